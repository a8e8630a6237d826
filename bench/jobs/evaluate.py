"""An evaluation: from models and a task to a table of metrics, each with its interval and its per-sample values.

    spec -> models, sets of records -> columns of per-sample values, model by model -> metrics -> one Parquet file

The original model, the retain-only one (the gold standard) and the one that has forgotten are measured with the same
samples, so that differences between them are paired. Finished pieces are kept next to the output file: the same command
continues an evaluation that was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.files.identity import identity_fields, with_spec_hash
from bench.files.origin import Origin, origin
from bench.files.parts import Parts, finished_output
from bench.files.score_file import write_scores
from bench.jobs.evaluation_sets import (
    Sets,
    end_of_answers,
    first_samples,
    sets_of,
    sets_sha256,
    tokens_sha256,
)
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.measurement import Measurement
from bench.jobs.preview import Preview, SetSize, state_of
from bench.jobs.resources import Resources, check_dtype
from bench.metrics import METRICS
from bench.metrics.harness import HARNESS
from bench.metrics.quantities import asked_of_a_model
from bench.metrics.table import (
    MODEL,
    ORIGINAL,
    RETAIN_ONLY,
    SCHEMA,
    Columns,
    columns_in,
    metric_table,
    record_rows,
    sample_rows,
)
from bench.metrics.values import Missing
from bench.models.find import ModelReference, find_model, loaded_model
from bench.tasks import Task
from bench.tasks.datasets import find_task, subject
from scoring.errors import UserError, expected_one_of
from scoring.files import work_folder
from scoring.progress import Bar
from scoring.readings import Reader
from scoring.samples import BATCH_TOKENS, Rejected
from scoring.settings import build, named
from scoring.templates import TEMPLATE_FIELDS, Template
from scoring.tokens import Tokenization
from scoring.work import ReplicaSpec

if TYPE_CHECKING:
    import pandas as pd

LEVELS = ("metric", "difference", "sample", "record")

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation gives back.

    Attributes:
        path: the Parquet file; None if none was to be written.
        table: its contents, see `bench.metrics.table`.
        record: facts that a reader must know: spec, sets, samples that were left out, seconds, packages.
    """

    path: Path | None
    table: pa.Table
    record: dict[str, Any]

    def rows(self, level: str) -> pd.DataFrame:
        """The rows of a level: "metric", "difference", "sample" or "record".

        Raises:
            UserError: there is no such level.
        """
        if level not in LEVELS:
            raise UserError(f"level is {level!r}: {expected_one_of(level, LEVELS)}")
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
        model: the model that has forgotten: a name, as on the command line, or a loaded transformers causal LM.
        task: its name, `NAME:SOURCE`, or a task file.
        tokenizer: of models that are loaded.
        original: the model before unlearning, given in the same way; None leaves it out.
        retain_model: the model that was never trained on the forget set, likewise.
        out: the Parquet file to write; the same call continues an evaluation that was stopped. None writes nothing.
        resources: how many replicas share the work; with 0, and with loaded models, it is done in this process.
        overwrite: replace `out` if it exists.
        progress: show bars.
        settings: further fields of `EvaluateSpec`, such as `metrics="ua,rr"` or `split="forget10"`.

    Returns:
        Every metric with its 95 % interval (Forget Quality and the KS distance have none), differences between the
        models, and the value of every sample.

    Raises:
        UserError: one line; what an earlier start of the same evaluation has measured is kept.
    """
    if not isinstance(resources, Resources | None):
        raise UserError(f"resources is {resources!r}: expected bench.Resources, or None")
    models = {"model": model, "original": original, "retain_model": retain_model}
    loaded = {f"loaded:{role}": one for role, one in models.items() if one is not None and _is_loaded(one)}
    names = {role: f"loaded:{role}" if f"loaded:{role}" in loaded else one for role, one in models.items()}
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
    with work_folder() as folder:
        result = evaluate_spec(spec, folder / "evaluation.parquet", resources, False, progress, references)
    return dataclasses.replace(result, path=None)


def _is_loaded(model: object) -> bool:
    return not isinstance(model, str | Path)


class _Record(Origin):
    rejected: list[dict[str, str]]


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
    resources = (resources or Resources()).checked()
    ready = _Ready.of(spec, out, resources, loaded or {})
    spec, out, task, source, metrics = ready.spec, ready.out, ready.task, ready.source, ready.metrics
    models, sets, rejected, identity = ready.models, ready.sets, ready.rejected, ready.identity
    if finished := ready.finished(overwrite):
        table, record = finished
        return EvaluationResult(out, table, {"spec": identity} | record)
    started = time.perf_counter()
    with Parts(out, identity) as parts, ExitStack() as stack:
        pieces = _PieceCache(parts)
        first = models[MODEL]
        end = end_of_answers(sets, first.tokenizer, spec.chosen_template())
        in_memory = {model.source: model.loaded for model in models.values() if model.loaded is not None}
        # One pool for all models: replicas start when they are first needed, and then exchange their weights.
        pool = stack.enter_context(
            resources.pool(ReplicaSpec(first.source, first.revision, spec.dtype, engine=resources.engine), in_memory)
        )

        @contextmanager
        def reader_of(source: str, revision: str | None) -> Iterator[Reader]:
            pool.exchange(resources.replica(source, revision, spec.dtype))
            batch_tokens = spec.batch_tokens or resources.batch_tokens()
            writing_tokens = 4 * (spec.batch_tokens or BATCH_TOKENS)
            yield Reader(pool, end, batch_tokens, bar if progress else None, writing_tokens)
            if spec.relearn_workers:
                # They need the cores.
                pool.close()

        measurement = Measurement(
            spec, task, source, models, sets, metrics, reader_of, pieces.piece, parts.folder, resources.engine
        )
        columns: dict[str, Columns] = {}
        # A model that is the original is not measured twice.
        first_of = {model.fingerprint: role for role, model in reversed(models.items())}
        todo = [role for role in first_of.values() if not parts.has(f"{role}-answers")]
        tokens = measurement.tokens_to_read() if progress and todo else 0.0
        if progress and any(parts.has(f"{role}-answers") for role in first_of.values()):
            print(f"continuing: {len(first_of) - len(todo)} of {len(first_of)} models are measured", file=sys.stderr)
        on = subject(spec.model, spec.task, spec.split)
        with Bar(f"evaluating ({on})", tokens * len(todo), "token", progress) as bar:
            for role, model in models.items():
                same = first_of[model.fingerprint]
                columns[role] = columns[same] if same in columns else measurement.columns_of(role, columns)
        table = metric_table(metrics, columns, spec.seed)
        if not table["value"].null_count < table.num_rows:
            parts.remove()
            raise UserError(f"{spec.task}: nothing could be measured; the first reason: {table['missing'][0]}")
        record = {
            "sets": {
                name: records.reason if isinstance(records, Missing) else len(records) for name, records in sets.items()
            },
            "rejected": [
                dataclasses.asdict(sample) | {"set": name} for name, samples in rejected.items() for sample in samples
            ],
            "harness": pieces.harness_versions,
            "seconds": time.perf_counter() - started,
            "engine": resources.engine,
            **origin("lm-eval", "sentence-transformers", *resources.packages()),
        }
        table = pa.concat_tables([table, record_rows(sets)])
        write_scores(table, out, identity, record)
        parts.remove()
    return EvaluationResult(out, table, {"spec": identity} | record)


def preview_evaluation(
    spec: EvaluateSpec, out: str | Path, resources: Resources | None = None, overwrite: bool = False
) -> Preview:
    """What `evaluate_spec` would do with the same arguments; nothing is written.

    Raises:
        UserError: what it would refuse before it computes.
    """
    resources = (resources or Resources()).checked()
    ready = _Ready.of(spec, out, resources, {})
    finished = ready.finished(overwrite)
    state = state_of(Parts(ready.out, ready.identity), finished is not None)
    model, template = ready.models[MODEL], ready.spec.chosen_template()
    sizes = []
    for name, records in ready.sets.items():
        if not isinstance(records, Missing):
            samples = first_samples(name, records, model, template)
            sizes.append(SetSize.of(name, samples, len(ready.rejected[name])))
    columns = {column for metric in ready.metrics for column in METRICS[metric].columns}
    texts, answers = asked_of_a_model(columns, ready.sets)
    counts = {
        "models": len({one.fingerprint for one in ready.models.values()}),
        "metrics": len(ready.metrics),
        "texts read by each model": texts,
        "answers written by each model": answers,
    }
    if new_tokens := ready.spec.new_tokens or ready.task.new_tokens:
        counts["tokens of an answer"] = new_tokens
    return Preview(ready.spec, ready.identity, state, model, tuple(sizes), counts, resources)


@dataclass(frozen=True)
class _Ready:
    """A checked spec with all that it names."""

    spec: EvaluateSpec
    out: Path
    task: Task
    source: str | None
    metrics: tuple[str, ...]
    models: dict[str, ModelReference]
    sets: Sets
    rejected: dict[str, list[Rejected]]
    identity: dict[str, Any]

    @classmethod
    def of(
        cls, spec: EvaluateSpec, out: str | Path, resources: Resources, loaded: Mapping[str, ModelReference]
    ) -> _Ready:
        spec = spec.checked()
        if resources.engine == "vllm":
            check_dtype(spec.dtype)
        task, source = find_task(spec.task)
        metrics = spec.metrics_of(task)
        models = models_of(spec, loaded)
        sets, rejected = sets_of(spec, task, source, models, metrics)
        if _asks_harness(metrics):
            task.harness(source)  # local questions that are at fault are refused before anything is measured
        identity = _identity(spec, task, models, sets)
        return cls(spec, Path(out).absolute(), task, source, metrics, models, sets, rejected, identity)

    def finished(self, overwrite: bool) -> tuple[pa.Table, dict[str, Any]] | None:
        """The table and the record, where they are there already; see `finished_output`."""
        return finished_output(
            self.out, self.identity, "an evaluation", "an evaluation", self.spec, overwrite, _Record, SCHEMA
        )


# --- Models and sets ----------------------------------------------------------------------------------------


def models_of(spec: EvaluateSpec, loaded: Mapping[str, ModelReference]) -> dict[str, ModelReference]:
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


# --- Columns ------------------------------------------------------------------------------------------------


class _PieceCache:
    """Pieces that are kept on disk for the next start.

    Attributes:
        harness_versions: versions of the tasks of lm-evaluation-harness that were run, by benchmark.
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
    """The spec, with hashes of models and data in place of their names, and the hash of all that."""
    content = identity_fields(spec, EvaluateSpec.EXECUTION) | {
        "schema_version": SCHEMA_VERSION,
        "task_name": task.name,
        "fingerprints": {role: model.fingerprint for role, model in models.items()},
        "sets_sha256": sets_sha256(sets),
        "harness_tasks_sha256": folder_sha256(spec.harness_tasks),
        **classifiers(spec),
        **harness_rule(spec.metrics_of(task), models[MODEL], spec.chosen_template()),
    }
    if (tokens := tokens_sha256(sets, models[MODEL].tokenizer, spec.chosen_template())) is not None:
        content["tokens_sha256"] = tokens
    if spec.template is None:
        end = end_of_answers(sets, models[MODEL].tokenizer, None)
        if end != models[MODEL].tokenizer.eos_token_id:
            content["answers_end"] = end  # earlier versions took the tokenizer's EOS for conversations too
    named_only = ("model", "original", "retain_model", "task", "selection", "harness_tasks", *TEMPLATE_FIELDS)
    return with_spec_hash(content, named_only)


def harness_rule(metrics: Sequence[str], model: ModelReference, template: Template | None) -> dict[str, Any]:
    """What is new in how questions of lm-evaluation-harness are put; nothing where it is as in earlier versions."""
    if not _asks_harness(metrics):
        return {}
    rule: dict[str, Any] = {"harness_begins_with_bos": True} if Tokenization(model.tokenizer).begin_is_unsaid else {}
    if template is not None:
        rule["harness_template"] = template.digest(model.tokenizer)
    return rule


def _asks_harness(metrics: Sequence[str]) -> bool:
    return any(quantity in HARNESS for metric in metrics for _, quantity in METRICS[metric].columns)


def classifiers(spec: EvaluateSpec) -> dict[str, str]:
    """The hashes of the models that judge answers, of those that are folders: their names say nothing about them."""
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
