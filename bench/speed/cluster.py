"""`mrd-bench benchmark cluster`: what it costs to spread the work, in one run.

scaling     the same draws on one and on two replicas of one thread each; both pools are loaded and take turns
scheduling  what the pool adds to the work itself: the same tasks, of next to no work, by one replica in this process
            and by one behind Ray's queue, in turns
memory      the largest memory of the driver of `mrd-bench score` while it scores data files of growing size under a
            model of next to no weights; the growth is in units of the smallest
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.models.find import find_model
from bench.stats.estimates import geometric_mean, t_interval
from bench.tasks.datasets import load_dataset
from scoring.cluster import Footprint, connect
from scoring.errors import UserError
from scoring.mrd import Request
from scoring.pool import ReplicaPool
from scoring.replica import load_model
from scoring.samples import Batch, Text, encode, make_batches
from scoring.work import DrawTask, LocalPool, ReplicaSpec

SIGMA = 1e-5
BATCH_TOKENS = 2048
TURNS = 7
DRAWS, DRAWS_PER_TASK = 8, 2
QUEUED_SAMPLES = 4000
POLL_S = 0.05


def run_benchmark(model: str, data: str, split: str | None, sizes: Sequence[int], out: str | None) -> None:
    """Measure, print the figures, and write them as JSON if asked to."""
    if len(sizes) < 2 or min(sizes) < 100:
        raise UserError(
            f"--sizes {','.join(map(str, sizes))}: expected two or more numbers of samples, each 100 or more"
        )
    reference = find_model(model)
    dataset = load_dataset(data, split or ("full" if data == "authors" else None), reference.tokenizer)
    encoded, _ = encode(dataset.texts, reference.tokenizer, reference.max_length)
    torch.set_num_threads(1)
    # One core more than replicas are measured on: the pools live side by side, and only one works at a time.
    connect(num_cpus=3)
    figures: dict[str, Any] = {"model": model, "samples": len(encoded), "turns": TURNS}
    scaling = _scaling(ReplicaSpec(reference.source, reference.revision), make_batches(encoded, BATCH_TOKENS))
    with tempfile.TemporaryDirectory(prefix="mrd-bench-") as folder:
        small = _small_model(reference.tokenizer, Path(folder) / "model")
        scheduling = _scheduling(small, reference.tokenizer)
        figures |= {"scaling_seconds": scaling, "scheduling_seconds": scheduling, **_summed_up(scaling, scheduling)}
        figures["driver_megabytes"] = {
            size: _driver_megabytes(small, data_file(Path(folder), size), Path(folder)) for size in sorted(sizes)
        }
    _print(figures)
    if out:
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")


def _scaling(spec: ReplicaSpec, batches: Sequence[Batch]) -> dict[int, list[float]]:
    """Seconds of each turn on one and on two replicas."""
    step = DRAWS_PER_TASK
    tasks = [DrawTask(0, Request("monte-carlo", SIGMA, 0, first, first + step)) for first in range(0, DRAWS, step)]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with ReplicaPool(spec, Footprint(1), 1) as one, ReplicaPool(spec, Footprint(1), 2) as two:
        pools = {1: one, 2: two}
        for pool in pools.values():
            # Loads the replicas.
            _drain(pool, tasks[:2], [batches])
        for turn in range(TURNS):
            for replicas in (1, 2) if turn % 2 else (2, 1):
                seconds[replicas].append(_drain(pools[replicas], tasks, [batches]))
    return seconds


def _scheduling(model: Path, tokenizer: Any) -> dict[str, list[float]]:
    """Seconds for every 1,000 samples in this process and behind the queue, a task for each batch."""
    samples, _ = encode(_texts(QUEUED_SAMPLES), tokenizer, 256)
    shards = [[batch] for batch in make_batches(samples, BATCH_TOKENS)]
    tasks = [DrawTask(shard, Request("gradient", SIGMA, 0)) for shard in range(len(shards))]
    seconds: dict[str, list[float]] = {"alone": [], "queued": []}
    with ReplicaPool(ReplicaSpec(str(model)), Footprint(1), 1) as pool:
        pools: dict[str, ReplicaPool | LocalPool] = {
            "alone": LocalPool(load_model(model)),
            "queued": pool,
        }
        for each in pools.values():
            _drain(each, tasks[:1], shards)
        for turn in range(TURNS):
            for key in sorted(pools, reverse=bool(turn % 2)):
                seconds[key].append(_drain(pools[key], tasks, shards) / len(samples) * 1000)
    return seconds


def _drain(pool: ReplicaPool | LocalPool, tasks: Sequence[DrawTask], shards: Sequence[Sequence[Batch]]) -> float:
    started = time.perf_counter()
    for _ in pool.run(tasks, shards):
        pass
    return time.perf_counter() - started


def _summed_up(seconds: dict[int, list[float]], per_thousand: dict[str, list[float]]) -> dict[str, Any]:
    """Efficiency of the second replica, and what the queue adds to 1,000 samples: over turns, each with itself."""
    efficiency = geometric_mean(np.array(seconds[1]) / np.array(seconds[2]) / 2)
    added = np.array(per_thousand["queued"]) - np.array(per_thousand["alone"])
    return {"efficiency": asdict(efficiency), "overhead": asdict(t_interval(added))}


# --- Memory -------------------------------------------------------------------------------------------------


def _small_model(tokenizer: Any, folder: Path) -> Path:
    """A model whose scoring takes next to no time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _texts(count: int) -> list[Text]:
    return [Text(str(i), *pair) for i, pair in enumerate(pairs_of(count))]


def pairs_of(count: int) -> list[tuple[str, str]]:
    """Questions and answers, no two of them alike."""
    rng = random.Random(0)
    words = ["who", "wrote", "a", "book", "about", "the", "sea", "and", "in", "which", "year", "was", "it", "read"]
    return [
        (f"{' '.join(rng.choices(words, k=6))} {i}?", f"{' '.join(rng.choices(words, k=5))}.") for i in range(count)
    ]


def data_file(folder: Path, count: int) -> Path:
    path = folder / f"{count}.jsonl"
    with path.open("w") as file:
        for prompt, completion in pairs_of(count):
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return path


def _driver_megabytes(model: Path, data: Path, folder: Path) -> float:
    """The largest memory of a driver in a process of its own."""
    command = [sys.executable, "-m", "bench.cli", "score", "--model", str(model), "--data", str(data)]
    command += ["--estimator", "gradient", "--replicas", "1", "--out", str(folder / f"{data.stem}.parquet")]
    with (folder / "said").open("w+") as said:
        driver = subprocess.Popen(command, stdout=said, stderr=said, cwd=Path(__file__).parents[2])
        largest = 0
        while driver.poll() is None:
            largest = max(largest, _anonymous_bytes(driver.pid))
            time.sleep(POLL_S)
        if driver.wait():
            said.seek(0)
            raise UserError(f"scoring {data.stem} samples failed: {said.read().strip().splitlines()[-1]}")
    return largest / 1e6


def _anonymous_bytes(process: int) -> int:
    """Memory that is no file's: libraries count for one process or for many by who else has them at the moment."""
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
        f"[95 % CI {efficiency['low']:.0%} to {efficiency['high']:.0%}] over {figures['turns']} turns"
    )
    alone = np.mean(figures["scheduling_seconds"]["alone"])
    print(
        f"scheduling: {overhead['value']:.3f} s for every 1,000 samples [95 % CI {overhead['low']:.3f} to "
        f"{overhead['high']:.3f}], beside {alone:.3f} s of work"
    )
    sizes = figures["driver_megabytes"]
    smallest = sizes[min(sizes)]
    for size, megabytes in sizes.items():
        print(f"memory of the driver: {megabytes:6.0f} MB at {size:>9,} samples, ratio {megabytes / smallest:.2f}")
