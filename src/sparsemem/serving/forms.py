"""How answers are written, whole and in pieces, for chats and for completions."""

import time
import uuid
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answered:
    """One finished answer."""

    text: str
    finish: str
    num_tokens: int


class Form:
    """How answers are written for one endpoint."""

    prefix = kind = chunk_kind = ""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answers: list[Answered], usage: dict[str, int]) -> dict[str, Any]:
        choices = [self.choice(number, answer) for number, answer in enumerate(answers)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def choice(self, number: int, answer: Answered) -> dict[str, Any]:
        raise NotImplementedError

    def opening(self, number: int) -> dict[str, Any] | None:
        return None

    def delta(self, number: int, text: str | None, finish: str | None) -> dict[str, Any]:
        raise NotImplementedError


class Chat(Form):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, number: int, answer: Answered) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": number, "message": message, "logprobs": None, "finish_reason": answer.finish}

    def opening(self, number: int) -> dict[str, Any] | None:
        return {"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def delta(self, number: int, text: str | None, finish: str | None) -> dict[str, Any]:
        return {"index": number, "delta": {} if text is None else {"content": text}, "finish_reason": finish}


class Completion(Form):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, number: int, answer: Answered) -> dict[str, Any]:
        return {"index": number, "text": answer.text, "logprobs": None, "finish_reason": answer.finish}

    def delta(self, number: int, text: str | None, finish: str | None) -> dict[str, Any]:
        return {"index": number, "text": text or "", "logprobs": None, "finish_reason": finish}
