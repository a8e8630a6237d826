"""`mrd-bench benchmark plan`: the constants of `mrd-bench plan` on this machine, and its plans against runs.

Constants are fitted to calls on random Llamas of four sizes. The runs are of two other sizes, and go through Ray and
from disk to disk, as those of `mrd-bench score` and `unlearn` do.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from scipy.optimize import nnls
from transformers.utils import logging as transformers_logging

from bench.files.origin import hardware
from bench.jobs.evaluate import evaluate_spec, preview_evaluation
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.resources import Resources
from bench.jobs.score import ScoreSpec, score
from bench.jobs.unlearn import UnlearnSpec, preview_unlearning, unlearn
from bench.models.embedded import FAMILIES, train_tokenizer
from bench.models.find import find_model
from bench.speed.figures import median_seconds, peak_bytes, run_tasks, seconds_of, write_figures
from bench.speed.made import CONTEXT, monte_carlo_tasks, random_data_file, random_llama_folder, random_samples
from bench.speed.plan import KINDS, PlannedJob, Profile, Shape, UnitCost, memory_of, plan, units_and_logits
from bench.speed.preview import planned
from bench.tasks.datasets import load_dataset
from scoring.api import DRAWS_PER_TASK
from scoring.cluster import Footprint, connect
from scoring.load import load_model
from scoring.mrd import EstimatorName, Request, estimate
from scoring.pool import ReplicaPool
from scoring.replica import TransformersReplica
from scoring.samples import BATCH_TOKENS, Batch, Sample, encode, make_batches
from scoring.work import DrawTask, ReplicaSpec

SIGMA = 1e-5
# Width and layers of models.
FITTED = ((64, 2), (160, 6), (384, 4), (640, 6))
CHECKED = {"small": (96, 4), "large": (288, 5)}
HEAD_DIM = 32
TOKENS, SCORED = 24, 10  # of a sample
REPEATS = 3
STARTS = 3
UPDATES = 12
EMPTY_TASKS = 400
RUNS: tuple[tuple[str, dict[str, Any], int, int], ...] = (
    # Model, settings, samples, replicas.
    ("small", {"estimator": "gradient"}, 6000, 1),
    ("large", {"estimator": "gradient"}, 1000, 2),
    ("small", {"estimator": "monte-carlo", "draws": 40}, 400, 2),
    ("large", {"estimator": "monte-carlo", "draws": 20}, 200, 1),
    ("small", {"estimator": "antithetic", "draws": 30}, 200, 1),
    ("large", {"estimator": "curvature", "draws": 2}, 60, 1),
    ("small", {"algorithm": "GradDiff", "epochs": 2}, 120, 1),
    ("large", {"algorithm": "GA", "epochs": 2}, 60, 1),
)
# Rows that are decoded together, and new tokens of a short and of a long answer: their difference is that of steps.
DECODED_ROWS = (64, 16, 4)
SHORT, LONG = 8, 40
# Whole commands in this process, whose plans are those of their dry runs.
COMMANDS = ("unlearn", "evaluate")


@dataclass(frozen=True)
class Check:
    """A run beside its plan.

    Attributes:
        what: what was run, in words.
        planned, measured: seconds.
        planned_bytes, measured_bytes: of a replica's tensors, at their peak; None where they are not measured.
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
    tokenizer = train_tokenizer(FAMILIES["authors"].tokenizer_text())
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
        checks += [_check_command(profile, folder, tokenizer, size, name) for size in CHECKED for name in COMMANDS]
    print(f"{'run':<66}{'planned':>10}{'measured':>10}{'ratio':>8}")
    for check in checks:
        ratio = check.planned / check.measured
        print(f"{check.what:<66}{check.planned:>8.1f} s{check.measured:>8.1f} s{ratio:>8.2f}")
        if check.planned_bytes is not None and check.measured_bytes is not None:
            sizes = (check.planned_bytes / 1e6, check.measured_bytes / 1e6)
            print(f"{'  memory of a replica':<66}{sizes[0]:>7.0f} MB{sizes[1]:>7.0f} MB{sizes[0] / sizes[1]:>8.2f}")
    write_figures({"profile": asdict(profile), "checks": [asdict(check) for check in checks]}, out)


def measure(folder: Path, tokenizer: Any) -> Profile:
    """The constants of this machine, for replicas of one thread.

    Args:
        folder: to work in.
        tokenizer: of the models.
    """
    models = {size: _model(folder, tokenizer, *size) for size in FITTED}
    # Rows of the fits: what a call is made of, and then its seconds or bytes.
    seconds: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS[:3]}
    bytes_held: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in (*seconds, "decoding")}
    steps: list[tuple[float, ...]] = []
    for size, path in models.items():
        replica = TransformersReplica(load_model(path))
        shape = Shape.of_model(replica.model)
        calls: dict[str, tuple[int, Callable[[Any], object]]] = {
            "forward": (BATCH_TOKENS, replica.logprobs),
            "gradient": (BATCH_TOKENS, replica.log_abs_gradient_norms),
            "curvature": (BATCH_TOKENS // 4, partial(replica.second_derivatives, seed=0, draw=0)),
        }
        for kind, (batch_tokens, call) in calls.items():
            # Batches of two sizes: costs that grow with the batch must be told from those that grow with the model.
            for tokens in (batch_tokens, batch_tokens // 8):
                batch = _batch(shape.vocabulary, tokens)
                counts = len(batch) * TOKENS, len(batch) * SCORED
                call(batch)  # what is kept for later calls is there in the second
                peak = peak_bytes(replica.model, partial(call, batch), replica.kept)
                bytes_held[kind].append((*units_and_logits(shape, kind, *counts), 4 * shape.params, peak))
                work = shape.widths(*counts), shape.forward_flops(*counts, TOKENS)
                seconds[kind].append((shape.layers, *work, median_seconds(partial(call, batch), REPEATS)))
        for rows in DECODED_ROWS:
            prompts = [sample.input_ids for sample in random_samples(rows, TOKENS - SCORED, 1, shape.vocabulary)]
            written = [partial(replica.greedy_continuations, prompts, [new] * rows, None) for new in (SHORT, LONG)]
            short, long = (median_seconds(write, REPEATS) for write in written)
            length = TOKENS - SCORED + (SHORT + LONG) / 2
            work = shape.widths(rows, rows), shape.forward_flops(rows, rows, length)
            steps.append((shape.layers, *work, shape.params, (long - short) / (LONG - SHORT)))
            peak = peak_bytes(replica.model, written[1])
            counts = rows * (TOKENS - SCORED + LONG), rows
            bytes_held["decoding"].append((*units_and_logits(shape, "decoding", *counts), 4 * shape.params, peak))
        if size == FITTED[-1]:
            replica.perturb(SIGMA, 0, 0)
            perturbing = median_seconds(partial(replica.perturb, SIGMA, 0, 1), REPEATS)
            noise = (perturbing + median_seconds(replica.restore, REPEATS) / DRAWS_PER_TASK) / shape.params
    times = {kind: fit(np.array(rows)) for kind, rows in seconds.items()}
    training, update = _training(folder, models)
    start, load = _starting(models)
    memory = {kind: fit(np.array(rows)) for kind, rows in bytes_held.items()}
    costs = {kind: UnitCost(*times[kind], *memory[kind]) for kind in times}
    layer, width, flop, weight = fit(np.array(steps))
    costs["decoding"] = replace(UnitCost(layer, width, flop, *memory["decoding"]), weight=weight)
    # A forward pass that keeps the activations for the backward one holds as much as `gradient`.
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
        sharing=_sharing(models[FITTED[1]]),
        memory=float(psutil.virtual_memory().total),
    )


def _model(folder: Path, tokenizer: Any, width: int, layers: int) -> Path:
    return random_llama_folder(folder / f"{width}-{layers}", tokenizer, width, layers, width // HEAD_DIM)


def _batch(vocabulary: int, tokens: int) -> Batch:
    """One batch of so many tokens."""
    (batch,) = make_batches(random_samples(tokens // TOKENS, TOKENS, SCORED, vocabulary), tokens)
    return batch


def fit(rows: np.ndarray) -> Any:
    """The coefficients, none below 0, by which the other columns sum up to the last one, (n, c + 1) -> c. Errors are
    relative, so that small models count as much as large ones."""
    scale = np.linalg.norm(rows[:, :-1] / rows[:, -1:], axis=0)
    scaled, _ = nnls(rows[:, :-1] / rows[:, -1:] / scale, np.ones(len(rows)))
    return tuple(float(value) for value in scaled / scale)


def _training(folder: Path, models: dict[tuple[int, int], Path]) -> tuple[tuple[float, ...], float]:
    """Seconds of training for each layer and call, activation and operation; and for each weight and update."""
    rows = []
    data = random_data_file(folder, 60)
    for path in models.values():
        shape = Shape.of_model(load_model(path))
        tokens, scored = _mean_lengths(_samples(path, data))
        for algorithm, batch_size, calls in (("GA", 2, 1), ("GA", 8, 1), ("GradDiff", 4, 2)):
            run = unlearn(
                _unlearn_spec(path, data, algorithm, batch_size, max_steps=UPDATES),
                folder / f"trained-{path.name}-{algorithm}-{batch_size}",
                progress=False,
            )
            counts = calls * batch_size * tokens, calls * batch_size * scored
            work = shape.widths(*counts), shape.forward_flops(*counts, tokens)
            rows.append((calls * shape.layers, *work, shape.params, run.record["seconds"]["training"] / UPDATES))
    *call, update = fit(np.array(rows))
    return tuple(call), update


def _unlearn_spec(model: Path, data: Path, algorithm: str, batch_size: int = 4, **fields: Any) -> UnlearnSpec:
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
    """Seconds until a replica of a tiny model has started, and more of them for each byte of a model. The first batch,
    which finds everything cold, is part of the start."""
    seconds, sizes = [], []
    for size in (FITTED[0], FITTED[-1]):
        sizes.append(sum(file.stat().st_size for file in models[size].glob("*.safetensors")))
        few = _batch(100, 2 * TOKENS)
        starts = []
        for _ in range(STARTS):
            started = time.perf_counter()
            with ReplicaPool(ReplicaSpec(str(models[size])), Footprint(1), 1) as pool:
                run_tasks(pool, [DrawTask(0, Request("gradient", SIGMA, 0))], [[few]])
            starts.append(time.perf_counter() - started)
        # The longest: processes that Ray keeps ready, and files that were just read, make the next start a short one.
        seconds.append(max(starts))
    load = max(0.0, (seconds[1] - seconds[0]) / (sizes[1] - sizes[0]))
    return seconds[0], load


class _EmptyTask:
    """A task for a replica that takes no time."""

    def __init__(self, number: int) -> None:
        self.shard, self.key = number, str(number)

    def do(self, *_: Any) -> None:
        return None


def _waiting(model: Path) -> float:
    """Seconds that a task waits."""
    tasks = [_EmptyTask(number) for number in range(EMPTY_TASKS)]
    with ReplicaPool(ReplicaSpec(str(model)), Footprint(1), 1) as pool:
        run_tasks(pool, tasks[:1], [[]])
        return seconds_of(lambda: run_tasks(pool, tasks, [[] for _ in tasks])) / EMPTY_TASKS


def _sharing(model: Path) -> float:
    """The share of its speed that a replica keeps beside another one."""
    batches = make_batches(_samples(model, random_data_file(model.parent, 200)), BATCH_TOKENS)
    tasks = monte_carlo_tasks(24, 2, SIGMA)
    seconds = {}
    for replicas in (1, 2):
        with ReplicaPool(ReplicaSpec(str(model)), Footprint(1), replicas) as pool:
            run_tasks(pool, tasks[: 2 * replicas], [batches])
            seconds[replicas] = seconds_of(partial(run_tasks, pool, tasks, [batches]))
    return min(1.0, seconds[1] / seconds[2] / 2)


def _samples(model: Path, data: Path) -> list[Sample]:
    """The samples of a data file, as the model reads them."""
    samples, _ = encode(load_dataset(str(data)).texts, find_model(str(model)).tokenizer, CONTEXT)
    return samples


def _mean_lengths(samples: Sequence[Sample]) -> tuple[float, float]:
    """Tokens and scored tokens of a sample, on average."""
    tokens, scored = np.mean([(sample.length, sample.num_scored) for sample in samples], axis=0)
    return float(tokens), float(scored)


def _check(
    profile: Profile, folder: Path, tokenizer: Any, size: str, settings: dict[str, Any], count: int, replicas: int
) -> Check:
    """One of RUNS beside its plan."""
    model, data = _model(folder, tokenizer, *CHECKED[size]), random_data_file(folder, count)
    shape = Shape.of_model(load_model(model))
    samples = _samples(model, data)
    tokens, scored = _mean_lengths(samples)
    sizes: tuple[float, float] | tuple[()] = ()
    if "estimator" in settings:
        estimator = settings["estimator"]
        spec = ScoreSpec(model=str(model), data=str(data), **settings)
        job = PlannedJob(shape, count, tokens, scored, batch_tokens=BATCH_TOKENS, **settings)
        out = folder / f"{size}-{estimator}.parquet"
        measured = score(spec, out, Resources(replicas=replicas), progress=False).seconds
        planned = plan(job, profile, replicas).seconds
        sizes = memory_of(job.checked(), profile), _replica_bytes(model, samples, estimator)
        what = f"{estimator}, {count} samples" + (f", {settings['draws']} draws" if "draws" in settings else "")
    else:
        algorithm, epochs = settings["algorithm"], settings["epochs"]
        job = PlannedJob(shape, count, tokens, scored, None, epochs=epochs, retained=float(algorithm == "GradDiff"))
        run = unlearn(_unlearn_spec(model, data, algorithm, epochs=epochs), folder / f"{size}-run", progress=False)
        measured = run.record["seconds"]["training"]
        job_plan = plan(job, profile, replicas)
        # The run is in this process, where nothing is started.
        planned = job_plan.seconds - job_plan.parts["start"]
        what = f"{algorithm}, {count} samples, {epochs} epochs"
    return Check(f"{what}, {shape.params / 1e6:.2f} M weights, {replicas} replica(s)", planned, measured, *sizes)


def _check_command(profile: Profile, folder: Path, tokenizer: Any, size: str, command: str) -> Check:
    """A command with all that belongs to it, in this process, beside the plan of its dry run: unlearn with looks at
    which samples are forgotten and an evaluation each epoch, or evaluate."""
    model = _model(folder, tokenizer, *CHECKED[size])
    forget, retain = random_data_file(folder, 60), random_data_file(folder, 40)
    out = folder / f"{size}-{command}"
    if command == "unlearn":
        spec = UnlearnSpec(
            model=str(model),
            task=str(forget),
            retain=str(retain),
            algorithm="GradDiff",
            epochs=3,
            learning_rate=1e-6,
            early_stopping=False,
            el_n=CONTEXT,  # EL is defined for no sample: MA alone decides
            workers=0,
        )
        job, *_ = planned(preview_unlearning(spec, out))
        assert job is not None
        job = replace(job, continuations=0)
        passed = unlearn(spec, out, progress=False).record["seconds"]
        measured = sum(passed[part] for part in ("training", "checks", "evaluation"))
        what = f"unlearn, {job.samples:g} samples, {job.epochs:g} epochs with looks and evaluations"
    else:
        task = folder / "made.yaml"
        sets = {"forget": forget, "retain": retain, "seen": forget, "unseen": retain}
        task.write_text("protocol: whp\n" + "".join(f"{name}: {path.name}\n" for name, path in sets.items()))
        asked = EvaluateSpec(model=str(model), task=str(task), metrics="seen_rouge,unseen_rouge,ma")
        job, *_ = planned(preview_evaluation(asked, out.with_suffix(".parquet"), Resources(replicas=0)))
        assert job is not None
        done = evaluate_spec(asked, out.with_suffix(".parquet"), Resources(replicas=0), progress=False)
        measured = done.record["seconds"]
        what = f"evaluate, {job.answers:g} answers of {job.new_tokens:g} tokens"
    seconds = plan(job, profile, 1, starts=False).seconds
    return Check(f"{what}, {job.shape.params / 1e6:.2f} M weights, this process", seconds, measured)


def _replica_bytes(model: Path, samples: Sequence[Sample], estimator: EstimatorName) -> float:
    """The bytes of a replica's tensors while it scores the largest batch, at their peak."""
    largest = max(make_batches(samples, BATCH_TOKENS), key=lambda batch: batch.input_ids.numel())
    replica = TransformersReplica(load_model(model))
    request = Request(estimator, SIGMA, 0, 0, 1)
    return float(peak_bytes(replica.model, lambda: estimate(replica, [largest], request)))
