"""Does a claim hold? Verdicts on effects, by their intervals and by the smallest effect that matters.

    holds                    the interval is on the claim's side of 0, and the effect no smaller than what matters
    contradicted             the interval is on the other side of 0
    no effect of that size   two one-sided tests (Schuirmann 1987): the effect is smaller than what matters
    cannot be told           none of these; with how much data would tell

To find no difference says nothing where few runs vary much, so that there is no effect is a verdict of its own. Claims
that are made together are a family: the chance of even one wrong verdict in it is at most 5 % (Holm 1979, step down, by
intervals of ever lower confidence). The smallest effect that matters is fixed before the run, and is half of the
paper's own where the paper prints one. A number that was looked at after the fact is exploratory: it is judged by
itself and marked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from bench.stats.estimates import LEVEL, Estimate, Resampled, over_seeds, t_interval

HOLDS, CONTRADICTED, NO_EFFECT, UNKNOWN = "holds", "is contradicted", "no effect of that size", "cannot be told"
VERDICTS = (HOLDS, CONTRADICTED, NO_EFFECT, UNKNOWN)
POWER = 0.8
RESAMPLES = 10_000
MOST = 1_000_000  # more data than anybody has
Interval = Callable[[float], Estimate]  # level of confidence, such as 0.95 -> the effect and its interval
Scale = Literal["difference", "correlation", "log ratio", "share"]


@dataclass(frozen=True)
class Claim:
    """A claim, and the effect that was measured to judge it.

    Attributes:
        text: what is claimed, as it follows "that".
        effect: names what was measured.
        sign: of the effect that is claimed, +1 or -1. 0 where the claim is that there is no effect: it holds if the
            effect is nearer to 0 than the margin, and is contradicted if it is further away.
        margin: the smallest effect that matters, in the units of the effect; 0: any.
        at: gives the effect with its interval at a level of confidence; nan where the data do not determine it.
        count: of the independent units that the interval is about.
        unit: what they are: "samples".
        scale: how numbers are printed: those of log ratios as ratios.
        paper: the effect that the paper prints, where it prints one.
        exploratory: the effect was chosen after the data were seen.
    """

    text: str
    effect: str
    sign: int
    margin: float
    at: Interval
    count: int
    unit: str
    scale: Scale = "difference"
    paper: float | None = None
    exploratory: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the data say about a claim.

    Attributes:
        claim: the claim.
        word: one of VERDICTS.
        estimate: the effect with its interval at 95 %, of this effect alone.
        needed: about how many units would tell, with a power of 80 % if the effect is as it was measured; nan where it
            can be told, inf where no number would.
    """

    claim: Claim
    word: str
    estimate: Estimate
    needed: float


def half_of(paper: float) -> float:
    """The smallest effect that matters where the paper prints one."""
    return abs(paper) / 2


def over_runs(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean of independent runs, or of differences between paired ones, with Student's t interval; without one where
    they do not vary."""
    estimate = over_seeds(values)
    if not math.isfinite(estimate.low):
        return lambda level: estimate
    return lambda level: t_interval(values, level)


def bootstrapped(estimator: Callable[..., Estimate], *data: Any) -> Interval:
    """An estimate of `bench.stats.estimates` that resamples, with as many resamples as far tails take.

    Args:
        estimator: takes the data and `resamples`.
    """
    estimate = estimator(*data, resamples=RESAMPLES)
    return estimate.at if isinstance(estimate, Resampled) else lambda level: estimate


def decide(claims: Sequence[Claim], level: float = LEVEL) -> list[Verdict]:
    """The verdicts on a family of claims.

    Step down: with k claims not yet judged each is judged at 1 - (1 - level) / k; those that can be are set aside, and
    the others are judged again as a smaller family.
    """
    words: dict[int, str] = {}
    error = 1 - level
    while waiting := [i for i, claim in enumerate(claims) if i not in words and not claim.exploratory]:
        error = (1 - level) / len(waiting)
        judged = {i: word for i in waiting if (word := _judge(claims[i], error)) != UNKNOWN}
        if not judged:
            break
        words |= judged
    verdicts = []
    for i, claim in enumerate(claims):
        own_error = 1 - level if claim.exploratory else error
        word = words.get(i) or _judge(claim, own_error)
        needed = _needed(claim, own_error) if word == UNKNOWN else math.nan
        verdicts.append(Verdict(claim, word, claim.at(level), needed))
    return verdicts


def _judge(claim: Claim, error: float) -> str:
    """The verdict on one claim with a chance of `error` to be wrong."""
    effect, equivalence = claim.at(1 - error), claim.at(1 - 2 * error)
    near = -claim.margin < equivalence.low and equivalence.high < claim.margin
    if claim.sign == 0:
        beyond = effect.low > claim.margin or effect.high < -claim.margin
        return HOLDS if near else CONTRADICTED if beyond else UNKNOWN
    if effect.sign == -claim.sign:
        return CONTRADICTED
    if near:
        return NO_EFFECT
    if effect.sign == claim.sign and abs(effect.value) >= claim.margin:
        return HOLDS
    return UNKNOWN


def _needed(claim: Claim, error: float) -> float:
    """How many units would tell, as the width of an interval goes down with the root of their number."""
    effect = claim.at(1 - error)
    half = (effect.high - effect.low) / 2
    size = abs(effect.value)
    # How far the effect is from the nearer border of the region in which it can be told.
    if claim.sign == 0:
        distance = abs(claim.margin - size)
    else:
        on_claimed_side = effect.value * claim.sign > 0
        distance = max(size if not on_claimed_side or size >= claim.margin else 0.0, claim.margin - size)
    if not math.isfinite(half):
        return math.nan
    if distance <= 0:
        return math.inf
    with_power = 1 + stats.norm.ppf(POWER) / stats.norm.ppf(1 - error / 2)
    needed = claim.count * (with_power * half / distance) ** 2
    return math.ceil(needed) if needed <= MOST else math.inf
