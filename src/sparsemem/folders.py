"""The folders that the command line makes: a grafted adapter, a trained model, an adapter after a patch.

Choices: a folder is made under a hidden name beside its own and renamed when whole, so that nobody finds half
of one; what an interrupted training run needs to go on lies in `OUT.partial` until it is finished.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .access import Background
from .files import read_json, write_json
from .provenance import differences, environment

BACKGROUND_FILE = "background.safetensors"
PATCH_FILE = "patch.safetensors"
METRICS_FILE = "metrics.json"
ADAPTER_FILE = "adapter_config.json"
BATCH_SIZE = 8


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends, or vanishes when it fails.

    Raises:
        ValueError: `path` is a file or a folder with something in it.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    part.chmod(0o755)
    try:
        yield part
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raises:
    ValueError: `path` is a file or a folder with something in it.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--out {path} exists and is not empty; name another folder or remove that one")


def graft(
    name: str, source: str, out: Path, *, seed: int, max_length: int, memory: dict[str, Any]
) -> dict[str, Any]:
    """Give a base model a memory, calibrate it on general text, and save adapter, background and tokenizer.

    Returns what was made: each memory layer's use of its slots, and how many tokens it was calibrated on.

    Raises:
        ValueError: bad data, an unknown model, or a memory that does not fit it.
    """
    from peft import get_peft_model

    from . import calibrate, memory_layers
    from .calibration import addressing_report
    from .data import batches, encode, read_records
    from .methods import memory_config
    from .models import load_base

    records = read_records(source, mixed=True)
    base, tokenizer = load_base(_absolute(name))
    max_length = min(max_length, getattr(base.config, "max_position_embeddings", None) or max_length)
    examples = encode(records, tokenizer, max_length=max_length, loss_on="all")
    model: Any = get_peft_model(base, memory_config(base, **memory))
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    background = calibrate(model, batches(examples, BATCH_SIZE, pad), seed=seed)
    with new_folder(out) as part:
        _save(part, model, tokenizer, background)
    layers = {
        layer: {"slots": table.num_slots, **addressing_report(background[layer])}
        for layer, table in memory_layers(model).items()
    }
    return {
        "out": str(out),
        "tokens": sum(len(example["input_ids"]) for example in examples),
        "layers": layers,
    }


def train(
    name: str, source: str, out: Path, *, method: str, resume: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """Finetune a model or an adapter and save what came of it; returns the content of its `metrics.json`.

    Raises:
        ValueError: bad data or model, a folder that is there already, a run to resume of other settings.
    """
    from .data import read_records
    from .methods import check_method
    from .models import load
    from .train import finetune

    check_method(method)
    records = read_records(source)
    settings = {"model": name, "data": source, "records": _digest(records), "method": method, **options}
    if resume and (out / METRICS_FILE).exists():
        metrics = read_json(out / METRICS_FILE)
        _refuse_other_settings(out, metrics["settings"], settings)
        return metrics
    refuse_existing(out)
    model, tokenizer = load(_absolute(name))
    background = _background(Path(name), method)
    with _checkpoints(out, settings, resume) as checkpoints:
        done = finetune(
            model,
            records,
            method,
            tokenizer=tokenizer,
            background=background,
            output_dir=checkpoints,
            resume=resume,
            **options,
        )
        figures = ("method", "steps", "loss", "seconds", "trained_params", "peak_bytes", "truncated")
        metrics = {**{key: getattr(done, key) for key in figures}, "settings": settings, **environment()}
        with new_folder(out) as part:
            _save(part, done.model, tokenizer, background)
            if done.patch is not None:
                done.patch.info.update(method=method, data=source, records=settings["records"])
                done.patch.save(part / PATCH_FILE)
            write_json(part / METRICS_FILE, metrics)
        shutil.rmtree(checkpoints)
    return metrics


def diff_adapters(before: Path, after: Path, out: Path) -> dict[str, Any]:
    """Save what changed between two states of one adapter as a row patch.

    Raises:
        ValueError: no adapter, adapters that do not belong together, or `out` is there already.
    """
    from .patch import RowPatch

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

    from .patch import RowPatch

    if out is not None:
        refuse_existing(out)
    patch = RowPatch.load(file)
    model = load_adapter(adapter)
    (patch.apply if forward else patch.revert)(model)
    if out is not None:
        with new_folder(out) as part:
            shutil.copytree(adapter, part, dirs_exist_ok=True)
            model.save_pretrained(part)
    else:
        with tempfile.TemporaryDirectory(dir=adapter.parent) as part:
            model.save_pretrained(part)
            # nothing but the weights has changed, and one file can be replaced as a whole
            (Path(part) / SAFETENSORS_WEIGHTS_NAME).replace(adapter / SAFETENSORS_WEIGHTS_NAME)
    return {"out": str(out or adapter), **describe_patch(patch)}


def describe_patch(patch: Any) -> dict[str, Any]:
    """What a row patch changes in each layer: rows, the largest change of a number, centres of scope."""
    layers = {}
    for name, layer in patch.layers.items():
        change = (layer.after.float() - layer.before.float()).abs()
        layers[name] = {
            "rows": len(layer.slots),
            "largest_change": float(change.max()) if change.numel() else 0.0,
            "centres": 0 if layer.scope is None else len(layer.scope.centres),
        }
    return {"base": patch.base, "info": patch.info, "layers": layers}


def load_adapter(adapter: Path) -> Any:
    """The base model with the adapter in this folder.

    Raises:
        ValueError: the folder holds no adapter, or its base model cannot be loaded.
    """
    from .models import load

    if not (adapter / ADAPTER_FILE).is_file():
        raise ValueError(f"{adapter} has no {ADAPTER_FILE}; give a folder that graft or train made")
    return load(str(adapter))[0]


def _absolute(name: str) -> str:
    """A local path from the root: an adapter remembers its base, and is loaded from anywhere."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _save(folder: Path, model: Any, tokenizer: Any, background: Background | None) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if background is not None:
        background.save(folder / BACKGROUND_FILE)


def _background(adapter: Path, method: str) -> Background | None:
    if method not in ("smf", "smf-open"):
        return None
    if not (adapter / ADAPTER_FILE).is_file():
        make = f"sparsemem graft {adapter} --background FILE --out ADAPTER"
        raise ValueError(f"{adapter} has no memory to train by method {method}; make one first: {make}")
    return Background.load(adapter / BACKGROUND_FILE)


@contextmanager
def _checkpoints(out: Path, settings: dict[str, Any], resume: bool) -> Iterator[Path]:
    """`OUT.partial`, with the settings that its checkpoints belong to; kept on failure once there are any."""
    folder = out.with_name(f"{out.name}.partial")
    held = folder / "settings.json"
    if held.exists() and not resume:
        raise ValueError(
            f"{folder} holds an interrupted run; add --resume to go on with it, or remove that folder"
        )
    if held.exists():
        _refuse_other_settings(folder, read_json(held), settings)
    write_json(held, settings)
    try:
        yield folder
    finally:
        if not any(folder.glob("checkpoint-*")):
            shutil.rmtree(folder, ignore_errors=True)


def _refuse_other_settings(folder: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    # through JSON and back, so that both sides know the same types
    changes = differences(there, json.loads(json.dumps(now)))
    if changes:
        advice = "name another folder or give the same settings"
        raise ValueError(f"{folder} holds a run of other settings ({changes}); {advice}")


def _digest(records: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True, default=str).encode()).hexdigest()
