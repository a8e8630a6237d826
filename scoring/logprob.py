"""Token log-probabilities that stay accurate as p -> 1.

log_softmax in fp32 has an absolute error near 1e-7, so the log-prob -1e-6 of a memorised token has lost most of
its digits, and MRD divides by it. Here

    P_t = log p_t = -softplus(logsumexp_{j != t}(z_j - z_t)),

which never subtracts two nearly equal numbers: its relative error stays near that of the logits themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from scoring.abilities import Abilities, abilities_of, positions_for
from scoring.precision import as_precise_as_weights
from scoring.samples import Batch

# Vocabulary columns computed at a time, which bounds the temporaries of a 256k-token vocabulary.
VOCABULARY_CHUNK = 32768
# Logits that exist at a time, where a model's head can be applied to some of the scored positions after the others.
LOGITS_AT_A_TIME = 1 << 24


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


def vocabulary_moments(logits: torch.Tensor, chunk: int = VOCABULARY_CHUNK) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of log p over the vocabulary, each token weighted by its own p, in nats.

        mean = Sum_v p_v log p_v,    deviation^2 = Sum_v p_v (log p_v - mean)^2

    Args:
        logits: (..., V), any floating dtype; the arithmetic is fp32 (fp64 for fp64 logits).
        chunk: vocabulary columns at a time.

    Returns:
        Both (...) fp32 or fp64. The differences from the mean are squared, not the values: where one token has nearly
        all the mass, the difference of two sums would be rounding.
    """
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    starts = range(0, logits.shape[-1], chunk)
    pieces = [torch.logsumexp(logits[..., start : start + chunk].to(precise), dim=-1) for start in starts]
    whole = torch.logsumexp(torch.stack(pieces), dim=0).unsqueeze(-1)

    def expectation(of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        total = torch.zeros_like(whole[..., 0])
        for start in starts:
            logp = logits[..., start : start + chunk].to(precise) - whole
            p = logp.exp()
            # A token that cannot come has the log-prob -inf, and adds nothing.
            total += torch.where(p > 0, p * of(logp), 0.0).sum(-1)
        return total

    mean = expectation(lambda logp: logp)
    return mean, expectation(lambda logp: (logp - mean.unsqueeze(-1)).square()).sqrt()


def _softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x) to full relative accuracy: torch returns x itself above the threshold, which is exact from 40 on."""
    return F.softplus(x, threshold=40.0)


@contextmanager
def _head_sees_only(model: PreTrainedModel, positions: torch.Tensor) -> Iterator[None]:
    """Within the context the output head gets only the scored positions: (B, T, d) becomes (B, S, d).

    Logits of prompt tokens are never computed; what the model does after its head (soft-capping, scaling) acts on the
    smaller tensor.
    """

    def select(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (at_positions(args[0], positions), *args[1:])

    handle = _head_of(model).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def scored_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits at the scored positions, (B, S, V), in the model's dtype.

    No attention mask is passed: padding is on the right, and causal attention does not look ahead. Rows that must not
    share a batch under this model are computed apart.
    """
    (logits,) = row_by_row(model, batch, lambda rows, able: (_scored_logits(model, rows, able),))
    return logits


def row_by_row(
    model: PreTrainedModel, batch: Batch, compute: Callable[[Batch, Abilities], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """What `compute` gives for the rows of a batch, tensors of (B, S, ...), in one go where all rows may share a batch
    under this model, see `Abilities.alike`; else for those together that may."""
    able = abilities_of(model)
    groups = able.alike(batch.lengths)
    if len(groups) == 1:
        return compute(batch, able)
    most = batch.positions.shape[1]
    back = torch.cat(groups).argsort().to(batch.input_ids.device)
    results = zip(*(compute(batch.select(rows), able) for rows in groups), strict=True)

    def padded(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, most - x.shape[1]))

    return tuple(torch.cat([padded(x) for x in parts])[back] for parts in results)


def _scored_logits(model: PreTrainedModel, batch: Batch, able: Abilities) -> torch.Tensor:
    with _head_sees_only(model, batch.positions) if able.head_selects else nullcontext():
        logits = _call(model, batch, able)
    if able.head_selects:
        return logits
    return at_positions(logits, batch.positions)


def _call(model: PreTrainedModel, batch: Batch, able: Abilities) -> torch.Tensor:
    """The logits that the model gives for the tokens of a batch."""
    with as_precise_as_weights(model):
        output = model(
            input_ids=batch.input_ids, use_cache=False, **positions_for(batch.input_ids, able.takes_positions)
        )
    logits: torch.Tensor = output.logits.to(batch.input_ids.device)
    return logits


def at_positions(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The values at some positions, (B, T, d) and (B, S) -> (B, S, d)."""
    rows = torch.arange(values.shape[0], device=values.device).unsqueeze(-1)
    return values[rows, positions.to(values.device)]


def _head_of(model: PreTrainedModel) -> nn.Module:
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise TypeError(f"{type(model).__name__} has no output embeddings: not a causal language model")
    return head


def scored_logprobs(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Log-probs P_t of the scored tokens under a causal LM, (B, S) in nats; 0 where `batch.mask` is False."""

    def compute(rows: Batch, able: Abilities) -> tuple[torch.Tensor]:
        if (at_a_time := positions_at_a_time(model, rows, able)) is None:
            logprobs = token_logprobs(_scored_logits(model, rows, able), rows.targets)
        else:
            logprobs = _in_pieces(model, rows, at_a_time)
        return (logprobs.masked_fill(~rows.mask, 0.0),)

    return row_by_row(model, batch, compute)[0]


def positions_at_a_time(model: PreTrainedModel, batch: Batch, able: Abilities) -> int | None:
    """The scored positions whose logits are to exist together; None: all of them, because they are few, or because the
    model's head cannot be applied by itself."""
    head: Any = _head_of(model)
    # A shard of a head has no product by itself.
    if not able.head_is_last or isinstance(head.weight, DTensor):
        return None
    vocabulary = len(head.weight)
    return max(1, LOGITS_AT_A_TIME // vocabulary) if batch.targets.numel() * vocabulary > LOGITS_AT_A_TIME else None


def _in_pieces(model: PreTrainedModel, batch: Batch, at_a_time: int) -> torch.Tensor:
    """Log-probs of the scored tokens, (B, S), a piece of the logits after the other."""
    head = _head_of(model)
    hidden, targets = head_inputs(model, batch).flatten(0, 1), batch.targets.flatten()
    pieces = [
        token_logprobs(head(some), of_some)
        for some, of_some in zip(hidden.split(at_a_time), targets.split(at_a_time), strict=True)
    ]
    return torch.cat(pieces).view(batch.targets.shape)


def head_inputs(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """What the head would be given at the scored positions, (B, S, d). It is given none of them."""
    hidden: list[torch.Tensor] = []

    def take(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden.append(at_positions(args[0], batch.positions))
        return (args[0][:, :0], *args[1:])

    handle = _head_of(model).register_forward_pre_hook(take)
    try:
        _call(model, batch, abilities_of(model))
    finally:
        handle.remove()
    return hidden[0]


def last_hidden(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of the output head at the scored positions, (B, S, d), and the logits, (B, S, V)."""

    def compute(rows: Batch, able: Abilities) -> tuple[torch.Tensor, torch.Tensor]:
        hidden: list[torch.Tensor] = []
        handle = _head_of(model).register_forward_hook(lambda _, args, __: hidden.append(args[0]))
        try:
            logits = _scored_logits(model, rows, able)
        finally:
            handle.remove()
        return hidden[0] if able.head_selects else at_positions(hidden[0], rows.positions), logits

    hidden, logits = row_by_row(model, batch, compute)
    return hidden, logits
