"""Numbers with their intervals as text, and whether a claim about their sign holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from bench.stats.estimates import Estimate

NO_EFFECT_SHOWN = "not separable from no effect"


def decimal(value: float, digits: int = 2) -> str:
    """A number with a true minus sign; a dash where it is not known."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text.removeprefix("-")


def interval(estimate: Estimate, digits: int = 2) -> str:
    """The ends of an interval, "0.30 to 0.53"; a dash where they are not known."""
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return "–"
    return f"{decimal(estimate.low, digits)} to {decimal(estimate.high, digits)}"


def with_ci(estimate: Estimate, digits: int = 2) -> str:
    """A value and its interval: "0.42 [95 % CI 0.30 to 0.53]"."""
    if not math.isfinite(estimate.value):
        return "not determined"
    ends = interval(estimate, digits)
    certainty = "too few samples for a CI" if ends == "–" else f"95 % CI {ends}"
    return f"{decimal(estimate.value, digits)} [{certainty}]"


def three_digits(value: float) -> str:
    """A number with three significant digits and a true minus sign."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def sign_verdict(estimate: Estimate, claim: int) -> str:
    """Whether the sign that the paper claims is the one that was measured."""
    if estimate.sign == 0:
        return NO_EFFECT_SHOWN
    return "the claim holds" if estimate.sign == claim else "the opposite of the claim"


def percent_with_ci(estimate: Estimate) -> str:
    """A share in percent: "5.0% [95 % CI 4.1 to 6.3]"."""
    return with_ci(Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high), 1).replace(" [", "% [", 1)


def number_with_ci(estimate: Estimate) -> str:
    """A number of any size: "1.23e+05 [95 % CI 9.8e+04 to 1.5e+05]"."""
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return f"{estimate.value:.3g} [too few samples for a CI]"
    return f"{estimate.value:.3g} [95 % CI {estimate.low:.3g} to {estimate.high:.3g}]"


def numbers_table(numbers: Mapping[str, Estimate]) -> pa.Table:
    """Numbers of a finding that no other table has: what they are, value, low and high."""
    return pa.Table.from_pylist(
        [{"what": what, "value": each.value, "low": each.low, "high": each.high} for what, each in numbers.items()]
    )


def interval_columns(name: str, estimate: Estimate) -> dict[str, float]:
    """Columns of a table: the value under the name, and the ends of its interval."""
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share_with_ci(estimate: Estimate) -> str:
    """A share: "45% [95 % CI 15% to 68%]"; where an upper limit is not known, "45% [95 % CI from 15%]"."""
    if not math.isfinite(estimate.value):
        return "not determined"
    if not math.isfinite(estimate.low):
        return f"{estimate.value:.0%} [no CI]"
    ends = f"from {estimate.low:.0%}" if estimate.high == 1 else f"{estimate.low:.0%} to {estimate.high:.0%}"
    return f"{estimate.value:.0%} [95 % CI {ends}]"


def count_with_ci(estimate: Estimate) -> str:
    """A whole number: "2 [95 % CI 1 to 13]"; for inf, "no number"; where only a lower limit is known, "at least 8"."""

    def whole(value: float) -> str:
        return "no number" if math.isinf(value) else f"{value:.0f}"

    if math.isnan(estimate.value):
        return f"at least {whole(estimate.low)}"
    return f"{whole(estimate.value)} [95 % CI {whole(estimate.low)} to {whole(estimate.high)}]"


def listed(names: Iterable[str]) -> str:
    """Names in a sentence: "A, B and C"."""
    names = list(names)
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def size_of(num_bytes: float) -> str:
    """A number of bytes for a message: "1.3 GB"."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= u), (1e3, "kB"))
    return f"{num_bytes / unit:.1f} {name}"
