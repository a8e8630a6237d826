"""How benchmarks measure, and how they put figures into words and files."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from bench.stats.estimates import Estimate
from scoring.errors import UserError
from scoring.memory import TensorMemory
from scoring.samples import Batch
from scoring.settings import named
from scoring.work import Pool, ReplicaTask

Name = TypeVar("Name", bound=Hashable)


# Of samples, draws, weights: more than any machine that a benchmark runs on can hold.
MOST = 1e15


def require_at_least(least: float, **settings: float) -> None:
    """Refuse settings below a bound, or that are no number of things at all.

    Raises:
        UserError: one line.
    """
    for name, value in settings.items():
        if not least <= value <= MOST:
            beyond = f" and at most {MOST:g}" if value > MOST else ""
            raise UserError(f"{named(name)} is {value:g}: expected at least {least:g}{beyond}")


# --- Measuring ----------------------------------------------------------------------------------------------


def now() -> float:
    """Seconds on a clock, when the GPU has done what it was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def processor_now() -> float:
    """Seconds that all threads of this process have computed, which the load of the machine hardly moves."""
    return time.process_time()


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = now) -> float:
    """Seconds that work takes, that of a GPU included unless another clock says otherwise."""
    started = clock()
    work()
    return clock() - started


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """The median of the seconds that work takes, after a first time that does not count."""
    work()
    return float(np.median([seconds_of(work) for _ in range(repeats)]))


def seconds_in_turns(
    works: Mapping[Name, Callable[[], object]], turns: int, clock: Callable[[], float] = now
) -> dict[Name, list[float]]:
    """Seconds of each work in every turn. The order changes from turn to turn, so that whatever else the machine does
    falls on all."""
    seconds: dict[Name, list[float]] = {name: [] for name in works}
    for turn in range(turns):
        for name in list(works)[::-1] if turn % 2 else works:
            seconds[name].append(seconds_of(works[name], clock))
    return seconds


def run_tasks(pool: Pool, tasks: Sequence[ReplicaTask], shards: Sequence[Sequence[Batch]]) -> None:
    """Let a pool do its tasks, and drop the results."""
    for _ in pool.run(tasks, shards):
        pass


def peak_bytes(model: torch.nn.Module, work: Callable[[], object], held: Sequence[torch.Tensor] = ()) -> int:
    """The most bytes that the weights of a model, what is held beside them, and the tensors of some work take
    together."""
    with TensorMemory() as memory:
        memory.count(*model.parameters(), *held)
        work()
    return memory.peak


def matmul_flops(size: int, device: str, dtype: torch.dtype = torch.float32, clock: Callable[[], float] = now) -> float:
    """Operations a second of the product of two square matrices, the best of five."""
    # As the replicas compute: TF32 would be another arithmetic.
    torch.set_float32_matmul_precision("highest")
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(seconds_of(lambda: a @ b, clock) for _ in range(5))


def device_name() -> str:
    """The GPU, or else the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


# --- Words and files ----------------------------------------------------------------------------------------


def interval(estimate: Mapping[str, float], form: str) -> str:
    """The interval of an estimate that is in the figures: "[95 % CI 0.12 to 0.34]"."""
    return f"[95 % CI {estimate['low']:{form}} to {estimate['high']:{form}}]"


def with_interval(estimate: Estimate, form: str) -> str:
    """A value and its interval in brackets, as far as they are known: "0.23 [0.12, 0.34]"."""
    if math.isnan(estimate.value):
        return "-"
    if math.isnan(estimate.low):
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def as_json(estimate: Estimate) -> dict[str, float | None]:
    """An estimate for JSON, which has no nan: null stands for it."""
    ends = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: value if math.isfinite(value) else None for name, value in ends.items()}


def from_json(values: Mapping[str, float | None]) -> Estimate:
    """The estimate of which `as_json` gave the values."""
    return Estimate(**{key: math.nan if value is None else value for key, value in values.items()})


def write_figures(figures: Mapping[str, Any], out: str | None) -> None:
    """Write figures as JSON, if a file is named."""
    if out is None:
        return
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"figures -> {out}")
