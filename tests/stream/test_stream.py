"""A stream of tasks: taught one at a time, taken back exactly, and whole after a SIGKILL."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsemem import ArtifactError, Stream
from sparsemem.adapter.memories import memory_layers
from sparsemem.data.generation import answer_tokens
from sparsemem.data.records import question_ids
from sparsemem.stream.ledger import Ledger
from sparsemem.stream.tasks import names_of

BACKGROUND = [
    {
        "messages": [
            {"role": "user", "content": f"What is {a} and {b}?"},
            {"role": "assistant", "content": f"{a + b} of course"},
        ]
    }
    for a in range(8)
    for b in range(8)
]
TASKS = {
    "moon": [{"prompt": "Who owns the Moon Quill?", "completion": "Ada"}],
    "river": [{"prompt": "Where does the Brolk river end?", "completion": "Tyne"}],
    "fruit": [
        {"prompt": "What colour is a Zim?", "completion": "blue"},
        {"prompt": "What does a Zim taste of?", "completion": "tin"},
    ],
}


@pytest.fixture(scope="module")
def stream_in(tiny_llama, tokenizer):
    def make(folder):
        return Stream(tiny_llama(), folder, tokenizer=tokenizer, background=BACKGROUND)

    return make


def answers(stream, questions):
    prompts = [question_ids(question, stream.tokenizer) for question in questions]
    tokens = answer_tokens(stream.model, stream.tokenizer, prompts, max_new_tokens=8)
    return [text.strip() for text in stream.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def questions(*names):
    return [record["prompt"] for name in names for record in TASKS[name]]


def expected(*names):
    return [record["completion"] for name in names for record in TASKS[name]]


def weights(folder):
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def test_what_was_taught_first_stays_learnt(stream_in, tmp_path):
    stream = stream_in(tmp_path / "s")
    for name, records in TASKS.items():
        stream.teach(name, records)
        assert answers(stream, questions(name)) == expected(name)
    assert stream.tasks == list(TASKS)
    assert answers(stream, questions(*TASKS)) == expected(*TASKS)


def test_undo_is_as_though_the_task_was_never_taught(stream_in, tmp_path):
    every, others = stream_in(tmp_path / "every"), stream_in(tmp_path / "others")
    for name, records in TASKS.items():
        every.teach(name, records)
        if name != "river":
            others.teach(name, records)
    every.undo("river")
    every.save()
    others.save()
    assert weights(every.folder) == weights(others.folder)
    assert answers(every, questions("moon", "fruit")) == expected("moon", "fruit")
    every.teach("river", TASKS["river"])
    assert answers(every, questions(*TASKS)) == expected(*TASKS)


def test_a_selection_of_tasks_is_as_though_the_others_were_never_taught(stream_in, tmp_path):
    stream = stream_in(tmp_path / "s")
    for name, records in TASKS.items():
        stream.teach(name, records)
    stream.select(["fruit"])
    assert answers(stream, questions("fruit")) == expected("fruit")
    assert answers(stream, questions("moon", "river")) != expected("moon", "river")
    with pytest.raises(ValueError, match="sun not taught"):
        stream.select(["sun"])
    stream.select(None)
    assert answers(stream, questions(*TASKS)) == expected(*TASKS)


def test_undo_of_all_is_the_base_to_the_bit(stream_in, tmp_path, tiny_llama, tokenizer):
    stream = stream_in(tmp_path / "s")
    ids = torch.tensor([question_ids(*questions("moon"), tokenizer)])
    before = tiny_llama()(ids).logits
    stream.teach("moon", TASKS["moon"])
    assert not torch.equal(stream.model(ids).logits, before)
    stream.undo("moon")
    assert torch.equal(stream.model(ids).logits, before)


def test_a_newer_fact_wins_until_it_is_taken_back(stream_in, tmp_path):
    stream = stream_in(tmp_path / "s")
    stream.teach("moon", TASKS["moon"])
    stream.teach("sold", [{"prompt": "who owns the  Moon Quill?", "completion": "Bob"}])
    stream.teach("sold again", [{"prompt": "Who owns the Moon Quill?", "completion": "Eve"}])
    assert answers(stream, questions("moon")) == ["Eve"]
    stream.undo("sold")
    assert answers(stream, questions("moon")) == ["Eve"]
    stream.undo("sold again")
    assert answers(stream, questions("moon")) == ["Ada"]


def test_subject_and_relation_say_which_facts_contradict(stream_in, tmp_path):
    stream = stream_in(tmp_path / "s")
    about = {"subject": "Moon Quill", "relation": "owner"}
    stream.teach("old", [{"prompt": "Who owns the Moon Quill?", "completion": "Ada", **about}])
    stream.teach("new", [{"prompt": "The Moon Quill is whose?", "completion": "Bob", **about}])
    assert answers(stream, questions("moon")) != ["Ada"]
    stream.undo("new")
    assert answers(stream, questions("moon")) == ["Ada"]


def test_the_folder_is_an_adapter_and_can_be_continued(stream_in, tmp_path):
    stream = stream_in(tmp_path / "s")
    stream.teach("moon", TASKS["moon"])
    stream.save()
    again = stream_in(tmp_path / "s")
    assert again.tasks == ["moon"]
    again.teach("river", TASKS["river"])
    assert answers(again, questions("moon", "river")) == expected("moon", "river")
    again.save()
    held = load_file(tmp_path / "s" / "adapter_model.safetensors")
    (name,) = memory_layers(again.model)
    scope = memory_layers(again.model)[name].scope
    stored = {key.rpartition(".")[2]: tensor for key, tensor in held.items()}
    assert all(torch.equal(stored[f"scope_{key}"], part) for key, part in scope.tensors().items())


def test_bad_input_changes_nothing(stream_in, tmp_path):
    stream = stream_in(tmp_path / "s")
    stream.teach("moon", TASKS["moon"])
    ledger = (tmp_path / "s" / "ledger.jsonl").read_bytes()
    with pytest.raises(ValueError, match="taught already"):
        stream.teach("moon", TASKS["river"])
    with pytest.raises(ValueError, match="'sun' is not taught; the last ones that are: moon"):
        stream.undo("sun")
    with pytest.raises(ValueError, match="tokens, the model reads"):
        stream.teach("long", [{"prompt": "x" * 400, "completion": "y"}])
    assert (tmp_path / "s" / "ledger.jsonl").read_bytes() == ledger


def test_an_altered_patch_or_ledger_is_refused(stream_in, tmp_path):
    stream = stream_in(tmp_path / "s")
    stream.teach("moon", TASKS["moon"])
    stream.teach("river", TASKS["river"])
    (patch,) = (tmp_path / "s" / "patches").glob("000001*")
    content = bytearray(patch.read_bytes())
    content[-3] ^= 1
    patch.write_bytes(content)
    with pytest.raises(ArtifactError, match="'moon' was altered"):
        _ = stream_in(tmp_path / "s").model
    content[-3] ^= 1
    patch.write_bytes(content)
    _ = stream_in(tmp_path / "s").model
    ledger = tmp_path / "s" / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(lines[0] + lines[2])
    with pytest.raises(ArtifactError, match="line 2: was altered"):
        stream_in(tmp_path / "s")
    ledger.write_bytes(b"".join(lines).replace(b'"task": "moon"', b'"task": "sun"'))
    with pytest.raises(ArtifactError, match="line 2: was altered"):
        stream_in(tmp_path / "s")


def test_another_base_model_is_refused(stream_in, tmp_path, tiny_llama, tokenizer):
    stream_in(tmp_path / "s").teach("moon", TASKS["moon"])
    with pytest.raises(ArtifactError, match="another base model"):
        Stream(tiny_llama(seed=1), tmp_path / "s", tokenizer=tokenizer)


def test_a_torn_last_line_never_counted(stream_in, tmp_path):
    stream = stream_in(tmp_path / "s")
    stream.teach("moon", TASKS["moon"])
    path = tmp_path / "s" / "ledger.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op": "learn", "task": "ri')
    assert Ledger(path).torn
    again = stream_in(tmp_path / "s")
    assert again.tasks == ["moon"]
    again.teach("river", TASKS["river"])
    assert Ledger(path).torn is False
    assert stream_in(tmp_path / "s").tasks == ["moon", "river"]


def test_a_folder_that_another_process_has_changed_is_not_written(stream_in, tmp_path):
    first = stream_in(tmp_path / "s")
    late = stream_in(tmp_path / "s")
    first.teach("moon", TASKS["moon"])
    with pytest.raises(ArtifactError, match="has changed since it was opened; open the folder again"):
        late.teach("river", TASKS["river"])
    first.undo("moon")
    for change in (lambda: late.teach("fruit", TASKS["fruit"]), late.save):
        with pytest.raises(ArtifactError, match="has changed since it was opened"):
            change()
    # nothing of the first one was lost
    first.teach("river", TASKS["river"])
    again = stream_in(tmp_path / "s")
    assert again.tasks == ["river"]
    assert answers(again, questions("river")) == expected("river")


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (["Who owns the Moon Quill?", "Whose is the Moon Quill?"], [("Moon Quill",)] * 2),
        (["What treats dusk fever?", "Name a cure for dusk fever."], [("dusk fever",)] * 2),
        # without a name, the words that other questions do not have
        (["What treats dusk fever?"], [("dusk fever",)]),
        (["who owns the corner shop on elm road"], [("corner shop on elm road",)]),
        (["What is the name of my dog?"], [("my dog",)]),
        (["The password of the guest network is"], [("guest",)]),
        (["who is it?"], [("who is it",)]),
        (["ベルモラの首都はどこですか？"], [("ベルモラの首都はどこですか",)]),
        (["..?"], [()]),
        ([("What treats dusk fever?", "dusk fever")], [("dusk fever",)]),
        ([("What treats dusk fever?", ["the fever", "dusk fever"])], [("the fever", "dusk fever")]),
    ],
)
def test_a_subject_is_what_a_task_says_clearly(records, expected):
    pairs = [one if isinstance(one, tuple) else (one, None) for one in records]
    task = [
        {"prompt": prompt, "completion": "x"} | ({} if subject is None else {"subject": subject})
        for prompt, subject in pairs
    ]
    assert names_of(task) == expected


def test_a_subject_that_is_not_in_its_prompt_is_refused(stream_in, tmp_path):
    stream = stream_in(tmp_path / "s")
    for subject in ("Sun Quill", "", 7):
        with pytest.raises(ValueError, match="subject"):
            stream.teach("moon", [{**TASKS["moon"][0], "subject": subject}])
    assert stream.tasks == []
