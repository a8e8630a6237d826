"""Logs against the tables of the run that they are of, each read by its own library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.jobs import unlearn as unlearning_job
from bench.jobs.logs import LOG_FIELDS, Logging, SweepLogs
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
        Logging(log=["wandb"]).check_packages()
