"""What is run, measured, stored and shown: tasks, metrics, experiments and their results.

import bench

evaluation = bench.evaluate(model, "authors", tokenizer=tokenizer)  # or names of models, as on the command line
trained = bench.train("authors", "data.jsonl", "models/mine", until={"ma": 0.99})
sweep = bench.sweep("sweep.yaml", "sweeps/ours")
bench.leaderboard("results/store", "board")
results = bench.read_results("results/store")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.boards.write import leaderboard
    from bench.jobs.attack import AttackResult, attack
    from bench.jobs.evaluate import EvaluationResult, evaluate
    from bench.jobs.resources import Resources, SweepResources
    from bench.jobs.sweep import sweep
    from bench.jobs.sweep_tables import SweepResult
    from bench.jobs.train import TrainResult, train
    from bench.results.frames import ResultFrames, read_results
    from scoring.errors import UserError

__all__ = [
    "AttackResult",
    "EvaluationResult",
    "Resources",
    "ResultFrames",
    "SweepResources",
    "SweepResult",
    "TrainResult",
    "UserError",
    "attack",
    "evaluate",
    "leaderboard",
    "read_results",
    "sweep",
    "train",
]

_HOMES = {
    "attack": "bench.jobs.attack",
    "AttackResult": "bench.jobs.attack",
    "evaluate": "bench.jobs.evaluate",
    "EvaluationResult": "bench.jobs.evaluate",
    "leaderboard": "bench.boards.write",
    "read_results": "bench.results.frames",
    "ResultFrames": "bench.results.frames",
    "Resources": "bench.jobs.resources",
    "SweepResources": "bench.jobs.resources",
    "sweep": "bench.jobs.sweep",
    "SweepResult": "bench.jobs.sweep_tables",
    "train": "bench.jobs.train",
    "TrainResult": "bench.jobs.train",
    "UserError": "scoring.errors",
}


def __getattr__(name: str) -> object:
    # Loaded when they are asked for: who imports one module of this package does not wait for all of them.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
