"""What the commands of the command line share: choices, option types, and how progress is said."""

from pathlib import Path

import click

METHODS = ("smf", "smf-open", "lora", "full")
TASKS = ("recall", "multiple-choice", "perplexity", "medmcqa", "wikitext", "triviaqa", "mentions")
DTYPES = PRECISIONS = ("float32", "bfloat16")
WRITES = ("last", "own")
MODES = ("additive", "replacement")
TRAINABLE = ("values", "values+scale", "memory")
RULES = ("kl", "tfidf", "tf", "grad", "random")
MOMENTS = ("row", "element", "table")
SCHEDULES = ("constant", "linear", "cosine")


def comma_names(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    """Callback of an option that takes names with commas between them."""
    return None if value is None else [name.strip() for name in value.split(",")]


def comma_numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Callback of an option that takes whole numbers with commas between them."""
    names = comma_names(context, parameter, value)
    try:
        return None if names is None else [int(name) for name in names]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not whole numbers with commas between them") from None


def say(message: str) -> None:
    """Progress goes to stderr: stdout is for results."""
    click.echo(message, err=True)


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
out_folder = click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder.")
seed_option = click.option("--seed", type=int, default=0, show_default=True)
