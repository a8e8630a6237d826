"""The finished pieces of a run on disk, next to the output file, until that is written whole."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from bench.files.folders import MadeFolders, claim, locked, owner_of, refuse_inputs, refuse_locked
from bench.files.identity import differences
from bench.files.score_file import FACTS_KEY, read_scores
from scoring.errors import RefusedUnderWay, UserError
from scoring.files import replacing, shown
from scoring.mrd import Draws
from scoring.reading import check_columns, exists, read_text, shaped
from scoring.settings import described, named
from scoring.work import DrawTask, Facts, ReplicaTask


def finished_output(
    out: Path,
    identity: dict[str, Any],
    kind: str,
    contents: str,
    settings: Any,
    overwrite: bool,
    shape: Any,
    columns: pa.Schema,
) -> tuple[pa.Table, dict[str, Any]] | None:
    """The table and the record that a run of the same spec has left in `out`; None if it is to be written.

    Args:
        out: the output file.
        identity: of the run that would be started.
        kind: of file that it must be, for messages: "a score file".
        contents: of such a file: "scores".
        settings: of the run, which may name `out` as an input.
        overwrite: replace what an earlier run has left.
        shape: of the record, see `scoring.reading.shaped`.
        columns: of the table, see `scoring.reading.check_columns`.

    Raises:
        UserError: the file is something else, or of another spec; or, with `overwrite`, it is none of ours.
    """
    refuse_inputs(out, settings)
    if not exists(out):
        return None
    try:
        table, spec, record = read_scores(out)
    except UserError:
        spec = {}
    if overwrite and spec:
        return None
    if overwrite and not out.is_dir():
        raise UserError(f"{named('out')} {shown(out)} was not written by mrd-bench: choose another file, or remove it")
    if overwrite:
        return None  # a folder is refused by who writes there
    if not identity.keys() <= spec.keys():
        raise UserError(
            f"{named('out')} {shown(out)} exists and is not {kind}: choose another, or {named('overwrite')}"
        )
    if spec["spec_hash"] != identity["spec_hash"]:
        raise UserError(
            f"{named('out')} {shown(out)} holds {contents} of another spec (different: {differences(spec, identity)}): "
            f"choose another file, or {named('overwrite')}"
        )
    expected = f"what this command writes; {named('overwrite')} replaces it"
    shaped(record, shape, str(out), expected)
    check_columns(table, columns, str(out), expected)
    if not table.num_rows:
        raise UserError(f"{shown(out)} has no rows: expected {expected}")
    print(f"already done, nothing to do: {shown(out)} is there (spec {identity['spec_hash']})", file=sys.stderr)
    return table, record


class Parts:
    """Finished pieces of a run on disk, next to the output file, until the file itself is written."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        if out.suffix != ".parquet":
            raise UserError(f"{named('out')} {shown(out)}: expected a file name ending in .parquet")
        if out.is_dir():
            raise UserError(f"{named('out')} {shown(out)} is a folder: expected the name of a file to write")
        self.folder = out.with_name(out.name + ".parts")
        self._out, self._identity = out, identity
        self._lock: FileLock | None = None
        self._made = MadeFolders(self.folder)

    def __enter__(self) -> Self:
        self._lock = locked(self.folder, self._out, "run", "lock")
        try:
            claim(self.folder, self._identity)
            self._check_owner()
        except BaseException:
            self._lock.release()
            self._made.remove_unused()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Refused: the next command, mended, must not find the claim of this one.
        if not any(self.folder.glob("*.parquet")) or (kind is not None and issubclass(kind, RefusedUnderWay)):
            self.remove()
        if self._lock is not None:
            self._lock.release()
        self._made.remove_unused()

    def _check_owner(self) -> None:
        owner = owner_of(self.folder)
        if owner is None or owner["spec_hash"] != self._identity["spec_hash"]:
            whose = f" ({owner['spec_hash']})" if owner else ""
            raise UserError(
                f"{shown(self.folder)} holds the unfinished work of another spec{whose}: finish it with its own "
                f"command, remove the folder, or choose another {named('out')}"
            )

    def check(self) -> int:
        """Refuse what entering would refuse, without writing anything; the number of pieces that are finished.

        Raises:
            UserError: the folder is of another spec, of another process, or cannot be written to.
        """
        refuse_locked(self.folder, self._out, "run", "lock")
        if (self.folder / "spec.json").is_file():
            self._check_owner()
        return len(list(self.folder.glob("*.parquet")))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.parquet"

    def has(self, key: str) -> bool:
        return self._path(key).is_file()

    def write(self, key: str, table: pa.Table, facts: dict[str, Any]) -> None:
        """Keep a piece with the facts that go with it, whole or not at all."""
        with replacing(self._path(key)) as unfinished:
            pq.write_table(table.replace_schema_metadata({FACTS_KEY: json.dumps(facts)}), unfinished)

    def read(self, key: str) -> tuple[pa.Table, dict[str, Any]]:
        """A piece and its facts."""
        table = pq.ParquetFile(self._path(key)).read()
        return table, json.loads(table.schema.metadata[FACTS_KEY])

    def number(self, name: str, choose: Callable[[], int]) -> int:
        """A number that, once chosen, stays for those who continue this run: its parts depend on it."""
        path = self.folder / name
        if not path.is_file():
            chosen = choose()
            with replacing(path) as unfinished:
                unfinished.write_text(str(chosen))
        text = read_text(path, "a whole number")
        if not text.isdecimal():
            raise UserError(f"{path} is {described(text)}: expected a whole number; remove the folder {self.folder}")
        return int(text)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class DrawParts(Parts):
    """The finished tasks of scoring, as `scoring.api.FinishedTasks` wants them.

    Args:
        names: positions in the data set -> ids of the samples, for who reads the parts while there are more to come;
            None: the parts have positions alone.
    """

    def __init__(
        self, out: Path, identity: dict[str, Any], names: Callable[[np.ndarray], Sequence[str]] | None = None
    ) -> None:
        super().__init__(out, identity)
        self._names = names

    def keep(self, task: DrawTask, draws: Draws, facts: Facts) -> None:
        """A task's result as a part."""
        values = pa.FixedSizeListArray.from_arrays(pa.array(draws.values.ravel()), draws.values.shape[1])
        ids = {} if self._names is None else {"sample_id": self._names(draws.indices)}
        columns = ids | {"index": draws.indices, "nll": draws.nll, "saturated": draws.saturated, "values": values}
        self.write(task.key, pa.table(columns), dataclasses.asdict(facts))

    def result(self, task: DrawTask) -> Draws:
        """What a task gave."""
        table, _ = self.read(task.key)
        values = table["values"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
        return Draws(table["index"].to_numpy(), values, table["nll"].to_numpy(), table["saturated"].to_numpy())

    def facts(self, tasks: Sequence[DrawTask]) -> Facts:
        """What all replicas noticed, over all runs that worked on these parts."""
        total = Facts()
        for task in tasks:
            metadata = pq.read_schema(self._path(task.key)).metadata
            total.add(Facts(**json.loads(metadata[FACTS_KEY])))
        return total


class ColumnParts(Parts):
    """The finished tasks whose results are columns, as `scoring.api.FinishedTasks` wants them."""

    def keep(self, task: ReplicaTask, result: dict[str, Any], facts: Facts) -> None:
        """A task's result as a part: arrays (n,) and (n, d) as columns, anything else beside the facts."""
        columns = {
            name: values if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])
            for name, values in result.items()
            if isinstance(values, np.ndarray)
        }
        others = {name: value for name, value in result.items() if not isinstance(value, np.ndarray)}
        self.write(task.key, pa.table(columns), {"facts": dataclasses.asdict(facts), "others": others})

    def result(self, task: ReplicaTask) -> dict[str, Any]:
        """What a task gave."""
        table, record = self.read(task.key)
        columns = {}
        for name in table.column_names:
            column = table[name].combine_chunks()
            nested = pa.types.is_fixed_size_list(column.type)
            flat = (column.flatten() if nested else column).to_numpy()
            columns[name] = flat.reshape(table.num_rows, -1) if nested else flat
        return columns | record["others"]

    def all_facts(self) -> Facts:
        """What all replicas noticed, over all runs that worked on these parts."""
        total = Facts()
        for path in sorted(self.folder.glob("*.parquet")):
            total.add(Facts(**json.loads(pq.read_schema(path).metadata[FACTS_KEY])["facts"]))
        return total
