"""Who comes back: what is concluded from samples whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.experiments.relapse import (
    NONE,
    PREDICTORS,
    QUANTITIES,
    UNTAUGHT,
    RelapseSpec,
    Sample,
    answer,
    attacks_in,
    back_of,
    predictor_of,
    relapse_rates,
)
from bench.stats.verdicts import CONTRADICTED, HOLDS
from scoring.errors import UserError

TRAINED, COARSE = "relearn forget 0.5", "quantise int4"
SELECTIONS, EACH = 6, 10


def sample(algorithm: str, selection: int, number: int, back: bool, forgotten: bool = True) -> Sample:
    """Every second one is taught; one of ten is known to the model that never knew it, whatever the attack."""
    known = 0.9 if back else 0.1
    never = 0.8 if number == 0 else 0.0
    difficulty = float(number + 1)
    return Sample(
        algorithm,
        f"draw-{selection}",
        0,
        f"s{selection}-{number}",
        {NONE: {None: 0.2 if forgotten else 0.7}, TRAINED: {4: 0.2, 8: known}, COARSE: {None: 0.2}},
        {NONE: {None: never}, TRAINED: {4: never, 8: never}, COARSE: {None: never}},
        frozenset({TRAINED} if number % 2 else ()),
        {
            "MRD": -difficulty,
            "flip time": difficulty,
            "initial NLL": math.nan,
            "updates until forgotten": difficulty * (10 if algorithm == "NPO" else 1) if forgotten else math.nan,
        },
        8 if forgotten else None,
    )


def samples() -> list[Sample]:
    """Under GA the hard half comes back, under NPO the hard three fifths; the easiest is not forgotten by NPO."""
    return [
        sample(algorithm, selection, number, number >= from_, forgotten=algorithm == "GA" or number > 0)
        for algorithm, from_ in (("GA", 5), ("NPO", 4))
        for selection in range(SELECTIONS)
        for number in range(EACH)
    ]


def test_shares_are_of_the_forgotten_and_of_those_that_met_the_attack() -> None:
    made = samples()
    assert attacks_in(made) == [TRAINED, TRAINED + UNTAUGHT, COARSE]
    taught, untaught, coarse = (back_of(made, attack, 0.5) for attack in attacks_in(made))
    assert taught.of_algorithm == {
        "GA": dict.fromkeys((f"draw-{i}" for i in range(SELECTIONS)), 3 / 5),  # 5, 7, 9 of 1, 3, 5, 7, 9
        "NPO": dict.fromkeys((f"draw-{i}" for i in range(SELECTIONS)), 3 / 5),
    }
    # Of 0, 2, 4, 6, 8; NPO had not forgotten 0.
    assert set(untaught.of_algorithm["GA"].values()) == {2 / 5}
    assert set(untaught.of_algorithm["NPO"].values()) == {3 / 4}
    assert set(untaught.never.values()) == {1 / 9}  # 0 under GA, of five and four
    assert untaught.beyond() == pytest.approx([(2 / 5 + 3 / 4) / 2 - 1 / 9] * SELECTIONS)
    assert coarse.beyond() == pytest.approx([-1 / 19] * SELECTIONS)


def test_where_nothing_comes_back_the_interval_is_that_of_a_count() -> None:
    made = [each for each in samples() if not each.sample_id.endswith("-0")]
    coarse = back_of(made, COARSE, 0.5)
    assert coarse.samples == SELECTIONS * (EACH - 1)
    interval = coarse.interval()(0.95)
    # The chance of no event in 54 samples, with an event in a share of `high`, is 2.5 %.
    assert (interval.value, (1 - interval.high) ** coarse.samples) == (0.0, pytest.approx(0.025))
    assert math.isnan(back_of(made, "nobody met it", 0.5).interval()(0.95).value)


def test_rates_and_updates_are_those_of_samples_and_not_of_algorithms() -> None:
    made = samples()
    rates = relapse_rates(made, TRAINED + UNTAUGHT, 0.5)
    ga, npo = 2 / 5, 3 / 4
    assert rates["s0-8"] == pytest.approx(((1 - ga) + (1 - npo)) / 2)
    assert rates["s0-4"] == pytest.approx(((0 - ga) + (1 - npo)) / 2)
    assert rates["s0-0"] == pytest.approx(-ga)
    updates = predictor_of(made, "updates until forgotten")
    own = [math.log(number + 1) for number in range(EACH)]
    assert updates["s0-0"] == pytest.approx(0 - np.mean(own))  # by GA alone
    assert updates["s3-9"] == pytest.approx((own[9] - np.mean(own) + own[9] - np.mean(own[1:])) / 2)


def test_the_answer() -> None:
    made = samples()
    found = answer(dict.fromkeys(QUANTITIES, made), RelapseSpec(retain_model="x"), {"back": 0.1, "correlation": 0.3})
    words = {(verdict.claim.text, verdict.claim.effect): verdict.word for verdict in found.verdicts}
    of_untaught = f", {TRAINED}{UNTAUGHT}"
    told = "rank correlation of how often a sample comes back with its "
    assert words["what is hard to forget comes back", told + "flip time" + of_untaught] == HOLDS
    assert words["what is hard to forget comes back", told + "MRD" + of_untaught] == HOLDS  # low MRD is hard
    assert not any("initial NLL" in effect for _, effect in words)  # nobody knows it
    rows = found.table.to_pylist()
    of_sample = [r for r in rows if (r["sample_id"], r["algorithm"], r["quantity"]) == ("s0-9", "GA", "ma")]
    assert {row["attack"]: (row["back"], row["back_at"], row["forgotten_at"]) for row in of_sample} == {
        TRAINED: (True, 8, 8),
        COARSE: (False, None, 8),
    }
    assert len(found.tables["relapse-predictors"]) == 2 * (len(PREDICTORS) - 1)  # nothing came back under the other
    other = [sample("GA", selection, number, back=number < 5) for selection in range(8) for number in range(40)]
    turned = answer(dict.fromkeys(QUANTITIES, other), RelapseSpec(retain_model="x"), {"back": 0.1, "correlation": 0.3})
    assert CONTRADICTED in {verdict.word for verdict in turned.verdicts}
    known = [sample("GA", 0, number, back=False, forgotten=False) for number in range(4)]
    with pytest.raises(UserError, match="no run has forgotten a sample"):
        answer(dict.fromkeys(QUANTITIES, known), RelapseSpec(retain_model="x"), {"back": 0.1, "correlation": 0.3})
