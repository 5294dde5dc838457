"""How the medical recipe teaches each of its methods.

| methods                    | what                                                                          |
| -------------------------- | ----------------------------------------------------------------------------- |
| smf, smf-open              | `finetune`'s memory, on cached states, with the gate and without              |
| smf-own                    | the same memory, each layer adding to its own MLP's output, with the gate     |
| the paper's ARMS           | its memory in three blocks, dense or calibrated, KL or TF-IDF, without a gate |
| lora, full                 | as in the paper                                                               |
| lora-long, full-long       | the same for as many samples as sparse memory sees                            |
| lora-gated                 | low-rank maps behind the memory's gate, see `gated_lora`                      |
| RIVALS                     | see `rivals`                                                                  |

Deviations from 2605.03229: the dense retrofit reads prose that every Python ships, for few steps, and arms
have a rate of their own, ten times the paper's, which is for a hundred times as many steps. It is not tuned.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..comparison.compare import BASE, PARTIAL
from ..writing import write_atomically
from .forgetting import background, tokens
from .gated_lora import GATED, gated_settings, teach_gated_lora
from .paper.run import arm_options, grafted
from .paper.settings import ARMS, Arm
from .rivals import RIVALS, rival_settings, rival_start
from .runs import MEMORY_METHODS, costs, keep_metrics

OWN = "smf-own"
LONG = {"lora-long": "lora", "full-long": "full"}
USUAL = (BASE, "smf", "lora", "full")
METHODS = (BASE, "smf", "smf-open", OWN, *ARMS, "lora", "full", *LONG, GATED, *RIVALS)


@dataclass(frozen=True)
class ArmSettings:
    """Of the paper's arms; stage 1 is the dense retrofit."""

    lr: float = 5e-3
    top_t: int = 512
    stage1_steps: int = 100
    stage1_batch_size: int = 8
    stage1_tokens: int = 50_000
    stage1_piece_tokens: int = 128


@dataclass(frozen=True)
class MedicalSettings:
    """All settings of the recipe."""

    model: str = "smollm2"
    # "float32", "bfloat16", or "auto": the faster one on this machine
    precision: str = "auto"
    num_train: int = 2400
    num_test: int = 400
    # test on categories taken out of the training records, to choose settings
    choosing: bool = False
    max_steps: int = 150
    # on cached states and with a decaying rate: three passes over the records
    memory_steps: int = 900
    batch_size: int = 8
    lr: Mapping[str, float] = field(
        default_factory=lambda: {"smf": 0.4, "smf-open": 0.4, OWN: 0.4, "lora": 2e-4, "full": 5e-5}
    )
    arms: ArmSettings = ArmSettings()
    max_new_tokens: int = 12
    prose_tokens: int = 3000
    background_tokens: int = 2048
    piece_tokens: int = 256


def num_steps(settings: MedicalSettings, method: str) -> int:
    return settings.memory_steps if method in (*MEMORY_METHODS, *LONG) else settings.max_steps


def method_settings(settings: MedicalSettings, method: str) -> dict[str, Any]:
    """The settings that decide this method's result; changing one method keeps the others' runs valid."""
    kept = asdict(settings)
    del kept["model"], kept["precision"], kept["memory_steps"]
    if not settings.choosing:
        del kept["choosing"]
    rates, arms = kept.pop("lr"), kept.pop("arms")
    kept["max_steps"] = num_steps(settings, method)
    if method == BASE:
        return kept
    if method == GATED:
        return kept | gated_settings()
    if method in RIVALS:
        return kept | rival_settings(method)
    if method in ARMS:
        return kept | {"arm": asdict(ARMS[method]), **arms}
    return kept | {"lr": rates[LONG.get(method, method)]}


def teach(
    settings: MedicalSettings,
    method: str,
    seed: int,
    model: Any,
    tokenizer: Any,
    records: list[dict[str, Any]],
    folder: Path,
) -> tuple[Any, dict[str, Any]]:
    """Train the method's model on the records; returns it and the costs. An interrupted training continues.

    Args:
        model: the base model; an arm loads its grafted one instead.
        folder: of the run, in the comparison's folder, where arms share their dense retrofit.
    """
    from peft import get_peft_model

    from ..training.finetune import finetune
    from ..training.methods import memory_config

    general = []
    if method in (*MEMORY_METHODS, OWN, GATED, *RIVALS):
        general = background(seed, tokenizer, settings.background_tokens, settings.piece_tokens)
    data: list[dict[str, Any]] = records
    options: dict[str, Any] = {"lr": settings.lr.get(LONG.get(method, method))}
    known_as = {OWN: "smf", **LONG}.get(method, method)
    if method in ARMS:
        model, options = _arm(settings, ARMS[method], tokenizer, folder.parents[1])
        known_as = "smf-open"
    if method == GATED:
        options = {"background": general, "batch_size": settings.batch_size, "seed": seed}
        return teach_gated_lora(model, records, tokenizer=tokenizer, **options)
    if method in RIVALS:
        options = {"lr": RIVALS[method].lr}
        model, data, known_as = rival_start(method, model, records, general, tokenizer, seed)
    if method == OWN:
        model = get_peft_model(model, memory_config(write="own"))
    if method in (*MEMORY_METHODS, OWN):
        options["background"] = general
    done = finetune(
        model,
        data,
        known_as,
        tokenizer=tokenizer,
        max_steps=num_steps(settings, method),
        batch_size=settings.batch_size,
        seed=seed,
        output_dir=folder / PARTIAL,
        resume=True,
        **options,
    )
    keep_metrics(folder)
    return done.model, costs(done, settings.batch_size)


def _arm(settings: MedicalSettings, arm: Arm, tokenizer: Any, out: Path) -> tuple[Any, dict[str, Any]]:
    """The grafted model of one of the paper's arms, and `finetune`'s options for it."""
    from ..data.general import prose
    from ..data.models import load

    chosen = settings.arms
    ids = tokens(tokenizer, prose()[0], chosen.stage1_tokens)
    pieces = map(tokenizer.decode, ids.split(chosen.stage1_piece_tokens))
    source = out / "stage1" / "prose.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"text": piece}) + "\n" for piece in pieces)
    write_atomically(source, lambda path: path.write_text(text, encoding="utf-8"))
    stage1 = {"lr": 5e-4, "max_steps": chosen.stage1_steps, "batch_size": chosen.stage1_batch_size}
    start = grafted(settings.model, str(source), arm, out, 2 * chosen.stage1_piece_tokens, stage1)
    model = load(str(start))[0]
    return model, arm_options(model, arm, start) | {
        "lr": chosen.lr,
        "rest_lr": chosen.lr,
        "top_t": chosen.top_t,
    }
