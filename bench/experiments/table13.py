"""Table 13: how often MRD should be measured again: every m epochs or, as the paper has it in one place, steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.experiments.shared import weighted_tables
from bench.experiments.shared.arms import (
    Columns,
    Contrast,
    Outcome,
    Row,
    better_sign,
    contrasts,
    finished_outcomes,
    merged,
    methods_of,
    metric_label,
    metric_title,
    values_of,
)
from bench.files.status import FINISHED
from bench.jobs.sweep_tables import as_table
from bench.report.words import decimal
from bench.stats.verdicts import Claim, decide
from scoring.errors import UserError

BEST = "m = 2"  # according to the paper
OTHERS = ("m = 1", "m = 3")  # the paper compares it with these
ONCE = "once"
STEPS = " steps"
ROUNDING = 1e-24  # of a mean square: the noise of arms that differ by the same in every pair
# Less m = 2 in Table 13; m = 2 is computed again from its parts.
PAPER = {
    ("m = 1", "uc_average"): -0.0031,
    ("m = 1", "ut_average"): -0.0030,
    ("m = 3", "uc_average"): -0.00445,
    ("m = 3", "ut_average"): -0.00055,
}


def run(setup: Setup) -> Answer:
    columns = weighted_tables.columns_of(setup)
    margins = setup.margins(*columns.judged)
    sweeps = [setup.sweep(key) for key in setup.sweep_keys()]
    trials = merged([sweep.trials for sweep in sweeps])
    return answer(trials, columns, weighted_tables.original_metrics(sweeps[0]), margins)


def arm_of_refresh(row: Row) -> str:
    """How often MRD is measured: "m = 2" for every two epochs."""
    if not row["refresh"]:
        return ONCE
    return f"m = {row['refresh']}" + (STEPS if row["refresh_unit"] == "steps" else "")


def answer(trials: pa.Table, columns: Columns, original: Mapping[str, Any], margins: Mapping[str, float]) -> Answer:
    """From trials of one algorithm over refreshes, selections and seeds.

    Args:
        original: metric -> value of the model before it forgets.
        margins: metric -> the smallest change that matters, of those that are judged.
    """
    outcomes, lost_sentence = finished_outcomes(trials, columns.all, arm_of_refresh)
    arms = list(dict.fromkeys(outcome.arm for outcome in outcomes))
    if BEST not in arms or not set(OTHERS) & set(arms):
        raise UserError(f"trials with {', '.join(arms)}: expected {BEST} and one of {', '.join(OTHERS)} to compare")
    epoch_arms = [arm for arm in arms if not arm.endswith(STEPS)]
    p_values = {metric: f_test(outcomes, epoch_arms, metric) for metric in columns.judged}
    compared = [c for arm in arms if arm != BEST for c in contrasts(outcomes, columns.judged, arm, BEST)]
    verdicts = decide(claims_of(compared, margins))
    measurements = measurements_of_mrd(trials)
    rows = {
        f"{method_name(algorithm, arm)}{f' ({measurements[arm]:g} × MRD)' if arm in measurements else ''}": [
            values_of(outcomes, algorithm, arm, metric) for metric in columns.all
        ]
        for algorithm, arm in methods_of(outcomes)
    }
    sentences = [
        weighted_tables.table_of_means(rows, columns, original, {outcome.pair for outcome in outcomes}),
        _whether_m_matters(p_values, epoch_arms),
        _differences([contrast for contrast in compared if not contrast.arm.endswith(STEPS)]),
    ]
    if steps := [contrast for contrast in compared if contrast.arm.endswith(STEPS)]:
        sentences.append(_steps_or_epochs(steps, measurements))
    if lost_sentence:
        sentences.append(lost_sentence)
    sentences.append(f"**The paper's claim, that {BEST} is best: {weighted_tables.decided(verdicts)}.**")
    panels = [
        weighted_tables.metric_dots(outcomes, metric, original, first=not number, name_of=method_name)
        for number, metric in enumerate(columns.judged)
    ]
    table = as_table(_rows(outcomes, columns, compared, measurements))
    return Answer(table, panels, sentences, verdicts, inches=(2 + 5.0 * len(panels), 1.8 + 0.5 * len(arms)))


def method_name(algorithm: str, arm: str) -> str:
    return f"{algorithm} + MRD, {arm}"


def measurements_of_mrd(trials: pa.Table) -> dict[str, float]:
    """Arm -> how often it measured MRD, by its passes over those of the arm that measured it once; {} where no arm
    did."""
    passes: dict[str, list[float]] = {}
    for row in trials.to_pylist():
        if row["status"] == FINISHED and row.get("forwards_mrd"):
            passes.setdefault(arm_of_refresh(row), []).append(row["forwards_mrd"])
    if ONCE not in passes:
        return {}
    once = np.mean(passes[ONCE])
    return {arm: float(np.mean(seeds) / once) for arm, seeds in passes.items()}


def f_test(outcomes: Sequence[Outcome], arms: Sequence[str], metric: str) -> float:
    """p of no difference between arms: F test of the arms, pairs as blocks; nan where it is not determined."""
    values = [
        {
            outcome.pair: outcome.values[metric]
            for outcome in outcomes
            if outcome.arm == arm and metric in outcome.values
        }
        for arm in arms
    ]
    pairs = sorted(set.intersection(*(set(by_pair) for by_pair in values)))
    if len(arms) < 2 or len(pairs) < 2:
        return math.nan
    y = np.array([[by_pair[pair] for pair in pairs] for by_pair in values])
    residual = y - y.mean(axis=0) - y.mean(axis=1, keepdims=True) + y.mean()
    a, s = y.shape
    noise = float((residual**2).sum() / ((a - 1) * (s - 1)))
    between = float(s * ((y.mean(axis=1) - y.mean()) ** 2).sum() / (a - 1))
    if noise <= ROUNDING:
        return math.nan
    return float(stats.f.sf(between / noise, a - 1, (a - 1) * (s - 1)))


def claims_of(compared: Sequence[Contrast], margins: Mapping[str, float]) -> list[Claim]:
    """That BEST is ahead of each of OTHERS in every metric; and, as the paper has both units, that they are the same.

    Args:
        compared: the contrasts of every other arm with BEST.
    """
    claims = []
    for contrast in compared:
        metric, effect = contrast.metric, f"{metric_title(contrast.metric)} of {contrast.arm} less that of {BEST}"
        if contrast.arm in OTHERS:
            text, sign = f"{BEST} is ahead of {contrast.arm}", -better_sign(metric)
            claims.append(contrast.claim(text, effect, sign, margins[metric], PAPER.get((contrast.arm, metric))))
        elif contrast.arm.endswith(STEPS):
            text = "m may count steps as well as epochs"
            claims.append(contrast.claim(text, effect, 0, margins[metric], exploratory=True))
    return claims


# --- Words --------------------------------------------------------------------------------------------------


def _whether_m_matters(p_values: Mapping[str, float], arms: Sequence[str]) -> str:
    parts = [
        f"{metric_label(metric)}: " + (f"p = {decimal(p, 3)}" if math.isfinite(p) else "not determined")
        for metric, p in p_values.items()
    ]
    return f"Does m matter at all? F test over {', '.join(arms)}, pairs of runs as blocks: {'; '.join(parts)}."


def _differences(compared: Sequence[Contrast]) -> str:
    parts = []
    for arm in dict.fromkeys(contrast.arm for contrast in compared):
        texts = [contrast.text() for contrast in compared if contrast.arm == arm]
        parts.append(f"{arm}: {', '.join(texts)}")
    ends = [abs(end) for c in compared for end in (c.difference.low, c.difference.high) if math.isfinite(end)]
    bound = f" Differences beyond {decimal(max(ends), 3)} are excluded by all of these intervals." if ends else ""
    return f"Less {BEST}, pair by pair of runs, each with its own interval: {'; '.join(parts)}.{bound}"


def _steps_or_epochs(steps: Sequence[Contrast], measurements: Mapping[str, float]) -> str:
    arm = steps[0].arm
    often = ""
    if arm in measurements and BEST in measurements:
        often = f", which measures MRD {measurements[arm]:g} times instead of {measurements[BEST]:g}"
    differences = ", ".join(contrast.text() for contrast in steps)
    return f"Steps instead of epochs: {arm}{often}, less {BEST} epochs: {differences}."


# --- Rows ---------------------------------------------------------------------------------------------------


def _rows(
    outcomes: Sequence[Outcome], columns: Columns, compared: Sequence[Contrast], measurements: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row for each arm and metric: mean over runs, and the difference to BEST."""
    contrast_of = {(contrast.arm, contrast.metric): contrast for contrast in compared}
    rows = []
    for algorithm, arm in methods_of(outcomes):
        for metric in columns.all:
            values = values_of(outcomes, algorithm, arm, metric)
            row = weighted_tables.row_of(
                method_name(algorithm, arm), algorithm, arm, metric, columns, values, contrast_of.get((arm, metric))
            )
            rows.append(row | {"measurements_of_mrd": measurements.get(arm)})
    return rows


EXPERIMENT = Experiment(
    "table13",
    "how often MRD is measured",
    "How much does it matter how often MRD is measured again, and is every two epochs best?",
    "m = 2 is best in completeness, .7953, and utility, ahead of m = 1 and m = 3 (Table 13; the parts of .7953 give "
    ".7915). The unit of m is epochs in Algorithm 2 and steps in another place.",
    run,
)
