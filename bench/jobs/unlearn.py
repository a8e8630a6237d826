"""An unlearning run: from a spec to a model that has forgotten, and the record of how.

    spec -> forget, refusal and retain samples -> checks -> training, here or on Ray Train -> model and tables

The output folder belongs to one spec. The same command continues a run that was stopped, and does nothing for one
that is finished. `algorithms.unlearn` does the same with a loaded model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from algorithms.corpus import REFUSALS, Corpus, Encoder, Evaluation, answers_evaluation, make_corpus
from algorithms.ease import MRD, is_file, sha256_of_values
from algorithms.ease import absolute_source as absolute_ease
from algorithms.history import History, Progress
from algorithms.objectives import algorithm_name
from algorithms.ray_train import TrainingJob, train_here, train_on_ray
from algorithms.recipe import (
    DUAL,
    EVALUATED,
    AnswersMeasured,
    Execution,
    Objectives,
    Recipe,
    total_updates,
    updates_per_epoch,
)
from algorithms.schedule import resolved_schedule
from algorithms.stopping import PAPER
from bench.files.identity import identity_fields, with_spec_hash
from bench.files.spec import read_mapping
from bench.jobs.logs import LOG_FIELDS, Logging, run_logged
from bench.jobs.preview import Preview, SetSize
from bench.jobs.resources import Resources, check_gpus
from bench.jobs.run_folder import Room, RunFolder, UnlearnResult, failures_noted, full_disks_said_plainly, read_run
from bench.models.find import ModelName, ModelReference, absolute_model, find_model
from bench.tasks import Task
from bench.tasks.datasets import (
    DataName,
    Dataset,
    absolute_source,
    check_dataset,
    find_task,
    is_data_file,
    load_dataset,
    load_default_retain,
    subject,
)
from bench.tasks.selections import read_ids
from bench.tasks.sources import TEXT, TEXTS, read_file, with_fields
from scoring.adapters import adapter_base
from scoring.cluster import connect
from scoring.errors import UserError
from scoring.load import read_config
from scoring.progress import Bar, Meter
from scoring.reading import read_text
from scoring.samples import TextSet
from scoring.settings import Doc, Naming, named, naming
from scoring.templates import TEMPLATE_FIELDS, TemplateSettings, absolute_template
from scoring.updates import OptimizerName

SCHEMA_VERSION = 1
# Bytes on disk for a weight: the model in fp32, and what the optimizer keeps.
BYTES_MODEL = 4
BYTES_MOMENTS: dict[OptimizerName, int] = {"adamw": 8, "sgd": 0, "adafactor": 0, "adamw-8bit": 2}
# What hashes stand for in a run's identity.
NOT_HASHED = ("model", "task", "forget_split", "selection", "retain", *TEMPLATE_FIELDS)


@dataclass(frozen=True, kw_only=True)
class UnlearnSpec(Recipe, Execution, AnswersMeasured, TemplateSettings, Logging):
    """What is to be forgotten, by which model, and how it is run.

    The hash of all fields but those of EXECUTION is the run's identity.
    """

    EXECUTION: ClassVar = (*(field.name for field in dataclasses.fields(Execution)), *LOG_FIELDS)
    ADDED_LATER: ClassVar = (
        "optimizer",
        "weights",
        "schedule",
        "hold_penalty",
        "reward",
        *DUAL,
        "negation",
        "alternatives",
        "adapter",
        "requests",
        *TEMPLATE_FIELDS,
    )

    model: Annotated[ModelName, Doc("an embedded model (authors, authors:retain90), a folder, or a Hugging Face id")]
    task: Annotated[DataName, Doc("a task, NAME:SOURCE, a task file (.yaml), or a data file of the forget set")]
    forget_split: Annotated[str | None, Doc("of a task, e.g. forget10 (default: the task's own)")] = None
    selection: Annotated[
        str | None, Doc("text file of sample ids, one a line: only these are forgotten (default: all)")
    ] = None
    requests: Annotated[
        str | None,
        Doc(
            "requests one after the other, with commas: forget splits of the task, or text files of sample ids; each "
            "starts from the model that the one before has left (default: one, by forget_split and selection)"
        ),
    ] = None
    retain: Annotated[
        DataName | None, Doc("split of the task, or a data file, of what is to be kept (default: the task's own)")
    ] = None
    refusals: Annotated[
        str | None, Doc("text file, one refusal a line, for PO and IdkDPO (default: the task's, or built-in ones)")
    ] = None

    adapter: Annotated[
        str | None,
        Doc("folder of a PEFT adapter of the model: it is put on, and it alone is trained further (default: none)"),
    ] = None
    alternatives: Annotated[
        str | None,
        Doc(
            "file (.jsonl) of objects with sample_id and alternatives, a list of answers, for AltPO (default: the "
            "task's wrong answers, where it has some)"
        ),
    ] = None

    @property
    def request_names(self) -> list[str]:
        """The requests that are named; none of a run of one.

        Raises:
            UserError: one is empty, or two are the same.
        """
        if self.requests is None:
            return []
        names = [name.strip() for name in self.requests.split(",")]
        if not all(names) or len(set(names)) < len(names):
            raise UserError(
                f"{named('requests')} is {self.requests!r}: expected splits or files of ids, each once, with commas "
                "between them"
            )
        return names

    def checked(self) -> Self:
        """The same with defaults filled in (the task's, then the algorithm's) and absolute paths.

        Raises:
            UserError: a value that cannot be, a combination that does not exist, or no such task.
        """
        if self.epochs is None and self.max_steps is None and (task := _task(self)) and (task.epochs or task.max_steps):
            return dataclasses.replace(self, epochs=task.epochs, max_steps=task.max_steps).checked()
        if isinstance(self.schedule, str):
            values, lines = read_mapping(self.schedule)
            with naming(Naming(file=self.schedule, lines=lines)):
                schedule = resolved_schedule(values, self.algorithm, self.settings, self.forget_weight)
            return dataclasses.replace(self, schedule=dataclasses.asdict(schedule)).checked()
        if self.adapter is not None:
            for name in ("lora_rank", "lora_alpha", "lora_targets", "trainable"):
                if getattr(self, name):
                    raise UserError(
                        f"{named('adapter')} and {named(name)} exclude each other: the adapter itself says what is "
                        "trained"
                    )
        filled = self.resolved()
        filled["algorithm"] = algorithm_name(self.algorithm)
        check_gpus("gpus_per_worker", self.gpus_per_worker)
        self.check_logs()
        self.chosen_template()
        return type(self)(**with_absolute_paths(vars(self) | filled))


def with_absolute_paths(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an UnlearnSpec; those that name files and folders are right in every process, whatever folder it works
    in."""
    located = dict(fields)
    for name in ("selection", "refusals", "alternatives", "adapter", "schedule", "log_dir"):
        if isinstance(path := fields.get(name), str):
            located[name] = str(Path(path).absolute())
    if isinstance(requests := fields.get("requests"), str):
        names = [name.strip() for name in requests.split(",")]
        located["requests"] = ",".join(str(Path(n).absolute()) if Path(n).is_file() else n for n in names)
    if isinstance(template := fields.get("template"), str):
        located["template"] = absolute_template(template)
    if isinstance(weights := fields.get("weights"), str):
        located["weights"] = absolute_ease(weights)
    if isinstance(schedule := fields.get("schedule"), dict) and isinstance(schedule.get("by"), str):
        located["schedule"] = schedule | {"by": absolute_ease(schedule["by"])}
    if isinstance(model := fields.get("model"), str):
        located["model"] = absolute_model(model)
    if isinstance(source := fields.get("task"), str):
        located["task"] = absolute_source(source)
        task = None if is_data_file(source) else find_task(source)[0]
        if isinstance(retain := fields.get("retain"), str) and not _is_split(retain, task):
            located["retain"] = absolute_source(retain)
    return located


def unlearn(spec: UnlearnSpec, out: str | Path, progress: bool = True) -> UnlearnResult:
    """Make a model forget, and write `out`.

    Raises:
        UserError: one line; what an earlier start of the same run has reached is kept.
    """
    out = Path(out).absolute()
    spec, model, forget, retain, identity = _ready(spec)
    with RunFolder(out, identity) as folder:
        logged = run_logged(spec, out, f"{spec.algorithm} {out.name}", identity)
        if folder.is_finished():
            folder.say_done()
            with logged:
                return read_run(out)
        corpus, rejected = corpus_of(spec, model, forget, retain)
        folder.check_room(room_of(spec, model, corpus, spec.adapter is not None))
        evaluation = evaluation_of(spec, model, corpus, retain)
        job = TrainingJob(
            spec,
            spec,
            corpus,
            model.source,
            model.revision,
            out,
            model.tokenizer,
            evaluation,
            continues_adapter=spec.adapter is not None,
        )
        folder.say_where_it_continues(total_updates(len(corpus.forget), spec))
        with full_disks_said_plainly(out):
            with failures_noted(folder), logged:
                on = subject(spec.model, spec.task, spec.forget_split)
                history = carried_out(job, f"unlearning ({spec.algorithm}, {on})", progress)
            folder.finish(history, corpus, rejected, job.checkpoints)
    return read_run(out)


def preview_unlearning(spec: UnlearnSpec, out: str | Path) -> Preview:
    """What `unlearn` would do with the same arguments; nothing is written.

    Raises:
        UserError: what `unlearn` would refuse before it computes.
    """
    out = Path(out).absolute()
    spec, model, forget, retain, identity = _ready(spec)
    folder = RunFolder(out, identity)
    folder.check()
    corpus, rejected = corpus_of(spec, model, forget, retain)
    total = total_updates(len(corpus.forget), spec)
    if not folder.is_finished():
        folder.check_room(room_of(spec, model, corpus))
    of_sets = {"forget": corpus.forget, "retain": corpus.retain, "refusals": corpus.refusals}
    if (evaluation := evaluation_of(spec, model, corpus, retain)) is not None:
        of_sets |= {f"evaluated, {name}": samples for name, samples in evaluation.sets.items()}
    sets = tuple(
        SetSize.of(name, samples, sum(left_out["set"] == name for left_out in rejected))
        for name, samples in of_sets.items()
        if samples
    )
    counts = {"updates an epoch": updates_per_epoch(len(corpus.forget), spec), "updates in all, at most": total}
    return Preview(spec, identity, folder.state(total), model, sets, counts)


def _ready(spec: UnlearnSpec) -> tuple[UnlearnSpec, ModelReference, Dataset, Dataset | None, dict[str, Any]]:
    """The spec, checked, with its model, its data and its identity."""
    spec = spec.checked()
    if spec.requests is not None:
        raise UserError(f"{named('requests')}: several requests are a job of `mrd-bench unlearn` alone")
    check_dataset(spec.task, spec.forget_split)
    model = _model_of(spec)
    forget, retain = datasets_of(spec, model.tokenizer)
    return spec, model, forget, retain, identity_of(spec, model, forget, retain)


def _model_of(spec: UnlearnSpec) -> ModelReference:
    """The initial model; with an adapter the base model with the adapter merged."""
    model = find_model(spec.model)
    if spec.adapter is None:
        return model
    folder, where = Path(spec.adapter), f"{named('adapter')} {spec.adapter!r}"
    base = adapter_base(folder) if folder.is_dir() else None
    if base is None:
        raise UserError(
            f"{where} is no folder with adapter_config.json: expected one that PEFT's save_pretrained wrote"
        )
    if find_model(str(base)).fingerprint != model.fingerprint:
        raise UserError(
            f"{where} is for the model {str(base)!r}, which is another one than {spec.model!r}: give that, or mend "
            "base_model_name_or_path in adapter_config.json"
        )
    return find_model(spec.adapter)


def carried_out(job: TrainingJob, title: str, progress: bool, loss: str = "forget") -> History:
    """Run a job in this process or on Ray Train, as its execution says.

    Args:
        title: of the bar.
        progress: show it.
        loss: what the bar calls the loss of the samples that are trained on.
    """
    execution = job.execution
    with _Bar(job, title, loss, progress) as bar:
        if execution.workers == 0:
            on_gpu = torch.cuda.is_available() and execution.gpus_per_worker != 0
            return train_here(job, "cuda" if on_gpu else "cpu", watch=bar.show)
        connect()
        footprint = Resources(None, execution.cpus_per_worker, execution.gpus_per_worker).footprint()
        return train_on_ray(job, footprint, bar.show)


# --- What is forgotten and kept -----------------------------------------------------------------------------


def _task(spec: UnlearnSpec) -> Task | None:
    return None if is_data_file(spec.task) else find_task(spec.task)[0]


def _is_split(retain: str, task: Task | None) -> bool:
    """Whether a retain set is a split of the task, and not a data file."""
    return task is not None and (retain in task.splits or not is_data_file(retain))


def datasets_of(
    spec: UnlearnSpec, tokenizer: Any, load: Callable[..., Dataset] = load_dataset
) -> tuple[Dataset, Dataset | None]:
    """The forget set, and the retain set where the objective or the evaluation uses one.

    Args:
        tokenizer: of the model, for tasks whose texts are cut by the number of tokens.
        load: `load_dataset`, or a function that remembers its results.
    """
    template = spec.chosen_template()
    forget = load(spec.task, spec.forget_split, tokenizer, template)
    if spec.selection is not None:
        forget = forget.chosen(read_ids(spec.selection), f"selection {spec.selection!r}")
    source = spec.retain
    task = _task(spec)
    needed = Objectives.of(spec).retain is not None
    if source is None and task is not None and (needed or spec.evaluate):
        forget_split = spec.forget_split or task.default_split
        if (split := task.retain_of.get(forget_split)) is not None:

            def load_split(name: str) -> Dataset:
                return load(spec.task, name, tokenizer, template)

            return forget, load_default_retain(load_split, spec.task, forget_split, split)
    if source is None:
        if needed:
            raise UserError(
                f"algorithm {spec.algorithm} has a retain term and there is no retain set: name a split of the task or "
                f"a data file with {named('retain')}, or take {named('retain_term')} none"
            )
        return forget, None
    if _is_split(source, task):
        return forget, load(spec.task, source, tokenizer, template)
    return forget, load(source, None, tokenizer, template)


def encoder_of(model: ModelReference) -> Encoder:
    return Encoder(model.tokenizer, model.max_length, model.vocabulary, f"the tokenizer of {model.source!r}")


def corpus_of(
    spec: UnlearnSpec, model: ModelReference, forget: Dataset, retain: Dataset | None
) -> tuple[Corpus, list[dict[str, str]]]:
    """The samples of a checked spec; and those that cannot be used, with their set and the reason."""
    taught = _alternatives(spec, model.tokenizer) if Objectives.of(spec).teaches == "alternatives" else _refusals(spec)
    return make_corpus(spec, encoder_of(model), forget.text_set, _text_set(retain), taught)


def _alternatives(spec: UnlearnSpec, tokenizer: Any) -> dict[str, list[str]]:
    """Sample id -> its alternative answers."""
    if spec.alternatives is not None:
        where = f"{named('alternatives')} {spec.alternatives!r}"
        records = with_fields(read_file(Path(spec.alternatives)), {"sample_id": TEXT, "alternatives": TEXTS}, where)
        return {record["sample_id"]: record["alternatives"] for record in records}
    task, source = (None, None) if is_data_file(spec.task) else find_task(spec.task)
    if task is not None:
        split = spec.forget_split or task.default_split
        records = task.load(task.evaluation(split).get("forget", split), source, tokenizer)
        if any("perturbed_answer" in record for record in records):
            return {record["id"]: record.get("perturbed_answer") or [] for record in records}
    raise UserError(
        f"algorithm {spec.algorithm} teaches alternative answers, and {spec.task!r} has none: give "
        f"{named('alternatives')}, a .jsonl file of objects with sample_id and alternatives, a list of answers"
    )


def _refusals(spec: UnlearnSpec) -> Sequence[str]:
    if spec.refusals is None:
        task = _task(spec)
        return (task and task.refusals) or REFUSALS
    text = read_text(spec.refusals, "one refusal a line", f"{named('refusals')} {spec.refusals!r}")
    lines = [line.strip() for line in text.splitlines()]
    if not any(lines):
        raise UserError(f"{named('refusals')} {spec.refusals!r} is empty; expected one refusal a line")
    return [line for line in lines if line]


def evaluation_of(
    spec: UnlearnSpec, model: ModelReference, corpus: Corpus, retain: Dataset | None
) -> Evaluation | None:
    if not spec.evaluate:
        return None
    return answers_evaluation(encoder_of(model), corpus, _text_set(retain), spec.evaluate_samples, spec.evaluate_every)


def _text_set(dataset: Dataset | None) -> TextSet | None:
    return None if dataset is None else dataset.text_set


def room_of(recipe: Recipe, model: ModelReference, corpus: Corpus, continues_adapter: bool = False) -> Room:
    """The bytes that a run writes."""
    config = read_config(model.source, model.revision)
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model {model.source!r} cannot be loaded as a causal language model: {reason}") from error
    weights = sum(p.numel() for p in empty.parameters())
    states = sum(
        sample.num_scored * config.get_text_config().hidden_size * BYTES_MODEL
        for role, quantities in Objectives.of(recipe).reference_quantities().items()
        for sample in {"forget": corpus.forget, "retain": corpus.retain, "refusal": corpus.refusals}[role]
        for quantity in quantities
        if quantity != "nll"
    )
    model_bytes = weights * BYTES_MODEL
    if recipe.lora_rank or continues_adapter:
        return Room(0, states, model_bytes, model_bytes)  # adapters are next to nothing
    moments = weights * BYTES_MOMENTS[recipe.optimizer]
    return Room(model_bytes + moments, states, model_bytes, model_bytes if recipe.negation else 0)


# --- Identity and progress ----------------------------------------------------------------------------------


def identity_of(spec: UnlearnSpec, model: ModelReference, forget: Dataset, retain: Dataset | None) -> dict[str, Any]:
    """The spec, with hashes of model and data in place of their names, and the hash of all that."""
    fields = identity_fields(spec, UnlearnSpec.EXECUTION)
    for holder, key in ((fields, "weights"), (fields.get("schedule", {}), "by")):
        if is_file(holder.get(key, MRD)):
            holder[key] = f"sha256:{sha256_of_values(holder[key])}"
    if fields["stopping"] in (None, PAPER):
        del fields["stopping"]  # no rule, or the only one that there was once
    if not fields["evaluate"] and fields["evaluate_samples"] == EVALUATED:
        fields["evaluate_samples"] = 100  # nobody asks; it was the default once
    content = fields | {
        "schema_version": SCHEMA_VERSION,
        "model_fingerprint": model.fingerprint,
        "forget_sha256": forget.sha256,
        "retain_sha256": retain.sha256 if retain else None,
        "refusals": list(_refusals(spec)) if Objectives.of(spec).teaches == "refusals" else None,
    }
    if spec.adapter is not None:
        content["adapter"] = "continued"  # which one is in the fingerprint of the model
    content.pop("alternatives", None)
    if Objectives.of(spec).teaches == "alternatives":
        answers = json.dumps(_alternatives(spec, model.tokenizer), sort_keys=True)
        content["alternatives"] = f"sha256:{hashlib.sha256(answers.encode()).hexdigest()}"
    if Objectives.of(spec).needs_layer:
        # Earlier versions took the positions from which the tokens are predicted, and did not say so.
        content["hidden_at"] = "tokens"
    return with_spec_hash(content, NOT_HASHED)


class _Bar:
    """The progress bar: updates, loss terms, the share of samples forgotten, and what is being done."""

    def __init__(self, job: TrainingJob, title: str, loss: str, shown: bool) -> None:
        self._bar = Bar(title, total_updates(len(job.corpus.forget), job.recipe), "update", shown)
        self._loss, self._in_this_process = loss, job.execution.workers == 0
        self._retains = Objectives.of(job.recipe).retain is not None
        self._noted: set[str] = set()

    def __enter__(self) -> _Bar:
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def show(self, progress: Progress) -> None:
        # At once, and not only in the summary: a run may go on for hours after what a note says at its start.
        for note in progress.notes if self._bar.shown else ():
            if note not in self._noted:
                self._noted.add(note)
                tqdm.write(f"note: {note}", file=sys.stderr)
        terms = []
        if progress.forget_loss is not None:
            terms.append(f"{self._loss}={progress.forget_loss:.3g}")
        if self._retains and progress.retain_loss is not None:
            terms.append(f"retain={progress.retain_loss:.3g}")
        if progress.forgotten is not None:
            terms.append(f"forgotten={progress.forgotten:.0%}")
        self._bar.at(progress.step)
        self._bar.left = progress.seconds_left
        if not self._in_this_process:  # else the bar's own meter has it
            terms.append(str(Meter(progress.phase, progress.done, progress.of)))
        self._bar.say(", ".join(filter(None, terms)))
