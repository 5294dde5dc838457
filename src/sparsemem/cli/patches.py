"""Commands for row patches: show, diff, apply, revert, merge, dial, subset."""

from pathlib import Path

import click

from .algebra import dial_patch, merge_patches, show_patch, subset_patch
from .described import show_described
from .options import as_json


@click.group()
def patch() -> None:
    """Show, create, apply or revert row patches.

    A row patch is a file with everything that one training run changed in an adapter's memory.
    """


patch_file = click.argument("patch_file", metavar="PATCH", type=click.Path(path_type=Path))
adapter_folder = click.argument("adapter", type=click.Path(path_type=Path))
out_copy = click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for a changed copy. Default: change ADAPTER itself.",
)


@patch.command("diff", short_help="Save the difference between two adapters as a patch.")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Patch file to create.")
@as_json
def diff_patch(before: Path, after: Path, out: Path, as_json: bool) -> None:
    """Save the difference between two adapter folders, BEFORE and AFTER training, as a patch."""
    from ..folders.patching import diff_adapters

    show_described(diff_adapters(before, after, out), as_json)


@patch.command("apply", short_help="Apply a patch to an adapter.")
@adapter_folder
@patch_file
@out_copy
@as_json
def apply_patch(adapter: Path, patch_file: Path, out: Path | None, as_json: bool) -> None:
    """Apply PATCH to ADAPTER: write its rows and its scope into the memory."""
    from ..folders.patching import move_patch

    show_described(move_patch(adapter, patch_file, out, forward=True), as_json)


@patch.command("revert", short_help="Revert a patch that an adapter holds.")
@adapter_folder
@patch_file
@out_copy
@as_json
def revert_patch(adapter: Path, patch_file: Path, out: Path | None, as_json: bool) -> None:
    """Revert PATCH: restore ADAPTER's memory to its state before the patch, to the byte."""
    from ..folders.patching import move_patch

    show_described(move_patch(adapter, patch_file, out, forward=False), as_json)


for command in (show_patch, merge_patches, dial_patch, subset_patch):
    patch.add_command(command)
