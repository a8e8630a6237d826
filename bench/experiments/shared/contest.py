"""How well measures of difficulty order samples as the truth does, and how well forecasts hit it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from bench.stats.estimates import Estimate, over_sets, partial_spearman, rank_correlation, spearman

MRD = "mrd"


@dataclass(frozen=True)
class Entry:
    """A measure that takes part.

    Attributes:
        name: with the look-ahead, where there is one.
        values: (N,).
        harder: +1 if a higher value should mean harder, -1 if a lower one.
        cost: forward passes a sample.
        in_updates: it is a number of updates, and can be held against the true one.
    """

    name: str
    values: np.ndarray
    harder: int
    cost: float
    in_updates: bool = False

    @property
    def hardness(self) -> np.ndarray:
        """(N,), higher for harder; what is not defined for a sample is worth the median."""
        values = self.harder * np.asarray(self.values, dtype=float)
        return np.where(np.isnan(values), np.nanmedian(values), values) if np.isnan(values).any() else values


@dataclass(frozen=True)
class Truth:
    """What a measure is held against.

    Attributes:
        name: in words.
        updates: (N,) until a sample is forgotten, inf where it was not at the cap; forgotten together the mean rank
            over the seeds stands for it.
        typical: (N,) a number of updates for calibration; together the median over the seeds.
        ceiling: the largest rank correlation that a measure can have with it, where it is noisy: the square root of the
            reliability of the mean over the seeds; 1 where it is not.
    """

    name: str
    updates: np.ndarray
    typical: np.ndarray
    ceiling: float = 1.0

    @classmethod
    def alone(cls, name: str, updates: np.ndarray) -> Truth:
        """Samples that were forgotten one by one."""
        return cls(name, updates, updates)

    @classmethod
    def together(cls, name: str, by_seed: Sequence[np.ndarray]) -> Truth:
        """Samples that were forgotten together, in a run for each seed.

        Reliability is that of Spearman and Brown: k r / (1 + (k - 1) r) of the mean over k seeds, r the mean rank
        correlation of two of them.
        """
        ranks = np.mean([stats.rankdata(updates) for updates in by_seed], axis=0)
        count = len(by_seed)
        ceiling = math.nan
        if count > 1:
            between = float(np.mean([rank_correlation(one, other) for one, other in combinations(by_seed, 2)]))
            ceiling = math.sqrt(max(0.0, count * between / (1 + (count - 1) * between)))
        return cls(name, ranks, np.median(by_seed, axis=0), ceiling)


@dataclass(frozen=True)
class Score:
    """How an entry does against a truth; all rank correlations are +1 where its order from easy to hard is the true
    one.

    Attributes:
        entry: the entry.
        truth: the truth.
        samples: how many are compared.
        correlation: Spearman's.
        beyond_length: the same with the number of scored tokens partialled out.
        middle_lengths: the same over the middle half of the lengths.
        ahead_of_mrd: its correlation less that of MRD, paired; None for MRD.
        ratio: median forecast / truth; None for what is not in updates.
        spread: the 10 and 90 % quantiles of that.
    """

    entry: Entry
    truth: Truth
    samples: int
    correlation: Estimate
    beyond_length: Estimate
    middle_lengths: Estimate
    ahead_of_mrd: Estimate | None
    ratio: Estimate | None
    spread: tuple[float, float] = (math.nan, math.nan)


def halves(sample_ids: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of the samples, (N,) bool each: one to choose measures on, the other to report on."""
    order = np.random.default_rng(seed).permutation(len(sample_ids))
    first = np.zeros(len(sample_ids), dtype=bool)
    first[order[: len(order) // 2]] = True
    return first, ~first


def score(entries: Mapping[str, Entry], truth: Truth, tokens: np.ndarray, rows: np.ndarray) -> dict[str, Score]:
    """How the entries do on some of the samples; those with nothing to forget are left out.

    Args:
        entries: by name, MRD among them.
        truth: of all N samples.
        tokens: (N,) scored tokens.
        rows: (N,) bool, the samples to use.
    """
    rows = rows & (truth.typical > 0)
    hard, lengths = truth.updates[rows], tokens[rows].astype(float)
    low, high = np.quantile(lengths, [0.25, 0.75]) if len(lengths) else (0.0, 0.0)
    middle = (lengths >= low) & (lengths <= high)
    by_mrd = entries[MRD].hardness[rows]
    scores = {}
    for name, entry in entries.items():
        values = entry.hardness[rows]
        ahead = None if name == MRD else _difference(values, by_mrd, hard)
        ratio, spread = _calibration(entry.values[rows], truth.typical[rows]) if entry.in_updates else (None, None)
        scores[name] = Score(
            entry,
            truth,
            int(rows.sum()),
            spearman(values, hard),
            partial_spearman(values, hard, lengths),
            spearman(values[middle], hard[middle]),
            ahead,
            ratio,
            spread or (math.nan, math.nan),
        )
    return scores


def best(entries: Mapping[str, Entry], truth: Truth, rows: np.ndarray) -> str:
    """The entry with the highest rank correlation on some of the samples."""
    rows = rows & (truth.typical > 0)
    found = {
        name: float(rank_correlation(entry.hardness[rows], truth.updates[rows])) for name, entry in entries.items()
    }
    return max(found, key=lambda name: found[name] if math.isfinite(found[name]) else -2.0)


def _difference(one: np.ndarray, other: np.ndarray, hard: np.ndarray) -> Estimate:
    def statistic(sets: list[np.ndarray]) -> np.ndarray:
        rows = sets[0]
        return rank_correlation(one[rows], hard[rows]) - rank_correlation(other[rows], hard[rows])

    return over_sets(statistic, [len(hard)])


def _calibration(forecast: np.ndarray, true: np.ndarray) -> tuple[Estimate, tuple[float, float]]:
    """Median, and 10 and 90 % quantiles, of forecast / truth over the samples where both are finite."""
    known = np.isfinite(forecast) & np.isfinite(true) & (true > 0)
    ratios = forecast[known] / true[known]
    if not len(ratios):
        return Estimate(math.nan, math.nan, math.nan), (math.nan, math.nan)
    low, high = np.quantile(ratios, [0.1, 0.9]).tolist()
    return over_sets(lambda sets: np.median(ratios[sets[0]], axis=-1), [len(ratios)]), (low, high)
