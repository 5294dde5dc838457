"""The arms and settings of the paper's comparison."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...comparison.compare import BASE


@dataclass(frozen=True)
class Arm:
    """One arm with sparse memory: its retrofit, its mode, what is trained, and the rule that selects rows."""

    retrofit: str
    mode: str
    trainable: str
    rule: str


_RULES = ("kl", "tfidf")
ARMS = {
    **{f"replacement-{rule}": Arm("dense", "replacement", "values", rule) for rule in _RULES},
    **{f"additive-{rule}": Arm("dense", "additive", "values", rule) for rule in _RULES},
    **{f"additive-scale-{rule}": Arm("dense", "additive", "values+scale", rule) for rule in _RULES},
    **{f"calibrated-{rule}": Arm("calibrate", "additive", "values", rule) for rule in _RULES},
}
METHODS = (BASE, *ARMS, "smf", "lora", "full")


@dataclass(frozen=True)
class PaperSettings:
    """The settings of the recipe; the defaults are the paper's."""

    model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    # "float32", "bfloat16", or "auto": the faster one on this machine
    precision: str = "auto"
    train_items: int = 60_000
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 4
    accumulation: int = 4
    max_length: int = 1024
    warmup_steps: int = 100
    top_t: int = 512
    smf_background: int = 300
    lr: Mapping[str, float] = field(
        default_factory=lambda: {"sparse": 5e-4, "smf": 0.8, "lora": 2e-4, "full": 5e-5}
    )
    stage1_epochs: int = 2
    stage1_max_steps: int | None = None
    stage1_batch_size: int = 4
    stage1_accumulation: int = 4
    limit: int = 1000
    fewshot: int = 0
    quirks: bool = False


SETTINGS = PaperSettings()
HUB = {
    "train": "openlifescienceai/medmcqa, train",
    "medmcqa": "openlifescienceai/medmcqa, validation",
    "wikitext": "Salesforce/wikitext wikitext-103-raw-v1, test",
    "triviaqa": "mandarjoshi/trivia_qa rc.nocontext, validation",
    "general": "hub:OpenAssistant/oasst1",
}


def method_settings(settings: PaperSettings, method: str, data: Mapping[str, str]) -> dict[str, Any]:
    """The settings that decide this method's result."""
    kept: dict[str, Any] = {"limit": settings.limit, "fewshot": settings.fewshot}
    kept["data"] = {name: data[name] for name in ("medmcqa", "wikitext", "triviaqa")}
    if method == BASE:
        return kept
    names = ("train_items", "epochs", "max_steps", "batch_size", "accumulation", "max_length", "warmup_steps")
    kept |= {name: getattr(settings, name) for name in names}
    kept["lr"] = settings.lr["sparse" if method in ARMS else method]
    kept["data"]["train"] = data["train"]
    if method in ARMS or method == "smf":
        kept["data"]["general"] = data["general"]
    if method == "smf":
        kept["smf_background"] = settings.smf_background
    if method in ARMS:
        kept |= {**asdict(ARMS[method]), "top_t": settings.top_t, "quirks": settings.quirks}
        if ARMS[method].retrofit == "dense":
            kept["stage1"] = stage1_options(settings)
    return kept


def stage1_options(settings: PaperSettings) -> dict[str, Any]:
    """Options of the dense retrofit's training run."""
    return {
        "lr": 5e-4,
        "epochs": settings.stage1_epochs,
        "max_steps": settings.stage1_max_steps,
        "batch_size": settings.stage1_batch_size,
        "gradient_accumulation_steps": settings.stage1_accumulation,
    }
