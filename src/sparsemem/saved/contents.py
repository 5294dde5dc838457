"""The contents of a folder that graft, train or learn made.

Choices: a result counts only for the weights that it was measured on. `evaluations.json` names these weights
by their digest. After a patch is reverted the result no longer counts; after it is applied again, it does.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..artifacts import ArtifactError
from ..atomic import read_json
from ..patches.facts import facts_of
from ..patches.patch import RowPatch
from ..stream.ledger import FILE as LEDGER_FILE
from ..stream.ledger import Ledger

BACKGROUND_FILE = "background.safetensors"
PATCH_FILE = "patch.safetensors"
METRICS_FILE = "metrics.json"
EVALUATIONS_FILE = "evaluations.json"
ADAPTER_FILE = "adapter_config.json"
CARD_FILE = "README.md"


class Contents(NamedTuple):
    """The contents of one folder. A missing file gives an empty value, or None for the patch.

    Attributes:
        adapter: adapter_config.json.
        metrics: metrics.json.
        results: entries of evaluations.json that were measured on the present weights.
        num_stale: number of entries that were measured on other weights.
        patch: the row patch of the training run.
        applied: whether the rows of the patch are in the weights.
        rows: for each memory layer, the number of rows that are not zero and the number of all rows.
        ledger: of a folder of `learn`, what was taught and taken back.
    """

    adapter: dict[str, Any]
    metrics: dict[str, Any]
    results: list[dict[str, Any]]
    num_stale: int
    patch: RowPatch | None
    applied: bool
    rows: dict[str, tuple[int, int]]
    ledger: Ledger | None = None

    @property
    def method(self) -> str:
        """The command or method that made the folder; empty if no file says so."""
        return "learn" if self.ledger is not None else str(self.metrics.get("method") or "")

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """Of a folder of `learn`: the ledger's lines of the tasks that it holds."""
        return [] if self.ledger is None else self.ledger.active()

    @property
    def base(self) -> str:
        """The base model's name or path; empty if it has none."""
        return str(self.adapter.get("base_model_name_or_path") or self.metrics.get("base_model") or "")

    @property
    def num_written(self) -> int:
        """Rows that are not zero, in all memory layers."""
        return sum(written for written, _ in self.rows.values())


def read_contents(folder: Path) -> Contents:
    """Read the contents of a folder.

    Raises:
        ValueError: the folder was not made by sparsemem, or a file in it cannot be read.
    """
    check_made(folder)
    adapter, entries = _json(folder / ADAPTER_FILE, {}), _json(folder / EVALUATIONS_FILE, [])
    digest = weights_digest(folder) if entries else ""
    results = [entry for entry in entries if entry.get("weights") == digest]
    patch = RowPatch.load(folder / PATCH_FILE) if (folder / PATCH_FILE).is_file() else None
    ledger = folder / LEDGER_FILE
    return Contents(
        adapter=adapter,
        metrics=_json(folder / METRICS_FILE, {}),
        results=results,
        num_stale=len(entries) - len(results),
        patch=patch,
        applied=patch is not None and patch.is_in(folder),
        rows=_rows(folder / SAFETENSORS_WEIGHTS_NAME) if _is_memory(adapter) else {},
        ledger=Ledger(ledger) if ledger.is_file() else None,
    )


def check_made(folder: Path) -> None:
    """Check that sparsemem made this folder.

    Raises:
        ValueError: the folder holds no adapter or model that sparsemem made.
    """
    adapter = _json(folder / ADAPTER_FILE, {})
    trained = (folder / METRICS_FILE).is_file() and (adapter or (folder / "config.json").is_file())
    if not trained and not _is_memory(adapter):
        raise ValueError(
            f"{folder} is not an adapter or model that sparsemem made: it has no {METRICS_FILE} and no "
            "sparse memory; give a folder that `sparsemem graft` or `sparsemem train` made"
        )


def weights_digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of the weight files, without background and patch; hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in (BACKGROUND_FILE, PATCH_FILE):
            digest.update(f"{path.name} {file_digest(path)} ".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_patch(patch: RowPatch) -> dict[str, Any]:
    """What a row patch changes, as plain JSON values.

    For each layer: the number of rows, the largest change of a single value, and the numbers of scope centres
    and of fact rows, which `learn` writes. For each tensor that the patch replaces as a whole: the largest
    change of a single value. "asked": the questions of the facts.
    """
    layers = {}
    for name, layer in patch.layers.items():
        change = (layer.after.float() - layer.before.float()).abs()
        layers[name] = {
            "rows": len(layer.slots),
            "largest_change": float(change.max()) if change.numel() else 0.0,
            "centres": 0 if layer.scope is None else len(layer.scope.centres),
            "fact_rows": 0 if layer.scope is None else len(layer.scope.facts.rows),
        }
    tensors = {
        name: float((whole.after.float() - whole.before.float()).abs().max())
        for name, whole in patch.tensors.items()
    }
    described = {"base": patch.base, "info": patch.info, "layers": layers, "tensors": tensors}
    return {**described, "asked": [fact.question for fact in facts_of(patch)]}


def _is_memory(adapter: dict[str, Any]) -> bool:
    return adapter.get("peft_type") == "SPARSE_MEMORY"


def _json(path: Path, default: Any) -> Any:
    """The content of a JSON file, or `default` if there is no such file.

    Raises:
        ValueError: it is not JSON, or of another type than `default`.
    """
    content = read_json(path) if path.is_file() else default
    if not isinstance(content, type(default)):
        raise ValueError(
            f"{path} has a {type(content).__name__} where a {type(default).__name__} is expected; get an "
            "undamaged copy"
        )
    return content


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
