"""How answers are written in OpenAI's API, for chats and for completions."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .bodies import Body
from .decoding import Chosen

_HALF = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Answered:
    """One finished answer."""

    text: str = ""
    finish: str = ""
    chosen: list[Chosen] = field(default_factory=list)
    facts: list[dict[str, Any]] | None = None


def named(facts: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The field of a choice that names its facts; none where they were not asked for."""
    return {} if facts is None else {"sparsemem_facts": facts}


class Form:
    """How answers are written for one endpoint."""

    prefix = kind = chunk_kind = ""

    def __init__(self, body: Body, tokenizer: Any) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        self._head["model"] = body.model
        self._tokenizer, self._num_top = tokenizer, body.num_top
        self._offsets: dict[int, int] = {}

    def whole(self, answers: list[Answered], usage: dict[str, int]) -> dict[str, Any]:
        choices = [
            {**self.choice(number, answer), **named(answer.facts)} for number, answer in enumerate(answers)
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def choice(self, number: int, answer: Answered) -> dict[str, Any]:
        raise NotImplementedError

    def opening(self, number: int) -> dict[str, Any] | None:
        return None

    def delta(
        self, number: int, text: str | None, chosen: Sequence[Chosen], finish: str | None
    ) -> dict[str, Any]:
        raise NotImplementedError

    def logprobs(self, number: int, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        """Of the next tokens of an answer; None: they were not asked for."""
        return None if self._num_top is None else self._logprobs(number, chosen)

    def _logprobs(self, number: int, chosen: Sequence[Chosen]) -> dict[str, Any]:
        raise NotImplementedError

    def _token(self, token: int) -> str:
        """A token's text, or its name in the vocabulary if that is no whole character."""
        text = self._tokenizer.decode([token])
        return self._tokenizer.convert_ids_to_tokens(token) if _HALF in text else text


class Chat(Form):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, number: int, answer: Answered) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        found = {"index": number, "message": message, "finish_reason": answer.finish}
        return {**found, "logprobs": self.logprobs(number, answer.chosen)}

    def opening(self, number: int) -> dict[str, Any] | None:
        return {"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def delta(
        self, number: int, text: str | None, chosen: Sequence[Chosen], finish: str | None
    ) -> dict[str, Any]:
        found = {"index": number, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
        return {**found, "logprobs": self.logprobs(number, chosen)} if chosen else found

    def _logprobs(self, number: int, chosen: Sequence[Chosen]) -> dict[str, Any]:
        def described(token: int, value: float) -> dict[str, Any]:
            text = self._tokenizer.decode([token])
            whole = None if _HALF in text else list(text.encode())
            return {"token": self._token(token), "logprob": value, "bytes": whole}

        content = [
            {**described(one.token, one.logprob), "top_logprobs": [described(*other) for other in one.top]}
            for one in chosen
        ]
        return {"content": content, "refusal": None}


class Completion(Form):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, number: int, answer: Answered) -> dict[str, Any]:
        found = {"index": number, "text": answer.text, "finish_reason": answer.finish}
        return {**found, "logprobs": self.logprobs(number, answer.chosen)}

    def delta(
        self, number: int, text: str | None, chosen: Sequence[Chosen], finish: str | None
    ) -> dict[str, Any]:
        found = {"index": number, "text": text or "", "finish_reason": finish}
        return {**found, "logprobs": self.logprobs(number, chosen) if chosen else None}

    def _logprobs(self, number: int, chosen: Sequence[Chosen]) -> dict[str, Any]:
        tokens, offsets = [self._token(one.token) for one in chosen], []
        for token in tokens:
            offsets.append(self._offsets.setdefault(number, 0))
            self._offsets[number] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in chosen],
            "top_logprobs": [{self._token(token): value for token, value in one.top} for one in chosen],
            "text_offset": offsets,
        }
