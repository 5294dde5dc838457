"""What benchmarks/speed.py compares: models, steps and layers, each ready to be called."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsemem import Background, SparseMemoryConfig, calibrate, memory_layers
from sparsemem.background.background import LayerBackground
from sparsemem.layer.memory import ProductKeyMemory
from sparsemem.layer.values import ReadLog
from sparsemem.optim.rows import RowAdamW
from sparsemem.optim.selection import select_rows
from sparsemem.precision import autocast
from sparsemem.training.cached import collate_states, train_states
from sparsemem.training.methods import lora_config

WIDTH, VOCABULARY, NUM_LAYERS = 576, 49_152, 30
SHAPE = {"num_keys": 128, "num_heads": 4, "top_k": 16, "key_dim": 256}
READ_LAYERS = [23, 26, 28]
TOP_T, MAX_GRAD_NORM = 512, 1.0
# One token in four has a label.
SUPERVISED = 4

Way = Callable[[], Any]


def base() -> Any:
    """A random model of SmolLM2-135M's shape, the same in each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return AutoModelForCausalLM.from_config(config)


def with_memory(write: str, num_keys: int = SHAPE["num_keys"]) -> Any:
    shape = {**SHAPE, "num_keys": num_keys}
    config = SparseMemoryConfig(write=write, layers_to_transform=READ_LAYERS, task_type="CAUSAL_LM", **shape)
    return get_peft_model(base(), config)


def written(write: str) -> Any:
    """A model whose rows are all written."""
    model = with_memory(write).eval()
    for memory in memory_layers(model).values():
        nn.init.normal_(memory.values, std=1e-3)
    return model


def row_adamw(model: nn.Module) -> RowAdamW:
    """As in the paper, with a small rate; the background has read every slot once."""
    layers = {}
    for name, memory in memory_layers(model).items():
        ones = torch.ones(memory.num_slots, dtype=torch.int64)
        layers[name] = LayerBackground(ones, ones, 10)
    return RowAdamW(model, 1e-3, top_t=TOP_T, background=Background(layers), max_grad_norm=MAX_GRAD_NORM)


def batch(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : length - length // SUPERVISED] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def kept_logits(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch as `FinetuneTrainer` passes it: logits only where there is a loss."""
    labels = data["labels"][:, 1:]
    which = (labels != -100).any(0).nonzero().squeeze(1)
    return {**data, "logits_to_keep": which, "shift_labels": labels[:, which].contiguous()}


def trainer_step(model: Any, optimizer: Any, loss: Callable[[], Tensor]) -> Way:
    def step() -> None:
        with autocast(model):
            value = loss()
        value.backward()
        if isinstance(optimizer, torch.optim.AdamW):
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _model_step(model: Any, optimizer: Any, data: dict[str, Tensor]) -> Way:
    return trainer_step(model.train(), optimizer, lambda: model(**data).loss)


def _own(rows: int, length: int, _folder: Path) -> Way:
    return own_step(rows, length, SHAPE["num_keys"])


def own_step(rows: int, length: int, num_keys: int) -> Way:
    model = with_memory("own", num_keys)
    return _model_step(model, row_adamw(model), kept_logits(batch(rows, length)))


def _last(rows: int, length: int, _folder: Path) -> Way:
    model = with_memory("last")
    return _model_step(model, row_adamw(model), kept_logits(batch(rows, length)))


def _last_cached(rows: int, length: int, folder: Path) -> Way:
    model = with_memory("last")
    data = batch(rows, length)
    examples = [
        {"input_ids": ids.tolist(), "labels": labels.tolist()}
        for ids, labels in zip(data["input_ids"], data["labels"], strict=True)
    ]
    held = train_states(model.eval(), examples, 0, 2**31, folder)
    assert held is not None
    head, states = held
    cached = collate_states([states[index] for index in range(rows)])
    return trainer_step(
        model.train(), row_adamw(model), lambda: head(cached["states"], cached["shift_labels"])["loss"]
    )


def _lora(rows: int, length: int, _folder: Path) -> Way:
    config = lora_config()
    # as in the demo: on a CPU, dropout would take a third of each step
    config.lora_dropout = 0.0
    model = get_peft_model(base(), config)
    return _model_step(model, adamw(model), kept_logits(batch(rows, length)))


def _full(rows: int, length: int, _folder: Path) -> Way:
    model = base()
    return _model_step(model, adamw(model), kept_logits(batch(rows, length)))


def _base_forward(rows: int, length: int, _folder: Path) -> Way:
    model, data = base().eval(), kept_logits(batch(rows, length))

    @torch.no_grad()
    def forward() -> None:
        with autocast(model):
            model(**data)

    return forward


def _dense_mask(rows: int, length: int, _folder: Path) -> Way:
    model = with_memory("own").train()
    return _model_step(model, DenseMask(memory_layers(model)), kept_logits(batch(rows, length)))


STEPS: dict[str, Callable[[int, int, Path], Way]] = {
    "base_forward": _base_forward,
    "own": _own,
    "last": _last,
    "last_cached": _last_cached,
    "lora": _lora,
    "full": _full,
    "dense_mask": _dense_mask,
}


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """As `prepare` makes it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)


class DenseMask:
    """The authors' way: dense gradients, times a mask of the selected rows, then torch's AdamW."""

    def __init__(self, layers: dict[str, ProductKeyMemory]) -> None:
        self.layers = layers
        self.reads: dict[str, list[Tensor]] = {name: [] for name in layers}
        self.tables = [memory.values for memory in layers.values()]
        self.adamw = torch.optim.AdamW(self.tables, lr=1e-3, weight_decay=0.0, fused=True)
        for name, memory in layers.items():
            memory.address = self._recorded(name, memory.address)  # type: ignore[method-assign]

    def _recorded(self, name: str, address: Callable) -> Callable:
        def record(x: Tensor) -> tuple[Tensor, Tensor]:
            slots, weights = address(x)
            self.reads[name].append(slots.detach())
            return slots, weights

        return record

    @torch.no_grad()
    def step(self) -> None:
        for name, memory in self.layers.items():
            slots = torch.cat([one.flatten() for one in self.reads[name]])
            counts = torch.bincount(slots, minlength=memory.num_slots)
            ones = torch.ones_like(counts)
            rows = select_rows(counts, LayerBackground(ones, ones, 10), top_t=TOP_T)
            mask = torch.zeros(memory.num_slots, 1)
            mask[rows] = 1
            assert memory.values.grad is not None
            memory.values.grad.mul_(mask)
            self.reads[name].clear()
        nn.utils.clip_grad_norm_(self.tables, MAX_GRAD_NORM)
        self.adamw.step()

    def zero_grad(self) -> None:
        self.adamw.zero_grad()


class Alone(nn.Module):
    """One memory as a model, so that the row optimizer finds it."""

    def __init__(self, num_keys: int, d: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.Linear(d, d))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def alone(num_keys: int, d: int) -> Any:
    config = SparseMemoryConfig(target_modules=["mlp"], write="own", **{**SHAPE, "num_keys": num_keys})
    return get_peft_model(Alone(num_keys, d), config)  # type: ignore[arg-type]


def layer_step(kind: str, num_keys: int, tokens: int, d: int) -> Way:
    """Forward, backward and optimizer step of one layer whose input needs a gradient."""
    model = alone(num_keys, d)
    x, grad = torch.randn(tokens, d).requires_grad_(), torch.randn(tokens, d)
    optimizer: Any = row_adamw(model) if kind == "own" else DenseMask(memory_layers(model))

    def step() -> None:
        model(x).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def optimizers(num_keys: int, tokens: int, d: int) -> tuple[dict[str, Way], Way]:
    """The steps of the row optimizer and of dense AdamW on one table, and what gives both their gradients."""
    model = alone(num_keys, d)
    optimizer = row_adamw(model)
    (memory,) = memory_layers(model).values()
    dense = nn.Parameter(torch.zeros(num_keys**2, d))
    dense.grad = torch.ones_like(dense)
    adam = torch.optim.AdamW([dense], lr=1e-3, weight_decay=0.0, fused=True)
    reads = SHAPE["num_heads"] * SHAPE["top_k"]
    slots, weights = torch.randint(0, num_keys**2, (tokens, reads)), torch.rand(tokens, reads)
    grad = torch.randn(tokens, d)

    def reread() -> None:
        assert isinstance(memory.log, ReadLog)
        memory.log.clear()
        memory.log.add(slots, weights, grad, None, num_keys**2)

    return {"rows": lambda: optimizer.step(), "dense": lambda: adam.step()}, reread


def mlp() -> nn.Module:
    return copy.deepcopy(base().model.layers[0].mlp)


def other_layer() -> nn.Module | None:
    """The layer of the package product-key-memory in the same shape; None if it is not installed."""
    try:
        from product_key_memory import PKM  # type: ignore[import-not-found]
    except ImportError:
        return None
    half = SHAPE["key_dim"] // 2
    return PKM(
        WIDTH, heads=SHAPE["num_heads"], num_keys=SHAPE["num_keys"], topk=SHAPE["top_k"], dim_head=half
    )


def bound(memory: ProductKeyMemory, tokens: int) -> dict[str, float]:
    """The least time of a forward pass, from its FLOPs and bytes and this machine's measured rates.

    FLOPs: 2 d d_q + 2 H s d_q / H + 2 H k d for each token. Bytes: each row as often as it is read.
    """
    d, d_q = memory.d_in, memory.num_heads * memory.key_dim
    reads = memory.num_heads * memory.top_k
    flops = tokens * (2 * d * d_q + 2 * memory.num_keys * d_q + 2 * reads * d)
    num_bytes = 4 * tokens * (reads + 1) * d
    one, big = torch.randn(1024, 1024), torch.randn(2**24)
    rates = []
    for work, size in ((lambda: one @ one, 2 * 1024**3), (lambda: big.sum(), 4 * len(big))):
        best = float("inf")
        for _ in range(8):
            start = time.process_time()
            work()
            best = min(best, time.process_time() - start)
        rates.append(size / best)
    return {
        "flops": flops,
        "bytes": num_bytes,
        "flops_per_second": rates[0],
        "bytes_per_second": rates[1],
        "seconds": flops / rates[0] + num_bytes / rates[1],
    }


def calibrations(num_batches: int, rows: int, length: int) -> dict[str, Way]:
    """Calibration of a memory, and the base's forward passes over the same text."""
    model = with_memory("last").eval()
    one = torch.ones(rows, length, dtype=torch.int64)
    ids = torch.randint(0, VOCABULARY, (num_batches, rows, length))
    batches = [{"input_ids": part, "attention_mask": one} for part in ids]

    @torch.no_grad()
    def forward() -> None:
        with model.disable_adapter(), autocast(model):
            for data in batches:
                model.base_model.model.model(**data)

    return {"calibrate": lambda: calibrate(model, batches), "base_forward": forward}


def resident(table: Tensor) -> int:
    """Bytes of a mapped table that are in memory (Linux)."""
    inside, address = False, table.data_ptr()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "Anonymous:":
            return 1024 * int(rest.split()[0])
    raise ValueError("the table is no mapping of this process")


def big_table(num_steps: int, d: int) -> dict[str, float]:
    """A table of 1,048,576 rows: bytes of its written rows and bytes in memory, after some steps."""
    model = alone(1024, d)
    (memory,) = memory_layers(model).values()
    optimizer, written = row_adamw(model), torch.zeros(0, dtype=torch.int64)
    # the system may report other memory of the process beside the table
    before = resident(memory.values)
    for _ in range(num_steps):
        model(torch.randn(256, d)).backward(torch.randn(256, d))
        optimizer.step()
        written = torch.cat([written, *optimizer.selected.values()]).unique()
        optimizer.zero_grad()
    size, held = 4.0 * d, resident(memory.values) - before
    return {"table": size * memory.num_slots, "written": size * len(written), "resident": held}


def reader(model: Any, ids: Tensor) -> Way:
    @torch.no_grad()
    def read() -> None:
        with autocast(model):
            model.eval()(input_ids=ids)

    return read


def writer(model: Any, ids: Tensor, new_tokens: int) -> Way:
    def write() -> None:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )

    return write
