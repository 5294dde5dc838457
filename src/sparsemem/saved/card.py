"""The model card (README.md) of a folder that graft, train or learn made; `card.md.jinja` is its text.

Choices: everything is read from the folder, so the card can be written again whenever something in the folder
changes. Data and models appear by file name or Hub name, never by a local path. Only what a user adds to the
front matter (language, license, ...) is kept; other changes to the card are lost.
"""

import json
import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from ..atomic import read_json, write_atomically, write_json
from ..data.names import PACKAGED, hub_base, public_data, public_model
from ..provenance import differences, environment
from ..stream.folder import first_question
from .contents import (
    CARD_FILE,
    EVALUATIONS_FILE,
    PATCH_FILE,
    Contents,
    check_made,
    describe_patch,
    file_digest,
    read_contents,
    weights_digest,
)

_ABOUT = {
    "graft": "an empty sparse memory; nothing is taught yet, so every answer is the base model's",
    "smf": "a sparse memory; rows of an added table were trained, and act within the training data's scope",
    "smf-open": "a sparse memory; rows of an added table were trained, without a scope",
    "learn": "a sparse memory to which tasks were taught one after another; each acts within its own scope",
    "lora": "a LoRA adapter",
    "full": "a copy of the base model with every parameter trained",
}
_FIGURES = ("steps", "loss", "seconds", "trained_params", "truncated")
_SHAPE = (
    "num_keys", "num_heads", "top_k", "key_dim", "mode", "value_gate", "trainable", "base_fingerprint",
    "r", "lora_alpha", "lora_dropout",
)  # fmt: skip
# settings that other sections of the card show
_ELSEWHERE = ("model", "data", "background", "background_records", "records", "method")
# tasks that ask what was not taught about what was taught
_NEIGHBOURS = ("mentions", "neighbours")


def write_card(folder: Path, name: str | None = None) -> None:
    """Write the folder's README.md from its other files; see `model_card`."""
    text = model_card(folder, name=name)
    write_atomically(folder / CARD_FILE, lambda part: part.write_text(text, encoding="utf-8"))


def model_card(folder: Path, *, name: str | None = None, name_tasks: bool = False) -> str:
    """The text of README.md for an adapter or model folder: front matter for the Hub, then Markdown.

    After a patch was applied or reverted, the card describes the present weights. It leaves out results that
    were measured on other weights.

    Args:
        folder: a folder that `sparsemem graft`, `train` or `learn` made.
        name: the name by which the example code loads the folder; NAMESPACE/NAME loads it from the Hub.
            Default: the folder's name.
        name_tasks: of a folder of `learn`: list its tasks, each with its first question.

    Raises:
        ValueError: the folder was not made by sparsemem, or a file in it cannot be read.
    """
    folder = Path(folder)
    made = read_contents(folder)
    name = name or folder.resolve().name
    settings, method = made.metrics.get("settings", {}), made.method
    named = [(entry["task"], first_question(folder, entry)) for entry in made.tasks] if name_tasks else []
    chat = (folder / "chat_template.jinja").is_file()
    first = next((question for _, question in named if question), None)
    number = made.metrics.get("num_records")
    # a memory that a patch was written into is no longer empty
    about = "a sparse memory" if method == "graft" and made.num_written else _ABOUT.get(method)
    return _template().render(
        front=front_matter(folder, made, name).to_yaml(line_break="\n"),
        name=name,
        made=made,
        method=method,
        settings=settings,
        base=_linked(made.base),
        base_name=public_model(made.base) or "BASE",
        on_hub_base=hub_base(made.base) is not None,
        about=about or "a sparse memory",
        taught={**(made.patch.info if made.patch else {}), **settings},
        number=f", {number:,} records" if number else "",
        named_tasks=named,
        layers=list(_layers(made)),
        patch_digest=file_digest(folder / PATCH_FILE) if made.patch else "",
        figures=[[key, _setting(value)] for key, value in _figures(made).items() if value is not None],
        results=list(_results(made)),
        chat=chat,
        question=first or ("Hello!" if chat else "Once upon a time"),
        scoped=method in ("smf", "learn") and made.adapter.get("mode") == "additive",
        about_neighbours=any(entry["task"] in _NEIGHBOURS for entry in made.results),
        exposed=[_data_name(entry) for entry in made.results if "exposure" in entry["metrics"]],
        versions=_versions(made),
    )


def _template() -> jinja2.Template:
    # a name that is missing must not become an empty text
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"plain": _escape, "data": public_data, "quoted": json.dumps}
    environment.filters["shown"] = lambda value: _escape(_show(value))
    return environment.from_string(Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8"))


def _linked(base: str) -> str:
    hub, name = hub_base(base), public_model(base)
    if hub is None:
        return f"the local model {_escape(name)}" if name else "a model without a name"
    link = f"[{_escape(hub)}](https://huggingface.co/{hub})"
    return f"{link}, in the {PACKAGED[name][1]}" if name in PACKAGED else link


def _layers(made: Contents) -> Iterator[list[Any]]:
    if made.ledger is not None:
        return
    layers = describe_patch(made.patch)["layers"] if made.patch else {}
    for name, (written, slots) in made.rows.items():
        layer = layers.get(name, {})
        yield [name, slots, written, layer.get("rows"), layer.get("centres")]


def _figures(made: Contents) -> dict[str, Any]:
    figures = {key: made.metrics.get(key) for key in _FIGURES}
    figures |= {k: v for k, v in made.metrics.get("settings", {}).items() if k not in _ELSEWHERE}
    if made.ledger is not None:
        seconds = sum(entry["seconds"] for entry in made.tasks)
        figures |= {"seconds": seconds, "bytes of all patches": sum(entry["bytes"] for entry in made.tasks)}
        # the table that every memory has stays empty: only these say how it reads
        return figures | {
            key: made.adapter.get(key) for key in ("mode", "target_modules", "base_fingerprint")
        }
    return figures | {key: made.adapter.get(key) for key in _SHAPE}


def _results(made: Contents) -> Iterator[list[Any]]:
    for entry in made.results:
        options, base = _options(entry), entry.get("base") or {}
        task = f"{entry['task']} ({options})" if options else entry["task"]
        for metric, value in entry["metrics"].items():
            yield [
                task,
                _data_name(entry),
                metric,
                value,
                base.get(metric),
                entry.get("n"),
                entry.get("date"),
            ]


def _versions(made: Contents) -> list[list[Any]]:
    held = made.ledger.about if made.ledger is not None else made.metrics
    rows = [*held.get("versions", {}).items()]
    rows += [(key, held[key]) for key in ("commit", "machine") if held.get(key)]
    return [list(row) for row in rows]


# Keys of the front matter that are written anew; a user's others are kept.
_OURS = (
    "base_model", "base_model_relation", "library_name", "model-index", "model_name", "pipeline_tag", "tags",
)  # fmt: skip


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


def front_matter(folder: Path, made: Contents, name: str) -> ModelCardData:
    """The front matter for a folder with these contents, published under this name."""
    kept = {key: value for key, value in read_front_matter(folder).items() if key not in _OURS}
    base = hub_base(made.base)
    # the Hub rejects a base model that is not a Hub name
    if base is not None:
        kept |= {"base_model": base, "base_model_relation": "adapter" if made.adapter else "finetune"}
    return ModelCardData(
        **kept,
        library_name="peft" if made.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["sparsemem", "sparse-memory" if made.rows else made.metrics["method"]],
        model_name=name,
        eval_results=[result for entry in made.results for result in _eval_results(entry)] or None,
    )


def _eval_results(entry: dict[str, Any]) -> Iterator[EvalResult]:
    data = _data_name(entry).removeprefix("hub:")
    for metric, value in entry["metrics"].items():
        # the Hub accepts only finite numbers
        if isinstance(value, int | float) and math.isfinite(value):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=data,
                dataset_name=data,
                dataset_config=_options(entry) or None,
                metric_type=metric,
                metric_name=f"{entry['task']}: {metric}",
                metric_value=value,
            )


# Keys of an entry of evaluations.json that hold what was found; all others say what was asked.
_FOUND = ("metrics", "base", "n", "weights", "date", "versions", "commit")


def record(folder: Path, entry: dict[str, Any]) -> None:
    """Add the results of an evaluation to the folder's `evaluations.json`, and write the model card again.

    The date, the versions, the commit and the digest of the present weights are added to the entry. The entry
    replaces an older one with the same task, data and options.

    Args:
        folder: an adapter or model that sparsemem made.
        entry: `{"task", "data", "limit", "metrics", "n"}`, if known also `"base"` (the base model's metrics),
            and further options.

    Raises:
        ValueError: the folder holds no adapter or model that sparsemem made.
    """
    check_made(folder)
    read_front_matter(folder)
    there = read_json(folder / EVALUATIONS_FILE) if (folder / EVALUATIONS_FILE).is_file() else []
    others = [old for old in there if differences(_asked(old), _asked(entry))]
    about = environment()
    entry = {**entry, "date": f"{datetime.now(UTC):%Y-%m-%d}", "weights": weights_digest(folder)}
    entry |= {key: about[key] for key in ("versions", "commit")}
    write_json(folder / EVALUATIONS_FILE, [*others, entry])
    write_card(folder)


def _asked(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in _FOUND}


def _data_name(entry: dict[str, Any]) -> str:
    """The data's public name; for a benchmark from the Hub, the name of its task."""
    return public_data(entry["data"]) if entry.get("data") else str(entry["task"])


def _options(entry: dict[str, Any]) -> str:
    """The options other than task and data, for example `limit 100`."""
    known = ["task", "data", *(["precision"] if entry.get("precision") == "float32" else [])]
    options = {key: value for key, value in _asked(entry).items() if key not in known and value is not None}
    return ", ".join(f"{key} {_show(_setting(value))}" for key, value in options.items())


def _setting(value: Any) -> Any:
    """A setting for readers. Text may be a path, so only its public name is shown."""
    return public_model(value) if isinstance(value, str) else value


def _show(value: Any) -> str:
    """A value for readers: floats with four digits, whole numbers with commas, None as a dash."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else str(value)


def _escape(text: str) -> str:
    """The text on one line, with Markdown's special characters escaped."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_\[\]<>|~&#])", r"\\\1", one_line)
