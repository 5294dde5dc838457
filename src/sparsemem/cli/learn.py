"""The command `learn`: tasks one after another, each of which can be taken back."""

import json
from pathlib import Path
from typing import Any

import click

from .options import as_json, check_inputs, say, seed_option


@click.command(short_help="Teach tasks one after another; undo any.")
@click.argument("model", required=False)
@click.option(
    "--stream", metavar="FILE|hub:NAME", help="What to teach: records, with a `task` name or without."
)
@click.option("--out", type=click.Path(path_type=Path), help="The folder that keeps all that is taught.")
@click.option("--every", type=click.IntRange(1), default=1, show_default=True,
              help="Records in a task, where they have no `task` name.")  # fmt: skip
@click.option(
    "--background",
    metavar="FILE|hub:NAME",
    help="General text for a new folder. Default: a text that is part of sparsemem.",
)
@click.option("--resume", is_flag=True, help="Continue the folder; tasks in it are not taught again.")
@click.option("--undo", metavar="TASK", help="Take a task back, exactly.")
@click.option("--status", is_flag=True, help="Show what the folder holds.")
@click.option("--verify", is_flag=True, help="Check every file of the folder.")
@seed_option
@as_json
def learn(
    model: str | None, stream: str | None, out: Path | None, every: int, background: str | None,
    resume: bool, undo: str | None, status: bool, verify: bool, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Teach MODEL a stream of tasks, one at a time; later ones leave earlier ones as they were.

    Each task leaves a patch and a line in the ledger of the --out folder, which is an adapter too. After an
    interruption --resume continues. --undo, --status and --verify need no MODEL.
    """
    check_inputs(model, general=stream)
    check_inputs(None, general=background)
    from ..stream import folder as streams

    asked = {"--stream": stream, "--undo": undo, "--status": status, "--verify": verify}
    chosen = [name for name, given in asked.items() if given]
    if len(chosen) != 1:
        got = " and ".join(chosen) or "none of them"
        raise click.UsageError(f"give one of --stream, --undo, --status and --verify, not {got}")
    if out is None and model is not None and streams.is_stream(Path(model)):
        out, model = Path(model), None
    if out is None:
        raise click.UsageError("--out is missing; name the folder that keeps what is taught")
    if stream is not None:
        options: dict[str, Any] = {"every": every, "background": background, "seed": seed, "resume": resume}
        try:
            done = streams.learn(model, stream, out, **options, say=say)
        except KeyboardInterrupt:
            say(f"\nstopped; --resume continues with {out}")
            raise SystemExit(130) from None
        number = done["taught"] + done["skipped"]
        text = f"{out}: taught {done['taught']} of {number} tasks, holds {done['tasks']}"
        _show(done, as_json, f"{text} ({done['seconds']:.0f} s, {done['bytes']:,} bytes)")
    elif undo is not None:
        done = streams.undo(out, undo, model)
        again = "".join(f"\nspeaks again: {question}" for question in done["again"])
        _show(done, as_json, f"{out}: took back {undo}, holds {done['tasks']} tasks{again}")
    elif status:
        held = streams.status(out)
        lines = [
            f"{one['task']}: records: {one['records']}, bytes: {one['bytes']:,}" for one in held["tasks"]
        ]
        lines += [f"{name}: taken back" for name in held["undone"]]
        lines.append(f"{out}: tasks: {len(held['tasks'])}, bytes: {held['bytes']:,}, model: {held['model']}")
        if held["interrupted"]:
            lines.append("the last task was interrupted and does not count; --resume teaches it again")
        _show(held, as_json, "\n".join(lines))
    else:
        found = streams.verify(out)
        _show(found, as_json, f"{out}: {found['lines']} lines and {found['patches']} patches are as written")


def _show(result: dict[str, Any], as_json: bool, text: str) -> None:
    click.echo(json.dumps(result) if as_json else text)
