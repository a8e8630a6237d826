"""`mrd-bench benchmark statistics`: how often the statistics are right, on simulated data whose truth is known.

Each case is computed as it was before a fault was mended and as it is now, on the same data: the coverage of 95 %
intervals, or how often something is claimed that is not so. What is refused (nan) is neither: its share is printed.
The formulas of before stand here alone, to show the fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

from bench.boards.compare import paired_g
from bench.experiments.shared.costs import UPDATES, ratios
from bench.files.origin import origin
from bench.speed.figures import require_at_least, write_figures
from bench.stats.estimates import LEVEL, Estimate, holm
from bench.stats.estimates import mean as mean_of
from bench.stats.selection_bias import (
    ScoreTable,
    reversal_rates,
    selections_needed,
    variance_shares,
    wilson,
)

COVERAGE, FALSE = "coverage", "false claims"
Draw = Callable[..., np.ndarray]
Outcome = float | bool  # whether an interval covers, or a claim is made; nan where none is given


@dataclass(frozen=True)
class Case:
    """A fault under one condition.

    Attributes:
        name: of the fault and the condition.
        what: COVERAGE, which should be 95 %, or FALSE, which should be 5 % at most.
        simulate: what one table of data gives, before and now.
    """

    name: str
    what: str
    simulate: Callable[[np.random.Generator], tuple[Outcome, Outcome]]


def run_benchmark(replications: int, out: str | None) -> None:
    """Simulate, print a table, and write the figures as JSON if asked to.

    Args:
        replications: simulated data sets for each case.
        out: JSON file.
    """
    require_at_least(10, replications=replications)
    print(f"{replications} data sets a case; Monte Carlo intervals in brackets\n")
    print(f"{'case':<66}{'what':<14}{'before':<22}{'now':<22}{'refused before':>15}{'now':>5}")
    rows = []
    for number, case in enumerate(cases()):
        rng = np.random.default_rng(number)
        found = np.array([case.simulate(rng) for _ in range(replications)], dtype=float)
        before, now = (_rate(column) for column in found.T)
        refused = np.isnan(found).mean(axis=0).tolist()
        rows.append(
            {"case": case.name, "what": case.what, "before": before, "now": now}
            | {"refused_before": refused[0], "refused_now": refused[1], "replications": replications}
        )
        cells = "".join(f"{_text(rate):<22}" for rate in (before, now))
        print(f"{case.name:<66}{case.what:<14}{cells}{refused[0]:>15.0%}{refused[1]:>5.0%}", flush=True)
    write_figures({"cases": rows} | origin(), out)


def cases() -> list[Case]:
    """All faults under all conditions."""
    tails = {"normal": _normal, "t(3)": _t3, "10 % outliers": _outliers}
    found = []
    for name, draw in tails.items():
        for a, s, r in ((3, 12, 2), (4, 24, 3), (10, 40, 4)):
            about = f"no selection effect, shared seeds, {name}, {a} × {s} × {r}"
            found.append(Case(about, FALSE, _shared_seeds(a, s, r, 0.0, draw)))
        about = f"share of the selection, shared seeds, {name}, 4 × 24 × 3"
        found.append(Case(about, COVERAGE, _shared_seeds(4, 24, 3, 1.0, draw)))
    for n in (3, 5, 10):
        found.append(Case(f"paired effect, normal, {n} pairs", COVERAGE, _paired_effect(n)))
    for n in (10, 14, 20):
        for name, draw in tails.items():
            found.append(Case(f"mean, {name}, {n} samples", COVERAGE, _mean(n, draw)))
    for n in (2, 3, 5):
        found.append(Case(f"ratios of updates, no difference, 4 algorithms, {n} seeds", FALSE, _grid(n)))
    for a in (3, 6, 10):
        found.append(Case(f"reversals by seeds alone, {a} × 12 × 2", FALSE, _reversals(a, 12)))
    found.append(Case("reversals are rare where they are 20 %, 3 × 12 × 2", FALSE, _never_rare(3, 12)))
    for a in (3, 6, 10):
        found.append(Case(f"selections needed, {a} × 12 × 2", COVERAGE, _needed(a, 12)))
    return found


# --- Words --------------------------------------------------------------------------------------------------


def _rate(outcomes: np.ndarray) -> dict[str, float] | None:
    """The share of outcomes that are so, of those that are known, with Wilson's interval."""
    known = outcomes[np.isfinite(outcomes)]
    return asdict(wilson(float(known.sum()), len(known))) if len(known) else None


def _text(rate: dict[str, float] | None) -> str:
    return f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]" if rate else "–"


def _covers(estimate: Estimate, truth: float) -> Outcome:
    return estimate.low <= truth <= estimate.high if math.isfinite(estimate.low) else math.nan


# --- Data ---------------------------------------------------------------------------------------------------


def _normal(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=size)


def _t3(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    return rng.standard_t(3, size=size) / math.sqrt(3)


def _outliers(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    """One in ten has five times the deviation; variance 1."""
    return rng.normal(size=size) * np.where(rng.random(size) < 0.1, 5, 1) / math.sqrt(0.9 + 0.1 * 25)


def _table(values: np.ndarray, shared: bool = False) -> ScoreTable:
    a, s, _ = values.shape
    return ScoreTable(tuple(map(str, range(a))), tuple(map(str, range(s))), values, shared)


# --- Faults -------------------------------------------------------------------------------------------------


def _shared_seeds(a: int, s: int, r: int, selection: float, draw: Draw) -> Callable[..., tuple[Outcome, Outcome]]:
    """Before: a seed's effect on all algorithms alike was booked as the selection's. Variances: algorithm 1, common
    seed .5, interaction .2, rest .3."""

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        values = rng.normal(size=(a, 1, 1)) + math.sqrt(selection) * draw(rng, (1, s, 1))
        values = values + math.sqrt(0.5) * draw(rng, (1, s, r)) + math.sqrt(0.2) * draw(rng, (a, s, 1))
        values = values + math.sqrt(0.3) * draw(rng, (a, s, r))
        found = [variance_shares(_table(values, shared)).selection for shared in (False, True)]
        if selection:
            before, now = (_covers(share, selection / (selection + 2)) for share in found)
        else:
            before, now = (share.low > 0 for share in found)
        return before, now

    return simulate


def _paired_effect(n: int) -> Callable[..., tuple[Outcome, Outcome]]:
    """Before: the limits, too, were multiplied by the correction for the bias of the value. A true effect of 1."""

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        found = paired_g(rng.normal(1.0, size=n))
        scale = 1 - 3 / (4 * (n - 1) - 1)
        return _covers(Estimate(found.value, scale * found.low, scale * found.high), 1.0), _covers(found, 1.0)

    return simulate


def _mean(n: int, draw: Draw) -> Callable[..., tuple[Outcome, Outcome]]:
    """Before: a BCa interval."""

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        x = draw(rng, (n,))
        bca = stats.bootstrap((x,), np.mean, n_resamples=500, method="BCa", rng=rng).confidence_interval
        return _covers(Estimate(0, float(bca.low), float(bca.high)), 0.0), _covers(mean_of(x), 0.0)

    return simulate


def _grid(seeds: int) -> Callable[..., tuple[Outcome, Outcome]]:
    """Before: seeds that agree had p = 0. Updates until all is forgotten, looked at after every fifth."""

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        updates = 5.0 * np.ceil(rng.normal(20, 2, size=(4, seeds, 2)) / 5)
        found = ratios(UPDATES, {str(k): [(float(x), float(y)) for x, y in pairs] for k, pairs in enumerate(updates)})
        p = []
        for pairs, ratio in zip(updates, found, strict=True):
            logs = np.log(pairs[:, 0] / pairs[:, 1])
            p.append(float(abs(logs[0]) < 1e-12) if np.ptp(logs) < 1e-12 else ratio.p)
        return bool((holm(p) < 1 - LEVEL).any()), any(ratio.sign for ratio in found)

    return simulate


def _reversals(a: int, s: int) -> Callable[..., tuple[Outcome, Outcome]]:
    """Before: each pair by itself. Algorithms lie .2 apart, and only seeds turn them."""

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        found = reversal_rates(_table(0.2 * np.arange(a)[:, None, None] + rng.normal(size=(a, s, 2))))
        before = any(r.rate.low > (r.by_seeds or 0.0) and r.difference.sign > 0 for r in found)
        return before, any(r.p_value < 1 - LEVEL for r in found)

    return simulate


def _never_rare(a: int, s: int) -> Callable[..., tuple[Outcome, Outcome]]:
    """Before: Wilson's upper limit below .05, which a dozen selections cannot reach."""

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        step = -stats.norm.ppf(0.2) * math.sqrt(2 * 0.75)
        values = step * np.arange(a)[:, None, None] + math.sqrt(0.5) * rng.normal(size=(a, s, 1))
        found = reversal_rates(_table(values + math.sqrt(0.5) * rng.normal(size=(a, s, 2))))
        return all(r.rate.high < 0.05 for r in found), all(r.at_most < 0.05 for r in found)

    return simulate


def _needed(a: int, s: int) -> Callable[..., tuple[Outcome, Outcome]]:
    """Before: a value also where neighbours lie within their noise; now only a lower limit there. Whether the number
    that is printed first is right: the value within a factor of 2, the limit at most the truth. Gaps of .5."""
    steps = np.full(a - 1, 0.5 / math.sqrt(2 * 0.75))
    correlation = np.eye(a - 1) - 0.5 * (np.eye(a - 1, k=1) + np.eye(a - 1, k=-1))
    noise = np.random.default_rng(0).multivariate_normal(np.zeros(a - 1), correlation, size=20_000)

    def needed(apart: np.ndarray) -> float:
        return float(np.quantile((noise / apart).max(axis=1), 0.95)) ** 2

    truth = needed(steps)

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        values = 0.5 * np.arange(a)[:, None, None] + math.sqrt(0.5) * rng.normal(size=(a, s, 1))
        table = _table(values + math.sqrt(0.5) * rng.normal(size=(a, s, 2)))
        means = table.means[np.argsort(table.means.mean(axis=1))]
        differences = np.diff(means, axis=0)
        before = needed(differences.mean(axis=1) / differences.std(axis=1, ddof=1))
        now = selections_needed(table)
        right = now.low <= truth if math.isnan(now.value) else truth / 2 <= now.value <= 2 * truth
        return truth / 2 <= before <= 2 * truth, right

    return simulate
