"""The command `learn`: tasks one after another, each of which can be taken back."""

from pathlib import Path
from typing import Any

import click

from .options import as_json, check_inputs, say, seed_option, show


class Learn(click.Group):
    """`learn teach|undo|status|verify`; without such a word it is `learn teach`, with its older options."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["teach", *args])

    @property
    def teach(self) -> click.Command:
        return self.commands["teach"]


@click.group(
    cls=Learn,
    short_help="Teach tasks one after another; undo any.",
    # the older options are those of `teach`
    context_settings={"ignore_unknown_options": True},
)
def learn() -> None:
    """Teach a model a stream of tasks, one at a time; later ones leave earlier ones as they were.

    The word `teach` may be left out: `learn MODEL --stream FILE --out DIR`. So can the other words, with
    `learn DIR` and one of --undo TASK, --status and --verify.
    """


folder = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))


@learn.command(short_help="Teach a stream of tasks.")
@click.argument("model", metavar="[MODEL|DIR]", required=False)
@click.option(
    "--stream", metavar="FILE|hub:NAME", help="What to teach: records, with a `task` name or without."
)
@click.option("--add", metavar="FILE|hub:NAME", help="Like --stream, beside what the folder holds already.")
@click.option("--out", type=click.Path(path_type=Path), help="The folder that keeps all that is taught.")
@click.option("--every", type=click.IntRange(1), default=1, show_default=True,
              help="Records in a task, where they have no `task` name.")  # fmt: skip
@click.option(
    "--background",
    metavar="FILE|hub:NAME",
    help="General text for a new folder. Default: a text that is part of sparsemem.",
)
@click.option(
    "--resume", is_flag=True, help="Continue --stream where it was interrupted; tasks are not taught twice."
)
@click.option("--undo", metavar="TASK", hidden=True, help="As `learn undo`.")
@click.option("--status", is_flag=True, hidden=True, help="As `learn status`.")
@click.option("--verify", is_flag=True, hidden=True, help="As `learn verify`.")
@seed_option
@as_json
def teach(
    model: str | None, stream: str | None, add: str | None, out: Path | None, every: int,
    background: str | None, resume: bool, undo: str | None, status: bool, verify: bool, seed: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Teach MODEL the tasks of a file, one at a time.

    Each task leaves a patch and a line in the ledger of the --out folder, which is an adapter too. After an
    interruption --resume continues. With --add, a folder is taught another file. Of documents, in a file that
    `study` wrote, changed sections are taught again, and those that are gone are taken back.
    """
    check_inputs(model, general=stream or add)
    check_inputs(None, general=background)
    from ..stream import folder as streams

    asked = {"--stream": stream, "--add": add, "--undo": undo, "--status": status, "--verify": verify}
    chosen = [name for name, given in asked.items() if given]
    if len(chosen) != 1:
        got = " and ".join(chosen) or "none of them"
        raise click.UsageError(f"give one of --stream, --add, --undo, --status and --verify, not {got}")
    if out is None and model is not None and streams.is_stream(Path(model)):
        out, model = Path(model), None
    if out is None:
        raise click.UsageError("--out is missing; name the folder that keeps what is taught")
    if undo is not None:
        _undo(out, undo, model, as_json)
    elif status:
        _status(out, as_json)
    elif verify:
        _verify(out, as_json)
    else:
        options: dict[str, Any] = {"every": every, "background": background, "seed": seed}
        options |= {"resume": resume, "add": add is not None}
        try:
            done = streams.learn(model, stream or add or "", out, **options, say=say)
        except KeyboardInterrupt:
            again = "--resume continues" if add is None else "the same command continues"
            say(f"\nstopped; {again} with {out}")
            raise SystemExit(130) from None
        number = done["taught"] + done["skipped"]
        text = f"{out}: taught {done['taught']} of {number} tasks, holds {done['tasks']}"
        show(done, as_json, f"{text} ({done['seconds']:.0f} s, {done['bytes']:,} bytes)")


@learn.command("undo", short_help="Take a task back, exactly.")
@folder
@click.argument("task")
@click.option("--model", help="The base model. Default: the one that the folder names.")
@as_json
def undo_task(folder: Path, task: str, model: str | None, as_json: bool) -> None:
    """Take TASK of DIR back: the others answer then as if they alone had been taught, to the byte.

    The name of a document that `study` read takes all of its sections back.
    """
    _undo(folder, task, model, as_json)


@learn.command("status", short_help="Show what a folder holds.")
@folder
@as_json
def show_status(folder: Path, as_json: bool) -> None:
    """List the tasks that DIR holds, each with its first question, and those that were taken back."""
    _status(folder, as_json)


@learn.command("verify", short_help="Check every file of a folder.")
@folder
@as_json
def check_folder(folder: Path, as_json: bool) -> None:
    """Check that every file of DIR is as it was written."""
    _verify(folder, as_json)


def _undo(out: Path, task: str, model: str | None, as_json: bool) -> None:
    from ..stream import folder as streams

    done = streams.undo(out, task, model)
    again = "".join(f"\nanswers again as it was taught before: {question}" for question in done["again"])
    asked = f" ({done['question']})" if done["question"] else ""
    show(done, as_json, f"{out}: took back {task}{asked}, holds {done['tasks']} tasks{again}")


def _status(out: Path, as_json: bool) -> None:
    from ..stream import folder as streams

    held = streams.status(out)
    lines = []
    for one in held["tasks"]:
        asked = f" ({one['question']})" if one["question"] else ""
        lines.append(f"{one['task']}{asked}: records: {one['records']}, bytes: {one['bytes']:,}")
    lines += [f"{name}: taken back" for name in held["undone"]]
    lines.append(f"{out}: tasks: {len(held['tasks'])}, bytes: {held['bytes']:,}, model: {held['model']}")
    if held["interrupted"]:
        lines.append("the last task was interrupted and does not count; --resume teaches it again")
    show(held, as_json, "\n".join(lines))


def _verify(out: Path, as_json: bool) -> None:
    from ..stream import folder as streams

    found = streams.verify(out)
    show(found, as_json, f"{out}: {found['lines']} lines and {found['patches']} patches are as written")
