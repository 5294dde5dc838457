"""What a record may look like. Each becomes one of four FORMS when it is read; nothing later checks it again.

| fields                                   | becomes                                                     |
| ---------------------------------------- | ----------------------------------------------------------- |
| messages                                 | messages, with `tools` where they are given                 |
| conversations (from, value)              | messages                                                    |
| prompt, completion or prompt, response   | prompt, completion; messages where one is a list of turns   |
| question, choices, answer                | unchanged                                                   |
| question, answer                         | prompt, completion                                          |
| instruction, output, input, system       | prompt, completion; messages where there is a system prompt |
| text                                     | unchanged                                                   |
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Turns: TypeAlias = Sequence[dict[str, str]]
FORMS = (("messages",), ("prompt", "completion"), ("question", "choices", "answer"), ("text",))
# Names of roles in other formats.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_ROLES["developer"] = "system"


def as_turns(asked: str | Turns) -> Turns:
    """A question, or a conversation that ends with one, as a conversation."""
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else asked


def checked(record: Any, place: str) -> dict[str, Any]:
    """The record in one of the FORMS, with its other fields; None is taken as a field that is missing.

    A turn of `messages` may have `"weight": 0`, as in OpenAI's format: it is then not learnt.

    Args:
        record: a dict, or a string, which is text.
        place: where the record is, for error messages.

    Raises:
        ValueError: a record of no known shape, or with wrong values.
    """
    record = {"text": record} if isinstance(record, str) else record
    given = {key: value for key, value in record.items() if value is not None} if _is_dict(record) else {}
    shape = next((shape for shape in _READERS if all(key in given for key in shape)), None)
    if shape is None:
        found = ", ".join(map(str, given)) if _is_dict(record) else type(record).__name__
        allowed = "; ".join(", ".join(shape) for shape in _READERS)
        raise ValueError(f"{place}: record with {found or 'no field'}; allowed are the fields {allowed}")
    try:
        made = _READERS[shape](given)
        if "subject" in given:
            made["subject"] = _subject(given["subject"])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return {**{key: value for key, value in record.items() if key not in _FIELDS}, **made}


def form_of(record: dict[str, Any]) -> tuple[str, ...]:
    """Which of the FORMS a checked record has."""
    form = next((form for form in FORMS if form[-1] in record), None)
    assert form, "read_records checks records"
    return form


def _messages(given: dict[str, Any]) -> dict[str, Any]:
    name = "messages" if "messages" in given else "conversations"
    turns = _turns(given[name], name)
    if "system" in given and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": _text(given, "system")}, *turns]
    if not any(turn["role"] == "assistant" for turn in turns[1:]):
        raise ValueError(f"{name} must have at least one assistant turn after the first turn")
    tools = _decoded(given.get("tools"))
    if tools is not None and not (isinstance(tools, list) and all(map(_is_dict, tools))):
        raise ValueError("tools must be a list of functions, each described by an object")
    return {"messages": turns, **({"tools": _without_none(tools)} if tools else {})}


def _pair(question: str, answer: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The reader of records with a question and an answer under these names."""

    def read(given: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(given[question], list) and not isinstance(given[answer], list):
            return {"prompt": _text(given, question), "completion": _text(given, answer)}
        sides = []
        for name, role in ((question, "user"), (answer, "assistant")):
            whole = isinstance(given[name], list)
            sides.append(
                _turns(given[name], name) if whole else [{"role": role, "content": _text(given, name)}]
            )
        # what the prompt's assistant says is not learnt
        sides[0] = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in sides[0]]
        if not any(turn["role"] == "assistant" for turn in sides[1]):
            raise ValueError(f"{answer} must have at least one assistant turn")
        return _messages({**given, "messages": [*sides[0], *sides[1]]})

    return read


def _instruction(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("history"):
        raise ValueError("history is not read; write the turns as messages")
    parts = [_text(given, "instruction"), *([_text(given, "input")] if given.get("input") else [])]
    prompt, completion = "\n\n".join(parts), _text(given, "output")
    if not given.get("system"):
        return {"prompt": prompt, "completion": completion}
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _messages({"messages": turns, "system": given["system"]})


def _choices(given: dict[str, Any]) -> dict[str, Any]:
    choices, answer = _decoded(given["choices"]), given["answer"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices must be a list of strings")
    # a table of text holds the number as text
    answer = int(answer) if isinstance(answer, str) and answer.isdecimal() else answer
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer={answer!r} must be the index of the right choice, 0 to {len(choices) - 1}")
    return {"question": _text(given, "question"), "choices": choices, "answer": answer}


_READERS: dict[tuple[str, ...], Callable[[dict[str, Any]], dict[str, Any]]] = {
    ("messages",): _messages,
    ("conversations",): _messages,
    ("prompt", "completion"): _pair("prompt", "completion"),
    ("prompt", "response"): _pair("prompt", "response"),
    ("question", "choices", "answer"): _choices,
    ("question", "answer"): _pair("question", "answer"),
    ("instruction", "output"): _instruction,
    ("text",): lambda given: {"text": _text(given, "text", blank=True)},
}
_FIELDS = {field for shape in _READERS for field in shape} | {
    "input",
    "history",
    "system",
    "tools",
    "subject",
}


def _turns(value: Any, name: str) -> list[dict[str, Any]]:
    turns = _decoded(value)
    if not isinstance(turns, list) or not turns or not all(map(_is_dict, turns)):
        raise ValueError(f"{name} must be a list of {{role, content}} with at least one assistant turn")
    return [_turn(turn, f"{name}[{number}]") for number, turn in enumerate(turns)]


def _turn(turn: dict[str, Any], place: str) -> dict[str, Any]:
    turn = _without_none(turn)
    role = turn.pop("from", None) or turn.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{place} must have a role: system, user, assistant or tool")
    turn["role"] = _ROLES.get(role, role)
    content = turn.pop("value", turn.get("content", ""))
    if isinstance(content, list) and all(_is_dict(part) and part.get("type") == "text" for part in content):
        content = "".join(_text(part, "text", blank=True) for part in content)
    if calls := turn.get("tool_calls"):
        turn["tool_calls"] = [_call(call, place) for call in _decoded(calls)]
    may_be_blank = bool(calls) or turn["role"] not in ("user", "assistant")
    return {**turn, "content": _text({f"{place}.content": content}, f"{place}.content", blank=may_be_blank)}


def _call(call: Any, place: str) -> dict[str, Any]:
    """A tool call; its arguments are an object, as chat templates want them, not OpenAI's JSON text."""
    function = call.get("function", call) if _is_dict(call) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place}.tool_calls must be a list of calls with the name of a function")
    function = {**function, "arguments": _decoded(function.get("arguments") or {})}
    return {"type": "function", **call, "function": function} if "function" in call else function


def _subject(subject: Any) -> str | list[str]:
    names = [subject] if isinstance(subject, str) else subject
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"subject={subject!r} must be a name or a list of names")
    return subject


def _text(given: dict[str, Any], name: str, *, blank: bool = False) -> str:
    text = given[name]
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, not {type(text).__name__}")
    if not blank and not text.strip():
        raise ValueError(f"{name} is blank; give text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} has half a character (a lone surrogate); repair the text") from None
    return text


def _decoded(value: Any) -> Any:
    """A list or object, which tables hold as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _without_none(value: Any) -> Any:
    """Rows of a table have every key that any row has."""
    if isinstance(value, list):
        return [_without_none(one) for one in value]
    return {k: _without_none(v) for k, v in value.items() if v is not None} if _is_dict(value) else value


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)
