"""Whether a claim of the paper holds here, in words that follow from the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from bench.stats.estimates import Estimate

HOLDS, CONTRADICTED, UNKNOWN = "holds", "is contradicted", "cannot be told"
# A rank correlation that is weaker than this even at the far end of its interval is not what the paper shows.
WEAK = 0.3


def correlation_verdict(correlation: Estimate, claimed_sign: int) -> str:
    """Whether there is a clear rank correlation of the claimed sign.

    The claim holds if the whole interval has that sign; it is contradicted if even the end of the interval that is
    nearest to the claim is weaker than WEAK; else, and without an interval, it cannot be told.
    """
    least, most = sorted((claimed_sign * correlation.low, claimed_sign * correlation.high))
    if not (math.isfinite(least) and math.isfinite(most)):
        return UNKNOWN
    if most < WEAK:
        return CONTRADICTED
    return HOLDS if least > 0 else UNKNOWN


def range_verdict(estimate: Estimate, low: float, high: float) -> str:
    """Whether a number lies between two bounds: HOLDS if its whole interval does, CONTRADICTED if all of it is
    outside, UNKNOWN otherwise, also where there is no interval."""
    if low <= estimate.low and estimate.high <= high:
        return HOLDS
    if estimate.high < low or estimate.low > high:
        return CONTRADICTED
    return UNKNOWN


def overall_verdict(by_algorithm: Mapping[str, str], average: str) -> str:
    """The verdict on all algorithms: that of their average, unless an algorithm contradicts the claim."""
    if CONTRADICTED in (average, *by_algorithm.values()):
        return CONTRADICTED
    return average


def list_verdicts(verdicts: Mapping[str, str]) -> str:
    """Verdicts with the names that they are for: "holds for NPO; cannot be told for PO"."""
    parts = []
    for verdict in (HOLDS, CONTRADICTED, UNKNOWN):
        if names := [name for name, its_verdict in verdicts.items() if its_verdict == verdict]:
            parts.append(f"{verdict} for {', '.join(names)}")
    return "; ".join(parts)


def verdict_here(verdicts: Mapping[str, str]) -> str:
    """One verdict, as "holds here", if it is the same for all; else the verdicts with their names."""
    if len(set(verdicts.values())) == 1:
        return f"{next(iter(verdicts.values()))} here"
    return list_verdicts(verdicts)
