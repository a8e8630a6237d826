"""Table 8: what does scoring a forget set cost, by the number of samples in a batch?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter
from tqdm import tqdm

from bench.experiments.experiment import Answer, Experiment, Setting
from bench.experiments.shared.verdicts import lies_within
from bench.files.identity import with_spec_hash
from bench.files.parts import Parts
from bench.files.score_file import write_scores
from bench.jobs.draws import read_finished
from bench.jobs.resources import Resources
from bench.models.find import find_model
from bench.report.figures import BLUE, GREEN, MUTED, Draw
from bench.report.words import interval_columns, markdown_table, number_with_ci
from bench.stats.estimates import Estimate, geometric_mean
from bench.tasks.datasets import load_dataset
from scoring.api import DRAWS_PER_TASK
from scoring.cluster import connect
from scoring.errors import UserError
from scoring.mrd import EstimatorName, Request, base_logprobs, estimate
from scoring.pool import ReplicaPool
from scoring.replica import TransformersReplica
from scoring.samples import Batch, Sample, collate, encode, evenly_spaced
from scoring.work import Facts, ReplicaSpec

ESTIMATORS: tuple[EstimatorName, ...] = ("monte-carlo", "gradient")
PAPERS_SECONDS = {8: 210, 16: 152, 32: 127, 64: 115, 128: 83}  # Table 8, on another machine
FEWEST_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Table8Spec:
    """What is timed.

    Attributes:
        model, task, split: whose samples.
        samples: how many, evenly spaced over the split; None: all.
        batch_sizes: samples in a batch, ascending.
        draws: K of Monte Carlo whose time is reported.
        timed_draws: draws that are timed; the rest is in proportion, every draw costs the same.
        repeats: how often everything is timed, in turn.
        sigma: of Monte Carlo.
    """

    model: str
    task: str
    split: str | None = None
    samples: int | None = None
    batch_sizes: list[int]
    draws: int = 200
    timed_draws: int = DRAWS_PER_TASK
    repeats: int = FEWEST_REPEATS
    sigma: float = 1e-5

    def checked(self) -> Table8Spec:
        """The same.

        Raises:
            UserError: a value out of range.
        """
        sizes = self.batch_sizes
        if len(sizes) < 2 or sizes != sorted(set(sizes)) or sizes[0] < 1:
            raise UserError(f"batch_sizes is {sizes}: expected two or more different ones, ascending")
        if self.repeats < FEWEST_REPEATS:
            raise UserError(f"repeats is {self.repeats}: expected {FEWEST_REPEATS} or more, for an interval")
        if not 1 <= self.timed_draws <= self.draws:
            raise UserError(f"timed_draws is {self.timed_draws}: expected 1 to {self.draws}, the draws")
        return self


@dataclass(frozen=True)
class Timing:
    """A work for a replica: one estimator over the batches of one size.

    Attributes:
        shard: the number of the batch size.
        estimator, sigma, draws: of which.
        repeat: of how many; negative for the first one, which is not counted.
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
        """Seconds of what is done once, and of all draws; each returns its numbers, so that a GPU has finished."""
        started = time.perf_counter()
        if self.estimator == "gradient":
            estimate(replica, batches, Request(self.estimator, self.sigma, 0))
            return time.perf_counter() - started, 0.0
        base = [logprobs.cpu() for logprobs in base_logprobs(replica, batches, self.estimator)]
        base = [logprobs.to(replica.device) for logprobs in base]
        once = time.perf_counter()
        estimate(replica, batches, Request(self.estimator, self.sigma, 0, 0, self.draws), base)
        return once - started, time.perf_counter() - once


def run(setting: Setting) -> Answer:
    spec = setting.spec(Table8Spec, "timing").checked()
    return answer(measure(spec, setting), spec)


def measure(spec: Table8Spec, setting: Setting) -> pa.Table:
    """A row for each repeat, batch size and estimator, timed in one replica that is loaded and warm."""
    model = find_model(spec.model)
    dataset = load_dataset(spec.task, spec.split, model.tokenizer)
    samples, _ = encode(evenly_spaced(dataset.texts, spec.samples), model.tokenizer, model.max_length)
    groups = [in_batches(samples, size) for size in spec.batch_sizes]
    content = dataclasses.asdict(spec) | {"model_fingerprint": model.fingerprint, "data_sha256": dataset.sha256}
    works = [
        # There and back: what drifts over a repeat strikes both ends alike.
        Timing(shard, estimator, spec.sigma, spec.timed_draws, repeat)
        for repeat in range(spec.repeats)
        for shard in range(len(groups))[:: -1 if repeat % 2 else 1]
        for estimator in ESTIMATORS
    ]
    path = setting.work / "timings.parquet"
    identity = with_spec_hash(content, ("model", "task", "split"))
    if (found := read_finished(path, identity)) is not None:
        return found
    with Parts(path, identity) as parts:
        todo = [work for work in works if not parts.has(work.key)]
        if todo:
            connect()
            for work, (once, drawn), facts in _timed(todo, groups, ReplicaSpec(model.source, model.revision), setting):
                row = _row(work, spec, groups[work.shard], once, drawn, facts)
                parts.write(work.key, pa.Table.from_pylist([row]), {})
        table = pa.concat_tables([parts.read(work.key)[0] for work in works]).replace_schema_metadata()
        write_scores(table, path, identity, {})
        parts.remove()
    return table


def _timed(
    works: Sequence[Timing], groups: Sequence[Sequence[Batch]], replica: ReplicaSpec, setting: Setting
) -> Iterator[tuple[Timing, tuple[float, float], Facts]]:
    """One after the other, in one replica."""
    shared = setting.resources
    footprint = Resources(None, shared.cpus_per_trial, shared.gpus_per_trial).footprint()
    # The first time pays for checks and memory; every size, since each has shapes of its own.
    first = [dataclasses.replace(work, draws=1, repeat=-1) for work in works if work.repeat == works[-1].repeat]
    with (
        ReplicaPool(replica, footprint, 1) as pool,
        tqdm(total=len(works), unit="timing", disable=not setting.progress) as bar,
    ):
        for work, seconds, facts in pool.run([*first, *works], groups):
            if work.repeat >= 0:
                yield work, seconds, facts
                bar.update()


def in_batches(samples: Sequence[Sample], size: int) -> list[Batch]:
    """Batches of so many samples of similar length, the last of what is left."""
    ordered = sorted(samples, key=lambda sample: (sample.length, sample.index))
    return [collate(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def _row(
    work: Timing, spec: Table8Spec, batches: Sequence[Batch], once: float, drawn: float, facts: Facts
) -> dict[str, Any]:
    # Passes over one batch become passes over the set; one of them is done once, the others for every draw.
    forwards, backwards = facts.forwards / len(batches), facts.backwards / len(batches)
    scale = spec.draws / work.draws if work.estimator == "monte-carlo" else 0.0
    return {
        "repeat": work.repeat,
        "estimator": work.estimator,
        "batch_size": spec.batch_sizes[work.shard],
        "batch_tokens": max(batch.input_ids.numel() for batch in batches),
        "batches": len(batches),
        "samples": sum(len(batch) for batch in batches),
        "seconds": once + drawn * scale,
        "timed_seconds": once + drawn,
        "forwards": 1 + (forwards - 1) * scale if scale else forwards,
        "backwards": backwards,
    }


@dataclass(frozen=True)
class BatchCost:
    """An estimator at a batch size.

    Attributes:
        estimator, batch_size: which.
        seconds: (repeats,), in the order of the repeats.
        row: what all repeats have in common.
    """

    estimator: str
    batch_size: int
    seconds: np.ndarray
    row: Mapping[str, Any]


def answer(timings: pa.Table, spec: Table8Spec) -> Answer:
    """From the rows of `measure`."""
    costs: dict[tuple[str, int], BatchCost] = {
        (estimator, size): _cost(timings, estimator, size) for estimator in ESTIMATORS for size in spec.batch_sizes
    }
    table = pa.Table.from_pylist([_line(each) for each in costs.values()])
    panels = [_seconds(costs, spec), _relative(costs, spec)]
    sentences = [_range(costs, spec), _passes(costs, spec), _markdown(costs, spec), _claim(costs, spec)]
    return Answer(table, panels, sentences, inches=(12.0, 5.0), tables={"table8-repeats": timings})


def _cost(timings: pa.Table, estimator: str, size: int) -> BatchCost:
    rows = [row for row in timings.to_pylist() if (row["estimator"], row["batch_size"]) == (estimator, size)]
    rows.sort(key=lambda row: row["repeat"])
    return BatchCost(estimator, size, np.array([row["seconds"] for row in rows]), rows[0])


def ratio(over: BatchCost, under: BatchCost) -> Estimate:
    """Of times, repeat by repeat: what disturbs a repeat disturbs both."""
    return geometric_mean(over.seconds / under.seconds)


def _line(each: BatchCost) -> dict[str, Any]:
    shared = ("samples", "batches", "batch_tokens", "forwards", "backwards")
    row: dict[str, Any] = {"estimator": each.estimator, "batch_size": each.batch_size}
    return row | interval_columns("seconds", geometric_mean(each.seconds)) | {name: each.row[name] for name in shared}


Costs = Mapping[tuple[str, int], BatchCost]


def _ends(costs: Costs, spec: Table8Spec, estimator: str) -> tuple[BatchCost, BatchCost]:
    return costs[estimator, spec.batch_sizes[0]], costs[estimator, spec.batch_sizes[-1]]


def _range(costs: Costs, spec: Table8Spec) -> str:
    parts = []
    for estimator in ESTIMATORS:
        first, last = _ends(costs, spec, estimator)
        parts.append(
            f"{estimator}{f' with K = {spec.draws}' if estimator == 'monte-carlo' else ''} takes "
            f"{number_with_ci(geometric_mean(first.seconds))} s with {first.batch_size} in a batch and "
            f"{number_with_ci(geometric_mean(last.seconds))} s with {last.batch_size}"
        )
    scaled = (
        f" ({spec.timed_draws} draws are timed, the rest is in proportion)" if spec.timed_draws < spec.draws else ""
    )
    samples = next(iter(costs.values())).row["samples"]
    return (
        f"**Scoring {samples} samples**, one replica: {'; '.join(parts)}{scaled}. Intervals are over {spec.repeats} "
        "repeats, in which all sizes take turns."
    )


def _passes(costs: Costs, spec: Table8Spec) -> str:
    slow, fast = (costs[estimator, spec.batch_sizes[-1]] for estimator in ESTIMATORS)
    return (
        f"Passes over the set: {slow.row['forwards']:.0f} forwards by {slow.estimator}; {fast.row['forwards']:.0f} "
        f"forward and {fast.row['backwards']:.0f} backward by {fast.estimator}. With {slow.batch_size} samples in a "
        f"batch the former takes {number_with_ci(ratio(slow, fast))} times as long."
    )


def _markdown(costs: Costs, spec: Table8Spec) -> str:
    head = ["samples in a batch", "padded tokens", *(f"{estimator}, s" for estimator in ESTIMATORS), "the paper, s"]
    rows = []
    for size in spec.batch_sizes:
        each = [costs[estimator, size] for estimator in ESTIMATORS]
        times = [number_with_ci(geometric_mean(cost.seconds)) for cost in each]
        rows.append([str(size), str(each[0].row["batch_tokens"]), *times, str(PAPERS_SECONDS.get(size, ""))])
    return markdown_table(head, rows)


def _claim(costs: Costs, spec: Table8Spec) -> str:
    """Over all sizes, and over those that the paper has too: small batches gain most."""
    smallest, largest = min(PAPERS_SECONDS), max(PAPERS_SECONDS)
    factor = PAPERS_SECONDS[smallest] / PAPERS_SECONDS[largest]
    own = [costs["monte-carlo", size] for size in spec.batch_sizes]
    shared = [each for each in own if each.batch_size in PAPERS_SECONDS]
    parts = [_judged(own)]
    if 1 < len(shared) < len(own):
        parts.append(f"over the sizes that the paper has as well, it {_judged(shared)}")
    return (
        f"The claim that scoring takes less time with larger batches {'; '.join(parts)}. (The paper's factor from "
        f"{smallest} to {largest} is {factor:.2f}, on another machine with a larger model.)"
    )


def _judged(costs: Sequence[BatchCost]) -> str:
    first, last = costs[0], costs[-1]
    gain = ratio(first, last)
    return (
        f"{lies_within(gain, 1.0, np.inf)} here: Monte Carlo with {first.batch_size} in a batch takes "
        f"{number_with_ci(gain)} times as long as with {last.batch_size}"
    )


# --- Panels -------------------------------------------------------------------------------------------------

# The last is a shift to the side, as a factor: intervals shall not hide one another.
STYLES = {"monte-carlo": (BLUE, "o", 0.97), "gradient": (GREEN, "s", 1.03)}


def _seconds(costs: Costs, spec: Table8Spec) -> Draw:
    def draw(axes: Axes) -> None:
        for estimator, (colour, marker, shift) in STYLES.items():
            found = [geometric_mean(costs[estimator, size].seconds) for size in spec.batch_sizes]
            label = f"{estimator}, K = {spec.draws}" if estimator == "monte-carlo" else estimator
            _dots(axes, shift * np.array(spec.batch_sizes), found, colour, marker, label)
        axes.set_yscale("log")
        axes.set_ylabel("seconds for the set, 95 % CI of repeats")
        axes.set_title("Time by batch size")
        _finish(axes, spec.batch_sizes)

    return draw


def _relative(costs: Costs, spec: Table8Spec) -> Draw:
    def draw(axes: Axes) -> None:
        shared = next((size for size in spec.batch_sizes if size in PAPERS_SECONDS), None)
        base = shared or spec.batch_sizes[0]
        for estimator, (colour, marker, shift) in STYLES.items():
            found = [ratio(costs[estimator, size], costs[estimator, base]) for size in spec.batch_sizes]
            _dots(axes, shift * np.array(spec.batch_sizes), found, colour, marker, estimator)
        sizes = list(spec.batch_sizes)
        if shared:
            paper = [seconds / PAPERS_SECONDS[base] for seconds in PAPERS_SECONDS.values()]
            axes.plot(list(PAPERS_SECONDS), paper, "--", color=MUTED, marker="D", markersize=5, label="the paper")
            sizes = sorted({*sizes, *PAPERS_SECONDS})
        axes.axhline(1, color=MUTED, linewidth=1)
        axes.set_ylabel(f"time, that with {base} in a batch being 1")
        axes.set_ylim(bottom=0)
        axes.set_title("What a larger batch saves")
        _finish(axes, sizes)

    return draw


def _dots(axes: Axes, x: np.ndarray, found: Sequence[Estimate], colour: str, marker: str, label: str) -> None:
    axes.plot(x, [each.value for each in found], color=colour, marker=marker, markersize=7, label=label)
    axes.vlines(x, [each.low for each in found], [each.high for each in found], color=colour, linewidth=2)


def _finish(axes: Axes, sizes: Sequence[int]) -> None:
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
