import contextlib
import re
from pathlib import Path

import pytest
import torch

import sparsemem
from sparsemem import precision
from sparsemem.precision import autocast, computing_in, precision_of


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request, monkeypatch):
    monkeypatch.setattr(precision, "fast_bf16", lambda device: request.param)
    return request.param


def product(model, **options):
    """The dtype that a product of float32 numbers has within `autocast`."""
    one = torch.ones(2, 2)
    with autocast(model, **options):
        return str((one @ one).dtype).removeprefix("torch.")


def test_automatic_is_bfloat16_where_it_is_faster(tiny_llama, fast):
    model = tiny_llama()
    assert product(model) == precision_of(model) == ("bfloat16" if fast else "float32")
    half = model.bfloat16()
    assert isinstance(autocast(half), contextlib.nullcontext)
    assert precision_of(half) == "bfloat16"
    assert precision_of(half.half()) == "float16"


@pytest.mark.parametrize("name", precision.PRECISIONS)
def test_what_is_asked_for_is_used(tiny_llama, fast, name):
    model = tiny_llama()
    with torch.autocast("cpu", torch.bfloat16):
        assert product(model, precision=name) == precision_of(model, name) == name
    with computing_in(name):
        assert product(model) == precision_of(model) == name
        assert product(model, precision="float32") == "float32"
        with computing_in(None):
            assert product(model) == name
    assert product(model) == ("bfloat16" if fast else "float32")


def test_words_and_weights_that_do_not_fit_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="precision='fp8' must be one of 'float32', 'bfloat16'"):
        precision_of(tiny_llama(), "fp8")
    with pytest.raises(ValueError, match="precision='fp8'"), computing_in("fp8"):
        pass
    with pytest.raises(ValueError, match="the weights are bfloat16; give precision=None"):
        autocast(tiny_llama().bfloat16(), "float32")


def test_no_float64_is_made_on_a_device():
    """Apple's have none. What these rooms count and fit lies on the CPU; `selection` meets a fake device."""
    on_the_cpu = {"selection", "background", "calibration", "fitting", "question_key"}
    for path in Path(sparsemem.__file__).parent.rglob("*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"float64|\.double\(\)", line) and path.stem not in on_the_cpu:
                safe = ".cpu().double()" in line or "torch.tensor(" in line or "torch.cat([score" in line
                assert safe, f"{path.name}:{number}: {line.strip()}"
