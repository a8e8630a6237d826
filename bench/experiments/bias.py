"""How much the choice of forget samples decides a comparison of unlearning algorithms.

Scores are y[algorithm, selection, seed]: a selection is one draw of forget samples, a seed is one repeated run on it.
Higher is better; a caller whose metric is better when lower turns its sign. Selections are taken as a random draw from
all that could have been drawn, so every interval is about new selections, not about these. Runs of one cell are taken
as independent: a seed shared between algorithms or selections is not modelled.

The same data and seed give the same interval.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from bench.statistics import LEVEL, Estimate
from scoring.errors import UserError

FEWEST_SELECTIONS = 3  # fewer leave the differences between algorithms with one degree of freedom or none
DRAWS = 1000
SAME = 1e-12  # scores this near to each other, in units of the largest, are ties: means of the same runs round apart
POINTS = 2**14  # quasi-random normal vectors: the number of selections is exact to about 0.3 %


@dataclass(frozen=True)
class ScoreTable:
    """Scores of every algorithm on every selection, with the same number of seeds everywhere.

    Attributes:
        algorithms: (a,) names.
        selections: (s,) names.
        values: (a, s, r) scores, finite; the r seeds of a cell are in no order.
        dropped: selections that were left out because they were not complete.
    """

    algorithms: tuple[str, ...]
    selections: tuple[str, ...]
    values: np.ndarray
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        a, s = len(self.algorithms), len(self.selections)
        if a < 2:
            raise UserError(
                f"scores of {a} algorithm{'s'[: a != 1]} ({', '.join(self.algorithms) or 'none'}): "
                "expected at least 2 to compare; add runs of another"
            )
        if s < FEWEST_SELECTIONS:
            left_out = f", {len(self.dropped)} left out ({_some(self.dropped)})" if self.dropped else ""
            raise UserError(
                f"scores of {s} complete selection{'s'[: s != 1]}{left_out}: expected at least {FEWEST_SELECTIONS} "
                f"with the same number of finite scores for each of {', '.join(self.algorithms)}; "
                "add the missing runs or leave out an algorithm"
            )
        if self.values.ndim != 3 or self.values.shape[:2] != (a, s) or self.values.shape[2] < 1:
            raise ValueError(f"values of shape {self.values.shape}: expected ({a}, {s}, seeds)")

    @classmethod
    def of(cls, algorithm: Sequence[str], selection: Sequence[str], value: Sequence[float] | np.ndarray) -> ScoreTable:
        """The balanced table of three sequences of one length, a row for each run.

        Rows with the same algorithm and selection are seeds, in any order. A selection is kept if every algorithm has
        r finite scores on it, with r the number that most selections can give (the larger of two equally common
        ones); the others are dropped. Names keep the order in which they first appear.

        Raises:
            UserError: fewer than 2 algorithms, or fewer than 3 complete selections.
        """
        _check_lengths(algorithm=algorithm, selection=selection, value=value)
        cells: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for name, drawn, score in zip(algorithm, selection, value, strict=True):
            cells[name, drawn].append(float(score))
        algorithms, selections = tuple(dict.fromkeys(algorithm)), tuple(dict.fromkeys(selection))
        repeats = {}
        for drawn in selections:
            column = [cells.get((name, drawn), []) for name in algorithms]
            counts = {len(scores) for scores in column}
            if len(counts) == 1 and all(math.isfinite(score) for scores in column for score in scores):
                repeats[drawn] = counts.pop()
        common = Counter(repeats.values())
        required = max(common, key=lambda count: (common[count], count), default=0)
        kept = tuple(drawn for drawn in selections if repeats.get(drawn) == required)
        values = np.array([[cells[name, drawn] for drawn in kept] for name in algorithms], dtype=float)
        dropped = tuple(drawn for drawn in selections if drawn not in set(kept))
        return cls(algorithms, kept, values.reshape(len(algorithms), len(kept), -1 if kept else 1), dropped)

    @property
    def seeds(self) -> int:
        return self.values.shape[2]

    @property
    def means(self) -> np.ndarray:
        """(a, s): over the seeds."""
        return self.values.mean(axis=2)


@dataclass(frozen=True)
class VarianceShares:
    """Shares of the variance of one run's score.

    Attributes:
        algorithm, selection, interaction, seed: shares of the total; their values sum to 1. With one seed in a cell,
            `interaction` is algorithm×selection and seed together, and `seed` is None.
        within_algorithm: share of the variance of a single algorithm's score that is due to which samples were drawn:
            (selection + algorithm×selection) / (selection + algorithm×selection + seed). All nan with one seed.
        within_algorithm_common: the part of it that moves all algorithms alike: selection / (selection +
            algorithm×selection + seed), the correlation of two algorithms' runs on the same selection. Known with
            one seed too, where it is a lower bound of the share above.
    """

    algorithm: Estimate
    selection: Estimate
    interaction: Estimate
    seed: Estimate | None
    within_algorithm: Estimate
    within_algorithm_common: Estimate

    @property
    def parts(self) -> dict[str, Estimate]:
        """The parts of the total, under the names they have in a table."""
        parts = {"algorithm": self.algorithm, "selection": self.selection}
        if self.seed is None:
            return parts | {"algorithm×selection + seed": self.interaction}
        return parts | {"algorithm×selection": self.interaction, "seed": self.seed}


@dataclass(frozen=True)
class Reversal:
    """How often the worse of two algorithms comes out ahead.

    Attributes:
        better, worse: by the mean over all selections; in the order of the table if the means are equal.
        rate: share of selections on which `worse` is ahead in the mean over the seeds.
        difference: mean of better - worse over selections, in units of the score.
        by_seeds: the rate that seed noise alone would give; None with one seed.
    """

    better: str
    worse: str
    rate: Estimate
    difference: Estimate
    by_seeds: float | None


@dataclass(frozen=True)
class Concordance:
    """Kendall's W as observed, and the agreement that it estimates: mean rank correlation of two selections."""

    w: float
    agreement: Estimate


@dataclass(frozen=True)
class PairNeeded:
    """Number of selections that the order of two algorithms needs; `better` by the mean."""

    better: str
    worse: str
    selections: Estimate


@dataclass(frozen=True)
class AdjustedScore:
    """An algorithm's mean over the `selections` it was run on, and what it would be at the mean difficulty."""

    algorithm: str
    selections: int
    raw: Estimate
    adjusted: Estimate


@dataclass(frozen=True)
class AdjustedDifference:
    """first - second at equal difficulty, in units of the score."""

    first: str
    second: str
    difference: Estimate


@dataclass(frozen=True)
class AdjustedScores:
    """Scores at equal difficulty.

    Attributes:
        difficulty: the mean difficulty to which scores are adjusted.
        slope: change of the score per unit of difficulty, the same for all algorithms.
        scores: of each algorithm, in the order of first appearance.
        differences: of each pair of algorithms.
    """

    difficulty: float
    slope: Estimate
    scores: tuple[AdjustedScore, ...]
    differences: tuple[AdjustedDifference, ...]


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
    """The ranks that an algorithm can have, 1 the best."""

    algorithm: str
    mean: float
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


def variance_shares(table: ScoreTable, level: float = LEVEL, draws: int = DRAWS, seed: int = 0) -> VarianceShares:
    """Which part of the variance of a score is due to algorithm, selection, their interaction, and seed.

        y_ijk = mean + A_i + S_j + I_ij + e_ijk, all independent, with variances
        A = (MS_A - MS_I) / (s r), S = (MS_S - MS_I) / (a r), I = (MS_I - MS_e) / r, e = MS_e

    with MS the mean squares of the two-way table, and variances below 0 set to 0 (Searle, Casella & McCulloch 1992,
    chapter 4).

    Intervals of the shares of the total are a parametric bootstrap of the mean squares (generalized intervals,
    Weerahandi 1993): MS* = MS df / χ²_df. The df of selection, interaction and seed are lowered to what the jackknife
    over selections says about MS, since scores with long tails make a mean square less certain than normal ones.
    The df of algorithm are a - 1: with few algorithms its share is hardly known, and the interval says so. It also
    supposes that the effects of algorithms are normal, which so few cannot show.

    Intervals within an algorithm do not depend on how the algorithms differ. They are jackknife t intervals over
    selections on Fisher's scale of intraclass correlations (Arvesen 1970), which holds for long tails too. Here the
    sum of selection and interaction is set to 0 where it is below, not each of them, so near 0 the value can be less
    than that of the shares.

    Args:
        draws: of the bootstrap.
    """
    a, s, r = table.values.shape
    squares = _mean_squares(_without_rounding(table.values))  # (4,)
    left = (np.arange(s)[:, None] + np.arange(1, s)) % s  # (s, s - 1): all selections but one
    deleted = _mean_squares(np.moveaxis(table.values[:, left], 1, 0))  # (4, s)

    df = np.array([a - 1, s - 1, (a - 1) * (s - 1), a * s * (r - 1)], dtype=float)
    for part in range(1, 4 if r > 1 else 3):
        df[part] = _supported_df(df[part], deleted[part])
    rng = np.random.default_rng(seed)
    scale = df[:, None] / rng.chisquare(np.maximum(df, 1)[:, None], size=(4, draws))
    values, drawn = _shares(squares, a, s, r), _shares(squares[:, None] * scale, a, s, r)
    tails = [(1 - level) / 2, (1 + level) / 2]
    parts = [Estimate(float(x), *map(float, np.quantile(xs, tails))) for x, xs in zip(values, drawn, strict=True)]

    unknown = Estimate(math.nan, math.nan, math.nan)
    return VarianceShares(
        parts[0],
        parts[1],
        parts[2],
        parts[3] if r > 1 else None,
        _correlation(_within(squares, a, r), _within(deleted, a, r), r, level) if r > 1 else unknown,
        _correlation(_common(squares, a, r), _common(deleted, a, r), a, level),
    )


def reversal_rates(table: ScoreTable, level: float = LEVEL) -> tuple[Reversal, ...]:
    """Of each pair, how often the algorithm that is worse on average comes out ahead on a single selection.

    The rate estimates P(the worse is ahead on a new selection), ties counted as one half, with "worse" by the mean
    over all selections that could be drawn. It can be above 1/2 where few selections decide the mean. The interval is
    Wilson's if the interval of the mean difference is on one side of 0. If it is not, which one is worse is not known
    either: the interval then spans Wilson's for both directions, from min(low, 1 - high) to max(high, 1 - low).

    Seed noise alone would give Φ(-|Δ| / sqrt((σ_1² + σ_2²) / r)), with Δ the mean difference and σ² the variance of
    each algorithm's runs on one selection.
    """
    pairs = _Pairs.of(table)
    count = len(table.selections)
    noise = table.values.var(axis=2, ddof=1).mean(axis=1) if table.seeds > 1 else None
    found = []
    for k, (i, j) in enumerate(pairs.index):
        sign = -1.0 if pairs.mean[k] < 0 else 1.0
        better, worse = (i, j) if sign > 0 else (j, i)
        difference = pairs.interval(k, sign, level)
        ahead = (np.sign(-sign * pairs.values[:, k]) + 1).sum() / 2
        rate = wilson(ahead, count, level)
        if not difference.sign:
            rate = Estimate(rate.value, min(rate.low, 1 - rate.high), max(rate.high, 1 - rate.low))
        by_seeds = None
        if noise is not None:
            by_seeds = float(special.ndtr(-_ratio(abs(pairs.mean[k]), math.sqrt((noise[i] + noise[j]) / table.seeds))))
        found.append(Reversal(table.algorithms[better], table.algorithms[worse], rate, difference, by_seeds))
    return tuple(found)


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

    def from_zero(count: float, end: float) -> float:
        """The end nearer to 0, for counts from 0."""
        if count == 0:
            return 0.0
        return float(stats.gamma.ppf(1 - level, count) / trials) if count <= near else end

    low, high = from_zero(successes, centre - half), 1 - from_zero(trials - successes, 1 - centre - half)
    return Estimate(float(share), float(low), float(high))


def kendalls_w(table: ScoreTable, level: float = LEVEL, draws: int = DRAWS // 2, seed: int = 0) -> Concordance:
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
    pairs = _Pairs.of(table)
    a, m = len(table.algorithms), len(table.selections)
    ties = 3 * (pairs.values == 0).sum(axis=1)  # t³ - t is 6 for each pair in groups of two; larger groups below
    ties = _tied(pairs, pairs.values == 0, a)
    if np.all(ties == a**3 - a):
        return Concordance(math.nan, Estimate(math.nan, math.nan, math.nan))
    w = float(_concordance((np.sign(pairs.values) + 1).mean(axis=0) / 2, pairs, a, ties.mean()))
    observed = max((m * w - 1) / (m - 1), 0.0)
    if not pairs.mean.any():
        # No direction in which agreement could grow.
        return Concordance(w, Estimate(observed, 0.0, 1.0))

    same = pairs.sd == 0
    always_tied = same & (pairs.mean == 0)
    tied = float(_tied(pairs, always_tied[None], a)[0])
    factor = _factor(pairs.values)
    noise = np.random.default_rng(seed).normal(size=(draws, m, len(factor))) @ factor
    standardized = np.clip(_ratio(pairs.mean, pairs.sd), -1e9, 1e9)

    def simulated(c: float) -> np.ndarray:
        ahead = np.where(always_tied, 0.5, (noise > -c * pairs.mean).mean(axis=1))
        return np.maximum((m * _concordance(ahead, pairs, a, tied) - 1) / (m - 1), 0)

    def population(c: float) -> float:
        return float(_concordance(special.ndtr(c * standardized), pairs, a, tied))

    def limit(low: bool) -> float:
        """The agreement at the last plausible c, by bisection of u = c / (1 + c)."""
        below, above = 0.0, 1.0
        for _ in range(14):
            u = (below + above) / 2
            found = simulated(u / (1 - u))
            # Rounding must not tell equal agreements apart.
            as_extreme = found >= observed - SAME if low else found <= observed + SAME
            if (as_extreme.mean() > (1 - level) / 2) == low:
                above = u
            else:
                below = u
        u = below if low else above
        return population(u / (1 - u)) if u < 1 else population(1e9)

    return Concordance(w, Estimate(observed, min(limit(True), observed), max(limit(False), observed)))


def selections_needed(table: ScoreTable, probability: float = 0.95, level: float = LEVEL) -> Estimate:
    """Number of selections after which the ranking by mean score is right with the given probability.

    The scores of the algorithms on one selection, each the mean of r seeds as in the table, are a normal vector; a
    mean of n selections has 1/n of its covariance. With d_l the difference of neighbours l in the ranking, in standard
    deviations, and z the differences' noise,

        n = min{n: P(sqrt(n) d_l + z_l > 0 for all l) >= probability} = (quantile of max_l (-z_l / d_l))²

    rounded up. inf where two algorithms have the same mean. The value takes the observed differences as the true
    ones: where several algorithms lie within their noise, the smallest difference looks smaller than it is, and the
    value is too large.

    The interval is n with all differences at their upper, and at their lower limits (noncentral t). It has its level
    for two algorithms and more than it for several. `high` is inf unless every pair of neighbours differs by a t test.

    Raises:
        UserError: probability is not between 0 and 1.
    """
    _check_probability(probability)
    means = table.means
    order = np.argsort(-means.mean(axis=1), kind="stable")
    neighbours = _Pairs.of(table, tuple((int(i), int(j)) for i, j in zip(order, order[1:], strict=False)))
    return _needed(neighbours, np.ones(len(order) - 1), probability, level)


def selections_needed_pair(
    table: ScoreTable, probability: float = 0.95, level: float = LEVEL
) -> tuple[PairNeeded, ...]:
    """As `selections_needed`, for each pair by itself: n = (z_p sd / |Δ|)², rounded up.

    Δ and sd are the mean and standard deviation of the difference over selections. Says which pairs are the trouble.
    """
    _check_probability(probability)
    pairs = _Pairs.of(table)
    found = []
    for k, (i, j) in enumerate(pairs.index):
        sign = -1.0 if pairs.mean[k] < 0 else 1.0
        better, worse = (i, j) if sign > 0 else (j, i)
        one = pairs.only(k)
        found.append(
            PairNeeded(
                table.algorithms[better],
                table.algorithms[worse],
                _needed(one, np.array([sign]), probability, level),
            )
        )
    return tuple(found)
