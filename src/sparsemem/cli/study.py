"""The command `study`: documents to records that `learn` takes."""

from pathlib import Path

import click

from ..data.names import is_url
from .options import MODEL_NAMES, as_json, check_inputs, say, show


@click.command(short_help="Turn documents into facts to teach.", epilog=MODEL_NAMES)
@click.argument("documents", metavar="DOCUMENT...", nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The file of records to write.",
)
@click.option("--model", default="smollm2", show_default=True, help="The model that is to be taught.")
@click.option(
    "--teacher",
    metavar="MODEL|URL",
    help="Who writes the questions: a model, or the address of an OpenAI-compatible server, whose key is "
    "read from SPARSEMEM_TEACHER_KEY. Default: --model itself.",
)
@click.option(
    "--teacher-model", metavar="NAME", help="The model to ask at a URL. Default: the first one there."
)
@as_json
def study(
    documents: tuple[str, ...], out: Path, model: str, teacher: str | None, teacher_model: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Read DOCUMENTs, or folders of them, and write the facts that they hold as records with their sources.

    Documents are text, Markdown, HTML, and PDF where pypdf is installed. A teacher writes questions with
    short answers; most of what is wrong is dropped, and counted by reason. Read the file before you teach it
    with `sparsemem learn`. The same command continues what was interrupted, and reads anew what has changed
    in a document.
    """
    from ..study.passages import documents as check_documents

    of_server = teacher is not None and is_url(teacher)
    if teacher_model is not None and not of_server:
        raise click.UsageError("--teacher-model belongs to a --teacher that is a URL")
    check_documents(documents)
    check_inputs(model)
    if teacher is not None and not of_server:
        check_inputs(teacher)
    from ..data.models import load
    from ..study import study as studying
    from ..study.teachers import Prompted, ask_of, of_model, token_count

    own = None if teacher is None or teacher == model else ask_of(teacher, teacher_model)
    loaded, tokenizer = load(model)
    base = of_model(loaded, tokenizer)
    about = {"model": model, "teacher": teacher or model, "teacher_model": teacher_model}
    try:
        done = studying.study(
            documents,
            out,
            Prompted(own or base),
            base,
            token_count(tokenizer),
            about=about,
            say=say,
        )
    except KeyboardInterrupt:
        say(f"\nstopped; what is finished is kept, the same command continues with {out}")
        raise SystemExit(130) from None
    lines = [f"{number} dropped: {reason}" for reason, number in done["dropped"].items()]
    lines.append(f"{out}: kept {done['kept']} records of {done['passages']} passages")
    show(done, as_json, "\n".join(lines))
