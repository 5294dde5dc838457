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
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ..data.models import context_length
from ..data.records import too_long
from ..precision import precision_of
from . import engine as engines
from .bodies import ApiError, Body, ChatBody, CompletionBody, parse
from .decoding import Row
from .engine import AnswerText, Engine, Piece, QueueFull
from .forms import Answered, Chat, Completion, Form, named
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
    origins: tuple[str, ...] = (),
    precision: str | None = None,
) -> FastAPI:
    """The application that answers for a model and its memories.

    Args:
        api_key: what clients must send as a bearer token; None: nothing.
        hosts: names under which the server may be asked; "*": any.
        origins: web pages that may ask from a browser; "*": any.
        precision: in which the model computes; see `precision_of`.
    """
    limits = limits or Limits()
    engine = Engine(
        served.model, served.tokenizer,
        max_batch=limits.max_batch, max_queue=limits.max_queue, precision=precision,
    )  # fmt: skip
    precision = precision_of(served.model, precision)
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

    @app.exception_handler(Exception)
    async def _failed(_request: Request, error: Exception) -> JSONResponse:
        # what was not foreseen is in the log, with its traceback
        message = f"the request failed: {type(error).__name__}"
        return JSONResponse(ApiError(500, message, "server_error").body, 500)

    app.add_middleware(_Gate, api_key=api_key, count=metrics.count)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            allow_private_network=True,
        )  # fmt: skip

    def model_object(name: str) -> dict[str, Any]:
        about = {"object": "model", "created": started, "owned_by": "sparsemem", "precision": precision}
        return {"id": name, **about, "max_model_len": room}

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
        body = parse(ChatBody, await read_body(request, limits.max_body))
        return await respond(body, request, Chat(body, served.tokenizer))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = parse(CompletionBody, await read_body(request, limits.max_body))
        return await respond(body, request, Completion(body, served.tokenizer))

    async def respond(body: Body, request: Request, form: Form) -> Any:
        memories, prompts = checked_model(body.model), body.prompts(served.tokenizer)
        longest = max(map(len, prompts))
        if longest >= room:
            raise ApiError(400, too_long(longest, room), code="context_length_exceeded")
        most = min(body.most_tokens() or room, limits.max_tokens, room - longest)
        requests, pieces = _submit(engine, served, body, prompts, most, memories)
        num_prompt = sum(map(len, prompts))
        if body.stream:
            usage = num_prompt if body.stream_options.include_usage else None
            stream = _stream(requests, pieces, form, usage, served)
            return StreamingResponse(stream, media_type="text/event-stream")
        collecting = asyncio.ensure_future(_collect(requests, pieces, served))
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
        return form.whole(answers, _usage(num_prompt, requests))

    return app


class _Gate:
    """Asks for the key, and counts answers by path and status.

    It is no `@app.middleware`: behind one, nobody learns that a client has gone.
    """

    def __init__(self, app: Any, api_key: str | None, count: Any) -> None:
        self._app, self._key, self._count = app, api_key, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 500

        async def watched(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        app = self._app
        if self._key is not None and scope["path"] != "/health" and not _allowed(Request(scope), self._key):
            error = ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
            app = JSONResponse(error.body, 401)
        try:
            await app(scope, receive, watched)
        finally:
            self._count(getattr(scope.get("route"), "path", "other"), status)


async def read_body(request: Request, most: int) -> bytes:
    """A request's body.

    Raises:
        ApiError: more than `most` bytes, or not there within BODY_SECONDS.
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
    return bytes(content)


def _allowed(request: Request, api_key: str) -> bool:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(given.encode(), api_key.encode())


def _submit(
    engine: Engine, served: Served, body: Body, prompts: list[list[int]], most: int, memories: tuple[str, ...]
) -> tuple[list[engines.Request], asyncio.Queue[tuple[int, Piece]]]:
    """Requests to the engine, `n` for each prompt, and the queue of their pieces with their numbers."""
    pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver_to(number: int) -> Any:
        def deliver(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, (number, piece))

        return deliver

    requests = [
        engines.Request(
            Row(list(prompts[number // body.n]), memories, body.sampling(number)),
            most,
            AnswerText(served.tokenizer, body.stops(served.tokenizer)),
            deliver_to(number),
            names_facts=body.sparsemem_facts,
        )
        for number in range(len(prompts) * body.n)
    ]
    if len(requests) > engine.max_queue:
        raise ApiError(
            400, f"{len(requests)} answers in one request; this server takes {engine.max_queue} at most",
            param="n",
        )  # fmt: skip
    try:
        engine.submit(*requests)
    except QueueFull:
        raise ApiError(
            429, f"{engine.max_queue} requests wait already; try again later", "rate_limit_error",
            code="rate_limit_exceeded",
        ) from None  # fmt: skip
    return requests, pieces


async def _collect(
    requests: list[engines.Request], pieces: asyncio.Queue[tuple[int, Piece]], served: Served
) -> list[Answered]:
    answers = [Answered() for _ in requests]
    while not all(answer.finish for answer in answers):
        number, piece = await pieces.get()
        if piece.error is not None:
            raise ApiError(500, piece.error, "server_error")
        answers[number].text += piece.text
        answers[number].chosen += piece.chosen
        answers[number].finish = piece.finish or ""
        if requests[number].names_facts:
            answers[number].facts = served.described(piece.facts)
    return answers


async def _stream(
    requests: list[engines.Request],
    pieces: asyncio.Queue[tuple[int, Piece]],
    form: Form,
    num_prompt: int | None,
    served: Served,
) -> AsyncIterator[str]:
    """Server-sent events, the last of them `[DONE]`; with the usage, if the prompt's tokens are given."""
    null_usage = {} if num_prompt is None else {"usage": None}
    left = len(requests)
    try:
        for number in range(len(requests)):
            if opening := form.opening(number):
                yield server_event({**form.chunk([opening]), **null_usage})
        while left:
            number, piece = await pieces.get()
            if piece.error is not None:
                yield server_event(ApiError(500, piece.error, "server_error").body)
                return
            if piece.text or piece.chosen:
                delta = form.delta(number, piece.text, piece.chosen, None)
                yield server_event({**form.chunk([delta]), **null_usage})
            if piece.finish is not None:
                left -= 1
                facts = served.described(piece.facts) if requests[number].names_facts else None
                last = {**form.delta(number, None, (), piece.finish), **named(facts)}
                yield server_event({**form.chunk([last]), **null_usage})
        if num_prompt is not None:
            yield server_event({**form.chunk([]), "usage": _usage(num_prompt, requests)})
        yield "data: [DONE]\n\n"
    finally:
        # a client that has gone away wants no more tokens
        _cancel(requests)


def _cancel(requests: list[engines.Request]) -> None:
    for request in requests:
        request.cancelled = True


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def server_event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _usage(num_prompt: int, requests: list[engines.Request]) -> dict[str, int]:
    num_tokens = sum(request.num_tokens for request in requests)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
    }


class Metrics:
    """Requests by path and status, and what the engine has done."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "sparsemem_requests", "Requests that were answered.", ["path", "status"], registry=self._registry
        )
        gauges = {
            "sparsemem_requests_running": ("Requests in the batch.", lambda: engine.num_running),
            "sparsemem_requests_waiting": ("Requests in the queue.", lambda: engine.num_waiting),
            "sparsemem_prompt_tokens_total": ("Tokens of prompts.", lambda: engine.num_prompt_tokens),
            "sparsemem_generated_tokens_total": ("Tokens of answers.", lambda: engine.num_generated_tokens),
            "sparsemem_answers_cancelled_total": (
                "Answers that a client gave up.",
                lambda: engine.num_cancelled,
            ),
        }
        for name, (about, read) in gauges.items():
            Gauge(name, about, registry=self._registry).set_function(read)

    def count(self, path: str, status: int) -> None:
        self._requests.labels(path, status).inc()

    def text(self) -> str:
        return generate_latest(self._registry).decode()
