"""Training difficulty: GraNd, EL2N, VoG and empirical Fisher, the scores that MRD is compared with.

All were defined for classifiers. A language model classifies once per scored token; each function
says how its score goes from tokens to the sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from scoring.errors import UserError
from scoring.logprob import scored_logits, scored_logprobs, token_logprobs
from scoring.sample_gradients import (
    ScalarOfSample,
    UnsupportedModule,
    autograd_norms,
    mean_negative_log_likelihood,
    negative_log_likelihood,
    per_sample_gradient_norms,
)
from scoring.samples import Batch


def grand(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """GraNd: the L2 norm, over all parameters, of the gradient of the sample's training loss.

    The loss is the mean negative log-likelihood of the scored tokens. Paul et al. 2021 ("Deep Learning on a
    Data Diet"), at one set of weights: their expectation over initialisations is left to the caller.

    Args:
        model: a causal LM in eval mode.
        batch: B samples on the model's device.

    Returns:
        (B,) fp64, nats per unit of parameter.
    """
    return _gradient_norms("GraNd", model, batch, mean_negative_log_likelihood)


def empirical_fisher(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The sample's part of the trace of the empirical Fisher information: ||grad log p(x)||^2 over all parameters, with
    log p(x) = Sum_t P_t over the scored tokens.

    Kirkpatrick et al. 2017 use the diagonal of its mean over samples as weights; the trace of one sample's part is the
    number that it adds.

    Args:
        model: a causal LM in eval mode.
        batch: B samples on the model's device.

    Returns:
        (B,) fp64.
    """
    return _gradient_norms("empirical Fisher", model, batch, negative_log_likelihood).square()


def _gradient_norms(what: str, model: PreTrainedModel, batch: Batch, scalar_of: ScalarOfSample) -> torch.Tensor:
    """The norms of each sample's gradient, (B,) fp64, by one backward pass where the model allows it."""
    try:
        return per_sample_gradient_norms(model, batch, scalar_of)[0]
    except UnsupportedModule as error:
        warnings.warn(f"{what}: {error}; each sample is differentiated by itself, which is slower", stacklevel=3)
        return autograd_norms(model, batch, scalar_of)[0]


@torch.no_grad()
def el2n(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """EL2N: the L2 norm of softmax(logits) - onehot(target), averaged over the scored tokens.

    Paul et al. 2021 ("Deep Learning on a Data Diet"), with tokens for images, at one set of weights.

    Args:
        model: a causal LM in eval mode.
        batch: B samples on the model's device.

    Returns:
        (B,) fp64, between 0 and sqrt(2).
    """
    scores = []
    # A sample at a time: the vocabulary-sized temporaries are those of one sample, not of the batch.
    for logits, targets, mask in zip(scored_logits(model, batch), batch.targets, batch.mask, strict=True):
        scores.append(error_norms(logits[mask], targets[mask]).mean())
    return torch.stack(scores)


def error_norms(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """||softmax(z) - onehot(t)||_2, (S, V) and (S,) -> (S,) fp64.

    With q the distribution over the other tokens, p_j = (1 - p_t) q_j, the norm is

        (1 - p_t) sqrt(1 + Sum_{j != t} q_j^2).

    Only the first factor vanishes as p_t -> 1, and it comes from the accurate log-prob without a subtraction.
    """
    missing = -torch.expm1(token_logprobs(logits, targets).double())
    precise = logits if logits.dtype == torch.float64 else logits.float()
    other_probabilities = precise.scatter(-1, targets.unsqueeze(-1), -torch.inf).softmax(-1)
    return missing * (1 + other_probabilities.square().sum(-1).double()).sqrt()


def vog(models: Iterable[PreTrainedModel], batch: Batch) -> torch.Tensor:
    """VoG: how much the input gradient of a sample changes from checkpoint to checkpoint.

    Agarwal, D'souza and Hooker 2022 take the gradient S_k of the true class's pre-softmax activation with
    respect to the pixels at K checkpoints, from it the spread of every pixel,

        sqrt((1/K) Sum_k (S_k - mean_k S_k)^2),

    and average that over the pixels (divisor K, and the root before the average, as in their published code).
    Carried over to text:

    - pixels become the numbers of the sample's input embeddings, one per token and dimension, as the
      embedding layer gives them out, without positions. Their mean over colour channels has no counterpart;
    - the activation of the true class becomes Sum_t log p_t over the scored tokens, so that all of a sample's
      predictions enter one gradient;
    - the average is over dimensions and all of the sample's tokens, prompt included. A token that no scored
      token looks back on (the last one always) has gradient zero and counts as such;
    - they then standardise scores within each class. Text has no classes: this is the raw score, to be
      compared only between samples scored at the same checkpoints.

    Args:
        models: K >= 2 checkpoints of one model, in eval mode. No reference to a checkpoint is held when the next
            one is requested, so that a generator that loads them, and holds none either, needs memory for one.
        batch: B samples on the models' device.

    Returns:
        (B,) fp64, in nats per unit of embedding.

    Raises:
        UserError: fewer than two checkpoints.
    """
    count = 0
    mean = squares = torch.zeros((), dtype=torch.float64)
    for model in models:
        count += 1
        gradients = _input_gradients(model, batch).double()
        # Welford's running mean and sum of squared deviations.
        change = gradients - mean
        mean = mean + change / count
        squares = squares + change * (gradients - mean)
        # The loop variable would keep this checkpoint alive while the next one loads.
        del model
    if count < 2:
        raise UserError(f"VoG needs checkpoints to vary over: found {count}, expected at least 2")
    per_token = (squares / count).sqrt().mean(-1)
    not_padding = torch.arange(per_token.shape[1], device=per_token.device) < batch.lengths.unsqueeze(-1)
    return per_token.masked_fill(~not_padding, 0.0).sum(-1) / batch.lengths


def _input_gradients(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Gradient of each sample's summed log-prob with respect to its input embeddings, (B, T, d).

    One backward for the batch: samples do not look at each other.
    """
    embedded: list[torch.Tensor] = []

    def make_leaf(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = model.get_input_embeddings().register_forward_hook(make_leaf)
    try:
        with torch.enable_grad():
            total = scored_logprobs(model, batch).sum()
    finally:
        handle.remove()
    return torch.autograd.grad(total, embedded)[0]
