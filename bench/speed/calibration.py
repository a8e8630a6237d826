"""`mrd-bench benchmark plan`: the constants of `mrd-bench plan` on this machine, and its sums against runs.

Constants are fitted to calls on random Llamas of three sizes; the runs are of two other sizes, through Ray and from
disk to disk, as `mrd-bench score` and `unlearn` do them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from scipy.optimize import nnls
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from bench.files.origin import hardware
from bench.jobs.resources import Resources
from bench.jobs.score import ScoreSpec, score
from bench.jobs.unlearn import UnlearnSpec, unlearn
from bench.models.find import find_model
from bench.speed.cluster import data_file
from bench.speed.plan import KINDS, PlannedJob, Profile, Shape, UnitCost, held, memory_of, plan
from bench.tasks.datasets import load_dataset
from scoring.api import DRAWS_PER_TASK
from scoring.cluster import Footprint, connect
from scoring.memory import TensorMemory
from scoring.mrd import EstimatorName, Request, estimate
from scoring.pool import ReplicaPool
from scoring.replica import TransformersReplica, load_model
from scoring.samples import BATCH_TOKENS, Sample, encode, make_batches
from scoring.work import DrawTask, ReplicaSpec

SIGMA = 1e-5
# Width, layers; heads are of 32.
FITTED = ((64, 2), (160, 6), (384, 4))
CHECKED = {"small": (96, 4), "large": (288, 5)}
TOKENS, SCORED = 24, 10
REPEATS = 5
STARTS = 3
UPDATES = 12
NO_WORKS = 400
RUNS: tuple[tuple[str, dict[str, Any], int, int], ...] = (
    # Model; what is asked; samples; replicas.
    ("small", {"estimator": "gradient"}, 6000, 1),
    ("large", {"estimator": "gradient"}, 1000, 2),
    ("small", {"estimator": "monte-carlo", "draws": 40}, 400, 2),
    ("large", {"estimator": "monte-carlo", "draws": 20}, 200, 1),
    ("small", {"estimator": "antithetic", "draws": 30}, 200, 1),
    ("large", {"estimator": "curvature", "draws": 2}, 60, 1),
    ("small", {"algorithm": "GradDiff", "epochs": 2}, 120, 1),
    ("large", {"algorithm": "GA", "epochs": 2}, 60, 1),
)


@dataclass(frozen=True)
class Check:
    """A run beside its plan.

    Attributes:
        what: was run.
        planned, measured: seconds.
        planned_bytes, measured_bytes: that tensors take in a replica, at their most; None where it is not measured.
    """

    what: str
    planned: float
    measured: float
    planned_bytes: float | None = None
    measured_bytes: float | None = None


def run_benchmark(out: str | None) -> None:
    """Measure, print constants and checks, and write both as JSON if asked to."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    tokenizer = find_model("authors").tokenizer
    connect()
    with tempfile.TemporaryDirectory(prefix="mrd-bench-") as name:
        folder = Path(name)
        profile = measure(folder, tokenizer)
        print(f"{profile.hardware}, one thread a replica")
        for kind, cost in profile.costs.items():
            print(
                f"{kind:<10} {1e9 * cost.flop:8.4f} ns an operation of a forward pass, {1e9 * cost.width:.2f} ns an "
                f"activation, {1e3 * cost.layer:.2f} ms a layer"
            )
        print(f"{'noise':<10} {1e9 * profile.noise:8.2f} ns a weight; updates {1e9 * profile.update:.2f} ns a weight")
        print(
            f"{'start':<10} {profile.start:8.1f} s; a task waits {1e3 * profile.task:.1f} ms; a replica beside another "
            f"keeps {profile.sharing:.0%} of its speed"
        )
        checks = [_check(profile, folder, tokenizer, *run) for run in RUNS]
    print(f"{'run':<66}{'planned':>10}{'measured':>10}{'ratio':>8}")
    for check in checks:
        ratio = check.planned / check.measured
        print(f"{check.what:<66}{check.planned:>8.1f} s{check.measured:>8.1f} s{ratio:>8.2f}")
        if check.planned_bytes is not None and check.measured_bytes is not None:
            sizes = (check.planned_bytes / 1e6, check.measured_bytes / 1e6)
            print(f"{'  memory of a replica':<66}{sizes[0]:>7.0f} MB{sizes[1]:>7.0f} MB{sizes[0] / sizes[1]:>8.2f}")
    if out:
        figures = {"profile": asdict(profile), "checks": [asdict(check) for check in checks]}
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")


def measure(folder: Path, tokenizer: Any) -> Profile:
    """The constants of this machine, of replicas of one thread."""
    rng = np.random.default_rng(0)
    models = {cut: _model(folder, tokenizer, *cut) for cut in FITTED}
    times: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS[:3]}
    sizes: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in times}
    for cut, path in models.items():
        replica = TransformersReplica(load_model(path))
        shape = shape_of(replica.model)
        calls: dict[str, tuple[int, Callable[[Any], object]]] = {
            "forward": (BATCH_TOKENS, replica.logprobs),
            "gradient": (BATCH_TOKENS, replica.log_abs_gradient_norms),
            "curvature": (BATCH_TOKENS // 4, partial(replica.second_derivatives, seed=0, draw=0)),
        }
        for kind, (most, call) in calls.items():
            # Of two lengths, or what grows with the batch could not be told from what grows with the model.
            for tokens in (most, most // 8):
                batch = _batch(rng, shape.vocabulary, tokens)
                through = len(batch) * TOKENS, len(batch) * SCORED
                peak = _peak(replica, partial(call, batch))
                sizes[kind].append((*held(shape, kind, *through), 4 * shape.params, peak))
                work = shape.widths(*through), shape.forward_flops(*through, TOKENS)
                times[kind].append((shape.layers, *work, _median_seconds(partial(call, batch))))
        if cut == FITTED[-1]:
            replica.perturb(SIGMA, 0, 0)
            moved = _median_seconds(partial(replica.perturb, SIGMA, 0, 1))
            noise = (moved + _median_seconds(replica.restore) / DRAWS_PER_TASK) / shape.params
    fitted = {kind: _fit(np.array(rows)) for kind, rows in times.items()}
    training, update = _training(folder, models)
    start, load = _starting(models)
    memory = {kind: _fit(np.array(rows)) for kind, rows in sizes.items()}
    costs = {kind: UnitCost(*fitted[kind], *memory[kind]) for kind in fitted}
    # A forward pass that keeps what the backward one needs holds what `gradient` does.
    costs["training"] = UnitCost(*training, *memory["gradient"])
    return Profile(
        name="here",
        hardware=hardware(),
        measured=True,
        costs=costs,
        noise=noise,
        update=update,
        start=start,
        load=load,
        task=_waiting(models[FITTED[0]]),
        sharing=_sharing(models[FITTED[1]], tokenizer),
        memory=float(psutil.virtual_memory().total),
    )


def _model(folder: Path, tokenizer: Any, width: int, layers: int) -> Path:
    path = folder / f"{width}-{layers}"
    if not path.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=256,
        )
        LlamaForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def shape_of(model: Any) -> Shape:
    config = model.config
    params = sum(p.numel() for p in model.parameters())
    return Shape(params, config.num_hidden_layers, config.hidden_size, config.vocab_size)


def _batch(rng: np.random.Generator, vocabulary: int, tokens: int) -> Any:
    scored = np.arange(TOKENS) >= TOKENS - SCORED
    samples = [Sample(str(i), rng.integers(0, vocabulary, TOKENS), scored, i) for i in range(tokens // TOKENS)]
    (batch,) = make_batches(samples, tokens)
    return batch


def _median_seconds(call: Callable[[], object]) -> float:
    """Of a call that is no longer the first."""
    call()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def _peak(replica: TransformersReplica, call: Callable[[], object]) -> float:
    """Bytes of the weights and of the tensors that a call makes, at their most."""
    with TensorMemory() as memory:
        memory.count(*replica.model.parameters())
        call()
    return float(memory.peak)


def _fit(rows: np.ndarray) -> Any:
    """Coefficients, none below 0, of the columns but the last that give the last, (n, c + 1) -> c: by relative errors,
    so that small models count as much as large ones."""
    scale = np.linalg.norm(rows[:, :-1] / rows[:, -1:], axis=0)
    solved, _ = nnls(rows[:, :-1] / rows[:, -1:] / scale, np.ones(len(rows)))
    return tuple(float(value) for value in solved / scale)


def _training(folder: Path, models: dict[tuple[int, int], Path]) -> tuple[tuple[float, ...], float]:
    """Seconds a layer and call, for each activation and operation; and for each weight and update."""
    rows = []
    for path in models.values():
        shape = shape_of(load_model(path))
        tokens, scored, _ = _sizes(path, folder, 60)
        for algorithm, batch_size, calls in (("GA", 2, 1), ("GA", 8, 1), ("GradDiff", 4, 2)):
            run = unlearn(
                _unlearning(path, data_file(folder, 60), algorithm, batch_size, max_steps=UPDATES),
                folder / f"trained-{path.name}-{algorithm}-{batch_size}",
                progress=False,
            )
            through = calls * batch_size * tokens, calls * batch_size * scored
            work = shape.widths(*through), shape.forward_flops(*through, tokens)
            rows.append((calls * shape.layers, *work, shape.params, run.record["seconds"]["training"] / UPDATES))
    *call, update = _fit(np.array(rows))
    return tuple(call), update


def _unlearning(model: Path, data: Path, algorithm: str, batch_size: int = 4, **fields: Any) -> UnlearnSpec:
    return UnlearnSpec(
        model=str(model),
        task=str(data),
        algorithm=algorithm,
        batch_size=batch_size,
        alpha=0.0,
        early_stopping=False,
        check_every=0,
        evaluate_every=0,
        evaluate_samples=1,
        learning_rate=1e-6,
        workers=0,
        retain=str(data) if algorithm == "GradDiff" else None,
        **fields,
    )


def _starting(models: dict[tuple[int, int], Path]) -> tuple[float, float]:
    """Seconds until a replica of next to nothing has begun, and for each byte of a model. The first batch, which finds
    everything cold, is part of it."""
    seconds, sizes = [], []
    for cut in (FITTED[0], FITTED[-1]):
        sizes.append(sum(file.stat().st_size for file in models[cut].glob("*.safetensors")))
        few = _batch(np.random.default_rng(0), 100, 2 * TOKENS)
        taken = []
        for _ in range(STARTS):
            started = time.perf_counter()
            with ReplicaPool(ReplicaSpec(str(models[cut])), Footprint(1), 1) as pool:
                for _ in pool.run([DrawTask(0, Request("gradient", SIGMA, 0))], [[few]]):
                    pass
            taken.append(time.perf_counter() - started)
        # Processes that Ray keeps ready, or files that were just read, would make the next start a short one.
        seconds.append(max(taken))
    load = max(0.0, (seconds[1] - seconds[0]) / (sizes[1] - sizes[0]))
    return seconds[0], load


class _Nothing:
    """A work without work."""

    def __init__(self, number: int) -> None:
        self.shard, self.key = number, str(number)

    def do(self, *_: Any) -> None:
        return None


def _waiting(model: Path) -> float:
    """Seconds for each task."""
    works = [_Nothing(number) for number in range(NO_WORKS)]
    with ReplicaPool(ReplicaSpec(str(model)), Footprint(1), 1) as pool:
        for _ in pool.run(works[:1], [[]]):
            pass
        started = time.perf_counter()
        for _ in pool.run(works, [[] for _ in works]):
            pass
        return (time.perf_counter() - started) / NO_WORKS


def _sharing(model: Path, tokenizer: Any) -> float:
    samples, _ = encode(load_dataset(str(data_file(model.parent, 200))).texts, tokenizer, 256)
    batches = make_batches(samples, BATCH_TOKENS)
    tasks = [DrawTask(0, Request("monte-carlo", SIGMA, 0, first, first + 2)) for first in range(0, 24, 2)]
    seconds = {}
    for replicas in (1, 2):
        with ReplicaPool(ReplicaSpec(str(model)), Footprint(1), replicas) as pool:
            for _ in pool.run(tasks[: 2 * replicas], [batches]):
                pass
            started = time.perf_counter()
            for _ in pool.run(tasks, [batches]):
                pass
            seconds[replicas] = time.perf_counter() - started
    return min(1.0, seconds[1] / seconds[2] / 2)


def _sizes(model: Path, folder: Path, count: int) -> tuple[float, float, int]:
    """Tokens and scored tokens of a sample, on average; and how many samples there are."""
    samples, _ = encode(load_dataset(str(data_file(folder, count))).texts, find_model(str(model)).tokenizer, 256)
    lengths: Sequence[tuple[int, int]] = [(sample.length, sample.num_scored) for sample in samples]
    tokens, scored = np.mean(lengths, axis=0)
    return float(tokens), float(scored), len(samples)


def _check(
    profile: Profile, folder: Path, tokenizer: Any, size: str, asked: dict[str, Any], count: int, replicas: int
) -> Check:
    model, data = _model(folder, tokenizer, *CHECKED[size]), data_file(folder, count)
    shape = shape_of(load_model(model))
    tokens, scored, _ = _sizes(model, folder, count)
    sizes: tuple[float, float] | tuple[()] = ()
    if "estimator" in asked:
        spec = ScoreSpec(model=str(model), data=str(data), **asked)
        job = PlannedJob(shape, count, tokens, scored, batch_tokens=BATCH_TOKENS, **asked)
        out = folder / f"{size}-{asked['estimator']}.parquet"
        measured = score(spec, out, Resources(replicas=replicas), progress=False).seconds
        planned = plan(job, profile, replicas).seconds
        sizes = memory_of(job.checked(), profile), _replica_bytes(model, data, asked["estimator"], BATCH_TOKENS)
        what = f"{asked['estimator']}, {count} samples" + (f", {asked['draws']} draws" if "draws" in asked else "")
    else:
        retained = float(asked["algorithm"] == "GradDiff")
        job = PlannedJob(shape, count, tokens, scored, None, epochs=asked["epochs"], retained=retained)
        run = unlearn(
            _unlearning(model, data, asked["algorithm"], epochs=asked["epochs"]), folder / f"{size}-run", progress=False
        )
        measured = run.record["seconds"]["training"]
        found = plan(job, profile, replicas)
        # In this process: nothing is started.
        planned = found.seconds - found.parts["start"]
        what = f"{asked['algorithm']}, {count} samples, {asked['epochs']} epochs"
    return Check(f"{what}, {shape.params / 1e6:.2f} M weights, {replicas} replica(s)", planned, measured, *sizes)


def _replica_bytes(model: Path, data: Path, estimator: EstimatorName, batch_tokens: int) -> float:
    """What the tensors of a replica take while it scores the largest batch, at their most."""
    samples, _ = encode(load_dataset(str(data)).texts, find_model(str(model)).tokenizer, 256)
    largest = max(make_batches(samples, batch_tokens), key=lambda batch: batch.input_ids.numel())
    replica = TransformersReplica(load_model(model))
    with TensorMemory() as memory:
        memory.count(*replica.model.parameters())
        estimate(replica, [largest], Request(estimator, SIGMA, 0, 0, 1))
    return float(memory.peak)
