"""Results of an evaluation, kept in the folder of the adapter or model."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from ..provenance import differences, environment
from .card import write_card
from .contents import EVALUATIONS_FILE, check_made, weights_digest
from .entries import asked
from .front_matter import read_front_matter


def record(folder: Path, entry: dict[str, Any]) -> None:
    """Add what an evaluation found to the folder's `evaluations.json`, and make its card again.

    The entry gets the date, versions and commit, and the digest of the weights that it holds for; it takes
    the place of an older one with the same task, data and options: all of its keys but `entries.FOUND`.

    Args:
        entry: `{"task", "data", "limit", "metrics", "n"}`, and as may be `"base"` (the base model's metrics)
            and further options.

    Raises:
        ValueError: the folder is no adapter or model that we made.
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
