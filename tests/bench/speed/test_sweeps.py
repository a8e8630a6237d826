"""The benchmarks of sweeps and of leaderboards: their figures, from known times and from a small run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.cli import main
from bench.results.store import read_stores
from bench.speed import leaderboard, sweep


def test_overheads_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """A warm trial takes 1 s, and its result comes 1.1 or 1.3 s after the last; a cold one 1 s, and 5 or 7 s."""
    gaps = {"warm": np.tile([1.1, 1.3], 10), "cold": np.tile([5.0, 7.0], 10)}
    trial_seconds = {kind: np.ones(20) for kind in gaps}
    figures = sweep.summary(gaps, trial_seconds)
    assert figures["overhead"]["warm"]["value"] == pytest.approx(0.2)
    assert figures["overhead"]["cold"]["value"] == pytest.approx(5.0)
    assert figures["gain"]["value"] == pytest.approx(25.0)
    assert figures["gain"]["low"] < 25 < figures["gain"]["high"]
    assert figures["largest_overhead"]["cold"] == pytest.approx(6.0)
    assert figures["seconds_per_trial"] == {"warm": pytest.approx(1.2), "cold": pytest.approx(6.0)}
    sweep.print_summary(figures | {"trials": 10, "turns": 2})
    assert "ratio of the overheads: 25.0 [95 % CI" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_leaderboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaderboard, "TURNS", 1)
    out = tmp_path / "figures.json"
    assert main(["benchmark", "leaderboard", "--runs", "300", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["runs"] == 300
    assert figures["page_megabytes"] > 0.1
    assert len(figures["build_seconds"]) == len(figures["read_seconds"]["single runs"]) == 1
    assert "ratio of the two" in capsys.readouterr().out


def test_made_runs_are_the_same_in_one_file_or_many(tmp_path: Path) -> None:
    roots = [leaderboard.write_made_runs(tmp_path / str(many), 100, one_file_each=many) for many in (True, False)]
    many, few = (sorted(read_stores([root]).runs.drop(["store"]).to_pylist(), key=str) for root in roots)
    assert many == few
    assert len(few) == 100
    assert [len(list((root / "runs").rglob("*.parquet"))) for root in roots] == [100, 10]


def test_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, problem in (
        (["leaderboard", "--runs", "150"], "--runs is 150: expected a multiple of 100"),
        (["leaderboard", "--out", str(tmp_path / "no" / "x.json")], "its folder does not exist"),
        (["sweep", "--trials", "3"], "--trials is 3: expected at least 8"),
    ):
        assert main(["benchmark", *arguments]) == 2
        assert problem in capsys.readouterr().err
