"""The result store: runs, scores and per-sample values that people share, as plain Parquet.

    STORE/runs/task=T/experiment=E/KEY.parquet       one row a run
    STORE/samples/task=T/experiment=E/KEY.parquet    one row a forget sample of a run
    STORE/scores/task=T/experiment=E/KEY.parquet     one row a sample and model: its MRD, and what it says

STORE is a folder or a URI that pyarrow opens (s3://, gs://, file://). A file is written once, whole, and never changed.
KEY is the hash of what is in it, so any number of writers need no lock, and writing the same again changes nothing. A
table has the same columns in every file; pandas, DuckDB and polars read `STORE/runs` as one partitioned table.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from scoring.errors import UserError, first_line
from scoring.files import replacing

# Of the tables' columns. A file says which it has; what older versions wrote is brought up to date when it is read.
SCHEMA_VERSION = 1
VERSION_KEY, TABLE_KEY = b"mrd_bench.store_version", b"mrd_bench.store_table"
READERS = 16  # files at once: from an object store most of the time is waiting

_ORIGIN = [
    ("model", pa.string()),
    ("model_fingerprint", pa.string()),
    ("data_sha256", pa.string()),
    ("spec", pa.string()),  # JSON, with its hash
    ("packages", pa.string()),  # JSON, name -> version
    ("hardware", pa.string()),
    ("git_commit", pa.string()),
]
SCHEMAS: dict[str, pa.Schema] = {
    "runs": pa.schema(
        [
            ("run", pa.string()),  # its spec's hash
            ("status", pa.string()),
            ("reason", pa.string()),
            ("algorithm", pa.string()),
            ("split", pa.string()),
            ("selection", pa.string()),
            ("kind", pa.string()),
            ("level", pa.string()),
            ("forget_samples", pa.int64()),
            ("mean_log_mrd", pa.float64()),
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
            ("scores", pa.string()),  # their spec's hash
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
}
PARTITIONS = ("task", "experiment")
# What brings a table of a version to the next one, by the version that it starts from.
Migration = Callable[[str, pa.Table], pa.Table]
MIGRATIONS: dict[int, Migration] = {}


@dataclass(frozen=True)
class Skipped:
    """A file that was not read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Results:
    """What stores hold.

    Attributes:
        runs, samples, scores: with the columns of SCHEMAS, and task, experiment, store.
        skipped: what lies there and could not be read.
    """

    runs: pa.Table
    samples: pa.Table
    scores: pa.Table
    skipped: tuple[Skipped, ...]


class Store:
    """A store at a folder or URI.

    Args:
        root: need not exist until something is written.

    Raises:
        UserError: no URI that can be opened.
    """

    def __init__(self, root: str | Path) -> None:
        given = str(root).rstrip("/") or "/"
        uri = re.match(r"([a-z][a-z0-9+.-]+://)(?:[^/@]*@)?([^?]*)", given)
        # Shown, and part of what is published: a URI's key and options are not.
        self.root = "".join(uri.groups()) if uri else given
        try:
            if uri:
                self._fs, self._path = fs.FileSystem.from_uri(given)
            else:
                self._fs, self._path = fs.LocalFileSystem(), os.path.abspath(given)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"store {self.root!r} cannot be opened: {first_line(error)}; expected a folder or a URI such as "
                "s3://bucket/folder"
            ) from error

    def write(self, name: str, table: pa.Table, task: str, experiment: str) -> str:
        """Write rows of the table `name` as one file; its path. Rows of one call are there together or not at all.

        Raises:
            UserError: the store cannot be written to, or the experiment's name cannot be a folder's.
        """
        table = _cast(table, SCHEMAS[name]).combine_chunks()
        key = hashlib.sha256(name.encode() + _stream(table)).hexdigest()[:24]
        labelled = table.replace_schema_metadata({VERSION_KEY: str(SCHEMA_VERSION), TABLE_KEY: name})
        sink = pa.BufferOutputStream()
        pq.write_table(labelled, sink, compression="zstd", write_page_checksum=True)
        folder = "/".join([self._path, name, *_partition(task, experiment)])
        path = f"{folder}/{key}.parquet"
        try:
            self._fs.create_dir(folder, recursive=True)
            if isinstance(self._fs, fs.LocalFileSystem):
                with replacing(Path(path)) as unfinished:
                    unfinished.write_bytes(sink.getvalue())
            else:
                # An object appears when all of it has been sent; in one piece, so that nothing can fail between two.
                with self._fs.open_output_stream(path) as stream:
                    stream.write(sink.getvalue())
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"store {self.root!r} cannot be written to: {first_line(error)}") from error
        return path

    def read(self, task: str | None = None, experiment: str | None = None) -> Results:
        """All rows, of one task or experiment if they are named.

        Raises:
            UserError: there is no store.
        """
        whole: dict[str, pa.Table] = {
            name: _labelled(schema.empty_table(), ("", ""), "") for name, schema in SCHEMAS.items()
        }
        skipped: list[Skipped] = []
        for name in SCHEMAS:
            paths = self._files(name)
            wanted = [path for path in paths if _is_wanted(path[len(self._path) + 1 :], task, experiment)]
            with ThreadPoolExecutor(READERS) as threads:
                read = list(threads.map(lambda path, name=name: self._read(name, path), wanted))
            skipped += [each for each in read if isinstance(each, Skipped)]
            parts: defaultdict[tuple[str, str], list[pa.Table]] = defaultdict(list)
            for each in read:
                if not isinstance(each, Skipped):
                    parts[each[0]].append(each[1])
            whole[name] = _joined(
                [whole[name], *(_labelled(pa.concat_tables(own), where, self.root) for where, own in parts.items())]
            )
        return Results(whole["runs"], whole["samples"], whole["scores"], tuple(skipped))

    def _files(self, name: str) -> list[str]:
        try:
            info = self._fs.get_file_info(f"{self._path}/{name}")
            if info.type == fs.FileType.NotFound:
                self._check_is_store()
                return []
            selector = fs.FileSelector(f"{self._path}/{name}", recursive=True)
            files = [each.path for each in self._fs.get_file_info(selector) if each.type == fs.FileType.File]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"store {self.root!r} cannot be read: {first_line(error)}") from error
        # Hidden ones are someone's unfinished work.
        return sorted(path for path in files if not path.rsplit("/", 1)[-1].startswith("."))

    def _check_is_store(self) -> None:
        infos = self._fs.get_file_info([f"{self._path}/{name}" for name in SCHEMAS])
        if all(info.type == fs.FileType.NotFound for info in infos):
            raise UserError(
                f"{self.root}: no results; expected a store that `mrd-bench results add`, or `mrd-bench sweep` with "
                "--results, has written to"
            )

    def _read(self, name: str, path: str) -> tuple[tuple[str, str], pa.Table] | Skipped:
        """Partition and rows of a file."""
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
                # ParquetFile.read hands out what could be decoded before an error only as an error: all or nothing.
                table = file.read()
            for each in range(version, SCHEMA_VERSION):
                table = MIGRATIONS[each](name, table)
            table = _cast(table, SCHEMAS[name])
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            return Skipped(shown, f"damaged: {first_line(error)}")
        return partition, table


def merge(results: Sequence[Results]) -> Results:
    """What several stores hold."""
    runs, samples, scores = (_joined([getattr(each, name) for each in results]) for name in SCHEMAS)
    return Results(runs, samples, scores, tuple(skipped for each in results for skipped in each.skipped))


def read_stores(roots: Sequence[str | Path], task: str | None = None, experiment: str | None = None) -> Results:
    """What is in stores together.

    Raises:
        UserError: one of them is no store.
    """
    return merge([Store(root).read(task, experiment) for root in roots])


def _partition(task: str, experiment: str) -> list[str]:
    for what, value in zip(PARTITIONS, (task, experiment), strict=True):
        if not re.fullmatch(r"[\w.-]+", value):
            raise UserError(f"{what} {value!r}: expected letters, digits, - _ and . alone, as it names a folder")
    return [f"{name}={value}" for name, value in zip(PARTITIONS, (task, experiment), strict=True)]


def _partition_of(relative: str) -> tuple[str, str] | None:
    """Task and experiment of a file of a store, by its path in there."""
    found = re.fullmatch(r"\w+/task=([^/]+)/experiment=([^/]+)/[^/]+", relative)
    return (unquote(found[1]), unquote(found[2])) if found else None


def _is_wanted(relative: str, task: str | None, experiment: str | None) -> bool:
    found = _partition_of(relative)
    wanted = (task, experiment)
    return found is None or all(w in (None, f) for w, f in zip(wanted, found, strict=True))


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly these columns; one that it lacks is null."""
    if table.schema.equals(schema):
        return table
    columns = [
        table[each.name].cast(each.type) if each.name in table.column_names else pa.nulls(table.num_rows, each.type)
        for each in schema
    ]
    return pa.table(columns, schema=schema)


def _labelled(table: pa.Table, partition: tuple[str, str], store: str) -> pa.Table:
    """With where the rows lie, as columns."""
    for column, value in (*zip(PARTITIONS, partition, strict=True), ("store", store)):
        table = table.append_column(column, pa.repeat(value, table.num_rows).dictionary_encode())
    return table


def _joined(parts: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(parts).unify_dictionaries()


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()
