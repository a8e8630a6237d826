"""Is a difference smaller than what matters? Two one-sided tests of paired differences (Schuirmann 1987).

Not to find a difference says nothing where few pairs vary much. Equivalence is a claim of its own: both "the mean is at
most minus the margin" and "it is at least the margin" are rejected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from bench.stats.estimates import LEVEL, ROUNDING

POWER = 0.8
MOST_PAIRS = 100_000


def equivalence_p(differences: Sequence[float] | np.ndarray, margin: float) -> float:
    """The larger p of the two one-sided t tests of a mean beyond -margin or margin.

    Where the differences do not vary it is 0 or 1, by what they are; nan for fewer than two.
    """
    x = np.asarray(differences, dtype=float)
    if len(x) < 2:
        return math.nan
    mean = float(x.mean())
    if np.ptp(x) <= ROUNDING * max(1.0, abs(mean)):
        return 0.0 if abs(mean) < margin else 1.0
    error = float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(stats.t.sf((margin - abs(mean)) / error, len(x) - 1))


def pairs_to_tell(spread: float, margin: float, comparisons: int = 1) -> float:
    """How many pairs it takes to show, with a power of 80 %, that a difference of zero is smaller than the margin:

        n = ((t_{1-alpha, n-1} + t_{(1+power)/2, n-1}) s / margin)^2,  alpha = 5 % / comparisons.

    Args:
        spread: standard deviation of the differences.
        comparisons: how many are made together.

    Returns:
        A whole number of at least 2; inf beyond MOST_PAIRS.
    """
    alpha = (1 - LEVEL) / comparisons
    n = 2
    while n <= MOST_PAIRS:
        quantiles = stats.t.ppf(1 - alpha, n - 1) + stats.t.ppf((1 + POWER) / 2, n - 1)
        needed = (quantiles * spread / margin) ** 2
        if needed <= n:
            return n
        n = max(n + 1, min(math.ceil(needed), math.ceil(1.2 * n)))
    return math.inf
