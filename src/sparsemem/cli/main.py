"""The command line: `sparsemem demo | graft | train | eval | compare | report | push | patch | chat |
serve | ui | config | env`.

Choices: the exit status is 0 for success, 1 for a failure, 2 for wrong usage or bad input (with one sentence
that explains it) and 130 for an interruption. Results go to stdout, progress to stderr. torch is imported
only inside the commands, so `--help` is fast.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from .adapters import evaluate, push
from .config_file import add_config, show_config
from .env import env
from .graft import graft
from .learn import learn
from .options import NAMES, as_json, check_inputs, comma_names, comma_numbers, say, seed_option
from .patches import patch
from .serve import serve, ui
from .train import train

RECIPES = ("demo", "medical", "paper", "lifelong")
NUM_SHOWN = 3


class _Commands(click.Group):
    """Turns errors that users can cause into one sentence on stderr and an exit status."""

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
    are close to the training data. Start with `sparsemem demo`.
    """
    # these warnings are for the authors of libraries; a user of the command line cannot fix them
    warnings.simplefilter("ignore", FutureWarning)


@main.command(short_help="Teach a small model invented facts; compare methods.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("sparsemem-demo"),
    show_default=True,
    help="Folder for the results.",
)
@click.option(
    "--methods",
    callback=comma_names,
    default="base,smf,lora,full",
    show_default=True,
    help="Methods to compare, separated by commas; smf-open is possible too.",
)
@seed_option
@as_json
def demo(out: Path, methods: list[str], seed: int, as_json: bool) -> None:
    """Teach a small model (SmolLM2) invented facts by several methods, and compare what each method forgets.

    If the demo is interrupted, the same command continues it with the next method.
    """
    from ..compare.recipes.demo import recipe

    _compare(recipe(), out, methods, [seed], as_json)


@main.command(short_help="Run a prepared comparison of methods.")
@click.argument("recipe", metavar="RECIPE", type=click.Choice(RECIPES))
@click.option("--model", help="Model to use instead of the recipe's own.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder with the data files of recipe paper. Default: the datasets on the Hub.",
)
@click.option(
    "--methods",
    callback=comma_names,
    metavar="NAME,NAME,...",
    help="Methods to compare, separated by commas. Default: the recipe's usual methods; it may know more.",
)
@click.option(
    "--seeds",
    callback=comma_numbers,
    metavar="N,N,...",
    help="Seeds, separated by commas; each method runs once with each seed. Default: the recipe's seeds.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the results. Default: sparsemem-RECIPE."
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change a setting of the recipe, for example max_steps=40. May be given several times.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="List the runs with their settings and expected time, but run and write nothing.",
)
@as_json
def compare(
    recipe: str, model: str | None, data_dir: Path | None, methods: list[str] | None,
    seeds: list[int] | None, out: Path | None, assignments: tuple[str, ...], dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run a prepared comparison (RECIPE): several methods, each with several seeds, then a report.

    Finished runs are not repeated when the same command is called again.
    """
    from importlib import import_module

    from ..compare.recipes.overrides import changed

    if dry_run and as_json:
        raise click.UsageError(
            "a dry run has no results, so --json has nothing to print; leave out --dry-run or --json"
        )
    room = import_module(f"..compare.recipes.{recipe}", __package__)
    chosen = room.recipe(model=model, data_dir=data_dir, settings=changed(room.SETTINGS, assignments))
    out = out or Path(f"sparsemem-{recipe}")
    if dry_run:
        from ..compare import compare as comparison

        click.echo(comparison.dry_run(chosen, out=out, methods=methods, seeds=seeds))
        return
    _compare(chosen, out, methods, seeds, as_json)


def _compare(
    recipe: Any, out: Path, methods: list[str] | None, seeds: list[int] | None, as_json: bool
) -> None:
    from ..compare.compare import compare
    from ..compare.report import rebuild_report

    try:
        compare(recipe, out=out, methods=methods, seeds=seeds, progress=say)
    except KeyboardInterrupt:
        finished = [path.parent.name for path in sorted(out.glob("runs/*/result.json"))]
        if finished:
            rebuild_report(out)
        kept = f"finished runs, kept in {out}: {', '.join(finished) or 'none yet'}"
        say(f"\nstopped; {kept}; the same command continues from here")
        raise SystemExit(130) from None
    _show_report(out, as_json)


@main.command(short_help="Write the report of a comparison again.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@as_json
def report(folder: Path, as_json: bool) -> None:
    """Write the report of a comparison again: tables, figure and HTML page.

    DIR is a folder that demo or compare made.
    """
    _show_report(folder, as_json)


def _show_report(out: Path, as_json: bool) -> None:
    from ..compare.report import rebuild_report, text_examples
    from ..compare.tables import text_table

    results, page = rebuild_report(out)
    if as_json:
        click.echo(json.dumps(results, ensure_ascii=False))
        return
    click.echo(text_table(results))
    if shown := text_examples(results, NUM_SHOWN):
        click.echo(f"\n{shown}")
    click.echo(f"\nreport: {page}")


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


for command in (graft, train, evaluate, push, patch, learn, serve, ui):
    main.add_command(command)
for command in main.commands.values():
    if not isinstance(command, click.Group):
        add_config(command)
for command in (show_config, env):
    main.add_command(command)


if __name__ == "__main__":
    main()
