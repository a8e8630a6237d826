"""Token log-probabilities that stay accurate as p -> 1.

log_softmax in fp32 has an absolute error near 1e-7, so the log-prob -1e-6 of a memorised token has lost most of
its digits, and MRD divides by it. Here

    P_t = log p_t = -softplus(logsumexp_{j != t}(z_j - z_t)),

which never subtracts two nearly equal numbers: its relative error stays near that of the logits themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from scoring.samples import Batch

# Vocabulary columns computed at a time, which bounds the temporaries of a 256k-token vocabulary.
VOCABULARY_CHUNK = 32768


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor, chunk: int = VOCABULARY_CHUNK) -> torch.Tensor:
    """Log-probabilities of the target tokens, in nats.

    Args:
        logits: (..., V), any floating dtype; the arithmetic is fp32 (fp64 for fp64 logits).
        targets: (...) int64.
        chunk: vocabulary columns at a time.

    Returns:
        (...) fp32 or fp64, <= 0. Exactly 0 only where every other logit underflows (a *saturated* token).

    Differentiable, in reverse and (nested) forward mode.
    """
    return -_softplus(-token_log_odds(logits, targets, chunk))


def token_log_odds(logits: torch.Tensor, targets: torch.Tensor, chunk: int = VOCABULARY_CHUNK) -> torch.Tensor:
    """Log-odds of the target tokens, a_t = log p_t - log(1 - p_t) = z_t - logsumexp_{j != t} z_j, in nats.

    Arguments, result and differentiability are those of `token_logprobs`; no token is saturated here.
    """
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    target = targets.unsqueeze(-1)
    target_logit = logits.gather(-1, target).to(precise)
    pieces = []
    for start in range(0, logits.shape[-1], chunk):
        gaps = logits[..., start : start + chunk].to(precise) - target_logit
        # The sum leaves the target itself out. Only its column is overwritten, in place: to mask all columns would
        # cost a quarter of the whole time.
        column = (target - start).clamp(0, gaps.shape[-1] - 1)
        gap = logits.gather(-1, column + start).to(precise) - target_logit
        gap = gap.masked_fill(column + start == target, -torch.inf)
        pieces.append(torch.logsumexp(gaps.scatter_(-1, column, gap), dim=-1))
    log_odds_against = pieces[0] if len(pieces) == 1 else torch.logsumexp(torch.stack(pieces), dim=0)
    return -log_odds_against


def _softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x) to full relative accuracy: torch returns x itself above the threshold, which is exact from 40 on."""
    return F.softplus(x, threshold=40.0)


@contextmanager
def _head_sees_only(model: PreTrainedModel, positions: torch.Tensor) -> Iterator[None]:
    """Within the context the output head gets only the scored positions: (B, T, d) becomes (B, S, d).

    Logits of prompt tokens are never computed; what the model does after its head (soft-capping, scaling) acts on the
    smaller tensor.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(f"{type(model).__name__} has no output embeddings: not a causal language model")

    def select(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]
        rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(-1)
        return (hidden[rows, positions.to(hidden.device)], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def scored_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits at the scored positions, (B, S, V), in the model's dtype.

    No attention mask is passed: padding is on the right, and causal attention does not look ahead. Position
    ids are passed with the full batch dimension, so that learned position embeddings keep samples apart.
    """
    rows, length = batch.input_ids.shape
    position_ids = torch.arange(length, device=batch.input_ids.device).expand(rows, length)
    with _head_sees_only(model, batch.positions):
        output = model(input_ids=batch.input_ids, position_ids=position_ids, use_cache=False)
    logits: torch.Tensor = output.logits
    return logits.to(batch.input_ids.device)


def scored_logprobs(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Log-probs P_t of the scored tokens under a causal LM, (B, S) in nats; 0 where `batch.mask` is False."""
    return token_logprobs(scored_logits(model, batch), batch.targets).masked_fill(~batch.mask, 0.0)


def last_hidden(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of the output head at the scored positions, (B, S, d), and the logits, (B, S, V)."""
    hidden: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...], __: Any) -> None:
        hidden.append(args[0])

    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(f"{type(model).__name__} has no output embeddings: not a causal language model")
    handle = head.register_forward_hook(keep)
    try:
        logits = scored_logits(model, batch)
    finally:
        handle.remove()
    return hidden[0], logits
