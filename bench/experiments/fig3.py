"""Figure 3: do metrics of training difficulty and MRD order groups of samples as the true unlearning difficulty does?

The true difficulty of a group is mean |Δθ| when all of its samples are forgotten; a metric of a group is the mean over
its samples. Groups are draws of their own from one forget set, so intervals are about further groups of that set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from scipy import stats
from transformers import PreTrainedModel

from bench.experiments.experiment import Answer, Experiment, Setting
from bench.experiments.shared.single_samples import estimated
from bench.experiments.shared.verdicts import CONTRADICTED, HOLDS, UNKNOWN, ruled, ruling
from bench.files.identity import with_spec_hash
from bench.files.score_file import read_scores, write_scores
from bench.files.status import FINISHED
from bench.jobs.resources import Resources
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.sweep_tables import as_table
from bench.models.cache import trained_once
from bench.models.embedded import FAMILIES, model_spec, train, train_tokenizer
from bench.models.find import ModelReference, find_model
from bench.report.figures import BLUE, GREEN, INK, MUTED, ORANGE, VERMILLION, Draw
from bench.report.words import with_ci
from bench.stats.estimates import Estimate, over_sets, partial_spearman, spearman
from bench.tasks.datasets import load_dataset
from scoring.cluster import connect
from scoring.errors import UserError
from scoring.pool import ReplicaPool
from scoring.replica import TransformersReplica, load_model
from scoring.samples import Batch, encode, make_batches
from scoring.training_difficulty import el2n, grand, vog
from scoring.work import ReplicaSpec

SCHEMA_VERSION = 1
MRD = "MRD"


@dataclass(frozen=True)
class Metric:
    """One that orders groups.

    Attributes:
        column: of the table of groups.
        title: as printed.
        harder: +1 if a higher value is said to mean harder, -1 if a lower one.
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
    """How training difficulty is measured. VoG asks for earlier states of the model's training.

    Attributes:
        checkpoints: models, as for find_model, from the earliest on; the model itself is the last.
        epochs: of an embedded model instead: trainings from the same initial weights on the same data that end after
            so many epochs, each with a learning-rate schedule of its own, which stand in for checkpoints.
        batch_tokens: padded tokens in a batch.
    """

    checkpoints: list[str] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    batch_tokens: int = 4096


def run(setting: Setting) -> Answer:
    result = setting.sweep()
    metrics = measure(setting, setting.spec(Fig3Spec, "metrics"), setting.spec(SweepSpec, "sweep").base)
    selections = pq.read_table(result.folder / "selections.parquet")
    return answer(groups(result.trials, selections, metrics))


# --- Training difficulty ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """GraNd, EL2N and VoG of a group of batches.

    Attributes:
        shard: see `scoring.work.Work`.
        checkpoints: source and revision of the earlier states of the replica's model; none: no VoG.
    """

    shard: int
    checkpoints: tuple[tuple[str, str | None], ...]

    @property
    def key(self) -> str:
        return f"training-difficulty-{self.shard:06d}"

    def do(
        self, replica: TransformersReplica, batches: Sequence[Batch], kept: dict[str, Any]
    ) -> list[dict[str, np.ndarray]]:
        """For each batch its samples' values by column."""
        found = []
        for batch in batches:
            here = batch.to(replica.device)
            scores = {"grand": grand(replica.model, here), "el2n": el2n(replica.model, here)}
            if self.checkpoints:
                scores["vog"] = vog(self._states(replica), here)
            values = {name: score.cpu().numpy() for name, score in scores.items()}
            found.append({"index": batch.indices.numpy(), **values})
        return found

    def _states(self, replica: TransformersReplica) -> Iterator[PreTrainedModel]:
        for source, revision in self.checkpoints:
            yield load_model(source, "float32", str(replica.device), revision)
        yield replica.model


def measure(setting: Setting, spec: Fig3Spec, base: dict[str, Any]) -> pa.Table:
    """GraNd, EL2N and VoG of every sample of the forget set: sample_id, num_tokens and a column for each.

    What `training-difficulty.parquet` holds already is read.

    Raises:
        UserError: a checkpoint that does not exist, or epochs of a model that is not an embedded one.
    """
    model = find_model(base["model"])
    dataset = load_dataset(base["task"], base.get("forget_split"), model.tokenizer)
    names = [*spec.checkpoints, *(_shorter_training(base["model"], epochs, setting.progress) for epochs in spec.epochs)]
    checkpoints = [find_model(name) for name in names]
    identity = with_spec_hash(
        {
            "schema_version": SCHEMA_VERSION,
            "model_fingerprint": model.fingerprint,
            "checkpoints": [each.fingerprint for each in checkpoints],
            "data_sha256": dataset.sha256,
            "batch_tokens": spec.batch_tokens,
        },
        (),
    )
    path = setting.work / "training-difficulty.parquet"
    if (known := _known(path, identity)) is not None:
        return known
    samples, _ = encode(dataset.texts, model.tokenizer, model.max_length)
    shards = [[batch] for batch in make_batches(samples, spec.batch_tokens)]
    values = _on_replicas(setting, model, checkpoints, shards)
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
    setting: Setting, model: ModelReference, checkpoints: Sequence[ModelReference], shards: Sequence[Sequence[Batch]]
) -> dict[str, np.ndarray]:
    connect()
    sources = tuple((each.source, each.revision) for each in checkpoints)
    spread = setting.resources
    footprint = Resources(spread.concurrent, spread.cpus_per_trial, spread.gpus_per_trial).footprint()
    with ReplicaPool(ReplicaSpec(model.source, model.revision), footprint, spread.concurrent) as pool:
        works = [Work(shard, sources) for shard in range(len(shards))]
        parts = [part for _, result, _ in pool.run(works, shards) for part in result]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _known(path: Path, identity: dict[str, Any]) -> pa.Table | None:
    """What the file holds, if it is of this identity."""
    if not path.is_file():
        return None
    table, spec, _ = read_scores(path)
    return table if spec["spec_hash"] == identity["spec_hash"] else None


def _shorter_training(name: str, epochs: int, progress: bool) -> str:
    """Folder of an embedded model whose training ended after so many epochs; cached as the model is."""
    family, _, kind = name.partition(":")
    if family not in FAMILIES:
        raise UserError(
            f"metrics: epochs {epochs}: {name!r} is not an embedded model, which alone can be trained again; name "
            "checkpoints instead"
        )
    spec = model_spec(kind or "full", family)
    spec |= {"training": spec["training"] | {"epochs": epochs}}

    def train_into(folder: Path) -> float:
        tokenizer = train_tokenizer(FAMILIES[family].tokenizer_text())
        model, loss = train(spec, tokenizer, progress)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return loss

    return str(trained_once(f"{family}-{kind or 'full'}-{epochs}-epochs", spec, train_into, threads=None))


# --- The answer ---------------------------------------------------------------------------------------------


def groups(trials: pa.Table, selections: pa.Table, metrics: pa.Table) -> pa.Table:
    """One row for each group that finished: its difficulty, and the means of the metrics over its samples.

    Args:
        trials, selections: tables of a sweep over random selections, see `bench.jobs.sweep`; of several runs of a
        group,
            by seed, the mean is taken.
        metrics: see `measure`.
    """
    known = {row["sample_id"]: row for row in metrics.to_pylist()}
    columns = [name for name in metrics.column_names if name != "sample_id"]
    members: dict[str, list[dict[str, Any]]] = {}
    for row in selections.to_pylist():
        if row["sample_id"] in known:
            members.setdefault(row["selection"], []).append(known[row["sample_id"]] | {"mrd": row["mrd"]})
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in trials.to_pylist():
        if row["status"] == FINISHED:
            runs.setdefault(row["selection"], []).append(row)
    return as_table(
        [
            {
                "group": name,
                "samples": own[0]["forget_samples"],
                "mean_abs_delta": float(np.mean([row["mean_abs_delta"] for row in own])),
                "updates": float(np.mean([row["updates"] for row in own])),
                "forgotten": all(row["forgotten"] == 1 for row in own),
                **{column: _mean([sample[column] for sample in members[name]]) for column in (*columns, "mrd")},
            }
            for name, own in runs.items()
        ]
    )


def _mean(values: Sequence[float | None]) -> float:
    """Of those that are known."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


@dataclass(frozen=True)
class Ordering:
    """How a metric orders the groups.

    Attributes:
        metric: which.
        ranks: (n,) of the groups, 1 the easiest by the metric.
        correlation: Spearman's, with the difficulty; +1 if the metric's order from easy to hard is the true one.
        beyond_length: the same with the mean number of scored tokens partialled out.
        mrd_ahead: correlation of MRD - |correlation| of this metric, whichever way round it orders; None for MRD.
    """

    metric: Metric
    ranks: np.ndarray
    correlation: Estimate
    beyond_length: Estimate
    mrd_ahead: Estimate | None


def orderings(table: pa.Table) -> list[Ordering]:
    """Of the metrics that were measured, MRD first; groups that were not forgotten at the cap share the last rank."""
    hard = difficulty(table)
    tokens = table["num_tokens"].to_numpy()
    hardness = {
        metric: metric.harder * table[metric.column].to_numpy()
        for metric in METRICS
        if metric.column in table.column_names
    }
    ours = hardness[METRICS[0]]

    def ahead_of(other: np.ndarray) -> Estimate:
        def of_rows(rows: list[np.ndarray]) -> np.ndarray:
            drawn = hard[rows[0]]
            return _spearman(ours[rows[0]], drawn) - np.abs(_spearman(other[rows[0]], drawn))

        return over_sets(of_rows, [len(hard)])

    return [
        Ordering(
            metric,
            stats.rankdata(values),
            spearman(values, hard),
            partial_spearman(values, hard, tokens),
            None if metric.title == MRD else ahead_of(values),
        )
        for metric, values in hardness.items()
    ]


def difficulty(table: pa.Table) -> np.ndarray:
    """(n,) mean |Δθ|; inf for groups that were not forgotten at the cap."""
    return np.where(np.array(table["forgotten"].to_pylist()), table["mean_abs_delta"].to_numpy(), np.inf)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation, (..., n) each -> (...); nan where one of them does not vary."""
    x, y = (stats.rankdata(values, axis=-1) for values in (x, y))
    x, y = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (x, y))
    return (x * y).sum(axis=-1) / np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))


def answer(table: pa.Table) -> Answer:
    """From a table of groups, see `groups`.

    Raises:
        UserError: fewer than two groups.
    """
    if table.num_rows < 2:
        raise UserError(f"{table.num_rows} groups finished: expected at least 2 to put in order")
    found = orderings(table)
    hard = difficulty(table)
    sentences = [_headline(table, found), _length(found), *_others(found)]
    if len(found) < len(METRICS):
        sentences.append("VoG is left out: no earlier states of the model's training are named.")
    if kept := int(np.isinf(hard).sum()):
        sentences.append(
            f"{kept} of {len(hard)} groups were not wholly forgotten at the cap: they need more than was measured, and "
            "share the last rank."
        )
    sentences.append(_claim(found))
    ranks = {f"rank_{each.metric.column}": each.ranks for each in found} | {"rank_difficulty": stats.rankdata(hard)}
    for name, column in ranks.items():
        table = table.append_column(name, pa.array(column))
    correlations = as_table(
        [
            {
                "metric": each.metric.title,
                **estimated("spearman", each.correlation),
                **estimated("length_partialled_out", each.beyond_length),
                **(estimated("mrd_ahead", each.mrd_ahead) if each.mrd_ahead else {}),
            }
            for each in found
        ]
    )
    panels = [_rank_lines(hard, found), _dots(found)]
    return Answer(table, panels, sentences, inches=(14.0, 5.5), tables={"fig3-correlations": correlations})


def _headline(table: pa.Table, found: Sequence[Ordering]) -> str:
    parts = ", ".join(f"{each.metric.title} {with_ci(each.correlation)}" for each in found)
    return (
        f"**Rank correlation with the true difficulty of {table.num_rows} groups of {table['samples'][0].as_py()} "
        f"samples: {parts}**. All are turned so that +1 means: easy to hard by the metric is easy to hard in truth; "
        "hard is high GraNd, EL2N and VoG, and low MRD. The truth is mean |Δθ| when all samples of a group are "
        "forgotten."
    )


def _length(found: Sequence[Ordering]) -> str:
    parts = ", ".join(f"{each.metric.title} {with_ci(each.beyond_length)}" for each in found)
    return (
        f"With the mean number of scored tokens partialled out: {parts}. MRD sums over tokens, GraNd and EL2N do not."
    )


def _others(found: Sequence[Ordering]) -> list[str]:
    parts = [f"{each.metric.title} {with_ci(each.mrd_ahead)}" for each in found if each.mrd_ahead]
    if not parts:
        return []
    return [
        "MRD's rank correlation less the size of the other metric's, whichever way round that one orders: "
        f"{', '.join(parts)}."
    ]


def _claim(found: Sequence[Ordering]) -> str:
    ours, *others = found
    beyond = ruling(ours.beyond_length, +1)
    text = (
        f"The paper's claim: MRD orders the groups as their difficulty does: {ruling(ours.correlation, +1)} here "
        f"(beyond what length explains: {beyond})"
    )
    if others:
        rulings = {each.metric.title: _is_behind(each) for each in others}
        text += f"; metrics of training difficulty do not order them as well: {ruled(rulings)}"
    return f"{text}."


def _is_behind(each: Ordering) -> str:
    """Whether a metric orders the groups less well than MRD does.

    That it does not is only said of one that orders them at all: the size of a correlation is above 0 by chance alone.
    """
    sign = each.mrd_ahead.sign if each.mrd_ahead else 0
    if sign < 0:
        return CONTRADICTED if each.correlation.sign else UNKNOWN
    return HOLDS if sign > 0 else UNKNOWN


# --- Pictures -----------------------------------------------------------------------------------------------


def _rank_lines(hard: np.ndarray, found: Sequence[Ordering]) -> Draw:
    """Ranks by each metric, groups in the order of their difficulty."""

    def draw(axes: Axes) -> None:
        order = np.argsort(hard, kind="stable")
        place = np.arange(1, len(order) + 1)
        axes.plot(place, place, color=INK, linestyle="--", linewidth=1, label="the true order")
        for each in reversed(found):
            ours = each.metric.title == MRD
            axes.plot(
                place,
                each.ranks[order],
                color=each.metric.colour,
                marker="o" if ours else ".",
                markersize=6 if ours else 5,
                linewidth=2.2 if ours else 1.1,
                alpha=1.0 if ours else 0.75,
                label=each.metric.title,
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


def _dots(found: Sequence[Ordering]) -> Draw:
    """Rank correlations with the difficulty, with 95 % intervals."""

    def draw(axes: Axes) -> None:
        place = -np.arange(len(found), dtype=float)
        for up, marker, filled, label in ((0.12, "s", True, "as it is"), (-0.12, "o", False, "length partialled out")):
            for y, each in zip(place, found, strict=True):
                estimate = each.correlation if filled else each.beyond_length
                colour = each.metric.colour
                inside = colour if filled else "white"
                axes.plot([estimate.low, estimate.high], [y + up] * 2, color=colour, linewidth=1.5)
                axes.plot(estimate.value, y + up, marker, color=colour, markerfacecolor=inside, markersize=8)
            axes.plot([], [], marker, color=MUTED, markerfacecolor=MUTED if filled else "white", label=label)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_xlim(-1, 1)
        axes.set_ylim(-len(found) + 0.4, 1.0)
        axes.set_yticks(place, [each.metric.title for each in found])
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
