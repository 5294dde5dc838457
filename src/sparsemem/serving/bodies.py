"""What a request may say: bodies of OpenAI's API, and of the servers that extend it, as pydantic models."""

import json
import logging
from dataclasses import fields
from functools import cache
from inspect import signature
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..data.records import QUESTION, conversation_ids, text_ids
from .decoding import Sampling

logger = logging.getLogger(__name__)

# Completions without max_tokens are this long, as OpenAI's are; chats may fill the context.
COMPLETION_TOKENS = 16
MAX_CHOICES = 128
# Values of fields that are not built, with which they ask for nothing.
_NOTHING: tuple[Any, ...] = (1, "none", "auto", ["text"], {"type": "text"})


class ApiError(Exception):
    """Becomes OpenAI's error object."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", *,
        param: str | None = None, code: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(kind: type[Parsed], content: bytes) -> Parsed:
    """The body as a model.

    Raises:
        ApiError: naming the first field that is wrong.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from None


def _refusal(wrong: Any) -> ApiError:
    """The error about one problem that pydantic found."""
    kind, message = wrong["type"], wrong["msg"]
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in wrong["loc"]]
    param = "".join(parts).removeprefix(".") or None
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON ({message.removeprefix('Invalid JSON: ')})")
    if kind == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param)
    if kind == "missing":
        return ApiError(400, f"you must provide a {param} parameter", param=param)
    if param is None:
        return ApiError(400, "the body must be a JSON object")
    given = repr(wrong["input"])
    given = f"{given[:100]} ..." if len(given) > 100 else given
    message = message.replace("Input should", "must", 1).replace("must be a valid", "must be a", 1)
    code = "unsupported_parameter" if kind == "unsupported" else None
    return ApiError(400, f"{param}={given}: {message}", param=param, code=code)


def _asks_nothing(value: Any) -> Any:
    if value and (value is True or value not in _NOTHING):
        raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")
    return value


def _joined(content: Any) -> Any:
    """Text parts as one text."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("content", "must be text, a string or text parts")
    return "".join(map(str, texts))


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(prompt: Any) -> Any:
    """A text or token ids, or a list of them, as a list."""
    one = isinstance(prompt, str) or (isinstance(prompt, list) and all(type(item) is int for item in prompt))
    prompts = [prompt] if one else prompt
    good = isinstance(prompts, list) and 0 < len(prompts) <= MAX_CHOICES
    if not good or not all(
        isinstance(item, str) or (isinstance(item, list) and item and all(type(i) is int for i in item))
        for item in prompts
    ):
        raise PydanticCustomError(
            "prompt", "must be a string, token ids, or a list of up to {most} of them", {"most": MAX_CHOICES}
        )
    return prompts


def _called(calls: Any) -> Any:
    """Tool calls with their arguments as objects, as chat templates take them."""
    if not isinstance(calls, list):
        return calls
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                call = {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
            except ValueError:
                raise PydanticCustomError("arguments", "arguments must be JSON") from None
        found.append(call)
    return found


def _unused(value: Any, info: ValidationInfo) -> Any:
    _say_unused(info.field_name)
    return value


# a field that is not built, and one that cannot change an answer
Nothing = Annotated[Any, AfterValidator(_asks_nothing)]
Unused = Annotated[Any, AfterValidator(_unused)]


class Fields(BaseModel):
    """A field that is null is a field left out."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class StreamOptions(Fields):
    include_usage: bool = False
    include_obfuscation: bool = False


class Turn(Fields):
    """A message; fields of its own that a chat template may know are kept."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_joined)] = ""
    tool_calls: Annotated[list[dict[str, Any]], BeforeValidator(_called)] = []

    @model_validator(mode="after")
    def _says_something(self) -> "Turn":
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise PydanticCustomError("content", "content must be text, a string or text parts")
        return self

    def as_dict(self) -> dict[str, Any]:
        found = self.model_dump(exclude_unset=True) | {"content": self.content}
        return found | {"role": "system"} if self.role == "developer" else found


class Body(Fields):
    """What both endpoints take."""

    model: str
    max_tokens: int | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed)] = Field(
        [], max_length=4
    )
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # which taught facts an answer gave, each with its source
    sparsemem_facts: bool = False
    user: Unused = None
    metadata: Unused = None
    store: Unused = None
    service_tier: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    verbosity: Unused = None
    keep_alive: Unused = None
    options: Unused = None
    parallel_tool_calls: Unused = None
    best_of: Nothing = None
    logit_bias: Nothing = None
    functions: Nothing = None
    function_call: Nothing = None
    response_format: Nothing = None
    modalities: Nothing = None

    @property
    def num_top(self) -> int | None:
        """How many likely tokens to report at each place; None: no logprobs at all."""
        raise NotImplementedError

    def prompts(self, tokenizer: Any) -> list[list[int]]:
        """Token ids of each prompt.

        Raises:
            ApiError: what the tokenizer or its chat template refuses.
        """
        raise NotImplementedError

    def stops(self, _tokenizer: Any) -> list[str]:
        return self.stop

    def most_tokens(self) -> int | None:
        """Tokens of an answer; None: as many as there is room for."""
        return _most("max_tokens", self.max_tokens)

    def sampling(self, number: int) -> Sampling:
        """How the answer of this number is drawn; each of several has a seed of its own."""
        names = {one.name for one in fields(Sampling)} - {"seed", "top_logprobs"}
        seed = None if self.seed is None else (self.seed + number + 2**63) % 2**64 - 2**63
        return Sampling(seed=seed, top_logprobs=self.num_top, **self.model_dump(include=names))


class ChatBody(Body):
    messages: list[Turn] = Field(min_length=1)
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: Any = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @property
    def num_top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def most_tokens(self) -> int | None:
        if self.max_completion_tokens is None:
            return super().most_tokens()
        return _most("max_completion_tokens", self.max_completion_tokens)

    def stops(self, tokenizer: Any) -> list[str]:
        return self.stop if tokenizer.chat_template else [*self.stop, f"\n{QUESTION}"]

    def prompts(self, tokenizer: Any) -> list[list[int]]:
        template = str(tokenizer.chat_template)
        options = {**self.chat_template_kwargs}
        for name in ("reasoning_effort", "tool_choice"):
            value = getattr(self, name)
            if value is not None and name in template:
                options.setdefault(name, value)
            elif name == "reasoning_effort" and value is not None:
                _say_unused(name)
        kept = {*signature(tokenizer.apply_chat_template).parameters, "turns", "tokenizer"} - {"kwargs"}
        if taken := sorted(kept & self.chat_template_kwargs.keys()):
            raise ApiError(
                400, f"chat_template_kwargs: {', '.join(taken)} cannot be set; it takes variables of the "
                "chat template", param="chat_template_kwargs",
            )  # fmt: skip
        tools = None if self.tool_choice == "none" else self.tools or None
        if self.tool_choice not in (None, "none", "auto") and "tool_choice" not in template:
            raise ApiError(
                400, f"tool_choice={self.tool_choice!r} cannot be enforced with this model; give 'auto' or "
                "'none'", param="tool_choice", code="unsupported_parameter",
            )  # fmt: skip
        if "tool" not in template and any(turn.role == "tool" or turn.tool_calls for turn in self.messages):
            raise ApiError(
                400, "messages: the model's chat template takes no tools; leave out tool calls and messages "
                "with the role 'tool'", param="messages", code="unsupported_parameter",
            )  # fmt: skip
        turns = [turn.as_dict() for turn in self.messages]
        try:
            return [conversation_ids(turns, tokenizer, tools=tools, **options)]
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None


class CompletionBody(Body):
    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    # false is what a chat says
    logprobs: Annotated[int | None, BeforeValidator(lambda value: None if value is False else value)] = Field(
        None, ge=0, le=20
    )
    echo: Nothing = None
    suffix: Nothing = None

    @property
    def num_top(self) -> int | None:
        return self.logprobs

    def most_tokens(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else super().most_tokens()

    def prompts(self, tokenizer: Any) -> list[list[int]]:
        found = []
        for prompt in self.prompt:
            if isinstance(prompt, str):
                try:
                    # a text as it is: no chat template
                    found.append(text_ids(prompt, tokenizer) or [tokenizer.eos_token_id])
                except ValueError as error:
                    raise ApiError(400, f"prompt: {error}", param="prompt") from None
            elif all(0 <= one < len(tokenizer) for one in prompt):
                found.append(prompt)
            else:
                raise ApiError(
                    400, f"prompt: a token id is outside 0 to {len(tokenizer) - 1}", param="prompt"
                )
        return found


def _most(name: str, value: int | None) -> int | None:
    if value is not None and value != -1 and value < 1:
        raise ApiError(
            400, f"{name}={value} must be 1 or more, or -1 for as many as there is room for", param=name
        )
    return None if value == -1 else value


@cache
def _say_unused(name: str | None) -> None:
    logger.warning("requests give %s, which this server does not use", name)
