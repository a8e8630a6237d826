"""Equivalence tests against scipy's one-sided tests, and their power in simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bench.stats.equivalence import equivalence_p, pairs_to_tell


@pytest.mark.parametrize("mean", [-0.4, 0.0, 0.1, 2.0])
def test_the_larger_of_two_one_sided_tests(mean: float) -> None:
    x = np.random.default_rng(1).normal(mean, 0.5, 9)
    above = stats.ttest_1samp(x, -0.3, alternative="greater").pvalue
    below = stats.ttest_1samp(x, 0.3, alternative="less").pvalue
    assert equivalence_p(x, 0.3) == pytest.approx(max(above, below), rel=1e-9)


def test_differences_that_do_not_vary() -> None:
    assert equivalence_p([0.1, 0.1, 0.1], 0.2) == 0
    assert equivalence_p([0.3, 0.3, 0.3], 0.2) == 1
    assert equivalence_p([0.0, 0.0], 0.2) == 0
    assert math.isnan(equivalence_p([0.1], 0.2))


@pytest.mark.parametrize(("spread", "margin", "comparisons"), [(1.0, 0.5, 1), (0.05, 0.05, 1), (1.0, 0.8, 10)])
def test_so_many_pairs_have_the_power(spread: float, margin: float, comparisons: int) -> None:
    def power(pairs: int) -> float:
        rng = np.random.default_rng(pairs)
        draws = rng.normal(0, spread, (3000, pairs))
        return float(np.mean([equivalence_p(row, margin) < 0.05 / comparisons for row in draws]))

    needed = int(pairs_to_tell(spread, margin, comparisons))
    assert 0.76 < power(needed) < 0.93
    assert power(needed - max(1, needed // 8)) < power(needed)


def test_pairs_at_the_ends() -> None:
    assert pairs_to_tell(0.0, 0.1) == 2
    assert math.isinf(pairs_to_tell(1.0, 1e-6))
