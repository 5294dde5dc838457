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

RECIPES = ("demo", "medical", "paper")
METHODS = ("smf", "smf-open", "lora", "full")
TASKS = ("recall", "multiple-choice", "perplexity", "medmcqa", "wikitext", "triviaqa")
DTYPES = ("float32", "bfloat16", "autocast")
MODES = ("additive", "replacement")
TRAINABLE = ("values", "values+scale", "memory")
RULES = ("kl", "tfidf", "tf", "grad", "random")
MOMENTS = ("row", "element", "table")
SCHEDULES = ("constant", "cosine")
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


def _names(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [name.strip() for name in value.split(",")]


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    names = _names(context, parameter, value)
    try:
        return None if names is None else [int(name) for name in names]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not whole numbers with commas between them") from None


def _progress(message: str) -> None:
    click.echo(message, err=True)


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
out_folder = click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder.")
seed_option = click.option("--seed", type=int, default=0, show_default=True)


@click.group(cls=_Commands)
@click.version_option(package_name="sparsemem")
def main() -> None:
    """Teach a language model something new by writing rows of an added memory."""
    # what one library warns another of is nothing that a user of the command line could mend
    warnings.simplefilter("ignore", FutureWarning)


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("sparsemem-demo"), show_default=True)
@click.option("--methods", callback=_names, default="base,smf,lora,full", show_default=True)
@seed_option
@as_json
def demo(out: Path, methods: list[str], seed: int, as_json: bool) -> None:
    """Teach SmolLM2 an invented handbook by several methods, and see what each of them forgets.

    An interrupted demo goes on with its next method when it is called again.
    """
    from .recipes.demo import recipe

    _compare(recipe(), out, methods, [seed], as_json)


@main.command()
@click.argument("recipe", metavar="RECIPE", type=click.Choice(RECIPES))
@click.option("--model", help="Another model than the recipe's.")
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Folder of the recipe's data, if it needs any."
)
@click.option("--methods", callback=_names, help="Comma between them; all of the recipe's by default.")
@click.option("--seeds", callback=_numbers, help="Comma between them; the recipe's by default.")
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

    from .recipes.overrides import changed

    if dry_run and as_json:
        raise click.UsageError("a dry run has no results for --json to print: leave out one of the two.")
    room = import_module(f".recipes.{recipe}", __package__)
    chosen = room.recipe(model=model, data_dir=data_dir, settings=changed(room.SETTINGS, assignments))
    out = out or Path(f"sparsemem-{recipe}")
    if dry_run:
        from . import compare as comparison

        click.echo(comparison.dry_run(chosen, out=out, methods=methods, seeds=seeds))
        return
    _compare(chosen, out, methods, seeds, as_json)


def _compare(
    recipe: Any, out: Path, methods: list[str] | None, seeds: list[int] | None, as_json: bool
) -> None:
    from .compare import compare
    from .report import rebuild_report

    try:
        compare(recipe, out=out, methods=methods, seeds=seeds, progress=_progress)
    except KeyboardInterrupt:
        finished = [path.parent.name for path in sorted(out.glob("runs/*/result.json"))]
        if finished:
            rebuild_report(out)
        kept = f"finished and kept in {out}: {', '.join(finished) or 'nothing yet'}"
        _progress(f"\nstopped; {kept}; the same command goes on from there")
        raise SystemExit(130) from None
    _show_report(out, as_json)


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@as_json
def report(folder: Path, as_json: bool) -> None:
    """Make the table, the figure and the page of a comparison again."""
    _show_report(folder, as_json)


def _show_report(out: Path, as_json: bool) -> None:
    from .report import rebuild_report, text_examples
    from .tables import text_table

    results, page = rebuild_report(out)
    if as_json:
        click.echo(json.dumps(results, ensure_ascii=False))
        return
    click.echo(text_table(results))
    if shown := text_examples(results, NUM_SHOWN):
        click.echo(f"\n{shown}")
    click.echo(f"\nreport: {page}")


@main.command()
@click.argument("model")
@click.option(
    "--background", required=True, metavar="FILE|hub:NAME", help="General text: what is not to change."
)
@out_folder
@click.option(
    "--retrofit",
    type=click.Choice(["calibrate", "dense"]),
    default="calibrate",
    show_default=True,
    help="How it is made useful: addresses from statistics, or the paper's training of all of it.",
)
@click.option("--mode", type=click.Choice(MODES), help="Beside the MLP (additive) or instead of it.")
@click.option("--layers", callback=_numbers, help="Blocks that get a memory; the retrofit's own by default.")
@click.option("--num-keys", type=int, help="A layer has num_keys ** 2 slots.")
@click.option("--num-heads", type=int, help="Queries per token and layer.")
@click.option("--top-k", type=int, help="Slots that one head reads for a token.")
@click.option("--key-dim", type=int, help="Width of one head's query.")
@click.option(
    "--max-length", type=click.IntRange(2), default=512, show_default=True, help="Tokens per record."
)
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Of the dense retrofit; 5e-4 by default.")
@click.option("--epochs", type=click.IntRange(1), help="Of the dense retrofit; 2 by default.")
@click.option("--max-steps", type=click.IntRange(1), help="Of the dense retrofit; overrides --epochs.")
@click.option("--batch-size", type=click.IntRange(1), help="Of the dense retrofit; 16 by default.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted dense retrofit into the same folder.")
@seed_option
@as_json
def graft(
    model: str, background: str, out: Path, retrofit: str, layers: list[int] | None, max_length: int,
    lr: float | None, epochs: int | None, max_steps: int | None, batch_size: int | None, resume: bool,
    seed: int, as_json: bool, **memory: Any,
) -> None:  # fmt: skip
    """Give MODEL a memory that general text has set up, as a new adapter.

    After calibration its answers stay what they were; after a dense retrofit they are near to it.
    """
    from . import folders

    given = {"lr": lr, "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size}
    given = {name: value for name, value in given.items() if value is not None}
    if retrofit == "calibrate" and (given or resume):
        first = next(iter(given), "resume").replace("_", "-")
        raise click.UsageError(f"--{first} is an option of --retrofit dense; calibration trains nothing")
    options = {"epochs": 2, "batch_size": 16, **given}
    memory = {"layers_to_transform": layers, **memory}
    try:
        made = folders.graft(
            model, background, out, seed=seed, max_length=max_length, memory=memory,
            retrofit=retrofit, resume=resume, options=options if retrofit == "dense" else None,
        )  # fmt: skip
    except KeyboardInterrupt:
        _progress(f"\nstopped; a dense retrofit goes on from its last checkpoint with --resume, into {out}")
        raise SystemExit(130) from None
    if as_json:
        click.echo(json.dumps(made))
        return
    for name, layer in made["layers"].items():
        click.echo(
            f"{name}: {layer['slots']:,} slots, {layer['used']:.0%} in use, entropy {layer['entropy']:.2f}"
        )
    if "loss" in made:
        held_out = "" if made["validation_loss"] is None else f", held out {made['validation_loss']:.3f}"
        click.echo(f"{made['steps']} steps, loss {made['loss']:.3f}{held_out}, {made['seconds']:.0f} s")
    click.echo(f"adapter: {out} ({retrofit} on {made['tokens']:,} tokens)")


@main.command()
@click.argument("model", metavar="MODEL|ADAPTER")
@click.option("--data", required=True, metavar="FILE|hub:NAME", help="What to teach.")
@out_folder
@click.option("--method", type=click.Choice(METHODS), default="smf", show_default=True)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run into the same folder.")
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), help="Learning rate; the method's own by default."
)
@click.option("--epochs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--max-steps", type=click.IntRange(1), help="Overrides --epochs.")
@click.option("--stop-loss", type=float, help="Stop when an epoch's mean loss is below.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--gradient-accumulation-steps", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--max-length", type=click.IntRange(2), help="Tokens per record; the model's context by default."
)
@click.option("--loss-on", type=click.Choice(["completion", "all"]), default="completion", show_default=True)
@click.option(
    "--top-t", type=int, default=1024, show_default=True, help="Rows that a step may change in a layer."
)
@click.option(
    "--rule", type=click.Choice(RULES), default="grad", show_default=True, help="Which rows these are."
)
@click.option(
    "--moments", type=click.Choice(MOMENTS), default="table", show_default=True, help="Second moments."
)
@click.option(
    "--trainable", type=click.Choice(TRAINABLE), help="What of the memory trains; as grafted by default."
)
@click.option("--schedule", type=click.Choice(SCHEDULES), default="constant", show_default=True)
@click.option("--warmup-steps", type=click.IntRange(0), default=5, show_default=True)
@seed_option
@as_json
def train(
    model: str, data: str, out: Path, method: str, resume: bool, trainable: str | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Teach MODEL or ADAPTER what the data says; sparse memory needs an adapter that graft made."""
    from . import folders

    try:
        metrics = folders.train(
            model, data, out, method=method, resume=resume, trainable=trainable, options=options
        )
    except KeyboardInterrupt:
        _progress(f"\nstopped; --resume goes on with {out} from the last checkpoint")
        raise SystemExit(130) from None
    if as_json:
        click.echo(json.dumps(metrics))
        return
    cut = f", {metrics['truncated']} records truncated" if metrics["truncated"] else ""
    done = f"{metrics['steps']} steps, loss {metrics['loss']:.3f}, {metrics['seconds']:.0f} s{cut}"
    click.echo(f"{method}: {out} ({done})")


@main.command("eval")
@click.argument("model", metavar="MODEL|ADAPTER")
@click.option(
    "--task", metavar="NAME|FILE.yaml", required=True, help=f"{', '.join(TASKS)}, or the harness's."
)
@click.option(
    "--data", type=click.Path(), metavar="FILE", help="The task's items; a benchmark's from the Hub."
)
@click.option(
    "--limit", type=click.IntRange(1), help="At most so many items; of a text, paragraphs or lines."
)
@click.option("--num-fewshot", type=click.IntRange(0), help="Worked examples before each question.")
@click.option("--chat", is_flag=True, help="Ask through the model's chat template.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--record", is_flag=True, help="Keep the result in ADAPTER's evaluations.json and model card.")
@as_json
def evaluate(model: str, task: str, data: str | None, record: bool, as_json: bool, **options: Any) -> None:
    """Read off what MODEL or ADAPTER knows, and beside an ADAPTER's what its base knew.

    Tasks of lm-evaluation-harness need the extra `eval`.
    """
    from . import folders
    from .evaluation import evaluate_named

    if record:
        folders.check_made(Path(model))
    found = evaluate_named(model, task, data, **options)
    if record:
        asked = {
            key: value
            for key, value in {"data": data, **options}.items()
            if value not in (None, False, "float32")
        }
        folders.record(Path(model), {**asked, **{key: found[key] for key in found if key != "model"}})
    if as_json:
        click.echo(json.dumps(found))
        return
    base = {name: f" (base {value:.4f})" for name, value in found.get("base", {}).items()}
    shown = [f"{name} {value:.4f}{base.get(name, '')}" for name, value in found["metrics"].items()]
    unit = "tokens" if "ppl" in found["metrics"] else "items"
    click.echo(f"{task}: {', '.join(shown)}, {found['n']:,} {unit}")


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("repo", metavar="NAMESPACE/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card; upload nothing.")
@as_json
def push(adapter: Path, repo: str, private: bool, dry_run: bool, as_json: bool) -> None:
    """Upload a folder that graft or train made to the Hub, with its model card."""
    from .publish import public_files, upload

    files = public_files(adapter, repo)
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files}
    if dry_run:
        card = dict(files)["README.md"].decode()  # type: ignore[union-attr]
        listed = "".join(f"{size:>14,}  {name}\n" for name, size in sizes.items())
        click.echo(json.dumps({"files": sizes, "card": card}) if as_json else f"{listed}\n{card}")
        return
    address = upload(files, repo, private=private)
    click.echo(json.dumps({"repo": repo, "commit": address, "files": sizes}) if as_json else address)


@main.group()
def patch() -> None:
    """Row patches: what a finetuning run did to an adapter, as a file to apply and to take back."""


patch_file = click.argument("patch_file", metavar="PATCH", type=click.Path(path_type=Path))
adapter_folder = click.argument("adapter", type=click.Path(path_type=Path))
out_copy = click.option("--out", type=click.Path(path_type=Path), help="New folder; in place by default.")


@patch.command("show")
@patch_file
@as_json
def show_patch(patch_file: Path, as_json: bool) -> None:
    """Say what a patch changes."""
    from .folders import describe_patch
    from .patch import RowPatch

    _show_patch(describe_patch(RowPatch.load(patch_file)), as_json)


@patch.command("diff")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New patch file.")
@as_json
def diff_patch(before: Path, after: Path, out: Path, as_json: bool) -> None:
    """Save what changed between two adapter folders, BEFORE and AFTER training."""
    from .folders import diff_adapters

    _show_patch(diff_adapters(before, after, out), as_json)


@patch.command("apply")
@adapter_folder
@patch_file
@out_copy
@as_json
def apply_patch(adapter: Path, patch_file: Path, out: Path | None, as_json: bool) -> None:
    """Write a patch's rows and scope into ADAPTER."""
    from .folders import move_patch

    _show_patch(move_patch(adapter, patch_file, out, forward=True), as_json)


@patch.command("revert")
@adapter_folder
@patch_file
@out_copy
@as_json
def revert_patch(adapter: Path, patch_file: Path, out: Path | None, as_json: bool) -> None:
    """Take a patch back out of ADAPTER, to the byte."""
    from .folders import move_patch

    _show_patch(move_patch(adapter, patch_file, out, forward=False), as_json)


def _show_patch(described: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(described))
        return
    for name, layer in described["layers"].items():
        change = f"{layer['rows']} rows, largest change {layer['largest_change']:.3g}"
        click.echo(f"{name}: {change}, {layer['centres']} centres of scope")
    for key, value in described["info"].items():
        click.echo(f"{key}: {value}")
    for key in ("base", "out"):
        if key in described:
            click.echo(f"{key}: {described[key]}")


@main.command()
@click.argument("model", metavar="MODEL|ADAPTER")
@click.option("--show-scope", is_flag=True, help="Say after each answer how far the input was in scope.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=200, show_default=True)
def chat(model: str, show_scope: bool, max_new_tokens: int) -> None:
    """Talk to MODEL or ADAPTER in the terminal; /exit, Ctrl-D or Ctrl-C ends it."""
    from .chat import converse
    from .models import load
    from .tuner import memory_layers

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


if __name__ == "__main__":
    main()
