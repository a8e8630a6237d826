"""The main job: from records to a Parquet file of difficulties.

    records -> samples -> batches -> tasks -> replicas -> parts on disk -> one Parquet file

Every finished task is a part on disk before the next one is waited for. The same command finds the parts of a killed
run and goes on; the output file appears whole or not at all. `scoring.score` goes the same way with a loaded model.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import pyarrow as pa

from bench.files.identity import identity_fields, with_spec_hash
from bench.files.origin import Origin, origin
from bench.files.parts import DrawParts, Parts, finished_output
from bench.files.score_file import write_scores
from bench.jobs.preview import Preview, SetSize, state_of
from bench.jobs.read_samples import read_samples
from bench.jobs.resources import Resources, check_dtype
from bench.models.find import ModelName, ModelReference, absolute_model, find_model
from bench.tasks.datasets import DataName, Texts, absolute_source, check_dataset, open_texts, subject
from scoring.api import ScoreSettings, draw_tasks, run_tasks, score_columns, score_table, shards_of
from scoring.batch_size import BatchSizeTask
from scoring.cluster import how_many_fit
from scoring.engine import Dtype
from scoring.mrd import ESTIMATORS, no_gradients
from scoring.sample_file import SampleFile
from scoring.samples import Rejected, nothing_scored
from scoring.settings import Doc
from scoring.templates import TEMPLATE_FIELDS, TemplateSettings, absolute_template
from scoring.work import ReplicaSpec

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ScoreSpec(ScoreSettings, TemplateSettings):
    """What is to be scored, and how. Its hash is the run's identity."""

    ADDED_LATER: ClassVar = TEMPLATE_FIELDS

    model: Annotated[ModelName, Doc("an embedded model (authors, authors:retain90), a folder, or a Hugging Face id")]
    data: Annotated[
        DataName,
        Doc(
            "a task (see `mrd-bench tasks`), NAME:SOURCE with its data's folder, file or Hugging Face id, a task file "
            "(.yaml), or a data file (.jsonl, .json or .parquet)"
        ),
    ]
    split: Annotated[str | None, Doc("of a task, e.g. forget10 (default: the task's own)")] = None
    dtype: Annotated[Dtype, Doc("of weights and activations")] = "float32"

    def checked(self, resources: Resources | None = None) -> Self:
        """The same with defaults filled in, and absolute paths.

        Args:
            resources: whose engine decides which estimators there are.

        Raises:
            UserError: a value that cannot be, or a combination that does not exist.
        """
        engine = (resources or Resources()).engine
        spec = self.completed(differentiates=engine != "vllm")
        estimator, _ = spec.chosen()
        if engine == "vllm":
            if not ESTIMATORS[estimator].perturbs:
                raise no_gradients(estimator)
            check_dtype(self.dtype)
        spec.chosen_template()
        return dataclasses.replace(
            spec,
            model=absolute_model(self.model),
            data=absolute_source(self.data),
            template=absolute_template(self.template),
        )


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


class _Record(Origin):
    """What every reader of a score file may rely on."""

    rejected: list[dict[str, str]]
    perturbation_survival: float | None
    gradient_error: float | None
    notes: list[str]


_COLUMNS = pa.schema(
    [pa.field("sample_id", pa.string(), nullable=False)]
    + [pa.field(name, pa.int64(), nullable=False) for name in ("num_tokens", "tokens_saturated", "draws")]
    + [pa.field(name, pa.float64(), nullable=False) for name in ("nll", "mrd", "mrd_stderr")]
)


def score(
    spec: ScoreSpec, out: str | Path, resources: Resources | None = None, overwrite: bool = False, progress: bool = True
) -> ScoreResult:
    """Score every sample of a data set and write `out`.

    Args:
        resources: how many replicas share the work; with 0 it is done in this process.
        overwrite: replace `out` if it exists.
        progress: show a bar.

    Raises:
        UserError: one line; nothing is half-written.
    """
    resources = (resources or Resources()).checked()
    spec, out, model, texts, identity = _ready(spec, out, resources)
    if finished := _finished(spec, out, identity, overwrite):
        table, record = finished
        return ScoreResult(out, table, [Rejected(**r) for r in record["rejected"]], record, 0.0)
    samples, rejected = read_samples(texts, model, spec.tokens)
    estimator, _ = spec.chosen()
    replica = ReplicaSpec(model.source, model.revision, spec.dtype, spec.allow_lost_perturbation, resources.engine)
    with DrawParts(out, identity, samples.names_of) as parts:
        batch_tokens = _batch_tokens(spec, resources, replica, samples, parts)
        shards = shards_of(samples.batches(batch_tokens), estimator)
        tasks = draw_tasks(spec, len(shards))
        title = f"scoring ({estimator}, {subject(spec.model, spec.data, spec.split)})"
        started = time.perf_counter()
        replaced = 0
        if not all(parts.has(task.key) for task in tasks):
            with resources.pool(replica) as pool:
                run_tasks(pool, tasks, shards, parts, title if progress else None)
                replaced = pool.replaced
        seconds = time.perf_counter() - started
        columns = score_columns(tasks, parts, spec, len(samples), samples.rows_of)
        table, unsound = score_table(samples.sample_ids, samples.num_scored, columns)
        rejected += unsound
        if not table.num_rows:
            parts.remove()
            raise nothing_scored(texts.name, rejected)
        record = dataclasses.asdict(parts.facts(tasks)) | {
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


def preview_scoring(
    spec: ScoreSpec, out: str | Path, resources: Resources | None = None, overwrite: bool = False
) -> Preview:
    """What `score` would do with the same arguments; nothing is written.

    Raises:
        UserError: what `score` would refuse before it computes.
    """
    resources = (resources or Resources()).checked()
    spec, out, model, texts, identity = _ready(spec, out, resources)
    finished = _finished(spec, out, identity, overwrite)
    samples, rejected = read_samples(texts, model, spec.tokens)
    state = state_of(DrawParts(out, identity), finished is not None)
    sets = (SetSize.of("samples", samples, len(rejected)),)
    return Preview(spec, identity, state, model, sets, resources=resources)


def _ready(
    spec: ScoreSpec, out: str | Path, resources: Resources
) -> tuple[ScoreSpec, Path, ModelReference, Texts, dict[str, Any]]:
    """The spec, checked, with its output, model, texts and identity."""
    spec = spec.checked(resources)
    check_dataset(spec.data, spec.split)
    model = find_model(spec.model)
    texts = open_texts(spec.data, spec.split, model.tokenizer, spec.chosen_template())
    return spec, Path(out).absolute(), model, texts, _identity(spec, texts, model)


def _finished(
    spec: ScoreSpec, out: Path, identity: dict[str, Any], overwrite: bool
) -> tuple[pa.Table, dict[str, Any]] | None:
    return finished_output(out, identity, "a score file", "scores", spec, overwrite, _Record, _COLUMNS)


def _identity(spec: ScoreSpec, texts: Texts, model: ModelReference) -> dict[str, Any]:
    """The spec, with hashes of model and data in place of their names, and the hash of all that."""
    content = identity_fields(spec) | {
        "schema_version": SCHEMA_VERSION,
        "data_sha256": texts.checked_sha256(),
        "model_fingerprint": model.fingerprint,
    }
    return with_spec_hash(content, ("model", "data", "split", *TEMPLATE_FIELDS))


def _batch_tokens(
    spec: ScoreSpec, resources: Resources, replica: ReplicaSpec, samples: SampleFile, parts: Parts
) -> int:
    """Tokens in a batch."""
    if isinstance(spec.batch_tokens, int):
        return spec.batch_tokens

    def choose() -> int:
        estimator, _ = spec.chosen()
        with resources.pool(replica, replicas=1) as pool:
            if spec.batch_tokens is None:
                return resources.batch_tokens()
            sharing = 1
            if not resources.in_this_process and not (footprint := resources.footprint()).gpus:
                sharing = min(resources.replicas or 1000, how_many_fit(footprint))
            ((_, tokens, _),) = list(pool.run([BatchSizeTask(estimator, samples.longest, sharing)], [[]]))
            return int(tokens)

    return parts.number("batch_tokens", choose)
