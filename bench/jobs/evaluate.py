"""An evaluation: from models and a task to a table of metrics, each with its interval and its per-sample values.

    spec -> models, sets of records -> columns of per-sample values, model by model -> metrics -> one Parquet file

The original model, the retain-only one (the gold standard) and the one that has forgotten are measured with the same
samples, so that differences between them are paired. What is finished is kept next to the output file: the same command
continues an evaluation that was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.files.identity import with_spec_hash
from bench.files.origin import origin
from bench.files.parts import Parts, finished_output
from bench.files.score_file import write_scores
from bench.jobs.relearn import Relearning, fine_tuned
from bench.jobs.resources import Resources, check_dtype
from bench.metrics import METRICS
from bench.metrics.harness import pool_model, run_harness
from bench.metrics.quantities import QUANTITIES, MeasurementSetup, measure
from bench.metrics.relearning import forgotten, nothing_relearned, relearned
from bench.metrics.similarity import Embedder
from bench.metrics.table import MODEL, ORIGINAL, RETAIN_ONLY, Columns, columns_in, metric_table, sample_rows
from bench.metrics.toxicity import Classifier
from bench.metrics.values import Missing, Scores
from bench.models.find import ModelName, ModelReference, absolute_model, find_model, loaded_model
from bench.tasks import Record, Task
from bench.tasks.datasets import DataName, absolute_source, find_task
from bench.tasks.selections import read_ids
from bench.tasks.task import Unreachable
from scoring.errors import UserError, unknown_name
from scoring.readings import Reader
from scoring.records import as_text, check_ids, question_answer
from scoring.samples import BATCH_TOKENS, NO_LIMIT, Rejected, Text, encode, evenly_spaced
from scoring.settings import Doc, Ge, Gt, Le, build, check, named
from scoring.work import Dtype, ReplicaSpec

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
# Quantities that lm-evaluation-harness measures.
HARNESS = ("acc", "log_likelihood", "words")
# How much it scores at once under a model that does not say how much it can read: its own default.
HARNESS_CONTEXT = 2048
RELEARNING = ("forgotten", "relearned")
RIGHT, FORGOTTEN, RELEARNED = (("forget", quantity) for quantity in ("right", *RELEARNING))
Sets = Mapping[str, list[Record] | Missing]


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """What is evaluated, and how. Its hash is the evaluation's identity."""

    EXECUTION: ClassVar = ("relearn_workers",)

    model: Annotated[ModelName, Doc("the model that has forgotten: an embedded one, a folder, or a Hugging Face id")]
    task: Annotated[DataName, Doc("a task (see `mrd-bench tasks`), NAME:SOURCE, or a task file (.yaml)")]
    split: Annotated[str | None, Doc("the forget split, e.g. forget10 (default: the task's own)")] = None
    selection: Annotated[
        str | None,
        Doc("text file of the ids of the samples that were forgotten, one a line (default: the whole split)"),
    ] = None
    original: Annotated[
        ModelName | None, Doc("the model before it forgot; without it Relearn takes all for known that is not now")
    ] = None
    retain_model: Annotated[
        ModelName | None, Doc("the gold standard: trained without the forget set; without it no Forget Quality")
    ] = None
    metrics: Annotated[
        str | None, Doc("names, separated by commas (default: all of the task; see `mrd-bench metrics`)")
    ] = None
    samples: Annotated[int | None, Ge(1), Doc("of each set at most, evenly spaced (default: all)")] = None
    mia_negatives: Annotated[
        Literal["holdout", "retain"], Doc("samples that were never trained on, or the retain set")
    ] = "holdout"
    min_k: Annotated[float, Gt(0), Le(1), Doc("share of tokens that Min-k% takes")] = 0.2
    el_n: Annotated[int, Ge(1), Doc("tokens in an n-gram of extraction likelihood")] = 10
    sentence_model: Annotated[ModelName | None, Doc("embeds sentences for FA (default: all-MiniLM-L6-v2)")] = None
    toxicity_model: Annotated[
        ModelName | None, Doc("a text-classification model (default: the task's, unitary/toxic-bert)")
    ] = None
    toxicity_label: Annotated[str, Doc("whose score it is")] = "toxic"
    harness_tasks: Annotated[
        str | None, Doc("folder of lm-evaluation-harness task files, which go before its own of the same name")
    ] = None
    harness_limit: Annotated[int | None, Ge(1), Doc("questions of each of its tasks at most (default: all)")] = None
    relearn_share: Annotated[float, Gt(0), Le(1), Doc("share of the forget set that is taught")] = Relearning.share
    relearn_steps: Annotated[int, Ge(1), Doc("updates of relearning, 4 samples each")] = Relearning.steps
    relearn_learning_rate: Annotated[float, Gt(0), Doc("of relearning")] = Relearning.learning_rate
    relearn_workers: Annotated[int, Ge(0), Doc("Ray Train workers of relearning; 0 trains in this process")] = 0
    dtype: Annotated[Dtype, Doc("of weights and activations")] = "float32"
    batch_tokens: Annotated[int, Ge(1), Doc("padded tokens in a batch")] = BATCH_TOKENS
    seed: Annotated[int, Ge(0), Doc("of the resampling and of relearning")] = 0

    def checked(self) -> Self:
        """The same with absolute paths.

        Raises:
            UserError: a value that cannot be.
        """
        check(self)
        if self.harness_tasks is not None and not Path(self.harness_tasks).is_dir():
            raise UserError(
                f"{named('harness_tasks')} is {self.harness_tasks!r}, which is no folder: expected one with task files "
                "(.yaml)"
            )
        located: dict[str, Any] = {"task": absolute_source(self.task)}
        for name in ("model", "original", "retain_model", "sentence_model", "toxicity_model"):
            if (model := getattr(self, name)) is not None:
                located[name] = absolute_model(model)
        for name in ("selection", "harness_tasks"):
            if (path := getattr(self, name)) is not None:
                located[name] = str(Path(path).absolute())
        return dataclasses.replace(self, **located)

    def relearning(self) -> Relearning:
        return Relearning(
            self.relearn_share, self.relearn_steps, self.relearn_learning_rate, self.seed, self.relearn_workers
        )

    def metrics_of(self, task: Task) -> tuple[str, ...]:
        """The metrics that are wanted, in the task's order.

        Raises:
            UserError: the task has no such metric, or none is named.
        """
        if self.metrics is None:
            return task.metrics
        wanted = [name.strip() for name in self.metrics.split(",") if name.strip()]
        if not wanted:
            few = ",".join(task.metrics[:2])
            raise UserError(
                f"{named('metrics')} is {self.metrics!r}: expected names, separated by commas, such as {few}"
            )
        for name in wanted:
            if name not in task.metrics:
                raise unknown_name(f"metric of task {task.name!r}", name, task.metrics)
        return tuple(name for name in task.metrics if name in wanted)


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation gives back.

    Attributes:
        path: the Parquet file; None where none was asked for.
        table: its contents, see `bench.metrics.table`.
        record: what a reader must know: spec, sets, samples that were left out, seconds, packages.
    """

    path: Path | None
    table: pa.Table
    record: dict[str, Any]

    def rows(self, level: str) -> pd.DataFrame:
        """The rows of a level: "metric", "difference" or "sample"."""
        table = self.table.filter(pc.equal(self.table["level"], level))
        return table.select([name for name in table.column_names if name != "level"]).to_pandas()

    @property
    def metrics(self) -> pd.DataFrame:
        """Every metric of every model, with its interval, or the reason why it is missing."""
        return self.rows("metric").drop(columns=["set", "sample_id", "text"])


def evaluate(
    model: str | Path | PreTrainedModel,
    task: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    original: str | Path | PreTrainedModel | None = None,
    retain_model: str | Path | PreTrainedModel | None = None,
    out: str | Path | None = None,
    resources: Resources | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **settings: Any,
) -> EvaluationResult:
    """Measure the metrics of a task under a model, beside the original and the retain-only model.

    Args:
        model: that has forgotten: a name, as on the command line, or a loaded transformers causal LM.
        task: its name, `NAME:SOURCE`, or a task file.
        tokenizer: of models that are loaded.
        original, retain_model: the same; None leaves them out.
        out: the Parquet file to write; the same call continues an evaluation that was stopped. None writes nothing.
        resources: how many replicas share the work; with 0, and with loaded models, it is done in this process.
        overwrite: replace what is in `out`.
        progress: show bars.
        settings: further fields of `EvaluateSpec`, such as `metrics="ua,rr"` or `split="forget10"`.

    Returns:
        Every metric with its 95 % interval, differences between the models, and the value of every sample.

    Raises:
        UserError: one line; what an earlier start of the same evaluation has measured is kept.
    """
    given = {"model": model, "original": original, "retain_model": retain_model}
    loaded = {f"loaded:{name}": one for name, one in given.items() if one is not None and _is_loaded(one)}
    names = {name: f"loaded:{name}" if f"loaded:{name}" in loaded else one for name, one in given.items()}
    spec = build(EvaluateSpec, {**names, "task": task, **settings})
    if loaded:
        if tokenizer is None:
            raise UserError("tokenizer is empty: a loaded model needs the one that it was trained with")
        if resources is not None and not resources.in_this_process:
            raise UserError("resources: a loaded model is evaluated in this process; leave them out, or replicas=0")
        resources = dataclasses.replace(resources or Resources(), replicas=0)
    references = {name: loaded_model(name, one, tokenizer) for name, one in loaded.items()}
    if out is not None:
        return evaluate_spec(spec, out, resources, overwrite, progress, references)
    with tempfile.TemporaryDirectory(prefix="mrd-bench-") as folder:
        result = evaluate_spec(spec, Path(folder) / "evaluation.parquet", resources, False, progress, references)
    return dataclasses.replace(result, path=None)


def _is_loaded(model: object) -> bool:
    return not isinstance(model, str | Path)


def evaluate_spec(
    spec: EvaluateSpec,
    out: str | Path,
    resources: Resources | None = None,
    overwrite: bool = False,
    progress: bool = True,
    loaded: Mapping[str, ModelReference] | None = None,
) -> EvaluationResult:
    """The same from a spec.

    Args:
        loaded: models in this process, by the names that the spec gives them.

    Raises:
        UserError: one line; what an earlier start of the same evaluation has measured is kept.
    """
    spec = spec.checked()
    resources = (resources or Resources()).checked()
    if resources.engine == "vllm":
        check_dtype(spec.dtype)
    out = Path(out).absolute()
    task, source = find_task(spec.task)
    metrics = spec.metrics_of(task)
    models = _models(spec, loaded or {})
    sets, rejected = sets_of(spec, task, source, models, metrics)
    identity = _identity(spec, task, models, sets)
    if not overwrite and (found := finished_output(out, identity, "an evaluation", "an evaluation")):
        return EvaluationResult(out, found[0], {"spec": identity} | found[1])
    started = time.perf_counter()
    with Parts(out, identity) as parts, ExitStack() as stack:
        pieces = _PieceCache(parts)
        first = models[MODEL]
        in_memory = {each.source: each.loaded for each in models.values() if each.loaded is not None}
        # One pool for all models: replicas start when something is asked of them, and then exchange their weights.
        pool = stack.enter_context(
            resources.pool(ReplicaSpec(first.source, first.revision, spec.dtype, engine=resources.engine), in_memory)
        )

        @contextmanager
        def reader_of(source: str, revision: str | None) -> Iterator[Reader]:
            pool.exchange(resources.replica(source, revision, spec.dtype))
            yield Reader(pool, first.tokenizer.eos_token_id, spec.batch_tokens, progress)
            if spec.relearn_workers:
                # They need the cores.
                pool.close()

        # What vLLM predicts it has to read: a window of the harness has its last token in the context.
        spare = 1 if resources.engine == "vllm" else 0
        measurement = Measurement(
            spec, task, source, models, sets, metrics, reader_of, pieces.piece, parts.folder, progress, spare
        )
        columns: dict[str, Columns] = {}
        for role, model in models.items():
            # A model that is the original is not measured twice.
            same = next((other for other in columns if models[other].fingerprint == model.fingerprint), None)
            columns[role] = columns[same] if same else measurement.columns_of(role, columns)
        table = metric_table(metrics, columns, spec.seed)
        if not table["value"].null_count < table.num_rows:
            parts.remove()
            raise UserError(f"{spec.task}: nothing could be measured; the first reason: {table['missing'][0]}")
        record = {
            "sets": {
                name: records.reason if isinstance(records, Missing) else len(records) for name, records in sets.items()
            },
            "rejected": [dataclasses.asdict(each) | {"set": name} for name in rejected for each in rejected[name]],
            "harness": pieces.harness_versions,
            "seconds": time.perf_counter() - started,
            "engine": resources.engine,
            **origin("lm-eval", "sentence-transformers", *resources.packages()),
        }
        write_scores(table, out, identity, record)
        parts.remove()
    return EvaluationResult(out, table, {"spec": identity} | record)


# --- Models and sets ----------------------------------------------------------------------------------------


def _models(spec: EvaluateSpec, loaded: Mapping[str, ModelReference]) -> dict[str, ModelReference]:
    """The models by role.

    Raises:
        UserError: one cannot be found, or they do not share a tokenizer.
    """
    names = {ORIGINAL: spec.original, RETAIN_ONLY: spec.retain_model, MODEL: spec.model}
    models = {role: loaded.get(name) or find_model(name) for role, name in names.items() if name is not None}
    forgotten_by = models[MODEL]
    for role, other in models.items():
        if other.tokenizer.get_vocab() != forgotten_by.tokenizer.get_vocab() or _ends(other) != _ends(forgotten_by):
            setting = {ORIGINAL: "original", RETAIN_ONLY: "retain_model"}[role]
            raise UserError(
                f"{named(setting)} {names[role]!r} has another tokenizer than {named('model')} {spec.model!r} "
                f"({len(other.tokenizer)} and {len(forgotten_by.tokenizer)} tokens): expected the same model "
                "trained on other data"
            )
    return models


def _ends(model: ModelReference) -> tuple[int | None, int | None]:
    return model.tokenizer.bos_token_id, model.tokenizer.eos_token_id


def sets_of(
    spec: EvaluateSpec,
    task: Task,
    source: str | None,
    models: Mapping[str, ModelReference],
    metrics: Sequence[str],
) -> tuple[Sets, dict[str, list[Rejected]]]:
    """The records of every set that the metrics speak of, each with an "id", and those that no model can take.

    Raises:
        UserError: a set that is there is at fault, or has no record.
    """
    split = spec.split or task.default_split
    if split not in task.retain_of:
        raise unknown_name(f"forget split of task {task.name!r}", split, task.retain_of)
    splits = dict(task.evaluation(split))
    if spec.mia_negatives in splits:
        splits["negatives"] = splits[spec.mia_negatives]
    asked = {name for metric in metrics for name, quantity in METRICS[metric].columns if quantity not in HARNESS}
    sets: dict[str, list[Record] | Missing] = {}
    rejected: dict[str, list[Rejected]] = {}
    for name in sorted(asked):
        if name not in splits:
            # Named differently, so that nobody wonders what the negatives are.
            absent = spec.mia_negatives if name == "negatives" else name
            sets[name] = Missing(f"task {task.name!r} has no {absent} set")
            continue
        try:
            records = task.load(splits[name], source, models[MODEL].tokenizer)
        except Unreachable as error:
            sets[name] = Missing(str(error))
            continue
        if not records:
            raise UserError(
                f"{spec.task}, split {splits[name]!r}: the {name} set is empty; expected at least one record"
            )
        records = [{**record, "id": str(record.get("id", i))} for i, record in enumerate(records)]
        check_ids(f"{spec.task}, split {splits[name]!r}", [record["id"] for record in records])
        if name == "forget" and spec.selection is not None:
            records = _selected(records, spec.selection, f"{spec.task}, split {splits[name]!r}")
        else:
            records = evenly_spaced(records, spec.samples)
        sets[name], rejected[name] = _fitting(name, records, models)
    return sets, rejected


def _selected(records: Sequence[Record], selection: str, where: str) -> list[Record]:
    """Those whose id is in a file, in the order of the data."""
    known = {record["id"] for record in records}
    chosen = read_ids(selection)
    if unknown := next((name for name in chosen if name not in known), None):
        raise UserError(f"{named('selection')} {selection!r}: {unknown_name(f'sample of {where}', unknown, known)}")
    return [record for record in records if record["id"] in set(chosen)]


def _fitting(
    name: str, records: Sequence[Record], models: Mapping[str, ModelReference]
) -> tuple[list[Record], list[Rejected]]:
    """The records whose texts fit into the context of every model, whatever is asked of them; and the others."""
    tokenizer, context = models[MODEL].tokenizer, min(model.max_length for model in models.values())
    fit, unfit = [], []
    for number, record in enumerate(records, start=1):
        _, rejected = encode(_texts(name, number, record), tokenizer, context)
        if rejected:
            unfit.append(Rejected(record["id"], rejected[0].reason))
        else:
            fit.append(record)
    if not fit:
        raise UserError(f"{name} set: none of {len(records)} records can be used; the first: {unfit[0].reason}")
    return fit, unfit


def _texts(name: str, number: int, record: Record) -> list[Text]:
    """Every pair of a question and an answer that a metric may put to a model."""
    if "prompt" in record and "completion" not in record:
        return [Text(record["id"], record["prompt"], ".")]
    texts = [as_text(name, number, record)]
    if "question" in record:
        questions = [record[key] for key in ("question", "paraphrased_question") if record.get(key)]
        answers = [record[key] for key in ("answer", "paraphrased_answer") if record.get(key)]
        answers += record.get("perturbed_answer") or []
        texts += [Text(record["id"], *question_answer(q, a)) for q in questions for a in answers]
    return texts


# --- Columns ------------------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """The measurements of one evaluation.

    Attributes:
        models, sets: by role and by name.
        reader_of: the replicas of a model, by its source and revision.
        piece: gives the columns that a work gives, or those it gave before: key, what is in them, work. Pieces are few.
        folder: to work in.
        spare: tokens of the context that the harness leaves free.
    """

    spec: EvaluateSpec
    task: Task
    source: str | None
    models: Mapping[str, ModelReference]
    sets: Sets
    metrics: Sequence[str]
    reader_of: Callable[[str, str | None], AbstractContextManager[Reader]]
    piece: Callable[[str, Sequence[Any], Callable[[], tuple[Columns, dict[str, Any]]]], Columns]
    folder: Path
    progress: bool
    spare: int = 0

    def __post_init__(self) -> None:
        spec, task = self.spec, self.task
        # The models share a tokenizer, and what does not fit into one is put to none.
        self.means = MeasurementSetup(
            self.models[MODEL].tokenizer,
            min(model.max_length for model in self.models.values()),
            task.new_tokens,
            spec.min_k,
            spec.el_n,
            _embedder(spec.sentence_model),
            _classifier(spec.toxicity_model or task.toxicity_model, spec.toxicity_label),
        )

    def columns_of(self, role: str, others: Mapping[str, Columns]) -> Columns:
        """All columns of one model. `others` are those of the models before it."""
        wanted = list(dict.fromkeys(column for name in self.metrics for column in METRICS[name].columns))
        relearning = any(quantity in RELEARNING for _, quantity in wanted)
        asked = [column for column in wanted if column[1] in QUANTITIES]
        if relearning:
            asked.append(RIGHT)
        benchmarks = list(dict.fromkeys(name for name, quantity in wanted if quantity in HARNESS))
        model = self.models[role]
        with self.reader_of(model.source, model.revision) as reader:
            columns = self.piece(f"{role}-answers", asked, lambda: (measure(asked, self.sets, reader, self.means), {}))
            columns |= self.piece(f"{role}-benchmarks", benchmarks, lambda: self._benchmarks(reader, benchmarks))
        if relearning:
            known = None if role == ORIGINAL else others.get(ORIGINAL, {}).get(RIGHT)
            columns |= self.piece(
                f"{role}-relearning", RELEARNING, lambda: (self._relearning(role, columns, known), {})
            )
        return columns

    def _benchmarks(self, reader: Reader, names: Sequence[str]) -> tuple[Columns, dict[str, Any]]:
        """Of lm-evaluation-harness; and the versions of its tasks."""
        known = self.task.harness(self.source)
        absent = {name: Missing(f"task {self.task.name!r} has no benchmark for {name}") for name in names}
        wanted = {name: known[name] for name in names if name in known}
        folder = self.spec.harness_tasks
        context = self.means.max_length if self.means.max_length < NO_LIMIT else HARNESS_CONTEXT
        try:
            lm = pool_model(reader, self.means.tokenizer, context - self.spare)
        except UserError as error:  # the harness is not installed, or cannot handle this tokenizer
            return {(name, quantity): Missing(str(error)) for name in names for quantity in HARNESS}, {}
        versions: dict[str, Any] = {}
        found = run_harness(lm, wanted, Path(folder) if folder else None, self.spec.harness_limit)
        columns: Columns = {}
        for name, scores in {**absent, **found}.items():
            if isinstance(scores, Missing):
                columns |= {(name, quantity): scores for quantity in HARNESS}
                continue
            versions[name] = scores.tasks
            quantity = "acc" if scores.metric == "acc" else "log_likelihood"
            columns[name, quantity] = Scores(tuple(scores.ids), scores.values)
            columns[name, "words"] = Scores(tuple(scores.ids), scores.weights)
        return columns, versions

    def _relearning(self, role: str, columns: Columns, known: Scores | Missing | None) -> Columns:
        right = columns[RIGHT]
        failed = next((column for column in (right, known) if isinstance(column, Missing)), None)
        if failed is not None:
            return {("forget", quantity): failed for quantity in RELEARNING}
        assert isinstance(right, Scores)
        assert not isinstance(known, Missing)
        # Of the original model nothing is forgotten.
        gone = forgotten(right, right if role == ORIGINAL else known)
        if not gone.values.any():
            return {FORGOTTEN: gone, RELEARNED: nothing_relearned(gone)}
        records = self.sets["forget"]
        assert not isinstance(records, Missing)
        folder = self.folder / f"{role}-relearning"
        model = self.models[role]
        source = model.source
        if model.loaded is not None:
            # It is trained further from a folder, and stays as it is.
            source = str(folder / "model")
            model.loaded.save_pretrained(source)
            model.tokenizer.save_pretrained(source)
        taught = fine_tuned(source, records, self.spec.relearning(), folder, self.progress)
        with self.reader_of(str(taught), None) as reader:
            again = measure([RIGHT], self.sets, reader, self.means)[RIGHT]
        shutil.rmtree(folder)
        if isinstance(again, Missing):
            return {("forget", quantity): again for quantity in RELEARNING}
        return {FORGOTTEN: gone, RELEARNED: relearned(gone, again)}


# Loaded once in a process: trials of a sweep measure one model after the other.
_embedder, _classifier = lru_cache(maxsize=1)(Embedder), lru_cache(maxsize=1)(Classifier)


class _PieceCache:
    """Pieces that are kept on disk for the next start.

    Attributes:
        harness_versions: of the tasks of lm-evaluation-harness that were asked, by benchmark.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.harness_versions: dict[str, Any] = {}

    def piece(self, key: str, anything: Sequence[Any], work: Callable[[], tuple[Columns, dict[str, Any]]]) -> Columns:
        """The columns that `work` gives; none if there is nothing in them."""
        if not anything:
            return {}
        if not self._parts.has(key):
            columns, versions = work()
            reasons = [[*column, c.reason] for column, c in columns.items() if isinstance(c, Missing)]
            self._parts.write(key, sample_rows(columns), {"missing": reasons, "harness": versions})
        table, facts = self._parts.read(key)
        self.harness_versions |= facts["harness"]
        missing = {(name, quantity): Missing(reason) for name, quantity, reason in facts["missing"]}
        return {**columns_in(table), **missing}


# --- Identity ----------------------------------------------------------------------------------------------


def _identity(spec: EvaluateSpec, task: Task, models: Mapping[str, ModelReference], sets: Sets) -> dict[str, Any]:
    """The spec with hashes in place of what names can hide, and its own hash."""
    content = {key: value for key, value in dataclasses.asdict(spec).items() if key not in EvaluateSpec.EXECUTION} | {
        "schema_version": SCHEMA_VERSION,
        "task_name": task.name,
        "fingerprints": {role: model.fingerprint for role, model in models.items()},
        "sets_sha256": {
            name: None if isinstance(records, Missing) else hashlib.sha256(json.dumps(records).encode()).hexdigest()
            for name, records in sets.items()
        },
        "harness_tasks_sha256": folder_sha256(spec.harness_tasks),
        **classifiers(spec),
    }
    return with_spec_hash(content, ("model", "original", "retain_model", "task", "selection", "harness_tasks"))


def classifiers(spec: EvaluateSpec) -> dict[str, str]:
    """The models that judge answers, where they are folders, by what is in them."""
    named = {"sentence_model": spec.sentence_model, "toxicity_model": spec.toxicity_model}
    hashes = {name: folder_sha256(folder) for name, folder in named.items() if folder and Path(folder).is_dir()}
    return {name: content for name, content in hashes.items() if content is not None}


def folder_sha256(folder: str | None) -> str | None:
    """Of all files below a folder."""
    if folder is None:
        return None
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    content = [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
