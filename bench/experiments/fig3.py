"""Figure 3: do metrics of training difficulty and MRD order groups of samples as the true unlearning difficulty does?

The true difficulty of a group is mean |Δθ| when all of its samples are forgotten; a metric of a group is the mean over
its samples. Groups are independent draws from one forget set, so intervals are about further groups of that set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from scipy import stats
from transformers import PreTrainedModel

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.experiments.shared.single_samples import is_below
from bench.files.identity import with_spec_hash
from bench.files.score_file import write_scores
from bench.files.status import FINISHED
from bench.jobs.draws import read_finished
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.sweep_tables import as_table
from bench.models.embedded import shorter_training
from bench.models.find import ModelReference, find_model
from bench.report.figures import BLUE, GREEN, INK, MUTED, ORANGE, VERMILLION, Draw
from bench.report.verdicts import listed
from bench.report.words import interval_columns, with_ci
from bench.stats.estimates import RESAMPLES, Estimate, over_sets, partial_spearman, rank_correlation, spearman
from bench.stats.verdicts import Claim, Verdict, bootstrapped, decide
from bench.tasks.datasets import load_dataset
from scoring.errors import UserError
from scoring.load import load_model
from scoring.replica import TransformersReplica
from scoring.samples import BATCH_TOKENS, Batch, encode, make_batches
from scoring.settings import Doc, Ge, check
from scoring.training_difficulty import el2n, grand, vog
from scoring.work import ReplicaSpec

SCHEMA_VERSION = 1
MRD = "MRD"
ORDERS, AHEAD = "correlation", "difference of correlations"  # effects that margins are named for


@dataclass(frozen=True)
class Metric:
    """A metric that orders groups.

    Attributes:
        column: of the table of groups.
        title: as printed.
        harder: +1 if a higher value should mean harder, -1 if a lower one.
        colour: of its line.
    """

    column: str
    title: str
    harder: int
    colour: str


METRICS = (
    Metric("mrd", MRD, -1, BLUE),
    Metric("grand", "GraNd", +1, VERMILLION),
    Metric("el2n", "EL2N", +1, GREEN),
    Metric("vog", "VoG", +1, ORANGE),
)


@dataclass(frozen=True, kw_only=True)
class Fig3Spec:
    """How training difficulty is measured. VoG needs earlier states of the model's training."""

    checkpoints: Annotated[
        list[str],
        Doc("earlier states of the model: folders or Hugging Face ids, the earliest first, without the model itself"),
    ] = field(default_factory=list)
    epochs: Annotated[
        list[Annotated[int, Ge(1)]],
        Doc(
            "instead of checkpoints, for an embedded model: trainings from the same initial weights on the same data "
            "that end after so many epochs, each with its own learning-rate schedule"
        ),
    ] = field(default_factory=list)
    batch_tokens: Annotated[int, Ge(1), Doc("padded tokens in a batch")] = BATCH_TOKENS

    def checked(self) -> Self:
        """The same.

        Raises:
            UserError: a value that is not allowed.
        """
        check(self)
        return self


def run(setup: Setup) -> Answer:
    sweep = setup.sweep()
    spec, base = setup.spec(Fig3Spec, "metrics"), setup.spec(SweepSpec, "sweep").base
    with setup.section("metrics"):
        metrics = measure(setup, spec, base)
    selections = pq.read_table(sweep.folder / "selections.parquet")
    return answer(groups_of(sweep.trials, sweep.samples, selections, metrics), setup.margins(ORDERS, AHEAD))


# --- Training difficulty ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingDifficulty:
    """The task of a replica to measure GraNd, EL2N and VoG of the samples of a shard.

    Attributes:
        shard: see `scoring.work.ReplicaTask`.
        checkpoints: source and revision of the earlier states of the replica's model; without any there is no VoG.
    """

    shard: int
    checkpoints: tuple[tuple[str, str | None], ...]

    @property
    def key(self) -> str:
        return f"training-difficulty-{self.shard:06d}"

    def do(
        self, replica: TransformersReplica, batches: Sequence[Batch], cache: dict[str, Any]
    ) -> list[dict[str, np.ndarray]]:
        """Column -> values of the samples, for each batch."""
        columns = []
        for batch in batches:
            on_device = batch.to(replica.device)
            scores = {"grand": grand(replica.model, on_device), "el2n": el2n(replica.model, on_device)}
            if self.checkpoints:
                scores["vog"] = vog(self._states(replica), on_device)
            values = {name: score.cpu().numpy() for name, score in scores.items()}
            columns.append({"index": batch.indices.numpy(), **values})
        return columns

    def _states(self, replica: TransformersReplica) -> Iterator[PreTrainedModel]:
        for source, revision in self.checkpoints:
            yield load_model(source, "float32", str(replica.device), revision)
        yield replica.model


def measure(setup: Setup, spec: Fig3Spec, base: dict[str, Any]) -> pa.Table:
    """GraNd, EL2N and VoG of every sample of the forget set: sample_id, num_tokens and a column for each metric.

    If `training-difficulty.parquet` has these numbers already, it is read.

    Raises:
        UserError: a checkpoint that does not exist, or epochs of a model that is not an embedded one.
    """
    model = find_model(base["model"])
    dataset = load_dataset(base["task"], base.get("forget_split"), model.tokenizer)
    shorter = [shorter_training(base["model"], epochs, setup.progress) for epochs in spec.epochs]
    checkpoints = [find_model(source) for source in (*spec.checkpoints, *shorter)]
    identity = with_spec_hash(
        {
            "schema_version": SCHEMA_VERSION,
            "model_fingerprint": model.fingerprint,
            "checkpoints": [checkpoint.fingerprint for checkpoint in checkpoints],
            "data_sha256": dataset.sha256,
            "batch_tokens": spec.batch_tokens,
        },
        (),
    )
    path = setup.work / "training-difficulty.parquet"
    if (measured := read_finished(path, identity)) is not None:
        return measured
    samples, _ = encode(dataset.texts, model.tokenizer, model.max_length)
    shards = [[batch] for batch in make_batches(samples, spec.batch_tokens)]
    values = _on_replicas(setup, model, checkpoints, shards)
    order = np.argsort(values.pop("index"))
    table = pa.table(
        {
            "sample_id": [sample.sample_id for sample in samples],
            "num_tokens": [sample.num_scored for sample in samples],
            **{name: column[order] for name, column in values.items()},
        }
    )
    write_scores(table, path, identity, {})
    return table


def _on_replicas(
    setup: Setup, model: ModelReference, checkpoints: Sequence[ModelReference], shards: Sequence[Sequence[Batch]]
) -> dict[str, np.ndarray]:
    """The columns of all samples, in the order in which batches were done."""
    sources = tuple((checkpoint.source, checkpoint.revision) for checkpoint in checkpoints)
    with setup.resources.replicas().pool(ReplicaSpec(model.source, model.revision)) as pool:
        tasks = [TrainingDifficulty(shard, sources) for shard in range(len(shards))]
        batches = [columns for _, result, _ in pool.run(tasks, shards) for columns in result]
    return {name: np.concatenate([columns[name] for columns in batches]) for name in batches[0]}


# --- The answer ---------------------------------------------------------------------------------------------


def groups_of(trials: pa.Table, samples: pa.Table, selections: pa.Table, metrics: pa.Table) -> pa.Table:
    """One row for each group that finished: its difficulty, and the means of the metrics over its samples.

    A group whose samples were all below the thresholds before any update had nothing to forget, and is left out.

    Args:
        trials, samples, selections: tables of a sweep over random selections, see `bench.jobs.sweep_tables`. Several
            runs of a group, which differ by their seed, are averaged.
        metrics: see `measure`.
    """
    metrics_of = {row["sample_id"]: row for row in metrics.to_pylist()}
    columns = [name for name in metrics.column_names if name != "sample_id"]
    members: dict[str, list[dict[str, Any]]] = {}
    for row in selections.to_pylist():
        if row["sample_id"] in metrics_of:
            members.setdefault(row["selection"], []).append(metrics_of[row["sample_id"]] | {"mrd": row["mrd"]})
    samples_of: dict[str, list[dict[str, Any]]] = {}
    for row in samples.to_pylist():
        samples_of.setdefault(row["trial"], []).append(row)
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in trials.to_pylist():
        if row["status"] == FINISHED and not all(is_below(row, sample) for sample in samples_of[row["trial"]]):
            runs.setdefault(row["selection"], []).append(row)
    return as_table(
        [
            {
                "group": name,
                "samples": seeds[0]["forget_samples"],
                "mean_abs_delta": float(np.mean([row["mean_abs_delta"] for row in seeds])),
                "updates": float(np.mean([row["updates"] for row in seeds])),
                "forgotten": all(row["forgotten"] == 1 for row in seeds),
                **{
                    column: _mean_of_known([sample[column] for sample in members[name]]) for column in (*columns, "mrd")
                },
            }
            for name, seeds in runs.items()
        ]
    )


def _mean_of_known(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


@dataclass(frozen=True)
class Ordering:
    """How a metric orders the groups.

    Attributes:
        metric: the metric.
        ranks: (n,) of the groups, 1 the easiest by the metric.
        correlation: Spearman's, with the difficulty; +1 if the metric's order from easy to hard is the true one.
        beyond_length: the same with the mean number of scored tokens partialled out.
        mrd_ahead: see `advantage`; None for MRD.
        hardness: (n,) the metric, turned so that high is hard.
    """

    metric: Metric
    ranks: np.ndarray
    correlation: Estimate
    beyond_length: Estimate
    mrd_ahead: Estimate | None
    hardness: np.ndarray


def orderings(table: pa.Table) -> list[Ordering]:
    """How each measured metric orders the groups, MRD first; groups that were not forgotten at the cap share the last
    rank."""
    hard = difficulties(table)
    tokens = table["num_tokens"].to_numpy()
    hardness = {
        metric: metric.harder * table[metric.column].to_numpy()
        for metric in METRICS
        if metric.column in table.column_names
    }
    by_mrd = hardness[METRICS[0]]
    return [
        Ordering(
            metric,
            stats.rankdata(values),
            spearman(values, hard),
            partial_spearman(values, hard, tokens),
            None if metric.title == MRD else advantage(by_mrd, values, hard),
            values,
        )
        for metric, values in hardness.items()
    ]


def advantage(first: np.ndarray, second: np.ndarray, truth: np.ndarray, resamples: int = RESAMPLES) -> Estimate:
    """The rank correlation of the first with the truth, less that of the second; all (n,).

    Where the second surely orders the other way round it is turned: that orders as well. (Its size alone would be above
    0 by chance even if it orders nothing.)
    """
    direction = spearman(second, truth).sign or 1

    def difference(sets: list[np.ndarray]) -> np.ndarray:
        rows = sets[0]
        return rank_correlation(first[rows], truth[rows]) - direction * rank_correlation(second[rows], truth[rows])

    return over_sets(difference, [len(truth)], resamples)


def difficulties(table: pa.Table) -> np.ndarray:
    """(n,) mean |Δθ|; inf for groups that were not forgotten at the cap."""
    return np.where(np.array(table["forgotten"].to_pylist()), table["mean_abs_delta"].to_numpy(), np.inf)


def answer(table: pa.Table, margins: Mapping[str, float]) -> Answer:
    """From a table of groups, see `groups_of`.

    Args:
        margins: smallest effects that matter, of ORDERS and AHEAD.

    Raises:
        UserError: fewer than two groups.
    """
    if table.num_rows < 2:
        raise UserError(f"{table.num_rows} groups finished: expected at least 2 to put in order")
    by_metric = orderings(table)
    hard = difficulties(table)
    sentences = [_headline(table, by_metric), _beyond_length(by_metric), *_mrd_ahead(by_metric)]
    if len(by_metric) < len(METRICS):
        sentences.append("VoG is left out: no earlier states of the model's training are named.")
    if capped := int(np.isinf(hard).sum()):
        sentences.append(
            f"{capped} of {len(hard)} groups were not wholly forgotten at the cap: they need more than was measured, "
            "and share the last rank."
        )
    decided = decide(claims_of(by_metric, hard, _unit(table), margins))
    sentences.append(_claim(decided))
    ranks = {f"rank_{ordering.metric.column}": ordering.ranks for ordering in by_metric}
    for name, column in (ranks | {"rank_difficulty": stats.rankdata(hard)}).items():
        table = table.append_column(name, pa.array(column))
    correlations = as_table(
        [
            {
                "metric": ordering.metric.title,
                **interval_columns("spearman", ordering.correlation),
                **interval_columns("length_partialled_out", ordering.beyond_length),
                **(interval_columns("mrd_ahead", ordering.mrd_ahead) if ordering.mrd_ahead else {}),
            }
            for ordering in by_metric
        ]
    )
    panels = [_rank_lines(hard, by_metric), _correlation_dots(by_metric)]
    return Answer(table, panels, sentences, decided, inches=(14.0, 5.5), tables={"fig3-correlations": correlations})


def claims_of(by_metric: Sequence[Ordering], hard: np.ndarray, unit: str, margins: Mapping[str, float]) -> list[Claim]:
    """That MRD orders groups as their difficulty does, and that every other metric does so less well."""
    mrd, *others = by_metric
    orders = Claim(
        "MRD orders samples as their difficulty does",
        "rank correlation of MRD's order with the difficulty",
        +1,
        margins[ORDERS],
        bootstrapped(spearman, mrd.hardness, hard),
        len(hard),
        unit,
        "correlation",
    )
    return [
        orders,
        *(
            Claim(
                "metrics of training difficulty do not order them as well",
                f"rank correlation of MRD less that of {ordering.metric.title}",
                +1,
                margins[AHEAD],
                bootstrapped(advantage, mrd.hardness, ordering.hardness, hard),
                len(hard),
                unit,
                "correlation",
            )
            for ordering in others
        ),
    ]


def _unit(table: pa.Table) -> str:
    size = table["samples"][0].as_py()
    return "samples" if size == 1 else f"groups of {size} samples"


def _headline(table: pa.Table, by_metric: Sequence[Ordering]) -> str:
    parts = ", ".join(f"{ordering.metric.title} {with_ci(ordering.correlation)}" for ordering in by_metric)
    return (
        f"**Rank correlation with the true difficulty of {table.num_rows} {_unit(table)}: {parts}**. "
        "All are turned so that +1 means: easy to hard by the metric is easy to hard in truth; "
        "hard is high GraNd, EL2N and VoG, and low MRD. The truth is mean |Δθ| when all samples of a group are "
        "forgotten."
    )


def _beyond_length(by_metric: Sequence[Ordering]) -> str:
    parts = ", ".join(f"{ordering.metric.title} {with_ci(ordering.beyond_length)}" for ordering in by_metric)
    return (
        f"With the mean number of scored tokens partialled out: {parts}. MRD sums over tokens, GraNd and EL2N do not."
    )


def _mrd_ahead(by_metric: Sequence[Ordering]) -> list[str]:
    parts = [f"{ordering.metric.title} {with_ci(ordering.mrd_ahead)}" for ordering in by_metric if ordering.mrd_ahead]
    if not parts:
        return []
    return [
        "MRD's rank correlation less that of the other metric, turned where it surely orders the other way round: "
        f"{', '.join(parts)}."
    ]


def _claim(decided: Sequence[Verdict]) -> str:
    mrd, *others = decided
    text = f"The paper's claim: {mrd.claim.text}: {mrd.word} here"
    if others:
        text += f"; {others[0].claim.text}: {listed(others)}"
    return f"{text}."


# --- Pictures -----------------------------------------------------------------------------------------------


def _rank_lines(hard: np.ndarray, by_metric: Sequence[Ordering]) -> Draw:
    """Ranks by each metric, groups in the order of their difficulty."""

    def draw(axes: Axes) -> None:
        order = np.argsort(hard, kind="stable")
        place = np.arange(1, len(order) + 1)
        axes.plot(place, place, color=INK, linestyle="--", linewidth=1, label="the true order")
        for ordering in reversed(by_metric):
            is_mrd = ordering.metric.title == MRD
            axes.plot(
                place,
                ordering.ranks[order],
                color=ordering.metric.colour,
                marker="o" if is_mrd else ".",
                markersize=6 if is_mrd else 5,
                linewidth=2.2 if is_mrd else 1.1,
                alpha=1.0 if is_mrd else 0.75,
                label=ordering.metric.title,
            )
        ticks = np.unique(np.linspace(1, len(order), 6).round())
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        axes.set_ylim(0, 1.22 * len(order))
        axes.set_xlabel("groups, easiest to hardest to forget")
        axes.set_ylabel("rank by the metric (high: hard)")
        axes.set_title("Groups in the order of their true difficulty")
        axes.legend(loc="upper left", ncols=3)

    return draw


def _correlation_dots(by_metric: Sequence[Ordering]) -> Draw:
    """Rank correlations with the difficulty, with 95 % intervals."""

    def draw(axes: Axes) -> None:
        heights = -np.arange(len(by_metric), dtype=float)
        for up, marker, filled, label in ((0.12, "s", True, "as it is"), (-0.12, "o", False, "length partialled out")):
            for y, ordering in zip(heights, by_metric, strict=True):
                estimate = ordering.correlation if filled else ordering.beyond_length
                colour = ordering.metric.colour
                inside = colour if filled else "white"
                axes.plot([estimate.low, estimate.high], [y + up] * 2, color=colour, linewidth=1.5)
                axes.plot(estimate.value, y + up, marker, color=colour, markerfacecolor=inside, markersize=8)
            axes.plot([], [], marker, color=MUTED, markerfacecolor=MUTED if filled else "white", label=label)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_xlim(-1, 1)
        axes.set_ylim(-len(by_metric) + 0.4, 1.0)
        axes.set_yticks(heights, [ordering.metric.title for ordering in by_metric])
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("rank correlation with the true difficulty (95 % CI)")
        axes.set_title("Agreement with it")
        axes.legend(loc="upper center", ncols=2)

    return draw


EXPERIMENT = Experiment(
    "fig3",
    "metrics of difficulty",
    "Do GraNd, EL2N, VoG and MRD order groups of samples as their true unlearning difficulty does?",
    "metrics of training difficulty do not follow the order of unlearning difficulty, and MRD does (Figure 3).",
    run,
)
