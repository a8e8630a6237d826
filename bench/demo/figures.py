"""The figures of the demo's page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from bench.demo.findings import Forecasts
from bench.demo.runs import DemoRun
from bench.files.score_file import Scores
from bench.jobs.draws import ScalingLine
from bench.report.figures import BLUE, GREEN, INK, MUTED, ORANGE, VERMILLION, Draw

EXTREMES = 5  # hardest and easiest samples that are marked


def difficulty(scores: Scores, title: str = "") -> Draw:
    """MRD of every sample, sorted, with 95 % intervals of the sampling error; the extremes are marked."""

    def draw(axes: Axes) -> None:
        mrd, error = scores["mrd"], scores["mrd_stderr"]
        order = np.argsort(mrd, kind="stable")
        rank = np.arange(1, len(order) + 1)
        extremes = min(EXTREMES, len(order) // 2)
        groups = (
            (slice(0, extremes), VERMILLION, "v", "hardest"),
            (slice(extremes, len(order) - extremes), MUTED, "o", "between"),
            (slice(len(order) - extremes, None), BLUE, "^", "easiest"),
        )
        for group, colour, marker, label in groups:
            axes.errorbar(
                rank[group],
                mrd[order][group],
                1.96 * error[order][group],
                fmt=marker,
                color=colour,
                markersize=5,
                elinewidth=1,
                label=label,
            )
        axes.set_xlabel("samples, hardest to easiest to forget")
        axes.set_ylabel("MRD")
        axes.legend(loc="upper left")
        axes.set_title(title)

    return draw


def estimators(first: Scores, second: Scores) -> Draw:
    """One estimator's scores against another's, with 95 % intervals of the sampling error and the diagonal."""

    def draw(axes: Axes) -> None:
        mrd_of = dict(zip(second.ids, second["mrd"].tolist(), strict=True))
        x = np.array([mrd_of.get(name, math.nan) for name in first.ids])
        axes.errorbar(
            x,
            first["mrd"],
            1.96 * first["mrd_stderr"],
            fmt="o",
            color=BLUE,
            ecolor=BLUE,
            markersize=4,
            elinewidth=0.8,
            label="samples, 95 % CI",
        )
        ends = np.array([np.nanmin(x), np.nanmax(x)])
        axes.plot(ends, ends, color=VERMILLION, linestyle="--", label="equal")
        axes.set_xlabel(f"MRD by {second.spec['estimator']}")
        axes.set_ylabel(f"MRD by {first.spec['estimator']}")
        axes.legend(loc="upper left")

    return draw


def forecasts(found: Forecasts) -> Draw:
    """The forecast against the real updates of each sample, with the diagonal."""

    def draw(axes: Axes) -> None:
        known = np.isfinite(found.flip_time) & np.isfinite(found.updates)
        real, forecast = found.updates[known], found.flip_time[known]
        axes.plot(real, forecast, color=BLUE, marker="o", linestyle="none", markersize=4, label="samples")
        end = 1.05 * max([1.0, *real.tolist(), *forecast.tolist()])
        axes.plot([0, end], [0, end], color=VERMILLION, linestyle="--", label="equal")
        axes.set_xlabel("real updates until forgotten")
        axes.set_ylabel("flip time, forecast")
        axes.legend(loc="upper left")

    return draw


def scaling(lines: Sequence[ScalingLine], title: str = "") -> Draw:
    """Median MRD against sigma, both logarithmic, with the slopes in the legend."""

    def draw(axes: Axes) -> None:
        for line, colour, marker in zip(lines, (BLUE, GREEN, VERMILLION, ORANGE), "os^D", strict=False):
            short = {"float32": "fp32", "bfloat16": "bf16"}.get(line.dtype, line.dtype)
            label = f"{line.statistic}, {short}: {line.slope().value:.2f} (should be {line.expected:g})"
            axes.plot(line.sigmas, np.median(line.scores, axis=1), color=colour, marker=marker, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        # Room above the lines for the legend.
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.45)
        axes.yaxis.set_major_locator(LogLocator(10, numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("sigma")
        axes.set_ylabel("MRD, median of samples")
        axes.legend(loc="upper left", title="slope", alignment="left")
        axes.set_title(title)

    return draw


def recall_by_epoch(runs: Sequence[DemoRun], which_set: Literal["forget", "retain"], title: str = "") -> Draw:
    """ROUGE-L recall of the forget or retain set by epoch: a colour for each algorithm, a dash and a mark for alpha."""

    def draw(axes: Axes) -> None:
        for run, style in zip(runs, _run_styles(runs), strict=True):
            _run_line(axes, run, run.epochs, _recall(run, which_set), style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epochs")
        axes.set_ylabel(f"ROUGE-L recall, {which_set} set")
        _run_legend(axes, runs, title)

    return draw


def trade_off(runs: Sequence[DemoRun], title: str = "") -> Draw:
    """The path of each run, recall of the retain set against that of the forget set."""

    def draw(axes: Axes) -> None:
        for run, style in zip(runs, _run_styles(runs), strict=True):
            _run_line(axes, run, run.forget_recall, run.retain_recall, style)
        # Time goes from left to right, as in the other figures.
        axes.invert_xaxis()
        axes.set_xlabel("ROUGE-L recall, forget set (reversed)")
        axes.set_ylabel("ROUGE-L recall, retain set")
        _run_legend(axes, runs, title)

    return draw


def _recall(run: DemoRun, which_set: Literal["forget", "retain"]) -> np.ndarray:
    return run.forget_recall if which_set == "forget" else run.retain_recall


RUN_COLOURS = (BLUE, ORANGE, GREEN, VERMILLION)
ALPHA_STYLES: tuple[tuple[Any, str], ...] = (("-", "o"), ("--", "^"), (":", "s"))
RING: dict[str, Any] = {
    "marker": "o",
    "markersize": 11,
    "markerfacecolor": "none",
}  # around the end of a run that ended early


def _run_styles(runs: Sequence[DemoRun]) -> list[tuple[str, Any, str]]:
    """Colour, dash and mark of each run, in the order in which algorithms and alphas first appear."""
    algorithms = list(dict.fromkeys(run.algorithm for run in runs))
    alphas = list(dict.fromkeys(run.alpha for run in runs))
    return [
        (
            RUN_COLOURS[algorithms.index(run.algorithm) % len(RUN_COLOURS)],
            *ALPHA_STYLES[alphas.index(run.alpha) % len(ALPHA_STYLES)],
        )
        for run in runs
    ]


def _run_line(axes: Axes, run: DemoRun, x: np.ndarray, y: np.ndarray, style: tuple[str, Any, str]) -> None:
    colour, dash, marker = style
    # Open marks on dashed lines: where two lines coincide, both can be seen.
    fill = colour if dash == "-" else "none"
    axes.plot(x, y, color=colour, linestyle=dash, marker=marker, markersize=5, markerfacecolor=fill, linewidth=1.3)
    if run.ended_early:
        axes.plot(x[-1:], y[-1:], color=colour, linestyle="none", **RING)


def _run_legend(axes: Axes, runs: Sequence[DemoRun], title: str) -> None:
    """Draw a legend above the axes, where no line can cross it: a row of algorithms, and one of alphas."""
    styles = _run_styles(runs)
    colours = {run.algorithm: style[0] for run, style in zip(runs, styles, strict=True)}
    alphas = {run.alpha: style[1:] for run, style in zip(runs, styles, strict=True)}
    algorithm_lines = [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in colours.items()]
    alpha_lines = [
        Line2D([], [], color=INK, linestyle=dash, marker=marker, markersize=5, label=f"alpha {alpha:g}")
        for alpha, (dash, marker) in alphas.items()
    ]
    for handle in alpha_lines[1:]:
        handle.set_markerfacecolor("none")
    if any(run.ended_early for run in runs):
        alpha_lines.append(Line2D([], [], color=INK, linestyle="none", label="ended early", **RING))
    # Two legends, as the columns of one would be as wide as the widest entry of both rows. add_artist keeps the first
    # one when the second is drawn, and only if it is not clipped to the axes does the layout leave room for it.
    axes.add_artist(_row_above(axes, alpha_lines, 0.1)).set_clip_on(False)
    letter = _row_above(axes, algorithm_lines, 1.7).prop.get_size_in_points()
    axes.set_title(title, pad=4.2 * letter)


def _row_above(axes: Axes, handles: Sequence[Line2D], height: float) -> Legend:
    """Draw a legend of one row, `height` times the size of its letters above the axes."""
    return axes.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(handles),
        columnspacing=1,
        handlelength=1.6,
        handletextpad=0.4,
        borderaxespad=height,
    )
