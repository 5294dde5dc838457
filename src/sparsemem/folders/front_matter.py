"""The front matter of a model card: the YAML that the Hub reads.

Choices: keys that a user adds (language, license, ...) are kept; our own keys are written anew.
"""

import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from .contents import CARD_FILE, Contents
from .entries import data_name, options_text
from .names import hub_base

_OURS = (
    "base_model",
    "base_model_relation",
    "library_name",
    "model-index",
    "model_name",
    "pipeline_tag",
    "tags",
)


def read_front_matter(folder: Path) -> dict[str, Any]:
    """The front matter of a folder's card; empty if there is no card.

    Raises:
        ValueError: it is not valid YAML.
    """
    readme = folder / CARD_FILE
    try:
        return (metadata_load(readme) or {}) if readme.is_file() else {}
    except YAMLError as error:
        raise ValueError(
            f"{readme} begins with broken YAML ({error}); correct it, or remove the file"
        ) from error


def new_front_matter(folder: Path, made: Contents, name: str) -> ModelCardData:
    """The front matter for a folder with these contents, published under this name."""
    kept = {key: value for key, value in read_front_matter(folder).items() if key not in _OURS}
    base = hub_base(made.base)
    # the Hub rejects a base model that is not a Hub name
    if base is not None:
        kept |= {"base_model": base, "base_model_relation": "adapter" if made.adapter else "finetune"}
    kind = "sparse-memory" if made.rows else made.metrics["method"]
    return ModelCardData(
        **kept,
        library_name="peft" if made.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["sparsemem", kind],
        model_name=name,
        eval_results=[result for entry in made.results for result in _eval_results(entry)] or None,
    )


def _eval_results(entry: dict[str, Any]) -> list[EvalResult]:
    data = data_name(entry).removeprefix("hub:")
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data,
            dataset_name=data,
            dataset_config=options_text(entry) or None,
            metric_type=metric,
            metric_name=f"{entry['task']}: {metric}",
            metric_value=value,
        )
        for metric, value in _numbers(entry["metrics"]).items()
    ]


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The finite numbers; the Hub accepts no others."""
    return {k: v for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
