"""What unlearning costs: what goes through the model, counted exactly, and seconds, as the machine has them.

The unit of cost is one forward of the whole forget set: tokens through the model, padding not counted, over those of
the forget set. A backward counts two, as it multiplies matrices twice where a forward does so once. Trials run alone,
one at a time: seconds beside another trial would say more about the neighbour.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bench.experiments.experiment import Setting
from bench.experiments.shared.arms import Row, bars
from bench.jobs.sweep_tables import SweepResult
from bench.jobs.unlearn import UnlearnSpec, corpus_of, datasets_of
from bench.models.find import find_model
from bench.report.figures import BLUE, GREEN, INK, MUTED, ORANGE, VERMILLION, Draw
from bench.report.words import decimal, interval
from bench.stats.estimates import LEVEL, Estimate, holm, over_seeds, t_test
from scoring.samples import make_batches
from scoring.settings import build

BACKWARD = 2  # forwards that a backward costs
COST, SECONDS, UPDATES = "cost", "seconds", "updates"


def timed(setting: Setting) -> list[SweepResult]:
    """Of every key of the spec that begins with "sweep", in order, one trial at a time.

    Trials are kept apart from those of other experiments: these may have run side by side, and be found by their hash.
    """
    alone = dataclasses.replace(setting, trials=setting.work / "trials")
    resources = dataclasses.replace(setting.resources, concurrent=1)
    return [alone.sweep(key, resources) for key in setting.values if key.startswith("sweep")]


@dataclass(frozen=True)
class ForgetSet:
    """What is forgotten, as it goes through the model.

    Attributes:
        tokens: of all samples, padding not counted.
        batches: in which its MRD is measured.
    """

    tokens: int
    batches: int

    @classmethod
    def of(cls, base: Mapping[str, Any]) -> ForgetSet:
        """Of the fields that all runs share."""
        spec = build(UnlearnSpec, {"algorithm": "GA", **base}).checked()
        model = find_model(spec.model)
        forget, retain = datasets_of(spec, model.tokenizer)
        samples = corpus_of(spec, model, forget, retain)[0].forget
        return cls(sum(sample.length for sample in samples), len(make_batches(samples, spec.batch_tokens)))


@dataclass(frozen=True)
class Spent:
    """What a run, or a part of it, took.

    Attributes:
        algorithm, arm, seed: of the run.
        training, mrd: cost of the updates and of measuring MRD, in forwards of the forget set.
        seconds_training, seconds_mrd: the same on the clock.
        updates: how many.
        reached: every sample was found forgotten.
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

    def of(self, measure: str) -> float:
        return float(getattr(self, measure))


def spent(row: Row, arm: str, forget: ForgetSet) -> Spent:
    """Of a trial as a whole."""
    passes = row["forwards_mrd"] + BACKWARD * row["backwards_mrd"]
    return Spent(
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
    """How many times as much one takes as another, seed by seed.

    Attributes:
        measure: COST, SECONDS or UPDATES.
        name: of what is compared.
        value: geometric mean of the ratios with its interval.
        p: two-sided, of a ratio of 1.
        corrected: the same for the number of comparisons that were made together.
        pairs: seeds.
    """

    measure: str
    name: str
    value: Estimate
    p: float
    corrected: float
    pairs: int

    @property
    def sign(self) -> int:
        """+1 if it takes more, -1 if less, 0 if that cannot be told."""
        if not self.corrected < 1 - LEVEL:
            return 0
        return 1 if self.value.value > 1 else -1

    def text(self) -> str:
        return f"{self.name} {times(self.value)}"


def ratios(measure: str, pairs: Mapping[str, Sequence[tuple[float, float]]]) -> list[Ratio]:
    """The geometric mean ratio of each list of pairs, with its t interval on the log scale; corrected together.

    Args:
        pairs: name -> (what it takes, what the other takes) for each seed, greater than 0. A count that has the same
            ratio in every seed, of two or more, has it for certain.
    """
    found = []
    for name, own in pairs.items():
        logs = [math.log(x / y) for x, y in own]
        estimate, p = t_test(logs)
        if measure != SECONDS and len(logs) > 1 and max(logs) - min(logs) < 1e-12:
            estimate, p = Estimate(logs[0], logs[0], logs[0]), float(abs(logs[0]) < 1e-12)
        value = Estimate(*(math.exp(end) for end in (estimate.value, estimate.low, estimate.high)))
        found.append((name, value, p, len(own)))
    corrected = holm([p for _, _, p, _ in found])
    return [
        Ratio(measure, name, value, p, holm_p, count)
        for (name, value, p, count), holm_p in zip(found, corrected, strict=True)
    ]


def times(estimate: Estimate) -> str:
    """1.23 times [95 % CI 1.10 to 1.38]."""
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


def mean_of(runs: Sequence[Spent], measure: str) -> Estimate:
    return over_seeds([run.of(measure) for run in runs])


# --- Pictures -----------------------------------------------------------------------------------------------

COLOURS = (MUTED, BLUE, VERMILLION, ORANGE, GREEN)
MARKERS = "os^Dv"


def ratio_dots(
    groups: Mapping[str, Sequence[Ratio]], title: str, log: bool = False, paper: Mapping[str, float] | None = None
) -> Draw:
    """Ratios by name, with 95 % intervals; a colour for each group. `paper` has its own ratios."""

    def draw(axes: Axes) -> None:
        names = list(dict.fromkeys(ratio.name for own in groups.values() for ratio in own))
        for number, (group, own) in enumerate(groups.items()):
            known = [ratio for ratio in own if math.isfinite(ratio.value.value)]
            shift = 0.22 * (number - (len(groups) - 1) / 2)
            axes.errorbar(
                [ratio.value.value for ratio in known],
                [-names.index(ratio.name) - shift for ratio in known],
                xerr=bars([ratio.value for ratio in known]),
                fmt=MARKERS[(number + 1) % len(MARKERS)],
                color=COLOURS[(number + 1) % len(COLOURS)],
                capsize=4,
                linestyle="none",
                label=group,
            )
        if paper:
            known_names = [name for name in names if name in paper]
            y = [-names.index(name) for name in known_names]
            axes.plot([paper[name] for name in known_names], y, "x", color=INK, label="paper")
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


def stacked(groups: Mapping[str, Sequence[tuple[float, float]]], parts: tuple[str, str], title: str) -> Draw:
    """Bars of two parts each, means over seeds."""

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
