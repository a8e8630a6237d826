"""A trial of a sweep: one unlearning run on one selection of samples, measured where it ran, kept as one file.

    Trial -> weights as they were -> training -> metrics of the task, attacks -> HASH.json

A trial leaves no model behind unless it is asked to, and no checkpoint: one that is stopped is begun anew. Workers stay
warm: the model is loaded once in a process, and its weights are put back before each trial from one copy a node.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired

import numpy as np
import torch
from transformers import PreTrainedModel
from typing_extensions import TypedDict

from algorithms.group import Group
from algorithms.history import History, Progress
from algorithms.ray_train import TrainingJob, ensure_reference, train_on_ray, unlearner_of
from algorithms.tables import sample_table
from algorithms.unlearner import Diverged
from bench.files.folders import Hashed
from bench.files.identity import with_spec_hash
from bench.files.origin import Origin, origin
from bench.files.status import DIVERGED, ERROR, FINISHED, OUT_OF_MEMORY
from bench.jobs.attack_spec import AttackSpec
from bench.jobs.evaluate import classifiers, folder_sha256, harness_rule
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.resources import Resources
from bench.jobs.trial_attacks import attack_identity, attacked
from bench.jobs.trial_metrics import TrialMetrics
from bench.jobs.unlearn import NOT_HASHED, UnlearnSpec, corpus_of, datasets_of, evaluation_of, identity_of
from bench.metrics.table import Columns
from bench.models.find import ModelReference, find_model
from bench.tasks.datasets import Dataset, find_task, load_dataset
from scoring.cluster import check_versions, versions
from scoring.errors import UserError, first_line
from scoring.files import replacing, work_folder
from scoring.load import load_model
from scoring.plugins import Plugin, load_plugins, loaded_plugins
from scoring.progress import current_meter, expect, metered
from scoring.reading import read_json
from scoring.templates import TEMPLATE_FIELDS, Template
from scoring.work import LocalPool

if TYPE_CHECKING:
    import ray

# What is true of the trial wherever it runs, and so is shared between sweeps.
LASTING = (FINISHED, DIVERGED)
Result = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """What is run.

    Attributes:
        spec: checked; its selection is a file of sample ids, or None.
        selection: the selection's name.
        evaluation: the metrics of the task that are measured; None: those of the training loop alone.
        each_epoch: measure them after each epoch, and not only at the end.
        identity: the whole of it, with hashes in place of names, and its own "spec_hash".
        attack: what the model is attacked with at the end; None: nothing.
    """

    spec: UnlearnSpec
    selection: str
    evaluation: EvaluateSpec | None
    each_epoch: bool
    identity: dict[str, Any]
    attack: AttackSpec | None = None

    @property
    def hash(self) -> str:
        return self.identity["spec_hash"]

    @property
    def title(self) -> str:
        """For a progress bar."""
        return f"{self.spec.algorithm}, {self.selection}, seed {self.spec.seed}"


def make_trial(
    spec: UnlearnSpec,
    selection: str,
    evaluation: EvaluateSpec | None,
    each_epoch: bool,
    references: Sequence[str],
    attack: AttackSpec | None = None,
) -> Trial:
    """A trial and its identity.

    Args:
        references: fingerprints of the models that metrics compare with.
        attack: see `Trial`.

    Raises:
        UserError: the spec is at fault, or its data are.
    """
    spec = spec.checked()
    model = _model(spec.model)
    forget, retain = datasets_of(spec, model.tokenizer, _dataset)
    identity = identity_of(spec, model, forget, retain)
    del identity["spec_hash"]
    if evaluation is not None:
        # Which model and which samples are measured follows from the rest of the trial.
        later = {name for name in EvaluateSpec.ADDED_LATER if getattr(evaluation, name) is None}
        left_out = {*_OF_THE_TRIAL, *later}
        fields = {key: value for key, value in dataclasses.asdict(evaluation).items() if key not in left_out}
        fields |= {"harness_tasks": folder_sha256(evaluation.harness_tasks), **classifiers(evaluation)}
        template = spec.chosen_template()
        fields |= harness_rule(evaluation.metrics_of(find_task(evaluation.task)[0]), model, template)
        if template is not None:
            # The forget set may be plain text, whose hash says nothing of it.
            fields |= {"template": dataclasses.asdict(template)}
        identity |= {"evaluation": fields | {"each_epoch": each_epoch, "references": list(references)}}
    if attack is not None:
        identity |= {"attack": attack_identity(attack)}
    return Trial(spec, selection, evaluation, each_epoch, with_spec_hash(identity, NOT_HASHED), attack)


# Fields of an evaluation that a trial decides itself.
_OF_THE_TRIAL = (
    *("model", "task", "split", "selection", "original", "retain_model"),
    *EvaluateSpec.EXECUTION,
    *TEMPLATE_FIELDS,
)


class _Outcome(TypedDict):
    """What every reader of a result may rely on."""

    spec: Hashed
    status: Literal["finished", "diverged", "out of memory", "error", "died", "stopped"]
    reason: str | None
    seconds: float | None
    updates: NotRequired[int]
    values: NotRequired[dict[str, float | None]]
    epochs: NotRequired[list[dict[str, float | None]]]
    samples: NotRequired[list[dict[str, Any]]]
    attacks: NotRequired[list[dict[str, Any]]]
    origin: NotRequired[Origin]


class TrialStore:
    """Results by hash, one file each, whole or not at all.

    Args:
        shared: the folder of results that hold anywhere; other sweeps find them there.
        local: the folder of results of this sweep alone: what it stopped, and what went wrong on these machines.
    """

    def __init__(self, shared: Path, local: Path) -> None:
        self.shared, self.local = shared, local

    def find(self, key: str) -> Result | None:
        """The result of a trial, None if there is none yet.

        Raises:
            UserError: the file of its result is damaged, or is of another trial.
        """
        for folder in (self.shared, self.local):
            path = folder / f"{key}.json"
            if path.is_file():
                expected = "the result of a trial: remove it, and the same command runs the trial again"
                result: Result = read_json(path, _Outcome, expected)
                if result["spec"]["spec_hash"] != key:
                    raise UserError(f"{path} is the result of {result['spec']['spec_hash']}: expected {expected}")
                return result
        return None

    def write(self, key: str, result: Result) -> None:
        folder = self.shared if result["status"] in LASTING else self.local
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{key}.json") as unfinished:
            unfinished.write_text(json.dumps(result))

    def forget_failures(self) -> None:
        """So that they are tried again."""
        shutil.rmtree(self.local, ignore_errors=True)


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep are given.

    Attributes:
        weights: of each model by its source, by name: in Ray's object store, one copy a node, or in this process.
        references: columns of the original and the retain-only model on each selection, by role; for metrics that
            compare.
        store: where results go.
        work: a folder that every node sees.
        resources: of the workers of a trial that has several.
        threads: of a trial.
        device: "cpu" or "cuda".
        keep_models: save what a trial ended with, in the store.
        driver_versions: of the driver's packages.
        plugins: files that add to the registries.
    """

    weights: Mapping[str, ray.ObjectRef | Mapping[str, np.ndarray]]
    references: Mapping[str, Columns]
    store: TrialStore
    work: Path
    threads: int = 1
    device: str = "cpu"
    keep_models: bool = False
    driver_versions: Mapping[str, str] = field(default_factory=versions)
    plugins: tuple[Plugin, ...] = field(default_factory=loaded_plugins)


Report = Callable[[Mapping[str, Any]], None]


def run_trial(trial: Trial, shared: TrialContext, report: Report = lambda _: None) -> Result:
    """Run a trial, unless its result is there, and keep the result: also one that says why there is none.

    Args:
        report: is given the row of each epoch as it is closed.
    """
    if earlier := shared.store.find(trial.hash):
        return earlier
    torch.set_num_threads(shared.threads)
    started = time.perf_counter()
    result: Result
    try:
        check_versions(shared.driver_versions)
        load_plugins(shared.plugins)
        result = {"status": FINISHED, "reason": None, **_run(trial, shared, report)}
    except Diverged as error:
        result = {"status": DIVERGED, "reason": str(error)}
    except (torch.OutOfMemoryError, MemoryError) as error:
        result = {"status": OUT_OF_MEMORY, "reason": f"{first_line(error)}; lower batch_tokens, or give a trial more"}
    except Exception as error:
        # One trial's failure is a row of the sweep, not its end.
        text = first_line(error)
        out_of_memory = "not enough memory" in text or "can't allocate memory" in text
        result = {"status": OUT_OF_MEMORY if out_of_memory else ERROR, "reason": text}
    if result["status"] not in LASTING:
        _WARM.clear()
        if shared.device == "cuda":
            torch.cuda.empty_cache()
    result = {"spec": trial.identity, **result, "seconds": time.perf_counter() - started, "origin": origin()}
    shared.store.write(trial.hash, _jsonable(result))
    return _jsonable(result)


def _jsonable(value: Any) -> Any:
    """The value with None for every number in it that is not finite: JSON has no nan."""
    if isinstance(value, dict):
        return {key: _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run(trial: Trial, shared: TrialContext, report: Report) -> Result:
    spec = trial.spec
    model = _model(spec.model)
    forget, retain = datasets_of(spec, model.tokenizer, _dataset)
    corpus, rejected = corpus_of(spec, model, forget, retain)
    metrics = None
    if trial.evaluation is not None:
        metrics = TrialMetrics(trial.evaluation, model, shared.references, shared.device)
    evaluation = evaluation_of(spec, model, corpus, retain)
    if metrics and trial.each_epoch and evaluation:
        evaluation = dataclasses.replace(evaluation, whole=metrics.of)

    def epoch_closed(row: Mapping[str, Any]) -> None:
        report({**row, **derived(row)})

    with _folder(trial, shared) as folder:
        job = TrainingJob(
            spec,
            spec,
            corpus,
            model.source,
            model.revision,
            folder,
            model.tokenizer,
            evaluation,
            keeps_checkpoints=spec.workers > 0,
        )
        train = _on_workers if spec.workers else _here
        with train(job, spec, shared, epoch_closed) as (history, trained):
            values = metrics.of(trained) if metrics and not trial.each_epoch else {}
            attacks: list[dict[str, Any]] = []
            if trial.attack is not None:
                attacks, under_attack = attacked(trial.attack, model, trained, shared.device)
                values |= under_attack
            if shared.keep_models:
                _keep(trained, model, shared.store.shared / trial.hash)
    epochs = [{**row, **derived(row)} for row in history.epochs]
    return {
        "values": {**epochs[-1], **values},
        "updates": history.step,
        "thresholds": history.known_thresholds,
        "epochs": epochs,
        "samples": sample_table(history, corpus).to_pylist(),
        **({"attacks": attacks} if attacks else {}),
        "passes": history.passes,
        "clocks": history.seconds,
        "notes": history.notes,
        "rejected": rejected,
    }


def derived(row: Mapping[str, Any]) -> dict[str, float]:
    """What a search maximises, from the training loop's own measurements.

    completeness = 1 - ROUGE-L recall on the forget set; utility = ROUGE-L recall on the retain set; balance is their
    harmonic mean. Only those that were measured.
    """
    values = {}
    if (forget := row.get("forget_rouge_l_recall")) is not None:
        values["completeness"] = 1 - forget
    if (retain := row.get("retain_rouge_l_recall")) is not None:
        values["utility"] = retain
    if len(values) == 2:
        total = values["completeness"] + values["utility"]
        values["balance"] = 2 * values["completeness"] * values["utility"] / total if total else 0.0
    return values


@contextmanager
def _folder(trial: Trial, shared: TrialContext) -> Iterator[Path]:
    """Where the run works: anywhere, or where all its workers see it."""
    if not trial.spec.workers:
        with work_folder() as folder:
            yield folder
        return
    folder = shared.work / trial.hash
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _here(
    job: TrainingJob, spec: UnlearnSpec, shared: TrialContext, epoch_closed: Report
) -> Iterator[tuple[History, PreTrainedModel]]:
    """Train in this process; the history, and the model with whole weights."""
    meter = current_meter()

    def update_made(progress: Progress) -> None:
        if meter is not None:
            meter.done = progress.step

    weights = _weights(shared, job.source)
    model = _as_it_was(job, weights, shared.device)
    ensure_reference(job, lambda: LocalPool(model), model.device)
    if spec.lora_rank or spec.gradient_checkpointing:
        _WARM.clear()  # this changes the model in ways that putting weights back does not undo
    unlearner = unlearner_of(job, model, Group(), update_made, epoch_closed, initial=weights)
    expect(unlearner.total)
    with metered(None):  # updates are counted, and not what is done in them
        history = unlearner.run()
    yield history, unlearner.trained.finished_model()


@contextmanager
def _on_workers(
    job: TrainingJob, spec: UnlearnSpec, shared: TrialContext, epoch_closed: Report
) -> Iterator[tuple[History, PreTrainedModel]]:
    """Train on Ray Train workers."""
    footprint = Resources(None, spec.cpus_per_worker, spec.gpus_per_worker).footprint()
    history = train_on_ray(job, footprint)
    for row in history.epochs:
        epoch_closed(row)
    saved = job.checkpoints.latest()
    assert saved is not None
    yield history, load_model(saved.model, "float32", shared.device)


def _keep(trained: PreTrainedModel, model: ModelReference, folder: Path) -> None:
    """Save what a trial ended with, whole or not at all."""
    shutil.rmtree(folder, ignore_errors=True)
    unfinished = folder.with_name(f".{folder.name}.tmp")
    trained.save_pretrained(unfinished)
    model.tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


# --- Warm workers -------------------------------------------------------------------------------------------

# The model that this process has loaded, by source, revision and device. One, as memory is what it takes.
_WARM: dict[tuple[str, str | None, str], PreTrainedModel] = {}


def shareable_weights(model: ModelReference) -> dict[str, np.ndarray]:
    """A model's weights by name, in fp32, as the object store shares them between processes without a copy."""
    loaded = load_model(model.source, "float32", "cpu", model.revision)
    return {name: p.detach().numpy() for name, p in loaded.named_parameters()}


def _weights(shared: TrialContext, source: str) -> dict[str, torch.Tensor]:
    """The initial weights: the memory is shared with all processes of the node, and nobody writes to it."""
    arrays = shared.weights[source]
    if not isinstance(arrays, Mapping):
        import ray

        arrays = ray.get(arrays)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _as_it_was(job: TrainingJob, weights: Mapping[str, torch.Tensor], device: str) -> PreTrainedModel:
    """The initial model, loaded by the first trial of this process."""
    key = (job.source, job.revision, device)
    if key not in _WARM:
        _WARM.clear()
        _WARM[key] = load_model(job.source, "float32", device, job.revision)
        return _WARM[key]
    model = _WARM[key]
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
            p.requires_grad_(True)
    return model


@lru_cache(maxsize=4)
def _model(name: str) -> ModelReference:
    return find_model(name)


_DATASETS: dict[tuple[str, str | None, int, str], Dataset] = {}


def _dataset(source: str, split: str | None, tokenizer: Any, template: Template | None) -> Dataset:
    """`load_dataset`, once in this process."""
    key = (source, split, id(tokenizer), repr(template))
    if key not in _DATASETS:
        _DATASETS[key] = load_dataset(source, split, tokenizer, template)
    return _DATASETS[key]


# --- Metrics of the task ------------------------------------------------------------------------------------
