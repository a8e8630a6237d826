"""How much a ranking of algorithms depends on the selection, and which of its places are certain."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy import special, stats

from bench.stats.estimates import LEVEL, Estimate, holm
from bench.stats.selection_bias.needed import noncentrality
from bench.stats.selection_bias.table import SAME, Pairs, ScoreTable, mean_scores, ratio

DRAWS = 500


@dataclass(frozen=True)
class Reversal:
    """How often the worse of two algorithms comes out ahead.

    Attributes:
        better, worse: by the mean over all selections; in the order of the table if the means are equal.
        rate: share of selections on which `worse` is ahead in the mean over the seeds.
        difference: mean of better - worse over selections, in units of the score.
        by_seeds: the rate that seed noise alone would give; None with one seed.
        p_value: of "`better` is better, and yet behind more often than the seeds explain", corrected for the number of
            pairs; nan with one seed, which cannot be told from the selection.
        at_most: the most that the rate can be, for all pairs at once, if differences are normal.
    """

    better: str
    worse: str
    rate: Estimate
    difference: Estimate
    by_seeds: float | None
    p_value: float
    at_most: float


@dataclass(frozen=True)
class Concordance:
    """Kendall's W as observed, and the agreement that it estimates: mean rank correlation of two selections."""

    w: float
    agreement: Estimate


@dataclass(frozen=True)
class SeparablePair:
    """Whether two algorithms can be told apart.

    Attributes:
        difference: mean of better - worse over selections; the interval is that of this pair alone.
        p_value: two-sided, corrected for the number of pairs.
        separable: p_value is below 1 - level. An interval without 0 does not suffice where there are several pairs.
    """

    better: str
    worse: str
    difference: Estimate
    p_value: float
    separable: bool


@dataclass(frozen=True)
class Rank:
    """The ranks that an algorithm can have, 1 the best, and its mean over all selections."""

    algorithm: str
    mean: Estimate
    best: int
    worst: int

    @property
    def text(self) -> str:
        return str(self.best) if self.best == self.worst else f"{self.best}–{self.worst}"


@dataclass(frozen=True)
class Ranking:
    """Algorithms from the best mean to the worst, and the pairs the ranks come from, in the order of the table."""

    ranks: tuple[Rank, ...]
    pairs: tuple[SeparablePair, ...]


def reversal_rates(table: ScoreTable, level: float = LEVEL) -> tuple[Reversal, ...]:
    """Of each pair, how often the algorithm that is worse on average comes out ahead on a single selection.

    The rate estimates P(the worse is ahead on a new selection), ties counted as one half, with "worse" by the mean
    over all selections that could be drawn. It can be above 1/2 where few selections decide the mean. The interval is
    Wilson's if the interval of the mean difference is on one side of 0. If it is not, which one is worse is not known
    either: the interval then spans Wilson's for both directions, from min(low, 1 - high) to max(high, 1 - low).

    Seed noise alone would give Φ(-|Δ| / sqrt((σ_1² + σ_2²) / r)), with Δ the mean difference and σ² the variance of
    each algorithm's runs on one selection. `p_value` is the larger of two, of the paired t test and of the binomial
    test of that rate, corrected by Holm. `at_most` is Φ(-δ) with δ the lower limit of Δ in standard deviations
    (noncentral t, Bonferroni's level): counts of a dozen selections cannot show that reversals are rare, sizes can.
    """
    pairs = Pairs.of(table)
    least_apart = noncentrality(pairs.t, pairs.counts - 1, 1 - (1 - level) / len(pairs.index))[0]
    least_apart = least_apart / np.sqrt(pairs.counts)
    most = special.ndtr(-np.where((pairs.deviation == 0) & (pairs.mean == 0), 0.0, least_apart))
    noise = _noise_of_means(table) if table.seeds > 1 else None
    reversals: list[Reversal] = []
    p = np.full(len(pairs.index), np.nan)
    for k, (better, worse) in enumerate(pairs.index):
        difference = pairs.interval(k, level)
        if not math.isfinite(pairs.mean[k]):
            continue
        s = int(pairs.counts[k])
        worse_ahead = np.nansum(1 - np.sign(pairs.values[:, k])) / 2
        rate = wilson(float(worse_ahead), s, level)
        if not difference.sign:
            rate = Estimate(rate.value, min(rate.low, 1 - rate.high), max(rate.high, 1 - rate.low))
        by_seeds = None
        if noise is not None:
            by_seeds = float(special.ndtr(-ratio(pairs.mean[k], np.sqrt(noise[better] + noise[worse]))))
            of_rate = 2 * stats.binom.sf(math.floor(worse_ahead) - 1, s, by_seeds)
            p[k] = min(max(pairs.p[k], of_rate), 1.0)
        names = table.algorithms[better], table.algorithms[worse]
        reversals.append(Reversal(*names, rate, difference, by_seeds, math.nan, float(most[k])))
    corrected = holm(p)[np.isfinite(pairs.mean)]
    return tuple(replace(reversal, p_value=float(value)) for reversal, value in zip(reversals, corrected, strict=True))


def _noise_of_means(table: ScoreTable) -> np.ndarray:
    """(a,): the variance that seeds give to a mean over the seeds of a selection."""
    runs = np.isfinite(table.values).sum(axis=2)
    squares = np.nansum((table.values - table.means[..., None]) ** 2, axis=(1, 2))
    of_run = squares / np.maximum(runs - 1, 0).sum(axis=1)
    there = runs > 0
    return np.asarray(of_run * (there / np.maximum(runs, 1)).sum(axis=1) / there.sum(axis=1))


def wilson(successes: float, trials: int, level: float = LEVEL) -> Estimate:
    """A proportion with Wilson's interval; successes may be halves, which ties are.

    Ends next to 0 and 1 are set from the Poisson distribution, without which the interval misses proportions near 0
    one time in six (Brown, Cai & DasGupta 2001, section 4.1.1).
    """
    z = stats.norm.ppf((1 + level) / 2)
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    near = 2 if trials <= 50 else 3

    def end_near_zero(count: float, wilsons: float) -> float:
        """The end of the interval that is nearer to 0, for a count from 0."""
        if count == 0:
            return 0.0
        return float(stats.gamma.ppf(1 - level, count) / trials) if count <= near else wilsons

    low, high = end_near_zero(successes, centre - half), 1 - end_near_zero(trials - successes, 1 - centre - half)
    return Estimate(float(share), float(low), float(high))


@dataclass(frozen=True)
class Failures:
    """Runs that did not finish: how many of how many, and their share with Wilson's interval."""

    failed: int
    runs: int
    share: Estimate


def failures_of(runs: Iterable[tuple[str, bool]]) -> dict[str, Failures]:
    """Name -> its failures, in the order in which names first appear.

    Args:
        runs: the algorithm or entry of each run, and whether it finished.
    """
    finished: defaultdict[str, list[bool]] = defaultdict(list)
    for name, has_finished in runs:
        finished[name].append(has_finished)
    return {
        name: Failures(each.count(False), len(each), wilson(each.count(False), len(each)))
        for name, each in finished.items()
    }


def kendalls_w(table: ScoreTable, level: float = LEVEL, draws: int = DRAWS, seed: int = 0) -> Concordance:
    """Do selections agree on the ranking of the algorithms?

    Each of m selections ranks the a algorithms by their mean over the seeds, ties sharing their mean rank:

        W = 12 Σ_i (R_i - (a + 1) / 2)² / (a³ - a - T),  agreement = (m W - 1) / (m - 1)

    with R_i the mean rank and T the mean of Σ (t³ - t) over the groups of t ties (Kendall & Gibbons 1990, chapter 6).
    W depends on m: without any agreement it is 1 / m on average. The agreement does not: it is the mean Spearman
    correlation of two selections' rankings, and the W of infinitely many selections. Below 0 it is set to 0, which it
    cannot be less than in the population. nan where all algorithms tie on every selection.

    The interval holds every agreement under which the observed one is not in the outer (1 - level) / 2 of its
    distribution. Populations are normal, with the observed covariance and c times the observed mean differences,
    c from 0 (no agreement) to infinity, so the interval stays honest where all selections agree, and where none do.

    Args:
        draws: simulated tables; memory is draws × selections × pairs of algorithms.
    """
    pairs = Pairs.of(table.complete)
    m = len(pairs.values)
    ties = pairs.ties(pairs.values == 0).mean()
    w = float(pairs.concordance((np.sign(pairs.values) + 1).mean(axis=0) / 2, ties))
    if math.isnan(w):
        return Concordance(w, Estimate(math.nan, math.nan, math.nan))
    observed = max((m * w - 1) / (m - 1), 0.0)
    if not pairs.mean.any():
        # There is no direction in which agreement could grow.
        return Concordance(w, Estimate(observed, 0.0, 1.0))

    identical = (pairs.values == 0).all(axis=0)
    always_ties = pairs.ties(identical[None])[0]
    factor = pairs.factor()
    noise = np.random.default_rng(seed).normal(size=(m, draws, len(factor))) @ factor  # (m, draws, pairs)
    apart = np.minimum(pairs.standardized, 1e9)  # finite, so that 0 times it is 0

    def simulated_agreement(c: float) -> np.ndarray:
        ahead = np.where(identical, 0.5, (noise > -c * pairs.mean).mean(axis=0))
        return np.maximum((m * pairs.concordance(ahead, always_ties) - 1) / (m - 1), 0)

    def limit(low: bool) -> float:
        """The agreement at the outermost plausible c, by bisection of u = c / (1 + c)."""
        left, right = 0.0, 1.0
        for _ in range(11):
            u = (left + right) / 2
            agreement = simulated_agreement(u / (1 - u))
            # Rounding must not tell equal agreements apart.
            as_extreme = agreement >= observed - SAME if low else agreement <= observed + SAME
            if (as_extreme.mean() > (1 - level) / 2) == low:
                right = u
            else:
                left = u
        u = left if low else right
        return float(pairs.concordance(special.ndtr(apart * (u / (1 - u) if u < 1 else 1e9)), always_ties))

    return Concordance(w, Estimate(observed, min(limit(True), observed), max(limit(False), observed)))


def separable(table: ScoreTable, level: float = LEVEL) -> Ranking:
    """Which algorithms can be told apart, and the ranks that each can have.

    Paired t tests over selections for all pairs, on the mean over the seeds, corrected by Holm (1979): the chance of
    even one false separation is at most 1 - level. An algorithm's rank is between

        best = 1 + number of algorithms significantly better, worst = a - number significantly worse

    which holds for all algorithms at once (Al Mohamad, Goeman & van Zwet 2022).
    """
    pairs = Pairs.of(table)
    a = len(table.algorithms)
    corrected = holm(pairs.p)
    significant = corrected < 1 - level

    best, worst = np.full(a, 1), np.full(a, a)
    for (better, worse), differ in zip(pairs.index, significant, strict=True):
        if differ:
            best[worse] += 1
            worst[better] -= 1
    means = mean_scores(table, level)
    return Ranking(
        tuple(
            Rank(table.algorithms[i], means[i], int(best[i]), int(worst[i]))
            for i in np.argsort([-mean.value for mean in means], kind="stable")
        ),
        tuple(
            SeparablePair(
                table.algorithms[i],
                table.algorithms[j],
                pairs.interval(k, level),
                float(corrected[k]),
                bool(significant[k]),
            )
            for k, (i, j) in enumerate(pairs.index)
        ),
    )


def separable_groups(ranking: Ranking) -> tuple[tuple[str, ...], ...]:
    """The ranking as far as it can be told: the most groups of which each algorithm of one is separable from each of
    the next ones, the best first."""
    apart = {frozenset((pair.better, pair.worse)) for pair in ranking.pairs if pair.separable}
    order = [rank.algorithm for rank in ranking.ranks]
    cuts = [
        k
        for k in range(1, len(order))
        if all(frozenset((above, below)) in apart for above in order[:k] for below in order[k:])
    ]
    return tuple(tuple(order[start:end]) for start, end in pairwise([0, *cuts, len(order)]))
