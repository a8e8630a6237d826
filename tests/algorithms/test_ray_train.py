"""Unlearning on Ray Train: any number of workers, DDP or FSDP2, dying ones included, ends with the same weights as one
process that nobody disturbs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from safetensors.torch import load_file

from algorithms.ray_train import TrainingJob, train_on_ray
from bench.cli import main
from bench.jobs.resources import SweepResources
from bench.jobs.sweep import sweep
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.unlearn import UnlearnResult, UnlearnSpec, corpus_of, datasets_of, unlearn
from bench.models.find import find_model
from scoring.cluster import Footprint, versions
from scoring.errors import UserError
from tests.conftest import LOGICAL_CPUS
from tests.paths import ROOT
from tests.processes import descendants, kill, wait_for
from tests.tiny_folders import pairs, write_jsonl

# Different orders of summation, through AdamW: it divides by the gradient's own size, also where that is rounding.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def spec(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> UnlearnSpec:
    """A retain term, a reference, a refresh and early stopping; batches that two workers share unevenly. A checkpoint
    after each update leaves time to kill something."""
    retain = write_jsonl(tmp_path_factory.mktemp("retain") / "retain.jsonl", pairs(10, seed=1))
    return UnlearnSpec(
        model=str(model_folder),
        task=str(data_file),
        retain=str(retain),
        algorithm="NPO-GradDiff",
        alpha=1.0,
        epochs=5,
        batch_size=3,
        learning_rate=1e-4,
        check_every=2,
        el_n=2,
        batch_tokens=60,
        checkpoint_every=1,
        evaluate_samples=5,
        workers=0,
    )


@pytest.fixture(scope="module")
def by_forecast(spec: UnlearnSpec) -> UnlearnSpec:
    """The same with all that goes by difficulty and needs whole weights."""
    groups = [{"share": 0.5, "algorithm": "GA"}, {"share": 0.5, "forget_weight": 0.5}]
    return dataclasses.replace(
        spec, weights="flip-time", reward=0.5, hold_penalty=0.05, schedule={"by": "mrd", "groups": groups}
    )


def alone(spec: UnlearnSpec, out: Path) -> UnlearnResult:
    """The run in this process, undisturbed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return unlearn(spec, out, progress=False)
    finally:
        torch.set_num_threads(before)


def weights(result: UnlearnResult) -> dict[str, torch.Tensor]:
    return load_file(str(result.model / "model.safetensors"))


def assert_close(found: UnlearnResult, expected: UnlearnResult, tolerance: float) -> None:
    """The same draws and losses, and weights that differ by at most `tolerance` of how far they moved."""
    for name in ("step", "samples", "tokens"):
        assert found.steps[name].to_pylist() == expected.steps[name].to_pylist()
    for name in ("loss", "gradient_norm"):
        torch.testing.assert_close(
            torch.tensor(found.steps[name].to_pylist()),
            torch.tensor(expected.steps[name].to_pylist()),
            rtol=1e-3 if tolerance else 0,
            atol=tolerance,
        )
    for name in ("updates", "updates_until_forgotten", "forgotten_at_step"):
        assert found.samples[name].to_pylist() == expected.samples[name].to_pylist()
    ease, true_ease = (
        pq.read_table(each.folder / "difficulty.parquet")["mrd"].to_pylist() for each in (found, expected)
    )
    np.testing.assert_allclose(ease, true_ease, rtol=1e-3 if tolerance else 0)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def after_checkpoint(run: Path, step: int, action: Callable[[], None]) -> threading.Thread:
    """Do something as soon as the run has a checkpoint of that step or a later one."""

    def reached() -> bool:
        return any(int(path.name.removeprefix("step-")) >= step for path in run.glob("checkpoints/step-*"))

    def wait() -> None:
        wait_for(reached, 300)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def train_workers() -> list[int]:
    return [pid for pid, command in descendants(os.getpid()).items() if "RayTrainWorker" in command]


def wait_until_they_form_a_group() -> list[int]:
    """Of two workers, as soon as one is about to meet the other; that takes a moment, so only the two are looked at."""
    wait_for(lambda: len(train_workers()) == 2, 300)
    workers = train_workers()

    def command(pid: int) -> bytes:
        return Path(f"/proc/{pid}/cmdline").read_bytes()

    wait_for(lambda: any(b"_setup_torch_process_group" in command(pid) for pid in workers), 300, pause=0.001)
    return workers


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_workers_and_kills_change_nothing(
    spec: UnlearnSpec, by_forecast: UnlearnSpec, tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths are relative to this process's working folder, which is not the workers'."""
    monkeypatch.chdir(tmp_path)
    spec = by_forecast if strategy == "ddp" else spec
    in_this_process = alone(spec, tmp_path / "alone")
    assert spec.retain is not None
    two = dataclasses.replace(
        spec,
        model=os.path.relpath(spec.model),
        task=os.path.relpath(spec.task),
        retain=os.path.relpath(spec.retain),
        workers=2,
        strategy=strategy,
    )
    killed: list[int] = []

    def kill_one() -> None:
        killed.append(train_workers()[-1])
        kill(killed[-1])

    def kill_a_starting_one() -> None:
        killed.append(wait_until_they_form_a_group()[-1])
        kill(killed[-1])
        assert not list((tmp_path / "killed").glob("checkpoints/step-*"))

    # Room for two workers and no more: those of a start that failed must give theirs back.
    others = ray.util.placement_group([{"CPU": 1}] * (LOGICAL_CPUS - 2))
    ray.get(others.ready())
    if strategy == "ddp":
        # The other one waits for it in vain, as they form their group, and must not hold up the two that come next.
        starting = threading.Thread(target=kill_a_starting_one, daemon=True)
        starting.start()
    killer = after_checkpoint(tmp_path / "killed", 5, kill_one)
    disturbed = unlearn(two, "killed", progress=False)
    killer.join()
    ray.util.remove_placement_group(others)
    assert len(killed) == (2 if strategy == "ddp" else 1)
    assert not set(killed) & set(train_workers())
    assert_close(disturbed, in_this_process, TOLERANCE)
    # Once is enough: what is continued from does not depend on how the weights were spread.
    if strategy == "ddp":
        undisturbed = unlearn(two, tmp_path / "undisturbed", progress=False)
        assert_close(disturbed, undisturbed, 0)


@pytest.mark.usefixtures("cluster")
def test_a_sweep_whose_trials_have_workers(spec: UnlearnSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same trial, by two workers and in the trial's own process. Paths are relative to this process's folder."""
    monkeypatch.chdir(tmp_path)
    base = {
        "model": os.path.relpath(spec.model),
        "task": os.path.relpath(spec.task),
        "retain": os.path.relpath(spec.retain or ""),
        "algorithm": "GradDiff",
        "max_steps": 3,
        "check_every": 0,
        "early_stopping": False,
    }
    by_two, by_one = (
        sweep(
            SweepSpec(base=base | {"workers": workers}),
            f"sweep{workers}",
            f"trials{workers}",
            SweepResources(concurrent=concurrent),
            progress=False,
        ).trials
        for workers, concurrent in ((2, 1), (0, 0))
    )
    assert by_two["reason"].to_pylist() == [None]
    assert by_two["trial"] == by_one["trial"]
    for name in ("loss", "delta_norm", "retain_probability"):
        assert by_two[name].to_pylist() == pytest.approx(by_one[name].to_pylist(), rel=1e-4)


@pytest.mark.usefixtures("cluster")
def test_a_users_mistake_is_not_tried_again(spec: UnlearnSpec, tmp_path: Path) -> None:
    absurd = dataclasses.replace(spec, algorithm="GradDiff", workers=1, learning_rate=1e6)
    with pytest.raises(UserError, match=r"diverged at update \d+.*lower learning_rate"):
        unlearn(absurd, tmp_path / "run", progress=False)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.usefixtures("cluster")
def test_an_error_that_would_come_again_ends_all_workers(spec: UnlearnSpec, tmp_path: Path) -> None:
    """The first worker fails alone, as it saves, while the other waits for it. No second start is needed to say so."""
    checked = dataclasses.replace(spec, algorithm="GradDiff", workers=2, max_failures=0).checked()
    model = find_model(spec.model)
    forget, retain = datasets_of(checked, model.tokenizer)
    corpus, _ = corpus_of(checked, model, forget, retain)
    job = TrainingJob(checked, checked, corpus, model.source, None, tmp_path, model.tokenizer)
    (tmp_path / "checkpoints").write_text("a file where a folder is wanted")
    with pytest.raises(UserError, match=r"^training failed in a worker: \w+Error: .*checkpoints"):
        train_on_ray(job, Footprint())


@pytest.mark.usefixtures("cluster")
def test_a_node_with_other_packages_is_refused(
    spec: UnlearnSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's process has the true ones."""
    own = versions()
    monkeypatch.setattr("algorithms.ray_train.versions", lambda: own | {"numpy": "1.0.0"})
    with pytest.raises(UserError, match=rf"^node \S+ has numpy {own['numpy']} \(the driver has 1.0.0\): install") as e:
        unlearn(dataclasses.replace(spec, workers=1, algorithm="GA"), tmp_path / "run", progress=False)
    assert "\n" not in str(e.value)


@pytest.mark.usefixtures("cluster")
def test_more_workers_than_fit(spec: UnlearnSpec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"50 workers of 1 CPU and 0 GPU: the cluster has room for \d+; lower workers"):
        unlearn(dataclasses.replace(spec, workers=50), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.ray
def test_a_killed_driver_continues(spec: UnlearnSpec, tmp_path: Path) -> None:
    lines = [f"{name}: {value}" for name, value in dataclasses.asdict(spec).items() if value not in (None, {})]
    (tmp_path / "spec.yaml").write_text("\n".join(lines) + "\n")
    run = tmp_path / "run"
    arguments = ["unlearn", "--spec", str(tmp_path / "spec.yaml"), "--out", str(run), "--workers"]
    command = [sys.executable, "-m", "bench.cli", *arguments, "1"]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after_checkpoint(run, 4, lambda: kill(driver.pid)).join()
    assert driver.wait() == -9
    assert not (run / "run.json").exists()
    # At once, while its worker may still be writing; and however it is spread from now on.
    assert main([*arguments, "0"]) == 0
    found = unlearn(spec, run, progress=False)
    assert_close(found, alone(spec, tmp_path / "alone"), TOLERANCE)
