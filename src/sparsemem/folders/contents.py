"""What lies in a folder that graft or train made.

Choices: results count only for the weights that they were read on, which `evaluations.json` names by digest:
after a patch was taken back they no longer count, and once it is applied again they do.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..files import ArtifactError, read_json
from ..patches.patch import RowPatch

BACKGROUND_FILE = "background.safetensors"
PATCH_FILE = "patch.safetensors"
METRICS_FILE = "metrics.json"
EVALUATIONS_FILE = "evaluations.json"
ADAPTER_FILE = "adapter_config.json"
CARD_FILE = "README.md"


class Contents(NamedTuple):
    """Of one folder; files that are not there are empty.

    Attributes:
        results: entries of evaluations.json that were read on the present weights.
        num_stale: how many others there are.
        applied: whether the rows of the patch are in the weights.
        rows: per memory layer, rows that are not zero, and all rows.
    """

    adapter: dict[str, Any]
    metrics: dict[str, Any]
    results: list[dict[str, Any]]
    num_stale: int
    patch: RowPatch | None
    applied: bool
    rows: dict[str, tuple[int, int]]

    @property
    def base(self) -> str:
        """The base model's name or path; empty where it has none."""
        return str(self.adapter.get("base_model_name_or_path") or self.metrics.get("base_model") or "")

    @property
    def num_written(self) -> int:
        return sum(written for written, _ in self.rows.values())


def read_contents(folder: Path) -> Contents:
    """Raises:
    ValueError: the folder is none of ours, or a file in it cannot be read.
    """
    check_made(folder)
    adapter, entries = _json(folder / ADAPTER_FILE, {}), _json(folder / EVALUATIONS_FILE, [])
    digest = weights_digest(folder) if entries else ""
    results = [entry for entry in entries if entry.get("weights") == digest]
    patch = RowPatch.load(folder / PATCH_FILE) if (folder / PATCH_FILE).is_file() else None
    return Contents(
        adapter=adapter,
        metrics=_json(folder / METRICS_FILE, {}),
        results=results,
        num_stale=len(entries) - len(results),
        patch=patch,
        applied=patch is not None and patch.is_in(folder),
        rows=_rows(folder / SAFETENSORS_WEIGHTS_NAME) if _is_memory(adapter) else {},
    )


def check_made(folder: Path) -> None:
    """Raises:
    ValueError: the folder is no adapter or model that we made.
    """
    adapter = _json(folder / ADAPTER_FILE, {})
    trained = (folder / METRICS_FILE).is_file() and (adapter or (folder / "config.json").is_file())
    if not trained and not _is_memory(adapter):
        raise ValueError(
            f"{folder} is no adapter or model that sparsemem made (no {METRICS_FILE}, no sparse memory); "
            "give a folder that graft or train made"
        )


def weights_digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of the weights of an adapter or model, background and patch apart."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in (BACKGROUND_FILE, PATCH_FILE):
            digest.update(f"{path.name} {file_digest(path)} ".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_patch(patch: RowPatch) -> dict[str, Any]:
    """What a row patch changes: in each layer rows, the largest change of a number, and centres of scope; of
    each tensor that it changes whole the largest change.
    """
    layers = {}
    for name, layer in patch.layers.items():
        change = (layer.after.float() - layer.before.float()).abs()
        layers[name] = {
            "rows": len(layer.slots),
            "largest_change": float(change.max()) if change.numel() else 0.0,
            "centres": 0 if layer.scope is None else len(layer.scope.centres),
        }
    tensors = {
        name: float((whole.after.float() - whole.before.float()).abs().max())
        for name, whole in patch.tensors.items()
    }
    return {"base": patch.base, "info": patch.info, "layers": layers, "tensors": tensors}


def _is_memory(adapter: dict[str, Any]) -> bool:
    return adapter.get("peft_type") == "SPARSE_MEMORY"


def _json(path: Path, default: Any) -> Any:
    return read_json(path) if path.is_file() else default


def _rows(weights: Path) -> dict[str, tuple[int, int]]:
    rows = {}
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                layer, found, _ = key.removeprefix("base_model.model.").partition(".sparse_memory_layers.")
                if found and key.endswith(".values"):
                    table = file.get_tensor(key)
                    rows[layer] = (int(table.any(dim=1).sum()), len(table))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{weights}: cannot be read ({error}); get an undamaged copy") from error
    return rows
