"""Runs that train a model on disk: a folder that belongs to one spec, and one process at a time.

spec.json                 the spec: its hash is the run's identity
checkpoints/              while it runs, see algorithms.checkpoints
reference/                while it runs, see algorithms.reference
initial/                  while it runs, the initial model's weights, which the trained ones are compared with
model/                    the model that has forgotten
adapter/                  the adapter that was trained, if one was; model/ has it merged
progress.json             while it runs, see algorithms.live
steps.parquet             one row an update; while it runs, a folder of parts
epochs.parquet            one row an epoch; row 0 is the initial model; likewise
samples.parquet           one row a forget sample
difficulty.parquet        MRD of every sample at every refresh
logs/                     what --log asks for, see bench.jobs.logs
run.json                  the rest of the record; written last, so that it says that all is there
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from algorithms.checkpoints import Checkpoints, latest_step
from algorithms.corpus import Corpus
from algorithms.history import History, Progress
from algorithms.initial import INITIAL
from algorithms.live import PROGRESS, read_progress, remove_parts, write_progress
from algorithms.reference import REFERENCE
from algorithms.tables import tables_of
from bench.files.folders import (
    RUN_MODEL,
    RUN_RECORD,
    SEVERAL_REQUESTS,
    TRAINING_RUN,
    Hashed,
    OwnedFolder,
    owner_of,
    refuse_several,
    request_folders,
)
from bench.files.origin import Origin, origin
from bench.jobs.preview import DONE, NEW
from bench.report.words import size_of
from scoring.errors import UserError, first_line
from scoring.files import replacing, shown
from scoring.reading import read_json, read_parquet
from scoring.settings import named


@dataclass(frozen=True)
class UnlearnResult:
    """What a run gives back.

    Attributes:
        folder: with model/, the tables and run.json.
        steps, epochs, samples: the tables, see docs/unlearning.md.
        record: facts that a reader must know: spec, thresholds, seconds, passes, notes, packages.
    """

    folder: Path
    steps: pa.Table
    epochs: pa.Table
    samples: pa.Table
    record: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / RUN_MODEL


@dataclass(frozen=True)
class Room:
    """The bytes that a run writes.

    Attributes:
        checkpoint: of one.
        reference: of what the initial model gives for the samples.
        initial: of the initial weights.
        finished: of the model that is put together at the end, where checkpoints have none.
    """

    checkpoint: int
    reference: int
    initial: int
    finished: int


class RunFolder(OwnedFolder):
    """The folder of one unlearning run."""

    KIND, BEGUN, RECORD = "run", ("checkpoints", REFERENCE), RUN_RECORD

    def tidy(self) -> None:
        shutil.rmtree(self._out / "checkpoints", ignore_errors=True)
        for name in (INITIAL, REFERENCE):
            for path in (self._out / name, *self._out.glob(f".{name}.*.tmp")):
                shutil.rmtree(path, ignore_errors=True)
        for name in ("reference.safetensors", PROGRESS):  # the former of a run that an earlier version began
            (self._out / name).unlink(missing_ok=True)

    def say_done(self) -> None:
        """Say on stderr that there is nothing to do."""
        print(
            f"already done, nothing to do: {shown(self._out)} holds this run (spec {self._identity['spec_hash']})",
            file=sys.stderr,
        )

    def say_where_it_continues(self, total: int) -> None:
        """Say on stderr from which update it goes on, if an earlier start has made some.

        Args:
            total: updates of a run that does not stop early.
        """
        if step := latest_step(self._out / "checkpoints"):
            print(f"continuing from update {step} of {total}: {shown(self._out)}", file=sys.stderr)

    def failed(self, reason: str) -> None:
        """Leave the reason for which a run has ended beside what it has reached."""
        if latest_step(self._out / "checkpoints") is not None:
            progress = read_progress(self._out) or Progress(0, 0)
            write_progress(self._out, replace(progress, phase="", failed=reason))

    def __exit__(self, *error: object) -> None:
        if latest_step(self._out / "checkpoints") is None:
            (self._out / PROGRESS).unlink(missing_ok=True)
            shutil.rmtree(self._out / INITIAL, ignore_errors=True)
        super().__exit__(*error)

    def check_room(self, room: Room) -> None:
        """Refuse to start where the checkpoints, of which two exist while one replaces the other, will not fit with all
        that is written beside them."""
        needed = (1 if any(self._out.glob("checkpoints/step-*")) else 2) * room.checkpoint + room.finished
        if not (self._out / REFERENCE).is_dir():
            needed += room.reference
        if not (self._out / INITIAL).is_dir():
            needed += room.initial
        place = next(folder for folder in (self._out, *self._out.parents) if folder.is_dir())
        free = shutil.disk_usage(place).free
        if free < needed:
            raise UserError(
                f"{named('out')} {shown(self._out)}: {size_of(free)} free, and the checkpoints need "
                f"{size_of(needed)}; free some, or choose a folder on another disk"
            )

    def state(self, updates: int) -> str:
        """What a command that makes so many updates would find here, in words."""
        if self.is_finished():
            return DONE
        steps = sorted((self._out / "checkpoints").glob("step-*"))
        step = int(steps[-1].name.removeprefix("step-")) if steps else None
        return NEW if step is None else f"would continue from update {step} of {updates}"

    def finish(
        self, history: History, corpus: Corpus, rejected: Sequence[Mapping[str, str]], checkpoints: Checkpoints
    ) -> None:
        """Put model and tables in place; run.json comes last and says that all is there."""
        saved = checkpoints.latest()
        assert saved is not None
        for kept in [saved.model, *([saved.adapter] if saved.adapter.is_dir() else [])]:
            unfinished = self._out / f".{kept.name}.tmp"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(kept, unfinished, copy_function=link)
            shutil.rmtree(self._out / kept.name, ignore_errors=True)
            unfinished.rename(self._out / kept.name)
        for name, table in self.tables(history, corpus).items():
            remove_parts(self._out, name)
            with replacing(self._out / f"{name}.parquet") as path:
                pq.write_table(table, path)
        record = {
            "spec": self._identity,
            "updates": history.step,
            **self.facts(history),
            "seconds": history.seconds,
            "notes": history.notes,
            "rejected": list(rejected),
            **origin(),
        }
        with replacing(self._out / self.RECORD) as path:
            path.write_text(json.dumps(record, indent=2) + "\n")
        self.tidy()

    def tables(self, history: History, corpus: Corpus) -> dict[str, pa.Table]:
        """What is written beside the model, by name."""
        return tables_of(history, corpus)

    def facts(self, history: History) -> dict[str, Any]:
        """What the record of this kind of run has besides."""
        return {"thresholds": history.known_thresholds, "passes": history.passes}


@contextmanager
def failures_noted(folder: RunFolder) -> Iterator[None]:
    """Within the context an error leaves its reason in the folder, for whoever watches."""
    try:
        yield
    except Exception as error:
        folder.failed(first_line(error))
        raise


@contextmanager
def full_disks_said_plainly(out: Path) -> Iterator[None]:
    """Within the context a disk that takes no more is the user's to mend."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UserError(
            f"{named('out')} {shown(out)}: nothing more can be written ({error}); free some space and give the same "
            "command again"
        ) from error


def link(source: str, target: str) -> None:
    """A second name for a file, where the file system has them: the weights are not written twice."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_run(folder: str | Path) -> UnlearnResult:
    """A finished run of unlearning.

    Raises:
        UserError: the folder holds none.
    """
    record, steps, epochs, samples = read_finished_run(folder, RunFolder.KIND, "unlearn", _Record, _COLUMNS)
    return UnlearnResult(Path(folder), steps, epochs, samples, record)


def read_finished_run(
    folder: str | Path, kind: str, command: str, shape: Any, columns: Mapping[str, pa.Schema]
) -> tuple[dict[str, Any], pa.Table, pa.Table, pa.Table]:
    """The record of a finished run, and its tables of steps, epochs and samples.

    Args:
        kind: of run, for messages.
        command: that writes such runs.
        shape: of the record, see `scoring.reading.shaped`.
        columns: of the tables, by name.

    Raises:
        UserError: the folder holds none.
    """
    folder = Path(folder)
    expected = f"what `mrd-bench {command}` writes"
    if (owner_of(folder) or {}).get("kind") == SEVERAL_REQUESTS:
        runs = ", ".join(map(str, request_folders(folder)))
        raise UserError(f"{folder} is a {SEVERAL_REQUESTS}: name one of them, {runs or 'once they have begun'}")
    if not (folder / RunFolder.RECORD).is_file():
        refuse_several(folder, f"{expected}, one folder of a run")
        raise UserError(f"{folder}: no finished {kind}; expected {expected}")
    if kind == RunFolder.KIND and (owner_of(folder) or {}).get("kind") == TRAINING_RUN:
        raise UserError(f"{folder} is a run of `mrd-bench train`, in which nothing is forgotten; expected {expected}")
    record = read_json(folder / RunFolder.RECORD, shape, expected)
    steps, epochs, samples = (
        read_parquet(folder / f"{name}.parquet", expected, columns[name]) for name in ("steps", "epochs", "samples")
    )
    if not epochs.num_rows:
        raise UserError(f"{folder / 'epochs.parquet'} has no rows: expected {expected}")
    return record, steps, epochs, samples


class _Identity(Hashed):
    algorithm: str
    alpha: float
    seed: int
    model: str
    task: str
    forget_split: str | None
    selection: str | None
    model_fingerprint: str
    forget_sha256: str


class _Record(Origin):
    """What every reader of run.json may rely on."""

    spec: _Identity
    updates: int
    thresholds: dict[str, float | None]
    seconds: dict[str, float]
    passes: dict[str, list[int]]
    notes: list[str]
    rejected: list[dict[str, str]]


_COLUMNS = {
    "steps": pa.schema([pa.field("step", pa.int64(), nullable=False)]),
    "epochs": pa.schema(
        [pa.field(name, pa.int64(), nullable=False) for name in ("epoch", "step")]
        + [(name, pa.float64()) for name in ("forget_loss", "retain_loss", "forgotten", "mean_abs_delta")]
    ),
    "samples": pa.schema(
        [
            pa.field("sample_id", pa.string(), nullable=False),
            pa.field("num_tokens", pa.int64(), nullable=False),
            pa.field("updates", pa.int64(), nullable=False),
            ("updates_until_forgotten", pa.int64()),
        ]
    ),
}
