"""`sparsemem serve`: the OpenAI-compatible server."""

from pathlib import Path

import click

from .options import DTYPES, say

NEEDED = "the server needs fastapi, uvicorn and prometheus-client; run `pip install 'sparsemem[serve]'`"


@click.command()
@click.argument("model", metavar="MODEL|ADAPTER")
@click.option(
    "--patch",
    "patches",
    multiple=True,
    metavar="NAME=FILE|FOLDER",
    help="What was taught, under the name by which requests ask for it: a patch file, or an adapter folder.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one."
)
@click.option("--api-key", envvar="SPARSEMEM_API_KEY", help="Clients must send it; or set SPARSEMEM_API_KEY.")
@click.option(
    "--max-batch", type=click.IntRange(1), default=16, show_default=True, help="Requests answered at once."
)
@click.option(
    "--max-queue", type=click.IntRange(1), default=256, show_default=True, help="Requests that may wait."
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Of one answer, at most."
)
@click.option(
    "--max-body", type=click.IntRange(1), default=1 << 20, show_default=True, help="Bytes of a request."
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of the weights."
)
def serve(
    model: str, patches: tuple[str, ...], host: str, port: int, api_key: str | None,
    max_batch: int, max_queue: int, max_tokens: int, max_body: int, dtype: str,
) -> None:  # fmt: skip
    """Answer OpenAI's API for MODEL and what was taught to it.

    A request's `model` names the base model, a patch, or several joined by "+". Requests with different
    patches are answered in one batch.
    """
    import torch

    check_installed(NEEDED, "fastapi", "uvicorn", "prometheus_client")
    from ..serving.api import Limits, build_app
    from ..serving.listen import is_loopback, listen
    from ..serving.memories import load_served

    served = load_served(model, _named(patches), dtype=getattr(torch, dtype))
    limits = Limits(max_batch=max_batch, max_queue=max_queue, max_tokens=max_tokens, max_body=max_body)
    app = build_app(served, api_key=api_key, limits=limits)
    if not is_loopback(host) and api_key is None:
        say(f"warning: whoever reaches {host} can use this server; --api-key asks clients for a key")
    names = ", ".join((served.base, *served.memories))
    listen(app, host, port, lambda address: say(f"{address}/v1 answers for {names}; Ctrl-C ends it"))


def check_installed(needed: str, *modules: str) -> None:
    """Raises:
    ValueError: a module is not installed; `needed` says what to do.
    """
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ValueError(f"{missing[0]} is not installed: {needed}")


def _named(patches: tuple[str, ...]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for given in patches:
        name, equals, path = given.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--patch {given!r} must be NAME=FILE, for example --patch facts=taught")
        if name in named:
            raise ValueError(
                f"--patch {given!r}: the name {name!r} is given twice; name each patch differently"
            )
        named[name] = Path(path).expanduser()
    return named
