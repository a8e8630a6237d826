"""The tables of a sweep, written when all its trials have ended."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from bench.files.folders import Hashed
from bench.files.origin import origin
from bench.files.status import DIED
from bench.jobs.sweep_plan import SweepPlan
from bench.jobs.trial import Result, Trial, TrialStore
from bench.jobs.unlearn import UnlearnSpec
from bench.tasks.selections import mean_log_flip_time, mean_log_mrd
from scoring.errors import UserError
from scoring.files import replacing
from scoring.reading import read_json, read_parquet
from scoring.templates import TEMPLATE_FIELDS

# The tables, with columns that every reader may rely on; a table of no rows has no columns.
TABLES = {
    "trials": pa.schema(
        [pa.field(name, pa.string(), nullable=False) for name in ("trial", "status", "selection", "algorithm", "task")]
        + [("reason", pa.string()), ("kind", pa.string()), ("level", pa.string())]
        + [pa.field(name, pa.int64(), nullable=False) for name in ("forget_samples", "seed")]
        + [("mean_log_mrd", pa.float64()), ("seconds", pa.float64()), ("updates", pa.int64())]
    ),
    "epochs": None,
    "samples": None,
}
# Written where trials were attacked.
ATTACKS = "attacks"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gives back.

    Attributes:
        folder: with the tables, selections.parquet and sweep.json.
        trials: one row a trial: hash, status, reason, selection and its difficulty, its arm where there are arms, the
            fields of its spec, and what it ended with.
        epochs: one row an epoch of a trial; row 0 is the initial model.
        samples: one row a forget sample of a trial.
        record: what a reader must know: spec, counts, seconds, packages.
        attacks: one row for each forget sample of a trial under each attack, after so many updates; None: there were
            none.
    """

    folder: Path
    trials: pa.Table
    epochs: pa.Table
    samples: pa.Table
    record: dict[str, Any]
    attacks: pa.Table | None = None


def write_tables(plan: SweepPlan, trials: Sequence[Trial], store: TrialStore, seconds: float) -> SweepResult:
    """Put the results of all trials into tables; sweep.json comes last and says that all is there."""
    results = [(trial, store.find(trial.hash) or _lost(trial)) for trial in trials]
    tables = {
        "trials": [_row(plan, trial, result) for trial, result in results],
        "epochs": [{"trial": trial.hash, **row} for trial, result in results for row in result.get("epochs", [])],
        "samples": [{"trial": trial.hash, **row} for trial, result in results for row in result.get("samples", [])],
    }
    if plan.attack is not None:
        tables[ATTACKS] = [
            {"trial": trial.hash, **row} for trial, result in results for row in result.get("attacks", [])
        ]
    for name, rows in tables.items():
        with replacing(plan.out / f"{name}.parquet") as unfinished:
            pq.write_table(as_table(rows), unfinished)
    record = {
        "spec": plan.identity,
        "model": plan.base.model,
        "counts": Counter(result["status"] for _, result in results),
        "seconds": seconds,
        **origin(),
    }
    with replacing(plan.out / "sweep.json") as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
    return read_sweep(plan.out)


def _lost(trial: Trial) -> Result:
    return {"spec": trial.identity, "status": DIED, "reason": "its result was not written", "seconds": None}


# Fields of a trial's spec that are columns of its row: all but where its selection is, what all trials share, and how
# it is run.
_SPEC_COLUMNS = tuple(
    field.name
    for field in dataclasses.fields(UnlearnSpec)
    if field.name not in (*UnlearnSpec.EXECUTION, *TEMPLATE_FIELDS, "selection", "requests")
)


def _row(plan: SweepPlan, trial: Trial, result: Result) -> dict[str, Any]:
    selection = plan.selections[trial.selection]
    spec = {name: getattr(trial.spec, name) for name in _SPEC_COLUMNS}
    # Of several types: a number of draws may be "auto".
    spec |= {"settings": json.dumps(spec["settings"], sort_keys=True), "draws": str(spec["draws"])}
    spec["schedule"] = spec["schedule"] and json.dumps(spec["schedule"], sort_keys=True)
    return {
        "trial": trial.hash,
        "status": result["status"],
        "reason": result["reason"],
        "selection": selection.name,
        "kind": selection.kind,
        "level": selection.level,
        "forget_samples": len(selection.ids),
        "mean_log_mrd": mean_log_mrd(selection, plan.mrd) if plan.mrd else None,
        **({"mean_log_flip_time": mean_log_flip_time(selection, plan.flip_time)} if plan.flip_time else {}),
        **({"arm": plan.arms[trial.hash]} if plan.spec.arms else {}),
        **spec,
        "updates": result.get("updates"),
        "seconds": result["seconds"],
        **_origin(trial, result),
        **{name: value for name, value in result.get("values", {}).items() if name not in spec},
    }


def _origin(trial: Trial, result: Result) -> dict[str, str | None]:
    """The trial's identity, and where its result comes from (`bench.files.origin`); early versions did not say."""
    made_by = result.get("origin", {})
    return {
        # Where the file of ids lies concerns this machine alone; the hash of the samples is in the identity.
        "identity": json.dumps({**trial.identity, "selection": trial.selection}, sort_keys=True),
        "packages": json.dumps(made_by["packages"]) if "packages" in made_by else None,
        "hardware": made_by.get("hardware"),
        "git_commit": made_by.get("git_commit"),
    }


def as_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows that need not have the same columns; a column without any value is of numbers."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: pa.array([row.get(name) for row in rows]) for name in names}
    return pa.table(
        {
            name: pa.nulls(len(rows), pa.float64()) if pa.types.is_null(column.type) else column
            for name, column in columns.items()
        }
    )


def read_sweep(folder: str | Path) -> SweepResult:
    """A finished sweep.

    Raises:
        UserError: the folder holds none.
    """
    folder = Path(folder)
    expected = "what `mrd-bench sweep` writes"
    if not (folder / "sweep.json").is_file():
        raise UserError(f"{folder}: no finished sweep; expected {expected}")
    record = read_json(folder / "sweep.json", _Record, expected)
    trials, epochs, samples = (
        read_parquet(folder / f"{name}.parquet", expected, columns) for name, columns in TABLES.items()
    )
    path = folder / f"{ATTACKS}.parquet"
    attacks = read_parquet(path, expected, None) if path.is_file() else None
    return SweepResult(folder, trials, epochs, samples, record, attacks)


class _Spec(Hashed):
    vary: dict[str, Any]


class _Record(TypedDict):
    """What every reader of sweep.json may rely on."""

    spec: _Spec
    counts: dict[str, int]
    seconds: float
