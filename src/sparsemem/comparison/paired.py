"""Compare a method with the base model on the same questions: accuracy difference with bootstrap interval.

Choices: questions are resampled, not seeds; the interval shows what other questions of the same kind might
have given. With several seeds, each question counts with its mean. A resample of n questions only needs the
number of times that each distinct difference occurs, so it is a single multinomial draw.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

NUM_RESAMPLES = 10_000
_SEED = 0
_TAILS = (0.025, 0.975)


def against_base(base: Sequence[bool], runs: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """`difference` of the runs' mean accuracy from the base model's, 95 % interval `low` to `high`, and `n`.

    Args:
        base: for each of n questions, whether the base model's answer is correct.
        runs: the same for each run (one per seed), with the same questions in the same order.

    Raises:
        ValueError: there are no questions or no runs, or the numbers of questions differ.
    """
    lengths = {len(base), *(len(run) for run in runs)}
    if not runs or len(base) == 0 or len(lengths) > 1:
        got = f"the base has {len(base)} and the runs have {[len(run) for run in runs]}"
        raise ValueError(f"all runs must answer the same questions, at least one; got: {got}")
    # integers, so that equal differences are exactly equal
    total = np.sum(np.asarray(runs, dtype=np.int64), axis=0) - len(runs) * np.asarray(base, dtype=np.int64)
    values, counts = np.unique(total, return_counts=True)
    draws = np.random.default_rng(_SEED).multinomial(len(base), counts / len(base), size=NUM_RESAMPLES)
    low, high = np.quantile(draws @ values, _TAILS) / (len(base) * len(runs))
    difference = float(total.sum()) / (len(base) * len(runs))
    return {"difference": difference, "low": float(low), "high": float(high), "n": len(base)}
