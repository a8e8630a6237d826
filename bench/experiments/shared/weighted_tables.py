"""Does drawing forget samples by MRD help? What the tables on weighted sampling share.

    trials -> outcomes by algorithm, arm and seed -> means, and differences paired by seed -> table, picture, verdict

An arm is a way of drawing: uniformly, p_i ∝ MRD_i (easy first), p_i ∝ 1 / MRD_i (hard first). Arms that share a seed
share all else that it decides, so they are compared seed by seed. Intervals are Student's t over seeds; the paper gives
means of five runs without any.
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

from bench.experiments.experiment import Answer, Setting
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
    bars,
    contrasts,
    digits,
    grouped,
    label,
    method,
    methods,
    outcomes,
    plus_minus,
    together,
    values_of,
)
from bench.experiments.shared.verdicts import CONTRADICTED, HOLDS, UNKNOWN, by_verdict, overall
from bench.jobs.sweep_tables import SweepResult, as_table
from bench.metrics import METRICS
from bench.metrics.table import ORIGINAL
from bench.report.figures import BLUE, MUTED, Draw
from bench.report.words import decimal, interval
from bench.stats.estimates import Estimate, over_seeds
from scoring.errors import UserError

# What MRD changes in the paper's Tables 1 and 5, mean over its algorithms; averages of Table 5 by its parts.
PAPER_CHANGE = {"uc_average": 0.032, "ut_average": 0.027, "wmdp_average": -0.017, "mmlu": 0.011}
WIDEST = 30  # letters of a label below a panel


# --- Trials -------------------------------------------------------------------------------------------------


def sweeps(setting: Setting) -> list[SweepResult]:
    """Of every key of the spec that begins with "sweep", in order: algorithms may need different settings."""
    return [setting.sweep(key) for key in setting.values if key.startswith("sweep")]


def run(setting: Setting) -> Answer:
    """Tables 1, 5, 6 and 7."""
    found = sweeps(setting)
    trials = together([sweep.trials for sweep in found])
    return answer(trials, Columns.of(trials["task"][0].as_py(), trials), original_of(found[0]))


def original_of(sweep: SweepResult) -> dict[str, float]:
    """Metric -> value of the model before it forgets, as the sweep measured it for comparison."""
    table = pq.read_table(sweep.folder / "reference.parquet")
    rows = table.filter(pc.and_(pc.equal(table["level"], "metric"), pc.equal(table["model"], ORIGINAL))).to_pylist()
    return {row["name"]: row["value"] for row in rows if row["value"] is not None}


# --- Statistics ---------------------------------------------------------------------------------------------


def improvement_verdict(own: Sequence[Contrast], columns: Columns) -> str:
    """Whether an arm improves both completeness and utility, by the corrected comparisons of one algorithm.

    It holds if each side has a metric that is better and no metric is worse; it is contradicted if one is worse.
    """
    if any(contrast.better < 0 for contrast in own):
        return CONTRADICTED
    sides = {columns.side(contrast.metric) for contrast in own if contrast.better > 0}
    return HOLDS if len(sides) == 2 else UNKNOWN


# --- Answers ------------------------------------------------------------------------------------------------


def answer(trials: pa.Table, columns: Columns, original: Row) -> Answer:
    """Tables 1, 5, 6 and 7, from trials over algorithms, alphas and seeds.

    Args:
        original: metric -> value of the model before it forgets.
    """
    found, lost = outcomes(trials, columns.all)
    compared = {
        arm: (contrasts(found, columns.judged, arm, UNIFORM), contrasts(found, columns.judged, arm, UNIFORM, True))
        for arm in (EASY_FIRST, HARD_FIRST)
        if any(outcome.arm == arm for outcome in found)
    }
    if EASY_FIRST not in compared or not compared[EASY_FIRST][0]:
        raise UserError("no algorithm has finished trials with alpha 0 and with alpha 1 and the same seed")
    sentences = [markdown(found, columns, original)]
    sentences += [by_algorithm(single, columns) for single, _ in compared.values()]
    if HARD_FIRST in compared:
        sentences.append(_direction(found, columns))
    sentences += _as_large_as_the_papers(compared[EASY_FIRST][1])
    if lost:
        sentences.append(lost)
    sentences.append(claim(*compared[EASY_FIRST], columns, "drawing by MRD improves both completeness and utility"))
    panels = [dots(found, metric, original, first=not number) for number, metric in enumerate(columns.judged)]
    if len(columns.judged) == 2:
        shown = [contrast for single, average in compared.values() for contrast in (*single, *average)]
        panels += [gains(shown, metric) for metric in columns.judged]
    height = 1.6 + 0.36 * len({(outcome.algorithm, outcome.arm) for outcome in found})
    inches = (1.5 + 3.6 * len(panels), max(4.0, height))
    return Answer(as_table(rows_of(found, columns, original)), panels, sentences, inches=inches)


def rows_of(found: Sequence[Outcome], columns: Columns, original: Row) -> list[dict[str, Any]]:
    """One row for each method and metric: mean over seeds, and the difference to uniform draws."""
    differences = {
        (contrast.algorithm, arm, contrast.metric): contrast
        for arm in dict.fromkeys(outcome.arm for outcome in found)
        if arm != UNIFORM
        # Of each metric by itself: those that decide are corrected together, the others say what they are made of.
        for metrics in (columns.judged, *((name,) for name in columns.all if name not in columns.judged))
        for average in (False, True)
        for contrast in contrasts(found, metrics, arm, UNIFORM, average)
    }
    rows = [
        row_of("Original", None, None, metric, columns, [original[metric]])
        for metric in columns.all
        if metric in original
    ]
    rows += [
        row_of(
            method(algorithm, arm),
            algorithm,
            arm,
            metric,
            columns,
            values_of(found, algorithm, arm, metric),
            differences.get((algorithm, arm, metric)),
        )
        for algorithm, arm in methods(found)
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
    """A method and a metric.

    Args:
        values: one for each seed.
        contrast: with the arm that it is compared with.
    """
    mean = over_seeds(values)
    difference = contrast.difference if contrast else Estimate(math.nan, math.nan, math.nan)
    return {
        "method": name,
        "algorithm": algorithm,
        "arm": arm,
        "metric": metric,
        "side": columns.side(metric),
        "higher_is_better": METRICS[metric].higher_is_better,
        "seeds": len(values),
        "mean": mean.value,
        "mean_low": mean.low,
        "mean_high": mean.high,
        "difference": difference.value,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "p": contrast.p if contrast else math.nan,
        "p_corrected": contrast.corrected if contrast else math.nan,
    }


# --- Words --------------------------------------------------------------------------------------------------


def markdown(found: Sequence[Outcome], columns: Columns, original: Row) -> str:
    """The paper's table, with intervals."""
    rows = {
        method(algorithm, arm): [values_of(found, algorithm, arm, name) for name in columns.all]
        for algorithm, arm in methods(found)
    }
    return markdown_table(rows, columns, original, len({outcome.seed for outcome in found}))


def markdown_table(rows: Mapping[str, Sequence[Sequence[float]]], columns: Columns, original: Row, seeds: int) -> str:
    """A paragraph with a table.

    Args:
        rows: name -> for each column the values of the seeds.
    """
    places = [digits(name) for name in columns.all]
    cells = {
        "Original": [decimal(original.get(name, math.nan), n) for name, n in zip(columns.all, places, strict=True)]
    }
    cells |= {name: [plus_minus(*each) for each in zip(row, places, strict=True)] for name, row in rows.items()}
    lines = ["| method | " + " | ".join(map(label, columns.all)) + " |", "|---|" + "---|" * len(columns.all)]
    lines += [f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items()]
    return (
        f"Means over {seeds} seed{'s' if seeds > 1 else ''} ± half the 95 % t interval (none where seeds do not "
        "differ):\n\n" + "\n".join(lines)
    )


def by_algorithm(single: Sequence[Contrast], columns: Columns) -> str:
    """Every algorithm's differences and verdict."""
    parts = []
    for algorithm, own in grouped(single).items():
        first = own[0]
        text = ", ".join(contrast.text() for contrast in own)
        parts.append(
            f"{method(algorithm, first.arm)} against {method(algorithm, first.against)}: {text}; "
            f"{_tells(improvement_verdict(own, columns))}"
        )
    return (
        f"Differences paired by seed ({min(c.pairs for c in single)} pairs), each with its own interval, verdicts "
        f"after Holm's correction for {len(single)} comparisons. " + ". ".join(parts) + "."
    )


def _tells(found: str) -> str:
    return {
        HOLDS: "both sides are better",
        CONTRADICTED: "a side is worse",
        UNKNOWN: "whether both sides are better cannot be told",
    }[found]


def _direction(found: Sequence[Outcome], columns: Columns) -> str:
    """p ∝ MRD (Algorithm 2) against p ∝ 1 / MRD (Appendix B)."""
    own = contrasts(found, columns.judged, EASY_FIRST, HARD_FIRST, average=True)
    if not own:
        return "Which of p ∝ MRD and p ∝ 1/MRD is better cannot be told: no algorithm has both."
    better = [label(c.metric) for c in own if c.better > 0]
    worse = [label(c.metric) for c in own if c.better < 0]
    ahead = [
        f"{which} is ahead on {' and '.join(names)}"
        for which, names in (("p ∝ MRD (Algorithm 2)", better), ("p ∝ 1/MRD (Appendix B)", worse))
        if names
    ]
    return (
        f"p ∝ MRD less p ∝ 1/MRD, mean over {_counted(len(_with_both(found)))}: "
        f"{', '.join(contrast.text() for contrast in own)}: "
        + (" and ".join(ahead) if ahead else "which of the two is better cannot be told")
        + "."
    )


def _with_both(found: Sequence[Outcome]) -> set[str]:
    arms: dict[str, set[str]] = {}
    for outcome in found:
        arms.setdefault(outcome.algorithm, set()).add(outcome.arm)
    return {algorithm for algorithm, own in arms.items() if {EASY_FIRST, HARD_FIRST} <= own}


def _as_large_as_the_papers(average: Sequence[Contrast]) -> list[str]:
    """Whether the intervals leave room for the changes that the paper has; nothing where it gives no average."""
    parts = []
    for contrast in average:
        paper, own = PAPER_CHANGE.get(contrast.metric), contrast.difference
        if paper is not None and math.isfinite(own.low):
            where = "inside" if own.low <= paper <= own.high else "outside"
            parts.append(
                f"{label(contrast.metric)} {decimal(paper, 3)}, {where} the interval here ({interval(own, 3)})"
            )
    return [f"Mean change over the paper's algorithms, for comparison: {'; '.join(parts)}."] if parts else []


def claim(single: Sequence[Contrast], average: Sequence[Contrast], columns: Columns, said_by_paper: str) -> str:
    """Whether what the paper says holds, by the comparisons of single algorithms and of their average."""
    verdicts = {algorithm: improvement_verdict(own, columns) for algorithm, own in grouped(single).items()}
    on_average = improvement_verdict(average, columns)
    text = ", ".join(contrast.text() for contrast in average)
    return (
        f"**The paper's claim, that {said_by_paper}, {overall(verdicts, on_average)} here.** "
        f"Mean change over {_counted(len(verdicts))} and {average[0].pairs} seeds: {text}; on average the claim "
        f"{on_average}, and by algorithm it {by_verdict(verdicts)}."
    )


def _counted(algorithms: int) -> str:
    return f"{algorithms} algorithm{'s' if algorithms > 1 else ''}"


# --- Pictures -----------------------------------------------------------------------------------------------


def dots(
    found: Sequence[Outcome],
    metric: str,
    original: Row,
    first: bool = True,
    name_of: Callable[[str, str], str] = method,
) -> Draw:
    """A metric of all methods, means with 95 % intervals over seeds, every seed as a small dot.

    Args:
        first: of the panels: the others need no names.
    """

    def draw(axes: Axes) -> None:
        order = methods(found)
        algorithms = list(dict.fromkeys(algorithm for algorithm, _ in order))
        # A gap between algorithms.
        place = [-(row + 0.6 * algorithms.index(algorithm)) for row, (algorithm, _) in enumerate(order)]
        for y, (algorithm, arm) in zip(place, order, strict=True):
            values = values_of(found, algorithm, arm, metric)
            mean = over_seeds(values)
            colour, marker = COLOURS.get(arm, BLUE), MARKERS.get(arm, "o")
            axes.plot(values, [y] * len(values), ".", color=colour, alpha=0.4, markersize=5)
            axes.errorbar(mean.value, y, xerr=bars([mean]), fmt=marker, color=colour, markersize=7, capsize=4)
        if metric in original:
            axes.axvline(original[metric], color=MUTED, linestyle=":", linewidth=1.2, label="original model")
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.1)
        axes.set_yticks(place, [name_of(*each) for each in order] if first else [""] * len(order))
        axes.grid(axis="y", visible=False)
        axes.set_ylim(min(place) - 0.7, 0.7)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(fill(f"{label(metric)}, 95 % CI", WIDEST))

    return draw


def gains(single: Sequence[Contrast], metric: str) -> Draw:
    """Differences to uniform draws by algorithm, paired by seed, with 95 % intervals; one colour for each arm."""

    def draw(axes: Axes) -> None:
        own = [contrast for contrast in single if contrast.metric == metric]
        algorithms = [*dict.fromkeys(c.algorithm for c in own if c.algorithm != ALL), ALL]
        arms = list(dict.fromkeys(contrast.arm for contrast in own))
        for number, arm in enumerate(arms):
            mine = [contrast for contrast in own if contrast.arm == arm]
            y = [-algorithms.index(c.algorithm) - 0.24 * (number - (len(arms) - 1) / 2) for c in mine]
            axes.errorbar(
                [contrast.difference.value for contrast in mine],
                y,
                xerr=bars([contrast.difference for contrast in mine]),
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
        axes.set_xlabel(fill(f"{label(metric)} less uniform, 95 % CI", WIDEST))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(arms), borderaxespad=0.1)

    return draw
