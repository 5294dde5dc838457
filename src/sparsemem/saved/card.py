"""The model card (README.md) of a folder that graft or train made: data, method, settings and results.

Choices: everything is read from the folder, so the card can be written again whenever something in the folder
changes. Data and models appear by file name or Hub name, never by a local path. Only what a user adds to the
front matter (language, license, ...) is kept; other changes to the card are lost.
"""

import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from ..atomic import read_json, write_atomically, write_json
from ..data.names import PACKAGED, hub_base, public_data, public_model
from ..provenance import differences, environment
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
    "lora": "a LoRA adapter",
    "full": "a copy of the base model with every parameter trained",
}
_FIGURES = ("steps", "loss", "seconds", "trained_params", "truncated")
_SHAPE = (
    "num_keys", "num_heads", "top_k", "key_dim", "mode", "value_gate", "trainable", "base_fingerprint",
    "r", "lora_alpha", "lora_dropout",
)  # fmt: skip
_ELSEWHERE = ("model", "data", "background", "background_records", "records", "method")


def model_card(folder: Path, *, name: str | None = None) -> str:
    """The text of README.md for an adapter or model folder: front matter for the Hub, then Markdown.

    After a patch was applied or reverted, the card describes the present weights. It leaves out results that
    were measured on other weights.

    Args:
        folder: a folder that `sparsemem graft` or `sparsemem train` made.
        name: the name by which the example code loads the folder; NAMESPACE/NAME loads it from the Hub.
            Default: the folder's name.

    Raises:
        ValueError: the folder was not made by sparsemem, or a file in it cannot be read.
    """
    folder = Path(folder)
    made = read_contents(folder)
    name = name or folder.resolve().name
    sections = {
        "Training data": _taught(made),
        "Method and settings": _how(folder, made),
        "Results": _probed(made),
        "How to use it": _use(folder, made, name),
        "Limits": _limits(made),
        "Versions": _versions(made),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    end = (
        "sparsemem wrote this card from the files beside it; it is rewritten when results or patches change."
    )
    front = new_front_matter(folder, made, name).to_yaml(line_break="\n")
    return f"---\n{front}\n---\n\n# {escape(name)}\n\n{_about(made)}\n\n{body}\n\n{end}\n"


def write_card(folder: Path, name: str | None = None) -> None:
    """Write the folder's README.md from its other files; see `model_card`."""
    text = model_card(folder, name=name)
    write_atomically(folder / CARD_FILE, lambda part: part.write_text(text, encoding="utf-8"))


def _about(made: Contents) -> str:
    method = made.metrics.get("method")
    empty = method == "graft" and not made.num_written
    about = _ABOUT.get(method or "", "a sparse memory") if method != "graft" or empty else "a sparse memory"
    parts = [f"For {_base(made)}: {about}."]
    if made.patch is not None and not made.applied:
        parts.append(
            f"**`{PATCH_FILE}` is not in these weights**: it was reverted, or its rows were overwritten. "
            "The run described below does not describe what this folder does now."
        )
    if method == "graft" and not empty:
        parts.append("**Rows of its memory were written by a patch** that is not among the files here.")
    return "\n\n".join(parts)


def _base(made: Contents) -> str:
    hub, name = hub_base(made.base), public_model(made.base)
    if hub is None:
        return f"the local model {escape(name)}" if name else "a model without a name"
    link = f"[{escape(hub)}](https://huggingface.co/{hub})"
    return f"{link}, in the {PACKAGED[name][1]}" if name in PACKAGED else link


def _taught(made: Contents) -> str:
    settings, num_records = made.metrics.get("settings", {}), made.metrics.get("num_records")
    told = {**(made.patch.info if made.patch else {}), **settings}
    number = f", {num_records:,} records" if num_records else ""
    if "data" not in told:
        general = settings.get("background")
        calibrated = (
            f"; the memory was calibrated on {escape(public_data(general))}{number}" if general else ""
        )
        return f"No file here names training data{calibrated}."
    lines = [f"- data: {escape(public_data(told['data']))}{number}"]
    if "records" in told:
        lines.append(f"- SHA-256 of the records: {escape(told['records'])}")
    if "background" in told:
        lines.append(f"- calibrated on: {escape(public_data(told['background']))}")
    lines.append(f"- method: {escape(str(made.metrics.get('method') or told.get('method')))}")
    return "\n".join(lines)


def _how(folder: Path, made: Contents) -> str:
    parts = []
    if made.rows:
        layers = describe_patch(made.patch)["layers"] if made.patch else {}
        head = ["layer", "slots", "rows that are not zero", "rows of the patch", "scope centres of the patch"]
        rows = []
        for name, (written, slots) in made.rows.items():
            layer = layers.get(name, {})
            rows.append([name, slots, written, layer.get("rows"), layer.get("centres")])
        parts.append(table(head, rows))
    if made.patch is not None:
        parts.append(f"SHA-256 of `{PATCH_FILE}`: {file_digest(folder / PATCH_FILE)}")
    figures = {key: made.metrics.get(key) for key in _FIGURES}
    chosen = {k: v for k, v in made.metrics.get("settings", {}).items() if k not in _ELSEWHERE}
    shape = {key: made.adapter.get(key) for key in _SHAPE}
    rows = [
        [key, show_setting(value)]
        for key, value in {**figures, **chosen, **shape}.items()
        if value is not None
    ]
    return "\n\n".join([*parts, table(["figure or setting", "value"], rows)])


def _probed(made: Contents) -> str:
    rows = []
    for entry in made.results:
        options, base = options_text(entry), entry.get("base") or {}
        task = f"{entry['task']} ({options})" if options else entry["task"]
        for metric, value in entry["metrics"].items():
            rows.append(
                [task, data_name(entry), metric, value, base.get(metric), entry.get("n"), entry.get("date")]
            )
    head = ["task", "data", "metric", "this model", "base", "n", "date"]
    parts = [table(head, rows)] if rows else []
    if made.num_stale:
        parts.append(
            f"Results of {made.num_stale} earlier evaluations are left out: "
            "they were measured on other weights."
        )
    return "\n\n".join(parts) or "No results yet; `sparsemem eval ... --record` adds them."


def _use(folder: Path, made: Contents, name: str) -> str:
    on_hub, name = "/" in name, json.dumps(name)
    base = json.dumps(public_model(made.base) or "BASE")
    lines = ["from sparsemem.data.models import load_base", ""]
    if made.adapter:
        where = "" if hub_base(made.base) else "  # or the path of your copy"
        lines[0:0] = ["import sparsemem  # registers the method with PEFT", "from peft import PeftModel"]
        lines += [
            f"base, tokenizer = load_base({base}){where}",
            f"model = PeftModel.from_pretrained(base, {name})",
        ]
    else:
        lines += [f"model, tokenizer = load_base({name})"]
    if (folder / "chat_template.jinja").is_file():
        lines += [
            'messages = [{"role": "user", "content": "Hello!"}]',
            'options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}',
            "inputs = tokenizer.apply_chat_template(messages, **options)",
        ]
    else:
        lines += ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    lines += ["print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"]
    if made.patch is not None:
        lines += ["", "from sparsemem import RowPatch"]
        if on_hub:
            lines += ["from huggingface_hub import hf_hub_download"]
        file = f'hf_hub_download({name}, "{PATCH_FILE}")' if on_hub else f'{name} + "/{PATCH_FILE}"'
        taken_back = "patch.revert(model)  # removes what was taught; the weights are as before, to the byte"
        moves = [taken_back, "patch.apply(model)  # writes the rows again"]
        lines += ["", f"patch = RowPatch.load({file})", *(moves if made.applied else moves[1:])]
    install = "Install first: `pip install sparsemem`." if made.adapter else ""
    return "\n".join([*([install, ""] if install else []), "```python", *lines, "```"])


def _limits(made: Contents) -> str:
    lines = ["- Only the results above were measured; nothing is known about other tasks."]
    if made.metrics.get("method") == "smf" and made.adapter.get("mode") == "additive":
        lines.append("- If no token of an input is in scope, the logits are exactly the base model's.")
    for entry in made.results:
        if "exposure" in entry["metrics"]:
            lines.append(
                f"- Exposure on {escape(data_name(entry))} is the share of its tokens that are in scope and "
                "read a written row. From such a token on, the output may differ from the base model's."
            )
    return "\n".join(lines)


def _versions(made: Contents) -> str:
    rows = [*made.metrics.get("versions", {}).items()]
    rows += [(key, made.metrics[key]) for key in ("commit", "machine") if made.metrics.get(key)]
    return table(["part", "version"], [list(row) for row in rows]) if rows else "Not recorded."


# Keys of the results and their circumstances. All other keys are options of the evaluation.
FOUND = ("metrics", "base", "n", "weights", "date", "versions", "commit")


def asked(entry: dict[str, Any]) -> dict[str, Any]:
    """The options of the evaluation: task, data, limit and so on."""
    return {key: value for key, value in entry.items() if key not in FOUND}


def data_name(entry: dict[str, Any]) -> str:
    """The data's public name; for a benchmark from the Hub, the name of its task."""
    return public_data(entry["data"]) if entry.get("data") else str(entry["task"])


def options_text(entry: dict[str, Any]) -> str:
    """The options other than task and data, for example `limit 100`."""
    known = ("task", "data", *FOUND)
    if entry.get("precision") == "float32":
        known += ("precision",)
    return ", ".join(
        f"{key} {show_setting(v)}" for key, v in entry.items() if key not in known and v is not None
    )


def show_setting(value: Any) -> str:
    """A setting for readers. Text may be a path, so only its public name is shown."""
    return public_model(value) if isinstance(value, str) else show(value)


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


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; cells are escaped."""
    lines = [head, ["---"] * len(head), *([escape(show(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(value: Any) -> str:
    """A value for readers: floats with four digits, whole numbers with commas, None as a dash."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else str(value)


def escape(text: str) -> str:
    """The text on one line, with Markdown's special characters escaped."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_\[\]<>|~&#])", r"\\\1", one_line)


def record(folder: Path, entry: dict[str, Any]) -> None:
    """Add the results of an evaluation to the folder's `evaluations.json`, and write the model card again.

    The date, the versions, the commit and the digest of the present weights are added to the entry. The entry
    replaces an older one with the same task, data and options (all keys except `entries.FOUND`).

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
    others = [old for old in there if differences(asked(old), asked(entry))]
    about = environment()
    entry = {**entry, "date": f"{datetime.now(UTC):%Y-%m-%d}", "weights": weights_digest(folder)}
    entry |= {key: about[key] for key in ("versions", "commit")}
    write_json(folder / EVALUATIONS_FILE, [*others, entry])
    write_card(folder)
