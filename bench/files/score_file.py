"""Scores on disk: Parquet files that carry the spec they were made from, written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scoring.errors import UserError
from scoring.files import replacing
from scoring.reading import parse_json, read_parquet, shaped

SPEC_KEY, FACTS_KEY = b"mrd_bench.spec", b"mrd_bench.facts"
# Rows that are encoded at a time, so that writing a file takes no more memory the longer it is.
ROW_GROUP = 16384


def write_scores(table: pa.Table, out: Path, identity: dict[str, Any], record: dict[str, Any]) -> None:
    """Write a score file: the rows, the spec with its hash, and the facts that the replicas noticed."""
    metadata = {SPEC_KEY: json.dumps(identity), FACTS_KEY: json.dumps(record)}
    with replacing(out) as unfinished:
        pq.write_table(table.replace_schema_metadata(metadata), unfinished, row_group_size=ROW_GROUP)


def read_scores(
    path: str | Path, expected: str = "what `mrd-bench score` writes"
) -> tuple[pa.Table, dict[str, Any], dict[str, Any]]:
    """The table of a score file, the spec that it was made from, and the facts that the replicas noticed.

    Args:
        expected: what the user may give, for messages.

    Raises:
        UserError: not a file that `score` wrote.
    """
    table = read_parquet(path, expected)
    metadata = table.schema.metadata or {}
    if SPEC_KEY not in metadata or FACTS_KEY not in metadata:
        raise UserError(f"{path}: not a score file of mrd-bench; expected {expected}")
    spec, facts = (
        shaped(parse_json(metadata[key], f"{path}, {key.decode()}", expected), dict[str, Any], str(path), expected)
        for key in (SPEC_KEY, FACTS_KEY)
    )
    return table, spec, facts


@dataclass(frozen=True)
class Scores:
    """A score file.

    Attributes:
        table: one row a sample (bench.jobs.score).
        spec: that it was made from.
        facts: that the replicas noticed.
    """

    table: pa.Table
    spec: dict[str, Any]
    facts: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path, *expected: str) -> Scores:
        """A score file; see `read_scores`."""
        return cls(*read_scores(path, *expected))

    def __getitem__(self, column: str) -> np.ndarray:
        return self.table[column].to_numpy()

    @property
    def ids(self) -> list[str]:
        return self.table["sample_id"].to_pylist()

    @property
    def probability(self) -> np.ndarray:
        """Geometric mean of the scored tokens' probabilities, (N,) (scoring.characteristics)."""
        return np.exp(-self["nll"] / self["num_tokens"])
