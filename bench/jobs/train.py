"""Training: from a spec to a model that has learnt a data set, by the loop of unlearning with the loss of learning.

    spec -> data, less what is left out -> checks -> training, here or on Ray Train -> model and tables

Two models can be made by one command: the original, which learns all of the data, and the retain-only model, which
learns all but the forget set from the same start. The output folder belongs to one spec, and the same command
continues what was stopped, as of `bench.jobs.unlearn`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import pyarrow as pa

from algorithms.corpus import Corpus, evaluation_of_answers, make_corpus
from algorithms.history import History
from algorithms.ray_train import TrainingJob
from algorithms.recipe import (
    EVALUATED,
    LEARNING,
    LEARNS,
    ClipNorm,
    ComputeType,
    Execution,
    LearningRate,
    LoraAlpha,
    LoraRank,
    LoraTargets,
    MaxSteps,
    Optimizer,
    Recipe,
    Seed,
    WarmupSteps,
    WeightDecay,
    learning,
    total_updates,
    updates_per_epoch,
)
from algorithms.tables import training_tables
from algorithms.target import TRAINED_MA, Target
from bench.files.folders import LOCK, ORIGINAL, RETAIN_ONLY, TRAINING_RUN, Hashed
from bench.files.identity import identity_fields, with_spec_hash
from bench.files.origin import Origin
from bench.jobs.logs import LOG_FIELDS, Logging, run_logged
from bench.jobs.preview import DONE, Preview, SetSize
from bench.jobs.resources import check_gpus
from bench.jobs.run_folder import (
    RunFolder,
    UnlearnResult,
    failures_noted,
    full_disks_said_plainly,
    read_finished_run,
)
from bench.jobs.unlearn import UnlearnSpec, carried_out, encoder_of, room_of, unlearn
from bench.models.find import ModelName, ModelReference, absolute_model, find_model
from bench.tasks import Record
from bench.tasks.datasets import DataName, Dataset, absolute_source, check_dataset, find_task, is_data_file, subject
from bench.tasks.left_out import joined_splits, parts_of, splits_taught, without
from scoring.errors import UserError
from scoring.files import replacing, shown
from scoring.reading import exists
from scoring.samples import evenly_spaced
from scoring.settings import Doc, Expected, Ge, build, check, named
from scoring.templates import TEMPLATE_FIELDS, TemplateSettings, absolute_template

SCHEMA_VERSION = 1
# What hashes stand for in a run's identity.
NOT_HASHED = ("model", "task", "split", "minus", *TEMPLATE_FIELDS)
EPOCHS, EPOCHS_UNTIL = 5, 20
# Columns of epochs, and what they count.
UNITS = {"step": "update", "epoch": "epoch"}
# Sets whose answers are measured, as the columns of epochs name them.
TRAINED, LEFT_OUT = "trained", "left_out"


@dataclass(frozen=True, kw_only=True)
class TrainSpec(Execution, TemplateSettings, Logging):
    """What is to be learnt, by which model, and how it is run.

    The hash of all fields but those of EXECUTION is the run's identity; a pair of models are two runs.
    """

    EXECUTION: ClassVar = (*(field.name for field in dataclasses.fields(Execution)), *LOG_FIELDS)
    ADDED_LATER: ClassVar = TEMPLATE_FIELDS

    model: Annotated[ModelName, Doc("the start: an embedded model, a folder, or a Hugging Face id")]
    task: Annotated[DataName, Doc("a task, NAME:SOURCE, a task file (.yaml), or a data file of what is to be learnt")]
    split: Annotated[
        str | None,
        Doc("of a task, several with commas (default: full; of a task without that, its forget and retain split)"),
    ] = None
    minus: Annotated[
        str | None,
        Doc(
            "what is left out: a split of the task or a data file, whose records are found by prompt and answer, or a "
            "text file of sample ids, one a line; several with commas (default: nothing)"
        ),
    ] = None
    and_retain: Annotated[
        str | None,
        Doc(
            "make two models: OUT/original learns all, and OUT/retain-only all but this forget set, from the same "
            "start; given as minus is"
        ),
    ] = None
    until: Annotated[
        dict[str, float],
        Expected("ma=NUMBER, a memorization accuracy above 0 and at most 1"),
        Doc("stop after the first epoch at which the trained samples' mean memorization accuracy is this: ma=0.99"),
    ] = dataclasses.field(default_factory=dict)
    ma_samples: Annotated[
        int, Ge(1), Doc("trained samples at most, evenly spaced, on which that accuracy is measured after each epoch")
    ] = 1000
    trainable: Annotated[
        str | None, Doc("regular expression searched in parameter names: only these are trained (default: all)")
    ] = None
    lora_rank: LoraRank = 0
    lora_alpha: LoraAlpha = None
    lora_targets: LoraTargets = None
    epochs: Annotated[int | None, Ge(1), Doc("at most (default: 5; with until 20; with max_steps no limit)")] = None
    max_steps: MaxSteps = None
    batch_size: Annotated[int, Ge(1), Doc("samples an update, over all workers")] = 16
    optimizer: Optimizer = "adamw"
    learning_rate: LearningRate = 5e-5
    weight_decay: WeightDecay = 0.0
    warmup_steps: WarmupSteps = 0
    clip_norm: ClipNorm = 1.0
    dtype: ComputeType = "float32"
    seed: Seed = 0
    evaluate: Annotated[
        bool,
        Doc("measure ROUGE-L recall and probability of the answers after each epoch, of what is left out as well"),
    ] = True
    evaluate_every: Annotated[
        int, Ge(0), Doc("epochs from one measurement to the next; the last is always made, and 0 makes no other")
    ] = 1
    evaluate_samples: Annotated[int, Ge(1), Doc("whose answers are measured at most, evenly spaced")] = EVALUATED

    def checked(self) -> Self:
        """The same with defaults filled in and absolute paths.

        Raises:
            UserError: a value that cannot be, a combination that does not exist, or no such task.
        """
        self.check_logs()
        check(self)
        if self.until and (set(self.until) != {"ma"} or not 0 < self.until["ma"] <= 1):
            given = ",".join(f"{name}={value:g}" for name, value in self.until.items())
            raise UserError(
                f"{named('until')} is {given}: expected ma=NUMBER, a memorization accuracy above 0 and at most 1"
            )
        if self.minus is not None and self.and_retain is not None:
            raise UserError(
                f"{named('minus')} and {named('and_retain')} exclude each other: the original of a pair learns all"
            )
        if is_data_file(self.task) and self.split is not None:
            check_dataset(self.task, self.split)
        for split in self.splits:
            check_dataset(self.task, split)
        check_gpus("gpus_per_worker", self.gpus_per_worker)
        self.chosen_template()
        epochs = EPOCHS_UNTIL if self.until else EPOCHS
        filled = dataclasses.replace(
            self,
            model=absolute_model(self.model),
            task=absolute_source(self.task),
            minus=_absolute(self.minus, self.task),
            and_retain=_absolute(self.and_retain, self.task),
            template=absolute_template(self.template),
            epochs=self.epochs if self.epochs or self.max_steps else epochs,
        )
        return dataclasses.replace(filled, lora_alpha=filled.recipe().lora_alpha)

    @property
    def splits(self) -> list[str]:
        """The splits that are learnt; none of a data file."""
        if is_data_file(self.task):
            return []
        return splits_taught(self.task) if self.split is None else [part.strip() for part in self.split.split(",")]

    def recipe(self) -> Recipe:
        """The same as a recipe of the loop, resolved.

        Raises:
            UserError: a combination that does not exist.
        """
        own = {field.name for field in dataclasses.fields(self)}
        shared = {name: getattr(self, name) for field in dataclasses.fields(Recipe) if (name := field.name) in own}
        return learning(**shared)

    def pair(self) -> dict[str, Self]:
        """The folder of each model below the output folder, and its spec; "" is the output folder itself."""
        if self.and_retain is None:
            return {"": self}
        minus = {ORIGINAL: self.minus, RETAIN_ONLY: self.and_retain}
        return {
            name: dataclasses.replace(
                self, and_retain=None, minus=minus[name], log_dir=self.log_dir and str(Path(self.log_dir) / name)
            )
            for name in minus
        }


def _absolute(left_out: str | None, task: str) -> str | None:
    """The name of what is left out, right in every process, whatever folder it works in."""
    if left_out is None:
        return None
    splits = () if is_data_file(task) else find_task(task)[0].splits
    return ",".join(
        part if part in splits or not exists(part) else str(Path(part).absolute()) for part in parts_of(left_out)
    )


@dataclass(frozen=True)
class TrainResult:
    """What a training run gives back.

    Attributes:
        folder: with model/, the tables and run.json.
        steps, epochs, samples: the tables, see docs/training.md.
        record: facts that a reader must know: spec, updates, seconds, notes, packages.
        retain_only: the same of the model that has not learnt the forget set, where a pair was made.
    """

    folder: Path
    steps: pa.Table
    epochs: pa.Table
    samples: pa.Table
    record: dict[str, Any]
    retain_only: TrainResult | None = None

    @property
    def model(self) -> Path:
        """A folder that loads with `AutoModelForCausalLM.from_pretrained`."""
        return self.folder / "model"


def train(
    model: str | Path, task: str | Path, out: str | Path, *, progress: bool = False, **settings: Any
) -> TrainResult:
    """Fine-tune a model on a split of a task or on a data file; with `and_retain` a second one, on the rest alone.

    Args:
        model: the start: an embedded model, a folder, or a Hugging Face id.
        task: its name, `NAME:SOURCE`, a task file, or a data file.
        out: the folder to write; the same call continues a run that was stopped, and reads one that is finished.
        progress: show bars.
        settings: further fields of `TrainSpec`, such as `split="full"`, `and_retain="forget10"`, `until={"ma": 0.99}`.

    Raises:
        UserError: one line; what an earlier start of the same run has reached is kept.
    """
    return train_spec(build(TrainSpec, {"model": model, "task": task, **settings}), out, progress)


def train_spec(spec: TrainSpec, out: str | Path, progress: bool = True) -> TrainResult:
    """The same from a spec.

    Raises:
        UserError: one line; what an earlier start of the same run has reached is kept.
    """
    out = Path(out).absolute()
    spec, model, data = _ready(spec, out)
    pair = spec.pair()
    results = [_trained(one, model, *data[name], out / name, name, progress) for name, one in pair.items()]
    return dataclasses.replace(results[0], retain_only=results[1] if len(results) > 1 else None)


def preview_training(spec: TrainSpec, out: str | Path) -> Preview:
    """What `train_spec` would do with the same arguments; nothing is written.

    Of a pair, sizes and identity are those of the original, which is made first.

    Raises:
        UserError: what `train_spec` would refuse before it computes.
    """
    out = Path(out).absolute()
    spec, model, data = _ready(spec, out)
    previews = [_preview_of_one(one, model, *data[name], out / name) for name, one in reversed([*spec.pair().items()])]
    states = dict(zip(reversed([*spec.pair()]), (preview.state for preview in previews), strict=True))
    if len(states) == 1:
        return previews[-1]
    state = "; ".join(f"{name}: {states[name]}" for name in spec.pair())
    return dataclasses.replace(previews[-1], spec=spec, state=DONE if set(states.values()) == {DONE} else state)


def _preview_of_one(
    spec: TrainSpec, model: ModelReference, dataset: Dataset, left_out: Dataset | None, out: Path
) -> Preview:
    identity = identity_of(spec, model, dataset, left_out)
    folder = TrainFolder(out, identity)
    folder.check()
    recipe, encoder = spec.recipe(), encoder_of(model)
    corpus, rejected = make_corpus(recipe, encoder, dataset.text_set, None)
    total = total_updates(len(corpus.forget), recipe)
    if not folder.is_finished():
        folder.check_room(room_of(recipe, model, corpus))
    sets = [SetSize.of(TRAINED, corpus.forget, len(rejected))]
    if left_out:
        samples, unused = encoder.samples(left_out.text_set)
        sets.append(SetSize.of("left out", samples, len(unused)))
    counts = {"updates an epoch": updates_per_epoch(len(corpus.forget), recipe), "updates in all, at most": total}
    return Preview(spec, identity, folder.state(total), model, tuple(sets), counts)


def _ready(spec: TrainSpec, out: Path) -> tuple[TrainSpec, ModelReference, dict[str, tuple[Dataset, Dataset | None]]]:
    """The spec, checked, with the start and what each model learns and does not, by the name of its folder."""
    spec = spec.checked()
    pair = spec.pair()
    if "" not in pair:
        _check_folder_of_pair(out)
    model = find_model(spec.model)
    template = spec.chosen_template()
    everything = joined_splits(spec.task, spec.splits, model.tokenizer, template)
    # Before the first model is trained it is known what the second one learns.
    data: dict[str, tuple[Dataset, Dataset | None]] = {}
    for name, one in pair.items():
        setting = "and_retain" if spec.and_retain is not None else "minus"
        data[name] = (
            (everything, None)
            if one.minus is None
            else without(everything, one.minus, spec.task, model.tokenizer, template, setting)
        )
    return spec, model, data


def _check_folder_of_pair(out: Path) -> None:
    if out.is_dir() and (foreign := [p.name for p in out.iterdir() if p.name not in (ORIGINAL, RETAIN_ONLY, LOCK)]):
        raise UserError(
            f"{named('out')} {shown(out)} is not empty and holds no pair of models ({foreign[0]}): choose another "
            "folder"
        )


def _trained(
    spec: TrainSpec,
    model: ModelReference,
    dataset: Dataset,
    left_out: Dataset | None,
    out: Path,
    name: str,
    progress: bool,
) -> TrainResult:
    """One model.

    Args:
        spec: checked, of this model alone.
        model: the start.
        dataset: what is learnt.
        left_out: what is not, for the evaluation.
        name: of the model in a pair; "" of one by itself.
    """
    identity = identity_of(spec, model, dataset, left_out)
    with TrainFolder(out, identity) as folder:
        logged = run_logged(spec, out, out.name, identity)
        if folder.is_finished():
            folder.say_done()
            with logged:
                return read_training(out)
        recipe, encoder = spec.recipe(), encoder_of(model)
        corpus, rejected = make_corpus(recipe, encoder, dataset.text_set, None)
        folder.check_room(room_of(recipe, model, corpus))
        asked = evenly_spaced(corpus.forget, spec.ma_samples)
        sets = {TRAINED: corpus.forget} | ({LEFT_OUT: encoder.samples(left_out.text_set)[0]} if left_out else {})
        job = TrainingJob(
            recipe,
            spec,
            corpus,
            model.source,
            model.revision,
            out,
            model.tokenizer,
            evaluation_of_answers(model.tokenizer, sets, spec.evaluate_samples, spec.evaluate_every)
            if spec.evaluate
            else None,
            target=Target(asked, spec.until.get("ma")) if spec.until or spec.evaluate else None,
        )
        folder.say_where_it_continues(total_updates(len(corpus.forget), recipe))
        with full_disks_said_plainly(out):
            with failures_noted(folder), logged:
                on = ", ".join(filter(None, (name, subject(spec.model, spec.task, spec.split))))
                history = carried_out(job, f"training ({on})", progress, "loss")
            if job.target is not None and len(asked) < len(corpus.forget):
                history.note(f"MA is that of {len(asked)} evenly spaced samples of {len(corpus.forget)}")
            folder.finish(history, corpus, [{**each, "set": TRAINED} for each in rejected], job.checkpoints)
    return read_training(out)


def identity_of(
    spec: TrainSpec, model: ModelReference, dataset: Dataset, left_out: Dataset | None = None
) -> dict[str, Any]:
    """The spec of one model, with hashes of model and data in place of their names, and the hash of all that."""
    fields = identity_fields(spec, (*TrainSpec.EXECUTION, "and_retain"))
    content = fields | {
        "kind": TrainFolder.KIND,
        "schema_version": SCHEMA_VERSION,
        "model_fingerprint": model.fingerprint,
        "data_sha256": dataset.sha256,
        "left_out_sha256": left_out.sha256 if left_out else None,
    }
    return with_spec_hash(content, NOT_HASHED)


class TrainFolder(RunFolder):
    """The folder of one training run."""

    KIND = TRAINING_RUN

    def tables(self, history: History, corpus: Corpus) -> dict[str, pa.Table]:
        return training_tables(history, corpus)

    def facts(self, history: History) -> dict[str, Any]:
        return {}


def read_training(folder: str | Path) -> TrainResult:
    """A finished training run.

    Raises:
        UserError: the folder holds none.
    """
    record, steps, epochs, samples = read_finished_run(folder, TrainFolder.KIND, "train", _Record, _COLUMNS)
    return TrainResult(Path(folder), steps, epochs, samples, record)


class _Identity(Hashed):
    kind: str
    model: str
    task: str
    split: str | None
    minus: str | None
    until: dict[str, float]
    epochs: int | None
    max_steps: int | None
    seed: int
    model_fingerprint: str
    data_sha256: str


class _Record(Origin):
    """What every reader of run.json may rely on."""

    spec: _Identity
    updates: int
    seconds: dict[str, float]
    notes: list[str]
    rejected: list[dict[str, str]]


_COLUMNS = {
    "steps": pa.schema([pa.field("step", pa.int64(), nullable=False), ("loss", pa.float64())]),
    "epochs": pa.schema(
        [pa.field(name, pa.int64(), nullable=False) for name in ("epoch", "step")]
        + [(name, pa.float64()) for name in ("loss", "mean_abs_delta")]
    ),
    "samples": pa.schema(
        [
            pa.field("sample_id", pa.string(), nullable=False),
            pa.field("num_tokens", pa.int64(), nullable=False),
            pa.field("updates", pa.int64(), nullable=False),
        ]
    ),
}


def ending(result: TrainResult) -> str:
    """Why a training run stopped, in words."""
    spec, last = result.record["spec"], result.epochs.to_pylist()[-1]
    updates, epochs = (f"{last[name]} {what}{'s' * (last[name] != 1)}" for name, what in UNITS.items())
    target = spec["until"].get("ma")
    if target is None:
        return f"done: {epochs}, {updates}"
    ma = f"MA {last[TRAINED_MA]:.4g}"
    if last[TRAINED_MA] >= target:
        if not last["step"]:
            return f"target reached before any update: {ma} of the model as it was given, {target:g} were asked for"
        return f"target reached after {epochs}, {updates}: {ma}, {target:g} were asked for"
    limit = "--max-steps" if last["step"] == spec["max_steps"] else "--epochs"
    return (
        f"TARGET NOT REACHED: {ma} after {epochs}, {updates}, the most allowed; {target:g} were asked for: give more "
        f"{limit} or a greater --learning-rate, and a new folder"
    )


# --- Teaching records ---------------------------------------------------------------------------------------


def fine_tuned(
    source: str, records: Sequence[Record], settings: Mapping[str, Any], folder: Path, progress: bool
) -> UnlearnResult:
    """The run that taught records in memory to a model that has its part in another job.

    Its identity is that of an unlearning run, as ever: what earlier versions have begun is continued.

    Args:
        source: folder or Hugging Face id of the model.
        records: what it is to learn.
        settings: fields of UnlearnSpec: learning rate, epochs, seed, ...
        folder: to work in; the same call goes on where it was stopped.
        progress: show a bar.

    Raises:
        UserError: a setting that does not exist or cannot be; see `unlearn`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taught = folder / "taught.jsonl"
    with replacing(taught) as unfinished:
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    fixed = {"model": source, "task": str(taught), "algorithm": LEARNS}
    return unlearn(
        build(UnlearnSpec, LEARNING | {"evaluate": False} | dict(settings) | fixed), folder / "run", progress
    )
