"""What a user would pick instead of sparse memory, as the demo and the medical recipe teach it.

| method                    | what                                                                          |
| ------------------------- | ----------------------------------------------------------------------------- |
| lora-1e-4, lora-5e-4      | LoRA as "lora", at another rate                                               |
| lora-mlp                  | LoRA of rank 10 on the MLPs alone, as in PEFT's own benchmark                 |
| lora-replay               | LoRA, general text as every twentieth record                                  |
| lora-kl                   | LoRA, KL divergence from the base on general text added to the loss           |
| osf                       | orthogonal subspace finetuning: 4 % of each matrix's singular directions       |
| shira                     | sparse high-rank adapters at random places                                    |
| full-2e-5, full-5e-5      | full finetuning, at another rate                                              |

Every adapter is PEFT's. LoRA runs without dropout here: drawing it takes a third of a step on a CPU.
"""

import itertools
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
_MLP_LORA = {"peft_type": "LORA", "r": 10, "lora_alpha": 20, "target_modules": list(_LINEAR[4:])}
_SHIRA = {"peft_type": "SHIRA", "r": 32, "target_modules": list(_LINEAR)}
# The rest of the singular directions trains, about 128 of 3,072 in PEFT's own benchmark.
_OSF = {"peft_type": "OSF", "effective_rank": 0.96, "target_modules": list(_LINEAR)}


@dataclass(frozen=True)
class Rival:
    """One rival's settings, as plain values.

    Attributes:
        lr: learning rate of AdamW.
        adapter: fields of the PEFT config; empty: every parameter of the model trains.
        replay: share of the records that is general text.
        kl: weight of the KL divergence from the base on general text.
    """

    lr: float
    adapter: Mapping[str, Any] = field(default_factory=dict)
    replay: float = 0.0
    kl: float = 0.0

    @property
    def has_own_loss(self) -> bool:
        """Whether the loss holds more than what is taught, so that no bound on it says when to stop."""
        return bool(self.replay or self.kl)


RIVALS = {
    "lora-1e-4": Rival(1e-4, _LORA),
    "lora-5e-4": Rival(5e-4, _LORA),
    "lora-mlp": Rival(2e-4, _MLP_LORA),
    "lora-replay": Rival(2e-4, _LORA, replay=0.05),
    "lora-kl": Rival(2e-4, _LORA, kl=1.0),
    "osf": Rival(5e-5, _OSF),
    "shira": Rival(3e-4, _SHIRA),
    "full-2e-5": Rival(2e-5),
    "full-5e-5": Rival(5e-5),
}
# Records of general text that one step's KL divergence is computed on.
_KL_BATCH = 2


def rival_settings(method: str) -> dict[str, Any]:
    """All that decides how a rival is taught, as plain JSON values."""
    return {"rival": asdict(RIVALS[method])}


def rival_start(
    method: str,
    model: Any,
    records: Sequence[dict[str, Any]],
    general: Sequence[Any],
    tokenizer: Any,
    seed: int,
) -> tuple[Any, list[dict[str, Any]], str]:
    """What `finetune` gets to train a rival: the model, the encoded data, and the method's name there."""
    model = rival_model(method, model, seed)
    keep_near_base(method, model, general, tokenizer, seed)
    data = rival_examples(method, records, general, tokenizer, seed)
    return model, data, "peft" if RIVALS[method].adapter else "full"


def rival_model(method: str, model: Any, seed: int) -> Any:
    """The base model with the rival's adapter, if it has one."""
    import peft

    fields = dict(RIVALS[method].adapter)
    if not fields:
        return model
    if fields["peft_type"] == "SHIRA":
        fields["random_seed"] = seed
    return peft.get_peft_model(model, peft.get_peft_config({**fields, "task_type": "CAUSAL_LM"}))


def rival_examples(
    method: str, records: Sequence[dict[str, Any]], general: Sequence[Any], tokenizer: Any, seed: int
) -> list[dict[str, Any]]:
    """The records encoded, and for a rival that replays, general text among them.

    Args:
        general: chats and plain strings.
    """
    from ...data.records import encode, read_records

    examples = encode(list(records), tokenizer)
    if share := RIVALS[method].replay:
        number = round(len(examples) * share / (1 - share))
        drawn = random.Random(seed).sample(list(general), number)
        examples += encode(read_records(_as_records(drawn), mixed=True), tokenizer)
    return examples


def keep_near_base(method: str, model: Any, general: Sequence[Any], tokenizer: Any, seed: int) -> None:
    """Add the KL divergence from the base on general text to every training loss of a rival that wants it.

    KL(base || model) in nats per token, of the model's adapter switched off and on.
    """
    import torch
    from torch.nn import functional

    from ...data.records import batches, encode, read_records

    weight = RIVALS[method].kl
    if not weight:
        return
    examples = encode(read_records(_as_records(general), mixed=True), tokenizer)
    random.Random(seed).shuffle(examples)
    turn = itertools.cycle(batches(examples, _KL_BATCH, tokenizer.pad_token_id))

    def add_divergence(module: Any, _args: Any, output: Any) -> None:
        if not module.training or output.loss is None:
            return
        batch = {key: next_.to(output.loss.device) for key, next_ in next(turn).items() if key != "labels"}
        with torch.no_grad(), module.disable_adapter():
            base = functional.log_softmax(module(**batch).logits.float(), dim=-1)
        new = functional.log_softmax(module(**batch).logits.float(), dim=-1)
        divergence = functional.kl_div(new, base, log_target=True, reduction="none").sum(-1)
        output.loss = output.loss + weight * divergence[batch["attention_mask"].bool()].mean()

    model.register_forward_hook(add_divergence)


def _as_records(general: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"text": one} if isinstance(one, str) else one for one in general]


GATED = "lora-gated"
RANK, LEARNING_RATE, STEPS = 64, 1e-2, 600


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

    from ...adapter.memories import memory_layers
    from ...training.loading import load_data
    from ...training.methods import add_memory, scope_on, taught_states
    from ...training.options import Options
    from ...training.trainer import peak_memory

    options = Options(batch_size=batch_size, seed=seed)
    taught = load_data(model, tokenizer, options, data=records, background=background)
    start = time.perf_counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        memory = stack.enter_context(peak_memory(model))
        set_seed(seed)
        taught = taught.with_mentions(model, options.mentions)
        model, seen = add_memory(model, taught, options)
        states = taught_states(model, taught, options, folder)
        assert states is not None
        scope_on(model, taught, options, seen, states)
        trained = _put_low_rank(memory_layers(model), rank)
        loss = _train(*states, trained, lr, steps, batch_size, seed)
    return model.eval(), {
        "loss": loss,
        "steps": steps,
        "samples": steps * batch_size,
        "seconds": time.perf_counter() - start,
        "trained_params": sum(parameter.numel() for parameter in trained),
        "peak_bytes": memory.peak_bytes,
    }


def _put_low_rank(layers: Mapping[str, Any], rank: int) -> list[Any]:
    """Replace every memory's read by a low-rank map; returns the maps' parameters."""
    from torch import nn

    trained: list[Any] = []
    for memory in layers.values():
        memory.values.requires_grad_(False)
        down, up = nn.Linear(memory.d_in, rank, bias=False), nn.Linear(rank, memory.d_out, bias=False)
        nn.init.zeros_(up.weight)
        memory.low_rank = nn.Sequential(down, up).to(memory.values.device)
        memory.read = partial(_read, memory.low_rank)  # type: ignore[method-assign]
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

    from ...precision import autocast
    from ...training.cached import collate_states
    from ...training.options import MAX_GRAD_NORM

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
