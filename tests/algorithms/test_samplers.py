"""Samplers against probabilities worked out by hand and against the formula of successive draws."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from algorithms.samplers import ORDERS, Sampler
from scoring.errors import UserError

# Every way of drawing; the last four go in passes.
KINDS: dict[str, dict] = {
    "with": {},
    "uniform": {"alpha": 0.0},
    "hard": {"alpha": -1.0},
    "without": {"replacement": False},
    "easy-first": {"order": "easy-first"},
    "hard-first": {"order": "hard-first"},
    "random": {"order": "random"},
}
PASSES = ["without", "easy-first", "hard-first", "random"]
# Of a sound sampler, once in 10^4 choices of the seeds; those below are fixed.
RARE = 1e-4


def ids(count: int) -> list[str]:
    return [f"q{i}" for i in range(count)]


def sampler(mrd: list[float] | np.ndarray, **settings) -> Sampler:
    made = Sampler(len(mrd), **settings)
    made.set_difficulty(np.asarray(mrd), ids(len(mrd)))
    return made


def on(count: int, *, without: tuple[int, ...] = ()) -> np.ndarray:
    active = np.ones(count, dtype=bool)
    active[list(without)] = False
    return active


def some_difficulties(count: int) -> np.ndarray:
    return np.exp(np.random.default_rng(count).normal(size=count))


def run(made: Sampler, steps: range, size: int, active: np.ndarray) -> list[list[int]]:
    return [made.draw(step, size, active).tolist() for step in steps]


def p_value(counts: dict, expected: dict) -> float:
    """Chi-square of counts against probabilities of the same outcomes; an outcome of neither kind is an error."""
    assert set(counts) <= set(expected)
    total = sum(counts.values())
    outcomes = list(expected)
    return stats.chisquare([counts.get(o, 0) for o in outcomes], [expected[o] * total for o in outcomes]).pvalue


def tally(outcomes) -> dict:
    counts: dict = {}
    for outcome in outcomes:
        counts[outcome] = counts.get(outcome, 0) + 1
    return counts


# Probabilities


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1, [1 / 8, 2 / 8, 5 / 8]),
        (0, [1 / 3, 1 / 3, 1 / 3]),
        # 1, 1/2, 1/5: in tenths 10, 5, 2.
        (-1, [10 / 17, 5 / 17, 2 / 17]),
        (0.5, [1 / 4.650281539872885, 1.4142135623730951 / 4.650281539872885, 2.23606797749979 / 4.650281539872885]),
        (2, [1 / 30, 4 / 30, 25 / 30]),
    ],
)
def test_probabilities_by_hand(alpha: float, expected: list[float]):
    found = sampler([1, 2, 5], alpha=alpha).probabilities(on(3))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize(("alpha", "expected"), [(1, [1 / 6, 0, 5 / 6]), (0, [0.5, 0, 0.5]), (-1, [5 / 6, 0, 1 / 6])])
def test_a_forgotten_sample_leaves_the_sum(alpha: float, expected: list[float]):
    found = sampler([1, 2, 5], alpha=alpha).probabilities(on(3, without=(1,)))
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_the_scale_of_the_difficulties_does_not_matter():
    mrd = some_difficulties(50)
    for alpha in (1, -1, 0.3):
        plain, scaled = (sampler(mrd * scale, alpha=alpha).probabilities(on(50)) for scale in (1, 1e-9))
        np.testing.assert_allclose(plain, scaled, rtol=1e-12)


@pytest.mark.parametrize("smallest", [1e-12, 1e-70, 5e-324])
@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.filterwarnings("error")
def test_small_difficulties_and_large_exponents_do_not_overflow(smallest: float, replacement: bool):
    mrd = [smallest, 4 * smallest, 1.0]
    for alpha, first in ((-5, 0), (-300, 0), (-1e300, 0), (-1e308, 0), (300, 2), (1e308, 2)):
        made = sampler(mrd, alpha=alpha, replacement=replacement)
        found = made.probabilities(on(3))
        assert np.all(np.isfinite(found))
        assert found.sum() == pytest.approx(1)
        assert found.argmax() == first
        assert made.draw(0, 3, on(3)).shape == (3,)
    # (smallest, 4 smallest)^-5: 1024 to 1.
    expected = [1024 / 1025, 1 / 1025, (smallest * 1024 / 1025) * smallest**4]
    np.testing.assert_allclose(sampler(mrd, alpha=-5).probabilities(on(3)), expected, rtol=1e-9, atol=1e-300)


def test_a_fixed_order_has_equal_shares():
    for order in list(ORDERS)[1:]:
        found = sampler([1, 2, 5], order=order).probabilities(on(3, without=(0,)))
        np.testing.assert_allclose(found, [0, 0.5, 0.5])


# Frequencies


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(1, [1 / 6, 2 / 6, 0, 3 / 6]), (0, [1 / 3, 1 / 3, 0, 1 / 3]), (-1, [6 / 11, 3 / 11, 0, 2 / 11])],
)
def test_frequencies_with_replacement(alpha: float, expected: list[float]):
    made, active = sampler([1, 2, 9, 3], alpha=alpha, seed=1), on(4, without=(2,))
    drawn = [i for batch in run(made, range(6000), 3, active) for i in batch]
    assert p_value(tally(drawn), {i: p for i, p in enumerate(expected) if p}) > RARE


@pytest.mark.slow
def test_draws_with_replacement_are_independent():
    """All ordered pairs of a batch, equal ones too; and of successive steps."""
    p = np.array([1, 2, 5]) / 8
    expected = {(i, j): p[i] * p[j] for i in range(3) for j in range(3)}
    made = sampler([1, 2, 5], seed=2)
    assert p_value(tally(map(tuple, run(made, range(6000), 2, on(3)))), expected) > RARE
    steps = [batch[0] for batch in run(made, range(12000), 1, on(3))]
    assert p_value(tally(zip(steps[::2], steps[1::2], strict=True)), expected) > RARE


def successive(weights: np.ndarray) -> dict[tuple[int, int], float]:
    """p_i p_j / (1 - p_i) of all ordered pairs."""
    p = weights / weights.sum()
    return {(i, j): p[i] * p[j] / (1 - p[i]) for i, j in itertools.permutations(range(len(p)), 2)}


@pytest.mark.parametrize("alpha", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("sizes", [(2,), (1, 1)], ids=["one batch", "two batches"])
def test_frequencies_without_replacement(alpha: float, sizes: tuple[int, ...]):
    mrd = np.array([1.0, 2, 5, 3])
    pairs = []
    for seed in range(4000):
        made = sampler(mrd, alpha=alpha, replacement=False, seed=seed)
        pairs.append(tuple(i for step, size in enumerate(sizes) for i in made.draw(step, size, on(4)).tolist()))
    assert p_value(tally(pairs), successive(mrd**alpha)) > RARE


@pytest.mark.slow
def test_frequencies_after_a_refill():
    """Of 1, 2, 5, 3 a batch of three leaves one; it, then a successive pair of the other three."""
    mrd = np.array([1.0, 2, 5, 3])
    found: dict[int, list[tuple[int, int]]] = {i: [] for i in range(4)}
    for seed in range(6000):
        made = sampler(mrd, replacement=False, seed=seed)
        first, second = run(made, range(2), 3, on(4))
        (last,) = set(range(4)) - set(first)
        assert second[0] == last
        found[last].append((second[1], second[2]))
    for last, pairs in found.items():
        others = np.delete(np.arange(4), last)
        expected = {(others[i], others[j]): p for (i, j), p in successive(mrd[others]).items()}
        assert p_value(tally(pairs), expected) > RARE


def test_without_replacement_the_rest_of_a_pass_follows_new_difficulties():
    made = sampler([1, 1, 1, 1], replacement=False)
    (first,) = made.draw(0, 1, on(4)).tolist()
    left = [i for i in range(4) if i != first]
    mrd = np.full(4, 1e-30)
    mrd[[first, left[2]]] = 1.0
    made.set_difficulty(mrd, ids(4))
    # The one already drawn is as likely as the likeliest, and yet not drawn again in this pass.
    assert made.draw(1, 1, on(4)).tolist() == [left[2]]
    assert sorted(made.draw(2, 2, on(4)).tolist()) == left[:2]


# Passes


@pytest.mark.parametrize("kind", PASSES)
def test_an_epoch_covers_every_active_sample_once(kind: str):
    made, active = sampler(some_difficulties(12), **KINDS[kind]), on(12, without=(3, 7))
    for epoch in range(3):
        made.begin_epoch()
        drawn = [i for batch in run(made, range(5 * epoch, 5 * epoch + 5), 2, active) for i in batch]
        assert sorted(drawn) == np.flatnonzero(active).tolist()


@pytest.mark.parametrize("kind", PASSES)
def test_an_endless_stream_without_epochs_is_a_chain_of_passes(kind: str):
    """Batches of 4 over 10 samples: every two passes, 5 batches, hold each sample twice, and no batch one twice."""
    made = sampler(some_difficulties(10), **KINDS[kind])
    batches = run(made, range(40), 4, on(10))
    assert all(len(set(batch)) == 4 for batch in batches)
    for at in range(0, 40, 5):
        assert sorted(i for batch in batches[at : at + 5] for i in batch) == sorted([*range(10)] * 2)
    # The first pass by itself ends in the middle of the third batch.
    assert sorted(batches[0] + batches[1] + batches[2][:2]) == [*range(10)]


@pytest.mark.parametrize("kind", PASSES)
def test_an_epoch_that_is_cut_short_begins_anew(kind: str):
    made = sampler(some_difficulties(6), **KINDS[kind])
    made.draw(0, 4, on(6))
    made.begin_epoch()
    assert sorted(made.draw(1, 6, on(6)).tolist()) == [*range(6)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_forgotten_sample_is_never_drawn_again(kind: str):
    made, active, rng = sampler(some_difficulties(9), **KINDS[kind]), on(9), np.random.default_rng(0)
    for step in range(60):
        if step % 8 == 7:
            active[rng.choice(np.flatnonzero(active))] = False
        batch = made.draw(step, 3, active)
        assert active[batch].all()
        assert len(batch) == (3 if kind in ("with", "uniform", "hard") else min(3, active.sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_all_samplers_draw_equally_much(kind: str):
    made = sampler(some_difficulties(9), **KINDS[kind])
    for step in range(20):
        batch = made.draw(step, 4, on(9))
        assert batch.shape == (4,)
        assert batch.dtype == np.int64


@pytest.mark.parametrize("kind", PASSES)
def test_a_batch_larger_than_the_set_holds_each_sample_once(kind: str):
    made = sampler([1, 2, 5], **KINDS[kind])
    for step in range(5):
        assert sorted(made.draw(step, 7, on(3)).tolist()) == [0, 1, 2]
        assert sorted(made.draw(step, 7, on(3, without=(1,))).tolist()) == [0, 2]
    assert len(sampler([1, 2, 5]).draw(0, 7, on(3))) == 7


# Fixed orders


@pytest.mark.parametrize(("order", "expected"), [("easy-first", [2, 0, 4, 1, 3]), ("hard-first", [3, 1, 0, 4, 2])])
def test_fixed_orders_with_ties_by_position(order: str, expected: list[int]):
    made = sampler([3, 2, 7, 1, 3], order=order)
    assert made.draw(0, 5, on(5)).tolist() == expected
    # The place is kept from batch to batch, and after the last comes the first.
    made.begin_epoch()
    batches = run(made, range(5), 2, on(5))
    assert [i for batch in batches for i in batch] == expected * 2
    without = [i for i in expected if i != 4]
    assert run(made, range(2), 2, on(5, without=(4,))) == [without[:2], without[2:]]


def test_a_batch_across_the_end_of_a_pass_skips_what_it_holds():
    made = sampler([5, 4, 3], order="easy-first")
    # 0, 1, 2 | 0, 1, 2 in pairs.
    assert run(made, range(3), 2, on(3)) == [[0, 1], [2, 0], [1, 2]]
    made = sampler([5, 4, 3], order="easy-first")
    made.draw(0, 2, on(3))
    # Sample 2 ends the first pass and, easiest now, is also the first of the second: not in the same batch, but next.
    made.set_difficulty(np.array([5.0, 4, 6]), ids(3))
    assert made.draw(1, 2, on(3)).tolist() == [2, 0]
    assert made.draw(2, 2, on(3)).tolist() == [2, 1]


def test_the_replacement_setting_does_not_touch_fixed_orders():
    for order in list(ORDERS)[1:]:
        pair = [sampler(some_difficulties(7), order=order, replacement=r) for r in (True, False)]
        assert run(pair[0], range(6), 3, on(7)) == run(pair[1], range(6), 3, on(7))


def test_a_refresh_reorders_what_is_left_of_a_pass():
    made = sampler([6, 5, 4, 3, 2, 1], order="easy-first")
    assert made.draw(0, 2, on(6)).tolist() == [0, 1]
    # By index alone, the third place of the new order would be sample 3, and 5 and 4 would be left out.
    made.set_difficulty(np.array([1.0, 2, 3, 4, 5, 6]), ids(6))
    assert made.draw(1, 2, on(6)).tolist() == [5, 4]
    made.set_difficulty(np.array([9.0, 8, 1, 2, 7, 6]), ids(6))
    # What is left are 3 and 2; the next pass goes by the new order from the start.
    assert made.draw(2, 4, on(6)).tolist() == [3, 2, 0, 1]


def test_random_is_one_permutation_whatever_the_difficulties():
    made = Sampler(30, order="random", seed=3)
    first = made.draw(0, 30, on(30)).tolist()
    assert sorted(first) == [*range(30)] != first
    made.set_difficulty(some_difficulties(30), ids(30))
    made.begin_epoch()
    assert made.draw(1, 30, on(30)).tolist() == first
    active = on(30, without=(first[0], first[10]))
    assert made.draw(2, 28, active).tolist() == [i for i in first if active[i]]
    assert Sampler(30, order="random", seed=4).draw(0, 30, on(30)).tolist() != first


# Reproducibility


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_and_another_seed_does_not(kind: str):
    mrd = some_difficulties(20)
    found = [run(sampler(mrd, seed=seed, **KINDS[kind]), range(8), 3, on(20)) for seed in (5, 5, 6)]
    assert found[0] == found[1]
    assert (found[0] == found[2]) == (kind in ("easy-first", "hard-first"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_sampler_goes_on_as_if_undisturbed(kind: str):
    mrd, active = some_difficulties(11), on(11, without=(2,))
    whole = sampler(mrd, seed=7, **KINDS[kind])
    run(whole, range(6), 3, active)
    resumed = Sampler(11, seed=7, **KINDS[kind])
    # Something to overwrite.
    resumed.set_difficulty(np.ones(11), ids(11))
    resumed.draw(0, 4, on(11))
    resumed.restore(json.loads(json.dumps(whole.state())))
    assert run(whole, range(6, 12), 3, active) == run(resumed, range(6, 12), 3, active)
    assert whole.state() == resumed.state()


def test_a_state_before_the_first_difficulties():
    made = sampler([1, 2, 5])
    made.restore(json.loads(json.dumps(Sampler(3).state())))
    with pytest.raises(RuntimeError, match="set_difficulty"):
        made.draw(0, 1, on(3))


def test_draws_are_addressed_by_step():
    made = sampler(some_difficulties(20))
    late = made.draw(9, 5, on(20)).tolist()
    assert run(made, range(10), 5, on(20))[9] == late


def test_later_changes_to_the_callers_array_do_not_reach_the_draws():
    mrd = np.array([1.0, 2, 5])
    made = Sampler(3)
    made.set_difficulty(mrd, ids(3))
    mrd[:] = math.nan
    np.testing.assert_allclose(made.probabilities(on(3)), [1 / 8, 2 / 8, 5 / 8])


# Degenerate difficulties


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.1])
def test_difficulties_that_are_no_numbers_are_refused(bad: float):
    made = Sampler(5)
    with pytest.raises(
        UserError, match=r"^difficulty of 1 of 5 samples \(q3\) .* the model has diverged, .* lower the"
    ):
        made.set_difficulty(np.array([1, 1, 1, bad, 1]), ids(5))
    with pytest.raises(UserError, match=r"of 4 of 5 samples \(q1, q2, q3, \.\.\.\) is not a finite number"):
        made.set_difficulty(np.array([1, bad, bad, bad, bad]), ids(5))
    with pytest.raises(UserError, match=r"of 3 of 5 samples \(q0, q1, q4\) is"):
        made.set_difficulty(np.array([bad, bad, 1, 1, bad]), ids(5))


def test_refused_difficulties_leave_the_old_ones():
    made = sampler([1, 2, 5])
    with pytest.raises(UserError) as raised:
        made.set_difficulty(np.array([1, math.nan, 1]), ids(3))
    assert "\n" not in str(raised.value)
    np.testing.assert_allclose(made.probabilities(on(3)), [1 / 8, 2 / 8, 5 / 8])


def test_the_numbers_of_difficulties_and_names_are_checked():
    made = Sampler(3)
    for mrd, names in ((np.ones(2), ids(3)), (np.ones(3), ids(2)), (np.ones((3, 1)), ids(3))):
        with pytest.raises(ValueError, match="for 3 samples"):
            made.set_difficulty(mrd, names)


def test_sound_difficulties_need_no_note():
    for settings in KINDS.values():
        assert Sampler(3, **settings).set_difficulty(np.array([1.0, 2, 5]), ids(3)) == []


@pytest.mark.parametrize("alpha", [1, -1, 0.5])
@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.filterwarnings("error")
def test_all_zero_is_uniform(alpha: float, replacement: bool):
    made = Sampler(4, alpha=alpha, replacement=replacement)
    (note,) = made.set_difficulty(np.zeros(4), ids(4))
    assert note == "all 4 samples have difficulty 0 (every scored token is saturated): drawn uniformly"
    np.testing.assert_allclose(made.probabilities(on(4, without=(1,))), [1 / 3, 0, 1 / 3, 1 / 3])
    assert len(made.draw(0, 3, on(4))) == 3


def test_all_zero_in_a_fixed_order_is_the_order_of_the_data():
    for order in ("easy-first", "hard-first"):
        made = Sampler(3, order=order)
        (note,) = made.set_difficulty(np.zeros(3), ids(3))
        assert note.endswith("taken in the order of the data")
        assert made.draw(0, 3, on(3)).tolist() == [0, 1, 2]
        # Some zeros have a place in the order like any other difficulty.
        assert made.set_difficulty(np.array([1.0, 0, 2]), ids(3)) == []


@pytest.mark.filterwarnings("error")
def test_some_zeros_easy_first():
    made = Sampler(4)
    (note,) = made.set_difficulty(np.array([0, 1, 3, 0]), ids(4))
    assert note.startswith("2 of 4 samples have difficulty 0")
    assert note.endswith("not drawn while others are active")
    np.testing.assert_allclose(made.probabilities(on(4)), [0, 0.25, 0.75, 0])
    assert {i for batch in run(made, range(200), 4, on(4)) for i in batch} == {1, 2}
    # The others are forgotten: uniform among the rest.
    np.testing.assert_allclose(made.probabilities(on(4, without=(1, 2))), [0.5, 0, 0, 0.5])
    assert {i for batch in run(made, range(50), 1, on(4, without=(1, 2))) for i in batch} == {0, 3}


@pytest.mark.filterwarnings("error")
def test_some_zeros_without_replacement_come_last_in_uniform_order():
    mrd = np.array([0, 1, 1e-200, 0])
    (note,) = Sampler(4, replacement=False).set_difficulty(mrd, ids(4))
    assert note.endswith("drawn last in each epoch")
    order = [tuple(sampler(mrd, replacement=False, seed=seed).draw(0, 4, on(4)).tolist()) for seed in range(400)]
    assert p_value(tally(order), {(1, 2, 0, 3): 0.5, (1, 2, 3, 0): 0.5}) > RARE


@pytest.mark.filterwarnings("error")
def test_some_zeros_hard_first_are_drawn_as_the_smallest_positive():
    made = Sampler(4, alpha=-1)
    (note,) = made.set_difficulty(np.array([0, 1, 4, 0]), ids(4))
    assert note.startswith("2 of 4 samples")
    assert note.endswith("drawn as the smallest positive difficulty is")
    # 1, 1, 1/4, 1.
    np.testing.assert_allclose(made.probabilities(on(4)), [4 / 13, 4 / 13, 1 / 13, 4 / 13])
    np.testing.assert_allclose(made.probabilities(on(4, without=(1, 2))), [0.5, 0, 0, 0.5])


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_is_always_drawn(kind: str, value: float):
    made = Sampler(1, **KINDS[kind])
    notes = made.set_difficulty(np.array([value]), ids(1))
    assert notes == (["one sample: always drawn, its difficulty does not matter"] if made.needs_difficulty else [])
    assert run(made, range(3), 1, on(1)) == [[0]] * 3


# Use


def test_which_samplers_need_difficulties():
    needs = {kind: Sampler(3, **settings).needs_difficulty for kind, settings in KINDS.items()}
    assert [kind for kind, needed in needs.items() if not needed] == ["uniform", "random"]
    assert Sampler(3, order="easy-first", alpha=0).needs_difficulty


@pytest.mark.parametrize("settings", [{"alpha": 0}, {"alpha": 0, "replacement": False}, {"order": "random"}])
def test_difficulties_that_are_not_needed_have_no_effect(settings: dict):
    plain, told = Sampler(8, **settings), Sampler(8, **settings)
    before = run(plain, range(6), 3, on(8))
    assert told.set_difficulty(np.array([0, 1, math.nan, 3, 4, -5, 6, 7]), ids(8)) == []
    assert run(told, range(6), 3, on(8)) == before
    with pytest.raises(ValueError, match="for 8 samples"):
        told.set_difficulty(np.ones(7), ids(7))


@pytest.mark.parametrize("kind", ["with", "hard", "without", "easy-first", "hard-first"])
def test_drawing_before_the_difficulties_are_known(kind: str):
    with pytest.raises(RuntimeError, match="draws by difficulty: call set_difficulty before the first draw"):
        Sampler(3, **KINDS[kind]).draw(0, 1, on(3))


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_drawn(kind: str):
    made = sampler([1, 2, 5], **KINDS[kind])
    with pytest.raises(ValueError, match="no sample is active"):
        made.draw(0, 1, np.zeros(3, dtype=bool))
    with pytest.raises(ValueError, match="no sample is active"):
        made.probabilities(np.zeros(3, dtype=bool))
    with pytest.raises(ValueError, match=r"shape \(4,\): expected \(3,\)"):
        made.draw(0, 1, on(4))
    with pytest.raises(ValueError, match="size is 0"):
        made.draw(0, 0, on(3))


def test_settings_that_are_refused():
    with pytest.raises(UserError, match=r"unknown order 'easyfirst': .* did you mean 'easy-first'\?"):
        Sampler(3, order="easyfirst")
    for alpha in (math.nan, math.inf):
        with pytest.raises(UserError, match=r"alpha is .* expected a finite number"):
            Sampler(3, alpha=alpha)
    with pytest.raises(UserError, match="0 forget samples: expected at least 1"):
        Sampler(0)
    with pytest.raises(UserError, match="seed is -1"):
        Sampler(3, seed=-1)
