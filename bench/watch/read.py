"""How far a run is, from its folder: the same for one that runs, one that was stopped and one that has finished.

progress.json, steps.parquet, epochs.parquet, spec.json, run.json or sweep.json -> `Seen`
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from algorithms.live import PROGRESS, TABLES, read_progress
from algorithms.target import TRAINED_MA
from bench.files.folders import (
    LOCK,
    ORIGINAL,
    RETAIN_ONLY,
    SEVERAL_REQUESTS,
    TRAINING_RUN,
    owner_of,
    request_folders,
    runs_within,
)
from scoring.errors import UserError
from scoring.files import is_held, shown
from scoring.progress import Meter
from scoring.reading import read_json

State = Literal["running", "stopped", "waiting", "finished", "failed"]
# Updates over which the time of one is averaged.
RECENT = 20
# What is drawn of a run: the name of a curve, its table and its column.
CURVES = {
    "forget loss": ("steps", "forget_loss"),
    "retain loss": ("steps", "retain_loss"),
    "forgotten": ("epochs", "forgotten"),
    "forget ROUGE-L": ("epochs", "forget_rouge_l_recall"),
    "retain ROUGE-L": ("epochs", "retain_rouge_l_recall"),
}
# And of one that learns.
TRAINING_CURVES = {
    "loss": ("steps", "loss"),
    "MA": ("epochs", TRAINED_MA),
    "ROUGE-L": ("epochs", "trained_rouge_l_recall"),
    "left out ROUGE-L": ("epochs", "left_out_rouge_l_recall"),
}
# What else is measured after an epoch, of these sets.
EVALUATED = tuple(
    f"{name}_{measure}"
    for measure in ("rouge_l_recall", "probability")
    for name in ("forget", "retain", "trained", "left_out")
)


@dataclass(frozen=True)
class Seen:
    """What can be said of a run.

    Attributes:
        name: of its folder.
        kind: "run" or "sweep", whose updates are trials.
        state: "waiting" is the second run of a pair, which has not begun.
        step, total: updates made, and those of a run that does not stop early; None where nobody knows.
        doing: what is being done, or why it failed.
        evaluation: the last measurements, by column of epochs.
        seconds_per_update, seconds_left, age: seconds; age is that of the last news.
        curves: (update, value) by name.
    """

    name: str
    kind: Literal["run", "sweep"]
    state: State
    step: int = 0
    total: int | None = None
    epoch: int | None = None
    loss: float | None = None
    forget_loss: float | None = None
    retain_loss: float | None = None
    forgotten: float | None = None
    doing: str = ""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    seconds_per_update: float | None = None
    seconds_left: float | None = None
    age: float = 0.0
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)


def runs_in(folder: Path) -> list[Path]:
    """The run in a folder, or those in its subfolders: several requests, or a pair that `train` makes, of which the one
    that begins later too."""
    owner = owner_of(folder)
    if owner is not None and owner.get("kind") == SEVERAL_REQUESTS:
        return request_folders(folder) or [folder]
    if owner is not None:
        return [folder]
    return [*runs_within(folder), *([folder / RETAIN_ONLY] if _begins_later(folder / RETAIN_ONLY) else [])]


def _begins_later(folder: Path) -> bool:
    """Whether a folder is that of the second run of a pair, of which there is only the first so far."""
    first = owner_of(folder.parent / ORIGINAL)
    if owner_of(folder) is not None or folder.name != RETAIN_ONLY or first is None:
        return False
    is_pair = {path.name for path in folder.parent.iterdir()} <= {ORIGINAL, RETAIN_ONLY, LOCK}
    return is_pair and first.get("kind") == TRAINING_RUN


def check_run(folder: Path) -> None:
    """Refuse a folder that holds no run.

    Raises:
        UserError: one line.
    """
    if not runs_in(folder):
        raise UserError(f"{shown(folder)} holds no run: expected the --out of train, unlearn or sweep")


def look_all(folders: Iterable[Path]) -> list[Seen]:
    """How far all runs in these folders are; a folder that has been removed meanwhile is a run that was stopped."""
    return [look(run) for folder in folders for run in runs_in(folder) or [folder]]


def look(folder: Path) -> Seen:
    """How far the run in a folder is."""
    spec = owner_of(folder) or {}
    kind: Literal["run", "sweep"] = "sweep" if "base" in spec else "run"
    record = folder / f"{kind}.json"
    progress = read_progress(folder)
    state: State = "stopped"
    if record.is_file():
        state = "finished"
    elif is_held(folder / LOCK):
        state = "running"
    elif progress is not None and progress.failed:
        state = "failed"
    elif _begins_later(folder):
        return Seen(shown(folder), kind, "waiting", age=_age(folder, record))
    if kind == "sweep":
        done = progress.step if progress else 0
        total = progress.total if progress else None
        if state == "finished":
            done = total = pq.read_metadata(folder / "trials.parquet").num_rows
        return Seen(shown(folder), kind, state, done, total, age=_age(folder, record))
    steps, epochs = (_rows(folder / f"{name}.parquet") for name in TABLES)
    last, row = (rows[-1] if rows else {} for rows in (steps, epochs))
    step = max(progress.step if progress else 0, last.get("step", 0))
    total = progress.total if progress else None
    if state == "finished":
        step = total = read_json(record, dict[str, Any], "the record of a run")["updates"]
    learns = spec.get("kind") == TRAINING_RUN
    recent = [each["seconds"] for each in steps[-RECENT:]]
    newest = progress if progress and progress.loss is not None else None
    doing = ""
    if progress and state in ("running", "failed"):
        doing = progress.failed or str(Meter(progress.phase, progress.done, progress.of))
    return Seen(
        shown(folder),
        kind,
        state,
        step,
        total,
        newest.epoch if newest else last.get("epoch"),
        newest.loss if newest else last.get("loss"),
        None if learns else newest.forget_loss if newest else last.get("forget_loss"),
        None if learns else newest.retain_loss if newest else last.get("retain_loss"),
        None if learns else progress.forgotten if newest and progress else row.get("forgotten"),
        doing,
        {name: each[name] for each in epochs for name in (TRAINED_MA, *EVALUATED) if each.get(name) is not None},
        sum(recent) / len(recent) if recent else None,
        progress.seconds_left if progress and state == "running" else None,
        _age(folder, record),
        {
            name: curve
            for name, (table, column) in (TRAINING_CURVES if learns else CURVES).items()
            if (curve := _curve(steps if table == "steps" else epochs, column))
        },
    )


def _curve(rows: Sequence[Mapping[str, Any]], column: str) -> list[tuple[int, float]]:
    return [(row["step"], row[column]) for row in rows if row.get(column) is not None]


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table that may be a file, a folder of parts, or on its way from the one to the other."""
    for _ in range(3):
        try:
            rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
            return rows
        except (OSError, pa.ArrowInvalid):
            time.sleep(0.05)
    return []


def _age(folder: Path, record: Path) -> float:
    """Seconds since the last news."""
    news = [folder / PROGRESS, record, folder / LOCK, *folder.glob("*.parquet/part-*"), *folder.glob("*.parquet")]
    times = []
    for path in news:
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(0.0, time.time() - max(times, default=time.time()))
