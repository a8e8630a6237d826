"""Writing a leaderboard: the page, a Markdown of the standings, pictures, and LaTeX tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.leaderboard.boards import Board
from bench.leaderboard.figures import pareto, strips
from bench.leaderboard.page import cells, columns, page
from bench.leaderboard.text import standings_latex
from bench.report import figures
from bench.report.words import markdown
from scoring.errors import UserError
from scoring.files import replacing


def write_leaderboard(boards: Sequence[Board], notes: Sequence[str], out: str | Path) -> None:
    """Write index.html, README.md, and of each board a picture and a LaTeX table.

    Raises:
        UserError: `out` cannot be written to.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, board in enumerate(boards):
            _draw(board, out / f"board-{number}")
            first = next(iter(board.metrics), None)
            if first:
                with replacing(out / f"board-{number}.tex") as unfinished:
                    unfinished.write_text(standings_latex(board, first), encoding="utf-8")
        for name, text in (("README.md", overview(boards, notes)), ("index.html", page(boards, notes))):
            with replacing(out / name) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to ({error.strerror})") from error


def _draw(board: Board, path: Path) -> None:
    panels = [pareto(board)] if board.trade_off else []
    panels += [strips(board, metric) for metric in board.trade_off or tuple(board.metrics)[:1]]
    if panels:
        inches = (5.5 * len(panels), max(4.0, 1.5 + 0.4 * len(board.entries)))
        for suffix in (".png", ".svg"):
            with replacing(path.with_suffix(suffix)) as unfinished:
                figures.picture(panels, unfinished, inches)


def overview(boards: Sequence[Board], notes: Sequence[str]) -> str:
    """The standings of every board by its first metrics, with what must be known of them."""
    parts = ["# Leaderboard\n", "The page with all metrics, runs and samples is `index.html`: open it in a browser.\n"]
    for number, board in enumerate(boards):
        parts.append(f"## {board.name}\n")
        parts.append(", ".join(f"{name} {value}" for name, value in board.about.items()) + ".\n")
        if board.metrics:
            parts.append(f"![Completeness against utility, and every selection](board-{number}.png)\n")
        for metric in board.trade_off or tuple(board.metrics)[:1]:
            parts.append(_table(board, metric))
            parts += [f"{sentence}\n" for sentence in board.sentences[metric]]
    if notes:
        parts.append("## Notes\n")
        parts.append("\n".join(f"- {note}" for note in notes) + "\n")
    return "\n".join(parts)


def _table(board: Board, metric: str) -> str:
    title = board.metrics[metric].title
    return markdown(columns(title), [cells(each) for each in board.standings[metric]]) + "\n"
