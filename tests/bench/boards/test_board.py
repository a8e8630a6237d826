"""Leaderboards against numbers computed by hand, and what must not be compared."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bench.boards.board import Board, boards
from bench.boards.page import page
from bench.boards.standings import Standing, group_letters
from bench.boards.text import standings_latex
from bench.boards.write import overview
from bench.cli import main
from bench.results.store import read_stores
from bench.stats.estimates import Estimate
from bench.stats.selection_bias import SeparablePair
from scoring.errors import UserError
from tests.made_runs import grid, made_run, write_runs

# Two algorithms on three selections with two seeds; means over seeds are A: .5 .6 .7, B: .3 .5 .6.
TWO = {
    "A": {"s1": [0.4, 0.6], "s2": [0.6, 0.6], "s3": [0.8, 0.6]},
    "B": {"s1": [0.2, 0.4], "s2": [0.5, 0.5], "s3": [0.7, 0.5]},
}


def board_of(root: Path, **more: Any) -> Board:
    found, notes = boards(read_stores([root]), **more)
    assert notes == []
    (board,) = found
    return board


def by_entry(board: Board, metric: str = "completeness") -> dict[str, Standing]:
    return {each.entry: each for each in board.standings[metric]}


def test_values_ranks_and_intervals_by_hand(tmp_path: Path) -> None:
    board = board_of(write_runs(tmp_path, grid(TWO)))
    assert board.name == "authors, fig2"
    assert [each.entry for each in board.standings["completeness"]] == ["A", "B"]
    first = by_entry(board)["A"]
    # Mean .6 of .5, .6, .7; standard deviation .1, so half the interval is t(.975, 2) .1 / sqrt(3) = 4.3027 * .057735.
    assert first.value.value == pytest.approx(0.6)
    assert first.value.high - first.value.value == pytest.approx(4.302653 * 0.0577350, rel=1e-5)
    assert (first.rank, first.runs, first.selections, first.seeds) == (1, 6, 3, 2)
    # Differences .2, .1, .1: mean .1333, standard deviation .0577, t = 4.0, p = .057 with 2 degrees: not separable.
    assert (first.best, first.worst) == (1, 2)
    assert first.groups == by_entry(board)["B"].groups == "a"
    assert first.adjusted is None
    assert "difficulty of the selections was not measured" in " ".join(board.sentences["completeness"])
    assert "0 of 1 pairs" in " ".join(board.sentences["completeness"])


def test_lower_is_better(tmp_path: Path) -> None:
    values = {name: {s: [1 - v for v in seeds] for s, seeds in own.items()} for name, own in TWO.items()}
    board = board_of(write_runs(tmp_path, grid(values, "forget_probability")))
    places = board.standings["forget_probability"]
    assert not board.metrics["forget_probability"].higher_is_better
    assert [(each.entry, each.rank) for each in places] == [("A", 1), ("B", 2)]
    assert places[0].value.value == pytest.approx(0.4)
    assert places[0].value.low < 0.4 < places[0].value.high


def test_equal_difficulty_can_turn_the_ranks(tmp_path: Path) -> None:
    """score = algorithm + 2 × difficulty exactly; A is better by .1, and was run on harder selections."""
    difficulty = {"s1": -1.0, "s2": -0.8, "s3": -0.6, "s4": -0.4, "s5": -0.2, "s6": 0.0}
    rows = [
        made_run(name, s, 0, {"completeness": level + 2 * difficulty[s]}, difficulty[s])
        for name, level, own in (("A", 2.1, ("s1", "s2", "s3", "s4")), ("B", 2.0, ("s2", "s3", "s4", "s5", "s6")))
        for s in own
    ]
    board = board_of(write_runs(tmp_path, rows))
    places = by_entry(board)
    # At the mean difficulty of the six selections, -.5.
    assert places["A"].adjusted is not None
    assert places["B"].adjusted is not None
    assert places["A"].adjusted.value == pytest.approx(1.1)
    assert places["B"].adjusted.value == pytest.approx(1.0)
    assert (places["A"].adjusted_rank, places["B"].adjusted_rank) == (1, 2)
    # So is the mean over all six, from what both have on three of them; and it says so.
    assert (places["A"].selections, places["B"].selections) == (4, 5)
    assert places["A"].value.value == pytest.approx(1.1)
    assert (places["A"].rank, places["B"].rank) == (1, 2)
    text = " ".join(board.sentences["completeness"])
    assert "3 of 6 selections" in text
    assert "Per unit of mean log MRD completeness changes by 2.00" in text


def forecast_rows() -> list[dict[str, Any]]:
    """score = algorithm - forecast / 4 exactly, on forecasts whose mean is 3; MRD was not measured."""
    forecasts = {"s1": 0.0, "s2": 1.0, "s3": 2.0, "s4": 3.0, "s5": 4.0, "s6": 8.0}
    return [
        made_run(name, s, 0, {"completeness": level - forecasts[s] / 4}, row={"mean_log_flip_time": forecasts[s]})
        for name, level, own in (("A", 1.9, ("s1", "s2", "s3", "s4")), ("B", 2.0, ("s2", "s3", "s4", "s5", "s6")))
        for s in own
    ]


def test_at_equal_forecast_by_hand(tmp_path: Path) -> None:
    board = board_of(write_runs(tmp_path, forecast_rows()))
    places = by_entry(board)
    for name, value, rank in (("A", 1.9 - 0.75, 2), ("B", 2.0 - 0.75, 1)):
        found = places[name].adjusted_by_forecast
        assert found is not None
        assert found.value == pytest.approx(value)
        assert places[name].forecast_rank == rank
        assert (places[name].adjusted, places[name].adjusted_rank) == (None, None)
    text = " ".join(board.sentences["completeness"])
    assert "Per unit of mean log flip time, the forecast of updates, it changes by \N{MINUS SIGN}0.25" in text
    assert "Not adjusted: the difficulty of the selections was not measured." in text
    assert board.selections["s6"].mean_log_flip_time == 8.0
    head = "| rank | entry | completeness | at equal forecast | rank by forecast |"
    assert head in overview([board], [])
    latex = standings_latex(board, "completeness")
    assert "by forecast & forecast rank" in latex
    assert "1.250 & 1" in latex
    data = re.search(r'id="data">(.*?)</script>', page([board]))
    assert data is not None
    (shown,) = json.loads(data[1])
    assert shown["standings"][0][0][-2:] == [[pytest.approx(1.25)] * 3, 1]
    assert shown["selections"][-1][-1] == 8.0


def test_forecasts_are_shown_only_where_they_are_known(tmp_path: Path) -> None:
    board = board_of(write_runs(tmp_path, grid(TWO)))
    assert "forecast" not in overview([board], []) + standings_latex(board, "completeness")
    assert "forecast" not in " ".join(board.sentences["completeness"])


def test_entries_on_other_selections_are_not_ranked_raw(tmp_path: Path) -> None:
    rows = [*grid(TWO), made_run("C", "s1", 0, {"completeness": 0.99})]
    board = board_of(write_runs(tmp_path, rows))
    assert [each.entry for each in board.standings["completeness"]] == ["A", "B", "C"]
    assert by_entry(board)["C"].rank is None
    assert by_entry(board)["C"].runs == 1
    assert by_entry(board)["A"].rank == 1
    assert "C: not compared" in " ".join(board.sentences["completeness"])


def test_too_few_selections_leave_ranks_without_intervals(tmp_path: Path) -> None:
    values = {name: {"s1": own["s1"]} for name, own in TWO.items()}
    board = board_of(write_runs(tmp_path, grid(values)))
    assert [(each.entry, each.rank, each.best) for each in board.standings["completeness"]] == [
        ("A", 1, None),
        ("B", 2, None),
    ]
    assert math.isnan(by_entry(board)["A"].value.low)
    assert "three selections" in " ".join(board.sentences["completeness"])


def test_failed_runs_are_shown_and_do_not_count(tmp_path: Path) -> None:
    rows = grid(TWO)
    rows[0] |= {"status": "diverged", "reason": "loss is nan", "metrics": []}
    board = board_of(write_runs(tmp_path, rows))
    assert [run.reason for run in board.runs if run.status != "finished"] == ["loss is nan"]
    assert by_entry(board)["A"].runs == 5
    # s1 has one seed of A and two of B.
    text = " ".join(board.sentences["completeness"])
    assert "1 of 3 selections do not have the same number of runs of all" in text
    assert "cannot be told with 2 complete selections" in text
    assert "Runs that did not finish: A 17% [95 % CI 1% to 56%], B 0% [95 % CI 0% to 39%]." in text


def test_intervals_end_where_a_metric_does(tmp_path: Path) -> None:
    utility = {"s1": 0.9, "s2": 1.0, "s3": 1.0, "s4": 1.0}
    rows = [made_run(name, s, 0, {"utility": value, "plugin": value}) for name in "AB" for s, value in utility.items()]
    board = board_of(write_runs(tmp_path, rows))
    known, unknown = (by_entry(board, name)["A"].value for name in ("utility", "plugin"))
    assert (known.value, known.low, known.high) == pytest.approx((unknown.value, unknown.low, 1.0))
    assert unknown.high > 1.05


def test_entries_are_named_by_what_differs(tmp_path: Path) -> None:
    rows = [
        made_run(name, "s1", 0, {"completeness": 0.5}, learning_rate=rate, beta=0.1)
        for name, rate in (("NPO", 1e-4), ("NPO", 3e-4), ("PO", 1e-4))
    ]
    board = board_of(write_runs(tmp_path, rows))
    assert list(board.entries) == ["NPO, learning_rate 0.0001", "NPO, learning_rate 0.0003", "PO"]
    assert board.entries["PO"] == {"algorithm": "PO", "learning_rate": 1e-4}


def test_drill_down(tmp_path: Path) -> None:
    board = board_of(write_runs(tmp_path, grid(TWO)))
    run = board.runs[0]
    assert (run.entry, run.selection, run.seed, run.values) == ("A", "s1", 0, {"completeness": 0.4})
    assert board.selections["s1"].ids == ("s1/0", "s1/1")
    assert run.updates_until_forgotten == {"s1/1": 4}
    assert board.texts["s1/1"].prompt == "about s1/1?"
    assert board.texts["s1/1"].mrd == 0.5
    assert board.origins[run.origin]["commit"] == "abc"
    assert board.origins[run.origin]["packages"] == "torch 2.13.0"


def test_selections_of_one_name_and_other_samples(tmp_path: Path) -> None:
    rows = [made_run("A", "s1", 0, {"completeness": 0.5}, row={"data_sha256": sha * 64}) for sha in "ab"]
    board = board_of(write_runs(tmp_path, rows))
    assert list(board.selections) == ["s1 (aaaaaaaa)", "s1 (bbbbbbbb)"]
    assert [run.selection for run in board.runs] == ["s1 (aaaaaaaa)", "s1 (bbbbbbbb)"]


def test_tasks_and_experiments_are_boards_of_their_own(tmp_path: Path) -> None:
    for task, experiment in (("tofu", "x"), ("authors", "y"), ("authors", "x")):
        write_runs(tmp_path, grid(TWO), task, experiment)
    found, _ = boards(read_stores([tmp_path]))
    assert [board.name for board in found] == ["authors, x", "authors, y", "tofu, x"]
    assert len(boards(read_stores([tmp_path]), task="authors")[0]) == 2
    with pytest.raises(UserError, match="no runs, task wmdp"):
        boards(read_stores([tmp_path]), task="wmdp")


# --- Stores of several people -------------------------------------------------------------------------------


def halves(tmp_path: Path, **second: Any) -> list[Path]:
    """Two people's stores: one has the runs of A, the other those of B."""
    return [
        write_runs(tmp_path / "a", grid({"A": TWO["A"]})),
        write_runs(tmp_path / "b", grid({"B": TWO["B"]}, **second)),
    ]


def test_merged_stores_are_one_board(tmp_path: Path) -> None:
    whole = board_of(write_runs(tmp_path / "whole", grid(TWO)))
    found, notes = boards(read_stores(halves(tmp_path)))
    (board,) = found
    assert notes == []
    assert board.standings == whole.standings
    assert {origin["store"] for origin in board.origins} == {str(tmp_path / "a"), str(tmp_path / "b")}


def test_the_same_run_in_two_stores_counts_once(tmp_path: Path) -> None:
    roots = [write_runs(tmp_path / name, grid(TWO)) for name in "ab"]
    found, notes = boards(read_stores(roots))
    assert notes == []
    assert len(found[0].runs) == 12


def test_conflicting_specs_are_refused(tmp_path: Path) -> None:
    roots = halves(tmp_path, evaluate_samples=48)
    with pytest.raises(UserError) as caught:
        boards(read_stores(roots))
    message = str(caught.value)
    assert "conflicting specs of authors, fig2" in message
    assert "evaluate_samples 24 and 48" in message
    assert str(roots[0]) in message
    assert "\n" not in message
    found, notes = boards(read_stores(roots), keep_conflicts=True)
    assert [board.name for board in found] == ["authors, fig2 (setting 1 of 2)", "authors, fig2 (setting 2 of 2)"]
    assert [list(board.entries) for board in found] == [["A"], ["B"]]
    assert "evaluate_samples" in found[1].about["settings differ in"]
    assert len(notes) == 1


def test_nested_settings_are_named(tmp_path: Path) -> None:
    roots = [
        write_runs(tmp_path / name, grid({"A": TWO["A"]}, evaluation={"samples": count, "metrics": "ua"}))
        for name, count in (("a", 20), ("b", 40))
    ]
    with pytest.raises(UserError, match=r"evaluation.samples 20 and 40"):
        boards(read_stores(roots))


def test_one_store_with_two_settings_has_two_boards(tmp_path: Path) -> None:
    rows = grid({"A": TWO["A"]}) + grid({"B": TWO["B"]}, el_n=5)
    found, notes = boards(read_stores([write_runs(tmp_path, rows)]))
    assert notes == []
    assert len(found) == 2


def test_contradicting_results_are_refused(tmp_path: Path) -> None:
    first = grid(TWO)
    second = [row | {"metrics": [("completeness", dict(row["metrics"])["completeness"] + 0.01)]} for row in first[:1]]
    roots = [write_runs(tmp_path / "a", first), write_runs(tmp_path / "b", second)]
    with pytest.raises(UserError, match=r"has different results in .*completeness: 0.4 and 0.41"):
        boards(read_stores(roots))
    found, notes = boards(read_stores(roots), keep_conflicts=True)
    assert found[0].runs[0].values["completeness"] == 0.4
    assert len(notes) == 1
    # Rounding is no contradiction, and a failure that was tried again none either.
    rounded = [row | {"metrics": [("completeness", dict(row["metrics"])["completeness"] + 1e-9)]} for row in first]
    failed = [first[0] | {"status": "died", "reason": "node lost", "metrics": []}]
    for name, rows in (("c", rounded), ("d", failed)):
        found, notes = boards(read_stores([write_runs(tmp_path / name, rows), roots[0]]))
        assert notes == []
        assert all(run.status == "finished" for run in found[0].runs)


def test_skipped_files_are_notes(tmp_path: Path) -> None:
    root = write_runs(tmp_path, grid(TWO))
    (root / "runs" / "task=authors" / "experiment=fig2" / "bad.parquet").write_bytes(b"PAR1")
    _, notes = boards(read_stores([root]))
    assert len(notes) == 1
    assert "bad.parquet: damaged" in notes[0]


# --- Groups -------------------------------------------------------------------------------------------------


def pair(better: str, worse: str, separable: bool) -> SeparablePair:
    return SeparablePair(better, worse, Estimate(0.1, 0.0, 0.2), 0.5, separable)


@pytest.mark.parametrize("seed", range(30))
def test_letters_are_shared_by_those_that_cannot_be_told_apart(seed: int) -> None:
    """And by no others; no letter could be left out."""
    rng = np.random.default_rng(seed)
    order = [f"e{n}" for n in range(rng.integers(2, 8))]
    apart = {both: bool(rng.random() < 0.5) for both in itertools.combinations(order, 2)}
    letters = group_letters(order, [pair(*both, clear) for both, clear in apart.items()])
    for (one, other), clear in apart.items():
        assert bool(set(letters[one]) & set(letters[other])) == (not clear)
    for letter in set("".join(letters.values())):
        members = {entry for entry in order if letter in letters[entry]}
        assert not any(members < {entry for entry in order if other in letters[entry]} for other in "abcdefghijklmnop")
    assert letters[order[0]].startswith("a")


def test_letters_by_hand() -> None:
    """a is apart from c; b from neither."""
    letters = group_letters(["a", "b", "c"], [pair("a", "b", False), pair("b", "c", False), pair("a", "c", True)])
    assert letters == {"a": "a", "b": "ab", "c": "b"}


# --- Command line -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [
        row | {"metrics": [*row["metrics"], ("utility", 1 - dict(row["metrics"])["completeness"])]} for row in grid(TWO)
    ]
    root = write_runs(tmp_path / "store", both)
    out = tmp_path / "board"
    assert main(["leaderboard", str(root), "--out", str(out)]) == 0
    assert "12 runs on 1 boards" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "board-0.png",
        "board-0.svg",
        "board-0.tex",
        "index.html",
    ]
    text = (out / "README.md").read_text()
    assert "| 1 (1–2) | A | 0.600 [0.352 to 0.848] |" in text
    assert (out / "board-0.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "board-0.svg").read_text()
    before = (out / "index.html").read_text()
    assert main(["leaderboard", str(root), "--out", str(out)]) == 0
    assert (out / "index.html").read_text() == before


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roots = halves(tmp_path, el_n=3)
    (tmp_path / "file").write_text("")
    for arguments, problem in (
        ([str(tmp_path / "none")], "no results; expected a store"),
        ([str(root) for root in roots], "conflicting specs"),
        ([str(roots[0]), "--task", "tofu"], "no runs"),
        ([str(roots[0]), "--out", str(tmp_path / "file" / "x")], "cannot be written to"),
    ):
        capsys.readouterr()
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        assert main(["leaderboard", *arguments, *out]) == 2
        err = capsys.readouterr().err
        assert problem in err
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_t_interval_is_scipys(tmp_path: Path) -> None:
    board = board_of(write_runs(tmp_path, grid(TWO)))
    means = [0.3, 0.5, 0.6]
    low, high = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
    assert by_entry(board)["B"].value.low == pytest.approx(low)
    assert by_entry(board)["B"].value.high == pytest.approx(high)
