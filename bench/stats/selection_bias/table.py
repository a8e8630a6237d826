"""The table of scores, and the differences between its algorithms."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from scipy import stats

from bench.stats.estimates import LEVEL, Estimate, t_interval
from scoring.errors import UserError

FEWEST_SELECTIONS = 3  # fewer leave the differences between algorithms with one degree of freedom or none
SAME = 1e-12  # scores this near to each other, in units of the largest, are ties: means of the same runs round apart


@dataclass(frozen=True)
class ScoreTable:
    """Scores of algorithms on selections, with repeated runs, of which some may be missing.

    Attributes:
        algorithms: (a,) names.
        selections: (s,) names.
        values: (a, s, r) scores; nan where there is no run. The seeds of a cell are in no order unless they are shared.
        seeds_shared: whether the seeds of each complete selection are the same for all algorithms, in the same order.
    """

    algorithms: tuple[str, ...]
    selections: tuple[str, ...]
    values: np.ndarray
    seeds_shared: bool = False

    def __post_init__(self) -> None:
        a, s = len(self.algorithms), len(self.selections)
        if a < 2:
            raise UserError(
                f"number of algorithms with scores: {a} ({', '.join(self.algorithms) or 'none'}); "
                "expected at least 2 to compare; add runs of another"
            )
        if self.values.ndim != 3 or self.values.shape[:2] != (a, s) or self.values.shape[2] < 1:
            raise ValueError(f"values of shape {self.values.shape}: expected ({a}, {s}, seeds)")
        has_runs = np.isfinite(self.values).any(axis=2)
        shared = has_runs.astype(int) @ has_runs.T  # (a, a) selections that both algorithms have
        most = np.where(np.eye(a, dtype=bool), 0, shared).max(axis=1)
        if most.min() < FEWEST_SELECTIONS:
            raise UserError(
                f"selections that {self.algorithms[int(most.argmin())]} shares with another algorithm: {most.min()}; "
                f"expected at least {FEWEST_SELECTIONS} with finite scores of both; add runs or leave it out"
            )
        if np.linalg.matrix_power((shared > 0).astype(float), a).min() == 0:
            raise UserError(
                f"{_first_names(self.algorithms)} are of groups that have no selection in common: expected runs that "
                "link them; add runs or compare each group by itself"
            )

    @classmethod
    def of(
        cls,
        algorithm: Sequence[str],
        selection: Sequence[str],
        value: Sequence[float] | np.ndarray,
        seed: Sequence[int] | None = None,
    ) -> ScoreTable:
        """The table of sequences of one length, a row for each run; without `seed`, none is shared.

        Rows with the same algorithm and selection are seeds, in any order. A score that is not finite is a run that is
        missing. Names keep the order in which they first appear; a selection without a score is left out.

        Raises:
            UserError: fewer than 2 algorithms, or one that shares fewer than 3 selections with any other.
        """
        seeds_of_rows = range(len(value)) if seed is None else seed
        check_lengths(algorithm=algorithm, selection=selection, value=value, seed=seeds_of_rows)
        runs: defaultdict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
        for algorithm_name, selection_name, number, score in zip(
            algorithm, selection, seeds_of_rows, value, strict=True
        ):
            if math.isfinite(score):
                runs[algorithm_name, selection_name].append((number, float(score)))
        scored = {name for _, name in runs}
        algorithms = tuple(dict.fromkeys(algorithm))
        selections = tuple(name for name in dict.fromkeys(selection) if name in scored)
        values = np.full((len(algorithms), len(selections), max(map(len, runs.values()), default=1)), np.nan)
        row_of, column_of = ({name: n for n, name in enumerate(names)} for names in (algorithms, selections))
        for (algorithm_name, selection_name), of_cell in runs.items():
            scores = [score for _, score in sorted(of_cell)]
            values[row_of[algorithm_name], column_of[selection_name], : len(scores)] = scores
        complete = _complete(values)
        shared = all(
            len({tuple(sorted(number for number, _ in runs[row, column])) for row in algorithms}) == 1
            for column, is_complete in zip(selections, complete, strict=True)
            if is_complete
        )
        return cls(algorithms, selections, values, shared)

    @property
    def seeds(self) -> int:
        """The most that a cell has."""
        return self.values.shape[2]

    @cached_property
    def means(self) -> np.ndarray:
        """(a, s): over the seeds; nan where there is none."""
        runs = np.isfinite(self.values).sum(axis=2)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.nansum(self.values, axis=2) / runs)

    @cached_property
    def is_complete(self) -> np.ndarray:
        """(s,): selections with r scores of every algorithm, r being what most selections can give."""
        return _complete(self.values)

    @property
    def incomplete(self) -> tuple[str, ...]:
        return tuple(name for name, kept in zip(self.selections, self.is_complete, strict=True) if not kept)

    @cached_property
    def complete(self) -> ScoreTable:
        """The complete selections alone, with the same number of seeds everywhere.

        Raises:
            UserError: there are fewer than three.
        """
        if self.is_complete.all() and np.isfinite(self.values).all():
            return self
        count = int(self.is_complete.sum())
        if count < FEWEST_SELECTIONS:
            raise UserError(
                f"number of complete selections: {count} ({len(self.incomplete)} are not: "
                f"{_first_names(self.incomplete)}); expected at least {FEWEST_SELECTIONS} with the same number of "
                f"finite scores for each of {_first_names(self.algorithms)}; add the missing runs or leave out an "
                "algorithm"
            )
        values = self.values[:, self.is_complete]
        seeds = int(np.isfinite(values[0, 0]).sum())
        names = tuple(name for name, kept in zip(self.selections, self.is_complete, strict=True) if kept)
        return ScoreTable(self.algorithms, names, values[..., :seeds], self.seeds_shared)


def _complete(values: np.ndarray) -> np.ndarray:
    """(s,): which selections have r scores of every algorithm, r being the number that most selections can give (the
    larger of two equally common ones)."""
    counts = np.isfinite(values).sum(axis=2)  # (a, s)
    most = counts.max(axis=0, initial=0)
    even = (counts == most).all(axis=0) & (most > 0)
    frequency = Counter(most[even].tolist())
    seeds = max(frequency, key=lambda count: (frequency[count], count), default=0)
    return np.asarray(even & (most == seeds))


def mean_scores(table: ScoreTable, level: float = LEVEL) -> tuple[Estimate, ...]:
    """Each algorithm's mean over all selections, also over those that it has no run on.

    If hard selections fail more often, the mean over what an algorithm has finished is that of the easy ones, and so is
    the mean over complete selections. Here y_ij = A_i + S_j is fitted to the cells that there are by least squares, and
    A_i + mean(S) is given: with all cells, the mean of the algorithm's. It supposes that a cell is missing by its
    selection and algorithm, and not by the score that it would have had beyond them.

    Intervals are t intervals of the delete-one-selection jackknife, with the degrees of freedom of the selections that
    the algorithm has; with all cells, Student's. nan where leaving out a selection leaves a mean unknown.
    """
    cells = table.means  # (a, s)
    s = cells.shape[1]
    means, without = _fitted_means(cells)
    error = np.sqrt((s - 1) / s * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    half = stats.t.ppf((1 + level) / 2, np.isfinite(cells).sum(axis=1) - 1) * error
    return tuple(Estimate(*map(float, ends)) for ends in zip(means, means - half, means + half, strict=True))


def _fitted_means(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A_i + mean(S_j) of (a, s) cells: of all selections, (a,), and without each of them, (s, a); nan where not all
    algorithms are linked by selections."""
    there = np.isfinite(cells)
    counts = np.maximum(there.sum(axis=0), 1)  # a selection without a cell adds nothing
    filled = np.where(there, cells, 0.0)
    centred = np.where(there, cells - filled.sum(axis=0) / counts, 0.0)
    # What each selection adds to the sums below, which without it are the whole less that: (s, ...).
    shares = (there / counts).T
    added = there.T[:, :, None] * np.eye(len(cells)) - shares[:, :, None] * there.T[:, None, :]
    of_selections = (filled.sum(axis=0) / counts)[:, None]

    def solved(equations: np.ndarray, right: np.ndarray, means: np.ndarray, weights: np.ndarray) -> np.ndarray:
        # The normal equations of A once S is eliminated, a graph Laplacian: of rank a - 1 if all are linked.
        linked = np.linalg.matrix_rank(equations, hermitian=True) >= len(cells) - 1
        inverse = np.linalg.pinv(equations, rcond=1e-12, hermitian=True)
        of_algorithms = (inverse @ right[..., None])[..., 0]
        fitted = of_algorithms + means - (weights * of_algorithms).sum(axis=-1, keepdims=True)
        return np.asarray(np.where(linked[..., None], fitted, np.nan))

    measured = there.any(axis=0)[:, None]
    count = measured.sum()
    counts_without = count - measured
    sums = [part.sum(axis=0) for part in (added, centred.T, of_selections, shares)]
    without = [whole - part for whole, part in zip(sums, (added, centred.T, of_selections, shares), strict=True)]
    return (
        solved(sums[0], sums[1], sums[2] / count, sums[3] / count),
        solved(without[0], without[1], without[2] / counts_without, without[3] / counts_without),
    )


@dataclass(frozen=True)
class Pairs:
    """Differences between pairs of algorithms on each selection, the better minus the worse.

    Attributes:
        index: (pairs,) positions of the better and the worse algorithm; of two that tie, the one that came first.
        values: (s, pairs) differences of the means over seeds; exactly 0 where they tie, nan where one has no run.
        mean: (pairs,), 0 or more, over the selections that both have; nan where they are fewer than three.
        deviation: (pairs,) standard deviation over the same.
    """

    index: list[tuple[int, int]]
    values: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, table: ScoreTable, index: list[tuple[int, int]] | None = None) -> Pairs:
        """All pairs in the order of the table, or those of `index`."""
        means = table.means
        i, j = np.array(index or list(combinations(range(len(means)), 2))).T
        tie = SAME * np.nanmax(np.abs(table.values))
        values = (means[i] - means[j]).T
        values = np.where(np.abs(values) <= tie, 0.0, values)
        counts = np.isfinite(values).sum(axis=0)
        enough = np.where(counts >= FEWEST_SELECTIONS, counts, np.nan)
        mean = np.nansum(values, axis=0) / enough
        mean = np.where(np.abs(mean) <= tie, 0.0, mean)
        turned = mean < 0
        i, j = np.where(turned, j, i), np.where(turned, i, j)
        deviation = np.sqrt(np.nansum((values - mean) ** 2, axis=0) / (enough - 1))
        deviation = np.where(deviation <= tie, 0.0, deviation)
        return cls(
            list(zip(i.tolist(), j.tolist(), strict=True)), np.where(turned, -values, values), np.abs(mean), deviation
        )

    @property
    def standardized(self) -> np.ndarray:
        """(pairs,): the mean difference in standard deviations."""
        return ratio(self.mean, self.deviation)

    @property
    def counts(self) -> np.ndarray:
        """(pairs,): selections that both have."""
        return np.asarray(np.isfinite(self.values).sum(axis=0))

    @property
    def t(self) -> np.ndarray:
        """(pairs,): the mean difference in standard errors."""
        return ratio(self.mean, self.deviation / np.sqrt(self.counts))

    @property
    def p(self) -> np.ndarray:
        """(pairs,): two-sided, of the paired t test; nan where a pair shares too few selections."""
        return np.asarray(2 * stats.t.sf(self.t, np.maximum(self.counts - 1, 1)))

    def interval(self, k: int, level: float) -> Estimate:
        """The mean difference of the k-th pair."""
        if math.isnan(self.mean[k]):
            return Estimate(math.nan, math.nan, math.nan)
        return t_interval(self.values[np.isfinite(self.values[:, k]), k], level)

    def factor(self) -> np.ndarray:
        """(q, pairs): a standard normal (q,) vector times it has the covariance of the differences of a complete
        table."""
        centred = (self.values - self.values.mean(axis=0)) * (self.deviation > 0)
        return np.asarray(np.linalg.qr(centred, mode="r")) / math.sqrt(len(centred) - 1)

    def ties(self, tied: np.ndarray) -> np.ndarray:
        """(n,): Σ (t³ - t) over groups of t algorithms that tie.

        Args:
            tied: (n, all pairs), which of them tie.
        """
        others = self._sums(tied, tied)  # t - 1 for each of the t
        return (others**2 + 2 * others).sum(axis=-1)

    def concordance(self, ahead: np.ndarray, ties: float) -> np.ndarray:
        """(...,): Kendall's W.

        Args:
            ahead: (..., all pairs), the share of selections on which the better of each pair is ahead.
            ties: see `ties`.
        """
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


def ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x / y of numbers from 0. 0 / 0 is 0: a difference of 0 is small, however little it varies."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(x == 0, 0.0, np.divide(x, y))


def check_lengths(**columns: Sequence[Hashable] | np.ndarray) -> None:
    """Refuse columns of different lengths with a ValueError."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of different lengths: {lengths}")


def _first_names(names: Sequence[str]) -> str:
    """Enough names for one line."""
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
