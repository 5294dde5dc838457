"""What reads a patch's rows, found and shown."""

import pytest
import torch

from sparsemem import RowPatch, Stream
from sparsemem.patches.space import load_spaces
from sparsemem.saved.showing import page_of, row_readers, text_of

BACKGROUND = [
    {"prompt": f"What is {a} and {b}?", "completion": f"{a + b} of course"}
    for a in range(8)
    for b in range(8)
]


@pytest.fixture(scope="module")
def taught(tiny_llama, tokenizer, tmp_path_factory):
    stream = Stream(
        tiny_llama(), tmp_path_factory.mktemp("r") / "s", tokenizer=tokenizer, background=BACKGROUND
    )
    entry = stream.teach("quill", [{"prompt": "Who owns the <b>Quill</b>?", "completion": "Ada"}])
    patch = RowPatch.load(stream.folder / entry["patch"])
    spaces, _ = load_spaces(stream.folder / "space.safetensors")
    return stream, patch, spaces


def test_the_answer_start_s_row_is_read_by_the_end_of_its_question(taught):
    stream, patch, spaces = taught
    texts = ["Nothing about it."]
    rows = row_readers(stream.model, stream.tokenizer, patch, texts, spaces=spaces)
    first = next(row for row in rows if row.row == 0)
    assert first.own
    assert first.fact == "Who owns the <b>Quill</b>?"
    assert first.readers[0].weight == 1
    assert first.readers[0].before.endswith("ssistant")
    # the patch need not be in the model
    stream.undo("quill")
    assert row_readers(stream.model, stream.tokenizer, patch, texts, spaces=spaces) == rows
    changes = [row.change for row in rows]
    assert changes == sorted(changes, reverse=True)
    assert torch.isfinite(torch.tensor(changes)).all()


def test_the_page_shows_texts_as_data(taught):
    stream, patch, spaces = taught
    rows = row_readers(stream.model, stream.tokenizer, patch, spaces=spaces)
    described = {"layers": {"l": {"rows": 0, "centres": 4}}}
    page = page_of("<script>alert(1)</script>", described, rows)
    assert "<script>" not in page
    assert "<b>Quill" not in page
    assert "&lt;b&gt;Quill" in page
    assert "<b>Quill</b>" in text_of(rows)
