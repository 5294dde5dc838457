"""The general text that ships with the package: what must not change, for those who name nothing better.

Questions with short and long answers (`general.jsonl`), none of which a recipe probes, and prose that every
Python has. Text of the user's own says better what is to be kept.
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
    # from the first paragraph that begins there
    starts = [text.index("\n\n", start) + 2 for start in starts]
    return [*chats, *({"text": text[start : start + PIECE_CHARACTERS]} for start in starts)]


def say_shipped() -> None:
    """Log that `general_background` is used because nothing else was given."""
    logger.warning(
        "no background given: the memory is calibrated on %s; "
        "a background of your own says better what to keep",
        SHIPPED,
    )


def prose() -> tuple[str, str]:
    """Real prose that every Python ships (`pydoc_data.topics`), as two texts: for background and for probing.

    Topics go to the two texts in turn, by name. Some topics repeat whole sections of others, so a paragraph
    that has occurred before is left out: the probe has no paragraph of the background.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    seen: set[str] = set()
    background = _new_paragraphs((topics[name] for name in names[::2]), seen)
    return background, _new_paragraphs((topics[name] for name in names[1::2]), seen)


def _new_paragraphs(texts: Iterable[str], seen: set[str]) -> str:
    """The paragraphs of `texts` that are not in `seen`, to which they are added; layout aside."""
    kept = []
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)
