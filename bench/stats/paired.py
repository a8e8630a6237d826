"""The size of an effect between paired runs."""

from __future__ import annotations

import math

import numpy as np

from bench.stats.estimates import LEVEL, Estimate
from bench.stats.selection_bias.needed import noncentrality
from bench.stats.selection_bias.table import SAME


def paired_g(differences: np.ndarray, level: float = LEVEL) -> Estimate:
    """Hedges' g of paired differences (n,).

        g = J mean / sd,   J = 1 - 3 / (4 (n - 1) - 1)

    The interval inverts the noncentral t distribution of sqrt(n) mean / sd (Cumming & Finch 2001). J corrects the value
    for its bias; the limits are those of the true effect as they stand, and times J they would miss it more often. nan
    with fewer than three differences, or where they are all the same.
    """
    n = len(differences)
    if n < 3 or (spread := float(differences.std(ddof=1))) <= SAME * max(1.0, float(np.abs(differences).max())):
        return Estimate(math.nan, math.nan, math.nan)
    d = float(differences.mean()) / spread
    correction = 1 - 3 / (4 * (n - 1) - 1)
    limits = noncentrality(np.array([d * math.sqrt(n)]), n - 1, level)[:, 0] / math.sqrt(n)
    return Estimate(correction * d, *map(float, limits))
