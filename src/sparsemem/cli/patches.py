"""Commands for row patches: show, diff, apply, revert, merge, dial, subset."""

import json
from pathlib import Path
from typing import Any

import click

from ..choices import CONFLICTS
from .options import as_json, say, show

patch_file = click.argument("patch_file", metavar="PATCH", type=click.Path(path_type=Path))
new_file = click.option("--out", type=click.Path(path_type=Path), required=True, help="New patch file.")


@click.command("merge", short_help="Merge patches into one.")
@click.argument("files", metavar="PATCH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@new_file
@click.option(
    "--on-conflict",
    type=click.Choice(CONFLICTS),
    default="refuse",
    show_default=True,
    help="What to do about rows and facts that the patches disagree about.",
)
@as_json
def merge_patches(files: tuple[Path, ...], out: Path, on_conflict: str, as_json: bool) -> None:
    """Merge PATCHes, in this order, into one patch, and report what they disagree about."""
    from ..patches.algebra import merge
    from ..patches.patch import RowPatch
    from ..saved.patching import refuse_other_memories

    _refuse(out)
    patches = [RowPatch.load(file) for file in files]
    refuse_other_memories(dict(zip(files, patches, strict=True)))
    merged, report = merge(patches, on_conflict)
    merged.save(out)
    result = {"out": str(out), "rows": report.rows, "tensors": report.tensors, "facts": report.facts}
    show(result, as_json, f"{out}: {len(files)} patches merged; they disagree about {report}")


@click.command("dial", short_help="Turn a patch down.")
@patch_file
@click.argument("amount", type=float)
@new_file
@as_json
def dial_patch(patch_file: Path, amount: float, out: Path, as_json: bool) -> None:
    """Save PATCH with every change AMOUNT times as large, from 0 (nothing) to 1 (the same)."""
    from ..patches.algebra import dial
    from ..patches.patch import RowPatch

    _refuse(out)
    dial(RowPatch.load(patch_file), amount).save(out)
    show({"out": str(out), "amount": amount}, as_json, f"{out}: {amount:g} of {patch_file}")


@click.command("subset", short_help="Take some tasks out of a merged patch.")
@patch_file
@click.option("--task", "tasks", multiple=True, required=True, help="A task to keep; may be repeated.")
@new_file
@as_json
def subset_patch(patch_file: Path, tasks: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Save the part of a merged PATCH that these tasks made."""
    from ..patches.algebra import subset
    from ..patches.patch import RowPatch

    _refuse(out)
    subset(RowPatch.load(patch_file), tasks).save(out)
    show({"out": str(out), "tasks": tasks}, as_json, f"{out}: {', '.join(tasks)}")


@click.command("show", short_help="Show what a patch changes.")
@patch_file
@click.option(
    "--adapter", type=click.Path(path_type=Path), help="Adapter of the same memory: show what reads the rows."
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="Further text to look for readers in; with --adapter."
)
@click.option(
    "--html", type=click.Path(path_type=Path), help="New HTML page with the readers; with --adapter."
)
@as_json
def show_patch(
    patch_file: Path, adapter: Path | None, text: Path | None, html: Path | None, as_json: bool
) -> None:
    """Show what PATCH changes, and with --adapter the tokens in context that read the most-changed rows."""
    from ..patches.patch import RowPatch
    from ..saved.contents import describe_patch

    if adapter is None and (text or html):
        raise click.UsageError(
            f"--{'text' if text else 'html'} needs --adapter, an adapter of the same memory"
        )
    patch = RowPatch.load(patch_file)
    described = describe_patch(patch)
    if adapter is None:
        show_described(described, as_json)
        if described["asked"] and not as_json:
            say("--adapter DIR, the folder of learn, shows the tokens that read each fact row")
        return
    from ..saved.showing import page_of, readers_of, text_of

    if html is not None:
        _refuse(html)
    readers = readers_of(adapter, patch, patch_file, text)
    if html is not None:
        html.write_text(page_of(patch_file.name, described, readers), encoding="utf-8")
    if as_json:
        shown: list[dict[str, Any]] = [
            {**row._asdict(), "readers": [one._asdict() for one in row.readers]} for row in readers
        ]
        click.echo(json.dumps({**described, "readers": shown}))
        return
    show_described(described, as_json)
    click.echo(text_of(readers))


def show_described(described: dict[str, Any], as_json: bool) -> None:
    """Print what `describe_patch` found."""
    lines = []
    for name, layer in described["layers"].items():
        rows = f"{layer['rows']} rows, largest change {layer['largest_change']:.3g}"
        if layer["fact_rows"]:
            rows = f"{layer['fact_rows']} fact rows" + (f", {rows}" if layer["rows"] else "")
        lines.append(f"{name}: {rows}, {layer['centres']} scope centres")
    for name, change in described["tensors"].items():
        lines.append(f"{name}: replaced as a whole, largest change {change:.3g}")
    lines += [f"read at the answer to: {question}" for question in described["asked"] if question]
    lines += [f"{key}: {value}" for key, value in described["info"].items() if key != "facts"]
    lines += [f"{key}: {described[key]}" for key in ("base", "out") if key in described]
    show(described, as_json, "\n".join(lines))


def _refuse(path: Path) -> None:
    from ..atomic import refuse_existing

    refuse_existing(path)


@click.group()
def patch() -> None:
    """Show, create, apply or revert row patches.

    A row patch is a file with everything that one training run changed in an adapter's memory.
    """


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
    from ..saved.patching import diff_adapters

    show_described(diff_adapters(before, after, out), as_json)


@patch.command("apply", short_help="Apply a patch to an adapter.")
@adapter_folder
@patch_file
@out_copy
@as_json
def apply_patch(adapter: Path, patch_file: Path, out: Path | None, as_json: bool) -> None:
    """Apply PATCH to ADAPTER: write its rows and its scope into the memory."""
    from ..saved.patching import move_patch

    show_described(move_patch(adapter, patch_file, out, forward=True), as_json)


@patch.command("revert", short_help="Revert a patch that an adapter holds.")
@adapter_folder
@patch_file
@out_copy
@as_json
def revert_patch(adapter: Path, patch_file: Path, out: Path | None, as_json: bool) -> None:
    """Revert PATCH: restore ADAPTER's memory to its state before the patch, to the byte."""
    from ..saved.patching import move_patch

    show_described(move_patch(adapter, patch_file, out, forward=False), as_json)


for command in (show_patch, merge_patches, dial_patch, subset_patch):
    patch.add_command(command)
