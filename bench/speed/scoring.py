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
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.models.find import ModelReference, find_model
from bench.speed.figures import (
    device_name,
    matmul_flops,
    peak_bytes,
    require_at_least,
    run_tasks,
    seconds_of,
    write_figures,
)
from bench.speed.made import monte_carlo_tasks, samples_of
from scoring.cluster import Footprint, connect
from scoring.load import load_model
from scoring.logprob import scored_logprobs
from scoring.mrd import Draws, EstimatorName, Request, Statistic, estimate, reduce_draws, relative_change
from scoring.pool import ReplicaPool
from scoring.replica import TransformersReplica
from scoring.sample_gradients import autograd_norms, log_abs_logprob
from scoring.samples import Batch, Sample, collate, make_batches
from scoring.work import ReplicaSpec

SIGMA = 1e-5
BATCH_TOKENS = 2048
MATMUL_SIZE = 2048
# The expected relative error of K draws is this over sqrt(K).
ERROR_OF_ONE_DRAW = 0.76
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
        error: relative, against fp64.
        error_of: which error that is.
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
    """Measure, print a table with ratios, and write the figures as JSON if asked to.

    Args:
        model: embedded one, folder or Hugging Face id.
        data: a task or a data file.
        split: of a task.
        samples: so many are scored, at most.
        draws: K.
        out: JSON file.
    """
    require_at_least(2, samples=samples, draws=draws)
    reference = find_model(model)
    scored = samples_of(data, split, reference)[:samples]
    batches = make_batches(scored, BATCH_TOKENS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = sum(sample.length for sample in scored)
    cores = len(os.sched_getaffinity(0))

    torch.set_num_threads(1)
    replica = TransformersReplica(load_model(reference.source, "float32", device))
    weights = sum(p.numel() for p in replica.model.parameters())
    hardware = device_name()
    print(f"{len(scored)} samples, {tokens} tokens, {weights / 1e6:.2f} M weights, K = {draws}, {device} ({hardware})")
    peak = matmul_flops(MATMUL_SIZE, device)
    rows = _measure(replica, scored, batches, draws)
    _print_rows(rows)

    speed = _forward_flops(replica, batches) * (draws + 1) / rows["b"].seconds
    seconds = {key: row.seconds for key, row in rows.items()}
    print(f"one thread each: (b) is {seconds['a'] / seconds['b']:.1f} x faster than (a)")
    print(f"                 (b) is {seconds['a_hoisted'] / seconds['b']:.1f} x faster than (a')")
    print(f"                 (c) is {seconds['b'] / seconds['c']:.1f} x faster than (b)")
    print(f"(b) computes {speed / 1e9:.1f} GFLOP/s,")
    print(
        f"    {speed / peak:.0%} of the {peak / 1e9:.1f} GFLOP/s that a {MATMUL_SIZE} x {MATMUL_SIZE} fp32 matrix "
        "product reaches here"
    )
    figures: dict[str, object] = {
        "samples": len(scored),
        "tokens": tokens,
        "weights": weights,
        "draws": draws,
        "device": hardware,
        "one_thread": {key: asdict(row) for key, row in rows.items()},
        "share_of_matmul_peak": speed / peak,
    }
    if device == "cpu" and cores > 1:
        figures["cores"] = _all_cores(reference, replica, scored, batches, draws, cores)
    write_figures(figures, out)


def _measure(
    replica: TransformersReplica, samples: Sequence[Sample], batches: Sequence[Batch], draws: int
) -> dict[str, Row]:
    """All methods, in this process."""
    compared = _spread(samples, REFERENCE_SAMPLES)
    compared_batches = make_batches(compared, BATCH_TOKENS)
    mean_abs, abs_mean = _references(replica, compared)
    printed = _spread(samples, PRINTED_SAMPLES)
    tokens = sum(sample.length for sample in samples)
    base = seconds_of(lambda: [replica.logprobs(batch) for batch in batches])
    rows = {}

    def row(
        name: str, seconds: float, forwards: int, backwards: int, memory: float, error: float, error_of: str
    ) -> Row:
        return Row(name, seconds, forwards, backwards, seconds / base, memory, error, error_of)

    for key, name, hoist in (("a", "(a)  Algorithm 1 as printed", False), ("a_hoisted", "(a') P(theta) once", True)):
        whole = seconds_of(partial(algorithm_1, replica, printed, SIGMA, PRINTED_DRAWS, hoist))
        # The one pass of (a') must not be scaled with the draws.
        once = seconds_of(lambda: [replica.logprobs(collate([sample])) for sample in printed]) if hoist else 0.0
        seconds = (once + (whole - once) / PRINTED_DRAWS * draws) * tokens / sum(sample.length for sample in printed)
        memory = _peak_weights(replica, partial(algorithm_1, samples=printed[-1:], sigma=SIGMA, draws=1, hoist=hoist))
        # The same estimator as (b), so its error is that of K draws.
        error = ERROR_OF_ONE_DRAW / math.sqrt(draws)
        forwards = draws + 1 if hoist else 2 * draws
        rows[key] = row(name, seconds, forwards, 0, memory, error, f"expected, {ERROR_OF_ONE_DRAW}/sqrt(K)")

    def seconds_of_draw(estimator: EstimatorName, count: int) -> float:
        """Seconds of one of so many draws over all samples."""
        estimate(replica, compared_batches[:1], Request(estimator, SIGMA, 0, 0, 1))  # checks and copies, once a replica
        draw = partial(estimate, replica, batches, Request(estimator, SIGMA, 0, 0, count))
        return (seconds_of(draw) - base) / count

    def peak(estimator: EstimatorName) -> float:
        request = Request(estimator, SIGMA, 0, 0, 1)
        return _peak_weights(replica, lambda bare: estimate(bare, batches[-1:], request))

    def errors(estimator: EstimatorName, statistic: Statistic, count: int, exact: np.ndarray) -> np.ndarray:
        scores = estimate(replica, compared_batches, Request(estimator, SIGMA, 1, 0, count))
        return np.abs(in_order(scores, statistic) / exact - 1)

    error = float(np.median(errors("monte-carlo", "mean_abs", draws, mean_abs)))
    seconds = base + draws * seconds_of_draw("monte-carlo", DRAWS)
    rows["b"] = row("(b)  monte-carlo", seconds, draws + 1, 0, peak("monte-carlo"), error, "median, sampling")

    error = float(np.max(errors("gradient", "mean_abs", 1, mean_abs)))
    seconds = seconds_of(partial(estimate, replica, batches, Request("gradient", SIGMA, 0)))
    rows["c"] = row("(c)  gradient", seconds, 1, 1, peak("gradient"), error, "largest, rounding")

    second_order: tuple[tuple[EstimatorName, int, int], ...] = (
        ("curvature", DIRECTIONS, 8),
        ("antithetic", PAIRS, 64),
    )
    for estimator, timed_draws, all_draws in second_order:
        error = float(np.median(errors(estimator, "abs_mean", all_draws, abs_mean)))
        forwards = 1 + all_draws if estimator == "curvature" else 1 + 2 * all_draws
        seconds = base + all_draws * seconds_of_draw(estimator, timed_draws)
        name = f"(d)  {estimator}, {all_draws} draws"
        rows[estimator] = row(name, seconds, forwards, 0, peak(estimator), error, "median, sampling and rounding")
    return rows


@torch.no_grad()
def algorithm_1(
    replica: TransformersReplica, samples: Sequence[Sample], sigma: float, draws: int, hoist: bool
) -> np.ndarray:
    """Algorithm 1 of the paper, line by line; with `hoist` P_t(theta) is computed once a sample. (N,) mean_abs."""
    model = replica.model
    scores = []
    for sample in samples:
        batch = collate([sample]).to(replica.device)
        total = 0.0
        for draw in range(draws):
            if draw == 0 or not hoist:
                before = scored_logprobs(model, batch)
            base = [p.detach().clone() for p in model.parameters()]
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=sigma)
            total += abs(relative_change(before, scored_logprobs(model, batch)).item())
            for p, value in zip(model.parameters(), base, strict=True):
                p.copy_(value)
        scores.append(total / draws)
    return np.array(scores)


def _references(replica: TransformersReplica, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Scores in fp64: mean_abs by per-sample autograd, abs_mean by curvature along other directions than those that are
    compared with it."""
    exact = TransformersReplica(copy.deepcopy(replica.model).double())
    norms, _ = autograd_norms(exact.model, collate(samples).to(exact.device), log_abs_logprob)
    request = Request("curvature", SIGMA, 0, 1000, 1000 + REFERENCE_DIRECTIONS)
    curvature = estimate(exact, make_batches(samples, BATCH_TOKENS), request)
    return SIGMA * math.sqrt(2 / math.pi) * norms.cpu().numpy(), in_order(curvature, "abs_mean")


def _all_cores(
    reference: ModelReference,
    replica: TransformersReplica,
    samples: Sequence[Sample],
    batches: Sequence[Batch],
    draws: int,
    cores: int,
) -> dict[str, float]:
    """(a) with a thread a core, and (b) on 1 and on `cores` replicas of one thread."""
    printed = _spread(samples, PRINTED_SAMPLES)
    torch.set_num_threads(cores)
    algorithm_1(replica, printed[:2], SIGMA, 1, False)  # starts the threads
    of_printed = seconds_of(lambda: algorithm_1(replica, printed, SIGMA, PRINTED_DRAWS, False))
    torch.set_num_threads(1)
    per_token = of_printed / sum(sample.length for sample in printed)
    of_all = per_token / PRINTED_DRAWS * sum(sample.length for sample in samples) * draws
    connect()
    seconds = {}
    for replicas in (1, cores):
        with ReplicaPool(ReplicaSpec(reference.source, reference.revision), Footprint(1), replicas) as pool:
            # Loads the replicas, and each computes its base.
            run_tasks(pool, monte_carlo_tasks(2 * replicas, POOL_DRAWS_PER_TASK, SIGMA), [batches])
            tasks = monte_carlo_tasks(POOL_DRAWS, POOL_DRAWS_PER_TASK, SIGMA)
            seconds[replicas] = seconds_of(partial(run_tasks, pool, tasks, [batches]))
    on_replicas = seconds[cores] * draws / POOL_DRAWS
    gain = seconds[1] / seconds[cores]
    print(f"all {cores} cores each: (b) is {of_all / on_replicas:.1f} x faster than (a)")
    print(f"{cores} replicas of one thread are {gain:.2f} x faster than one ({gain / cores:.0%} efficiency)")
    return {"cores": cores, "a_seconds": of_all, "b_seconds": on_replicas, "replicas_gain": gain}


def _spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples of evenly spread lengths."""
    by_length = sorted(samples, key=lambda sample: (sample.length, sample.index))
    positions = np.linspace(0, len(by_length) - 1, min(count, len(by_length))).round().astype(int)
    return sorted((by_length[position] for position in positions), key=lambda sample: sample.index)


def in_order(draws: Draws, statistic: Statistic) -> np.ndarray:
    """The scores of draws, (N,), in the order of the samples."""
    return reduce_draws(draws.values, statistic)[0][np.argsort(draws.indices)]


def _peak_weights(replica: TransformersReplica, work: Callable[[TransformersReplica], object]) -> float:
    """The peak memory of the tensors while `work` runs, in units of the weights, which count as one."""
    # What was checked once is not checked again, but the copy of the base is made in the measured time.
    bare = copy.copy(replica)
    bare.release_base()
    return peak_bytes(bare.model, lambda: work(bare)) / sum(p.nbytes for p in bare.model.parameters())


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
