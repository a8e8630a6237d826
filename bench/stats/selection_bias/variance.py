"""Which part of the variance of a score is due to the choice of the samples."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from scipy import linalg, special, stats

from bench.stats.estimates import LEVEL, Estimate
from bench.stats.selection_bias.table import SAME, ScoreTable

ALGORITHM, SELECTION, COMMON_SEED, INTERACTION, REST = range(5)  # mean squares, and the variances made of them
LAYERS = {SELECTION: "selection", COMMON_SEED: "common seed", INTERACTION: "algorithm×selection", REST: "seed"}
LONG_TAILS = 0.01  # p of a test of kurtosis below which scores have long tails
FEWEST_FOR_KURTOSIS = 5  # numbers that scipy asks for


@dataclass(frozen=True)
class VarianceShares:
    """Shares of the variance of one run's score.

    Attributes:
        algorithm, selection, interaction, seed: shares of the total; with `common_seed` their values sum to 1. With
            one seed in a cell, `interaction` is algorithm×selection and seed together, `seed` is None, and `selection`
            is nan: it cannot be told from what a seed that algorithms share does to all of them.
        common_seed: what a seed does to all algorithms alike on one selection; None unless the table's seeds are
            shared, of which there must be two.
        within_algorithm: share of the variance of a single algorithm's score that is due to which samples were drawn:
            (selection + algorithm×selection) / (selection + algorithm×selection + seed). All nan with one seed.
        within_algorithm_common: the part of it that moves all algorithms alike: selection / (selection +
            algorithm×selection + seed), the correlation of two algorithms' runs on the same selection with different
            seeds. nan with one seed.
        long_tails: in what scores have longer tails than normal ones ("seed"); "" if nowhere. Then `selection` and the
            two within an algorithm have a lower limit only, their upper one being 1, and other shares have no limits.
    """

    algorithm: Estimate
    selection: Estimate
    interaction: Estimate
    seed: Estimate | None
    within_algorithm: Estimate
    within_algorithm_common: Estimate
    common_seed: Estimate | None = None
    long_tails: str = ""

    @property
    def parts(self) -> dict[str, Estimate]:
        """The parts of the total, under the names they have in a table."""
        if self.seed is None:
            return {"algorithm": self.algorithm, "algorithm×selection + seed": self.interaction}
        parts = {"algorithm": self.algorithm, "selection": self.selection}
        if self.common_seed is not None:
            parts |= {"seed, common to all algorithms": self.common_seed}
        return parts | {"algorithm×selection": self.interaction, "seed": self.seed}


def variance_shares(table: ScoreTable, level: float = LEVEL) -> VarianceShares:
    """Which part of the variance of a score is due to algorithm, selection, their interaction, and seed.

        y_ijk = mean + A_i + S_j + I_ij + e_ijk, all but A random and independent, with variances
        A = (MS_A - MS_I) / (s r), S = (MS_S - MS_I) / (a r), I = (MS_I - MS_e) / r, e = MS_e

    with MS the mean squares of the two-way table, and variances below 0 set to 0 (Searle, Casella & McCulloch 1992,
    chapter 4). The algorithms are those of the table: A is the mean square of their true means, Σ (A_i - mean)² /
    (a - 1), and no interval is about algorithms that were not run. Where algorithms share their seeds, a seed on a
    selection can move all of them alike (the same order of samples): R_jk is added, which would else be booked as
    selection,

        S = (MS_S - MS_R - MS_I + MS_e) / (a r),  R = (MS_R - MS_e) / a,

    MS_R and MS_e being the mean squares of the seeds within a selection: of their means over algorithms, and of the
    rest.

    Intervals are over selections, those of t for x = log(N / B + κ), with N the variances of the part, B those of the
    rest, and κ B what is subtracted from mean squares to give N: x is about the log of a ratio of mean squares, which
    is defined where N is 0 or less. Its standard error is the larger of the jackknife's, which by chance is too small
    with few selections, and that of normal scores, Var(log MS) = trigamma(df / 2); t has s - 1 degrees of freedom.
    `mrd-bench benchmark statistics` measures the coverage.

    Outliers that were not drawn cannot be known: with long tails the upper limit of the selection's share is too low in
    up to a third of tables, whatever the method, and its lower limit is right. So where a test of kurtosis (Anscombe &
    Glynn 1983) rejects normal selections, interactions or seeds, there are lower limits only. Long tails of the
    selections alone can be missed by that test, the more the fewer they are.

    Raises:
        UserError: fewer than three selections are complete.
    """
    table = table.complete
    shared = table.seeds_shared and table.seeds > 1
    layers = _layers(table.values, shared)
    long_tails = _long_tails(layers)
    statistics = _MeanSquares.of(table.values, layers, shared)
    every = [ALGORITHM, SELECTION, COMMON_SEED, INTERACTION, REST]
    within = every[1:]
    variances = np.maximum(statistics.variances @ statistics.squares, 0)
    with np.errstate(invalid="ignore"):
        values = variances / variances.sum()

    def share(part: int) -> Estimate:
        low, high = statistics.interval([part], every, level)
        return _between(values[part], low, high, long_tails, part == SELECTION)

    def share_within(parts: list[int]) -> Estimate:
        low, high = statistics.interval(parts, within, level)
        return _between(statistics.share(parts, within), low, high, long_tails, True)

    unknown = Estimate(math.nan, math.nan, math.nan)
    one_seed = table.seeds == 1
    return VarianceShares(
        share(ALGORITHM),
        unknown if one_seed else share(SELECTION),
        share(INTERACTION),
        None if one_seed else share(REST),
        unknown if one_seed else share_within([SELECTION, INTERACTION]),
        unknown if one_seed else share_within([SELECTION]),
        share(COMMON_SEED) if shared else None,
        long_tails,
    )


def _between(value: float, low: float, high: float, long_tails: str, is_selection: bool) -> Estimate:
    """A share with the limits that can be told."""
    if not math.isfinite(low + high) or (long_tails and not is_selection):
        return Estimate(float(value), math.nan, math.nan)
    return Estimate(float(value), min(low, float(value)), 1.0 if long_tails else max(high, float(value)))


@dataclass(frozen=True)
class _MeanSquares:
    """Mean squares of a table, and what is made of them.

    Attributes:
        squares: (5,).
        without_one: (5, s) without each of the selections.
        log_variance: (5,) of the logarithms of mean squares of normal scores.
        variances: (5, 5) the variances, in rows, as linear functions of mean squares.
        variances_without_one: the same of one selection less.
    """

    squares: np.ndarray
    without_one: np.ndarray
    log_variance: np.ndarray
    variances: np.ndarray
    variances_without_one: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, layers: dict[int, np.ndarray], shared: bool) -> _MeanSquares:
        a, s, r = values.shape
        squares, without_one, log_variance = np.zeros(5), np.zeros((5, s)), np.zeros(5)
        for part, numbers in layers.items():
            count = numbers.shape[1]
            own = (numbers**2).sum(axis=1)
            if part in (SELECTION, INTERACTION):  # about their mean over selections
                own = ((numbers - numbers.mean(axis=0)) ** 2).sum(axis=1)
                squares[part], df = own.sum() / ((s - 1) * count), (s - 1) * count
                without_one[part] = (own.sum() - own * s / (s - 1)) / ((s - 2) * count)
            else:
                squares[part], df = own.mean() / count, s * count
                without_one[part] = (own.sum() - own) / ((s - 1) * count)
            log_variance[part] = special.polygamma(1, df / 2)
        contrasts = layers[INTERACTION]
        means_without_one = (contrasts.sum(axis=0) - contrasts) / (s - 1)
        squares[ALGORITHM] = s * (contrasts.mean(axis=0) ** 2).sum() / (a - 1)
        without_one[ALGORITHM] = (s - 1) * (means_without_one**2).sum(axis=1) / (a - 1)
        # An effect that is not there leaves rounding, which must not look like a small one.
        rounding = (SAME * np.abs(values).max()) ** 2
        squares, without_one = (np.where(found <= rounding, 0.0, found) for found in (squares, without_one))
        if squares[ALGORITHM]:
            # The sum of squares is MS_I times a noncentral χ², of fixed algorithms.
            noise, apart = squares[INTERACTION], max(squares[ALGORITHM] - squares[INTERACTION], 0.0)
            log_variance[ALGORITHM] = (2 * noise**2 + 4 * noise * apart) / ((a - 1) * squares[ALGORITHM] ** 2)
        return cls(squares, without_one, log_variance, _variances(a, s, r, shared), _variances(a, s - 1, r, shared))

    def share(self, parts: list[int], of: list[int]) -> float:
        """The variances of some parts in those of others, no less than 0."""
        some, whole = self.variances[parts].sum(axis=0) @ self.squares, self.variances[of].sum(axis=0) @ self.squares
        return float(min(max(some / whole, 0.0), 1.0)) if whole > 0 else math.nan

    def interval(self, parts: list[int], of: list[int], level: float) -> tuple[float, float]:
        """The limits of a share; nan where they are not determined."""
        others = [part for part in of if part not in parts]

        def sides(variances: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return variances[parts].sum(axis=0) @ squares, variances[others].sum(axis=0) @ squares

        some, rest = sides(self.variances, self.squares)
        some_without, rest_without = sides(self.variances_without_one, self.without_one)
        if not rest and not rest_without.any() and some > 0:
            return 1.0, 1.0
        if not some and not some_without.any() and rest > 0:
            return 0.0, 0.0
        of_some, of_rest = self.variances[parts].sum(axis=0), self.variances[others].sum(axis=0)
        count = self.without_one.shape[1]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            offset = np.maximum(-of_some, 0) @ self.squares / rest
            centre, replicates = np.log(some / rest + offset), np.log(some_without / rest_without + offset)
            jackknife = (count - 1) / count * ((replicates - replicates.mean()) ** 2).sum()
            slopes = self.squares * (of_some * rest - some * of_rest) / rest**2 / (some / rest + offset)
            error = math.sqrt(np.fmax(jackknife, (slopes**2 * self.log_variance).sum()))
            ends = centre + np.array([-1, 1]) * special.stdtrit(count - 1, (1 + level) / 2) * error
            low, high = np.maximum(1 - 1 / (1 + np.maximum(np.exp(ends) - offset, 0)), 0).tolist()
        return low, high


def _variances(a: int, s: int, r: int, shared: bool) -> np.ndarray:
    """(5, 5): variances, in rows, of mean squares; unbiased, and so perhaps below 0. With one seed, interaction is all
    the rest."""
    found = np.zeros((5, 5))
    found[ALGORITHM, [ALGORITHM, INTERACTION]] = 1 / (s * r), -1 / (s * r)
    found[SELECTION, [SELECTION, INTERACTION]] = 1 / (a * r), -1 / (a * r)
    found[INTERACTION, [INTERACTION, REST]] = 1 / r, -1 / r
    found[REST, REST] = 1
    if shared:
        found[SELECTION, [COMMON_SEED, REST]] = -1 / (a * r), 1 / (a * r)
        found[COMMON_SEED, [COMMON_SEED, REST]] = 1 / a, -1 / a
    return found


def _layers(values: np.ndarray, shared: bool) -> dict[int, np.ndarray]:
    """(s, numbers) for each mean square below that of the algorithms: independent numbers with its expectation.

    They are the scores of a selection, (a, r), times orthonormal contrasts of algorithms and of seeds: the mean of all,
    contrasts of algorithms in the mean over seeds, and those of seeds, in the mean over algorithms if seeds are shared
    and else of each algorithm.
    """
    a, s, r = values.shape
    of_algorithms, of_seeds = (linalg.helmert(size, full=True) if size > 1 else np.ones((1, 1)) for size in (a, r))
    by_seed = np.einsum("asr,qr->saq", values, of_seeds)
    both = np.einsum("saq,pa->spq", by_seed, of_algorithms)
    layers = {SELECTION: both[:, :1, 0], INTERACTION: both[:, 1:, 0]}
    if r == 1:
        return layers
    if shared:
        return layers | {COMMON_SEED: both[:, 0, 1:], REST: both[:, 1:, 1:].reshape(s, -1)}
    return layers | {REST: by_seed[:, :, 1:].reshape(s, -1)}


def _long_tails(layers: dict[int, np.ndarray]) -> str:
    """In what scores have longer tails than normal ones: "selection and seed"; "" if nowhere."""
    found = []
    for part, numbers in layers.items():
        if part in (SELECTION, INTERACTION):
            numbers = numbers - numbers.mean(axis=0)
        if numbers.size < FEWEST_FOR_KURTOSIS or np.ptp(numbers) <= SAME * np.abs(numbers).max():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fewer than 20 numbers, where few tails are long enough to be found
            if stats.kurtosistest(numbers.ravel(), alternative="greater").pvalue < LONG_TAILS:
                found.append(LAYERS[part])
    return " and ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))
