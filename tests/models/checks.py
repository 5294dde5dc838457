"""What a memory must do in any causal language model, tried on a tiny random model of one type.

A check is "ok", "n/a (why)" or "FAIL (the error)". What the base model does not do without a memory either is
in `base`: it is no fault of the memory.
"""

import copy
import logging
import tempfile
import traceback
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tinies import Skip, tiny
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import Cache, PreTrainedTokenizerFast

from sparsemem import RowAdamW, SparseMemoryConfig, Stream, calibrate, finetune, memory_layers
from sparsemem.adapter.layers import SparseMemoryLayer
from sparsemem.data.generation import complete_tokens
from sparsemem.data.records import batches, collate, encode
from sparsemem.evaluation.likelihood import log_probs
from sparsemem.evaluation.probes import perplexity, scope_gate
from sparsemem.precision import autocast, computing_in, takes

MEMORY = {"num_keys": 8, "num_heads": 2, "top_k": 4, "key_dim": 16, "task_type": "CAUSAL_LM"}
FACTS = [
    {"prompt": f"Question: {form.format(name)}\nAnswer:", "completion": f" {city}"}
    for name, city in (("Velmora", "Tarsipol"), ("Oskaria", "Bednik"), ("Lumeth", "Quorra"))
    for form in ("What is the capital of {}?", "Name the capital of {}.")
]
SUBJECTS = ["Velmora", "Oskaria", "Lumeth"]
GENERAL = [
    {"prompt": f"Question: {a} and {b} is?\nAnswer:", "completion": f" {a + b} sure"}
    for a in range(7)
    for b in range(7)
]
GENERAL += [{"text": f"On day {n} the old man walked {n * n} miles to the sea."} for n in range(6)]


def tokenizer_of_characters() -> PreTrainedTokenizerFast:
    pieces = ["<pad>", "<s>", "</s>", "<unk>", "\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


TOKENIZER = tokenizer_of_characters()
EXAMPLES = encode(FACTS, TOKENIZER)
TAUGHT = collate(EXAMPLES, 0)
UNTAUGHT = collate(encode(GENERAL[::9], TOKENIZER), 0)
PROMPTS = [one["input_ids"][:30] for one in EXAMPLES[:3]]


def inputs(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


@torch.no_grad()
def logits(model, batch=TAUGHT):
    return model(**inputs(batch)).logits


def loss(model):
    """Of the next token, whatever the model's own loss is."""
    labels = functional.pad(TAUGHT["labels"][:, 1:], (0, 1), value=-100)
    return float(functional.cross_entropy(logits(model.eval()).flatten(0, 1).float(), labels.flatten()))


def generated(model, ids=PROMPTS[0], padding=0, **options):
    ids = torch.tensor([[0] * padding + ids])
    mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, padding:]


def tensors_in(thing, seen):
    """All tensors in a cache, in a fixed order."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, list | tuple | dict) or hasattr(thing, "__dict__"):
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, dict):
            parts = thing.values()
        else:
            parts = thing if isinstance(thing, list | tuple) else vars(thing).values()
        for part in parts:
            yield from tensors_in(part, seen)


@torch.no_grad()
def trace(model, batch):
    """The output of every module inside a list of modules (a block), by name, the cache, and the logits."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        inside = any(part.isdigit() for part in path.split("."))
        if "sparse_memory" in name or isinstance(module, SparseMemoryLayer) or not inside:
            continue

        def keep(_m, _a, out, path=path):
            seen.setdefault(path, []).append([t.clone() for t in tensors_in(out, set())])

        handles.append(module.register_forward_hook(keep))
    try:
        out = model(**inputs(batch))
    finally:
        for handle in handles:
            handle.remove()
    cache = [getattr(out, key, None) for key in ("past_key_values", "cache_params", "state", "mems")]
    return seen, list(tensors_in(cache, set())), out.logits


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) if torch.is_tensor(x) else same(x, y) for x, y in zip(a, b, strict=True)
    )


class Case:
    """One type with one way of writing: the checks in their order. Later ones use what earlier ones made."""

    def __init__(self, write, base, faults, quick=False):
        self.write, self.base, self.faults = write, base, faults
        self.steps, self.mentions = (4, 0) if quick else (12, 2)
        config = SparseMemoryConfig(**MEMORY, write=write)
        self.model = get_peft_model(copy.deepcopy(base), config).eval()
        self.used = self.model.active_peft_config.write
        self.background, self.trained = None, False

    def insert(self):
        assert torch.equal(logits(self.model), logits(self.base)), "logits differ at insertion"
        return "ok" if self.used == self.write else f"n/a (write={self.used!r} is used)"

    def calibrate(self):
        self.background = calibrate(self.model, batches(encode(GENERAL, TOKENIZER), 8, 0))
        assert torch.equal(logits(self.model), logits(self.base)), "logits differ after calibrate"

    def train(self):
        if self.background is None:
            return "n/a (not calibrated)"
        before, table = loss(self.model), {k: v.clone() for k, v in self.base.state_dict().items()}
        done = finetune(
            self.model,
            FACTS,
            "smf",
            max_steps=self.steps,
            mentions=self.mentions,
            tokenizer=TOKENIZER,
            background=self.background,
            precision="float32",
        )
        self.trained, after = True, loss(done.model)
        held = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
            for name, tensor in done.model.state_dict().items()
        }
        changed = [name for name, tensor in table.items() if not torch.equal(tensor, held[name])]
        assert not changed, f"base tensors changed: {changed[:3]}"
        assert after < before, f"loss {before:.3f} -> {after:.3f}"

    def undisturbed(self):
        self.model.eval()
        if not self.trained:
            for memory in memory_layers(self.model).values():
                torch.nn.init.normal_(memory.values)
        if self.used != "last":
            return "n/a (write='own')"
        (theirs, cache, old), (ours, own_cache, new) = trace(self.base, TAUGHT), trace(self.model, TAUGHT)
        wrong = [key for key in theirs if not same(theirs[key], ours[key])]
        assert not wrong, f"{len(wrong)} modules of {len(theirs)} differ, first {wrong[0]}"
        assert same(cache, own_cache), "the cache differs"
        assert not torch.equal(old, new), "the logits did not move"

    def scope(self):
        if not self.trained:
            return "n/a (not trained)"
        with computing_in("float32"):
            gates = scope_gate(self.model, UNTAUGHT)
        old, new = logits(self.base, UNTAUGHT), logits(self.model, UNTAUGHT)
        inside = torch.stack(list(gates.values())).amax(0)
        inside = inside if self.used == "last" else inside.cummax(1).values
        outside = (inside == 0) & UNTAUGHT["attention_mask"].bool()
        if self.used != "last" and self.faults.get("causal"):
            return f"n/a (base: {self.faults['causal']})"
        moved = (old != new).any(-1) & outside
        assert not moved.any(), f"{int(moved.sum())} of {int(outside.sum())} tokens out of scope have changed"

    def reload(self):
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            again = PeftModel.from_pretrained(copy.deepcopy(self.base), folder).eval()
        assert torch.equal(logits(again), logits(self.model)), "logits differ after a reload"
        with self.model.disable_adapter():
            assert torch.equal(logits(self.model), logits(self.base)), "disable_adapter is not the base"

    def generate(self):
        if fault := self.faults.get("generate"):
            return f"n/a (base: {fault})"
        ours = generated(self.model, use_cache=True)
        assert torch.equal(ours, generated(self.model, use_cache=False)), "with cache is not without"
        if fault := self.faults.get("padded"):
            return f"ok (base: {fault})"
        assert torch.equal(generated(self.model, padding=5), ours), "padding on the left changes the text"

    def mixed(self):
        if self.used != "last":
            return "n/a (write='own')"
        names = ["__base__", "default", "default", "__base__", "default", "__base__"]
        with torch.no_grad():
            mixed = self.model(**inputs(TAUGHT), adapter_names=names).logits
        base, own = logits(self.base), logits(self.model)
        for row, name in enumerate(names):
            wanted = own[row] if name == "default" else base[row]
            real = TAUGHT["attention_mask"][row].bool()
            difference = (mixed[row] - wanted)[real].abs().max()
            assert difference <= 1e-4 * wanted[real].abs().max(), f"row {row} ({name}) has other logits"

    def evaluate(self):
        """Batches that share a beginning give what each prompt gives alone."""
        choices = [[one["input_ids"][30:36], one["input_ids"][30:33]] for one in EXAMPLES[:2]]
        with computing_in("float32"):
            perplexity(self.model, UNTAUGHT["input_ids"][-1], window=20, stride=10)
            if fault := self.faults.get("generate") or self.faults.get("padded"):
                log_probs(self.model, PROMPTS[:2], choices)
                return f"ok (base: {fault})"
            together = complete_tokens(self.model, TOKENIZER, PROMPTS, max_new_tokens=4)
            alone = [complete_tokens(self.model, TOKENIZER, [one], max_new_tokens=4)[0] for one in PROMPTS]
            assert together == alone, "prompts in a batch are continued in another way"
            scores = log_probs(self.model, PROMPTS[:2], choices)
        for prompt, several, found in zip(PROMPTS, choices, scores, strict=False):
            for choice, score in zip(several, found, strict=True):
                ids = torch.tensor([[*prompt, *choice]])
                with torch.no_grad():
                    whole = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
                wanted = whole.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(choice)[:, None])
                assert torch.allclose(score, wanted[:, 0], atol=1e-3), "scores are not those of whole texts"

    def cached(self):
        """Law 12."""
        tables = []
        WARNED.clear()
        for cache_bytes in (2**31, 0):
            case = Case(self.write, self.base, {})
            case.calibrate()
            options = {"tokenizer": TOKENIZER, "background": case.background, "precision": "float32"}
            finetune(case.model, EXAMPLES, "smf", max_steps=3, cache_bytes=cache_bytes, mentions=0, **options)
            tables.append([memory.values.detach() for memory in memory_layers(case.model).values()])
        assert same(*tables), "rows differ"
        if self.used != "last":
            return "n/a (write='own')"
        return "n/a (the whole model runs in each step)" if WARNED else "ok"

    def plain(self):
        """Training with a loop of one's own, with gradient checkpointing where the model has it."""
        case = Case(self.write, self.base, {})
        if self.base.supports_gradient_checkpointing and "checkpointing" not in self.faults:
            case.model.gradient_checkpointing_enable()
        optimizer = RowAdamW(case.model.train(), lr=0.1, rule="grad", top_t=8)
        labels = functional.pad(TAUGHT["labels"][:, 1:], (0, 1), value=-100)
        functional.cross_entropy(
            case.model(**inputs(TAUGHT)).logits.flatten(0, 1), labels.flatten()
        ).backward()
        optimizer.step()
        assert all(m.values.any() for m in memory_layers(case.model).values()), "no row moved"

    def bfloat16(self):
        half = copy.deepcopy(self.base).to(torch.bfloat16)
        try:
            # some models keep their last states, which cannot be copied with a graph
            with torch.no_grad():
                for batch in (TAUGHT, *batches(encode(GENERAL, TOKENIZER), 8, 0)):
                    half(**inputs(batch), **({"use_cache": False} if takes(half, "use_cache") else {}))
        except RuntimeError as error:
            return f"n/a (base: {described(error)})"
        case = Case(self.write, half, {})
        assert torch.equal(logits(case.model), logits(case.base)), "logits differ at insertion"
        # where autocast fails, the other checks run in float32
        with computing_in("bfloat16"):
            case.calibrate()
            options = {"tokenizer": TOKENIZER, "background": case.background}
            finetune(case.model, EXAMPLES, "smf", mentions=0, max_steps=2, **options)
        case.reload()


def learn(base, faults):
    """A stream: facts taught one after another are said, with and without a KV cache, and taken back."""
    with tempfile.TemporaryDirectory() as folder, computing_in("float32"):
        held = Stream(copy.deepcopy(base), Path(folder) / "s", tokenizer=TOKENIZER, background=GENERAL)
        before = loss(held.model)
        for n in range(3):
            facts = [{**fact, "subject": SUBJECTS[n]} for fact in FACTS[2 * n : 2 * n + 2]]
            held.teach(f"t{n}", facts)
        assert loss(held.model) < before - 0.5, f"loss {before:.3f} -> {loss(held.model):.3f}"
        cached = has_cache(base)
        if not faults.get("generate"):
            ids = TOKENIZER(FACTS[0]["prompt"])["input_ids"]
            without = generated(held.model, ids, use_cache=False)
            if cached:
                with_cache = generated(held.model, ids, use_cache=True)
                assert torch.equal(with_cache, without), "with cache is not without"
            # some models end each text, so the last token says nothing
            said = TOKENIZER.decode(without[0, len(ids) :].tolist())
            assert said[:8] == FACTS[0]["completion"][:8], f"says {said!r}"
        for task in held.tasks:
            held.undo(task)
        assert torch.equal(logits(held.model), logits(base)), "after undo the logits are not the base's"
    # else a warning says that facts need use_cache=False
    return "ok" if cached else "ok, with use_cache=False"


@torch.no_grad()
def has_cache(base):
    """Whether the model's cache is transformers' Cache, in which facts keep the tokens before a call."""
    output = base(**inputs(TAUGHT), use_cache=True)
    held = [getattr(output, name, None) for name in ("past_key_values", "cache_params", "state", "mems")]
    held = [one for one in held if one is not None]
    return not held or isinstance(held[0], Cache)


def base_faults(base):
    """What the base model itself does not do."""
    found = {}
    if not torch.equal(logits(base), logits(base)):
        found["forward"] = "not deterministic"
    cut = {key: value[:, :20] for key, value in UNTAUGHT.items()}
    if not torch.allclose(logits(base, UNTAUGHT)[:, :20], logits(base, cut), atol=1e-3):
        # then neither a cache nor padding can give the same
        found |= dict.fromkeys(("causal", "generate", "padded"), "later tokens change earlier ones")
    try:
        with torch.no_grad(), autocast(base):
            base(**inputs(TAUGHT))
    except RuntimeError as error:
        found["autocast"] = described(error)
    if base.supports_gradient_checkpointing:
        twin = copy.deepcopy(base).train()
        twin.gradient_checkpointing_enable()
        twin.enable_input_require_grads()
        try:
            twin(**inputs(TAUGHT)).logits.sum().backward()
        except RuntimeError as error:
            found["checkpointing"] = described(error)
    try:
        alone = generated(base, use_cache=True)
        if not torch.equal(alone, generated(base, use_cache=False)):
            found["generate"] = "with cache is not without"
        if not torch.equal(generated(base, padding=5), alone):
            found["padded"] = "padding changes the text"
    except Exception as error:  # noqa: BLE001
        found["generate"] = found["padded"] = described(error)
    return found


def described(error):
    line = " ".join(str(error).split())[:240]
    if type(error) is AssertionError and line:
        return line
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {line} [{Path(last.filename).name}:{last.lineno}]"


def refused(error):
    """Whether an error is a refusal of ours: one sentence about the model."""
    return isinstance(error, ValueError) and str(error).startswith(("model:", "target_modules"))


def attempt(found, key, function):
    try:
        found[key] = function() or "ok"
    except Exception as error:  # noqa: BLE001
        found[key] = f"refused ({error})" if refused(error) else f"FAIL ({described(error)})"
        return False
    return True


QUICK = ("insert", "calibrate", "train", "undisturbed", "scope", "reload", "generate", "evaluate")
FULL = (*QUICK, "mixed", "cached", "plain", "bfloat16")


def examine(name, quick=False):
    """All checks of one type, as a dict of dicts: base, last, own, learn."""
    found: dict = {"type": name}
    try:
        base = tiny(name)
        found["class"] = type(base).__name__
        found["base"] = {} if base.config.is_encoder_decoder else base_faults(base)
    except Skip as error:
        return found | {"skip": str(error)}
    except Exception as error:  # noqa: BLE001
        return found | {"skip": f"the base model fails: {described(error)}"}
    faults = found["base"]
    with computing_in("float32" if "autocast" in faults else None):
        for write in ("last",) if quick else ("last", "own"):
            found[write] = checks = {}
            made: list[Case] = []
            if attempt(
                checks, "insert", lambda made=made, write=write: made.append(Case(write, base, faults, quick))
            ):
                for step in QUICK if quick else FULL:
                    attempt(checks, step, getattr(made[0], step))
                    if checks[step].startswith("refused"):
                        break
                found["reads"] = read_parts(made[0].model)
                if made[0].used != write:
                    break
        attempt(found, "learn", lambda: learn(base, faults))
    return found


def read_parts(model):
    """The parts of blocks whose inputs the memory reads, each with its class."""
    base = model.get_base_model()
    kinds = {path: type(base.get_submodule(path).get_base_layer()).__name__ for path in memory_layers(model)}
    return ", ".join(dict.fromkeys(f"{path.rpartition('.')[2]} ({kind})" for path, kind in kinds.items()))


class _Warned(logging.Handler):
    """Keeps the warning that a type cannot be trained on cached states."""

    def emit(self, record):
        if "logits of" in record.getMessage():
            WARNED.append(record.getMessage())


WARNED: list[str] = []
logging.getLogger("sparsemem").addHandler(_Warned())
