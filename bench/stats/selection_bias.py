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
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, pairwise

import numpy as np
from scipy import optimize, special, stats
from scipy.stats import qmc

from bench.stats.estimates import LEVEL, Estimate, holm, t_interval
from scoring.errors import UserError

FEWEST_SELECTIONS = 3  # fewer leave the differences between algorithms with one degree of freedom or none
DRAWS = 1000
SAME = 1e-12  # scores this near to each other, in units of the largest, are ties: means of the same runs round apart
POINTS = 2**13  # quasi-random normal vectors: the number of selections is exact to about 1 %


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
                f"number of algorithms with scores: {a} ({', '.join(self.algorithms) or 'none'}); "
                "expected at least 2 to compare; add runs of another"
            )
        if s < FEWEST_SELECTIONS:
            left_out = f" ({len(self.dropped)} left out: {_some(self.dropped)})" if self.dropped else ""
            raise UserError(
                f"number of complete selections: {s}{left_out}; expected at least {FEWEST_SELECTIONS} with the same "
                f"number of finite scores for each of {_some(self.algorithms)}; add the missing runs or leave out an "
                "algorithm"
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
    squares = _mean_squares(table.values)  # (4,)
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
    noise = table.values.var(axis=2, ddof=1).mean(axis=1) if table.seeds > 1 else None
    found = []
    for k, (better, worse) in enumerate(pairs.index):
        difference = pairs.interval(k, level)
        ahead = (1 - np.sign(pairs.values[:, k])).sum() / 2
        rate = wilson(float(ahead), len(table.selections), level)
        if not difference.sign:
            rate = Estimate(rate.value, min(rate.low, 1 - rate.high), max(rate.high, 1 - rate.low))
        by_seeds = None
        if noise is not None:
            deviation = np.sqrt((noise[better] + noise[worse]) / table.seeds)
            by_seeds = float(special.ndtr(-_ratio(pairs.mean[k], deviation)))
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
    m = len(table.selections)
    ties = pairs.ties(pairs.values == 0).mean()
    w = float(pairs.concordance((np.sign(pairs.values) + 1).mean(axis=0) / 2, ties))
    if math.isnan(w):
        return Concordance(w, Estimate(math.nan, math.nan, math.nan))
    observed = max((m * w - 1) / (m - 1), 0.0)
    if not pairs.mean.any():
        # No direction in which agreement could grow.
        return Concordance(w, Estimate(observed, 0.0, 1.0))

    identical = (pairs.values == 0).all(axis=0)
    always = pairs.ties(identical[None])[0]
    factor = pairs.factor()
    noise = np.random.default_rng(seed).normal(size=(m, draws, len(factor))) @ factor  # (m, draws, pairs)
    apart = np.minimum(_ratio(pairs.mean, pairs.deviation), 1e9)  # finite, so that 0 times it is 0

    def simulated(c: float) -> np.ndarray:
        ahead = np.where(identical, 0.5, (noise > -c * pairs.mean).mean(axis=0))
        return np.maximum((m * pairs.concordance(ahead, always) - 1) / (m - 1), 0)

    def limit(low: bool) -> float:
        """The agreement at the outermost plausible c, by bisection of u = c / (1 + c)."""
        left, right = 0.0, 1.0
        for _ in range(11):
            u = (left + right) / 2
            drawn = simulated(u / (1 - u))
            # Rounding must not tell equal agreements apart.
            as_extreme = drawn >= observed - SAME if low else drawn <= observed + SAME
            if (as_extreme.mean() > (1 - level) / 2) == low:
                right = u
            else:
                left = u
        u = left if low else right
        return float(pairs.concordance(special.ndtr(apart * (u / (1 - u) if u < 1 else 1e9)), always))

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
    order = np.argsort(-table.means.mean(axis=1), kind="stable").tolist()
    return _needed(_Pairs.of(table, list(pairwise(order))), probability, level)


def selections_needed_pair(
    table: ScoreTable, probability: float = 0.95, level: float = LEVEL
) -> tuple[PairNeeded, ...]:
    """As `selections_needed`, for each pair by itself: n = (z_p sd / |Δ|)², rounded up.

    Δ and sd are the mean and standard deviation of the difference over selections. Says which pairs are the trouble.
    """
    _check_probability(probability)
    found = []
    for pair in combinations(range(len(table.algorithms)), 2):
        pairs = _Pairs.of(table, [pair])
        better, worse = pairs.index[0]
        needed = _needed(pairs, probability, level)
        found.append(PairNeeded(table.algorithms[better], table.algorithms[worse], needed))
    return tuple(found)


def adjusted_scores(
    algorithms: Sequence[str],
    difficulty: Sequence[float] | np.ndarray,
    values: Sequence[float] | np.ndarray,
    selections: Sequence[str],
    level: float = LEVEL,
) -> AdjustedScores:
    """What each algorithm would score at the mean difficulty, also where each was run on selections of its own.

    Four sequences of one length, a row for each run; difficulty is that of the selection (mean log MRD), in any unit.
    Runs of one algorithm on one selection are averaged first. Then, by least squares,

        y = score of the algorithm + slope (difficulty - mean difficulty)

    with the mean over the distinct selections. Where all algorithms have seen all selections, adjusted scores are the
    raw ones. Difficulty is taken as known: a noisy one biases the slope towards 0.

    Intervals of adjusted values are t intervals of the delete-one-selection jackknife (the cluster-robust CR3,
    MacKinnon, Nielsen & Webb 2023), with the degrees of freedom that this variance has under equal independent errors
    (Satterthwaite, as Bell & McCaffrey 2002 for CR2): an algorithm with few selections has few, however many the
    others have. They are nan where the value hangs on a single selection. Intervals of raw means are t intervals over
    the algorithm's selections.

    Raises:
        UserError: a value is not finite, a selection has two difficulties, or difficulty does not vary within any
            algorithm, so that it cannot be told from the algorithms.
    """
    _check_lengths(algorithms=algorithms, difficulty=difficulty, values=values, selections=selections)
    cells: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    hard: dict[str, float] = {}
    for name, drawn, difficult, score in zip(algorithms, selections, difficulty, values, strict=True):
        for what, number in (("score", score), ("difficulty", difficult)):
            if not math.isfinite(number):
                raise UserError(
                    f"{what} of {name!r} on selection {drawn!r} is {number}: expected a finite number; "
                    "leave the run out"
                )
        if hard.setdefault(drawn, float(difficult)) != difficult:
            raise UserError(
                f"selection {drawn!r} has the difficulties {hard[drawn]} and {difficult}: expected one for all "
                "its runs; give selections of different samples different names"
            )
        cells[name, drawn].append(float(score))

    names, drawn_names = list(dict.fromkeys(algorithms)), list(hard)
    row = np.array([names.index(name) for name, _ in cells], dtype=int)
    column = np.array([drawn_names.index(drawn) for _, drawn in cells], dtype=int)
    y = np.array([np.mean(scores) for scores in cells.values()])
    x = np.array(list(hard.values()))
    middle = float(x.mean()) if hard else math.nan
    design = np.column_stack([row[:, None] == np.arange(len(names)), x[column] - middle]).astype(float)
    if not cells or np.linalg.matrix_rank(design) < design.shape[1]:
        raise UserError(
            f"difficulty of {len(hard)} selections: expected one algorithm with runs on two of different difficulty, "
            "without which difficulty and algorithm cannot be told apart; add runs or compare raw scores"
        )
    index = list(combinations(range(len(names)), 2))
    single = np.eye(len(names) + 1)  # the scores, and the slope
    wanted = np.array([*single, *(single[i] - single[j] for i, j in index)])
    found = _jackknifed(wanted, design, column, y, level)
    scores, slope, differences = found[: len(names)], found[len(names)], found[len(names) + 1 :]
    return AdjustedScores(
        middle,
        slope,
        tuple(
            AdjustedScore(name, int((row == k).sum()), t_interval(y[row == k], level), scores[k])
            for k, name in enumerate(names)
        ),
        tuple(AdjustedDifference(names[i], names[j], d) for (i, j), d in zip(index, differences, strict=True)),
    )


def separable(table: ScoreTable, level: float = LEVEL) -> Ranking:
    """Which algorithms can be told apart, and the ranks that each can have.

    Paired t tests over selections for all pairs, on the mean over the seeds, corrected by Holm (1979): the chance of
    even one false separation is at most 1 - level. An algorithm's rank is between

        best = 1 + number of algorithms significantly better, worst = a - number significantly worse

    which holds for all algorithms at once (Al Mohamad, Goeman & van Zwet 2022).
    """
    pairs = _Pairs.of(table)
    a = len(table.algorithms)
    standard_error = pairs.deviation / math.sqrt(len(table.selections))
    p = 2 * stats.t.sf(_ratio(pairs.mean, standard_error), len(table.selections) - 1)
    corrected = holm(p)
    apart = corrected < 1 - level

    best, worst = np.full(a, 1), np.full(a, a)
    for better, worse in (pair for pair, clear in zip(pairs.index, apart, strict=True) if clear):
        best[worse] += 1
        worst[better] -= 1
    means = table.means.mean(axis=1)
    return Ranking(
        tuple(
            Rank(table.algorithms[i], float(means[i]), int(best[i]), int(worst[i]))
            for i in np.argsort(-means, kind="stable")
        ),
        tuple(
            SeparablePair(
                table.algorithms[i], table.algorithms[j], pairs.interval(k, level), float(corrected[k]), bool(apart[k])
            )
            for k, (i, j) in enumerate(pairs.index)
        ),
    )


@dataclass(frozen=True)
class _Pairs:
    """Differences of pairs of algorithms over selections, the better minus the worse.

    Attributes:
        index: (pairs,) positions of the better and the worse algorithm; a tie keeps the order it was asked in.
        values: (s, pairs) of the means over seeds; exactly 0 where they tie.
        mean: (pairs,), 0 or more, over the selections.
        deviation: (pairs,) standard deviation over the selections.
    """

    index: list[tuple[int, int]]
    values: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, table: ScoreTable, index: list[tuple[int, int]] | None = None) -> _Pairs:
        """All pairs in the order of the table, or those of `index`."""
        means = table.means
        i, j = np.array(index or list(combinations(range(len(means)), 2))).T
        tie = SAME * np.abs(table.values).max()
        values = (means[i] - means[j]).T
        values = np.where(np.abs(values) <= tie, 0.0, values)
        mean = values.mean(axis=0)
        mean = np.where(np.abs(mean) <= tie, 0.0, mean)
        turned = mean < 0
        i, j = np.where(turned, j, i), np.where(turned, i, j)
        deviation = values.std(axis=0, ddof=1)
        deviation = np.where(deviation <= tie, 0.0, deviation)
        return cls(
            list(zip(i.tolist(), j.tolist(), strict=True)), np.where(turned, -values, values), np.abs(mean), deviation
        )

    def interval(self, k: int, level: float) -> Estimate:
        return t_interval(self.values[:, k], level)

    def factor(self) -> np.ndarray:
        """(q, pairs): a standard normal (q,) vector times it has the covariance of the differences."""
        centred = (self.values - self.values.mean(axis=0)) * (self.deviation > 0)
        return np.asarray(np.linalg.qr(centred, mode="r")) / math.sqrt(len(centred) - 1)

    def ties(self, tied: np.ndarray) -> np.ndarray:
        """(n,): Σ (t³ - t) over groups of t algorithms that tie; of (n, all pairs) that say which do."""
        others = self._sums(tied, tied)  # t - 1 for each of the t
        return (others**2 + 2 * others).sum(axis=-1)

    def concordance(self, ahead: np.ndarray, ties: float) -> np.ndarray:
        """(...,): Kendall's W, of the share of selections on which the better of each of all pairs is ahead."""
        ranks = self._sums(ahead, 1 - ahead)  # algorithms beaten: 0 to a - 1 in the mean over selections
        a = ranks.shape[-1]
        most = a**3 - a - ties
        return 12 * ((ranks - (a - 1) / 2) ** 2).sum(axis=-1) / most if most > 0 else np.full(ranks.shape[:-1], np.nan)

    def _sums(self, of_better: np.ndarray, of_worse: np.ndarray) -> np.ndarray:
        """(..., a): the sum over each algorithm's pairs, of (..., pairs)."""
        better, worse = self._sides
        return of_better @ better + of_worse @ worse

    @cached_property
    def _sides(self) -> tuple[np.ndarray, np.ndarray]:
        """(pairs, a) each: 1 where the algorithm is the better, and where it is the worse."""
        index = np.array(self.index)
        better, worse = (index[:, side, None] == np.arange(1 + index.max()) for side in (0, 1))
        return better.astype(float), worse.astype(float)


def _mean_squares(values: np.ndarray) -> np.ndarray:
    """(4, ...) mean squares of algorithm, selection, interaction and seed, of (..., a, s, r)."""
    a, s, r = values.shape[-3:]
    cells = values.mean(axis=-1, keepdims=True)
    rows, columns = cells.mean(axis=-2, keepdims=True), cells.mean(axis=-3, keepdims=True)
    grand = rows.mean(axis=-3, keepdims=True)
    squares = [
        s * r * ((rows - grand) ** 2).sum(axis=(-3, -2, -1)) / (a - 1),
        a * r * ((columns - grand) ** 2).sum(axis=(-3, -2, -1)) / (s - 1),
        r * ((cells - rows - columns + grand) ** 2).sum(axis=(-3, -2, -1)) / ((a - 1) * (s - 1)),
        ((values - cells) ** 2).sum(axis=(-3, -2, -1)) / max(a * s * (r - 1), 1),
    ]
    # What rounding leaves of effects that are not there.
    nothing = (SAME * np.abs(values).max()) ** 2
    return np.array([np.where(square <= nothing, 0.0, square) for square in squares])


def _shares(squares: np.ndarray, a: int, s: int, r: int) -> np.ndarray:
    """(4, ...) shares of the total variance, of (4, ...) mean squares; interaction is all the rest if r = 1."""
    of_algorithm, of_selection, of_both, of_seed = squares
    variances = np.maximum(
        [
            (of_algorithm - of_both) / (s * r),
            (of_selection - of_both) / (a * r),
            (of_both - of_seed) / r,
            of_seed,
        ],
        0,
    )
    with np.errstate(invalid="ignore"):
        return variances / variances.sum(axis=0)


def _within(squares: np.ndarray, a: int, r: int) -> np.ndarray:
    """Correlation of two runs of one algorithm on one selection, of (4, ...) mean squares."""
    _, of_selection, of_both, of_seed = squares
    between = (of_selection + (a - 1) * of_both) / a
    with np.errstate(invalid="ignore"):
        return (between - of_seed) / (between + (r - 1) * of_seed)


def _common(squares: np.ndarray, a: int, r: int) -> np.ndarray:
    """Correlation of the runs of two algorithms on one selection, of (4, ...) mean squares."""
    _, of_selection, of_both, of_seed = squares
    with np.errstate(invalid="ignore"):
        return (of_selection - of_both) / (of_selection + (a - 1) * of_both + a * (r - 1) * of_seed)


def _correlation(value: np.ndarray, deleted: np.ndarray, of: int, level: float) -> Estimate:
    """An intraclass correlation in groups of `of`, below 0 set to 0, with its jackknife interval.

    On Fisher's scale log((1 + (of - 1) ρ) / (1 - ρ)), the log of the ratio of two mean squares.

    Args:
        deleted: (s,) the same without each of the selections.
    """
    correlation = float(value)
    if correlation >= 1 - SAME and (deleted >= 1 - SAME).all():
        return Estimate(1.0, 1.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre, each = (np.log((1 + (of - 1) * rho) / (1 - rho)) for rho in (value, deleted))
    error = math.sqrt((len(each) - 1) / len(each) * ((each - each.mean()) ** 2).sum())
    ends = centre + np.array([-1, 1]) * stats.t.ppf((1 + level) / 2, len(each) - 1) * error
    low, high = np.maximum(1 - of / (np.exp(ends) + of - 1), 0).tolist()
    return Estimate(max(correlation, 0.0), low, high)


def _supported_df(df: float, deleted: np.ndarray) -> float:
    """Degrees of freedom of a mean square, at most `df`, with the jackknife's variance of its logarithm.

    That of χ² with n degrees is trigamma(n / 2).

    Args:
        deleted: (s,) the mean square without each of the selections.
    """
    if not deleted.any():
        return df  # 0 however many
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(deleted)
        variance = (len(logs) - 1) / len(logs) * ((logs - logs.mean()) ** 2).sum()
    if variance <= special.polygamma(1, df / 2):
        return df
    if not variance < special.polygamma(1, 0.5):
        return 1.0
    return float(optimize.brentq(lambda n: special.polygamma(1, n / 2) - variance, 1.0, df))


def _needed(pairs: _Pairs, probability: float, level: float) -> Estimate:
    """Selections after which all of the given pairs are in order."""
    apart = _ratio(pairs.mean, pairs.deviation)
    noise = pairs.factor() / np.where(pairs.deviation > 0, pairs.deviation, 1)
    root = math.sqrt(len(pairs.values))
    low, high = noncentrality(apart * root, len(pairs.values) - 1, level) / root
    high = np.where((pairs.deviation == 0) & (pairs.mean == 0), 0.0, high)  # the same algorithm twice
    return Estimate(*(_smallest(d, noise, probability) for d in (apart, high, low)))


def _smallest(apart: np.ndarray, noise: np.ndarray, probability: float) -> float:
    """The smallest number of selections that put all differences on their right side.

    Args:
        apart: (pairs,) differences in standard deviations.
        noise: (q, pairs) factor of their correlation.
    """
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


def noncentrality(observed: np.ndarray, df: int, level: float) -> np.ndarray:
    """(2, n) limits of the noncentrality λ of observed t: P(t' >= t | low) = P(t' <= t | high) = (1 - level) / 2.

    P(t' <= t) = E Φ(t sqrt(χ² / df) - λ), the mean over the quantiles of χ². Right to 3 digits for any t; scipy's
    distribution gives nan for some.
    """
    roots = np.sqrt(stats.chi2.ppf((np.arange(500) + 0.5) / 500, df) / df)

    def limit(t: float, tail: float) -> float:
        if math.isinf(t):
            return t
        ends = min(t * roots[0], t * roots[-1]) - 9, max(t * roots[0], t * roots[-1]) + 9
        return float(
            optimize.brentq(lambda noncentrality: special.ndtr(t * roots - noncentrality).mean() - tail, *ends)
        )

    return np.array([[limit(t, tail) for t in observed.tolist()] for tail in ((1 + level) / 2, (1 - level) / 2)])


def _jackknifed(
    wanted: np.ndarray, design: np.ndarray, cluster: np.ndarray, y: np.ndarray, level: float
) -> list[Estimate]:
    """Linear functions of least-squares coefficients, with their delete-one-cluster intervals.

    Args:
        wanted: (k, p) a function in a row.
        design: (n, p) of full rank.
        cluster: (n,) which of the clusters, from 0.
        y: (n,).
    """
    clusters = cluster.max() + 1
    whole = wanted @ np.linalg.pinv(design)
    # Values are linear in y: what leaving out a cluster changes is too.
    kept = np.where((cluster != np.arange(clusters)[:, None])[..., None], design, 0.0)  # (clusters, n, p)
    without = wanted @ np.linalg.pinv(kept)
    changes = without - whole
    known = (np.abs(without @ kept - wanted) < 1e-6).all(axis=(0, 2))
    variance = (clusters - 1) / clusters * ((changes @ y) ** 2).sum(axis=0)
    found = []
    for k, value in enumerate((whole @ y).tolist()):
        if not known[k]:
            found.append(Estimate(value, math.nan, math.nan))
            continue
        spread = changes[:, k] @ changes[:, k].T
        df = np.trace(spread) ** 2 / (spread**2).sum()
        half = float(stats.t.ppf((1 + level) / 2, df) * math.sqrt(variance[k]))
        found.append(Estimate(value, value - half, value + half))
    return found


def _ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x / y of numbers from 0; 0 / 0 is 0: what does not differ at all is not apart."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(x == 0, 0.0, np.divide(x, y))


def _check_probability(probability: float) -> None:
    if not 0 < probability < 1:
        raise UserError(f"probability {probability}: expected a number between 0 and 1; 0.95 is usual")


def _check_lengths(**columns: Sequence[Hashable] | np.ndarray) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of different lengths: {lengths}")


def _some(names: Sequence[str]) -> str:
    """Enough names for one line."""
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
