"""PairedMetric differences at equal selections and seeds, against numbers by hand and scipy's distributions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bench.boards.compare import Comparison, compare, entry_side, store_side
from bench.cli import main
from bench.results.store import read_stores
from bench.stats.paired import paired_g
from scoring.errors import UserError
from tests.made_runs import grid, made_run, write_runs

# Means over seeds, A: .5 .6 .7, B: .3 .5 .5; B less A is -.2, -.1, -.2.
TWO = {
    "A": {"s1": [0.4, 0.6], "s2": [0.6, 0.6], "s3": [0.8, 0.6]},
    "B": {"s1": [0.2, 0.4], "s2": [0.5, 0.5], "s3": [0.6, 0.4]},
}


def between(root: Path, first: str, second: str, metric: str | None = None) -> Comparison:
    results = read_stores([root])
    return compare(entry_side(first, results), entry_side(second, results), metric)


def test_by_hand(tmp_path: Path) -> None:
    (found,) = between(write_runs(tmp_path, grid(TWO)), "A", "B").metrics
    assert (found.metric, found.pairs, found.units, found.unit) == ("completeness", 6, 3, "selection")
    assert found.first == pytest.approx(0.6)
    assert found.second == pytest.approx(1.3 / 3)
    # Mean -1/6, standard deviation .057735, standard error 1/30.
    assert found.difference.value == pytest.approx(-1 / 6)
    assert found.difference.low == pytest.approx(-1 / 6 - 4.302653 / 30, rel=1e-5)
    assert found.difference.high == pytest.approx(-1 / 6 + 4.302653 / 30, rel=1e-5)
    # g = (1 - 3 / 7) × -.16667 / .057735.
    assert found.effect.value == pytest.approx(4 / 7 * -2.886751, rel=1e-6)


def test_the_interval_of_the_effect_turns_round_the_noncentral_t() -> None:
    differences = np.array([0.2, 0.5, -0.1, 0.4, 0.3, 0.35])
    found = paired_g(differences)
    n, correction = 6, 1 - 3 / (4 * 5 - 1)
    t = math.sqrt(n) * differences.mean() / differences.std(ddof=1)
    assert found.value == pytest.approx(correction * t / math.sqrt(n))
    # At either end the observed t is just at the edge of what that end expects.
    for end, tail in ((found.low, 0.975), (found.high, 0.025)):
        assert stats.nct.cdf(t, n - 1, end * math.sqrt(n)) == pytest.approx(tail, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 8])
def test_coverage_of_the_effect(n: int) -> None:
    """The interval holds the true effect in about 95 % of 2,000 simulated comparisons, also of very few."""
    rng = np.random.default_rng(0)
    truth = 0.8
    found = [paired_g(rng.normal(truth, 1.0, n)) for _ in range(2000)]
    assert 0.935 <= np.mean([each.low <= truth <= each.high for each in found]) <= 0.965


def test_no_effect_without_spread_or_with_two() -> None:
    for differences in ([0.1, 0.1, 0.1], [0.1, 0.2]):
        assert math.isnan(paired_g(np.array(differences)).value)


def test_lower_is_better_turns_the_effect_alone(tmp_path: Path) -> None:
    (found,) = between(write_runs(tmp_path, grid(TWO, "forget_probability")), "A", "B").metrics
    assert found.difference.value < 0 < found.effect.value


def test_partners_are_of_the_same_samples_and_seed(tmp_path: Path) -> None:
    """By the samples, not by the name of the selection; what has no partner is counted."""
    rows = grid(TWO)
    others = [
        made_run("B", "s1", 5, {"completeness": 9.0}),
        made_run("B", "s2", 0, {"completeness": 9.0}, row={"data_sha256": "f" * 64}),
        made_run("B", "s3", 0, {"completeness": 9.0}, el_n=3),
        made_run("A", "s1", 6, {}, row={"status": "diverged"}),
    ]
    found = between(write_runs(tmp_path, rows + others), "A", "B")
    assert found.unpaired == (0, 3)
    assert found.metrics[0].pairs == 6
    assert found.metrics[0].second == pytest.approx(1.3 / 3)


def test_few_selections_are_compared_run_by_run(tmp_path: Path) -> None:
    values = {name: {"s1": own["s1"], "s2": own["s2"]} for name, own in TWO.items()}
    (found,) = between(write_runs(tmp_path, grid(values)), "A", "B").metrics
    assert (found.units, found.unit) == (4, "run")
    assert found.difference.value == pytest.approx(np.mean([-0.2, -0.2, -0.1, -0.1]))


def test_settings_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    rows = grid(TWO) + grid({"A": TWO["B"]}, learning_rate=3e-4)
    root = write_runs(tmp_path, rows)
    with pytest.raises(
        UserError, match=r"2 settings, which differ in learning_rate; name one, such as A,learning_rate="
    ):
        between(root, "A", "B")
    (found,) = between(root, "A,learning_rate=1e-4", "A,learning_rate=0.0003").metrics
    assert found.difference.value == pytest.approx(-1 / 6)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("AA", "unknown algorithm with finished runs 'AA'"),
        ("A,learning_rates=1e-4", "did you mean 'learning_rate'"),
        ("A,learning_rate=2", "no run has learning_rate 2; expected one of 0.0001"),
        ("A,learning_rate", "expected field=value"),
    ],
)
def test_names_that_mean_nothing(tmp_path: Path, name: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        between(write_runs(tmp_path, grid(TWO)), name, "B")
    assert problem in str(caught.value)


def test_nothing_in_common(tmp_path: Path) -> None:
    rows = grid({"A": TWO["A"]}) + grid({"B": TWO["B"]}, evaluate_samples=3)
    root = write_runs(tmp_path, rows)
    with pytest.raises(UserError, match="no selection and seed in common"):
        between(root, "A", "B")
    with pytest.raises(UserError, match="unknown metric of both sides 'utility'"):
        between(write_runs(tmp_path / "two", grid(TWO)), "A", "B", "utility")


def test_two_stores(tmp_path: Path) -> None:
    """Before and after: each run with itself, .01 better; also where it has another hash."""
    before = write_runs(tmp_path / "a", grid(TWO))
    better = {name: {s: [v + 0.01 for v in own] for s, own in each.items()} for name, each in TWO.items()}
    after = write_runs(tmp_path / "b", grid(better) + grid({"C": TWO["A"]}))
    sides = [store_side(str(root), read_stores([root])) for root in (before, after)]
    found = compare(*sides)
    assert found.unpaired == (0, 6)
    assert found.metrics[0].pairs == 12
    assert found.metrics[0].units == 6
    assert found.metrics[0].difference.value == pytest.approx(0.01)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(write_runs(tmp_path / "a", grid(TWO)))
    assert main(["compare", "A", "B", "--results", root]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "B less A, paired by selection and seed"
    assert lines[2].split()[:5] == ["completeness", "↑", "6", "3", "selections"]
    assert "−0.167 [−0.31 to −0.0232]" in lines[2]
    assert main(["compare", root, root, "--metric", "completeness"]) == 0
    assert "0 [0 to 0]" in capsys.readouterr().out
    assert main(["compare", "A", "C", "--results", root]) == 2
    assert "expected one of A, B" in capsys.readouterr().err
    assert main(["compare", root, str(tmp_path / "none")]) == 2
    assert "no results" in capsys.readouterr().err
