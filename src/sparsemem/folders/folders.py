"""The folders that the command line makes: a grafted adapter, a trained model, an adapter after a patch."""

import hashlib
import json
import shutil
import tempfile
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..background.background import Background
from ..data.general import SHIPPED, general_background, say_shipped
from ..files import read_json, write_atomically, write_json
from ..processes import is_first
from ..provenance import differences, environment
from .card import FOUND, front_matter, model_card
from .contents import (
    ADAPTER_FILE,
    BACKGROUND_FILE,
    CARD_FILE,
    EVALUATIONS_FILE,
    METRICS_FILE,
    PATCH_FILE,
    check_made,
    describe_patch,
    public_data,
    weights_digest,
)  # fmt: skip
from .staging import checkpoints_of, new_folder, refuse_existing, refuse_other_settings

BATCH_SIZE = 8
# Methods whose memory is calibrated on general text.
CALIBRATED = ("smf", "smf-open")


def graft(
    name: str,
    source: str,
    out: Path,
    *,
    seed: int,
    max_length: int,
    memory: dict[str, Any],
    retrofit: str = "calibrate",
    resume: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Give a base model a memory, make it useful on general text, and save adapter, background and tokenizer.

    Args:
        retrofit: "calibrate", or "dense", see `dense_retrofit`.
        resume: take up an interrupted dense retrofit.
        options: of the dense retrofit's `finetune`: lr, epochs, max_steps, batch_size.

    Returns what was made: each memory layer's use of its slots, the number of tokens of general text, and
    for a dense retrofit its steps and losses.

    Raises:
        ValueError: bad data, an unknown model, a memory that does not fit it, a folder that is there already,
            or a retrofit to resume of other settings.
    """
    from peft import get_peft_model
    from transformers import set_seed

    from ..adapter.model import memory_layers
    from ..background.calibration import addressing_report, calibrate
    from ..data.models import load_base
    from ..data.records import batches, encode
    from ..training.methods import memory_config, retrofit_config
    from ..training.retrofit import dense_retrofit, general_records

    records = general_records(source)
    settings = {"model": _absolute(name), "background": public_data(source), "records": _digest(records)}
    settings |= {"retrofit": retrofit, "seed": seed, "max_length": max_length, "memory": memory}
    settings |= options or {}
    if resume and (out / METRICS_FILE).exists():
        made = read_json(out / METRICS_FILE)
        refuse_other_settings(out, made["settings"], settings)
        return {"out": str(out), **made}
    refuse_existing(out)
    base, tokenizer = load_base(_absolute(name))
    max_length = min(max_length, getattr(base.config, "max_position_embeddings", None) or max_length)
    examples = encode(records, tokenizer, max_length=max_length, loss_on="all")
    config = memory_config(**memory) if retrofit == "calibrate" else retrofit_config(base, **memory)
    set_seed(seed)
    model: Any = get_peft_model(base, config)
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    made: dict[str, Any] = {"tokens": sum(len(one["input_ids"]) for one in examples)}
    with checkpoints_of(out, settings, resume) if retrofit == "dense" else nullcontext() as checkpoints:
        if checkpoints is None:
            background = calibrate(model, batches(examples, BATCH_SIZE, pad), seed=seed)
        else:
            options = {"seed": seed, **(options or {})}
            background, figures = dense_retrofit(model, examples, tokenizer, checkpoints, resume, **options)
            made |= figures
        made["layers"] = {
            layer: {"slots": table.num_slots, **addressing_report(background[layer])}
            for layer, table in memory_layers(model).items()
        }
        about = {"method": "graft", "num_records": len(records), "settings": settings, **environment()}
        with new_folder(out) as part:
            _save(part, model, tokenizer, background)
            write_json(part / METRICS_FILE, {**made, **about})
            write_card(part, out.name)
        if checkpoints is not None:
            shutil.rmtree(checkpoints, ignore_errors=not is_first())
    return {"out": str(out), **made}


def train(
    name: str,
    source: str,
    out: Path,
    *,
    method: str,
    resume: bool,
    options: dict[str, Any],
    background: str | None = None,
    trainable: str | None = None,
) -> dict[str, Any]:
    """Finetune a model or an adapter and save what came of it; returns the content of its `metrics.json`.

    Args:
        background: general text on which a base model's new memory is calibrated; None: the text that ships
            with the package. An adapter has its own.
        trainable: what of the adapter's memory trains, if other than it says itself.
        options: of `finetune`.

    Raises:
        ValueError: bad data or model, a folder that is there already, a run to resume of other settings, or a
            background where none is used.
    """
    from peft import get_peft_model
    from transformers import set_seed

    from ..adapter.model import set_trainable
    from ..data.models import load
    from ..data.reading import read_records
    from ..training.finetune import finetune
    from ..training.methods import check_method, memory_config

    check_method(method)
    records = read_records(source)
    settings = {"model": _absolute(name), "data": public_data(source), "records": _digest(records)}
    settings |= {"method": method, "trainable": trainable, **options}
    is_adapter = (Path(name).expanduser() / ADAPTER_FILE).is_file()
    general = _general(method, background, is_adapter)
    if general is not None:
        settings["background"] = SHIPPED if background is None else public_data(background)
        settings["background_records"] = _digest(general)
    if resume and (out / METRICS_FILE).exists():
        metrics = read_json(out / METRICS_FILE)
        refuse_other_settings(out, metrics["settings"], settings)
        return metrics
    refuse_existing(out)
    model, tokenizer = load(_absolute(name))
    kept: Any = general
    if general is not None:
        set_seed(options["seed"])
        model = get_peft_model(model, memory_config(trainable=trainable))
        if background is None:
            say_shipped()
    elif is_adapter and method in CALIBRATED:
        kept = Background.load(Path(name).expanduser() / BACKGROUND_FILE)
    if trainable is not None:
        set_trainable(model, trainable)
    with checkpoints_of(out, settings, resume) as checkpoints:
        done = finetune(
            model,
            records,
            method,
            tokenizer=tokenizer,
            background=kept,
            output_dir=checkpoints,
            resume=resume,
            **options,
        )
        figures = ("method", "precision", "steps", "loss", "seconds")
        figures += ("trained_params", "peak_bytes", "truncated")
        metrics = {key: getattr(done, key) for key in figures} | {"num_records": len(records)}
        metrics |= {"base_model": done.model.config.name_or_path, "settings": settings, **environment()}
        with new_folder(out) as part:
            _save(part, done.model, tokenizer, done.background)
            if done.patch is not None:
                done.patch.info.update(method=method, data=public_data(source), records=settings["records"])
                done.patch.save(part / PATCH_FILE)
            write_json(part / METRICS_FILE, metrics)
            write_card(part, out.name)
        shutil.rmtree(checkpoints, ignore_errors=not is_first())
    return metrics


def diff_adapters(before: Path, after: Path, out: Path) -> dict[str, Any]:
    """Save what changed between two states of one adapter as a row patch.

    Raises:
        ValueError: no adapter, adapters that do not belong together, or `out` is there already.
    """
    from ..patches.patch import RowPatch

    refuse_existing(out)
    patch = RowPatch.diff(load_adapter(after), since=before)
    patch.save(out)
    return {"out": str(out), **describe_patch(patch)}


def move_patch(adapter: Path, file: Path, out: Path | None, *, forward: bool) -> dict[str, Any]:
    """Apply a row patch to a saved adapter, or take it back; into a copy at `out`, or in place.

    Raises:
        ValueError: no adapter, a damaged or unfitting patch, or `out` is there already.
    """
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    from ..patches.patch import RowPatch

    if out is not None:
        refuse_existing(out)
    patch = RowPatch.load(file)
    # a card that cannot be read must be found before anything is written
    front_matter(adapter)
    model = load_adapter(adapter)
    (patch.apply if forward else patch.revert)(model)
    if out is not None:
        with new_folder(out) as part:
            shutil.copytree(adapter, part, dirs_exist_ok=True)
            model.save_pretrained(part)
            write_card(part, out.name)
    else:
        with tempfile.TemporaryDirectory(dir=adapter.parent) as part:
            model.save_pretrained(part)
            # nothing but the weights has changed, and one file can be replaced as a whole
            (Path(part) / SAFETENSORS_WEIGHTS_NAME).replace(adapter / SAFETENSORS_WEIGHTS_NAME)
        write_card(adapter)
    return {"out": str(out or adapter), **describe_patch(patch)}


def record(folder: Path, entry: dict[str, Any]) -> None:
    """Add what an evaluation found to the folder's `evaluations.json`, and make its card again.

    The entry gets the date, versions and commit, and the digest of the weights that it holds for; it takes
    the place of an older one with the same task, data and options: all of its keys but `card.FOUND`.

    Args:
        entry: `{"task", "data", "limit", "metrics", "n"}`, and as may be `"base"` (the base model's metrics)
            and further options.

    Raises:
        ValueError: the folder is no adapter or model that we made.
    """
    check_made(folder)
    front_matter(folder)
    there = read_json(folder / EVALUATIONS_FILE) if (folder / EVALUATIONS_FILE).is_file() else []
    others = [old for old in there if differences(_asked(old), _asked(entry))]
    about = environment()
    entry = {**entry, "date": f"{datetime.now(UTC):%Y-%m-%d}", "weights": weights_digest(folder)}
    entry |= {key: about[key] for key in ("versions", "commit")}
    write_json(folder / EVALUATIONS_FILE, [*others, entry])
    write_card(folder)


def write_card(folder: Path, name: str | None = None) -> None:
    """Make the folder's README.md from what lies in it; see `card.model_card`."""
    text = model_card(folder, name=name)
    write_atomically(folder / CARD_FILE, lambda part: part.write_text(text, encoding="utf-8"))


def load_adapter(adapter: Path) -> Any:
    """The base model with the adapter in this folder.

    Raises:
        ValueError: the folder holds no adapter, or its base model cannot be loaded.
    """
    from ..data.models import load

    if not (adapter / ADAPTER_FILE).is_file():
        raise ValueError(f"{adapter} has no {ADAPTER_FILE}; give a folder that graft or train made")
    return load(str(adapter))[0]


def _asked(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in FOUND}


def _absolute(name: str) -> str:
    """A local path from the root: an adapter remembers its base, and is loaded from anywhere."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _save(folder: Path, model: Any, tokenizer: Any, background: Background | None) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if background is not None:
        background.save(folder / BACKGROUND_FILE)


def _general(method: str, source: str | None, is_adapter: bool) -> list[dict[str, Any]] | None:
    """Records on which a new memory is to be calibrated; None where there is none to make."""
    from ..training.retrofit import general_records

    if method not in CALIBRATED or is_adapter:
        if source is not None:
            why = f"method {method} has no memory" if method not in CALIBRATED else "an adapter keeps its own"
            raise ValueError(f"--background {source}: {why}; leave it out")
        return None
    return general_background() if source is None else general_records(source)


def _digest(records: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True, default=str).encode()).hexdigest()
