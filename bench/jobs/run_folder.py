"""Unlearning runs on disk: a folder that belongs to one spec, and one process at a time.

spec.json                 what is run: its hash is the run's identity
checkpoints/              while it runs, see algorithms.checkpoints
reference.safetensors     while it runs, see algorithms.reference
model/                    what the training ended with
steps.parquet             one row an update
epochs.parquet            one row an epoch; row 0 is the initial model
samples.parquet           one row a forget sample
difficulty.parquet        MRD of every sample at every refresh
run.json                  the rest of the record; written last, so that it says that all is there
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from algorithms.checkpoints import Checkpoints
from algorithms.unlearner import Corpus, History
from bench.files.folders import OwnedFolder
from bench.files.origin import origin
from bench.report.words import size_of
from scoring.errors import UserError
from scoring.files import replacing


@dataclass(frozen=True)
class UnlearnResult:
    """What a run gives back.

    Attributes:
        folder: with model/, the tables and run.json.
        steps, epochs, samples: the tables, see the README.
        record: what a reader must know: spec, thresholds, seconds, passes, notes, packages.
    """

    folder: Path
    steps: pa.Table
    epochs: pa.Table
    samples: pa.Table
    record: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model"


class RunFolder(OwnedFolder):
    """The folder of one unlearning run."""

    WHAT, BEGUN, RECORD = "run", ("checkpoints", "reference.safetensors"), "run.json"

    def tidy(self) -> None:
        shutil.rmtree(self._out / "checkpoints", ignore_errors=True)
        (self._out / "reference.safetensors").unlink(missing_ok=True)

    def check_room(self, checkpoint: int, reference: int) -> None:
        """Refuse to start where the checkpoints, of which two exist while one replaces the other, will not fit.

        Args:
            checkpoint: bytes of one.
            reference: bytes of what is kept of the initial model.
        """
        needed = (1 if any(self._out.glob("checkpoints/step-*")) else 2) * checkpoint
        if not (self._out / "reference.safetensors").is_file():
            needed += reference
        free = shutil.disk_usage(self._out).free
        if free < needed:
            raise UserError(
                f"--out {self._out}: {size_of(free)} free, and the checkpoints need {size_of(needed)}; free some, or "
                "choose a folder on another disk"
            )

    def finish(
        self, history: History, corpus: Corpus, rejected: Sequence[Mapping[str, str]], checkpoints: Checkpoints
    ) -> None:
        """Put model and tables in place; run.json comes last and says that all is there."""
        saved = checkpoints.latest()
        assert saved is not None
        unfinished = self._out / ".model.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(saved.model, unfinished, copy_function=_link)
        shutil.rmtree(self._out / "model", ignore_errors=True)
        unfinished.rename(self._out / "model")
        tables = {
            "steps": pa.Table.from_pylist(history.steps, _step_schema()),
            "epochs": pa.Table.from_pylist(history.epochs, _epoch_schema(history.epochs)),
            "samples": sample_table(history, corpus),
            "difficulty": _difficulty(history, corpus),
        }
        for name, table in tables.items():
            with replacing(self._out / f"{name}.parquet") as path:
                pq.write_table(table, path)
        record = {
            "spec": self._identity,
            "updates": history.step,
            # JSON has no nan: EL may be defined for no sample.
            "thresholds": {k: None if np.isnan(v) else v for k, v in history.thresholds.items()},
            "seconds": history.seconds,
            "passes": history.passes,
            "notes": history.notes,
            "rejected": list(rejected),
            **origin(),
        }
        with replacing(self._out / "run.json") as path:
            path.write_text(json.dumps(record, indent=2) + "\n")
        self.tidy()


@contextmanager
def full_disks_said_plainly(out: Path) -> Iterator[None]:
    """Within the context a disk that takes no more is the user's to mend."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UserError(
            f"--out {out}: nothing more can be written ({error}); free some space and give the same command again"
        ) from error


def _link(source: str, target: str) -> None:
    """A second name for a file, where the file system has them: the weights are not written twice."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _step_schema() -> pa.Schema:
    number, whole = pa.float64(), pa.int64()
    return pa.schema(
        [
            ("step", whole),
            ("epoch", whole),
            ("loss", number),
            ("forget_loss", number),
            ("retain_loss", number),
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
    """Numbers, whichever of them this run knows; not every epoch knows all."""
    names = dict.fromkeys(name for row in rows for name in row)
    whole = ("epoch", "step", "tokens")
    return pa.schema(
        [
            (name, pa.int64() if name in whole or name.startswith(("forwards", "backwards")) else pa.float64())
            for name in names
        ]
    )


def sample_table(history: History, corpus: Corpus) -> pa.Table:
    """One row a forget sample, see the README."""

    def memory(when: str, what: str) -> pa.Array:
        """Of each sample; null where it was not measured: EL is not where MA alone says that it is not forgotten."""
        values = history.memory[when][what] if history.memory else [np.inf] * len(corpus.forget)
        return pa.array([None if np.isinf(value) else value for value in values], pa.float64())

    return pa.table(
        {
            "sample_id": [s.sample_id for s in corpus.forget],
            "num_tokens": [s.num_scored for s in corpus.forget],
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
        }
    )


def _difficulty(history: History, corpus: Corpus) -> pa.Table:
    """MRD of every sample at every refresh."""
    ids = [s.sample_id for s in corpus.forget]
    rows = [
        {"step": entry["step"], "sample_id": name, "mrd": mrd}
        for entry in history.mrd
        for name, mrd in zip(ids, entry["mrd"], strict=True)
    ]
    schema = pa.schema([("step", pa.int64()), ("sample_id", pa.string()), ("mrd", pa.float64())])
    return pa.Table.from_pylist(rows, schema)


def read_run(folder: str | Path) -> UnlearnResult:
    """A finished run.

    Raises:
        UserError: the folder holds none.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "run.json").read_text())
        steps, epochs, samples = (pq.read_table(folder / f"{name}.parquet") for name in ("steps", "epochs", "samples"))
    except (OSError, json.JSONDecodeError, pa.ArrowException) as error:
        raise UserError(f"{folder}: no finished run; expected what `mrd-bench unlearn` writes") from error
    return UnlearnResult(folder, steps, epochs, samples, record)
