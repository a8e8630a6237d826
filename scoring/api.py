"""The front door: how hard is each record to forget, under a model that is loaded already.

    records -> samples -> batches -> draws of a replica -> one row per record

The command line goes the same way, with records from a file and replicas on a cluster.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from scoring.errors import UserError
from scoring.eval_mode import left_unchanged
from scoring.loaded import check_loaded
from scoring.mrd import (
    DEFAULT_TOLERANCE,
    ESTIMATORS,
    Draws,
    EstimatorName,
    NumberOfDraws,
    Sigma,
    Statistic,
    StatisticChoice,
    reduce_draws,
    request_for,
    statistic_and_draws,
)
from scoring.progress import Bar
from scoring.records import Record, texts_of
from scoring.sample_file import Batches
from scoring.samples import (
    BATCH_TOKENS_ARE,
    Batch,
    Rejected,
    Sample,
    Text,
    TextSet,
    Tokens,
    context_length,
    default_batch_tokens,
    encode_checked,
    make_batches,
    nothing_scored,
)
from scoring.settings import Doc, Ge, Gt, Lt, build, check
from scoring.templates import PLAIN, chosen_template
from scoring.work import DrawTask, Facts, LocalPool, Pool, ReplicaTask

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Draws in one task: enough to share the noise and the base log-probs, few enough to share the work.
DRAWS_PER_TASK = 10
# Batches in one task, by whether the estimator perturbs: one that does makes its noise once per task.
BATCHES_PER_TASK = {True: 64, False: 1}


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How MRD is estimated."""

    estimator: Annotated[
        EstimatorName | None,
        Doc(
            "gradient is exact as sigma -> 0; monte-carlo is Algorithm 1 as printed (default: gradient; with vLLM, "
            "which does not differentiate, monte-carlo)"
        ),
    ] = None
    statistic: StatisticChoice = None
    sigma: Sigma = 1e-5
    draws: NumberOfDraws = None
    tolerance: Annotated[
        float, Gt(0), Lt(1), Doc("of the median relative standard error over the samples, for draws auto")
    ] = DEFAULT_TOLERANCE
    seed: Annotated[int, Doc("addresses the noise")] = 0
    tokens: Annotated[Tokens, Doc("which are scored: the answer's, as in the unlearning loss, or all")] = "answer"
    batch_tokens: Annotated[
        Annotated[int, Ge(1)] | Literal["auto"] | None,
        Doc(f"padded tokens in a batch, or auto: what is fastest, of what fits into memory {BATCH_TOKENS_ARE}"),
    ] = None
    allow_lost_perturbation: Annotated[bool, Doc("score although storage rounds the noise away")] = False

    def completed(self, differentiates: bool = True) -> Self:
        """The settings with defaults filled in for estimator, statistic and draws.

        Args:
            differentiates: whether the engine can differentiate.

        Raises:
            UserError: a value that is not allowed, or a combination that does not exist.
        """
        check(self)
        estimator = self.estimator or ("gradient" if differentiates else "monte-carlo")
        statistic, draws = statistic_and_draws(estimator, self.statistic, self.draws)
        return replace(self, estimator=estimator, statistic=statistic, draws=draws)

    def chosen(self) -> tuple[EstimatorName, Statistic]:
        """Estimator and statistic of completed settings."""
        assert self.estimator is not None
        assert self.statistic is not None
        return self.estimator, self.statistic


class FinishedTasks(Protocol):
    """The results of finished tasks, so that a run that was stopped can go on."""

    def has(self, key: str) -> bool:
        """Whether a task is finished."""

    def keep(self, task: Any, result: Any, facts: Facts) -> None:
        """Keep the result of a task."""

    def result(self, task: Any) -> Any:
        """The result of a task."""


class FinishedInMemory:
    """The results of finished tasks in memory, for a run that is never continued."""

    def __init__(self) -> None:
        self._results: dict[str, Any] = {}
        self.facts = Facts()

    def has(self, key: str) -> bool:
        return key in self._results

    def keep(self, task: ReplicaTask, result: Any, facts: Facts) -> None:
        self._results[task.key] = result
        self.facts.add(facts)

    def result(self, task: ReplicaTask) -> Any:
        return self._results[task.key]


@torch.inference_mode(False)  # what is made in a caller's inference mode cannot be differentiated
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[Record | str],
    *,
    estimator: EstimatorName | None = "gradient",
    statistic: Statistic | None = None,
    sigma: float = 1e-5,
    draws: int | Literal["auto"] | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    seed: int = 0,
    tokens: Tokens = "answer",
    batch_tokens: int | None = None,
    allow_lost_perturbation: bool = False,
    template: str = PLAIN,
    system: str | None = None,
    template_variables: Mapping[str, str | bool] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Memory Removal Difficulty of records under a loaded model, in this process.

    Args:
        model: a transformers causal LM, on any device; it is left unchanged.
        tokenizer: its tokenizer.
        records: records with the fields prompt and completion, question and answer, messages, or text, and perhaps
            an id; a plain string is a record by itself.
        estimator: see `scoring.mrd`.
        statistic: see `scoring.mrd`; None takes the estimator's default.
        sigma: standard deviation of the perturbation of every weight.
        draws: K, for an estimator that draws; or "auto": until the standard error is within `tolerance`.
        tolerance: bound on the median relative standard error over the samples, for draws "auto".
        seed: seed of the noise.
        tokens: "answer" scores the completion and its end token, as the unlearning loss does, "all" every token.
        batch_tokens: padded tokens in a batch; None: as many as suit the model's device.
        allow_lost_perturbation: score although the weights' dtype rounds the noise away.
        template, system, template_variables: how pairs and conversations are put, see `scoring.templates`.
        progress: show a bar.

    Returns:
        One row per record, in their order: sample_id, num_tokens, tokens_saturated, nll (nats), mrd and its standard
        error mrd_stderr (both without a unit; the error is 0 where nothing is drawn), mrd_per_token, draws, reason. A
        record that cannot be scored has nan for numbers, and the reason. `attrs` has the settings and the facts that
        the replica noticed, see `scoring.work.Facts`.

    Raises:
        UserError: one line: a setting or a record at fault, or no record that can be scored.
    """
    if str(batch_tokens) == "auto":
        raise UserError("batch_tokens is 'auto': expected a whole number of at least 1; auto is for the command line")
    settings = build(
        ScoreSettings,
        {
            "estimator": estimator,
            "statistic": statistic,
            "sigma": sigma,
            "draws": draws,
            "tolerance": tolerance,
            "seed": seed,
            "tokens": tokens,
            "batch_tokens": batch_tokens,
            "allow_lost_perturbation": allow_lost_perturbation,
        },
    ).completed()
    check_loaded(model, tokenizer)
    texts = texts_of("records", records, chosen_template(template, system, template_variables or {}))
    samples, rejected = samples_of(model, tokenizer, texts, settings.tokens)
    batches = make_batches(samples, batch_tokens or default_batch_tokens(model.device))
    shards = shards_of(batches, settings.chosen()[0])
    tasks = draw_tasks(settings, len(shards))
    finished = FinishedInMemory()
    with left_unchanged(model), LocalPool(model, allow_lost_perturbation=allow_lost_perturbation) as pool:
        run_tasks(pool, tasks, shards, finished, f"scoring ({settings.estimator})" if progress else None)
    # A sample's index is its position among all records; its row is the position among those that are scored.
    row_of = {sample.index: row for row, sample in enumerate(samples)}
    table, unsound = score_table(
        pa.array([sample.sample_id for sample in samples]),
        np.array([sample.num_scored for sample in samples]),
        score_columns(
            tasks, finished, settings, len(samples), lambda indices: np.array([row_of[i] for i in indices.tolist()])
        ),
    )
    return in_order(table, [text.sample_id for text in texts], [*rejected, *unsound], asdict(settings), finished.facts)


def samples_of(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[Text], tokens: Tokens = "answer", name: str = "records"
) -> tuple[list[Sample], list[Rejected]]:
    """The samples of texts, and the texts that cannot be scored.

    Raises:
        UserError: a text at fault, or none that can be scored.
    """
    vocabulary = model.config.get_text_config().vocab_size
    return encode_checked(
        TextSet(name, texts), tokenizer, context_length(model.config), vocabulary, "the tokenizer", tokens
    )


# --- From batches to columns --------------------------------------------------------------------------------


def shards_of(batches: Sequence[Batch], estimator: EstimatorName) -> list[Sequence[Batch]]:
    """The batches, cut into the shards of tasks."""
    size = BATCHES_PER_TASK[ESTIMATORS[estimator].perturbs]
    return [batches[first : first + size] for first in range(0, len(batches), size)]


def draw_tasks(settings: ScoreSettings, num_shards: int) -> list[DrawTask]:
    """The tasks of all shards: one for each range of draws; with draws "auto" one, which decides when to stop.

    Args:
        settings: completed settings.
        num_shards: number of shards.
    """
    estimator, statistic = settings.chosen()
    request, precision = request_for(
        estimator, statistic, settings.sigma, settings.seed, settings.draws, settings.tolerance
    )
    if precision is not None:
        return [DrawTask(shard, request, precision) for shard in range(num_shards)]
    draws = request.last_draw
    ranges = [(first, min(first + DRAWS_PER_TASK, draws)) for first in range(0, draws, DRAWS_PER_TASK)]
    return [
        DrawTask(shard, replace(request, first_draw=first, last_draw=last))
        for shard in range(num_shards)
        for first, last in ranges
    ]


def run_tasks(
    pool: Pool,
    tasks: Sequence[ReplicaTask],
    shards: Sequence[Sequence[Batch]],
    finished: FinishedTasks,
    title: str | None,
) -> None:
    """Do the tasks that are not finished, and keep their results.

    Args:
        pool: the replicas.
        tasks: all tasks.
        shards: the batches of each shard.
        finished: the results so far.
        title: the title of a progress bar; None shows none.
    """
    todo = [task for task in tasks if not finished.has(task.key)]
    # The bar counts samples times draws, so that it moves evenly although shards differ in size.
    sizes = {task.key: float(_samples_in(shards[task.shard]) * _draws_of(task)) for task in tasks}
    unit = "sample-draw" if any(_draws_of(task) > 1 for task in tasks) else "sample"
    ahead = {task.key: sizes[task.key] for task in todo}
    total, done = sum(sizes.values()), sum(sizes.values()) - sum(ahead.values())
    if title is not None and done and todo:
        print(f"continuing from {done:.0f} of {total:.0f} {unit}s: {title}", file=sys.stderr)
    with Bar(title or "", total, unit, title is not None, done) as bar:
        bar.begin(ahead)
        for task, result, facts in pool.run(todo, shards):
            finished.keep(task, result, facts)
            bar.finish(task.key)


def _samples_in(shard: Sequence[Batch]) -> int:
    """The number of samples in a shard; batches on disk are not read."""
    return shard.num_samples if isinstance(shard, Batches) else sum(len(batch) for batch in shard)


def _draws_of(task: ReplicaTask) -> int:
    if not isinstance(task, DrawTask):
        return 1
    return 1 if task.precision else task.request.last_draw - task.request.first_draw


def score_columns(
    tasks: Sequence[DrawTask],
    finished: FinishedTasks,
    settings: ScoreSettings,
    count: int,
    rows_of: Callable[[np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
    """Reduce the results of the tasks to columns of `count` samples: nll, mrd, mrd_stderr, tokens_saturated, draws.

    Args:
        tasks: the tasks, shard by shard, and within a shard in the order of their draws.
        finished: their results.
        settings: completed settings.
        count: number of samples.
        rows_of: positions in the data set -> rows of the columns, both (n,).
    """
    _, statistic = settings.chosen()
    columns = {name: np.empty(count) for name in ("nll", "mrd", "mrd_stderr")}
    columns |= {name: np.empty(count, dtype=np.int64) for name in ("tokens_saturated", "draws")}
    for _, tasks_of_shard in groupby(tasks, key=lambda task: task.shard):
        draws = reduce(Draws.followed_by, (finished.result(task) for task in tasks_of_shard))
        mrd, stderr = reduce_draws(draws.values, statistic)
        rows = rows_of(draws.indices)
        num_draws = draws.values.shape[1] if settings.draws else 0
        for name, values in zip(columns, (draws.nll, mrd, stderr, draws.saturated, num_draws), strict=True):
            columns[name][rows] = values
    return columns


def score_table(
    sample_ids: pa.Array, num_tokens: np.ndarray, columns: Mapping[str, np.ndarray]
) -> tuple[pa.Table, list[Rejected]]:
    """The score table, one row per sample whose scores are valid; and the other samples, with the reason.

    Args:
        sample_ids: ids of N samples.
        num_tokens: scored tokens of each, (N,).
        columns: see `score_columns`.
    """
    table = pa.table(
        {
            "sample_id": sample_ids,
            "num_tokens": num_tokens,
            "tokens_saturated": columns["tokens_saturated"],
            "nll": columns["nll"],
            "mrd": columns["mrd"],
            "mrd_stderr": columns["mrd_stderr"],
            "mrd_per_token": columns["mrd"] / num_tokens,
            "draws": columns["draws"],
        }
    )
    finite = pc.and_(pc.is_finite(table["mrd"]), pc.is_finite(table["nll"]))
    saturated = pc.equal(table["tokens_saturated"], table["num_tokens"])
    reasons = {
        "the model's log-probabilities are not finite": pc.invert(finite),
        "every scored token has probability exactly 1": pc.and_(finite, saturated),
    }
    rejected = [
        Rejected(name, reason)
        for reason, applies in reasons.items()
        for name in table.filter(applies)["sample_id"].to_pylist()
    ]
    return table.filter(pc.and_not(finite, saturated)) if rejected else table, rejected


def in_order(
    table: pa.Table, ids: Sequence[str], rejected: Sequence[Rejected], settings: Mapping[str, Any], facts: Facts
) -> pd.DataFrame:
    """The rows in the order of the records, with a row for each that could not be scored."""
    if not table.num_rows:
        raise nothing_scored("records", rejected)
    frame: pd.DataFrame = table.to_pandas().set_index("sample_id").reindex(ids).reset_index(names="sample_id")
    reasons = {rejection.sample_id: rejection.reason for rejection in rejected}
    # Int64 is pandas' type of whole numbers that can be missing.
    counts = {name: "Int64" for name in table.column_names if rejected and pa.types.is_integer(table[name].type)}
    frame = frame.astype(counts).assign(reason=np.array([reasons.get(name) for name in ids], dtype=object))
    frame.attrs = {"settings": dict(settings), "facts": asdict(facts)}
    return frame
