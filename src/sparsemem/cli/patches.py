"""Commands on row patches: show, diff, apply, revert."""

import json
from pathlib import Path
from typing import Any

import click

from .options import as_json


@click.group()
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
    from ..folders.contents import describe_patch
    from ..patches.patch import RowPatch

    _show_patch(describe_patch(RowPatch.load(patch_file)), as_json)


@patch.command("diff")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New patch file.")
@as_json
def diff_patch(before: Path, after: Path, out: Path, as_json: bool) -> None:
    """Save what changed between two adapter folders, BEFORE and AFTER training."""
    from ..folders.patching import diff_adapters

    _show_patch(diff_adapters(before, after, out), as_json)


@patch.command("apply")
@adapter_folder
@patch_file
@out_copy
@as_json
def apply_patch(adapter: Path, patch_file: Path, out: Path | None, as_json: bool) -> None:
    """Write a patch's rows and scope into ADAPTER."""
    from ..folders.patching import move_patch

    _show_patch(move_patch(adapter, patch_file, out, forward=True), as_json)


@patch.command("revert")
@adapter_folder
@patch_file
@out_copy
@as_json
def revert_patch(adapter: Path, patch_file: Path, out: Path | None, as_json: bool) -> None:
    """Take a patch back out of ADAPTER, to the byte."""
    from ..folders.patching import move_patch

    _show_patch(move_patch(adapter, patch_file, out, forward=False), as_json)


def _show_patch(described: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(described))
        return
    for name, layer in described["layers"].items():
        change = f"{layer['rows']} rows, largest change {layer['largest_change']:.3g}"
        click.echo(f"{name}: {change}, {layer['centres']} centres of scope")
    for name, change in described["tensors"].items():
        click.echo(f"{name}: whole, largest change {change:.3g}")
    for key, value in described["info"].items():
        click.echo(f"{key}: {value}")
    for key in ("base", "out"):
        if key in described:
            click.echo(f"{key}: {described[key]}")
