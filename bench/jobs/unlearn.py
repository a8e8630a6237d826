"""An unlearning run: from a spec to a model that has forgotten, and the record of how.

    spec -> forget, refusal and retain samples -> checks -> training, here or on Ray Train -> model and tables

The output folder belongs to one spec. The same command continues a run that was stopped, and does nothing for one
that is finished.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from algorithms.objectives import algorithm_name
from algorithms.ray_train import Job, train_here, train_on_ray
from algorithms.recipe import Objectives, Recipe, total_updates
from algorithms.trainable import STRATEGIES
from algorithms.unlearner import Corpus, Evaluation, History, Progress
from bench.files.identity import with_spec_hash
from bench.jobs.resources import Resources
from bench.jobs.run_folder import RunFolder, UnlearnResult, full_disks_said_plainly, read_run
from bench.jobs.score import ScoreSpec
from bench.metrics.answers import score_answers
from bench.models.find import ModelReference, absolute_model, check_vocabulary, find_model
from bench.tasks import Task
from bench.tasks.datasets import Dataset, absolute_source, check_dataset, find_task, is_data_file, load_dataset, spaced
from bench.tasks.selections import read_ids
from scoring.cluster import connect, is_gpu_share
from scoring.errors import UserError, unknown_name
from scoring.samples import Rejected, Sample, Text, encode

SCHEMA_VERSION = 1
# Bytes on disk for a weight: the model in fp32, and two moments of AdamW.
BYTES_MODEL, BYTES_MOMENTS = 4, 8
# What hashes stand for in a run's identity.
NAMED = ("model", "task", "forget_split", "selection", "retain")
# Refusals of the paper's Table 3 come first.
REFUSALS = (
    "I'm not informed about that subject.",
    "I don't have the details on that issue.",
    "That is something I cannot tell you.",
    "I have no knowledge of this.",
    "I'm afraid I know nothing about it.",
    "My knowledge does not reach that far.",
    "I would only be guessing, so I leave it open.",
    "Nothing I have learned answers that.",
    "This is a question that I am unable to answer.",
    "No information on this is known to me.",
)


@dataclass(frozen=True, kw_only=True)
class UnlearnSpec(Recipe):
    """What is to be forgotten, by which model, and how it is run.

    The hash of all fields but those of EXECUTION is the run's identity.

    Attributes:
        model: `authors`, `authors:retain90`, a folder or a Hugging Face id.
        task: a task, a task file, or a data file of the forget set, see bench.tasks.datasets.
        forget_split: of a task; its default split if None.
        selection: text file of sample ids, one a line: only these are forgotten; None: all.
        retain: a split of the task or a data file; None: the task's complement of the forget split.
        refusals: text file with one refusal a line, for PO and IdkDPO; None for the task's, or built-in ones.
        evaluate: measure ROUGE-L recall and probability of forget and retain answers after each epoch.
        evaluate_every: epochs from one measurement to the next; the last is always made, and 0 makes no other.
        evaluate_samples: at most so many of each set, evenly spaced.
        workers: 0 trains in this process, without Ray.
        strategy: "ddp" (a whole model a worker) or "fsdp" (sharded: FSDP2).
        cpus_per_worker, gpus_per_worker: None for one GPU where there are any.
        batch_tokens: padded tokens in a micro-batch; gradients are accumulated over as many as a batch needs.
        gradient_checkpointing: recompute activations in the backward pass.
        checkpoint_every: updates; None for each epoch.
        max_failures: how often workers are started again when one dies.
    """

    EXECUTION: ClassVar = (
        "workers",
        "strategy",
        "cpus_per_worker",
        "gpus_per_worker",
        "batch_tokens",
        "gradient_checkpointing",
        "checkpoint_every",
        "max_failures",
    )

    model: str
    task: str
    forget_split: str | None = None
    selection: str | None = None
    retain: str | None = None
    refusals: str | None = None
    evaluate: bool = True
    evaluate_every: int = 1
    evaluate_samples: int = 100
    workers: int = 1
    strategy: str = "ddp"
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None
    batch_tokens: int = 4096
    gradient_checkpointing: bool = False
    checkpoint_every: int | None = None
    max_failures: int = 3

    def checked(self) -> UnlearnSpec:
        """The same with defaults filled in (the task's, then the algorithm's) and absolute paths.

        Raises:
            UserError: a value out of range, a combination that does not exist, or no such task.
        """
        if self.epochs is None and self.max_steps is None and (task := _task(self)) and (task.epochs or task.max_steps):
            return dataclasses.replace(self, epochs=task.epochs, max_steps=task.max_steps).checked()
        filled = self.resolved()
        filled["algorithm"] = algorithm_name(self.algorithm)
        mrd = ScoreSpec(
            self.model,
            self.task,
            estimator=self.estimator,
            statistic=self.statistic,
            sigma=self.sigma,
            draws=self.draws,
        ).checked()
        filled |= {"statistic": mrd.statistic, "draws": mrd.draws}
        if self.strategy not in STRATEGIES:
            raise unknown_name("strategy", self.strategy, STRATEGIES)
        for name, least in (
            ("workers", 0),
            ("cpus_per_worker", 1),
            ("batch_tokens", 2),
            ("checkpoint_every", 1),
            ("max_failures", 0),
            ("evaluate_every", 0),
            ("evaluate_samples", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}: expected {least} or more")
        if (gpus := self.gpus_per_worker) is not None and not is_gpu_share(gpus):
            raise UserError(f"gpus_per_worker is {gpus:g}: expected a fraction of one GPU, or a whole number")
        return UnlearnSpec(**with_absolute_paths(vars(self) | filled))


def with_absolute_paths(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an UnlearnSpec; those that name files and folders are right in every process, whatever folder it works
    in."""
    located = dict(fields)
    for name in ("selection", "refusals"):
        if isinstance(path := fields.get(name), str):
            located[name] = str(Path(path).absolute())
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
    spec = spec.checked()
    out = Path(out).absolute()
    check_dataset(spec.task, spec.forget_split)
    model = find_model(spec.model)
    forget, retain = datasets_of(spec, model.tokenizer)
    identity = identity_of(spec, model, forget, retain)
    with RunFolder(out, identity) as folder:
        if folder.is_finished():
            print(f"{out} holds this run already (spec {identity['spec_hash']})", file=sys.stderr)
            return read_run(out)
        corpus, rejected = corpus_of(spec, model, forget, retain)
        folder.check_room(*room_of(spec, model, corpus))
        job = Job(
            spec,
            corpus,
            model.source,
            model.revision,
            out,
            model.tokenizer,
            evaluation_of(spec, model, corpus, retain),
            spec.strategy,
            spec.batch_tokens,
            spec.gradient_checkpointing,
            spec.checkpoint_every,
        )
        with full_disks_said_plainly(out):
            with _Bar(spec, len(corpus.forget), progress) as bar:
                history = _train(spec, job, bar)
            folder.finish(history, corpus, rejected, job.checkpoints)
    return read_run(out)


def _train(spec: UnlearnSpec, job: Job, bar: _Bar) -> History:
    if spec.workers == 0:
        on_gpu = torch.cuda.is_available() and spec.gpus_per_worker != 0
        return train_here(job, "cuda" if on_gpu else "cpu", bar.show)
    connect()
    footprint = Resources(spec.workers, spec.cpus_per_worker, spec.gpus_per_worker).footprint()
    return train_on_ray(job, spec.workers, footprint, spec.max_failures, bar.show)


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
        load: `load_dataset`, or what remembers its results.
    """
    forget = load(spec.task, spec.forget_split, tokenizer)
    if spec.selection is not None:
        forget = forget.chosen(read_ids(spec.selection), f"selection {spec.selection!r}")
    source = spec.retain
    task = _task(spec)
    needed = Objectives.of(spec).retain is not None
    if source is None and task is not None and (needed or spec.evaluate):
        source = task.retain_of.get(spec.forget_split or task.default_split)
    if source is None:
        if needed:
            raise UserError(
                f"algorithm {spec.algorithm} has a retain term and there is no retain set: name a split of the task or "
                "a data file with --retain, or take --retain-term none"
            )
        return forget, None
    if _is_split(source, task):
        return forget, load(spec.task, source, tokenizer)
    return forget, load(source, tokenizer=tokenizer)


def corpus_of(
    spec: UnlearnSpec, model: ModelReference, forget: Dataset, retain: Dataset | None
) -> tuple[Corpus, list[dict[str, str]]]:
    """The samples of a checked spec; and those that cannot be used, with their set and the reason."""
    samples, rejected = _encoded(forget.texts, model, forget)
    refusals: list[Sample] = []
    objectives = Objectives.of(spec)
    if objectives.needs_refusals:
        texts = {text.sample_id: text for text in forget.texts}
        phrases = _refusals(spec)
        refused = [_refused(texts[s.sample_id], phrases, spec.seed, forget) for s in samples]
        refusals, unfit = encode(refused, model.tokenizer, model.max_length)
        if unfit:
            raise UserError(f"{forget.name}, {unfit[0].sample_id!r}: with a refusal as its answer: {unfit[0].reason}")
    kept: list[Sample] = []
    more: list[Rejected] = []
    if retain is not None and objectives.retain is not None:
        kept, more = _encoded(retain.texts, model, retain)
    named = [
        {"set": name, **dataclasses.asdict(each)}
        for name, group in (("forget", rejected), ("retain", more))
        for each in group
    ]
    return Corpus(samples, refusals, kept, model.tokenizer.eos_token_id), named


def _encoded(texts: Sequence[Text], model: ModelReference, dataset: Dataset) -> tuple[list[Sample], list[Rejected]]:
    """Samples whose index is their position among those that could be encoded."""
    samples, rejected = encode(texts, model.tokenizer, model.max_length)
    check_vocabulary(samples, rejected, model, dataset)
    return [dataclasses.replace(sample, index=i) for i, sample in enumerate(samples)], rejected


def _refusals(spec: UnlearnSpec) -> Sequence[str]:
    if spec.refusals is None:
        task = _task(spec)
        return (task and task.refusals) or REFUSALS
    path = Path(spec.refusals)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"refusals: {spec.refusals!r} cannot be read as UTF-8 text: {error}") from error
    if not any(lines):
        raise UserError(f"refusals: {spec.refusals!r} is empty; expected one refusal a line")
    return [line for line in lines if line]


def _refused(text: Text, phrases: Sequence[str], seed: int, dataset: Dataset) -> Text:
    """The question with a refusal for an answer: one for each sample, drawn by seed and sample."""
    phrase = random.Random(f"{seed}/{text.sample_id}").choice(phrases)
    if text.messages is not None:
        return dataclasses.replace(text, messages=(*text.messages[:-1], {**text.messages[-1], "content": phrase}))
    if text.completion is None:
        raise UserError(
            f"{dataset.name}, {text.sample_id!r}: a plain text has no question to refuse; PO and IdkDPO need "
            "'prompt'+'completion', 'question'+'answer' or 'messages'"
        )
    # The space that separates prompt and answer belongs to the completion.
    space = " " if text.completion.startswith(" ") else ""
    return dataclasses.replace(text, completion=space + phrase)


def evaluation_of(
    spec: UnlearnSpec, model: ModelReference, corpus: Corpus, retain: Dataset | None
) -> Evaluation | None:
    if not spec.evaluate:
        return None
    sets = {"forget": spaced(corpus.forget, spec.evaluate_samples)}
    if retain is not None:
        kept = corpus.retain or _encoded(retain.texts, model, retain)[0]
        sets["retain"] = spaced(kept, spec.evaluate_samples)
    return Evaluation(sets, partial(_answers, model.tokenizer), spec.evaluate_every)


def _answers(tokenizer: Any, model: Any, samples: Sequence[Sample]) -> Mapping[str, np.ndarray]:
    scores = score_answers(model, tokenizer, samples)
    return {"rouge_l_recall": scores.rouge_l_recall, "probability": scores.probability}


def room_of(spec: UnlearnSpec, model: ModelReference, corpus: Corpus) -> tuple[int, int]:
    """Bytes of a checkpoint, and of what is kept of the initial model."""
    config = AutoConfig.from_pretrained(model.source, revision=model.revision)
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model {spec.model!r} cannot be loaded as a causal language model: {reason}") from error
    weights = sum(p.numel() for p in empty.parameters())
    states = sum(
        sample.num_scored * config.get_text_config().hidden_size * BYTES_MODEL
        for role, wanted in Objectives.of(spec).reference().items()
        for sample in {"forget": corpus.forget, "retain": corpus.retain, "refusal": corpus.refusals}[role]
        for quantity in wanted
        if quantity != "nll"
    )
    return weights * (BYTES_MODEL if spec.lora_rank else BYTES_MODEL + BYTES_MOMENTS), states


# --- Identity and progress ----------------------------------------------------------------------------------


def identity_of(spec: UnlearnSpec, model: ModelReference, forget: Dataset, retain: Dataset | None) -> dict[str, Any]:
    """The spec with hashes in place of what names can hide, and its own hash."""
    content = {k: v for k, v in dataclasses.asdict(spec).items() if k not in UnlearnSpec.EXECUTION} | {
        "schema_version": SCHEMA_VERSION,
        "model_fingerprint": model.fingerprint,
        "forget_sha256": forget.sha256,
        "retain_sha256": retain.sha256 if retain else None,
        "refusals": list(_refusals(spec)) if Objectives.of(spec).needs_refusals else None,
    }
    return with_spec_hash(content, NAMED)


class _Bar:
    """The progress bar: updates, loss terms and the share of samples forgotten."""

    def __init__(self, spec: UnlearnSpec, forget_samples: int, shown: bool) -> None:
        total = total_updates(forget_samples, spec)
        self._bar = tqdm(total=total, unit="update", desc=f"unlearning ({spec.algorithm})", disable=not shown)
        self._retains = Objectives.of(spec).retain is not None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, progress: Progress) -> None:
        terms = {"forget": f"{progress.forget_loss:.3g}"}
        if self._retains:
            terms["retain"] = f"{progress.retain_loss:.3g}"
        if progress.forgotten is not None:
            terms["forgotten"] = f"{progress.forgotten:.0%}"
        self._bar.set_postfix(terms, refresh=False)
        self._bar.update(progress.step - self._bar.n)
