"""Table 13: how often MRD is to be measured again: every m epochs or, as the paper has it in one place, steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from bench.experiments.experiment import Answer, Experiment, Setting
from bench.experiments.shared import weighted_tables
from bench.experiments.shared.arms import Columns, Contrast, Outcome, Row, label
from bench.experiments.shared.verdicts import CONTRADICTED, HOLDS, UNKNOWN
from bench.files.status import FINISHED
from bench.jobs.sweep_tables import as_table
from bench.report.words import decimal
from bench.stats.estimates import LEVEL, holm
from scoring.errors import UserError

BEST = "m = 2"  # the paper's
OTHERS = ("m = 1", "m = 3")  # which the paper compares it with
NEVER = "once"
STEPS = " steps"


def run(setting: Setting) -> Answer:
    found = weighted_tables.sweeps(setting)
    trials = weighted_tables.together([sweep.trials for sweep in found])
    return answer(trials, Columns.of(trials["task"][0].as_py(), trials), weighted_tables.original_of(found[0]))


def arm_of_refresh(row: Row) -> str:
    """How often MRD is measured, "m = 2" for every two epochs."""
    if not row["refresh"]:
        return NEVER
    return f"m = {row['refresh']}" + (STEPS if row["refresh_unit"] == "steps" else "")


def answer(trials: pa.Table, columns: Columns, original: Mapping[str, Any]) -> Answer:
    """From trials of one algorithm over refreshes and seeds.

    Args:
        original: metric -> value of the model before it forgets.
    """
    found, lost = weighted_tables.outcomes(trials, columns.all, arm_of_refresh)
    arms = list(dict.fromkeys(outcome.arm for outcome in found))
    if BEST not in arms or not set(OTHERS) & set(arms):
        raise UserError(f"trials with {', '.join(arms)}: expected {BEST} and one of {', '.join(OTHERS)} to compare")
    epochs = [arm for arm in arms if not arm.endswith(STEPS)]
    matters = {metric: _matters(found, epochs, metric) for metric in columns.judged}
    corrected = dict(zip(matters, holm(list(matters.values())), strict=True))
    compared = _against_best(found, arms, columns.judged)
    measured = measurements(trials)
    rows = {
        f"{name(algorithm, arm)}{f' ({measured[arm]:g} × MRD)' if arm in measured else ''}": [
            weighted_tables.values_of(found, algorithm, arm, metric) for metric in columns.all
        ]
        for algorithm, arm in weighted_tables.methods(found)
    }
    sentences = [
        weighted_tables.markdown_table(rows, columns, original, len({outcome.seed for outcome in found})),
        _whether(corrected, epochs),
        _pairwise([contrast for contrast in compared if not contrast.arm.endswith(STEPS)]),
    ]
    if steps := [contrast for contrast in compared if contrast.arm.endswith(STEPS)]:
        sentences.append(_units(steps, measured))
    if lost:
        sentences.append(lost)
    sentences.append(_claim([contrast for contrast in compared if contrast.arm in epochs], columns))
    panels = [
        weighted_tables.dots(found, metric, original, first=not number, name_of=name)
        for number, metric in enumerate(columns.judged)
    ]
    height = 1.8 + 0.5 * len(arms)
    return Answer(
        as_table(_rows(found, columns, compared, measured)), panels, sentences, inches=(2 + 5.0 * len(panels), height)
    )


def name(algorithm: str, arm: str) -> str:
    return f"{algorithm} + MRD, {arm}"


def measurements(trials: pa.Table) -> dict[str, float]:
    """Arm -> passes that measured MRD, in those of the arm that measured it once; {} where no arm did."""
    passes: dict[str, list[float]] = {}
    for row in trials.to_pylist():
        if row["status"] == FINISHED and row.get("forwards_mrd"):
            passes.setdefault(arm_of_refresh(row), []).append(row["forwards_mrd"])
    if NEVER not in passes:
        return {}
    once = np.mean(passes[NEVER])
    return {arm: float(np.mean(own) / once) for arm, own in passes.items()}


def _matters(found: Sequence[Outcome], arms: Sequence[str], metric: str) -> float:
    """p of no difference between arms: F test of the arms, seeds as blocks; nan where it is not determined."""
    own = [
        {outcome.seed: outcome.values[metric] for outcome in found if outcome.arm == arm and metric in outcome.values}
        for arm in arms
    ]
    seeds = sorted(set.intersection(*(set(values) for values in own)))
    if len(arms) < 2 or len(seeds) < 2:
        return math.nan
    y = np.array([[values[seed] for seed in seeds] for values in own])
    residual = y - y.mean(axis=0) - y.mean(axis=1, keepdims=True) + y.mean()
    a, s = y.shape
    noise = float((residual**2).sum() / ((a - 1) * (s - 1)))
    between = float(s * ((y.mean(axis=1) - y.mean()) ** 2).sum() / (a - 1))
    if noise <= 1e-24:
        return math.nan
    return float(stats.f.sf(between / noise, a - 1, (a - 1) * (s - 1)))


def _against_best(found: Sequence[Outcome], arms: Sequence[str], metrics: Sequence[str]) -> list[Contrast]:
    """Every other m less BEST; corrected for all of them together."""
    own = [contrast for arm in arms if arm != BEST for contrast in weighted_tables.contrasts(found, metrics, arm, BEST)]
    corrected = holm([contrast.p for contrast in own])
    return [
        Contrast(c.algorithm, c.arm, c.against, c.metric, c.difference, c.p, p, c.pairs)
        for c, p in zip(own, corrected, strict=True)
    ]


# --- Words --------------------------------------------------------------------------------------------------


def _whether(corrected: Mapping[str, float], arms: Sequence[str]) -> str:
    parts = []
    for metric, p in corrected.items():
        if not math.isfinite(p):
            parts.append(f"{label(metric)}: not determined")
        else:
            told = "m matters" if p < 1 - LEVEL else "not separable from no effect"
            parts.append(f"{label(metric)}: p = {decimal(p, 3)}, {told}")
    return (
        f"Does m matter at all? F test over {', '.join(arms)}, seeds as blocks, after Holm's correction: "
        f"{'; '.join(parts)}."
    )


def _pairwise(compared: Sequence[Contrast]) -> str:
    parts = []
    for arm in dict.fromkeys(contrast.arm for contrast in compared):
        own = [contrast for contrast in compared if contrast.arm == arm]
        parts.append(f"{arm}: {', '.join(contrast.text() for contrast in own)}")
    ends = [abs(end) for c in compared for end in (c.difference.low, c.difference.high) if math.isfinite(end)]
    bound = f" Differences beyond {decimal(max(ends), 3)} are excluded by all of these intervals." if ends else ""
    return f"Less {BEST}, paired by seed, each with its own interval: {'; '.join(parts)}.{bound}"


def _units(steps: Sequence[Contrast], measured: Mapping[str, float]) -> str:
    """Epochs or steps?"""
    arm = steps[0].arm
    often = ""
    if arm in measured and BEST in measured:
        often = f", which measures MRD {measured[arm]:g} times instead of {measured[BEST]:g}"
    better, worse = ([label(c.metric) for c in steps if c.better == sign] for sign in (1, -1))
    told = [f"{word} in {' and '.join(names)}" for word, names in (("better", better), ("worse", worse)) if names]
    return (
        f"Steps instead of epochs: {arm}{often}, less {BEST} epochs: {', '.join(c.text() for c in steps)}: "
        f"{' and '.join(told) if told else 'not separable from no effect'}."
    )


def refresh_verdict(compared: Sequence[Contrast], columns: Columns) -> str:
    """Whether BEST is the best.

    It holds if its completeness is better than that of all OTHERS that were run and no metric of it is worse; it is
    contradicted if any other m is better in a metric.
    """
    if any(contrast.better > 0 for contrast in compared):
        return CONTRADICTED
    own = [c for c in compared if c.arm in OTHERS and columns.side(c.metric) == "completeness"]
    return HOLDS if own and all(contrast.better < 0 for contrast in own) else UNKNOWN


def _claim(compared: Sequence[Contrast], columns: Columns) -> str:
    found = refresh_verdict(compared, columns)
    others = [arm for arm in OTHERS if any(contrast.arm == arm for contrast in compared)]
    ahead = [f"{c.arm} in {label(c.metric)}" for c in compared if c.better > 0]
    why = {
        HOLDS: f"its completeness is better than that of {' and '.join(others)}",
        CONTRADICTED: f"better is {', '.join(ahead)}",
        UNKNOWN: f"its completeness is not separable from that of {' and '.join(others)}, by {compared[0].pairs} seeds",
    }[found]
    return f"**The paper's claim, that {BEST} is best, {found} here**: {why}."


# --- Rows ---------------------------------------------------------------------------------------------------


def _rows(
    found: Sequence[Outcome], columns: Columns, compared: Sequence[Contrast], measured: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row for each arm and metric: mean over seeds, and the difference to BEST."""
    by_cell = {(contrast.arm, contrast.metric): contrast for contrast in compared}
    rows = []
    for algorithm, arm in weighted_tables.methods(found):
        for metric in columns.all:
            values = weighted_tables.values_of(found, algorithm, arm, metric)
            row = weighted_tables.row_of(
                name(algorithm, arm), algorithm, arm, metric, columns, values, by_cell.get((arm, metric))
            )
            rows.append(row | {"measurements_of_mrd": measured.get(arm)})
    return rows


EXPERIMENT = Experiment(
    "table13",
    "how often MRD is measured",
    "How much does it matter how often MRD is measured again, and is every two epochs best?",
    "m = 2 is best in completeness, .7953, and utility, ahead of m = 1 and m = 3 (Table 13; the parts of .7953 give "
    ".7915). The unit of m is epochs in Algorithm 2 and steps in another place.",
    run,
)
