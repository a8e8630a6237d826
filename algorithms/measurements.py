"""What is measured of the whole model between updates; each worker measures its share of the samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from algorithms.group import Group
from algorithms.initial import in_pieces
from algorithms.recipe import Recipe
from scoring.flip_time import Forecaster, Outputs
from scoring.mrd import estimate, reduce_draws, request_for
from scoring.progress import advance, expect
from scoring.replica import TransformersReplica
from scoring.samples import Batch, Sample, collate, make_batches
from scoring.updates import TrialUpdates, UpdateSettings, sums_of_changes


def measure_mrd(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    recipe: Recipe,
    group: Group,
    batch_tokens: int,
    batched_gradients: bool | None = None,
    gradient_checkpointing: bool = False,
) -> tuple[np.ndarray, TransformersReplica]:
    """MRD of samples under a model in fp32, (N,); and the replica by which this worker measured its share.

    Args:
        recipe: a resolved recipe: its estimator, statistic, sigma, draws and seed are used.
        batch_tokens: padded tokens in a batch.
        batched_gradients, gradient_checkpointing: see `TransformersReplica`.
    """
    replica = TransformersReplica(
        model, gradient_checkpointing=gradient_checkpointing, batched_gradients=batched_gradients
    )
    batches = make_batches(samples, batch_tokens)[group.rank :: group.size]
    mine: dict[int, float] = {}
    if batches:
        assert recipe.statistic is not None
        request, precision = request_for(recipe.estimator, recipe.statistic, recipe.sigma, recipe.seed, recipe.draws)
        draws = estimate(replica, batches, request, precision=precision)
        mrd, _ = reduce_draws(draws.values, recipe.statistic)
        mine = dict(zip(draws.indices.tolist(), mrd.tolist(), strict=True))
    mrd_of = group.gathered(mine)
    return np.array([mrd_of[sample.index] for sample in samples]), replica


def measure_forecasts(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    loss: Callable[[Outputs, Batch], torch.Tensor],
    recipe: Recipe,
    threshold: float,
    group: Group,
) -> tuple[np.ndarray, Forecaster]:
    """How many updates on a sample alone it takes until its MA is below a threshold, (N,), see `scoring.flip_time`; and
    the forecaster by which this worker measured its share.

    Args:
        model: the model in training itself: the weights that require a gradient are moved for a trial, and put back.
        loss: of the sample that a batch has, from what the model gives for it, (1,).
        recipe: its optimiser, learning rate, weight decay and clip norm are used.
        threshold: of MA.
    """
    device = next(model.parameters()).device
    forecaster = Forecaster(model, TrialUpdates(model, UpdateSettings.of(recipe)), lambda now, _: loss(now, batch))
    mine = {}
    expect(len(samples[group.rank :: group.size]))
    for sample in samples[group.rank :: group.size]:
        batch = collate([sample]).to(device)
        mine[sample.index] = float(forecaster.forecast([batch], [threshold])[0, 0])
        advance()
    forecast_of = group.gathered(mine)
    return np.array([forecast_of[sample.index] for sample in samples]), forecaster


def weight_change(
    weights: Iterable[tuple[str, torch.Tensor]], initial: Mapping[str, Any], group: Group
) -> dict[str, float | None]:
    """How far the weights are from the initial model's: mean |Δθ| over all of them, and ‖Δθ‖.

    Args:
        weights: by name. A sharded one is compared by all workers, which then are here together, each its rows; any
            other by the first worker.
        initial: the initial model's weights by name, of which rows are taken: tensors, or `StoredTensors`. Without any
            nothing is compared.
    """
    if not initial:
        return {"mean_abs_delta": None, "delta_norm": None}
    total, squares, count = sums_of_changes(
        (now.cpu(), base)
        for name, p in weights
        if name in initial and (isinstance(p, DTensor) or group.rank == 0)
        for now, base in in_pieces(*rows_here(p, group), initial[name])
    )
    sums = group.gathered({group.rank: (total, squares, count)}).values()
    total, squares, count = (sum(column) for column in zip(*sums, strict=True))
    return {"mean_abs_delta": total / count, "delta_norm": math.sqrt(squares)}


def rows_here(p: torch.Tensor, group: Group) -> tuple[torch.Tensor, int]:
    """The rows of a weight that this worker has, and the number of the first."""
    if not isinstance(p, DTensor):
        return p, 0
    return p.to_local(), min(len(p), group.rank * math.ceil(len(p) / group.size))
