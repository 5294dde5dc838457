"""The data of one training run: what is taught, kept and held out, and the general text."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..background.background import Background
from ..data.general import general_background, say_shipped
from ..data.known import KEEP_FORMS, answers_elsewhere, mention_records
from ..data.models import context_length
from ..data.reading import Records, digest_of, read_records
from ..data.records import batches, encode, truncate
from ..data.subjects import subjects_of
from .options import Options

logger = logging.getLogger(__name__)

BACKGROUND_BATCH_SIZE = 8
# Tokens of a kept answer to another question about a subject, and the most subjects that are facts.
MENTION_LENGTH, MENTION_SUBJECTS = 12, 256

Data = str | Path | Sequence[dict] | Sequence[str] | datasets.Dataset
Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class RunData:
    """The data of a run, as `encode` returns it, cut to `max_length` or to the model's context length.

    Attributes:
        tokenizer: with which it was encoded.
        examples: what is taught.
        records: the same as it was read; empty if it was encoded before.
        truncated: how many of the examples were cut.
        held_out: validation examples; None without validation data.
        kept: examples whose answers must not change.
        general: the memory's Background, or examples of general text to calibrate it on; None if not given.
        digests: of what the user gave, by argument of `finetune`; a Background is known by its corpus.
    """

    tokenizer: PreTrainedTokenizerBase
    examples: list[dict]
    records: Sequence[dict] = ()
    truncated: int = 0
    held_out: list[dict] | None = None
    kept: Sequence[dict] = ()
    general: Background | list[dict] | None = None
    digests: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def pad(self) -> int:
        # with an attention mask and labels of -100, any token can be used as padding
        return int(self.tokenizer.pad_token_id or 0)  # type: ignore[arg-type]

    def batches(self, batch_size: int) -> Batches:
        """What is taught, in batches."""
        return batches(self.examples, batch_size, self.pad)

    def general_batches(self) -> Batches:
        """The general text, in batches of records of about the same length."""
        assert isinstance(self.general, list)
        return batches(_by_length(self.general), BACKGROUND_BATCH_SIZE, self.pad)

    def known_batches(self, background: Background) -> Batches:
        """Batches of known states: taught answers within the background's text, and the kept examples."""
        elsewhere = answers_elsewhere(self.examples, self.tokenizer, background.contexts)
        return batches([*elsewhere, *self.kept], BACKGROUND_BATCH_SIZE, self.pad)

    def with_mentions(self, model: Any, forms: int) -> "RunData":
        """This data, in which the model's answers to other questions about the taught subjects are kept.

        Args:
            model: before it is taught.
            forms: number of questions about each subject.
        """
        facts = forms and any("text" not in record for record in self.records)
        subjects = subjects_of(list(self.records)) if facts else []
        if len(subjects) > MENTION_SUBJECTS:
            logger.info(
                "%d subjects are a domain rather than facts, so other questions about them are not kept",
                len(subjects),
            )
        if not 0 < len(subjects) <= MENTION_SUBJECTS:
            return self
        options: dict[str, Any] = {"forms": KEEP_FORMS[:forms], "max_new_tokens": MENTION_LENGTH}
        named = mention_records(model, self.tokenizer, list(self.records), **options)
        return replace(self, kept=[*self.kept, *encode(named, self.tokenizer)])


def load_data(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    *,
    data: Data,
    validation: Data | None = None,
    keep: Data | None = None,
    background: Background | Data | None = None,
) -> RunData:
    """Read and encode the data of a run; the arguments are those of `finetune`.

    Raises:
        ValueError: bad data.
    """
    length = options.max_length or context_length(model)

    digests: dict[str, str | None] = {}

    def cut(name: str, source: Any, loss_on: str = "completion") -> tuple[list[dict], list[dict], int]:
        records, examples = _read(source, tokenizer, loss_on, mixed=name == "background")
        digests[name] = digest_of(records or examples)
        return records, *truncate(examples, length)

    records, examples, truncated = cut("data", data, options.loss_on)
    held_out = None if validation is None else cut("validation", validation, options.loss_on)[1]
    kept = [] if keep is None else cut("keep", keep)[1]
    if background is None and options.has_memory and not isinstance(model, PeftModel):
        say_shipped()
        background = general_background()
    if isinstance(background, Background):
        digests["background"] = background.corpus
    elif background is not None:
        background = cut("background", background)[1]
    # the loss on other held-out records may be measured in each part of a run
    digests.pop("validation", None)
    return RunData(tokenizer, examples, records, truncated, held_out, kept, background, digests)


def _by_length(examples: list[dict]) -> list[dict]:
    return sorted(examples, key=lambda one: len(one["input_ids"]))


def _read(
    source: Any, tokenizer: PreTrainedTokenizerBase, loss_on: str, mixed: bool
) -> tuple[list[dict], list[dict]]:
    """Records and their encoding; no records of data that is encoded already."""
    if not isinstance(source, str | Path | Records):
        source = [{"text": record} if isinstance(record, str) else record for record in source]
        if source and isinstance(source[0], dict) and "input_ids" in source[0]:
            return [], source
    records = read_records(source, mixed=mixed)
    return records, encode(records, tokenizer, loss_on=loss_on)
