"""The main job: from records to a Parquet file of difficulties, by way of Ray replicas.

    records -> samples -> batches -> shards -> tasks -> replicas -> parts on disk -> one Parquet file

Every finished task is a part on disk before the next one is waited for. The same command finds the parts of a
killed run and goes on; the output file appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from bench.files.identity import with_spec_hash
from bench.files.origin import origin
from bench.files.parts import Parts, finished, noticed, read_draws, write_draws
from bench.files.score_file import write_scores
from bench.jobs.resources import BATCH_TOKENS, DTYPE_CHOICES, Resources, check_dtype
from bench.models.find import ModelReference, absolute_model, check_tokens, find_model, nothing_scored
from bench.tasks.datasets import Texts, absolute_source, check_dataset, open_texts
from scoring.batch_size import FitWork
from scoring.cluster import connect, how_many_fit
from scoring.errors import UserError, unknown_name
from scoring.files import replacing
from scoring.mrd import ESTIMATORS, STATISTICS, Draws, Request, Until, no_gradients, reduce_draws
from scoring.pool import ReplicaPool, Task
from scoring.sample_file import Batches, SampleFile
from scoring.samples import TOKENS_CHOICES, Rejected, Sample, encoded

SCHEMA_VERSION = 1
# Draws in one task: enough to share the noise and the base log-probs, few enough to share the work.
DRAWS_PER_TASK = 10
# Batches in one task: estimators that perturb pay for the noise once a task, the others need no such sharing.
BATCHES_PER_TASK = {True: 64, False: 1}


@dataclass(frozen=True)
class ScoreSpec:
    """What is to be scored, and how. Its hash is the run's identity.

    Attributes:
        model: `authors`, `authors:retain90`, a folder or a Hugging Face id.
        data: a task, a task file or a data file, see bench.tasks.datasets.
        split: of a task.
        estimator, statistic: see scoring.mrd; statistic None takes the estimator's own.
        sigma: standard deviation of the perturbation of every weight.
        draws: a number, "auto", or None for the estimator's default.
        tolerance: of the median relative standard error, for draws "auto".
        seed: addresses the noise.
        tokens: "answer" (those the unlearning loss sees) or "all".
        batch_tokens: padded tokens in a batch, or "auto": as many as fit into a replica's memory.
        dtype: of weights and activations.
        allow_lost_perturbation: score although storage rounds the perturbation away; the file says so.
    """

    model: str
    data: str
    split: str | None = None
    estimator: str = "monte-carlo"
    statistic: str | None = None
    sigma: float = 1e-5
    draws: int | str | None = None
    tolerance: float = 0.05
    seed: int = 0
    tokens: str = "answer"
    batch_tokens: int | str = BATCH_TOKENS
    dtype: str = "float32"
    allow_lost_perturbation: bool = False

    def checked(self) -> ScoreSpec:
        """The same with defaults filled in, and absolute paths.

        Raises:
            UserError: a value out of range or a combination that does not exist.
        """
        if self.estimator not in ESTIMATORS:
            raise unknown_name("estimator", self.estimator, ESTIMATORS)
        estimator = ESTIMATORS[self.estimator]
        statistic = self.statistic or estimator.statistics[0]
        if statistic not in STATISTICS:
            raise unknown_name("statistic", statistic, STATISTICS)
        if statistic not in estimator.statistics:
            able = [name for name, e in ESTIMATORS.items() if statistic in e.statistics]
            raise UserError(
                f"--estimator {self.estimator} does not estimate {statistic}: it is for "
                f"{', '.join(estimator.statistics)}; for {statistic} use {' or '.join(able)}"
            )
        if self.tokens not in TOKENS_CHOICES:
            raise unknown_name("choice of --tokens", self.tokens, TOKENS_CHOICES)
        if self.dtype not in DTYPE_CHOICES:
            raise unknown_name("dtype", self.dtype, DTYPE_CHOICES)
        if not (np.isfinite(self.sigma) and self.sigma > 0):
            raise UserError(f"--sigma {self.sigma:g}: expected a number greater than 0 (the paper uses 1e-5)")
        if not 0 < self.tolerance < 1:
            raise UserError(f"--tolerance {self.tolerance:g}: expected a number between 0 and 1")
        if self.batch_tokens != "auto" and not (isinstance(self.batch_tokens, int) and self.batch_tokens >= 1):
            raise UserError(f"--batch-tokens {self.batch_tokens}: expected at least 1, or auto")
        draws = estimator.default_draws if self.draws is None or not estimator.default_draws else self.draws
        if draws != "auto" and estimator.default_draws:
            if not isinstance(draws, int):
                raise UserError(f"--draws {draws}: expected a whole number of at least 2, or auto")
            if draws < 2:
                raise UserError(f"--draws {draws}: expected at least 2, so that a standard error exists")
        places: dict[str, Any] = {"model": absolute_model(self.model), "data": absolute_source(self.data)}
        return dataclasses.replace(self, **places, statistic=statistic, draws=draws)


@dataclass(frozen=True)
class ScoreResult:
    """What a run gives back.

    Attributes:
        path: the Parquet file.
        table: its contents.
        rejected: samples that could not be scored.
        facts: what the replicas noticed.
        seconds: of scoring, without loading; 0 if the file was there already.
    """

    path: Path
    table: pa.Table
    rejected: list[Rejected]
    facts: dict[str, Any]
    seconds: float


def score(
    spec: ScoreSpec, out: str | Path, resources: Resources | None = None, overwrite: bool = False, progress: bool = True
) -> ScoreResult:
    """Score every sample of a data set on Ray and write `out`.

    Raises:
        UserError: one line; nothing is half-written.
    """
    spec = spec.checked()
    resources = (resources or Resources()).checked()
    if resources.engine == "vllm":
        check_engine(spec)
    out = Path(out).absolute()
    check_dataset(spec.data, spec.split)
    model = find_model(spec.model)
    texts = open_texts(spec.data, spec.split, model.tokenizer)
    identity = _identity(spec, texts, model)
    if not overwrite and (found := finished(out, identity, "a score file", "scores")):
        table, record = found
        return ScoreResult(out, table, [Rejected(**r) for r in record["rejected"]], record, 0.0)
    rejected: list[Rejected] = []
    samples = SampleFile(_samples(texts, spec, model, rejected))
    check_tokens(len(samples), samples.largest_token, rejected, model, texts.name)

    with Parts(out, identity) as parts:
        batch_tokens = _batch_tokens(spec, resources, model, samples, parts)
        shards = _shards(samples.batches(batch_tokens), spec)
        tasks = _tasks(spec, len(shards))
        todo = [task for task in tasks if not parts.has(task.key)]
        started = time.perf_counter()
        replaced = _run(spec, resources, model, shards, todo, parts, progress)
        seconds = time.perf_counter() - started
        table, unsound = _sound(_table(spec, tasks, parts, samples))
        rejected += unsound
        if not table.num_rows:
            parts.remove()
            raise nothing_scored(texts.name, rejected)
        record = dataclasses.asdict(noticed(parts, tasks)) | {
            "rejected": [dataclasses.asdict(r) for r in rejected],
            "seconds": seconds,
            "replaced_replicas": replaced,
            "engine": resources.engine,
            "batch_tokens": batch_tokens,
            **origin(*resources.packages()),
        }
        write_scores(table, out, identity, record)
        parts.remove()
    return ScoreResult(out, table, rejected, record, seconds)


def check_engine(spec: ScoreSpec) -> None:
    """Refuse what vLLM cannot do.

    Raises:
        UserError: an estimator that differentiates, or a dtype that vLLM has not.
    """
    if not ESTIMATORS[spec.estimator].perturbs:
        raise no_gradients(spec.estimator)
    check_dtype(spec.dtype)


def _identity(spec: ScoreSpec, texts: Texts, model: ModelReference) -> dict[str, Any]:
    """The spec with hashes in place of what names can hide, and its own hash."""
    content = dataclasses.asdict(spec) | {
        "schema_version": SCHEMA_VERSION,
        "data_sha256": texts.checked_sha256(),
        "model_fingerprint": model.fingerprint,
    }
    return with_spec_hash(content, ("model", "data", "split"))


def _samples(texts: Texts, spec: ScoreSpec, model: ModelReference, rejected: list[Rejected]) -> Iterator[Sample]:
    """The samples that can be scored; the others are added to `rejected`."""
    for each in encoded(texts, model.tokenizer, model.max_length, spec.tokens):
        if isinstance(each, Sample):
            yield each
        else:
            rejected.append(each)


def _batch_tokens(
    spec: ScoreSpec, resources: Resources, model: ModelReference, samples: SampleFile, parts: Parts
) -> int:
    """Tokens in a batch; once found, they stay for those who continue this run: its parts are of such batches."""
    if isinstance(spec.batch_tokens, int):
        return spec.batch_tokens
    found = parts.folder / "batch_tokens"
    if not found.is_file():
        connect()
        replica = resources.replica(model.source, model.revision, spec.dtype, spec.allow_lost_perturbation)
        footprint = resources.footprint()
        sharing = 1 if footprint.gpus else min(resources.replicas or 1000, how_many_fit(footprint))
        work = FitWork(spec.estimator, samples.longest, sharing)
        with ReplicaPool(replica, footprint, 1) as pool:
            ((_, tokens, _),) = list(pool.run([work], [[]]))
        with replacing(found) as unfinished:
            unfinished.write_text(str(tokens))
    return int(found.read_text())


def _shards(batches: Batches, spec: ScoreSpec) -> list[Batches]:
    size = BATCHES_PER_TASK[ESTIMATORS[spec.estimator].perturbs]
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def _tasks(spec: ScoreSpec, shards: int) -> list[Task]:
    """Every shard's draws, cut into ranges; with draws "auto" a shard decides for itself and is one task."""
    if spec.draws == "auto":
        until = Until(spec.statistic, spec.tolerance)  # type: ignore[arg-type]
        request = Request(spec.estimator, spec.sigma, spec.seed, 0, until.most)
        return [Task(shard, request, until) for shard in range(shards)]
    draws = int(spec.draws) or 1  # type: ignore[arg-type]
    ranges = [(first, min(first + DRAWS_PER_TASK, draws)) for first in range(0, draws, DRAWS_PER_TASK)]
    return [
        Task(shard, Request(spec.estimator, spec.sigma, spec.seed, first, last))
        for shard in range(shards)
        for first, last in ranges
    ]


def _run(
    spec: ScoreSpec,
    resources: Resources,
    model: ModelReference,
    shards: Sequence[Batches],
    todo: Sequence[Task],
    parts: Parts,
    progress: bool,
) -> int:
    """Do the tasks; how many replicas died and were replaced."""
    if not todo:
        return 0
    connect()
    replica = resources.replica(model.source, model.revision, spec.dtype, spec.allow_lost_perturbation)
    # Work in sample-draws, so that the bar moves with the work whatever the shards' sizes.
    work = {
        task.key: shards[task.shard].num_samples
        * (1 if task.until else task.request.last_draw - task.request.first_draw)
        for task in todo
    }
    unit = "sample-draw" if isinstance(spec.draws, int) and spec.draws else "sample"
    with (
        ReplicaPool(replica, resources.footprint(), resources.replicas) as pool,
        tqdm(total=sum(work.values()), unit=unit, desc=f"scoring ({spec.estimator})", disable=not progress) as bar,
    ):
        for task, draws, facts in pool.run(todo, shards):
            write_draws(parts, task, draws, facts)
            bar.update(work[task.key])
    return pool.replaced


def _table(spec: ScoreSpec, tasks: Sequence[Task], parts: Parts, samples: SampleFile) -> pa.Table:
    """Reduce the parts to one row a sample, in input order."""
    count = len(samples)
    floats = {key: np.empty(count) for key in ("nll", "mrd", "stderr")}
    column = floats | {key: np.empty(count, dtype=np.int64) for key in ("saturated", "draws")}
    # Tasks come shard by shard, and within a shard in the order of their draws.
    for _, own in groupby(tasks, key=lambda task: task.shard):
        draws = reduce(Draws.followed_by, (read_draws(parts, task) for task in own))
        mrd, stderr = reduce_draws(draws.values, spec.statistic)  # type: ignore[arg-type]
        rows = samples.rows_of(draws.indices)
        values = (draws.nll, mrd, stderr, draws.saturated, draws.values.shape[1] if spec.draws else 0)
        for key, value in zip(column, values, strict=True):
            column[key][rows] = value
    return pa.table(
        {
            "sample_id": samples.sample_ids,
            "num_tokens": samples.num_scored,
            "tokens_saturated": column["saturated"],
            "nll": column["nll"],
            "mrd": column["mrd"],
            "mrd_stderr": column["stderr"],
            "mrd_per_token": column["mrd"] / samples.num_scored,
            "draws": column["draws"],
        }
    )


def _sound(table: pa.Table) -> tuple[pa.Table, list[Rejected]]:
    """The rows that mean something, and the samples of those that do not."""
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
