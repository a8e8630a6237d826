"""Which part of the variance of a score is due to the choice of the samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from bench.stats.estimates import LEVEL, Estimate
from bench.stats.selection_bias.table import SAME, ScoreTable

DRAWS = 1000
ALGORITHM, SELECTION, COMMON_SEED, INTERACTION, REST = range(5)  # rows of mean squares and of shares


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
    """

    algorithm: Estimate
    selection: Estimate
    interaction: Estimate
    seed: Estimate | None
    within_algorithm: Estimate
    within_algorithm_common: Estimate
    common_seed: Estimate | None = None

    @property
    def parts(self) -> dict[str, Estimate]:
        """The parts of the total, under the names they have in a table."""
        if self.seed is None:
            return {"algorithm": self.algorithm, "algorithm×selection + seed": self.interaction}
        parts = {"algorithm": self.algorithm, "selection": self.selection}
        if self.common_seed is not None:
            parts |= {"seed, common to all algorithms": self.common_seed}
        return parts | {"algorithm×selection": self.interaction, "seed": self.seed}


def variance_shares(table: ScoreTable, level: float = LEVEL, draws: int = DRAWS, seed: int = 0) -> VarianceShares:
    """Which part of the variance of a score is due to algorithm, selection, their interaction, and seed.

        y_ijk = mean + A_i + S_j + I_ij + e_ijk, all independent, with variances
        A = (MS_A - MS_I) / (s r), S = (MS_S - MS_I) / (a r), I = (MS_I - MS_e) / r, e = MS_e

    with MS the mean squares of the two-way table, and variances below 0 set to 0 (Searle, Casella & McCulloch 1992,
    chapter 4). Where algorithms share their seeds, a seed on a selection can move all of them alike (the same order of
    samples): R_jk is added, which would else be booked as selection,

        S = (MS_S - MS_R - MS_I + MS_e) / (a r),  R = (MS_R - MS_e) / a,

    MS_R and MS_e being the mean squares of the seeds within a selection: of their means over algorithms, and of the
    rest.

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
    shared = table.seeds_shared and r > 1
    squares = _mean_squares(table.values, shared)  # (5,)
    others = (np.arange(s)[:, None] + np.arange(1, s)) % s  # (s, s - 1): for each selection all but itself
    without_one = _mean_squares(np.moveaxis(table.values[:, others], 1, 0), shared)  # (5, s)

    of_rest = (a - 1 if shared else a) * s * (r - 1)
    df = np.array([a - 1, s - 1, s * (r - 1) if shared else 0, (a - 1) * (s - 1), of_rest], dtype=float)
    for part in range(1, 5):
        if df[part]:
            df[part] = _supported_df(df[part], without_one[part])
    rng = np.random.default_rng(seed)
    scale = df[:, None] / rng.chisquare(np.maximum(df, 1)[:, None], size=(5, draws))
    if not shared:
        scale[COMMON_SEED] = scale[REST]  # one mean square under two names
    values, resampled = _shares(squares, a, s, r), _shares(squares[:, None] * scale, a, s, r)
    tails = [(1 - level) / 2, (1 + level) / 2]
    parts = [
        Estimate(float(value), *map(float, np.quantile(shares, tails)))
        for value, shares in zip(values, resampled, strict=True)
    ]

    unknown = Estimate(math.nan, math.nan, math.nan)
    return VarianceShares(
        parts[ALGORITHM],
        parts[SELECTION] if r > 1 else unknown,
        parts[INTERACTION],
        parts[REST] if r > 1 else None,
        _correlation(_within(squares, a, r), _within(without_one, a, r), r, level) if r > 1 else unknown,
        _correlation(_common(squares, a, r), _common(without_one, a, r), a, level) if r > 1 else unknown,
        parts[COMMON_SEED] if shared else None,
    )


def _mean_squares(values: np.ndarray, shared: bool) -> np.ndarray:
    """(5, ...) mean squares of algorithm, selection, common seed, interaction and the rest, of (..., a, s, r).

    Args:
        shared: whether the seeds of a selection are the same ones for all algorithms, in the same order; else the
            common seed has the mean square of the rest, which makes its part of the variance 0.
    """
    a, s, r = values.shape[-3:]
    cells = values.mean(axis=-1, keepdims=True)
    rows, columns = cells.mean(axis=-2, keepdims=True), cells.mean(axis=-3, keepdims=True)
    grand = rows.mean(axis=-3, keepdims=True)
    within = values - cells
    in_common = within.mean(axis=-3, keepdims=True) if shared else np.zeros_like(within[..., :1, :, :])
    rest = ((within - in_common) ** 2).sum(axis=(-3, -2, -1)) / max((a - 1 if shared else a) * s * (r - 1), 1)
    squares = [
        s * r * ((rows - grand) ** 2).sum(axis=(-3, -2, -1)) / (a - 1),
        a * r * ((columns - grand) ** 2).sum(axis=(-3, -2, -1)) / (s - 1),
        a * (in_common**2).sum(axis=(-3, -2, -1)) / (s * (r - 1)) if shared else rest,
        r * ((cells - rows - columns + grand) ** 2).sum(axis=(-3, -2, -1)) / ((a - 1) * (s - 1)),
        rest,
    ]
    # An effect that is not there leaves rounding, which must not look like a small one.
    rounding = (SAME * np.abs(values).max()) ** 2
    return np.array([np.where(square <= rounding, 0.0, square) for square in squares])


def _shares(squares: np.ndarray, a: int, s: int, r: int) -> np.ndarray:
    """(5, ...) shares of the total variance, of (5, ...) mean squares; if r = 1, interaction is all the rest."""
    of_algorithm, of_both = squares[ALGORITHM], squares[INTERACTION]
    variances = np.maximum([(of_algorithm - of_both) / (s * r), *_below_algorithm(squares, a, r)], 0)
    with np.errstate(invalid="ignore"):
        return np.asarray(variances / variances.sum(axis=0))


def _below_algorithm(squares: np.ndarray, a: int, r: int) -> list[np.ndarray]:
    """Variances of selection, common seed, interaction and the rest, unbiased and so perhaps below 0."""
    _, of_selection, of_common_seed, of_both, of_rest = squares
    return [
        (of_selection - of_common_seed - of_both + of_rest) / (a * r),
        (of_common_seed - of_rest) / a,
        (of_both - of_rest) / r,
        of_rest,
    ]


def _within(squares: np.ndarray, a: int, r: int) -> np.ndarray:
    """Correlation of two runs of one algorithm on one selection, of (5, ...) mean squares."""
    _, of_selection, of_common_seed, of_both, of_rest = squares
    between, of_seed = (of_selection + (a - 1) * of_both) / a, (of_common_seed + (a - 1) * of_rest) / a
    with np.errstate(invalid="ignore"):
        return np.asarray((between - of_seed) / (between + (r - 1) * of_seed))


def _common(squares: np.ndarray, a: int, r: int) -> np.ndarray:
    """Correlation of two algorithms' runs on one selection with different seeds, of (5, ...) mean squares."""
    variances = _below_algorithm(squares, a, r)
    with np.errstate(invalid="ignore"):
        return np.asarray(variances[0] / np.sum(variances, axis=0))


def _correlation(value: np.ndarray, without_one: np.ndarray, size: int, level: float) -> Estimate:
    """An intraclass correlation, set to 0 where it is below, with its jackknife interval.

    On Fisher's scale log((1 + (size - 1) ρ) / (1 - ρ)), the log of the ratio of two mean squares.

    Args:
        without_one: (s,) the same without each of the selections.
        size: how many runs are in a group.
    """
    correlation = float(value)
    if correlation >= 1 - SAME and (without_one >= 1 - SAME).all():
        return Estimate(1.0, 1.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre, replicates = (np.log((1 + (size - 1) * rho) / (1 - rho)) for rho in (value, without_one))
    count = len(replicates)
    error = math.sqrt((count - 1) / count * ((replicates - replicates.mean()) ** 2).sum())
    ends = centre + np.array([-1, 1]) * stats.t.ppf((1 + level) / 2, count - 1) * error
    low, high = np.maximum(1 - size / (np.exp(ends) + size - 1), 0).tolist()
    return Estimate(max(correlation, 0.0), low, high)


def _supported_df(df: float, without_one: np.ndarray) -> float:
    """Degrees of freedom of a mean square, at most `df`, with the jackknife's variance of its logarithm.

    The variance of the logarithm of χ² with n degrees is trigamma(n / 2).

    Args:
        without_one: (s,) the mean square without each of the selections.
    """
    if not without_one.any():
        return df  # the mean square is 0 with any
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(without_one)
        variance = (len(logs) - 1) / len(logs) * ((logs - logs.mean()) ** 2).sum()
    if variance <= special.polygamma(1, df / 2):
        return df
    if not variance < special.polygamma(1, 0.5):
        return 1.0
    return float(optimize.brentq(lambda n: special.polygamma(1, n / 2) - variance, 1.0, df))
