"""What unlearning costs: passes through the model, counted exactly, and seconds on this machine.

The unit of cost is one forward of the whole forget set: tokens through the model, padding not counted, over those of
the forget set. A backward counts two, as it multiplies matrices twice where a forward does so once. Trials run one at
a time: seconds beside another trial would say more about the neighbour.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bench.experiments.experiment import Setup
from bench.experiments.shared.arms import Row
from bench.jobs.resources import Resources
from bench.jobs.sweep_tables import SweepResult
from bench.jobs.unlearn import UnlearnSpec, corpus_of, datasets_of
from bench.models.find import find_model
from bench.report.figures import BLUE, GREEN, INK, MUTED, ORANGE, VERMILLION, Draw, error_bars
from bench.report.words import decimal, interval
from bench.stats.estimates import LEVEL, ROUNDING, Estimate, exponential, holm, t_test
from bench.stats.verdicts import Interval, over_runs
from scoring.samples import default_batch_tokens, make_batches
from scoring.settings import build

BACKWARD = 2  # forwards that a backward costs
COST, SECONDS, UPDATES = "cost", "seconds", "updates"


def timed_sweeps(setup: Setup) -> list[SweepResult]:
    """Every sweep of the spec file, one trial at a time.

    Trials are kept apart from those of other experiments, which may have run side by side: a trial that is known by
    its hash is not run again.
    """
    alone = dataclasses.replace(setup, trials=setup.work / "trials")
    one_by_one = 0 if setup.resources.in_this_process else 1
    resources = dataclasses.replace(setup.resources, concurrent=one_by_one)
    return [alone.sweep(key, resources) for key in setup.sweep_keys()]


@dataclass(frozen=True)
class ForgetSet:
    """The size of a forget set, as it goes through the model.

    Attributes:
        tokens: of all samples, padding not counted.
        batches: in which its MRD is measured.
    """

    tokens: int
    batches: int

    @classmethod
    def of(cls, base: Mapping[str, Any]) -> ForgetSet:
        """The forget set of runs that have the settings `base` in common."""
        spec = build(UnlearnSpec, {"algorithm": "GA", **base}).checked()
        model = find_model(spec.model)
        forget, retain = datasets_of(spec, model.tokenizer)
        samples = corpus_of(spec, model, forget, retain)[0].forget
        batch_tokens = spec.batch_tokens or default_batch_tokens(Resources(0).device())
        return cls(sum(sample.length for sample in samples), len(make_batches(samples, batch_tokens)))


@dataclass(frozen=True)
class RunCost:
    """The cost of a run, or of a part of it.

    Attributes:
        algorithm, arm, seed: of the run.
        training, mrd: cost of the updates and of measuring MRD, in forwards of the forget set.
        seconds_training, seconds_mrd: the same in seconds.
        updates: how many.
        reached: in the end every sample was forgotten.
    """

    algorithm: str
    arm: str
    seed: int
    training: float
    mrd: float
    seconds_training: float
    seconds_mrd: float
    updates: float
    reached: bool = True

    @property
    def cost(self) -> float:
        return self.training + self.mrd

    @property
    def seconds(self) -> float:
        return self.seconds_training + self.seconds_mrd

    def amount(self, measure: str) -> float:
        """The value of COST, SECONDS, UPDATES, or of an attribute."""
        return float(getattr(self, measure))


def run_cost(row: Row, arm: str, forget: ForgetSet) -> RunCost:
    """The cost of a whole trial, from its row."""
    passes = row["forwards_mrd"] + BACKWARD * row["backwards_mrd"]
    return RunCost(
        row["algorithm"],
        arm,
        row["seed"],
        # Every token that goes forward in training comes back.
        row["tokens"] * (1 + BACKWARD) / forget.tokens,
        passes / forget.batches,
        row["seconds_training"],
        row["seconds_mrd"],
        row["updates"],
        row["forgotten"] == 1.0,
    )


# --- Ratios -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """How many times as much one run takes as another, seed by seed.

    Attributes:
        measure: COST, SECONDS or UPDATES.
        name: names the comparison.
        value: geometric mean of the ratios with its interval.
        p: two-sided, of a ratio of 1.
        corrected: p, corrected for the number of comparisons that were made together.
        pairs: seeds that both runs have.
        at: the logarithm of the ratio with its interval at a level of confidence.
    """

    measure: str
    name: str
    value: Estimate
    p: float
    corrected: float
    pairs: int
    at: Interval

    @property
    def sign(self) -> int:
        """+1 if it takes more, -1 if less, 0 if that cannot be told after the correction."""
        if not self.corrected < 1 - LEVEL:
            return 0
        return 1 if self.value.value > 1 else -1

    def text(self) -> str:
        return f"{self.name} {times_with_ci(self.value)}"


def ratios(measure: str, pairs: Mapping[str, Sequence[tuple[float, float]]], by_design: bool = False) -> list[Ratio]:
    """The geometric mean ratio of each list of pairs, with its t interval on the log scale; corrected together.

    Args:
        pairs: name -> (amount of one run, amount of the other) for each seed, greater than 0. Seeds that agree have no
            interval and no p: whole updates of a few seeds agree by chance too.
        by_design: amounts are counts that no seed can change, as of a round of fixed length: a ratio that is the same
            in every seed, of two or more, is known for certain.
    """
    tests = []
    for seeds in pairs.values():
        logs = [math.log(x / y) for x, y in seeds]
        log_ratio, p, at = *t_test(logs), over_runs(logs)
        if by_design and len(logs) > 1 and max(logs) - min(logs) < ROUNDING:
            log_ratio, p = Estimate(logs[0], logs[0], logs[0]), float(abs(logs[0]) < ROUNDING)
            at = functools.partial(_certain, logs[0])
        tests.append((exponential(log_ratio), p, at))
    corrected = holm([p for _, p, _ in tests])
    return [
        Ratio(measure, name, value, p, corrected_p, len(pairs[name]), at)
        for name, (value, p, at), corrected_p in zip(pairs, tests, corrected, strict=True)
    ]


def _certain(value: float, level: float) -> Estimate:
    """A value that is known at any level."""
    return Estimate(value, value, value)


def times_with_ci(estimate: Estimate) -> str:
    """A ratio: "1.23 times [95 % CI 1.10 to 1.38]"."""
    if not math.isfinite(estimate.value):
        return "not determined"
    around = interval(estimate)
    if around == "–":
        around = "too few seeds for a CI"
    elif estimate.low == estimate.high:
        around = "in every seed"
    else:
        around = f"95 % CI {around}"
    return f"{decimal(estimate.value)} times [{around}]"


# --- Pictures -----------------------------------------------------------------------------------------------

COLOURS = (MUTED, BLUE, VERMILLION, ORANGE, GREEN)
MARKERS = "os^Dv"


def ratio_dots(
    groups: Mapping[str, Sequence[Ratio]], title: str, log: bool = False, paper: Mapping[str, float] | None = None
) -> Draw:
    """Ratios by name, with 95 % intervals; a colour for each group.

    Args:
        paper: the ratios of the paper, by name.
    """

    def draw(axes: Axes) -> None:
        names = list(dict.fromkeys(ratio.name for group in groups.values() for ratio in group))
        for number, (label, group) in enumerate(groups.items()):
            known = [ratio for ratio in group if math.isfinite(ratio.value.value)]
            shift = 0.22 * (number - (len(groups) - 1) / 2)
            axes.errorbar(
                [ratio.value.value for ratio in known],
                [-names.index(ratio.name) - shift for ratio in known],
                xerr=error_bars([ratio.value for ratio in known]),
                fmt=MARKERS[(number + 1) % len(MARKERS)],
                color=COLOURS[(number + 1) % len(COLOURS)],
                capsize=4,
                linestyle="none",
                label=label,
            )
        if paper:
            in_paper = [name for name in names if name in paper]
            y = [-names.index(name) for name in in_paper]
            axes.plot([paper[name] for name in in_paper], y, "x", color=INK, label="paper")
        axes.axvline(1, color=MUTED, linewidth=1)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks([-float(row) for row in range(len(names))], names)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(-len(names) + 0.4, 0.6)
        axes.set_xlabel(title)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.1)

    return draw


def stacked_bars(groups: Mapping[str, Sequence[tuple[float, float]]], parts: tuple[str, str], title: str) -> Draw:
    """Bars of two parts each, means over seeds.

    Args:
        groups: name of a bar -> the two parts for each seed.
        parts: their names.
    """

    def draw(axes: Axes) -> None:
        names = list(groups)
        means = np.array([np.mean(groups[name], axis=0) if groups[name] else (0.0, 0.0) for name in names])
        y = -np.arange(len(names), dtype=float)
        axes.barh(y, means[:, 0], color=BLUE, height=0.6, label=parts[0])
        axes.barh(y, means[:, 1], left=means[:, 0], color=ORANGE, height=0.6, label=parts[1])
        axes.set_yticks(y, names)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(title)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.1)

    return draw
