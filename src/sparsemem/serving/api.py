"""The OpenAI-compatible HTTP interface: models, chat completions, completions, health and metrics.

Why not `transformers serve`: it answers one request after another, or packs all requests' tokens into one row
(continuous batching), where a request cannot have memories of its own; it loads any model by name that a
request asks for; and its errors are not in OpenAI's form. Models, caches, sampling and incremental decoding
are transformers' and tokenizers' own.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.exceptions import HTTPException

from ..data.models import context_length
from . import engine as engines
from .bodies import Answered, ApiError, Asked, Chat, Completion, Form, read_chat, read_completion
from .decoding import Row, Sampling
from .engine import AnswerText, Engine, Piece, QueueFull
from .listen import LOOPBACK_HOSTS, new_app
from .memories import Served

BODY_SECONDS = 10


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    Attributes:
        max_batch, max_queue: requests that are answered at once, and others that wait.
        max_tokens: of one answer.
        max_body: bytes of a request.
    """

    max_batch: int = 16
    max_queue: int = 256
    max_tokens: int = 4096
    max_body: int = 1 << 20


def build_app(
    served: Served,
    *,
    api_key: str | None = None,
    limits: Limits | None = None,
    hosts: tuple[str, ...] = LOOPBACK_HOSTS,
) -> FastAPI:
    """The application that answers for a model and its memories.

    Args:
        api_key: what clients must send as a bearer token; None: nothing.
        hosts: names under which the server may be asked; "*": any.
    """
    limits = limits or Limits()
    engine = Engine(served.model, served.tokenizer, max_batch=limits.max_batch, max_queue=limits.max_queue)
    started = int(time.time())
    room = context_length(served.model)
    metrics = Metrics(engine)

    @asynccontextmanager
    async def running(_app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = new_app(running, hosts)

    @app.exception_handler(ApiError)
    async def _api_error(_request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(ApiError(400, str(error)).body, 400)

    @app.middleware("http")
    async def _counted(request: Request, call_next: Any) -> Any:
        if api_key is not None and request.url.path != "/health" and not _allowed(request, api_key):
            error = ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
            response: Any = JSONResponse(error.body, 401)
        else:
            response = await call_next(request)
        route = request.scope.get("route")
        metrics.requests.labels(getattr(route, "path", "other"), response.status_code).inc()
        return response

    def model_object(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "sparsemem"}

    def checked_model(name: str) -> tuple[str, ...]:
        memories = served.memories_of(name)
        if memories is None:
            allowed = ", ".join((served.base, *served.memories))
            raise ApiError(
                404, f"The model {name!r} does not exist; there are {allowed}, and several joined by '+'",
                param="model", code="model_not_found",
            )  # fmt: skip
        return memories

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    async def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_object(name) for name in (served.base, *served.memories)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        checked_model(name)
        return model_object(name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await read_body(request, limits.max_body)
        asked = read_chat(body, served.tokenizer, room, limits.max_tokens)
        return await respond(asked, request, Chat(asked.model))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = await read_body(request, limits.max_body)
        asked = read_completion(body, served.tokenizer, room, limits.max_tokens)
        return await respond(asked, request, Completion(asked.model))

    async def respond(asked: Asked, request: Request, form: Form) -> Any:
        requests, pieces = _submit(engine, served, asked, checked_model(asked.model))
        if asked.stream:
            stream = _stream(requests, pieces, asked, form)
            return StreamingResponse(stream, media_type="text/event-stream")
        collecting = asyncio.ensure_future(_collect(requests, pieces))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait([collecting, gone], return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ApiError(499, "the client has gone")
            answers = collecting.result()
        finally:
            _cancel(requests)
            collecting.cancel()
            gone.cancel()
        return form.whole(answers, _usage(asked, sum(one.num_tokens for one in answers)))

    return app


async def read_body(request: Request, most: int) -> Any:
    """A request's JSON.

    Raises:
        ApiError: more than `most` bytes, not there within BODY_SECONDS, or no JSON.
    """
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > most:
                    raise ApiError(413, f"the body is larger than this server's limit of {most} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} seconds") from None
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON ({error})") from None


def _allowed(request: Request, api_key: str) -> bool:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(given.encode(), api_key.encode())


def _submit(
    engine: Engine, served: Served, asked: Asked, memories: tuple[str, ...]
) -> tuple[list[engines.Request], asyncio.Queue[tuple[int, Piece]]]:
    """A request to the engine for each prompt, and the queue of their pieces with the prompts' numbers."""
    pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver_to(number: int) -> Any:
        def deliver(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, (number, piece))

        return deliver

    requests = [
        engines.Request(
            Row(list(prompt), memories, Sampling(**vars(asked.sampling))),
            asked.max_tokens,
            AnswerText(served.tokenizer, asked.stop),
            deliver_to(number),
        )
        for number, prompt in enumerate(asked.prompts)
    ]
    try:
        engine.submit(*requests)
    except QueueFull:
        raise ApiError(
            429, f"{engine.max_queue} requests wait already; try again later", "rate_limit_error",
            code="rate_limit_exceeded",
        ) from None  # fmt: skip
    return requests, pieces


async def _collect(
    requests: list[engines.Request], pieces: asyncio.Queue[tuple[int, Piece]]
) -> list[Answered]:
    answers: dict[int, Answered] = {}
    while len(answers) < len(requests):
        number, piece = await pieces.get()
        if piece.error is not None:
            raise ApiError(500, piece.error, "server_error")
        if piece.finish is not None:
            request = requests[number]
            answers[number] = Answered(request.text.text, piece.finish, request.num_tokens)
    return [answers[number] for number in range(len(requests))]


async def _stream(
    requests: list[engines.Request],
    pieces: asyncio.Queue[tuple[int, Piece]],
    asked: Asked,
    form: Form,
) -> AsyncIterator[str]:
    """Server-sent events, the last of them `[DONE]`."""
    null_usage = {"usage": None} if asked.include_usage else {}
    left = len(requests)
    try:
        for number in range(len(requests)):
            if opening := form.opening(number):
                yield _event({**form.chunk([opening]), **null_usage})
        while left:
            number, piece = await pieces.get()
            if piece.error is not None:
                yield _event(ApiError(500, piece.error, "server_error").body)
                return
            if piece.text or piece.finish is None:
                yield _event({**form.chunk([form.delta(number, piece.text, None)]), **null_usage})
            if piece.finish is not None:
                left -= 1
                yield _event({**form.chunk([form.delta(number, None, piece.finish)]), **null_usage})
        if asked.include_usage:
            num_tokens = sum(request.num_tokens for request in requests)
            yield _event({**form.chunk([]), "usage": _usage(asked, num_tokens)})
        yield "data: [DONE]\n\n"
    finally:
        # a client that has gone away wants no more tokens
        _cancel(requests)


def _cancel(requests: list[engines.Request]) -> None:
    for request in requests:
        request.cancelled = True


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.5)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _usage(asked: Asked, num_tokens: int) -> dict[str, int]:
    num_prompt = sum(map(len, asked.prompts))
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
    }


class Metrics:
    """Requests by path and status, and what the engine has done."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "sparsemem_requests", "Requests that were answered.", ["path", "status"], registry=self._registry
        )
        gauges = {
            "sparsemem_requests_running": ("Requests in the batch.", lambda: engine.num_running),
            "sparsemem_requests_waiting": ("Requests in the queue.", lambda: engine.num_waiting),
            "sparsemem_prompt_tokens_total": ("Tokens of prompts.", lambda: engine.num_prompt_tokens),
            "sparsemem_generated_tokens_total": ("Tokens of answers.", lambda: engine.num_generated_tokens),
        }
        for name, (about, read) in gauges.items():
            Gauge(name, about, registry=self._registry).set_function(read)

    def text(self) -> str:
        return generate_latest(self._registry).decode()
