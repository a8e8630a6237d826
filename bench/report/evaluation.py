"""An evaluation on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.evaluation_job import MODEL, ORIGINAL, RETAIN_ONLY, EvaluationResult
from bench.metrics import METRICS
from bench.tasks import Task


def print_evaluation(result: EvaluationResult, task: Task) -> None:
    """A line for each metric, a column for each model, intervals below values; then what is missing, and why."""
    rows = [row for row in result.table.to_pylist() if row["level"] != "sample"]
    models = [model for model in (ORIGINAL, MODEL, RETAIN_ONLY) if any(row["model"] == model for row in rows)]
    differences = list(dict.fromkeys(row["model"] for row in rows if row["level"] == "difference"))
    _print_rows(rows, task, models)
    if differences:
        print("\ndifferences, paired")
        _print_rows(rows, task, differences)
    print("brackets: 95 % intervals, bootstrap over samples")
    _print_missing([row for row in rows if row["level"] == "metric" and row["missing"]])
    for rejected in result.record["rejected"]:
        print(f"left out of the {rejected['set']} set, {rejected['sample_id']!r}: {rejected['reason']}")
    print(f"{result.table.num_rows - len(rows)} per-sample values -> {result.path}")


def _print_rows(rows: Sequence[dict[str, Any]], task: Task, columns: Sequence[str]) -> None:
    """The metrics that have a value for one of the columns, under the headings of the paper's tables."""
    cells = {(row["model"], row["name"]): row for row in rows if row["model"] in columns}
    present = {name for (_, name), row in cells.items() if row["value"] is not None or row["level"] == "metric"}
    print(f"{'metric':<28}" + "".join(f"{column:>28}" for column in columns))
    for title, names in (
        ("unlearning completeness", task.completeness),
        ("model utility", task.utility),
        ("further", task.further),
    ):
        shown = [name for name in names if name in present]
        if shown:
            print(f"- {title}")
        for name in shown:
            arrow = "↑" if METRICS[name].higher_is_better else "↓"
            print(f"{name + ' ' + arrow:<28}" + "".join(f"{_cell(cells.get((c, name))):>28}" for c in columns))


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["value"] is None:
        return "missing"
    # Four decimals, as in the paper's tables; the p of a test may be far below.
    value = f"{row['value']:.4f}" if row["value"] == 0 or 1e-4 <= abs(row["value"]) < 100 else f"{row['value']:.4g}"
    return value if row["low"] is None else f"{value} [{row['low']:.3g}, {row['high']:.3g}]"


def _print_missing(rows: Sequence[dict[str, Any]]) -> None:
    """Each reason once, with the metrics that it keeps from being measured."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        by_reason.setdefault(row["missing"], []).append(row["name"])
    for reason, names in by_reason.items():
        print(f"missing {', '.join(dict.fromkeys(names))}: {reason}")
