"""Membership inference: telling samples that a model was trained on from ones that it never saw, by one number each.

All functions take scores that are the higher, the more a sample is like one that was trained on, as arrays, and reduce
the last axis, so that they serve one data set and stacks of bootstrap resamples alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from scipy import stats

FALSE_POSITIVES = 0.01


def auc(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """P(a member's score > another's), ties counting half: Mann-Whitney's U over the number of pairs. (..., N) and
    (..., M) -> (...), 0 to 1; 1/2 where the two cannot be told apart."""
    u = stats.mannwhitneyu(members, others, axis=-1, method="asymptotic").statistic
    return np.asarray(u) / (members.shape[-1] * others.shape[-1])


def true_positives(members: np.ndarray, others: np.ndarray, share: float = FALSE_POSITIVES) -> np.ndarray:
    """TPR at a FPR: the share of members above the lowest threshold that at most a share of the others is above.

    The threshold is the (floor(share M) + 1)-th highest score of the M others, and what equals it is below. So there
    never are more false positives among these others than asked for; of fewer than 1 / share others none is allowed,
    and the result is the TPR at a FPR of 0, which errs towards less.

    Args:
        members: (..., N).
        others: (..., M).
        share: of the others, in [0, 1).

    Returns:
        (...), 0 to 1.
    """
    count = others.shape[-1]
    place = count - 1 - int(share * count + 1e-9)  # 0.29 * 100 is 28.999999999999996
    threshold = np.partition(others, place, axis=-1)[..., place]
    return (members > threshold[..., None]).mean(-1)


def relative_leak(leak: np.ndarray, retain_leak: np.ndarray) -> np.ndarray:
    """PrivLeak of MUSE (Shi et al. 2024): (AUC - AUC_retain) / AUC_retain, in per cent.

    Both AUC are MUSE's, which turns the scores round: 0 where every forget sample is known, 1/2 where it cannot be told
    from others. Below 0 samples are still known, above 0 they stand out as forgotten; 0 is the retain-only model's.
    """
    return 100 * (leak - retain_leak) / retain_leak


def packed_bytes(texts: Sequence[str]) -> np.ndarray:
    """How many bytes zlib packs each text's UTF-8 to, (N,): how much there is to be remembered."""
    return np.array([len(zlib.compress(text.encode())) for text in texts], dtype=np.float64)
