"""Statistics of selection bias: by hand, against second implementations, and the coverage of their intervals.

Coverage is the share of 500 simulated tables whose 95 % interval holds the true value. Its own standard error is 1 %,
so 92 to 98 % is what a right interval shows. Only the lower bound is tested where an interval must hold its true value
more often: at the edge of what a parameter can be, and where a stated guarantee is for the worst case.
"""

import dataclasses
import math
from collections.abc import Callable
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from scipy import special, stats

from bench.stats.estimates import Estimate, t_interval
from bench.stats.selection_bias import (
    ScoreTable,
    adjusted,
    adjusted_scores,
    kendalls_w,
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
from scoring.errors import UserError

SIMULATIONS = 500
HONEST, EXACT = (0.92, 1.0), (0.92, 0.98)


def table(values: np.ndarray | list) -> ScoreTable:
    """Of (a, s, r), or of (a, s) with one seed."""
    values = np.asarray(values, dtype=float)
    values = values[..., None] if values.ndim == 2 else values
    a, s, _ = values.shape
    return ScoreTable(tuple("ABCDEFGHIJ"[:a]), tuple(f"draw {k}" for k in range(s)), values)


def simulated(
    rng: np.random.Generator,
    means: np.ndarray | list,
    selections: int,
    seeds: int,
    selection: float = 0.0,
    interaction: float = 0.0,
    seed: float = 0.0,
    noise: Callable[..., np.ndarray] | None = None,
) -> ScoreTable:
    """Scores with given variances; noise has mean 0 and variance 1."""
    draw = noise or (lambda size: rng.normal(size=size))
    a = len(means)
    values = np.asarray(means)[:, None, None] + math.sqrt(selection) * draw(size=(1, selections, 1))
    values = values + math.sqrt(interaction) * draw(size=(a, selections, 1))
    return table(values + math.sqrt(seed) * draw(size=(a, selections, seeds)))


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low - 1e-9 <= truth <= estimate.high + 1e-9


def assert_coverage(hits: dict[str, list[bool]], bounds: dict[str, tuple[float, float]] | tuple[float, float]) -> None:
    found = {name: float(np.mean(each)) for name, each in hits.items()}
    bounds = bounds if isinstance(bounds, dict) else dict.fromkeys(found, bounds)
    assert all(len(each) >= SIMULATIONS for each in hits.values())
    assert not {name: share for name, share in found.items() if not bounds[name][0] <= share <= bounds[name][1]}, found


# The table


def rows(values: np.ndarray) -> tuple[list[str], list[str], list[float]]:
    a, s, r = values.shape
    cells = [(i, j, k) for i in range(a) for j in range(s) for k in range(r)]
    return [f"algorithm {i}" for i, _, _ in cells], [f"draw {j}" for _, j, _ in cells], [values[c] for c in cells]


def test_a_table_is_made_of_rows_in_any_order():
    values = np.random.default_rng(0).normal(size=(3, 4, 2))
    algorithm, selection, value = rows(values)
    order = np.random.default_rng(1).permutation(len(value))
    made = ScoreTable.of(*([column[k] for k in order] for column in (algorithm, selection, value)))
    i, j = (
        [made.algorithms.index(f"algorithm {k}") for k in range(3)],
        [made.selections.index(f"draw {k}") for k in range(4)],
    )
    assert np.array_equal(np.sort(made.values[i][:, j], axis=2), np.sort(values, axis=2))
    assert made.incomplete == ()
    assert made.seeds == 2


def test_selections_that_are_not_complete_are_known():
    values = np.random.default_rng(0).normal(size=(2, 7, 2))
    values[0, 1, 0] = np.nan
    values[1, 2, 1] = np.inf
    algorithm, selection, value = rows(values)
    kept = [
        k
        for k, (name, drawn) in enumerate(zip(algorithm, selection, strict=True))
        if (name, drawn) != ("algorithm 1", "draw 3")  # a missing cell
    ]
    lost = next(k for k in kept if (algorithm[k], selection[k]) == ("algorithm 0", "draw 5"))
    kept.remove(lost)  # one seed of two
    columns = [[column[k] for k in kept] for column in (algorithm, selection, value)]
    # One seed more, for every algorithm: complete, but not like most.
    for name in ("algorithm 0", "algorithm 1"):
        for column, extra in zip(columns, (name, "draw 6", 0.5), strict=True):
            column.append(extra)
    # draws 0 and 4 are left, and a new one.
    for name in ("algorithm 0", "algorithm 1"):
        for _ in range(2):
            for column, extra in zip(columns, (name, "draw 7", 0.5), strict=True):
                column.append(extra)
    made = ScoreTable.of(*columns)
    assert made.complete.selections == ("draw 0", "draw 4", "draw 7")
    assert made.incomplete == ("draw 1", "draw 2", "draw 3", "draw 5", "draw 6")
    assert made.complete.values.shape == (2, 3, 2)
    # All are kept for what needs one algorithm or two.
    assert made.values.shape == (2, 8, 3)
    assert np.isnan(made.means[1, 3])
    assert made.means[0, 1] == values[0, 1, 1]


def test_what_cannot_be_compared_is_one_clear_line():
    with pytest.raises(UserError, match=r"number of algorithms with scores: 1 \(GA\); expected at least 2") as found:
        ScoreTable.of(["GA"] * 3, ["a", "b", "c"], [1, 2, 3])
    assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="selections that GA shares with another algorithm: 2; expected at least 3"):
        ScoreTable.of(["GA", "NPO"] * 2 + ["GA"], ["a", "a", "b", "b", "c"], [1, 2, 3, 4, 5])
    with pytest.raises(UserError, match="A, B, C, D are of groups that have no selection in common"):
        ScoreTable.of(list("ABCD" * 3), [name + str(k) for k in range(3) for name in "xxyy"], range(12))
    some = ScoreTable.of(list("ABBCAC" * 3), [name + str(k) for k in range(3) for name in "xxyyzz"], range(18))
    with pytest.raises(UserError, match=r"complete selections: 0 \(9 are not: x0, .*\); expected at least 3") as found:
        variance_shares(some)
    assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="number of algorithms with scores: 0"):
        ScoreTable.of([], [], [])
    with pytest.raises(UserError, match="shares with another algorithm: 0"):
        ScoreTable.of(["GA", "NPO"], ["a", "b"], [1, 2])
    with pytest.raises(UserError, match="probability is 95: expected a number between 0 and 1"):
        selections_needed(table([[1, 2, 3], [2, 3, 5]]), probability=95)
    with pytest.raises(ValueError, match="different lengths"):
        ScoreTable.of(["GA", "NPO"], ["a"], [1.0])


# Missing runs


def test_means_over_selections_that_an_algorithm_has_no_run_on_by_hand():
    # A = 0, B = 1, C = 3 and selections 0, -1, -4, -7, each sum a cell: without noise, the fit is exact. A and B lack
    # the hardest, and C the easiest.
    cells = np.add.outer([0.0, 1, 3], [0.0, -1, -4, -7, 2])
    cells[:2, 3] = cells[2, 4] = np.nan
    y = table(cells)
    assert [mean.value for mean in mean_scores(y)] == pytest.approx([-2, -1, 1])
    assert [mean.value for mean in mean_scores(table(cells[:, :3]))] == pytest.approx(cells[:, :3].mean(axis=1))
    assert [rank.algorithm for rank in separable(y).ranks] == ["C", "B", "A"]
    assert np.nanmean(cells[2]) < np.nanmean(cells[1])  # as C alone has finished the hardest
    # Each pair is compared on what both have.
    differences = {(r.better, r.worse): r.difference.value for r in reversal_rates(y)}
    assert differences == pytest.approx({("B", "A"): 1, ("C", "A"): 3, ("C", "B"): 2})
    # Without the one selection that links A and B to C and D, how far these lie from those is not known.
    cells = np.add.outer([0.0, 1, 3, 4], np.arange(7.0))
    cells[:2, 4:] = cells[2:, :3] = np.nan
    linked = mean_scores(table(cells))
    assert [mean.value for mean in linked] == pytest.approx([3, 4, 6, 7])
    assert math.isnan(linked[0].low)
    assert math.isnan(linked[3].high)


def test_intervals_of_means_are_the_jackknifes():
    cells = np.random.default_rng(0).normal(size=(3, 7))
    cells[0, 1] = cells[2, 4] = np.nan
    cells[:, 6] = np.nan  # a selection without any run
    without = np.array([[mean.value for mean in mean_scores(table(np.delete(cells, j, axis=1)))] for j in range(7)])
    error = np.sqrt(6 / 7 * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    half = [(mean.high - mean.low) / 2 for mean in mean_scores(table(cells))]
    assert half == pytest.approx(stats.t.ppf(0.975, [4, 5, 4]) * error)


def missing_where_hard(rng: np.random.Generator, y: ScoreTable) -> ScoreTable:
    """Runs fail the more often, the harder the selection (the lower its mean), by themselves."""
    hardness = -stats.zscore(y.means.mean(axis=0))
    fails = rng.random(y.means.shape) < 0.5 * special.ndtr(2 * hardness - 1)
    return dataclasses.replace(y, values=np.where(fails[..., None], np.nan, y.values))


def test_runs_that_fail_on_hard_selections_do_not_move_means():
    # Over complete selections, the means are off by .4 standard deviations of a selection, and cover 50 % or less.
    rng, hits, off, off_complete = np.random.default_rng(0), {name: [] for name in "ABC"}, [], []
    for _ in range(SIMULATIONS):
        y = missing_where_hard(rng, simulated(rng, [0, 1, 2], 24, 2, 1.0, 0.2, 0.3))
        for k, (name, mean) in enumerate(zip("ABC", mean_scores(y), strict=True)):
            hits[name].append(covers(mean, k))
            off.append(mean.value - k)
            off_complete.append(float(y.complete.means[k].mean()) - k)
    assert abs(np.mean(off)) < 0.05 < 0.25 < np.mean(off_complete)
    assert_coverage(hits, EXACT)


# Variance shares


def test_variance_shares_by_hand():
    # Cells of two algorithms (rows) on three selections, each with runs at -1 and +1 around it:
    #   10 11 15      row means 12 and 9; column means 8, 11, 12.5; grand mean 10.5 (0 of interaction: 9.5 12.5 14)
    #    6 11 10
    # MS_A = 3 * 2 * (1.5² + 1.5²) / 1 = 27
    # MS_S = 2 * 2 * (2.5² + 0.5² + 2²) / 2 = 4 * 10.5 / 2 = 21
    # Interaction of the first row: 10 - 9.5, 11 - 12.5, 15 - 14 = 0.5, -1.5, 1; of the second the opposite.
    # MS_I = 2 * 2 * (0.25 + 2.25 + 1) / 2 = 7;  MS_e = 6 cells * 2 / 6 = 2
    # Variances: A (27 - 7) / 6 = 10/3, S (21 - 7) / 4 = 3.5, I (7 - 2) / 2 = 2.5, e 2; the sum is 34/3.
    cells = np.array([[10, 11, 15], [6, 11, 10]])
    found = variance_shares(table(np.stack([cells - 1, cells + 1], axis=2)))
    assert [part.value * 34 / 3 for part in found.parts.values()] == pytest.approx([10 / 3, 3.5, 2.5, 2])
    assert list(found.parts) == ["algorithm", "selection", "algorithm×selection", "seed"]
    assert found.within_algorithm.value == pytest.approx((3.5 + 2.5) / 8)
    assert found.within_algorithm_common.value == pytest.approx(3.5 / 8)
    # With one seed, MS are halved: A (13.5 - 3.5) / 3 = 10/3, the rest 3.5; the 3.5 of S may be the seed's.
    found = variance_shares(table(cells))
    assert [part.value * 31 / 3 for part in found.parts.values()] == pytest.approx([10 / 3, 3.5])
    assert list(found.parts) == ["algorithm", "algorithm×selection + seed"]
    assert found.seed is None
    unknown = found.selection, found.within_algorithm, found.within_algorithm_common
    assert all(math.isnan(share.value) for share in unknown)


def test_a_seed_that_algorithms_share_is_not_booked_as_selection():
    # The cells above, runs at -3 and +3 for both algorithms on every selection, and -1 and +1 around that, opposite:
    # MS_R = 2 * 6 * 9 / 3 = 36;  MS_e = 12 * 1 / 3 = 4;  MS_A, MS_S, MS_I as above
    # S (21 - 36 - 7 + 4) / 4 < 0, so 0;  R (36 - 4) / 2 = 16;  I (7 - 4) / 2 = 1.5;  e 4;  A 10/3
    cells = np.array([[10, 11, 15], [6, 11, 10]], dtype=float)
    runs = np.stack([cells - 3, cells + 3], axis=2) + np.array([1.0, -1.0])[:, None, None] * np.array([1.0, -1.0])
    columns = (list(column) for column in rows(runs))
    found = variance_shares(ScoreTable.of(*columns, seed=[0, 1] * 6))
    total = 10 / 3 + 16 + 1.5 + 4
    assert [part.value * total for part in found.parts.values()] == pytest.approx([10 / 3, 0, 16, 1.5, 4])
    assert found.within_algorithm.value == 0  # (21 + 7) / 2 between selections, (36 + 4) / 2 between seeds
    # As seeds of their own they would be (36 * 3 + 4 * 3) / 6 = 20 of the seed, 3.5 of the selection.
    apart = variance_shares(ScoreTable.of(*rows(runs), seed=range(12)))
    assert apart.common_seed is None
    assert apart.selection.value > 0.1


@pytest.mark.parametrize("long_tails", [False, True])
def test_no_selection_effect_is_claimed_where_seeds_are_shared(long_tails):
    rng, claims = np.random.default_rng(0), {True: 0, False: 0}
    tails = (lambda size: rng.standard_t(3, size) / math.sqrt(3)) if long_tails else None
    for _ in range(200):
        runs = simulated(rng, [0, 1, 2, 3], 24, 3, 0.0, 0.2, 0.3, tails).values + rng.normal(size=(1, 24, 3))
        for shared in claims:
            known = dataclasses.replace(table(runs), seeds_shared=shared)
            claims[shared] += variance_shares(known).selection.low > 0
    assert claims[True] <= 0.05 * 200 < 0.5 * 200 < claims[False]


def test_within_algorithm_is_the_correlation_of_seeds_and_of_algorithms():
    # With many selections, the correlation of columns of the table says the same, without mean squares.
    found = simulated(np.random.default_rng(0), [0, 5], 1500, 2, selection=1, interaction=0.5, seed=0.5)
    y = found.values - found.values.mean(axis=(1, 2), keepdims=True)
    shares = variance_shares(found)
    seeds = np.corrcoef(np.concatenate([y[0], y[1]]).T)[0, 1]
    assert shares.within_algorithm.value == pytest.approx(seeds, abs=0.01)
    assert shares.within_algorithm_common.value == pytest.approx(
        np.corrcoef(y[0].ravel(), y[1].ravel())[0, 1], abs=0.01
    )


def test_shares_where_something_does_not_vary():
    y = simulated(np.random.default_rng(0), [0, 1, 2], 10, 1, selection=1, interaction=0.5).values
    no_noise = variance_shares(table(np.repeat(y, 3, axis=2)))
    assert no_noise.seed == Estimate(0, 0, 0)
    assert no_noise.within_algorithm == Estimate(1, 1, 1)
    assert no_noise.within_algorithm_common.high < 1
    additive = variance_shares(table(np.repeat((np.arange(3)[:, None] + np.arange(8.0) ** 2)[..., None], 2, axis=2)))
    assert additive.interaction.value == 0
    assert additive.within_algorithm_common.value == 1
    constant = variance_shares(table(np.full((3, 5, 2), 0.3)))
    assert all(math.isnan(part.value) for part in constant.parts.values())


def apart(a: int, variance: float) -> np.ndarray:
    """Means of fixed algorithms at equal distances, with that mean square."""
    means = np.arange(a, dtype=float)
    return means * math.sqrt(variance) / means.std(ddof=1)


@pytest.mark.parametrize(
    ("a", "s", "r", "algorithm", "selection", "interaction", "seed"),
    [
        (3, 20, 2, 1.0, 1.0, 0.5, 0.5),
        pytest.param(5, 40, 3, 0.5, 0.6, 0.3, 0.4, marks=pytest.mark.slow),
        pytest.param(10, 5, 3, 0.2, 2.0, 0.3, 0.3, marks=pytest.mark.slow),
        pytest.param(3, 24, 3, 1.0, 0.0, 0.1, 1.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("common_seed", [0.0, 0.5])
def test_intervals_of_variance_shares_cover(a, s, r, algorithm, selection, interaction, seed, common_seed):
    within = selection + common_seed + interaction + seed
    total = algorithm + within
    truths = {
        "algorithm": algorithm / total,
        "selection": selection / total,
        "interaction": interaction / total,
        "seed": seed / total,
        "within_algorithm": (selection + interaction) / within,
        "within_algorithm_common": selection / within,
    } | ({"common_seed": common_seed / total} if common_seed else {})
    hits: dict[str, list[bool]] = {name: [] for name in truths}
    rng, refused = np.random.default_rng(0), 0
    for _ in range(SIMULATIONS):
        y = simulated(rng, apart(a, algorithm), s, r, selection, interaction, seed).values
        y = y + math.sqrt(common_seed) * rng.normal(size=(1, s, r))
        found = variance_shares(dataclasses.replace(table(y), seeds_shared=common_seed > 0))
        refused += found.long_tails != ""
        for name, truth in truths.items():
            share = getattr(found, name)
            hits[name].append(math.isnan(share.low) or covers(share, truth))
    assert refused < 0.1 * SIMULATIONS
    assert_coverage(hits, HONEST)  # more than 95 % with few selections, and where a part is 0


def test_the_interval_within_algorithms_is_the_jackknifes_or_that_of_normal_scores():
    # Correlation of two seeds: (F - 1) / (F + 1) with F the variance of an algorithm's means over selections, times 2,
    # over that of the seeds. The interval is a t interval of log F, done again without each of 12 selections.
    y = simulated(np.random.default_rng(0), [0, 1, 2], 12, 2, selection=1, interaction=0.5, seed=0.5).values
    unlike = y.copy()
    unlike[:, 0] += 5  # the jackknife's standard error is the larger one

    def log_ratio(runs: np.ndarray) -> float:
        return math.log(2 * runs.mean(axis=2).var(axis=1, ddof=1).mean() / runs.var(axis=2, ddof=1).mean())

    def jackknife(runs: np.ndarray) -> float:
        each = np.array([log_ratio(np.delete(runs, k, axis=1)) for k in range(12)])
        return math.sqrt(11 / 12 * ((each - each.mean()) ** 2).sum())

    def normal(runs: np.ndarray) -> float:
        # Of log(MS_S + 2 MS_I) - log(MS_e), with 11, 22 and 36 degrees of freedom.
        cells = runs.mean(axis=2)
        of_selection = 6 * cells.mean(axis=0).var(ddof=1)
        of_both = 3 * cells.var(axis=1, ddof=1).mean() * 2 - of_selection
        shares = np.array([of_selection, of_both]) / (of_selection + of_both)
        return math.sqrt((shares**2 * special.polygamma(1, [5.5, 11])).sum() + special.polygamma(1, 18))

    for runs, error in ((y, normal(y)), (unlike, jackknife(unlike))):
        assert error == max(normal(runs), jackknife(runs))
        half = stats.t.ppf(0.975, 11) * error
        expected = [(f - 1) / (f + 1) for f in np.exp(log_ratio(runs) + np.array([0, -half, half]))]
        for shared in (False, True):  # the seed's own variance is what is left over, whatever it is shared by
            shares = variance_shares(dataclasses.replace(table(runs), seeds_shared=shared))
            found, expected[2] = shares.within_algorithm, 1.0 if shares.long_tails else expected[2]
            # Normal seeds that are shared are two mean squares, whose logarithms vary a little more than that of one.
            tolerance = 0.01 if shared and error == normal(runs) else 1e-9
            assert [found.value, found.low, found.high] == pytest.approx(expected, abs=tolerance)


def test_with_long_tails_there_are_lower_limits_only_and_they_hold():
    # With both limits, 73 to 90 % would cover.
    rng = np.random.default_rng(0)
    hits: dict[str, list[bool]] = {"selection": [], "within_algorithm": [], "within_algorithm_common": []}
    truths = {"selection": 1 / 2.7, "within_algorithm": 1.2 / 1.7, "within_algorithm_common": 1 / 1.7}
    refused = 0

    def outliers(size: tuple[int, ...]) -> np.ndarray:
        return rng.normal(size=size) * np.where(rng.random(size) < 0.1, 5, 1) / math.sqrt(3.4)

    for _ in range(SIMULATIONS):
        found = variance_shares(simulated(rng, apart(4, 1.0), 24, 3, 1.0, 0.2, 0.5, noise=outliers))
        refused += found.long_tails != ""
        for name, truth in truths.items():
            share = getattr(found, name)
            hits[name].append(covers(share, truth))
            assert (share.high == 1) >= (found.long_tails != "")
        assert math.isnan(found.algorithm.low) == math.isnan(found.seed.high) == (found.long_tails != "")
    assert refused > 0.9 * SIMULATIONS
    assert_coverage(hits, (0.95, 1.0))


def test_where_tails_are_long_is_named():
    runs = simulated(np.random.default_rng(0), [0, 1, 2], 20, 3, 1.0, 0.3, 0.3).values
    assert variance_shares(table(runs)).long_tails == ""
    far = runs.copy()
    far[:, 4] += 12
    assert variance_shares(table(far)).long_tails == "selection"
    far[1, 7, 2] += 12
    assert variance_shares(table(far)).long_tails == "selection, algorithm×selection and seed"
    # With so few, one far selection is nothing unusual.
    assert variance_shares(table(far[:, :4])).long_tails == ""


# Reversals


def test_reversal_rates_by_hand():
    # B - A is 3, 1, -1, 0, 2 on five selections: B is better by 1 on average; A is ahead once and ties once, 1.5 / 5.
    # Runs are at ± 0.5 around these (variance 0.5) for A, and equal for B: Φ(-1 / sqrt((0.5 + 0) / 2)) = Φ(-2).
    centre = np.array([[1, 2, 3, 4, 5], [4, 3, 2, 4, 7.0]])
    spread = np.array([0.5, 0.0])[:, None]
    (found,) = reversal_rates(table(np.stack([centre - spread, centre + spread], axis=2)))
    assert (found.better, found.worse) == ("B", "A")
    assert found.rate.value == pytest.approx(0.3)
    assert found.by_seeds == pytest.approx(stats.norm.cdf(-2))
    paired = stats.ttest_rel(centre[1], centre[0])
    assert found.difference.value == pytest.approx(1)
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(paired.confidence_interval()))
    # 0 is in it, so which is worse is open, and the interval is Wilson's in both directions.
    assert found.difference.low < 0
    one_way = wilson(1.5, 5)
    assert (found.rate.low, found.rate.high) == pytest.approx((one_way.low, max(one_way.high, 1 - one_way.low)))
    # Far apart, it is Wilson's.
    (found,) = reversal_rates(table([[1, 2, 3, 4, 5], [4, 6, 5, 8, 9]]))
    assert found.rate == wilson(0, 5)
    assert found.by_seeds is None


def test_wilson_is_scipys_but_next_to_0_and_1():
    for successes in range(3, 18):
        expected = stats.binomtest(successes, 20).proportion_ci(method="wilson")
        found = wilson(successes, 20)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    # One of 20: e^-λ = 0.95, over 20.
    assert wilson(1, 20).low == pytest.approx(-math.log(0.95) / 20)
    assert wilson(19, 20).high == pytest.approx(1 + math.log(0.95) / 20)
    assert (wilson(0, 20).low, wilson(20, 20).high) == (0, 1)


def test_wilson_covers_each_proportion():
    # Exactly, from the binomial distribution. It is discrete: single proportions can be off more than 2 %.
    for trials in (20, 40):
        intervals = [wilson(successes, trials) for successes in range(trials + 1)]
        low, high = np.array([(found.low, found.high) for found in intervals]).T
        p = np.linspace(0.001, 0.999, 999)[:, None]
        held = (low <= p) & (p <= high)
        coverage = (stats.binom.pmf(np.arange(trials + 1), trials, p) * held).sum(axis=1)
        assert coverage.min() > 0.915
        assert 0.94 < coverage.mean() < 0.965


@pytest.mark.parametrize("tails", ["normal", "skewed"])
@pytest.mark.parametrize("gap", [0.02, 0.3, 0.8])
def test_intervals_of_reversal_rates_cover(tails, gap):
    # B is better by `gap`. The difference of two exponentials' scores is B's alone: long on one side.
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(1000):
        noise = rng.normal(size=24) if tails == "normal" else rng.exponential(size=24) - 1
        (found,) = reversal_rates(table([np.zeros(24), gap + noise]))
        hits.append(
            covers(found.rate, stats.norm.cdf(-gap) if tails == "normal" else 1 - math.exp(gap - 1) ** (gap < 1))
        )
    # Where the direction is open, the interval holds two; it must hold the right one.
    assert_coverage({"rate": hits}, HONEST if gap < 0.5 else EXACT)


# Kendall's W


def test_kendalls_w_is_friedmans():
    y = simulated(np.random.default_rng(0), [0, 0.3, 0.5, 1], 12, 2, selection=1, interaction=1)
    w = stats.friedmanchisquare(*y.means).statistic / (12 * 3)
    found = kendalls_w(y)
    assert found.w == pytest.approx(w)
    assert found.agreement.value == pytest.approx((12 * w - 1) / 11)
    # The mean Spearman correlation of two selections.
    correlations = [stats.spearmanr(y.means[:, j], y.means[:, k]).statistic for j, k in combinations(range(12), 2)]
    assert found.agreement.value == pytest.approx(np.mean(correlations))
    # With ties of two and of three.
    values = np.random.default_rng(1).integers(0, 3, (4, 9)).astype(float) + np.arange(4)[:, None]
    assert kendalls_w(table(values)).w == pytest.approx(stats.friedmanchisquare(*values).statistic / (9 * 3))


def test_kendalls_w_by_hand_and_at_its_ends():
    # Ranks 1 2 3, 1 2 3, 1 3 2: rank sums 3, 7, 8; W = 12 (3² + 1² + 2²) / (9 (27 - 3)) = 168 / 216.
    assert kendalls_w(table([[1, 1, 1], [2, 2, 3], [3, 3, 2]])).w == pytest.approx(168 / 216)
    rng = np.random.default_rng(0)
    agreed = kendalls_w(table(np.arange(3)[:, None] + 0.1 * rng.normal(size=(3, 10))))
    assert (agreed.w, agreed.agreement.value, agreed.agreement.high) == pytest.approx((1, 1, 1))
    assert 0.5 < agreed.agreement.low < 1  # ten selections that agree do not show that all do
    opposed = kendalls_w(table([[1, 2, 1, 2], [2, 1, 2, 1.5]]))
    assert (opposed.w, opposed.agreement.value, opposed.agreement.low) == (0, 0, 0)
    assert opposed.agreement.high > 0.2
    same = kendalls_w(table(np.tile(np.arange(6.0), (3, 1))))
    assert math.isnan(same.w)
    # Two algorithms that are one, and a third that differs: W is 1, since selections agree in all they can.
    y = rng.normal(size=12)
    twins = kendalls_w(table([y, y, y + 1 + 0.1 * rng.normal(size=12)]))
    assert (twins.w, twins.agreement.high) == pytest.approx((1, 1))
    # The twins count once: W and its interval are those of two algorithms, up to the draws.
    other = y + 0.5 + rng.normal(size=12)
    pair, twins = kendalls_w(table([y, other]), draws=4000), kendalls_w(table([y, y, other]), draws=4000)
    assert twins.w == pytest.approx(pair.w)
    assert (twins.agreement.low, twins.agreement.high) == pytest.approx(
        (pair.agreement.low, pair.agreement.high), abs=0.03
    )


def true_agreement(means: list[float], variance: float) -> float:
    """Mean ranks from P(i ahead of j), for independent normal scores."""
    a = len(means)
    ahead = stats.norm.cdf(np.subtract.outer(means, means) / math.sqrt(2 * variance))
    ranks = ahead.sum(axis=1) + 0.5
    return float(12 * ((ranks - (a + 1) / 2) ** 2).sum() / (a**3 - a))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("means", "s", "bounds"),
    [
        ([0, 0.5, 1.0], 20, EXACT),
        ([0, 0.4, 0.8, 1.2, 1.6], 30, EXACT),
        ([0, 0, 0, 0], 20, HONEST),  # agreement 0 cannot be missed from above
    ],
)
def test_the_interval_of_agreement_covers(means, s, bounds):
    truth = true_agreement(means, 0.5 + 0.5 / 2)
    rng, hits, values = np.random.default_rng(0), [], []
    for number in range(SIMULATIONS):
        found = kendalls_w(simulated(rng, means, s, 2, 1.0, 0.5, 0.5), draws=150, seed=number)
        hits.append(covers(found.agreement, truth))
        values.append((s * found.w - 1) / (s - 1))
    assert_coverage({"agreement": hits}, bounds)
    # W is (1 - agreement) / s too large; the agreement is not.
    assert np.mean(values) == pytest.approx(truth, abs=0.012)


def test_reversals_are_corrected_over_pairs_and_can_be_shown_to_be_rare():
    # A is 0; B is 10 ± 1; C is 0.5 ahead on 9 of 12 selections and 1 behind on 3, with almost no noise of seeds.
    b = 10 + np.tile([-1.0, 1.0], 6)
    c = np.tile([0.5, 0.5, 0.5, -1.0], 3) + 0.6
    runs = np.stack([np.zeros(12), b, c])[..., None] + np.array([-1e-3, 1e-3])
    found = {(r.better, r.worse): r for r in reversal_rates(table(runs))}
    # Of B and A: t = 10 / (1.0445 / sqrt(12)); the limit is where P(t' >= t) is 2.5 % / 3.
    sd = b.std(ddof=1)
    apart = -stats.norm.ppf(found["B", "A"].at_most) * math.sqrt(12)
    assert stats.nct.sf(10 / sd * math.sqrt(12), 11, apart) == pytest.approx(0.025 / 3, rel=0.01)
    assert found["B", "A"].at_most < 0.05 < found["C", "A"].at_most
    # C is behind A on 3 selections, which no seed explains; the t test is the larger p, corrected as the least of 3.
    assert found["C", "A"].rate.value == 3 / 12
    p = stats.ttest_1samp(c, 0).pvalue
    assert found["C", "A"].p_value == pytest.approx(3 * p)
    assert found["B", "A"].p_value == 1
    assert math.isnan(reversal_rates(table(runs[..., :1]))[0].p_value)


# Selections needed


def test_selections_needed_by_brute_force():
    y = simulated(np.random.default_rng(3), [0, 0.9, 2.0, 2.8], 30, 2, selection=1, interaction=1)
    needed = selections_needed(y, probability=0.9).value
    means = y.means - y.means.mean(axis=0)  # what a selection adds to all changes no order
    rng = np.random.default_rng(0)
    noise = rng.multivariate_normal(np.zeros(4), np.cov(means), size=200_000)
    order = np.argsort(means.mean(axis=1))

    def right(n: float) -> float:
        drawn = means.mean(axis=1) + noise / math.sqrt(n)
        return float((np.diff(drawn[:, order], axis=1) > 0).all(axis=1).mean())

    assert right(1.03 * needed) > 0.9 > right(0.97 * (needed - 1))


def test_selections_needed_of_a_pair_is_in_closed_form():
    # Differences 0, 1, 2, 3, 4: mean 2, variance 2.5; (1.6449 / 2)² 2.5 = 1.69, so 2; (3.0902 / 2)² 2.5 = 5.97, so 6.
    y = table([np.zeros(5), np.arange(5.0)])
    assert selections_needed(y).value == 2
    assert selections_needed(y, probability=0.999).value == 6
    (pair,) = selections_needed_pair(y, probability=0.999)
    assert (pair.better, pair.worse, pair.selections) == ("B", "A", selections_needed(y, probability=0.999))
    # Limits of the noncentral t: it is 2 / sqrt(2.5 / 5) = 2.83, with 4 degrees of freedom. The smallest whole n is
    # on one side of the limit, and n - 1 on the other.
    for n, tail in ((pair.selections.low, 0.025), (pair.selections.high, 0.975)):
        noncentralities = math.sqrt(5) * stats.norm.ppf(0.999) / np.sqrt([n, n - 1])
        at, before = stats.nct.cdf(2 / math.sqrt(0.5), 4, noncentralities)
        assert at > tail - 1e-4 > before - 1e-4


def test_selections_needed_says_where_no_number_suffices():
    rng = np.random.default_rng(0)
    y = rng.normal(size=20)
    # The same algorithm twice.
    twins = table([y, y, y + 1 + rng.normal(size=20)])
    assert selections_needed(twins) == Estimate(math.inf, math.inf, math.inf)
    pairs = {(pair.better, pair.worse): pair.selections for pair in selections_needed_pair(twins)}
    assert pairs["A", "B"].value == math.inf
    assert pairs["C", "A"].value < 100
    # A constant apart: one selection shows it, whatever it adds to both.
    assert selections_needed(table([y, y + 0.1])) == Estimate(1, 1, 1)
    mixed = table([y, y + 0.1, y + 1 + rng.normal(size=20)])
    assert selections_needed(mixed) == selections_needed_pair(mixed)[2].selections
    # Not separable by a t test: no number of selections is known to be enough.
    near = table([y, y + 0.1 + rng.normal(size=20)])
    assert not reversal_rates(near)[0].difference.sign
    needed = selections_needed(near)
    assert math.isnan(needed.value)
    assert (math.isfinite(needed.low), needed.high) == (True, math.inf)


def test_selections_needed_up_to_groups():
    # A and B differ by noise alone, C is 3 below them, D and E 3 below C and equal.
    rng = np.random.default_rng(0)
    y = table(np.array([6.0, 6.0, 3.0, 0.0, 0.0])[:, None] + 1.5 * rng.normal(size=(5, 20)))
    ranking = separable(y)
    groups = separable_groups(ranking)
    assert [set(group) for group in groups] == [{"A", "B"}, {"C"}, {"D", "E"}]
    found = selections_needed_between(y, groups)
    assert math.isnan(selections_needed(y).value)
    assert math.isfinite(found.high)
    # As brute force has it: the smallest n after which both of a group are ahead of all of the next.
    noise = rng.multivariate_normal(np.zeros(5), np.cov(y.means), size=100_000)
    means = y.means.mean(axis=1)

    def right(n: float) -> float:
        drawn = means + noise / math.sqrt(n)
        return float(((drawn[:, :2].min(axis=1) > drawn[:, 2]) & (drawn[:, 2] > drawn[:, 3:].max(axis=1))).mean())

    assert right(found.value) > 0.95 > right(found.value - 1) or found.value == 1
    # Groups of one are the ranking; one group needs nothing.
    order = [rank.algorithm for rank in ranking.ranks]
    assert selections_needed_between(y, [[name] for name in order]).low == selections_needed(y).low
    assert math.isnan(selections_needed_between(y, [order]).value)


def true_needed(means: list[float], variance: float) -> float:
    """By numeric integration of the normal distribution, for independent scores."""
    apart = np.diff(np.sort(means)) / math.sqrt(2 * variance)
    if not apart.all():
        return math.inf
    if len(apart) == 1:
        return math.ceil((stats.norm.ppf(0.95) / apart[0]) ** 2)
    correlation = np.eye(len(apart)) - 0.5 * (np.eye(len(apart), k=1) + np.eye(len(apart), k=-1))
    normal = stats.multivariate_normal(cov=correlation)
    low, high = 0, 10_000
    while high - low > 1:
        n = (low + high) // 2
        low, high = (low, n) if normal.cdf(math.sqrt(n) * apart) >= 0.95 else (n, high)
    return high


@pytest.mark.slow
@pytest.mark.parametrize(
    ("means", "s", "bounds"),
    [
        ([0, 0.7], 20, EXACT),
        ([0, 0.7], 40, EXACT),
        ([0, 0], 20, EXACT),
        # All limits at once are more than is needed, most where several neighbours are equally near.
        ([0, 0.6, 1.2, 1.8], 30, HONEST),
        ([0, 1, 1], 30, HONEST),
    ],
)
def test_the_interval_of_selections_needed_covers(means, s, bounds):
    truth = true_needed(means, 0.5 + 0.5 / 2)
    rng, hits, found = np.random.default_rng(0), [], []
    for _ in range(SIMULATIONS):
        found.append(selections_needed(simulated(rng, means, s, 2, 1.0, 0.5, 0.5)))
        hits.append(covers(found[-1], truth))
    assert_coverage({"needed": hits}, bounds)
    # Covering is no merit of an interval that says nothing.
    assert np.median([each.low for each in found]) > 0.1 * min(truth, 50)


# Scores at equal difficulty


def long_form(table: ScoreTable) -> tuple[list[str], list[str], list[float]]:
    cells = [(i, j, k) for i, j, k in np.ndindex(*table.values.shape)]
    return (
        [table.algorithms[i] for i, _, _ in cells],
        [table.selections[j] for _, j, _ in cells],
        [float(table.values[cell]) for cell in cells],
    )


def test_with_all_selections_for_all_adjusted_scores_are_the_raw_ones():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=15)
    y = table(simulated(rng, [0, 1, 2], 15, 2, 0.1, 0.1, 0.1).values - difficulty[:, None])
    algorithm, selection, value = long_form(y)
    by_name = dict(zip(y.selections, difficulty, strict=True))
    found = adjusted_scores(algorithm, [by_name[drawn] for drawn in selection], value, selection)
    assert found.difficulty == pytest.approx(difficulty.mean())
    for score, mean in zip(found.scores, y.means.mean(axis=1), strict=True):
        assert score.raw.value == pytest.approx(mean)
        assert score.adjusted.value == pytest.approx(mean)
        assert score.selections == 15
        # What difficulty explains is no longer in doubt.
        assert score.adjusted.high - score.adjusted.low < 0.7 * (score.raw.high - score.raw.low)
    # The slope is that of the selections' means.
    assert found.slope.value == pytest.approx(stats.linregress(difficulty, y.means.mean(axis=0)).slope)


def test_adjusted_scores_by_hand():
    # A on difficulties 0 and 2, scores 1 and 5; B on 4 and 6, scores 6 and 10. Within both, +2 per unit. The mean
    # difficulty is 3. A: mean 3 at 1, so 3 + 2 * 2 = 7. B: mean 8 at 5, so 8 - 2 * 2 = 4. B's draw was the better one.
    found = adjusted_scores(["A", "A", "B", "B"], [0, 2, 4, 6], [1, 5, 6, 10], ["a", "b", "c", "d"])
    assert (found.difficulty, found.slope.value) == pytest.approx((3, 2))
    assert [score.raw.value for score in found.scores] == pytest.approx([3, 8])
    assert [score.adjusted.value for score in found.scores] == pytest.approx([7, 4])
    (difference,) = found.differences
    assert (difference.first, difference.second, difference.difference.value) == ("A", "B", pytest.approx(3))
    # Repeats of a cell count once: their mean.
    again = adjusted_scores(["A", "A", "A", "B", "B"], [0, 0, 2, 4, 6], [0, 2, 5, 6, 10], ["a", "a", "b", "c", "d"])
    assert [score.adjusted.value for score in again.scores] == pytest.approx([7, 4])


@pytest.mark.parametrize("longest", [adjusted.LONGEST, 1])
def test_adjusted_intervals_are_the_jackknifes(longest, monkeypatch):
    # Against least squares done again without each selection.
    monkeypatch.setattr(adjusted, "LONGEST", longest)
    rng = np.random.default_rng(0)
    algorithm, selection = ["A"] * 5 + ["B"] * 4 + ["C"] * 6, list("abcdefghiabcdef")
    hard = dict(zip("abcdefghi", rng.normal(size=9), strict=True))
    x = np.array([hard[drawn] for drawn in selection])
    y = rng.normal(size=15) + x
    found = adjusted_scores(algorithm, x, y, selection)

    def weights(kept: np.ndarray) -> np.ndarray:
        design = np.stack([*(np.array(algorithm) == name for name in "ABC"), x - np.mean(list(hard.values()))], axis=1)
        return np.linalg.pinv(design.astype(float) * kept[:, None])

    everyone = weights(np.full(15, True))
    changes = np.array([weights(np.array(selection) != drawn) - everyone for drawn in hard])
    whole, left_out = everyone @ y, everyone @ y + changes @ y
    error = np.sqrt(8 / 9 * ((left_out - whole) ** 2).sum(axis=0))
    estimates = [*(score.adjusted for score in found.scores), found.slope]
    assert [estimate.value for estimate in estimates] == pytest.approx(list(whole))
    in_errors = [(estimate.high - estimate.low) / 2 for estimate in estimates] / error
    # Satterthwaite's degrees of freedom, of the products of the changes' weights.
    products = [changes[:, k] @ changes[:, k].T for k in range(4)]
    df = [np.trace(each) ** 2 / (each**2).sum() for each in products]
    assert in_errors == pytest.approx(stats.t.ppf(0.975, df))
    # Between 1 and 8 degrees of freedom, which is all that nine selections can give.
    assert (in_errors > stats.t.ppf(0.975, 8)).all()
    assert (in_errors < stats.t.ppf(0.975, 1)).all()


def test_what_hangs_on_one_selection_has_no_interval():
    found = adjusted_scores(["A", "A", "A", "B"], [0, 1, 2, 5], [1, 3, 4, 7], ["a", "b", "c", "d"])
    assert math.isfinite(found.scores[0].adjusted.low)
    assert math.isfinite(found.scores[1].adjusted.value)
    assert math.isnan(found.scores[1].adjusted.low)
    assert math.isnan(found.scores[1].raw.low)
    assert math.isnan(found.differences[0].difference.low)


def test_rows_that_cannot_be_adjusted_are_one_clear_line():
    with pytest.raises(UserError, match=r"score of 'A' on selection 'b' is nan: expected a finite number"):
        adjusted_scores(["A", "A"], [0, 1], [1, math.nan], ["a", "b"])
    with pytest.raises(UserError, match=r"selection 'a' has the difficulties 0.0 and 1: expected one"):
        adjusted_scores(["A", "B"], [0, 1], [1, 2], ["a", "a"])
    with pytest.raises(UserError, match="difficulty of 2 selections: expected one algorithm with runs on two"):
        adjusted_scores(["A", "B"], [0, 1], [1, 2], ["a", "b"])
    with pytest.raises(UserError, match="difficulty of 0 selections"):
        adjusted_scores([], [], [], [])


@pytest.mark.slow
@pytest.mark.parametrize("design", ["same", "disjoint", "overlapping"])
def test_intervals_of_adjusted_scores_cover(design):
    drawn = {
        "same": [range(20)] * 3,
        "disjoint": [range(7), range(7, 20), range(20, 28)],
        "overlapping": [range(14), range(7, 20), range(10, 28)],
    }[design]
    algorithm = [name for name, used in zip("ABC", drawn, strict=True) for _ in used]
    selection = [k for used in drawn for k in used]
    names = [f"draw {k}" for k in selection]
    row = np.array(["ABC".index(name) for name in algorithm])
    hits: dict[str, list[bool]] = {name: [] for name in "ABC"} | {"slope": [], "A - B": []}
    rng = np.random.default_rng(0)
    for _ in range(SIMULATIONS):
        difficulty = rng.normal(size=28)
        x = difficulty[selection]
        middle = difficulty[sorted(set(selection))].mean()
        # A selection's own effect, beyond difficulty, moves all algorithms that were run on it.
        y = row - 0.8 * (x - middle) + 0.4 * rng.normal(size=28)[selection] + 0.4 * rng.normal(size=len(x))
        found = adjusted_scores(algorithm, x, y, names)
        for k, score in enumerate(found.scores):
            hits[score.algorithm].append(covers(score.adjusted, k))
        hits["slope"].append(covers(found.slope, -0.8))
        hits["A - B"].append(covers(found.differences[0].difference, -1))
    # The jackknife's variance is never too small on average, and a little too large for few selections.
    assert_coverage(hits, (0.92, 0.985))


# Separable algorithms


def test_separation_is_holm_of_paired_t_tests():
    y = simulated(np.random.default_rng(1), [0, 0.1, 0.9, 1.2], 20, 2, 1.0, 0.3, 0.3)
    found = separable(y)
    index = list(combinations(range(4), 2))
    p = [stats.ttest_rel(y.means[i], y.means[j]).pvalue for i, j in index]
    # Holm: the k-th smallest of six times (6 - k), and no less than the one before.
    corrected = np.empty(6)
    reached = 0.0
    for k, pair in enumerate(np.argsort(p)):
        reached = max(reached, min(1, (6 - k) * p[pair]))
        corrected[pair] = reached
    assert [pair.p_value for pair in found.pairs] == pytest.approx(list(corrected))
    assert [pair.separable for pair in found.pairs] == list(corrected < 0.05)
    assert 0 < sum(pair.separable for pair in found.pairs) < 6
    ranks = {rank.algorithm: rank for rank in found.ranks}
    for k, name in enumerate("ABCD"):
        apart = [pair for pair in found.pairs if pair.separable]
        assert ranks[name].best == 1 + sum(pair.worse == name for pair in apart)
        assert ranks[name].worst == 4 - sum(pair.better == name for pair in apart)
        expected = t_interval(y.means[k])
        found_mean = ranks[name].mean
        assert (found_mean.value, found_mean.low, found_mean.high) == pytest.approx(
            (expected.value, expected.low, expected.high)
        )
    assert [rank.mean.value for rank in found.ranks] == sorted((rank.mean.value for rank in found.ranks), reverse=True)


def test_ranks_are_written_as_what_they_can_be():
    rng = np.random.default_rng(0)
    y = rng.normal(size=20)
    found = separable(table([y, y, y - 5 + 0.1 * rng.normal(size=20), y + 0.2]))
    assert {rank.algorithm: rank.text for rank in found.ranks} == {"D": "1", "A": "2–3", "B": "2–3", "C": "4"}
    same = next(pair for pair in found.pairs if {pair.better, pair.worse} == {"A", "B"})
    assert (same.p_value, same.separable) == (1, False)


@pytest.mark.slow
@pytest.mark.parametrize("means", [[0, 0, 0, 0], [0, 0, 1, 1, 3]])
def test_false_separations_are_rare(means):
    # At least one false separation, and at least one algorithm whose rank is not in its interval.
    rng, false, wrong = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        found = separable(simulated(rng, means, 20, 2, 1.0, 0.3, 0.3))
        truth = dict(zip("ABCDE", means, strict=False))
        false += any(pair.separable and truth[pair.better] <= truth[pair.worse] for pair in found.pairs)
        for rank in found.ranks:
            above = sum(mean > truth[rank.algorithm] for mean in means)
            level = sum(mean == truth[rank.algorithm] for mean in means)
            if rank.best > above + 1 or rank.worst < above + level:
                wrong += 1
                break
    assert 10 < false < 80
    assert wrong <= false


def test_results_do_not_depend_on_the_order_of_algorithms():
    y = simulated(np.random.default_rng(0), [0, 0.6, 1.0], 15, 2, 1.0, 0.3, 0.3)
    whole = selections_needed(y)
    for order in permutations(range(3)):
        turned = ScoreTable(tuple("ABC"[k] for k in order), y.selections, y.values[list(order)])
        assert selections_needed(turned) == whole
        assert kendalls_w(turned).w == pytest.approx(kendalls_w(y).w)
        assert [rank.text for rank in separable(turned).ranks] == [rank.text for rank in separable(y).ranks]
        rates = {frozenset((pair.better, pair.worse)): pair.rate for pair in reversal_rates(turned)}
        for pair in reversal_rates(y):
            assert rates[frozenset((pair.better, pair.worse))] == pair.rate
    assert all(earlier.mean.value >= later.mean.value for earlier, later in pairwise(separable(y).ranks))
