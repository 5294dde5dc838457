"""Learning against forgetting: every method a line over its strengths, from the committed runs alone.

    python benchmarks/frontier.py

Reads docs/results/{demo,handbook,demo-one-layer,demo-sweep,medical,medical-one-layer} and writes
docs/results/frontier/{demo,medical}.png and tables.md, which docs/results/frontier.md shows. Runs of
different commits stand side by side: losses are against the base of a run's own comparison.
"""

from pathlib import Path
from typing import Any

from sparsemem.compare.figure import pareto_figure
from sparsemem.compare.results import collect

RESULTS = Path(__file__).parents[1] / "docs" / "results"
OUT = RESULTS / "frontier"
TASKS = {
    "demo": ("recall_heldout", ("knowledge", "perplexity", "drift")),
    "medical": ("chapters", ("capitals", "perplexity", "drift")),
}
# Families, from the weakest setting to the strongest; what is not named stands alone.
LINES = {
    "demo": (
        ("lora-1e-4", "lora", "lora 3e-4", "lora-5e-4", "lora 5e-4"),
        ("full", "full-5e-5", "full 5e-5"),
    ),
    "medical": (("lora", "lora-long"), ("full-2e-5", "full", "full-long"), ("smf, one layer", "smf")),
}
# (folder, method there) -> name in the figure, of runs that the task's own folder does not hold
OTHERS = {
    "demo": {
        ("handbook", "learn"): "learn",
        ("demo-one-layer", "smf"): "smf, one layer",
        ("demo-one-layer", "full"): "full",
        ("demo-sweep/lora-0.0003", "lora"): "lora 3e-4",
        ("demo-sweep/lora-0.0005", "lora"): "lora 5e-4",
        ("demo-sweep/full-5e-05", "full"): "full 5e-5",
    },
    "medical": {("medical-one-layer", "smf"): "smf, one layer"},
}


def rows_of(task: str) -> list[dict[str, Any]]:
    """The task's rows, and those of other folders, each moved onto the task's own base."""
    rows = collect(RESULTS / task)["rows"]
    base = next(row for row in rows if row["method"] == "base")
    held = {row["method"] for row in rows}
    for (folder, method), name in OTHERS[task].items():
        if name in held:
            continue
        found = {row["method"]: row for row in collect(RESULTS / folder)["rows"]}
        row = {**found[method], "method": name, "commit": folder}
        row["perplexity"] *= base["perplexity"] / found["base"]["perplexity"]
        rows.append(row)
    return rows


def table(task: str, rows: list[dict[str, Any]]) -> str:
    learnt, (kept, *_) = TASKS[task]
    base = next(row for row in rows if row["method"] == "base")
    lines = [
        f"| method | seeds | learnt: {learnt} | {kept} | perplexity | drift | steps | samples | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        rise = row["perplexity"] / base["perplexity"] - 1
        samples = row.get("samples")
        cells = [
            row["method"],
            len(row["seeds"]) or "",
            f"{row[learnt]:.3f}",
            f"{row[kept]:.3f}",
            f"{rise:+.1%}",
        ]
        cells += [f"{row['drift']:.4f}", f"{row['steps']:.0f}", "" if samples is None else f"{samples:.0f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['seconds']:.0f}"])) + " |")
    return "\n".join(lines)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    text = []
    for task, (learnt, lost) in TASKS.items():
        rows = rows_of(task)
        figure = pareto_figure(rows, learnt=(learnt,), lost=lost, lines=LINES[task])
        (OUT / f"{task}.png").write_bytes(figure)
        text.append(f"## {task}\n\n{table(task, rows)}\n")
    (OUT / "tables.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
