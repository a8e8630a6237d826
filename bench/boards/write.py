"""Writing a leaderboard: the page, a Markdown of the standings, pictures, and LaTeX tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.boards.answers import answer_files, write_answers
from bench.boards.board import Board, boards
from bench.boards.figures import pareto, strips
from bench.boards.page import TITLE as PAGE_TITLE
from bench.boards.page import columns, page, table_rows
from bench.boards.text import standings_latex
from bench.files.folders import HEAD_BYTES, MadeFolders, refuse_foreign, unwritable
from bench.metrics import ATTACKED
from bench.report import figures
from bench.report.document import title_element
from bench.report.words import markdown_table
from bench.results.store import read_stores
from scoring.files import replacing

# How the files of a leaderboard begin.
TITLE = "# Leaderboard\n"


def leaderboard(
    stores: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    task: str | None = None,
    experiment: str | None = None,
    keep_conflicts: bool = False,
) -> tuple[list[Board], list[str]]:
    """Rank the runs in result stores, and write the leaderboard's page.

    Entries are ranked by their means over selections, adjusted for those that an entry lacks, and at equal difficulty.

    Args:
        stores: folders or URIs (s3://, gs://) of stores.
        out: folder for index.html, README.md, pictures and LaTeX tables, and a page of the answers of each run whose
            answers are in a store.
        task, experiment: only this one.
        keep_conflicts: show runs even where stores contradict each other: runs of different settings get boards of
            their own, and of a run with two results the first store's is shown.

    Returns:
        The boards, and notes that a reader must know.

    Raises:
        UserError: a path is no store, stores contradict each other, or `out` cannot be written to.
    """
    roots = [stores] if isinstance(stores, str | Path) else stores
    results = read_stores(roots, task, experiment)
    ranked, notes = boards(results, keep_conflicts=keep_conflicts)
    _check_place(Path(out))
    # What the page leads to is there before the page.
    write_answers(ranked, results, Path(out))
    write_leaderboard(ranked, notes, out, answer_files(ranked, results))
    return ranked, notes


def write_leaderboard(
    ranked: Sequence[Board], notes: Sequence[str], out: str | Path, answers: Mapping[str, str] | None = None
) -> None:
    """Write index.html, README.md, and of each board a picture and a LaTeX table.

    Args:
        answers: pages beside index.html, by the run whose answers they show.

    Raises:
        UserError: `out` cannot be written to.
    """
    out = Path(out)
    made = MadeFolders(out)
    _check_place(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, board in enumerate(ranked):
            _draw(board, out / f"board-{number}")
            first = next(iter(board.metrics), None)
            if first:
                with replacing(out / f"board-{number}.tex") as unfinished:
                    unfinished.write_text(standings_latex(board, first), encoding="utf-8")
        for name, text in (("README.md", overview(ranked, notes)), ("index.html", page(ranked, notes, answers))):
            with replacing(out / name) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        made.remove_unused()
        raise unwritable(out, error) from error


def _check_place(out: Path) -> None:
    refuse_foreign(out / "README.md", TITLE, "a leaderboard")
    refuse_foreign(out / "index.html", title_element(PAGE_TITLE), "a leaderboard", HEAD_BYTES)


def _draw(board: Board, path: Path) -> None:
    panels = [pareto(board)] if board.trade_off else []
    panels += [strips(board, metric) for metric in board.trade_off or tuple(board.metrics)[:1]]
    if panels:
        inches = (5.5 * len(panels), max(4.0, 1.5 + 0.4 * len(board.entries)))
        for suffix in (".png", ".svg"):
            with replacing(path.with_suffix(suffix)) as unfinished:
                figures.picture(panels, unfinished, inches)


def overview(ranked: Sequence[Board], notes: Sequence[str]) -> str:
    """README.md: the standings of every board by its first metrics, with the sentences that a reader must know."""
    parts = [TITLE, "The page with all metrics, runs and samples is `index.html`: open it in a browser.\n"]
    for number, board in enumerate(ranked):
        parts.append(f"## {board.name}\n")
        parts.append(", ".join(f"{name} {value}" for name, value in board.about.items()) + ".\n")
        if board.metrics:
            parts.append(f"![Completeness against utility, and every selection](board-{number}.png)\n")
        robustness = [name for name in board.metrics if name == f"{ATTACKED}completeness"]
        for metric in (*(board.trade_off or tuple(board.metrics)[:1]), *robustness):
            parts.append(_table(board, metric))
            parts += [f"{sentence}\n" for sentence in board.sentences[metric]]
    if notes:
        parts.append("## Notes\n")
        parts.append("\n".join(f"- {note}" for note in notes) + "\n")
    return "\n".join(parts)


def _table(board: Board, metric: str) -> str:
    return markdown_table(columns(board, metric), table_rows(board, metric)) + "\n"
