"""`mrd-bench benchmark sweep`: what Ray Tune adds to a trial, with warm workers and with a new one each, in one run.

The trials are short, a few updates on a few samples, and run one at a time. Overhead is the time from one result to the
next less the seconds of the trial itself: choosing it, handing it to a worker, starting that worker if it is not warm,
and keeping the result. The first trial of a sweep, which starts Ray's actors, does not count. Both kinds take turns, so
that whatever else the machine does falls on both.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.jobs.resources import SweepResources
from bench.jobs.sweep import sweep
from bench.jobs.sweep_plan import SweepSpec
from bench.speed.figures import interval, require_at_least, write_figures
from bench.stats.estimates import Estimate, over_sets
from scoring.cluster import connect
from scoring.errors import UserError

TURNS = 2
FEWEST = 8  # trials in a turn: fewer give no interval
# Kind of worker -> whether it is used again.
KINDS = {"warm": True, "cold": False}


def run_benchmark(model: str, data: str, split: str | None, trials: int, out: str | None) -> None:
    """Measure, print both and their ratio, and write the figures as JSON if asked to.

    Args:
        model: embedded one, folder or Hugging Face id.
        data: a task or a data file.
        split: of a task.
        trials: in each sweep.
        out: JSON file.
    """
    require_at_least(FEWEST, trials=trials)
    base: dict[str, Any] = {"model": model, "task": data, "algorithm": "GA", "max_steps": 2, "evaluate": False}
    base |= {"early_stopping": False, "check_every": 0} | ({"forget_split": split} if split else {})
    spec = SweepSpec(base=base, vary={"seed": list(range(trials))})
    connect()
    gaps: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    trial_seconds: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for _ in range(TURNS):
        for kind, reuse in KINDS.items():
            with tempfile.TemporaryDirectory(prefix="mrd-bench-") as folder:
                finished, seconds = _times(spec, Path(folder), reuse)
            gaps[kind].append(np.diff(finished))
            trial_seconds[kind].append(seconds[1:])
    figures = summary(
        {kind: np.concatenate(turns) for kind, turns in gaps.items()},
        {kind: np.concatenate(turns) for kind, turns in trial_seconds.items()},
    )
    figures |= {"trials": trials, "turns": TURNS, "model": model}
    print_summary(figures)
    write_figures(figures, out)


def _times(spec: SweepSpec, folder: Path, reuse: bool) -> tuple[np.ndarray, np.ndarray]:
    """When each trial's result was written, in order, and the seconds that the trial itself took, both (N,)."""
    resources = dataclasses.replace(SweepResources(concurrent=1), reuse=reuse)
    result = sweep(spec, folder / "out", folder / "trials", resources, progress=False)
    if lost := next((row for row in result.trials.to_pylist() if row["status"] != "finished"), None):
        raise UserError(f"a trial ended as {lost['status']}: {lost['reason']}")
    seconds = dict(zip(result.trials["trial"].to_pylist(), result.trials["seconds"].to_pylist(), strict=True))
    files = sorted((folder / "trials").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return np.array([path.stat().st_mtime_ns / 1e9 for path in files]), np.array([seconds[path.stem] for path in files])


def summary(gaps: dict[str, np.ndarray], trial_seconds: dict[str, np.ndarray]) -> dict[str, Any]:
    """Overheads of both kinds with intervals, and their ratio.

    Args:
        gaps: seconds from one result to the next, of each kind.
        trial_seconds: of the trials themselves.
    """
    overhead = {kind: gaps[kind] - trial_seconds[kind] for kind in gaps}
    warm, cold = overhead["warm"], overhead["cold"]
    gain = over_sets(lambda rows: cold[rows[1]].mean(-1) / warm[rows[0]].mean(-1), [len(warm), len(cold)])
    return {
        "seconds_per_trial": {kind: float(seconds.mean()) for kind, seconds in gaps.items()},
        "overhead": {kind: asdict(_mean(seconds)) for kind, seconds in overhead.items()},
        "largest_overhead": {kind: float(seconds.max()) for kind, seconds in overhead.items()},
        "gain": asdict(gain),
    }


def _mean(values: np.ndarray) -> Estimate:
    return over_sets(lambda rows: values[rows[0]].mean(-1), [len(values)])


def print_summary(figures: dict[str, Any]) -> None:
    """Print the figures of `summary`."""
    print(f"{figures['turns']} sweeps of {figures['trials']} trials of each kind, one trial at a time")
    for kind, title in (("warm", "warm workers"), ("cold", "a new worker for each")):
        overhead = figures["overhead"][kind]
        print(
            f"{title:<24}{figures['seconds_per_trial'][kind]:>7.2f} s a trial, overhead {overhead['value']:.2f} s "
            f"{interval(overhead, '.2f')}, at most {figures['largest_overhead'][kind]:.2f} s"
        )
    print(f"ratio of the overheads: {figures['gain']['value']:.1f} {interval(figures['gain'], '.1f')}")
