"""The command line: the group of all commands, and how errors become exit statuses.

Choices: the exit status is 0 for success, 1 for a failure, 2 for wrong usage or bad input (with one sentence
that explains it) and 130 for an interruption. Results go to stdout, progress to stderr. torch is imported
only inside the commands, so `--help` is fast.
"""

import sys
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import click

from .adapters import evaluate, push
from .comparing import compare, demo, report
from .config_file import add_config, show_config
from .env import env
from .graft import graft
from .learn import Learn, learn
from .options import NAMES, check_inputs
from .patches import patch
from .serve import serve, ui
from .study import study
from .train import train

# by use: what a new user needs comes first
ORDER = (
    "ui", "train", "study", "learn", "chat", "eval", "serve", "patch", "push", "demo", "compare", "report",
    "graft", "config", "env",
)  # fmt: skip


class _Commands(click.Group):
    """Turns errors that users can cause into one sentence on stderr and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=ORDER.index)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(2 if isinstance(error, ValueError) else 1)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            ctx.exit(130)


@click.group(cls=_Commands)
@click.version_option(package_name="sparsemem")
def main() -> None:
    """Teach a language model something new by training rows of an added memory.

    With sparse memory the model's own weights do not change. By default the memory acts only on inputs that
    are close to the training data. Start with `sparsemem ui`, which teaches a small model in your browser.
    """
    # these warnings are for the authors of libraries; a user of the command line cannot fix them
    warnings.simplefilter("ignore", FutureWarning)


@main.command(short_help="Talk to a model or adapter in the terminal.", epilog=NAMES)
@click.argument("model", metavar="MODEL|ADAPTER")
@click.option(
    "--show-scope",
    is_flag=True,
    help="After each answer, show how far the input was in the memory's scope, from 0 (outside) to 1.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Maximum length of one answer in tokens.",
)
def chat(model: str, show_scope: bool, max_new_tokens: int) -> None:
    """Talk to MODEL or ADAPTER in the terminal; end with /exit, Ctrl-D or Ctrl-C."""
    check_inputs(model)
    from ..adapter.memories import memory_layers
    from ..data.models import load
    from .chat import converse

    loaded, tokenizer = load(model)
    if show_scope:
        memory_layers(loaded)
    write = partial(click.echo, nl=False)
    try:
        converse(loaded, tokenizer, _lines(), write, show_scope=show_scope, max_new_tokens=max_new_tokens)
    except KeyboardInterrupt:
        click.echo()


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return


for command in (train, study, learn, evaluate, serve, ui, patch, push, demo, compare, report, graft):
    main.add_command(command)
for command in main.commands.values():
    # `learn` is a group whose first command has all options; other groups take no file
    if isinstance(command, Learn):
        add_config(command.teach)
    elif not isinstance(command, click.Group):
        add_config(command)
for command in (show_config, env):
    main.add_command(command)


if __name__ == "__main__":
    main()
