"""Run an application with uvicorn: where it listens, what it says, how it ends."""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

logger = logging.getLogger(__name__)

GRACE_SECONDS = 10
# Names of this machine for itself.
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens at this host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hosts_for(host: str) -> tuple[str, ...]:
    """Names under which a server that listens at this host may be asked; "*": any."""
    return LOOPBACK_HOSTS if is_loopback(host) else ("*",)


def new_app(running: Callable[[FastAPI], Any], hosts: tuple[str, ...]) -> FastAPI:
    """An application that answers only if it is asked for under one of these names.

    Args:
        running: the context in which it runs.
        hosts: "*": any. A page of another host, whose name was made to lead to this machine, gets no answer.
    """
    # its own pages of documentation load scripts from elsewhere
    app = FastAPI(lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return app


def listen(app: Any, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; answers that are under way get GRACE_SECONDS.

    Args:
        port: 0: any free one.
        say: gets the address, once it can be reached.

    Raises:
        ValueError: the port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"--host {host} --port {port}: cannot listen there ({error.strerror}); give another port, or "
                "--port 0 for any"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        config = uvicorn.Config(
            _without_cancellation(app),
            log_level="warning",
            timeout_graceful_shutdown=GRACE_SECONDS,
            server_header=False,
        )
        server = _Server(config, lambda: say(f"http://{shown}:{taken.getsockname()[1]}"))
        server.run(sockets=[taken])


def _without_cancellation(app: Any) -> Any:
    """The application; a request that the end of the server cuts off is no error with a traceback."""

    async def run(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            logger.warning("an answer was cut off: the server ends")

    return run


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets=sockets)
        # a second Ctrl-C leaves this out, and the application ends with a traceback
        if self.force_exit:
            await self.lifespan.shutdown()
