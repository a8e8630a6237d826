"""The result store: runs, scores and per-sample values that people share, as plain Parquet.

    STORE/runs/task=T/experiment=E/KEY.parquet       one row for each run
    STORE/samples/task=T/experiment=E/KEY.parquet    one row for each forget sample of a run
    STORE/scores/task=T/experiment=E/KEY.parquet     one row for each sample and model: its MRD and its text
    STORE/answers/task=T/experiment=E/KEY.parquet    one row for each sample of a run's evaluation: its answers

STORE is a folder or a URI that pyarrow opens (s3://, gs://, file://). A file is written once, whole, and never changed.
KEY is the hash of the file's content, so any number of writers need no lock, and writing the same again changes
nothing. A table has the same columns in every file, but for those of OPTIONAL, which a file has where one of its rows
has a value: so files without one are the same bytes as ever. pandas, DuckDB and polars read `STORE/runs` as one
partitioned table; where some files have such a column, DuckDB is told `union_by_name=true` and polars
`missing_columns="insert"`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from typing_extensions import TypedDict

from bench.files.folders import check_folder
from scoring.errors import UserError, first_line
from scoring.files import replacing
from scoring.reading import parse_json, shaped
from scoring.settings import named

# Version of the tables' columns. Every file names its own; an older file is brought up to date as it is read.
SCHEMA_VERSION = 1
VERSION_KEY, TABLE_KEY = b"mrd_bench.store_version", b"mrd_bench.store_table"
READERS = 16  # files that are read at once: with an object store most of the time is waiting

_ORIGIN = [
    ("model", pa.string()),
    ("model_fingerprint", pa.string()),
    ("data_sha256", pa.string()),
    ("spec", pa.string()),  # JSON, with its hash
    ("packages", pa.string()),  # JSON, name -> version
    ("hardware", pa.string()),
    ("git_commit", pa.string()),
]
ANSWERED_BY = ("before", "after", "retain_only")
SCHEMAS: dict[str, pa.Schema] = {
    "runs": pa.schema(
        [
            ("run", pa.string()),  # hash of its spec
            ("status", pa.string()),
            ("reason", pa.string()),
            ("algorithm", pa.string()),
            ("split", pa.string()),
            ("selection", pa.string()),
            ("kind", pa.string()),
            ("level", pa.string()),
            ("forget_samples", pa.int64()),
            ("mean_log_mrd", pa.float64()),
            ("mean_log_flip_time", pa.float64()),
            ("seed", pa.int64()),
            ("updates", pa.int64()),
            ("seconds", pa.float64()),
            ("metrics", pa.map_(pa.string(), pa.float64())),
            *_ORIGIN,
        ]
    ),
    "samples": pa.schema(
        [
            ("run", pa.string()),
            ("sample_id", pa.string()),
            ("num_tokens", pa.int64()),
            ("updates", pa.int64()),
            ("updates_until_forgotten", pa.int64()),
            ("forgotten_at_step", pa.int64()),
            ("mrd_initial", pa.float64()),
            ("ma_initial", pa.float64()),
            ("el_initial", pa.float64()),
            ("ma_last", pa.float64()),
            ("el_last", pa.float64()),
        ]
    ),
    "scores": pa.schema(
        [
            ("scores", pa.string()),  # hash of the spec of the score file
            ("split", pa.string()),
            ("estimator", pa.string()),
            ("statistic", pa.string()),
            ("sigma", pa.float64()),
            ("seed", pa.int64()),
            ("sample_id", pa.string()),
            ("num_tokens", pa.int64()),
            ("tokens_saturated", pa.int64()),
            ("nll", pa.float64()),
            ("mrd", pa.float64()),
            ("mrd_stderr", pa.float64()),
            ("mrd_per_token", pa.float64()),
            ("draws", pa.int64()),
            ("prompt", pa.string()),
            ("completion", pa.string()),
            *_ORIGIN,
        ]
    ),
    "answers": pa.schema(
        [
            ("run", pa.string()),
            ("evaluation", pa.string()),  # hash of its spec
            ("set", pa.string()),
            ("sample_id", pa.string()),
            ("question", pa.string()),
            ("truth", pa.string()),
            # Of the original, the unlearned and the retain-only model.
            *((name, pa.string()) for name in ANSWERED_BY),
            *((f"rouge_{name}", pa.float64()) for name in ANSWERED_BY),
            *((f"ma_{name}", pa.float64()) for name in ANSWERED_BY),
        ]
    ),
}
OPTIONAL = {"runs": ("mean_log_flip_time",)}
PARTITIONS = ("task", "experiment")
# Functions that bring a table to the next version, by the version that they start from.
Migration = Callable[[str, pa.Table], pa.Table]
MIGRATIONS: dict[int, Migration] = {}


@dataclass(frozen=True)
class Skipped:
    """A file that was not read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Results:
    """The content of stores.

    Attributes:
        runs, samples, scores, answers: tables with the columns of SCHEMAS, and task, experiment, store.
        skipped: files that could not be read.
    """

    runs: pa.Table
    samples: pa.Table
    scores: pa.Table
    answers: pa.Table
    skipped: tuple[Skipped, ...]


class Store:
    """A store at a folder or URI.

    Args:
        root: folder or URI; need not exist until something is written.

    Raises:
        UserError: the URI cannot be opened.
    """

    def __init__(self, root: str | Path) -> None:
        address = str(root).rstrip("/") or "/"
        uri = re.match(r"([a-z][a-z0-9+.-]+://)(?:[^/@]*@)?([^?]*)", address)
        # The root is shown and published: without a URI's key and options.
        self.root = "".join(uri.groups()) if uri else address
        try:
            if uri:
                self._fs, self._path = fs.FileSystem.from_uri(address)
            else:
                self._fs, self._path = fs.LocalFileSystem(), os.path.abspath(address)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"store {self.root!r} cannot be opened: {first_line(error)}; expected a folder or a URI such as "
                "s3://bucket/folder"
            ) from error

    def check(self, experiment: str | None = None) -> None:
        """Refuse a local store that cannot be written to, before the work whose results go there.

        Args:
            experiment: the name that will be written under.

        Raises:
            UserError: a file stands in the way, nothing can be written there, or the name cannot be a folder's.
        """
        if experiment is not None:
            _partition("any", experiment)
        if isinstance(self._fs, fs.LocalFileSystem):
            check_folder("results", Path(self._path))

    def refuse_inside(self, out: Path) -> None:
        """Refuse to write something else into a local store.

        Raises:
            UserError: one line.
        """
        if isinstance(self._fs, fs.LocalFileSystem) and Path(self._path).resolve() in out.resolve().parents:
            raise UserError(f"{named('out')} {out} lies in the store {self.root}: choose another place")

    def write(self, name: str, table: pa.Table, task: str, experiment: str) -> str:
        """Write rows of the table `name` as one file, all of them or none, and give back its path.

        Raises:
            UserError: the store cannot be written to, or the experiment's name cannot be a folder's.
        """
        table = _cast(table, SCHEMAS[name]).combine_chunks()
        empty = [column for column in OPTIONAL.get(name, ()) if table[column].null_count == table.num_rows]
        table = table.drop_columns(empty)
        key = hashlib.sha256(name.encode() + _ipc_bytes(table)).hexdigest()[:24]
        with_metadata = table.replace_schema_metadata({VERSION_KEY: str(SCHEMA_VERSION), TABLE_KEY: name})
        sink = pa.BufferOutputStream()
        pq.write_table(with_metadata, sink, compression="zstd", write_page_checksum=True)
        folder = "/".join([self._path, name, *_partition(task, experiment)])
        path = f"{folder}/{key}.parquet"
        try:
            self._fs.create_dir(folder, recursive=True)
            if isinstance(self._fs, fs.LocalFileSystem):
                with replacing(Path(path)) as unfinished:
                    unfinished.write_bytes(sink.getvalue())
            else:
                # An object appears once all of it has been sent; one write, so that it cannot fail between two.
                with self._fs.open_output_stream(path) as stream:
                    stream.write(sink.getvalue())
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"store {self.root!r} cannot be written to: {first_line(error)}") from error
        return path

    def read(
        self, task: str | None = None, experiment: str | None = None, columns: Mapping[str, Sequence[str]] | None = None
    ) -> Results:
        """All rows, or those of one task or experiment.

        Args:
            columns: that are read of each table, by its name; of a file that is damaged elsewhere this does not notice.
                None: all.

        Raises:
            UserError: there is no store.
        """
        tables: dict[str, pa.Table] = {}
        skipped: list[Skipped] = []
        for name, schema in SCHEMAS.items():
            paths = [path for path in self._files(name) if _is_of(path[len(self._path) + 1 :], task, experiment)]
            with ThreadPoolExecutor(READERS) as threads:
                chosen = None if columns is None else columns[name]
                outcomes = list(threads.map(partial(self._read, name, chosen), paths))
            by_partition: defaultdict[tuple[str, str], list[pa.Table]] = defaultdict(list)
            for outcome in outcomes:
                if isinstance(outcome, Skipped):
                    skipped.append(outcome)
                else:
                    partition, rows = outcome
                    by_partition[partition].append(rows)
            schema = _chosen(schema, chosen)
            empty = _with_place(schema.empty_table(), ("", ""), "")
            parts = [_with_place(pa.concat_tables(rows), where, self.root) for where, rows in by_partition.items()]
            tables[name] = _joined([empty, *parts])
        return Results(**tables, skipped=tuple(skipped))

    def _files(self, name: str) -> list[str]:
        try:
            info = self._fs.get_file_info(f"{self._path}/{name}")
            if info.type == fs.FileType.NotFound:
                self._check_is_store()
                return []
            selector = fs.FileSelector(f"{self._path}/{name}", recursive=True)
            files = [file.path for file in self._fs.get_file_info(selector) if file.type == fs.FileType.File]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"store {self.root!r} cannot be read: {first_line(error)}") from error
        # Hidden files are still being written.
        return sorted(path for path in files if not path.rsplit("/", 1)[-1].startswith("."))

    def _check_is_store(self) -> None:
        infos = self._fs.get_file_info([f"{self._path}/{name}" for name in SCHEMAS])
        if all(info.type == fs.FileType.NotFound for info in infos):
            raise UserError(
                f"{self.root}: no results; expected a store that `mrd-bench results add`, or `mrd-bench sweep` with "
                "--results, has written to"
            )

    def _read(self, name: str, columns: Sequence[str] | None, path: str) -> tuple[tuple[str, str], pa.Table] | Skipped:
        """The partition and the rows of a file, or why it was skipped."""
        relative = path[len(self._path) + 1 :]
        shown = f"{self.root}/{relative}"
        partition = _partition_of(relative)
        if not path.endswith(".parquet") or partition is None:
            return Skipped(shown, f"not where {name} of mrd-bench lie ({name}/task=T/experiment=E/KEY.parquet)")
        try:
            with (
                self._fs.open_input_file(path) as source,
                pq.ParquetFile(source, page_checksum_verification=True) as file,
            ):
                metadata = file.schema_arrow.metadata or {}
                if metadata.get(TABLE_KEY) != name.encode():
                    return Skipped(shown, f"a Parquet file, but none of {name} of mrd-bench")
                version = int(metadata[VERSION_KEY])
                if version > SCHEMA_VERSION:
                    return Skipped(
                        shown, f"schema {version} of a newer mrd-bench; this one reads up to {SCHEMA_VERSION}: upgrade"
                    )
                # ParquetFile.read raises if any part cannot be decoded: all rows of a file or none. What an older file
                # calls its columns only the migrations know.
                table = file.read(None if version < SCHEMA_VERSION or columns is None else list(columns))
            for old in range(version, SCHEMA_VERSION):
                table = MIGRATIONS[old](name, table)
            table = _cast(table, _chosen(SCHEMAS[name], columns))
            table.validate(full=True)
        except Exception as error:  # of Arrow, of the file system, or of a library that unpacks
            return Skipped(shown, f"damaged: {first_line(error)}")
        return partition, table


class Identity(TypedDict):
    """What is needed of the spec of a run."""

    algorithm: str


def identity_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a run, from its row of a store.

    Raises:
        UserError: the row lacks what runs are ranked and compared by.
    """
    where = f"store {run['store']!r}, run {run['run']!r}"
    expected = "a row that `mrd-bench results add` has written; remove the file that it is in"
    for column in ("run", "spec", "algorithm", "selection", "status", "seed", "data_sha256"):
        if run[column] is None:
            raise UserError(f"{where}: no {column}; expected {expected}")
    packages = parse_json(run["packages"] or "{}", f"{where}: packages", expected)
    shaped(packages, dict[str, str | None], f"{where}: packages", expected)
    identity: dict[str, Any] = shaped(parse_json(run["spec"], f"{where}: spec", expected), Identity, where, expected)
    return identity


def merge(results: Sequence[Results]) -> Results:
    """The content of several stores as one."""
    tables = {name: _joined([getattr(result, name) for result in results]) for name in SCHEMAS}
    return Results(**tables, skipped=tuple(file for result in results for file in result.skipped))


def read_stores(
    roots: Sequence[str | Path],
    task: str | None = None,
    experiment: str | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
) -> Results:
    """The content of stores together, or of one task or experiment.

    Args:
        columns: see `Store.read`.

    Raises:
        UserError: one of them is no store.
    """
    if not roots:
        raise UserError("no store is named: expected at least one, a folder or a URI")
    return merge([Store(root).read(task, experiment, columns) for root in roots])


def _partition(task: str, experiment: str) -> list[str]:
    """The folders in which rows of a task and experiment lie, as readers of partitioned tables know them."""
    for name, value in zip(PARTITIONS, (task, experiment), strict=True):
        if not re.fullmatch(r"[\w.-]+", value):
            raise UserError(f"{name} {value!r}: expected letters, digits, - _ and . alone, as it names a folder")
    return [f"{name}={value}" for name, value in zip(PARTITIONS, (task, experiment), strict=True)]


def _partition_of(relative: str) -> tuple[str, str] | None:
    """Task and experiment of a file, by its path in the store."""
    match = re.fullmatch(r"\w+/task=([^/]+)/experiment=([^/]+)/[^/]+", relative)
    return (unquote(match[1]), unquote(match[2])) if match else None


def _is_of(relative: str, task: str | None, experiment: str | None) -> bool:
    """Whether a file may have rows of this task and experiment; one in the wrong place may, and is reported later."""
    partition = _partition_of(relative)
    if partition is None:
        return True
    return task in (None, partition[0]) and experiment in (None, partition[1])


def as_stored(name: str, table: pa.Table) -> pa.Table:
    """The table with exactly the columns of the table `name`; one that it lacks is null.

    Raises:
        pa.ArrowException: values that cannot become those of a column.
    """
    return _cast(table, SCHEMAS[name])


def _chosen(schema: pa.Schema, columns: Sequence[str] | None) -> pa.Schema:
    """The schema of these columns alone; None: of all."""
    return schema if columns is None else pa.schema([schema.field(column) for column in columns])


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly these columns; a column that it lacks is null."""
    if table.schema.equals(schema):
        return table
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _with_place(table: pa.Table, partition: tuple[str, str], store: str) -> pa.Table:
    """The table with columns that say where its rows lie: task, experiment and store."""
    for column, value in (*zip(PARTITIONS, partition, strict=True), ("store", store)):
        table = table.append_column(column, pa.repeat(value, table.num_rows).dictionary_encode())
    return table


def _joined(parts: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(parts).unify_dictionaries()


def _ipc_bytes(table: pa.Table) -> bytes:
    """The table as an Arrow stream: the same bytes for the same rows."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()
