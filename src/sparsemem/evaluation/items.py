"""Read and check the items of the tasks of `sparsemem eval`, from a file or from the Hub.

A file is, depending on the task:
- JSONL of `{"question", "answer"}`; `answer` is a text, a list of texts, or TriviaQA's aliases; a list may be
  named `answers` too;
- JSONL of `{"question", "choices", "answer"}`, or with MedMCQA's `opa` to `opd`, `cop` and `exp`;
- a text file, or JSONL of `{"text"}`;
- for mentions, contexts and neighbours, the records that were taught.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..choices import TASKS
from ..data.reading import from_hub, read_records, read_rows
from ..data.subjects import subjects_of

HUB = {
    "medmcqa": ("openlifescienceai/medmcqa", None, "validation"),
    "triviaqa": ("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1", "test"),
}
_TAUGHT = 'the records that were taught, {"prompt", "completion"} or {"messages"} per line'
FORMS = {
    "recall": '{"question", "answer"} per line, the answer a text or a list of texts',
    "multiple-choice": '{"question", "choices", "answer"} per line, the answer an index from 0',
    "perplexity": 'plain text, or JSONL of {"text"}',
    "mentions": _TAUGHT,
}
OPTIONS = ("opa", "opb", "opc", "opd")


def read_items(
    task: str,
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    num_fewshot: int = 0,
    split: str | None = None,
    keep: Callable[[Any], bool] | None = None,
) -> list[dict[str, Any]] | str:
    """Read a task's items, or one text for perplexity, from a file or from the Hub.

    Args:
        data: the file; None: the benchmark's data on the Hub.
        limit: the largest number of items. For a text: of paragraphs (wikitext: of lines that are not empty);
            for mentions: of subjects; for contexts and neighbours: of records.
        num_fewshot: number of worked examples before each question of triviaqa; they become the items'
            "examples". They are the last records of the file, or the first of the Hub's training split, and
            are never asked.
        split: a split of the Hub's dataset to use in place of the test split.
        keep: returns whether a record is used; called before the record is checked.

    Raises:
        ValueError: an unknown task, a bad option, data that is missing, empty or of the wrong form, or the
            Hub cannot be reached.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; use one of {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is too small; give at least 1, or leave it out")
    if num_fewshot < 0 or (num_fewshot and task != "triviaqa"):
        raise ValueError(f"num_fewshot={num_fewshot}: task {task} takes 0, triviaqa 0 or more; leave it out")
    if TASKS[task] == "perplexity":
        return _text(task, data, limit)
    if TASKS[task] == "mentions":
        return [{"subject": subject} for subject in _subjects(task, data)[:limit]]
    if TASKS[task] == "taught":
        if data is None:
            raise ValueError(f"data: task {task} asks about what was taught; give {_TAUGHT}")
        return list(read_records(data, mixed=True))[:limit]
    places, records = _from_hub(task, split) if data is None else read_rows(Path(data).expanduser())
    pairs = [pair for pair in zip(places, records, strict=True) if keep is None or keep(pair[1])]
    if num_fewshot:
        return _with_examples(task, data, pairs, limit, num_fewshot)
    if not pairs:
        raise ValueError(f"data is empty ({data}); give at least one item")
    check = {"medmcqa": _medmcqa, "multiple-choice": _choices}.get(task, _question)
    return [check(record, place) for place, record in pairs[:limit]]


def _with_examples(
    task: str, data: str | Path | None, pairs: list[tuple[str, Any]], limit: int | None, num: int
) -> list[dict[str, Any]]:
    if data is None:
        places, records = _from_hub(task, f"train[:{num}]")
        shown, rest = list(zip(places, records, strict=True)), pairs
    else:
        shown, rest = pairs[-num:], pairs[:-num]
    examples = [_question(record, place) for place, record in shown]
    told = {example["question"] for example in examples}
    items = (_question(record, place) for place, record in rest)
    asked = [item for item in items if item["question"] not in told][:limit]
    if not asked:
        raise ValueError(
            f"num_fewshot={num} leaves none of the {len(pairs)} items of {data} to ask; give a smaller number"
        )
    return [{**item, "examples": examples} for item in asked]


def _subjects(task: str, data: str | Path | None) -> list[str]:
    found = subjects_of(_from_hub(task)[1] if data is None else read_records(data, mixed=True))
    if not found:
        raise ValueError(
            f"data ({data}): no record has a subject that could be found; give {FORMS[TASKS[task]]}"
        )
    return found


def _text(task: str, data: str | Path | None, limit: int | None) -> str:
    if data is not None and Path(data).suffix != ".jsonl":
        try:
            texts = [Path(data).expanduser().read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"data file {str(data)!r} cannot be read as text ({error}); give a text file"
            ) from error
        if task == "perplexity" and limit is not None:
            texts = texts[0].split("\n\n")
    else:
        records = _from_hub(task)[1] if data is None else read_records(data)
        if "text" not in records[0]:
            raise ValueError(
                f"{data}, line 1: record without text; task {task} reads a text file or JSONL of text"
            )
        texts = [record["text"].strip() for record in records if record["text"].strip()]
    if task == "wikitext":
        # as in the paper, for every kind of file
        texts = [line.strip() for text in texts for line in text.split("\n") if line.strip()]
    text = "\n\n".join(texts[:limit])
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
        raise ValueError(f"{place}: an answer is empty or not a text; give texts that are not empty")
    return {"question": question, "answer": texts}


def _medmcqa(record: Any, place: str) -> dict[str, Any]:
    own = isinstance(record, dict) and "choices" not in record
    if own:
        if missing := [name for name in ("question", *OPTIONS, "cop") if name not in record]:
            raise ValueError(
                f"{place}: no column {', '.join(missing)}; give question, opa, opb, opc, opd and cop, or "
                "question, choices and answer"
            )
        options = [record[name] for name in OPTIONS]
        record = {**record, "choices": options, "answer": record["cop"]}
    item = _choices(record, place)
    if len(item["choices"]) != len(OPTIONS):
        raise ValueError(f"{place}: {len(item['choices'])} choices; MedMCQA's questions have four; give four")
    return {**item, "explanation": item.get("explanation") or item.get("exp")}


def _choices(record: Any, place: str) -> dict[str, Any]:
    needed = ("question", "choices", "answer")
    if not isinstance(record, dict) or not all(name in record for name in needed):
        missing = [name for name in needed if not isinstance(record, dict) or name not in record]
        raise ValueError(f"{place}: no column {', '.join(missing)}; give {FORMS['multiple-choice']}")
    question, choices, answer = (record[name] for name in needed)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{place}: question={question!r} is empty or not a text; give a text")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{place}: choices={choices!r} is not a list of two or more; give a list of texts")
    for letter, choice in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", choices, strict=False):
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"{place}: option {letter} is {choice!r}; give a text that is not empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(
            f"{place}: answer={answer!r} is outside 0-{len(choices) - 1}; give the right choice's index"
        )
    return record


def _from_hub(task: str, split: str | None = None) -> tuple[list[str], list[Any]]:
    if task not in HUB:
        raise ValueError(f"task {task} needs data; give a file with --data FILE: {FORMS[TASKS[task]]}")
    name, config, own_split = HUB[task]
    split = split or own_split
    instead = (
        f"put that split into a file and give it with --data FILE, or its folder with --data-dir when "
        f"methods are compared: {FORMS[TASKS[task]]}"
    )
    records = list(from_hub(name, config, split=split, instead=instead))
    return [f"{name} {split}, item {number}" for number in range(1, len(records) + 1)], records
