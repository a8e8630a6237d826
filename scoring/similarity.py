"""How much a sample resembles others: by the model's hidden states, and by what its gradient does to the retain set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from scoring.errors import RefusedUnderWay, UserError
from scoring.logprob import last_hidden, scored_logprobs
from scoring.sample_gradients import mean_negative_log_likelihood
from scoring.samples import Batch

# Rows of the table of similarities that are in memory at a time.
ROWS = 1024


@torch.no_grad()
def mean_hidden_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The mean, over the scored tokens, of what the output head reads: an embedding of the answer.

    Returns:
        (B, d) fp32.
    """
    hidden = last_hidden(model, batch)[0].float()
    mask = batch.mask.to(hidden.device).unsqueeze(-1)
    return hidden.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)


def similarity_to_neighbours(embeddings: np.ndarray, neighbours: int) -> np.ndarray:
    """kNN similarity: the mean cosine similarity of each sample to its k nearest other samples of the set.

    Args:
        embeddings: (N, d), as `mean_hidden_states` gives them.
        neighbours: k; where there are fewer other samples, all of them.

    Returns:
        (N,) between -1 and 1; nan for a single sample, and for one whose embedding is not finite: it is nobody's
        neighbour.
    """
    count = len(embeddings)
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.all():
        similarity = np.full(count, np.nan)
        similarity[finite] = similarity_to_neighbours(embeddings[finite], neighbours)
        return similarity
    k = min(neighbours, count - 1)
    if k < 1:
        return np.full(count, np.nan)
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-30)
    means = np.empty(count)
    for first in range(0, count, ROWS):
        rows = np.arange(first, min(first + ROWS, count))
        cosines = unit[rows] @ unit.T
        cosines[rows - first, rows] = -np.inf  # a sample is no neighbour of itself
        means[rows] = np.partition(cosines, count - k, axis=1)[:, count - k :].mean(1)
    return means


def mean_gradient(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """The gradient of the mean over samples of the mean NLL of their scored tokens, by the parameter's name.

    Raises:
        UserError: no weight requires a gradient.
        RefusedUnderWay: a sample spoils the mean: its log-probs are not finite.
    """
    count = sum(map(len, batches))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UserError("no weight of the model requires a gradient: there is nothing to compare gradients of")
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch in batches:
        for name, gradient in _gradients(model, batch, parameters).items():
            total[name] += gradient / count
    if not all(gradient.isfinite().all() for gradient in total.values()):
        raise RefusedUnderWay(
            f"retain: the model's log-probabilities of {_not_finite(model, batches)} are not finite, nor is the mean "
            "gradient then: leave it out"
        )
    return total


@torch.no_grad()
def _not_finite(model: PreTrainedModel, batches: Sequence[Batch]) -> str:
    """The first sample whose log-probs are not finite, in words."""
    for batch in batches:
        finite = scored_logprobs(model, batch).isfinite().all(-1).tolist()
        if not all(finite):
            return f"sample {batch.sample_ids[finite.index(False)]!r}"
    return "a sample"


def gradient_cosines(model: PreTrainedModel, batch: Batch, direction: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The cosine between each sample's gradient of its mean NLL and a given direction, such as the mean gradient over
    the retain set: near 1 where forgetting the sample raises the loss of what is to be kept.

    Args:
        model: a causal LM in eval mode.
        batch: B samples on the model's device.
        direction: by the parameter's name.

    Returns:
        (B,) fp64 between -1 and 1; 0 where one of the two is zero, nan where one is not finite.
    """
    parameters = {name: p for name, p in model.named_parameters() if name in direction}
    length = _dot(direction, direction) ** 0.5
    cosines = []
    for row in range(len(batch)):
        gradients = _gradients(model, batch.rows(row, row + 1).to(batch.input_ids.device), parameters)
        product, own = _dot(gradients, direction), _dot(gradients, gradients) ** 0.5
        cosines.append(product / (own * length) if own and length else 0.0)
    return torch.tensor(cosines, dtype=torch.float64)


def _gradients(
    model: PreTrainedModel, batch: Batch, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The gradient of the batch's sum of mean NLLs; parameters without one are left out."""
    with torch.enable_grad():
        loss = mean_negative_log_likelihood(scored_logprobs(model, batch), batch.mask).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}


def _dot(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    return sum((one[name].double() * other[name].double()).sum().item() for name in one if name in other)
