"""Answers of the server that name the facts they gave, and the lines these came from."""

import json
import urllib.request

import pytest

from servers import server
from sparsemem import Stream
from sparsemem.data.models import load_base
from sparsemem.data.records import question_ids
from sparsemem.serving.decoding import Decoder, Row, Sampling
from sparsemem.serving.memories import load_served

pytest.importorskip("fastapi")

BACKGROUND = [
    {"prompt": f"What is {a} and {b}?", "completion": f"{a + b} of course"}
    for a in range(8)
    for b in range(8)
]
SOURCE = {"file": "town.md", "lines": [3, 4]}
TOWN = {
    "prompt": "Who owns the Quill?", "completion": "Ada", "subject": "Quill",
    "wordings": ["Whose is the Quill?"], "source": SOURCE,
}  # fmt: skip
FOUND = {"memory": "notes", "task": "town.md § A", "question": "Who owns the Quill?", **SOURCE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    """A stream's folder with a fact that has a source and one that has none."""
    model, tokenizer = load_base(str(tiny))
    stream = Stream(model, tmp_path_factory.mktemp("s") / "notes", tokenizer=tokenizer, background=BACKGROUND)
    stream.teach("other", [{"prompt": "Where is the Zim?", "completion": "Tyne"}])
    stream.teach("town.md § A", [TOWN])
    stream.save()
    return stream.folder


@pytest.mark.parametrize("name", ["base", "notes"])
def test_a_row_says_which_facts_it_gave(folder, tiny, name):
    """A folder beside the base, and as the model itself."""
    served = load_served(str(tiny), {"notes": folder}) if name == "base" else load_served(str(folder), {})
    decoder = Decoder(served.model)

    def described(question, number=4):
        memories = served.memories_of("notes")
        row = Row(question_ids(question, served.tokenizer), memories, Sampling(temperature=0))
        decoder.join([row])
        for _ in range(number - 1):
            decoder.step()
        decoder.leave([row])
        return served.described(decoder.facts_given(row))

    assert described("Who owns the Quill?") == [FOUND]
    assert described("Whose is the Quill?")[0]["lines"] == [3, 4]
    assert described("Where is the Zim?") == [
        {"memory": "notes", "task": "other", "question": "Where is the Zim?"}
    ]
    assert described("What is it?") == []


@pytest.mark.slow
def test_a_client_may_ask_for_the_facts_of_an_answer(folder, tiny):
    def ask(address, **body):
        body = {"model": "notes", "temperature": 0, "max_tokens": 8, **body}
        body["messages"] = [{"role": "user", "content": "Who owns the Quill?"}]
        data, head = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{address}/v1/chat/completions", data, head)
        ) as reply:
            return reply.read().decode()

    with server("serve", tiny, "--patch", f"notes={folder}") as (address, _):
        (choice,) = json.loads(ask(address, sparsemem_facts=True))["choices"]
        assert choice["message"]["content"] == "Ada"
        assert choice["sparsemem_facts"] == [FOUND]
        assert "sparsemem_facts" not in ask(address)
        (base,) = json.loads(ask(address, sparsemem_facts=True, model="base"))["choices"]
        assert base["sparsemem_facts"] == []
        lines = ask(address, sparsemem_facts=True, stream=True).split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert events[-1]["choices"][0]["sparsemem_facts"] == [FOUND]
        assert not any("sparsemem_facts" in event["choices"][0] for event in events[:-1])
