"""`benchmark volume` on little: what it measures is there, and growth is by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cli import main
from bench.speed.volume import growth


@pytest.mark.slow
def test_a_small_run(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    command = (
        f"benchmark volume --model {model_folder} --samples 100 --trials 10,30 --runs 300 --replicas 0 --out {out}"
    )
    assert main(command.split()) == 0
    figures = json.loads(out.read_text())
    assert list(figures["samples"]) == ["100"]
    # A process that has torch in it, in megabytes; a list has none.
    assert 200 < figures["samples"]["100"]["driver_megabytes"] < 5000
    assert 20 < figures["runs"]["300"]["listing_megabytes"] < figures["runs"]["300"]["leaderboard_megabytes"]
    small, large = figures["trials"]["10"], figures["trials"]["30"]
    assert set(small) == {"choosing", "planning", "tables", "page", "adding"}
    assert figures["growth_with_trials"]["planning"] == pytest.approx(large["planning"] / small["planning"] / 3)
    assert "growth over that of the trials: choosing" in capsys.readouterr().out


def test_growth_by_hand() -> None:
    """Ten times the runs: a list that takes five times as long grows half as fast, and a board with their square."""
    sizes = {1000: {"listing": 1.0, "leaderboard": 2.0}, 100: {"listing": 0.2, "leaderboard": 0.02}}
    assert growth(sizes) == pytest.approx({"listing": 0.5, "leaderboard": 10.0})


@pytest.mark.parametrize(
    ("flag", "sizes", "step"), [("--samples", "150", 100), ("--trials", "10,15", 10), ("--runs", "-100", 100)]
)
def test_refused(flag: str, sizes: str, step: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "volume", f"{flag}={sizes}"]) == 2
    assert f"{flag} is {sizes}: expected numbers with commas between them, each a multiple of {step}" in (
        capsys.readouterr().err
    )
