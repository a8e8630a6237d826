"""Sweeps: the cross of algorithms, selections, seeds and settings.

    spec -> plan -> trials whose result is not there yet, on Ray Tune or in this process -> tables

Every trial is a row, also one that failed or was stopped, with its spec. A trial is known by its hash: what this or
another sweep has finished is not done again, so the same command continues a sweep that was killed.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from algorithms.history import Progress
from algorithms.live import PROGRESS, write_progress
from bench.files.folders import OwnedFolder, check_folder
from bench.files.spec import spec_file
from bench.jobs.logs import Logging, SweepLogs
from bench.jobs.preview import DONE, NEW, Preview, SetSize
from bench.jobs.resources import SweepResources
from bench.jobs.run_folder import full_disks_said_plainly
from bench.jobs.search import Search
from bench.jobs.sweep_plan import SweepPlan, SweepSpec, configurations
from bench.jobs.sweep_tables import SweepResult, read_sweep, write_tables
from bench.jobs.trial import Trial, TrialContext, TrialStore, run_trial, shareable_weights
from bench.jobs.unlearn import corpus_of, datasets_of, room_of
from bench.models.find import find_model
from bench.report.words import size_of
from scoring.errors import UserError
from scoring.files import shown, work_folder
from scoring.progress import Bar
from scoring.settings import build, named

BYTES_RESULT = 300_000  # of a trial, on disk, for a selection of a few hundred samples


class _SweepFolder(OwnedFolder):
    KIND, RECORD = "sweep", "sweep.json"
    BEGUN = ("selections.parquet", "difficulty.parquet.parts", "forecast.parquet.parts")

    def reopen(self) -> None:
        """So that it is not finished."""
        (self._out / self.RECORD).unlink(missing_ok=True)

    def tidy(self) -> None:
        for name in (".tune", ".work", PROGRESS):
            path = self._out / name
            path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def sweep(
    spec: SweepSpec | Mapping[str, Any] | str | Path,
    out: str | Path,
    trials: str | Path | None = None,
    resources: SweepResources | None = None,
    progress: bool = True,
    retry_failed: bool = False,
    logging: Logging | None = None,
) -> SweepResult:
    """Run the trials of a sweep, and write its tables to `out`.

    Args:
        spec: what is swept; also as a mapping, or as a YAML file of one.
        out: the folder; the same call continues a sweep that was stopped.
        trials: the folder of results, shared with other sweeps; None: "trials" next to `out`.
        resources: how the trials are spread; None: on Ray, as many at once as fit.
        progress: show a bar.
        retry_failed: try again what an earlier start gave up: out of memory, dead workers, errors.
        logging: where trials are logged; None: nowhere.

    Returns:
        The tables of trials, epochs, samples and selections (Arrow), and the record of the sweep.

    Raises:
        UserError: one line; what an earlier start has finished is kept.
    """
    if isinstance(spec, str | Path):
        with spec_file(spec, {}, SweepSpec) as from_file:
            return sweep(from_file, out, trials, resources, progress, retry_failed, logging)
    if not isinstance(spec, SweepSpec | Mapping):
        raise UserError(f"spec is {spec!r}: expected bench.jobs.sweep_plan.SweepSpec, a mapping or a YAML file")
    if not isinstance(resources, SweepResources | None):
        raise UserError(f"resources is {resources!r}: expected bench.SweepResources, or None")
    resources, out = (resources or SweepResources()).checked(), Path(out).absolute()
    logging = logging or Logging()
    logging.check_logs()
    plan, store = _ready(spec, out, trials, resources)
    with _SweepFolder(out, plan.identity) as folder, full_disks_said_plainly(out):
        if retry_failed and store.local.is_dir():
            store.forget_failures()
            folder.reopen()
        if folder.is_finished():
            print(
                f"already done, nothing to do: {shown(out)} holds this sweep (spec {plan.identity['spec_hash']})",
                file=sys.stderr,
            )
            return read_sweep(out)
        started = time.perf_counter()
        plan.choose(resources)
        all_trials = configurations(plan)
        waiting = [trial for trial in all_trials if not store.find(trial.hash)]
        _check_room(plan, all_trials, waiting, store)
        if (finished := len(all_trials) - len(waiting)) and waiting:
            print(f"continuing: {finished} of {len(all_trials)} trials are finished", file=sys.stderr)
        logs = SweepLogs(logging, out)
        search = Search(plan) if plan.spec.search == "optuna" else None
        if resources.in_this_process:
            _run_here(plan, waiting, len(all_trials), store, resources, progress, logs)
        elif waiting or (search and search.left):
            from bench.jobs.sweep_on_tune import run_on_tune

            run_on_tune(plan, all_trials, waiting, search, store, resources, progress, logs)
        if search:
            all_trials = search.trials()
        for trial in all_trials:
            if found := store.find(trial.hash):
                logs.add(trial.hash, trial.title, found)
        result = write_tables(plan, all_trials, store, time.perf_counter() - started)
        folder.tidy()
    return result


def preview_sweep(
    spec: str | Path,
    out: str | Path,
    trials: str | Path | None = None,
    resources: SweepResources | None = None,
    logging: Logging | None = None,
) -> Preview:
    """What `sweep` would do with the same arguments; nothing is written in its folders.

    Selections by MRD are drawn as if all samples were equally difficult: there are as many.

    Raises:
        UserError: what `sweep` would refuse before it computes.
    """
    resources, out = (resources or SweepResources()).checked(), Path(out).absolute()
    (logging or Logging()).check_logs()
    with spec_file(spec, {}, SweepSpec) as from_file, work_folder() as work:
        plan, store = _ready(from_file, out, trials, resources)
        folder = _SweepFolder(out, plan.identity)
        folder.check()
        plan.choose_without_measuring(work)
        all_trials = configurations(plan)
        count = len(all_trials) or (plan.spec.trials or 0) * len(plan.selections)
        if folder.is_finished():
            state = DONE
        else:
            _check_room(plan, all_trials, all_trials, store)
            state = "would continue" if (out / "selections.parquet").is_file() else NEW
        forget, retain = datasets_of(plan.base, plan.model.tokenizer)
        corpus, rejected = corpus_of(plan.base, plan.model, forget, retain)
        of_sets = {"forget": corpus.forget, "retain": corpus.retain}
        sets = tuple(
            SetSize.of(name, samples, sum(left_out["set"] == name for left_out in rejected))
            for name, samples in of_sets.items()
            if samples
        )
        samples = [len(selection.ids) for selection in plan.selections.values()]
        counts = {"selections": len(samples), "samples of the largest selection": max(samples), "trials": count}
        # As it stands in the file: where the data are is part of a sweep's identity.
        return Preview(plan.base, plan.identity, state, plan.model, sets, counts, resources, vars(from_file))


def _ready(
    spec: SweepSpec | Mapping[str, Any], out: Path, trials: str | Path | None, resources: SweepResources
) -> tuple[SweepPlan, TrialStore]:
    """The plan of a sweep, checked, and where the results of its trials are."""
    if not isinstance(spec, SweepSpec):
        spec = build(SweepSpec, spec)
    plan = SweepPlan(spec.checked(), out)
    if resources.in_this_process:
        _check_in_this_process(plan)
    store = TrialStore(Path(trials).absolute() if trials else out.parent / "trials", out / "failed")
    check_folder("trials", store.shared)
    return plan, store


def _check_room(plan: SweepPlan, trials: Sequence[Trial], waiting: Sequence[Trial], store: TrialStore) -> None:
    """Refuse a sweep that the disk cannot hold, before it starts."""
    count = len(waiting) if trials else (plan.spec.trials or 0) * len(plan.selections)
    needed = count * BYTES_RESULT
    if plan.spec.keep_models and count:
        forget, retain = datasets_of(plan.base, plan.model.tokenizer)
        corpus, _ = corpus_of(plan.base, plan.model, forget, retain)
        needed += count * room_of(plan.base, plan.model, corpus).initial  # as large as the model that a trial ends with
    place = next(folder for folder in (store.shared, *store.shared.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{named('trials')} {shown(store.shared)}: {size_of(free)} free, and {count} trials need "
            f"{size_of(needed)}; free some, choose a folder on another disk"
            f"{', or leave out keep_models' if plan.spec.keep_models else ''}"
        )


def _check_in_this_process(plan: SweepPlan) -> None:
    """Refuse what only Ray can run."""
    for what, possible in (
        (f"{named('search')} {plan.spec.search}", plan.spec.search != "optuna"),
        (f"{named('scheduler')} {plan.spec.scheduler}", plan.spec.scheduler == "none"),
        (f"{named('base')}: workers {plan.base.workers}", plan.base.workers == 0),
    ):
        if not possible:
            raise UserError(f"{what} needs Ray, and {named('concurrent')} is 0: expected at least 1")


def _run_here(
    plan: SweepPlan,
    waiting: Sequence[Trial],
    total: int,
    store: TrialStore,
    resources: SweepResources,
    progress: bool,
    logs: SweepLogs,
) -> None:
    """Run the trials without a result one by one in this process.

    Args:
        total: trials of the sweep, with those that have one.
    """
    shared = TrialContext(
        {model.source: shareable_weights(model) for model in map(find_model, {trial.spec.model for trial in waiting})},
        plan.references,
        store,
        plan.out / ".work",
        resources.cpus_per_trial,
        resources.replicas().device(),
        plan.spec.keep_models,
    )
    threads = torch.get_num_threads()
    try:
        with Bar(f"sweep ({plan.subject})", total, "trial", progress, total - len(waiting)) as bar:
            bar.begin({trial.hash: 1.0 for trial in waiting})
            for number, trial in enumerate(waiting, start=total - len(waiting)):
                write_progress(plan.out, Progress(number, total))
                bar.say(trial.title)
                with bar.task(trial.hash):
                    result = run_trial(trial, shared)
                logs.add(trial.hash, trial.title, result)
                bar.finish(trial.hash)
    finally:
        torch.set_num_threads(threads)
