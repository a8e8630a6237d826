"""The figures of a leaderboard, the sentences under them, and the Pareto front."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from bench.boards.board import Board
from bench.boards.standings import Standing
from bench.report.figures import BLUE, GREEN, INK, MUTED, ORANGE, VERMILLION, Draw, error_bars
from bench.report.words import decimal, listed, three_digits
from bench.stats.estimates import Estimate

MOST_ENTRIES = 30  # in a figure
WIDTH = 6.4  # inches
LINE_HEIGHT = 0.2  # inches for a line of text
LABEL_LETTERS = 24  # in a line of a label
LEVEL_STYLES = ((BLUE, "^"), (ORANGE, "s"), (VERMILLION, "v"), (GREEN, "D"), (MUTED, "P"))
KNOWN_LEVELS = ("easy", "medium", "hard")


# --- Completeness against utility ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """An entry in the plane that the two metrics of a trade-off span."""

    entry: str
    completeness: Estimate
    utility: Estimate


def marks(board: Board) -> list[Mark]:
    """Marks of the entries that have a rank under both metrics of the trade-off, the most complete first."""
    assert board.trade_off is not None
    first, second = ({s.entry: s for s in board.standings[metric] if _has_rank(s)} for metric in board.trade_off)
    return [Mark(name, standing.value, second[name].value) for name, standing in first.items() if name in second]


def front(board: Board) -> list[Mark]:
    """The Pareto front, from the least to the most complete mark: those that no other mark beats.

    One mark beats another if it is as good in both metrics and better in one.
    """
    signs = _signs(board)
    all_marks = marks(board)
    points = np.array(
        [[sign * e.value for sign, e in zip(signs, _coordinates(mark), strict=True)] for mark in all_marks]
    ).reshape(-1, 2)
    as_good = (points[:, None] >= points[None]).all(axis=2)
    better = (points[:, None] > points[None]).any(axis=2)
    beaten = np.any(as_good & better, axis=0).tolist()
    unbeaten = [mark for mark, is_beaten in zip(all_marks, beaten, strict=True) if not is_beaten]
    return sorted(unbeaten, key=lambda mark: signs[0] * mark.completeness.value)


def pareto(board: Board, title: str = "") -> Draw:
    """Utility against completeness: means with 95 % intervals over selections, and the Pareto front.

    An axis whose metric is better when lower is reversed, so that the upper right is always the best.
    """

    def draw(axes: Axes) -> None:
        assert board.trade_off is not None
        best = front(board)
        drawn = _drawn_marks(board)
        for group, colour, fill, marker, label in (
            ([mark for mark in drawn if mark not in best], MUTED, "none", "s", "other entries"),
            (best, BLUE, BLUE, "o", "on the Pareto front"),
        ):
            if group:
                axes.errorbar(
                    [mark.completeness.value for mark in group],
                    [mark.utility.value for mark in group],
                    xerr=error_bars([mark.completeness for mark in group]),
                    yerr=error_bars([mark.utility for mark in group]),
                    fmt=marker,
                    color=colour,
                    markerfacecolor=fill,
                    markersize=6,
                    elinewidth=1,
                    label=label,
                )
        signs = _signs(board)
        for sign, axis in zip(signs, (axes.xaxis, axes.yaxis), strict=True):
            axis.set_inverted(sign < 0)
        left, bottom = axes.get_xlim()[0], axes.get_ylim()[0]
        x = [left, *(mark.completeness.value for mark in best), best[-1].completeness.value]
        y = [best[0].utility.value, *(mark.utility.value for mark in best), bottom]
        axes.plot(x, y, drawstyle="steps-pre", color=BLUE, linewidth=1, linestyle="--", zorder=1)
        axes.set_xlim(axes.get_xlim())
        axes.set_xlim(left, axes.get_xlim()[1])
        axes.set_ylim(bottom, axes.get_ylim()[1])
        _margin_labels(axes, drawn, best)
        axes.set_xlabel(_axis_title(board, board.trade_off[0]))
        axes.set_ylabel(_axis_title(board, board.trade_off[1]))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, columnspacing=1, handletextpad=0.3)
        axes.set_title(title, pad=30)

    return draw


def pareto_inches(board: Board) -> tuple[float, float]:
    lines = sum(len(_lines(mark.entry)) for mark in _drawn_marks(board))
    return WIDTH, max(4.2, 1.3 + 1.05 * LINE_HEIGHT * lines)


def pareto_caption(board: Board) -> str:
    assert board.trade_off is not None
    best = front(board)
    names = listed([mark.entry for mark in reversed(best)])
    all_marks = marks(board)
    caption = (
        f"{names} {'is' if len(best) == 1 else 'are'} on the Pareto front: no other of the {len(all_marks)} entries is "
        "as good in both metrics and better in one. The further right, the more is forgotten; the higher, the more is "
        "kept. Marks are means over selections, crosses their 95 % intervals; the front is that of the means."
    )
    drawn = {mark.entry for mark in _drawn_marks(board)}
    absent = [name for name in board.entries if name not in {mark.entry for mark in all_marks}]
    return caption + _left_out([mark.entry for mark in all_marks if mark.entry not in drawn]) + _not_compared(absent)


def pareto_alt(board: Board) -> str:
    assert board.trade_off is not None
    x, y = (board.metrics[metric].title for metric in board.trade_off)
    ends = "; ".join(
        f"{mark.entry} {decimal(mark.completeness.value, 3)} and {decimal(mark.utility.value, 3)}"
        for mark in reversed(front(board))
    )
    return f"{y} against {x}, {len(_drawn_marks(board))} entries. The Pareto front, {x} and {y}: {ends}."


def _drawn_marks(board: Board) -> list[Mark]:
    """At most MOST_ENTRIES marks, those of the front first."""
    best = front(board)
    others = [mark for mark in marks(board) if mark not in best]
    return (best + others)[:MOST_ENTRIES]


def _margin_labels(axes: Axes, drawn: Sequence[Mark], best: Sequence[Mark]) -> None:
    """Write names to the right of the axes, as near to the height of their marks as they fit, with a line to each."""
    size = float(mpl.rcParams["font.size"]) * 0.9
    assert axes.figure is not None
    height = axes.figure.bbox.height / axes.figure.dpi - 1.1  # inches, less what is above and below the axes
    line = 1.3 * size / 72 / height
    low, high = axes.get_ylim()
    ordered = sorted(drawn, key=lambda mark: (mark.utility.value - low) / (high - low))
    mark_heights = [(mark.utility.value - low) / (high - low) for mark in ordered]
    label_heights = [len(_lines(mark.entry)) * line for mark in ordered]
    for mark, centre in zip(ordered, without_overlap(mark_heights, label_heights), strict=True):
        axes.annotate(
            _label(mark.entry),
            (mark.completeness.value, mark.utility.value),
            (1.04, centre),
            textcoords="axes fraction",
            va="center",
            fontsize=size,
            fontweight="bold" if mark in best else "normal",
            linespacing=1.1,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "linestyle": ":",
                "color": MUTED,
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def without_overlap(centres: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Centres of labels moved so that none overlap and none is above 1.

    Args:
        centres: where labels would best be, in ascending order.
        heights: of the labels.
    """
    moved: list[float] = []
    for centre, height, height_below in zip(centres, heights, [0.0, *heights], strict=False):
        moved.append(max(centre, moved[-1] + (height + height_below) / 2) if moved else centre)
    highest = 1.0 + (heights[-1] / 2 if heights else 0)
    for label in reversed(range(len(moved))):
        moved[label] = min(moved[label], highest - heights[label] / 2)
        highest = moved[label] - heights[label] / 2
    return moved


# --- The selections of each entry ---------------------------------------------------------------------------


def by_selection(board: Board, metric: str) -> dict[str, dict[str, float]]:
    """The value of each entry on each selection, a mean over seeds."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in board.runs:
        value = run.values.get(metric, math.nan)
        if math.isfinite(value):
            values[run.entry][run.selection].append(value)
    return {
        entry: {selection: float(np.mean(seeds)) for selection, seeds in selections.items()}
        for entry, selections in values.items()
    }


def strips(board: Board, metric: str, title: str = "") -> Draw:
    """The value of each entry on every selection, marked by level, and the mean with its interval; best on top."""

    def draw(axes: Axes) -> None:
        drawn = _drawn_standings(board, metric)
        values = by_selection(board, metric)
        levels = _levels(board)
        step = 0.18 if len(levels) < 3 else 0.36 / (len(levels) - 1)  # between levels, in rows
        for place, level in enumerate(levels):
            colour, marker = LEVEL_STYLES[place % len(LEVEL_STYLES)] if len(levels) > 1 else (BLUE, "o")
            points = [
                (value, row + step * (place - (len(levels) - 1) / 2))
                for row, standing in enumerate(drawn)
                for selection, value in values.get(standing.entry, {}).items()
                if board.selections[selection].level == level
            ]
            x, y = np.array(points).reshape(-1, 2).T
            label = (level or "no level") if len(levels) > 1 else "selections"
            axes.plot(x, y, linestyle="none", marker=marker, markersize=4, color=colour, alpha=0.6, label=label)
        axes.errorbar(
            [standing.value.value for standing in drawn],
            [row + 0.36 for row in range(len(drawn))],
            xerr=error_bars([standing.value for standing in drawn]),
            fmt="D",
            color=INK,
            markersize=4,
            capsize=3,
            label="mean, 95 % CI",
        )
        axes.set_yticks(range(len(drawn)), [_label(standing.entry) for standing in drawn])
        axes.set_ylim(len(drawn) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(_axis_title(board, metric))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, columnspacing=1, handletextpad=0.2)
        axes.set_title(title, pad=30)

    return draw


def strips_inches(board: Board, metric: str) -> tuple[float, float]:
    drawn = _drawn_standings(board, metric)
    lines = max((len(_lines(standing.entry)) for standing in drawn), default=1)
    return WIDTH, 1.2 + max(0.42, LINE_HEIGHT * lines) * len(drawn)


def strips_caption(board: Board, metric: str) -> str:
    """How widely the best entry ranges over selections, against its lead over the second."""
    values = by_selection(board, metric)
    ranked = [standing for standing in board.standings[metric] if _has_rank(standing)]
    caption = "Every mark is a selection of forget samples, its value a mean over seeds; the best entry is on top."
    if len(ranked) > 1 and len(values.get(ranked[0].entry, {})) > 1:
        first, second = ranked[:2]
        values_of_first = values[first.entry].values()
        width, lead = max(values_of_first) - min(values_of_first), abs(first.value.value - second.value.value)
        times = f", {width / lead:.1f} times its lead of" if lead > 0 else ", while there is no lead:"
        caption += (
            f" From selection to selection {first.entry} ranges over {three_digits(width)} ("
            f"{three_digits(min(values_of_first))} to {three_digits(max(values_of_first))}){times} "
            f"{three_digits(lead)} over {second.entry}."
        )
    drawn = {standing.entry for standing in _drawn_standings(board, metric)}
    standings = board.standings[metric]
    absent = [s.entry for s in standings if not math.isfinite(s.value.value)]
    return (
        caption
        + _left_out([s.entry for s in standings if s.entry not in drawn and s.entry not in absent])
        + (f" Without a value: {listed(absent)}." if absent else "")
    )


def strips_alt(board: Board, metric: str) -> str:
    means = "; ".join(f"{s.entry} {three_digits(s.value.value)}" for s in _drawn_standings(board, metric))
    return f"{board.metrics[metric].title} of each entry on each selection. Means: {means}."


def _drawn_standings(board: Board, metric: str) -> list[Standing]:
    return [standing for standing in board.standings[metric] if math.isfinite(standing.value.value)][:MOST_ENTRIES]


def _levels(board: Board) -> list[str]:
    """The levels of the board's selections: easy, medium, hard, then others as they come."""
    levels = dict.fromkeys(selection.level for selection in board.selections.values())
    known = [level for level in KNOWN_LEVELS if level in levels]
    return known + [level for level in levels if level not in known]


# --- Pieces -------------------------------------------------------------------------------------------------


def _has_rank(standing: Standing) -> bool:
    return standing.rank is not None and math.isfinite(standing.value.value)


def _signs(board: Board) -> tuple[int, int]:
    """+1 for a metric of the trade-off that is better when higher, -1 for one that is better when lower."""
    assert board.trade_off is not None
    x, y = (1 if board.metrics[metric].higher_is_better else -1 for metric in board.trade_off)
    return x, y


def _coordinates(mark: Mark) -> tuple[Estimate, Estimate]:
    return mark.completeness, mark.utility


def _axis_title(board: Board, metric: str) -> str:
    label = board.metrics[metric]
    return f"{_literal(label.title)} ({'higher' if label.higher_is_better else 'lower'} is better)"


def _lines(name: str) -> list[str]:
    return textwrap.wrap(name, LABEL_LETTERS) or [""]


def _label(name: str) -> str:
    return _literal("\n".join(_lines(name)))


def _literal(text: str) -> str:
    """Text with its dollars escaped: matplotlib would set what stands between two as a formula."""
    return text.replace("$", r"\$")


def _left_out(names: Sequence[str]) -> str:
    return f" Not drawn, of lower rank than the {MOST_ENTRIES} that are: {listed(names)}." if names else ""


def _not_compared(names: Sequence[str]) -> str:
    return f" Not compared: {listed(names)}." if names else ""
