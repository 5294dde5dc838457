"""All runs behind the tables: which are finished, which are missing, and the tables made from their folders.

    python benchmarks/evidence.py                      # the list, with the minutes that are left
    python benchmarks/evidence.py run --data-dir DATA  # what is missing; resumes; --jobs N: N at a time
    python benchmarks/evidence.py tables               # reports, and the tables of README and docs/results

A run is finished when its folder holds result.json. `tests/test_evidence.py` fails when a table differs from
its folder.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sparsemem.atomic import read_json
from sparsemem.compare.report import rebuild_report
from sparsemem.compare.results import BASE, collect, run_name
from sparsemem.compare.tables import table

PROJECT = Path(__file__).parents[1]
RESULTS = PROJECT / "docs" / "results"
PAGES = (PROJECT / "README.md", RESULTS / "index.md")


class Runs(NamedTuple):
    """One command: `compare RECIPE --methods ... --seeds ... --out docs/results/FOLDER`.

    Attributes:
        minutes: of one run of one method, on one thread of an idle machine; an estimate.
        needs_data: whether the command needs --data-dir.
    """

    folder: str
    recipe: str
    methods: str
    seeds: str = "0"
    minutes: float = 5
    options: tuple[str, ...] = ()
    needs_data: bool = False

    def command(self, data_dir: Path | None = None, root: Path = RESULTS) -> list[str]:
        place = ["--out", os.path.relpath(root / self.folder, PROJECT)]
        data = ["--data-dir", str(data_dir or "DATA")] if self.needs_data else []
        chosen = ["--methods", self.methods, "--seeds", self.seeds]
        return ["compare", self.recipe, *chosen, *self.options, *data, *place]

    def names(self) -> list[str]:
        """The run folders that the command makes."""
        return [run_name(BASE, None), *(run_name(*pair) for pair in self.pairs())]

    def pairs(self) -> list[tuple[str, int]]:
        """Methods with their seeds, without the base."""
        taught = [method for method in self.methods.split(",") if method != BASE]
        return [(method, int(seed)) for seed in self.seeds.split(",") for method in taught]

    def only(self, methods: str, seeds: str) -> "Runs":
        return self._replace(methods=methods, seeds=seeds)

    def missing(self, root: Path = RESULTS) -> list[str]:
        return [n for n in self.names() if not (root / self.folder / "runs" / n / "result.json").is_file()]


def _lifelong(data: str, number: int) -> tuple[str, ...]:
    return "--set", f"data={data}", "--set", f"counts=[100,{number}]"


# The learning rate of the paper's arms is chosen on a split of the training records: dev/LOG.md.
ARMS = "base,replacement-kl,additive-kl,additive-tfidf,additive-scale-kl,calibrated-kl,smf-own,lora,full"
ALL_ARMS = f"{ARMS},lora-long,full-long,lora-kl,lora-mlp,lora-gated"
RUNS = (
    Runs("medical-arms", "medical", ALL_ARMS, "0", 6),
    Runs("medical-arms", "medical", "base,additive-kl,additive-scale-kl,lora,full", "1,2", 6),
    Runs("handbook", "demo", "base,learn,smf,lora,full", "0", 5),
    Runs("handbook", "demo", "base,learn,smf,lora,full", "1,2", 5),
    Runs("handbook", "demo", "lora-kl,lora-mlp,lora-replay,osf,shira,lora-gated", "0", 8),
    Runs("medical", "medical", "base,smf,lora,full", "0,1,2", 10),
    Runs("lifelong-pokemqa", "lifelong", "base,smf,retrieval", "0", 6, _lifelong("pokemqa", 300), True),
    Runs("lifelong-zsre", "lifelong", "base,smf,retrieval", "0", 15, _lifelong("zsre", 998), True),
    Runs(
        "lifelong-counterfact", "lifelong", "base,smf,retrieval", "0", 15, _lifelong("counterfact", 960), True
    ),
    Runs("demo-gemma3", "demo", "base,smf,lora,full", "0,1,2", 15, ("--model", "gemma3-270m")),
)


class Table(NamedTuple):
    """A table of a page: columns by their heading in the report, rows as (label, folder, method)."""

    columns: dict[str, str]
    rows: tuple[tuple[str, str, str], ...]


_KEPT = {"perplexity": "perplexity (base {base})", "drift": "drift"}
_HANDBOOK = {"recall": "recall", "recall, reworded": "recall, reworded", "knowledge kept": "knowledge kept"}
TABLES = {
    "demo": Table(
        {
            **_HANDBOOK,
            "in contexts": "in contexts",
            "neighbours changed": "neighbours changed",
            **_KEPT,
        },
        (
            ("**learn (sparse memory, facts)**", "handbook", "learn"),
            ("lora", "handbook", "lora"),
            ("full finetuning", "handbook", "full"),
            ("smf (sparse memory, a table)", "handbook", "smf"),
            ("lora with KL to the base", "demo", "lora-kl"),
        ),
    ),
    "rivals": Table(
        {**_HANDBOOK, **_KEPT, "mentions changed": "mentions changed", "time": "time"},
        tuple(
            (method, "demo", method)
            for method in ("smf", "lora-gated", "lora-kl", "lora-mlp", "lora-replay", "osf", "shira")
        ),
    ),
    "medical": Table(
        {"chapters": "chapters", "capitals": "capitals asked in the same form", **_KEPT},
        (
            ("base", "medical", "base"),
            ("**smf (sparse memory)**", "medical", "smf"),
            ("lora", "medical", "lora"),
            ("full finetuning", "medical", "full"),
        ),
    ),
}
# of the paper's arms, whose runs take hours, those that are there
TABLES["arms"] = Table(
    {**TABLES["medical"].columns, "time": "time"},
    tuple(
        (method, "medical-arms", method)
        for method in ALL_ARMS.split(",")
        if (RESULTS / "medical-arms" / "runs" / run_name(method, None if method == BASE else 0)).is_dir()
    ),
)
# folder -> (method, numbers of edits), of the tables of facts taught one at a time
EDITS = {
    # before facts had two keys
    "lifelong": (("smf", (1000,)), ("retrieval", (100, 300, 1000))),
    "lifelong-zsre": (("smf", (100, 998)),),
    "lifelong-pokemqa": (("smf", (100, 300)),),
    "lifelong-counterfact": (("smf", (100, 960)),),
}


def listed(root: Path = RESULTS) -> str:
    """The list of all runs, and what is left."""
    lines, left = [], 0.0
    for runs in RUNS:
        missing = runs.missing(root)
        minutes = runs.minutes * len(missing)
        left += minutes
        state = f"missing {', '.join(missing)} (about {minutes:.0f} min)" if missing else "all there"
        lines.append(f"sparsemem {' '.join(runs.command(root=root))}\n  {state}")
    return "\n".join([*lines, f"left: about {left:.0f} min" if left else "nothing is left"])


def run(root: Path, data_dir: Path | None, folders: str | None, jobs: int) -> None:
    """Run what is missing, each run in a process of its own, the base's first in each folder.

    Args:
        root: the folder of the folders.
        data_dir: for the commands that need it; None: they are left out, which is said.
        folders: comma-separated; None: all.
        jobs: runs at a time.
    """
    bases: dict[str, Future[None]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for runs in RUNS:
            missing = runs.missing(root)
            if not missing or (folders is not None and runs.folder not in folders.split(",")):
                continue
            if runs.needs_data and data_dir is None:
                sys.stderr.write(f"{runs.folder}: needs --data-dir; left out\n")
                continue
            if BASE in missing and runs.folder not in bases:
                bases[runs.folder] = pool.submit(_run_one, runs.only(BASE, "0").command(data_dir, root), None)
            for method, seed in runs.pairs():
                if run_name(method, seed) in missing:
                    one = runs.only(method, str(seed)).command(data_dir, root)
                    pool.submit(_run_one, one, bases.get(runs.folder))


def _run_one(command: list[str], base: Future[None] | None) -> None:
    """Run one command after the run of its base; when it fails, the others go on."""
    if base is not None:
        base.result()
    done = subprocess.run(
        [sys.executable, "-m", "sparsemem", *command], cwd=PROJECT, stderr=subprocess.PIPE, text=True
    )
    sys.stderr.write(f"sparsemem {' '.join(command)}\n  exit {done.returncode}\n")
    if done.returncode:
        sys.stderr.write(done.stderr[-1500:])
    done.check_returncode()


# of the handbook: methods whose answers in contexts and to neighbours are listed
EMBEDDED = ("learn", "smf", "lora", "full")


def made(name: str) -> str:
    """A table of TABLES or EDITS, or "contexts", as Markdown, from the run folders."""
    if name == "contexts":
        return _contexts_table()
    return _edits_table(name) if name in EDITS else _table(TABLES[name])


def _contexts_table() -> str:
    """The handbook's questions in each context, and its neighbours; seed 0."""
    found = [
        read_json(RESULTS / "handbook" / "runs" / run_name(one, 0) / "result.json")["embedded"]
        for one in EMBEDDED
    ]
    lines = [["asked", *EMBEDDED], ["---", *["---:"] * len(EMBEDDED)]]
    for kind in found[0]["contexts"]["parts"]:
        right = [one["contexts"]["parts"][kind]["right"] for one in found]
        lines.append([f"taught, context: {kind}", *(f"{share:.2f} right" for share in right)])
    for kind in found[0]["neighbours"]["parts"]:
        parts = [one["neighbours"]["parts"][kind] for one in found]
        cells = [f"{part['taught']:.2f} taught, {part['changed']:.2f} changed" for part in parts]
        lines.append([f"neighbour: {kind}", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _table(wanted: Table) -> str:
    first = wanted.rows[0][1]
    base = _cells(first, BASE)
    headings = [text.format(base=base.get(column, "")) for column, text in wanted.columns.items()]
    lines = [["method", *headings], ["---", *["---:"] * len(headings)]]
    for label, folder, method in wanted.rows:
        cells = _cells(folder, method)
        lines.append([label, *(cells.get(column, "–") for column in wanted.columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(folder: str, method: str) -> dict[str, str]:
    head, *rows = table(collect(RESULTS / folder))
    return next(dict(zip(head, row, strict=True)) for row in rows if row[0] == method)


def _edits_table(folder: str) -> str:
    shares = ("reliability", "generality", "contexts", "locality", "knowledge", "first_tenth")
    head = [
        "method",
        "edits",
        "reliability",
        "reworded",
        "in contexts",
        "others unchanged",
        "knowledge kept",
        "first tenth",
    ]
    lines = [[*head, "seconds, bytes an edit"], ["---", *["---:"] * len(head)]]
    for method, counts in EDITS[folder]:
        points = _points(folder, method)
        for count in counts:
            point = points[count]
            cells = [f"{100 * point[key]:.1f} %" if key in point else "–" for key in shares]
            cost = f"{point['seconds_per_edit']:.2f}, {point['bytes_per_edit']:,.0f}"
            lines.append([method, f"{count:,}", *cells, cost])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _points(folder: str, method: str) -> dict[int, dict[str, Any]]:
    result = read_json(RESULTS / folder / "runs" / run_name(method, 0) / "result.json")
    return {point["edits"]: point for point in result["points"]}


_PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """A page with each of its tables made again."""
    return _PLACE.sub(lambda found: found[1] + made(found[2]) + found[4], text)


def rebuild() -> None:
    """Write every report and every table of a page again."""
    for folder in sorted({path.parents[2] for path in RESULTS.glob("*/runs/*/result.json")}):
        rebuild_report(folder)
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="The runs behind the tables.")
    parser.add_argument("action", nargs="?", choices=("list", "run", "tables"), default="list")
    parser.add_argument("--data-dir", type=Path, help="folder with zsre.jsonl and counterfact.jsonl")
    parser.add_argument("--root", type=Path, default=RESULTS, help="where runs lie; default: docs/results")
    parser.add_argument("--folders", help="run these alone, comma-separated")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    given = parser.parse_args()
    root, known = given.root.resolve(), {runs.folder for runs in RUNS}
    if unknown := sorted(set((given.folders or "").split(",")) - known - {""}):
        parser.error(f"--folders: {', '.join(unknown)} unknown; use some of {', '.join(sorted(known))}")
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs} must be at least 1")
    if given.action == "run":
        run(root, given.data_dir, given.folders, given.jobs)
    if given.action == "tables" or (given.action == "run" and root == RESULTS):
        rebuild()
    sys.stdout.write(listed(root) + "\n")


if __name__ == "__main__":
    main()
