"""Gated LoRA: low-rank maps in place of the tail memory's tables, behind the same gate.

It tells what the gate does from what the memory does. The read layers, the scope, the known states, the
cached states and the loss are sparse memory's; only the read differs: up(down(x)), with `up` zero at first.

Reference: ours (no paper).
"""

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

GATED = "lora-gated"
RANK, LEARNING_RATE, STEPS = 64, 3e-3, 600


def gated_settings() -> dict[str, Any]:
    """The settings that decide the method's result."""
    return {"gated": {"rank": RANK, "lr": LEARNING_RATE, "steps": STEPS}}


def teach_gated_lora(
    model: Any,
    records: Sequence[dict[str, Any]],
    *,
    tokenizer: Any,
    background: Sequence[Any],
    batch_size: int,
    seed: int,
    rank: int = RANK,
    lr: float = LEARNING_RATE,
    steps: int = STEPS,
) -> tuple[Any, dict[str, Any]]:
    """Train in place; returns the model and what training cost, as a row has it.

    Args:
        model: a base model, or one with an empty tail memory.
        background: chats and plain strings.
        lr: of AdamW, falling linearly to 0.
    """
    from transformers import set_seed

    from ..data.records import batches
    from ..training.cached import train_states
    from ..training.finetune import CACHE_BYTES
    from ..training.footprint import peak_memory
    from ..training.loading import MENTION_FORMS, known_batches, load_data, mention_examples
    from ..training.methods import prepare

    options = {"validation": None, "keep": None, "max_length": None, "loss_on": "completion"}
    loaded = load_data(model, "smf", tokenizer, data=records, background=background, **options)
    start = time.perf_counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        memory = stack.enter_context(peak_memory(model))
        set_seed(seed)
        named = mention_examples(model, records, tokenizer, MENTION_FORMS)
        loaded = loaded._replace(kept=[*loaded.kept, *named])
        prepared = prepare(
            model,
            "smf",
            batches=batches(loaded.examples, batch_size, loaded.pad),
            background=loaded.general,
            seed=seed,
            known=partial(known_batches, loaded, tokenizer),
            states=lambda ready: train_states(ready, loaded.examples, loaded.pad, CACHE_BYTES, folder),
        )
        assert prepared.states is not None
        prepared.optimizer.release()
        trained = _put_low_rank(prepared.model, rank)
        loss = _train(*prepared.states, trained, lr, steps, batch_size, seed)
    return prepared.model.eval(), {
        "loss": loss,
        "steps": steps,
        "samples": steps * batch_size,
        "seconds": time.perf_counter() - start,
        "trained_params": sum(parameter.numel() for parameter in trained),
        "peak_bytes": memory.peak_bytes,
    }


def _put_low_rank(model: Any, rank: int) -> list[Any]:
    """Replace every memory's read by a low-rank map; returns the maps' parameters."""
    from torch import nn

    from ..adapter.model import memory_layers

    trained: list[Any] = []
    for memory in memory_layers(model).values():
        memory.values.requires_grad_(False)
        down, up = nn.Linear(memory.d_in, rank, bias=False), nn.Linear(rank, memory.d_out, bias=False)
        nn.init.zeros_(up.weight)
        memory.low_rank = nn.Sequential(down, up).to(memory.values.device)
        memory.read = partial(_read, memory.low_rank)
        trained += memory.low_rank.parameters()
    return trained


def _read(low_rank: Any, x: Any, _counted: Any = None) -> Any:
    return low_rank(x.float())


def _train(
    head: Any, rows: Any, trained: list[Any], lr: float, steps: int, batch_size: int, seed: int
) -> float:
    """Mean loss of the last epoch's worth of steps."""
    import torch
    from torch.utils.data import DataLoader

    from ..precision import autocast
    from ..training.cached import collate_states
    from ..training.methods import MAX_GRAD_NORM

    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(rows, batch_size, shuffle=True, generator=order, collate_fn=collate_states)
    losses: list[float] = []
    while len(losses) < steps:
        for batch in loader:
            with autocast(head.model):
                loss = head(batch["states"], batch["shift_labels"])["loss"]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    last = losses[-len(loader) :]
    return sum(last) / len(last)
