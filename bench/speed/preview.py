"""`--dry-run`: what a command would do, as a spec file.

Its comments say sizes, time, memory and the state of the output.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from algorithms.stopping import PAPER
from bench.files.spec import as_yaml
from bench.jobs.attack_spec import AttackSpec
from bench.jobs.difficulty import DifficultySpec
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.preview import DONE, Preview
from bench.jobs.resources import Resources, SweepResources
from bench.jobs.score import ScoreSpec
from bench.jobs.train import TrainSpec
from bench.jobs.unlearn import UnlearnSpec
from bench.models.find import ModelReference
from bench.speed.plan import MANY, PlannedJob, Profile, Shape, find_profile, machine_lines, notes_on, plan, profiles
from scoring.answers import EXTRA_TOKENS
from scoring.errors import UserError
from scoring.load import read_config
from scoring.readings import PROMPTS_PER_TASK
from scoring.samples import default_batch_tokens

# Of a sample's tokens, from which EL is decoded at a look, where the rule asks for it: about half of a half-forgotten
# sample are predicted wrongly, and about half of the samples are half-forgotten.
EL_SHARE = 0.25


def preview_lines(preview: Preview, command: str, profile: str | None) -> Iterator[str]:
    """A preview as a spec file.

    Args:
        command: that was given, such as "unlearn".
        profile: of the machine that is planned for, by name; None: this one.

    Raises:
        UserError: no such profile.
    """
    yield f"# mrd-bench {command}: a dry run, nothing was written"
    yield f"# output  {preview.state}"
    yield f"# spec    {preview.identity['spec_hash']}"
    for size in preview.sets:
        left_out = f", {size.rejected} rejected" if size.rejected else ""
        yield (
            f"# samples {size.samples:,} {size.name}{left_out}: {size.tokens:.1f} tokens on average, {size.scored:.1f} "
            f"of them scored; the longest has {size.longest}"
        )
    for what, count in preview.counts.items():
        yield f"# count   {count:,} {what}"
    if preview.state != DONE:
        for line in plan_lines(preview, profile):
            yield f"# {line}"
    yield as_yaml(preview.as_settings()).rstrip("\n")


def plan_lines(preview: Preview, name: str | None) -> Iterator[str]:
    """Time and memory of what a command would do.

    Raises:
        UserError: no such profile.
    """
    if not preview.sets:
        yield "time    not planned: all that is asked are questions of lm-evaluation-harness"
        return
    job, devices, starts = planned(preview)
    profile = find_profile(name) if name else here()
    if job is None or profile is None:
        yield "time    not planned: " + (
            "it depends on when samples are forgotten"
            if job is None
            else f"{torch.cuda.get_device_name()} is not known; give --profile, see `mrd-bench plan`"
        )
        return
    try:
        job_plan = plan(job, profile, devices, starts)
    except UserError as error:
        yield f"note: {error}"
        return
    yield from machine_lines(job, job_plan, profile)
    trials = preview.counts.get("trials", 1)
    if trials > 1:
        at_once = _at_once(preview.resources)
        hours = job_plan.seconds * math.ceil(trials / at_once) / 3600
        yield f"        a trial; {trials} of them, {at_once} at once: {hours:.3g} h"
    yield from (f"note: {note}" for note in notes_on(job, profile))
    if isinstance(preview.spec, AttackSpec):
        yield "note: the updates of relearning are not counted, nor questions of lm-evaluation-harness"
    if isinstance(preview.spec, EvaluateSpec):
        yield "note: relearning, questions of lm-evaluation-harness and classifiers are not counted"


def here() -> Profile | None:
    """The profile that comes nearest to this machine; None: its GPU is not known."""
    known = profiles()
    if not torch.cuda.is_available():
        return known["cpu-core"]
    name = torch.cuda.get_device_name().lower()
    return next((profile for key, profile in known.items() if key in name), None)


def planned(preview: Preview) -> tuple[PlannedJob | None, int, bool]:
    """The job to be planned, None where it cannot be; the devices that do it; and whether they have to be started."""
    spec, first = preview.spec, preview.sets[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_tokens = spec.batch_tokens if isinstance(spec.batch_tokens, int) else default_batch_tokens(device)
    job = PlannedJob(
        shape_of(preview.model),
        first.samples,
        first.tokens,
        first.scored,
        None,
        batch_tokens=batch_tokens,
        dtype=spec.dtype,
    )
    devices, starts = _devices(spec, preview.resources)
    if isinstance(spec, ScoreSpec):
        estimator, _ = spec.chosen()
        # As many as it takes to reach a tolerance are not known beforehand: the estimator's own number stands for them.
        draws = spec.draws if isinstance(spec.draws, int) and spec.draws else None
        return replace(job, estimator=estimator, draws=draws), devices, starts
    if isinstance(spec, DifficultySpec):
        return replace(job, measure=tuple(spec.measures), lookahead=spec.lookahead), devices, starts
    if isinstance(spec, UnlearnSpec):
        if "samples of the largest selection" in preview.counts:
            job = replace(job, samples=preview.counts["samples of the largest selection"])
        return _training(job, spec, preview), devices, starts
    if isinstance(spec, TrainSpec):
        return _learning(job, spec, preview), devices, starts
    if isinstance(spec, EvaluateSpec | AttackSpec):
        return _evaluation(job, preview), devices, starts
    return None, devices, starts


def _training(job: PlannedJob, spec: UnlearnSpec, preview: Preview) -> PlannedJob:
    """The job of a run that does not stop early."""
    batch_size = spec.batch_size or 1
    an_epoch = math.ceil(job.samples / batch_size)
    epochs = min(spec.epochs or MANY, (spec.max_steps or MANY) / an_epoch)

    def times(every: int, unit: str) -> float:
        return epochs * (an_epoch if unit == "steps" else 1) / every if every else 0.0

    retain = spec.retain_term not in (None, "none")
    # Each epoch, where nobody says how often.
    every, unit = (1, "epochs") if spec.check_every is None else (spec.check_every, spec.check_unit)
    looks = 1 + math.ceil(times(every, unit)) if every else 0
    by_mrd = bool(spec.alpha) or spec.order in ("easy-first", "hard-first")
    evaluated = [size for size in preview.sets if size.name.startswith("evaluated")]
    rounds = 1 + (math.ceil(epochs / spec.evaluate_every) if spec.evaluate_every else 1)
    texts = float(rounds * sum(size.samples for size in evaluated))
    return replace(
        job,
        epochs=epochs,
        batch_size=batch_size,
        retained=float(retain),
        looks=looks,
        continuations=looks * job.samples * job.tokens * EL_SHARE if spec.stopping == PAPER else 0,
        refreshes=1 + math.floor(times(spec.refresh, spec.refresh_unit)) if by_mrd else 0,
        reads=texts,
        answers=texts,
        rounds=max(1, rounds * len(evaluated)),
        new_tokens=job.scored + EXTRA_TOKENS,
    )


def _learning(job: PlannedJob, spec: TrainSpec, preview: Preview) -> PlannedJob:
    """The job of a training run that makes all its epochs, of both models of a pair as if both learnt all."""
    models = len(spec.pair())
    an_epoch = math.ceil(job.samples / spec.batch_size)
    epochs = min(spec.epochs or MANY, (spec.max_steps or MANY) / an_epoch)
    rounds = 1 + (math.ceil(epochs / spec.evaluate_every) if spec.evaluate_every else 1)
    texts = float(spec.evaluate * rounds * sum(min(spec.evaluate_samples, size.samples) for size in preview.sets))
    measured = min(spec.ma_samples, job.samples) / job.samples
    looks = (1 + math.ceil(epochs)) * measured if spec.until or spec.evaluate else 0.0
    return replace(
        job,
        epochs=models * epochs,
        batch_size=spec.batch_size,
        retained=0.0,
        looks=models * looks,
        reads=models * texts,
        answers=models * texts,
        rounds=models * rounds * len(preview.sets),
        new_tokens=job.scored + EXTRA_TOKENS,
    )


def _evaluation(job: PlannedJob, preview: Preview) -> PlannedJob:
    """The job of an evaluation: the texts that its metrics read, and the answers that they want written."""
    models = preview.counts["models"]
    tokens = [size.tokens * size.samples for size in preview.sets]
    scored = [size.scored * size.samples for size in preview.sets]
    samples = sum(size.samples for size in preview.sets)
    return replace(
        job,
        samples=samples,
        tokens=sum(tokens) / samples,
        scored=sum(scored) / samples,
        reads=float(models * preview.counts["texts read by each model"]),
        answers=float(models * preview.counts["answers written by each model"]),
        continuations=0,
        rounds=models,
        new_tokens=preview.counts.get("tokens of an answer", round(sum(scored) / samples) + EXTRA_TOKENS),
        rows=PROMPTS_PER_TASK,
        models=models,
    )


def _devices(spec: Any, resources: Any) -> tuple[int, bool]:
    """How many devices work, and whether Ray has to start something on them."""
    on_gpus = torch.cuda.is_available()
    if isinstance(resources, SweepResources):
        return (1 if on_gpus else resources.cpus_per_trial), not resources.in_this_process
    if isinstance(resources, Resources):
        each = resources.cpus_per_replica
        if resources.in_this_process:
            return (1 if on_gpus else torch.get_num_threads()), False
        fit = torch.cuda.device_count() if on_gpus else max(1, (os.cpu_count() or 1) // each)
        return (resources.replicas or fit) * (1 if on_gpus else each), True
    if spec.workers == 0:
        return (1 if on_gpus else torch.get_num_threads()), False
    return spec.workers * (1 if on_gpus else spec.cpus_per_worker), True


def _at_once(resources: SweepResources) -> int:
    if resources.concurrent is not None:
        return max(1, resources.concurrent)
    return max(1, torch.cuda.device_count() or (os.cpu_count() or 1) // resources.cpus_per_trial)


def shape_of(model: ModelReference) -> Shape:
    """The shape of a model that was found and is not loaded."""
    config = read_config(model.source, model.revision)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    params = sum(parameter.numel() for parameter in empty.parameters())
    return Shape(params, text.num_hidden_layers, text.hidden_size, text.vocab_size)
