"""What draws and groups of forget samples go by: how easy each sample is to forget.

    mrd         its MRD: how fast its log-probabilities move
    flip-time   1 / n, with n the forecast of `scoring.flip_time`: how many updates it takes until it is forgotten
    FILE        numbers that somebody else has; FILE:COLUMN where the file has several

A greater value is easier, whatever the source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from scoring.errors import UserError, unknown_name
from scoring.files import shown
from scoring.reading import check_regular, exists, read_parquet, readable
from scoring.samples import Sample
from scoring.settings import named

MRD, FLIP_TIME = "mrd", "flip-time"
SUFFIXES = (".parquet", ".jsonl")
SOURCES = f"{MRD}, {FLIP_TIME}, or a file of numbers ({' or '.join(SUFFIXES)}), as FILE or FILE:COLUMN"
# A forecast below that is taken for it: of a sample that is forgotten already it is 0, and 1 / 0 is no weight.
LEAST_UPDATES = 0.5
ID = "sample_id"
# What an ease of 0 means, by source; of a file it is what the file says.
ZEROS = {MRD: "every scored token is saturated", FLIP_TIME: "no update brings them nearer"}


def is_file(source: str) -> bool:
    return source not in (MRD, FLIP_TIME)


def check_source(name: str, source: str) -> None:
    """Refuse a setting, called `name`, that is neither a known source nor could be a file."""
    if is_file(source) and _path_and_column(source)[0].suffix not in SUFFIXES:
        raise UserError(f"{named(name)} is {source!r}: expected {SOURCES}")


def ease_of_forecasts(updates: np.ndarray) -> np.ndarray:
    """1 / n of forecasts in updates, (N,); 0 where n is inf."""
    ease: np.ndarray = 1 / np.maximum(updates, LEAST_UPDATES)
    return ease


def rewards(updates: np.ndarray, exponent: float) -> np.ndarray:
    """n^exponent of forecasts in updates, (N,); where n is inf it is taken for the largest that is finite."""
    finite = updates[np.isfinite(updates)]
    most = max(LEAST_UPDATES, finite.max()) if len(finite) else LEAST_UPDATES
    return np.clip(updates, LEAST_UPDATES, most) ** exponent


# --- Files --------------------------------------------------------------------------------------------------


def absolute_source(source: str) -> str:
    """The same source, right in every process, whatever folder it works in."""
    if not is_file(source):
        return source
    path, column = _path_and_column(source)
    return f"{path.absolute()}:{column}" if column else str(path.absolute())


def values_of(source: str, samples: Sequence[Sample]) -> np.ndarray:
    """The values of samples in a file, (N,).

    Raises:
        UserError: the file is at fault, or lacks a sample.
    """
    values = _read(source)
    if missing := [sample.sample_id for sample in samples if sample.sample_id not in values]:
        raise UserError(
            f"{source} has no value for {len(missing)} of {len(samples)} forget samples, such as {missing[0]!r}: "
            f"expected one for each {ID}"
        )
    return np.array([values[sample.sample_id] for sample in samples])


def sha256_of_values(source: str) -> str:
    """The hash of what a file says, in whatever order and format."""
    return hashlib.sha256(json.dumps(_read(source), sort_keys=True).encode()).hexdigest()


def _path_and_column(source: str) -> tuple[Path, str]:
    """FILE, or FILE:COLUMN; without a column ""."""
    path, colon, column = source.rpartition(":")
    return (Path(path), column) if colon and not Path(source).exists() else (Path(source), "")


def _read(source: str) -> dict[str, float]:
    """Sample id -> value, 0 or more."""
    path, column = _path_and_column(source)
    if not exists(path):
        raise UserError(f"{shown(path)} does not exist: expected {SOURCES}")
    expected = "Parquet, or a JSON object a line"
    if path.suffix == ".parquet":
        table = read_parquet(path, expected)
    else:
        with readable(str(path), expected):
            check_regular(path)
            table = pyarrow.json.read_json(path)
    if ID not in table.column_names:
        raise UserError(f"{path} has no column {ID}: expected it, and a column of numbers")
    numbers = [
        field.name for field in table.schema if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    ]
    if column and column not in numbers:
        raise unknown_name(f"column of numbers in {path}", column, numbers)
    if not column and len(numbers) != 1:
        raise UserError(
            f"{path} has {len(numbers)} columns of numbers ({', '.join(numbers) or 'none'}): expected one, or "
            f"{path}:COLUMN"
        )
    with readable(f"{path}, column {ID}", "ids as text or whole numbers", "is of another type"):
        ids = pc.cast(table[ID], pa.string()).to_pylist()
    values = pc.cast(table[column or numbers[0]], pa.float64(), safe=False).to_pylist()
    for sample_id, value in zip(ids, values, strict=True):
        if value is None or not (0 <= value < np.inf):
            raise UserError(
                f"{path}: {column or numbers[0]} of {sample_id!r} is {value}: expected a finite number of at least 0, "
                "greater for what is easier"
            )
    if len(set(ids)) < len(ids):
        twice = next(sample_id for row, sample_id in enumerate(ids) if sample_id in ids[:row])
        raise UserError(f"{path}: {ID} {twice!r} occurs twice; expected each once")
    return dict(zip(ids, values, strict=True))
