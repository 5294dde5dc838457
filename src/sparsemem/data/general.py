"""The general text that ships with the package, used where the user gives no background.

It has questions with short and long answers (`general.jsonl`), and prose from Python's own documentation. No
recipe's probe asks these questions. General text of the user's own describes better what should be kept.
"""

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SHIPPED = "the general text that ships with sparsemem"
NUM_PIECES, PIECE_CHARACTERS = 12, 1000


def general_background() -> list[dict[str, Any]]:
    """Records in mixed shapes: 296 chats of one question and its answer, and NUM_PIECES pieces of prose."""
    lines = Path(__file__).with_name("general.jsonl").read_text(encoding="utf-8").splitlines()
    chats = []
    for item in map(json.loads, lines):
        user = {"role": "user", "content": item["question"]}
        chats.append({"messages": [user, {"role": "assistant", "content": item["answer"]}]})
    text = prose()[0]
    starts = range(0, len(text), len(text) // NUM_PIECES)[:NUM_PIECES]
    # each piece begins with a paragraph
    starts = [text.index("\n\n", start) + 2 for start in starts]
    return [*chats, *({"text": text[start : start + PIECE_CHARACTERS]} for start in starts)]


def say_shipped() -> None:
    """Log that `general_background` is used because nothing else was given."""
    logger.warning(
        "no background given: the memory is calibrated on %s; "
        "your own general text describes better what to keep",
        SHIPPED,
    )


def prose() -> tuple[str, str]:
    """Two texts from Python's own documentation (`pydoc_data.topics`): one for background, one for probing.

    Topics, sorted by name, go to the two texts in turn. Some topics repeat whole sections of others. So a
    paragraph that has occurred before is left out, and the probe has no paragraph of the background.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    seen: set[str] = set()
    background = _new_paragraphs((topics[name] for name in names[::2]), seen)
    return background, _new_paragraphs((topics[name] for name in names[1::2]), seen)


def _new_paragraphs(texts: Iterable[str], seen: set[str]) -> str:
    """The paragraphs of `texts` that are not in `seen`, compared without layout; they are added to `seen`."""
    kept = []
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)
