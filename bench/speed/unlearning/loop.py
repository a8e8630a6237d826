"""The speed of our training loop."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from algorithms.group import Group
from algorithms.objectives import ALGORITHMS
from algorithms.ray_train import TrainingJob, ensure_reference, unlearner_of
from algorithms.recipe import Objectives, updates_per_epoch
from algorithms.samplers import Sampler, retain_order
from bench.jobs.unlearn import UnlearnSpec
from bench.models.find import find_model
from bench.speed.figures import now, seconds_of
from bench.speed.unlearning.inputs import Sizes, load, load_corpus
from scoring.samples import Sample
from scoring.work import LocalPool


class TrainingLoop:
    """Our training loop, some updates at a time: no checks, no evaluation, no checkpoints, and uniform draws from all
    samples.

    Args:
        spec: whose algorithm is trained.
        updates: the most that are made.
        folder: for the outputs of the initial model.
    """

    def __init__(self, spec: UnlearnSpec, updates: int, folder: Path) -> None:
        self.spec = spec = dataclasses.replace(spec, max_steps=updates, early_stopping=False).checked()
        self.corpus = load_corpus(spec)
        reference, model = find_model(spec.model), load(spec)
        folder = folder / spec.algorithm
        folder.mkdir(exist_ok=True)
        job = TrainingJob(spec, spec, self.corpus, reference.source, reference.revision, folder, reference.tokenizer)
        for path in (job.reference_path, job.initial_path):
            shutil.rmtree(path, ignore_errors=True)
        ensure_reference(job, lambda: LocalPool(model), model.device)
        self.unlearner = unlearner_of(job, model, Group())

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The record of each update."""
        return self.unlearner.history.steps

    def advance(self, updates: int, clock: Callable[[], float] = now) -> float:
        """Make so many updates, and return the seconds that they take."""
        return seconds_of(partial(self._train, updates), clock)

    def _train(self, updates: int) -> None:
        unlearner, all_samples = self.unlearner, np.ones(len(self.corpus.forget), dtype=bool)
        for _ in range(updates):
            unlearner.step(unlearner.sampler.draw(unlearner.history.step, self.spec.batch_size or 1, all_samples))

    def batches(self, updates: int) -> list[list[dict[str, Sample]]]:
        """The batches of the first updates: pairs of a forget and a retain sample, by role. A sample that is to be
        refused has its refusal."""
        spec, corpus, objectives = self.spec, self.corpus, Objectives.of(self.spec)
        forget = corpus.refusals if objectives.needs_refusals else corpus.forget
        all_samples, size = np.ones(len(forget), dtype=bool), spec.batch_size or 1
        sampler = Sampler(len(forget), spec.order, spec.alpha or 0.0, spec.replacement, seed=spec.seed)
        batches = []
        for step in range(updates):
            drawn = sampler.draw(step, size, all_samples).tolist()
            pairs = [{"forget": forget[i]} for i in drawn]
            if objectives.retain is not None:
                retained = retain_order(step * size, len(drawn), len(corpus.retain), spec.seed)
                for pair, i in zip(pairs, retained, strict=True):
                    pair["retain"] = corpus.retain[i]
            batches.append(pairs)
        return batches


def distinct_algorithms() -> list[str]:
    """The algorithms, but those whose updates cost as those of an earlier one, by the same objective and weights."""
    objectives, names = set(), []
    for name, algorithm in ALGORITHMS.items():
        objective = (algorithm.forget, algorithm.retain, algorithm.forget_weight, algorithm.retain_weight)
        if objective not in objectives:
            objectives.add(objective)
            names.append(name)
    return names


def measure_speed(spec: UnlearnSpec, sizes: Sizes, folder: Path) -> dict[str, dict[str, float]]:
    """Algorithm -> the median over rounds of tokens a second and of seconds."""
    print(f"\n{'one thread':<16}{'tokens/s':>10}{'s/round':>10}{'updates':>10}   (Table 9: a round of training)")
    figures = {}
    for name in distinct_algorithms():
        of_algorithm = dataclasses.replace(spec, algorithm=name)
        updates = updates_per_epoch(len(load_corpus(of_algorithm).forget), of_algorithm.checked())
        loop = TrainingLoop(of_algorithm, sizes.warm_up + sizes.rounds * updates, folder)
        loop.advance(sizes.warm_up)
        seconds = np.array([loop.advance(updates) for _ in range(sizes.rounds)])
        tokens = np.array([step["tokens"] for step in loop.steps[sizes.warm_up :]]).reshape(sizes.rounds, -1).sum(1)
        figures[name] = {
            "tokens_per_second": float(np.median(tokens / seconds)),
            "round_seconds": float(np.median(seconds)),
            "round_updates": updates,
        }
        print(f"{name:<16}{figures[name]['tokens_per_second']:>10.0f}{np.median(seconds):>10.2f}{updates:>10}")
    return figures
