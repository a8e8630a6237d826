"""`mrd-bench benchmark scoring`: Algorithm 1 as printed against the estimators, in one run.

Methods, on the same samples and the same model:
    (a)  Algorithm 1 exactly as printed: a sample at a time, fresh noise for each sample and draw, P_t(theta) anew
         in every draw
    (a') the same with P_t(theta) computed once a sample
    (b)  monte-carlo, the same statistic: noise shared by all samples, batches, base kept
    (c)  gradient, the closed form of the same statistic
    (d)  curvature and antithetic, the other statistic

Times of (a), (b) and (d) are measured on few draws and scaled to K: every draw costs the same.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.models.find import ModelReference, find_model
from bench.tasks.datasets import load_dataset
from scoring.cluster import Footprint, connect
from scoring.errors import UserError
from scoring.logprob import scored_logprobs
from scoring.memory import TensorMemory
from scoring.mrd import Draws, EstimatorName, Request, estimate, reduce_draws, relative_change
from scoring.pool import ReplicaPool
from scoring.replica import TransformersReplica, load_model
from scoring.sample_gradients import autograd_norms, log_abs_logprob
from scoring.samples import Batch, Sample, collate, encode, make_batches
from scoring.work import DrawTask, ReplicaSpec

SIGMA = 1e-5
BATCH_TOKENS = 2048
# How much of each method is run; the rest is scaled.
PRINTED_SAMPLES, PRINTED_DRAWS = 16, 5
DRAWS, PAIRS, DIRECTIONS = 10, 2, 2
REFERENCE_SAMPLES, REFERENCE_DIRECTIONS = 24, 16
POOL_DRAWS, POOL_DRAWS_PER_TASK = 24, 2


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: of the method.
        seconds: for all samples and all draws, scaled where the module's docstring says so.
        forwards, backwards: passes over the whole set.
        cost: seconds in units of one batched forward pass over the set.
        peak_weights: peak memory of tensors in units of the model's weights.
        error: against fp64, what it means is said in `error_of`.
    """

    name: str
    seconds: float
    forwards: float
    backwards: float
    cost: float
    peak_weights: float
    error: float
    error_of: str


def run_benchmark(model: str, data: str, split: str | None, samples: int, draws: int, out: str | None) -> None:
    """Measure, print a table with ratios, and write the figures as JSON if asked to."""
    if draws < 2 or samples < 2:
        raise UserError(f"--samples {samples} --draws {draws}: expected at least 2 of each")
    reference = find_model(model)
    dataset = load_dataset(data, split or ("full" if data == "authors" else None), reference.tokenizer)
    encoded, _ = encode(dataset.texts, reference.tokenizer, reference.max_length)
    chosen = encoded[:samples]
    batches = make_batches(chosen, BATCH_TOKENS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = sum(s.length for s in chosen)
    cores = len(os.sched_getaffinity(0))

    torch.set_num_threads(1)
    replica = TransformersReplica(load_model(reference.source, "float32", device))
    weights = sum(p.numel() for p in replica.model.parameters())
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}"
    print(f"{len(chosen)} samples, {tokens} tokens, {weights / 1e6:.2f} M weights, K = {draws}, {device} ({where})")
    peak = _matmul_peak(device)
    rows = _measure(replica, chosen, batches, draws)
    _print_rows(rows)

    flops = _forward_flops(replica, batches)
    share = flops * (draws + 1) / rows["b"].seconds / peak
    seconds = {key: row.seconds for key, row in rows.items()}
    print(f"one thread each: (b) is {seconds['a'] / seconds['b']:.1f} x faster than (a)")
    print(f"                 (b) is {seconds['a_hoisted'] / seconds['b']:.1f} x faster than (a')")
    print(f"                 (c) is {seconds['b'] / seconds['c']:.1f} x faster than (b)")
    print(f"(b) computes {flops * (draws + 1) / rows['b'].seconds / 1e9:.1f} GFLOP/s,")
    print(f"    {share:.0%} of the {peak / 1e9:.1f} GFLOP/s that a 2048 x 2048 fp32 matrix product reaches here")
    figures: dict[str, object] = {
        "samples": len(chosen),
        "tokens": tokens,
        "weights": weights,
        "draws": draws,
        "device": where,
        "one_thread": {key: asdict(row) for key, row in rows.items()},
        "share_of_matmul_peak": share,
    }
    if device == "cpu" and cores > 1:
        figures["cores"] = _all_cores(reference, replica, chosen, batches, draws, cores)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")
        print(f"figures -> {out}")


def _measure(
    replica: TransformersReplica, samples: Sequence[Sample], batches: Sequence[Batch], draws: int
) -> dict[str, Row]:
    """All methods, in this process."""
    few = _spread(samples, REFERENCE_SAMPLES)
    few_batches = make_batches(few, BATCH_TOKENS)
    mean_abs, abs_mean = _references(replica, few)
    own = _spread(samples, PRINTED_SAMPLES)
    tokens = sum(s.length for s in samples)
    base = timed(lambda: [replica.logprobs(batch) for batch in batches])
    rows = {}

    def row(
        name: str, seconds: float, forwards: int, backwards: int, memory: float, error: float, error_of: str
    ) -> Row:
        return Row(name, seconds, forwards, backwards, seconds / base, memory, error, error_of)

    for key, name, hoist in (("a", "(a)  Algorithm 1 as printed", False), ("a_hoisted", "(a') P(theta) once", True)):
        measured = timed(partial(algorithm_1, replica, own, SIGMA, PRINTED_DRAWS, hoist))
        # The one pass of (a') must not be scaled with the draws.
        once = timed(lambda: [replica.logprobs(collate([sample])) for sample in own]) if hoist else 0.0
        seconds = (once + (measured - once) / PRINTED_DRAWS * draws) * tokens / sum(s.length for s in own)
        memory = _peak(replica, partial(algorithm_1, samples=own[-1:], sigma=SIGMA, draws=1, hoist=hoist))
        # The same estimator as (b), so its error is that of K draws.
        error = 0.76 / math.sqrt(draws)
        rows[key] = row(name, seconds, draws + 1 if hoist else 2 * draws, 0, memory, error, "expected, 0.76/sqrt(K)")

    def drawn(key: EstimatorName, count: int) -> float:
        """Seconds of one draw over all samples."""
        estimate(replica, few_batches[:1], Request(key, SIGMA, 0, 0, 1))  # checks and copies, once a replica
        return (timed(partial(estimate, replica, batches, Request(key, SIGMA, 0, 0, count))) - base) / count

    def peak(key: EstimatorName) -> float:
        return _peak(replica, lambda r: estimate(r, batches[-1:], Request(key, SIGMA, 0, 0, 1)))

    def scores(key: EstimatorName, statistic: str, count: int) -> np.ndarray:
        return _in_order(estimate(replica, few_batches, Request(key, SIGMA, 1, 0, count)), statistic)

    def error_of(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
        return np.abs(got / exact - 1)

    error = float(np.median(error_of(scores("monte-carlo", "mean_abs", draws), mean_abs)))
    seconds = base + draws * drawn("monte-carlo", DRAWS)
    rows["b"] = row("(b)  monte-carlo", seconds, draws + 1, 0, peak("monte-carlo"), error, "median, sampling")

    error = float(np.max(error_of(scores("gradient", "mean_abs", 1), mean_abs)))
    seconds = timed(partial(estimate, replica, batches, Request("gradient", SIGMA, 0)))
    rows["c"] = row("(c)  gradient", seconds, 1, 1, peak("gradient"), error, "largest, rounding")

    second_order: tuple[tuple[EstimatorName, int, int], ...] = (
        ("curvature", DIRECTIONS, 8),
        ("antithetic", PAIRS, 64),
    )
    for key, measured_draws, full in second_order:
        error = float(np.median(error_of(scores(key, "abs_mean", full), abs_mean)))
        passes = 1 + full if key == "curvature" else 1 + 2 * full
        seconds = base + full * drawn(key, measured_draws)
        rows[key] = row(
            f"(d)  {key}, {full} draws", seconds, passes, 0, peak(key), error, "median, sampling and rounding"
        )
    return rows


@torch.no_grad()
def algorithm_1(
    replica: TransformersReplica, samples: Sequence[Sample], sigma: float, draws: int, hoist: bool
) -> np.ndarray:
    """Algorithm 1 of the paper, line by line. `hoist` computes P_t(theta) once a sample. Returns (N,) mean_abs."""
    model = replica.model
    scores = []
    for sample in samples:
        batch = collate([sample]).to(replica.device)
        total = 0.0
        for draw in range(draws):
            if draw == 0 or not hoist:
                before = scored_logprobs(model, batch)
            kept = [p.detach().clone() for p in model.parameters()]
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=sigma)
            total += abs(relative_change(before, scored_logprobs(model, batch)).item())
            for p, value in zip(model.parameters(), kept, strict=True):
                p.copy_(value)
        scores.append(total / draws)
    return np.array(scores)


def _references(replica: TransformersReplica, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """fp64: mean_abs by per-sample autograd, abs_mean by curvature along other directions than those compared."""
    exact = TransformersReplica(copy.deepcopy(replica.model).double())
    norms, _ = autograd_norms(exact.model, collate(samples).to(exact.device), log_abs_logprob)
    request = Request("curvature", SIGMA, 0, 1000, 1000 + REFERENCE_DIRECTIONS)
    curved = estimate(exact, make_batches(samples, BATCH_TOKENS), request)
    return SIGMA * math.sqrt(2 / math.pi) * norms.cpu().numpy(), _in_order(curved, "abs_mean")


def _all_cores(
    reference: ModelReference,
    replica: TransformersReplica,
    samples: Sequence[Sample],
    batches: Sequence[Batch],
    draws: int,
    cores: int,
) -> dict[str, float]:
    """(a) with a thread a core, and (b) on 1 and on `cores` replicas of one thread."""
    own = _spread(samples, PRINTED_SAMPLES)
    torch.set_num_threads(cores)
    algorithm_1(replica, own[:2], SIGMA, 1, False)  # starts the threads
    per_token = timed(lambda: algorithm_1(replica, own, SIGMA, PRINTED_DRAWS, False)) / sum(s.length for s in own)
    torch.set_num_threads(1)
    printed = per_token / PRINTED_DRAWS * sum(s.length for s in samples) * draws
    connect()
    seconds = {}
    for replicas in (1, cores):
        with ReplicaPool(ReplicaSpec(reference.source, reference.revision), Footprint(1), replicas) as pool:
            # Loads the replicas, and each computes its base.
            _drain(pool, _pool_tasks(2 * replicas), batches)
            seconds[replicas] = timed(partial(_drain, pool, _pool_tasks(POOL_DRAWS), batches))
    scaled = seconds[cores] * draws / POOL_DRAWS
    gain = seconds[1] / seconds[cores]
    print(f"all {cores} cores each: (b) is {printed / scaled:.1f} x faster than (a)")
    print(f"{cores} replicas of one thread are {gain:.2f} x faster than one ({gain / cores:.0%} efficiency)")
    return {"cores": cores, "a_seconds": printed, "b_seconds": scaled, "replicas_gain": gain}


def _pool_tasks(draws: int) -> list[DrawTask]:
    step = POOL_DRAWS_PER_TASK
    return [DrawTask(0, Request("monte-carlo", SIGMA, 0, first, first + step)) for first in range(0, draws, step)]


def _drain(pool: ReplicaPool, tasks: Sequence[DrawTask], batches: Sequence[Batch]) -> None:
    for _ in pool.run(tasks, [batches]):
        pass


def _spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples of evenly spread lengths."""
    ordered = sorted(samples, key=lambda s: (s.length, s.index))
    where = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return sorted((ordered[i] for i in where), key=lambda s: s.index)


def _in_order(draws: Draws, statistic: str) -> np.ndarray:
    return reduce_draws(draws.values, statistic)[0][np.argsort(draws.indices)]  # type: ignore[arg-type]


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(replica: TransformersReplica, work: Callable[[TransformersReplica], object]) -> float:
    """Peak memory of the tensors while `work` runs, in units of the weights, which count as one."""
    bare = copy.copy(replica)
    bare._perturbation = None  # the base copy is part of what is measured
    parameters = list(bare.model.parameters())
    with TensorMemory() as memory:
        memory.count(*parameters)
        work(bare)
    return memory.peak / sum(p.numel() * p.element_size() for p in parameters)


def _matmul_peak(device: str) -> float:
    """FLOP/s of an fp32 2048 x 2048 matrix product, best of 5."""
    a, b = torch.randn(2048, 2048, device=device), torch.randn(2048, 2048, device=device)
    a @ b
    return 2 * 2048**3 / min(timed(lambda: a @ b) for _ in range(5))


def _forward_flops(replica: TransformersReplica, batches: Sequence[Batch]) -> int:
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            replica.logprobs(batch)
    return counter.get_total_flops()


def _print_rows(rows: dict[str, Row]) -> None:
    print(f"{'':<30}{'seconds':>10}{'forwards':>10}{'backwards':>10}{'cost':>8}{'peak/weights':>14}{'error':>9}")
    for row in rows.values():
        print(
            f"{row.name:<30}{row.seconds:>10.1f}{row.forwards:>10.0f}{row.backwards:>10.0f}{row.cost:>8.1f}"
            f"{row.peak_weights:>14.2f}{row.error:>9.1e}  ({row.error_of})"
        )
    print("cost: in batched forward passes; peak/weights: peak memory, weights included; error: relative, against fp64")
