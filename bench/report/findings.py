"""What score files say: agreement of estimators, scaling with sigma, difficulty by attribute, with intervals.

Each finding is data first and a sentence second; the sentence is written from the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.files.score_file import Scores
from bench.report.attributes import Correlation, Effect, Record
from bench.report.words import said
from bench.stats.estimates import Estimate, over_samples, spearman
from scoring.mrd import scaling_slope

# Slope of log MRD against log sigma where the model is measured and not its rounding (scoring.mrd.scaling_slope).
EXPECTED_SLOPE = {"mean_abs": 1.0, "abs_mean": 2.0}
SLOPE_TOLERANCE = 0.1


# --- Scaling with sigma -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScalingLine:
    """One statistic, measured at several sigmas on the same samples with the same directions.

    Attributes:
        estimator, statistic, dtype: see scoring.mrd.
        sigmas: (M,).
        scores: (M, N).
    """

    estimator: str
    statistic: str
    dtype: str
    sigmas: np.ndarray
    scores: np.ndarray

    @property
    def expected(self) -> float:
        return EXPECTED_SLOPE[self.statistic]

    def slope(self) -> Estimate:
        """scaling_slope, with its interval over the samples."""
        sigmas = self.sigmas.tolist()
        return over_samples(lambda rows: scaling_slope(sigmas, self.scores[:, rows]), self.scores.shape[1])

    def sentence(self) -> str:
        slope = self.slope()
        found = (
            f"{self.statistic} by {self.estimator} in {self.dtype}, sigma {self.sigmas[0]:.0e} to "
            f"{self.sigmas[-1]:.0e}: slope {said(slope, 3)}, expected {self.expected:g}."
        )
        if abs(slope.value - self.expected) <= SLOPE_TOLERANCE:
            return f"{found} The number follows the perturbation, as it must."
        return f"{found} The number does not follow the perturbation: it measures rounding, not the model."


def inflation(lines: Sequence[ScalingLine]) -> str:
    """How far each statistic in a coarser dtype is from itself in float32, at the smallest and largest shared sigma."""
    sentences = []
    exact = {line.statistic: line for line in lines if line.dtype == "float32"}
    for line in lines:
        if line.dtype == "float32" or line.statistic not in exact:
            continue
        reference = exact[line.statistic]
        shared = [sigma for sigma in line.sigmas.tolist() if sigma in reference.sigmas]
        for sigma in dict.fromkeys((shared[0], shared[-1])) if shared else ():
            here, there = (float(np.median(one.scores[list(one.sigmas).index(sigma)])) for one in (line, reference))
            sentences.append(
                f"At sigma {sigma:.0e} the median {line.statistic} in {line.dtype} is {here / there:.3g} times that in "
                "float32."
            )
    return " ".join(sentences)


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
