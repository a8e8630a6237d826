"""What score files say: agreement of estimators, scaling with sigma, difficulty by attribute, with intervals.

Each finding is data first and a sentence second; the sentence is written from the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.files.score_file import Scores
from bench.jobs.draws import ScalingLine
from bench.report.attributes import Correlation, Effect, Record
from bench.stats.estimates import Estimate, spearman

# --- Scaling with sigma -------------------------------------------------------------------------------------


# --- Agreement of estimators --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Two estimators on the same samples.

    Attributes:
        first, second: their names.
        rank: Spearman's correlation of their scores.
        ratio: median over samples of first / second.
    """

    first: str
    second: str
    rank: Estimate
    ratio: float


def agreement(first: Scores, second: Scores) -> Agreement:
    """How two estimators agree; the samples that both scored."""
    value = dict(zip(second.ids, second["mrd"].tolist(), strict=True))
    shared = [(mrd, value[name]) for name, mrd in zip(first.ids, first["mrd"].tolist(), strict=True) if name in value]
    a, b = np.array(shared).T
    return Agreement(first.spec["estimator"], second.spec["estimator"], spearman(a, b), float(np.median(a / b)))


# --- The whole ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """What the page shows.

    Attributes:
        monte_carlo, gradient, curvature: scores of one split by three estimators.
        whole: scores of the split for the attributes, by `gradient`.
        records: by sample id, of all these samples.
        scaling: the scaling check.
        scaling_draws: its draws (pairs, for antithetic) at each sigma.
        effects, correlations: of `whole`.
        model: what is known about the model, printed as it is.
    """

    monte_carlo: Scores
    gradient: Scores
    curvature: Scores
    whole: Scores
    records: Mapping[str, Record]
    scaling: Sequence[ScalingLine]
    scaling_draws: int
    effects: Sequence[Effect]
    correlations: Sequence[Correlation]
    model: Mapping[str, str]
