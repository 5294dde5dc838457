"""The commands eval and push: measure an adapter or model, and publish it."""

import json
from pathlib import Path
from typing import Any

import click

from ..choices import PRECISIONS, TASKS
from .options import NAMES, as_json, check_inputs


@click.command("eval", short_help="Evaluate a model or adapter on a task.", epilog=NAMES)
@click.argument("model", metavar="MODEL|ADAPTER")
@click.option(
    "--task",
    metavar="NAME|FILE.yaml",
    required=True,
    help=f"One of {', '.join(TASKS)}; or a task of lm-evaluation-harness, by name or YAML file.",
)
@click.option(
    "--data",
    type=click.Path(),
    metavar="FILE",
    help="File with the items of the task. Default for medmcqa, wikitext, triviaqa: from the Hub.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="Use only this many items (for a text: paragraphs or lines)."
)
@click.option(
    "--num-fewshot", type=click.IntRange(0), help="Number of answered examples before each question."
)
@click.option("--chat", is_flag=True, help="Use the model's chat template for the questions.")
@click.option(
    "--dtype",
    type=click.Choice(PRECISIONS),
    default="float32",
    show_default=True,
    help="Number format of the loaded weights.",
)
@click.option(
    "--precision",
    type=click.Choice([*PRECISIONS, "auto"]),
    help="Precision of the computation; auto: the faster one on this device. Default: that of --dtype.",
)
@click.option(
    "--record", is_flag=True, help="Also save the result in ADAPTER's evaluations.json and its model card."
)
@as_json
def evaluate(model: str, task: str, data: str | None, record: bool, as_json: bool, **options: Any) -> None:
    """Evaluate MODEL or ADAPTER on a task; for an adapter, also show the base model's score.

    Tasks of lm-evaluation-harness need the optional packages of `pip install "sparsemem[eval]"`.
    """
    check_inputs(model)
    if data is not None and task in TASKS:
        from ..evaluation.items import read_items

        read_items(task, data, limit=options["limit"], num_fewshot=options["num_fewshot"] or 0)
    from ..evaluation.tasks import evaluate_named
    from ..saved import card as recording
    from ..saved.contents import check_made

    if record:
        check_made(Path(model))
    chosen = options["precision"] or options["dtype"]
    options["precision"] = None if chosen == "auto" else chosen
    found = evaluate_named(model, task, data, **options)
    if record:
        asked = {
            key: value
            for key, value in {"data": data, **options}.items()
            if value is not None and value is not False and value != PRECISIONS[0]
        }
        recording.record(Path(model), {**asked, **{key: found[key] for key in found if key != "model"}})
    if as_json:
        click.echo(json.dumps(found))
        return
    base = {name: f" (base {value:.4f})" for name, value in found.get("base", {}).items()}
    shown = [f"{name} {value:.4f}{base.get(name, '')}" for name, value in found["metrics"].items()]
    unit = "tokens" if "ppl" in found["metrics"] else "items"
    click.echo(f"{task}: {', '.join(shown)}, {found['n']:,} {unit}")


@click.command(short_help="Upload an adapter to the Hugging Face Hub.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("repo", metavar="NAMESPACE/NAME")
@click.option("--private", is_flag=True, help="If the repository is new, make it private.")
@click.option("--dry-run", is_flag=True, help="Show the files and the model card, but upload nothing.")
@click.option(
    "--name-tasks",
    is_flag=True,
    help="List the tasks that learn taught, and a question of each, in the card.",
)
@as_json
def push(adapter: Path, repo: str, private: bool, dry_run: bool, name_tasks: bool, as_json: bool) -> None:
    """Upload ADAPTER and its model card to the Hugging Face Hub.

    ADAPTER is a folder that graft, train or learn made. The repository is created if it does not exist. Of a
    folder of learn only the adapter is uploaded; its ledger and patches stay here.
    """
    from ..saved.publish import public_files, upload

    files = public_files(adapter, repo, name_tasks=name_tasks)
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files}
    if dry_run:
        card = dict(files)["README.md"].decode()  # type: ignore[union-attr]
        listed = "".join(f"{size:>14,}  {name}\n" for name, size in sizes.items())
        click.echo(json.dumps({"files": sizes, "card": card}) if as_json else f"{listed}\n{card}")
        return
    address = upload(files, repo, private=private)
    click.echo(json.dumps({"repo": repo, "commit": address, "files": sizes}) if as_json else address)
