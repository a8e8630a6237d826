"""Correlations and effect sizes against independent computations, and the coverage of their intervals."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from bench.stats.estimates import (
    Estimate,
    geometric_mean,
    hedges_g,
    mean,
    mean_difference,
    over_samples,
    over_seeds,
    partial_spearman,
    spearman,
    t_interval,
    t_test,
)


def correlated(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and y that share z, with ties in z, as lengths have them."""
    z = rng.integers(20, 40, count).astype(float)
    x = 0.2 * z + rng.normal(size=count)
    y = 0.1 * z + 0.5 * x + rng.normal(size=count)
    return x, y, z


def test_spearman_is_scipys_with_ties():
    x, y, z = correlated(np.random.default_rng(0), 60)
    assert spearman(x, z).value == pytest.approx(stats.spearmanr(x, z).statistic, abs=1e-12)
    assert spearman(x, y).value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_partial_spearman_is_the_residual_correlation_of_ranks():
    x, y, z = correlated(np.random.default_rng(1), 60)
    rx, ry, rz = (stats.rankdata(values) for values in (x, y, z))
    design = np.stack([np.ones_like(rz), rz], axis=1)
    left = [ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0] for ranks in (rx, ry)]
    assert partial_spearman(x, y, z).value == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-10)
    r = stats.spearmanr(np.stack([x, y, z], axis=1)).statistic
    formula = (r[0, 1] - r[0, 2] * r[1, 2]) / math.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert partial_spearman(x, y, z).value == pytest.approx(formula, abs=1e-10)


def test_partial_spearman_by_hand():
    # Ranks: r_xy = 1 - 6 (0 + 1 + 1 + 0) / (4 * 15) = 0.8, r_xz = 1 - 6 (1 + 1 + 1 + 1) / 60 = 0.6,
    # r_yz = 1 - 6 (1 + 4 + 4 + 1) / 60 = 0. So (0.8 - 0) / sqrt((1 - 0.36) * 1) = 0.8 / 0.8 = 1.
    x, y, z = np.array([1, 2, 3, 4]), np.array([1, 3, 2, 4]), np.array([2, 1, 4, 3])
    assert partial_spearman(x, y, z, resamples=99).value == pytest.approx(1.0)


def test_what_z_explains_wholly_has_no_partial_correlation():
    z = np.arange(30.0)
    assert math.isnan(partial_spearman(z, np.random.default_rng(0).normal(size=30), z).value)
    # y follows z up to noise of its own, x does too: nothing is left between them.
    rng = np.random.default_rng(2)
    z = rng.normal(size=1000)
    found = partial_spearman(z + rng.normal(size=1000), z + rng.normal(size=1000), z)
    assert abs(found.value) < 0.1
    assert found.sign == 0


def test_hedges_g_by_hand():
    # Means 2 and 5, variances 1 and 1, so s = 1 and d = 3; the correction is 1 - 3 / (4 * 6 - 9) = 0.8.
    assert hedges_g(np.array([1, 2, 3]), np.array([4, 5, 6])).value == pytest.approx(2.4)
    # Unequal groups: variances 2 (N = 2) and 1 (M = 3), s^2 = (2 + 2) / 3, difference 3, 1 - 3 / 11.
    expected = (1 - 3 / 11) * 3 / math.sqrt(4 / 3)
    assert hedges_g(np.array([1, 3]), np.array([4, 5, 6])).value == pytest.approx(expected)
    assert mean_difference(np.array([1, 3]), np.array([4, 5, 6])).value == pytest.approx(3.0)


def test_exchanging_the_groups_flips_the_sign():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=40), rng.normal(1.0, size=50)
    there, back = hedges_g(x, y), hedges_g(y, x)
    assert there.value == pytest.approx(-back.value)
    assert (there.sign, back.sign) == (1, -1)


def test_intervals_are_reproducible_and_contain_the_value():
    x, y, z = correlated(np.random.default_rng(4), 50)
    for found in (spearman(x, y), partial_spearman(x, y, z), mean(x), mean_difference(x, y), hedges_g(x, y)):
        assert found.low < found.value < found.high
    assert spearman(x, y, seed=5) == spearman(x, y, seed=5)
    assert spearman(x, y, seed=5) != spearman(x, y, seed=6)


def test_over_samples_repeats_a_known_statistic():
    x = np.random.default_rng(5).normal(size=40)
    found, known = over_samples(lambda rows: x[rows].mean(), len(x)), mean(x)
    assert found.value == pytest.approx(known.value)
    assert found.low == pytest.approx(known.low, abs=0.02)
    assert found.high == pytest.approx(known.high, abs=0.02)


def test_too_little_data_is_nan_not_an_error():
    assert math.isnan(spearman(np.array([1.0]), np.array([2.0])).value)
    flat = spearman(np.ones(10), np.arange(10.0))
    assert math.isnan(flat.value)
    assert flat.sign == 0
    assert Estimate(1.0, math.nan, math.nan).sign == 0
    few = spearman(np.arange(4.0), np.array([1.0, 2.0, 4.0, 3.0]))
    assert few.value == pytest.approx(0.8)
    # Every resample of three samples in order is in order: no evidence of certainty.
    assert math.isnan(spearman(np.arange(3.0), np.arange(3.0)).low)


def test_unequal_pairs_are_refused():
    with pytest.raises(ValueError, match="3, 4"):
        spearman(np.arange(3.0), np.arange(4.0))


def test_t_interval_by_hand():
    # s = sqrt(2.5), and t_{0.975, 4} = 2.776445 in printed tables.
    estimate = t_interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert dataclasses.astuple(estimate) == pytest.approx((3, 3 - half, 3 + half), rel=1e-6)
    assert (estimate.sign, t_interval([1.0, 1.1, 0.9]).sign, t_interval([-2.0, -2.0]).sign) == (1, 1, -1)
    assert math.isnan(t_interval([7.0]).low)
    assert t_interval([7.0]).value == 7
    assert math.isnan(t_interval([]).value)


def test_runs_that_differ_by_their_seed_have_that_interval():
    values = [1.0, 2.0, 4.0]
    assert over_seeds(values) == t_test(values)[0] == t_interval(values)
    # Runs that are all the same do not show how much others would differ.
    assert over_seeds([2.0, 2.0]).value == 2
    assert math.isnan(over_seeds([2.0, 2.0]).low)
    of_logs = t_interval(np.log(values))
    assert geometric_mean(values).high == pytest.approx(math.exp(of_logs.high))


# --- Coverage: the share of simulated data sets whose 95 % interval contains the truth ------------------------

SIMULATIONS = 300
COUNT = 40  # samples of forget10


def coverage(simulate, truth: float) -> float:
    rng = np.random.default_rng(0)
    found = [simulate(rng) for _ in range(SIMULATIONS)]
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in found]))


def normal_spearman(rho: float) -> float:
    """Spearman's correlation of a bivariate normal distribution with Pearson's rho."""
    return 6 / math.pi * math.asin(rho / 2)


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_coverage_of_spearman(rho):
    def simulate(rng):
        x, y = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], COUNT).T
        return spearman(x, y, resamples=499)

    assert 0.90 <= coverage(simulate, normal_spearman(rho)) <= 0.98


@pytest.mark.slow
def test_coverage_of_partial_spearman():
    covariance = np.array([[1, 0.6, 0.5], [0.6, 1, 0.4], [0.5, 0.4, 1]])
    xy, xz, yz = (normal_spearman(covariance[i, j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    truth = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))

    def simulate(rng):
        return partial_spearman(*rng.multivariate_normal(np.zeros(3), covariance, COUNT).T, resamples=499)

    assert 0.90 <= coverage(simulate, truth) <= 0.98


def test_coverage_of_group_differences():
    def groups(rng):
        return rng.normal(0.0, 2.0, COUNT // 2), rng.normal(1.6, 2.0, COUNT // 2)

    assert 0.90 <= coverage(lambda rng: hedges_g(*groups(rng), resamples=499), 0.8) <= 0.98
    assert 0.90 <= coverage(lambda rng: mean_difference(*groups(rng), resamples=499), 1.6) <= 0.98


def test_the_mean_of_few_samples_has_students_interval():
    x = np.random.default_rng(0).normal(size=12)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (mean(x).low, mean(x).high) == pytest.approx((expected.low, expected.high))
    assert math.isnan(mean(x[:9]).low)
