"""Margins of the scored tokens, and when they fall: the arithmetic of flip time, without a model.

A token counts for memorization accuracy (MA) while its margin, the lead of its logit over the best other one, is above
zero:

    m_t = z_t[x_t] - max_{j != x_t} z_t[j].

While a sample is being forgotten its margins shrink; that of token t reaches zero at n_t, its flip time, in updates. MA
falls below a threshold tau once enough tokens have flipped, so the forecast for tau is one of the n_t: the k-th
smallest, k = floor((1 - tau) T) + 1.
"""

from __future__ import annotations

import numpy as np
import torch


def token_margins(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The margins m_t of the target tokens.

    Args:
        logits: (..., V), any floating dtype.
        targets: (...) int64.

    Returns:
        (...) fp32, or fp64 for fp64 logits.
    """
    target = targets.unsqueeze(-1)
    own = logits.gather(-1, target).squeeze(-1)
    best_other = logits.scatter(-1, target, -torch.inf).amax(-1)
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return own.to(precise) - best_other.to(precise)


def flips_needed(tokens: int, threshold: float) -> int | None:
    """How many of the tokens must be predicted wrongly before MA is below the threshold: k = floor((1 - tau) T) + 1,
    decided by the comparison that MA itself is put to; None if no number of them is enough (tau = 0)."""
    k = min(tokens, max(0, int((1 - threshold) * tokens)))
    while k > 0 and (tokens - k + 1) / tokens < threshold:
        k -= 1
    while k <= tokens and not (tokens - k) / tokens < threshold:
        k += 1
    return k if k <= tokens else None


def flip_times(updates: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """When each token's margin reaches zero on a path on which it was looked at a few times.

    Between two looks the margin is taken to be a straight line, and beyond the last one the last line goes on.

    Args:
        updates: (P,) rising, the number of updates after which each look was taken; the first is 0.
        margins: (P, T) at each look, P >= 2.

    Returns:
        (T,) in updates: 0 where the margin is not above zero at the start, inf where the line never comes down to it,
        nan where one of the line's ends is no number.
    """
    margins = np.asarray(margins, dtype=np.float64)
    before, after = margins[:-1], margins[1:]
    # The look after which the margin is at zero or below for the first time; the last line where there is none.
    down = after <= 0
    segment = np.where(down.any(axis=0), down.argmax(axis=0), len(after) - 1)
    token = np.arange(margins.shape[1])
    start, end = before[segment, token], after[segment, token]
    length = np.diff(np.asarray(updates, dtype=np.float64))[segment]
    drop = start - end
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.asarray(updates)[segment] + np.where(drop <= 0, np.inf, start / drop * length)
    return np.where(margins[0] <= 0, 0.0, times)


def updates_until(times: np.ndarray, threshold: float) -> float:
    """The forecast for MA below the threshold: the k-th smallest flip time; see `flips_needed`.

    Args:
        times: (T,) flip times of a sample's scored tokens.
        threshold: tau, 0 to 1.

    Returns:
        In updates; inf if the threshold is never reached, nan if one of the flip times is.
    """
    if np.isnan(times).any():
        return float("nan")
    k = flips_needed(len(times), threshold)
    if k is None:
        return float("inf")
    return 0.0 if k == 0 else float(np.sort(times)[k - 1])
