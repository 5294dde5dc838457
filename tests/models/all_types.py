"""Every causal type of the installed transformers, tried with a memory: `make models`.

    python tests/models/all_types.py docs/results/models.jsonl docs/models.md [TYPE ...]

The first file gets one line a type, with the version of transformers; types that it has for this version are
left out, so a stopped run continues. Types that are named are tried again. The page is made from the file.
Exit 1 if a type fails.
"""

import json
import logging
import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from checks import examine
from tinies import OTHERS, causal_types

import sparsemem.data.asked
from sparsemem.provenance import environment

SECONDS, BYTES = 900, 8 << 30
COMMAND = "make models"
PAGE = """# Models

Which causal language models of transformers carry a memory. Each type was tried as a tiny random model of
its own config class: insertion, calibration, `finetune` by both ways of writing, `learn`, save and load,
generation with and without a cache and with padding, batches of several adapters, bfloat16, and the laws that
belong to them.

{summary}

`finetune` and `learn`: works, refused (in one sentence, below), or fails. "own": the model has no norm after
its last block, so each memory layer writes at its own MLP (`write="own"`), and `learn` is refused. Reads: the
part of a block whose input the memory reads. Since: the oldest version of transformers with which the type
was tried and passed. What the base model does not do without a memory either stands in the last column.

| type | `finetune` | `learn` | reads | since | the base model itself |
| --- | --- | --- | --- | --- | --- |
{rows}

## Refused

{refused}

## Not tried

{skipped}

Made by `{command}` (`tests/models/all_types.py`) from `docs/results/models.jsonl`: {source}.
"""


def try_all(out: Path, names: list[str]) -> None:
    """Append one line for each type that the file lacks; types in `names` are tried again."""
    version = transformers.__version__
    have = {line["type"] for line in read(out) if line["transformers"] == version}
    for name in names or [name for name in [*causal_types(), *OTHERS] if name not in have]:
        start = time.time()
        # a process of its own: some types end it or fill the memory
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
            try:
                found = pool.submit(alone, name).result()
            except BrokenProcessPool:
                found = {"type": name, "finetune": "fails: the process ended", "learn": "fails: not reached"}
        source = {"transformers": version, "commit": environment()["commit"]}
        line = json.dumps(found | source | {"seconds": round(time.time() - start)})
        sys.stdout.write(f"{line}\n")
        with out.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def alone(name: str) -> dict[str, object]:
    """All checks of one type, with limits of time and memory, as a line of the file."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.alarm(SECONDS)
    # random states say little of what is asked, so few relations will do
    sparsemem.data.asked.LEAST_RELATIONS = 6
    return shortened(examine(name))


def shortened(found: dict) -> dict[str, object]:
    """One line: works, refused or fails, with what is special."""
    line = {key: found[key] for key in ("type", "class", "reads") if key in found}
    if "skip" in found:
        return line | {"skip": found["skip"]}
    line["base"] = found["base"]
    checks = {
        f"{write} {key}": result for write in ("last", "own") for key, result in found.get(write, {}).items()
    }
    failed = {key: result for key, result in checks.items() if result.startswith("FAIL")}
    refused = [result for result in checks.values() if result.startswith("refused")]
    if failed:
        line["finetune"], line["failed"] = f"fails: {next(iter(failed.values()))}", failed
    elif refused:
        line["finetune"] = refused[0]
    else:
        line["finetune"] = "own" if checks["last insert"] != "ok" else "works"
    learn = found["learn"]
    for ours, told in (("ok", "works"), ("FAIL", "fails:")):
        learn = f"{told}{learn.removeprefix(ours)}" if learn.startswith(ours) else learn
    line["learn"] = learn
    return line


def read(file: Path) -> list[dict]:
    """The lines of a file, the last of each type and version; [] if there is none."""
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.exists() else ())
    return list({(line["type"], line["transformers"]): line for line in lines}.values())


def passes(line: dict) -> bool:
    return not any(line.get(key, "").startswith("fails") for key in ("finetune", "learn"))


def page(lines: list[dict]) -> str:
    """The page of the lines of a file; a type has the result of the newest version."""
    by_version = sorted(lines, key=lambda line: [int(part) for part in line["transformers"].split(".")[:2]])
    newest = {line["type"]: line for line in by_version}
    since = {line["type"]: line["transformers"] for line in reversed(by_version) if passes(line)}
    tried = {name: line for name, line in sorted(newest.items()) if "skip" not in line}
    rows, refused, kinds, alone = [], [], Counter(), 0
    for name, line in tried.items():
        told = [line[key].split(":")[0].split(" (")[0] for key in ("finetune", "learn")]
        whys = {line[key] for key in ("finetune", "learn") if line[key].startswith(("refused", "fails"))}
        refused += [f"- `{name}`: {why.removeprefix('refused (').removesuffix(')')}" for why in sorted(whys)]
        kind = "fail" if not passes(line) else "are refused" if told[0] == "refused" else "work"
        kinds[kind] += 1
        alone += told[0] != "refused" and told[1] == "refused"
        base = "; ".join(dict.fromkeys(line["base"].values()))
        rows.append(
            f"| {name} | {told[0]} | {told[1]} | {line.get('reads', '')} | {since.get(name, '')} | {base} |"
        )
    skipped = [f"- `{name}`: {line['skip']}" for name, line in sorted(newest.items()) if "skip" in line]
    counted = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    versions = sorted({line["transformers"] for line in lines})
    commits = sorted({str(line["commit"])[:7] for line in newest.values()})
    return PAGE.format(
        summary=f"Of {len(tried)} types, {counted}; {alone} of those that work do by `finetune` alone. "
        f"{len(skipped)} were not tried.",
        rows="\n".join(rows),
        refused="\n".join(refused) or "None.",
        skipped="\n".join(skipped) or "None.",
        command=COMMAND,
        source=f"transformers {', '.join(versions)}; commit {', '.join(commits)}",
    )


def main(out: Path, to: Path, names: list[str]) -> int:
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try_all(out, names)
    lines = read(out)
    to.write_text(page(lines), encoding="utf-8")
    failed = [line["type"] for line in lines if not passes(line)]
    sys.stdout.write(
        f"{len(failed)} of {len(lines)} fail: {', '.join(failed)}\n" if failed else "none fails\n"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
