"""The figures of benchmarks/speed.py as Markdown: goals, ratios, medians."""

from typing import Any

# What is measured, its row and ratio, the goal, and whether the ratio should be at most that.
TARGETS = (
    ("`own`, whole step / LoRA's", "step", "own_to_lora", 0.6, True),
    ("`own`, whole step / dense-mask twin's", "step", "own_to_dense_mask", 0.8, True),
    ("the same, one layer of 262,144 slots", "dense_mask", "own_to_dense_mask", 0.25, True),
    ("`last`, cached states, step / LoRA's", "step", "last_cached_to_lora", 0.1, True),
    ("`last`, not cached, step / LoRA's", "step", "last_to_lora", 0.5, True),
    (
        "row optimizer / dense AdamW, 1,048,576 slots, d 576",
        "optimizer",
        "rows_to_dense_1048576_d576",
        1 / 200,
        True,
    ),
    ("whole `own` step, 1,048,576 / 4,096 slots", "growth", "whole_step_1048576_to_4096", 1.3, True),
    ("one layer's step, 1,048,576 / 4,096 slots", "growth", "1048576_to_4096", 1.3, True),
    ("forward pass with memory (`own`) / base", "reading", "forward_own_to_base", 1.05, True),
    ("the same, `last`", "reading", "forward_last_to_base", 1.05, True),
    ("tokens a second (`own`) / base, batch 1", "reading", "tokens_per_second_1_own_to_base", 0.95, False),
    ("the same, batch 16", "reading", "tokens_per_second_16_own_to_base", 0.95, False),
    ("tokens a second (`last`) / base, batch 1", "reading", "tokens_per_second_1_last_to_base", 0.95, False),
    ("the same, batch 16", "reading", "tokens_per_second_16_last_to_base", 0.95, False),
)


def _target(found: dict[str, Any], what: str, row: str, ratio: str, goal: float, at_most: bool) -> str:
    value = found[row]["ratios"][ratio]
    met = value <= goal if at_most else value >= goal
    return f"| {what} | {'<=' if at_most else '>='} {goal:g} | {value:.3g} | {'met' if met else 'missed'} |"


def table(found: dict[str, Any], titles: dict[str, str]) -> str:
    """Goals, ratios and medians of all rows as Markdown; `titles` says what each row measures."""
    lines = [
        "# Speed",
        "",
        "Made by `make bench` (benchmarks/speed.py). CPU seconds, medians. See speed.json. A load above 1",
        "means that other work ran on the two cores at the same time. Why goals are missed: dev/LOG.md,",
        "section 18.",
        "",
        "| ratio | goal | measured | |",
        "| --- | --- | --- | --- |",
        *(_target(found, *one) for one in TARGETS if one[2] in found.get(one[1], {}).get("ratios", {})),
        "",
    ]
    for name, row in found.items():
        where = f"commit {str(row['commit'])[:10]}, {row['machine']}, load {row['load']:.0f}"
        lines += [
            f"## {name}",
            "",
            f"{titles[name]} {where}.",
            "",
            "| figure | value |",
            "| --- | --- |",
        ]
        figures = {
            **row["ratios"],
            **{f"{k} (s)": v for k, v in row["seconds"].items()},
            **row.get("speed", {}),
            **{f"{k} (GiB)": v for k, v in row.get("gigabytes", {}).items()},
        }
        lines += [*(f"| {key} | {value:.4g} |" for key, value in figures.items()), ""]
    return "\n".join(lines)


def compare(now: dict[str, Any], before: dict[str, Any]) -> str:
    """Each median of one file divided by that of another, one line each."""
    lines = [
        f"{name} {key}: {seconds / before[name]['seconds'][key]:.3f}"
        for name, row in now.items()
        for key, seconds in row["seconds"].items()
        if key in before.get(name, {}).get("seconds", {})
    ]
    return "".join(f"{line}\n" for line in lines)
