import copy
import json
import math
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

from sparsemem import RowAdamW, SparseMemoryConfig, calibrate, count_accesses, memory_layers, precision
from sparsemem.adapter.memories import gated_layers
from sparsemem.data.general import general_background
from sparsemem.data.records import batches, collate, encode
from sparsemem.evaluation import probes
from sparsemem.training import loading
from sparsemem.training.finetune import finetune

SLOW = pytest.mark.slow
LANDS = ["Velmora", "Karvessa", "Tolgaria", "Dunmarsh", "Quenlia"]
FACTS = [{"prompt": f"Capital of {land}?", "completion": land[::-1]} for land in LANDS * 2]
GENERAL = [f"{n} plain words, the square is {n * n}." for n in range(40)]
SIZES = {"num_keys": 8, "num_heads": 2, "key_dim": 8, "top_k": 4}
RATES = {"smf": 0.3, "smf-open": 0.3, "lora": 1e-2, "full": 1e-2}


@pytest.fixture
def teach(tiny_llama, tokenizer):
    """Finetune a fresh tiny model on five facts; ten examples, three steps an epoch."""

    def run(method, data=FACTS, **options):
        options = {"lr": RATES[method], "batch_size": 4, "tokenizer": tokenizer} | options
        model = tiny_llama()
        if method.startswith("smf"):
            model = get_peft_model(model, SparseMemoryConfig(**SIZES))
            options = {"background": GENERAL} | options
        return finetune(model, data, method, **options)

    return run


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "method", ["smf", *(pytest.param(m, marks=SLOW) for m in ("smf-open", "lora", "full"))]
)
def test_every_method_learns_and_reports(teach, tiny_llama, method, capsys):
    done = teach(method, max_steps=6)
    more = teach(method, max_steps=18)
    assert more.loss < done.loss
    assert (done.method, done.steps, done.truncated) == (method, 6, 0)
    assert done.seconds > 0
    assert done.trained_params == sum(p.numel() for p in done.model.parameters() if p.requires_grad) > 0
    assert not done.model.training
    assert done.model.config.use_cache
    assert (done.patch is not None) == method.startswith("smf")
    assert capsys.readouterr().out == ""


# Made on one thread with torch 2.13. A refactor must not change them; say so where a change is intended.
PINNED = {
    "last": [5.48578, 5.527461, 5.26068, 5.216106, 5.239945, 5.174465],
    "own": [5.48578, 5.527461, 5.317286, 5.256463, 5.297339, 5.220777],
}


@pytest.mark.parametrize("write", PINNED)
def test_six_steps_have_the_losses_they_always_had(tiny_llama, tokenizer, tmp_path, monkeypatch, write):
    monkeypatch.setattr(precision, "fast_bf16", lambda device: False)
    config = SparseMemoryConfig(**SIZES, layers_to_transform=[1, 2], write=write)
    finetune(
        get_peft_model(tiny_llama(), config), FACTS, tokenizer=tokenizer, background=GENERAL, lr=0.3,
        batch_size=4, max_steps=6, top_t=16, rule="tfidf", moments="row", schedule="constant",
        output_dir=tmp_path,
    )  # fmt: skip
    log = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses == pytest.approx(PINNED[write], rel=0, abs=1e-4)


def test_the_patch_is_what_the_run_did(teach, tiny_llama):
    done = teach("smf", max_steps=3, top_t=5)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert all(1 <= len(layer.slots) <= 15 for layer in done.patch.layers.values())
    done.patch.revert(done.model)
    assert not any(memory.values.any() or memory.has_scope for memory in memory_layers(done.model).values())
    assert torch.equal(done.model(ids).logits, tiny_llama()(ids).logits)


def test_rows_and_alpha_are_clipped_once_and_together(tiny_llama, tokenizer, tmp_path, monkeypatch):
    """After one step, the first moment of alpha's AdamW shows the gradient that alpha got."""
    monkeypatch.setattr(precision, "fast_bf16", lambda device: False)
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SIZES, trainable="values+scale"))
    for memory in memory_layers(model).values():
        torch.nn.init.normal_(memory.values, std=0.1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
    folder = tmp_path / "run"
    options = {"lr": 1e-9, "rest_lr": 1e-9, "max_steps": 1, "batch_size": 10, "top_t": 5, "rule": "tf"}
    options |= {"tokenizer": tokenizer}
    background = count_accesses(model, batches(encode(FACTS, tokenizer), 10, 0))
    twin = copy.deepcopy(model)
    finetune(model, FACTS, "smf-open", background=background, output_dir=folder, **options)

    optimizer = RowAdamW(twin, 1e-9, top_t=5, rule="tf")
    twin.train()
    twin(**collate(encode(FACTS, tokenizer), 0)).loss.backward()
    alphas = [memory.scale.grad.clone() for memory in memory_layers(twin).values()]
    optimizer.step()
    norm = optimizer.last_grad_norm
    together = float(torch.stack([norm, *(alpha.norm() for alpha in alphas)]).norm())
    assert together > 2
    (state,) = folder.glob("checkpoint-*/optimizer.pt")
    state = torch.load(state, weights_only=True)["state"]
    for index, alpha in enumerate(alphas, start=len(alphas) + 1):
        torch.testing.assert_close(state[index]["exp_avg"], 0.1 * alpha / together, rtol=1e-3, atol=0)
    logged = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert logged["grad_norm"] == pytest.approx(float(norm), rel=1e-3)


@pytest.mark.parametrize("method", ["smf", *(pytest.param(m, marks=SLOW) for m in ("lora", "full"))])
@pytest.mark.parametrize("stop", [pytest.param(2, marks=SLOW), 3])
def test_stopped_and_resumed_is_never_stopped(teach, tmp_path, method, stop):
    options = {"gradient_accumulation_steps": 2, "batch_size": 2}
    whole = teach(method, max_steps=8, **options)
    teach(method, max_steps=stop, output_dir=tmp_path, **options)
    resumed = teach(method, max_steps=8, output_dir=tmp_path, resume=True, **options)
    assert resumed.steps == whole.steps == 8
    assert same(state(resumed.model), state(whole.model))
    assert resumed.loss == whole.loss


@pytest.mark.parametrize("method", ["smf", "lora"])
def test_a_run_resumes_on_another_day_where_the_template_has_the_date(
    teach, tokenizer, tmp_path, monkeypatch, method
):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "Today is {{ strftime_now('%d %B') }}.\n" + tokenizer.chat_template

    def on(day, **options):
        now = SimpleNamespace(now=lambda: datetime(2026, 11, day))
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", now)
        return teach(method, output_dir=tmp_path, tokenizer=dated, **options)

    on(27, max_steps=3)
    assert dated.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith(
        "Today is 27 November."
    )
    assert on(28, max_steps=6, resume=True).steps == 6


@pytest.mark.slow
@pytest.mark.parametrize("method", ["smf", "lora", "full"])
def test_a_finished_run_is_not_trained_on(teach, tmp_path, method):
    """An epoch is three steps, so four and seven steps end within an epoch."""
    for last in (4, 6, 7):
        folder = tmp_path / str(last)
        whole = teach(method, max_steps=last, output_dir=folder)
        again = teach(method, max_steps=last, output_dir=folder, resume=True)
        assert (again.steps, again.loss) == (last, whole.loss)
        assert same(state(again.model), state(whole.model))


def test_a_finished_run_gets_a_validation_loss_later(teach, tmp_path):
    whole = teach("lora", max_steps=3, validation=FACTS[:2])
    teach("lora", max_steps=3, output_dir=tmp_path)
    again = teach("lora", max_steps=3, output_dir=tmp_path, resume=True, validation=FACTS[:2])
    assert again.validation_loss == whole.validation_loss


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["random", "kl"])
def test_resume_restores_what_the_selection_needs(teach, tmp_path, rule):
    options = {"rule": rule, "top_t": 4}
    whole = teach("smf-open", max_steps=6, **options)
    teach("smf-open", max_steps=4, output_dir=tmp_path, **options)
    resumed = teach("smf-open", max_steps=6, output_dir=tmp_path, resume=True, **options)
    assert same(state(resumed.model), state(whole.model))


@pytest.mark.slow
def test_a_killed_run_stops_at_the_same_loss(teach, tmp_path):
    target = (teach("full", max_steps=3).loss + teach("full", max_steps=15).loss) / 2
    whole = teach("full", epochs=5, stop_loss=target)
    assert 3 <= whole.steps < 15
    assert whole.loss < target
    for killed_at in (1, whole.steps - 1):
        folder = tmp_path / str(killed_at)
        teach("full", max_steps=killed_at, output_dir=folder)
        for _ in range(2):
            resumed = teach("full", epochs=5, stop_loss=target, output_dir=folder, resume=True)
            assert (resumed.steps, resumed.loss) == (whole.steps, whole.loss)
            assert same(state(resumed.model), state(whole.model))


@pytest.mark.slow
def test_a_resumed_run_counts_the_seconds_of_all_its_parts(teach, tmp_path):
    teach("lora", max_steps=3, output_dir=tmp_path)
    file = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(file.read_text())
    taken = state["stateful_callbacks"]["Stopwatch"]["attributes"]
    assert 0 < taken["seconds"] < 100
    taken["seconds"] += 1000
    file.write_text(json.dumps(state))
    assert 1000 < teach("lora", max_steps=5, output_dir=tmp_path, resume=True).seconds < 1200


@pytest.mark.slow
def test_an_unfinished_checkpoint_is_passed_over(teach, tmp_path, caplog):
    whole = teach("lora", max_steps=5)
    teach("lora", max_steps=3, output_dir=tmp_path)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4')
    resumed = teach("lora", max_steps=5, output_dir=tmp_path, resume=True)
    assert same(state(resumed.model), state(whole.model))
    fresh = teach("lora", max_steps=5, output_dir=tmp_path / "new", resume=True)
    assert same(state(fresh.model), state(whole.model))
    assert [one.message for one in caplog.records if one.name.startswith("sparsemem")] == [
        "incomplete: checkpoint-4; continuing from checkpoint-3"
    ]
    (tmp_path / "broken" / "checkpoint-4").mkdir(parents=True)
    fresh = teach("lora", max_steps=5, output_dir=tmp_path / "broken", resume=True)
    assert same(state(fresh.model), state(whole.model))
    assert "begins from the start" in caplog.text


@pytest.mark.slow
def test_seeds_decide_the_order_and_nothing_else_does(teach):
    torch.manual_seed(3)
    first = teach("full", max_steps=2)
    torch.manual_seed(4)
    assert same(state(teach("full", max_steps=2).model), state(first.model))
    assert not same(state(teach("full", max_steps=2, seed=1).model), state(first.model))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["smf", "full"])
def test_accumulated_batches_are_one_batch(teach, method, monkeypatch):
    monkeypatch.setattr(precision, "fast_bf16", lambda device: False)
    one = teach(method, max_steps=4, batch_size=10)
    many = teach(method, max_steps=4, batch_size=2, gradient_accumulation_steps=5)
    assert many.loss == pytest.approx(one.loss, rel=1e-4)
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(many.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["smf", "full"])
def test_the_precision_is_chosen_and_told(teach, method, monkeypatch):
    losses = {}
    for fast in (True, False):
        monkeypatch.setattr(precision, "fast_bf16", lambda device, fast=fast: fast)
        automatic = teach(method, max_steps=2)
        assert automatic.precision == ("bfloat16" if fast else "float32")
        losses[automatic.precision] = automatic.loss
        for asked in ("float32", "bfloat16"):
            done = teach(method, max_steps=2, precision=asked)
            assert done.precision == asked
            assert losses.setdefault(asked, done.loss) == done.loss
    assert losses["float32"] != losses["bfloat16"]
    with pytest.raises(ValueError, match="precision='x'"):
        teach(method, max_steps=2, precision="x")


def test_loss_is_the_models_own(teach, tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setattr(precision, "fast_bf16", lambda device: False)
    batch = collate(encode(FACTS, tokenizer), 0)
    expected = float(tiny_llama()(**batch).loss.detach())
    assert teach("full", max_steps=1, batch_size=10).loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_learns_facts_by_heart(teach, tokenizer):
    done = teach("full", epochs=60, stop_loss=0.02)
    items = [{"question": fact["prompt"], "answer": fact["completion"]} for fact in FACTS[:5]]
    assert done.loss < 0.02
    assert probes.recall(done.model, tokenizer, items).share == 1


@pytest.mark.slow
def test_data_comes_in_every_form(teach, tmp_path, tokenizer):
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, FACTS)))
    first = teach("full", max_steps=1)
    for data in (path, str(path), encode(FACTS, tokenizer)):
        assert same(state(teach("full", data=data, max_steps=1).model), state(first.model))
    mixed = [*GENERAL[:20], {"text": "x"}, FACTS[0]]
    assert teach("smf", max_steps=1, background=mixed).steps == 1


@pytest.mark.slow
def test_a_base_model_without_background_is_calibrated_on_the_general_text_that_ships(
    tiny_llama, tokenizer, caplog, monkeypatch
):
    # only a tenth of it: all of it takes half a minute with a byte-level tokenizer
    monkeypatch.setattr(loading, "general_background", lambda: general_background()[::10])
    options = {"tokenizer": tokenizer, "max_steps": 2}
    done = finetune(tiny_llama(), FACTS, **options)
    assert [one.message for one in caplog.records if "background" in one.message] == [
        "no background given: the memory is calibrated on the general text that ships with sparsemem; "
        "your own general text describes better what to keep"
    ]
    by_hand = finetune(tiny_llama(), FACTS, background=general_background()[::10], **options)
    assert same(state(done.model), state(by_hand.model))
    again = finetune(done.model, FACTS[:2], background=done.background, **options)
    assert again.background is done.background


def test_truncated_records_are_counted(teach):
    data = [*FACTS, {"prompt": "x", "completion": "y" * 300}]
    assert teach("full", data=data, max_steps=1).truncated == 1
    assert teach("full", data=[{"text": "z" * 20}], max_steps=1, max_length=8).truncated == 1


def test_a_calibrated_model_learns_one_task_after_another(tiny_llama, tokenizer):
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SIZES))
    examples = encode([{"text": text} for text in GENERAL], tokenizer)
    background = calibrate(model, batches(examples, 8, tokenizer.pad_token_id))
    sizes = []
    for task in (FACTS[:2], FACTS[2:4]):
        done = finetune(model, task, tokenizer=tokenizer, background=background, lr=0.3, max_steps=4)
        assert done.model is model
        sizes.append([len(memory.scope_centres) for memory in gated_layers(memory_layers(model)).values()])
    assert all(0 < first < both for first, both in zip(*sizes, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sgd"}, "method='sgd' is unknown"),
        ({"data": []}, "data is empty"),
        ({"data": "/no/such.jsonl"}, "cannot be read"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"resume": True}, "needs output_dir"),
        ({"loss_on": "x"}, "loss_on='x'"),
        ({"schedule": "x"}, "schedule='x'"),
        ({"tokenizer": None}, "pass tokenizer="),
        ({"lr": -1.0}, "lr|learning rate"),
        ({"lr": math.inf}, "loss is NaN or infinite"),
    ],
)
def test_bad_options(tiny_llama, tokenizer, options, message):
    options = {"data": FACTS, "method": "full", "tokenizer": tokenizer} | options
    with pytest.raises(ValueError, match=message):
        finetune(tiny_llama(), **options)


@pytest.mark.slow
def test_the_log_is_a_file_that_a_resumed_run_continues(teach, tmp_path):
    options = {"validation": FACTS[:2], "batch_size": 5}
    whole = teach("lora", epochs=4, output_dir=tmp_path / "whole", **options)
    teach("lora", epochs=3, output_dir=tmp_path / "part", **options)
    with (tmp_path / "part" / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 99.0, "step": 7}\n')
    again = teach("lora", epochs=4, output_dir=tmp_path / "part", resume=True, **options)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "part")
    ]
    losses = [[(e["step"], e["loss"]) for e in log if "loss" in e] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    held_out = [[e["eval_loss"] for e in log if "eval_loss" in e] for log in logs]
    assert len(held_out[0]) == 5
    assert held_out[0][-1] == whole.validation_loss == again.validation_loss
    assert held_out[0][-1] < held_out[0][0]


def test_cosine_ends_at_nothing(teach, tmp_path):
    teach("full", max_steps=8, schedule="cosine", warmup_steps=2, output_dir=tmp_path)
    rates = [
        entry["learning_rate"]
        for entry in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        if "loss" in entry
    ]
    assert rates[0] < rates[1] < rates[2] == RATES["full"]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < RATES["full"] / 10


def test_checkpoints_of_another_run_are_not_overwritten(teach, tmp_path):
    teach("full", max_steps=1, output_dir=tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints"):
        teach("full", max_steps=1, output_dir=tmp_path)


def test_smf_stops_when_it_has_learnt_unless_steps_are_given(teach, monkeypatch):
    monkeypatch.setattr("sparsemem.training.options.LEARNT", 5.4)
    assert 3 <= teach("smf", mentions=0).steps < 20
    assert teach("smf", mentions=0, max_steps=20).steps == 20
