"""Save the results of an evaluation in the folder of the adapter or model."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..provenance import differences, environment
from ..writing import read_json, write_json
from .card import write_card
from .contents import EVALUATIONS_FILE, check_made, weights_digest
from .entries import asked
from .front_matter import read_front_matter


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
