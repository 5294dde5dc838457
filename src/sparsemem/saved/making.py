"""Make the folder of a grafted adapter, or of a trained adapter or model."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..atomic import new_folder, read_json, refuse_existing, write_json
from ..background.background import Background
from ..choices import MEMORY_METHODS
from ..data.general import SHIPPED, general_background, say_shipped
from ..data.names import public_data
from ..data.reading import digest_of, read_records
from ..processes import is_first
from ..provenance import differences, environment
from .card import write_card
from .contents import ADAPTER_FILE, BACKGROUND_FILE, METRICS_FILE, PATCH_FILE

BATCH_SIZE = 8


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
    """Add a memory to a base model, prepare it on general text, and save adapter, background and tokenizer.

    Args:
        name: the base model.
        source: general text, a file or `hub:NAME`.
        out: the folder to create.
        seed: seed of the memory's random numbers.
        max_length: tokens per record; longer records are cut.
        memory: changes to the default configuration of the memory; None values are ignored.
        retrofit: "calibrate", or "dense" (see `dense_retrofit`).
        resume: continue an interrupted dense retrofit.
        options: options of the dense retrofit: lr, epochs, max_steps, batch_size,
            gradient_accumulation_steps.

    Returns the folder, the number of tokens of general text, and for each memory layer how many of its slots
    are in use; for a dense retrofit also its steps and losses.

    Raises:
        ValueError: the data is bad, the model is unknown, the memory does not fit the model, the folder
            exists, or the retrofit to resume has other settings.
    """
    from peft import get_peft_model
    from transformers import set_seed

    from ..adapter.memories import memory_layers
    from ..background.calibration import addressing_report, calibrate
    from ..data.models import context_length, load_base
    from ..data.records import batches, encode
    from ..training.methods import memory_config, retrofit_config
    from ..training.retrofit import dense_retrofit, general_records

    records = general_records(source)
    settings = {"model": _absolute(name), "background": public_data(source), "records": digest_of(records)}
    settings |= {"retrofit": retrofit, "seed": seed, "max_length": max_length, "memory": memory}
    settings |= options or {}
    if resume and (out / METRICS_FILE).exists():
        made = read_json(out / METRICS_FILE)
        refuse_other_settings(out, made["settings"], settings)
        return {"out": str(out), **made}
    refuse_existing(out)
    base, tokenizer = load_base(_absolute(name))
    max_length = min(max_length, context_length(base))
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
    report_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Finetune a model or an adapter and save the result; returns the content of its `metrics.json`.

    Args:
        name: a model or the folder of an adapter.
        source: training data, a file or `hub:NAME`.
        out: the folder to create.
        method: a method of `finetune`.
        resume: continue an interrupted run.
        background: general text on which a base model's new memory is calibrated. None: the text that is part
            of the package. An adapter has its own background.
        trainable: the parts of the adapter's memory to train. None: as the adapter's configuration says.
        options: further options of `finetune`, which a resumed run must have again.
        report_to: as for `finetune`.

    Raises:
        ValueError: the data or the model is bad, the folder exists, the run to resume has other settings, or
            a background is given that the method does not use.
    """
    from ..data.models import load
    from ..training.finetune import finetune
    from ..training.options import Options, check_trackers

    options = {**options, "method": method, "trainable": trainable}
    # refused before the model is loaded
    Options(**{key: value for key, value in options.items() if key != "keep"})
    check_trackers(report_to)
    records = read_records(source)
    settings = {"model": _absolute(name), "data": public_data(source), "records": digest_of(records)}
    settings |= options
    is_adapter = (Path(name).expanduser() / ADAPTER_FILE).is_file()
    general = _general(method, background, is_adapter)
    if general is not None:
        settings["background"] = SHIPPED if background is None else public_data(background)
        settings["background_records"] = digest_of(general)
    if resume and (out / METRICS_FILE).exists():
        metrics = read_json(out / METRICS_FILE)
        refuse_other_settings(out, metrics["settings"], settings)
        return metrics
    refuse_existing(out)
    model, tokenizer = load(_absolute(name))
    kept: Any = general
    if general is not None and background is None:
        say_shipped()
    elif is_adapter and method in MEMORY_METHODS:
        kept = Background.load(Path(name).expanduser() / BACKGROUND_FILE)
    with checkpoints_of(out, settings, resume) as checkpoints:
        done = finetune(
            model,
            records,
            tokenizer=tokenizer,
            background=kept,
            output_dir=checkpoints,
            resume=resume,
            report_to=report_to,
            **options,
        )
        if done.patch is not None:
            _round_rows(done.model, done.patch)
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


def _absolute(name: str) -> str:
    """A local path made absolute, so that an adapter can find its base model from any working directory."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _save(folder: Path, model: Any, tokenizer: Any, background: Background | None) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if background is not None:
        background.save(folder / BACKGROUND_FILE)


def _round_rows(model: Any, patch: Any) -> None:
    """Round the rows that a run changed to bfloat16, in the model and in the patch, which halves its file.

    On the choosing handbook recall is the same, taught and reworded (docs/results/stopping.jsonl).
    """
    import torch

    from ..adapter.memories import memory_layers

    layers = memory_layers(model)
    for name, layer in patch.layers.items():
        layer.after = layer.after.to(torch.bfloat16).float()
        values = layers[name].values.data
        values[layer.slots.to(values.device)] = layer.after.to(values)


def _general(method: str, source: str | None, is_adapter: bool) -> list[dict[str, Any]] | None:
    """Records on which a new memory is calibrated; None if no memory is created."""
    from ..training.retrofit import general_records

    if method not in MEMORY_METHODS or is_adapter:
        if source is not None:
            without = method not in MEMORY_METHODS
            why = f"method {method} has no memory" if without else "an adapter has its own background"
            raise ValueError(f"--background {source}: {why}; leave it out")
        return None
    return general_background() if source is None else general_records(source)


@contextmanager
def checkpoints_of(out: Path, settings: dict[str, Any], resume: bool) -> Iterator[Path]:
    """Yield `OUT.partial`, the folder for checkpoints, which also holds the settings of the run.

    If the block fails, the folder is kept as soon as it holds a checkpoint.

    Raises:
        ValueError: the folder holds an interrupted run and `resume` is False, or that run has other settings.
    """
    folder = out.with_name(f"{out.name}.partial")
    if not is_first():
        yield folder
        return
    held = folder / "settings.json"
    if held.exists() and not resume:
        raise ValueError(
            f"{folder} holds an interrupted run; add --resume to continue it, or remove that folder"
        )
    if held.exists():
        refuse_other_settings(folder, read_json(held), settings)
    write_json(held, settings)
    try:
        yield folder
    finally:
        if not any(folder.glob("checkpoint-*")):
            shutil.rmtree(folder, ignore_errors=True)


def refuse_other_settings(folder: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a run in `folder` has the present settings.

    Raises:
        ValueError: the settings differ.
    """
    # through JSON and back, so that both sides have the same types
    changes = differences(there, json.loads(json.dumps(now)))
    if changes:
        advice = "give the same settings or another folder"
        raise ValueError(f"{folder} holds a run with other settings ({changes}); {advice}")
