"""Samplers against uniform draws: what is concluded from trials whose truth is known."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.experiments.reproduce import OF_EXPERIMENTS, SPECS
from bench.experiments.samplers import (
    BETTER,
    UPDATES,
    UTILITIES,
    WORSE,
    CompareSpec,
    answer,
    comparisons_of,
    runs_of,
    utility_at,
)
from bench.files.spec import read_mapping
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.sweep_tables import as_table
from bench.jobs.unlearn import UnlearnSpec
from bench.report import figures
from bench.stats.verdicts import NO_EFFECT, UNKNOWN
from scoring.errors import UserError
from scoring.settings import build

RECALL, PROBABILITY = UTILITIES
# Arm -> by how much its updates change, how much its utility, and how much either varies.
ARMS = {
    "uniform": (0.0, 0.0, 0.0),
    "fast": (-0.3, 0.0, 0.02),
    "slow": (0.3, -0.1, 0.01),
    "same": (0.0, 0.0, 0.005),
    "noisy": (0.0, 0.0, 0.3),
}


def epoch(trial: str, step: int, forgotten: float, recall: float) -> dict[str, Any]:
    return {
        "trial": trial,
        "step": step,
        "forget_rouge_l_recall": forgotten,
        "retain_rouge_l_recall": recall,
        "retain_probability": 0.9,
    }


def tables(pairs: int = 12) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    trials, epochs = [], []
    for number in range(pairs):
        own = np.random.default_rng(number)
        level, kept = own.uniform(50, 90), own.uniform(0.7, 0.9)
        for arm, (change, loss, noise) in ARMS.items():
            rng = np.random.default_rng([number, len(arm)])
            name = f"{arm}-{number}"
            updates = level * math.exp(change + rng.normal(0, noise))
            utility = kept + loss + 0.2 * rng.normal(0, noise)
            fields = {"trial": name, "status": "finished", "algorithm": "GA", "arm": arm, "selection": f"s{number}"}
            trials.append(fields | {"seed": 0, "updates": round(1000 * updates), "forgotten": 1.0})
            # Half of the recall, .8, is gone half way between the last two.
            epochs += [
                epoch(name, 0, 0.8, 1.0),
                epoch(name, 9, 0.5, utility + 0.1),
                epoch(name, 18, 0.3, utility - 0.1),
            ]
    return trials, epochs


def test_utility_where_half_is_gone_by_hand() -> None:
    rows = [epoch("a", 0, 0.8, 1.0), epoch("a", 5, 0.6, 0.9), epoch("a", 10, 0.2, 0.5), epoch("a", 15, 0.5, 0.1)]
    # .4 is half way from .6 to .2, and .5 later on does not count.
    assert utility_at(rows, RECALL, 0.5) == pytest.approx(0.7)
    # .6 is reached at the second measurement.
    assert utility_at(rows, RECALL, 0.25) == pytest.approx(0.9)
    assert utility_at(rows, RECALL, 0.9) is None
    assert utility_at([{"trial": "a", "step": 0}], RECALL, 0.5) is None


def test_verdicts(tmp_path: Path) -> None:
    trials, epochs = tables()
    found = answer(as_table(trials), as_table(epochs), CompareSpec())
    verdicts = {
        (row["arm"], row["measure"]): row["verdict"] for row in found.table.to_pylist() if row["arm"] != "uniform"
    }
    assert verdicts["fast", UPDATES] == BETTER
    assert verdicts["slow", UPDATES] == WORSE
    assert verdicts["same", UPDATES] == NO_EFFECT
    assert verdicts["noisy", UPDATES] == UNKNOWN
    assert verdicts["slow", RECALL] == WORSE
    assert verdicts["same", RECALL] == verdicts["fast", RECALL] == NO_EFFECT
    assert verdicts["noisy", RECALL] == UNKNOWN
    # The same in every pair, which tells nothing.
    assert {verdicts[arm, PROBABILITY] for arm in ARMS if arm != "uniform"} == {UNKNOWN}
    assert [verdict.claim.sign for verdict in found.verdicts[:3]] == [-1, +1, +1]
    noisy = next(row for row in found.table.to_pylist() if (row["arm"], row["measure"]) == ("noisy", UPDATES))
    updates = {row["trial"]: row["updates"] for row in trials}
    logs = np.log([updates[f"noisy-{n}"] / updates[f"uniform-{n}"] for n in range(12)])
    assert noisy["pairs"] == 12
    assert noisy["change"] == pytest.approx(logs.mean())
    assert noisy["margin"] == pytest.approx(-math.log(0.9))  # 10 % fewer
    assert noisy["pairs_needed"] > 12
    text = "\n".join(found.sentences)
    assert "| GA | fast | 12 of 12 |" in text
    assert "worse: slow" in text
    assert re.search(r"cannot be told: noisy \(about \d+ pairs would tell\)", text)
    assert found.sentences[-1].startswith("**Better than uniform draws: fast in updates**")
    figures.picture(found.panels, tmp_path / "picture.png", found.inches or (5, 5))
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_a_change_is_that_of_pairs() -> None:
    trials, epochs = tables(pairs=3)
    # A run without a partner, and one that never got so far.
    trials = [row for row in trials if row["trial"] != "uniform-2"]
    epochs = [row for row in epochs if row["trial"] != "fast-0" or row["step"] < 18]
    compared = comparisons_of(runs_of(as_table(trials), as_table(epochs), 0.5), CompareSpec(least_pairs=2))
    fast = next(c for c in compared if (c.arm, c.measure) == ("fast", UPDATES))
    updates = {row["trial"]: row["updates"] for row in trials}
    logs = [math.log(updates[f"fast-{n}"] / updates[f"uniform-{n}"]) for n in (0, 1)]
    assert (fast.pairs, fast.change.value) == (2, pytest.approx(np.mean(logs)))
    assert next(c for c in compared if (c.arm, c.measure) == ("fast", RECALL)).pairs == 1
    # By default so few pairs tell nothing.
    alone = comparisons_of(runs_of(as_table(trials), as_table(epochs), 0.5), CompareSpec())
    assert {c.word for c in alone} == {UNKNOWN}
    assert next(c for c in alone if (c.arm, c.measure) == ("fast", UPDATES)).change.value == pytest.approx(
        np.mean(logs)
    )


def test_negative_answers_and_runs_that_ended_early() -> None:
    trials, epochs = tables()
    trials = [row for row in trials if row["arm"] in ("uniform", "same", "slow")]
    trials[0] |= {"forgotten": 0.5}
    trials[-1] |= {"status": "diverged"}
    found = answer(as_table(trials), as_table(epochs), CompareSpec())
    assert found.sentences[-1].startswith("**No arm is shown to beat uniform draws**; 2 of 6 comparisons")
    text = "\n".join(found.sentences)
    assert "1 of 35 runs ended before all was forgotten, and count with what they had made" in text
    assert "1 of 36 trials did not finish" in text
    without = [row for row in trials if row["arm"] != "uniform"]
    with pytest.raises(UserError, match="trials of slow, same: expected uniform and others"):
        answer(as_table(without), as_table(epochs), CompareSpec())


@pytest.mark.parametrize("preset", OF_EXPERIMENTS)
def test_specs_are_sound(preset: str) -> None:
    """Every arm is a run, the same arms in every preset, and as many pairs as a verdict takes."""
    values = read_mapping(SPECS / "samplers.yaml")[0][preset]
    build(CompareSpec, values["compare"]).checked()
    spec = build(SweepSpec, values["sweep"]).checked()
    assert next(iter(spec.arms)) == "uniform"
    assert len(spec.arms) == 8
    for algorithm in spec.vary["algorithm"]:
        for fields in spec.arms.values():
            build(UnlearnSpec, spec.base | fields | {"algorithm": algorithm, "seed": 0}).checked()
    pairs = len(spec.vary["seed"]) * sum(selection["count"] for selection in spec.selections or [{"count": 1}])
    assert pairs >= {"demo": 6, "decide": 20, "paper": 5}[preset]
