"""What the demo's page shows of scores: three estimators and how they agree, scaling with sigma, attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.demo.runs import CLAIMED_SIGN
from bench.files.score_file import Scores
from bench.jobs.draws import ScalingLine
from bench.report.attributes import Correlation, Effect, Record
from bench.report.words import decimal, sign_verdict, with_ci
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
class Forecasts:
    """Forecasts of updates, and MRD, against the real updates of samples that were each forgotten alone.

    Attributes:
        rule: the memorization accuracy below which a sample counts as forgotten.
        spec: of the measures: algorithm, optimizer, learning_rate, lookahead, data, split.
        flip_time: (N,) updates.
        mrd: (N,) of the same samples.
        updates: (N,) real ones; inf for a sample that was given up.
        most_updates: after which it was.
    """

    rule: float
    spec: Mapping[str, Any]
    flip_time: np.ndarray
    mrd: np.ndarray
    updates: np.ndarray
    most_updates: int

    def correlations(self) -> tuple[Estimate, Estimate]:
        """Spearman's, of flip time and of MRD with the real updates; samples that were given up are tied last."""
        return spearman(self.flip_time, self.updates), spearman(self.mrd, self.updates)

    def sentence(self) -> str:
        """Both correlations, and how far the forecast is from the real number."""
        flip_time, mrd = self.correlations()
        known = np.isfinite(self.flip_time) & np.isfinite(self.updates) & (self.flip_time > 0) & (self.updates > 0)
        ratio = f"{np.median(self.flip_time[known] / self.updates[known]):.2g}" if known.any() else "–"
        given_up = int(np.isinf(self.updates).sum())
        rest = f" Given up after {self.most_updates} updates: {given_up}." if given_up else ""
        return (
            f"Rank correlation with the real updates of {len(self.updates)} samples: flip time {with_ci(flip_time)}; "
            f"MRD {with_ci(mrd)}, which the paper expects to be negative: {sign_verdict(mrd, CLAIMED_SIGN)}. The "
            f"forecast is {ratio} times the real number in the median, and that is "
            f"{decimal(float(np.median(self.updates)), 0)}.{rest}"
        )


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
        forecasts: of updates, and the real ones.
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
    forecasts: Forecasts
    model: Mapping[str, str]
