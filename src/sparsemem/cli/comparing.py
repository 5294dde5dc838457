"""The commands demo, compare and report: methods side by side, and what came of it."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from ..choices import RECIPES
from .options import as_json, comma_names, comma_numbers, say, seed_option

NUM_SHOWN = 3


@click.command(short_help="Teach a small model invented facts; compare methods.")
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
    default="base,learn,lora,full",
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


@click.command(
    short_help=f"Run a prepared comparison: {', '.join(RECIPES)}.",
    help="Run a prepared comparison: several methods, each with several seeds, then a report.\n\n"
    + "RECIPE is one of\n\n"
    + "\b\n"
    + "\n".join(f"{name:<9} {about}" for name, about in RECIPES.items())
    + "\n\nFinished runs are not repeated when the same command is called again.",
)
@click.argument("recipe", metavar="RECIPE", type=click.Choice(list(RECIPES)))
@click.option("--model", help="Model to use instead of the recipe's own.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder with data files. lifelong needs it (zsre.jsonl or counterfact.jsonl); paper can use it in "
    "place of the datasets on the Hub. The other recipes have their own data.",
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
    from ..compare.recipes.overrides import changed

    if dry_run and as_json:
        raise click.UsageError(
            "a dry run has no results, so --json has nothing to print; leave out --dry-run or --json"
        )
    room = import_module(f"..compare.recipes.{recipe}", __package__)
    chosen = room.recipe(model=model, data_dir=data_dir, settings=changed(room.SETTINGS, assignments))
    out = out or Path(f"sparsemem-{recipe}")
    if dry_run:
        from ..compare.compare import dry_run as planned

        click.echo(planned(chosen, out=out, methods=methods, seeds=seeds))
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


@click.command(short_help="Write the report of a comparison again.")
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
