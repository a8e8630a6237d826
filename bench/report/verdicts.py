"""Verdicts on claims in words, as rows of a table, and at a glance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from bench.report.words import decimal, interval, markdown_table
from bench.stats.estimates import Estimate
from bench.stats.verdicts import UNKNOWN, VERDICTS, Verdict

GLANCE = (
    "Intervals are 95 %, of each effect by itself. A verdict is made by an interval corrected for all claims of its "
    "table (Holm). *No effect of that size*: two one-sided tests say that the effect is smaller than the smallest that "
    "matters, which was fixed before the run. *None* is claimed where the claim is that there is no effect. Ratios are "
    "judged by their logarithms."
)
SCHEMA = pa.schema(
    [
        ("claim", pa.string()),
        ("effect", pa.string()),
        ("scale", pa.string()),
        ("claimed_sign", pa.int8()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("margin", pa.float64()),
        ("paper", pa.float64()),
        ("count", pa.int64()),
        ("unit", pa.string()),
        ("exploratory", pa.bool_()),
        ("verdict", pa.string()),
        ("needed", pa.float64()),
    ]
)
_DIGITS: dict[str, int] = {"difference": 3, "correlation": 2, "log ratio": 2, "share": 2}


def rows(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """A row of `SCHEMA` for each verdict, with numbers on the claim's own scale."""
    return [
        {
            "claim": verdict.claim.text,
            "effect": verdict.claim.effect,
            "scale": verdict.claim.scale,
            "claimed_sign": verdict.claim.sign,
            "value": verdict.estimate.value,
            "low": verdict.estimate.low,
            "high": verdict.estimate.high,
            "margin": verdict.claim.margin,
            "paper": verdict.claim.paper,
            "count": verdict.claim.count,
            "unit": verdict.claim.unit,
            "exploratory": verdict.claim.exploratory,
            "verdict": verdict.word,
            "needed": None if math.isnan(verdict.needed) else verdict.needed,
        }
        for verdict in verdicts
    ]


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of verdicts as a Markdown table; a column for the experiment where rows have it."""
    with_experiment = any("experiment" in row for row in rows)
    head = ["claim", "measured", "effect (95 % CI)", "claimed", "smallest that matters", "paper", "n", "verdict"]
    lines = []
    for row in rows:
        estimate = Estimate(row["value"], row["low"], row["high"])
        verdict = f"**{row['verdict']}**" if row["verdict"] != UNKNOWN else row["verdict"]
        if row["verdict"] == UNKNOWN:
            verdict += f": {needed(row['needed'], row['unit'])}"
        if row["exploratory"]:
            verdict += " (exploratory)"
        lines.append(
            [
                *([str(row["experiment"])] if with_experiment else []),
                row["claim"],
                row["effect"],
                effect(estimate, row["scale"]),
                {1: ratio_or("> 0", "> 1", row["scale"]), -1: ratio_or("< 0", "< 1", row["scale"]), 0: "none"}[
                    row["claimed_sign"]
                ],
                margin(row["margin"], row["scale"]),
                "–" if row["paper"] is None else number(row["paper"], row["scale"]),
                f"{row['count']} {row['unit']}",
                verdict,
            ]
        )
    return markdown_table([*(["experiment"] if with_experiment else []), *head], lines)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many claims are decided, and what the others lack. A claim that was measured in several ways is decided where
    it can be told in one of them.

    Args:
        rows: of verdicts, with their experiment; what was looked at after the fact is no claim.
    """
    claims: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if not row["exploratory"]:
            claims.setdefault((row["experiment"], row["claim"]), []).append(row)
    undecided = {
        key: of_claim for key, of_claim in claims.items() if all(row["verdict"] == UNKNOWN for row in of_claim)
    }
    lines = [
        f"- {experiment}, that {claim}: "
        + "; ".join(f"{row['count']} {row['unit']}, {needed(row['needed'], row['unit'])}" for row in of_claim)
        for (experiment, claim), of_claim in undecided.items()
    ]
    head = f"**Of {len(claims)} claims {len(claims) - len(undecided)} are decided**"
    if not lines:
        return f"{head}."
    return "\n".join([f"{head}, and of these it {UNKNOWN}:", "", *lines])


def ratio_or(difference: str, ratio: str, scale: str) -> str:
    """The words for a ratio where the scale is one, else those for a difference."""
    return ratio if scale == "log ratio" else difference


def number(value: float, scale: str) -> str:
    """An effect as it is printed: ratios instead of their logarithms."""
    if scale == "log ratio":
        return f"{math.exp(value):.3g}" if value < 3 else f"{math.exp(value):.0f}"
    return decimal(value, _DIGITS[scale])


def effect(estimate: Estimate, scale: str) -> str:
    """An effect with its interval: "0.42 (0.30 to 0.53)"."""
    if not math.isfinite(estimate.value):
        return "not determined"
    if not math.isfinite(estimate.low):
        return f"{number(estimate.value, scale)} (no interval)"
    if scale == "log ratio":
        return f"{number(estimate.value, scale)} ({number(estimate.low, scale)} to {number(estimate.high, scale)})"
    digits = _DIGITS[scale]
    return f"{decimal(estimate.value, digits)} ({interval(estimate, digits)})"


def margin(value: float, scale: str) -> str:
    """The smallest effect that matters."""
    if not value:
        return "any"
    if scale == "log ratio":
        return f"×{math.exp(value):.3g}"
    return f"{value:g}"


def needed(count: float | None, unit: str) -> str:
    """How much data would tell: "about 90 seeds would tell"."""
    if count is None or math.isnan(count):
        return "without an interval"
    if math.isinf(count):
        return f"no number of {unit} would tell"
    return f"about {count:.0f} {unit} would tell"


def listed(verdicts: Iterable[Verdict]) -> str:
    """Verdicts with what they are about: "holds for NPO; cannot be told for PO (about 90 seeds would tell)"."""
    verdicts = list(verdicts)
    parts = []
    for word in VERDICTS:
        names = [verdict.claim.effect + _would_tell(verdict) for verdict in verdicts if verdict.word == word]
        if names:
            parts.append(f"{word} for {', '.join(names)}")
    return "; ".join(parts)


def by_claim(verdicts: Iterable[Verdict]) -> list[str]:
    """For each claim, in the order in which they first appear: "that it is so: holds for NPO; ..."."""
    of_claim: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        of_claim.setdefault(verdict.claim.text, []).append(verdict)
    return [f"that {text}: {listed(each)}" for text, each in of_claim.items()]


def _would_tell(verdict: Verdict) -> str:
    """In brackets, how much data would tell; "" where it can be told."""
    return f" ({needed(verdict.needed, verdict.claim.unit)})" if verdict.word == UNKNOWN else ""
