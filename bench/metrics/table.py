"""The table of an evaluation: metrics with their intervals, differences between models, every sample's values, and what
was asked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from bench.metrics import METRICS
from bench.metrics.registry import Statistic
from bench.metrics.values import Column, Measured, Missing, Scores, Unmeasured
from bench.stats.estimates import Estimate, over_sets
from bench.tasks import Record
from bench.tasks.words import question_and_truth

# The models of an evaluation, in the order in which they are measured: what the original one knew decides what counts
# as forgotten.
ORIGINAL, RETAIN_ONLY, MODEL = "original", "retain-only", "model"
Columns = dict[Column, Scores | Missing]
# The names of the rows that say what was asked.
ASKED = QUESTION, TRUTH = ("question", "truth")

SAMPLE_ROWS = pa.schema(
    [
        ("set", pa.string()),
        ("name", pa.string()),
        ("sample_id", pa.string()),
        ("value", pa.float64()),
        ("text", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("level", pa.string()),
        ("model", pa.string()),
        ("name", pa.string()),
        ("set", pa.string()),
        ("sample_id", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("samples", pa.int64()),
        ("missing", pa.string()),
        ("text", pa.string()),
    ]
)


def metric_table(metrics: Sequence[str], columns: Mapping[str, Columns], seed: int) -> pa.Table:
    """Every metric of every model, the differences to the reference models, and every sample's values.

    Columns: level ("metric", "difference" or "sample"), model, name (of a metric or a quantity), set and sample_id
    (of a sample), value, low and high (95 % interval, bootstrap over samples), samples (how many the metric is formed
    from), missing (why there is no value) and text (what the model wrote).

    Args:
        metrics: names.
        columns: of each model, by its role.
        seed: of the bootstrap.
    """
    rows = []
    measured = {role: Measured(of_model, columns.get(RETAIN_ONLY)) for role, of_model in columns.items()}
    for role, of_model in measured.items():
        for name in metrics:
            statistic = _compared_with_itself if METRICS[name].compares and role == RETAIN_ONLY else None
            fields = estimated(name, [(1, of_model)], seed, statistic)
            rows.append({"level": "metric", "model": role, "name": name, **fields})
    for reference in (RETAIN_ONLY, ORIGINAL):
        if reference not in measured:
            continue
        for name in metrics:
            if METRICS[name].interval and not METRICS[name].compares:
                fields = estimated(name, [(1, measured[MODEL]), (-1, measured[reference])], seed)
                rows.append({"level": "difference", "model": f"{MODEL} - {reference}", "name": name, **fields})
    tables = [pa.Table.from_pylist(rows, SCHEMA)]
    for role, of_role in columns.items():
        samples = sample_rows(of_role)
        count = samples.num_rows
        arrays = {
            "level": pa.array(["sample"] * count, pa.string()),
            "model": pa.array([role] * count, pa.string()),
            **{name: samples[name] for name in samples.column_names},
        }
        tables.append(
            pa.table([arrays.get(field.name, pa.nulls(count, field.type)) for field in SCHEMA], schema=SCHEMA)
        )
    return pa.concat_tables(tables)


def estimated(
    name: str, terms: Sequence[tuple[int, Measured]], seed: int, statistic: Statistic | None = None
) -> dict[str, Any]:
    """A metric of a model, or a sum of those of several, as the fields of a row.

    Args:
        terms: what each counts, and its columns; all have the same samples, which are resampled together: a model and
            -1 times another are their paired difference.
        seed: of the bootstrap.
        statistic: in place of the metric's own.
    """
    metric = METRICS[name]
    statistic = statistic or metric.statistic
    sets = list(dict.fromkeys(set_name for set_name, _ in metric.columns))

    def value_on(rows: list[np.ndarray] | None) -> np.ndarray:
        rows_by_set = dict(zip(sets, rows, strict=True)) if rows is not None else None
        return sum(factor * statistic(measured.resampled(rows_by_set)) for factor, measured in terms)  # type: ignore[return-value]

    try:
        with warnings.catch_warnings():
            # The mean of no values is dealt with below.
            warnings.simplefilter("ignore", RuntimeWarning)
            value = float(value_on(None))
        measured = terms[0][1]
        counts = {set_name: measured.count(set_name, quantity) for set_name, quantity in metric.columns}
    except Unmeasured as error:
        return {"missing": str(error)}
    if not math.isfinite(value):
        return {"missing": "not defined on these samples"}
    estimate = Estimate(value, math.nan, math.nan)
    if metric.interval:
        estimate = over_sets(value_on, [measured.length(set_name) for set_name in sets], seed=seed)
    low, high = (bound if math.isfinite(bound) else None for bound in (estimate.low, estimate.high))
    return {"value": value, "low": low, "high": high, "samples": sum(counts.values())}


def metric_value(name: str, measured: Measured) -> float:
    """A metric without its interval; nan where it cannot be measured on these samples."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return float(METRICS[name].statistic(measured.resampled(None)))
    except Unmeasured:
        return math.nan


def _compared_with_itself(measured: Measured) -> np.ndarray:
    raise Unmeasured("compares with the retain-only model, which this is")


def sample_rows(columns: Columns) -> pa.Table:
    """A row for each value of the columns that were measured."""
    tables = [
        pa.table(
            {
                "set": [set_name] * len(scores.ids),
                "name": [quantity] * len(scores.ids),
                "sample_id": list(scores.ids),
                "value": pa.array(scores.values, pa.float64()),
                "text": pa.array(scores.texts or [None] * len(scores.ids), pa.string()),
            },
            SAMPLE_ROWS,
        )
        for (set_name, quantity), scores in columns.items()
        if isinstance(scores, Scores)
    ]
    return pa.concat_tables(tables) if tables else SAMPLE_ROWS.empty_table()


def record_rows(sets: Mapping[str, Sequence[Record] | Missing]) -> pa.Table:
    """What was asked: rows of level "record", whose text is the "question" or the "truth" of a sample. With them the
    answers can be read where the data are not."""
    rows = [
        {"level": "record", "name": name, "set": set_name, "sample_id": record["id"], "text": text}
        for set_name, records in sets.items()
        if not isinstance(records, Missing)
        for record in records
        for name, text in zip(ASKED, question_and_truth(record), strict=True)
        if text is not None
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def columns_in(table: pa.Table) -> Columns:
    """The columns whose rows `sample_rows` gave."""
    rows_of: dict[Column, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        rows_of.setdefault((row["set"], row["name"]), []).append(row)
    return {
        column: Scores(
            tuple(row["sample_id"] for row in rows),
            np.array([row["value"] for row in rows], dtype=np.float64),
            None if rows[0]["text"] is None else tuple(row["text"] for row in rows),
        )
        for column, rows in rows_of.items()
    }
