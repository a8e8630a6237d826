"""The arms of weighted sampling: easy first, uniform, hard first; their outcomes and contrasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from bench.files.status import FINISHED
from bench.jobs.sweep_tables import as_table
from bench.metrics import METRICS
from bench.report.figures import BLUE, MUTED, VERMILLION
from bench.report.words import decimal, with_ci
from bench.stats.estimates import Estimate, exponential, over_seeds, t_test
from bench.stats.verdicts import Claim, Scale, over_runs
from bench.tasks.datasets import find_task
from scoring.errors import UserError

Row = Mapping[str, Any]
Pair = tuple[str, int]  # what runs of different arms share: the selection of samples, and the seed
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


def metric_title(name: str) -> str:
    return AVERAGES.get(name) or METRICS[name].title


def metric_label(name: str) -> str:
    """A metric's title with an arrow to the better side."""
    return f"{metric_title(name)} {'↑' if METRICS[name].higher_is_better else '↓'}"


def better_sign(metric: str) -> int:
    """Of a change for the better."""
    return 1 if METRICS[metric].higher_is_better else -1


def scale_of(metric: str) -> Scale:
    """On which a metric is compared: perplexities by their ratio, shares by their difference."""
    return "log ratio" if metric == "perplexity" else "difference"


def change_of(metric: str, change: float) -> float:
    """A change as people write it on the scale on which the metric is compared: a perplexity's is a share of it."""
    return math.log1p(change) if scale_of(metric) == "log ratio" else change


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
    def of(cls, task_name: str, metrics: Collection[str]) -> Columns:
        """Those of the metrics that are in the paper's table of a task.

        Raises:
            UserError: none of them is of one of the sides.
        """
        task = find_task(task_name)[0]
        sides = (task.completeness, task.utility)
        columns = cls(*(tuple(name for name in side if name in metrics) for side in sides))
        if not (columns.completeness and columns.utility):
            expected = " and one of ".join(", ".join(side) for side in sides)
            raise UserError(f"too few metrics for the table: expected one of {expected} under evaluate")
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


def pair_of(row: Row) -> Pair:
    return row["selection"], row["seed"]


@dataclass(frozen=True)
class Outcome:
    """The metrics at the end of one trial.

    Attributes:
        algorithm, arm: of the trial.
        pair: the samples that were forgotten, and the seed.
        values: metric -> value, where it was measured.
    """

    algorithm: str
    arm: str
    pair: Pair
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
            pair_of(row),
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
    """The difference between two arms of an algorithm, pair by pair.

    Attributes:
        algorithm: or ALL.
        arm, against: the difference is arm - against.
        metric: of the difference; of its logarithm where it is compared by ratios, see `scale_of`.
        by_pair: the difference of each pair that both arms have. Pairs are taken to be independent: they differ by
            their seed, or by their samples.
        algorithms: how many the difference is the mean of.
    """

    algorithm: str
    arm: str
    against: str
    metric: str
    by_pair: Mapping[Pair, float]
    algorithms: int = 1

    @property
    def differences(self) -> list[float]:
        return list(self.by_pair.values())

    @property
    def difference(self) -> Estimate:
        """Mean over the pairs, with the interval of this difference alone."""
        return t_test(self.differences)[0]

    @property
    def p(self) -> float:
        """Two-sided, of no difference; not corrected for other comparisons."""
        return t_test(self.differences)[1]

    @property
    def pairs(self) -> int:
        return len(self.by_pair)

    def text(self) -> str:
        estimate, places, ratio = self.difference, digits(self.metric), ""
        if scale_of(self.metric) == "log ratio":
            estimate, places, ratio = exponential(estimate), 3, "ratio "
        if self.pairs > 1 and math.isfinite(estimate.value) and not math.isfinite(estimate.low):
            certainty = f"{decimal(estimate.value, places)} [the same in every pair]"
        else:
            certainty = with_ci(estimate, places)
        return f"{metric_label(self.metric)} {ratio}{certainty}"

    def claim(
        self,
        text: str,
        effect: str,
        sign: int,
        margin: float,
        paper: float | None = None,
        exploratory: bool = False,
    ) -> Claim:
        """A claim on this difference.

        Args:
            margin, paper: the smallest change that matters, and the paper's, see `change_of`.
        """
        return Claim(
            text,
            effect,
            sign,
            change_of(self.metric, margin),
            over_runs(self.differences),
            self.pairs,
            unit_of(self.by_pair),
            scale_of(self.metric),
            None if paper is None else change_of(self.metric, paper),
            exploratory,
        )


def unit_of(pairs: Collection[Pair]) -> str:
    """What the independent units of a comparison are."""
    return "seeds" if len({selection for selection, _ in pairs}) <= 1 else "pairs of runs"


def contrasts(
    outcomes: Sequence[Outcome], metrics: Sequence[str], arm: str, against: str, average: bool = False
) -> list[Contrast]:
    """The contrasts of every algorithm that has both arms, on every metric.

    Args:
        average: the mean over the algorithms instead, on the pairs that all of them have.
    """
    # algorithm -> metric -> pair -> difference
    differences: dict[str, dict[str, dict[Pair, float]]] = {}
    for algorithm in dict.fromkeys(outcome.algorithm for outcome in outcomes):
        by_metric = {metric: _differences(outcomes, algorithm, metric, arm, against) for metric in metrics}
        if any(by_metric.values()):
            differences[algorithm] = by_metric
    algorithms = len(differences) if average else 1
    if average and differences:
        differences = {
            ALL: {metric: _averaged([by_metric[metric] for by_metric in differences.values()]) for metric in metrics}
        }
    return [
        Contrast(algorithm, arm, against, metric, by_metric[metric], algorithms)
        for algorithm, by_metric in differences.items()
        for metric in metrics
    ]


def _differences(outcomes: Sequence[Outcome], algorithm: str, metric: str, arm: str, against: str) -> dict[Pair, float]:
    """Pair -> arm - against."""
    on_scale = math.log if scale_of(metric) == "log ratio" else float
    values = {
        which: {
            outcome.pair: on_scale(outcome.values[metric])
            for outcome in outcomes
            if (outcome.algorithm, outcome.arm) == (algorithm, which) and metric in outcome.values
        }
        for which in (arm, against)
    }
    return {pair: value - values[against][pair] for pair, value in values[arm].items() if pair in values[against]}


def _averaged(differences: Sequence[Mapping[Pair, float]]) -> dict[Pair, float]:
    """Pair -> mean over the algorithms, for the pairs that all have."""
    shared = set.intersection(*(set(by_pair) for by_pair in differences))
    return {pair: float(np.mean([by_pair[pair] for by_pair in differences])) for pair in sorted(shared)}


def methods_of(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """Algorithms and their arms, in the order in which they appear, the arms of an algorithm together."""
    algorithms = list(dict.fromkeys(outcome.algorithm for outcome in outcomes))
    arms = list(dict.fromkeys(outcome.arm for outcome in outcomes))
    present = {(outcome.algorithm, outcome.arm) for outcome in outcomes}
    return [(algorithm, arm) for algorithm in algorithms for arm in arms if (algorithm, arm) in present]


def values_of(outcomes: Sequence[Outcome], algorithm: str, arm: str, metric: str) -> list[float]:
    """The values of a metric, one for each run."""
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
