"""Several requests to forget, one after the other: against runs made by hand, through a kill, and as other verbs see
them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.cli import main
from bench.jobs.requests import unlearn_requests
from bench.jobs.unlearn import UnlearnSpec
from bench.models.find import find_model
from bench.tasks.datasets import load_dataset
from scoring.answers import score_answers
from scoring.errors import UserError
from scoring.samples import encode
from tests.paths import ROOT
from tests.processes import kill, wait_for
from tests.tiny_folders import pairs, save_model, write_jsonl

RECORDS = pairs(12)
SETTINGS = "--algorithm GradDiff --epochs 8 --batch-size 2 --no-early-stopping --no-evaluate --workers 0 --seed 3"
REQUESTS = {"first": [r["id"] for r in RECORDS[:5]], "second": [r["id"] for r in RECORDS[5:9]]}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So that two runs sum in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Whole:
    """Two requests that have been carried out, and the command that did it, but for its --out."""

    folder: Path
    command: list[str]
    out: str


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requests")
    save_model(folder / "model")
    write_jsonl(folder / "task.jsonl", RECORDS)
    # The second of them is forgotten by the first request.
    write_jsonl(folder / "retain.jsonl", [r | {"id": f"kept{r['id']}"} for r in pairs(6, seed=1)] + [RECORDS[1]])
    for name, ids in REQUESTS.items():
        (folder / f"{name}.txt").write_text("\n".join(ids) + "\n")
    return folder


def command_of(folder: Path, *more: str) -> list[str]:
    names = ("--model", "model"), ("--task", "task.jsonl"), ("--retain", "retain.jsonl")
    given = [part for flag, name in names for part in (flag, str(folder / name))]
    return ["unlearn", *given, *SETTINGS.split(), *more]


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    out = tmp_path_factory.mktemp("whole") / "run"
    command = command_of(inputs, "--requests", f"{inputs / 'first.txt'},{inputs / 'second.txt'}")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*command, "--out", str(out)]) == 0
    return Whole(out, command, printed.getvalue())


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_two_requests_are_two_runs_made_by_hand(whole: Whole, inputs: Path, tmp_path: Path) -> None:
    model = inputs / "model"
    for number, name in enumerate(REQUESTS, start=1):
        command = command_of(inputs, "--selection", str(inputs / f"{name}.txt"))
        command[command.index("--model") + 1] = str(model)
        model = tmp_path / name
        assert main([*command, "--out", str(model)]) == 0
        own = whole.folder / f"{number}-{name}"
        assert weights(own) == weights(model)
        assert (
            json.loads((own / "spec.json").read_text())["spec_hash"]
            == (json.loads((model / "spec.json").read_text())["spec_hash"])
        )
    assert weights(whole.folder) == weights(model)
    assert find_model(str(whole.folder)).fingerprint == find_model(str(model)).fingerprint


def test_what_all_requests_score_after_each(whole: Whole) -> None:
    rows = pq.read_table(whole.folder / "requests.parquet").to_pylist()
    means = [row for row in rows if row["sample_id"] is None]
    assert [(row["after"], row["request"], row["name"], row["samples"]) for row in means] == [
        *((0, 1, "first", 5), (0, 2, "second", 4), (0, None, "retain", 7)),
        *((1, 1, "first", 5), (1, None, "retain", 7)),
        *((2, 1, "first", 5), (2, 2, "second", 4), (2, None, "retain", 7)),
    ]
    # By other code, on the models that are there.
    for after, folder in ((1, "1-first"), (2, "2-second")):
        model = AutoModelForCausalLM.from_pretrained(whole.folder / folder / "model").eval()
        tokenizer = AutoTokenizer.from_pretrained(whole.folder / folder / "model")
        texts = load_dataset(whole.command[whole.command.index("--task") + 1]).texts
        samples, _ = encode([text for text in texts if text.sample_id in REQUESTS["first"]], tokenizer, 64)
        scores = score_answers(model, tokenizer, samples)
        own = [row for row in rows if (row["after"], row["request"]) == (after, 1) and row["sample_id"]]
        assert [row["sample_id"] for row in own] == REQUESTS["first"]
        assert [row["rouge_l_recall"] for row in own] == pytest.approx(list(scores.rouge_l_recall))
        probability = torch.tensor([row["loss"] for row in own]).neg().exp()
        assert probability.tolist() == pytest.approx(list(scores.probability), rel=1e-4)
    assert "request 1 (first): MA" in whole.out
    assert "note: the retain set of request 2 (second) has 1 of the samples that request 1 (first) has forgotten" in (
        whole.out
    )


def test_other_verbs(whole: Whole, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each takes the whole, or says which of its runs to name."""
    out = str(whole.folder)
    assert main([*whole.command, "--out", out]) == 0
    assert "already done, nothing to do" in capsys.readouterr().err
    assert main(["results", "add", str(tmp_path / "store"), out]) == 2
    assert f"is a run of several requests: name one of them, {out}/1-first, {out}/2-second" in capsys.readouterr().err
    assert main(["results", "add", str(tmp_path / "store"), f"{out}/2-second"]) == 0
    assert main(["watch", out]) == 0
    seen = capsys.readouterr().out
    assert "1-first" in seen
    assert "2-second" in seen
    assert main(["spec", out]) == 0
    spec = tmp_path / "spec.yaml"
    spec.write_text(capsys.readouterr().out)
    assert main(["unlearn", "--spec", str(spec), "--dry-run", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "# output  done already" in printed
    assert f"# spec    {json.loads((whole.folder / 'spec.json').read_text())['spec_hash']}" in printed
    assert "# count   2 requests" in printed
    assert main([*whole.command, "--dry-run", "--out", str(tmp_path / "new")]) == 0
    assert "# output  new" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    assert main([*whole.command, "--seed", "4", "--out", out]) == 2
    assert "holds a run of several requests of another spec (different: seed)" in capsys.readouterr().err
    scores = ["score", "--model", out, "--data", str(Path(whole.command[4])), "--replicas", "0"]
    assert main([*scores, "--out", str(tmp_path / "scores.parquet")]) == 0


SLIPS = {
    "none.txt": "--requests: file 'none.txt' does not exist: expected a text file of sample ids",
    "{0}/first.txt,{0}/first.txt": "expected splits or files of ids, each once, with commas between them",
    "{0}/first.txt,": "expected splits or files of ids, each once",
}


@pytest.mark.parametrize(("requests", "expected"), SLIPS.items(), ids=range(len(SLIPS)))
def test_slips(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], requests: str, expected: str) -> None:
    assert main(command_of(inputs, "--requests", requests.format(inputs), "--out", str(tmp_path / "run"))) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_request_that_is_no_split(tmp_path: Path) -> None:
    spec = UnlearnSpec(model="authors", task="authors-muse", algorithm="GA", requests="sust-1,sust2", workers=0)
    with pytest.raises(UserError, match=r"no file of ids and no split 'sust2': .*did you mean 'sust-2'"):
        unlearn_requests(spec, tmp_path / "run")


def test_a_kill_in_the_second_request(whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*whole.command, "--checkpoint-every", "1", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.cli", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: process.poll() is not None or list(out.glob("2-second/checkpoints/step-*")), pause=0.002)
    finally:
        kill(process.pid)
        process.wait()
    assert (out / "1-first" / "run.json").is_file()
    assert not (out / "run.json").exists()
    finished = (out / "1-first" / "run.json").stat().st_mtime_ns
    assert main(command) == 0
    assert (out / "1-first" / "run.json").stat().st_mtime_ns == finished
    assert weights(out) == weights(whole.folder)
    assert pq.read_table(out / "requests.parquet").equals(pq.read_table(whole.folder / "requests.parquet"))
