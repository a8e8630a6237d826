"""The benchmark compares what is the same mathematics, loses no run, and counts right; its speeds are read, not
asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.objectives import ALGORITHMS
from bench.cli import main
from bench.jobs.unlearn import UnlearnSpec
from bench.speed.unlearning import trainer
from bench.speed.unlearning.inputs import COMPARED, Sizes
from bench.speed.unlearning.loop import TrainingLoop, distinct_algorithms
from bench.speed.unlearning.run import run_benchmark
from bench.speed.unlearning.stopping import add_paced_seconds, change_by_alpha, in_words
from bench.speed.unlearning.trainer import IGNORED, compare_with_trainer, median, padded
from scoring.errors import UserError
from scoring.samples import Sample
from tests.tiny_folders import pairs, write_jsonl

TINY = Sizes(
    warm_up=1,
    rounds=1,
    pairs=2,
    segment=2,
    losses=5,
    refreshes=1,
    draws=6,
    timed_draws=2,
    batch_sizes=(4, 64),
    batch_size_samples=20,
    epochs=1,
    check_every=6,
)


@pytest.fixture(scope="module")
def retain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("retain") / "retain.jsonl", pairs(10, seed=1))


@pytest.fixture
def spec(model_folder: Path, data_file: Path, retain_file: Path) -> UnlearnSpec:
    return UnlearnSpec(
        model=str(model_folder),
        task=str(data_file),
        retain=str(retain_file),
        algorithm="GradDiff",
        alpha=0.0,
        evaluate=False,
        workers=0,
    )


def test_everything_is_measured_and_written(cluster, model_folder, data_file, retain_file, tmp_path, capsys):
    out = tmp_path / "new" / "figures.json"
    run_benchmark(str(model_folder), str(data_file), None, str(retain_file), 2, str(out), TINY)
    printed = capsys.readouterr().out

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    figures = json.loads(out.read_text(), parse_constant=refuse)
    assert (figures["forget_samples"], figures["retain_samples"], figures["batch_size"]) == (24, 10, 4)
    assert set(figures["speed"]) == set(distinct_algorithms())
    assert all(row["tokens_per_second"] > 0 and row["round_updates"] == 6 for row in figures["speed"].values())

    assert set(figures["trainer"]) == set(COMPARED)
    for row in figures["trainer"].values():
        assert row["loss_difference"] < 1e-4
        assert len(row["ratios"]) == TINY.pairs
        assert row["ratio"]["value"] == pytest.approx(np.mean(row["ratios"]))  # the median of two
        assert row["ratio"]["low"] is None  # no interval from two

    refresh = figures["refresh"]
    assert set(refresh["batch_size_seconds"]) == {"4"}
    assert "64 samples: left out, there are 20" in printed
    # The default recipe: m = 2.
    assert {name: row["refreshes"] for name, row in refresh["shares"].items()} == {
        n: 2 + (n != "NPO") for n in COMPARED
    }
    share = 2 * refresh["seconds"]["gradient"] / (4 * figures["speed"]["NPO"]["round_seconds"])
    assert refresh["shares"]["NPO"]["gradient"] == pytest.approx(share)

    runs = figures["stopping"]["runs"]
    asked = {(name, alpha, seed) for name in COMPARED for alpha in (0, 1, -1) for seed in (0, 1)}
    assert {(row["algorithm"], row["alpha"], row["seed"]) for row in runs} == asked
    assert len(runs) == len(asked)
    for row in runs:
        assert row["seconds"] == row["training"] + row["mrd"]
        assert (row["mrd"] > 0, row["refreshes"]) == ((True, 1) if row["alpha"] else (False, 0))
        assert row["updates"] == 6  # one epoch of six updates: all are forgotten at its end, or it is given up
    for row in figures["stopping"]["means"]:
        own = [r for r in runs if (r["algorithm"], r["alpha"]) == (row["algorithm"], row["alpha"])]
        assert row["censored"] == sum(not r["reached"] for r in own)
    # A random model is not made to forget in six updates: nothing is hidden.
    assert sum(row["censored"] for row in figures["stopping"]["means"]) > 0
    assert "pairs left out: not all forgotten" in printed


def test_costs_are_added_up(model_folder, data_file, retain_file, tmp_path):
    """Of a run of two epochs: six updates each, and three looks and evaluations. What costs less is the same."""
    out = tmp_path / "costs.json"
    command = f"benchmark costs --model {model_folder} --data {data_file} --retain {retain_file} --turns 2 --out {out}"
    assert main(command.split()) == 0
    figures = json.loads(out.read_text())
    assert figures["largest_difference_of_el"] == 0
    seconds = {name: float(np.median(taken)) for name, taken in figures["seconds"].items()}
    now = figures["run"]["now"]
    assert now["training"] == pytest.approx(12 * seconds["update, now"])
    assert now["looks"] == pytest.approx(3 * seconds["look, MA, now"])
    assert now["share"] == pytest.approx((now["looks"] + 3 * seconds["evaluation, now"]) / now["training"])
    assert figures["update_padding"]["now"] <= figures["update_padding"]["before"]


def test_the_loop_trains_on_the_batches_that_trainer_is_given(spec: UnlearnSpec, tmp_path: Path):
    loop = TrainingLoop(spec, 7, tmp_path)
    loop.advance(7)
    batches = loop.batches(7)
    assert [row["samples"] for row in loop.steps] == [[p["forget"].sample_id for p in batch] for batch in batches]
    lengths = [sum(sample.length for pair in batch for sample in pair.values()) for batch in batches]
    assert [row["tokens"] for row in loop.steps] == lengths
    # 7 x 4 draws of 10: every retained sample comes twice before any comes a third time.
    retained = [pair["retain"].sample_id for batch in batches for pair in batch]
    assert sorted(retained[:10]) == sorted(retained[10:20]) == sorted({*retained})


def test_another_objective_is_noticed(spec: UnlearnSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trainer, "BETA", 0.11)
    monkeypatch.setattr(trainer, "COMPARED", ("NPO",))
    with pytest.raises(RuntimeError, match="NPO: our loss and Trainer's differ"):
        compare_with_trainer(spec, TINY, tmp_path)


def test_padded_by_hand():
    short = Sample("a", np.array([5, 6, 7]), np.array([False, False, True]))
    long = Sample("b", np.array([1, 2, 3, 4]), np.array([False, True, True, True]))
    made = padded([short, long], pad=9)
    assert made["input_ids"].tolist() == [[5, 6, 7, 9], [1, 2, 3, 4]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert made["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED], [IGNORED, 2, 3, 4]]
    assert all(tensor.dtype == torch.int64 for tensor in made.values())


def test_objectives_come_once():
    """SGA and CGA have GA's, AltPO that of IdkDPO with other answers, and TaskVector and Relearn learn alike."""
    assert distinct_algorithms() == [name for name in ALGORITHMS if name not in ("SGA", "CGA", "AltPO", "Relearn")]


def test_median_has_an_interval_from_ten_values_on():
    values = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 30])
    found = median(values)
    assert found.value == 5.5
    assert 2 <= found.low < 5.5 < found.high <= 9
    assert math.isnan(median(values[:9]).low)


def row(alpha: float, seed: int, updates: int, seconds: float, reached: bool = True) -> dict[str, Any]:
    return {
        "algorithm": "GA",
        "alpha": alpha,
        "seed": seed,
        "reached": reached,
        "updates": updates,
        "tokens": 200 * updates,
        "updates_a_sample": updates / 10,
        "seconds": seconds,
        "paced_seconds": seconds / 2,
    }


def test_changes_are_paired_by_seed():
    rows = [row(0.0, seed, updates, 2.0) for seed, updates in enumerate([70, 80, 90])]
    rows += [row(1.0, seed, updates, 3.0 + seed / 10) for seed, updates in ((2, 85), (0, 60), (1, 80))]
    found = change_by_alpha(rows, "GA", 1.0)
    # Differences -10, 0, -5: mean -5, s = 5; t_{0.975, 2} = 4.302653.
    half = 4.302653 * 5 / math.sqrt(3)
    assert list(found["updates"]["difference"].values()) == pytest.approx([-5, -5 - half, -5 + half], rel=1e-6)
    ratio = np.array([225, 225 - 3 * half, 225 + 3 * half]) / 240
    assert list(found["updates"]["ratio"].values()) == pytest.approx(ratio, rel=1e-6)
    assert found["tokens"]["difference"]["value"] == pytest.approx(-1000)
    assert (found["pairs"], found["left_out"]) == (3, 0)
    words = in_words(found)
    assert "updates x 0.94 [0.78, 1.09], no difference shown; time with MRD x 1.55 [1.43, 1.67], more" in words
    assert words.endswith("The paper's time is x 0.77 (Table 10), outside the interval at one pace")


def test_pace_by_hand():
    def run(name: str, tokens: int, training: float, refreshes: int, mrd: float) -> dict[str, Any]:
        seconds = {"training": training, "mrd": mrd}
        return {"algorithm": name, "tokens": tokens, "refreshes": refreshes, **seconds}

    # Seconds a token: 0.01, 0.02, 0.06; a refresh: 1, 3.
    runs = [run("GA", 100, 1.0, 0, 0.0), run("GA", 200, 4.0, 4, 4.0), run("GA", 300, 18.0, 2, 6.0)]
    other = run("PO", 10, 1.0, 0, 0.0)
    diverged = {"algorithm": "PO", "diverged": "why"}
    add_paced_seconds([*runs, other, diverged])
    assert [r["paced_seconds"] for r in runs] == pytest.approx([2.0, 4.0 + 4 * 2, 6.0 + 2 * 2])
    assert other["paced_seconds"] == pytest.approx(1.0)
    assert "paced_seconds" not in diverged


def test_runs_that_did_not_finish_are_left_out_and_named():
    rows = [row(0.0, seed, 70, 2.0) for seed in range(3)] + [row(-1.0, seed, 90, 3.0, seed < 2) for seed in range(3)]
    rows.append({"algorithm": "GA", "alpha": 1.0, "seed": 0, "reached": False, "diverged": "why"})
    found = change_by_alpha(rows, "GA", -1.0)
    assert (found["pairs"], found["left_out"], found["updates"]["difference"]["value"]) == (2, 1, 20)
    assert "(1 of 3 pairs left out: not all forgotten)" in in_words(found)
    assert "paper" not in in_words(found)
    assert in_words(change_by_alpha(rows, "GA", 1.0)).endswith(
        "(1 of 1 pairs left out: not all forgotten): nothing to compare"
    )


def test_bad_input_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert main(["benchmark", "unlearning", "--seeds", "1"]) == 2
    assert "--seeds is 1: expected at least 2, or 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["benchmark", "unlearning", "--samples", "3"])  # of the other benchmark
    assert "unknown argument '--samples'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["benchmark", "unlearnin"])
    assert "did you mean 'unlearning'?" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs accelerate: pip install"):
        run_benchmark("authors", "authors", None, None, 0, None)


def test_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same run without a limit, and under one that Python itself hardly fits under."""
    out = tmp_path / "memory.json"
    rows = []
    for limit in ([], ["--limit", "1e8"]):
        assert main(["benchmark", "memory", "--params", "2e5", "--ways", "adapters", *limit, "--out", str(out)]) == 0
        figures = json.loads(out.read_text())
        rows.append(figures["ways"]["adapters"])
    assert [row["fits"] for row in rows] == [True, False]
    assert rows[1]["error"]
    assert figures["weights"] / 4 == pytest.approx(figures["params"], rel=0.01)
    for kind in ("private", "resident", "data"):
        assert rows[0][kind] > figures["weights"]
        assert rows[0][kind] > rows[1][kind] > 0
    assert rows[1]["data"] <= 1.5e8, "it was looked at before it had the limit"
    printed = capsys.readouterr().out
    assert f"{rows[0]['private'] / 1e9:.2f}" in printed
    assert "no" in printed.splitlines()[-2].split()
