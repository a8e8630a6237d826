"""The finished pieces of a run on disk, next to the output file, until that is written whole."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from bench.files.identity import differences
from bench.files.score_file import FACTS_KEY, read_scores
from scoring.errors import UserError
from scoring.files import replacing
from scoring.mrd import Draws
from scoring.pool import Facts, Task


def finished(out: Path, identity: dict[str, Any], what: str, it: str) -> tuple[pa.Table, dict[str, Any]] | None:
    """What a run of the same spec has left in `out`: table and record; None where nothing is there.

    Args:
        out: the output file.
        identity: of the run that would be started.
        what: what the file must be, such as "a score file".
        it: what is in it, such as "scores".

    Raises:
        UserError: the file is something else, or of another spec.
    """
    if not out.exists():
        return None
    try:
        table, spec, record = read_scores(out)
    except UserError:
        spec = {}
    if not identity.keys() <= spec.keys():
        raise UserError(f"--out {out} exists and is not {what}: choose another, or --overwrite")
    if spec["spec_hash"] != identity["spec_hash"]:
        raise UserError(
            f"--out {out} holds {it} of another spec (different: {differences(spec, identity)}): choose another "
            "file, or --overwrite"
        )
    print(f"{out} is there already (spec {identity['spec_hash']})", file=sys.stderr)
    return table, record


class Parts:
    """Finished pieces of a run on disk, next to the output file, until the file itself is written."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        if out.suffix != ".parquet":
            raise UserError(f"--out {out}: expected a file name ending in .parquet")
        if out.is_dir():
            raise UserError(f"--out {out} is a folder: expected the name of a file to write")
        self.folder = out.with_name(out.name + ".parts")
        self._identity = identity
        self._lock = FileLock(self.folder / "lock")

    def __enter__(self) -> Parts:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.folder}: another run is writing here; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise UserError(f"--out: cannot write in {str(self.folder.parent)!r} ({error.strerror})") from error
        try:
            self._claim()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _claim(self) -> None:
        owner = self.folder / "spec.json"
        if not owner.is_file():
            with replacing(owner) as unfinished:
                unfinished.write_text(json.dumps(self._identity))
        found = json.loads(owner.read_text())["spec_hash"]
        if found != self._identity["spec_hash"]:
            raise UserError(
                f"{self.folder} holds the unfinished work of another spec ({found}): finish it with its own command, "
                "remove the folder, or choose another --out"
            )

    def __exit__(self, *_: object) -> None:
        # Refused before anything was done: the next command, mended, must not find the claim of this one.
        if not any(self.folder.glob("*.parquet")):
            self.remove()
        self._lock.release()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.parquet"

    def has(self, key: str) -> bool:
        return self._path(key).is_file()

    def write(self, key: str, table: pa.Table, facts: dict[str, Any]) -> None:
        """One piece with what was noticed on the way, whole or not at all."""
        with replacing(self._path(key)) as unfinished:
            pq.write_table(table.replace_schema_metadata({FACTS_KEY: json.dumps(facts)}), unfinished)

    def read(self, key: str) -> tuple[pa.Table, dict[str, Any]]:
        """What `write` was given."""
        table = pq.read_table(self._path(key))
        return table, json.loads(table.schema.metadata[FACTS_KEY])

    def facts(self, key: str) -> dict[str, Any]:
        return json.loads(pq.read_schema(self._path(key)).metadata[FACTS_KEY])

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def write_draws(parts: Parts, task: Task, draws: Draws, facts: Facts) -> None:
    """A scoring task's result as a part."""
    values = pa.FixedSizeListArray.from_arrays(pa.array(draws.values.ravel()), draws.values.shape[1])
    columns = {"index": draws.indices, "nll": draws.nll, "saturated": draws.saturated, "values": values}
    parts.write(task.key, pa.table(columns), dataclasses.asdict(facts))


def read_draws(parts: Parts, task: Task) -> Draws:
    table, _ = parts.read(task.key)
    values = table["values"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    return Draws(table["index"].to_numpy(), values, table["nll"].to_numpy(), table["saturated"].to_numpy())


def noticed(parts: Parts, tasks: Sequence[Task]) -> Facts:
    """What all replicas noticed, over all runs that worked on these parts."""
    total = Facts()
    for task in tasks:
        total.add(Facts(**parts.facts(task.key)))
    return total
