"""`mrd-bench benchmark cluster`: what it costs to spread work over replicas, in one run.

scaling     the same draws on one and on two replicas of one thread each; both pools are loaded and take turns
scheduling  what the pool adds to the work itself: the same tasks, of next to no work, by one replica in this process
            and by one behind Ray's queue, in turns
memory      the largest memory of the driver of `mrd-bench score` while it scores data files of growing size under a
            model of next to no weights; the growth is in units of the smallest
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from bench.models.find import find_model
from bench.speed.figures import interval, run_tasks, seconds_in_turns, write_figures
from bench.speed.made import (
    CONTEXT,
    monte_carlo_tasks,
    random_data_file,
    random_llama_folder,
    random_texts,
    samples_of,
)
from bench.stats.estimates import geometric_mean, t_interval
from scoring.cluster import Footprint, connect
from scoring.errors import UserError
from scoring.load import load_model
from scoring.mrd import Request
from scoring.pool import ReplicaPool
from scoring.samples import Batch, encode, make_batches
from scoring.settings import named
from scoring.work import DrawTask, LocalPool, Pool, ReplicaSpec

SIGMA = 1e-5
BATCH_TOKENS = 2048
TURNS = 7
DRAWS, DRAWS_PER_TASK = 8, 2
QUEUED_SAMPLES = 4000
POLL_S = 0.05


def run_benchmark(model: str, data: str, split: str | None, sizes: Sequence[int], out: str | None) -> None:
    """Measure, print the figures, and write them as JSON if asked to.

    Args:
        model: embedded one, folder or Hugging Face id.
        data: a task or a data file.
        split: of a task.
        sizes: samples of the data files, two or more numbers.
        out: JSON file.
    """
    if len(sizes) < 2 or min(sizes) < 100:
        raise UserError(
            f"{named('sizes')} is {','.join(map(str, sizes))}: expected two or more numbers of samples, each 100 or "
            "more"
        )
    reference = find_model(model)
    samples = samples_of(data, split, reference)
    torch.set_num_threads(1)
    # One core more than replicas are measured on: the pools live side by side, and only one works at a time.
    connect(num_cpus=3)
    figures: dict[str, Any] = {"model": model, "samples": len(samples), "turns": TURNS}
    scaling = _scaling(ReplicaSpec(reference.source, reference.revision), make_batches(samples, BATCH_TOKENS))
    with tempfile.TemporaryDirectory(prefix="mrd-bench-") as name:
        folder = Path(name)
        # Scoring under this model takes next to no time.
        small = random_llama_folder(
            folder / "model", reference.tokenizer, 16, 1, 2, intermediate_size=16, tie_word_embeddings=True
        )
        scheduling = _scheduling(small, reference.tokenizer)
        figures |= {"scaling_seconds": scaling, "scheduling_seconds": scheduling, **summary(scaling, scheduling)}
        figures["driver_megabytes"] = {
            size: _driver_megabytes(small, random_data_file(folder, size), folder) for size in sorted(sizes)
        }
    _print(figures)
    write_figures(figures, out)


def _scaling(spec: ReplicaSpec, batches: Sequence[Batch]) -> dict[int, list[float]]:
    """Seconds of each turn on one and on two replicas."""
    tasks = monte_carlo_tasks(DRAWS, DRAWS_PER_TASK, SIGMA)
    with ReplicaPool(spec, Footprint(1), 1) as one, ReplicaPool(spec, Footprint(1), 2) as two:
        pools = {1: one, 2: two}
        for pool in pools.values():
            # Loads the replicas.
            run_tasks(pool, tasks[:2], [batches])
        works = {replicas: partial(run_tasks, pool, tasks, [batches]) for replicas, pool in pools.items()}
        return seconds_in_turns(works, TURNS)


def _scheduling(model: Path, tokenizer: Any) -> dict[str, list[float]]:
    """Seconds for every 1,000 samples in this process and behind the queue, a task for each batch."""
    samples, _ = encode(random_texts(QUEUED_SAMPLES), tokenizer, CONTEXT)
    shards = [[batch] for batch in make_batches(samples, BATCH_TOKENS)]
    tasks = [DrawTask(shard, Request("gradient", SIGMA, 0)) for shard in range(len(shards))]
    with ReplicaPool(ReplicaSpec(str(model)), Footprint(1), 1) as queued:
        pools: dict[str, Pool] = {"alone": LocalPool(load_model(model)), "queued": queued}
        for pool in pools.values():
            run_tasks(pool, tasks[:1], shards)
        works = {name: partial(run_tasks, pool, tasks, shards) for name, pool in pools.items()}
        seconds = seconds_in_turns(works, TURNS)
    return {name: [taken / len(samples) * 1000 for taken in turns] for name, turns in seconds.items()}


def summary(seconds: dict[int, list[float]], per_thousand: dict[str, list[float]]) -> dict[str, Any]:
    """The efficiency of the second replica, and what the queue adds to 1,000 samples. Figures of one turn are compared
    with each other.

    Args:
        seconds: of each turn, by the number of replicas.
        per_thousand: seconds for 1,000 samples of each turn, "alone" and "queued".
    """
    efficiency = geometric_mean(np.array(seconds[1]) / np.array(seconds[2]) / 2)
    added = np.array(per_thousand["queued"]) - np.array(per_thousand["alone"])
    return {"efficiency": asdict(efficiency), "overhead": asdict(t_interval(added))}


# --- Memory -------------------------------------------------------------------------------------------------


def _driver_megabytes(model: Path, data: Path, folder: Path) -> float:
    """The largest memory of `mrd-bench score`, started as a process by itself."""
    command = [sys.executable, "-m", "bench.cli", "score", "--model", str(model), "--data", str(data)]
    command += ["--estimator", "gradient", "--replicas", "1", "--out", str(folder / f"{data.stem}.parquet")]
    with (folder / "output").open("w+") as output:
        driver = subprocess.Popen(command, stdout=output, stderr=output, cwd=Path(__file__).parents[2])
        largest = 0
        while driver.poll() is None:
            largest = max(largest, _anonymous_bytes(driver.pid))
            time.sleep(POLL_S)
        if driver.wait():
            output.seek(0)
            raise UserError(f"scoring {data.stem} samples failed: {output.read().strip().splitlines()[-1]}")
    return largest / 1e6


def _anonymous_bytes(process: int) -> int:
    """Memory that belongs to no file: whose pages of libraries count depends on which processes share them."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:  # it has just ended, or has no such file
        try:
            return 0 if Path("/proc").is_dir() else psutil.Process(process).memory_full_info().uss
        except psutil.Error:
            return 0
    return 1024 * next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:")), 0)


def _print(figures: dict[str, Any]) -> None:
    efficiency, overhead = figures["efficiency"], figures["overhead"]
    print(
        f"scaling: two replicas of one thread against one: efficiency {efficiency['value']:.0%} "
        f"{interval(efficiency, '.0%')} over {figures['turns']} turns"
    )
    alone = np.mean(figures["scheduling_seconds"]["alone"])
    print(
        f"scheduling: {overhead['value']:.3f} s for every 1,000 samples {interval(overhead, '.3f')}, beside "
        f"{alone:.3f} s of work"
    )
    sizes = figures["driver_megabytes"]
    smallest = sizes[min(sizes)]
    for size, megabytes in sizes.items():
        print(f"memory of the driver: {megabytes:6.0f} MB at {size:>9,} samples, ratio {megabytes / smallest:.2f}")
