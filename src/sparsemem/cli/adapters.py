"""Commands that make, train, read and publish adapters: graft, train, eval, push."""

import json
from pathlib import Path
from typing import Any

import click

from .options import (
    DTYPES,
    METHODS,
    MODES,
    MOMENTS,
    PRECISIONS,
    RULES,
    SCHEDULES,
    TASKS,
    TRAINABLE,
    WRITES,
    as_json,
    comma_names,
    comma_numbers,
    out_folder,
    say,
    seed_option,
)


@click.command()
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
@click.option(
    "--write", type=click.Choice(WRITES), help="Behind the last block (last), or to each layer's own output."
)
@click.option("--mode", type=click.Choice(MODES), help="Beside the MLP (additive) or instead of it.")
@click.option(
    "--layers", callback=comma_numbers, help="Blocks that get a memory; the retrofit's own by default."
)
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
@click.option(
    "--gradient-accumulation-steps", type=click.IntRange(1), help="Of the dense retrofit; 1 by default."
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted dense retrofit into the same folder.")
@seed_option
@as_json
def graft(
    model: str, background: str, out: Path, retrofit: str, layers: list[int] | None, max_length: int,
    lr: float | None, epochs: int | None, max_steps: int | None, batch_size: int | None,
    gradient_accumulation_steps: int | None, resume: bool, seed: int, as_json: bool, **memory: Any,
) -> None:  # fmt: skip
    """Give MODEL a memory that general text has set up, as a new adapter.

    After calibration its answers stay what they were; after a dense retrofit they are near to it.
    """
    from ..folders import making

    given = {"lr": lr, "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size}
    given["gradient_accumulation_steps"] = gradient_accumulation_steps
    given = {name: value for name, value in given.items() if value is not None}
    if retrofit == "calibrate" and (given or resume):
        first = next(iter(given), "resume").replace("_", "-")
        raise click.UsageError(f"--{first} is an option of --retrofit dense; calibration trains nothing")
    options = {"epochs": 2, "batch_size": 16, **given}
    memory = {"layers_to_transform": layers, **memory}
    try:
        made = making.graft(
            model, background, out, seed=seed, max_length=max_length, memory=memory,
            retrofit=retrofit, resume=resume, options=options if retrofit == "dense" else None,
        )  # fmt: skip
    except KeyboardInterrupt:
        say(f"\nstopped; a dense retrofit goes on from its last checkpoint with --resume, into {out}")
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


@click.command()
@click.argument("model", metavar="MODEL|ADAPTER")
@click.option("--data", required=True, metavar="FILE|hub:NAME", help="What to teach.")
@out_folder
@click.option(
    "--background",
    metavar="FILE|hub:NAME",
    help="General text for the memory that MODEL gets: what is not to change. It has a default.",
)
@click.option("--method", type=click.Choice(METHODS), default="smf", show_default=True)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run into the same folder.")
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), help="Learning rate; the method's own by default."
)
@click.option(
    "--keep",
    metavar="FILE|hub:NAME",
    help="Records near to what is taught whose answers must stay.",
)
@click.option(
    "--mentions",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="Other questions about each taught subject whose answers are kept; 0: none.",
)
@click.option(
    "--cache-bytes",
    type=click.IntRange(0),
    default=2**31,
    show_default=True,
    help="The base's states, computed once: so many bytes in memory, more in a file; 0: no cache.",
)
@click.option(
    "--epochs",
    type=click.IntRange(1),
    help="Passes over the data. By default 3, and for sparse memory at least 200 steps.",
)
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
@click.option(
    "--schedule",
    type=click.Choice(SCHEDULES),
    help="How the rate runs. By default linear to 0 for sparse memory, constant for the others.",
)
@click.option("--warmup-steps", type=click.IntRange(0), default=5, show_default=True)
@click.option(
    "--precision", type=click.Choice(PRECISIONS), help="Of the computation; the faster one by default."
)
@click.option(
    "--report-to",
    "report_to",
    callback=comma_names,
    help="Trackers of the loss, comma between them: tensorboard, wandb, trackio.",
)
@seed_option
@as_json
def train(
    model: str, data: str, out: Path, background: str | None, method: str, resume: bool,
    trainable: str | None, report_to: list[str] | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Teach MODEL or ADAPTER what the data says.

    A MODEL gets a memory first, as `graft` makes it by default.
    """
    from ..folders import making

    try:
        metrics = making.train(
            model, data, out, method=method, resume=resume, background=background, trainable=trainable,
            options=options, report_to=report_to or (),
        )  # fmt: skip
    except KeyboardInterrupt:
        say(f"\nstopped; --resume goes on with {out} from the last checkpoint")
        raise SystemExit(130) from None
    if as_json:
        click.echo(json.dumps(metrics))
        return
    cut = f", {metrics['truncated']} records truncated" if metrics["truncated"] else ""
    done = f"{metrics['steps']} steps, loss {metrics['loss']:.3f}, {metrics['seconds']:.0f} s{cut}"
    click.echo(f"{method}: {out} ({done})")


@click.command("eval")
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
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of the weights."
)
@click.option(
    "--precision", type=click.Choice([*PRECISIONS, "auto"]), help="Of the computation; the dtype by default."
)
@click.option("--record", is_flag=True, help="Keep the result in ADAPTER's evaluations.json and model card.")
@as_json
def evaluate(model: str, task: str, data: str | None, record: bool, as_json: bool, **options: Any) -> None:
    """Read off what MODEL or ADAPTER knows, and beside an ADAPTER's what its base knew.

    Tasks of lm-evaluation-harness need the extra `eval`.
    """
    from ..evaluation.evaluation import evaluate_named
    from ..folders import recording
    from ..folders.contents import check_made

    if record:
        check_made(Path(model))
    chosen = options["precision"] or options["dtype"]
    options["precision"] = None if chosen == "auto" else chosen
    found = evaluate_named(model, task, data, **options)
    if record:
        asked = {
            key: value
            for key, value in {"data": data, **options}.items()
            if value is not None and value is not False and value != DTYPES[0]
        }
        recording.record(Path(model), {**asked, **{key: found[key] for key in found if key != "model"}})
    if as_json:
        click.echo(json.dumps(found))
        return
    base = {name: f" (base {value:.4f})" for name, value in found.get("base", {}).items()}
    shown = [f"{name} {value:.4f}{base.get(name, '')}" for name, value in found["metrics"].items()]
    unit = "tokens" if "ppl" in found["metrics"] else "items"
    click.echo(f"{task}: {', '.join(shown)}, {found['n']:,} {unit}")


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("repo", metavar="NAMESPACE/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card; upload nothing.")
@as_json
def push(adapter: Path, repo: str, private: bool, dry_run: bool, as_json: bool) -> None:
    """Upload a folder that graft or train made to the Hub, with its model card."""
    from ..folders.publish import public_files, upload

    files = public_files(adapter, repo)
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files}
    if dry_run:
        card = dict(files)["README.md"].decode()  # type: ignore[union-attr]
        listed = "".join(f"{size:>14,}  {name}\n" for name, size in sizes.items())
        click.echo(json.dumps({"files": sizes, "card": card}) if as_json else f"{listed}\n{card}")
        return
    address = upload(files, repo, private=private)
    click.echo(json.dumps({"repo": repo, "commit": address, "files": sizes}) if as_json else address)
