"""Unlearning from the command line: what a run leaves, what it refuses, and what kills and full disks do to it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from algorithms.objectives import ALGORITHMS
from algorithms.recipe import DUAL
from bench.cli import main
from bench.jobs import unlearn as unlearning_job
from bench.jobs.unlearn import REFUSALS, UnlearnSpec, identity_of, unlearn
from bench.models.find import find_model
from bench.tasks.datasets import load_dataset
from bench.tasks.embedded import authors
from scoring.answers import score_answers
from scoring.samples import Sample, encode
from scoring.templates import TEMPLATE_FIELDS
from tests.paths import ROOT
from tests.processes import kill, wait_for
from tests.tiny_folders import BOS, EOS, pairs, save_model, token_id, tokenizer, write_jsonl

TABLES = ("steps", "epochs", "samples", "difficulty")
# What progress bars leave on stderr.
BARS = ("unlearning (", "Writing model shards", "Loading weights")

FORGET = pairs(10)
RETAIN = [record | {"id": f"kept{record['id']}"} for record in pairs(8, seed=1)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So that two runs sum in the same order, whatever the tests before have left."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- Running the command ------------------------------------------------------------------------------------


def run(arguments: Sequence[str]) -> int:
    """The exit code, also where argparse ends the process."""
    try:
        return main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


def lines_of(error: str) -> list[str]:
    """The lines on stderr that are no progress bar, and no note of a run that goes on."""
    return [
        line
        for line in error.splitlines()
        if line.strip() and not line.startswith((*BARS, "note: ", "continuing from"))
    ]


def refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """The error line of a command that must be refused."""
    capsys.readouterr()
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = lines_of(printed.err)
    assert line.startswith("mrd-bench")
    return line


def flags(**values: Any) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


class Inputs:
    """A sound command of six updates, and the folder in which a test spoils it."""

    def __init__(self, tmp_path: Path, model: Path) -> None:
        self.tmp_path, self.model, self.out = tmp_path, model, tmp_path / "run"
        (tmp_path / "data").mkdir()
        self.task = self.data("task.jsonl", FORGET)
        self.retain = self.data("retain.jsonl", RETAIN)

    def data(self, name: str, records: Sequence[Mapping[str, Any]]) -> Path:
        return write_jsonl(self.tmp_path / "data" / name, records)

    def file(self, name: str, content: str) -> Path:
        path = self.tmp_path / "data" / name
        path.write_text(content, encoding="utf-8")
        return path

    def copy_of_model(self) -> Path:
        return Path(shutil.copytree(self.model, self.tmp_path / "data" / "copy"))

    def command(self, *more: str, **changed: Any) -> list[str]:
        chosen: dict[str, Any] = {
            "model": self.model,
            "task": self.task,
            "retain": self.retain,
            "out": self.out,
            "algorithm": "GradDiff",
            "epochs": 2,
            "workers": 0,
            **changed,
        }
        given = {name: value for name, value in chosen.items() if value is not None}
        return ["unlearn", *flags(**given), "--no-evaluate", *more]


@pytest.fixture
def inputs(tmp_path: Path, model_folder: Path) -> Inputs:
    return Inputs(tmp_path, model_folder)


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All files with what they hold and when they were written; the lock is opened by whoever asks for it."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def without_seconds(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All tables of a run, less the columns that no two runs share; nan is "nan", which is equal to itself."""

    def comparable(value: Any) -> Any:
        return "nan" if isinstance(value, float) and math.isnan(value) else value

    return {
        name: [{k: comparable(v) for k, v in row.items() if not k.startswith("seconds")} for row in table(folder, name)]
        for name in TABLES
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "model.safetensors"))


# --- Truth by transformers and torch alone ------------------------------------------------------------------


def ids_of(prompt: str, completion: str) -> tuple[list[int], int]:
    """Token ids and the place of the first scored one, from the words themselves."""
    before = [BOS, *map(token_id, prompt.split())]
    return [*before, *map(token_id, completion.split()), EOS], len(before)


def losses(model: Any, ids: Sequence[int], first: int) -> torch.Tensor:
    """NLL of each scored token."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return F.cross_entropy(logits[first - 1 : -1], torch.tensor(ids[first:]), reduction="none")


def in_fp64(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def probability(model: Any, records: Sequence[Mapping[str, str]]) -> float:
    """The mean over records of the geometric mean of their tokens' probabilities."""
    each = [losses(model, *ids_of(r["prompt"], r["completion"])).mean().neg().exp().item() for r in records]
    return float(np.mean(each))


@torch.no_grad()
def recall(model: Any, records: Sequence[Mapping[str, str]]) -> float:
    """The mean share of the true words that a greedy answer has in the same order; twenty more words may come."""
    shares = []
    for record in records:
        ids, first = ids_of(record["prompt"], record["completion"])
        most = len(ids) - first + 20
        out = model.generate(torch.tensor([ids[:first]]), max_new_tokens=most, do_sample=False, pad_token_id=0)
        written, truth = [i for i in out[0, first:].tolist() if i > EOS], ids[first:-1]
        shares.append(longest_common(tuple(written), tuple(truth)) / len(truth))
    return float(np.mean(shares))


def longest_common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    row = [0] * (len(other) + 1)
    for a in one:
        last = row
        row = [0]
        for at, b in enumerate(other, start=1):
            row.append(last[at - 1] + 1 if a == b else max(last[at], row[-1]))
    return row[-1]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama that knows the forget and the retain set by heart; not to be changed."""
    folder = save_model(tmp_path_factory.mktemp("learnt") / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder).train()
    sequences = [ids_of(r["prompt"], r["completion"])[0] for r in [*FORGET, *RETAIN]]
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    labels = ids.masked_fill(torch.arange(width) >= torch.tensor([[len(s)] for s in sequences]), -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(90):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


# --- A whole run --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A finished run, and what it printed."""

    command: list[str]
    inputs: Inputs
    printed: str
    error: str

    @property
    def folder(self) -> Path:
        return self.inputs.out

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())


@pytest.fixture(scope="module")
def whole(learnt: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """GradDiff, easy samples first, MRD anew each epoch; some samples are forgotten on the way."""
    inputs = Inputs(tmp_path_factory.mktemp("whole"), learnt)
    more = "--evaluate --alpha 1 --epochs 6 --refresh 1 --batch-size 3 --learning-rate 2e-4 --el-n 2 --stopping paper"
    command = inputs.command(*more.split())
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        assert run(command) == 0
    return Whole(command, inputs, out.getvalue(), error.getvalue())


@pytest.mark.slow
def test_folder_holds_a_model_and_the_tables(whole: Whole, learnt: Path) -> None:
    names = {path.name for path in whole.folder.iterdir()} - {".lock"}
    assert names == {"spec.json", "run.json", "model", *(f"{name}.parquet" for name in TABLES)}
    assert not [path for path in whole.folder.rglob("*") if "tmp" in path.name]

    model: Any = AutoModelForCausalLM.from_pretrained(whole.folder / "model")
    words = AutoTokenizer.from_pretrained(whole.folder / "model")
    assert words("w3 w5")["input_ids"] == [BOS, token_id("w3"), token_id("w5")]
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(learnt).num_parameters()
    before, after = weights(learnt), weights(whole.folder / "model")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(value.isfinite().all() for value in after.values())


def test_steps_and_samples_agree(whole: Whole) -> None:
    steps, samples = table(whole.folder, "steps"), table(whole.folder, "samples")
    assert [s["step"] for s in steps] == list(range(1, len(steps) + 1))
    # Ten samples in batches of three.
    assert [s["epoch"] for s in steps] == [1 + step // 4 for step in range(len(steps))]
    assert {len(s["samples"]) for s in steps} == {3}
    assert {s["learning_rate"] for s in steps} == {2e-4}
    for s in steps:
        assert s["loss"] == pytest.approx(s["forget_loss"] + s["retain_loss"])

    assert [s["sample_id"] for s in samples] == [record["id"] for record in FORGET]
    assert [s["num_tokens"] for s in samples] == [len(record["completion"].split()) + 1 for record in FORGET]
    draws = Counter(name for s in steps for name in s["samples"])
    assert {s["sample_id"]: s["updates"] for s in samples} == {record["id"]: draws[record["id"]] for record in FORGET}
    assert sum(s["updates"] for s in samples) == 3 * len(steps)

    forgotten = [s for s in samples if s["forgotten_at_step"] is not None]
    assert 0 < len(forgotten) < len(samples)
    for s in forgotten:
        until = steps[: s["forgotten_at_step"]]
        assert s["updates_until_forgotten"] == sum(step["samples"].count(s["sample_id"]) for step in until)
        assert not any(s["sample_id"] in step["samples"] for step in steps[s["forgotten_at_step"] :])
    assert all(s["updates_until_forgotten"] is None for s in samples if s not in forgotten)


def test_epochs_agree_with_steps(whole: Whole) -> None:
    steps, epochs = table(whole.folder, "steps"), table(whole.folder, "epochs")
    samples = table(whole.folder, "samples")
    assert [e["epoch"] for e in epochs] == list(range(7))
    assert [e["step"] for e in epochs] == list(range(0, 25, 4))
    assert epochs[0]["loss"] is None
    for e in epochs:
        own = [s for s in steps if s["epoch"] == e["epoch"]]
        for name in ("loss", "forget_loss", "retain_loss"):
            assert not own or e[name] == pytest.approx(np.mean([s[name] for s in own]))
        assert e["tokens"] == sum(s["tokens"] for s in steps[: e["step"]])
        at = [s["forgotten_at_step"] for s in samples]
        assert e["forgotten"] == pytest.approx(sum(n is not None and n <= e["step"] for n in at) / len(at))


def test_difficulty_against_fp64(whole: Whole, learnt: Path) -> None:
    """MRD's closed form: sigma sqrt(2/pi) times the norm of the gradient of Sum_t log|P_t|."""
    rows = table(whole.folder, "difficulty")
    ids = [record["id"] for record in FORGET]
    assert [(r["step"], r["sample_id"]) for r in rows] == [(step, name) for step in range(0, 24, 4) for name in ids]
    model = in_fp64(learnt)
    expected = []
    for record in FORGET:
        summed = losses(model, *ids_of(record["prompt"], record["completion"])).log().sum()
        norm = sum(g.square().sum() for g in torch.autograd.grad(summed, list(model.parameters()))).sqrt()
        expected.append(1e-5 * math.sqrt(2 / math.pi) * norm.item())
    initial = [r["mrd"] for r in rows[: len(ids)]]
    np.testing.assert_allclose(initial, expected, rtol=1e-3)
    assert [s["mrd_initial"] for s in table(whole.folder, "samples")] == initial
    assert initial != [r["mrd"] for r in rows[-len(ids) :]]


def test_what_epochs_say_of_the_models(whole: Whole, learnt: Path) -> None:
    first, last = table(whole.folder, "epochs")[0], table(whole.folder, "epochs")[-1]
    for row, folder in ((first, learnt), (last, whole.folder / "model")):
        model = in_fp64(folder)
        for name, records in (("forget", FORGET), ("retain", RETAIN)):
            assert row[f"{name}_probability"] == pytest.approx(probability(model, records), rel=1e-3)
            assert row[f"{name}_rouge_l_recall"] == pytest.approx(recall(model, records), abs=1e-6)
    assert last["forget_probability"] < first["forget_probability"]

    before, after = weights(learnt), weights(whole.folder / "model")
    moved = torch.cat([(after[name].double() - before[name].double()).flatten() for name in before])
    assert first["mean_abs_delta"] == first["delta_norm"] == 0
    assert last["mean_abs_delta"] == pytest.approx(moved.abs().mean().item())
    assert last["delta_norm"] == pytest.approx(moved.norm().item())


def test_thresholds_are_the_initial_averages(whole: Whole, learnt: Path) -> None:
    samples = table(whole.folder, "samples")
    model = in_fp64(learnt)
    for s, record in zip(samples, FORGET, strict=True):
        ids, first = ids_of(record["prompt"], record["completion"])
        predicted = model(input_ids=torch.tensor([ids])).logits[0, first - 1 : -1].argmax(-1)
        assert s["ma_initial"] == pytest.approx((predicted == torch.tensor(ids[first:])).double().mean().item())
    for name in ("ma", "el"):
        initial = np.array([s[f"{name}_initial"] for s in samples])
        threshold = whole.record["thresholds"][name]
        assert threshold == pytest.approx(initial[np.isfinite(initial)].mean())
        last = [s[f"{name}_last"] for s in samples if s["forgotten_at_step"] == 24]
        assert all(value < threshold for value in last if not math.isnan(value))


def test_record(whole: Whole, learnt: Path) -> None:
    record = whole.record
    assert record["spec"] == json.loads((whole.folder / "spec.json").read_text())
    assert {"algorithm": "GradDiff", "alpha": 1.0, "batch_size": 3, "retain_term": "nll"}.items() <= (
        record["spec"].items()
    )
    assert record["spec"]["model"] == str(learnt)
    assert record["updates"] == 24
    # A forward and a backward for the forget batch, and for the retain batch.
    assert record["passes"]["training"] == [48, 48]
    assert record["rejected"] == []
    assert record["packages"]["torch"] == torch.__version__
    assert record["seconds"].keys() == {"training", "mrd", "checks", "evaluation", "checkpoints"}
    assert all(value > 0 for value in record["seconds"].values())


def test_summary(whole: Whole) -> None:
    samples, epochs = table(whole.folder, "samples"), table(whole.folder, "epochs")
    updates = [s["updates_until_forgotten"] for s in samples if s["updates_until_forgotten"] is not None]
    lines = whole.printed.splitlines()
    (said,) = (line for line in lines if line.startswith("GradDiff, alpha 1: "))
    assert f"{len(updates)} of 10 samples forgotten" in said
    assert ": 24 updates" in said
    assert f"after {np.median(updates):g} draws in the median" in said
    assert str(whole.folder / "model") in whole.printed
    assert f"{whole.folder}/*.parquet" in whole.printed
    # A row an epoch, below the heads.
    assert lines[0].split()[:5] == ["epoch", "step", "forget_loss", "retain_loss", "forgotten"]
    for e, line in zip(epochs, lines[1:8], strict=True):
        assert line.split()[:2] == [str(e["epoch"]), str(e["step"])]
        assert float(line.split()[4]) == pytest.approx(e["forgotten"], rel=1e-3)
        assert float(line.split()[6]) == pytest.approx(e["forget_probability"], rel=1e-3)
    assert "24/24" in whole.error


# --- The same folder again ----------------------------------------------------------------------------------


def test_a_finished_run_is_left_alone(whole: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(whole.folder)
    assert run(whole.command) == 0
    printed = capsys.readouterr()
    (line,) = lines_of(printed.err)
    assert "holds this run" in line
    assert whole.record["spec"]["spec_hash"] in line
    assert printed.out == whole.printed
    assert content(whole.folder) == before


# What does not change the result; with its flags, all different from the run's own.
EXECUTION = {
    "workers": "--workers 3",
    "strategy": "--strategy fsdp",
    "cpus_per_worker": "--cpus-per-worker 2",
    "gpus_per_worker": "--gpus-per-worker 0.5",
    "batch_tokens": "--batch-tokens 64",
    "gradient_checkpointing": "--gradient-checkpointing",
    "checkpoint_every": "--checkpoint-every 3",
    "max_failures": "--max-failures 0",
    "log": "--log jsonl",
    "log_dir": "--log jsonl --log-dir nowhere",
}
# Every other field, but those that name a model or data.
IDENTITY = {
    "algorithm": "--algorithm SimNPO",
    "settings": "--algorithm NPO-GradDiff --settings beta=0.2",
    "retain_term": "--retain-term kl",
    "forget_weight": "--forget-weight 2",
    "retain_weight": "--retain-weight 2",
    "layer": "--layer 1",
    "trainable": "--trainable mlp",
    "lora_rank": "--lora-rank 2",
    "lora_alpha": "--lora-rank 2 --lora-alpha 3",
    "lora_targets": "--lora-rank 2 --lora-targets q_proj",
    "epochs": "--epochs 7",
    "max_steps": "--max-steps 24",
    "batch_size": "--batch-size 2",
    "learning_rate": "--learning-rate 2e-3",
    "weight_decay": "--weight-decay 0.1",
    "warmup_steps": "--warmup-steps 2",
    "clip_norm": "--clip-norm 2",
    "dtype": "--dtype bfloat16",
    "order": "--order easy-first",
    "alpha": "--alpha -1",
    "replacement": "--no-replacement",
    "refresh": "--refresh 0",
    "refresh_unit": "--refresh-unit steps",
    "estimator": "--estimator curvature",
    "statistic": "--estimator monte-carlo --statistic abs_mean",
    "sigma": "--sigma 1e-4",
    "draws": "--estimator monte-carlo --draws 20",
    "early_stopping": "--no-early-stopping",
    "stopping": "--stopping ma=0.4",
    "check_every": "--check-every 2",
    "check_unit": "--check-unit steps",
    "el_n": "--el-n 3",
    "seed": "--seed 1",
    "evaluate": "--no-evaluate",
    "evaluate_every": "--evaluate-every 2",
    "evaluate_samples": "--evaluate-samples 3",
    "ma_threshold": "--ma-threshold 0.5",
    "el_threshold": "--el-threshold 0.5",
    "optimizer": "--optimizer sgd",
    "weights": "--weights flip-time",
    "schedule": f"--schedule {ROOT}/examples/schedule.yaml",
    "hold_penalty": "--hold-penalty 0.1",
    "reward": "--reward 1",
    "negation": "--negation 0.5",
    **dict.fromkeys(DUAL, "--retain-term nll --retain-limit 1 --dual-step 2 --dual-warmup 1"),
}
NAMES = {
    "model",
    "task",
    "forget_split",
    "selection",
    "retain",
    "refusals",
    "alternatives",
    "adapter",
    "requests",
    *TEMPLATE_FIELDS,
}


def test_every_field_is_in_one_of_the_lists() -> None:
    assert {*EXECUTION, *IDENTITY, *NAMES} == {field.name for field in dataclasses.fields(UnlearnSpec)}


@pytest.mark.parametrize("more", EXECUTION.values(), ids=EXECUTION)
def test_how_a_run_is_executed_is_not_its_identity(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = content(whole.folder)
    assert run([*whole.command, *more.split()]) == 0
    assert "holds this run" in capsys.readouterr().err
    after = content(whole.folder)
    logs = {path for path in after if path.startswith("logs")}  # of a finished run, too, where they are asked for
    assert {path: after[path] for path in after if path not in logs} == before
    assert bool(logs) == (more == EXECUTION["log"])
    assert (tmp_path / "nowhere").is_dir() == (more == EXECUTION["log_dir"])
    shutil.rmtree(whole.folder / "logs", ignore_errors=True)


@pytest.mark.parametrize("field", IDENTITY)
def test_another_spec_is_refused(whole: Whole, capsys: pytest.CaptureFixture[str], field: str) -> None:
    before = content(whole.folder)
    line = refused(capsys, [*whole.command, *IDENTITY[field].split()])
    assert "holds a run of another spec" in line
    named = re.search(r"different: ([a-z_, ]+)", line)
    assert named, line
    found = set(named[1].split(", "))
    assert field in found
    # What was asked for, and at most what follows from it.
    asked = {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in IDENTITY[field].split()}
    assert found <= asked | {"statistic", "draws", "lora_alpha", "forget_weight", "retain_weight", "evaluate_samples"}
    assert content(whole.folder) == before


def _seed(inputs: Inputs) -> dict[str, Path]:
    return {"model": save_model(inputs.tmp_path / "data" / "other", seed=1)}


def _vocabulary(inputs: Inputs) -> dict[str, Path]:
    folder = inputs.copy_of_model()
    tokenizer(chat=True).save_pretrained(folder)
    return {"model": folder}


def _word(name: str, records: Sequence[dict[str, str]]) -> Callable[[Inputs], dict[str, Path]]:
    changed = [records[0] | {"completion": records[0]["completion"] + " w1"}, *records[1:]]
    return lambda inputs: {name: inputs.data("changed.jsonl", changed)}


def _fewer(inputs: Inputs) -> dict[str, Path]:
    return {"task": inputs.data("fewer.jsonl", FORGET[:-1])}


def _renamed(inputs: Inputs) -> dict[str, Path]:
    return {"task": inputs.data("renamed.jsonl", [FORGET[0] | {"id": "another"}, *FORGET[1:]])}


CONTENTS: dict[str, tuple[Callable[[Inputs], dict[str, Path]], str]] = {
    "weights": (_seed, "model_fingerprint"),
    "tokenizer": (_vocabulary, "model_fingerprint"),
    "a word of the forget set": (_word("task", FORGET), "forget_sha256"),
    "a sample less": (_fewer, "forget_sha256"),
    "an id": (_renamed, "forget_sha256"),
    "a word of the retain set": (_word("retain", RETAIN), "retain_sha256"),
}


@pytest.mark.parametrize(("changed", "named"), CONTENTS.values(), ids=CONTENTS)
def test_what_is_behind_a_name_is_part_of_the_spec(
    whole: Whole,
    learnt: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: Callable[[Inputs], dict[str, Path]],
    named: str,
) -> None:
    before = content(whole.folder)
    line = refused(capsys, [*whole.command, *flags(**changed(Inputs(tmp_path, learnt)))])
    assert "holds a run of another spec" in line
    assert named in line
    assert content(whole.folder) == before


def test_names_of_model_and_data_are_not_part_of_the_spec(
    whole: Whole, learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Inputs(tmp_path, learnt)
    assert run([*whole.command, *flags(model=moved.copy_of_model(), task=moved.task, retain=moved.retain)]) == 0
    assert "holds this run" in capsys.readouterr().err


def identity_with(inputs: Inputs, **fields: Any) -> dict[str, Any]:
    spec = UnlearnSpec(model=str(inputs.model), task=str(inputs.task), algorithm="GA", workers=0, **fields).checked()
    return identity_of(spec, find_model(spec.model), load_dataset(spec.task), None)


def test_what_files_say_is_part_of_the_spec_and_where_they_are_is_not(learnt: Path, tmp_path: Path) -> None:
    inputs = Inputs(tmp_path, learnt)
    ease, schedules = [], []
    for number, last in enumerate((1, 1, 2)):
        rows = [json.dumps({"sample_id": record["id"], "ease": 3}) for record in FORGET[:-1]]
        rows.append(json.dumps({"sample_id": FORGET[-1]["id"], "ease": last}))
        ease.append(str(inputs.file(f"ease{number}.jsonl", "\n".join(rows))))
        text = f"by: {ease[number]}\ngroups:\n  - {{share: 0.5}}\n  - {{share: 0.5, algorithm: ga}}\n"
        schedules.append(str(inputs.file(f"schedule{number}.yaml", text)))
    written_out = {"by": ease[0], "groups": [{"share": 0.5}, {"share": 0.5, "forget_weight": 1.0}]}
    for name, (first, again, other) in (("weights", ease), ("schedule", schedules)):
        hashes = [identity_with(inputs, **{name: value})["spec_hash"] for value in (first, again, other)]
        assert hashes[0] == hashes[1] != hashes[2]
    assert identity_with(inputs, schedule=written_out) == identity_with(inputs, schedule=schedules[0])
    assert not {"weights", "schedule", "optimizer", "hold_penalty", "reward"} & identity_with(inputs).keys()


def test_a_schedule_at_fault_is_named_with_its_line(
    learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = Inputs(tmp_path, learnt)
    path = inputs.file("schedule.yaml", "groups:\n  - share: 0.5\n    algorithm: GQ\n  - share: 0.5\n")
    command = ["unlearn", *flags(model=learnt, task=inputs.task, algorithm="GA", schedule=path, out=inputs.out)]
    line = refused(capsys, command)
    assert f"{path}, line 3: " in line
    assert "algorithm is 'GQ': expected one of" in line
    assert "cannot be read" in refused(capsys, [*command, "--schedule", "nowhere.yaml"])
    spec = inputs.file("run.yaml", "weights: nowhere.jsonl\n")
    assert "nowhere.jsonl does not exist" in refused(capsys, [*command[:-4], *command[-2:], *flags(spec=spec)])


def _with_a_file(inputs: Inputs) -> Path:
    inputs.out.mkdir()
    (inputs.out / "mine.txt").write_text("mine")
    return inputs.out


def _with_a_folder(inputs: Inputs) -> Path:
    (inputs.out / "mine").mkdir(parents=True)
    return inputs.out


OUTS: dict[str, tuple[Callable[[Inputs], Path], str]] = {
    "with a file of another's": (_with_a_file, "is not empty and holds no run: choose another folder"),
    "with a folder of another's": (_with_a_folder, "is not empty and holds no run: choose another folder"),
    "a file": (lambda inputs: inputs.file("out", "mine"), "is a file: expected a folder to write to"),
    "under a file": (lambda inputs: inputs.file("out", "mine") / "run", r"cannot be written to \(Not a directory\)"),
}


@pytest.mark.parametrize(("occupied", "expected"), OUTS.values(), ids=OUTS)
def test_what_is_anothers_is_left_alone(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], occupied: Callable[[Inputs], Path], expected: str
) -> None:
    out = occupied(inputs)
    before, names = content(inputs.tmp_path), set(inputs.tmp_path.rglob("*"))
    line = refused(capsys, inputs.command(out=out))
    assert re.search(expected, line), line
    assert str(out) in line
    assert content(inputs.tmp_path) == before
    assert set(inputs.tmp_path.rglob("*")) == names


@pytest.mark.parametrize("text", ['{"name": "another program"}', "[1]", "no JSON"])
def test_a_spec_json_of_another_program(inputs: Inputs, capsys: pytest.CaptureFixture[str], text: str) -> None:
    inputs.out.mkdir()
    (inputs.out / "spec.json").write_text(text)
    before = content(inputs.tmp_path)
    line = refused(capsys, inputs.command())
    assert str(inputs.out) in line
    assert content(inputs.tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    inputs.out.mkdir()
    inputs.out.chmod(0o500)
    for out in (inputs.out, inputs.out / "run"):
        assert "cannot be written to (Permission denied)" in refused(capsys, inputs.command(out=out))
        assert list(inputs.out.iterdir()) == []


def _nan_weight(inputs: Inputs) -> list[str]:
    folder = inputs.copy_of_model()
    broken = weights(folder)
    broken["model.norm.weight"][0] = float("nan")
    save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
    return flags(model=folder)


def _cut_weights(inputs: Inputs) -> list[str]:
    folder = inputs.copy_of_model()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    return flags(model=folder)


def _no_causal_model(inputs: Inputs) -> list[str]:
    from transformers import T5Config

    folder = inputs.copy_of_model()
    T5Config(vocab_size=97).save_pretrained(folder)
    return flags(model=folder)


def _plain_text(inputs: Inputs) -> list[str]:
    return flags(algorithm="PO", task=inputs.data("text.jsonl", [{"id": "a", "text": "w1 w2 w3"}]))


def _all_too_long(inputs: Inputs) -> list[str]:
    return flags(task=inputs.data("long.jsonl", [{"id": "a", "prompt": "w1", "completion": "w2 " * 70}]))


def _retain_all_empty(inputs: Inputs) -> list[str]:
    return flags(retain=inputs.data("empty.jsonl", [{"id": "a", "prompt": "w1", "completion": ""}]))


STARTS: dict[str, tuple[Callable[[Inputs], list[str]], str]] = {
    "weights that are cut off": (_cut_weights, "cannot be loaded as a causal language model"),
    "a layer too deep": (lambda _: flags(algorithm="RMU", layer=3), "layer is 3: the model has 2 decoder layers"),
    "nothing to train": (lambda _: flags(trainable="nowhere"), "'nowhere' matches no parameter of the model"),
    "no question to refuse": (
        _plain_text,
        "'a': a plain text has no question to answer; PO, IdkDPO and AltPO need 'prompt'",
    ),
    "nothing to forget": (_all_too_long, "none of 1 samples can be scored; the first, 'a': 73 tokens"),
    "nothing to keep": (
        _retain_all_empty,
        "none of 1 samples can be scored; the first, 'a': empty answer",
    ),
    "no causal model": (_no_causal_model, "cannot be loaded as a causal language model"),
    "weights that are not finite": (_nan_weight, "weight 'model.norm.weight' holds NaN or infinity"),
}


@pytest.mark.parametrize(
    ("spoil", "expected"),
    STARTS.values(),
    ids=STARTS,
)
def test_a_first_start_that_is_refused_leaves_nothing(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], spoil: Callable[[Inputs], list[str]], expected: str
) -> None:
    line = refused(capsys, [*inputs.command(), *spoil(inputs)])
    assert expected in line
    assert not inputs.out.exists()
    # The mended command finds nothing in its way.
    assert run(inputs.command(epochs=1)) == 0


# --- Kills, and two at once ---------------------------------------------------------------------------------


@pytest.fixture
def process_of() -> Iterator[Callable[[Sequence[str]], subprocess.Popen[str]]]:
    """Starts the command in a process of its own; what is left of them is ended afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(command: Sequence[str]) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "bench.cli", *command],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            kill(process.pid)
        process.communicate()


def checkpoints(out: Path) -> list[int]:
    """Steps of the finished checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in out.glob("checkpoints/step-*"))


@pytest.mark.slow
def test_killed_runs_end_as_if_undisturbed(
    learnt: Path,
    tmp_path: Path,
    process_of: Callable[[Sequence[str]], subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a reference, a warm-up, passes over the samples, refreshes and checks in the middle of epochs. Meanwhile,
    another process wants the same folder."""
    inputs = Inputs(tmp_path, learnt)
    more = "--alpha -1 --no-replacement --refresh 3 --refresh-unit steps --check-every 4 --check-unit steps --el-n 2"
    more += " --stopping paper --epochs 10 --batch-size 2 --learning-rate 7e-5 --warmup-steps 6 --checkpoint-every 1"
    command = inputs.command(*more.split(), algorithm="GradDiff-KL")
    at = command.index("--out")
    undisturbed = tmp_path / "undisturbed"
    assert run([*command[:at], "--out", str(undisturbed), *command[at + 2 :]]) == 0

    first = process_of(command)
    wait_for(lambda: first.poll() is not None or (checkpoints(inputs.out) or [0])[-1] >= 2)
    assert first.poll() is None, "the run ended before it could be killed"
    first.send_signal(signal.SIGSTOP)
    wait_for(lambda: Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    before = content(inputs.out)
    assert "another run is writing here; wait for it, or choose another" in refused(capsys, command)
    assert content(inputs.out) == before
    kill(first.pid)
    first.wait()
    reached = checkpoints(inputs.out)[-1]
    assert 2 <= reached < 50
    assert not (inputs.out / "run.json").exists()
    # Nor does another spec take over what is unfinished.
    assert "holds a run of another spec (different: seed)" in refused(capsys, [*command, "--seed", "1"])
    assert content(inputs.out) == before
    kept = json.loads((inputs.out / "checkpoints" / f"step-{reached:08d}" / "history.json").read_text())["steps"]

    second = process_of(command)
    printed, error = second.communicate(timeout=120)
    assert second.returncode == 0, error
    assert lines_of(error) == []
    assert "samples forgotten" in printed
    # It went on: no two runs take the same time to the last digit.
    steps = table(inputs.out, "steps")
    assert [s["seconds"] for s in steps[:reached]] == [s["seconds"] for s in kept[:reached]]
    assert without_seconds(inputs.out) == without_seconds(undisturbed)
    assert (inputs.out / "model" / "model.safetensors").read_bytes() == (
        undisturbed / "model" / "model.safetensors"
    ).read_bytes()
    records = [json.loads((folder / "run.json").read_text()) for folder in (inputs.out, undisturbed)]
    for record in records:
        del record["seconds"], record["git_commit"]
    assert records[0] == records[1]
    assert {p.name for p in inputs.out.iterdir()} == {p.name for p in undisturbed.iterdir()}
    # The run was worth comparing: MRD was measured again, and some samples are forgotten, not all.
    assert len({r["step"] for r in table(inputs.out, "difficulty")}) > 5
    assert 0 < table(inputs.out, "epochs")[-1]["forgotten"] < 1


# --- Full disks ---------------------------------------------------------------------------------------------

# Run as root of a user namespace of its own: mounts end with the process. Prints a line of JSON a command.
MOUNTS = """
import contextlib, io, json, subprocess, sys
from pathlib import Path
from bench.cli import main

folder, command = sys.argv[1], sys.argv[2:]
for options, out in (("size=256k", "run"), ("size=16m", "run"), ("size=16m,ro", "run"), ("size=16m,ro", "")):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
        code = main([*command, "--out", str(Path(folder) / out)])
    left = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))
    print(json.dumps([code, error.getvalue(), left]))
    # Lazily: a file of weights that is mapped into memory may not have been let go yet.
    subprocess.run(["umount", "-l", folder], check=True)
"""


@pytest.mark.slow
def test_disks_that_are_full_or_read_only(inputs: Inputs) -> None:
    """Real ones. The model has 74 kB of weights: two checkpoints, with AdamW's two moments, take six times as much."""
    disk = inputs.tmp_path / "disk"
    disk.mkdir()
    alone = ["unshare", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if shutil.which("unshare") is None or subprocess.run([*alone, *mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    command = inputs.command(out=None)
    done = subprocess.run(
        [*alone, sys.executable, "-c", MOUNTS, str(disk), *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    small, large, inside, itself = map(json.loads, done.stdout.splitlines())

    code, error, left = small
    assert code == 2
    (line,) = lines_of(error)
    assert re.search(r"--out .*run: .* free, and the checkpoints need .*; free some, or choose", line), line
    # Before training started: there was no update to show.
    assert "update" not in error
    assert left == []

    code, _, left = large
    assert code == 0
    assert {"run/run.json", "run/model/model.safetensors"} <= set(left)

    for code, error, left in (inside, itself):
        assert code == 2
        (line,) = lines_of(error)
        assert "cannot be written to (Read-only file system)" in line
        assert left == []


@pytest.mark.parametrize(("lora_rank", "copies"), [(0, 7), (2, 2)])
def test_room_is_that_of_two_checkpoints(
    inputs: Inputs,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lora_rank: int,
    copies: int,
) -> None:
    """Weights and two moments, twice, and the initial weights; of adapters the initial and the finished model."""
    size = sum(value.numel() for value in weights(inputs.model).values()) * 4
    usage = shutil.disk_usage(inputs.tmp_path)
    free = int(copies * size * 0.98)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    command = inputs.command(lora_rank=lora_rank)
    line = refused(capsys, command)
    assert "choose a folder on another disk" in line
    assert not inputs.out.exists()
    free = int(copies * size * 1.02)
    assert run(command) == 0


# --- When nobody looks, and when the rule cannot tell ---------------------------------------------------------


def test_nobody_looks(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    """All updates are made, nothing is measured for the rule, and nothing is said to be forgotten."""
    assert run(inputs.command(check_every=0)) == 0
    printed = capsys.readouterr()
    assert "forgotten (MA" not in printed.out
    assert "forgotten=" not in printed.err
    record = json.loads((inputs.out / "run.json").read_text())
    assert record["spec"]["early_stopping"] is False
    assert record["thresholds"] == {}
    assert "checks" not in record["seconds"]
    samples = pq.read_table(inputs.out / "samples.parquet")
    for name in ("ma_initial", "el_initial", "ma_last", "el_last", "forgotten_at_step", "updates_until_forgotten"):
        assert samples[name].null_count == samples.num_rows
    assert set(pq.read_table(inputs.out / "epochs.parquet")["forgotten"].to_pylist()) == {None}


def test_stopping_needs_someone_who_looks(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, inputs.command("--early-stopping", check_every=0))
    assert "--early-stopping and --check-every 0 exclude each other" in line
    assert not inputs.out.exists()


def test_extraction_that_is_nowhere_defined(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    """No sample has a hundred tokens: JSON has no nan, and the summary says so."""
    assert run(inputs.command(el_n=100, stopping="paper")) == 0
    assert "MA alone decides" in capsys.readouterr().out
    assert json.loads((inputs.out / "run.json").read_text())["thresholds"]["el"] is None


def test_a_threshold_of_zero_is_said_aloud(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model reproduces no four tokens in a row: its EL is 0, and nothing falls below."""
    assert run(inputs.command(model=save_model(inputs.tmp_path / "random"), el_n=4, stopping="paper")) == 0
    out = capsys.readouterr().out
    assert "EL of all samples is 0 on the initial model, and nothing is below: no sample can count as forgotten" in out


# --- Specs from files, and slips in them --------------------------------------------------------------------


@pytest.fixture
def yaml_of(whole: Whole, tmp_path: Path) -> Callable[..., Path]:
    """The whole run's spec as a file, with lines changed, added, or left out (None)."""

    def write(**changed: str | None) -> Path:
        lines: dict[str, str | None] = {
            "model": str(whole.inputs.model),
            "task": str(whole.inputs.task),
            "retain": str(whole.inputs.retain),
            "algorithm": "graddiff",
            "alpha": "1",
            "epochs": "6",
            "refresh": "1",
            "batch_size": "3.0",
            "learning_rate": "2e-4",
            "stopping": "paper",
            "el_n": "2",
            "workers": "0",
            **changed,
        }
        path = tmp_path / "spec.yaml"
        path.write_text("".join(f"{name}: {value}\n" for name, value in lines.items() if value is not None))
        return path

    return write


def test_a_spec_file_is_the_same_run_as_its_flags(
    whole: Whole, yaml_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["unlearn", "--spec", str(yaml_of()), "--out", str(whole.folder)]) == 0
    printed = capsys.readouterr()
    assert "holds this run" in printed.err
    assert printed.out == whole.printed


def test_flags_win_over_the_file(
    whole: Whole, yaml_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["unlearn", "--out", str(whole.folder), "--spec"]
    wrong = yaml_of(alpha="-1", early_stopping="false", task="nowhere.jsonl", seed="many")
    right = ["--alpha", "1", "--early-stopping", "--task", str(whole.inputs.task), "--seed", "0"]
    assert run([*command, str(wrong), *right]) == 0
    assert "holds this run" in capsys.readouterr().err
    # Without one of the flags the file counts.
    line = refused(capsys, [*command, str(wrong), *right[2:]])
    assert "(different: alpha)" in line


def test_numbers_in_a_file(inputs: Inputs, yaml_of: Callable[..., Path]) -> None:
    path = yaml_of(learning_rate="5e-5", epochs="1", settings="{beta: 2.5e-1}", algorithm="NPO", evaluate="no")
    assert run(["unlearn", "--spec", str(path), "--out", str(inputs.out)]) == 0
    spec = json.loads((inputs.out / "spec.json").read_text())
    assert (spec["learning_rate"], spec["settings"], spec["evaluate"]) == (5e-5, {"beta": 0.25}, False)
    assert {s["learning_rate"] for s in table(inputs.out, "steps")} == {5e-5}


FILES: dict[str, tuple[dict[str, str | None], str]] = {
    "unknown key": (
        {"learning_rte": "1"},
        r"spec.yaml, line \d+: unknown field 'learning_rte': .*mean 'learning_rate'",
    ),
    "a flag's spelling": ({"batch-size": "1"}, "unknown field 'batch-size': .*did you mean 'batch_size'"),
    "a word for a number": (
        {"learning_rate": "fast"},
        r"yaml, line \d+: learning_rate is 'fast': expected a number",
    ),
    "a fraction": ({"epochs": "1.5"}, r"spec.yaml, line \d+: epochs is 1.5: expected a whole number of at least 1"),
    "no task": ({"task": None}, "spec.yaml: missing task: expected in a spec file, or as --task"),
    "unknown algorithm": (
        {"algorithm": "GradDif"},
        r"line \d+: algorithm is 'GradDif': expected one of GA, .*mean 'GradDiff'\?",
    ),
    "out": ({"out": "run"}, "unknown field 'out'"),
}


@pytest.mark.parametrize(("changed", "expected"), FILES.values(), ids=FILES)
def test_slips_in_a_file(
    inputs: Inputs,
    yaml_of: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, str | None],
    expected: str,
) -> None:
    line = refused(capsys, ["unlearn", "--spec", str(yaml_of(**changed)), "--out", str(inputs.out)])
    assert re.search(expected, line), line
    assert not inputs.out.exists()


SLIPS = {
    "unknown flag": ("--learning-rat 1", r"unknown argument '--learning-rat'; did you mean --learning-rate\?"),
    "a field's spelling": ("--learning_rate 1", r"unknown argument '--learning_rate'; did you mean --learning-rate\?"),
    "beginning of a flag": ("--learn 1", "unknown argument '--learn'"),
    "unknown algorithm": (
        "--algorithm GradDif",
        r"--algorithm is 'GradDif': expected one of GA, .*mean 'GradDiff'\?",
    ),
    "unknown order": ("--order easy", r"--order is 'easy': expected one of .*; did you mean 'easy-first'\?"),
    "unknown strategy": ("--strategy fdsp", r"--strategy is 'fdsp': expected one of .*; did you mean 'fsdp'\?"),
    "unknown retain term": ("--retain-term nl", r"--retain-term is 'nl': expected one of none, nll.*mean 'nll'\?"),
    "unknown dtype": ("--dtype bfloat", r"--dtype is 'bfloat': expected one of .*; did you mean 'bfloat16'\?"),
    "unknown estimator": ("--estimator grad", r"--estimator is 'grad': expected one of .*; did you mean 'gradient'\?"),
    "unknown unit": ("--check-unit step", r"--check-unit is 'step': expected one of .*; did you mean 'steps'\?"),
    "setting without a value": ("--settings beta", "--settings is 'beta': expected name=number"),
    "setting of words": ("--settings beta=high", "--settings beta=high: expected a number"),
    "no setting": ("--algorithm NPO --settings=", "--settings is '': expected name=number"),
    "unknown setting": ("--algorithm NPO --settings bta=1", "unknown setting of npo 'bta': .*did you mean 'beta'"),
    "setting of an algorithm without": ("--settings beta=1", "unknown setting of ga 'beta': it has no settings"),
    "setting out of range": (
        "--algorithm NPO --settings beta=0",
        r"--settings\['beta'\] is 0: expected a number greater than 0",
    ),
    "infinite setting": ("--algorithm NPO --settings beta=inf", "--settings beta=inf: expected a finite"),
    "no epochs": ("--epochs 0", "--epochs is 0: expected a whole number of at least 1"),
    "a word for a number": ("--epochs many", "--epochs is 'many': expected a whole number of at least 1"),
    "no learning rate": ("--learning-rate 0", "--learning-rate is 0: expected a number greater than 0"),
    "infinite alpha": ("--alpha inf", "--alpha is inf: expected a finite number"),
    "negative workers": ("--workers -1", "--workers is -1: expected a whole number of at least 0"),
    "checkpoints never": ("--checkpoint-every 0", "--checkpoint-every is 0: expected a whole number of at least 1"),
    "one and a half GPUs": ("--gpus-per-worker 1.5", "--gpus-per-worker is 1.5: expected a fraction of one GPU, or a"),
    "a setting of no adapters": ("--lora-targets mlp", "--lora-targets is of adapters, and there are none: give"),
    "adapters and a pattern": ("--lora-rank 2 --trainable mlp", "--trainable and --lora-rank exclude each other"),
    "one draw": ("--estimator monte-carlo --draws 1", "--draws is 1: expected a whole number of at least 2"),
    "split of a file": ("--forget-split forget10", "forget10: a data file has no splits"),
    "no data": ("--task nowhere.jsonl", "data file 'nowhere.jsonl' does not exist"),
    "no retain data": ("--retain nowhere.jsonl", "data file 'nowhere.jsonl' does not exist"),
    "unknown task": ("--task author", r"unknown task 'author': .*; did you mean 'authors'\?"),
    "a task without data": ("--task whp", r"task 'whp' needs its data: write whp:SOURCE"),
    "data for a task that has its own": ("--task authors:mine", "the data of 'authors' are generated"),
    "unknown split": ("--task authors --forget-split forget9", r"unknown split .*'forget9': .*mean 'forget10'\?"),
    "no model": ("--model ./nowhere", "model folder './nowhere' does not exist"),
    "no file": ("--spec nowhere.yaml", r"spec file 'nowhere.yaml' cannot be read \(No such file or directory\)"),
}


@pytest.mark.parametrize(("slip", "expected"), SLIPS.values(), ids=SLIPS)
def test_slips_on_the_command_line(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], slip: str, expected: str
) -> None:
    before = content(inputs.tmp_path)
    line = refused(capsys, [*inputs.command(), *slip.split()])
    assert re.search(expected, line), line
    assert not inputs.out.exists()
    assert content(inputs.tmp_path) == before


@pytest.mark.parametrize("missing", ["model", "task", "algorithm"])
def test_required_field(inputs: Inputs, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    line = refused(capsys, inputs.command(**{missing: None}))
    assert f"missing {missing}: expected in a spec file, or as --{missing}" in line


# --- Data ---------------------------------------------------------------------------------------------------


def trained_tokens(out: Path) -> list[int]:
    return [s["tokens"] for s in table(out, "steps")]


def length(prompt: str, completion: str) -> int:
    return len(ids_of(prompt, completion)[0])


def test_an_algorithm_with_a_retain_term_needs_a_retain_set(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, inputs.command(retain=None))
    assert "algorithm GradDiff has a retain term and there is no retain set" in line
    assert "--retain-term none" in line
    assert not inputs.out.exists()

    # What it says helps: GradDiff without its retain term is GA, and no retain sample is trained on.
    assert run(inputs.command("--retain-term", "none", retain=None)) == 0
    other = inputs.tmp_path / "ga"
    assert run(inputs.command(retain=None, algorithm="GA", out=other)) == 0
    assert (inputs.out / "model" / "model.safetensors").read_bytes() == (
        other / "model" / "model.safetensors"
    ).read_bytes()
    steps = table(inputs.out, "steps")
    assert {s["retain_loss"] for s in steps} == {None}
    lengths = {r["id"]: length(r["prompt"], r["completion"]) for r in FORGET}
    assert trained_tokens(inputs.out) == [sum(lengths[name] for name in s["samples"]) for s in steps]


def test_retain_file_is_what_is_kept(inputs: Inputs) -> None:
    """The loss of the first update, of the retain set too, from the samples themselves."""
    retain = inputs.data("one.jsonl", RETAIN[:1])
    assert run(inputs.command(retain=retain, batch_size=2)) == 0
    first = table(inputs.out, "steps")[0]
    model = in_fp64(inputs.model)
    mean = {r["id"]: losses(model, *ids_of(r["prompt"], r["completion"])).mean().item() for r in [*FORGET, RETAIN[0]]}
    assert first["retain_loss"] == pytest.approx(mean[RETAIN[0]["id"]], rel=1e-5)
    assert first["forget_loss"] == pytest.approx(-np.mean([mean[name] for name in first["samples"]]), rel=1e-5)


# One word for the first refusal, two for the second, and so on: their lengths tell them apart.
OWN_REFUSALS = ["w80", "w81 w82", "w83 w84 w85"]


def corpus_of(**fields: Any) -> Any:
    """What an algorithm with refusals is trained on."""
    spec = UnlearnSpec(**{"algorithm": "PO", "retain_term": "none", "workers": 0, **fields}).checked()
    forget = load_dataset(spec.task, spec.forget_split)
    return unlearning_job.corpus_of(spec, find_model(spec.model), forget, None)[0]


def refusals_of(samples: Sequence[Sample]) -> list[list[int]]:
    return [s.input_ids[s.scored].tolist() for s in samples]


def test_refusals_of_a_file(inputs: Inputs) -> None:
    # A first line like any other, blank lines, and white space around one.
    path = inputs.file("refusals.txt", f"\n{OWN_REFUSALS[0]}\n\n   {OWN_REFUSALS[1]}  \n \n{OWN_REFUSALS[2]}")
    task = inputs.data("many.jsonl", pairs(40))
    given = {"model": str(inputs.model), "task": str(task), "refusals": str(path)}
    corpus = corpus_of(**given)
    assert [s.sample_id for s in corpus.refusals] == [s.sample_id for s in corpus.forget]
    assert [s.index for s in corpus.refusals] == list(range(40))
    expected = [[*map(token_id, phrase.split()), EOS] for phrase in OWN_REFUSALS]
    drawn = [expected.index(refusal) for refusal in refusals_of(corpus.refusals)]
    # 40 draws of one in three: none is rarer than this but once in 10^6 seeds.
    assert all(drawn.count(which) >= 3 for which in range(3))
    for sample, record in zip(corpus.refusals, pairs(40), strict=True):
        assert sample.input_ids[~sample.scored].tolist() == [BOS, *map(token_id, record["prompt"].split())]

    # One for each sample, by seed and sample: not by its place in the data, nor by which others there are.
    assert refusals_of(corpus_of(**given).refusals) == refusals_of(corpus.refusals)
    assert refusals_of(corpus_of(**given, seed=1).refusals) != refusals_of(corpus.refusals)
    fewer = corpus_of(**given | {"task": str(inputs.data("fewer.jsonl", pairs(40)[::-2]))})
    assert refusals_of(fewer.refusals) == refusals_of(corpus.refusals)[::-2]


@pytest.mark.parametrize("algorithm", ["PO", "IdkDPO"])
def test_refusals_are_what_is_trained_on(inputs: Inputs, algorithm: str) -> None:
    refusals = inputs.file("refusals.txt", "\n".join(OWN_REFUSALS))
    assert run(inputs.command("--retain-term", "none", algorithm=algorithm, refusals=refusals, batch_size=3)) == 0
    corpus = corpus_of(model=str(inputs.model), task=str(inputs.task), refusals=str(refusals))
    assert {len(refusal) for refusal in refusals_of(corpus.refusals)} <= {2, 3, 4}
    refused_ids = {s.sample_id: s.input_ids.tolist() for s in corpus.refusals}
    answers = {r["id"]: length(r["prompt"], r["completion"]) if algorithm == "IdkDPO" else 0 for r in FORGET}
    steps = table(inputs.out, "steps")
    expected = [sum(len(refused_ids[name]) + answers[name] for name in s["samples"]) for s in steps]
    assert trained_tokens(inputs.out) == expected
    if algorithm == "PO":
        model = in_fp64(inputs.model)
        prompts = {r["id"]: 1 + len(r["prompt"].split()) for r in FORGET}
        first = steps[0]["samples"]
        mean = np.mean([losses(model, refused_ids[name], prompts[name]).mean().item() for name in first])
        assert steps[0]["forget_loss"] == pytest.approx(mean, rel=1e-5)


def test_refusals_are_part_of_the_spec(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    """What they say, not the file's name; and not at all for an algorithm that has no use for them."""
    one, other, copy = (inputs.file(f"{name}.txt", text) for name, text in (("1", "w1"), ("2", "w2"), ("3", "w1\n")))
    command = inputs.command("--max-steps", "1", algorithm="PO")
    assert run([*command, "--refusals", str(one)]) == 0
    assert "(different: refusals)" in refused(capsys, [*command, "--refusals", str(other)])
    assert "(different: refusals)" in refused(capsys, command)
    assert run([*command, "--refusals", str(copy)]) == 0
    assert "holds this run" in capsys.readouterr().err


NO_REFUSALS: dict[str, tuple[Callable[[Inputs], Path], str]] = {
    "empty": (lambda i: i.file("r.txt", ""), "r.txt' is empty; expected one refusal a line"),
    "blank lines": (lambda i: i.file("r.txt", "\n  \n"), "r.txt' is empty; expected one refusal a line"),
    "missing": (lambda i: i.tmp_path / "r.txt", "r.txt' cannot be read .*No such file or directory"),
    "a folder": (lambda i: i.model, "cannot be read .*Is a directory"),
    "not text": (lambda i: i.model / "model.safetensors", "model.safetensors: not UTF-8 text at byte"),
    "longer than the context": (
        lambda i: i.file("r.txt", "w1 " * 64),
        r"task.jsonl, 'r0': with a refusal as its answer: \d+ tokens, the model's context holds 64",
    ),
}


@pytest.mark.parametrize(("write", "expected"), NO_REFUSALS.values(), ids=NO_REFUSALS)
def test_refusals_that_cannot_be_read(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], write: Callable[[Inputs], Path], expected: str
) -> None:
    line = refused(capsys, inputs.command(algorithm="PO", refusals=write(inputs)))
    assert re.search(expected, line), line
    assert not inputs.out.exists()


def test_alternatives(inputs: Inputs, embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file, each sample has its own; of a task, the wrong answers of its records. What they say is in the
    identity."""
    records = pairs(40)
    own = {record["id"]: [f"w80 w{10 + row}", f"w81 w{10 + row}"] for row, record in enumerate(records)}
    lines = [{"sample_id": name, "alternatives": answers} for name, answers in reversed(own.items())]
    path, task = inputs.data("alternatives.jsonl", lines), inputs.data("many.jsonl", records)
    given = {"algorithm": "AltPO", "model": str(inputs.model), "task": str(task), "alternatives": str(path)}
    corpus = corpus_of(**given)
    choices = {name: [[*map(token_id, answer.split()), EOS] for answer in answers] for name, answers in own.items()}
    drawn = [
        choices[s.sample_id].index(answer)
        for s, answer in zip(corpus.refusals, refusals_of(corpus.refusals), strict=True)
    ]
    assert 8 <= sum(drawn) <= 32, "both are drawn: beyond that once in 10^5 seeds"

    command = inputs.command("--retain-term", "none", "--max-steps", "1", algorithm="AltPO")
    answers = [{"sample_id": record["id"], "alternatives": ["w80"]} for record in FORGET]
    for number, (content, expected) in enumerate(
        [
            (answers[1:], rf"'{FORGET[0]['id']}' has no alternative answer: expected one or more of each sample"),
            ([{"sample_id": "r0"}], "record 1: field 'alternatives' is missing, expected a list of texts"),
            (
                [{"sample_id": "r0", "alternatives": "w80"}],
                "record 1: field 'alternatives' is .*expected a list of texts",
            ),
            ([answers[0] | {"alternatives": ["w1 " * 64]}, *answers[1:]], "with an alternative as its answer: "),
        ]
    ):
        file = inputs.data(f"wrong{number}.jsonl", content)
        assert re.search(expected, line := refused(capsys, [*command, "--alternatives", str(file)])), line
    assert "teaches alternative answers, and" in refused(capsys, command)
    assert not inputs.out.exists()
    assert run([*command, "--alternatives", str(inputs.data("a.jsonl", answers))]) == 0
    assert run([*command, "--alternatives", str(inputs.data("b.jsonl", answers[::-1]))]) == 0
    other = inputs.data("c.jsonl", [answer | {"alternatives": ["w81"]} for answer in answers])
    assert "(different: alternatives)" in refused(capsys, [*command, "--alternatives", str(other)])

    of_task = corpus_of(algorithm="AltPO", model=str(embedded), task="authors", forget_split="forget01")
    words = AutoTokenizer.from_pretrained(embedded)
    for sample, record in zip(of_task.refusals, authors.load("forget01"), strict=True):
        assert words.decode(sample.input_ids[sample.scored])[1:].removesuffix("</s>") in record["perturbed_answer"]


def test_adapter(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    """It alone is trained further, and what is left is an adapter again; one of another model, one that lacks weights,
    and settings that contradict it, are refused."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(inputs.model), config)
    adapted.save_pretrained(inputs.tmp_path / "adapter")
    command = inputs.command("--adapter", str(inputs.tmp_path / "adapter"), algorithm="NPO", max_steps=2)
    assert "--adapter and --lora-rank exclude each other" in refused(capsys, [*command, "--lora-rank", "2"])
    other = save_model(inputs.tmp_path / "other", seed=3)
    assert "which is another one than" in refused(capsys, [*command, "--model", str(other)])
    assert "is no folder with adapter_config.json" in refused(capsys, [*command, "--adapter", str(other)])
    spoilt = Path(shutil.copytree(inputs.tmp_path / "adapter", inputs.tmp_path / "spoilt"))
    weights = load_file(spoilt / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, spoilt / "adapter_model.safetensors")
    assert "it lacks 1 weights that its adapter_config" in refused(capsys, [*command, "--adapter", str(spoilt)])
    assert not inputs.out.exists()
    assert run(command) == 0
    assert "(different: model_fingerprint, adapter)" in refused(capsys, [*command[:-2]])
    before = adapted.merge_and_unload().state_dict()
    after = AutoModelForCausalLM.from_pretrained(inputs.out / "model").state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "up_proj" in name
    }
    assert table(inputs.out, "steps")[0]["forget_loss"] == pytest.approx(20 * np.log(2), rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(inputs.model)
    left = peft.PeftModel.from_pretrained(base, inputs.out / "adapter").merge_and_unload().state_dict()
    assert all(torch.allclose(left[name], after[name], rtol=0, atol=1e-6) for name in after)
    assert run([*command, "--adapter", str(inputs.out / "adapter"), "--out", str(inputs.tmp_path / "further")]) == 0


def test_built_in_refusals(embedded: Path) -> None:
    """Under the embedded model, whose tokens can be written out: the question stays, a refusal takes the answer's
    place, with the space before it."""
    corpus = corpus_of(model=str(embedded), task="authors", forget_split="forget10")
    words = AutoTokenizer.from_pretrained(embedded)
    assert len(corpus.refusals) == 40
    drawn = set()
    for sample, record in zip(corpus.refusals, authors.load("forget10"), strict=True):
        before = words.decode(sample.input_ids[~sample.scored])
        assert before == f"<s>Question: {record['question']}\nAnswer:"
        after = words.decode(sample.input_ids[sample.scored])
        assert after.startswith(" ")
        assert after.endswith("</s>")
        drawn.add(after.removeprefix(" ").removesuffix("</s>"))
    assert drawn <= set(REFUSALS)
    # Of ten phrases, forty draws leave out more than four but once in 10^6 seeds.
    assert len(drawn) >= 6


def test_conversations_are_refused_in_their_last_turn(tmp_path: Path) -> None:
    model = save_model(tmp_path / "chat", chat=True)
    inputs = Inputs(tmp_path, model)
    turns = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 w6 w7"},
    ]
    task = inputs.data("chat.jsonl", [{"id": "a", "messages": turns}])
    refusals = inputs.file("refusals.txt", "w80 w81")
    (sample,) = corpus_of(model=str(model), task=str(task), refusals=str(refusals)).refusals
    text = "<user> w1 w2 <end> <assistant> w3 <end> <user> w4 <end> <assistant> w80 w81 <end>"
    assert sample.input_ids.tolist() == [token_id(word) for word in text.split()]
    assert sample.input_ids[sample.scored].tolist() == [token_id(word) for word in ("w80", "w81", "<end>")]
    assert run(inputs.command("--retain-term", "none", algorithm="PO", task=task, refusals=refusals, max_steps=1)) == 0
    # With replacement: the one sample four times.
    assert trained_tokens(inputs.out) == [4 * len(text.split())]


def test_samples_that_cannot_be_used_are_named(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [
        {"id": "long", "prompt": "w1 " * 60, "completion": "w2 w3 w4"},
        {"id": "empty", "prompt": "w1", "completion": ""},
    ]
    mixed = inputs.data("mixed.jsonl", [bad[0], *FORGET[:4], bad[1], *FORGET[4:]])
    kept = inputs.data("kept.jsonl", [{"id": "kept-empty", "text": ""}, *RETAIN])
    refusals = inputs.file("refusals.txt", "\n".join(OWN_REFUSALS))
    command = inputs.command(algorithm="IdkDPO", task=mixed, retain=kept, refusals=refusals)
    assert run(command) == 0
    rejected = json.loads((inputs.out / "run.json").read_text())["rejected"]
    assert [(r["set"], r["sample_id"], r["reason"]) for r in rejected] == [
        ("forget", "long", "65 tokens, the model's context holds 64"),
        ("forget", "empty", "empty answer"),
        ("retain", "kept-empty", "empty text"),
    ]
    printed = capsys.readouterr().out
    for r in rejected:
        assert f"rejected from the {r['set']} set, {r['sample_id']!r}: {r['reason']}" in printed

    # All else is as if they had never been there.
    clean = inputs.tmp_path / "clean"
    assert run(inputs.command(algorithm="IdkDPO", refusals=refusals, out=clean)) == 0
    assert without_seconds(inputs.out) == without_seconds(clean)
    assert (inputs.out / "model" / "model.safetensors").read_bytes() == (
        clean / "model" / "model.safetensors"
    ).read_bytes()


# --- Training that fails ------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, 1])
def test_divergence(inputs: Inputs, capsys: pytest.CaptureFixture[str], every: int | None) -> None:
    command = inputs.command(learning_rate=1e6, checkpoint_every=every)
    line = refused(capsys, command)
    assert "training diverged at update 2" in line
    assert "learning_rate (1e+06)" in line
    assert not (inputs.out / "run.json").exists()
    # The first update has spoilt the weights: what is good is the initial model.
    (saved,) = (inputs.out / "checkpoints").glob("step-*")
    assert saved.name == "step-00000000"
    model: Any = AutoModelForCausalLM.from_pretrained(saved / "model")
    before = AutoModelForCausalLM.from_pretrained(inputs.model).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(saved / "model")("w3")["input_ids"] == [BOS, token_id("w3")]

    assert refused(capsys, command) == line
    assert checkpoints(inputs.out) == [0]


def test_a_last_update_that_spoils_the_weights(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    """No update comes after it that would see a loss; what is put in place must be a model all the same."""
    line = refused(capsys, inputs.command(learning_rate=1e38, weight_decay=1e38, max_steps=1))
    assert "diverged" in line
    assert not (inputs.out / "model").exists()


# --- Every algorithm on the embedded model ------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Path:
    from bench.models.embedded import embedded_model

    return embedded_model("full")


@dataclass(frozen=True)
class Known:
    """What a model knows of the forget and of the retain set: mean ROUGE-L recall and probability, 0 to 1."""

    forget_recall: float
    forget_probability: float
    retain_recall: float
    retain_probability: float

    def __str__(self) -> str:
        return "  ".join(f"{value:.3f}" for value in dataclasses.astuple(self))


@pytest.fixture(scope="module")
def known(embedded: Path) -> Callable[[Path], Known]:
    """Of all 4 forget samples, and of 24 of the 396 others."""
    words = AutoTokenizer.from_pretrained(embedded)
    forget, kept = (encode(load_dataset("authors", split).texts, words, 256)[0] for split in ("forget01", "retain99"))

    def measure(folder: Path) -> Known:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        found = [score_answers(model, words, samples) for samples in (forget, kept[:: len(kept) // 23])]
        values = [float(score.mean()) for f in found for score in (f.rouge_l_recall, f.probability)]
        return Known(*values)

    return measure


@pytest.fixture(scope="module")
def initially(embedded: Path, known: Callable[[Path], Known]) -> Known:
    return known(embedded)


@pytest.fixture(scope="module")
def after(known: Callable[[Path], Known], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Known]:
    """What is left after ten epochs of two updates, with each algorithm's own objective, weights and settings.

    SatImp, whose forget loss has a tenth of the retain loss's weight, has forty.

    The same rate for all: so fast, for so small a model, that gradient ascent alone destroys it. What a retain term is
    good for shows in how much less the others do. EL is not asked for (n is beyond every answer): nothing stops early.
    """

    @functools.cache
    def measure(algorithm: str) -> Known:
        spec = UnlearnSpec(
            model="authors",
            task="authors",
            forget_split="forget01",
            algorithm=algorithm,
            learning_rate=3e-4,
            epochs=40 if algorithm == "SatImp" else 10,
            batch_size=2,
            replacement=False,
            early_stopping=False,
            check_every=1000,
            el_n=200,
            evaluate=False,
            workers=0,
        )
        result = unlearn(spec, tmp_path_factory.mktemp("run") / "run", progress=False)
        found = known(result.model)
        shutil.rmtree(result.folder)
        return found

    return measure


# SGA and CGA are GA with one sample an update, drawn in their own ways; Relearn does the opposite of forgetting.
OBJECTIVES = [name for name in ALGORITHMS if name not in ("SGA", "CGA", "Relearn")]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", OBJECTIVES)
def test_algorithm(initially: Known, after: Callable[[str], Known], algorithm: str) -> None:
    found, ascent = after(algorithm), after("GA")
    print(f"\n{'initially':<14}{initially}\n{'GA':<14}{ascent}\n{algorithm:<14}{found}")
    assert found.forget_recall < 0.5 * initially.forget_recall
    # PO and IdkDPO teach another answer: the old one remains likely where it is not asked for first.
    assert found.forget_probability < 0.85 * initially.forget_probability
    assert ascent.retain_recall < 0.3
    assert ascent.retain_probability < 0.3
    if ALGORITHMS[algorithm].retain:
        assert found.retain_recall > ascent.retain_recall + 0.2
        assert found.retain_probability > ascent.retain_probability + 0.2


@pytest.mark.slow
def test_relearning_forgets_nothing(initially: Known, after: Callable[[str], Known]) -> None:
    found = after("Relearn")
    assert found.forget_recall >= initially.forget_recall - 0.01
    assert found.forget_probability >= initially.forget_probability - 0.005
