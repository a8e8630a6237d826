"""The leaderboard's page: one HTML file that needs no network, with every run and sample behind its standings.

Python writes the frame, the figures and the standings by each board's first metric: a reader without JavaScript sees
these. `leaderboard.js` shows the rest, from the JSON in the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench.boards.board import Board, RankedRun
from bench.boards.figures import (
    marks,
    pareto,
    pareto_alt,
    pareto_caption,
    pareto_inches,
    strips,
    strips_alt,
    strips_caption,
    strips_inches,
)
from bench.boards.standings import SelectionLabel, Standing
from bench.report import figures
from bench.report.document import document
from bench.report.words import decimal, interval
from bench.stats.estimates import Estimate

HERE = Path(__file__).parent
TITLE = "mrd-bench leaderboard"


def page(boards: Sequence[Board], notes: Sequence[str] = (), answers: Mapping[str, str] | None = None) -> str:
    """The whole document.

    Args:
        notes: what a reader must know about the stores: files that were skipped, conflicts.
        answers: pages beside this one, by the run whose answers they show.
    """
    runs = sum(len(board.runs) for board in boards)
    links = "".join(f'<li><a href="#board={n}">{escape(board.name)}</a></li>' for n, board in enumerate(boards))
    sections = "".join(_board(board, number) for number, board in enumerate(boards))
    remarks = "".join(f"<li>{escape(note)}</li>" for note in notes)
    body = (
        '<a class="skip" href="#main">Skip to the standings</a>'
        '<header><h1>Leaderboard</h1><button type="button" id="theme" hidden>Theme: auto</button>'
        f"<p>Unlearning algorithms on {len(boards)} {'board' if len(boards) == 1 else 'boards'}, {runs:,} runs. Ranks "
        "are as measured, adjusted for selections of forget samples that an entry lacks, and, where entries differ in "
        "their selections, at equal difficulty. Intervals are 95 %, over selections.</p>"
        "<noscript><p>Without JavaScript this page shows each board by its first metric.</p></noscript></header>"
        + (f'<nav aria-label="Boards"><ul id="boards">{links}</ul></nav>' if len(boards) > 1 else "")
        + f'<main id="main" tabindex="-1">{sections}<section id="detail" hidden></section></main>'
        + (f'<footer><h2>Notes</h2><ul id="notes">{remarks}</ul></footer>' if notes else "")
    )
    return document(TITLE, body, [_board_data(board, answers or {}) for board in boards], HERE, "leaderboard")


def _board(board: Board, number: int) -> str:
    metric = next(iter(board.metrics), None)
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in board.about.items())
    content = f"<dl>{terms}</dl>"
    if metric is None:
        content += "<p>No run has finished with a metric.</p>"
    else:
        sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in board.sentences[metric])
        content += (
            '<div class="controls" hidden>'
            '<label>Metric <select class="metric"></select></label>'
            '<label>Filter <input type="search" class="filter" placeholder="entry or setting"></label>'
            '<output class="count"></output></div>'
            f'<div class="place">{_static_table(board, metric)}</div>'
            '<p class="explained">Entries that share a letter cannot be told apart on these selections. A rank '
            "is followed by the range of ranks that the entry can have.</p>"
            f'<div class="sentences">{sentences}</div>{_figures(board, number)}'
        )
    return f'<section class="board" id="board-{number}"><h2 tabindex="-1">{escape(board.name)}</h2>{content}</section>'


def _figures(board: Board, number: int) -> str:
    html = ""
    if board.trade_off and marks(board):
        drawn = figures.svg(pareto(board), f"b{number}p", pareto_alt(board), pareto_inches(board))
        html += f"<figure>{drawn}<figcaption>{escape(pareto_caption(board))}</figcaption></figure>"
    for n, metric in enumerate(board.trade_off or tuple(board.metrics)[:1]):
        size, alt = strips_inches(board, metric), strips_alt(board, metric)
        drawn = figures.svg(strips(board, metric), f"b{number}s{n}", alt, size)
        html += f"<figure>{drawn}<figcaption>{escape(strips_caption(board, metric))}</figcaption></figure>"
    return f'<div class="figures">{html}</div>'


def _static_table(board: Board, metric: str) -> str:
    """The table of the standings for readers without JavaScript; the script replaces it."""
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table_rows(board, metric)
    )
    heads = "".join(f'<th scope="col">{escape(title)}</th>' for title in columns(board, metric))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Standings"><table class="numbers">'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def has_adjusted(board: Board, metric: str) -> bool:
    """Whether values at equal difficulty are known and not the raw ones: only then are they shown."""
    return any(standing.adjusted for standing in board.standings[metric])


def has_forecasts(board: Board, metric: str) -> bool:
    """The same of values at equal forecast."""
    return any(standing.adjusted_by_forecast for standing in board.standings[metric])


def columns(board: Board, metric: str) -> list[str]:
    """Column heads of the standings by a metric."""
    adjusted = ["at equal difficulty", "rank there"] if has_adjusted(board, metric) else []
    forecast = ["at equal forecast", "rank by forecast"] if has_forecasts(board, metric) else []
    title = board.metrics[metric].title
    return ["rank", "entry", title, *adjusted, *forecast, "not separable", "runs"]


def table_rows(board: Board, metric: str) -> list[list[str]]:
    """The rows of the standings, below `columns`."""
    adjusted, forecast = has_adjusted(board, metric), has_forecasts(board, metric)
    return [_cells(standing, adjusted, forecast) for standing in board.standings[metric]]


def _cells(standing: Standing, adjusted: bool, forecast: bool) -> list[str]:
    rank = "not compared" if standing.rank is None else str(standing.rank)
    if standing.best is not None and standing.best != standing.worst:
        rank += f" ({standing.best}–{standing.worst})"
    return [
        rank,
        standing.entry,
        _with_interval(standing.value),
        *(_adjusted_cells(standing.adjusted, standing.adjusted_rank) if adjusted else ()),
        *(_adjusted_cells(standing.adjusted_by_forecast, standing.forecast_rank) if forecast else ()),
        standing.groups or "–",
        str(standing.runs),
    ]


def _adjusted_cells(value: Estimate | None, rank: int | None) -> list[str]:
    return ["–" if value is None else _with_interval(value), "–" if rank is None else str(rank)]


def _with_interval(estimate: Estimate) -> str:
    return f"{decimal(estimate.value, 3)} [{interval(estimate, 3)}]"


# --- The data that the script reads -------------------------------------------------------------------------


def _board_data(board: Board, answers: Mapping[str, str]) -> dict[str, Any]:
    """A board as the script reads it: lists without keys, and numbers in place of names, as there are many runs."""
    entries = {name: number for number, name in enumerate(board.entries)}
    selections = {name: number for number, name in enumerate(board.selections)}
    ids = {name: n for n, name in enumerate(dict.fromkeys(i for s in board.selections.values() for i in s.ids))}
    metrics = list(board.metrics)
    return {
        "name": board.name,
        "entries": [[name, {k: _text(v) for k, v in fields.items()}] for name, fields in board.entries.items()],
        "metrics": [
            [name, metric.title, metric.definition, metric.higher_is_better] for name, metric in board.metrics.items()
        ],
        "standings": [
            [_standing(row, entries, has_forecasts(board, name)) for row in board.standings[name]] for name in metrics
        ],
        "sentences": [list(board.sentences[name]) for name in metrics],
        "selections": [_selection(label, ids) for label in board.selections.values()],
        "samples": [_sample(name, board) for name in ids],
        "runs": [
            _run(run, board, entries[run.entry], selections[run.selection], metrics, answers.get(run.run))
            for run in board.runs
        ],
        "origins": [list(origin.items()) for origin in board.origins],
    }


def _selection(label: SelectionLabel, ids: Mapping[str, int]) -> list[Any]:
    row = [label.name, label.level, _number(label.mean_log_mrd), [ids[name] for name in label.ids]]
    forecast = _number(label.mean_log_flip_time)
    return row if forecast is None else [*row, forecast]


def _standing(standing: Standing, entries: Mapping[str, int], forecast: bool) -> list[Any]:
    row = [
        entries[standing.entry],
        standing.rank,
        standing.best,
        standing.worst,
        _estimate(standing.value),
        _estimate(standing.adjusted) if standing.adjusted else None,
        standing.adjusted_rank,
        standing.groups,
        standing.runs,
        standing.selections,
        standing.seeds,
    ]
    if not forecast:
        return row
    value = standing.adjusted_by_forecast
    return [*row, _estimate(value) if value else None, standing.forecast_rank]


def _sample(name: str, board: Board) -> list[Any]:
    text = board.texts.get(name)
    return [name, *([text.prompt, text.completion, _number(text.mrd), text.num_tokens] if text else [None] * 4)]


def _run(
    run: RankedRun, board: Board, entry: int, selection: int, metrics: Sequence[str], answers: str | None
) -> list[Any]:
    until = None
    if run.updates_until_forgotten:
        until = [run.updates_until_forgotten.get(name) for name in board.selections[run.selection].ids]
    return [
        run.run,
        entry,
        selection,
        run.seed,
        run.status,
        run.reason,
        [_number(run.values.get(name)) for name in metrics],
        run.updates,
        _number(run.seconds),
        until,
        run.origin,
        *([] if answers is None else [answers]),
    ]


def _estimate(estimate: Estimate) -> list[float | None]:
    return [_number(estimate.value), _number(estimate.low), _number(estimate.high)]


def _number(value: float | None) -> float | None:
    """Six significant digits; None for what is not a finite number."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
