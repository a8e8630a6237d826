"""Numbers with intervals: rank correlations, effect sizes and means.

Intervals over samples are bootstrap intervals: they resample the samples with replacement and are bias-corrected and
accelerated (BCa, Efron 1987); where BCa is not defined, because a resample or the jackknife does not vary, the
percentile interval stands in. Fewer than FEWEST samples give a value without an interval. The same data and seed give
the same interval. Intervals of means of few samples and of a few runs are Student's t intervals, as a bootstrap of so
few is too narrow.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.95
FEWEST = 10  # samples (of the smaller group): resamples of fewer are too alike, and the interval too narrow
FEW_FOR_BCA = 20  # of a mean
NUMBERS_IN_MEMORY = 4_000_000  # at a time: the jackknife of BCa alone is N resamples of N - 1
ROUNDING = 1e-12  # repeats whose range is at most that, in units of their mean, do not vary


@dataclass(frozen=True)
class Estimate:
    """A number and the confidence interval around it; nan where the data do not determine it."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """+1 or -1 where the whole interval lies on one side of 0; 0 where it does not, or is not known."""
        return int(self.low > 0) - int(self.high < 0)

    def within(self, least: float, most: float) -> Estimate:
        """The same, with the interval cut at what the number can be at all, but not short of the value; nan stays."""
        low, high = max(self.low, least), min(self.high, most)
        return Estimate(self.value, min(low, self.value), max(high, self.value))


class Resampled(Estimate):
    """An estimate whose interval is by resampling.

    Attributes:
        at: gives the same number with its interval at another level of confidence, from the same resamples. It is not a
            field of the dataclass, so that what writes estimates down sees numbers alone.
    """

    at: Callable[[float], Estimate]

    def __init__(self, value: float, low: float, high: float, at: Callable[[float], Estimate]) -> None:
        super().__init__(value, low, high)
        object.__setattr__(self, "at", at)


def spearman(x: np.ndarray, y: np.ndarray, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Estimate:
    """Spearman's rank correlation of two (N,) arrays: Pearson's, of the ranks, ties sharing their mean rank."""
    return _bootstrapped(rank_correlation, (x, y), True, resamples, level, seed)


def rank_correlation(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Spearman's rank correlation without an interval, along an axis; nan where x or y does not vary."""
    return _pearson(_centred_ranks(x, axis), _centred_ranks(y, axis), axis)


def rank_share_correlation(
    x: np.ndarray, y: np.ndarray, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """Pearson's correlation of the ranks of x with y itself, both (N,). For a y that is nearly the same for most, such
    as how often something rare happens: ranks would make an order of differences that mean nothing."""

    def correlation(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return _pearson(_centred_ranks(x, axis), y - y.mean(axis=axis, keepdims=True), axis)

    return _bootstrapped(correlation, (x, y), True, resamples, level, seed)


def partial_spearman(
    x: np.ndarray,
    y: np.ndarray,
    z: np.ndarray,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Rank correlation of x and y with z partialled out, all (N,).

    Ranks are regressed on the ranks of z, and the residuals are correlated, which is the same as

        r_xy.z = (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2))

    with r the Spearman correlations. A two-valued x (a level) compares its two groups. Only what is linear in the
    ranks of z is removed; nan where x or y has the same ranks as z.
    """
    return _bootstrapped(_partial_spearman, (x, y, z), True, resamples, level, seed)


def mean(x: np.ndarray, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Estimate:
    """The mean of (N,). Of up to FEW_FOR_BCA samples the interval is Student's: BCa's covers 90 % at 10 to 14."""
    if FEWEST <= len(x) <= FEW_FOR_BCA:
        return t_interval(x, level)
    return _bootstrapped(_mean, (x,), True, resamples, level, seed)


def mean_difference(
    x: np.ndarray, y: np.ndarray, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """mean(y) - mean(x) of two independent groups, (N,) and (M,); each group is resampled by itself."""
    return _bootstrapped(_mean_difference, (x, y), False, resamples, level, seed)


def hedges_g(x: np.ndarray, y: np.ndarray, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Estimate:
    """Hedges' g of two independent groups, (N,) and (M,), positive where y is larger.

        g = (1 - 3 / (4 (N + M) - 9)) (mean(y) - mean(x)) / s,
        s^2 = ((N - 1) s_x^2 + (M - 1) s_y^2) / (N + M - 2)

    The difference in pooled standard deviations, corrected for the bias of small groups (Hedges 1981).
    """
    return _bootstrapped(_hedges_g, (x, y), False, resamples, level, seed)


def t_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Estimate:
    """The mean of a few values and Student's t interval: mean ± t_{(1 + level) / 2, n - 1} s / sqrt(n).

    The ends are nan for one value, and all is nan for none.
    """
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Estimate(float(x[0]) if len(x) else math.nan, math.nan, math.nan)
    value = float(x.mean())
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Estimate(value, value - half, value + half)


def t_test(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> tuple[Estimate, float]:
    """The mean of independent runs with its t interval, and the two-sided p of a mean of 0.

    nan where the data do not determine them: for a single value, and for values that do not vary, as shares of few
    samples may not by chance.
    """
    x = np.asarray(values, dtype=float)
    estimate = t_interval(x, level)
    if len(x) < 2 or np.ptp(x) <= ROUNDING * max(1.0, abs(estimate.value)):
        return Estimate(estimate.value, math.nan, math.nan), math.nan
    return estimate, float(stats.ttest_1samp(x, 0.0).pvalue)


def over_seeds(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Estimate:
    """The mean of runs that differ by their seed, with its t interval; no interval where they do not vary."""
    return t_test(values, level)[0]


def geometric_mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """The geometric mean of positive numbers from a few repeats, with the t interval of their logarithms."""
    return exponential(t_interval(np.log(values)))


def exponential(estimate: Estimate) -> Estimate:
    """A number that was estimated by its natural logarithm."""
    return Estimate(*np.exp([estimate.value, estimate.low, estimate.high]).tolist())


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """p values, (N,), corrected for their number (Holm 1979). One that is nan stays nan, and counts."""
    values = np.asarray(p, dtype=float)
    order = np.argsort(values)  # nan last
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1)
    return corrected


def over_samples(
    statistic: Callable[[np.ndarray], float],
    count: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Any statistic of a set of samples, with its interval.

    Args:
        statistic: takes the positions of the samples to use, (n,) integers with repetitions.
        count: number of samples.
    """

    def of_rows(rows: np.ndarray, axis: int) -> np.ndarray:
        return np.apply_along_axis(lambda row: np.asarray(statistic(row.astype(int))), axis, rows)

    return _bootstrapped(of_rows, (np.arange(count),), True, resamples, level, seed)


def over_sets(
    statistic: Callable[[list[np.ndarray]], np.ndarray],
    counts: Sequence[int],
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """A statistic of several sets of samples, each resampled by itself, with its interval.

    A set is resampled once for all that the statistic takes from it, so averages and differences of paired values
    have the interval of paired values.

    Args:
        statistic: takes the positions of the samples to use, (..., n) integers with repetitions for each set, and
            reduces the last axis.
        counts: number of samples of each set.
    """

    def of_rows(*rows: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(statistic([row.astype(int) for row in rows]), dtype=float)

    return _bootstrapped(of_rows, tuple(map(np.arange, counts)), False, resamples, level, seed)


def _bootstrapped(
    statistic: Callable[..., np.ndarray],
    groups: tuple[np.ndarray, ...],
    paired: bool,
    resamples: int,
    level: float,
    seed: int,
) -> Estimate:
    """A statistic and its interval.

    Args:
        statistic: takes the groups and `axis`, and reduces that axis.
        groups: (N,) each; of one length if `paired`.
    """
    groups = tuple(np.asarray(group, dtype=float) for group in groups)
    if paired and len({len(group) for group in groups}) != 1:
        raise ValueError(f"paired samples of different lengths: {', '.join(str(len(group)) for group in groups)}")
    smallest = min(len(group) for group in groups)
    if smallest < 2:
        return Estimate(math.nan, math.nan, math.nan)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # Resamples that do not determine the statistic are dealt with below.
        warnings.simplefilter("ignore")
        value = float(statistic(*groups, axis=-1))
    if smallest < FEWEST:
        return Estimate(value, math.nan, math.nan)
    drawn: Any = None

    def at(level: float) -> Estimate:
        nonlocal drawn
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = stats.bootstrap(
                groups,
                statistic,
                paired=paired,
                n_resamples=0 if drawn else resamples,
                bootstrap_result=drawn,
                confidence_level=level,
                method="BCa",
                vectorized=True,
                batch=max(1, NUMBERS_IN_MEMORY // max(len(group) for group in groups)),
                rng=np.random.default_rng(seed),
            )
        low, high = float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)
        if math.isfinite(low) and math.isfinite(high):
            return Resampled(value, low, high, at)
        # The percentile interval, from the resamples that determine the statistic: a few may hold one value only.
        finite = drawn.bootstrap_distribution[np.isfinite(drawn.bootstrap_distribution)]
        if not (math.isfinite(value) and len(finite) > resamples / 2):
            return Resampled(value, math.nan, math.nan, at)
        low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2]).tolist()
        return Resampled(value, low, high, at)

    return at(level)


def _partial_spearman(x: np.ndarray, y: np.ndarray, z: np.ndarray, axis: int) -> np.ndarray:
    x, y, z = (_centred_ranks(values, axis) for values in (x, y, z))
    return _pearson(_residual(x, z, axis), _residual(y, z, axis), axis)


def _centred_ranks(values: np.ndarray, axis: int) -> np.ndarray:
    ranks = stats.rankdata(values, axis=axis)
    return ranks - ranks.mean(axis=axis, keepdims=True)


def _residual(values: np.ndarray, z: np.ndarray, axis: int) -> np.ndarray:
    """What remains of centred values after the regression on centred z; exactly 0 where only rounding remains."""
    slope = (values * z).sum(axis=axis, keepdims=True) / (z * z).sum(axis=axis, keepdims=True)
    residual = values - slope * z
    rounding = (residual**2).sum(axis=axis, keepdims=True) < 1e-12 * (values**2).sum(axis=axis, keepdims=True)
    return np.where(rounding, 0.0, residual)


def _pearson(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    """Pearson's correlation of centred values; nan where one of them does not vary."""
    return (x * y).sum(axis=axis) / np.sqrt((x * x).sum(axis=axis) * (y * y).sum(axis=axis))


def _mean(x: np.ndarray, axis: int) -> np.ndarray:
    return x.mean(axis=axis)


def _mean_difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    return y.mean(axis=axis) - x.mean(axis=axis)


def _hedges_g(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    n, m = x.shape[axis], y.shape[axis]
    pooled = ((n - 1) * x.var(axis=axis, ddof=1) + (m - 1) * y.var(axis=axis, ddof=1)) / (n + m - 2)
    correction = 1 - 3 / (4 * (n + m) - 9)
    return correction * _mean_difference(x, y, axis) / np.sqrt(pooled)
