"""From finished work to a store: what real sweeps, runs and score files leave there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from bench.boards.board import boards
from bench.cli import main
from bench.files.origin import git_commit, hardware, origin, package_version
from bench.results.store import Results, read_stores
from tests.tiny_folders import pairs, write_jsonl


@pytest.fixture(scope="module")
def swept(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sweep of two algorithms on three selections, put into a store as it was run; and its inputs."""
    folder = tmp_path_factory.mktemp("swept")
    task = write_jsonl(folder / "task.jsonl", pairs(12))
    spec = {
        "base": {
            "model": str(model_folder),
            "task": str(task),
            "epochs": 1,
            "el_n": 2,
            "learning_rate": 1e-3,
            "evaluate_every": 0,
        },
        "vary": {"algorithm": ["GA", "NPO"]},
        "selections": [{"kind": "random", "size": 4, "count": 3}],
        "forecast": True,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(spec))
    command = ["sweep", str(folder / "sweep.yaml"), "--out", str(folder / "out"), "--concurrent", "0"]
    assert main([*command, "--results", str(folder / "store"), "--experiment", "tiny"]) == 0
    return folder


def by_run(results: Results) -> dict[str, Mapping[str, Any]]:
    return {row["run"]: row for row in results.runs.to_pylist()}


def test_rows_say_what_they_are_and_where_from(swept: Path) -> None:
    results = read_stores([swept / "store"])
    trials = {row["trial"]: row for row in pq.read_table(swept / "out" / "trials.parquet").to_pylist()}
    rows = by_run(results)
    assert rows.keys() == trials.keys()
    assert len(rows) == 6
    for name, row in rows.items():
        trial, spec = trials[name], json.loads(row["spec"])
        assert (row["task"], row["experiment"]) == ("task", "tiny")
        assert (row["algorithm"], row["selection"], row["seed"]) == (trial["algorithm"], trial["selection"], 0)
        assert dict(row["metrics"])["completeness"] == trial["completeness"]
        assert "seconds_training" not in dict(row["metrics"])
        assert row["mean_log_mrd"] == trial["mean_log_mrd"]
        # The model is a random one that knows nothing by heart: no number of updates takes it below that.
        assert row["mean_log_flip_time"] == pytest.approx(trial["mean_log_flip_time"], rel=0, abs=0, nan_ok=True)
        assert spec["spec_hash"] == name
        assert spec["learning_rate"] == 1e-3
        assert spec["selection"] == row["selection"]
        assert len(row["model_fingerprint"]) == 64
        assert row["data_sha256"] == spec["forget_sha256"]
        assert json.loads(row["packages"])["torch"] == package_version("torch")
        assert row["hardware"] == hardware()
        assert row["git_commit"] == git_commit()
    ids = [each["sample_id"] for each in results.samples.to_pylist() if each["run"] in rows]
    assert len(ids) == 24


def test_the_boards_have_texts_and_difficulty(swept: Path) -> None:
    (board,), notes = boards(read_stores([swept / "store"]))
    assert notes == []
    assert set(board.entries) == {"GA", "NPO"}
    written = {str(record["id"]): record for record in map(json.loads, (swept / "task.jsonl").read_text().splitlines())}
    scores = pq.read_table(swept / "out" / "difficulty.parquet").to_pylist()
    mrd = {row["sample_id"]: row["mrd"] for row in scores}
    assert board.texts
    for name, text in board.texts.items():
        assert text.prompt.strip() == written[name]["prompt"].strip()
        assert text.completion.strip() == written[name]["completion"].strip()
        assert text.mrd == mrd[name]
    assert all(each.mean_log_mrd is not None and len(each.ids) == 4 for each in board.selections.values())
    assert all(each.mean_log_flip_time is not None for each in board.selections.values())


def test_adding_again_changes_nothing(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(path for path in (swept / "store").rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    assert main(["results", "add", str(swept / "store"), str(swept / "out"), "--experiment", "tiny"]) == 0
    assert "6 runs, 24 values of their samples, 12 scores" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (swept / "store").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_run_and_a_score_file(swept: Path, model_folder: Path, tmp_path: Path) -> None:
    """A trial that was run again by itself is the same run."""
    trial = pq.read_table(swept / "out" / "trials.parquet").to_pylist()[0]
    ids = pq.read_table(swept / "out" / "selections.parquet").to_pylist()
    chosen = [row["sample_id"] for row in ids if row["selection"] == trial["selection"]]
    (tmp_path / "ids.txt").write_text("".join(f"{name}\n" for name in chosen))
    base = yaml.safe_load((swept / "sweep.yaml").read_text())["base"]
    spec = base | {"algorithm": trial["algorithm"], "selection": str(tmp_path / "ids.txt"), "workers": 0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec))
    assert main(["unlearn", "--spec", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]) == 0
    scores = tmp_path / "scores.parquet"
    arguments = ["--model", str(model_folder), "--data", str(swept / "task.jsonl"), "--estimator", "gradient"]
    assert main(["score", *arguments, "--replicas", "1", "--out", str(scores)]) == 0
    store = tmp_path / "store"
    assert main(["results", "add", str(store), str(tmp_path / "run"), str(scores), "--experiment", "single"]) == 0
    results = read_stores([store])
    (row,) = results.runs.to_pylist()
    assert row["run"] == trial["trial"]
    assert dict(row["metrics"])["completeness"] == pytest.approx(trial["completeness"])
    assert row["selection"].startswith("of 4, ")
    assert str(tmp_path) not in row["spec"].replace(str(base["task"]), "")
    assert results.scores.num_rows == 12
    assert results.scores.to_pylist()[0]["estimator"] == "gradient"
    assert main(["leaderboard", str(store), "--out", str(tmp_path / "board")]) == 0
    # The same run in a store of a sweep and in one of its own: one result, no conflict.
    both = [str(swept / "store"), str(store)]
    assert main(["leaderboard", *both, "--out", str(tmp_path / "both")]) == 0


def test_what_cannot_be_added(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pq.read_table(swept / "out" / "selections.parquet"), foreign)
    for path, problem in (
        (tmp_path / "empty", "expected the folder of a finished sweep or run, a score file"),
        (foreign, "not a score file"),
    ):
        assert main(["results", "add", str(tmp_path / "store"), str(path)]) == 2
        err = capsys.readouterr().err
        assert problem in err
        assert err.count("\n") == 1
    # One that cannot be added keeps those before it out as well.
    assert main(["results", "add", str(tmp_path / "store"), str(swept / "out"), str(foreign)]) == 2
    assert not (tmp_path / "store").exists()


def test_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    found = origin("no-such-package")
    assert found["packages"]["no-such-package"] is None
    assert "cores" in found["hardware"]
    assert found["git_commit"] is None or len(found["git_commit"].removesuffix("-dirty")) == 40
    git_commit.cache_clear()
    monkeypatch.setenv("MRD_BENCH_COMMIT", "given")
    assert git_commit() == "given"
    git_commit.cache_clear()
