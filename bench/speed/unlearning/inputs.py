"""What all parts of the benchmark measure on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from algorithms.corpus import Corpus
from bench.jobs.unlearn import UnlearnSpec, corpus_of, datasets_of
from bench.models.find import find_model
from scoring.load import load_model

# Table 10: time with MRD / time without, 6m23s / 8m20s and so on.
PAPER_TIME = {"GA": 383 / 500, "GradDiff": 698 / 861, "PO": 851 / 1024, "NPO": 723 / 960}
COMPARED = tuple(PAPER_TIME)


@dataclass(frozen=True)
class Sizes:
    """How much of everything is run.

    Attributes:
        warm_up: updates before any are timed.
        rounds: timed rounds of each objective.
        pairs, segment: alternations of ours and Trainer, and the updates of each.
        losses: first updates whose losses are compared.
        refreshes: timed refreshes.
        draws: K of monte-carlo.
        timed_draws: so many of them are run, and the time is scaled to all: each costs the same.
        batch_sizes: samples in a batch of monte-carlo.
        batch_size_samples: so many samples are scored, at most, to compare batch sizes.
        check_every: updates from one check of the stopping rule to the next.
        epochs: after which a run that has not forgotten all is given up.
    """

    warm_up: int = 5
    rounds: int = 3
    pairs: int = 12
    segment: int = 10
    losses: int = 5
    refreshes: int = 3
    draws: int = 200
    timed_draws: int = 4
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64, 128)
    batch_size_samples: int = 256
    check_every: int = 5
    epochs: int = 30


def benchmarked(model: str, data: str, split: str | None, retain: str | None, **settings: Any) -> UnlearnSpec:
    """A run whose parts are measured, in this process, with uniform draws.

    Args:
        model, data, split, retain: as in UnlearnSpec.
        settings: further fields.
    """
    return UnlearnSpec(
        model=model,
        task=data,
        forget_split=split or ("forget10" if data == "authors" else None),
        retain=retain,
        algorithm="GradDiff",
        alpha=0.0,
        workers=0,
        **settings,
    )


def load_corpus(spec: UnlearnSpec) -> Corpus:
    """The samples that are forgotten and retained."""
    spec = spec.checked()
    model = find_model(spec.model)
    return corpus_of(spec, model, *datasets_of(spec, model.tokenizer))[0]


def load(spec: UnlearnSpec) -> PreTrainedModel:
    """The model that is to forget."""
    reference = find_model(spec.model)
    return load_model(reference.source, "float32", "cuda" if torch.cuda.is_available() else "cpu", reference.revision)
