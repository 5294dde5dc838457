"""What a request may say: bodies of OpenAI's API, checked field by field, and errors in its form."""

import time
import uuid
from dataclasses import dataclass
from typing import Any

from ..data.records import QUESTION, conversation_ids, text_ids, too_long
from .decoding import Sampling

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields that change nothing here.
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"}
# Fields of OpenAI's that are allowed where they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip
_OURS = {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"}
# Completions without max_tokens are this long, as OpenAI's are; chats may fill the context.
COMPLETION_TOKENS = 16


class ApiError(Exception):
    """Becomes OpenAI's error object."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", *,
        param: str | None = None, code: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Asked:
    """A checked request.

    Attributes:
        prompts: token ids of each prompt.
        max_tokens: of each answer.
    """

    model: str
    prompts: list[list[int]]
    max_tokens: int
    sampling: Sampling
    stop: list[str]
    stream: bool
    include_usage: bool


def read_chat(body: Any, tokenizer: Any, room: int, limit: int) -> Asked:
    """A body of /v1/chat/completions.

    Args:
        room: tokens of prompt and answer together.
        limit: tokens of an answer at most.

    Raises:
        ApiError: a body that is not allowed.
    """
    _check_fields(body, {"messages", "max_completion_tokens"})
    try:
        prompt = conversation_ids(_turns(body.get("messages")), tokenizer)
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None
    name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    asked = _common(body, [prompt], name, None, room, limit)
    if not tokenizer.chat_template:
        asked.stop.append(f"\n{QUESTION}")
    return asked


def read_completion(body: Any, tokenizer: Any, room: int, limit: int) -> Asked:
    """A body of /v1/completions; see `read_chat`."""
    _check_fields(body, {"prompt"})
    return _common(
        body, _prompts(body.get("prompt"), tokenizer), "max_tokens", COMPLETION_TOKENS, room, limit
    )


def _check_fields(body: Any, further: set[str]) -> None:
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name, value in body.items():
        if name in _OURS or name in further or name in _IGNORED or value is None:
            continue
        if name not in _NEUTRAL:
            raise ApiError(400, f"Unrecognized request argument supplied: {name}", param=name)
        if not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in _NEUTRAL[name]
        ):
            raise ApiError(
                400, f"{name}={value!r} is not supported by this server; leave it out", param=name,
                code="unsupported_parameter",
            )  # fmt: skip


def _common(
    body: dict[str, Any], prompts: list[list[int]], max_name: str, default: int | None, room: int, limit: int
) -> Asked:
    model = body.get("model")
    if not isinstance(model, str):
        raise ApiError(400, "you must provide a model parameter", param="model")
    longest = max(map(len, prompts))
    if longest >= room:
        raise ApiError(
            400, too_long(longest, room), param="messages" if "messages" in body else "prompt",
            code="context_length_exceeded",
        )  # fmt: skip
    most = min(limit, room - longest)
    wanted = _number(body, max_name, 1, None, whole=True)
    if wanted is not None and wanted > limit:
        raise ApiError(
            400, f"{max_name}={wanted} is above this server's limit of {limit} tokens", param=max_name
        )
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(one, str) and one for one in stop):
        raise ApiError(400, f"stop={stop!r} must be a string or a list of up to 4 strings", param="stop")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise ApiError(
            400, f"stream_options={options!r}: only include_usage is known", param="stream_options"
        )
    for name in ("stream",):
        if not isinstance(body.get(name) or False, bool):
            raise ApiError(400, f"{name}={body[name]!r} must be true or false", param=name)
    temperature, top_p = _number(body, "temperature", 0, 2), _number(body, "top_p", 0, 1)
    if top_p == 0:
        raise ApiError(
            400, "top_p=0 must be above 0; for the likeliest token give temperature=0", param="top_p"
        )
    seed: Any = _number(body, "seed", -(2**63), 2**63 - 1, whole=True)
    return Asked(
        model=model,
        prompts=prompts,
        max_tokens=min(int(wanted or default or most), most),
        sampling=Sampling(1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p, seed),
        stop=list(stop),
        stream=bool(body.get("stream")),
        include_usage=bool(options.get("include_usage")),
    )


def _number(body: dict[str, Any], name: str, least: float, most: float | None, *, whole: bool = False) -> Any:
    value = body.get(name)
    if value is None:
        return None
    good = isinstance(value, int) or (isinstance(value, float) and not whole)
    if not good or isinstance(value, bool) or not least <= value or (most is not None and value > most):
        kind = "a whole number" if whole else "a number"
        allowed = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise ApiError(400, f"{name}={value!r} must be {kind} {allowed}", param=name)
    return value


def _turns(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", param="messages")
    turns = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError(
                400, f"{place}.role={role!r} must be one of {', '.join(ROLES)}", param=f"{place}.role"
            )
        turns.append({"role": ROLES[role], "content": _content(message.get("content"), place)})
    return turns


def _content(content: Any, place: str) -> str:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in parts
    ):
        raise ApiError(400, f"{place}.content must be text, a string or text parts", param=f"{place}.content")
    return "".join(part["text"] for part in parts)


def _prompts(prompt: Any, tokenizer: Any) -> list[list[int]]:
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt or len(prompt) > 128:
        raise ApiError(
            400, "prompt must be a string, token ids, or a list of up to 128 of them", param="prompt"
        )
    return [_prompt(one, tokenizer) for one in prompt]


def _prompt(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        # a text as it is: no chat template
        return text_ids(prompt, tokenizer) or [tokenizer.eos_token_id]
    if isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
        if not all(0 <= one < len(tokenizer) for one in prompt):
            raise ApiError(400, f"prompt: a token id is outside 0 to {len(tokenizer) - 1}", param="prompt")
        return prompt
    raise ApiError(400, "prompt must be a string, token ids, or a list of up to 128 of them", param="prompt")


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
