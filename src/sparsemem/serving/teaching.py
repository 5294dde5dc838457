"""What a teacher typed or dropped, as records."""

import json
from typing import Any

NUM_RECORDS = 2000
_PAIRS = (("prompt", "completion"), ("question", "answer"))


def typed_records(question: Any, answer: Any, phrasings: Any) -> list[dict[str, str]]:
    """A question, further phrasings of it, and their answer.

    Raises:
        ValueError: an empty field, or one that is no text.
    """
    texts = [question, *(phrasings if isinstance(phrasings, list) else [phrasings])]
    if not all(isinstance(one, str) for one in [*texts, answer]):
        raise ValueError("question, answer and phrasings must be text")
    prompts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not question.strip() or not answer.strip():
        raise ValueError("a question and its answer are needed; fill in both")
    return [{"prompt": prompt, "completion": answer.strip()} for prompt in prompts]


def dropped_records(text: str, name: str) -> list[dict[str, str]]:
    """Records of a JSONL file: prompts and completions, questions and answers, or one exchange of messages.

    Raises:
        ValueError: naming the line that is not such a record, or too many lines.
    """
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: not valid JSON ({error}); put one object on each line") from None
        records.append(_record(record, place))
        if len(records) > NUM_RECORDS:
            raise ValueError(
                f"{name} has more than {NUM_RECORDS:,} records; teach it with `sparsemem train` instead"
            )
    if not records:
        raise ValueError(f"{name} is empty; put one object on each line")
    return records


def _record(record: Any, place: str) -> dict[str, str]:
    found = record if isinstance(record, dict) else {}
    pair = next((pair for pair in _PAIRS if all(key in found for key in pair)), None)
    texts = [found[key] for key in pair] if pair else _exchange(found.get("messages"))
    if len(texts) != 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(
            f"{place}: must have the fields prompt and completion, or question and answer, as text, or "
            "messages with one question and one answer"
        )
    return {"prompt": texts[0].strip(), "completion": texts[1].strip()}


def _exchange(messages: Any) -> list[Any]:
    turns = messages if isinstance(messages, list) else []
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
    return [turn.get("content") for turn in turns] if roles == ["user", "assistant"] else []
