"""Standings and comparisons as text."""

from __future__ import annotations

from bench.boards.board import Board, shown
from bench.boards.compare import Comparison, Side
from bench.report.words import decimal, interval, three_digits
from bench.results.export import latex_table


def standings_latex(board: Board, metric: str) -> str:
    """The standings of a board as rows of a LaTeX table."""
    rows = [
        {
            "rank": each.rank,
            "entry": each.entry,
            board.metrics[metric].title: decimal(each.value.value, 3),
            "95 % CI": interval(each.value, 3),
            "adjusted": decimal(each.adjusted.value, 3) if each.adjusted else None,
            "adjusted rank": each.adjusted_rank,
            "not separable": each.groups,
        }
        for each in board.standings[metric]
    ]
    return latex_table(list(rows[0]), rows)


def comparison_lines(found: Comparison, first: Side, second: Side) -> list[str]:
    """A line for each metric."""
    lines = [f"{second.name} less {first.name}, paired by selection and seed"]
    for side, alone in zip((first, second), found.alone, strict=True):
        if alone:
            lines.append(f"{alone} of {len(side.runs)} runs of {side.name} have no partner, and are left out")
    head = f"{'metric':<26}{'pairs':>6}{'over':>16}{'first':>10}{'second':>10}"
    lines.append(f"{head}{'difference [95 % CI]':>30}{'g [95 % CI]':>26}")
    for each in found.metrics:
        arrow = "↑" if shown(each.metric).higher_is_better else "↓"
        over = f"{each.units} {each.unit}s"
        low, middle, high = map(three_digits, (each.difference.low, each.difference.value, each.difference.high))
        difference = f"{middle} [{low} to {high}]"
        effect = f"{decimal(each.effect.value)} [{interval(each.effect)}]"
        lines.append(
            f"{each.metric + ' ' + arrow:<26}{each.pairs:>6}{over:>16}{each.first:>10.4g}{each.second:>10.4g}"
            f"{difference:>30}{effect:>26}"
        )
    lines.append(
        "g: Hedges' g of paired differences, positive where the second is better; intervals are each by itself"
    )
    return lines
