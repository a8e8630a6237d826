"""Does drawing forget samples by MRD help? What the tables on weighted sampling share.

    trials -> outcomes by algorithm, arm and seed -> means, and differences paired by seed -> table, picture, verdict

An arm is a way of drawing: uniformly, p_i ∝ MRD_i (easy first), p_i ∝ 1 / MRD_i (hard first). Arms with the same seed
share all that the seed decides, so they are compared seed by seed. Intervals are Student's t over seeds; the paper
gives means of five runs without any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from textwrap import fill
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bench.experiments.experiment import Answer, Setup
from bench.experiments.shared.arms import (
    ALL,
    COLOURS,
    EASY_FIRST,
    HARD_FIRST,
    MARKERS,
    UNIFORM,
    Columns,
    Contrast,
    Outcome,
    Row,
    by_algorithm,
    contrasts,
    digits,
    finished_outcomes,
    merged,
    method_name,
    methods_of,
    metric_label,
    plus_minus,
    values_of,
)
from bench.experiments.shared.verdicts import CONTRADICTED, HOLDS, UNKNOWN, list_verdicts, overall_verdict
from bench.jobs.sweep_tables import SweepResult, as_table
from bench.metrics import METRICS
from bench.metrics.table import ORIGINAL
from bench.report.figures import BLUE, MUTED, Draw, error_bars
from bench.report.words import decimal, interval, interval_columns
from bench.stats.estimates import Estimate, over_seeds
from scoring.errors import UserError

# The change by MRD in the paper's Tables 1 and 5, mean over its algorithms; for Table 5 its averages are computed
# again from their parts.
PAPER_CHANGE = {"uc_average": 0.032, "ut_average": 0.027, "wmdp_average": -0.017, "mmlu": 0.011}
WIDEST = 30  # letters of a label below a panel


# --- Trials -------------------------------------------------------------------------------------------------


def run(setup: Setup) -> Answer:
    """Tables 1, 5, 6 and 7."""
    sweeps = [setup.sweep(key) for key in setup.sweep_keys()]
    trials = merged([sweep.trials for sweep in sweeps])
    return answer(trials, Columns.of(trials["task"][0].as_py(), trials), original_metrics(sweeps[0]))


def original_metrics(sweep: SweepResult) -> dict[str, float]:
    """Metric -> value of the model before it forgets, as the sweep measured it for comparison."""
    table = pq.read_table(sweep.folder / "reference.parquet")
    rows = table.filter(pc.and_(pc.equal(table["level"], "metric"), pc.equal(table["model"], ORIGINAL))).to_pylist()
    return {row["name"]: row["value"] for row in rows if row["value"] is not None}


# --- Statistics ---------------------------------------------------------------------------------------------


def improvement_verdict(contrasts_of_algorithm: Sequence[Contrast], columns: Columns) -> str:
    """Whether an arm improves both completeness and utility, by the corrected comparisons of one algorithm.

    That holds if each side has a metric that is better and no metric is worse; it is contradicted if one is worse.
    """
    if any(contrast.better < 0 for contrast in contrasts_of_algorithm):
        return CONTRADICTED
    sides = {columns.side(contrast.metric) for contrast in contrasts_of_algorithm if contrast.better > 0}
    return HOLDS if len(sides) == 2 else UNKNOWN


# --- Answers ------------------------------------------------------------------------------------------------


def answer(trials: pa.Table, columns: Columns, original: Row) -> Answer:
    """Tables 1, 5, 6 and 7, from trials over algorithms, alphas and seeds.

    Args:
        original: metric -> value of the model before it forgets.
    """
    outcomes, lost_sentence = finished_outcomes(trials, columns.all)
    # Arm -> its contrasts with uniform draws, of single algorithms and of their average.
    compared = {
        arm: (
            contrasts(outcomes, columns.judged, arm, UNIFORM),
            contrasts(outcomes, columns.judged, arm, UNIFORM, average=True),
        )
        for arm in (EASY_FIRST, HARD_FIRST)
        if any(outcome.arm == arm for outcome in outcomes)
    }
    if EASY_FIRST not in compared or not compared[EASY_FIRST][0]:
        raise UserError("no algorithm has finished trials with alpha 0 and with alpha 1 and the same seed")
    sentences = [means_by_method(outcomes, columns, original)]
    sentences += [differences_by_algorithm(single, columns) for single, _ in compared.values()]
    if HARD_FIRST in compared:
        sentences.append(_direction(outcomes, columns))
    sentences += _paper_changes(compared[EASY_FIRST][1])
    if lost_sentence:
        sentences.append(lost_sentence)
    sentences.append(claim(*compared[EASY_FIRST], columns, "drawing by MRD improves both completeness and utility"))
    panels = [metric_dots(outcomes, metric, original, first=not number) for number, metric in enumerate(columns.judged)]
    if len(columns.judged) == 2:
        shown = [contrast for single, average in compared.values() for contrast in (*single, *average)]
        panels += [gains(shown, metric) for metric in columns.judged]
    height = 1.6 + 0.36 * len({(outcome.algorithm, outcome.arm) for outcome in outcomes})
    inches = (1.5 + 3.6 * len(panels), max(4.0, height))
    return Answer(as_table(rows_of(outcomes, columns, original)), panels, sentences, inches=inches)


def rows_of(outcomes: Sequence[Outcome], columns: Columns, original: Row) -> list[dict[str, Any]]:
    """One row for each method and metric: mean over seeds, and the difference to uniform draws."""
    differences = {
        (contrast.algorithm, arm, contrast.metric): contrast
        for arm in dict.fromkeys(outcome.arm for outcome in outcomes)
        if arm != UNIFORM
        # Metrics that decide are corrected together; each of the others, of which they are made, by itself.
        for metrics in (columns.judged, *((name,) for name in columns.all if name not in columns.judged))
        for average in (False, True)
        for contrast in contrasts(outcomes, metrics, arm, UNIFORM, average)
    }
    rows = [
        row_of("Original", None, None, metric, columns, [original[metric]])
        for metric in columns.all
        if metric in original
    ]
    rows += [
        row_of(
            method_name(algorithm, arm),
            algorithm,
            arm,
            metric,
            columns,
            values_of(outcomes, algorithm, arm, metric),
            differences.get((algorithm, arm, metric)),
        )
        for algorithm, arm in methods_of(outcomes)
        for metric in columns.all
    ]
    return rows + [
        row_of(f"average of algorithms, {arm}", ALL, arm, metric, columns, [], contrast)
        for (algorithm, arm, metric), contrast in differences.items()
        if algorithm == ALL
    ]


def row_of(
    name: str,
    algorithm: str | None,
    arm: str | None,
    metric: str,
    columns: Columns,
    values: Sequence[float],
    contrast: Contrast | None = None,
) -> dict[str, Any]:
    """The row of a method and a metric.

    Args:
        values: one for each seed.
        contrast: with the arm that it is compared with.
    """
    difference = contrast.difference if contrast else Estimate(math.nan, math.nan, math.nan)
    return {
        "method": name,
        "algorithm": algorithm,
        "arm": arm,
        "metric": metric,
        "side": columns.side(metric),
        "higher_is_better": METRICS[metric].higher_is_better,
        "seeds": len(values),
        **interval_columns("mean", over_seeds(values)),
        **interval_columns("difference", difference),
        "p": contrast.p if contrast else math.nan,
        "p_corrected": contrast.corrected if contrast else math.nan,
    }


# --- Words --------------------------------------------------------------------------------------------------


def means_by_method(outcomes: Sequence[Outcome], columns: Columns, original: Row) -> str:
    """The paper's table, with intervals."""
    rows = {
        method_name(algorithm, arm): [values_of(outcomes, algorithm, arm, name) for name in columns.all]
        for algorithm, arm in methods_of(outcomes)
    }
    return table_of_means(rows, columns, original, len({outcome.seed for outcome in outcomes}))


def table_of_means(rows: Mapping[str, Sequence[Sequence[float]]], columns: Columns, original: Row, seeds: int) -> str:
    """A paragraph with a table of means.

    Args:
        rows: name -> for each column the values of the seeds.
    """
    places = [digits(name) for name in columns.all]
    cells = {
        "Original": [decimal(original.get(name, math.nan), n) for name, n in zip(columns.all, places, strict=True)]
    }
    cells |= {
        name: [plus_minus(values, n) for values, n in zip(row, places, strict=True)] for name, row in rows.items()
    }
    lines = ["| method | " + " | ".join(map(metric_label, columns.all)) + " |", "|---|" + "---|" * len(columns.all)]
    lines += [f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items()]
    return (
        f"Means over {seeds} seed{'s' if seeds > 1 else ''} ± half the 95 % t interval (none where seeds do not "
        "differ):\n\n" + "\n".join(lines)
    )


def differences_by_algorithm(single: Sequence[Contrast], columns: Columns) -> str:
    """Every algorithm's differences and verdict."""
    meaning = {
        HOLDS: "both sides are better",
        CONTRADICTED: "a side is worse",
        UNKNOWN: f"whether both sides are better {UNKNOWN}",
    }
    parts = []
    for algorithm, group in by_algorithm(single).items():
        first = group[0]
        text = ", ".join(contrast.text() for contrast in group)
        parts.append(
            f"{method_name(algorithm, first.arm)} against {method_name(algorithm, first.against)}: {text}; "
            f"{meaning[improvement_verdict(group, columns)]}"
        )
    return (
        f"Differences paired by seed ({min(c.pairs for c in single)} pairs), each with its own interval, verdicts "
        f"after Holm's correction for {len(single)} comparisons. " + ". ".join(parts) + "."
    )


def _direction(outcomes: Sequence[Outcome], columns: Columns) -> str:
    """p ∝ MRD (Algorithm 2) against p ∝ 1 / MRD (Appendix B)."""
    average = contrasts(outcomes, columns.judged, EASY_FIRST, HARD_FIRST, average=True)
    if not average:
        return f"Which of p ∝ MRD and p ∝ 1/MRD is better {UNKNOWN}: no algorithm has both."
    better, worse = (
        [metric_label(contrast.metric) for contrast in average if contrast.better == sign] for sign in (1, -1)
    )
    ahead = [
        f"{direction} is ahead on {' and '.join(names)}"
        for direction, names in (("p ∝ MRD (Algorithm 2)", better), ("p ∝ 1/MRD (Appendix B)", worse))
        if names
    ]
    return (
        f"p ∝ MRD less p ∝ 1/MRD, mean over {_count_algorithms(len(_algorithms_with_both(outcomes)))}: "
        f"{', '.join(contrast.text() for contrast in average)}: "
        + (" and ".join(ahead) if ahead else f"which of the two is better {UNKNOWN}")
        + "."
    )


def _algorithms_with_both(outcomes: Sequence[Outcome]) -> set[str]:
    """The algorithms that were run with p ∝ MRD and with p ∝ 1 / MRD."""
    easy, hard = ({outcome.algorithm for outcome in outcomes if outcome.arm == arm} for arm in (EASY_FIRST, HARD_FIRST))
    return easy & hard


def _paper_changes(average: Sequence[Contrast]) -> list[str]:
    """Whether the intervals leave room for the changes in the paper; nothing where it gives no average."""
    parts = []
    for contrast in average:
        paper, difference = PAPER_CHANGE.get(contrast.metric), contrast.difference
        if paper is not None and math.isfinite(difference.low):
            where = "inside" if difference.low <= paper <= difference.high else "outside"
            parts.append(
                f"{metric_label(contrast.metric)} {decimal(paper, 3)}, {where} the interval here "
                f"({interval(difference, 3)})"
            )
    return [f"Mean change over the paper's algorithms, for comparison: {'; '.join(parts)}."] if parts else []


def claim(single: Sequence[Contrast], average: Sequence[Contrast], columns: Columns, claimed: str) -> str:
    """Whether the paper's claim holds, by the comparisons of single algorithms and of their average.

    Args:
        claimed: what the paper claims, after "that".
    """
    verdicts = {algorithm: improvement_verdict(group, columns) for algorithm, group in by_algorithm(single).items()}
    on_average = improvement_verdict(average, columns)
    text = ", ".join(contrast.text() for contrast in average)
    return (
        f"**The paper's claim, that {claimed}, {overall_verdict(verdicts, on_average)} here.** "
        f"Mean change over {_count_algorithms(len(verdicts))} and {average[0].pairs} seeds: {text}; on average the "
        f"claim {on_average}, and by algorithm it {list_verdicts(verdicts)}."
    )


def _count_algorithms(count: int) -> str:
    return f"{count} algorithm{'s' if count > 1 else ''}"


# --- Pictures -----------------------------------------------------------------------------------------------


def metric_dots(
    outcomes: Sequence[Outcome],
    metric: str,
    original: Row,
    first: bool = True,
    name_of: Callable[[str, str], str] = method_name,
) -> Draw:
    """A metric of all methods, means with 95 % intervals over seeds, every seed as a small dot.

    Args:
        first: of the panels: the others need no names.
        name_of: the name of a method, by algorithm and arm.
    """

    def draw(axes: Axes) -> None:
        methods = methods_of(outcomes)
        algorithms = list(dict.fromkeys(algorithm for algorithm, _ in methods))
        # With a gap between algorithms.
        heights = [-(row + 0.6 * algorithms.index(algorithm)) for row, (algorithm, _) in enumerate(methods)]
        for y, (algorithm, arm) in zip(heights, methods, strict=True):
            values = values_of(outcomes, algorithm, arm, metric)
            mean = over_seeds(values)
            colour, marker = COLOURS.get(arm, BLUE), MARKERS.get(arm, "o")
            axes.plot(values, [y] * len(values), ".", color=colour, alpha=0.4, markersize=5)
            axes.errorbar(mean.value, y, xerr=error_bars([mean]), fmt=marker, color=colour, markersize=7, capsize=4)
        if metric in original:
            axes.axvline(original[metric], color=MUTED, linestyle=":", linewidth=1.2, label="original model")
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.1)
        axes.set_yticks(heights, [name_of(*method) for method in methods] if first else [""] * len(methods))
        axes.grid(axis="y", visible=False)
        axes.set_ylim(min(heights) - 0.7, 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(fill(f"{metric_label(metric)}, 95 % CI", WIDEST))

    return draw


def gains(compared: Sequence[Contrast], metric: str) -> Draw:
    """Differences to uniform draws by algorithm, paired by seed, with 95 % intervals; one colour for each arm."""

    def draw(axes: Axes) -> None:
        shown = [contrast for contrast in compared if contrast.metric == metric]
        algorithms = [*dict.fromkeys(contrast.algorithm for contrast in shown if contrast.algorithm != ALL), ALL]
        arms = list(dict.fromkeys(contrast.arm for contrast in shown))
        for number, arm in enumerate(arms):
            of_arm = [contrast for contrast in shown if contrast.arm == arm]
            shift = 0.24 * (number - (len(arms) - 1) / 2)
            axes.errorbar(
                [contrast.difference.value for contrast in of_arm],
                [-algorithms.index(contrast.algorithm) - shift for contrast in of_arm],
                xerr=error_bars([contrast.difference for contrast in of_arm]),
                fmt=MARKERS.get(arm, "o"),
                color=COLOURS.get(arm, BLUE),
                capsize=4,
                label=arm,
            )
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks([-float(row) for row in range(len(algorithms))], algorithms)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(-len(algorithms) + 0.4, 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(fill(f"{metric_label(metric)} less uniform, 95 % CI", WIDEST))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(arms), borderaxespad=0.1)

    return draw
