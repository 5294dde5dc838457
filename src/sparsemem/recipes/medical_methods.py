"""How the medical recipe teaches each of its methods.

| methods                    | what                                                                          |
| -------------------------- | ----------------------------------------------------------------------------- |
| smf, smf-open              | `finetune`'s memory, on cached states, with the gate and without              |
| smf-own                    | the same memory, each layer adding to its own MLP's output, with the gate     |
| the paper's ARMS           | its memory in three blocks, dense or calibrated, KL or TF-IDF, without a gate |
| lora, full                 | as in the paper                                                               |
| lora-long, full-long       | the same for as many samples as sparse memory sees                            |
| RIVALS                     | see `rivals`                                                                  |

Deviations from 2605.03229: the dense retrofit reads prose that every Python ships, for few steps, and arms
have a rate of their own, chosen by training loss: the paper's is for a hundred times as many steps.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..comparison.compare import BASE
from ..writing import write_atomically
from .forgetting import background, tokens
from .paper.run import arm_options, grafted
from .paper.settings import ARMS
from .rivals import RIVALS, keep_near_base, rival_examples, rival_model, rival_settings
from .runs import MEMORY_METHODS

OWN = "smf-own"
LONG = {"lora-long": "lora", "full-long": "full"}
METHODS = (BASE, "smf", "smf-open", OWN, *ARMS, "lora", "full", *LONG, *RIVALS)


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


class Teaching(NamedTuple):
    """What `finetune` gets: the model, the data, the method's name there, and options."""

    model: Any
    data: Sequence[dict[str, Any]]
    method: str
    options: dict[str, Any]


def num_steps(settings: MedicalSettings, method: str) -> int:
    return settings.memory_steps if method in (*MEMORY_METHODS, *LONG) else settings.max_steps


def method_settings(settings: MedicalSettings, method: str) -> dict[str, Any]:
    """The settings that decide this method's result; changing one method keeps the others' runs valid."""
    kept = asdict(settings)
    del kept["model"], kept["precision"], kept["memory_steps"]
    rates, arms = kept.pop("lr"), kept.pop("arms")
    kept["max_steps"] = num_steps(settings, method)
    if method == BASE:
        return kept
    if method in RIVALS:
        return kept | rival_settings(method)
    if method in ARMS:
        return kept | {"arm": asdict(ARMS[method]), **arms}
    return kept | {"lr": rates[LONG.get(method, method)]}


def teaching(
    settings: MedicalSettings,
    method: str,
    seed: int,
    tokenizer: Any,
    records: Sequence[dict[str, Any]],
    out: Path,
) -> Teaching:
    """The untaught model of a method, and how to teach it the records.

    Args:
        out: the comparison's folder, where arms share their dense retrofit.
    """
    from peft import get_peft_model

    from ..data.models import load_base
    from ..training.methods import memory_config

    if method in ARMS:
        return _arm(settings, method, tokenizer, records, out)
    model = load_base(settings.model)[0]
    general = background(seed, tokenizer, settings.background_tokens, settings.piece_tokens)
    if method in RIVALS:
        rival = RIVALS[method]
        model = rival_model(method, model, seed)
        keep_near_base(method, model, general, tokenizer, seed)
        data = rival_examples(method, records, general, tokenizer, seed)
        return Teaching(model, data, "peft" if rival.adapter else "full", {"lr": rival.lr})
    options: dict[str, Any] = {"lr": settings.lr[LONG.get(method, method)]}
    if method == OWN:
        model = get_peft_model(model, memory_config(write="own"))
    if method in (*MEMORY_METHODS, OWN):
        options["background"] = general
    known = {OWN: "smf", **LONG}
    return Teaching(model, records, known.get(method, method), options)


def _arm(
    settings: MedicalSettings, method: str, tokenizer: Any, records: Sequence[dict[str, Any]], out: Path
) -> Teaching:
    from ..data.general import prose
    from ..data.models import load

    arm, chosen = ARMS[method], settings.arms
    ids = tokens(tokenizer, prose()[0], chosen.stage1_tokens)
    pieces = map(tokenizer.decode, ids.split(chosen.stage1_piece_tokens))
    source = out / "stage1" / "prose.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"text": piece}) + "\n" for piece in pieces)
    write_atomically(source, lambda path: path.write_text(text, encoding="utf-8"))
    stage1 = {"lr": 5e-4, "max_steps": chosen.stage1_steps, "batch_size": chosen.stage1_batch_size}
    start = grafted(settings.model, str(source), arm, out, 2 * chosen.stage1_piece_tokens, stage1)
    model = load(str(start))[0]
    options = arm_options(model, arm, start) | {"lr": chosen.lr, "rest_lr": chosen.lr, "top_t": chosen.top_t}
    return Teaching(model, records, "smf-open", options)
