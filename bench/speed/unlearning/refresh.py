"""What measuring MRD again costs beside training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from algorithms.group import Group
from algorithms.measurements import measure_mrd
from algorithms.objectives import ALGORITHMS
from algorithms.recipe import Recipe
from bench.jobs.unlearn import UnlearnSpec
from bench.speed.figures import seconds_of
from bench.speed.unlearning.inputs import COMPARED, Sizes, load, load_corpus
from scoring.mrd import Request, estimate
from scoring.replica import TransformersReplica
from scoring.samples import Batch, collate, default_batch_tokens, make_batches


def measure_refresh(spec: UnlearnSpec, sizes: Sizes, speed: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Seconds of a refresh of the forget set, of monte-carlo for each batch size, and shares of training time.

    Args:
        spec: whose forget set is measured.
        sizes: how much is run.
        speed: of training, see `measure_speed`.
    """
    checked, corpus, model = spec.checked(), load_corpus(spec), load(spec)
    batch_tokens = checked.batch_tokens or default_batch_tokens(model.device)
    refresh = partial(measure_mrd, model, corpus.forget, checked, Group(), batch_tokens)
    refresh()
    seconds = {
        "gradient": float(np.median([seconds_of(refresh) for _ in range(sizes.refreshes)])),
        "monte-carlo": _monte_carlo_seconds(model, make_batches(corpus.forget, batch_tokens), sizes),
    }
    scaled = f"K = {sizes.draws}, scaled from {sizes.timed_draws} draws"
    print(
        f"\na refresh of {len(corpus.forget)} samples, one thread: gradient {seconds['gradient']:.2f} s, monte-carlo "
        f"{seconds['monte-carlo']:.1f} s ({scaled})"
    )
    shares = {name: _share(name, speed[name]["round_seconds"], checked.refresh, seconds) for name in COMPARED}

    samples = [*corpus.forget, *corpus.retain][: sizes.batch_size_samples]
    samples.sort(key=lambda sample: (sample.length, sample.num_scored))
    by_size = {}
    print(f"monte-carlo on {len(samples)} samples by batch size (Table 8; {scaled}):")
    for size in sizes.batch_sizes:
        if size > len(samples):
            print(f"{size:>6} samples: left out, there are {len(samples)}")
            continue
        batches = [collate(samples[start : start + size]) for start in range(0, len(samples), size)]
        by_size[size] = _monte_carlo_seconds(model, batches, sizes)
        print(f"{size:>6} samples {by_size[size]:>9.1f} s")
    return {"seconds": seconds, "shares": shares, "batch_size_samples": len(samples), "batch_size_seconds": by_size}


def _monte_carlo_seconds(model: PreTrainedModel, batches: Sequence[Batch], sizes: Sizes) -> float:
    replica = TransformersReplica(model)
    sigma = Recipe.sigma
    base: list[torch.Tensor] = []
    base_seconds = seconds_of(lambda: base.extend(replica.logprobs(batch) for batch in batches))
    estimate(replica, batches[:1], Request("monte-carlo", sigma, 0, 0, 1))  # checks and copies, once a replica
    request = Request("monte-carlo", sigma, 0, 0, sizes.timed_draws)
    draw_seconds = seconds_of(partial(estimate, replica, batches, request, base)) / sizes.timed_draws
    return base_seconds + draw_seconds * sizes.draws


def _share(name: str, round_seconds: float, every: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Refreshes of the default recipe, in units of its training time.

    Args:
        name: of the algorithm.
        round_seconds: of an epoch of training.
        every: so many epochs MRD is measured again.
        seconds: of a refresh, by estimator.
    """
    epochs = ALGORITHMS[name].epochs
    refreshes = math.ceil(epochs / every)
    shares = {estimator: refreshes * value / (epochs * round_seconds) for estimator, value in seconds.items()}
    print(
        f"    {name:<10} {epochs} epochs, {refreshes} refreshes: gradient adds {shares['gradient']:.0%} to the "
        f"training time, monte-carlo {shares['monte-carlo']:.0%}; one refresh is "
        f"{seconds['gradient'] / round_seconds:.2f} and {seconds['monte-carlo'] / round_seconds:.1f} rounds"
    )
    return {"epochs": epochs, "refreshes": refreshes, **shares}
