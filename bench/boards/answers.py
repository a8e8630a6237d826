"""The pages of the answers that stores keep of runs on leaderboards."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.answers.page import write_page
from bench.answers.table import Answer, AnswerTable, Model, Role, Row, in_order_of_sets
from bench.boards.board import Board, RankedRun
from bench.results.store import ANSWERED_BY, Results

ROLES: Mapping[str, Role] = dict(zip(ANSWERED_BY, ("before", "after", "retain-only"), strict=True))
_FILE_NAME = re.compile(r"\w{1,64}")


def answer_files(boards: Sequence[Board], results: Results) -> dict[str, str]:
    """The names of the pages that `write_answers` writes, by the run whose answers they show."""
    kept = set(results.answers["run"].to_pylist())
    runs = (run.run for board in boards for run in board.runs)
    return {run: f"answers-{run}.html" for run in runs if run in kept and _FILE_NAME.fullmatch(run)}


def write_answers(boards: Sequence[Board], results: Results, out: Path) -> None:
    """Write a page for each run whose answers are kept.

    Raises:
        UserError: a page cannot be written.
    """
    files = answer_files(boards, results)
    rows: defaultdict[str, dict[tuple[str, str], dict[str, Any]]] = defaultdict(dict)
    for row in _complete(results) if files else ():
        # A sample of two evaluations is shown once.
        rows[row["run"]].setdefault((row["set"], row["sample_id"]), row)
    for board in boards:
        for run in board.runs:
            if run.run in files:
                write_page(_table(board, run, rows[run.run]), out / files[run.run], setting="out")


def _complete(results: Results) -> Iterator[dict[str, Any]]:
    """The rows that say whose answers they are, to what."""
    names = ("run", "set", "sample_id")
    return (row for row in results.answers.to_pylist() if all(row[name] is not None for name in names))


def _table(board: Board, run: RankedRun, rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> AnswerTable:
    asked = [name for name in ANSWERED_BY if name == "after" or any(row[name] is not None for row in rows.values())]
    models = tuple(Model(ROLES[name], run.entry if name == "after" else ROLES[name]) for name in asked)

    def row_of(key: tuple[str, str]) -> Row:
        row, (set_name, sample_id) = rows[key], key
        forgotten = set_name == "forget"
        until = run.updates_until_forgotten.get(sample_id) if forgotten else None
        answers = [
            Answer(row[name], row[f"rouge_{name}"], row[f"ma_{name}"], until if name == "after" else None)
            for name in asked
        ]
        text = board.texts.get(sample_id) if forgotten else None
        return Row(set_name, sample_id, row["question"], row["truth"], tuple(answers), text.mrd if text else None)

    ordered = tuple(map(row_of, in_order_of_sets(rows)))
    return AnswerTable(f"{run.entry}, run {run.run}, on {board.name}", models, ordered)
