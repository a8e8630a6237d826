"""The outcome of an evaluation on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bench.attacks.relearn import BATCH_SIZE
from bench.jobs.evaluate import EvaluationResult
from bench.metrics import METRICS
from bench.metrics.table import MODEL, ORIGINAL, RETAIN_ONLY
from bench.tasks import Task


def print_evaluation(result: EvaluationResult, task: Task) -> None:
    """A line for each metric, a column for each model, intervals below values; then what is missing, and why."""
    table = result.table.filter(pc.is_in(result.table["level"], pa.array(["metric", "difference"])))
    values = pc.sum(pc.equal(result.table["level"], "sample")).as_py()
    rows = table.to_pylist()
    models = [model for model in (ORIGINAL, MODEL, RETAIN_ONLY) if any(row["model"] == model for row in rows)]
    differences = list(dict.fromkeys(row["model"] for row in rows if row["level"] == "difference"))
    _print_rows(rows, task, models)
    if differences:
        print("\ndifferences, paired")
        _print_rows(rows, task, differences)
    print("brackets: 95 % intervals, bootstrap over samples")
    _print_protocol(result.record["spec"], {row["name"] for row in rows if row["value"] is not None})
    _print_missing([row for row in rows if row["level"] == "metric" and row["missing"]], models)
    for rejected in result.record["rejected"]:
        print(f"left out of the {rejected['set']} set, {rejected['sample_id']!r}: {rejected['reason']}")
    print(f"{values} per-sample values -> {result.path}")


def _print_rows(rows: Sequence[dict[str, Any]], task: Task, columns: Sequence[str]) -> None:
    """The metrics that have a value for one of the columns, under the headings of the paper's tables."""
    cells = {(row["model"], row["name"]): row for row in rows if row["model"] in columns}
    present = {name for (_, name), row in cells.items() if row["value"] is not None or row["level"] == "metric"}
    texts = {key: _cell(row) for key, row in cells.items()}
    # At least two spaces between the columns, however long an interval is written.
    width = max([28, *(len(text) + 2 for text in texts.values())])
    print(f"{'metric':<28}" + "".join(f"{column:>{width}}" for column in columns))
    others = [name for name in present if name not in task.metrics]
    for title, names in (
        ("unlearning completeness", task.completeness),
        ("model utility", task.utility),
        ("further", (*task.further, *sorted(others))),
    ):
        shown = [name for name in names if name in present]
        if shown:
            print(f"- {title}")
        for name in shown:
            arrow = "↑" if METRICS[name].higher_is_better else "↓"
            print(f"{name + ' ' + arrow:<28}" + "".join(f"{texts.get((c, name), ''):>{width}}" for c in columns))


def _cell(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "missing"
    # Four decimals, as in the paper's tables; the p of a test may be far below.
    value = f"{row['value']:.4f}" if row["value"] == 0 or 1e-4 <= abs(row["value"]) < 100 else f"{row['value']:.4g}"
    return value if row["low"] is None else f"{value} [{row['low']:.3g}, {row['high']:.3g}]"


def _print_protocol(spec: dict[str, Any], measured: set[str]) -> None:
    """What must be known to compare the metrics with those of others."""
    if "mia" in measured:
        print(f"MIA: Min-{spec['min_k']:.0%} of the answer against the {spec['mia_negatives']} set")
    elif any(name.startswith("mia_") or name == "priv_leak" for name in measured):
        print(f"MIA: forget samples against the {spec['mia_negatives']} set; Min-k: {spec['min_k']:.0%}")
    if "el" in measured:
        print(f"EL: {spec['el_n']}-grams")
    if "relearn" in measured:
        print(
            f"Relearn: {spec['relearn_steps']} updates of {BATCH_SIZE} samples on {spec['relearn_share']:.0%} of the "
            f"forget set, learning rate {spec['relearn_learning_rate']:g}; forgotten is what "
            + ("the original model knew" if ORIGINAL in spec["fingerprints"] else "is answered wrongly")
        )


def _print_missing(rows: Sequence[dict[str, Any]], models: Sequence[str]) -> None:
    """Each reason once, with the metrics that it keeps from being measured; and of which models, if not of all."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        by_reason.setdefault(row["missing"], {}).setdefault(row["name"], []).append(row["model"])
    for reason, names in by_reason.items():
        lacking = [name if len(of) == len(models) else f"{name} of {', '.join(of)}" for name, of in names.items()]
        print(f"missing {', '.join(lacking)}: {reason}")
