"""`sparsemem ui`: the web page on which a model is taught."""

from pathlib import Path

import click

from .options import NAMES, say
from .serve import NEEDED, check_installed


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
    check_installed(NEEDED, "fastapi", "uvicorn", "prometheus_client")
    from ..serving.listen import hosts_for, is_loopback, listen
    from ..serving.opening import open_lessons
    from ..serving.page import build_page

    if not is_loopback(host):
        say(f"warning: everyone who can reach {host} can teach this model; there is no password")
    page = build_page(lambda progress: open_lessons(model, out, progress), model, hosts=hosts_for(host))
    listen(page, host, port, lambda address: say(f"open {address} in a browser; Ctrl-C ends it"))
