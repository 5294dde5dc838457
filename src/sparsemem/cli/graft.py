"""The command graft: add an empty memory to a model."""

import json
from pathlib import Path
from typing import Any

import click

from ..choices import MODES, RETROFITS, WRITES
from .options import MODEL_NAMES, as_json, check_inputs, comma_numbers, out_folder, say_stopped, seed_option


@click.command(short_help="Add an empty sparse memory to a model.", epilog=MODEL_NAMES)
@click.argument("model")
@click.option(
    "--background",
    required=True,
    metavar="FILE|hub:NAME",
    help="General text on which the model should not change: a JSONL file or a dataset on the Hub.",
)
@out_folder
@click.option(
    "--retrofit",
    type=click.Choice(RETROFITS),
    default="calibrate",
    show_default=True,
    help="calibrate: set the memory's addressing from data, without training. "
    "dense: train the whole memory on the general text, as the paper does.",
)
@click.option(
    "--write",
    type=click.Choice(WRITES),
    help="Where the memory's output is added: behind the last block (last), or to each MLP's output (own). "
    "Default: last; with --retrofit dense: own.",
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    help="Use the memory beside the MLP (additive) or instead of it (replacement, needs --write own). "
    "Default: additive.",
)
@click.option(
    "--layers",
    callback=comma_numbers,
    metavar="N,N,...",
    help="Blocks that get a memory layer, counted from 0. Default: three blocks, which depend on --retrofit.",
)
@click.option(
    "--num-keys",
    type=int,
    help="Sub-keys per half; a memory layer has num_keys ** 2 slots. Default: 64 (dense: 128).",
)
@click.option("--num-heads", type=int, help="Queries per token and memory layer. Default: 16 (dense: 4).")
@click.option("--top-k", type=int, help="Slots that each head reads for one token. Default: 64 (dense: 16).")
@click.option("--key-dim", type=int, help="Size of the query of one head. Default: 64 (dense: 256).")
@click.option(
    "--max-length",
    type=click.IntRange(2),
    default=512,
    show_default=True,
    help="Tokens per record; longer records are cut.",
)
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), help="Learning rate of --retrofit dense. Default: 5e-4."
)
@click.option(
    "--epochs", type=click.IntRange(1), help="Passes over the text with --retrofit dense. Default: 2."
)
@click.option(
    "--max-steps", type=click.IntRange(1), help="Optimizer steps of --retrofit dense; overrides --epochs."
)
@click.option(
    "--batch-size", type=click.IntRange(1), help="Records per batch with --retrofit dense. Default: 16."
)
@click.option(
    "--gradient-accumulation-steps",
    type=click.IntRange(1),
    help="Batches per optimizer step of --retrofit dense. Default: 1.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted --retrofit dense with the same --out.")
@seed_option
@as_json
def graft(
    model: str, background: str, out: Path, retrofit: str, layers: list[int] | None, max_length: int,
    lr: float | None, epochs: int | None, max_steps: int | None, batch_size: int | None,
    gradient_accumulation_steps: int | None, resume: bool, seed: int, as_json: bool, **memory: Any,
) -> None:  # fmt: skip
    """Add an empty sparse memory to MODEL and save it as a new adapter.

    With --retrofit calibrate the model's answers do not change at all; with dense they change slightly.
    """
    check_inputs(model, out=None if resume else out, general=background)
    from ..saved import making

    given = {"lr": lr, "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size}
    given["gradient_accumulation_steps"] = gradient_accumulation_steps
    given = {name: value for name, value in given.items() if value is not None}
    if retrofit == "calibrate" and (given or resume):
        first = next(iter(given), "resume").replace("_", "-")
        raise click.UsageError(
            f"--{first} is an option of --retrofit dense, but the retrofit is calibrate; "
            f"leave out --{first} or add --retrofit dense"
        )
    options = {"epochs": 2, "batch_size": 16, **given}
    memory = {"layers_to_transform": layers, **memory}
    try:
        made = making.graft(
            model, background, out, seed=seed, max_length=max_length, memory=memory,
            retrofit=retrofit, resume=resume, options=options if retrofit == "dense" else None,
        )  # fmt: skip
    except (KeyboardInterrupt, SystemExit) as stop:
        raise say_stopped(stop, out) from None
    if as_json:
        click.echo(json.dumps(made))
        return
    for name, layer in made["layers"].items():
        click.echo(
            f"{name}: {layer['slots']:,} slots, {layer['used']:.0%} in use, entropy {layer['entropy']:.2f}"
        )
    if "loss" in made:
        held_out = (
            "" if made["validation_loss"] is None else f", validation loss {made['validation_loss']:.3f}"
        )
        click.echo(f"{made['steps']} steps, loss {made['loss']:.3f}{held_out}, {made['seconds']:.0f} s")
    click.echo(f"adapter: {out} ({retrofit} on {made['tokens']:,} tokens)")
