"""The command train: finetune a model or an adapter."""

import json
from pathlib import Path
from typing import Any

import click

from ..choices import LOSS_ON, METHODS, MOMENTS, PRECISIONS, RULES, SCHEDULES, TRAINABLE
from .options import (
    NAMES,
    Bytes,
    as_json,
    check_inputs,
    comma_names,
    out_folder,
    say_stopped,
    seed_option,
)


@click.command(short_help="Train a model or adapter on data.", epilog=NAMES)
@click.argument("model", metavar="MODEL|ADAPTER")
@click.option(
    "--data",
    required=True,
    metavar="FILE|hub:NAME",
    help="Training data: a file or folder of JSON lines, CSV or Parquet, or a dataset on the Hub, with "
    'records such as {"prompt", "completion"}, {"messages"} or {"text"}; the guide lists all of them.',
)
@out_folder
@click.option(
    "--background",
    metavar="FILE|hub:NAME",
    help="General text on which the model should not change; used to calibrate the new memory of a MODEL. "
    "Default: a text that is part of sparsemem.",
)
@click.option(
    "--method",
    # "peft" is for an adapter that was made in Python
    type=click.Choice([name for name in METHODS if name != "peft"]),
    default="smf",
    show_default=True,
    help="smf: sparse memory that acts only within the scope of the data. smf-open: sparse memory without a "
    "scope, as in the paper. lora: LoRA. full: train every parameter.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run with the same --out.")
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), help="Learning rate. Default: depends on the method."
)
@click.option(
    "--keep",
    metavar="FILE|hub:NAME",
    help="Records close to the training data whose answers must not change (smf only).",
)
@click.option(
    "--mentions",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="For each subject in the training data, keep the answers to this many other questions about it "
    "(smf only); 0: none.",
)
@click.option(
    "--cache-bytes",
    type=Bytes(),
    default="2GiB",
    show_default=True,
    help="Memory for the base model's cached states, such as 512MB; more is kept in a file. 0: no cache.",
)
@click.option(
    "--epochs",
    type=click.IntRange(1),
    help="Passes over the data. Default: 3; for sparse memory also at least 200 steps.",
)
@click.option("--max-steps", type=click.IntRange(1), help="Number of optimizer steps; overrides --epochs.")
@click.option(
    "--stop-loss",
    type=float,
    help="Stop when the mean loss of the last epoch is below this. Default: .005 for smf without --epochs "
    "and --max-steps.",
)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Records per batch.")
@click.option(
    "--gradient-accumulation-steps",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Batches per optimizer step.",
)
@click.option(
    "--max-length",
    type=click.IntRange(2),
    help="Tokens per record; longer records are cut. Default: the model's context length.",
)
@click.option(
    "--loss-on",
    type=click.Choice(LOSS_ON),
    default="completion",
    show_default=True,
    help="Compute the loss on the answers only (completion) or on all tokens.",
)
@click.option(
    "--top-t",
    type=int,
    default=1024,
    show_default=True,
    help="Rows that one step may change in each memory layer.",
)
@click.option(
    "--rule",
    type=click.Choice(RULES),
    default="grad",
    show_default=True,
    help="How these rows are chosen: by gradient (grad), by access counts (kl, tfidf, tf), or at random.",
)
@click.option(
    "--moments",
    type=click.Choice(MOMENTS),
    default="table",
    show_default=True,
    help="Second moments of the row optimizer: one per row, per element, or per value table.",
)
@click.option(
    "--trainable",
    type=click.Choice(TRAINABLE),
    help="Parts of the memory to train: the rows, the rows and the output scale, or everything. "
    "Default: as in the adapter; for a MODEL, values.",
)
@click.option(
    "--schedule",
    type=click.Choice(list(SCHEDULES)),
    help="Learning rate schedule. Default: linear to 0 for sparse memory, constant for other methods.",
)
@click.option(
    "--warmup-steps",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Steps in which the learning rate rises from 0.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Precision of the computation. Default: the faster one on this device.",
)
@click.option(
    "--report-to",
    callback=comma_names,
    metavar="NAME,NAME,...",
    help="Send the loss of every step to tensorboard, wandb or trackio, separated by commas.",
)
@seed_option
@as_json
def train(
    model: str, data: str, out: Path, background: str | None, keep: str | None, method: str, resume: bool,
    trainable: str | None, report_to: list[str] | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train MODEL or ADAPTER on the data and save the result in a new folder.

    Single facts are better taught by `sparsemem learn`: faster, in any context, and each can be taken back.
    This command is for a domain, such as many cases of one task.

    With --method smf or smf-open, a MODEL first gets an empty memory, as `graft` creates by default. An
    ADAPTER can be trained further with a method of its own kind.
    """
    check_inputs(model, out=None if resume else out, data=[data, keep], general=background)
    from ..saved import making

    try:
        metrics = making.train(
            model, data, out, method=method, resume=resume, background=background, trainable=trainable,
            options={**options, "keep": keep}, report_to=report_to or (),
        )  # fmt: skip
    except (KeyboardInterrupt, SystemExit) as stop:
        raise say_stopped(stop, out) from None
    if as_json:
        click.echo(json.dumps(metrics))
        return
    cut = f", {metrics['truncated']} records truncated" if metrics["truncated"] else ""
    done = f"{metrics['steps']} steps, loss {metrics['loss']:.3f}, {metrics['seconds']:.0f} s{cut}"
    click.echo(f"{method}: {out} ({done})")
