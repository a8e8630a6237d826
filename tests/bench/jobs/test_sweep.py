"""Sweeps from the command line: what the trials are, what kills, failures and other sweeps do to them."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from algorithms import objectives
from bench.cli import main
from bench.jobs import sweep as sweeps
from bench.jobs import sweep_on_tune
from bench.jobs import trial as trials
from bench.jobs.attack import attack_spec
from bench.jobs.attack_spec import AttackSpec
from bench.jobs.evaluate import evaluate_spec
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.resources import Resources, SweepResources
from bench.jobs.run_folder import read_run
from bench.jobs.sweep import sweep
from bench.jobs.sweep_plan import SweepPlan, SweepSpec
from bench.jobs.sweep_tables import SweepResult, read_sweep
from bench.jobs.trial import TrialContext, TrialStore, run_trial, shareable_weights
from bench.jobs.unlearn import UnlearnSpec, unlearn
from bench.models.find import find_model
from bench.tasks.datasets import load_dataset
from scoring import plugins
from scoring.cluster import versions
from scoring.errors import UserError
from scoring.load import load_model
from scoring.measuring import difficulty
from scoring.settings import build
from tests.paths import ROOT
from tests.processes import descendants, kill, wait_for
from tests.tiny_folders import pairs, write_jsonl
from tests.tiny_tofu import pairs_of, records, taught, write_task

HERE, TWO = SweepResources(concurrent=0), SweepResources(concurrent=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker, so that sums have the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Inputs:
    """A sound sweep of a tiny model on a data file."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.trials = folder, model, folder / "trials"
        (folder / "data").mkdir()
        self.task = write_jsonl(folder / "data" / "task.jsonl", pairs(12))
        self.retain = write_jsonl(
            folder / "data" / "retain.jsonl", [r | {"id": f"kept{r['id']}"} for r in pairs(6, seed=1)]
        )

    def spec(self, base: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        own = {
            "model": str(self.model),
            "task": str(self.task),
            "retain": str(self.retain),
            "epochs": 2,
            "el_n": 2,
            "learning_rate": 1e-3,
            "evaluate_every": 0,
        }
        return {
            "base": own | dict(base or {}),
            "vary": {"algorithm": ["GA", "NPO"]},
            "selections": [{"kind": "random", "size": 6, "count": 2}],
        } | fields

    def file(self, spec: Mapping[str, Any], name: str = "sweep.yaml") -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(dict(spec)))
        return path

    def run(
        self, spec: Mapping[str, Any], name: str = "out", resources: SweepResources = HERE, **more: Any
    ) -> SweepResult:
        return sweep(build(SweepSpec, spec), self.folder / name, self.trials, resources, progress=False, **more)


@pytest.fixture
def inputs(tmp_path: Path, model_folder: Path) -> Inputs:
    return Inputs(tmp_path, model_folder)


def rows_of(result: SweepResult) -> dict[str, dict[str, Any]]:
    return {row["trial"]: row for row in result.trials.to_pylist()}


def timeless(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The tables, without what a clock gave, and without the commit: somebody may be working on the code."""
    return {
        name: [
            {key: value for key, value in row.items() if "seconds" not in key and key != "git_commit"}
            for row in pq.read_table(folder / f"{name}.parquet").to_pylist()
        ]
        for name in ("trials", "epochs", "samples", "selections")
    }


# --- What a trial is ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trial_is_the_run_that_its_row_names(inputs: Inputs) -> None:
    """The same as `mrd-bench unlearn --selection`, to the last digit, also in a worker that has done another trial."""
    result = inputs.run(inputs.spec({"alpha": 1.0}))
    names = {path.read_text(): path for path in (inputs.folder / "out" / "selections").glob("*.txt")}
    table = pq.read_table(inputs.folder / "out" / "selections.parquet").to_pylist()
    assert result.trials.num_rows == 4
    for number, row in enumerate(result.trials.to_pylist()):
        assert row["status"] == "finished"
        ids = [each["sample_id"] for each in table if each["selection"] == row["selection"]]
        assert len(set(ids)) == 6 == row["forget_samples"]
        spec = UnlearnSpec(
            model=str(inputs.model),
            task=str(inputs.task),
            retain=str(inputs.retain),
            selection=str(names["".join(f"{name}\n" for name in ids)]),
            algorithm=row["algorithm"],
            alpha=1.0,
            epochs=2,
            el_n=2,
            learning_rate=1e-3,
            evaluate_every=0,
            workers=0,
        )
        alone = read_run(unlearn(spec, inputs.folder / f"alone{number}", progress=False).folder)
        epochs = [each for each in result.epochs.to_pylist() if each["trial"] == row["trial"]]
        assert len(epochs) == alone.epochs.num_rows
        for ours, theirs in zip(epochs, alone.epochs.to_pylist(), strict=True):
            for key, value in theirs.items():
                if "seconds" not in key:
                    assert ours[key] == value, key
        samples = [each for each in result.samples.to_pylist() if each.pop("trial") == row["trial"]]
        assert samples == alone.samples.to_pylist()
        last = epochs[-1]
        assert row["completeness"] == 1 - last["forget_rouge_l_recall"]
        assert row["utility"] == last["retain_rouge_l_recall"]
    difficulty = dict(
        zip(
            *pq.read_table(inputs.folder / "out" / "difficulty.parquet", columns=["sample_id", "mrd"])
            .to_pydict()
            .values(),
            strict=True,
        )
    )
    for row in result.trials.to_pylist():
        ids = [each["sample_id"] for each in table if each["selection"] == row["selection"]]
        assert row["mean_log_mrd"] == pytest.approx(np.mean(np.log([difficulty[name] for name in ids])), rel=1e-12)


def test_forecasts_of_selections(tmp_path: Path) -> None:
    """One flip time a sample, whatever the algorithms; a sweep without forecasts is the same sweep as ever."""
    base = {"model": "authors", "task": "authors", "forget_split": "forget01", "learning_rate": 2e-5}
    fields = {"base": base, "vary": {"algorithm": ["NPO"]}, "selections": [{"kind": "random", "size": 2, "count": 2}]}
    plan = SweepPlan(build(SweepSpec, fields | {"forecast": True}).checked(), tmp_path)
    without = SweepPlan(build(SweepSpec, fields).checked(), tmp_path)
    assert "forecast" not in without.identity
    assert plan.identity["forecast"] is True
    plan.choose(HERE)
    model = find_model("authors")
    texts = load_dataset("authors", "forget01").texts
    rows = [{"id": text.sample_id, "prompt": text.prompt, "completion": text.completion} for text in texts]
    expected = difficulty(load_model(model.source), model.tokenizer, rows, learning_rate=2e-5)
    assert plan.flip_time == pytest.approx(dict(zip(expected["sample_id"], expected["flip-time@average"], strict=True)))
    assert max(plan.flip_time.values()) > 1
    for row in pq.read_table(tmp_path / "selections.parquet").to_pylist():
        assert row["flip_time"] == plan.flip_time[row["sample_id"]]
    written = (tmp_path / "forecast.parquet").stat().st_mtime_ns
    plan.choose(HERE)
    assert (tmp_path / "forecast.parquet").stat().st_mtime_ns == written


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        {"algorithm": "RMU"},
        {"algorithm": "GA", "lora_rank": 2},
        {"algorithm": "GA", "gradient_checkpointing": True},
        {"algorithm": "GA", "learning_rate": 1e6, "clip_norm": None},
    ],
    ids=["frozen layers", "adapters", "checkpointing", "diverged"],
)
def test_a_warm_worker_forgets_what_came_before(inputs: Inputs, before: dict[str, Any]) -> None:
    spec = build(SweepSpec, inputs.spec({"algorithm": "GA"}, vary={}, selections=[]))
    plan = SweepPlan(spec, inputs.folder)
    plan.choose(SweepResources())
    (selection,) = plan.selections.values()
    trial = plan.trial({}, selection)
    weights = {plan.model.source: shareable_weights(plan.model)}

    def run(what: trials.Trial, name: str) -> dict[str, Any]:
        store = TrialStore(inputs.folder / name, inputs.folder / f"{name}-own")
        result = run_trial(what, TrialContext(weights, {}, store, inputs.folder / "work"))
        return {key: value for key, value in result.items() if key not in ("seconds", "clocks", "epochs", "values")} | {
            "moved": [row["mean_abs_delta"] for row in result.get("epochs", [])]
        }

    trials._WARM.clear()
    alone = run(trial, "alone")
    other = run(plan.trial(before, selection), "other")
    assert other["status"] == ("diverged" if "learning_rate" in before else "finished")
    assert run(trial, "after") == alone
    assert alone["moved"][-1] > 0


@pytest.mark.slow
def test_the_metrics_of_a_trial_are_those_of_its_model(tmp_path: Path) -> None:
    """Against `evaluate` on the model that the trial ended with, with both reference models, on a selection; and what
    it meets at the end against `attack`."""
    task = write_task(tmp_path / "task")
    known = [record for name in ("forget", "retain") for record in records(name)]
    model = taught(tmp_path / "full", pairs_of(*known), 40)
    retained = taught(tmp_path / "retained", pairs_of(*records("retain")), 40, seed=1)
    metrics = "ua,mia,rr,relearn,uc_average,retain_rr,forget_quality"
    spec = {
        "base": {
            "model": str(model),
            "task": str(task),
            "algorithm": "GA",
            "epochs": 1,
            "el_n": 2,
            "learning_rate": 3e-3,
            "evaluate": False,
        },
        "selections": [{"kind": "random", "size": 20}],
        "evaluate": {"metrics": metrics, "retain_model": str(retained), "relearn_steps": 3, "samples": 10, "el_n": 2},
        "attack": {"metrics": "rr,ma"}
        | (
            strengths := {
                "attacks": ["relearn", "quantise"],
                "taught": ["forget"],
                "shares": [0.5],
                "learning_rates": [1e-3],
                "updates": [2, 5],
                "formats": ["int4"],
            }
        ),
        "keep_models": True,
    }
    result = sweep(build(SweepSpec, spec), tmp_path / "out", None, HERE, False)
    assert result.attacks is not None
    for number, row in enumerate(result.trials.to_pylist()):
        assert row["status"] == "finished", row["reason"]
        again = evaluate_spec(
            EvaluateSpec(
                model=str(tmp_path / "trials" / row["trial"]),
                task=str(task),
                original=str(model),
                retain_model=str(retained),
                selection=str(tmp_path / "out" / "selections" / f"{number:04d}.txt"),
                metrics=metrics,
                relearn_steps=3,
                samples=10,
                el_n=2,
            ),
            tmp_path / f"again{number}.parquet",
            Resources(replicas=0),
            progress=False,
        ).table.to_pylist()
        expected = {r["name"]: r["value"] for r in again if r["level"] == "metric" and r["model"] == "model"}
        assert expected.keys() == set(metrics.split(","))
        for name, value in expected.items():
            assert value is not None, name
            assert row[name] == pytest.approx(value, rel=1e-9), name
        of_forget = {r["sample_id"] for r in again if r["level"] == "sample" and r["set"] == "forget"}
        assert len(of_forget) == 20
        settings: dict[str, Any] = {
            "model": str(tmp_path / "trials" / row["trial"]),
            "task": str(task),
            "selection": str(tmp_path / "out" / "selections" / f"{number:04d}.txt"),
            "metrics": "rr,ma",
            **strengths,
        }
        attacks = attack_spec(build(AttackSpec, settings), tmp_path / f"attacks{number}.parquet", Resources(replicas=0))
        expected_rows = {
            (r["attack"], r["updates"], r["sample_id"], r["name"]): r["value"]
            for r in attacks.table.to_pylist()
            if r["level"] == "sample"
        }
        mine = [r for r in result.attacks.to_pylist() if r["trial"] == row["trial"]]
        found = {
            (r["attack"], r["updates"], r["sample_id"], name): r[name]
            for r in mine
            for name in ("ma", "rouge_l_recall")
        }
        assert found == pytest.approx(expected_rows)
        assert len([r for r in mine if r["taught"]]) == 2 * 10  # half of the samples, after 2 and 5 updates
        worst = next(r["value"] for r in attacks.table.to_pylist() if (r["level"], r["name"]) == ("worst", "ma"))
        assert row["attacked_ma"] == pytest.approx(worst)


# --- Configurations -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cross(inputs: Inputs) -> None:
    result = inputs.run(
        inputs.spec(
            vary={"algorithm": ["GA"], "alpha": [0.0, -1.0], "seed": [0, 3]},
            selections=[{"kind": "thirds"}, {"kind": "composite", "size": 5}],
        )
    )
    cells = Counter((row["alpha"], row["seed"], row["selection"]) for row in result.trials.to_pylist())
    thirds = [f"thirds-{level}-0" for level in ("easy", "medium", "hard")]
    assert cells == Counter((a, s, n) for a in (0.0, -1.0) for s in (0, 3) for n in (*thirds, "composite-0-000"))
    assert result.record["counts"] == {"finished": 16}


def test_arms(inputs: Inputs) -> None:
    """Settings that go together, beside those that are crossed; an arm that says what base says is the same trial."""
    groups = [{"share": 0.5}, {"share": 0.5, "forget_weight": 2.0}]
    ease = inputs.folder / "data" / "ease.jsonl"
    ease.write_text("".join(json.dumps({"sample_id": record["id"], "ease": 1}) + "\n" for record in pairs(12)))
    arms = {
        "uniform": {},
        "easy": {"alpha": 1.0, "weights": str(ease)},
        "groups": {"schedule": {"by": "mrd", "groups": groups}},
    }
    spec = inputs.spec({"max_steps": 1, "epochs": None}, vary={"algorithm": ["GA"], "seed": [0, 1]}, arms=arms)
    result = inputs.run(spec)
    rows = result.trials.to_pylist()
    assert [row["status"] for row in rows] == ["finished"] * 12
    cells = Counter((row["arm"], row["seed"], row["selection"]) for row in rows)
    assert cells == Counter((a, s, f"random-0-00{n}") for a in arms for s in (0, 1) for n in (0, 1))
    for row in rows:
        assert (row["alpha"], row["weights"]) == ((1.0, str(ease)) if row["arm"] == "easy" else (0.0, "mrd"))
        schedule = json.loads(row["schedule"])["groups"] if row["schedule"] else []
        assert [group["forget_weight"] for group in schedule] == ([1.0, 2.0] if row["arm"] == "groups" else [])
        if row["arm"] == "uniform":
            assert not {"arm", "weights", "schedule"} & json.loads(row["identity"]).keys()
    without = inputs.run({name: value for name, value in spec.items() if name != "arms"}, "without")
    assert set(rows_of(without)) == {row["trial"] for row in rows if row["arm"] == "uniform"}
    assert "arms" not in without.record["spec"]
    assert "arm" not in without.trials.column_names


@pytest.mark.slow
def test_random_search_is_decided_by_its_seed(inputs: Inputs) -> None:
    spec = inputs.spec(
        vary={"algorithm": ["GA", "NPO"], "learning_rate": {"log_uniform": [1e-5, 1e-3]}, "seed": {"integers": [0, 9]}},
        search="random",
        trials=3,
    )
    del spec["base"]["learning_rate"]
    drawn = [(row["algorithm"], row["learning_rate"], row["seed"]) for row in inputs.run(spec).trials.to_pylist()]
    assert len(drawn) == 6
    assert len(set(drawn)) == 3  # each on both selections
    assert all(1e-5 <= rate <= 1e-3 and 0 <= seed <= 9 for _, rate, seed in drawn)
    again = [(row["algorithm"], row["learning_rate"], row["seed"]) for row in inputs.run(spec, "b").trials.to_pylist()]
    assert again == drawn
    other = inputs.run(spec | {"seed": 1}, "c").trials["learning_rate"].to_pylist()
    assert not {rate for _, rate, _ in drawn} & set(other)


@pytest.mark.usefixtures("cluster")
def test_optuna_goes_on_with_what_it_knows(inputs: Inputs) -> None:
    spec = inputs.spec(
        vary={"algorithm": ["GA", "NPO"], "learning_rate": {"log_uniform": [1e-4, 1e-2]}},
        search="optuna",
        trials=4,
        objective="completeness",
    )
    del spec["base"]["learning_rate"]
    result = inputs.run(spec, resources=SweepResources(concurrent=1))
    tried = json.loads((result.folder / "search.json").read_text())
    assert len(tried) == 4
    for each in tried:
        own = [
            row["completeness"]
            for row in result.trials.to_pylist()
            if all(row[name] == value for name, value in each["values"].items())
        ]
        assert len(own) == 2
        assert each["objective"] == pytest.approx(np.mean(own))
    # As a driver that was killed in the third configuration leaves it.
    (result.folder / "search.json").write_text(json.dumps(tried[:2]))
    (result.folder / "sweep.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in inputs.trials.glob("*.json")}
    again = inputs.run(spec, resources=SweepResources(concurrent=1))
    now = json.loads((again.folder / "search.json").read_text())
    assert now[:2] == tried[:2]
    assert len(now) == 4
    assert len({json.dumps(each["values"]) for each in now}) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


@pytest.mark.parametrize("flag", ["--trials", "--results"])
def test_places_that_cannot_be_written_to_are_refused_first(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    (inputs.folder / "a-file").write_text("")
    command = ["sweep", str(inputs.file(inputs.spec())), "--out", str(inputs.folder / "out"), "--concurrent", "0"]
    assert main([*command, flag, str(inputs.folder / "a-file" / "x")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"{flag} .*a-file/x: .*a-file is a file; expected a folder$", line)
    assert not (inputs.folder / "out").exists()


PLUGIN = """
from algorithms.objectives import ALGORITHMS, Algorithm

def doubled(logprobs, mask):
    return 2 * (logprobs * mask).sum(-1) / mask.sum(-1)

ALGORITHMS["Doubled"] = Algorithm(doubled)
"""


@pytest.mark.usefixtures("cluster")
def test_an_algorithm_of_a_plugin(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known to the driver, to the trial, and to the worker that the trial starts."""
    monkeypatch.setattr(plugins, "_LOADED", {})
    before = dict(objectives.ALGORITHMS)
    path = inputs.folder / "doubled.py"
    path.write_text(PLUGIN)
    one_update = {"max_steps": 1, "early_stopping": False, "check_every": 0, "evaluate": False}
    losses = {}
    try:
        for algorithm, workers, concurrent in (("Doubled", 1, "1"), ("GA", 0, "0")):
            spec = inputs.spec(one_update | {"workers": workers, "algorithm": algorithm}, vary={}, selections=[])
            out = inputs.folder / algorithm
            command = ["sweep", str(inputs.file(spec)), "--plugin", str(path), "--concurrent", concurrent]
            assert main([*command, "--out", str(out), "--trials", str(inputs.trials)]) == 0
            (losses[algorithm],) = read_sweep(out).trials["loss"].to_pylist()
    finally:
        for name in set(objectives.ALGORITHMS) - set(before):
            del objectives.ALGORITHMS[name]
    assert losses["Doubled"] == pytest.approx(2 * losses["GA"], rel=1e-5)
    identities = [json.loads(file.read_text())["spec"]["plugins"] for file in inputs.trials.glob("*.json")]
    assert identities == [[plugins.read_plugin(path).sha256]] * 2


@pytest.mark.usefixtures("cluster")
def test_asha_stops_those_behind_and_their_rows_say_so(inputs: Inputs) -> None:
    spec = inputs.spec(
        {"epochs": 8, "evaluate_every": 1, "early_stopping": False, "check_every": 0},
        vary={"algorithm": ["GA"], "learning_rate": [1e-2, 1e-3, 1e-5, 1e-6, 1e-7, 1e-8]},
        selections=[],
        scheduler="asha",
        objective="completeness",
        reduction=2,
    )
    del spec["base"]["learning_rate"]
    made = build(SweepSpec, spec)
    result = sweep(made, inputs.folder / "out", inputs.trials, SweepResources(concurrent=1), progress=False)
    counts = result.record["counts"]
    assert counts["finished"] >= 1
    assert counts["stopped"] >= 2
    assert sum(counts.values()) == 6
    for row in result.trials.to_pylist():
        epochs = [e["epoch"] for e in result.epochs.to_pylist() if e["trial"] == row["trial"]]
        if row["status"] == "stopped":
            assert re.fullmatch(rf"behind the others after epoch {epochs[-1]}", row["reason"])
            assert epochs[-1] < 8
            assert row["completeness"] is not None
        else:
            assert epochs == list(range(9))
    # It is true of this sweep alone: another one runs it.
    assert {path.stem for path in inputs.trials.glob("*.json")} == {
        row["trial"] for row in result.trials.to_pylist() if row["status"] == "finished"
    }


# --- What goes wrong ----------------------------------------------------------------------------------------


def test_a_trial_that_diverges_is_a_row_with_its_reason(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    spec = inputs.spec({"algorithm": "GA", "clip_norm": None}, vary={"learning_rate": [1e-3, 1e6]}, selections=[])
    del spec["base"]["learning_rate"]
    out = inputs.folder / "out"
    assert main(["sweep", str(inputs.file(spec)), "--out", str(out), "--concurrent", "0"]) == 0
    rows = {row["learning_rate"]: row for row in read_sweep(out).trials.to_pylist()}
    assert rows[1e-3]["status"] == "finished"
    assert rows[1e6]["status"] == "diverged"
    assert "training diverged at update" in rows[1e6]["reason"]
    assert rows[1e6]["completeness"] is None
    printed = capsys.readouterr().out
    assert "2 trials (1 finished, 1 diverged)" in printed
    assert rows[1e6]["reason"] in printed


@contextmanager
def failing(how: BaseException) -> Iterator[None]:
    """Within the context training meets an accident: none can be arranged for a CPU that is always the same."""

    def accident(*_: Any, **__: Any) -> None:
        raise how

    kept = trials.unlearner_of
    trials.unlearner_of = accident  # type: ignore[assignment]
    try:
        yield
    finally:
        trials.unlearner_of = kept


@pytest.mark.parametrize(
    ("how", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "out of memory"),
        (MemoryError(), "out of memory"),
        (OSError("Input/output error"), "error"),
    ],
)
def test_accidents_are_rows_that_are_not_shared(inputs: Inputs, how: BaseException, status: str) -> None:
    spec = build(SweepSpec, inputs.spec({"algorithm": "GA"}, vary={}, selections=[]))
    plan = SweepPlan(spec, inputs.folder)
    plan.choose(SweepResources())
    (trial,) = plan.trials({})
    store = TrialStore(inputs.trials, inputs.folder / "failed")
    shared = TrialContext({plan.model.source: shareable_weights(plan.model)}, {}, store, inputs.folder / "work")
    with failing(how):
        result = run_trial(trial, shared)
    assert result["status"] == status
    assert (str(how) or "MemoryError").splitlines()[0] in result["reason"]
    assert not inputs.trials.exists()
    assert store.find(trial.hash) == result
    store.forget_failures()
    assert run_trial(trial, shared)["status"] == "finished"
    assert (inputs.trials / f"{trial.hash}.json").is_file()


def workers(driver: int) -> list[int]:
    """The processes that run the trials of a driver that started its own Ray."""
    return [pid for pid, command in descendants(driver).items() if "ImplicitFunc" in command or "_one_trial" in command]


@contextmanager
def driver(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process of its own; ended at last, with all that it started."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.cli", *command],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        own = list(descendants(process.pid))
        for pid in (process.pid, *own):
            kill(pid)
        process.wait()


@pytest.mark.ray
def test_a_sweep_killed_three_times_ends_as_if_undisturbed(inputs: Inputs) -> None:
    """12 trials; the driver and all it started are killed at a random moment, twice as it runs them itself and once on
    Ray Tune, and at last one of Tune's workers is."""
    spec = inputs.spec(
        {"epochs": 3, "evaluate_every": 1},
        vary={"algorithm": ["GradDiff", "NPO"], "seed": [0, 1]},
        selections=[{"kind": "random", "size": 6, "count": 2}, {"kind": "composite", "size": 6, "count": 1}],
    )
    undisturbed = inputs.run(spec, "undisturbed")
    assert undisturbed.record["counts"] == {"finished": 12}
    shutil.rmtree(inputs.trials)
    out, kept = inputs.folder / "killed", inputs.folder / "kept"
    command = ["sweep", str(inputs.file(spec)), "--out", str(out), "--trials", str(kept), "--concurrent"]
    rng = random.Random(str(inputs.folder))
    finished: dict[Path, int] = {}
    for concurrent in ("0", "0", "2"):
        with driver([*command, concurrent], inputs.folder / "log.txt") as process:
            # The first trials of each start are waited for, or nothing would ever be finished; then it strikes.
            enough = len(finished) + 2
            while len(list(kept.glob("*.json"))) < enough and process.poll() is None:
                time.sleep(0.02)
            assert process.poll() is None, (concurrent, (inputs.folder / "log.txt").read_text()[-2000:])
            time.sleep(rng.uniform(0, 0.5))
        # Nothing that an earlier start finished was written again.
        assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
        finished = {path: path.stat().st_mtime_ns for path in kept.glob("*.json")}
        assert not (out / "sweep.json").exists()
        assert len(finished) < 12, "the sweep ended before it could be killed"
    with driver([*command, "2"], inputs.folder / "log.txt") as process:
        wait_for(lambda: process.poll() is not None or workers(process.pid), 120)
        if running := workers(process.pid):
            kill(running[0])
        assert process.wait(timeout=180) == 0, (inputs.folder / "log.txt").read_text()[-2000:]
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert timeless(out) == timeless(undisturbed.folder)
    assert not (out / ".tune").exists()
    # Once more: nothing is left to do.
    content = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main([*command, "0"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == content


@pytest.mark.usefixtures("cluster")
def test_trials_on_a_node_with_other_packages_are_rows_that_say_so(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers' processes have the true ones."""
    own = versions()
    with monkeypatch.context() as patched:
        patched.setattr(
            "bench.jobs.sweep_on_tune.TrialContext", partial(TrialContext, driver_versions=own | {"torch": "1.0.0"})
        )
        rows = inputs.run(inputs.spec(vary={"algorithm": ["GA"]}, selections=[]), resources=TWO).trials.to_pylist()
    assert [row["status"] for row in rows] == ["error"]
    assert re.match(rf"node \S+ has torch {own['torch']} \(the driver has 1\.0\.0\): install", rows[0]["reason"])
    # Nobody else is told so, and with the right ones they are tried again.
    result = inputs.run(inputs.spec(vary={"algorithm": ["GA"]}, selections=[]), retry_failed=True)
    assert result.record["counts"] == {"finished": 1}


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_dies_while_it_starts_is_no_row(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker is given kills it as it is read, before Tune counts the trial as running; the next one lives."""
    killed = inputs.folder / "killed"

    def read() -> tuple[()]:
        if not killed.exists():
            killed.touch()
            os.kill(os.getpid(), 9)
        return ()

    class Deadly:
        def __reduce__(self) -> Any:
            return read, ()

    monkeypatch.setattr("bench.jobs.sweep_on_tune.TrialContext", partial(TrialContext, plugins=Deadly()))
    spec = inputs.spec(vary={"algorithm": ["GA"]}, selections=[])
    result = inputs.run(spec, resources=SweepResources(concurrent=1))
    assert killed.exists()
    assert result.record["counts"] == {"finished": 1}


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_always_dies_is_a_row(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a size that the worker's process may not hold: the system kills it, as it does those out of memory."""
    deadly = build(SweepSpec, inputs.spec(vary={"algorithm": ["GA", "NPO"]}, selections=[]))
    real = sweep_on_tune._one_trial

    def dies(config: dict[str, Any], trials: Any, shared: Any, objective: Any) -> None:
        if trials[config["number"]].spec.algorithm == "NPO":
            os.kill(os.getpid(), 9)
        real(config, trials, shared, objective)

    monkeypatch.setattr(sweep_on_tune, "_one_trial", dies)
    out = inputs.folder / "out"
    result = sweep(deadly, out, inputs.trials, SweepResources(concurrent=1), progress=False)
    rows = {row["algorithm"]: row for row in result.trials.to_pylist()}
    assert rows["GA"]["status"] == "finished"
    assert rows["NPO"]["status"] == "died"
    assert "its worker died 4 times" in rows["NPO"]["reason"]
    monkeypatch.undo()
    # The same command leaves it; asked to, it is tried again.
    assert rows_of(sweep(deadly, out, inputs.trials, progress=False)) == rows_of(result)
    again = sweep(deadly, out, inputs.trials, HERE, progress=False, retry_failed=True)
    assert again.record["counts"] == {"finished": 2}


@pytest.mark.slow
def test_trials_of_another_sweep_are_found_by_their_hash(inputs: Inputs) -> None:
    first = inputs.run(inputs.spec(), "first")
    before = {path: path.stat().st_mtime_ns for path in inputs.trials.glob("*.json")}
    assert len(before) == 4
    # The same runs, said otherwise: another base, a moved data file, how they are spread.
    moved = inputs.folder / "data" / "moved.jsonl"
    shutil.copy(inputs.task, moved)
    wider = inputs.spec({"task": str(moved), "max_failures": 1}, vary={"algorithm": ["SimNPO", "NPO", "GA"]})
    second = inputs.run(wider, "second")
    assert second.trials.num_rows == 6
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert len(list(inputs.trials.glob("*.json"))) == 6
    shared = rows_of(second)
    for key, row in rows_of(first).items():
        # All but where the data lie; so in the spec, too, which is one column.
        one, other = (each | json.loads(each["identity"]) for each in (shared[key], row))
        assert one.pop("task") != other.pop("task")
        assert one.pop("identity") != other.pop("identity")
        assert one == other
    # A setting that changes the outcome is another trial.
    third = inputs.run(inputs.spec({"sigma": 1e-4}, vary={"algorithm": ["GA"]}), "third")
    assert not set(rows_of(third)) & set(shared)


# --- Refusals -----------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"sigmma": 1}, {}, "did you mean 'sigma'"),
    ({}, {"vary": {"algoritm": ["GA"]}}, "vary: unknown field 'algoritm'"),
    ({}, {"vary": {"algorithm": ["GA", "NPOO"]}}, "'NPOO'"),
    ({}, {"vary": {"algorithm": ["GA"], "alpha": [0.0, "high"]}}, "alpha"),
    ({}, {"vary": {"algorithm": ["GA"], "alpha": []}}, "alpha is an empty list"),
    ({}, {"vary": {"algorithm": ["GA"], "alpha": [0.0, 0.0]}}, "alpha has a value twice"),
    ({}, {"vary": {"algorithm": ["GA"], "alpha": {"uniform": [0, 1]}}}, "expected a list of values for search grid"),
    ({}, {"vary": {"algorithm": ["GA"], "alpha": {"normal": [0, 1]}}}, "one of uniform, log_uniform, integers"),
    ({}, {"vary": {"algorithm": ["GA"], "epochs": [2]}}, "epochs is in base as well"),
    ({}, {"vary": {"algorithm": ["GA"], "workers": [0]}}, "workers does not change what a trial ends with"),
    ({"algorithm": "GA", "selection": "a.txt"}, {"vary": {}}, "base: selection is set"),
    ({"lora_alpha": 4}, {}, "base: lora_alpha is of adapters, and there are none"),
    ({}, {"arms": {"a": {"alhpa": 1}}}, "arms: a: unknown field 'alhpa'"),
    ({}, {"arms": {"a": {}, "b": {"alpha": "high"}}}, "alpha is 'high': expected a number"),
    ({}, {"arms": {"a": {"algorithm": "GA"}}}, "arms: a: algorithm is in vary as well"),
    ({}, {"arms": {"a": {"task": "authors"}}}, "arms: a: task is the same for all arms"),
    ({}, {"arms": {"a": {}}, "search": "optuna", "trials": 2}, "search optuna exclude each other"),
    ({}, {"search": "bayes"}, "search is 'bayes': expected one of grid, random, optuna"),
    ({}, {"search": "random"}, "trials is missing"),
    ({}, {"trials": 3}, "trials is 3"),
    ({}, {"scheduler": "asha", "objective": "fame"}, "objective of scheduler asha is 'fame': expected one of"),
    ({"evaluate": False}, {"scheduler": "asha"}, "objective balance: expected evaluate: true"),
    ({}, {"selections": [{"kind": "random"}]}, "no size"),
    ({}, {"selections": [{"kind": "random", "size": 13}]}, "has 12 samples"),
    ({}, {"selections": [{"kind": "randon", "size": 3}]}, "did you mean 'random'"),
    ({}, {"selections": [{"kind": "attribute", "by": "colour", "size": 2}]}, "unknown attribute"),
    ({}, {"selections": [{"kind": "random", "size": 3}] * 2}, "occurs twice"),
    ({}, {"evaluate": {"metrics": "fa"}}, "has no metrics"),
    ({}, {"thresholds": "mean"}, "thresholds is 'mean': expected one of selection, split"),
    ({}, {"concurency": 2}, "unknown field 'concurency'"),
]


@pytest.mark.parametrize(("base", "fields", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_slips_are_refused_before_anything_is_done(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], base: dict[str, Any], fields: dict[str, Any], said: str
) -> None:
    out = inputs.folder / "out"
    assert main(["sweep", str(inputs.file(inputs.spec(base, **fields))), "--out", str(out)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert said in line
    assert not inputs.trials.exists()
    assert not (out / "trials.parquet").exists()


@pytest.mark.parametrize(
    ("base", "fields", "said"),
    [
        ({}, {"search": "optuna", "trials": 2}, "search optuna"),
        ({}, {"scheduler": "asha"}, "scheduler asha"),
        ({"workers": 2}, {}, "base: workers 2"),
    ],
)
def test_what_needs_ray_is_not_run_without(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], base: dict[str, Any], fields: dict[str, Any], said: str
) -> None:
    out = inputs.folder / "out"
    path = inputs.file(inputs.spec(base, **fields))
    assert main(["sweep", str(path), "--out", str(out), "--concurrent", "0"]) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(
        rf"mrd-bench: error: {path}, line \d+: {said} needs Ray, and --concurrent is 0: expected at least 1\n", line
    ), line
    assert not out.exists()


@pytest.mark.slow
def test_a_sweep_larger_than_the_disk_is_refused(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = inputs.spec(keep_models=True)
    path = inputs.file(spec)
    weights = sum(array.nbytes for array in shareable_weights(SweepPlan(build(SweepSpec, spec), path).model).values())
    usage = shutil.disk_usage(inputs.folder)
    out = inputs.folder / "out"
    command = ["sweep", str(path), "--out", str(out), "--concurrent", "0"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * weights))
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert re.search(r"free, and 4 trials need .*; free some, choose .*, or leave out keep_models", line)
    assert not inputs.trials.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * (weights + sweeps.BYTES_RESULT)))
    assert main(command) == 0
    models = list(inputs.trials.glob("*/model.safetensors"))
    assert len(models) == 4
    assert sum(model.stat().st_size for model in models) >= 4 * weights


def test_a_folder_belongs_to_one_sweep(inputs: Inputs) -> None:
    inputs.run(inputs.spec())
    with pytest.raises(UserError, match=r"holds a sweep of another spec \(different: vary\)"):
        inputs.run(inputs.spec(vary={"algorithm": ["GA"]}))
    with pytest.raises(UserError, match="no finished sweep"):
        read_sweep(inputs.trials)
