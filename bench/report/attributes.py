"""Attributes of samples, and how difficulty depends on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bench.files.score_file import Scores
from bench.report.figures import BLUE, GREEN, INK, MUTED, ORANGE, Draw, error_bars
from bench.report.words import with_ci
from bench.stats.estimates import LEVEL, Estimate, hedges_g, mean, mean_difference, partial_spearman, spearman
from bench.stats.verdicts import Claim, Interval, bootstrapped, decide
from scoring.characteristics import characteristics

Record = dict[str, Any]
MARGIN = 0.1  # a rank correlation that matters; of a weaker one MRD's ranks have less than 1 % of their variance
SHORTEST, LONGEST = 0.05, 0.95  # quantiles of a group's lengths, between which it is said to have them
FEWEST_IN_OVERLAP = 20  # samples of each group, without which nothing is said
UNKNOWN_EFFECT = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Attribute:
    """A two-valued attribute of the records, and what the paper says about it.

    Attributes:
        field: key of the record.
        title: its name in text.
        low, high: its two values.
        claim: +1 if the paper says that MRD is higher at the high level, -1 if lower (section 3.3 and Table 11).
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
class Overlap:
    """The samples of two groups in the range of lengths that both groups have.

    What length does to MRD is taken out of ranks by a straight line, and groups whose lengths differ differ from that
    line by where they lie on it: a task's complex answers may have no short ones beside them. In the common range
    there are neighbours of the other group.

    Attributes:
        shortest, longest: ends of the range, in scored tokens.
        is_high: (N,) whether a sample is of the group at the high level.
        mrd, tokens: (N,) of the samples.
    """

    shortest: float
    longest: float
    is_high: np.ndarray
    mrd: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, is_high: np.ndarray, mrd: np.ndarray, tokens: np.ndarray) -> Overlap:
        """From the samples of both groups, (M,) each."""
        ends = [np.quantile(tokens[group], [SHORTEST, LONGEST]) for group in (is_high, ~is_high)]
        shortest, longest = max(low for low, _ in ends), min(high for _, high in ends)
        inside = (shortest <= tokens) & (tokens <= longest)
        return cls(float(shortest), float(longest), is_high[inside], mrd[inside], tokens[inside])

    @property
    def counts(self) -> tuple[int, int]:
        """How many samples are at the low and at the high level."""
        return int((~self.is_high).sum()), int(self.is_high.sum())

    @cached_property
    def at(self) -> Interval:
        """The rank correlation of the level with MRD, length partialled out, with its interval at a level of
        confidence; not known with fewer than FEWEST_IN_OVERLAP samples of either group."""
        if min(self.counts) < FEWEST_IN_OVERLAP:
            return lambda _: UNKNOWN_EFFECT
        level = self.is_high.astype(float)
        if np.ptp(self.tokens) == 0:
            return bootstrapped(spearman, level, self.mrd)
        return bootstrapped(partial_spearman, level, self.mrd, self.tokens)

    @cached_property
    def correlation(self) -> Estimate:
        """The rank correlation with its interval at 95 %."""
        return self.at(LEVEL)

    def text(self) -> str:
        """The effect with its interval, and of how many samples."""
        low, high = self.counts
        samples = f"{low} + {high} samples of {self.shortest:.0f} to {self.longest:.0f} tokens"
        if self.shortest > self.longest:
            return "not determined, as the groups have no lengths in common"
        if min(self.counts) < FEWEST_IN_OVERLAP:
            return f"not determined with {samples}: it takes {FEWEST_IN_OVERLAP} of each"
        return f"{with_ci(self.correlation)} with {samples}"


@dataclass(frozen=True)
class Effect:
    """MRD at the low and the high level of an attribute.

    Attributes:
        attribute: the attribute.
        low, high: (N,), (M,) MRD of the two groups.
        low_mean, high_mean: means of the groups.
        difference: mean at the high level - mean at the low level.
        size: Hedges' g, positive where the high level has the higher MRD.
        correlation: Spearman's, of the level (0, 1) with MRD.
        beyond_length: the same with the number of scored tokens partialled out.
        with_length: Spearman's correlation of the level with the number of scored tokens.
        overlap: the samples in the range of lengths that both groups have, by which the claim is judged.
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
    overlap: Overlap

    def claim(self, margin: float) -> Claim:
        """What the paper says about the attribute, judged where lengths overlap."""
        name, sign = self.attribute.title, self.attribute.claim
        return Claim(
            f"the higher the {name}, the {'higher' if sign > 0 else 'lower'} the MRD",
            f"{name}, rank correlation where lengths overlap",
            sign,
            margin,
            self.overlap.at,
            sum(self.overlap.counts),
            "samples",
            "correlation",
        )

    def sentence(self) -> str:
        """The paper's claim, and whether it holds here, judged by itself."""
        name, claim = self.attribute.title, self.attribute.claim
        paper = f"The paper says: high {name}, {'higher' if claim > 0 else 'lower'} MRD."
        if not math.isfinite(self.difference.value):
            return f"{paper} There are too few samples to compare."
        change = self.difference.value / self.low_mean.value
        return (
            f"{paper} Here the mean MRD is {abs(change):.1%} {'higher' if change > 0 else 'lower'} at the high level, "
            f"Hedges' g {with_ci(self.size)}, which is not set apart from length. With length partialled out, rank "
            f"correlation {with_ci(self.beyond_length)}; where lengths overlap, {self.overlap.text()}: "
            f"{decide([self.claim(MARGIN)])[0].word}."
        )


def attribute_effects(scores: Scores, records: Sequence[Record]) -> list[Effect]:
    """The effects of the attributes that the records have at both levels.

    Args:
        scores: of samples whose ids are among the records'.
        records: with ids and attributes.
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
            both = is_low | is_high
            effects.append(effect_of_level(attribute, is_high[both], mrd[both], length[both]))
    return effects


def effect_of_level(attribute: Attribute, is_high: np.ndarray, mrd: np.ndarray, tokens: np.ndarray) -> Effect:
    """The effect of an attribute from samples at its two levels.

    Args:
        is_high: (N,) whether a sample is at the high level.
        mrd, tokens: (N,) of the samples.
    """
    low, high, level = mrd[~is_high], mrd[is_high], is_high.astype(float)
    return Effect(
        attribute,
        low,
        high,
        mean(low),
        mean(high),
        mean_difference(low, high),
        hedges_g(low, high),
        spearman(level, mrd),
        partial_spearman(level, mrd, tokens),
        spearman(level, tokens),
        Overlap.of(is_high, mrd, tokens),
    )


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of MRD with a number that each sample has.

    Attributes:
        title: what the number is.
        mrd: its correlation with MRD.
        beyond_length: the same with the number of scored tokens partialled out; nan for the length itself.
        per_token: its correlation with MRD / tokens.
        claim: the sign that the paper gives the correlation, 0 if it gives none.
        samples: how many there are.
        at: beyond_length at a level of confidence.
    """

    title: str
    mrd: Estimate
    beyond_length: Estimate
    per_token: Estimate
    claim: int
    samples: int
    at: Interval

    def sentence(self) -> str:
        """The paper's claim, and whether it holds here."""
        side = "higher" if self.claim > 0 else "lower"
        beyond = Claim(
            f"the higher the {self.title}, the {side} the MRD",
            self.title,
            self.claim,
            MARGIN,
            self.at,
            self.samples,
            "samples",
            "correlation",
        )
        return (
            f"The paper says: high {self.title}, {side} MRD. Here the rank correlation is {with_ci(self.mrd)}. With "
            f"length partialled out, {with_ci(self.beyond_length)}: {decide([beyond])[0].word}."
        )


LENGTH = "length in scored tokens"
PROBABILITY = "initial generation probability"


def correlations(scores: Scores, records: Sequence[Record], corpus: Sequence[str]) -> list[Correlation]:
    """MRD against length, likelihood and the measured characteristics of the texts.

    Args:
        scores: of samples whose ids are among the records'.
        records: with ids, questions and answers.
        corpus: the texts that the model was trained on, each as often as the model saw it in an epoch.
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
        Correlation(
            title,
            spearman(values, mrd),
            partial_spearman(values, mrd, length),
            spearman(values, per_token),
            claim,
            len(mrd),
            functools.partial(_partial_spearman, values, mrd, length),
        )
        for title, values, claim in columns
    ]


def _partial_spearman(x: np.ndarray, y: np.ndarray, z: np.ndarray, level: float) -> Estimate:
    return partial_spearman(x, y, z, level=level)


def by_attribute(effects: Sequence[Effect], title: str = "") -> Draw:
    """MRD at the two levels of each attribute: samples as faint dots, means with 95 % intervals."""

    def draw(axes: Axes) -> None:
        jitter = np.random.default_rng(0)  # moves dots sideways, so that they do not hide each other
        groups = [(e.low, e.low_mean) for e in effects], [(e.high, e.high_mean) for e in effects]
        for level, (colour, marker, offset) in enumerate(((ORANGE, "s", -0.2), (BLUE, "o", 0.2))):
            for place, (values, centre) in enumerate(groups[level]):
                x = place + offset
                axes.plot(
                    x + jitter.uniform(-0.13, 0.13, len(values)),
                    values,
                    linestyle="none",
                    marker=".",
                    markersize=3,
                    color=colour,
                    alpha=0.35,
                    zorder=1,
                )
                axes.errorbar(
                    x,
                    centre.value,
                    error_bars([centre]),
                    fmt=marker,
                    color=INK,
                    markerfacecolor=colour,
                    markersize=8,
                    capsize=4,
                    label=("low", "high")[level] if place == 0 else None,
                    zorder=3,
                )
        axes.set_xticks(range(len(effects)), [effect.attribute.title for effect in effects])
        axes.grid(axis="x", visible=False)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.12 * (high - low))
        axes.set_ylabel("MRD")
        axes.legend(loc="upper left", ncols=2)
        axes.set_title(title)

    return draw


def forest_plot(effects: Sequence[Effect], correlations: Sequence[Correlation]) -> Draw:
    """Rank correlations with MRD, as they are, with length partialled out, and of effects also where lengths overlap;
    and the signs that the paper gives."""

    def draw(axes: Axes) -> None:
        names = [effect.attribute.title for effect in effects] + [other.title for other in correlations]
        claims = [effect.attribute.claim for effect in effects] + [other.claim for other in correlations]
        plain = [effect.correlation for effect in effects] + [other.mrd for other in correlations]
        beyond = [effect.beyond_length for effect in effects] + [other.beyond_length for other in correlations]
        heights = -np.arange(len(names), dtype=float)
        overlap = [effect.overlap.correlation for effect in effects]
        for shift, estimates, colour, marker, label in (
            (0.2, plain, ORANGE, "s", "as it is"),
            (0.0, beyond, BLUE, "o", "length partialled out"),
            (-0.2, overlap, GREEN, "D", "where lengths overlap"),
        ):
            axes.errorbar(
                [estimate.value for estimate in estimates],
                heights[: len(estimates)] + shift,
                xerr=error_bars(estimates),
                fmt=marker,
                color=colour,
                capsize=3,
                label=label,
            )
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_xlim(-1, 1)
        for y, claim in zip(heights, claims, strict=True):
            if claim:
                axes.annotate("▶" if claim > 0 else "◀", (0.96 * claim, y), ha="center", va="center", color=MUTED)
        axes.set_yticks(heights, names)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(-len(names) + 0.4, 0.6)
        axes.set_xlabel("rank correlation (arrow: the paper's sign)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1, handletextpad=0.3)

    return draw
