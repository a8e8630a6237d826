"""`mrd-bench benchmark statistics`: how often the statistics are right, on simulated data whose truth is known.

Each case is computed as it was before a fault was mended and as it is now, on the same data: the coverage of 95 %
intervals, or how often something is claimed that is not so. What is refused (nan) is neither: its share is printed.
The formulas of before stand here alone, to show the fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from scipy import optimize, special, stats

from bench.experiments.shared.costs import UPDATES, ratios
from bench.files.origin import origin
from bench.speed.figures import require_at_least, write_figures
from bench.stats.estimates import LEVEL, Estimate, holm, t_interval
from bench.stats.estimates import mean as mean_of
from bench.stats.paired import paired_g
from bench.stats.selection_bias import (
    ScoreTable,
    mean_scores,
    reversal_rates,
    selections_needed,
    selections_needed_between,
    selections_needed_pair,
    separable,
    separable_groups,
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
    print(f"{'case':<76}{'what':<14}{'before':<22}{'now':<22}{'refused before':>15}{'now':>5}")
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
        print(f"{case.name:<76}{case.what:<14}{cells}{refused[0]:>15.0%}{refused[1]:>5.0%}", flush=True)
    write_figures({"cases": rows} | origin(), out)


def cases() -> list[Case]:
    """All faults under all conditions."""
    tails = {"normal": _normal, "t(3)": _t3, "10 % outliers": _outliers}
    found = []
    for name, draw in tails.items():
        for a, s, r in ((3, 5, 2), (3, 12, 2), (4, 24, 3), (10, 40, 4)):
            about = f"no selection effect, shared seeds, {name}, {a} × {s} × {r}"
            found.append(Case(about, FALSE, _no_selection_effect(a, s, r, draw)))
        for a, s, r in ((3, 5, 2), (10, 12, 2), (4, 24, 3), (10, 40, 4)):
            about = f"share of the selection, shared seeds, {name}, {a} × {s} × {r}"
            found.append(Case(about, COVERAGE, _share(a, s, r, 1.0, draw, draw)))
        for a, s, r in ((3, 5, 2), (10, 12, 3), (3, 40, 2)):
            about = f"share within an algorithm, {name}, {a} × {s} × {r}"
            found.append(Case(about, COVERAGE, _share_within(a, s, r, draw)))
    for a, s, r in ((3, 12, 2), (10, 40, 4)):
        about = f"share of the selection, which is 0, shared seeds, normal, {a} × {s} × {r}"
        found.append(Case(about, COVERAGE, _share(a, s, r, 0.0, _normal, _normal)))
    about = "share of the selection, shared seeds, outliers of it alone, 4 × 24 × 3"
    found.append(Case(about, COVERAGE, _share(4, 24, 3, 1.0, _outliers, _normal)))
    for n in (3, 5, 10):
        found.append(Case(f"paired effect, normal, {n} pairs", COVERAGE, _paired_effect(n)))
    for n in (10, 14, 20):
        for name, draw in tails.items():
            found.append(Case(f"mean, {name}, {n} samples", COVERAGE, _mean(n, draw)))
    for name, draw in tails.items():
        for s in (12, 40):
            about = f"mean of an algorithm, hard selections fail, {name}, 4 × {s} × 2"
            found.append(Case(about, COVERAGE, _missing(4, s, draw, False)))
    about = "mean of an algorithm, runs fail by their own score, normal, 4 × 40 × 2"
    found.append(Case(about, COVERAGE, _missing(4, 40, _normal, True)))
    for n in (2, 3, 5):
        found.append(Case(f"ratios of updates, no difference, 4 algorithms, {n} seeds", FALSE, _grid(n)))
    for a in (3, 6, 10):
        found.append(Case(f"reversals by seeds alone, {a} × 12 × 2", FALSE, _reversals(a, 12)))
    found.append(Case("reversals are rare where they are 20 %, 3 × 12 × 2", FALSE, _never_rare(3, 12)))
    for a in (3, 6, 10):
        found.append(Case(f"selections needed, {a} × 12 × 2", COVERAGE, _needed(a, 12)))
    for a in (3, 10):
        found.append(Case(f"selections needed by two neighbours, {a} × 12 × 2", COVERAGE, _needed_pair(a, 12)))
        found.append(Case(f"selections needed up to groups, {a} × 40 × 2", COVERAGE, _needed_up_to_groups(a, 40)))
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


def _runs(
    rng: np.random.Generator, a: int, s: int, r: int, selection: float, of_selection: Draw, of_rest: Draw
) -> np.ndarray:
    """(a, s, r). Mean square of fixed algorithms 1; variances: common seed .5, interaction .2, rest .3."""
    means = np.arange(a) / np.arange(a).std(ddof=1)
    values = means[:, None, None] + math.sqrt(selection) * of_selection(rng, (1, s, 1))
    values = values + math.sqrt(0.5) * of_rest(rng, (1, s, r)) + math.sqrt(0.2) * of_rest(rng, (a, s, 1))
    return np.asarray(values + math.sqrt(0.3) * of_rest(rng, (a, s, r)))


def _no_selection_effect(a: int, s: int, r: int, draw: Draw) -> Callable[..., tuple[Outcome, Outcome]]:
    """Before: a seed's effect on all algorithms alike was booked as the selection's."""

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        values = _runs(rng, a, s, r, 0.0, draw, draw)
        return (
            _generalized_share(values, rng).low > 0,
            variance_shares(_table(values, shared=True)).selection.low > 0,
        )

    return simulate


def _share(
    a: int, s: int, r: int, selection: float, of_selection: Draw, of_rest: Draw
) -> Callable[..., tuple[Outcome, Outcome]]:
    """Before: generalized intervals that book the common seed as selection and take algorithms for a random draw."""

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        values = _runs(rng, a, s, r, selection, of_selection, of_rest)
        truth = selection / (selection + 2)
        now = variance_shares(_table(values, shared=True)).selection
        return _covers(_generalized_share(values, rng), truth), _covers(now, truth)

    return simulate


def _generalized_share(values: np.ndarray, rng: np.random.Generator) -> Estimate:
    """The selection's share as it was: MS df / χ²_df with df lowered to the jackknife's variance of log MS."""
    a, s, r = values.shape

    def squares(runs: np.ndarray) -> np.ndarray:
        cells = runs.mean(axis=2)
        count = runs.shape[1]
        rows, columns = cells.mean(axis=1, keepdims=True), cells.mean(axis=0)
        both = r * ((cells - rows - columns + cells.mean()) ** 2).sum() / ((a - 1) * (count - 1))
        return np.array([count * r * rows.var(ddof=1), a * r * columns.var(ddof=1), both, runs.var(2, ddof=1).mean()])

    df = np.array([a - 1, s - 1, (a - 1) * (s - 1), a * s * (r - 1)], dtype=float)
    logs = np.log([squares(np.delete(values, j, axis=1)) for j in range(s)])
    for part, variance in list(enumerate((s - 1) ** 2 / s * logs.var(axis=0, ddof=1)))[1:]:
        if variance > special.polygamma(1, df[part] / 2):
            df[part] = optimize.brentq(
                lambda n, variance=variance: special.polygamma(1, n / 2) - min(variance, 4.9), 1, df[part]
            )
    drawn = squares(values)[:, None] * df[:, None] / rng.chisquare(df[:, None], size=(4, 300))
    of_algorithm, of_selection, of_both, of_seed = drawn
    parts = [(of_algorithm - of_both) / (s * r), (of_selection - of_both) / (a * r), (of_both - of_seed) / r, of_seed]
    variances = np.maximum(parts, 0)
    low, high = np.quantile(variances[1] / variances.sum(axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(math.nan, float(low), float(high))


def _share_within(a: int, s: int, r: int, draw: Draw) -> Callable[..., tuple[Outcome, Outcome]]:
    """Before: the jackknife alone, with both limits. Variances: selection 1, interaction .2, seed .8."""

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        values = draw(rng, (1, s, 1)) + math.sqrt(0.2) * draw(rng, (a, s, 1)) + math.sqrt(0.8) * draw(rng, (a, s, r))

        def log_ratio(runs: np.ndarray) -> float:
            return math.log(r * runs.mean(axis=2).var(axis=1, ddof=1).mean() / runs.var(axis=2, ddof=1).mean())

        logs = np.array([log_ratio(np.delete(values, j, axis=1)) for j in range(s)])
        half = stats.t.ppf((1 + LEVEL) / 2, s - 1) * (s - 1) / math.sqrt(s) * logs.std(ddof=1)
        low, high = (1 - r / (math.exp(log_ratio(values) + end) + r - 1) for end in (-half, half))
        now = variance_shares(_table(values)).within_algorithm
        return _covers(Estimate(math.nan, low, high), 0.6), _covers(now, 0.6)

    return simulate


def _missing(a: int, s: int, draw: Draw, by_own_score: bool) -> Callable[..., tuple[Outcome, Outcome]]:
    """Before: means over the selections that all have finished. The first algorithm's true mean is 0; half of the
    hardest cells fail, by the selection's effect or by the score itself."""

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        of_selection = draw(rng, (1, s, 1))
        own = 0.5 * draw(rng, (a, s, 1)) + 0.5 * draw(rng, (a, s, 2))
        values = np.arange(a)[:, None, None] + of_selection + own
        hardness = -of_selection - (own.mean(axis=2, keepdims=True) if by_own_score else 0)
        fails = rng.random((a, s, 1)) < 0.5 * stats.norm.cdf(2 * hardness - 1)
        table = _table(np.where(fails, np.nan, values))
        kept = table.means[0, table.is_complete]
        return _covers(t_interval(kept), 0.0), _covers(mean_scores(table)[0], 0.0)

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


def _steps(a: int) -> np.ndarray:
    """Gaps of .5 between neighbours, in standard deviations of a difference between selections."""
    return np.full(a - 1, 0.5 / math.sqrt(2 * 0.75))


def _equal_gaps(rng: np.random.Generator, a: int, s: int) -> ScoreTable:
    values = 0.5 * np.arange(a)[:, None, None] + math.sqrt(0.5) * rng.normal(size=(a, s, 1))
    return _table(values + math.sqrt(0.5) * rng.normal(size=(a, s, 2)))


def _noise(a: int) -> np.ndarray:
    """(4,000, a) standard normal; differences of neighbours have variance 1."""
    return np.random.default_rng(0).normal(size=(4_000, a)) / math.sqrt(2)


def _count(right: np.ndarray) -> float:
    """The number of selections that puts the smallest of (n, differences) noise over gap on its right side in 95 %."""
    return max(1.0, math.ceil(float(np.quantile(right.max(axis=1), 0.95)) ** 2))


def _needed(a: int, s: int) -> Callable[..., tuple[Outcome, Outcome]]:
    """Before: a value also where neighbours lie within their noise; now only a lower limit there. Whether the number
    that is printed first is right: the value within a factor of 2, the limit at most the truth."""
    noise = np.diff(_noise(a), axis=1)
    truth = _count(noise / _steps(a))

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        table = _equal_gaps(rng, a, s)
        means = table.means[np.argsort(table.means.mean(axis=1))]
        differences = np.diff(means, axis=0)
        before = _count(noise / (differences.mean(axis=1) / differences.std(axis=1, ddof=1)))
        return truth / 2 <= before <= 2 * truth, _right(selections_needed(table), truth)

    return simulate


def _needed_pair(a: int, s: int) -> Callable[..., tuple[Outcome, Outcome]]:
    """The same of the two algorithms that are nearest to each other in the table; before without a limit."""
    truth = _count(np.diff(_noise(2), axis=1) / _steps(2))

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        table = _equal_gaps(rng, a, s)
        gaps = {(p.better, p.worse): p.selections for p in selections_needed_pair(table)}
        order = [rank.algorithm for rank in separable(table).ranks]
        nearest = max((gaps[pair] for pair in pairwise(order) if pair in gaps), key=lambda count: count.low)
        differences = {pair: np.subtract(*(table.means[int(name)] for name in pair)) for pair in pairwise(order)}
        before = max((stats.norm.ppf(0.95) * d.std(ddof=1) / d.mean()) ** 2 for d in differences.values())
        return truth / 2 <= before <= 2 * truth, _right(nearest, truth)

    return simulate


def _needed_up_to_groups(a: int, s: int) -> Callable[..., tuple[Outcome, Outcome]]:
    """Whether the interval holds what the order of the groups needs that the data tell apart; before, the number for
    the whole ranking."""
    noise = _noise(a)
    whole = _count(np.diff(noise, axis=1) / _steps(a))

    def simulate(rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        table = _equal_gaps(rng, a, s)
        groups = separable_groups(separable(table))
        found = selections_needed_between(table, groups)
        before = selections_needed(table)
        if math.isnan(found.low):
            return _right(before, whole), math.nan
        pairs = [(int(x), int(y)) for better, worse in pairwise(groups) for x in better for y in worse]
        gaps = np.array([0.5 * (x - y) for x, y in pairs]) / math.sqrt(2 * 0.75)
        if (gaps <= 0).any():
            return _right(before, whole), False
        truth = _count(np.stack([noise[:, y] - noise[:, x] for x, y in pairs], axis=1) / gaps)
        return _right(before, whole), _covers(found, truth)

    return simulate


def _right(needed: Estimate, truth: float) -> bool:
    """Whether the number that is printed first is: a value within a factor of 2, or a lower limit."""
    return needed.low <= truth if math.isnan(needed.value) else truth / 2 <= needed.value <= 2 * truth
