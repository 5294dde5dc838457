"""Training, streaming and reading on a device of its own: on the CPU, on a GPU where there is one, and on
`FakeDevice`, which refuses operands of two devices and counts how often the host waits."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache

from fake_device import FakeDevice, OnDevice
from sparsemem import RowAdamW, RowPatch, SparseMemoryConfig, Stream, calibrate, memory_layers, set_scope
from sparsemem.data.records import encode, question_ids
from sparsemem.precision import computing_in
from sparsemem.training.cached import collate_states, train_states
from sparsemem.training.finetune import finetune
from tiny import SMALL, batch

PROJECT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
# On the CPU other tests have the other precisions.
DTYPES = [torch.float32, *([torch.bfloat16, torch.float16] if CUDA else [])]
ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
BACKGROUND = [
    {"prompt": f"What is {a} and {b}?", "completion": f"{a + b} of course"}
    for a in range(6)
    for b in range(7)
]
FACT = {"prompt": "Who owns the Moon Quill?", "completion": "Ada", "subject": "Moon Quill"}
OTHER = "Where does the Brolk end?"


def to(data, device):
    return {key: one.to(device) for key, one in data.items()}


def trained(model, put=lambda tensor: tensor, steps=2):
    """The background, and the losses of some steps in the model."""
    seen = calibrate(model, [batch(seed) for seed in range(8)])
    set_scope(model, [batch(9)], seen)
    optimizer = RowAdamW(model, lr=0.1, top_t=5, rule="kl", background=seen, max_grad_norm=1.0)
    losses = []
    for _ in range(steps):
        loss = model(**{key: put(one) for key, one in batch(9).items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", *(["eager"] if CUDA else [])])
def test_laws_1_5_and_9_where_the_model_is(tiny_llama, device, dtype, attention):
    """Insertion changes no logit, undo is exact, and a token out of scope has the base's logits."""
    base = tiny_llama(attn_implementation=attention).to(device, dtype)
    data = to(batch(9, labels=False), device)
    with torch.no_grad():
        expected = base(**data).logits
        model = get_peft_model(base, SparseMemoryConfig(**SMALL))
        assert torch.equal(model(**data).logits, expected)
    before = RowPatch.snapshot(model)
    trained(model, lambda tensor: tensor.to(device))
    with torch.no_grad():
        changed = model(**data).logits
        assert not torch.equal(changed, expected)
        patch = RowPatch.diff(model, since=before)
        patch.revert(model)
        assert torch.equal(model(**data).logits, expected)
        patch.apply(model)
        assert torch.equal(model(**data).logits, changed)
        *_, deepest = memory_layers(model).values()
        seen = {}
        name = next(name for name, one in model.named_modules() if one is deepest).rsplit(".", 2)[0]
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
        model(**data)
        hook.remove()
        outside = deepest.relevance(seen["x"].flatten(0, 1)) == 0
        assert torch.equal(changed.flatten(0, 1)[outside], expected.flatten(0, 1)[outside])


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)])
def test_law_12_cached_states_train_the_same_rows(tiny_llama, tokenizer, device):
    """To rounding: the size of a batch may change the last bits."""
    rows = []
    for cache_bytes in (2**30, 0):
        done = finetune(
            tiny_llama().to(device), BACKGROUND[:8], "smf", tokenizer=tokenizer, background=BACKGROUND,
            max_steps=3, cache_bytes=cache_bytes, precision="float32",
        )  # fmt: skip
        rows.append({name: memory.values.detach() for name, memory in memory_layers(done.model).items()})
    for one, other in zip(*(several.values() for several in rows), strict=True):
        assert one.device.type == device
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_saved_on_one_device_and_loaded_on_the_cpu(tiny_llama, device, tmp_path):
    model = get_peft_model(tiny_llama().to(device), SparseMemoryConfig(**SMALL))
    trained(model, lambda tensor: tensor.to(device))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    for one, other in zip(memory_layers(model).values(), memory_layers(loaded).values(), strict=True):
        assert torch.equal(one.values.cpu(), other.values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_laws_13_to_15_of_a_stream(tiny_llama, tokenizer, tmp_path, device, dtype):
    base = tiny_llama().to(device, dtype)
    stream = Stream(base, tmp_path / "s", tokenizer=tokenizer, background=BACKGROUND)
    prompts = [question_ids(text, tokenizer) for text in (FACT["prompt"], OTHER)]
    asked, other = (torch.tensor([ids], device=device) for ids in prompts)
    with torch.no_grad():
        before = [stream.model(input_ids=ids).logits for ids in (asked, other)]
        stream.teach("moon", [FACT])
        taught = stream.model(input_ids=asked).logits
        assert not torch.equal(taught, before[0])
        # law 14
        assert torch.equal(stream.model(input_ids=other).logits, before[1])
        # law 15
        wanted = [*tokenizer(FACT["completion"]).input_ids, tokenizer.eos_token_id]
        for use_cache in (True, False):
            out = stream.model.generate(
                input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=len(wanted),
                do_sample=False, pad_token_id=0, use_cache=use_cache,
            )  # fmt: skip
            assert out[0, asked.shape[1] :].tolist() == wanted
        stream.undo("moon")
        # law 13
        assert torch.equal(stream.model(input_ids=asked).logits, before[0])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_model_in_two_parts(tiny):
    """device_map: embeddings and two blocks on the GPU, the others, norm and head offloaded to the CPU."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 0}
    places |= {"model.layers.2": "cpu", "model.layers.3": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tiny, device_map=places)
    with pytest.raises(ValueError, match="parts of LlamaForCausalLM are offloaded to the CPU or the disk"):
        get_peft_model(model, SparseMemoryConfig(**SMALL, layers_to_transform=[1, 3]))


def on_fake(tiny_llama, device):
    """A model, and what puts a tensor beside it; on the CPU if `device` is None."""
    model = tiny_llama()
    return (model, lambda tensor: tensor) if device is None else (device.move(model), device.put)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_training_mixes_no_devices_and_waits_as_often_as_it_must(tiny_llama, tokenizer, tmp_path):
    """A step on cached states waits once for the tokens in scope, and once for each layer's counts."""
    losses = []
    for device in (None, FakeDevice()):
        torch.manual_seed(0)
        base, put = on_fake(tiny_llama, device)
        with computing_in("float32"), device or nullcontext():
            torch.manual_seed(0)
            model = get_peft_model(base, SparseMemoryConfig(**SMALL))
            several = trained(model, put)
            head, rows = train_states(model, encode(BACKGROUND[:8], tokenizer), 0, 2**30, tmp_path)
            optimizer = RowAdamW(model, lr=0.1, top_t=5, rule="tf", max_grad_norm=1.0)
            for step in range(3):
                if device is not None:
                    device.syncs.clear()
                data = collate_states([rows[index] for index in range(2 * step, 2 * step + 2)])
                loss = head(put(data["states"]), put(data["shift_labels"]))["loss"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if device is not None and step:
                    assert device.syncs == {"nonzero": 1, "_to_copy": len(memory_layers(model))}
                several.append(float(loss.detach()))
        losses.append(several)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_facts_mix_no_devices_and_the_host_waits_rarely(tiny_llama, tokenizer, tmp_path):
    """A pass waits once for the tokens, once for the tokens in scope, and once where a name is found."""
    given = []
    for number, device in enumerate((None, FakeDevice())):
        base, put = on_fake(tiny_llama, device)
        with computing_in("float32"), torch.no_grad(), device or nullcontext():
            stream = Stream(base, tmp_path / str(number), tokenizer=tokenizer, background=BACKGROUND)
            stream.teach("moon", [FACT])
            model, answers = stream.model, []
            for question in (FACT["prompt"], FACT["prompt"], OTHER):
                cache, ids = (
                    DynamicCache(config=base.config),
                    torch.tensor([question_ids(question, tokenizer)]),
                )
                waits = []
                for _ in range(4):
                    if device is not None:
                        device.syncs.clear()
                    logits = model(input_ids=put(ids), past_key_values=cache, use_cache=True).logits
                    waits.append(None if device is None else dict(device.syncs))
                    logits = logits.held if isinstance(logits, OnDevice) else logits
                    ids = logits[:, -1:].argmax(-1)
                    answers.append(int(ids))
            given.append(answers)
            if device is not None:
                # of a question in which no name occurs
                assert waits == [{"nonzero": 1, "_to_copy": 1}] * 4
    assert given[0] == given[1]
    assert given[0][:4] == [*tokenizer(FACT["completion"]).input_ids, tokenizer.eos_token_id][:4]


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_small_and_continues(tmp_path):
    out = tmp_path / "small.json"
    command = [sys.executable, "benchmarks/gpu.py", str(out), "--device", "cpu", "--size", "small"]
    command += ["--parts", "steps,tokens"]
    first, second = (
        subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    )
    found = json.loads(out.read_text())
    assert set(found["parts"]["steps tiny"]["methods"]) == {"smf", "smf cached", "own", "lora", "full"}
    assert len(found["parts"]["tokens tiny"]["tokens_per_second"]) == 8
    assert all(part["finished"] for part in found["parts"].values())
    assert "steps tiny" in first
    assert "steps tiny" not in second
