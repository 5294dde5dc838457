"""Folders of `sparsemem learn`: SIGKILL, a full disk, altered files, and what the command line says."""

import json
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from sparsemem.artifacts import load_artifact
from sparsemem.cli.main import main
from sparsemem.stream.folder import status, verify
from sparsemem.stream.ledger import Ledger
from started import sparsemem_with

BACKGROUND = [
    {"prompt": f"What is {a} and {b}?", "completion": f"{a + b} of course"}
    for a in range(8)
    for b in range(8)
]
NUM_TASKS = 6


@pytest.fixture(scope="module")
def paths(tmp_path_factory, tiny_llama, tokenizer):
    folder = tmp_path_factory.mktemp("learn")
    tiny_llama().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lines = [
        {"task": f"t{n}", "prompt": f"Who owns the Quill {n}?", "completion": f"A{n}"}
        for n in range(NUM_TASKS)
    ]
    write(folder / "stream.jsonl", lines)
    write(folder / "background.jsonl", BACKGROUND)
    return folder


@pytest.fixture(scope="module")
def whole(paths):
    """A folder that was taught without an interruption."""
    done = learn(paths, paths / "whole")
    assert done.exit_code == 0, done.output
    return paths / "whole"


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def arguments(paths, out, *more, stream="stream.jsonl"):
    model, stream = str(paths / "base"), str(paths / stream)
    background = () if "--resume" in more and (Path(out) / "ledger.jsonl").exists() else (
        "--background", str(paths / "background.jsonl"))  # fmt: skip
    return ["learn", model, "--stream", stream, "--out", str(out), *background, *more]


def learn(paths, out, *more, stream="stream.jsonl"):
    return CliRunner().invoke(main, arguments(paths, out, *more, stream=stream))


def run(*more):
    return CliRunner().invoke(main, ["learn", *map(str, more)])


def parts(folder):
    """What a folder holds of its tasks: the weights' bytes, and each patch's header with all digests."""
    # safetensors writes the two keys of the metadata in any order, so a patch's own bytes may differ
    patches = sorted((folder / "patches").glob("*.safetensors"))
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return [weights, *(load_artifact(file, "row patch")[1] for file in patches)]


@pytest.mark.parametrize("after", [0, 3])
def test_a_killed_process_leaves_a_folder_that_resumes(paths, whole, tmp_path, after):
    out = tmp_path / "killed"
    with sparsemem_with(*arguments(paths, out)) as process:
        # a line of progress says that a task is on the disk; the kill hits what comes after it
        while f"t{after}:" not in process.stderr:
            assert process.poll() is None, process.stderr
            time.sleep(0.001)
    assert process.returncode == -signal.SIGKILL
    held = status(out)["tasks"]
    assert after < len(held) <= NUM_TASKS
    done = learn(paths, out, "--resume", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["skipped"] == len(held)
    assert parts(out) == parts(whole)
    assert verify(out)["ok"]


def test_status_undo_and_verify_need_no_model(paths, whole, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    shown = run("--status", "--out", out)
    assert shown.exit_code == 0
    assert f"tasks: {NUM_TASKS}" in shown.stdout
    assert "t2 (Who owns the Quill 2?): records: 1" in shown.stdout
    undone = run("--undo", "t3", "--out", out)
    assert undone.exit_code == 0, undone.output
    assert "took back t3 (Who owns the Quill 3?)" in undone.stdout
    assert "t3: taken back" in run("--status", "--out", out).stdout
    assert run("--verify", "--out", out).exit_code == 0
    # a stream that is continued does not teach it again
    assert json.loads(learn(paths, out, "--resume", "--json").stdout)["taught"] == 0


def test_the_words_do_what_the_options_do(paths, whole, tmp_path):
    for name in ("old", "new"):
        shutil.copytree(whole, tmp_path / name)
    stream = ("--stream", paths / "stream.jsonl", "--resume")
    pairs = [
        (("--status", "--json", "--out"), ("status", "--json")),
        (("--undo", "t3", "--out"), ("undo",)),
        (("--verify", "--out"), ("verify",)),
        (stream, ("teach", *stream)),
    ]
    for old, new in pairs:
        first = run(*old, tmp_path / "old")
        second = run(*new, tmp_path / "new", *(["t3"] if new == ("undo",) else []))
        assert (first.exit_code, second.exit_code) == (0, 0), second.output
        hide = str(tmp_path / "new"), str(tmp_path / "old")
        assert second.stdout.replace(*hide).split(" (")[0] == first.stdout.split(" (")[0]
    assert parts(tmp_path / "old") == parts(tmp_path / "new")
    assert "teach" in CliRunner().invoke(main, ["learn", "--help"]).stdout


def test_another_file_is_added_and_its_tasks_are_not_taught_twice(paths, tmp_path):
    def plain(name, words):
        write(paths / name, [{"prompt": f"Who owns the {w}?", "completion": f"B{w}"} for w in words])
        return paths / name

    out = tmp_path / "s"
    assert learn(paths, out, stream=plain("first.jsonl", ["moon", "sun"]).name).exit_code == 0
    more = plain("more.jsonl", ["sun", "star"])
    refused = run(out, "--stream", more, "--resume")
    assert refused.exit_code == 2
    assert "teach the file with --add" in refused.stderr
    added = json.loads(run(out, "--add", more, "--json").stdout)
    assert (added["taught"], added["skipped"], added["tasks"]) == (1, 1, 3)
    assert [one["question"] for one in status(out)["tasks"]] == [
        f"Who owns the {word}?" for word in ("moon", "sun", "star")
    ]
    assert json.loads(run(out, "--add", more, "--json").stdout)["taught"] == 0
    assert run("undo", out, "task-00001").exit_code == 0
    # what was taken back is taught again when it is added, under a new name
    assert json.loads(run(out, "--add", paths / "first.jsonl", "--json").stdout)["taught"] == 1
    assert verify(out)["ok"]


def test_undo_on_the_command_line_is_exact(paths, whole, tmp_path):
    lines = (paths / "stream.jsonl").read_text().splitlines(keepends=True)
    (paths / "others.jsonl").write_text("".join(lines[:2] + lines[3:]))
    assert learn(paths, tmp_path / "others", stream="others.jsonl").exit_code == 0
    shutil.copytree(whole, tmp_path / "every")
    assert run("--undo", "t2", "--out", tmp_path / "every").exit_code == 0
    assert parts(tmp_path / "every")[0] == parts(tmp_path / "others")[0]


def test_a_newer_fact_is_named_when_it_is_taken_back(paths, tmp_path):
    asked = {"prompt": "Who owns the Quill?"}
    write(
        paths / "twice.jsonl",
        [{"task": "old", "completion": "A", **asked}, {"task": "new", "completion": "B", **asked}],
    )
    taught = learn(paths, tmp_path / "s", stream="twice.jsonl")
    assert taught.exit_code == 0
    assert "replaced an earlier answer to: Who owns the Quill?" in taught.stderr
    assert (
        "answers again as it was taught before: Who owns the Quill?"
        in run("--undo", "new", "--out", tmp_path / "s").stdout
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2: not valid JSON"),
        ('{"prompt": "a"}\n', "line 1: record with prompt"),
        (
            '{"task": "x", "text": "a b"}\n{"task": "y", "text": "a b"}\n{"task": "x", "text": "a b"}\n',
            "the task 'x' was there before",
        ),
        ('{"task": "x", "text": "a b"}\n{"text": "a b"}\n', "record 2: task=None must be a name"),
    ],
)
def test_a_bad_stream_is_one_sentence_and_makes_no_folder(paths, tmp_path, lines, message):
    (paths / "bad.jsonl").write_text(lines)
    done = learn(paths, tmp_path / "bad", stream="bad.jsonl")
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "bad").exists()


def test_what_is_taught_cannot_be_taught_otherwise_or_over(paths, whole):
    before = parts(whole)
    assert "add --resume" in learn(paths, whole).stderr
    write(paths / "other.jsonl", [{"task": "t1", "prompt": "Who owns the Quill 1?", "completion": "Z"}])
    done = learn(paths, whole, "--resume", stream="other.jsonl")
    assert done.exit_code == 2
    assert "task 't1' was taught from other records before" in done.stderr
    unknown = run("--undo", "sun", "--out", whole)
    assert unknown.exit_code == 2
    assert "task 'sun' is not taught; the last ones that are: t1 (Who owns the Quill 1?)" in unknown.stderr
    assert run("--status", "--verify", "--out", whole).exit_code == 2
    assert parts(whole) == before


@pytest.mark.parametrize(
    "name", ["ledger.jsonl", "patches/000002.safetensors", "space.safetensors", "adapter_model.safetensors"]
)
def test_verify_finds_what_was_altered(whole, tmp_path, name):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    content = bytearray((out / name).read_bytes())
    content[-20] ^= 1
    (out / name).write_bytes(content)
    found = run("--verify", "--out", out)
    assert found.exit_code == 2, found.output
    assert name.split("/")[-1] in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_a_full_disk_is_one_sentence_and_loses_nothing(paths, whole, tmp_path, monkeypatch):
    out, append = tmp_path / "full", Ledger.append
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self, entry):
        if len(self.entries) == 3:
            # from here on no file may grow: what a full disk does, by the system itself
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._size + 10, limits[1]))
        return append(self, entry)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", full)
        try:
            done = learn(paths, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.exit_code == 2, done.stderr
    assert "what was taught before is safe" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert [task["task"] for task in status(out)["tasks"]] == ["t0", "t1"]
    assert learn(paths, out, "--resume").exit_code == 0
    assert parts(out) == parts(whole)


def test_the_card_says_what_was_taught_how_to_take_it_back_and_the_versions(paths, whole):
    push = ["push", str(whole), "acme/quills", "--dry-run", "--json"]
    shown = json.loads(CliRunner().invoke(main, push).stdout)
    card = shown["card"]
    assert f"{NUM_TASKS} tasks with {NUM_TASKS} records" in card
    assert "sparsemem learn undo FOLDER TASK" in card
    assert "eval ... --task neighbours --record" in card
    assert "Not recorded" not in card
    assert "| python |" in card
    # what was taught is said only where the author wants it
    assert "Quill" not in card
    assert str(paths) not in card
    assert not {"ledger.jsonl", "patches", "space.safetensors"} & set(shown["files"])
    named = json.loads(CliRunner().invoke(main, [*push, "--name-tasks"]).stdout)["card"]
    assert "- t3: Who owns the Quill 3?" in named
    assert '"Who owns the Quill 0?"' in named
