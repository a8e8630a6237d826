"""Relearning: fine-tuning a model that has forgotten on part of what it forgot, to see what comes back.

Lo et al. 2024 ask how strongly a forgotten concept re-emerges; the paper does not publish its protocol. Here it is an
ordinary training run that minimises the answers' NLL on a share of the forget set for a number of updates, with AdamW.
What comes back is then counted over the whole forget set, as FA counts.
"""

from __future__ import annotations

import numpy as np

from bench.metrics.values import Scores


def forgotten(right: Scores, known: Scores | None) -> Scores:
    """Which samples were forgotten, 1 or 0: known to the original model and answered wrongly now.

    Args:
        right: FA's column of the model.
        known: that of the original model; None: everything was known.
    """
    gone = 1 - right.values
    return Scores(right.ids, gone if known is None else gone * known.values)


def relearned(gone: Scores, right_again: Scores) -> Scores:
    """Which samples were forgotten and are answered rightly after the fine-tune, 1 or 0, with the new answers."""
    return Scores(gone.ids, gone.values * right_again.values, right_again.texts)


def nothing_relearned(gone: Scores) -> Scores:
    """What comes back where nothing was forgotten."""
    return Scores(gone.ids, np.zeros(len(gone.ids)))
