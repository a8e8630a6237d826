"""The trials of a sweep side by side, on Ray Tune: on warm workers, stopped early where a scheduler says so.

trials, or what a search proposes -> Ray Tune -> run_trial on a warm worker -> HASH.json
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from algorithms.history import Progress
from algorithms.live import write_progress
from bench.files.status import DIED, STOPPED
from bench.jobs.logs import SweepLogs
from bench.jobs.resources import SweepResources
from bench.jobs.search import OBJECTIVE, WORST, Search
from bench.jobs.sweep_plan import SweepPlan
from bench.jobs.trial import Result, Trial, TrialContext, TrialStore, run_trial, shareable_weights
from bench.models.find import find_model
from scoring.board import TELL_S, read_board, told_on
from scoring.cluster import Footprint, connect, how_many_fit
from scoring.errors import UserError
from scoring.plugins import load_plugins
from scoring.progress import Bar

# How often a trial whose worker dies is begun anew before its row says so.
MAX_DEATHS = 3


def run_on_tune(
    plan: SweepPlan,
    trials: Sequence[Trial],
    waiting: Sequence[Trial],
    search: Search | None,
    store: TrialStore,
    resources: SweepResources,
    progress: bool,
    logs: SweepLogs,
) -> None:
    """Run the trials that have no result yet, or the configurations that a search has left.

    Args:
        trials: all of the sweep.
        waiting: those of them without a result.
        search: None runs `waiting`.

    Raises:
        UserError: a trial fits on no node; Optuna is not installed.
    """
    connect()
    footprint = resources.footprint()
    has_workers = plan.base.workers > 0
    concurrent = resources.concurrent or (1 if has_workers else how_many_fit(footprint, "trial"))
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
    objective = None if plan.spec.scheduler == "none" else plan.spec.objective

    def fit(watch: _Watch, work: Any, space: dict[str, Any], search_by: dict[str, Any]) -> None:
        _fit(plan, watch, work, space, search_by, footprint, concurrent, resources.reuse)

    if search is not None:
        space = {name: _domain_of(values) for name, values in plan.spec.vary.items()}
        search_by = {"search_alg": search.algorithm(), "num_samples": search.left, "metric": OBJECTIVE, "mode": "max"}
        fit(
            _Configurations(plan.subject, search, progress),
            tune.with_parameters(_every_selection, plan=plan, shared=shared),
            space,
            search_by,
        )
        return
    # Tune begins a trial anew whose worker dies at work, and gives up one whose worker dies while it starts.
    for turn in range(MAX_DEATHS + 1):
        if not (left := [trial for trial in waiting if store.find(trial.hash) is None]):
            break
        fit(
            _Trials(plan.subject, store, left, len(trials), progress, logs, plan.out, is_last=turn == MAX_DEATHS),
            tune.with_parameters(_one_trial, trials=left, shared=shared, objective=objective),
            {"number": tune.grid_search(list(range(len(left))))},
            {"scheduler": _scheduler(plan)},
        )


def _fit(
    plan: SweepPlan,
    watch: _Watch,
    work: Any,
    space: dict[str, Any],
    search_by: dict[str, Any],
    footprint: Footprint,
    concurrent: int,
    reuse: bool,
) -> None:
    """Let Tune do the work with every point of a space, and tell `watch` how each ended."""
    # A trial with workers of its own takes no core here, where its workers may need them all; Tune wants it to take
    # something.
    bundles = [{"memory": 1.0}] if plan.base.workers > 0 else [{"CPU": footprint.cpus, "GPU": footprint.gpus}]
    storage = plan.out / ".tune"
    shutil.rmtree(storage, ignore_errors=True)
    with _environment(), watch:
        tune.Tuner(
            tune.with_resources(work, tune.PlacementGroupFactory(bundles)),
            param_space=space,
            tune_config=tune.TuneConfig(max_concurrent_trials=concurrent, reuse_actors=reuse, **search_by),
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
    """Within the context Ray Tune leaves writing results to us, and an interrupt ends the sweep."""
    variables = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the last report is not of an epoch
        "RAY_AIR_NEW_OUTPUT": "0",  # the new one is not silent at verbosity 0
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
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
        # Beyond the last epoch: a trial that gets there has finished, and is not stopped.
        max_t=(plan.base.epochs or 0) + 1,
        grace_period=plan.spec.grace_epochs,
        reduction_factor=plan.spec.reduction,
    )


def _domain_of(values: Any) -> Any:
    """What Tune draws a field from."""
    if isinstance(values, list):
        return tune.choice(values)
    kind, (low, high) = next(iter(values.items()))
    if kind == "integers":
        return tune.randint(int(low), int(high) + 1)
    return tune.uniform(low, high) if kind == "uniform" else tune.loguniform(low, high)


def _one_trial(config: dict[str, Any], trials: Sequence[Trial], shared: TrialContext, objective: str | None) -> None:
    """What a warm worker does with a trial: run it, and tell a scheduler what every epoch reached."""

    def report(row: Mapping[str, Any]) -> None:
        # Row 0 is the initial model.
        if objective and row["epoch"]:
            tune.report({"epoch": row["epoch"], objective: row[objective], "row": dict(row)})

    trial = trials[config["number"]]
    with told_on(trial.hash):
        result = run_trial(trial, shared, report)
    # Tune complains on the terminal about a trial that reports nothing.
    tune.report({"status": result["status"]})


def _every_selection(config: dict[str, Any], plan: SweepPlan, shared: TrialContext) -> None:
    """What a warm worker does with a configuration of an adaptive search: run it on every selection, so that the search
    compares configurations and not the samples they drew."""
    load_plugins(shared.plugins)
    try:
        trials = plan.trials(config)
    except UserError as error:
        # Values that do not go together: nothing that a search should come back to.
        tune.report({OBJECTIVE: WORST, "trials": 0, "reason": str(error)})
        return
    results = [run_trial(trial, shared) for trial in trials]
    reached = [result.get("values", {}).get(plan.spec.objective) for result in results]
    values = [value for value in reached if value is not None]
    mean = float(np.mean(values)) if len(values) == len(reached) else WORST
    tune.report({OBJECTIVE: mean, "trials": len(trials)})


class _Watch(tune.Callback):
    """The progress bar of a sweep."""

    def __init__(self, about: str, total: int, done: int, unit: str, shown: bool) -> None:
        self._bar = Bar(f"sweep ({about})", total, unit, shown, done)
        self._done, self._total = done, total
        self._looked = 0.0

    def __enter__(self) -> _Watch:
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def ended(self, out: Path) -> None:
        """One more is done, which whoever watches the sweep is told."""
        self._done += 1
        write_progress(out, Progress(self._done, self._total))

    def boards(self, trial: Any) -> dict[str, str]:
        """Of a trial under way: the keys of its tasks, and where they tell how far they are."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if self._bar.shown and time.monotonic() - self._looked > TELL_S:
            self._looked = time.monotonic()
            running = [trial for trial in trials if trial.status == "RUNNING"]
            self._bar.say(f"{len(running)} running")
            boards = {key: board for trial in running for key, board in self.boards(trial).items()}
            self._bar.told({key: read_board(board) for key, board in boards.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks, and never reads them again here

    def setup(self, *_: Any, **__: Any) -> None:
        pass


class _Trials(_Watch):
    """Keeps what only the driver knows: which trials were stopped, and whose worker died.

    Args:
        is_last: a trial whose worker died is not begun anew after this.
    """

    def __init__(
        self,
        about: str,
        store: TrialStore,
        waiting: Sequence[Trial],
        total: int,
        shown: bool,
        logs: SweepLogs,
        out: Path,
        is_last: bool = True,
    ) -> None:
        super().__init__(about, total, total - len(waiting), "trial", shown)
        self._bar.begin({trial.hash: 1.0 for trial in waiting})
        self._store, self._waiting, self._logs, self._is_last = store, waiting, logs, is_last
        self._out = out
        self._rows: dict[str, list[dict[str, Any]]] = {}

    def boards(self, trial: Any) -> dict[str, str]:
        key = self._waiting[trial.config["number"]].hash
        return {key: key}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "row" in result:
            self._rows.setdefault(trial.trial_id, []).append(result["row"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._ended(trial, STOPPED, "behind the others after epoch {epoch}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if not self._is_last and trial.run_metadata.num_failures <= MAX_DEATHS:
            return  # its worker died while it started: the trial is begun anew
        self._ended(
            trial, DIED, f"its worker died {MAX_DEATHS + 1} times; out of memory? Give it more, or fewer at once"
        )

    def _ended(self, tuned: Any, status: str, reason: str) -> None:
        result: Result | None
        trial = self._waiting[tuned.config["number"]]
        if self._store.find(trial.hash) is None:
            epochs = self._rows.get(tuned.trial_id, [])
            result = {"spec": trial.identity, "status": status, "epochs": epochs, "seconds": None}
            if epochs:
                result |= {"values": epochs[-1], "updates": epochs[-1]["step"]}
            result["reason"] = reason.format(epoch=epochs[-1]["epoch"] if epochs else 0)
            self._store.write(trial.hash, result)
        if result := self._store.find(trial.hash):
            self._logs.add(trial.hash, trial.title, result)
        self._bar.finish(trial.hash)
        self.ended(self._out)


class _Configurations(_Watch):
    """Keeps what an adaptive search has tried."""

    def __init__(self, about: str, search: Search, shown: bool) -> None:
        super().__init__(about, search.total, search.total - search.left, "configuration", shown)
        self._search = search

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._search.add(trial.config, trial.last_result[OBJECTIVE], trial.last_result.get("reason"))
        self._bar.at(self._search.total - self._search.left)
        self.ended(self._search.folder)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._search.add(trial.config, WORST, f"its worker died {MAX_DEATHS + 1} times")
        self._bar.at(self._search.total - self._search.left)
        self.ended(self._search.folder)
