"""Measures of difficulty, side by side: from records to a Parquet file with a column for each.

    records -> samples -> batches -> measures of replicas -> parts on disk -> one Parquet file

It goes the way of `bench.jobs.score`: the same command finds the parts of a killed run and goes on; the output file
appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import pyarrow as pa
from safetensors.torch import save_file

from algorithms.alone import LossAlone
from algorithms.objectives import algorithm_name
from bench.files.identity import identity_fields, with_spec_hash
from bench.files.origin import Origin, origin
from bench.files.parts import ColumnParts, finished_output
from bench.files.score_file import write_scores
from bench.jobs.preview import Preview, SetSize, state_of
from bench.jobs.read_samples import read_samples
from bench.jobs.resources import Resources
from bench.models.find import ModelName, ModelReference, absolute_model, find_model
from bench.tasks.datasets import (
    DataName,
    Texts,
    absolute_source,
    check_dataset,
    find_task,
    is_data_file,
    load_default_retain,
    open_texts,
    subject,
)
from scoring.engine import Dtype
from scoring.errors import UserError
from scoring.files import replacing
from scoring.measures import MEASURES, Asked
from scoring.measuring import (
    DifficultySettings,
    MeanGradientTask,
    asked_by,
    columns_of,
    costs,
    difficulty_table,
    text_columns,
)
from scoring.reading import check_columns
from scoring.samples import BATCH_TOKENS_ARE, Rejected, Tokens, make_batches, nothing_scored
from scoring.settings import Doc, Ge, named
from scoring.templates import TEMPLATE_FIELDS, TemplateSettings, absolute_template
from scoring.work import Pool, ReplicaSpec

SCHEMA_VERSION = 1
NOT_HASHED = ("model", "data", "split", "retain", "corpus", "checkpoints", *TEMPLATE_FIELDS)


@dataclass(frozen=True, kw_only=True)
class OnModel(TemplateSettings):
    """The samples and the model under which they are looked at, and the algorithm whose updates are meant."""

    ADDED_LATER: ClassVar = TEMPLATE_FIELDS

    model: Annotated[ModelName, Doc("an embedded model (authors, graded), a folder, or a Hugging Face id")]
    data: Annotated[
        DataName, Doc("a task, NAME:SOURCE with its data's folder or Hugging Face id, a task file, or a data file")
    ]
    split: Annotated[str | None, Doc("of a task, e.g. forget10 (default: the task's own)")] = None
    samples: Annotated[int | None, Ge(1), Doc("at most, evenly spaced (default: all)")] = None
    algorithm: Annotated[str, Doc("whose updates forecasts and truths are about, without its retain term")] = "GA"
    settings: Annotated[dict[str, float], Doc("of its objective, such as beta=0.1")] = field(default_factory=dict)
    tokens: Annotated[Tokens, Doc("which are scored: the answer's, as in the unlearning loss, or all")] = "answer"
    batch_tokens: Annotated[int | None, Ge(1), Doc(f"padded tokens in a batch {BATCH_TOKENS_ARE}")] = None
    dtype: Annotated[Dtype, Doc("of weights and activations; updates need float32")] = "float32"

    def loss(self) -> LossAlone:
        """Of the algorithm on a sample alone.

        Raises:
            UserError: no such algorithm or setting, or one that needs more than the sample.
        """
        return LossAlone(algorithm_name(self.algorithm), self.settings)

    def located(self) -> dict[str, Any]:
        """The fields that are right in every process, whatever folder it works in."""
        return {
            "model": absolute_model(self.model),
            "data": absolute_source(self.data),
            "template": absolute_template(self.template),
            "algorithm": algorithm_name(self.algorithm),
        }


@dataclass(frozen=True, kw_only=True)
class DifficultySpec(DifficultySettings, OnModel):
    """Which measures are taken of which samples. Its hash is the run's identity."""

    retain: Annotated[
        DataName | None, Doc("split of the task, or a data file, for gradient-cosine (default: the task's own)")
    ] = None
    retain_samples: Annotated[int, Ge(1), Doc("of the retain set at most, evenly spaced")] = 256
    corpus: Annotated[
        DataName | None, Doc("a task or a data file in which frequency counts (default: the data themselves)")
    ] = None
    checkpoints: Annotated[
        list[str], Doc("earlier states of the model for vog, the earliest first: folders or Hugging Face ids")
    ] = field(default_factory=list)

    def checked(self, resources: Resources | None = None) -> Self:
        """The same with absolute paths.

        Args:
            resources: whose engine decides which measures there are.

        Raises:
            UserError: a value that cannot be, or a combination that does not exist.
        """
        spec = self.checked_settings()
        spec.loss()
        spec.chosen_template()
        if resources is not None and resources.engine == "vllm":
            refused = [name for name, measure in spec.measures.items() if "model" in measure.needs]
            if refused:
                possible = [name for name, measure in MEASURES.items() if "model" not in measure.needs]
                raise UserError(
                    f"{named('measure')} {refused[0]} looks inside the model, which vLLM does not show: use "
                    f"{named('engine')} transformers, or of {', '.join(possible)}"
                )
        located = spec.located() | {"checkpoints": [absolute_model(source) for source in spec.checkpoints]}
        if spec.corpus is not None:
            located["corpus"] = absolute_source(spec.corpus)
        if spec.retain is not None and is_data_file(spec.retain):
            located["retain"] = absolute_source(spec.retain)
        return dataclasses.replace(spec, **located)


@dataclass(frozen=True)
class DifficultyResult:
    """What a run gives back.

    Attributes:
        path: the Parquet file.
        table: its contents.
        rejected: samples that could not be measured.
        record: thresholds as numbers, cost and seconds by measure, and what the replicas noticed.
        seconds: of measuring, without loading; 0 if the file was there already.
    """

    path: Path
    table: pa.Table
    rejected: list[Rejected]
    record: dict[str, Any]
    seconds: float


class _Record(Origin):
    rejected: list[dict[str, str]]
    thresholds: dict[str, float]
    cost: dict[str, float]
    seconds_of_measures: dict[str, float]
    notes: list[str]


_COLUMNS = pa.schema(
    [pa.field("sample_id", pa.string(), nullable=False), pa.field("num_tokens", pa.int64(), nullable=False)]
)


def difficulty(
    spec: DifficultySpec,
    out: str | Path,
    resources: Resources | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> DifficultyResult:
    """Take measures of every sample of a data set and write `out`.

    Args:
        resources: how many replicas share the work; with 0 it is done in this process.
        overwrite: replace `out` if it exists.
        progress: show a bar.

    Raises:
        UserError: one line; nothing is half-written.
    """
    resources = (resources or Resources()).checked()
    ready = _Ready.of(spec, out, resources)
    spec, out, model, texts = ready.spec, ready.out, ready.model, ready.texts
    retain, corpus, asked, identity = ready.retain, ready.corpus, ready.asked, ready.identity
    if finished := ready.finished(overwrite):
        table, record = finished
        return DifficultyResult(out, table, [Rejected(**r) for r in record["rejected"]], record, 0.0)
    samples, rejected = read_samples(texts, model, spec.tokens, spec.samples)
    on = subject(spec.model, spec.data, spec.split)
    with ColumnParts(out, identity) as parts:
        started = time.perf_counter()
        replica = ReplicaSpec(model.source, model.revision, spec.dtype, engine=resources.engine)
        with resources.pool(replica) as pool:
            batch_tokens = spec.batch_tokens or parts.number("batch_tokens", resources.batch_tokens)
            batches = samples.batches(batch_tokens)
            if retain is not None:
                path = parts.folder / "retain.safetensors"
                _write_mean_gradient(pool, spec, retain, model, batch_tokens, path)
                asked = dataclasses.replace(asked, retain_gradient=str(path))
            columns, asked, seconds_of = columns_of(
                pool,
                [batches[number : number + 1] for number in range(len(batches))],
                batches,
                spec,
                asked,
                parts,
                len(samples),
                samples.rows_of,
                f"measuring ({', '.join(spec.measure)}, {on})" if progress else None,
            )
            replaced = pool.replaced
        seconds = time.perf_counter() - started
        if any(measure.scope == "texts" for measure in spec.measures.values()):
            words = {text.sample_id: text.words for text in texts}
            of_samples = [words[sample_id] for sample_id in samples.sample_ids.to_pylist()]
            columns |= text_columns(spec, of_samples, [text.words for text in corpus])
        table, unsound = difficulty_table(samples.sample_ids, samples.num_scored, columns, spec)
        rejected += unsound
        if not table.num_rows:
            parts.remove()
            raise nothing_scored(texts.name, rejected)
        record = dataclasses.asdict(parts.all_facts()) | {
            "rejected": [dataclasses.asdict(r) for r in rejected],
            "thresholds": dict(asked.thresholds),
            "cost": costs(spec, asked),
            "seconds_of_measures": seconds_of,
            "seconds": seconds,
            "replaced_replicas": replaced,
            "engine": resources.engine,
            **origin(*resources.packages()),
        }
        write_scores(table, out, identity, record)
        parts.remove()
    return DifficultyResult(out, table, rejected, record, seconds)


def preview_difficulty(
    spec: DifficultySpec, out: str | Path, resources: Resources | None = None, overwrite: bool = False
) -> Preview:
    """What `difficulty` would do with the same arguments; nothing is written.

    Raises:
        UserError: what `difficulty` would refuse before it computes.
    """
    resources = (resources or Resources()).checked()
    ready = _Ready.of(spec, out, resources)
    finished = ready.finished(overwrite)
    samples, rejected = read_samples(ready.texts, ready.model, ready.spec.tokens, ready.spec.samples)
    state = state_of(ColumnParts(ready.out, ready.identity), finished is not None)
    sets = (SetSize.of("samples", samples, len(rejected)),)
    return Preview(ready.spec, ready.identity, state, ready.model, sets, resources=resources)


@dataclass(frozen=True)
class _Ready:
    """A checked spec with all that it names."""

    spec: DifficultySpec
    out: Path
    model: ModelReference
    texts: Texts
    retain: Texts | None
    corpus: Texts
    asked: Asked
    identity: dict[str, Any]

    @classmethod
    def of(cls, spec: DifficultySpec, out: str | Path, resources: Resources) -> _Ready:
        spec = spec.checked(resources)
        check_dataset(spec.data, spec.split)
        model = find_model(spec.model)
        texts = open_texts(spec.data, spec.split, model.tokenizer, spec.chosen_template())
        retain = _retain_texts(spec, model) if spec.needs("retain") else None
        corpus = open_texts(spec.corpus, None, model.tokenizer) if spec.corpus else texts
        checkpoints = [find_model(source) for source in spec.checkpoints]
        asked = asked_by(spec, spec.loss(), tuple((state.source, state.revision) for state in checkpoints))
        identity = with_spec_hash(
            identity_fields(spec)
            | {
                "schema_version": SCHEMA_VERSION,
                "data_sha256": texts.checked_sha256(),
                "model_fingerprint": model.fingerprint,
                "retain_sha256": retain.checked_sha256() if retain else None,
                "corpus_sha256": corpus.checked_sha256() if spec.corpus else None,
                "checkpoint_fingerprints": [checkpoint.fingerprint for checkpoint in checkpoints],
            },
            NOT_HASHED,
        )
        return cls(spec, Path(out).absolute(), model, texts, retain, corpus, asked, identity)

    def finished(self, overwrite: bool) -> tuple[pa.Table, dict[str, Any]] | None:
        """The table and the record, where they are there already; see `finished_output`."""
        finished = finished_output(
            self.out, self.identity, "a difficulty file", "measures", self.spec, overwrite, _Record, _COLUMNS
        )
        if finished:
            numbers = pa.schema([(name, pa.float64()) for name in finished[0].column_names[2:]])
            check_columns(finished[0], numbers, str(self.out), "a number for each measure")
        return finished


def _retain_texts(spec: DifficultySpec, model: ModelReference) -> Texts:
    """The texts of the retain set.

    Raises:
        UserError: none is named, and the data are no task that has one.
    """
    task = None if is_data_file(spec.data) else find_task(spec.data)[0]
    source = spec.retain
    if source is None and task is not None:
        forget_split = spec.split or task.default_split
        if (split := task.retain_of.get(forget_split)) is not None:

            def open_split(name: str) -> Texts:
                return open_texts(spec.data, name, model.tokenizer, spec.chosen_template())

            return load_default_retain(open_split, spec.data, forget_split, split)
    if source is None:
        raise UserError(
            f"{named('measure')} gradient-cosine compares with a retain set, and there is none: name a split of the "
            f"task or a data file with {named('retain')}"
        )
    if task is not None and source in task.splits:
        return open_texts(spec.data, source, model.tokenizer, spec.chosen_template())
    return open_texts(source, None, model.tokenizer, spec.chosen_template())


def _write_mean_gradient(
    pool: Pool, spec: DifficultySpec, retain: Texts, model: ModelReference, batch_tokens: int, path: Path
) -> None:
    """The mean gradient over the retain set, next to the parts, for every replica to read."""
    if path.is_file():
        return
    samples, _ = read_samples(retain, model, spec.tokens, spec.retain_samples)
    chosen = [samples[row] for row in range(len(samples))]
    ((_, gradient, _),) = list(pool.run([MeanGradientTask()], [make_batches(chosen, batch_tokens)]))
    with replacing(path) as unfinished:
        save_file(gradient, unfinished)


def print_difficulty(result: DifficultyResult) -> None:
    """Range, cost and hardest samples of each measure, and all that a reader must know to trust them."""
    table, record = result.table, result.record
    print(
        f"{table.num_rows} samples measured in {result.seconds:.1f} s, {len(result.rejected)} rejected -> {result.path}"
    )
    if record["thresholds"]:
        print("thresholds of MA: " + ", ".join(f"{name} = {value:.4g}" for name, value in record["thresholds"].items()))
    print(f"{'measure':<28}{'median':>12}{'10 %':>12}{'90 %':>12}{'forwards':>10}{'seconds':>9}  hardest")
    for column in table.column_names[2:]:
        print(_line(column, table, record["cost"], record["seconds_of_measures"]))
    for note in record["notes"]:
        print(f"note: {note}")
    for rejected in result.rejected:
        print(f"rejected {rejected.sample_id!r}: {rejected.reason}")


def _line(column: str, table: pa.Table, cost: Mapping[str, float], seconds: Mapping[str, float]) -> str:
    name = column.partition("@")[0]
    values = table[column].to_numpy()
    if np.isnan(values).all():
        return f"{column:<28}{'not defined for any sample':>36}"
    low, middle, high = np.nanquantile(values, [0.1, 0.5, 0.9], method="nearest")
    text = f"{column:<28}{middle:>12.4g}{low:>12.4g}{high:>12.4g}"
    if name not in MEASURES:
        return text
    hardest = int(np.nanargmax(values * MEASURES[name].harder))
    spent = f"{seconds[name]:.1f}" if name in seconds else ""
    return f"{text}{cost[name]:>10.3g}{spent:>9}  {table['sample_id'][hardest].as_py()}"
