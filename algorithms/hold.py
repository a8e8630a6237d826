"""Difficulty as a regulariser: how fast a forget sample moves with the weights, as a term of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from scoring.logprob import scored_logits, token_log_odds
from scoring.samples import Batch


def log_odds_gradient_norm(model: PreTrainedModel, parameters: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
    """||grad Sum_t a_t|| / T of a sample, with a_t = log p_t - log(1 - p_t) the log-odds of its T scored tokens.

    For a memorised token |P_t| = e^(-a_t), so that this is MRD by token, up to a constant.

    Args:
        model: a causal LM in eval mode.
        parameters: the weights that the gradient is taken of.
        batch: of one sample, on the model's device.

    Returns:
        A scalar, whose gradient with respect to the weights is that of a gradient: attention is computed by the kernel
        that can be differentiated twice.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        log_odds = token_log_odds(scored_logits(model, batch), batch.targets)[batch.mask].sum()
        gradient = torch.autograd.grad(log_odds, parameters, create_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(part) for part in gradient if part is not None]
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms)) / batch.mask.sum()
    return norm
