"""Options and messages that several commands use."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

# at the end of the help of each command that loads a model
MODEL_NAMES = "MODEL is a name on the Hugging Face Hub, a local folder, a .gguf file, smollm2 or gemma3-270m."
NAMES = f"{MODEL_NAMES} ADAPTER is a folder that graft, train or learn made."


class Bytes(click.ParamType):
    """A number of bytes, written with a unit or without: 2GiB, 512MB, 1048576."""

    name = "size"
    _units = ("", "k", "m", "g", "t")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is not a size; write for example 2GiB, 512MB or 0", param, ctx)
        number, unit, binary = found.groups()
        return int(float(number) * (1024 if binary else 1000) ** self._units.index(unit))


def comma_names(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    """Callback of an option whose value is a list of names, separated by commas."""
    return None if value is None else [name.strip() for name in value.split(",")]


def comma_numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Callback of an option whose value is a list of whole numbers, separated by commas."""
    names = comma_names(context, parameter, value)
    try:
        return None if names is None else [int(name) for name in names]
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not a list of whole numbers separated by commas, for example 0,1,2"
        ) from None


def check_inputs(
    model: str | None, *, out: Path | None = None, data: Sequence[str | None] = (), general: str | None = None
) -> None:
    """Refuse names and files that cannot be right, within a second: torch takes longer to import.

    Args:
        out: a folder that must be free.
        data: sources whose records have one shape each.
        general: a source whose records may be mixed.

    Raises:
        ValueError: one of them is wrong.
    """
    from ..atomic import refuse_existing
    from ..data.names import check_model
    from ..data.reading import check_records

    check_model(model)
    if out is not None:
        refuse_existing(out)
    for source in data:
        check_records(source)
    check_records(general, mixed=True)


def say(message: str) -> None:
    """Print progress on stderr; stdout is for results."""
    click.echo(message, err=True)


def show(result: Any, as_json: bool, text: str) -> None:
    """Print a result: one JSON object, or the text for readers."""
    click.echo(json.dumps(result) if as_json else text)


def say_stopped(stop: KeyboardInterrupt | SystemExit, out: Path) -> SystemExit:
    """Say how to continue a run that Ctrl-C or SIGTERM has stopped; the exit that follows."""
    if any(out.parent.glob(f"{out.name}.partial/checkpoint-*")):
        say(f"\nstopped; to continue from the last checkpoint, add --resume (--out {out})")
    else:
        say("\nstopped; nothing was saved yet")
    return SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code)


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
out_folder = click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder to create; it must not exist or must be empty.",
)
seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the random numbers."
)
