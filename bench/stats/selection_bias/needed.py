"""How many selections a paper would need for its ranking to be right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise, product

import numpy as np
from scipy import optimize, special, stats
from scipy.stats import qmc

from bench.stats.estimates import LEVEL, Estimate
from bench.stats.selection_bias.table import Pairs, ScoreTable
from scoring.errors import UserError
from scoring.settings import named

POINTS = 2**13  # quasi-random normal vectors: the number of selections is exact to about 1 %


@dataclass(frozen=True)
class PairNeeded:
    """Number of selections that the order of two algorithms needs; `better` by the mean."""

    better: str
    worse: str
    selections: Estimate


def selections_needed(table: ScoreTable, probability: float = 0.95, level: float = LEVEL) -> Estimate:
    """Number of selections after which the ranking by mean score is right with the given probability.

    The scores of the algorithms on one selection, each the mean of r seeds as in the table, are a normal vector; a
    mean of n selections has 1/n of its covariance. With d_l the difference of neighbours l in the ranking, in standard
    deviations, and z the differences' noise,

        n = min{n: P(sqrt(n) d_l + z_l > 0 for all l) >= probability} = (quantile of max_l (-z_l / d_l))²

    rounded up. The value takes the observed differences as the true ones, and hangs on the smallest: where neighbours
    lie within their noise it would be many times too large (the square of one over a difference near 0). It is nan
    there, and `low` says how many are needed at least; inf where two algorithms are the same.

    The interval is n with all differences at their upper, and at their lower limits (noncentral t). It has its level
    for two algorithms and more than it for several. `high` is inf unless every pair of neighbours differs by a t test.

    Raises:
        UserError: probability is not between 0 and 1.
    """
    _check_probability(probability)
    table = table.complete
    order = np.argsort(-table.means.mean(axis=1), kind="stable").tolist()
    return _needed(Pairs.of(table, list(pairwise(order))), probability, level)


def selections_needed_between(
    table: ScoreTable, groups: Sequence[Sequence[str]], probability: float = 0.95, level: float = LEVEL
) -> Estimate:
    """As `selections_needed`, for the order of groups alone: each algorithm of one is ahead of each of the next.

    With the groups of `separable_groups` this is what a paper needs that ranks no further than it can tell. Groups that
    the same data have made are further apart in them than they are, so the value is rather too small. nan for one
    group.
    """
    _check_probability(probability)
    places = [[table.algorithms.index(name) for name in group] for group in groups]
    index = [pair for better, worse in pairwise(places) for pair in product(better, worse)]
    if not index:
        return Estimate(math.nan, math.nan, math.nan)
    return _needed(Pairs.of(table.complete, index), probability, level)


def selections_needed_pair(
    table: ScoreTable, probability: float = 0.95, level: float = LEVEL
) -> tuple[PairNeeded, ...]:
    """As `selections_needed`, for each pair by itself: n = (z_p sd / |Δ|)², rounded up.

    Δ and sd are the mean and standard deviation of the difference over selections. Says which pairs are the trouble.
    """
    _check_probability(probability)
    needed = []
    for pair in combinations(range(len(table.algorithms)), 2):
        pairs = Pairs.of(table, [pair])
        better, worse = pairs.index[0]
        selections = _needed(pairs, probability, level)
        needed.append(PairNeeded(table.algorithms[better], table.algorithms[worse], selections))
    return tuple(needed)


def noncentrality(observed: np.ndarray, df: np.ndarray | int, level: float) -> np.ndarray:
    """(2, n) limits of the noncentrality λ of observed t: P(t' >= t | low) = P(t' <= t | high) = (1 - level) / 2.

    P(t' <= t) = E Φ(t sqrt(χ² / df) - λ), the mean over the quantiles of χ². Right to 3 digits for any t; scipy's
    distribution gives nan for some.
    """

    def limit(t: float, df: int, tail: float) -> float:
        if not math.isfinite(t):
            return t
        roots = _roots_of_chi2(df)
        ends = min(t * roots[0], t * roots[-1]) - 9, max(t * roots[0], t * roots[-1]) + 9
        return float(
            optimize.brentq(lambda noncentrality: special.ndtr(t * roots - noncentrality).mean() - tail, *ends)
        )

    pairs = list(zip(observed.tolist(), np.broadcast_to(df, observed.shape).tolist(), strict=True))
    return np.array([[limit(t, n, tail) for t, n in pairs] for tail in ((1 + level) / 2, (1 - level) / 2)])


@lru_cache
def _roots_of_chi2(df: int) -> np.ndarray:
    """(500,) quantiles of sqrt(χ² / df)."""
    return np.asarray(np.sqrt(stats.chi2.ppf((np.arange(500) + 0.5) / 500, df) / df))


def _needed(pairs: Pairs, probability: float, level: float) -> Estimate:
    """Selections after which all of these pairs are in order."""
    apart = pairs.standardized
    noise = pairs.factor() / np.where(pairs.deviation > 0, pairs.deviation, 1)
    low, high = noncentrality(pairs.t, pairs.counts - 1, level) / np.sqrt(pairs.counts)
    high = np.where((pairs.deviation == 0) & (pairs.mean == 0), 0.0, high)  # the same algorithm twice
    value, least, most = (_smallest_count(differences, noise, probability) for differences in (apart, high, low))
    return Estimate(value if math.isfinite(most) or math.isinf(least) else math.nan, least, most)


def _smallest_count(apart: np.ndarray, noise: np.ndarray, probability: float) -> float:
    """The smallest number of selections that put all differences on their right side.

    Args:
        apart: (pairs,) differences in standard deviations.
        noise: (q, pairs) factor of their correlation.
    """
    if np.isnan(apart).any():
        return math.nan
    if (apart <= 0).any():
        return math.inf
    if len(apart) == 1:
        root = stats.norm.ppf(probability) / apart[0]
    else:
        root = np.quantile((_normals(len(noise)) @ (noise / apart)).max(axis=1), probability)
    return float(max(np.ceil(max(root, 0.0) ** 2 - 1e-9), 1))


@lru_cache
def _normals(dimensions: int) -> np.ndarray:
    """(POINTS, dimensions) standard normal and evenly spread."""
    return qmc.MultivariateNormalQMC(np.zeros(dimensions), rng=np.random.default_rng(0)).random(POINTS)


def _check_probability(probability: float) -> None:
    if not 0 < probability < 1:
        raise UserError(f"{named('probability')} is {probability}: expected a number between 0 and 1; 0.95 is usual")
