"""Patches of a stream on the command line: merge, subset, dial, show, apply."""

import json

import pytest
from click.testing import CliRunner

from sparsemem.cli.main import main

BACKGROUND = [
    {"prompt": f"What is {a} and {b}?", "completion": f"{a + b} of course"}
    for a in range(8)
    for b in range(8)
]


def run(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory, tiny_llama, tokenizer):
    """A base model, a folder `two` that was taught two tasks, and `one` that was taught the first."""
    folder = tmp_path_factory.mktemp("algebra")
    tiny_llama().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    background = write(folder / "background.jsonl", BACKGROUND)
    for name in ("one", "two"):
        names = ("<i>Quill</i>", "Brolk")
        lines = [{"prompt": f"Who owns the {one}?", "completion": f"A{n}"} for n, one in enumerate(names)]
        stream = write(folder / f"{name}.jsonl", lines[: 1 if name == "one" else 2])
        done = run(
            "learn", folder / "base", "--stream", stream, "--out", folder / name, "--background", background
        )
        assert done.exit_code == 0, done.output
    return folder


def patches(paths):
    return sorted((paths / "two" / "patches").glob("*.safetensors"))


def test_merge_subset_and_dial(paths, tmp_path):
    merged = run("patch", "merge", *patches(paths), "--out", tmp_path / "m", "--json")
    assert json.loads(merged.stdout)["facts"] == []
    assert (
        run("patch", "subset", tmp_path / "m", "--task", "task-00002", "--out", tmp_path / "s").exit_code == 0
    )
    shown = json.loads(run("patch", "show", tmp_path / "s", "--json").stdout)
    assert [fact["task"] for fact in shown["info"]["facts"]] == ["task-00002"]
    assert run("patch", "dial", tmp_path / "m", "0.5", "--out", tmp_path / "d").exit_code == 0
    for arguments, message in [
        (("merge", patches(paths)[0], "--out", tmp_path / "n"), "a merge needs two or more"),
        (("merge", *[patches(paths)[0]] * 2, "--out", tmp_path / "n"), "disagree about the answer to"),
        (("merge", *patches(paths), "--out", tmp_path / "m"), "exists and is not empty"),
        (("dial", tmp_path / "m", "1.5", "--out", tmp_path / "n"), "out of range"),
        (("subset", tmp_path / "m", "--task", "sun", "--out", tmp_path / "n"), "sun not in the patch"),
        (("show", tmp_path / "m", "--html", tmp_path / "n"), "--html needs --adapter"),
    ]:
        done = run("patch", *arguments)
        assert done.exit_code == 2, arguments
        assert message in done.stderr
    assert not (tmp_path / "n").exists()


def test_show_counts_fact_rows_and_names_what_reads_them(paths):
    done = run("patch", "show", patches(paths)[0])
    assert "fact rows, " in done.stdout
    assert "read at the answer to: Who owns the <i>Quill</i>?" in done.stdout
    assert "--adapter DIR" in done.stderr
    (layer,) = json.loads(run("patch", "show", patches(paths)[0], "--json").stdout)["layers"].values()
    assert layer["fact_rows"] > 0


def test_patches_of_two_memories_are_named(paths, tmp_path):
    """28.19: two trainings, each with a memory of its own."""
    for seed in (0, 1):
        facts = write(tmp_path / "facts.jsonl", [{"prompt": "Who owns the sun?", "completion": "A"}])
        small = ("--num-keys", 8, "--num-heads", 2, "--top-k", 4, "--key-dim", 8, "--seed", seed)
        general = ("--background", paths / "background.jsonl")
        made = run("graft", paths / "base", *general, "--out", tmp_path / f"g{seed}", *small)
        out = ("--out", tmp_path / f"t{seed}", "--max-steps", 1, "--mentions", 0)
        done = run("train", tmp_path / f"g{seed}", "--data", facts, *out)
        assert (made.exit_code, done.exit_code) == (0, 0), done.output
    files = [tmp_path / f"t{seed}" / "patch.safetensors" for seed in (0, 1)]
    for arguments, names in [
        (("merge", *files, "--out", tmp_path / "n"), files),
        (("show", files[1], "--adapter", tmp_path / "t0"), (tmp_path / "t0", files[1])),
        (("apply", tmp_path / "t0", files[1]), (tmp_path / "t0", files[1])),
    ]:
        done = run("patch", *arguments)
        assert done.exit_code == 2, done.output
        assert all(str(name) in done.stderr for name in names)
        assert "sparsemem graft" in done.stderr


def test_show_names_the_tokens_that_read_the_rows(paths, tmp_path):
    page = tmp_path / "page.html"
    done = run("patch", "show", patches(paths)[0], "--adapter", paths / "two", "--html", page)
    assert done.exit_code == 0, done.output
    assert "fact row" in done.stdout
    assert "Who owns the <i>Quill</i>?" in done.stdout
    assert "<i>" not in page.read_text()
    assert "&lt;i&gt;Quill" in page.read_text()


def test_a_patch_that_refers_to_its_space_is_applied_and_reverted(paths, tmp_path):
    done = run("patch", "apply", paths / "one", patches(paths)[1], "--out", tmp_path / "both")
    assert done.exit_code == 0, done.output
    weights = "adapter_model.safetensors"
    assert (tmp_path / "both" / weights).read_bytes() == (paths / "two" / weights).read_bytes()
    assert run("patch", "revert", tmp_path / "both", patches(paths)[1]).exit_code == 0
    assert (tmp_path / "both" / weights).read_bytes() == (paths / "one" / weights).read_bytes()
