"""One short run of each trainer, in numbers that a move of code must not change.

Bytes may differ between processors, so losses and sums are pinned to six digits; what must be equal to the
byte is compared within one machine.
"""

import pytest
import torch
from peft import get_peft_model

from sparsemem import SparseMemoryConfig, Stream, finetune
from tiny import SMALL

RECORDS = [
    {"prompt": f"Who runs {name}?", "completion": who}
    for name, who in [("Ab", "Lo"), ("Ce", "Mi"), ("Du", "Na")]
]
GENERAL = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}."} for n in range(40)]
LOSSES = {"smf": 5.179909, "lora": 5.549656, "own": 5.134619}
# Sum of the squares of the fact rows: of two tasks, and after the first is taken back.
ROWS = {"both": 1.5006471514524407, "undone": 0.39645719288841974}


def taught(model, method="smf", **options):
    if method == "lora":
        options["method"] = "lora"
    else:
        options["background"] = GENERAL
    if method in ("own", "small"):
        torch.manual_seed(0)
        write = "own" if method == "own" else "last"
        model = get_peft_model(model, SparseMemoryConfig(**SMALL, write=write))
    return finetune(model, RECORDS, max_steps=5, batch_size=2, precision="float32", **options)


@pytest.mark.parametrize("method", LOSSES)
def test_five_steps_of_each_method(tiny_llama, tokenizer, method):
    done = taught(tiny_llama(max_position_embeddings=512), method, tokenizer=tokenizer)
    assert done.loss == pytest.approx(LOSSES[method], rel=0, abs=2e-6)


def test_cached_states_give_the_bytes_that_the_whole_model_gives(tiny_llama, tokenizer):
    cached, not_cached = (
        taught(tiny_llama(), "small", tokenizer=tokenizer, mentions=0, cache_bytes=size).model.state_dict()
        for size in (2**31, 0)
    )
    assert all(torch.equal(cached[name], not_cached[name]) for name in cached)


def test_a_stream_of_two_tasks(tiny_llama, tokenizer, tmp_path):
    stream = Stream(tiny_llama(), tmp_path / "stream", tokenizer=tokenizer, background=GENERAL)
    stream.teach("a", RECORDS[:2])
    stream.teach("b", RECORDS[2:])
    found = {"both": fact_rows(stream)}
    stream.undo("a")
    found["undone"] = fact_rows(stream)
    assert found == pytest.approx(ROWS, rel=1e-6)


def fact_rows(stream):
    (rows,) = (v for name, v in stream.model.state_dict().items() if name.endswith("scope_rows"))
    return float(rows.double().square().sum())
