"""`sparsemem ui`: the web page on which a model is taught."""

from pathlib import Path

import click

from .options import say
from .serve import NEEDED, check_installed


@click.command()
@click.argument("model", metavar="[MODEL|ADAPTER]", default="smollm2")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("sparsemem-ui"),
    show_default=True,
    help="Folder of what is taught; used again when it is there.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen at; others may reach it then."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0: any free one."
)
def ui(model: str, out: Path, host: str, port: int) -> None:
    """Teach MODEL in the browser, ask it, and see what else changed.

    What is taught lies in --out, one patch file for each lesson.
    """
    check_installed(NEEDED, "fastapi", "uvicorn", "prometheus_client")
    from ..serving.lessons import open_lessons
    from ..serving.listen import is_loopback, listen
    from ..serving.page import LOOPBACK_HOSTS, build_page

    hosts = LOOPBACK_HOSTS
    if not is_loopback(host):
        say(f"warning: whoever reaches {host} can teach this model; the page asks for no password")
        hosts = ("*",)
    page = build_page(lambda progress: open_lessons(model, out, progress), model, hosts=hosts)
    listen(page, host, port, lambda address: say(f"open {address} in a browser; Ctrl-C ends it"))
