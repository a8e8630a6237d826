"""The whole benchmark, in one run.

    speed     every objective in our training loop: tokens a second, seconds of a round (Table 9 of the paper)
    trainer   the same objective on the same batches in transformers' Trainer, in alternating segments
    refresh   what measuring MRD again costs beside training, and how that depends on the batch size (Table 8)
    stopping  runs until every sample is forgotten, with and without MRD (Table 10)

The first three are measured in this process on one thread. The runs of the last are Ray tasks of one core, as many
at a time as there are cores, from the first to the last.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from algorithms.stopping import PAPER
from bench.jobs.unlearn import UnlearnSpec
from bench.speed.figures import device_name, write_figures
from bench.speed.unlearning.inputs import Sizes, benchmarked, load, load_corpus
from bench.speed.unlearning.loop import measure_speed
from bench.speed.unlearning.refresh import measure_refresh
from bench.speed.unlearning.stopping import run_until_forgotten
from bench.speed.unlearning.trainer import compare_with_trainer
from scoring.errors import UserError
from scoring.settings import named


def run_benchmark(
    model: str,
    data: str,
    split: str | None,
    retain: str | None,
    seeds: int,
    out: str | None,
    sizes: Sizes | None = None,
) -> dict[str, Any]:
    """Measure, print tables and findings, write the figures as JSON if asked to, and return them.

    Args:
        model, data, split, retain: as in UnlearnSpec.
        seeds: of the runs until all is forgotten, 2 or more; 0 leaves them out.
        out: JSON file.
        sizes: how much of everything is run.
    """
    sizes = sizes or Sizes()
    if seeds < 0 or seeds == 1:
        raise UserError(
            f"{named('seeds')} is {seeds}: expected at least 2, or 0 to leave out the runs until all is forgotten"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("comparing with transformers' Trainer needs accelerate: pip install 'mrd-bench[trainer]'")
    spec = benchmarked(model, data, split, retain, stopping=PAPER, evaluate=False)
    figures = _describe(spec)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures["speed"] = measure_speed(spec, sizes, Path(folder))
        figures["trainer"] = compare_with_trainer(spec, sizes, Path(folder))
        figures["refresh"] = measure_refresh(spec, sizes, figures["speed"])
    figures["stopping"] = run_until_forgotten(spec, sizes, seeds) if seeds else None
    figures["sizes"] = asdict(sizes)
    write_figures(figures, out)
    return figures


def _describe(spec: UnlearnSpec) -> dict[str, Any]:
    """Print and return what is measured on."""
    checked, corpus, device = spec.checked(), load_corpus(spec), device_name()
    weights = sum(p.numel() for p in load(spec).parameters())
    tokens = sum(sample.length for sample in corpus.forget)
    print(
        f"{len(corpus.forget)} samples to forget, {tokens} tokens, {len(corpus.retain)} to retain; "
        f"{weights / 1e6:.2f} M weights; batches of {checked.batch_size}; {device}"
    )
    return {
        "forget_samples": len(corpus.forget),
        "forget_tokens": tokens,
        "retain_samples": len(corpus.retain),
        "weights": weights,
        "batch_size": checked.batch_size,
        "learning_rate": checked.learning_rate,
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }
