"""`mrd-bench reproduce`: what an answer leaves, what is refused; and figure 2 on tables whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.axes import Axes

from bench.cli import main
from bench.experiments import fig2, reproduce
from bench.experiments.experiment import Answer, Experiment, Setup
from bench.experiments.fig2 import Fig2Spec, answer
from bench.files.spec import read_mapping
from bench.jobs.sweep_plan import SweepSpec
from bench.stats.verdicts import HOLDS, NO_EFFECT
from scoring.errors import UserError
from scoring.settings import build

# --- The frame of all experiments ---------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An experiment "count" of its own spec file; the list grows with every run."""
    runs: list[str] = []

    def run(setup: Setup) -> Answer:
        runs.append(setup.values["word"])
        if setup.values["word"] == "fail":
            raise UserError("word is 'fail': expected another")
        (setup.work / "kept").write_text("measured")

        def draw(axes: Axes) -> None:
            axes.plot([0, 1], [0, 1])

        table = pa.table({"length": [len(setup.values["word"])]})
        return Answer(table, [draw, draw], ["It has **letters**.", "The claim holds."], tables={"count-more": table})

    experiment = Experiment("count", "letters", "How many letters?", "there are some.", run)
    specs = tmp_path / "specs"
    specs.mkdir()
    (specs / "count.yaml").write_text("demo: {word: three}\npaper: {word: seventeen}\n")
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"count": experiment})
    monkeypatch.setattr(reproduce, "SPECS", specs)
    return runs


def test_an_answer_is_a_table_a_picture_and_a_paragraph(counted: list[str], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["reproduce", "count", "--out", str(out)]) == 0
    folder = out / "count"
    assert {path.name for path in folder.iterdir()} == {
        "count.parquet",
        "count-more.parquet",
        "count.png",
        "count.svg",
        "finding.md",
        "record.json",
        "spec.yaml",
    }
    assert pq.read_table(folder / "count.parquet").to_pydict() == {"length": [5]}
    assert (folder / "count.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "count.svg").read_text()
    assert read_mapping(folder / "spec.yaml")[0] == {"demo": {"word": "three"}}
    text = (folder / "finding.md").read_text()
    for part in ("How many letters?", "*The paper:* there are some.", "(count.png)", "It has **letters**.", "holds."):
        assert part in text
    assert "(count/count.png)" in (out / "README.md").read_text()
    assert "The claim holds." in capsys.readouterr().out
    # Once more: it is there. With its own spec file too.
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(["reproduce", "all", "--out", str(out)]) == 0
    assert main(["reproduce", "count", "--out", str(out), "--spec", str(folder / "spec.yaml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert counted == ["three"]


def test_an_answer_that_failed_leaves_what_was_there(counted: list[str], tmp_path: Path) -> None:
    out, spec = tmp_path / "out", tmp_path / "own.yaml"
    spec.write_text("demo: {word: fail}\n")
    with pytest.raises(UserError, match="expected another"):
        reproduce.reproduce("count", "demo", out, spec=spec)
    assert not (out / "count").exists()
    spec.write_text("demo: {word: four}\n")
    reproduce.reproduce("count", "demo", out, spec=spec)
    # What an interrupted start has left is taken for nothing until the record is there.
    (out / "count" / "record.json").unlink()
    reproduce.reproduce("count", "demo", out, spec=spec)
    assert counted == ["fail", "four", "four"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reproduce", "cuont"], "unknown experiment 'cuont': expected one of count, all; did you mean 'count'"),
        (["reproduce", "count", "--preset", "papre"], "did you mean 'paper'"),
        (["reproduce", "all", "--spec", "a.yaml"], "--spec is for one experiment"),
        (["reproduce", "count", "--spec", "none.yaml"], "cannot be read"),
        (["reproduce", "count", "--concurrent", "-1"], "--concurrent is -1: expected a whole number of at least 0"),
    ],
)
def test_slips(counted: list[str], tmp_path: Path, capsys: Any, arguments: list[str], said: str) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()
    assert counted == []


def test_slips_in_spec_files(counted: list[str], tmp_path: Path) -> None:
    spec = tmp_path / "own.yaml"
    for text, said in (("demos: {word: a}\n", "did you mean 'demo'"), ("paper: {word: a}\n", "no section 'demo'")):
        spec.write_text(text)
        with pytest.raises(UserError, match=said):
            reproduce.reproduce("count", "demo", tmp_path / "out", spec=spec)


def test_another_preset_is_refused(counted: list[str], tmp_path: Path) -> None:
    reproduce.reproduce("count", "demo", tmp_path)
    record = json.loads((tmp_path / "count" / "record.json").read_text())
    assert record["values"] == {"word": "three"}
    with pytest.raises(UserError, match=r"holds count by another spec \(preset demo\)"):
        reproduce.reproduce("count", "paper", tmp_path)
    assert json.loads((tmp_path / "count" / "record.json").read_text()) == record


# --- Every experiment that there is -------------------------------------------------------------------------


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_sweeps_of_every_spec_are_sound(name: str) -> None:
    """Every section that is a sweep is one that `mrd-bench sweep` takes, as far as it can be told without models."""
    presets = read_mapping(reproduce.SPECS / f"{name}.yaml")[0]
    assert {"demo", "paper"} <= presets.keys() <= {*reproduce.OF_EXPERIMENTS, reproduce.MARGINS}
    for values in presets.values():
        assert values
        for section in values.values():
            if isinstance(section, dict) and "base" in section:
                build(SweepSpec, section).checked()


def test_experiments_say_what_they_ask(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "list"]) == 0
    printed = capsys.readouterr().out
    for name, experiment in reproduce.EXPERIMENTS.items():
        assert experiment.name == name
        assert experiment.question.endswith("?")
        assert f"{name} " in printed
        assert experiment.question in printed
    assert {path.stem for path in reproduce.SPECS.glob("*.yaml")} == {*reproduce.EXPERIMENTS, "real"}


# --- Figure 2 -----------------------------------------------------------------------------------------------


MARGINS = {"share": 0.1, "reversals": 0.05}


def trials(
    effects: dict[str, float], selection: float, interaction: float, seed: float, count: int = 40, runs: int = 3
) -> pa.Table:
    """Simulated trials: standard deviations of the three parts, and the mean of each algorithm."""
    rng = np.random.default_rng(5)
    common = rng.normal(0, selection, count)
    rows: dict[str, list[Any]] = {
        name: [] for name in ("status", "algorithm", "selection", "seed", "mean_log_mrd", "completeness")
    }
    for algorithm, effect in effects.items():
        own = rng.normal(0, interaction, count)
        for number in range(count):
            for run in range(runs):
                value = effect + common[number] + own[number] + rng.normal(0, seed)
                row = ("finished", algorithm, f"s{number}", run, 1e-6 * number - common[number], value)
                for name, each in zip(rows, row, strict=True):
                    rows[name].append(each)
    return pa.table(rows)


SPEC = Fig2Spec(measures={"completeness": 1.0})


def test_all_by_selection() -> None:
    found = answer(trials({"A": 0.0, "B": 0.05}, 1.0, 0.5, 0.05), SPEC, MARGINS)
    shares = {row["part"]: row for row in found.tables["fig2-shares"].to_pylist()}
    within = shares["within an algorithm: selection and algorithm×selection"]
    truth = (1.0 + 0.25) / (1.0 + 0.25 + 0.0025)
    assert within["low"] < truth < within["high"]
    assert within["low"] > 0.95
    # Whichever of the two is the better one, it is behind more often than seeds explain.
    assert [verdict.word for verdict in found.verdicts] == [HOLDS, HOLDS]
    # 0.05 apart with a standard deviation of 0.7 between selections: nobody can tell.
    assert "Not separable: " in " ".join(found.sentences)
    (pair,) = found.tables["fig2-pairs"].to_pylist()
    assert not pair["separable"]
    assert 0.2 < pair["reversal_rate"] < 0.8
    # The score falls by one where the difficulty (here minus the common part) rises by one.
    assert "Per unit of mean log MRD the completeness changes by −" in " ".join(found.sentences)


def test_reversals_that_no_seed_explains() -> None:
    found = answer(trials({"A": 0.0, "B": 0.6}, 0.3, 0.5, 0.02, count=60), SPEC, MARGINS)
    (pair,) = found.tables["fig2-pairs"].to_pylist()
    assert (pair["better"], pair["worse"]) == ("B", "A")
    # P(N(0.6, 0.5² + 0.5²) < 0) = 19.8 %, and the seeds alone never turn it.
    assert pair["reversal_low"] < 0.198 < pair["reversal_high"]
    assert pair["reversal_by_seeds"] < 0.01
    assert pair["separable"]
    assert [verdict.word for verdict in found.verdicts] == [HOLDS, HOLDS]
    # One-sided 95 %: (1.645 × 0.707 / 0.6)² = 3.8 selections.
    assert pair["selections_low"] <= 4 <= pair["selections_high"]


def test_all_by_seed_and_none_reversed() -> None:
    found = answer(trials({"A": 0.0, "B": 9.0}, 0.0, 0.0, 1.0, count=100), SPEC, MARGINS)
    assert [verdict.word for verdict in found.verdicts][1] == NO_EFFECT
    rows = found.tables["fig2-ranking"].to_pylist()
    assert [(row["algorithm"], row["rank_best"], row["rank_worst"]) for row in rows] == [("B", 1, 1), ("A", 2, 2)]


def test_what_is_lower_is_better_is_turned() -> None:
    table = trials({"A": 0.0, "B": 9.0}, 0.1, 0.1, 0.1)
    found = answer(table, Fig2Spec(measures={"completeness": -1.0}), MARGINS)
    assert found.tables["fig2-ranking"].to_pylist()[0]["algorithm"] == "A"


def test_trials_that_failed_and_measures_that_do_not_vary() -> None:
    table = trials({"A": 0.0, "B": 1.0}, 1.0, 0.5, 0.1)
    status = table["status"].to_pylist()
    status[0] = "diverged"
    table = table.set_column(0, "status", pa.array(status)).append_column("flat", pa.array([1.0] * table.num_rows))
    found = answer(table, Fig2Spec(measures={"completeness": 1.0, "flat": 1.0}), MARGINS)
    text = " ".join(found.sentences)
    assert f"1 of {table.num_rows} trials did not finish" in text
    assert "flat does not vary" in text
    assert "on 39 selections" in text
    assert "1 of 40 selections are not complete" in text
    first, second = found.tables["fig2-failures"].to_pylist()
    assert (first["algorithm"], first["trials"], first["failed"]) == ("A", 120, 1)
    assert first["share_low"] < 1 / 120 < first["share_high"]
    assert (second["failed"], second["share"], second["share_low"]) == (0, 0, 0)
    with pytest.raises(UserError, match="there is nothing to compare"):
        answer(table, Fig2Spec(measures={"flat": 1.0}), MARGINS)
    with pytest.raises(UserError, match="measures has 'fame': expected columns"):
        answer(table, Fig2Spec(measures={"fame": 1.0}), MARGINS)


def test_thirds() -> None:
    rows = [
        {"status": "finished", "algorithm": a, "level": level, "mean_log_mrd": 1.0, "completeness": value + seed}
        for a in ("A", "B")
        for level, value in (("easy", 1.0), ("medium", 2.0), ("hard", 3.0))
        for seed in (0.0, 0.5)
    ]
    found = fig2.third_rows(pa.Table.from_pylist(rows), ["completeness"])
    assert [(row["algorithm"], row["third"], row["completeness"], row["runs"]) for row in found] == [
        (a, level, value + 0.25, 2) for a in ("A", "B") for level, value in (("easy", 1), ("medium", 2), ("hard", 3))
    ]
