"""Reading files that people and other programs wrote, or that are damaged: whatever goes wrong is one `UserError`.

One reader for each kind of file. Libraries raise what they like on damaged bytes (Arrow, zlib, thrift, RecursionError,
UnicodeDecodeError, OverflowError of a date), so each reader wraps the whole step from bytes to values, and nothing
else.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from scoring.errors import UserError, first_line

# How deep lists and objects may lie in each other: less than what later work on them can go through.
DEEPEST = 200


# --- Files --------------------------------------------------------------------------------------------------


@contextmanager
def readable(where: str, expected: str, failing: str = "cannot be read") -> Iterator[None]:
    """Within the context, whatever a library or the file system raises becomes one line.

    Args:
        where: what is read, as the message names it.
        expected: follows "expected" in the message.
        failing: the fault, before its reason in brackets.

    Raises:
        UserError: see above; one that is raised inside passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise UserError(f"{where} {failing} ({reason}): expected {expected}") from error


def check_regular(path: str | Path) -> None:
    """Refuse what is not a plain file: reading a pipe or a device may never end.

    Raises:
        OSError: one whose `strerror` says what there is instead.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe or a device, no plain file", str(path))


def exists(path: str | Path) -> bool:
    """Whether there is something at a path; what the file system cannot even look for, such as a name that is too
    long, is not there."""
    try:
        return os.path.exists(path)
    except (OSError, ValueError):
        return False


def read_bytes(path: str | Path, expected: str, where: str = "") -> bytes:
    """The content of a plain file.

    Args:
        where: what messages call it; its path if nothing is said.

    Raises:
        UserError: one line: there is none, or it cannot be read.
    """
    with readable(where or str(path), expected):
        check_regular(path)
        return Path(path).read_bytes()


def read_text(path: str | Path, expected: str, where: str = "") -> str:
    """The text of a plain file in UTF-8, with line feeds at the ends of lines, whatever they are there.

    Raises:
        UserError: one line; of what is no UTF-8 it names the byte.
    """
    text = decoded(read_bytes(path, expected, where), str(path), expected)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decoded(content: bytes, where: str, expected: str, before: int = 0) -> str:
    """Bytes as UTF-8 text; a byte order mark at the start of a file, as Windows programs put it, is none of it.

    Args:
        before: bytes of the file that come before these, for the message.

    Raises:
        UserError: one line with the byte at fault.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text at byte {before + error.start}; expected {expected}") from error
    return text if before else text.removeprefix("\ufeff")


# --- JSON ---------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes, where: str, expected: str, lines: bool = False) -> Any:
    """The value of JSON text.

    Args:
        lines: the text may have several lines: messages name the one at fault.

    Raises:
        UserError: one line: no JSON, a number with thousands of digits, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if lines else ""
        raise UserError(
            f"{where}{line}: not JSON ({error.msg} at column {error.colno}); expected {expected}"
        ) from error
    except RecursionError:
        raise _too_deep(where, expected) from None
    except ValueError as error:  # more digits than Python reads
        reason = first_line(error).partition(";")[0]
        raise UserError(f"{where}: not readable JSON ({reason}); expected {expected}") from error
    if isinstance(text, str) and text.count("[") + text.count("{") > DEEPEST and _depth_exceeds(value, DEEPEST):
        raise _too_deep(where, expected)
    return value


def _too_deep(where: str, expected: str) -> UserError:
    return UserError(f"{where}: nested more than {DEEPEST} deep; expected {expected}")


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        inner = [part for part in level if isinstance(part, dict | list)]
        level = [child for part in inner for child in (part.values() if isinstance(part, dict) else part)]
        if not inner:
            return False
    return True


def read_json(path: str | Path, shape: Any, expected: str) -> Any:
    """The value of a JSON file, which must have this shape.

    Args:
        shape: see `shaped`.
        expected: the file in words, such as "what `mrd-bench unlearn` writes".

    Raises:
        UserError: one line that names the file, and the place in it where something else is.
    """
    return shaped(parse_json(read_text(path, expected), str(path), expected, lines=True), shape, str(path), expected)


def shaped(value: Any, shape: Any, where: str, expected: str) -> Any:
    """The value, if it has this shape.

    Args:
        shape: a type as pydantic checks it: `dict[str, Any]`, or a TypedDict of the keys that are needed, beside which
            others may be; or a dataclass, of which an instance comes back.

    Raises:
        UserError: one line that names the place where something else is.
    """
    builds = dataclasses.is_dataclass(shape)
    try:
        built = _adapter(shape).validate_python(value, strict=not builds)
        return built if builds else value
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, detail["loc"])) or "its content"
        fault = "is missing" if detail["type"] == "missing" else f"is not as it should be ({detail['msg']})"
        raise UserError(f"{where}: {place} {fault}: expected {expected}") from error


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


# --- Parquet ------------------------------------------------------------------------------------------------


@contextmanager
def parquet_file(path: str | Path, expected: str) -> Iterator[pq.ParquetFile]:
    """An open Parquet file; within the context whatever Arrow raises becomes one line.

    Raises:
        UserError: see above.
    """
    with readable(str(path), expected, "is not a readable Parquet file"):
        check_regular(path)
        with pq.ParquetFile(path) as file:
            yield file


def read_parquet(path: str | Path, expected: str, columns: pa.Schema | None = None) -> pa.Table:
    """The table of a Parquet file.

    Args:
        columns: see `check_columns`.

    Raises:
        UserError: one line: it cannot be read, or a column is missing or of another type.
    """
    with parquet_file(path, expected) as file:
        table = file.read()
        # Read through once: what is damaged inside a column shows itself only then.
        table.validate(full=True)
    check_columns(table, columns or pa.schema([]), str(path), expected)
    return table


def check_columns(table: pa.Table, columns: pa.Schema, where: str, expected: str) -> None:
    """Refuse a table that lacks a column, or has one of another type.

    Args:
        columns: those that it must have, in types that can become these. A field that is not nullable must have a
            value in every row.

    Raises:
        UserError: one line.
    """
    for field in columns:
        if table.column_names.count(field.name) != 1:
            raise UserError(f"{where} has no column {field.name!r}: expected {expected}")
        with readable(f"{where}, column {field.name!r}", expected, "is of another type"):
            table[field.name].cast(field.type)
        if not field.nullable and table[field.name].null_count:
            raise UserError(f"{where}, column {field.name!r}, has a row without a value: expected {expected}")
