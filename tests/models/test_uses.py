"""Everyday use of a model with a memory: each use works or is refused in one sentence.

Generation with taught facts: laws/test_facts_in_context.py. More of Trainer: training/test_everyday.py.
"""

import copy
import io
import pickle

import pytest
import torch
from checks import FACTS, GENERAL, MEMORY, PROMPTS, TAUGHT, TOKENIZER, UNTAUGHT, generated, logits, same
from peft import LoraConfig, PeftModel, get_peft_model
from tinies import tiny
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from sparsemem import RowAdamW, SparseMemoryConfig, Stream, finetune, memory_layers
from sparsemem.data.records import collate, encode

KINDS = ("llama", "qwen3")
OPTIONS = {"tokenizer": TOKENIZER, "background": GENERAL, "mentions": 0, "precision": "float32"}
LORA = {"r": 2, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def teach(base, steps=8):
    model = get_peft_model(base, SparseMemoryConfig(**MEMORY))
    return finetune(model, FACTS, "smf", max_steps=steps, **OPTIONS).model.eval()


def rows(model):
    return [memory.values.detach().clone() for memory in memory_layers(model).values()]


@pytest.fixture(scope="module", params=KINDS)
def base(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def made(base):
    return teach(copy.deepcopy(base))


@pytest.fixture
def taught(made):
    return copy.deepcopy(made)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """Of the base model."""
    path = tmp_path_factory.mktemp("base")
    base.save_pretrained(path)
    return path


# Generation

SAME_AS_GREEDY = {
    "cache": {"use_cache": True},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
SAME_AS_WITHOUT_CACHE = {
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("use", SAME_AS_GREEDY)
def test_generation_as_in_greedy_search_without_a_cache(made, base, use):
    expected = generated(made, use_cache=False)
    assert not torch.equal(expected, generated(base, use_cache=False))
    assert torch.equal(generated(made, **SAME_AS_GREEDY[use]), expected)


def test_generation_with_an_assistant(made, base):
    assert torch.equal(generated(made, assistant_model=base), generated(made, use_cache=False))


@pytest.mark.parametrize("use", SAME_AS_WITHOUT_CACHE)
def test_generation_with_a_cache_is_as_without(made, use):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(generated(made, use_cache=use_cache, **SAME_AS_WITHOUT_CACHE[use]))
    assert torch.equal(*found)


def test_prompts_padded_on_the_left_are_continued_as_alone(made):
    length = max(map(len, PROMPTS)) + 3
    ids = torch.tensor([[0] * (length - len(one)) + one for one in PROMPTS])
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    together = made.generate(input_ids=ids, attention_mask=(ids > 0).long(), **options)[:, length:]
    alone = torch.cat([generated(made, one)[:, len(one) :] for one in PROMPTS])
    assert torch.equal(together, alone)


# Weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taught_saved_and_loaded(base, dtype, tmp_path):
    half = copy.deepcopy(base).to(dtype)
    before = logits(half)
    model = get_peft_model(copy.deepcopy(half), SparseMemoryConfig(**MEMORY))
    options = OPTIONS | {"precision": None}
    model = finetune(model, FACTS, "smf", max_steps=8, **options).model.eval()
    assert logits(model).dtype == dtype
    assert not torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(half, tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _loaded(model),
}


def _loaded(model):
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    return torch.load(held, weights_only=False)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_as_the_model(made, way):
    assert torch.equal(logits(COPIES[way](made)), logits(made))


def test_a_state_dict_goes_into_a_model_of_the_same_config(made, base, tmp_path):
    made.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        for memory in memory_layers(again).values():
            memory.values.zero_()
    again.load_state_dict(made.state_dict())
    assert torch.equal(logits(again), logits(made))


# Devices


def everywhere(place="cpu", late="cpu"):
    """A device map whose last block is at `late`."""
    outer = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), place)
    return outer | {f"model.layers.{n}": place for n in range(3)} | {"model.layers.3": late}


@pytest.mark.parametrize("places", ["auto", everywhere()], ids=["auto", "by part"])
def test_a_base_with_a_device_map_is_taught_as_without(made, folder, places):
    found = teach(AutoModelForCausalLM.from_pretrained(folder, device_map=places))
    assert same(rows(found), rows(made))
    assert torch.equal(logits(found), logits(made))


OFFLOADED = pytest.raises(ValueError, match=r"model: parts of \w+ are offloaded to the CPU or the disk")


def offloaded(folder, tmp_path):
    options = {"device_map": everywhere(late="disk"), "offload_folder": tmp_path / "offload"}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_an_offloaded_base_is_refused(made, folder, tmp_path):
    from accelerate import cpu_offload

    made.save_pretrained(tmp_path / "adapter")
    with OFFLOADED:
        get_peft_model(offloaded(folder, tmp_path), SparseMemoryConfig(**MEMORY))
    with OFFLOADED:
        PeftModel.from_pretrained(offloaded(folder, tmp_path), tmp_path / "adapter")
    with OFFLOADED:
        Stream(offloaded(folder, tmp_path), tmp_path / "s", tokenizer=TOKENIZER, background=GENERAL)
    model = AutoModelForCausalLM.from_pretrained(folder)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with OFFLOADED:
        get_peft_model(model, SparseMemoryConfig(**MEMORY))


# Compilers

ONE_KIND = pytest.mark.parametrize("base", KINDS[:1], indirect=True)


@pytest.fixture(scope="module")
def learnt(base, tmp_path_factory):
    """A model that a stream taught one fact."""
    return stream(copy.deepcopy(base), tmp_path_factory.mktemp("stream")).model


def stream(base, path):
    held = Stream(base, path / "s", tokenizer=TOKENIZER, background=GENERAL)
    held.teach("t", [{**FACTS[0], "subject": "Velmora"}])
    return held


@pytest.fixture(autouse=True)
def _few_relations(monkeypatch):
    # random states say little of what is asked, so few relations will do
    monkeypatch.setattr("sparsemem.data.asked.LEAST_RELATIONS", 6)


@ONE_KIND
@torch.no_grad()
def test_one_graph_holds_the_whole_model(made):
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    inside, outside = TAUGHT["input_ids"], UNTAUGHT["input_ids"][:, :12]
    for ids in (inside, outside):
        assert torch.equal(compiled(ids).logits, made(ids).logits)
    assert torch.equal(compiled(outside).logits, made.get_base_model()(outside).logits)


@ONE_KIND
@torch.no_grad()
def test_a_taught_model_is_exported(made):
    ids = TAUGHT["input_ids"]
    exported = torch.export.export(made, (), {"input_ids": ids, "use_cache": False}, strict=False).module()
    assert torch.equal(exported(input_ids=ids, use_cache=False).logits, made(ids).logits)
    other = UNTAUGHT["input_ids"][:6, : ids.shape[1]]
    other = torch.nn.functional.pad(other, (0, ids.shape[1] - other.shape[1]))
    assert torch.equal(exported(input_ids=other, use_cache=False).logits, made(other).logits)


@ONE_KIND
@torch.no_grad()
def test_names_of_facts_are_looked_up_outside_of_a_graph(learnt):
    """Without fullgraph: test_a_compiled_forward_pass_gives_the_same."""
    ids = TAUGHT["input_ids"]
    with pytest.raises(Exception, match=r"compile without fullgraph=True"):
        torch.compile(learnt, backend="eager", fullgraph=True)(ids)
    with pytest.raises(ValueError, match=r"model: holds facts of learn.*cannot be exported"):
        torch.export.export(learnt, (), {"input_ids": ids, "use_cache": False}, strict=False)


# A LoRA for the style, a memory for the facts


def told_twice(test):
    """PEFT and transformers warn of a second adapter."""
    for text in ("You are trying to modify a model with PEFT", "Already found a `peft_config` attribute"):
        test = pytest.mark.filterwarnings(f"ignore:{text}")(test)
    return test


def with_lora(base):
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**LORA)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.01)
    return model


def test_a_memory_on_a_lora_that_is_merged(base, tmp_path):
    styled = with_lora(base).merge_and_unload()
    before = logits(styled)
    model = teach(copy.deepcopy(styled))
    assert not torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    held = stream(styled, tmp_path)
    assert not torch.equal(logits(held.model), before)
    held.undo("t")
    assert torch.equal(logits(held.model), before)


@told_twice
def test_a_memory_on_a_lora_that_is_not_merged_is_refused(made, base, tmp_path):
    made.save_pretrained(tmp_path / "adapter")
    refused = pytest.raises(ValueError, match=r"merge_and_unload\(\)")
    with refused:
        get_peft_model(with_lora(base), SparseMemoryConfig(**MEMORY))
    with refused:
        finetune(with_lora(base).get_base_model(), FACTS, "smf", max_steps=1, **OPTIONS)
    with refused:
        PeftModel.from_pretrained(with_lora(base), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has an adapter already; give the base model"):
        stream(with_lora(base), tmp_path)
    with pytest.raises(ValueError, match=r"Cannot combine adapters with different peft types"):
        with_lora(base).add_adapter("facts", SparseMemoryConfig(**MEMORY))


@told_twice
def test_a_lora_added_to_a_memory_is_saved_and_loaded_apart(taught, base, tmp_path):
    """It changes the states that the memory reads, so facts hold as far as these stay near."""
    before, expected = rows(taught), logits(taught)
    taught.save_pretrained(tmp_path / "facts")
    both = get_peft_model(taught, LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert torch.equal(logits(both), expected)
    # rows train too where they are given to the optimizer
    optimizer = torch.optim.AdamW([p for name, p in both.named_parameters() if "lora_" in name], lr=0.01)
    for _ in range(2):
        both.train()(**TAUGHT).loss.backward()
        optimizer.step()
    both.eval()
    assert not torch.equal(logits(both), expected)
    assert same(rows(taught), before)
    both.save_pretrained(tmp_path / "style")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "facts")
    again = PeftModel.from_pretrained(again, tmp_path / "style").eval()
    assert torch.equal(logits(again), logits(both))


@told_twice
def test_transformers_holds_both_and_switches(base, made, tmp_path):
    made.save_pretrained(tmp_path / "facts")
    with_lora(base).save_pretrained(tmp_path / "style")
    model = copy.deepcopy(base)
    model.load_adapter(str(tmp_path / "facts"), "facts")
    model.load_adapter(str(tmp_path / "style"), "style")
    for name, expected in (("facts", logits(made)), ("style", logits(with_lora(base)))):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)
    model.set_adapter(["facts", "style"])
    both = logits(model)
    assert not torch.equal(both, logits(made))
    assert not torch.equal(both, logits(with_lora(base)))


def test_unloaded_and_taught_again(taught, base, tmp_path):
    bare = taught.unload()
    assert torch.equal(logits(bare), logits(base))
    again = teach(bare)
    assert torch.equal(logits(again), logits(teach(copy.deepcopy(base))))
    bare = stream(again.unload(), tmp_path / "1").model.unload()
    assert torch.equal(logits(bare), logits(base))
    held, fresh = stream(bare, tmp_path / "2"), stream(copy.deepcopy(base), tmp_path / "3")
    assert torch.equal(logits(held.model), logits(fresh.model))


# Trainer

TRAINER = {
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "noise in embeddings": {"neftune_noise_alpha": 5.0},
    "batches by length": {"train_sampling_strategy": "group_by_length"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"activation_checkpointing": True},
    "bfloat16": {"bf16": True},
    "adafactor": {"optim": "adafactor", "learning_rate": 0.1},
    "batch size found": {"auto_find_batch_size": True},
}


def trained(base, path, own_optimizer=True, model_class=Trainer, **options):
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), SparseMemoryConfig(**MEMORY))
    options = {"max_steps": 4, "per_device_train_batch_size": 3, "save_strategy": "no", **options}
    arguments = TrainingArguments(
        path, report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    optimizer = RowAdamW(model, lr=0.3, top_t=16, rule="tf") if own_optimizer else None
    examples = encode(FACTS, TOKENIZER)
    trainer = model_class(
        model, arguments, train_dataset=examples, eval_dataset=examples, optimizers=(optimizer, None),
        data_collator=lambda rows: collate(rows, 0),
    )  # fmt: skip
    trainer.train()
    return model.eval()


@pytest.mark.parametrize("use", TRAINER)
def test_trainer(base, use, tmp_path, caplog, capsys):
    model = trained(base, tmp_path, own_optimizer=use != "adafactor", **TRAINER[use])
    assert all(table.any() for table in rows(model))
    held = {name: tensor for name, tensor in model.state_dict().items() if "sparse_memory" not in name}
    assert same(list(held.values()), list(base.state_dict().values()))
    assert model(**TAUGHT).loss < base(**TAUGHT).loss


@ONE_KIND
def test_a_batch_that_is_too_large_leaves_nothing_behind(base, tmp_path, capsys):
    class Full(Trainer):
        def training_step(self, model, inputs, *args):
            if len(inputs["input_ids"]) > 3:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args)

    halved = trained(
        base, tmp_path, model_class=Full, auto_find_batch_size=True, per_device_train_batch_size=6
    )
    assert same(rows(halved), rows(trained(base, tmp_path)))


# TRL, which imports slowly: tests/adapter/test_peft_integration.py has packing

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}Q: {{ m['content'] }}\n{% endif %}{% endfor %}"
)
TRL = {
    "max_length": 64, "max_steps": 3, "per_device_train_batch_size": 3, "learning_rate": 0.1, "report_to": [],
    "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@ONE_KIND
@pytest.mark.parametrize("use", ["the assistant's tokens alone", "preferences"])
def test_trl(base, use, tmp_path, capsys):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = TEMPLATE
    model = get_peft_model(copy.deepcopy(base), SparseMemoryConfig(**MEMORY))
    given = {
        "optimizers": (RowAdamW(model, lr=0.3, top_t=16, rule="tf"), None),
        "processing_class": tokenizer,
    }
    if use == "preferences":
        facts = [{**fact, "chosen": fact["completion"], "rejected": " none"} for fact in FACTS]
        facts = [{key: fact[key] for key in ("prompt", "chosen", "rejected")} for fact in facts]
        trainer = DPOTrainer(
            model, args=DPOConfig(tmp_path, **TRL), train_dataset=Dataset.from_list(facts), **given
        )
    else:
        turns = [
            {
                "messages": [
                    {"role": "user", "content": one["prompt"]},
                    {"role": "assistant", "content": one["completion"]},
                ]
            }
            for one in FACTS
        ]
        config = SFTConfig(tmp_path, assistant_only_loss=True, **TRL)
        trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(turns), **given)
    trainer.train()
    held = {name: tensor for name, tensor in model.state_dict().items() if "sparse_memory" not in name}
    assert same(list(held.values()), list(base.state_dict().values()))
    assert all(table.any() for table in rows(model))
