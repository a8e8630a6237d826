"""Standings and comparisons as text."""

from __future__ import annotations

from bench.boards.board import Board, metric_label
from bench.boards.compare import Comparison, Side
from bench.boards.page import has_adjusted, has_forecasts
from bench.boards.standings import Standing
from bench.report.words import decimal, interval, three_digits
from bench.results.export import latex_table


def standings_latex(board: Board, metric: str) -> str:
    """The standings of a board as rows of a LaTeX table."""
    adjusted, forecast = has_adjusted(board, metric), has_forecasts(board, metric)
    rows = [
        {
            "rank": standing.rank,
            "entry": standing.entry,
            board.metrics[metric].title: decimal(standing.value.value, 3),
            "95 % CI": interval(standing.value, 3),
            **(_adjusted_cells(standing) if adjusted else {}),
            **(_forecast_cells(standing) if forecast else {}),
            "not separable": standing.groups,
        }
        for standing in board.standings[metric]
    ]
    return latex_table(list(rows[0]), rows)


def _adjusted_cells(standing: Standing) -> dict[str, str | int | None]:
    value = standing.adjusted
    return {"adjusted": decimal(value.value, 3) if value else None, "adjusted rank": standing.adjusted_rank}


def _forecast_cells(standing: Standing) -> dict[str, str | int | None]:
    value = standing.adjusted_by_forecast
    return {"by forecast": decimal(value.value, 3) if value else None, "forecast rank": standing.forecast_rank}


def comparison_lines(comparison: Comparison, first: Side, second: Side) -> list[str]:
    """A comparison as a table for the terminal, a line for each metric."""
    lines = [f"{second.name} less {first.name}, paired by selection and seed"]
    for side, unpaired in zip((first, second), comparison.unpaired, strict=True):
        if unpaired:
            lines.append(f"{unpaired} of {len(side.runs)} runs of {side.name} have no partner, and are left out")
    head = f"{'metric':<26}{'pairs':>6}{'over':>16}{'first':>10}{'second':>10}"
    lines.append(f"{head}{'difference [95 % CI]':>30}{'g [95 % CI]':>26}")
    for paired in comparison.metrics:
        arrow = "↑" if metric_label(paired.metric).higher_is_better else "↓"
        over = f"{paired.units} {paired.unit}s"
        low, middle, high = map(three_digits, (paired.difference.low, paired.difference.value, paired.difference.high))
        difference = f"{middle} [{low} to {high}]"
        effect = f"{decimal(paired.effect.value)} [{interval(paired.effect)}]"
        lines.append(
            f"{paired.metric + ' ' + arrow:<26}{paired.pairs:>6}{over:>16}{paired.first:>10.4g}{paired.second:>10.4g}"
            f"{difference:>30}{effect:>26}"
        )
    lines.append(
        "g: Hedges' g of paired differences, positive where the second is better; intervals are each by itself"
    )
    return lines
