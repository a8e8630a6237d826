"""What leaks when a model is asked often: the best of k drawn answers."""

from __future__ import annotations

import numpy as np
from scipy.special import gammaln

# How many answers leak@k is asked of.
KS = (1, 2, 4, 8, 16, 32, 64)


def best_of(scores: np.ndarray, k: int) -> np.ndarray:
    """The expected best score of k answers out of n that were drawn, without bias.

        leak@k = Sum_(i=k..n) C(i - 1, k - 1) / C(n, k) s_(i),   s_(1) <= ... <= s_(n)

    The mean of the maximum over all choices of k of the n; for scores of 0 and 1 it is pass@k of Chen et al. 2021.

    Args:
        scores: (..., n), finite.
        k: 1 to n.

    Returns:
        (...,)
    """
    n = scores.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}: expected 1 to {n}, the number of answers")
    places = np.arange(k, n + 1)
    logs = _log_choose(places - 1, k - 1) - _log_choose(np.array(n), k)
    best: np.ndarray = np.sort(scores, axis=-1)[..., k - 1 :] @ np.exp(logs)
    return best


def _log_choose(n: np.ndarray, k: int) -> np.ndarray:
    chosen: np.ndarray = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return chosen
