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
ALL = "average"  # stands for an algorithm where all of them are averaged
# Metrics that sum up one side of a table, and so decide; where a side has none, all of its metrics do.
AVERAGES = {"uc_average": "UC", "ut_average": "UT", "wmdp_average": "WMDP accuracy", "mmlu": "MMLU accuracy"}
COLOURS = {UNIFORM: MUTED, EASY_FIRST: BLUE, HARD_FIRST: VERMILLION}
MARKERS = {UNIFORM: "o", EASY_FIRST: "s", HARD_FIRST: "^"}


def method_name(algorithm: str, arm: str) -> str:
    """An algorithm with an arm, as the paper names it."""
    if arm == UNIFORM:
        return algorithm
    return "CGA" if (algorithm, arm) == ("SGA", EASY_FIRST) else f"{algorithm} + {arm}"


def metric_label(name: str) -> str:
    """A metric's title with an arrow to the better side."""
    metric = METRICS[name]
    return f"{AVERAGES.get(name, metric.title)} {'↑' if metric.higher_is_better else '↓'}"


def digits(metric: str) -> int:
    """How many digits follow the point: 3 of shares, 2 of perplexities."""
    return 2 if metric == "perplexity" else 3


@dataclass(frozen=True)
class Columns:
    """The metrics of a table, in its order.

    Attributes:
        completeness, utility: the two sides of the table.
    """

    completeness: tuple[str, ...]
    utility: tuple[str, ...]

    @classmethod
    def of(cls, task_name: str, trials: pa.Table) -> Columns:
        """The metrics of the paper's table of a task that were measured.

        Raises:
            UserError: no metric of one of the sides was measured.
        """
        task = find_task(task_name)[0]
        measured = {name for name in trials.column_names if trials[name].null_count < trials.num_rows}
        sides = (task.completeness, task.utility)
        columns = cls(*(tuple(name for name in side if name in measured) for side in sides))
        if not (columns.completeness and columns.utility):
            expected = " and one of ".join(", ".join(side) for side in sides)
            raise UserError(f"the trials lack metrics: expected one of {expected} under evaluate")
        return columns

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.completeness, *self.utility)

    @property
    def judged(self) -> tuple[str, ...]:
        """The metrics that decide whether a claim holds."""
        return tuple(
            name
            for side in (self.completeness, self.utility)
            for name in (tuple(metric for metric in side if metric in AVERAGES) or side)
        )

    def side(self, metric: str) -> str:
        return "completeness" if metric in self.completeness else "utility"


def merged(tables: Sequence[pa.Table]) -> pa.Table:
    """Trials, or their epochs, of several sweeps, which may have different columns; a row that two have comes once."""
    rows = {(row["trial"], row.get("epoch")): row for table in tables for row in table.to_pylist()}
    return as_table(list(rows.values()))


def arm_of_alpha(row: Row) -> str:
    return ARMS.get(row["alpha"], f"MRD^{row['alpha']:g}")


@dataclass(frozen=True)
class Outcome:
    """The metrics at the end of one trial.

    Attributes:
        algorithm, arm, seed: of the trial.
        values: metric -> value, where it was measured.
    """

    algorithm: str
    arm: str
    seed: int
    values: Mapping[str, float]


def finished_outcomes(
    trials: pa.Table, metrics: Sequence[str], arm_of: Callable[[Row], str] = arm_of_alpha
) -> tuple[list[Outcome], str | None]:
    """The outcomes of the trials that finished; and a sentence about those that did not, None if all did."""
    rows = trials.to_pylist()
    finished = [row for row in rows if row["status"] == FINISHED]
    outcomes = [
        Outcome(
            row["algorithm"],
            arm_of(row),
            row["seed"],
            {name: row[name] for name in metrics if row.get(name) is not None},
        )
        for row in finished
    ]
    if len(finished) == len(rows):
        return outcomes, None
    lost = len(rows) - len(finished)
    reasons = sorted({f"{row['algorithm']}: {row['reason'] or row['status']}" for row in rows if row not in finished})
    return outcomes, f"{lost} of {len(rows)} trials did not finish and are left out ({'; '.join(reasons)})."


@dataclass(frozen=True)
class Contrast:
    """The difference between two arms of an algorithm, seed by seed.

    Attributes:
        algorithm: or ALL.
        arm, against: the difference is arm - against.
        metric: of the difference.
        difference: mean over seeds, with the interval of this difference alone.
        p: two-sided, of no difference.
        corrected: p, corrected for the number of comparisons that were made together.
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

    def text(self) -> str:
        places = digits(self.metric)
        if self.pairs > 1 and math.isfinite(self.difference.value) and not math.isfinite(self.difference.low):
            return f"{metric_label(self.metric)} {decimal(self.difference.value, places)} [the same in every seed]"
        return f"{metric_label(self.metric)} {with_ci(self.difference, places)}"


def contrasts(
    outcomes: Sequence[Outcome], metrics: Sequence[str], arm: str, against: str, average: bool = False
) -> list[Contrast]:
    """The contrasts of every algorithm that has both arms, on every metric; corrected for their number together.

    Args:
        average: the mean over the algorithms instead, on the seeds that all of them have.
    """
    # algorithm -> metric -> seed -> difference
    differences: dict[str, dict[str, dict[int, float]]] = {}
    for algorithm in dict.fromkeys(outcome.algorithm for outcome in outcomes):
        by_metric = {metric: _differences(outcomes, algorithm, metric, arm, against) for metric in metrics}
        if any(by_metric.values()):
            differences[algorithm] = by_metric
    if average and differences:
        differences = {
            ALL: {metric: _averaged([by_metric[metric] for by_metric in differences.values()]) for metric in metrics}
        }
    cells = [
        (algorithm, metric, list(by_metric[metric].values()))
        for algorithm, by_metric in differences.items()
        for metric in metrics
    ]
    tests = [t_test(values) for *_, values in cells]
    corrected = holm([p for _, p in tests])
    return [
        Contrast(algorithm, arm, against, metric, difference, p, corrected_p, len(values))
        for (algorithm, metric, values), (difference, p), corrected_p in zip(cells, tests, corrected, strict=True)
    ]


def _differences(outcomes: Sequence[Outcome], algorithm: str, metric: str, arm: str, against: str) -> dict[int, float]:
    """Seed -> arm - against."""
    values = {
        which: {
            outcome.seed: outcome.values[metric]
            for outcome in outcomes
            if (outcome.algorithm, outcome.arm) == (algorithm, which) and metric in outcome.values
        }
        for which in (arm, against)
    }
    return {seed: value - values[against][seed] for seed, value in values[arm].items() if seed in values[against]}


def _averaged(differences: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Seed -> mean over the algorithms, for the seeds that all have."""
    shared_seeds = set.intersection(*(set(by_seed) for by_seed in differences))
    return {seed: float(np.mean([by_seed[seed] for by_seed in differences])) for seed in sorted(shared_seeds)}


def methods_of(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """Algorithms and their arms, in the order in which they appear, the arms of an algorithm together."""
    algorithms = list(dict.fromkeys(outcome.algorithm for outcome in outcomes))
    arms = list(dict.fromkeys(outcome.arm for outcome in outcomes))
    present = {(outcome.algorithm, outcome.arm) for outcome in outcomes}
    return [(algorithm, arm) for algorithm in algorithms for arm in arms if (algorithm, arm) in present]


def values_of(outcomes: Sequence[Outcome], algorithm: str, arm: str, metric: str) -> list[float]:
    """The values of a metric, one for each seed."""
    return [
        outcome.values[metric]
        for outcome in outcomes
        if (outcome.algorithm, outcome.arm) == (algorithm, arm) and metric in outcome.values
    ]


def plus_minus(values: Sequence[float], places: int = 3) -> str:
    """The mean and half its interval: "0.812 ± 0.013"."""
    mean = over_seeds(values)
    half = f" ± {decimal(mean.high - mean.value, places)}" if math.isfinite(mean.high) else ""
    return decimal(mean.value, places) + half


def by_algorithm(single: Sequence[Contrast]) -> dict[str, list[Contrast]]:
    """The contrasts of each algorithm."""
    groups: dict[str, list[Contrast]] = {}
    for contrast in single:
        groups.setdefault(contrast.algorithm, []).append(contrast)
    return groups
