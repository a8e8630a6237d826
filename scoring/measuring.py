"""The front door of the measures of difficulty: how hard is each record to forget, by MRD, by forecast, by others.

    records -> samples -> batches -> measures of a replica -> one row per record

The command line goes the same way, with records from a file and replicas on a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file

from scoring.api import FinishedInMemory, FinishedTasks, in_order, run_tasks, samples_of
from scoring.errors import UserError
from scoring.eval_mode import left_unchanged
from scoring.files import work_folder
from scoring.flip_time import ForgetLoss, gradient_ascent
from scoring.loaded import check_loaded
from scoring.measures import MEASURES, Asked, Measure
from scoring.mrd import Sigma
from scoring.progress import advance, expect
from scoring.records import Record, texts_of
from scoring.replica import TransformersReplica
from scoring.samples import Batch, Rejected, Tokens, default_batch_tokens, make_batches
from scoring.settings import Doc, Ge, Known, Le, build, check, named
from scoring.similarity import mean_gradient
from scoring.templates import PLAIN, chosen_template
from scoring.updates import UpdateSettings, gradients_put_aside
from scoring.work import LocalPool, Pool

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The threshold that is the average MA of all samples under the initial model, as in the paper's stopping rule.
AVERAGE: Literal["average"] = "average"
MA_COLUMN = "ma"
# Why a sample has no row.
NOT_FINITE = "the model's log-probabilities are not finite"


def _measures() -> Iterable[str]:
    return MEASURES


@dataclass(frozen=True, kw_only=True)
class DifficultySettings(UpdateSettings):
    """Which measures of difficulty are taken, and how."""

    measure: Annotated[list[str], Known(_measures), Doc("one or more, with commas; see `mrd-bench measures`")]
    thresholds: Annotated[
        list[Annotated[float, Ge(0), Le(1)] | Literal["average"]],
        Doc("of MA below which a sample counts as forgotten; average: that of all samples under the initial model"),
    ] = field(default_factory=lambda: [AVERAGE])
    lookahead: Annotated[
        int, Ge(1), Doc("h of forecasts: gradients that are taken on the way to a threshold; 2 or 3 pay for far ones")
    ] = 1
    sigma: Sigma = 1e-5
    neighbours: Annotated[int, Ge(1), Doc("k of knn-similarity")] = 5

    def checked_settings(self) -> Self:
        """The same, each measure and threshold once.

        Raises:
            UserError: a value that is not allowed.
        """
        check(self)
        for name in ("measure", "thresholds"):
            if not getattr(self, name):
                raise UserError(f"{named(name)} is empty: expected at least one")
        names = {name.lower(): name for name in MEASURES}
        measure = dict.fromkeys(names[name.lower()] for name in self.measure)
        return replace(self, measure=list(measure), thresholds=list(dict.fromkeys(self.thresholds)))

    @property
    def measures(self) -> dict[str, Measure]:
        """The measures that are asked for, by name."""
        return {name: MEASURES[name] for name in self.measure}

    def needs(self, need: str) -> bool:
        """Whether one of the measures needs it, see `scoring.measures.Need`."""
        return any(need in measure.needs for measure in self.measures.values())


def threshold_name(threshold: float | str) -> str:
    """As it stands in the names of columns: "average", or the number."""
    return threshold if isinstance(threshold, str) else f"{threshold:g}"


# --- Tasks of replicas --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasureTask:
    """Take measures of a shard; each gives one or more columns, and the seconds that it took.

    Attributes:
        shard: the number of the shard.
        names: of measures of the same scope, "batch" or "set".
        asked: what they are asked for.
    """

    shard: int
    names: tuple[str, ...]
    asked: Asked

    @property
    def key(self) -> str:
        return f"measures-{self.shard:06d}"

    def do(self, replica: Any, batches: Sequence[Batch], cache: dict[str, Any]) -> dict[str, Any]:
        """Column -> (n,) or (n, d); and the seconds by measure under "seconds"."""
        columns: dict[str, Any] = {"index": np.concatenate([batch.indices.cpu().numpy() for batch in batches])}
        seconds = {}
        shared: dict[str, Any] = {}
        expect(len(self.names))
        for name in self.names:
            measure = MEASURES[name]
            started = time.perf_counter()
            subject = batches if measure.scope == "set" else batches[0]
            given = measure.of(replica, subject, self.asked, shared)
            if not isinstance(given, dict):
                given = {"": given}
            columns |= {f"{name}@{ending}" if ending else name: values for ending, values in given.items()}
            seconds[name] = time.perf_counter() - started
            advance()
        return columns | {"seconds": seconds}


@dataclass(frozen=True)
class MemorizationTask:
    """MA of the samples of a shard, for the average threshold."""

    shard: int

    @property
    def key(self) -> str:
        return f"ma-{self.shard:06d}"

    def do(self, replica: TransformersReplica, batches: Sequence[Batch], cache: dict[str, Any]) -> dict[str, Any]:
        """Columns "index" and "ma", (n,) each; nan for a sample whose log-probs are not finite."""
        ma = []
        for batch in batches:
            logprobs, hits = replica.token_scores(batch)
            mask = batch.mask.cpu().numpy()
            finite = (np.isfinite(logprobs) | ~mask).all(-1)
            ma.append(np.where(finite, (hits & mask).sum(-1) / mask.sum(-1), np.nan))
        return {
            "index": np.concatenate([batch.indices.cpu().numpy() for batch in batches]),
            MA_COLUMN: np.concatenate(ma),
        }


@dataclass(frozen=True)
class MeanGradientTask:
    """The mean gradient over a set, which is one shard."""

    shard: int = 0

    @property
    def key(self) -> str:
        return "mean-gradient"

    def do(self, replica: TransformersReplica, batches: Sequence[Batch], cache: dict[str, Any]) -> dict[str, Any]:
        """Parameter -> its gradient on the CPU."""
        replica.forwards += len(batches)
        replica.backwards += len(batches)
        gradient = mean_gradient(replica.model, [batch.to(replica.device) for batch in batches])
        return {name: part.cpu().contiguous() for name, part in gradient.items()}


# --- From batches to columns --------------------------------------------------------------------------------


def columns_of(
    pool: Pool,
    shards: Sequence[Sequence[Batch]],
    whole: Sequence[Batch],
    settings: DifficultySettings,
    asked: Asked,
    finished: FinishedTasks,
    count: int,
    rows_of: Callable[[np.ndarray], np.ndarray],
    title: str | None,
) -> tuple[dict[str, np.ndarray], Asked, dict[str, float]]:
    """All measures of replicas, of `count` samples.

    Args:
        pool: the replicas.
        shards: the batches, one each.
        whole: all of them.
        settings: checked settings.
        asked: what measures are asked for, without thresholds.
        finished: the results so far.
        rows_of: positions in the data set -> rows of the columns, both (n,).
        title: of a progress bar; None shows none.

    Returns:
        The columns, (count,) each; what was asked for, with thresholds; and the seconds of replicas by measure.
    """
    columns: dict[str, np.ndarray] = {}
    if settings.needs("thresholds"):
        numbers = {threshold_name(t): t for t in settings.thresholds}
        if AVERAGE in numbers:
            tasks = [MemorizationTask(shard) for shard in range(len(shards))]
            run_tasks(pool, tasks, shards, finished, title and f"MA first, {title}")
            columns[MA_COLUMN] = joined([finished.result(task) for task in tasks], count, rows_of)[MA_COLUMN]
            numbers[AVERAGE] = average_of(columns[MA_COLUMN])
        asked = replace(asked, thresholds={name: float(number) for name, number in numbers.items()})
    by_scope: dict[str, list[str]] = {"batch": [], "set": []}
    for name, measure in settings.measures.items():
        if measure.scope != "texts":
            by_scope[measure.scope].append(name)
    all_shards = [*shards, whole]
    tasks_by_scope = {
        "set": [MeasureTask(len(shards), tuple(by_scope["set"]), asked)],
        "batch": [MeasureTask(shard, tuple(by_scope["batch"]), asked) for shard in range(len(shards))],
    }
    seconds = dict.fromkeys((name for names in by_scope.values() for name in names), 0.0)
    # The set first: one replica works on it while the others take the batches.
    todo = [task for scope, names in by_scope.items() if names for task in tasks_by_scope[scope]]
    todo.sort(key=lambda task: -len(all_shards[task.shard]))
    run_tasks(pool, todo, all_shards, finished, title)
    for scope, names in by_scope.items():
        if names:
            results = [finished.result(task) for task in tasks_by_scope[scope]]
            columns |= joined(results, count, rows_of)
            for result in results:
                for name, spent in result["seconds"].items():
                    seconds[name] += spent
    for name, measure in settings.measures.items():
        if measure.finish is not None:
            columns[name] = measure.finish(columns[name], asked)
    return columns, asked, seconds


def average_of(values: np.ndarray) -> float:
    """The average of those that are numbers; 0 where none is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else 0.0


def joined(
    results: Sequence[Mapping[str, Any]], count: int, rows_of: Callable[[np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    """The columns of several shards, in the order of the samples."""
    rows = rows_of(np.concatenate([result["index"] for result in results]))
    columns = {}
    for name in results[0]:
        if name not in ("index", "seconds"):
            values = np.concatenate([result[name] for result in results])
            columns[name] = np.empty((count, *values.shape[1:]))
            columns[name][rows] = values
    return columns


def difficulty_table(
    sample_ids: pa.Array, num_tokens: np.ndarray, columns: Mapping[str, np.ndarray], settings: DifficultySettings
) -> tuple[pa.Table, list[Rejected]]:
    """The table, one row per sample whose measures are numbers; and the other samples, with the reason. A forecast may
    be infinite: no update brings the sample nearer.

    Args:
        sample_ids: ids of N samples.
        num_tokens: scored tokens of each, (N,).
        columns: (N,) each.
        settings: checked settings.
    """
    thresholds = [threshold_name(t) for t in settings.thresholds]
    names = [column for name, measure in settings.measures.items() for column in measure.columns(name, thresholds)]
    if MA_COLUMN in columns:
        names.insert(0, MA_COLUMN)
    undefined = np.zeros(len(num_tokens), dtype=bool)
    for name in names:
        undefined |= np.isnan(columns[name]) & (not _may_be_undefined(name, columns[name]))
    ids = sample_ids.to_pylist()
    rejected = [Rejected(ids[row], NOT_FINITE) for row in np.flatnonzero(undefined).tolist()]
    table = pa.table({"sample_id": sample_ids, "num_tokens": num_tokens, **{name: columns[name] for name in names}})
    return table.filter(pa.array(~undefined)), rejected


def _may_be_undefined(column: str, values: np.ndarray) -> bool:
    """Whether a column may be nan, whatever the model: texts without words, or a sample without others."""
    measure = MEASURES.get(column.partition("@")[0])
    if measure is None:
        return False
    return measure.scope == "texts" or (measure.finish is not None and bool(np.isnan(values).all()))


# --- In this process ----------------------------------------------------------------------------------------


@torch.inference_mode(False)  # what is made in a caller's inference mode cannot be differentiated
def difficulty(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[Record | str],
    *,
    measure: str | Sequence[str] = "flip-time",
    thresholds: float | Literal["average"] | Sequence[float | Literal["average"]] = AVERAGE,
    loss: ForgetLoss = gradient_ascent,
    retain: Iterable[Record | str] | None = None,
    checkpoints: str | Sequence[str] = (),
    tokens: Tokens = "answer",
    batch_tokens: int | None = None,
    template: str = PLAIN,
    system: str | None = None,
    template_variables: Mapping[str, str | bool] | None = None,
    progress: bool = False,
    **settings: Any,
) -> pd.DataFrame:
    """Measures of how hard records are to forget under a loaded model, in this process.

    Args:
        model: a transformers causal LM in fp32 or fp64, on any device; it is left unchanged. Forecasts take updates
            along the weights that require a gradient.
        tokenizer: its tokenizer.
        records: as `scoring.score` takes them.
        measure: one or more keys of `scoring.measures.MEASURES`, such as "flip-time" or ("mrd", "nll").
        thresholds: one or more, of MA below which a sample counts as forgotten; "average" is that of all records under
            the model.
        loss: of the algorithm whose updates are forecast: gradient ascent, or `algorithms.alone.LossAlone("NPO")`.
        retain: records to be kept; gradient-cosine needs them.
        checkpoints: folders or ids of earlier states of the model; vog needs them.
        tokens: "answer" or "all", see `scoring.score`.
        batch_tokens: padded tokens in a batch; None: as many as suit the model's device.
        template, system, template_variables: how pairs and conversations are put, see `scoring.templates`.
        progress: show a bar.
        settings: further fields of `DifficultySettings`, such as `learning_rate=1e-5`, `optimizer="sgd"` or
            `lookahead=2`.

    Returns:
        One row per record, in their order: sample_id, num_tokens, ma where the average threshold is asked for, a column
        for each measure ("mrd") or for each measure and threshold ("flip-time@0.5", in updates), and reason. `attrs`
        has the settings, the thresholds as numbers, and the cost of each measure in forward passes a sample.

    Raises:
        UserError: one line: a setting, a record or the model at fault.
    """
    fields = {"measure": _listed(measure), "thresholds": _listed(thresholds), **settings}
    checked = build(DifficultySettings, fields).checked_settings()
    if not callable(loss):
        raise UserError(f"loss is {loss!r}: expected a function, such as algorithms.alone.LossAlone('NPO')")
    check_loaded(model, tokenizer)
    if checked.needs("retain") and retain is None:
        raise UserError("retain is empty: gradient-cosine needs records that are to be kept, at least one")
    asked = asked_by(checked, loss, checkpoints=tuple((source, None) for source in _listed(checkpoints)))
    chat = chosen_template(template, system, template_variables or {})
    texts = texts_of("records", records, chat)
    samples, rejected = samples_of(model, tokenizer, texts, tokens)
    batch_tokens = batch_tokens or default_batch_tokens(model.device)
    batches = make_batches(samples, batch_tokens)
    row_of = {sample.index: row for row, sample in enumerate(samples)}
    finished = FinishedInMemory()
    with (
        left_unchanged(model),
        gradients_put_aside(model),
        LocalPool(model) as pool,
        work_folder() as folder,
    ):
        if checked.needs("retain"):
            kept, _ = samples_of(model, tokenizer, texts_of("retain", retain or [], chat), tokens, "retain")
            ((_, gradient, _),) = list(pool.run([MeanGradientTask()], [make_batches(kept, batch_tokens)]))
            path = str(folder / "retain.safetensors")
            save_file(gradient, path)
            asked = replace(asked, retain_gradient=path)
        columns, asked, _ = columns_of(
            pool,
            [[batch] for batch in batches],
            batches,
            checked,
            asked,
            finished,
            len(samples),
            lambda indices: np.array([row_of[i] for i in indices.tolist()]),
            "measuring" if progress else None,
        )
    corpus = [text.words for text in texts]
    columns |= text_columns(checked, [corpus[sample.index] for sample in samples], corpus)
    table, unsound = difficulty_table(
        pa.array([sample.sample_id for sample in samples]),
        np.array([sample.num_scored for sample in samples]),
        columns,
        checked,
    )
    frame = in_order(table, [text.sample_id for text in texts], [*rejected, *unsound], asdict(checked), finished.facts)
    frame.attrs |= {"thresholds": dict(asked.thresholds), "cost": costs(checked, asked)}
    return frame


def _listed(value: Any) -> list[Any]:
    """One value, or several, as a list."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def asked_by(settings: DifficultySettings, loss: ForgetLoss, checkpoints: tuple[tuple[str, str | None], ...]) -> Asked:
    """What measures are asked for by settings, without the thresholds.

    Raises:
        UserError: a measure needs checkpoints, and none are named.
    """
    if settings.needs("checkpoints") and not checkpoints:
        raise UserError(f"{named('checkpoints')} is empty: vog needs earlier states of the model, at least one")
    return Asked(
        update=UpdateSettings.of(settings),
        lookahead=settings.lookahead,
        sigma=settings.sigma,
        neighbours=settings.neighbours,
        loss=loss,
        checkpoints=checkpoints,
    )


def costs(settings: DifficultySettings, asked: Asked) -> dict[str, float]:
    """The cost of each measure by itself, in forward passes a sample."""
    return {name: measure.cost(asked) for name, measure in settings.measures.items()}


def text_columns(settings: DifficultySettings, texts: Sequence[str], corpus: Sequence[str]) -> dict[str, np.ndarray]:
    """The measures of the texts alone, (N,) each."""
    return {name: measure.of(texts, corpus) for name, measure in settings.measures.items() if measure.scope == "texts"}
