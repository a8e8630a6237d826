"""What can be read of a run that is under way: its tables as they grow, and how far it is.

    steps.parquet/part-000001.parquet ...     the rows of `algorithms.tables`, a thousand updates a part
    epochs.parquet/part-000001.parquet
    progress.json                             a `Progress`

Parquet files cannot be appended to, so each table is a folder of parts, which is read as one table is. A part is
replaced as a whole, and none overlap: nobody ever reads an update twice.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from algorithms.history import History, Progress
from algorithms.tables import epoch_table, step_table
from scoring.files import replacing
from scoring.progress import Meter, current_meter, every, metered

TABLES = ("steps", "epochs")
PROGRESS = "progress.json"
ROWS_PER_PART = 1000
# Seconds after which a table is written again, and after which the progress is.
TABLES_S, PROGRESS_S = 10.0, 1.0


class LiveTables:
    """Writes the tables of a run as they grow.

    Args:
        folder: of the run; None writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._written = 0
        self._last = 0.0

    def begin(self, history: History) -> None:
        """Write what a run begins with. Rows that an earlier start has written after it go: they will come again."""
        if self._folder is None:
            return
        for name in TABLES:
            table = self._folder / f"{name}.parquet"
            if table.is_file():  # of a run that was killed while it put them in place
                table.unlink()
            table.mkdir(exist_ok=True)
            for leftover in table.glob(".*.tmp"):
                leftover.unlink()
        parts = self._steps(history)
        # The last first, so that what is there is whole at any time.
        for path in sorted((self._folder / "steps.parquet").glob("part-*.parquet"), reverse=True):
            if path.name not in parts:
                path.unlink()
        for name in sorted(parts, reverse=True):
            _write(self._folder / "steps.parquet" / name, parts[name])
        self._write_epochs(history)
        self._written, self._last = history.step, time.monotonic()

    def follow(self, history: History, now: bool = False) -> None:
        """Write what has come, if it is time.

        Args:
            now: it is.
        """
        if self._folder is None or not (now or time.monotonic() - self._last > TABLES_S):
            return
        for name, table in self._steps(history, self._written).items():
            _write(self._folder / "steps.parquet" / name, table)
        self._write_epochs(history)
        self._written, self._last = history.step, time.monotonic()

    @staticmethod
    def _steps(history: History, after: int = 0) -> dict[str, pa.Table]:
        """The parts, from the one that has the first update after another; the first is there before any update."""
        firsts = range(after // ROWS_PER_PART * ROWS_PER_PART, max(1, len(history.steps)), ROWS_PER_PART)
        return {
            _part(first // ROWS_PER_PART): step_table(history.steps[first : first + ROWS_PER_PART]) for first in firsts
        }

    def _write_epochs(self, history: History) -> None:
        assert self._folder is not None
        _write(self._folder / "epochs.parquet" / _part(0), epoch_table(history.epochs))


def _part(number: int) -> str:
    return f"part-{number + 1:06d}.parquet"


def _write(path: Path, table: pa.Table) -> None:
    with replacing(path) as unfinished:
        pq.write_table(table, unfinished)


def remove_parts(folder: Path, name: str) -> None:
    """Remove a table's folder of parts, if there is one, so that a file can take its name."""
    table = folder / f"{name}.parquet"
    if table.is_dir():
        leftover = folder / f".{name}.parquet.tmp"
        shutil.rmtree(leftover, ignore_errors=True)
        table.rename(leftover)
        shutil.rmtree(leftover)


@contextmanager
def progress_told(read: Callable[[], Progress], *tell: Callable[[Progress], None]) -> Iterator[None]:
    """Within the context others are told from time to time how far the run is, in another thread.

    Args:
        read: gives the progress; what the context is doing is added to it.
        tell: who is told.
    """
    meter = current_meter() or Meter()

    def look() -> None:
        progress = replace(read(), phase=meter.phase, done=meter.done, of=meter.of)
        for each in tell:
            each(progress)

    look()
    with metered(meter), every(PROGRESS_S, look):
        yield


def write_progress(folder: Path, progress: Progress) -> None:
    """Leave the progress where all who see the folder can read it; a full disk is no reason to end a run here."""
    with suppress(OSError), replacing(folder / PROGRESS) as unfinished:
        unfinished.write_text(json.dumps(asdict(progress)))


def read_progress(folder: Path) -> Progress | None:
    """The progress of a run; None where there is none, or one that this version does not know."""
    try:
        progress = Progress(**json.loads((folder / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return progress
