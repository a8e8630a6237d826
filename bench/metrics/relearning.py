"""Relearning: fine-tuning a model that has forgotten on part of what it forgot, to see what comes back.

Lo et al. 2024 ask how strongly a forgotten concept re-emerges; the paper does not publish its protocol. Here it is an
ordinary training run that minimises the answers' NLL on a share of the forget set for a number of updates, with AdamW.
What comes back is then counted over the whole forget set, as FA counts.
"""

from __future__ import annotations

import numpy as np

from bench.metrics.values import Scores

# The quantities of relearning, which exist on the forget set.
RELEARNING = ("forgotten", "relearned")


def forgotten(right: Scores, right_before: Scores | None) -> Scores:
    """Which samples were forgotten, 1 or 0: answered rightly by the original model, and wrongly now.

    Args:
        right: which samples the model answers rightly, 1 or 0, as FA counts.
        right_before: the same of the original model; None: it answered all rightly.
    """
    wrong = 1 - right.values
    return Scores(right.ids, wrong if right_before is None else wrong * right_before.values)


def relearned(forgotten: Scores, right_after: Scores) -> Scores:
    """Which forgotten samples are answered rightly after the fine-tune, 1 or 0, with the new answers."""
    return Scores(forgotten.ids, forgotten.values * right_after.values, right_after.texts)


def nothing_relearned(forgotten: Scores) -> Scores:
    """The column `relearned` where nothing was forgotten: all 0."""
    return Scores(forgotten.ids, np.zeros(len(forgotten.ids)))
