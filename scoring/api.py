"""The front door: how hard is each record to forget, under a model that is loaded already.

    records -> samples -> batches -> draws of a replica -> one row a record

The command line goes the same way, with records from a file and replicas on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from scoring.mrd import (
    ESTIMATORS,
    Draws,
    EstimatorName,
    NumberOfDraws,
    Request,
    Sigma,
    Statistic,
    StatisticChoice,
    Until,
    complete,
    reduce_draws,
)
from scoring.records import Record, texts_of
from scoring.sample_file import Batches
from scoring.samples import (
    BATCH_TOKENS,
    Batch,
    Rejected,
    Sample,
    Tokens,
    check_tokens,
    context_length,
    encode,
    make_batches,
    nothing_scored,
)
from scoring.settings import Doc, Ge, Gt, Lt, check
from scoring.work import DrawTask, Facts, LocalPool, Pool

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Draws in one task: enough to share the noise and the base log-probs, few enough to share the work.
DRAWS_PER_TASK = 10
# Batches in one task: estimators that perturb pay for the noise once a task, the others need no such sharing.
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
    ] = 0.05
    seed: Annotated[int, Doc("addresses the noise")] = 0
    tokens: Annotated[Tokens, Doc("which are scored: the answer's, as in the unlearning loss, or all")] = "answer"
    batch_tokens: Annotated[
        Annotated[int, Ge(1)] | Literal["auto"], Doc("padded tokens in a batch, or auto: as many as fit into memory")
    ] = BATCH_TOKENS
    allow_lost_perturbation: Annotated[bool, Doc("score although storage rounds the noise away")] = False

    def completed(self, differentiates: bool = True) -> Self:
        """The same with the fields filled in that others decide: estimator, statistic and draws.

        Args:
            differentiates: whether the engine can.

        Raises:
            UserError: a value that cannot be, or a combination that does not exist.
        """
        check(self)
        estimator = self.estimator or ("gradient" if differentiates else "monte-carlo")
        statistic, draws = complete(estimator, self.statistic, self.draws)
        return replace(self, estimator=estimator, statistic=statistic, draws=draws)

    def chosen(self) -> tuple[EstimatorName, Statistic]:
        """Of completed settings."""
        assert self.estimator is not None
        assert self.statistic is not None
        return self.estimator, self.statistic


class Finished(Protocol):
    """Where finished tasks are kept, so that a run that was stopped goes on."""

    def has(self, key: str) -> bool:
        """Whether a task is finished."""

    def keep(self, task: DrawTask, draws: Draws, facts: Facts) -> None:
        """Keep what a task gave."""

    def draws(self, task: DrawTask) -> Draws:
        """What a task gave."""


class InMemory:
    """Finished tasks of a run that is not continued."""

    def __init__(self) -> None:
        self._draws: dict[str, Draws] = {}
        self.facts = Facts()

    def has(self, key: str) -> bool:
        return key in self._draws

    def keep(self, task: DrawTask, draws: Draws, facts: Facts) -> None:
        self._draws[task.key] = draws
        self.facts.add(facts)

    def draws(self, task: DrawTask) -> Draws:
        return self._draws[task.key]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[Record | str],
    *,
    estimator: EstimatorName = "gradient",
    statistic: Statistic | None = None,
    sigma: float = 1e-5,
    draws: int | Literal["auto"] | None = None,
    tolerance: float = 0.05,
    seed: int = 0,
    tokens: Tokens = "answer",
    batch_tokens: int = BATCH_TOKENS,
    allow_lost_perturbation: bool = False,
    progress: bool = False,
) -> pd.DataFrame:
    """Memory Removal Difficulty of records under a loaded model, in this process.

    Args:
        model: a transformers causal LM, on any device; afterwards it is as it was.
        tokenizer: its tokenizer.
        records: each with the fields prompt and completion, question and answer, messages, or text, and perhaps an id;
            a plain text is a record of its own.
        estimator, statistic: see `scoring.mrd`; None takes the estimator's own.
        sigma: standard deviation of the perturbation of every weight.
        draws: K of an estimator that draws, or "auto": until the standard error is within `tolerance`.
        tolerance: of the median relative standard error over the samples.
        seed: addresses the noise.
        tokens: "answer" scores the completion and its end token, as the unlearning loss does, "all" every token.
        batch_tokens: padded tokens in a batch.
        allow_lost_perturbation: score although the weights' dtype rounds the noise away.
        progress: show a bar.

    Returns:
        One row a record, in their order: sample_id, num_tokens, tokens_saturated, nll (nats), mrd, mrd_stderr,
        mrd_per_token, draws, and the reason where a record cannot be scored, whose numbers are nan. `attrs` has the
        settings and what was noticed on the way.

    Raises:
        UserError: one line: a setting or a record at fault, or no record that can be scored.
    """
    settings = ScoreSettings(
        estimator=estimator,
        statistic=statistic,
        sigma=sigma,
        draws=draws,
        tolerance=tolerance,
        seed=seed,
        tokens=tokens,
        batch_tokens=batch_tokens,
        allow_lost_perturbation=allow_lost_perturbation,
    ).completed()
    samples, rejected, ids = samples_of(model, tokenizer, records, settings.tokens)
    batches = make_batches(samples, batch_tokens)
    shards = shards_of(batches, estimator)
    tasks = draw_tasks(settings, len(shards))
    kept = InMemory()
    with as_it_was(model), LocalPool(model, allow_lost_perturbation=allow_lost_perturbation) as pool:
        run_tasks(pool, tasks, shards, kept, f"scoring ({settings.estimator})" if progress else None)
    # A sample's index is its place among all records.
    rows = {sample.index: row for row, sample in enumerate(samples)}
    table, unsound = score_table(
        pa.array([sample.sample_id for sample in samples]),
        np.array([sample.num_scored for sample in samples]),
        score_columns(tasks, kept, settings, len(samples), lambda places: np.array([rows[i] for i in places.tolist()])),
    )
    return _in_order(table, ids, [*rejected, *unsound], settings, kept.facts)


def samples_of(
    model: PreTrainedModel, tokenizer: Any, records: Iterable[Record | str], tokens: Tokens = "answer"
) -> tuple[list[Sample], list[Rejected], list[str]]:
    """The samples of records, those that cannot be scored, and the ids of all.

    Raises:
        UserError: a record at fault, or no record that can be scored.
    """
    texts = texts_of("records", records)
    ids = [text.sample_id for text in texts]
    samples, rejected = encode(texts, tokenizer, context_length(model.config), tokens)
    largest = max((int(sample.input_ids.max()) for sample in samples), default=-1)
    check_tokens(len(samples), largest, rejected, model.config.get_text_config().vocab_size, "the tokenizer", "records")
    return samples, rejected, ids


@contextmanager
def as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the model is in eval mode; afterwards it, and torch, are as they were."""
    training = [module for module in model.modules() if module.training]
    precision = torch.get_float32_matmul_precision()
    model.eval()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for module in training:
            module.training = True


# --- From batches to columns --------------------------------------------------------------------------------


def shards_of(batches: Sequence[Batch], estimator: EstimatorName) -> list[Sequence[Batch]]:
    """The batches of each task."""
    size = BATCHES_PER_TASK[ESTIMATORS[estimator].perturbs]
    return [batches[first : first + size] for first in range(0, len(batches), size)]


def draw_tasks(settings: ScoreSettings, shards: int) -> list[DrawTask]:
    """Every shard's draws, cut into ranges; with draws "auto" a shard decides for itself and is one task.

    Args:
        settings: completed.
    """
    estimator, statistic = settings.chosen()
    if settings.draws == "auto":
        until = Until(statistic, settings.tolerance)
        request = Request(estimator, settings.sigma, settings.seed, 0, until.most)
        return [DrawTask(shard, request, until) for shard in range(shards)]
    draws = settings.draws or 1
    ranges = [(first, min(first + DRAWS_PER_TASK, draws)) for first in range(0, draws, DRAWS_PER_TASK)]
    return [
        DrawTask(shard, Request(estimator, settings.sigma, settings.seed, first, last))
        for shard in range(shards)
        for first, last in ranges
    ]


def run_tasks(
    pool: Pool, tasks: Sequence[DrawTask], shards: Sequence[Sequence[Batch]], finished: Finished, bar: str | None
) -> None:
    """Do the tasks that are not finished.

    Args:
        pool: the replicas.
        bar: the title of a progress bar; None shows none.
    """
    todo = [task for task in tasks if not finished.has(task.key)]
    # Work in sample-draws, so that the bar moves with the work whatever the shards' sizes.
    sizes = {task.key: _samples_in(shards[task.shard]) * _draws_of(task) for task in todo}
    unit = "sample-draw" if any(_draws_of(task) > 1 for task in todo) else "sample"
    with tqdm(total=sum(sizes.values()), unit=unit, desc=bar, disable=bar is None) as shown:
        for task, draws, facts in pool.run(todo, shards):
            finished.keep(task, draws, facts)
            shown.update(sizes[task.key])


def _samples_in(shard: Sequence[Batch]) -> int:
    """Nothing is read of batches that are on disk."""
    return shard.num_samples if isinstance(shard, Batches) else sum(len(batch) for batch in shard)


def _draws_of(task: DrawTask) -> int:
    return 1 if task.until else task.request.last_draw - task.request.first_draw


def score_columns(
    tasks: Sequence[DrawTask],
    finished: Finished,
    settings: ScoreSettings,
    count: int,
    rows_of: Callable[[np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
    """Reduce what the tasks gave to columns of `count` samples.

    Args:
        tasks: shard by shard, and within a shard in the order of their draws.
        settings: completed.
        rows_of: data-set positions -> rows, both (n,).
    """
    _, statistic = settings.chosen()
    columns = {name: np.empty(count) for name in ("nll", "mrd", "mrd_stderr")}
    columns |= {name: np.empty(count, dtype=np.int64) for name in ("tokens_saturated", "draws")}
    for _, of_shard in groupby(tasks, key=lambda task: task.shard):
        draws = reduce(Draws.followed_by, (finished.draws(task) for task in of_shard))
        mrd, stderr = reduce_draws(draws.values, statistic)
        rows = rows_of(draws.indices)
        made = draws.values.shape[1] if settings.draws else 0
        for name, values in zip(columns, (draws.nll, mrd, stderr, draws.saturated, made), strict=True):
            columns[name][rows] = values
    return columns


def score_table(
    sample_ids: pa.Array, num_tokens: np.ndarray, columns: Mapping[str, np.ndarray]
) -> tuple[pa.Table, list[Rejected]]:
    """One row for each sample whose numbers mean something; and the samples of the others.

    Args:
        sample_ids, num_tokens: of N samples.
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
        for reason, where in reasons.items()
        for name in table.filter(where)["sample_id"].to_pylist()
    ]
    return table.filter(pc.and_not(finite, saturated)) if rejected else table, rejected


def _in_order(
    table: pa.Table, ids: Sequence[str], rejected: Sequence[Rejected], settings: ScoreSettings, facts: Facts
) -> pd.DataFrame:
    """The rows in the order of the records, also of those that could not be scored."""
    if not table.num_rows:
        raise nothing_scored("records", rejected)
    frame: pd.DataFrame = table.to_pandas().set_index("sample_id").reindex(ids).reset_index(names="sample_id")
    reasons = {each.sample_id: each.reason for each in rejected}
    # Whole numbers that can be missing.
    counts = dict.fromkeys(("num_tokens", "tokens_saturated", "draws"), "Int64") if rejected else {}
    frame = frame.astype(counts).assign(reason=np.array([reasons.get(name) for name in ids], dtype=object))
    frame.attrs = {"settings": asdict(settings), "facts": asdict(facts)}
    return frame
