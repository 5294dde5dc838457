"""The web page on which a model is taught: its files, and the interface that its script calls.

Choices: everything is in the package, and the page may load nothing from elsewhere (its content security
policy says so). The server answers to its own host names alone, and changes come as JSON from its own pages
alone, so that other pages in the same browser cannot teach.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse

from .api import read_body
from .bodies import ApiError
from .lessons import Lessons, Progress
from .listen import LOOPBACK_HOSTS, new_app
from .teaching import dropped_records, typed_records
from .work import Worker

STATIC = Path(__file__).with_name("static")
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/icon.svg": "icon.svg"}
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
            "asked": held.asked if held else [],
            "changed": held.changed if held else None,
            "job": worker.job,
            "error": worker.error,
        }

    def serve_file(path: str, name: str) -> None:
        @app.get(path)
        async def _file() -> FileResponse:
            return FileResponse(STATIC / name)

    for path, name in FILES.items():
        serve_file(path, name)

    @app.get("/api/state")
    async def get_state() -> dict[str, Any]:
        return state()

    @app.post("/api/teach")
    async def teach(request: Request) -> dict[str, Any]:
        body = await _body(request)
        held = lessons()
        try:
            if "file" in body:
                name = str(body.get("name") or "file")
                records, title = dropped_records(str(body["file"]), name), name
            else:
                records = typed_records(body.get("question"), body.get("answer"), body.get("phrasings", []))
                title = records[0]["prompt"]
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        return begin("teach", lambda progress: held.teach(records, title, progress))

    @app.post("/api/ask")
    async def ask(request: Request) -> Any:
        question = (await _body(request)).get("question")
        if not isinstance(question, str) or not question.strip() or len(question) > MAX_QUESTION:
            raise ApiError(400, f"a question of 1 to {MAX_QUESTION:,} characters is needed")
        return await short(lessons().ask, question.strip())

    @app.post("/api/changes")
    async def changes(request: Request) -> dict[str, Any]:
        await _body(request)
        return begin("changes", lessons().look_for_changes)

    @app.post("/api/lessons/{name}")
    async def switch(name: str, request: Request) -> dict[str, Any]:
        on = (await _body(request)).get("on")
        if not isinstance(on, bool):
            raise ApiError(400, "on must be true or false")
        await short(lessons().set_on, name, on)
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

    return app


async def _body(request: Request) -> dict[str, Any]:
    body = await read_body(request, MAX_BODY)
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    return body


def _from_here(request: Request) -> bool:
    """Whether a change comes from a page of this server, or from a program that says what it sends."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        return False
    return request.method == "DELETE" or request.headers.get("content-type", "").startswith(
        "application/json"
    )
