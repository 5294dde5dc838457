"""The tasks of `sparsemem eval`: three probes, each over a file of the user's or a benchmark from the Hub.

| task            | probe           | from the Hub                                            |
| --------------- | --------------- | ------------------------------------------------------- |
| recall          | recall          | needs a file                                            |
| triviaqa        | recall          | mandarjoshi/trivia_qa, rc.nocontext, validation         |
| multiple-choice | multiple_choice | needs a file                                            |
| medmcqa         | multiple_choice | openlifescienceai/medmcqa, validation                   |
| perplexity      | perplexity      | needs a file                                            |
| wikitext        | perplexity      | Salesforce/wikitext, wikitext-103-raw-v1, test          |

Files: JSONL of `{"question", "answer"}` (`answer` one text, a list of texts, or TriviaQA's aliases; a list
may also be called `answers`), JSONL of `{"question", "choices", "answer"}` (or MedMCQA's `opa` to `opd` and
`cop`), and any text file, or JSONL of `{"text"}`.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from .data import read_jsonl, read_records
from .probes import multiple_choice, perplexity, recall

logger = logging.getLogger(__name__)

_PROBES = {
    "recall": "recall",
    "triviaqa": "recall",
    "multiple-choice": "multiple-choice",
    "medmcqa": "multiple-choice",
    "perplexity": "perplexity",
    "wikitext": "perplexity",
}
TASKS = tuple(_PROBES)
_HUB = {
    "medmcqa": ("openlifescienceai/medmcqa", None, "validation"),
    "triviaqa": ("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1", "test"),
}
_MAX_NEW_TOKENS = {"recall": 12, "triviaqa": 32}


def evaluate(
    model: Any, tokenizer: Any, task: str, *, items: list[dict[str, Any]] | str
) -> tuple[dict[str, float], int]:
    """A task's metrics, and the number of items (of tokens, for perplexity) that they were read on.

    Args:
        items: what `read_items` returned for this task.

    Raises:
        ValueError: a text of fewer than two tokens.
    """
    if isinstance(items, str):
        # a whole book is longer than the context: the probe reads it in windows
        ids = torch.tensor(
            tokenizer(items, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long
        )
        return {"perplexity": perplexity(model, ids)}, len(ids)
    if _PROBES[task] == "recall":
        answers = recall(model, tokenizer, items, max_new_tokens=_MAX_NEW_TOKENS[task])
        return {"recall": answers.share}, len(items)
    scores = multiple_choice(model, tokenizer, items)
    return {name: scores[name] for name in ("acc_sum", "acc_mean")}, len(items)


def read_items(
    task: str, data: str | Path | None = None, *, limit: int | None = None
) -> list[dict[str, Any]] | str:
    """What a task asks: its items, or one text for perplexity; from a file, or from the Hub.

    Args:
        limit: at most so many items; of a text, so many paragraphs.

    Raises:
        ValueError: an unknown task, a bad limit, data that is missing, empty or of another form, or no Hub.
    """
    if task not in _PROBES:
        raise ValueError(f"task {task!r} is unknown; use one of {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is too small; give at least 1, or leave it out")
    probe = _PROBES[task]
    if probe == "perplexity":
        return _text(task, data, limit)
    places, records = _from_hub(task) if data is None else read_jsonl(Path(data).expanduser())
    pairs = list(zip(places, records, strict=True))[:limit]
    if not pairs:
        raise ValueError(f"data is empty ({data}); give at least one item")
    if probe == "recall":
        return [_question(record, place) for place, record in pairs]
    return read_records([_choices(record, place) for place, record in pairs])


def _text(task: str, data: str | Path | None, limit: int | None) -> str:
    if data is not None and Path(data).suffix != ".jsonl":
        try:
            text = Path(data).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"data file {str(data)!r} cannot be read as text ({error}); give a text file"
            ) from error
        paragraphs = [text] if limit is None else text.split("\n\n")
    else:
        records = _from_hub(task)[1] if data is None else read_records(data)
        if "text" not in records[0]:
            raise ValueError(
                f"{data}, line 1: record without text; task {task} reads a text file or JSONL of text"
            )
        # as the published perplexities of WikiText are read
        paragraphs = [record["text"].strip() for record in records if record["text"].strip()]
    text = "\n\n".join(paragraphs[:limit])
    if not text.strip():
        raise ValueError(f"data is empty ({data}); give a text to read")
    return text


def _question(record: Any, place: str) -> dict[str, Any]:
    question = record.get("question") if isinstance(record, dict) else None
    answer = record.get("answer", record.get("answers")) if isinstance(record, dict) else None
    if isinstance(answer, dict):
        answer = answer.get("aliases")
    texts = [answer] if isinstance(answer, str) else answer
    if not isinstance(question, str) or not isinstance(texts, list) or not texts:
        raise ValueError(
            f"{place}: not an item of this task; give question and answer, a text or a list of texts"
        )
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{place}: an answer is empty or no text; give texts")
    return {"question": question, "answer": texts}


def _choices(record: Any, place: str) -> dict[str, Any]:
    if isinstance(record, dict) and "cop" in record:
        options = [record.get(key) for key in ("opa", "opb", "opc", "opd")]
        record = {"question": record.get("question"), "choices": options, "answer": record["cop"]}
    try:
        (item,) = read_records([record])
    except ValueError as error:
        raise ValueError(f"{place}: {str(error).removeprefix('data record 1: ')}") from None
    if "choices" not in item:
        raise ValueError(f"{place}: not an item of this task; give question, choices and answer")
    return item


def _from_hub(task: str) -> tuple[list[str], list[Any]]:
    if task not in _HUB:
        raise ValueError(f"task {task} needs data; name a file with --data FILE")
    name, config, split = _HUB[task]
    import datasets

    try:
        records = list(datasets.load_dataset(name, config, split=split))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be loaded from the Hub ({error}); name a file of your own with --data FILE"
        ) from error
    return [f"{name} {split}, item {number}" for number in range(1, len(records) + 1)], records
