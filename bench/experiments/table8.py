"""Table 8: what does scoring a forget set cost, by the number of samples in a batch?"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter
from tqdm import tqdm

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.files.identity import with_spec_hash
from bench.files.parts import Parts
from bench.files.score_file import write_scores
from bench.jobs.draws import read_finished
from bench.models.find import ModelName, find_model
from bench.report.figures import BLUE, GREEN, MUTED, Draw
from bench.report.verdicts import listed
from bench.report.words import interval_columns, markdown_table, number_with_ci, numbers_table
from bench.stats.estimates import Estimate, geometric_mean
from bench.stats.verdicts import Claim, Verdict, decide, half_of, over_runs
from bench.tasks.datasets import DataName, load_dataset
from scoring.api import DRAWS_PER_TASK
from scoring.errors import UserError
from scoring.mrd import EstimatorName, Request, base_logprobs, estimate
from scoring.replica import TransformersReplica
from scoring.samples import Batch, Sample, collate, encode, evenly_spaced
from scoring.settings import Doc, Ge, Gt, check, named
from scoring.work import Facts, ReplicaSpec

ESTIMATORS: tuple[EstimatorName, ...] = ("monte-carlo", "gradient")
PAPER_SECONDS = {8: 210, 16: 152, 32: 127, 64: 115, 128: 83}  # Table 8, on another machine
FEWEST_REPEATS = 3
MARGIN = "log ratio of times"


@dataclass(frozen=True, kw_only=True)
class Table8Spec:
    """What is timed."""

    model: Annotated[ModelName, Doc("an embedded model, a folder, or a Hugging Face id")]
    task: Annotated[DataName, Doc("whose samples are scored")]
    split: Annotated[str | None, Doc("of the task (default: the task's own)")] = None
    samples: Annotated[int | None, Ge(1), Doc("how many, evenly spaced over the split (default: all)")] = None
    batch_sizes: Annotated[list[Annotated[int, Ge(1)]], Doc("samples in a batch, ascending")]
    draws: Annotated[int, Ge(1), Doc("K of Monte Carlo whose time is reported")] = 200
    timed_draws: Annotated[
        int, Ge(1), Doc("draws that are timed; the time of all is in proportion, as every draw costs the same")
    ] = DRAWS_PER_TASK
    repeats: Annotated[int, Ge(FEWEST_REPEATS), Doc("how often everything is timed, in turn")] = FEWEST_REPEATS
    sigma: Annotated[float, Gt(0), Doc("of Monte Carlo")] = 1e-5

    def checked(self) -> Self:
        """The same.

        Raises:
            UserError: a value that is not allowed.
        """
        check(self)
        sizes = self.batch_sizes
        if len(sizes) < 2 or sizes != sorted(set(sizes)):
            raise UserError(f"{named('batch_sizes')} is {sizes}: expected two or more different ones, ascending")
        if self.timed_draws > self.draws:
            raise UserError(
                f"{named('timed_draws')} is {self.timed_draws}: expected at most {named('draws')}, {self.draws}"
            )
        return self


@dataclass(frozen=True)
class Timing:
    """The task of a replica to time one estimator over the batches of one size.

    Attributes:
        shard: the number of the batch size.
        estimator, sigma, draws: what is timed.
        repeat: the number of the repeat; negative for the warm-up, which is not counted.
    """

    shard: int
    estimator: EstimatorName
    sigma: float
    draws: int
    repeat: int

    @property
    def key(self) -> str:
        return f"{self.repeat:03d}-{self.shard:03d}-{self.estimator}"

    def do(self, replica: TransformersReplica, batches: Sequence[Batch], cache: dict[str, Any]) -> tuple[float, float]:
        """Seconds of what is done once, and of all draws. Both wait for their numbers, so a GPU has finished."""
        started = time.perf_counter()
        if self.estimator == "gradient":
            estimate(replica, batches, Request(self.estimator, self.sigma, 0))
            return time.perf_counter() - started, 0.0
        base = [logprobs.cpu() for logprobs in base_logprobs(replica, batches, self.estimator)]
        base = [logprobs.to(replica.device) for logprobs in base]
        drawing = time.perf_counter()
        estimate(replica, batches, Request(self.estimator, self.sigma, 0, 0, self.draws), base)
        return drawing - started, time.perf_counter() - drawing


def run(setup: Setup) -> Answer:
    spec = setup.spec(Table8Spec, "timing")
    return answer(measure(spec, setup), spec, setup.margins(MARGIN))


def measure(spec: Table8Spec, setup: Setup) -> pa.Table:
    """A row for each repeat, batch size and estimator, timed in one replica that is loaded and warm."""
    model = find_model(spec.model)
    dataset = load_dataset(spec.task, spec.split, model.tokenizer)
    samples, _ = encode(evenly_spaced(dataset.texts, spec.samples), model.tokenizer, model.max_length)
    shards = [in_batches(samples, size) for size in spec.batch_sizes]
    content = dataclasses.asdict(spec) | {"model_fingerprint": model.fingerprint, "data_sha256": dataset.sha256}
    tasks = [
        # Batch sizes go up and down in turn: a machine that slows down strikes both ends alike.
        Timing(shard, estimator, spec.sigma, spec.timed_draws, repeat)
        for repeat in range(spec.repeats)
        for shard in range(len(shards))[:: -1 if repeat % 2 else 1]
        for estimator in ESTIMATORS
    ]
    path = setup.work / "timings.parquet"
    identity = with_spec_hash(content, ("model", "task", "split"))
    if (timings := read_finished(path, identity)) is not None:
        return timings
    with Parts(path, identity) as parts:
        todo = [task for task in tasks if not parts.has(task.key)]
        if todo:
            replica = ReplicaSpec(model.source, model.revision)
            for task, (once, drawing), facts in _time_in_turn(todo, shards, replica, setup):
                row = timing_row(task, spec, shards[task.shard], once, drawing, facts)
                parts.write(task.key, pa.Table.from_pylist([row]), {})
        timings = pa.concat_tables([parts.read(task.key)[0] for task in tasks]).replace_schema_metadata()
        write_scores(timings, path, identity, {})
        parts.remove()
    return timings


def _time_in_turn(
    tasks: Sequence[Timing], shards: Sequence[Sequence[Batch]], replica: ReplicaSpec, setup: Setup
) -> Iterator[tuple[Timing, tuple[float, float], Facts]]:
    """The results of the tasks, one after the other, in one replica."""
    # The first time pays for checks and memory, with every batch size again, since the shapes are others.
    warm_up = [dataclasses.replace(task, draws=1, repeat=-1) for task in tasks if task.repeat == tasks[-1].repeat]
    with (
        setup.resources.replicas().pool(replica, replicas=1) as pool,
        tqdm(total=len(tasks), unit="timing", disable=not setup.progress) as bar,
    ):
        for task, seconds, facts in pool.run([*warm_up, *tasks], shards):
            if task.repeat >= 0:
                yield task, seconds, facts
                bar.update()


def in_batches(samples: Sequence[Sample], size: int) -> list[Batch]:
    """Batches of `size` samples of similar length; the last one may have fewer."""
    ordered = sorted(samples, key=lambda sample: (sample.length, sample.index))
    return [collate(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def timing_row(
    task: Timing, spec: Table8Spec, batches: Sequence[Batch], once: float, drawing: float, facts: Facts
) -> dict[str, Any]:
    """The row of a timing.

    Args:
        once, drawing: seconds of what is done once, and of the timed draws.
    """
    # Passes over a batch become passes over the set. One of the forwards is done once, the others for every draw.
    forwards, backwards = facts.forwards / len(batches), facts.backwards / len(batches)
    scale = spec.draws / task.draws if task.estimator == "monte-carlo" else 0.0
    return {
        "repeat": task.repeat,
        "estimator": task.estimator,
        "batch_size": spec.batch_sizes[task.shard],
        "batch_tokens": max(batch.input_ids.numel() for batch in batches),
        "batches": len(batches),
        "samples": sum(len(batch) for batch in batches),
        "seconds": once + drawing * scale,
        "timed_seconds": once + drawing,
        "forwards": 1 + (forwards - 1) * scale if scale else forwards,
        "backwards": backwards,
    }


@dataclass(frozen=True)
class BatchCost:
    """The time of an estimator at a batch size.

    Attributes:
        estimator, batch_size: the estimator and the number of samples in a batch.
        seconds: (repeats,), in the order of the repeats.
        row: of the first repeat; the counts are the same in all.
    """

    estimator: str
    batch_size: int
    seconds: np.ndarray
    row: Mapping[str, Any]

    @property
    def mean_seconds(self) -> Estimate:
        return geometric_mean(self.seconds)


# By estimator and batch size.
Costs = Mapping[tuple[str, int], BatchCost]


def answer(timings: pa.Table, spec: Table8Spec, margins: Mapping[str, float]) -> Answer:
    """From the rows of `measure`.

    Args:
        margins: the smallest gain that matters where the paper prints none, by the name MARGIN.
    """
    costs: Costs = {
        (estimator, size): batch_cost(timings, estimator, size) for estimator in ESTIMATORS for size in spec.batch_sizes
    }
    table = pa.Table.from_pylist([_row(cost) for cost in costs.values()])
    panels = [_seconds_by_size(costs, spec), _seconds_relative(costs, spec)]
    verdicts = decide(_claims(costs, spec, margins[MARGIN]))
    sentences = [_headline(costs, spec), _passes(costs, spec), _table(costs, spec), _claim(costs, spec, verdicts)]
    ratio = {f"seconds by {ESTIMATORS[0]} / {ESTIMATORS[1]}": _slow_to_fast(costs, spec)}
    tables = {"table8-repeats": timings, "table8-numbers": numbers_table(ratio)}
    return Answer(table, panels, sentences, verdicts, inches=(12.0, 5.0), tables=tables)


def batch_cost(timings: pa.Table, estimator: str, size: int) -> BatchCost:
    rows = [row for row in timings.to_pylist() if (row["estimator"], row["batch_size"]) == (estimator, size)]
    rows.sort(key=lambda row: row["repeat"])
    return BatchCost(estimator, size, np.array([row["seconds"] for row in rows]), rows[0])


def time_ratio(cost: BatchCost, other: BatchCost) -> Estimate:
    """How many times as long one takes as the other, repeat by repeat: a disturbance of a repeat concerns both."""
    return geometric_mean(cost.seconds / other.seconds)


def _row(cost: BatchCost) -> dict[str, Any]:
    counts = ("samples", "batches", "batch_tokens", "forwards", "backwards")
    row: dict[str, Any] = {"estimator": cost.estimator, "batch_size": cost.batch_size}
    return row | interval_columns("seconds", cost.mean_seconds) | {name: cost.row[name] for name in counts}


def _headline(costs: Costs, spec: Table8Spec) -> str:
    parts = []
    for estimator in ESTIMATORS:
        smallest, largest = costs[estimator, spec.batch_sizes[0]], costs[estimator, spec.batch_sizes[-1]]
        parts.append(
            f"{estimator}{f' with K = {spec.draws}' if estimator == 'monte-carlo' else ''} takes "
            f"{number_with_ci(smallest.mean_seconds)} s with {smallest.batch_size} in a batch and "
            f"{number_with_ci(largest.mean_seconds)} s with {largest.batch_size}"
        )
    scaled = (
        f" ({spec.timed_draws} draws are timed, the rest is in proportion)" if spec.timed_draws < spec.draws else ""
    )
    samples = next(iter(costs.values())).row["samples"]
    return (
        f"**Scoring {samples} samples**, one replica: {'; '.join(parts)}{scaled}. Intervals are over {spec.repeats} "
        "repeats, in which all sizes take turns."
    )


def _slow_to_fast(costs: Costs, spec: Table8Spec) -> Estimate:
    """How many times as long the slower estimator takes with the largest batches."""
    return time_ratio(*(costs[estimator, spec.batch_sizes[-1]] for estimator in ESTIMATORS))


def _passes(costs: Costs, spec: Table8Spec) -> str:
    slow, fast = (costs[estimator, spec.batch_sizes[-1]] for estimator in ESTIMATORS)
    return (
        f"Passes over the set: {slow.row['forwards']:.0f} forwards by {slow.estimator}; {fast.row['forwards']:.0f} "
        f"forward and {fast.row['backwards']:.0f} backward by {fast.estimator}. With {slow.batch_size} samples in a "
        f"batch the former takes {number_with_ci(_slow_to_fast(costs, spec))} times as long."
    )


def _table(costs: Costs, spec: Table8Spec) -> str:
    head = ["samples in a batch", "padded tokens", *(f"{estimator}, s" for estimator in ESTIMATORS), "the paper, s"]
    rows = []
    for size in spec.batch_sizes:
        of_size = [costs[estimator, size] for estimator in ESTIMATORS]
        seconds = [number_with_ci(cost.mean_seconds) for cost in of_size]
        rows.append([str(size), str(of_size[0].row["batch_tokens"]), *seconds, str(PAPER_SECONDS.get(size, ""))])
    return markdown_table(head, rows)


def _claims(costs: Costs, spec: Table8Spec, margin: float) -> list[Claim]:
    """Over the sizes that the paper has too, and over all where there are others: small batches gain most."""
    in_paper = [size for size in spec.batch_sizes if size in PAPER_SECONDS]
    claims = []
    if len(in_paper) > 1:
        paper = math.log(PAPER_SECONDS[in_paper[0]] / PAPER_SECONDS[in_paper[-1]])
        claims.append(_gain(costs, in_paper, half_of(paper), paper))
    if in_paper != spec.batch_sizes:
        claims.append(_gain(costs, spec.batch_sizes, margin))
    return claims


def _gain(costs: Costs, sizes: Sequence[int], margin: float, paper: float | None = None) -> Claim:
    """How much longer the smallest of some sizes takes than the largest."""
    smallest, largest = costs["monte-carlo", sizes[0]], costs["monte-carlo", sizes[-1]]
    # Repeat by repeat, as in `time_ratio`.
    logs = np.log(smallest.seconds / largest.seconds)
    return Claim(
        "scoring takes less time with larger batches",
        f"time with {sizes[0]} in a batch / with {sizes[-1]}, Monte Carlo",
        +1,
        margin,
        over_runs(logs),
        len(logs),
        "repeats",
        "log ratio",
        paper,
    )


def _claim(costs: Costs, spec: Table8Spec, verdicts: Sequence[Verdict]) -> str:
    smallest, largest = min(PAPER_SECONDS), max(PAPER_SECONDS)
    factor = PAPER_SECONDS[smallest] / PAPER_SECONDS[largest]
    by_monte_carlo = [costs["monte-carlo", size] for size in spec.batch_sizes]
    fastest = min(by_monte_carlo, key=lambda cost: cost.mean_seconds.value)
    return (
        f"The claim that {verdicts[0].claim.text}: {listed(verdicts)}. The fastest here is {fastest.batch_size} in a "
        f"batch. (The paper's factor from {smallest} to {largest} is {factor:.2f}, on another machine with a larger "
        "model.)"
    )


# --- Panels -------------------------------------------------------------------------------------------------

# Colour, marker, and a factor that moves marks to the side, so that intervals do not hide one another.
STYLES = {"monte-carlo": (BLUE, "o", 0.97), "gradient": (GREEN, "s", 1.03)}


def _seconds_by_size(costs: Costs, spec: Table8Spec) -> Draw:
    def draw(axes: Axes) -> None:
        for estimator, (colour, marker, shift) in STYLES.items():
            means = [costs[estimator, size].mean_seconds for size in spec.batch_sizes]
            label = f"{estimator}, K = {spec.draws}" if estimator == "monte-carlo" else estimator
            _line(axes, shift * np.array(spec.batch_sizes), means, colour, marker, label)
        axes.set_yscale("log")
        axes.set_ylabel("seconds for the set, 95 % CI of repeats")
        axes.set_title("Time by batch size")
        _label_sizes(axes, spec.batch_sizes)

    return draw


def _seconds_relative(costs: Costs, spec: Table8Spec) -> Draw:
    def draw(axes: Axes) -> None:
        in_paper = next((size for size in spec.batch_sizes if size in PAPER_SECONDS), None)
        base = in_paper or spec.batch_sizes[0]
        for estimator, (colour, marker, shift) in STYLES.items():
            ratios = [time_ratio(costs[estimator, size], costs[estimator, base]) for size in spec.batch_sizes]
            _line(axes, shift * np.array(spec.batch_sizes), ratios, colour, marker, estimator)
        sizes = list(spec.batch_sizes)
        if in_paper:
            paper = [seconds / PAPER_SECONDS[base] for seconds in PAPER_SECONDS.values()]
            axes.plot(list(PAPER_SECONDS), paper, "--", color=MUTED, marker="D", markersize=5, label="the paper")
            sizes = sorted({*sizes, *PAPER_SECONDS})
        axes.axhline(1, color=MUTED, linewidth=1)
        axes.set_ylabel(f"time, that with {base} in a batch being 1")
        axes.set_ylim(bottom=0)
        axes.set_title("What a larger batch saves")
        _label_sizes(axes, sizes)

    return draw


def _line(axes: Axes, x: np.ndarray, estimates: Sequence[Estimate], colour: str, marker: str, label: str) -> None:
    axes.plot(x, [e.value for e in estimates], color=colour, marker=marker, markersize=7, label=label)
    axes.vlines(x, [e.low for e in estimates], [e.high for e in estimates], color=colour, linewidth=2)


def _label_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("samples in a batch")
    axes.legend()


EXPERIMENT = Experiment(
    name="table8",
    title="time of MRD by batch size",
    question="How long does scoring a forget set take, and what do larger batches save?",
    claim="The time of MRD falls as the batch grows: from 3m30s with 8 samples in a batch to 1m23s with 128.",
    run=run,
)
