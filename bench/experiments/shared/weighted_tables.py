"""Does drawing forget samples by MRD help? What the tables on weighted sampling share.

    trials -> outcomes by algorithm, arm and pair -> means, and differences within pairs -> table, picture, verdicts

An arm is a way of drawing: uniformly, p_i ∝ MRD_i (easy first), p_i ∝ 1 / MRD_i (hard first). Arms that forget the same
samples with the same seed share all that these decide, so they are compared pair by pair. Intervals are Student's t
over runs; the paper gives means of five runs without any. The claims are on p ∝ MRD, as in Algorithm 2, and on the mean
of the algorithms; single algorithms are shown with their intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
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
    Pair,
    Row,
    better_sign,
    by_algorithm,
    change_of,
    contrasts,
    digits,
    finished_outcomes,
    merged,
    method_name,
    methods_of,
    metric_label,
    metric_title,
    plus_minus,
    scale_of,
    unit_of,
    values_of,
)
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.sweep_tables import SweepResult, as_table
from bench.metrics import METRICS
from bench.metrics.table import ORIGINAL
from bench.report import verdicts as in_words
from bench.report.figures import BLUE, MUTED, Draw, error_bars
from bench.report.words import decimal, interval_columns
from bench.stats.estimates import Estimate, over_seeds
from bench.stats.verdicts import Claim, Verdict, decide
from bench.tasks.datasets import find_task
from scoring.errors import UserError
from scoring.settings import build

WIDEST = 30  # letters of a label below a panel


# --- Trials -------------------------------------------------------------------------------------------------


def run(setup: Setup, paper: Mapping[str, float]) -> Answer:
    """Tables 1, 5, 6 and 7.

    Args:
        paper: metric -> its change by MRD in the paper, mean over the algorithms.
    """
    columns = columns_of(setup)
    margins = setup.margins(*columns.judged)
    sweeps = [setup.sweep(key) for key in setup.sweep_keys()]
    trials = merged([sweep.trials for sweep in sweeps])
    return answer(trials, columns, original_metrics(sweeps[0]), margins, paper)


def columns_of(setup: Setup) -> Columns:
    """The metrics that the sweeps ask for, known before anything is run."""
    metrics: dict[str, None] = {}
    task_name = ""
    for key in setup.sweep_keys():
        spec = setup.spec(SweepSpec, key)
        if spec.evaluate:
            fixed = {name: spec.base[name] for name in ("model", "task") if name in spec.base}
            with setup.section(key):
                evaluation = build(EvaluateSpec, fixed | spec.evaluate)
                metrics |= dict.fromkeys(evaluation.metrics_of(find_task(evaluation.task)[0]))
            task_name = evaluation.task
    if not task_name:
        raise UserError(f"{setup.names.start()}expected evaluate, with metrics of the task, in a sweep")
    return Columns.of(task_name, metrics)


def original_metrics(sweep: SweepResult) -> dict[str, float]:
    """Metric -> value of the model before it forgets, as the sweep measured it for comparison."""
    table = pq.read_table(sweep.folder / "reference.parquet")
    rows = table.filter(pc.and_(pc.equal(table["level"], "metric"), pc.equal(table["model"], ORIGINAL))).to_pylist()
    return {row["name"]: row["value"] for row in rows if row["value"] is not None}


# --- Answers ------------------------------------------------------------------------------------------------


def answer(
    trials: pa.Table, columns: Columns, original: Row, margins: Mapping[str, float], paper: Mapping[str, float]
) -> Answer:
    """Tables 1, 5, 6 and 7, from trials over algorithms, alphas, selections and seeds.

    Args:
        original: metric -> value of the model before it forgets.
        margins: metric -> the smallest change that matters, of those that are judged.
        paper: metric -> its change by MRD in the paper.
    """
    outcomes, lost_sentence = finished_outcomes(trials, columns.all)
    compared = {
        arm: single for arm in (EASY_FIRST, HARD_FIRST) if (single := contrasts(outcomes, columns.judged, arm, UNIFORM))
    }
    if EASY_FIRST not in compared:
        raise UserError("no algorithm has finished trials with alpha 0 and with alpha 1, the same samples and seed")
    average = {arm: contrasts(outcomes, columns.judged, arm, UNIFORM, average=True) for arm in compared}
    directions = contrasts(outcomes, columns.judged, EASY_FIRST, HARD_FIRST, average=True)
    claims = claims_of(average[EASY_FIRST], columns, margins, paper)
    for others in (average.get(HARD_FIRST, []), directions):
        claims += claims_of(others, columns, margins, {}, exploratory=True)
    verdicts = decide(claims)
    sentences = [means_by_method(outcomes, columns, original)]
    sentences += [differences_by_algorithm(single) for single in compared.values()]
    if directions:
        sentences.append(_direction(directions))
    sentences += _paper_changes(average[EASY_FIRST], paper)
    if lost_sentence:
        sentences.append(lost_sentence)
    claimed = "drawing by MRD improves both completeness and utility"
    sentences.append(conclusion(average[EASY_FIRST], verdicts, claimed))
    panels = [metric_dots(outcomes, metric, original, first=not number) for number, metric in enumerate(columns.judged)]
    if len(columns.judged) == 2:
        shown = [contrast for arm in compared for contrast in (*compared[arm], *average[arm])]
        panels += [gains(shown, metric) for metric in columns.judged]
    height = 1.6 + 0.36 * len({(outcome.algorithm, outcome.arm) for outcome in outcomes})
    inches = (1.5 + 3.6 * len(panels), max(4.0, height))
    return Answer(as_table(rows_of(outcomes, columns, original)), panels, sentences, verdicts, inches=inches)


def claims_of(
    average: Sequence[Contrast],
    columns: Columns,
    margins: Mapping[str, float],
    paper: Mapping[str, float],
    when: str = "",
    exploratory: bool = False,
) -> list[Claim]:
    """What the paper says of an arm: that it is better than the other in every metric.

    Args:
        average: the contrasts of the arm, over the algorithms.
        when: what follows the effect, such as " after epoch 1".
    """
    claims = []
    for contrast in average:
        does = "forgets more" if columns.side(contrast.metric) == "completeness" else "keeps more"
        than = "" if contrast.against == UNIFORM else f" than drawing by {contrast.against}"
        effect = f"mean {metric_title(contrast.metric)} of {_count_algorithms(contrast)}{when}"
        claims.append(
            contrast.claim(
                f"drawing by {contrast.arm} {does}{than}",
                effect,
                better_sign(contrast.metric),
                margins[contrast.metric],
                paper.get(contrast.metric),
                exploratory,
            )
        )
    return claims


def rows_of(outcomes: Sequence[Outcome], columns: Columns, original: Row) -> list[dict[str, Any]]:
    """One row for each method and metric: mean over runs, and the difference to uniform draws."""
    differences = {
        (contrast.algorithm, arm, contrast.metric): contrast
        for arm in dict.fromkeys(outcome.arm for outcome in outcomes)
        if arm != UNIFORM
        for average in (False, True)
        for contrast in contrasts(outcomes, columns.all, arm, UNIFORM, average)
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
        values: one for each run.
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
        "runs": len(values),
        **interval_columns("mean", over_seeds(values)),
        **interval_columns("difference", difference),
        "scale": scale_of(metric),
        "pairs": contrast.pairs if contrast else 0,
        "p": contrast.p if contrast else math.nan,
    }


# --- Words --------------------------------------------------------------------------------------------------


def means_by_method(outcomes: Sequence[Outcome], columns: Columns, original: Row) -> str:
    """The paper's table, with intervals."""
    rows = {
        method_name(algorithm, arm): [values_of(outcomes, algorithm, arm, name) for name in columns.all]
        for algorithm, arm in methods_of(outcomes)
    }
    return table_of_means(rows, columns, original, {outcome.pair for outcome in outcomes})


def table_of_means(
    rows: Mapping[str, Sequence[Sequence[float]]], columns: Columns, original: Row, pairs: Collection[Pair]
) -> str:
    """A paragraph with a table of means.

    Args:
        rows: name -> for each column the values of the runs.
        pairs: of the runs.
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
        f"Means over {_count_runs(pairs)} ± half the 95 % t interval (none where runs do not differ):\n\n"
        + "\n".join(lines)
    )


def _count_runs(pairs: Collection[Pair]) -> str:
    """ "5 seeds", or "24 runs (24 selections of samples, 1 seed)"."""
    selections, seeds = (len(set(parts)) for parts in zip(*pairs, strict=True))
    count_seeds = f"{seeds} seed{'s' if seeds > 1 else ''}"
    return count_seeds if selections == 1 else f"{len(pairs)} runs ({selections} selections of samples, {count_seeds})"


def differences_by_algorithm(single: Sequence[Contrast]) -> str:
    """Every algorithm's differences."""
    parts = []
    for algorithm, group in by_algorithm(single).items():
        first = group[0]
        text = ", ".join(contrast.text() for contrast in group)
        parts.append(f"{method_name(algorithm, first.arm)} against {method_name(algorithm, first.against)}: {text}")
    by = (
        "seed" if unit_of({pair for contrast in single for pair in contrast.by_pair}) == "seeds" else "samples and seed"
    )
    return (
        f"Differences paired by {by} ({min(c.pairs for c in single)} pairs), each with its own interval, not corrected "
        f"for their number. {'. '.join(parts)}."
    )


def _direction(average: Sequence[Contrast]) -> str:
    """p ∝ MRD (Algorithm 2) against p ∝ 1 / MRD (Appendix B)."""
    return (
        f"p ∝ MRD (Algorithm 2) less p ∝ 1/MRD (Appendix B), mean over {_count_algorithms(average[0])}: "
        f"{', '.join(contrast.text() for contrast in average)}."
    )


def _paper_changes(average: Sequence[Contrast], paper: Mapping[str, float]) -> list[str]:
    """Whether the intervals leave room for the changes in the paper; nothing where it gives no average."""
    parts = []
    for contrast in average:
        if contrast.metric in paper and math.isfinite(contrast.difference.low):
            change, scale = change_of(contrast.metric, paper[contrast.metric]), scale_of(contrast.metric)
            where = "inside" if contrast.difference.low <= change <= contrast.difference.high else "outside"
            here = in_words.effect(contrast.difference, scale)
            parts.append(
                f"{metric_label(contrast.metric)} {in_words.number(change, scale)}, {where} the interval here, {here}"
            )
    return [f"Mean change over the paper's algorithms, for comparison: {'; '.join(parts)}."] if parts else []


def conclusion(average: Sequence[Contrast], verdicts: Sequence[Verdict], claimed: str) -> str:
    """What the data say about the paper's claim; without what is exploratory.

    Args:
        average: what is decided on, over the algorithms.
        claimed: what the paper claims, after "that".
    """
    count = min(contrast.pairs for contrast in average)
    text = ", ".join(contrast.text() for contrast in average)
    return (
        f"Mean change over {_count_algorithms(average[0])} and {count} {unit_of(average[0].by_pair)}: {text}. "
        f"**The paper's claim, that {claimed}: {decided(verdicts)}.**"
    )


def decided(verdicts: Sequence[Verdict]) -> str:
    """The verdicts in words, without those that are exploratory."""
    return in_words.listed(verdict for verdict in verdicts if not verdict.claim.exploratory)


def _count_algorithms(contrast: Contrast) -> str:
    return f"{contrast.algorithms} algorithm{'s' if contrast.algorithms > 1 else ''}"


# --- Pictures -----------------------------------------------------------------------------------------------


def metric_dots(
    outcomes: Sequence[Outcome],
    metric: str,
    original: Row,
    first: bool = True,
    name_of: Callable[[str, str], str] = method_name,
) -> Draw:
    """A metric of all methods, means with 95 % intervals over runs, every run as a small dot.

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
    """Differences to uniform draws by algorithm, by pairs of runs, with 95 % intervals; one colour for each arm."""

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
