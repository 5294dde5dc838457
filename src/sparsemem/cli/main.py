"""The command line: `sparsemem demo | graft | train | eval | compare | report | push | patch | chat`.

Choices: exit 0 done, 1 failure, 2 wrong usage or bad input with one sentence, 130 interrupted; results on
stdout, progress on stderr; torch is imported only inside the commands, so that `--help` does not wait for it.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from .adapters import evaluate, graft, push, train
from .config_file import add_config, show_config
from .env import env
from .options import as_json, comma_names, comma_numbers, say, seed_option
from .patches import patch
from .serve import serve
from .ui import ui

RECIPES = ("demo", "medical", "paper")
NUM_SHOWN = 3


class _Commands(click.Group):
    """Turns what users can cause into one sentence on stderr and an exit status."""

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
    """Teach a language model something new by writing rows of an added memory."""
    # what one library warns another of is nothing that a user of the command line could mend
    warnings.simplefilter("ignore", FutureWarning)


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("sparsemem-demo"), show_default=True)
@click.option("--methods", callback=comma_names, default="base,smf,lora,full", show_default=True)
@seed_option
@as_json
def demo(out: Path, methods: list[str], seed: int, as_json: bool) -> None:
    """Teach SmolLM2 an invented handbook by several methods, and see what each of them forgets.

    An interrupted demo goes on with its next method when it is called again.
    """
    from ..recipes.demo import recipe

    _compare(recipe(), out, methods, [seed], as_json)


@main.command()
@click.argument("recipe", metavar="RECIPE", type=click.Choice(RECIPES))
@click.option("--model", help="Another model than the recipe's.")
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Folder of the recipe's data, if it needs any."
)
@click.option("--methods", callback=comma_names, help="Comma between them; all of the recipe's by default.")
@click.option("--seeds", callback=comma_numbers, help="Comma between them; the recipe's by default.")
@click.option("--out", type=click.Path(path_type=Path), help="sparsemem-RECIPE by default.")
@click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Another value of a recipe's setting."
)
@click.option("--dry-run", is_flag=True, help="Say what would be run, with its settings; write nothing.")
@as_json
def compare(
    recipe: str, model: str | None, data_dir: Path | None, methods: list[str] | None,
    seeds: list[int] | None, out: Path | None, assignments: tuple[str, ...], dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run a recipe's methods with several seeds; finished runs are taken up when called again."""
    from importlib import import_module

    from ..recipes.overrides import changed

    if dry_run and as_json:
        raise click.UsageError("a dry run has no results for --json to print: leave out one of the two.")
    room = import_module(f"..recipes.{recipe}", __package__)
    chosen = room.recipe(model=model, data_dir=data_dir, settings=changed(room.SETTINGS, assignments))
    out = out or Path(f"sparsemem-{recipe}")
    if dry_run:
        from ..comparison import compare as comparison

        click.echo(comparison.dry_run(chosen, out=out, methods=methods, seeds=seeds))
        return
    _compare(chosen, out, methods, seeds, as_json)


def _compare(
    recipe: Any, out: Path, methods: list[str] | None, seeds: list[int] | None, as_json: bool
) -> None:
    from ..comparison.compare import compare
    from ..comparison.report import rebuild_report

    try:
        compare(recipe, out=out, methods=methods, seeds=seeds, progress=say)
    except KeyboardInterrupt:
        finished = [path.parent.name for path in sorted(out.glob("runs/*/result.json"))]
        if finished:
            rebuild_report(out)
        kept = f"finished and kept in {out}: {', '.join(finished) or 'nothing yet'}"
        say(f"\nstopped; {kept}; the same command goes on from there")
        raise SystemExit(130) from None
    _show_report(out, as_json)


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@as_json
def report(folder: Path, as_json: bool) -> None:
    """Make the table, the figure and the page of a comparison again."""
    _show_report(folder, as_json)


def _show_report(out: Path, as_json: bool) -> None:
    from ..comparison.report import rebuild_report, text_examples
    from ..comparison.tables import text_table

    results, page = rebuild_report(out)
    if as_json:
        click.echo(json.dumps(results, ensure_ascii=False))
        return
    click.echo(text_table(results))
    if shown := text_examples(results, NUM_SHOWN):
        click.echo(f"\n{shown}")
    click.echo(f"\nreport: {page}")


@main.command()
@click.argument("model", metavar="MODEL|ADAPTER")
@click.option("--show-scope", is_flag=True, help="Say after each answer how far the input was in scope.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=200, show_default=True)
def chat(model: str, show_scope: bool, max_new_tokens: int) -> None:
    """Talk to MODEL or ADAPTER in the terminal; /exit, Ctrl-D or Ctrl-C ends it."""
    from ..adapter.model import memory_layers
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


for command in (graft, train, evaluate, push, patch, serve, ui):
    main.add_command(command)
for command in main.commands.values():
    if not isinstance(command, click.Group):
        add_config(command)
for command in (show_config, env):
    main.add_command(command)


if __name__ == "__main__":
    main()
