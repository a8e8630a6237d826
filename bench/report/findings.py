"""What score files say: agreement of estimators, scaling with sigma, difficulty by attribute, with intervals.

Each finding is data first and a sentence second; the sentence is written from the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bench.score_file import read_scores
from bench.stats.estimates import Estimate, hedges_g, mean, mean_difference, over_samples, partial_spearman, spearman
from bench.words import said, verdict
from scoring.characteristics import characteristics
from scoring.mrd import scaling_slope

Record = dict[str, Any]

# Slope of log MRD against log sigma where the model is measured and not its rounding (scoring.mrd.scaling_slope).
EXPECTED_SLOPE = {"mean_abs": 1.0, "abs_mean": 2.0}
SLOPE_TOLERANCE = 0.1


@dataclass(frozen=True)
class Scores:
    """A score file.

    Attributes:
        table: one row a sample (bench.scoring_job).
        spec: what made it.
        facts: what was noticed on the way.
    """

    table: pa.Table
    spec: dict[str, Any]
    facts: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> Scores:
        return cls(*read_scores(path))

    def __getitem__(self, column: str) -> np.ndarray:
        return self.table[column].to_numpy()

    @property
    def ids(self) -> list[str]:
        return self.table["sample_id"].to_pylist()

    @property
    def probability(self) -> np.ndarray:
        """Geometric mean of the scored tokens' probabilities, (N,) (scoring.characteristics)."""
        return np.exp(-self["nll"] / self["num_tokens"])


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


# --- Attributes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attribute:
    """A two-valued attribute of the records, and what the paper says about it.

    Attributes:
        field: of the record.
        title: as printed.
        low, high: its two values.
        claim: +1 if MRD is said to be higher at the high level, -1 if lower (paper, section 3.3 and Table 11).
    """

    field: str
    title: str
    low: Any
    high: Any
    claim: int


ATTRIBUTES = (
    Attribute("complexity", "complexity", "low", "high", +1),
    Attribute("frequency", "frequency", 1, 4, -1),
    Attribute("rare_words", "rare words", "low", "high", +1),
)


@dataclass(frozen=True)
class Effect:
    """MRD at the low and the high level of an attribute.

    Attributes:
        attribute: which.
        low, high: (N,), (M,) MRD of the two groups.
        low_mean, high_mean: of the groups.
        difference: high - low.
        size: Hedges' g, positive where the high level has the higher MRD.
        correlation: Spearman's, of the level (0, 1) with MRD.
        beyond_length: the same with the number of scored tokens partialled out.
        with_length: Spearman's correlation of the level with the number of scored tokens.
    """

    attribute: Attribute
    low: np.ndarray
    high: np.ndarray
    low_mean: Estimate
    high_mean: Estimate
    difference: Estimate
    size: Estimate
    correlation: Estimate
    beyond_length: Estimate
    with_length: Estimate

    def sentence(self) -> str:
        name, claim = self.attribute.title, self.attribute.claim
        says = f"The paper says: high {name}, {'higher' if claim > 0 else 'lower'} MRD."
        if not math.isfinite(self.difference.value):
            return f"{says} There are too few samples to compare."
        change = self.difference.value / self.low_mean.value
        return (
            f"{says} Here the mean MRD is {abs(change):.1%} {'higher' if change > 0 else 'lower'} at the high level, "
            f"Hedges' g {said(self.size)}: {verdict(self.size, claim)}. With length partialled out, rank correlation "
            f"{said(self.beyond_length)}: {verdict(self.beyond_length, claim)}."
        )


def attribute_effects(scores: Scores, records: Sequence[Record]) -> list[Effect]:
    """The effect of every attribute that the records carry at both levels.

    Args:
        scores: of samples whose ids are among the records'.
        records: with their attributes.
    """
    by_id = {record["id"]: record for record in records}
    rows = [by_id[name] for name in scores.ids]
    mrd, length = scores["mrd"], scores["num_tokens"]
    effects = []
    for attribute in ATTRIBUTES:
        values = [record.get(attribute.field) for record in rows]
        is_low = np.array([value == attribute.low for value in values])
        is_high = np.array([value == attribute.high for value in values])
        if is_low.any() and is_high.any():
            low, high, both = mrd[is_low], mrd[is_high], is_low | is_high
            level = is_high[both].astype(float)
            effects.append(
                Effect(
                    attribute,
                    low,
                    high,
                    mean(low),
                    mean(high),
                    mean_difference(low, high),
                    hedges_g(low, high),
                    spearman(level, mrd[both]),
                    partial_spearman(level, mrd[both], length[both]),
                    spearman(level, length[both]),
                )
            )
    return effects


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of MRD with a number that each sample has.

    Attributes:
        title: of that number.
        mrd: its correlation with MRD.
        beyond_length: the same with the number of scored tokens partialled out; nan for the length itself.
        per_token: its correlation with MRD / tokens.
        claim: the sign the paper gives it, 0 for none.
    """

    title: str
    mrd: Estimate
    beyond_length: Estimate
    per_token: Estimate
    claim: int = 0

    def sentence(self) -> str:
        return (
            f"The paper says: high {self.title}, {'higher' if self.claim > 0 else 'lower'} MRD. Here the rank "
            f"correlation is {said(self.mrd)}: {verdict(self.mrd, self.claim)}. With length partialled out, "
            f"{said(self.beyond_length)}: {verdict(self.beyond_length, self.claim)}."
        )


LENGTH = "length in scored tokens"
PROBABILITY = "initial generation probability"


def correlations(scores: Scores, records: Sequence[Record], corpus: Sequence[str]) -> list[Correlation]:
    """MRD against length, likelihood and the measured characteristics of the texts.

    Args:
        scores: of samples whose ids are among the records'.
        records: with question and answer.
        corpus: the texts that the model was trained on, each as often as it saw it in an epoch.
    """
    by_id = {record["id"]: record for record in records}
    rows = [by_id[name] for name in scores.ids]
    texts = characteristics([f"{record['question']} {record['answer']}" for record in rows], corpus)
    mrd, per_token, length = scores["mrd"], scores["mrd_per_token"], scores["num_tokens"]
    columns: list[tuple[str, np.ndarray, int]] = [
        (LENGTH, length, 0),
        ("negative log-likelihood", scores["nll"], 0),
        (PROBABILITY, scores.probability, -1),
        ("counted syntactic complexity", np.array([text.syntactic_complexity for text in texts]), +1),
        ("counted occurrence frequency", np.array([text.occurrence_frequency for text in texts]), -1),
        ("counted share of rare words", np.array([text.rare_words for text in texts]), +1),
    ]
    return [
        Correlation(title, spearman(x, mrd), partial_spearman(x, mrd, length), spearman(x, per_token), claim)
        for title, x, claim in columns
    ]


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
