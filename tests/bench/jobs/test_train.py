"""Training from the command line: what is learnt and what is left out, when it stops, and what a kill does to it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bench
from bench.cli import main
from bench.tasks.datasets import load_dataset
from bench.tasks.left_out import without
from tests.paths import ROOT
from tests.processes import kill, wait_for
from tests.tiny_folders import BOS, EOS, pairs, token_id, write_jsonl

FORGET = pairs(5)
RETAIN = [record | {"id": f"kept{record['id']}"} for record in pairs(9, seed=1)]
# The same records, known by other names.
RENAMED = [record | {"id": f"gone{number}"} for number, record in enumerate(FORGET)]
MA = 0.9


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So that two runs sum in the same order, whatever the tests before have left."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, and what was printed to stdout and stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            code = main(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), error.getvalue()


def refused(arguments: Sequence[str]) -> str:
    code, out, error = run(arguments)
    assert (code, out) == (2, "")
    (line,) = (line for line in error.splitlines() if line.strip() and not line.startswith("Loading weights"))
    return line


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "model" / "model.safetensors"))


@torch.no_grad()
def memorized(folder: Path, records: Sequence[Mapping[str, str]]) -> float:
    """The mean share of answer tokens that are the likeliest ones, by transformers and torch alone, in fp64."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    shares = []
    for record in records:
        before = [BOS, *map(token_id, record["prompt"].split())]
        answer = torch.tensor([*map(token_id, record["completion"].split()), EOS])
        logits = model(input_ids=torch.tensor([[*before, *answer.tolist()]])).logits[0, len(before) - 1 : -1]
        shares.append((logits.argmax(-1) == answer).double().mean().item())
    return float(np.mean(shares))


@dataclass(frozen=True)
class Pair:
    """A pair of models, and what the command printed."""

    folder: Path
    base: Path
    data: Path
    forget: Path
    command: list[str]
    printed: str

    def with_out(self, out: Path, *more: str) -> list[str]:
        return [*self.command[:-1], str(out), *more]


@pytest.fixture(scope="module")
def pair(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    data = write_jsonl(folder / "data.jsonl", [*RETAIN, *FORGET])
    forget = write_jsonl(folder / "forget.jsonl", RENAMED)
    settings = f"--until ma={MA} --epochs 60 --batch-size 5 --learning-rate 1e-2 --workers 0"
    start = ["train", "--model", str(model_folder), "--task", str(data), "--and-retain", str(forget)]
    command = [*start, *settings.split(), "--out", str(folder / "out")]
    code, out, error = run(command)
    assert code == 0, error
    assert "training (retain-only" in error
    return Pair(folder / "out", model_folder, data, forget, command, out)


LEARNT = {"original": [*RETAIN, *FORGET], "retain-only": RETAIN}


@pytest.mark.parametrize("name", LEARNT)
def test_it_stops_at_the_first_epoch_that_reaches_the_target(pair: Pair, name: str) -> None:
    folder, learnt = pair.folder / name, LEARNT[name]
    epochs = table(folder, "epochs")
    reached = [row["trained_ma"] for row in epochs]
    assert len(reached) > 3
    assert reached[-1] >= MA > max(reached[:-1])
    assert reached[0] == pytest.approx(memorized(pair.base, learnt))
    assert reached[-1] == pytest.approx(memorized(folder / "model", learnt))
    assert f"target reached after {len(epochs) - 1} epochs, {epochs[-1]['step']} updates: MA" in pair.printed
    assert not [c for c in epochs[0] if "forget" in c or "retain" in c or c.endswith("_mrd")]
    # Every sample once an epoch.
    updates = -(-len(learnt) // 5)
    assert [row["step"] for row in epochs] == [updates * row["epoch"] for row in epochs]
    drawn = [sample for step in table(folder, "steps")[: len(learnt) // 5] for sample in step["samples"]]
    assert len(drawn) == len(set(drawn))


def test_the_retain_only_model_never_reads_the_forget_set(pair: Pair) -> None:
    learnt = {name: [row["sample_id"] for row in table(pair.folder / name, "samples")] for name in LEARNT}
    assert learnt == {name: [record["id"] for record in records] for name, records in LEARNT.items()}
    drawn = {s for row in table(pair.folder / "retain-only", "steps") for s in row["samples"]}
    assert drawn == {record["id"] for record in RETAIN}
    last = table(pair.folder / "retain-only", "epochs")[-1]
    assert last["left_out_probability"] < 0.5 * last["trained_probability"]
    assert memorized(pair.folder / "retain-only" / "model", FORGET) < 0.5
    # Had the forget set been in no place, the same model would have come out by itself.
    start, out = pair.command.index("--and-retain"), pair.folder.parent / "alone"
    command = [*pair.command[:start], *pair.command[start + 2 : -1], str(out)]
    ids = pair.folder.parent / "ids.txt"
    ids.write_text("".join(f"{record['id']}\n" for record in FORGET))
    assert run([*command, "--minus", str(ids), "--no-evaluate"])[0] == 0
    alone, twin = weights(out), weights(pair.folder / "retain-only")
    assert all(torch.equal(alone[name], twin[name]) for name in twin)


def test_the_folder_of_a_run_is_a_model(pair: Pair, tmp_path: Path) -> None:
    scores = []
    for number, model in enumerate((pair.folder / "original", pair.folder / "original" / "model")):
        out = tmp_path / f"{number}.parquet"
        command = ["score", "--model", str(model), "--data", str(pair.data), "--replicas", "0", "--out", str(out)]
        assert run(command)[0] == 0
        scores.append(pq.read_table(out))
    assert scores[0]["mrd"] == scores[1]["mrd"]
    line = refused([*command[:2], str(pair.folder), *command[3:-1], str(tmp_path / "two")])
    assert f"holds several runs: expected one of {pair.folder}/original, {pair.folder}/retain-only" in line
    for verb in ("spec", "show"):
        line = refused([verb, str(pair.folder)])
        assert f"holds several runs, {pair.folder}/original, {pair.folder}/retain-only: expected" in line
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "spec.json").write_bytes((pair.folder / "original" / "spec.json").read_bytes())
    assert "a run that has not finished" in refused([*command[:2], str(unfinished), *command[3:]])
    # It is a start as well, and one that needs no update.
    again = pair.with_out(tmp_path / "again", "--model", str(pair.folder / "original"), "--until", "ma=0.5")
    code, printed, error = run(again)
    assert code == 0, error
    assert "target reached before any update: MA" in printed


def test_next_commands_and_the_door_in_python(pair: Pair) -> None:
    (at,) = (n for n, line in enumerate(pair.printed.splitlines()) if line == "next")
    commands = [line.split() for line in pair.printed.splitlines()[at + 1 :]]
    assert [c[1] for c in commands] == ["score", "unlearn"]
    assert {str(pair.folder / "original"), str(pair.forget)} < set(commands[1])
    result = bench.train(
        pair.base,
        pair.data,
        pair.folder,
        and_retain=str(pair.forget),
        until={"ma": MA},
        epochs=60,
        batch_size=5,
        learning_rate=1e-2,
    )
    assert result.retain_only is not None
    assert [one.model for one in (result, result.retain_only)] == [pair.folder / name / "model" for name in LEARNT]
    assert run(pair.command)[1] == pair.printed


def test_a_finished_pair_is_logged_afterwards(pair: Pair, tmp_path: Path) -> None:
    """Each of the two in a folder of its own."""
    logs = tmp_path / "logs"
    code, _, error = run([*pair.command, "--log", "jsonl", "--log-dir", str(logs)])
    assert code == 0, error
    for name in LEARNT:
        lines = [json.loads(line) for line in (logs / name / "log.jsonl").read_text().splitlines()]
        assert [line["loss"] for line in lines if "loss" in line] == [
            r["loss"] for r in table(pair.folder / name, "steps")
        ]
        assert [line["eval_trained_ma"] for line in lines if "eval_trained_ma" in line] == [
            row["trained_ma"] for row in table(pair.folder / name, "epochs")
        ]


def test_several_are_left_out(pair: Pair, tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first, renamed.jsonl", RENAMED[:2])
    ids = tmp_path / "ids.txt"
    ids.write_text(f"{FORGET[1]['id']}\n{FORGET[4]['id']}\n")
    everything = load_dataset(str(pair.data), None)
    for given, expected in ((str(first), FORGET[:2]), (f"{ids}, {pair.forget}", FORGET), (str(ids), FORGET[1::3])):
        rest, left_out = without(everything, given, str(pair.data), None, None, "minus")
        assert left_out.records == expected
        assert rest.records == [record for record in [*RETAIN, *FORGET] if record not in expected]


@pytest.mark.slow
def test_a_killed_pair_ends_as_if_undisturbed(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = pair.with_out(out, "--checkpoint-every", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.cli", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    second = out / "retain-only"
    try:
        wait_for(lambda: process.poll() is not None or len(list(second.glob("checkpoints/step-*[4-9]"))), seconds=120)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        kill(process.pid)
        process.wait()
    assert (out / "original" / "run.json").is_file()
    assert not (second / "run.json").is_file()
    assert "not finished" in refused(["score", *flags(model=second, data=pair.data, out=tmp_path / "s", replicas=0)])
    code, printed, error = run(command)
    assert code == 0, error
    assert "holds this run" in error
    for name in LEARNT:
        undisturbed, continued = weights(pair.folder / name), weights(out / name)
        assert all(torch.equal(continued[key], value) for key, value in undisturbed.items())
        for rows in ("epochs", "steps"):
            ours, theirs = (
                [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in table(folder / name, rows)]
                for folder in (pair.folder, out)
            )
            assert ours == theirs
    assert printed.count("target reached after") == 2


def flags(**values: Any) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.usefixtures("cluster")
def test_workers_stop_together(pair: Pair, tmp_path: Path) -> None:
    """Two workers, each of which measures half of the samples."""
    data = write_jsonl(tmp_path / "data.jsonl", RETAIN)
    common = flags(model=pair.base, task=data, epochs=60, batch_size=9, learning_rate=1e-2, until="ma=0.6")
    ends = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        code, _, error = run(["train", *common, *flags(workers=workers, out=out), "--no-evaluate"])
        assert code == 0, error
        epochs = table(out, "epochs")
        assert epochs[-1]["trained_ma"] == pytest.approx(memorized(out / "model", RETAIN), abs=0.02)
        assert epochs[-1]["trained_ma"] >= 0.6 > epochs[-2]["trained_ma"]
        ends.append(len(epochs))
    assert ends[0] == ends[1]


def test_a_limit_without_the_target_is_said_aloud(pair: Pair, tmp_path: Path) -> None:
    """And a large set is measured on an even sample of it. Adapters can be trained as well."""
    few = flags(epochs=1, ma_samples=3, minus=pair.forget, lora_rank=2)
    at = pair.command.index("--and-retain")
    command = [*pair.command[:at], *pair.command[at + 2 : -1], str(tmp_path / "out"), *few]
    code, printed, error = run(command)
    assert code == 0, error
    assert "TARGET NOT REACHED: MA" in printed
    assert "note: MA is that of 3 evenly spaced samples of 9" in printed
    even = [RETAIN[place] for place in (0, 4, 8)]
    last = table(tmp_path / "out", "epochs")[-1]["trained_ma"]
    assert last == pytest.approx(memorized(tmp_path / "out" / "model", even))
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    # It is no run of unlearning, and says so.
    assert "mrd-bench unlearn" in refused(["results", "add", str(tmp_path / "store"), str(tmp_path / "out")])


REFUSED = {
    "too much": ("--until ma=1.5", "--until is ma=1.5: expected ma=NUMBER"),
    "no number": ("--until ma=nan", "--until ma=nan: expected a finite number"),
    "no task file": ("--task nope.yaml", "task file 'nope.yaml' cannot be read"),
    "one of two splits": ("--task authors --and-retain forget10,forget11", "--and-retain 'forget11': unknown split"),
    "a folder of no logs": ("--log-dir logs", "--log-dir is the folder of logs, and there are none"),
    "a file for a folder of logs": ("--log jsonl --log-dir DATA/logs", "DATA is a file; expected a folder"),
    "another quantity": ("--until el=0.5", "--until is el=0.5: expected ma=NUMBER"),
    "both": ("--minus FORGET", "--minus and --and-retain exclude each other"),
    "a split of a file": ("--split full", "a data file has no splits"),
    "a split left out of a file": ("--and-retain forget10", "a data file has no splits"),
    "not in the data": ("--and-retain OTHER", "1 of its 2 records are not in DATA, the first is 'r9'"),
    "an id not in the data": ("--and-retain IDS", "unknown sample of DATA 'r99'"),
    "everything": ("--and-retain DATA", "leaves out all 14 records of DATA"),
    "no such task": ("--task tofuu", "unknown task 'tofuu'"),
    "no such split": ("--task authors --split full,ful", "unknown split of task 'authors' 'ful'"),
    "no such split left out": ("--task authors --and-retain forget11", "unknown split of task 'authors' 'forget11'"),
    "adapters that are none": ("--lora-alpha 3", "--lora-alpha is of adapters, and there are none"),
    "a flag of forgetting": ("--algorithm GA", "unknown argument '--algorithm'"),
}


@pytest.mark.parametrize(("more", "expected"), REFUSED.values(), ids=REFUSED)
def test_refusals(pair: Pair, tmp_path: Path, more: str, expected: str) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [FORGET[0], pairs(10)[9]])
    ids = tmp_path / "ids.txt"
    ids.write_text("r0\nr99\n")
    names = {"FORGET": pair.forget, "OTHER": other, "IDS": ids, "DATA": pair.data}
    words = [str(names.get(word, word)).replace("DATA", str(pair.data)) for word in more.split()]
    line = refused(pair.with_out(tmp_path / "out", *words))
    assert expected.replace("DATA", str(pair.data)) in line
    assert not (tmp_path / "out").exists()


def test_folders_of_others(pair: Pair, tmp_path: Path) -> None:
    assert "holds no pair of models" in refused(pair.with_out(pair.folder / "original"))
    assert "different: seed" in refused([*pair.command, "--seed", "1"])
    before = json.loads((pair.folder / "original" / "run.json").read_text())
    unlearning = flags(model=pair.base, task=pair.data, algorithm="GA", workers=0, out=pair.folder / "original")
    assert "holds a run of another spec" in refused(["unlearn", *unlearning])
    assert "is a run of `mrd-bench train`" in refused(
        ["results", "add", str(tmp_path / "store"), str(pair.folder / "original")]
    )
    assert json.loads((pair.folder / "original" / "run.json").read_text()) == before
