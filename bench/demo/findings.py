"""What the demo's page shows of scores: three estimators and how they agree, scaling with sigma, attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.files.score_file import Scores
from bench.jobs.draws import ScalingLine
from bench.report.attributes import Correlation, Effect, Record
from bench.stats.estimates import Estimate, spearman


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
    """How two estimators agree on the samples that both scored."""
    mrd_of = dict(zip(second.ids, second["mrd"].tolist(), strict=True))
    shared = [(mrd, mrd_of[name]) for name, mrd in zip(first.ids, first["mrd"].tolist(), strict=True) if name in mrd_of]
    x, y = np.array(shared).T
    return Agreement(first.spec["estimator"], second.spec["estimator"], spearman(x, y), float(np.median(x / y)))


@dataclass(frozen=True)
class Findings:
    """What the page shows of scores.

    Attributes:
        monte_carlo, gradient, curvature: scores of one split by three estimators.
        attribute_scores: scores of the split that is compared by attribute, by `gradient`.
        records: all these samples, by id.
        scaling: the lines of the check that MRD follows sigma.
        scaling_draws: draws (pairs, for antithetic) at each sigma of that check.
        effects, correlations: of attributes with `attribute_scores`.
        model: facts about the model, by name, printed as they are.
    """

    monte_carlo: Scores
    gradient: Scores
    curvature: Scores
    attribute_scores: Scores
    records: Mapping[str, Record]
    scaling: Sequence[ScalingLine]
    scaling_draws: int
    effects: Sequence[Effect]
    correlations: Sequence[Correlation]
    model: Mapping[str, str]
