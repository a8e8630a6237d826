"""Logs against the tables of the run that they are of, each read by its own library."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.jobs import unlearn as unlearning_job
from bench.jobs.logs import LOG_FIELDS, LOGGED, Logging, SweepLogs
from bench.jobs.sweep import preview_sweep, sweep
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.unlearn import UnlearnSpec, unlearn
from scoring.errors import UserError
from tests.tiny_folders import pairs, write_jsonl

COLUMNS = ("forget_loss", "gradient_norm", "learning_rate", "loss")


class Killed(Exception):
    pass


def spec_of(model: Path, folder: Path, log: Sequence[str]) -> UnlearnSpec:
    task = write_jsonl(folder / "task.jsonl", pairs(6))
    return UnlearnSpec(
        model=str(model), task=str(task), algorithm="GA", workers=0, epochs=3, batch_size=2, early_stopping=False,
        check_every=0, evaluate_samples=2, checkpoint_every=2, log=list(log),
    )  # fmt: skip


@pytest.fixture
def killed_and_continued(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run that is killed an update after its checkpoint and continued, with logs of some kinds: folder and tables."""

    def made(*log: str) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
        spec, out = spec_of(model_folder, tmp_path, log), tmp_path / "run"
        train_here = unlearning_job.train_here

        def dies(job: Any, device: str, **more: Any) -> Any:
            def observe(progress: Any) -> None:
                if progress.step == 5:
                    raise Killed

            return train_here(job, device, observe, **more)

        with monkeypatch.context() as patch:
            patch.setattr(unlearning_job, "train_here", dies)
            with pytest.raises(Killed):
                unlearn(spec, out, progress=False)
        result = unlearn(spec, out, progress=False)
        assert result.record["spec"].keys().isdisjoint(LOG_FIELDS)
        return out / "logs", result.steps.to_pylist(), result.epochs.to_pylist()

    return made


def test_tensorboard_and_json_lines_have_each_row_once(killed_and_continued: Any) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, steps, epochs = killed_and_continued("tensorboard", "jsonl")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for name in COLUMNS:
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in steps]  # they are fp32 there
    recall = [(event.step, event.value) for event in events.Scalars("eval/forget_rouge_l_recall")]
    assert recall == [(row["step"], pytest.approx(row["forget_rouge_l_recall"], rel=1e-6)) for row in epochs]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    of_steps = [line for line in lines if "loss" in line]
    assert [{key: line[key] for key in ("step", *COLUMNS)} for line in of_steps] == [
        {key: row[key] for key in ("step", *COLUMNS)} for row in steps
    ]
    assert [line["epoch"] for line in lines if "eval_mean_abs_delta" in line] == [row["epoch"] for row in epochs]


def test_mlflow_has_each_row_once(killed_and_continued: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder, steps, _ = killed_and_continued("mlflow")
    client = mlflow.MlflowClient((folder / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mrd-bench").experiment_id])
    for name in COLUMNS:
        history = sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name))
        assert history == [(row["step"], row[name]) for row in steps]


def test_wandb_writes_offline_runs_with_the_numbers(killed_and_continued: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, steps, _ = killed_and_continued("wandb")
    losses = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in row:
                losses.append((int(float(row["train/global_step"])), float(row["train/loss"])))
    assert sorted(losses) == [(row["step"], pytest.approx(row["loss"])) for row in steps]


def test_a_sweep_logs_each_finished_trial_once(tmp_path: Path) -> None:
    logs = SweepLogs(Logging(log=["jsonl"]), tmp_path)
    epochs = [{"epoch": 0, "step": 0, "loss": None}, {"epoch": 1, "step": 3, "loss": -1.5}]
    result = {"spec": {"spec_hash": "abc"}, "status": "finished", "epochs": epochs, "values": {**epochs[1], "ua": 0.5}}
    for _ in range(2):
        logs.add("abc", "GA, all, seed 0", result)
    lines = [json.loads(line) for line in (tmp_path / "logs/abc/log.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 0, "epoch": 0.0},
        {"step": 3, "epoch": 1.0, "eval_loss": -1.5, "eval_ua": 0.5},
    ]


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^log wandb needs the package wandb: pip install 'mrd-bench\[log\]'$"):
        Logging(log=["wandb"]).check_logs()


def test_a_log_that_fails_ends_alone_and_is_made_up_for(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that cannot be opened, and one that refuses a row; the finished run, given again, logs what is missing."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, out = tmp_path / "logs", tmp_path / "run"
    folder.mkdir()
    in_the_way = folder / "tensorboard"
    in_the_way.write_text("")
    spec = dataclasses.replace(spec_of(model_folder, tmp_path, ["tensorboard", "jsonl"]), log_dir=str(folder))
    steps = unlearn(spec, out, progress=False).steps.to_pylist()

    def said() -> list[str]:
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("mrd-bench")]

    (line,) = said()
    assert line.startswith("mrd-bench: nothing more is logged to tensorboard (")
    written = (folder / "log.jsonl").read_text()
    assert written.count('"loss"') == len(steps)

    in_the_way.unlink()
    (folder / LOGGED).write_text((folder / LOGGED).read_text().replace('"jsonl"', '"other"'))
    (folder / "log.jsonl").unlink()
    (folder / "log.jsonl").symlink_to("/dev/full")
    unlearn(spec, out, progress=False)
    (line,) = said()
    assert line.startswith("mrd-bench: nothing more is logged to jsonl ([Errno 28] No space left on device)")
    (folder / "log.jsonl").unlink()
    for _ in range(2):
        unlearn(spec, out, progress=False)
        assert said() == []
        assert (folder / "log.jsonl").read_text() == written
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in steps]
    # Another run's rows would be taken for logged.
    other = dataclasses.replace(spec, seed=1)
    with pytest.raises(UserError, match=r"^log_dir .* holds the logs of another run: choose another folder$"):
        unlearn(other, tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


def test_folders_that_cannot_be_logged_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^log_dir .*/file/logs: .*/file is a file; expected a folder$"):
        Logging(log=["jsonl"], log_dir=str(tmp_path / "file" / "logs")).check_logs()
    for job in (sweep, preview_sweep):
        with pytest.raises(UserError, match=r"^log_dir is the folder of logs, and there are none: name them with log"):
            job(SweepSpec(base={}), tmp_path / "out", logging=Logging(log_dir=str(tmp_path)))  # type: ignore[operator]
