"""The table of scores, and the differences between its algorithms."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from bench.stats.estimates import Estimate, t_interval
from scoring.errors import UserError

FEWEST_SELECTIONS = 3  # fewer leave the differences between algorithms with one degree of freedom or none
SAME = 1e-12  # scores this near to each other, in units of the largest, are ties: means of the same runs round apart


@dataclass(frozen=True)
class ScoreTable:
    """Scores of every algorithm on every selection, with the same number of seeds everywhere.

    Attributes:
        algorithms: (a,) names.
        selections: (s,) names.
        values: (a, s, r) scores, finite; the r seeds of a cell are in no order unless they are shared.
        dropped: selections that were left out because they were not complete.
        seeds_shared: whether the seeds of each selection are the same for all algorithms, and in the same order.
    """

    algorithms: tuple[str, ...]
    selections: tuple[str, ...]
    values: np.ndarray
    dropped: tuple[str, ...] = ()
    seeds_shared: bool = False

    def __post_init__(self) -> None:
        a, s = len(self.algorithms), len(self.selections)
        if a < 2:
            raise UserError(
                f"number of algorithms with scores: {a} ({', '.join(self.algorithms) or 'none'}); "
                "expected at least 2 to compare; add runs of another"
            )
        if s < FEWEST_SELECTIONS:
            left_out = f" ({len(self.dropped)} left out: {_first_names(self.dropped)})" if self.dropped else ""
            raise UserError(
                f"number of complete selections: {s}{left_out}; expected at least {FEWEST_SELECTIONS} with the same "
                f"number of finite scores for each of {_first_names(self.algorithms)}; add the missing runs or leave "
                "out an algorithm"
            )
        if self.values.ndim != 3 or self.values.shape[:2] != (a, s) or self.values.shape[2] < 1:
            raise ValueError(f"values of shape {self.values.shape}: expected ({a}, {s}, seeds)")

    @classmethod
    def of(
        cls,
        algorithm: Sequence[str],
        selection: Sequence[str],
        value: Sequence[float] | np.ndarray,
        seed: Sequence[int] | None = None,
    ) -> ScoreTable:
        """The balanced table of sequences of one length, a row for each run; without `seed`, none is shared.

        Rows with the same algorithm and selection are seeds, in any order. A selection is kept if every algorithm has
        r finite scores on it, with r the number that most selections can give (the larger of two equally common
        ones); the others are dropped. Names keep the order in which they first appear.

        Raises:
            UserError: fewer than 2 algorithms, or fewer than 3 complete selections.
        """
        seeds_of_rows = range(len(value)) if seed is None else seed
        check_lengths(algorithm=algorithm, selection=selection, value=value, seed=seeds_of_rows)
        runs: defaultdict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
        for algorithm_name, selection_name, number, score in zip(
            algorithm, selection, seeds_of_rows, value, strict=True
        ):
            runs[algorithm_name, selection_name].append((number, float(score)))
        cells = {cell: [score for _, score in sorted(of_cell)] for cell, of_cell in runs.items()}
        algorithms, selections = tuple(dict.fromkeys(algorithm)), tuple(dict.fromkeys(selection))
        seeds_of = {}  # of the selections on which all algorithms have as many finite scores
        for selection_name in selections:
            column = [cells.get((algorithm_name, selection_name), []) for algorithm_name in algorithms]
            counts = {len(scores) for scores in column}
            if len(counts) == 1 and all(math.isfinite(score) for scores in column for score in scores):
                seeds_of[selection_name] = counts.pop()
        frequency = Counter(seeds_of.values())
        seeds = max(frequency, key=lambda count: (frequency[count], count), default=0)
        complete = tuple(name for name in selections if seeds_of.get(name) == seeds)
        values = np.array([[cells[row, column] for column in complete] for row in algorithms], dtype=float)
        dropped = tuple(name for name in selections if name not in set(complete))
        shared = all(
            len({tuple(sorted(number for number, _ in runs[row, column])) for row in algorithms}) == 1
            for column in complete
        )
        return cls(
            algorithms, complete, values.reshape(len(algorithms), len(complete), -1 if complete else 1), dropped, shared
        )

    @property
    def seeds(self) -> int:
        return self.values.shape[2]

    @property
    def means(self) -> np.ndarray:
        """(a, s): over the seeds."""
        return self.values.mean(axis=2)


@dataclass(frozen=True)
class Pairs:
    """Differences between pairs of algorithms on each selection, the better minus the worse.

    Attributes:
        index: (pairs,) positions of the better and the worse algorithm; of two that tie, the one that came first.
        values: (s, pairs) differences of the means over seeds; exactly 0 where they tie.
        mean: (pairs,), 0 or more, over the selections.
        deviation: (pairs,) standard deviation over the selections.
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

    @property
    def standardized(self) -> np.ndarray:
        """(pairs,): the mean difference in standard deviations."""
        return ratio(self.mean, self.deviation)

    def interval(self, k: int, level: float) -> Estimate:
        """The mean difference of the k-th pair."""
        return t_interval(self.values[:, k], level)

    def factor(self) -> np.ndarray:
        """(q, pairs): a standard normal (q,) vector times it has the covariance of the differences."""
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
