"""A method against the base on the same questions: difference in accuracy with its bootstrap interval.

Choices: questions are resampled, not seeds: the interval says what other questions of the same kind might
have given. Several seeds enter by each question's mean. Resampling n questions is drawing how often each of
their few distinct differences occurs, so that a resample is one multinomial draw whatever n is.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

NUM_RESAMPLES = 10_000
_SEED = 0
_TAILS = (0.025, 0.975)


def against_base(base: Sequence[bool], runs: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """`difference` of the runs' mean accuracy to the base's, its 95 % interval from `low` to `high`, and `n`.

    `base` and each of `runs` (one per seed) hold whether each of the same `n` questions was answered rightly,
    in the same order.

    Raises:
        ValueError: when there are no questions or no runs, or not the same number of questions everywhere.
    """
    lengths = {len(base), *(len(run) for run in runs)}
    if not runs or len(base) == 0 or len(lengths) > 1:
        got = f"the base has {len(base)} and the runs have {[len(run) for run in runs]}"
        raise ValueError(f"every run must have answered the same questions, one or more, but {got}")
    # whole numbers, so that equal differences are equal to the bit
    total = np.sum(np.asarray(runs, dtype=np.int64), axis=0) - len(runs) * np.asarray(base, dtype=np.int64)
    values, counts = np.unique(total, return_counts=True)
    draws = np.random.default_rng(_SEED).multinomial(len(base), counts / len(base), size=NUM_RESAMPLES)
    low, high = np.quantile(draws @ values, _TAILS) / (len(base) * len(runs))
    difference = float(total.sum()) / (len(base) * len(runs))
    return {"difference": difference, "low": float(low), "high": float(high), "n": len(base)}
