"""The arms of weighted sampling: easy first, uniform, hard first; their outcomes and contrasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from bench.files.status import FINISHED
from bench.jobs.sweep_tables import as_table
from bench.metrics import METRICS
from bench.report.figures import BLUE, MUTED, VERMILLION
from bench.report.words import decimal, with_ci
from bench.stats.estimates import LEVEL, Estimate, holm, over_seeds, t_test
from bench.tasks.datasets import find_task
from scoring.errors import UserError

Row = Mapping[str, Any]
UNIFORM, EASY_FIRST, HARD_FIRST = "uniform", "MRD", "1/MRD"
ARMS = {0.0: UNIFORM, 1.0: EASY_FIRST, -1.0: HARD_FIRST}
# Of all algorithms together.
ALL = "average"
# Metrics that sum up one side of a table, and so decide; where a side has none, all of its metrics do.
AVERAGES = {"uc_average": "UC", "ut_average": "UT", "wmdp_average": "WMDP accuracy", "mmlu": "MMLU accuracy"}
COLOURS = {UNIFORM: MUTED, EASY_FIRST: BLUE, HARD_FIRST: VERMILLION}
MARKERS = {UNIFORM: "o", EASY_FIRST: "s", HARD_FIRST: "^"}


def method(algorithm: str, arm: str) -> str:
    """As the paper names it."""
    if arm == UNIFORM:
        return algorithm
    return "CGA" if (algorithm, arm) == ("SGA", EASY_FIRST) else f"{algorithm} + {arm}"


def label(metric: str) -> str:
    """A metric's name with an arrow to what is better."""
    own = METRICS[metric]
    return f"{AVERAGES.get(metric, own.title)} {'↑' if own.higher_is_better else '↓'}"


def digits(metric: str) -> int:
    """Of shares 3, of perplexities 2."""
    return 2 if metric == "perplexity" else 3


@dataclass(frozen=True)
class Columns:
    """The metrics of a table, in its order.

    Attributes:
        completeness, utility: its two sides.
    """

    completeness: tuple[str, ...]
    utility: tuple[str, ...]

    @classmethod
    def of(cls, task: str, trials: pa.Table) -> Columns:
        """Those of the paper's table of a task that were measured.

        Raises:
            UserError: none was of one of the sides.
        """
        own = find_task(task)[0]
        there = {name for name in trials.column_names if trials[name].null_count < trials.num_rows}
        found = cls(*(tuple(name for name in side if name in there) for side in (own.completeness, own.utility)))
        if not (found.completeness and found.utility):
            wanted = " and one of ".join(", ".join(side) for side in (own.completeness, own.utility))
            raise UserError(f"the trials lack metrics: expected one of {wanted} under evaluate")
        return found

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.completeness, *self.utility)

    @property
    def judged(self) -> tuple[str, ...]:
        """Those that decide."""
        return tuple(
            name
            for side in (self.completeness, self.utility)
            for name in (tuple(each for each in side if each in AVERAGES) or side)
        )

    def side(self, metric: str) -> str:
        return "completeness" if metric in self.completeness else "utility"


def together(tables: Sequence[pa.Table]) -> pa.Table:
    """Trials, or their epochs, of several sweeps, which may have different columns; what is in two of them, once."""
    rows = {(row["trial"], row.get("epoch")): row for table in tables for row in table.to_pylist()}
    return as_table(list(rows.values()))


def arm_of_alpha(row: Row) -> str:
    return ARMS.get(row["alpha"], f"MRD^{row['alpha']:g}")


@dataclass(frozen=True)
class Outcome:
    """What one trial ended with.

    Attributes:
        algorithm, arm, seed: of the trial.
        values: metric -> value, where it was measured.
    """

    algorithm: str
    arm: str
    seed: int
    values: Mapping[str, float]


def outcomes(
    trials: pa.Table, metrics: Sequence[str], arm_of: Callable[[Row], str] = arm_of_alpha
) -> tuple[list[Outcome], str | None]:
    """Of the trials that finished; and a sentence about those that did not, None if all did."""
    rows = trials.to_pylist()
    done = [row for row in rows if row["status"] == FINISHED]
    found = [
        Outcome(
            row["algorithm"],
            arm_of(row),
            row["seed"],
            {name: row[name] for name in metrics if row.get(name) is not None},
        )
        for row in done
    ]
    if len(done) == len(rows):
        return found, None
    why = sorted({f"{row['algorithm']}: {row['reason'] or row['status']}" for row in rows if row not in done})
    return found, f"{len(rows) - len(done)} of {len(rows)} trials did not finish and are left out ({'; '.join(why)})."


@dataclass(frozen=True)
class Contrast:
    """Two arms of an algorithm, seed by seed.

    Attributes:
        algorithm: or ALL.
        arm, against: which are compared.
        metric: of the difference.
        difference: arm - against, mean over seeds, with the interval of this difference alone.
        p: two-sided, of no difference.
        corrected: the same for the number of comparisons that were made together.
        pairs: seeds that both arms have.
    """

    algorithm: str
    arm: str
    against: str
    metric: str
    difference: Estimate
    p: float
    corrected: float
    pairs: int

    @property
    def better(self) -> int:
        """+1 if the arm is better, -1 if it is worse, 0 if that cannot be told after the correction."""
        if not self.corrected < 1 - LEVEL:
            return 0
        return 1 if (self.difference.value > 0) == METRICS[self.metric].higher_is_better else -1

    @property
    def better_alone(self) -> int:
        """The same without the correction: what the interval of the difference says."""
        return self.difference.sign * (1 if METRICS[self.metric].higher_is_better else -1)

    def text(self) -> str:
        places = digits(self.metric)
        if self.pairs > 1 and math.isfinite(self.difference.value) and not math.isfinite(self.difference.low):
            return f"{label(self.metric)} {decimal(self.difference.value, places)} [the same in every seed]"
        return f"{label(self.metric)} {with_ci(self.difference, places)}"


def contrasts(
    found: Sequence[Outcome], metrics: Sequence[str], arm: str, against: str, average: bool = False
) -> list[Contrast]:
    """Every algorithm that has both arms, on every metric; corrected for their number together.

    Args:
        average: the mean over the algorithms instead, on the seeds that all of them have.
    """
    by_algorithm: dict[str, dict[str, dict[int, float]]] = {}
    for algorithm in dict.fromkeys(outcome.algorithm for outcome in found):
        own = {metric: _differences(found, algorithm, metric, arm, against) for metric in metrics}
        if any(own.values()):
            by_algorithm[algorithm] = own
    if average and by_algorithm:
        by_algorithm = {ALL: {metric: _averaged([own[metric] for own in by_algorithm.values()]) for metric in metrics}}
    cells = [
        (algorithm, metric, list(own[metric].values())) for algorithm, own in by_algorithm.items() for metric in metrics
    ]
    estimates = [t_test(values) for *_, values in cells]
    corrected = holm([p for _, p in estimates])
    return [
        Contrast(algorithm, arm, against, metric, estimate, p, holm_p, len(values))
        for (algorithm, metric, values), (estimate, p), holm_p in zip(cells, estimates, corrected, strict=True)
    ]


def _differences(found: Sequence[Outcome], algorithm: str, metric: str, arm: str, against: str) -> dict[int, float]:
    """Seed -> arm - against."""
    values = {
        which: {
            outcome.seed: outcome.values[metric]
            for outcome in found
            if (outcome.algorithm, outcome.arm) == (algorithm, which) and metric in outcome.values
        }
        for which in (arm, against)
    }
    return {seed: value - values[against][seed] for seed, value in values[arm].items() if seed in values[against]}


def _averaged(differences: Sequence[Mapping[int, float]]) -> dict[int, float]:
    shared = set.intersection(*(set(own) for own in differences))
    return {seed: float(np.mean([own[seed] for own in differences])) for seed in sorted(shared)}


def methods(found: Sequence[Outcome]) -> list[tuple[str, str]]:
    """Algorithms and their arms, in the order in which they come, arms of an algorithm together."""
    algorithms = list(dict.fromkeys(outcome.algorithm for outcome in found))
    arms = list(dict.fromkeys(outcome.arm for outcome in found))
    there = {(outcome.algorithm, outcome.arm) for outcome in found}
    return [(algorithm, arm) for algorithm in algorithms for arm in arms if (algorithm, arm) in there]


def values_of(found: Sequence[Outcome], algorithm: str, arm: str, metric: str) -> list[float]:
    """One for each seed."""
    return [
        outcome.values[metric]
        for outcome in found
        if (outcome.algorithm, outcome.arm) == (algorithm, arm) and metric in outcome.values
    ]


def plus_minus(values: Sequence[float], places: int = 3) -> str:
    """0.812 ± 0.013: the mean and half its interval."""
    mean = over_seeds(values)
    half = f" ± {decimal(mean.high - mean.value, places)}" if math.isfinite(mean.high) else ""
    return decimal(mean.value, places) + half


def grouped(single: Sequence[Contrast]) -> dict[str, list[Contrast]]:
    """By algorithm."""
    found: dict[str, list[Contrast]] = {}
    for contrast in single:
        found.setdefault(contrast.algorithm, []).append(contrast)
    return found


def bars(estimates: Sequence[Estimate]) -> np.ndarray:
    """Lengths of error bars, (2, n); 0 where there is no interval."""
    arms = np.array([[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]])
    return np.nan_to_num(np.clip(arms, 0, None))
