"""`--dry-run` and `mrd-bench spec`: what they print makes the same thing again, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

from bench.cli.main import main
from bench.files.spec import as_yaml, read_mapping
from tests.bench.jobs.test_unlearn import content
from tests.tiny_folders import pairs, save_model, write_jsonl
from tests.tiny_tofu import write_task


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and a task; nothing in it may change."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "model")
    write_jsonl(folder / "f.jsonl", pairs(8))
    write_jsonl(folder / "m.jsonl", pairs(8)[:3])
    write_jsonl(folder / "r.jsonl", pairs(8, seed=1))
    write_task(folder / "task")
    return folder


def commands(made: Path) -> dict[str, list[str]]:
    model, data = ["--model", str(made / "model")], ["--data", str(made / "f.jsonl"), "--replicas", "0"]
    return {
        "score": ["score", *model, *data, "--estimator", "monte-carlo", "--draws", "3"],
        "difficulty": ["difficulty", *model, *data, "--measure", "nll,length"],
        "truth": ["difficulty", "--truth", *model, *data, "--until", "0.5", "--most-updates", "2"],
        "evaluate": [
            *("evaluate", *model, "--task", str(made / "task" / "tiny.yaml"), "--metrics", "rr,ma,retain_truth_ratio"),
            *("--replicas", "0"),
        ],
        "unlearn": [
            *("unlearn", *model, "--task", str(made / "f.jsonl"), "--retain", str(made / "r.jsonl")),
            *("--algorithm", "IdkDPO", "--epochs", "2", "--evaluate-samples", "2", "--workers", "0"),
            *("--learning-rate", "5e-05"),
        ],
    }


def identity_of(out: Path) -> dict[str, Any]:
    if out.is_dir():
        return json.loads((out / "spec.json").read_text())
    return json.loads(pq.read_schema(out).metadata[b"mrd_bench.spec"])


def printed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    assert main(command) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["score", "difficulty", "truth", "evaluate", "unlearn"])
def test_what_is_printed_makes_the_same_again(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = commands(made)[name]
    verb = command[: 1 + (name == "truth")]
    out = tmp_path / ("run" if name == "unlearn" else "out.parquet")
    before = content(made)
    preview = printed(capsys, *command, "--out", str(out), "--dry-run")
    assert not list(tmp_path.iterdir())
    assert "# output  new" in preview
    printed(capsys, *command, "--out", str(out))
    identity = identity_of(out)
    assert f"# spec    {identity['spec_hash']}" in preview
    assert "done already" in printed(capsys, *command, "--out", str(out), "--dry-run")
    stored = printed(capsys, "spec", str(out))
    assert content(made) == before
    # From another folder, where relative paths would mean something else.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    here = ["--workers", "0"] if name == "unlearn" else ["--replicas", "0"]
    for text, more in ((preview, []), (stored, here)):
        Path("spec.yaml").write_text(text)
        again = printed(capsys, *verb, "--spec", "spec.yaml", "--out", str(out), "--dry-run", *more)
        assert f"# spec    {identity['spec_hash']}" in again
        assert "done already" in again
    other = ["--seed", "7"] if name in ("score", "unlearn", "evaluate") else ["--samples", "3"]
    assert main([*verb, "--spec", "spec.yaml", "--out", str(out), "--dry-run", *other]) == 2
    assert "of another spec" in capsys.readouterr().err


SWEEP = """\
base: {{model: {made}/model, task: {made}/f.jsonl, algorithm: GA, epochs: 1, evaluate: false, check_every: 0}}
vary: {{seed: [0, 1], learning_rate: [5e-5, 1.0e-4]}}
selections: [{{kind: random, size: 3, count: 2}}, {{kind: thirds}}]
"""


def test_sweeps(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four configurations on two draws and three thirds."""
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(made=made))
    out = tmp_path / "sweeps" / "one"
    command = ["sweep", str(tmp_path / "sweep.yaml"), "--out", str(out), "--concurrent", "0", "--threads", "1"]
    preview = printed(capsys, *command, "--dry-run")
    assert not out.parent.exists()
    assert "# count   20 trials" in preview
    threads = torch.get_num_threads()
    printed(capsys, *command)
    assert torch.get_num_threads() == threads
    assert pq.read_table(out / "trials.parquet").num_rows == 20
    for text in (preview, printed(capsys, "spec", str(out))):
        (tmp_path / "again.yaml").write_text(text)
        again = printed(capsys, "sweep", str(tmp_path / "again.yaml"), *command[2:], "--dry-run")
        assert f"# spec    {identity_of(out)['spec_hash']}" in again
        assert "done already" in again


def test_where_a_run_would_go_on(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of four updates two are kept by a start that was stopped there; another process that writes is waited for."""
    out = tmp_path / "run"
    command = [*commands(made)["unlearn"], "--out", str(out)]
    printed(capsys, *command)
    # As a start leaves it that is killed after the first epoch.
    (out / "run.json").unlink()
    (out / "checkpoints" / "step-00000002").mkdir(parents=True)
    before = content(out)
    assert "would continue from update 2 of 4" in printed(capsys, *command, "--dry-run")
    assert content(out) == before
    with FileLock(out / ".lock"):
        assert main([*command, "--dry-run"]) == 2
    assert "another run is writing here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flaws"),
    [
        ("score", ["--model", "MADE/none"]),
        ("score", ["--data", "MADE/none.jsonl"]),
        ("score", ["--out", "MADE/out.txt"]),
        ("score", ["--out", "MADE/f.jsonl/out.parquet"]),
        ("difficulty", ["--measure", "gradient-cosine"]),
        ("truth", ["--engine", "vllm", "--replicas", "1"]),
        ("evaluate", ["--metrics", "rrr"]),
        ("evaluate", ["--original", "MADE/none"]),
        ("unlearn", ["--task", "MADE/none.jsonl"]),
        ("unlearn", ["--out", "MADE"]),
        ("unlearn", ["--out", "MADE/f.jsonl"]),
        ("unlearn", ["--selection", "MADE/r.jsonl"]),
        ("unlearn", ["--early-stopping", "--check-every", "0"]),
    ],
)
def test_a_dry_run_is_refused_as_the_command_is(
    name: str, flaws: Sequence[str], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("run" if name == "unlearn" else "out.parquet")
    # Of a flag that is given twice the last one counts.
    command = [*commands(made)[name], "--out", str(out), *(flaw.replace("MADE", str(made)) for flaw in flaws)]
    lines = []
    for more in ([], ["--dry-run"]):
        assert main([*command, *more]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        lines.append(printed.err)
    assert lines[0] == lines[1]
    assert not list(tmp_path.iterdir())


def test_a_training_run(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--workers", "0", "--out", str(tmp_path / "run")]
    own = ["--model", str(made / "model"), "--task", str(made / "f.jsonl"), "--epochs", "1", "--no-evaluate"]
    preview = printed(capsys, *train, *own, "--dry-run")
    assert not list(tmp_path.iterdir())
    printed(capsys, *train, *own)
    assert f"# spec    {identity_of(tmp_path / 'run')['spec_hash']}" in preview
    pair = printed(
        capsys, *train[:3], "--out", str(tmp_path / "pair"), *own, "--and-retain", str(made / "m.jsonl"), "--dry-run"
    )
    assert "# output  original: new; retain-only: new" in pair
    (tmp_path / "spec.yaml").write_text(printed(capsys, "spec", str(tmp_path / "run")))
    assert main([*train, "--spec", str(tmp_path / "spec.yaml")]) == 0
    assert "holds this run" in capsys.readouterr().err


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    values = {
        "a": "5e-5",
        "b": 5e-5,
        "c": "yes",
        "d": None,
        "e": ["2024-01-01", 1.0, "null"],
        "f": {"g": "1:2"},
        "h": "ö\n",
    }
    (tmp_path / "values.yaml").write_text(as_yaml(values), encoding="utf-8")
    assert read_mapping(tmp_path / "values.yaml")[0] == values


def test_what_is_no_result(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, problem in (
        (tmp_path / "none", "does not exist"),
        (made, "holds no spec.json of a run"),
        (made / "f.jsonl", "f.jsonl"),
    ):
        assert main(["spec", str(path)]) == 2
        line = capsys.readouterr().err
        assert problem in line
        assert line.count("\n") == 1
