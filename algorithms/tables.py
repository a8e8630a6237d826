"""The record of a run as Arrow tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from algorithms.corpus import Corpus
from algorithms.history import History


def tables_of(history: History, corpus: Corpus) -> dict[str, pa.Table]:
    """The tables by name.

    steps       one row per update: loss terms, samples drawn, tokens, passes, seconds
    epochs      one row per epoch, and row 0 for the initial model: metrics, how far the weights have moved, passes and
                seconds so far
    samples     one row per forget sample, see `sample_table`
    difficulty  MRD or forecast of every sample at every refresh
    """
    return {
        "steps": step_table(history.steps),
        "epochs": epoch_table(history.epochs),
        "samples": sample_table(history, corpus),
        "difficulty": _difficulty_table(history, corpus),
    }


def step_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of updates as a table; any of a run, which have the same schema."""
    return pa.Table.from_pylist(list(rows), _step_schema())


def epoch_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of epochs as a table."""
    return pa.Table.from_pylist(list(rows), _epoch_schema(rows))


def training_tables(history: History, corpus: Corpus) -> dict[str, pa.Table]:
    """The tables of a model that has learnt the samples, without the columns that say what is forgotten and kept.

    steps     one row per update: loss, samples, tokens, passes, seconds
    epochs    one row per epoch, and row 0 for the initial model
    samples   one row per sample: its tokens, and how often it was learnt
    """
    tables = tables_of(history, corpus)
    of_forgetting = ("forget_loss", "retain_loss", "retain_weight", "forgotten", "seconds_checks")
    for name in ("steps", "epochs"):
        columns = tables[name].column_names
        left_out = [column for column in columns if column in of_forgetting or column.endswith("_mrd")]
        tables[name] = tables[name].drop_columns(left_out)
    samples = tables["samples"].select(["sample_id", "num_tokens", "updates"])
    return {"steps": tables["steps"], "epochs": tables["epochs"], "samples": samples}


def _step_schema() -> pa.Schema:
    number, whole = pa.float64(), pa.int64()
    return pa.schema(
        [
            ("step", whole),
            ("epoch", whole),
            ("loss", number),
            ("forget_loss", number),
            ("retain_loss", number),
            ("retain_weight", number),
            ("gradient_norm", number),
            ("learning_rate", number),
            ("samples", pa.list_(pa.string())),
            ("tokens", whole),
            ("forwards", whole),
            ("backwards", whole),
            ("seconds", number),
        ]
    )


def _epoch_schema(rows: Sequence[Mapping[str, Any]]) -> pa.Schema:
    """All numbers that any epoch has; a row may lack some."""
    names = dict.fromkeys(name for row in rows for name in row)
    whole = ("epoch", "step", "tokens")
    return pa.schema(
        [
            (name, pa.int64() if name in whole or name.startswith(("forwards", "backwards")) else pa.float64())
            for name in names
        ]
    )


def sample_table(history: History, corpus: Corpus) -> pa.Table:
    """One row per forget sample: its tokens, how often it was drawn, the update after which it was forgotten, its MRD
    on the initial model, and MA and EL on the initial model and when last measured; with a schedule its group too."""

    def memory(when: Literal["initial", "last"], measure: Literal["ma", "el"]) -> pa.Array:
        """MA or EL of each sample; null if not measured. EL is not if MA alone shows that the sample is remembered."""
        values = history.memory[when][measure] if history.memory else [np.inf] * len(corpus.forget)
        return pa.array([None if np.isinf(value) else value for value in values], pa.float64())

    group = {"group": pa.array(history.groups, pa.int64())} if history.groups else {}
    return pa.table(
        {
            "sample_id": [sample.sample_id for sample in corpus.forget],
            "num_tokens": [sample.num_scored for sample in corpus.forget],
            "updates": history.drawn,
            "updates_until_forgotten": pa.array(history.drawn_until_forgotten, pa.int64()),
            "forgotten_at_step": pa.array(history.forgotten_at, pa.int64()),
            "mrd_initial": pa.array(
                history.mrd[0]["mrd"] if history.mrd else [None] * len(corpus.forget), pa.float64()
            ),
            "ma_initial": memory("initial", "ma"),
            "el_initial": memory("initial", "el"),
            "ma_last": memory("last", "ma"),
            "el_last": memory("last", "el"),
            **group,
        }
    )


def _difficulty_table(history: History, corpus: Corpus) -> pa.Table:
    """MRD of every sample at every refresh; where forecasts were made, these in updates, inf where no update helps."""
    measured = {"mrd": history.mrd} | ({"forecast": history.forecasts} if history.forecasts else {})
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for name, entries in measured.items():
        for entry in entries:
            for sample, value in zip(corpus.forget, entry[name], strict=True):
                row = rows.setdefault((entry["step"], sample.sample_id), {})
                row |= {"step": entry["step"], "sample_id": sample.sample_id, name: value}
    schema = pa.schema([("step", pa.int64()), ("sample_id", pa.string()), *((name, pa.float64()) for name in measured)])
    in_order = sorted(rows.values(), key=lambda row: row["step"])
    return pa.Table.from_pylist(in_order, schema)
