"""`mrd-bench benchmark sweep`: what Ray Tune adds to a trial, with warm workers and with a new one each, in one run.

The trials are short, a few updates on a few samples, and run one at a time. Overhead is the time from one result to the
next less the seconds that the trial itself took: choosing it, handing it to a worker, starting that worker where it is
not warm, and keeping the result. The first trial of a sweep, which starts Ray's actors, is told apart. Both kinds take
turns, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.jobs.resources import SweepResources
from bench.jobs.sweep import sweep
from bench.jobs.sweep_plan import SweepSpec
from bench.stats.estimates import Estimate, over_sets
from scoring.cluster import connect
from scoring.errors import UserError

TURNS = 2
FEWEST = 8  # trials in a turn: fewer give no interval
KINDS = {"warm": True, "cold": False}


def run_benchmark(model: str, data: str, split: str | None, trials: int, out: str | None) -> None:
    """Measure, print both and their ratio, and write the figures as JSON if asked to."""
    if trials < FEWEST:
        raise UserError(f"--trials {trials}: expected at least {FEWEST}")
    base: dict[str, Any] = {"model": model, "task": data, "algorithm": "GA", "max_steps": 2, "evaluate": False}
    base |= {"early_stopping": False, "check_every": 0} | ({"forget_split": split} if split else {})
    spec = SweepSpec(base=base, vary={"seed": list(range(trials))})
    connect()
    gaps: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    own: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for _ in range(TURNS):
        for kind, reuse in KINDS.items():
            with tempfile.TemporaryDirectory(prefix="mrd-bench-") as folder:
                finished, seconds = _times(spec, Path(folder), reuse)
            gaps[kind].append(np.diff(finished))
            own[kind].append(seconds[1:])
    figures = _figures({k: np.concatenate(v) for k, v in gaps.items()}, {k: np.concatenate(v) for k, v in own.items()})
    figures |= {"trials": trials, "turns": TURNS, "model": model}
    _print(figures)
    if out:
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")


def _times(spec: SweepSpec, folder: Path, reuse: bool) -> tuple[np.ndarray, np.ndarray]:
    """When each trial's result was there, in order, and the seconds that the trial itself took, both (N,)."""
    resources = dataclasses.replace(SweepResources(concurrent=1), reuse=reuse)
    result = sweep(spec, folder / "out", folder / "trials", resources, progress=False)
    if lost := next((row for row in result.trials.to_pylist() if row["status"] != "finished"), None):
        raise UserError(f"a trial ended as {lost['status']}: {lost['reason']}")
    seconds = dict(zip(result.trials["trial"].to_pylist(), result.trials["seconds"].to_pylist(), strict=True))
    files = sorted((folder / "trials").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return np.array([path.stat().st_mtime_ns / 1e9 for path in files]), np.array([seconds[path.stem] for path in files])


def _figures(gaps: dict[str, np.ndarray], own: dict[str, np.ndarray]) -> dict[str, Any]:
    overhead = {kind: gaps[kind] - own[kind] for kind in gaps}

    def estimated(statistic: Any, *values: np.ndarray) -> dict[str, float]:
        found: Estimate = over_sets(statistic, [len(each) for each in values])
        return asdict(found)

    return {
        "seconds_per_trial": {kind: float(each.mean()) for kind, each in gaps.items()},
        "overhead": {k: estimated(lambda rows, e=e: e[rows[0]].mean(-1), e) for k, e in overhead.items()},
        "largest_overhead": {kind: float(each.max()) for kind, each in overhead.items()},
        "gain": estimated(
            lambda rows: overhead["cold"][rows[1]].mean(-1) / overhead["warm"][rows[0]].mean(-1),
            overhead["warm"],
            overhead["cold"],
        ),
    }


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['turns']} sweeps of {figures['trials']} trials of each kind, one trial at a time")
    for kind, title in (("warm", "warm workers"), ("cold", "a new worker for each")):
        overhead = figures["overhead"][kind]
        print(
            f"{title:<24}{figures['seconds_per_trial'][kind]:>7.2f} s a trial, overhead {overhead['value']:.2f} s "
            f"[95 % CI {overhead['low']:.2f} to {overhead['high']:.2f}], at most "
            f"{figures['largest_overhead'][kind]:.2f} s"
        )
    gain = figures["gain"]
    print(f"ratio of the overheads: {gain['value']:.1f} [95 % CI {gain['low']:.1f} to {gain['high']:.1f}]")
