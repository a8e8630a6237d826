"""Verdicts on claims, against words that follow by hand, and their error rates on data whose truth is known."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from bench.report.verdicts import rows, summary
from bench.stats.estimates import Estimate, spearman, t_interval
from bench.stats.verdicts import CONTRADICTED, HOLDS, NO_EFFECT, UNKNOWN, Claim, decide, over_runs


def claim(at, sign=1, margin=0.1, count=20, **others):
    return Claim("it is so", "effect", sign, margin, at, count, "runs", **others)


def normal(value, error):
    """The interval of a normal effect with a standard error."""

    def at(level):
        half = stats.norm.ppf((1 + level) / 2) * error
        return Estimate(value, value - half, value + half)

    return at


@pytest.mark.parametrize(
    ("value", "error", "sign", "word"),
    [
        (0.3, 0.1, 1, HOLDS),  # 0.3 - 1.96 × 0.1 > 0
        (-0.3, 0.1, -1, HOLDS),
        (-0.3, 0.1, 1, CONTRADICTED),
        (-0.05, 0.01, 1, CONTRADICTED),  # on the other side, however little
        (0.05, 0.01, 1, NO_EFFECT),  # clearly there, and clearly smaller than what matters
        (0.0, 0.05, 1, NO_EFFECT),  # 1.645 × 0.05 < 0.1 < 1.96 × 0.05: one-sided tests
        (0.0, 0.07, 1, UNKNOWN),
        (0.09, 0.02, 1, UNKNOWN),  # there, and perhaps smaller than what matters
        (0.15, 0.1, 1, UNKNOWN),
        (0.0, 0.05, 0, HOLDS),  # the claim that there is none
        (0.3, 0.05, 0, CONTRADICTED),
        (0.15, 0.1, 0, UNKNOWN),
        (0.3, math.nan, 1, UNKNOWN),
    ],
)
def test_words(value, error, sign, word):
    (verdict,) = decide([claim(normal(value, error), sign)])
    assert verdict.word == word
    assert math.isnan(verdict.needed) == (word != UNKNOWN or math.isnan(error))


def test_a_family_is_stepped_down():
    # Of three claims the first needs z > 2.394 (5 % / 3), the second then z > 2.241, the last z > 1.960.
    errors = [1 / 2.5, 1 / 2.3, 1 / 2.0]
    claims = [claim(normal(1.0, error), margin=0.0) for error in errors]
    assert [verdict.word for verdict in decide(claims)] == [HOLDS] * 3
    # Where the first cannot be told none of the others is given an easier test.
    weaker = [claim(normal(1.0, 1 / z), margin=0.0) for z in (2.35, 2.3, 2.0)]
    assert [verdict.word for verdict in decide(weaker)] == [UNKNOWN] * 3
    # What was chosen after the fact is judged by itself, and takes nothing from the others.
    late = claim(normal(1.0, 1 / 2.0), margin=0.0, exploratory=True)
    assert [verdict.word for verdict in decide([*weaker, late])] == [UNKNOWN] * 3 + [HOLDS]
    # The interval that is shown is that of the effect alone.
    assert decide(weaker)[0].estimate == normal(1.0, 1 / 2.35)(0.95)


def test_as_many_as_are_needed_do_tell():
    """Repeat a study with the number of runs that the verdict names: it decides in about 80 % of cases."""
    rng = np.random.default_rng(0)
    for mean, margin in ((0.0, 0.3), (0.5, 0.1)):
        first = rng.normal(size=12)
        first = (first - first.mean()) / first.std(ddof=1) + mean  # exactly this mean, and a deviation of 1
        (verdict,) = decide([claim(over_runs(first), margin=margin, count=12)])
        assert verdict.word == UNKNOWN
        told = [
            decide([claim(over_runs(rng.normal(mean, 1, int(verdict.needed))), margin=margin)])[0].word != UNKNOWN
            for _ in range(150)
        ]
        assert 0.68 < np.mean(told) < 0.94


def test_wrong_verdicts_are_rare():
    """Ten claims, all of them at the border of being wrong: a family has a wrong verdict in 5 % of cases at most."""
    rng = np.random.default_rng(1)
    wrong = []
    for _ in range(150):
        none = [claim(over_runs(rng.normal(0, 1, 10)), margin=0.0) for _ in range(5)]  # there is no effect
        border = [claim(over_runs(rng.normal(0.5, 0.4, 10)), margin=0.5) for _ in range(5)]  # just what matters
        words = [verdict.word for verdict in decide([*none, *border])]
        wrong.append(any(word != UNKNOWN for word in words[:5]) or NO_EFFECT in words[5:] or CONTRADICTED in words[5:])
    assert np.mean(wrong) < 0.09


def test_runs_that_do_not_vary_tell_nothing():
    (verdict,) = decide([claim(over_runs([0.2, 0.2, 0.2]))])
    assert verdict.word == UNKNOWN
    assert math.isnan(verdict.needed)
    assert over_runs([1.0, 2.0, 4.0])(0.9) == t_interval([1.0, 2.0, 4.0], 0.9)


def test_an_estimate_by_resampling_is_written_as_its_numbers():
    found = spearman(np.arange(12.0), np.arange(12.0) ** 2 % 7)
    assert dataclasses.asdict(found) == {"value": found.value, "low": found.low, "high": found.high}
    assert found.at(0.99).low < found.low < found.high < found.at(0.99).high
    assert found.at(0.95) == found


def test_a_claim_is_decided_where_one_way_of_measuring_it_tells():
    """By hand: of three claims one is told in its second way, one holds, and one needs (2.8 * 0.2 / 0.08)^2 as many."""
    told = decide([claim(normal(0.02, 0.2)), claim(normal(-0.5, 0.05))])
    holds = decide([dataclasses.replace(claim(normal(0.5, 0.05)), text="that too")])
    open_ = decide(
        [dataclasses.replace(claim(normal(0.02, 0.2)), text="perhaps"), claim(normal(0, 1), exploratory=True)]
    )
    printed = summary([{"experiment": "fig0", **row} for row in rows([*told, *holds, *open_])])
    assert printed.splitlines()[0] == "**Of 3 claims 2 are decided**, and of these it cannot be told:"
    (lacks,) = printed.splitlines()[2:]
    assert lacks == f"- fig0, that perhaps: 20 runs, about {open_[0].needed:.0f} runs would tell"
    assert open_[0].needed == pytest.approx(
        20 * ((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * 0.2 / 0.08) ** 2, rel=0.01
    )
