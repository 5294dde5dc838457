"""Load the data of one training run: what is taught, kept and held out, and the general text."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..background.background import Background
from ..data.general import general_background, say_shipped
from ..data.known import KEEP_FORMS, answers_elsewhere, mention_records
from ..data.reading import read_records
from ..data.records import batches as batched
from ..data.records import encode, truncate
from ..data.subjects import subjects_of
from .methods import MEMORY_METHODS

logger = logging.getLogger(__name__)

BACKGROUND_BATCH_SIZE = 8
# Default number of other questions per subject, tokens of an answer, and the most subjects that are facts.
MENTION_FORMS, MENTION_LENGTH, MENTION_SUBJECTS = 4, 12, 256

Data = str | Path | Sequence[dict] | Sequence[str] | datasets.Dataset


class RunData(NamedTuple):
    """The data of a run, as `encode` returns it, cut to `max_length` or to the model's context length.

    Attributes:
        examples: what is taught.
        truncated: how many of them were cut.
        held_out: validation examples; None without validation data.
        kept: examples whose answers must not change.
        general: the memory's Background, or batches of general text to calibrate it on; None if not given.
        pad: token id for padding.
    """

    examples: list[dict]
    truncated: int
    held_out: list[dict] | None
    kept: list[dict]
    general: Background | list[dict[str, Tensor]] | None
    pad: int


def load_data(
    model: Any,
    method: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: Data,
    validation: Data | None,
    keep: Data | None,
    background: Background | Data | None,
    max_length: int | None,
    loss_on: str,
) -> RunData:
    """Read and encode the data of a run; the arguments are those of `finetune`.

    Raises:
        ValueError: bad data.
    """
    # with an attention mask and labels of -100, any token can be used as padding
    pad: Any = tokenizer.pad_token_id or 0
    length = max_length or getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    examples, truncated = truncate(_examples(data, tokenizer, loss_on), length)
    held_out = None if validation is None else truncate(_examples(validation, tokenizer, loss_on), length)[0]
    kept = [] if keep is None else truncate(_examples(keep, tokenizer, "completion"), length)[0]
    general = _general(background, model, method, tokenizer, length, pad)
    return RunData(examples, truncated, held_out, kept, general, pad)


def mention_examples(model: Any, data: Any, tokenizer: PreTrainedTokenizerBase, number: int) -> list[dict]:
    """The base model's own answers to other questions about the taught subjects, encoded."""
    if not isinstance(data, str | Path):
        data = [record for record in data if isinstance(record, dict) and "input_ids" not in record]
    records = read_records(data) if data else []
    subjects = subjects_of(records) if any("text" not in record for record in records) else []
    if not subjects:
        return []
    if len(subjects) > MENTION_SUBJECTS:
        logger.info(
            "%d subjects are a domain rather than facts, so other questions about them are not kept",
            len(subjects),
        )
        return []
    options = {"forms": KEEP_FORMS[:number], "max_new_tokens": MENTION_LENGTH}
    return encode(mention_records(model, tokenizer, records, **options), tokenizer)


def known_batches(
    loaded: RunData, tokenizer: PreTrainedTokenizerBase, seen: Background
) -> list[dict[str, Tensor]]:
    """Batches of known states: taught answers within the background's text, and the kept examples."""
    elsewhere = answers_elsewhere(loaded.examples, tokenizer, seen.contexts)
    return batched([*elsewhere, *loaded.kept], BACKGROUND_BATCH_SIZE, loaded.pad)


def _general(
    background: Any, model: Any, method: str, tokenizer: PreTrainedTokenizerBase, length: int, pad: int
) -> Background | list[dict[str, Tensor]] | None:
    """The given Background, or batches of general text for a new memory."""
    if background is None and method in MEMORY_METHODS and not isinstance(model, PeftModel):
        say_shipped()
        background = general_background()
    if background is None or isinstance(background, Background):
        return background
    general = truncate(_examples(background, tokenizer, "completion", mixed=True), length)[0]
    return batched(sorted(general, key=lambda one: len(one["input_ids"])), BACKGROUND_BATCH_SIZE, pad)


def _examples(data: Any, tokenizer: PreTrainedTokenizerBase, loss_on: str, mixed: bool = False) -> list[dict]:
    if not isinstance(data, str | Path):
        data = [{"text": record} if isinstance(record, str) else record for record in data]
        if data and isinstance(data[0], dict) and "input_ids" in data[0]:
            return data
    return encode(read_records(data, mixed=mixed), tokenizer, loss_on=loss_on)
