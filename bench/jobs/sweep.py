"""Sweeps: the cross of algorithms, selections, seeds and settings, on Ray Tune.

    spec -> plan -> trials whose result is not there yet, on warm workers -> tables

Every trial is a row, also one that failed or was stopped, with its spec. A trial is known by its hash: what this or
another sweep has finished is not done again, so the same command continues a sweep that was killed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from tqdm import tqdm

from bench.files.folders import OwnedFolder
from bench.files.origin import origin
from bench.files.spec import spec_file
from bench.files.status import DIED, STOPPED
from bench.jobs.resources import SweepResources
from bench.jobs.run_folder import full_disks_said_plainly
from bench.jobs.sweep_plan import SweepPlan, SweepSpec, configurations
from bench.jobs.trial import Result, Trial, TrialContext, TrialStore, run_trial, shareable_weights
from bench.jobs.unlearn import UnlearnSpec, corpus_of, datasets_of, room_of
from bench.models.find import find_model
from bench.report.words import size_of
from bench.tasks.selections import mean_log_mrd
from scoring.cluster import connect, how_many_fit
from scoring.errors import UserError
from scoring.files import replacing, shown
from scoring.settings import build, named

# How often a trial whose worker dies is begun anew before its row says so.
MAX_DEATHS = 2
BYTES_RESULT = 300_000  # of a trial, on disk, for a selection of a few hundred samples
TABLES = ("trials", "epochs", "samples")
# What an adaptive search maximises, and what a configuration is given that has no value: all that have are shares.
OBJECTIVE, WORST = "objective", -1.0


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gives back.

    Attributes:
        folder: with the tables, selections.parquet and sweep.json.
        trials: one row a trial: hash, status, reason, selection and its difficulty, the fields of its spec, and what it
            ended with.
        epochs: one row an epoch of a trial; row 0 is the initial model.
        samples: one row a forget sample of a trial.
        record: what a reader must know: spec, counts, seconds, packages.
    """

    folder: Path
    trials: pa.Table
    epochs: pa.Table
    samples: pa.Table
    record: dict[str, Any]


class _SweepFolder(OwnedFolder):
    WHAT, BEGUN, RECORD = "sweep", ("selections.parquet", "difficulty.parquet.parts"), "sweep.json"

    def reopen(self) -> None:
        """So that it is not finished."""
        (self._out / self.RECORD).unlink(missing_ok=True)

    def tidy(self) -> None:
        for name in (".tune", ".work"):
            shutil.rmtree(self._out / name, ignore_errors=True)


def sweep(
    spec: SweepSpec | Mapping[str, Any] | str | Path,
    out: str | Path,
    trials: str | Path | None = None,
    resources: SweepResources | None = None,
    progress: bool = True,
    retry_failed: bool = False,
) -> SweepResult:
    """Run the trials of a sweep, and write its tables to `out`.

    Args:
        spec: what is swept; also as a mapping, or as a YAML file of one.
        out: the folder; the same call continues a sweep that was stopped.
        trials: the folder of results, shared with other sweeps; None: "trials" next to `out`.
        retry_failed: try again what an earlier start gave up: out of memory, dead workers, errors.

    Raises:
        UserError: one line; what an earlier start has finished is kept.
    """
    if isinstance(spec, str | Path):
        with spec_file(spec, {}, SweepSpec) as from_file:
            return sweep(from_file, out, trials, resources, progress, retry_failed)
    if not isinstance(spec, SweepSpec):
        spec = build(SweepSpec, spec)
    spec, resources, out = spec.checked(), (resources or SweepResources()).checked(), Path(out).absolute()
    plan = SweepPlan(spec, out)
    store = TrialStore(Path(trials).absolute() if trials else out.parent / "trials", out / "failed")
    with _SweepFolder(out, plan.identity) as folder, full_disks_said_plainly(out):
        if retry_failed and store.own.is_dir():
            store.forget_failures()
            folder.reopen()
        if folder.is_finished():
            tqdm.write(f"{shown(out)} holds this sweep already (spec {plan.identity['spec_hash']})")
            return read_sweep(out)
        started = time.perf_counter()
        plan.choose(resources)
        wanted = configurations(plan)
        waiting = [trial for trial in wanted if not store.find(trial.hash)]
        _check_room(plan, wanted, waiting, store)
        search = _Search(plan) if spec.search == "optuna" else None
        if waiting or (search and search.left):
            _run(plan, wanted, waiting, search, store, resources, progress)
        if search:
            wanted = search.trials()
        result = _write(plan, wanted, store, time.perf_counter() - started)
        folder.tidy()
    return result


def _check_room(plan: SweepPlan, trials: Sequence[Trial], waiting: Sequence[Trial], store: TrialStore) -> None:
    """Refuse a sweep that the disk cannot hold, before it starts."""
    count = len(waiting) if trials else (plan.spec.trials or 0) * len(plan.selections)
    needed = count * BYTES_RESULT
    if plan.spec.keep_models and count:
        forget, retain = datasets_of(plan.base, plan.model.tokenizer)
        corpus, _ = corpus_of(plan.base, plan.model, forget, retain)
        checkpoint, _ = room_of(dataclasses.replace(plan.base, lora_rank=1), plan.model, corpus)
        needed += count * checkpoint
    place = next(folder for folder in (store.shared, *store.shared.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{named('trials')} {shown(store.shared)}: {size_of(free)} free, and {count} trials need "
            f"{size_of(needed)}; free some, choose a folder on another disk"
            f"{', or leave out keep_models' if plan.spec.keep_models else ''}"
        )


# --- Ray Tune -----------------------------------------------------------------------------------------------


def _run(
    plan: SweepPlan,
    wanted: Sequence[Trial],
    waiting: Sequence[Trial],
    search: _Search | None,
    store: TrialStore,
    resources: SweepResources,
    progress: bool,
) -> None:
    """Run the trials that wait, or the configurations that a search has left."""
    connect()
    footprint = resources.footprint()
    own_workers = plan.base.workers > 0
    at_once = resources.concurrent or (1 if own_workers else how_many_fit(footprint, "trial"))
    models = [find_model(name) for name in {trial.spec.model for trial in waiting} or {plan.base.model}]
    shared = TrialContext(
        # Put once; Ray keeps one copy a node, and its processes read it where it is.
        {model.source: ray.put(shareable_weights(model)) for model in models},
        plan.references,
        store,
        plan.out / ".work",
        footprint.cpus,
        "cuda" if footprint.gpus else "cpu",
        plan.spec.keep_models,
    )
    compared = None if plan.spec.scheduler == "none" else plan.spec.objective
    if search is None:
        watch: _Watch = _Trials(shared.store, waiting, len(wanted), progress)
        work = tune.with_parameters(_one_trial, trials=list(waiting), shared=shared, objective=compared)
        space: dict[str, Any] = {"number": tune.grid_search(list(range(len(waiting))))}
        how: dict[str, Any] = {"scheduler": _scheduler(plan)}
    else:
        watch = _Configurations(search, progress)
        work = tune.with_parameters(_every_selection, plan=plan, shared=shared)
        space = {name: _domain(values) for name, values in plan.spec.vary.items()}
        how = {"search_alg": search.algorithm(), "num_samples": search.left, "metric": OBJECTIVE, "mode": "max"}
    # A trial with workers of its own takes no core here, where its workers may need them all; Tune wants it to take
    # something.
    asks = [{"memory": 1.0}] if own_workers else [{"CPU": footprint.cpus, "GPU": footprint.gpus}]
    storage = plan.out / ".tune"
    shutil.rmtree(storage, ignore_errors=True)
    with _environment(), watch:
        tune.Tuner(
            tune.with_resources(work, tune.PlacementGroupFactory(asks)),
            param_space=space,
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=resources.reuse, **how),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(storage),
                failure_config=tune.FailureConfig(max_failures=MAX_DEATHS),
                callbacks=[watch],
                verbose=0,
            ),
        ).fit()
    shutil.rmtree(storage, ignore_errors=True)


@contextmanager
def _environment() -> Iterator[None]:
    """What Ray Tune reads from there: results are ours to write, and an interrupt ends the sweep."""
    own = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the last report is not of an epoch
        "RAY_AIR_NEW_OUTPUT": "0",  # the new one is not silent at verbosity 0
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # a trial that died is a row
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _scheduler(plan: SweepPlan) -> ASHAScheduler | None:
    if plan.spec.scheduler == "none":
        return None
    return ASHAScheduler(
        time_attr="epoch",
        metric=plan.spec.objective,
        mode="max",
        # Beyond the last epoch: who gets there has finished, and is not stopped.
        max_t=(plan.base.epochs or 0) + 1,
        grace_period=plan.spec.grace_epochs,
        reduction_factor=plan.spec.reduction,
    )


def _one_trial(config: dict[str, Any], trials: Sequence[Trial], shared: TrialContext, objective: str | None) -> None:
    """What a warm worker does with a trial: run it, and tell a scheduler what every epoch reached."""

    def report(row: Mapping[str, Any]) -> None:
        # Row 0 is the initial model.
        if objective and row["epoch"]:
            tune.report({"epoch": row["epoch"], objective: row[objective], "row": dict(row)})

    result = run_trial(trials[config["number"]], shared, report)
    # Of a trial that reports nothing, Tune speaks on the terminal.
    tune.report({"status": result["status"]})


def _every_selection(config: dict[str, Any], plan: SweepPlan, shared: TrialContext) -> None:
    """What a warm worker does with a configuration of an adaptive search: run it on every selection, so that the search
    compares configurations and not the samples they drew."""
    try:
        trials = plan.trials(config)
    except UserError as error:
        # Values that do not go together: nothing that a search should come back to.
        tune.report({OBJECTIVE: WORST, "trials": 0, "reason": str(error)})
        return
    results = [run_trial(trial, shared) for trial in trials]
    found = [result.get("values", {}).get(plan.spec.objective) for result in results]
    values = [value for value in found if value is not None]
    tune.report({OBJECTIVE: float(np.mean(values)) if len(values) == len(found) else WORST, "trials": len(trials)})


class _Watch(tune.Callback):
    """The progress bar of a sweep."""

    def __init__(self, total: int, done: int, unit: str, shown: bool) -> None:
        self._bar: Any = tqdm(total=total, initial=done, unit=unit, desc="sweep", disable=not shown)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves what it was given, and never reads it again here

    def setup(self, *_: Any, **__: Any) -> None:
        pass


class _Trials(_Watch):
    """Keeps what only the driver knows: which trials were stopped, and whose worker died."""

    def __init__(self, store: TrialStore, waiting: Sequence[Trial], total: int, shown: bool) -> None:
        super().__init__(total, total - len(waiting), "trial", shown)
        self._store, self._waiting = store, waiting
        self._rows: dict[str, list[dict[str, Any]]] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "row" in result:
            self._rows.setdefault(trial.trial_id, []).append(result["row"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._ended(trial, STOPPED, "behind the others after epoch {epoch}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._ended(
            trial, DIED, f"its worker died {MAX_DEATHS + 1} times; out of memory? Give it more, or fewer at once"
        )

    def _ended(self, tuned: Any, status: str, reason: str) -> None:
        trial = self._waiting[tuned.config["number"]]
        if self._store.find(trial.hash) is None:
            own = self._rows.get(tuned.trial_id, [])
            result: Result = {"spec": trial.identity, "status": status, "epochs": own, "seconds": None}
            if own:
                result |= {"values": own[-1], "updates": own[-1]["step"]}
            result["reason"] = reason.format(epoch=own[-1]["epoch"] if own else 0)
            self._store.write(trial.hash, result)
        self._bar.update()


class _Configurations(_Watch):
    """Keeps what an adaptive search has tried."""

    def __init__(self, search: _Search, shown: bool) -> None:
        super().__init__(search.total, search.total - search.left, "configuration", shown)
        self._search = search

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._search.add(trial.config, trial.last_result[OBJECTIVE], trial.last_result.get("reason"))
        self._bar.update()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._search.add(trial.config, WORST, f"its worker died {MAX_DEATHS + 1} times")
        self._bar.update()


class _Search:
    """An adaptive search that is continued where it was stopped: what was tried is kept next to the tables.

    Attributes:
        total: configurations that are wanted.
    """

    def __init__(self, plan: SweepPlan) -> None:
        self._plan, self._path = plan, plan.out / "search.json"
        self.total = plan.spec.trials or 0
        self._tried: list[dict[str, Any]] = json.loads(self._path.read_text()) if self._path.is_file() else []

    @property
    def left(self) -> int:
        return self.total - len(self._tried)

    def add(self, values: Mapping[str, Any], objective: float, reason: str | None) -> None:
        self._tried.append({"values": dict(values), OBJECTIVE: objective, "reason": reason})
        with replacing(self._path) as unfinished:
            unfinished.write_text(json.dumps(self._tried, indent=2) + "\n")

    def algorithm(self) -> Any:
        """The search, knowing what was tried.

        Raises:
            UserError: Optuna is not installed.
        """
        try:
            import optuna
        except ImportError:
            raise UserError("search optuna needs the package optuna: pip install 'mrd-bench[optuna]'") from None
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        points = [each["values"] for each in self._tried]
        return OptunaSearch(
            # Begun again with the same seed, it would draw the same first points.
            seed=self._plan.spec.seed + 1000 * len(points),
            points_to_evaluate=points or None,
            evaluated_rewards=[each[OBJECTIVE] for each in self._tried] or None,
        )

    def trials(self) -> list[Trial]:
        """Of all configurations that go together, in the order in which they were tried."""
        found = [t for each in self._tried if not each["reason"] for t in self._plan.trials(each["values"])]
        return list({trial.hash: trial for trial in found}.values())


def _domain(values: Any) -> Any:
    """What Tune draws a field from."""
    if isinstance(values, list):
        return tune.choice(values)
    kind, (low, high) = next(iter(values.items()))
    if kind == "integers":
        return tune.randint(int(low), int(high) + 1)
    return tune.uniform(low, high) if kind == "uniform" else tune.loguniform(low, high)


# --- Tables -------------------------------------------------------------------------------------------------


def _write(plan: SweepPlan, wanted: Sequence[Trial], store: TrialStore, seconds: float) -> SweepResult:
    """Put the results of all trials into tables; sweep.json comes last and says that all is there."""
    results = [(trial, store.find(trial.hash) or _lost(trial)) for trial in wanted]
    tables = {
        "trials": [_row(plan, trial, result) for trial, result in results],
        "epochs": [{"trial": trial.hash, **row} for trial, result in results for row in result.get("epochs", [])],
        "samples": [{"trial": trial.hash, **row} for trial, result in results for row in result.get("samples", [])],
    }
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


# Fields of a trial's spec that are columns of its row: all but where its selection is, and how it is run.
_SPEC_COLUMNS = tuple(
    each.name for each in dataclasses.fields(UnlearnSpec) if each.name not in (*UnlearnSpec.EXECUTION, "selection")
)


def _row(plan: SweepPlan, trial: Trial, result: Result) -> dict[str, Any]:
    selection = plan.selections[trial.selection]
    spec = {name: getattr(trial.spec, name) for name in _SPEC_COLUMNS}
    # Of several types: a number of draws may be "auto".
    spec |= {"settings": json.dumps(spec["settings"], sort_keys=True), "draws": str(spec["draws"])}
    return {
        "trial": trial.hash,
        "status": result["status"],
        "reason": result["reason"],
        "selection": selection.name,
        "kind": selection.kind,
        "level": selection.level,
        "forget_samples": len(selection.ids),
        "mean_log_mrd": mean_log_mrd(selection, plan.mrd) if plan.mrd else None,
        **spec,
        "updates": result.get("updates"),
        "seconds": result["seconds"],
        **_origin(trial, result),
        **{name: value for name, value in result.get("values", {}).items() if name not in spec},
    }


def _origin(trial: Trial, result: Result) -> dict[str, str | None]:
    """What the row is of and from, see `bench.files.origin`; a trial that an earlier version ran does not say."""
    found = result.get("origin", {})
    return {
        # Where the ids lie is this machine's own affair; the hash of the samples is in there.
        "identity": json.dumps({**trial.identity, "selection": trial.selection}, sort_keys=True),
        "packages": json.dumps(found["packages"]) if "packages" in found else None,
        "hardware": found.get("hardware"),
        "git_commit": found.get("git_commit"),
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
    try:
        record = json.loads((folder / "sweep.json").read_text())
        trials, epochs, samples = (pq.read_table(folder / f"{name}.parquet") for name in TABLES)
    except (OSError, json.JSONDecodeError, pa.ArrowException) as error:
        raise UserError(f"{folder}: no finished sweep; expected what `mrd-bench sweep` writes") from error
    return SweepResult(folder, trials, epochs, samples, record)
