"""The web page on which a model is taught: its files, and the interface that its script calls.

Choices: everything is in the package, and the page may load nothing from elsewhere (its content security
policy says so). The server answers to its own host names alone, and changes come as JSON from its own pages
alone, so that other pages in the same browser cannot teach.
"""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import Field, StrictBool
from starlette.exceptions import HTTPException

from .api import read_body, server_event
from .bodies import ApiError, Fields, Parsed, parse
from .exchanges import Tell, ask, more
from .lessons import Lessons, Progress
from .listen import LOOPBACK_HOSTS, new_app

STATIC = Path(__file__).with_name("static")
MAX_BODY = 4 << 20
MAX_QUESTION = 2000
_POLICY = "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"


def build_page(
    opened: Callable[[Progress], Lessons], model: str, *, hosts: tuple[str, ...] = LOOPBACK_HOSTS
) -> FastAPI:
    """The application behind the page.

    Args:
        opened: loads the model and its lessons; it runs once the page can be reached.
        model: what the page calls the model until it is loaded.
        hosts: names under which the page may be asked for; "*": any.
    """
    worker = Worker()
    loaded: list[Lessons] = []

    @asynccontextmanager
    async def running(_app: FastAPI) -> AsyncIterator[None]:
        worker.start("load", lambda progress: loaded.append(opened(progress)))
        yield
        await asyncio.to_thread(worker.stop)

    app = new_app(running, hosts)

    @app.exception_handler(ApiError)
    async def _error(_request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.status)

    @app.exception_handler(HTTPException)
    async def _http_error(_request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)

    @app.middleware("http")
    async def _guarded(request: Request, call_next: Any) -> Any:
        if request.method not in ("GET", "HEAD") and not _from_here(request):
            return JSONResponse({"error": "changes come from this server's own pages only"}, 403)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-store"
        return response

    async def read(kind: type[Parsed], request: Request) -> Parsed:
        return parse(kind, await read_body(request, MAX_BODY))

    def lessons() -> Lessons:
        if not loaded:
            raise ApiError(503, worker.error or "the model is still loading; wait a moment")
        return loaded[0]

    def begin(kind: str, work: Callable[[Progress], object]) -> dict[str, Any]:
        if not worker.start(kind, work):
            raise ApiError(409, "something else is under way; wait until it is done")
        return state()

    async def short(work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await asyncio.wrap_future(worker.do(work, *arguments))
        except ValueError as error:
            raise ApiError(404, str(error)) from None

    def state() -> dict[str, Any]:
        held = loaded[0] if loaded else None
        return {
            "ready": held is not None,
            "model": held.base if held else model,
            "lessons": [asdict(lesson) for lesson in held.lessons] if held else [],
            "undone": held.undone if held else [],
            "asked": held.asked if held else [],
            "changed": held.changed if held else None,
            "job": worker.job,
            "error": worker.error,
        }

    @app.get("/api/state")
    async def get_state() -> dict[str, Any]:
        return state()

    @app.post("/api/teach")
    async def teach(request: Request) -> dict[str, Any]:
        body = await read(Teach, request)
        held = lessons()
        try:
            if body.file is not None:
                records, title = dropped_records(body.file, body.name), body.name
            else:
                records = typed_records(body.question, body.answer, body.phrasings)
                title = records[0]["prompt"]
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        return begin("teach", lambda progress: held.teach(records, title, progress))

    def streamed(work: Callable[[Tell], dict[str, Any]]) -> StreamingResponse:
        """An answer as server-sent events: its texts so far, then its number or what went wrong."""
        events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        async def sent() -> AsyncIterator[str]:
            event: dict[str, Any] = {}
            while "number" not in event and "error" not in event:
                event = await events.get()
                yield server_event(event)

        worker.do(work, tell).add_done_callback(lambda done: tell(_end(done)))
        return StreamingResponse(sent(), media_type="text/event-stream")

    @app.post("/api/ask")
    async def ask_both(request: Request) -> StreamingResponse:
        body = await read(Ask, request)
        held, question = lessons(), body.question.strip()
        if not 0 < len(question) <= MAX_QUESTION:
            raise ApiError(400, f"a question of 1 to {MAX_QUESTION:,} characters is needed")
        return streamed(lambda tell: ask(held, question, body.follows, tell))

    @app.post("/api/more")
    async def continue_one(request: Request) -> StreamingResponse:
        body, held = await read(More, request), lessons()
        return streamed(lambda tell: more(held, body.number, body.side, tell))

    @app.post("/api/changes")
    async def changes(request: Request) -> dict[str, Any]:
        await read(Fields, request)
        return begin("changes", lessons().look_for_changes)

    @app.post("/api/lessons/{name}")
    async def switch(name: str, request: Request) -> dict[str, Any]:
        await short(lessons().set_on, name, (await read(Switch, request)).on)
        return state()

    @app.post("/api/lessons/{name}/redo")
    async def redo(name: str, request: Request) -> dict[str, Any]:
        await read(Fields, request)
        await short(lessons().redo, name)
        return state()

    @app.delete("/api/lessons/{name}")
    async def undo(name: str) -> dict[str, Any]:
        await short(lessons().undo, name)
        return state()

    @app.get("/api/lessons/{name}/file")
    async def download(name: str) -> FileResponse:
        held = lessons()
        try:
            file, called = held.file_of(name)
        except ValueError as error:
            raise ApiError(404, str(error)) from None
        return FileResponse(file, media_type="application/octet-stream", filename=called)

    app.mount("/", StaticFiles(directory=STATIC, html=True))
    return app


class Teach(Fields):
    """A question with its answer, or a file's text and name."""

    question: str = ""
    answer: str = ""
    phrasings: list[str] = Field([], max_length=100)
    file: str | None = None
    name: str = "file"


class Ask(Fields):
    """A question; `follows` is the number of the exchange before it."""

    question: str
    follows: int | None = None


class More(Fields):
    """Which answer to continue."""

    number: int
    side: Literal["base", "taught"]


class Switch(Fields):
    on: StrictBool


def _end(done: Future) -> dict[str, Any]:
    """The last event of an answer."""
    if done.cancelled():
        return {"error": "the server is shutting down"}
    error = done.exception()
    if error is None:
        return {"number": done.result()["number"]}
    if not isinstance(error, ValueError):
        logger.error("an answer failed", exc_info=error)
    return {"error": " ".join(str(error).split())}


def _from_here(request: Request) -> bool:
    """Whether a change comes from a page of this server, or from a program that says what it sends."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        return False
    return request.method == "DELETE" or request.headers.get("content-type", "").startswith(
        "application/json"
    )


NUM_RECORDS = 2000
_PAIRS = (("prompt", "completion"), ("question", "answer"))


def typed_records(question: str, answer: str, phrasings: list[str]) -> list[dict[str, str]]:
    """A question, further phrasings of it, and their answer.

    Raises:
        ValueError: an empty field.
    """
    prompts = list(dict.fromkeys(text.strip() for text in [question, *phrasings] if text.strip()))
    if not question.strip() or not answer.strip():
        raise ValueError("a question and its answer are needed; fill in both")
    return [{"prompt": prompt, "completion": answer.strip()} for prompt in prompts]


def dropped_records(text: str, name: str) -> list[dict[str, Any]]:
    """Records of a JSONL file: prompts and completions, questions and answers, or one exchange of messages.

    Each wording of a record of `sparsemem study` is one; subject and source are kept.

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
        records += _records(record, place)
        if len(records) > NUM_RECORDS:
            raise ValueError(
                f"{name} has more than {NUM_RECORDS:,} records; teach it with `sparsemem train` instead"
            )
    if not records:
        raise ValueError(f"{name} is empty; put one object on each line")
    return records


def _records(record: Any, place: str) -> list[dict[str, Any]]:
    found = record if isinstance(record, dict) else {}
    pair = next((pair for pair in _PAIRS if all(key in found for key in pair)), None)
    texts = [found[key] for key in pair] if pair else _exchange(found.get("messages"))
    if len(texts) != 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(
            f"{place}: must have the fields prompt and completion, or question and answer, as text, or "
            "messages with one question and one answer"
        )
    wordings = found.get("wordings") or []
    if not isinstance(wordings, list) or not all(isinstance(text, str) and text.strip() for text in wordings):
        raise ValueError(f"{place}: wordings must be a list of questions")
    kept = {key: found[key] for key in ("subject", "source") if found.get(key) is not None}
    return [
        {"prompt": text.strip(), "completion": texts[1].strip(), **kept} for text in (texts[0], *wordings)
    ]


def _exchange(messages: Any) -> list[Any]:
    turns = messages if isinstance(messages, list) else []
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
    return [turn.get("content") for turn in turns] if roles == ["user", "assistant"] else []


logger = logging.getLogger(__name__)


class Worker:
    """A thread that does one job after the other.

    Attributes:
        job: the long job that runs or waits: `{"kind", "phase", "step", "steps"}`; None: none.
        error: of the last long job, until the next one begins.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="worker")
        self._lock = threading.Lock()
        self.job: dict[str, Any] | None = None
        self.error: str | None = None

    def start(self, kind: str, work: Callable[[Callable[[str, int, int], None]], object]) -> bool:
        """Begin a long job in the background; False: another one is under way.

        Args:
            work: gets a function that it tells its progress: phase, step, number of steps.
        """
        with self._lock:
            if self.job is not None:
                return False
            self.job = {"kind": kind, "phase": "Waiting", "step": 0, "steps": 0}
            self.error = None
        self._pool.submit(self._run, kind, work)
        return True

    def do(self, work: Callable[..., Any], *arguments: Any) -> Future:
        """Do something short, when its turn comes."""
        return self._pool.submit(work, *arguments)

    def stop(self) -> None:
        """Wait for what runs; drop what waits."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, kind: str, work: Callable[[Callable[[str, int, int], None]], object]) -> None:
        def progress(phase: str, step: int, steps: int) -> None:
            self.job = {"kind": kind, "phase": phase, "step": step, "steps": steps}

        try:
            work(progress)
        except (ValueError, OSError, RuntimeError) as error:
            logger.exception("%s failed", kind)
            self.error = " ".join(str(error).split())
        finally:
            self.job = None
