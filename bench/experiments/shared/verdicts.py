"""Whether a claim of the paper holds here, in words that are computed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from bench.stats.estimates import Estimate

HOLDS, CONTRADICTED, UNKNOWN = "holds", "is contradicted", "cannot be told"


def overall(by_algorithm: Mapping[str, str], average: str) -> str:
    """The verdict on all algorithms: what holds on average must not be contradicted by any of them."""
    if CONTRADICTED in (average, *by_algorithm.values()):
        return CONTRADICTED
    return average


def by_verdict(verdicts: Mapping[str, str]) -> str:
    """Holds for NPO; cannot be told for PO."""
    parts = []
    for which in (HOLDS, CONTRADICTED, UNKNOWN):
        if names := [name for name, own in verdicts.items() if own == which]:
            parts.append(f"{which} for {', '.join(names)}")
    return "; ".join(parts)


# A rank correlation that even at the far end of its interval is smaller is not what the paper shows.
WEAK = 0.3


def ruling(correlation: Estimate, claim: int) -> str:
    """Whether there is a clear rank correlation of the claimed sign.

    It holds if the whole interval has that sign; it is contradicted if even the end of the interval that is the
    nearest to the claim is weaker than WEAK; else, and without an interval, it cannot be told.
    """
    ends = sorted((claim * correlation.low, claim * correlation.high))
    if not all(math.isfinite(end) for end in ends):
        return UNKNOWN
    least, most = ends
    if most < WEAK:
        return CONTRADICTED
    return HOLDS if least > 0 else UNKNOWN


def ruled(rulings: Mapping[str, str]) -> str:
    """HOLDS, CONTRADICTED or UNKNOWN "here" if that is so of all; else of which it is so."""
    if len(set(rulings.values())) == 1:
        return f"{next(iter(rulings.values()))} here"
    return "; ".join(
        f"{verdict} for {', '.join(name for name, own in rulings.items() if own == verdict)}"
        for verdict in (HOLDS, CONTRADICTED, UNKNOWN)
        if verdict in rulings.values()
    )


def lies_within(estimate: Estimate, low: float, high: float) -> str:
    """Whether a number lies between two bounds: HOLDS if its whole interval does, CONTRADICTED if all of it is
    outside, UNKNOWN otherwise, also where there is no interval."""
    if low <= estimate.low and estimate.high <= high:
        return HOLDS
    if estimate.high < low or estimate.low > high:
        return CONTRADICTED
    return UNKNOWN
