"""What the command line says to bad input: one line on stderr that names the fault, exit code 2, no file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bench.cli import main
from tests.paths import ROOT
from tests.processes import descendants
from tests.tiny_folders import BOS, pairs, token_id, tokenizer, write_jsonl


def run(arguments: list[str]) -> int:
    """The exit code, also where argparse ends the process."""
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The error line of a command that must be refused."""
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    # What a progress bar drew before the error is no line of its own.
    lines = [line for line in printed.err.splitlines() if line.strip() and not line.startswith("scoring (")]
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("mrd-bench")
    return lines[0]


class Inputs:
    """A sound command and the folder in which a test spoils it."""

    def __init__(self, tmp_path: Path, model: Path, data: Path) -> None:
        self.tmp_path, self.model, self.data, self.out = tmp_path, model, data, tmp_path / "scores.parquet"

    def command(self, *more: str, **paths: Path | str) -> list[str]:
        chosen = {"model": self.model, "data": self.data, "out": self.out} | paths
        named = [part for key, value in chosen.items() for part in (f"--{key}", str(value))]
        return ["score", *named, *more]

    def copy_of_model(self) -> Path:
        return Path(shutil.copytree(self.model, self.tmp_path / "copy"))

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


@pytest.fixture
def inputs(tmp_path: Path, model_folder: Path, data_file: Path) -> Inputs:
    return Inputs(tmp_path, model_folder, data_file)


FLAGS = {
    "sigma of zero": ("--sigma 0", "--sigma is 0: expected a number greater than 0"),
    "negative sigma": ("--sigma -0.5", "--sigma is -0.5: expected a number greater than 0"),
    "sigma is nan": ("--sigma nan", "--sigma is nan: expected a finite number greater than 0"),
    "sigma is infinite": ("--sigma inf", "--sigma is inf: expected a finite number greater than 0"),
    "sigma is a word": ("--sigma small", "--sigma is 'small': expected a number greater than 0"),
    "one draw": (
        "--estimator monte-carlo --draws 1",
        "--draws is 1: expected a whole number of at least 2, so that a standard error exists, or auto",
    ),
    "negative draws": ("--draws -5", "--draws is -5: expected a whole number of at least 0, or auto"),
    "draws is a word": ("--draws many", "--draws is 'many': expected a whole number of at least 0, or auto"),
    "draws is a fraction": ("--draws 2.5", "--draws is 2.5: expected a whole number of at least 0, or auto"),
    "unknown estimator": ("--estimator montecarlo", "--estimator is 'montecarlo'.*did you mean 'monte-carlo'"),
    "unknown statistic": ("--statistic mean-abs", "--statistic is 'mean-abs'.*did you mean 'mean_abs'"),
    "estimator of the other statistic": (
        "--estimator gradient --statistic abs_mean",
        "--estimator gradient does not estimate abs_mean.*use monte-carlo or antithetic or curvature",
    ),
    "unknown dtype": ("--dtype bfloat", "--dtype is 'bfloat'.*did you mean 'bfloat16'"),
    "unknown choice of tokens": ("--tokens answers", "--tokens is 'answers'.*did you mean 'answer'"),
    "tolerance of zero": (
        "--draws auto --tolerance 0",
        "--tolerance is 0: expected a number greater than 0 and below 1",
    ),
    "tolerance is nan": (
        "--draws auto --tolerance nan",
        "--tolerance is nan: expected a finite number greater than 0 and below 1",
    ),
    "no batch tokens": ("--batch-tokens 0", "--batch-tokens is 0: expected a whole number of at least 1, or auto"),
    "no replicas of an engine that needs some": (
        "--engine vllm --replicas 0",
        "--replicas is 0: .* a process of its own; expected at least 1, or --engine transformers",
    ),
    "negative replicas": ("--replicas -2", "--replicas is -2: expected a whole number of at least 0"),
    "no cores": ("--cpus-per-replica 0", "--cpus-per-replica is 0: expected a whole number of at least 1"),
    "negative cores": ("--cpus-per-replica -1", "--cpus-per-replica is -1: expected a whole number of at least 1"),
    "negative GPUs": (
        "--gpus-per-replica -1",
        "--gpus-per-replica is -1: expected a fraction of one GPU, or a whole number",
    ),
    "one and a half GPUs": (
        "--gpus-per-replica 1.5",
        "--gpus-per-replica is 1.5: expected a fraction of one GPU, or a whole number",
    ),
    "GPUs are nan": (
        "--gpus-per-replica nan",
        "--gpus-per-replica is nan: expected a fraction of one GPU, or a whole number",
    ),
    "split of a file": ("--split forget10", "split forget10: a data file has no splits"),
    "unknown flag": ("--sigm 1e-5", "unknown argument '--sigm'; did you mean --sigma"),
    "unknown flag with a value": ("--estimater=gradient", "unknown argument '--estimater=gradient'.*--estimator"),
}


@pytest.mark.parametrize(("flags", "expected"), FLAGS.values(), ids=FLAGS)
def test_flag(inputs: Inputs, capsys: pytest.CaptureFixture[str], flags: str, expected: str) -> None:
    assert_matches(expected, refused(capsys, inputs.command(*flags.split())))
    assert list(inputs.tmp_path.iterdir()) == []


def assert_matches(expected: str, line: str) -> None:
    assert re.search(expected, line), line


def test_verb(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, ["scor"])
    assert "unknown verb 'scor'" in line
    assert "did you mean 'score'?" in line


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model", "command line: missing model: expected in a spec file, or as --model"),
        ("data", "command line: missing data: expected in a spec file, or as --data"),
        ("out", "the following arguments are required: --out"),
    ],
)
def test_required_flag(inputs: Inputs, capsys: pytest.CaptureFixture[str], missing: str, message: str) -> None:
    command = inputs.command()
    at = command.index(f"--{missing}")
    line = refused(capsys, command[:at] + command[at + 2 :])
    assert message in line


def test_split_and_task(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, inputs.command("--split", "forget11", data="authors"))
    assert "unknown" in line
    assert "forget11" in line
    assert "did you mean 'forget10'?" in line
    line = refused(capsys, inputs.command(data="author"))
    assert "unknown task 'author'" in line
    assert "did you mean 'authors'?" in line


def _without(name: str) -> Callable[[Inputs], Path]:
    def spoil(inputs: Inputs) -> Path:
        folder = inputs.copy_of_model()
        for path in folder.glob(name):
            path.unlink()
        return folder

    return spoil


def _pickled(inputs: Inputs) -> Path:
    folder = _without("*.safetensors")(inputs)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return folder


def _with(name: str, content: bytes) -> Callable[[Inputs], Path]:
    def spoil(inputs: Inputs) -> Path:
        folder = inputs.copy_of_model()
        (folder / name).write_bytes(content)
        return folder

    return spoil


def _cut_weights(inputs: Inputs) -> Path:
    folder = inputs.copy_of_model()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


def _more_words(inputs: Inputs) -> Path:
    folder = inputs.copy_of_model()
    tokenizer(extra=["beyond"]).save_pretrained(folder)
    inputs.data = write_jsonl(inputs.tmp_path / "beyond.jsonl", [{"prompt": "w1", "completion": "w2 beyond"}])
    return folder


def _nan_weight(inputs: Inputs) -> Path:
    folder = inputs.copy_of_model()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


MODELS: dict[str, tuple[Callable[[Inputs], Path], str]] = {
    "folder missing": (lambda i: i.tmp_path / "nowhere", "nowhere' does not exist: expected a folder with config.json"),
    "a file": (lambda i: i.data, "does not exist: expected a folder"),
    "no config": (_without("config.json"), "has no config.json: expected a saved transformers model"),
    "no weights": (_without("*.safetensors"), r"has no \*.safetensors"),
    "no tokenizer": (_without("tokenizer*"), r"has no tokenizer.*tokenizer.save_pretrained\(folder\)"),
    "pickles only": (_pickled, r"pickled weights only \(pytorch_model.bin\).*which writes safetensors"),
    "config is not JSON": (_with("config.json", b"{broken"), "configuration cannot be loaded"),
    "config is a list": (_with("config.json", b"[]"), "configuration cannot be loaded"),
    "config names no architecture": (_with("config.json", b"{}"), "configuration cannot be loaded"),
    "tokenizer is not JSON": (_with("tokenizer.json", b"{broken"), "tokenizer cannot be loaded"),
    "tokenizer has more words": (_more_words, "vocabulary mismatch: .* gives token id 97, the model embeds 97"),
}


@pytest.mark.parametrize(("spoil", "expected"), MODELS.values(), ids=MODELS)
def test_model(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], spoil: Callable[[Inputs], Path], expected: str
) -> None:
    assert_matches(expected, refused(capsys, inputs.command(model=spoil(inputs))))
    assert not inputs.out.exists()


# Seen by the replica, which reads the weights.
# How to spoil them, the replicas that meet them, the message.
WEIGHTS: dict[str, tuple[Callable[[Inputs], Path], str, str]] = {
    "cut off": (_cut_weights, "1", "cannot be loaded as a causal language model"),
    "not finite": (_nan_weight, "0", "weight 'model.norm.weight' holds NaN or infinity"),
}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("spoil", "replicas", "expected"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], spoil: Callable[[Inputs], Path], replicas: str, expected: str
) -> None:
    folder = spoil(inputs)
    assert_matches(expected, refused(capsys, inputs.command("--replicas", replicas, model=folder)))
    assert list(inputs.tmp_path.iterdir()) == [folder]


def _line(second: str) -> Callable[[Inputs], Path]:
    return lambda i: i.file("d.jsonl", json.dumps({"prompt": "w1", "completion": "w2"}) + "\n" + second + "\n")


DATA: dict[str, tuple[Callable[[Inputs], Path | str], str]] = {
    "missing": (lambda i: i.tmp_path / "d.jsonl", "d.jsonl' does not exist: expected a JSON Lines or Parquet file"),
    "a folder": (lambda i: i.model, "is a folder: expected a JSON Lines or Parquet file"),
    "empty": (lambda i: i.file("d.jsonl", ""), "the data file is empty; expected at least one record"),
    "blank lines only": (lambda i: i.file("d.jsonl", "\n \n"), "the data file is empty"),
    "not JSON": (_line("{prompt: w1}"), r"d.jsonl, line 2: not JSON \(.*at column 2\); expected one object a line"),
    "a list": (_line('["w1", "w2"]'), "line 2: a JSON list; expected one object a line"),
    "not UTF-8": (lambda i: i.file("d.jsonl", b'{"text": "\xff"}\n'), "not UTF-8 text at byte 10"),
    "half a surrogate": (_line('{"text": "\\ud800"}'), "line 2: half of a surrogate pair"),
    "wrong fields": (_line('{"prompt": "w1", "reply": "w2"}'), "record 2: fields 'prompt', 'reply'; expected 'prompt'"),
    "no fields": (_line("{}"), "record 2: fields none; expected 'prompt'"),
    "a number as text": (_line('{"prompt": "w1", "completion": 3}'), "record 2: field 'completion' is int, expected"),
    "no text": (_line('{"text": null}'), "record 2: field 'text' is NoneType, expected text"),
    "messages are text": (_line('{"messages": "hello"}'), "record 2: 'messages' must be a list of"),
    "messages end with the user": (
        _line('{"messages": [{"role": "user", "content": "w1"}]}'),
        "record 2: 'messages' must be .* ends with an assistant turn",
    ),
    "no chat template": (
        lambda i: i.file("d.jsonl", '{"messages": [{"role": "assistant", "content": "w1"}]}\n'),
        "needs a chat template and this tokenizer has none",
    ),
    "id twice": (
        lambda i: i.file("d.jsonl", '{"id": "a", "text": "w1 w2"}\n{"id": "a", "text": "w3 w4"}\n'),
        "record 2: id 'a' occurs twice",
    ),
    "not Parquet": (lambda i: i.file("d.parquet", "no Parquet"), "not a readable Parquet file"),
    "an empty Parquet file": (lambda i: i.file("d.parquet", ""), "not a readable Parquet file"),
    "nothing can be scored": (
        lambda i: i.file("d.jsonl", '{"id": "a", "prompt": "w1", "completion": ""}\n{"text": ""}\n'),
        "none of 2 samples can be scored; the first, 'a': empty answer",
    ),
}


@pytest.mark.parametrize(("spoil", "expected"), DATA.values(), ids=DATA)
def test_data(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], spoil: Callable[[Inputs], Path | str], expected: str
) -> None:
    assert_matches(expected, refused(capsys, inputs.command(data=spoil(inputs))))
    assert not inputs.out.exists()


def _file(inputs: Inputs) -> Path:
    return inputs.file("file", "") / "scores.parquet"


def _folder(inputs: Inputs) -> Path:
    inputs.out.mkdir()
    return inputs.out


OUTS: dict[str, tuple[Callable[[Inputs], Path], str]] = {
    "not .parquet": (lambda i: i.tmp_path / "scores.csv", "scores.csv: expected a file name ending in .parquet"),
    "under a file": (_file, r"--out .*/file/scores.parquet: cannot be written to \(Not a directory\)"),
    "not a score file": (lambda i: i.file("scores.parquet", "mine"), "exists and is not a score file"),
    "a folder": (_folder, "exists and is not a score file"),
}


@pytest.mark.parametrize(("spoil", "expected"), OUTS.values(), ids=OUTS)
def test_out(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], spoil: Callable[[Inputs], Path], expected: str
) -> None:
    assert_matches(expected, refused(capsys, inputs.command(out=spoil(inputs))))


def test_a_folder_is_not_overwritten(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, inputs.command("--overwrite", out=_folder(inputs)))
    assert "is a folder: expected the name of a file" in line
    assert inputs.out.is_dir()


# A replica for which Ray would wait for ever.
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("flags", ["--gpus-per-replica 64", "--cpus-per-replica 999"])
def test_more_than_any_node_has(inputs: Inputs, capsys: pytest.CaptureFixture[str], flags: str) -> None:
    line = refused(capsys, inputs.command(*flags.split()))
    assert "fits on no node: the largest of 1 node(s) has 4 CPU and" in line
    # The mended command finds nothing in its way.
    assert list(inputs.tmp_path.iterdir()) == []


@pytest.mark.ray
def test_a_cluster_that_does_not_answer(inputs: Inputs) -> None:
    """In a process of its own: what hangs in Ray cannot be taken back."""
    program = "import sys, scoring.cluster; scoring.cluster.JOIN_TIMEOUT_S = 3.0\n"
    program += "from bench.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *inputs.command()],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("mrd-bench"))
    assert "RAY_ADDRESS=127.0.0.1:1 did not answer (nothing within 3 s)" in line
    assert "unset RAY_ADDRESS to run locally" in line
    assert list(inputs.tmp_path.iterdir()) == []
    assert not [command for command in descendants(os.getpid()).values() if str(inputs.out) in command]


def test_samples_that_cannot_be_scored_are_named(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.files.score_file import read_scores

    good = pairs(5)
    bad = [
        {"id": "long", "prompt": "w1 " * 60, "completion": "w2 w3 w4"},
        {"id": "empty", "prompt": "w1", "completion": ""},
        {"id": "nothing", "text": ""},
    ]
    clean = inputs.command("--replicas", "0", data=write_jsonl(inputs.tmp_path / "good.jsonl", good))
    assert run(clean) == 0
    assert "rejected '" not in capsys.readouterr().out
    expected, _, _ = read_scores(inputs.out)

    mixed = write_jsonl(inputs.tmp_path / "mixed.jsonl", [bad[0], good[0], bad[1], *good[1:], bad[2]])
    out = inputs.tmp_path / "mixed.parquet"
    assert run(inputs.command("--replicas", "0", data=mixed, out=out)) == 0
    printed = capsys.readouterr().out
    assert "5 samples scored" in printed
    assert "3 rejected" in printed
    # bos + 60 + 3 + eos
    assert "rejected 'long': 65 tokens, the model's context holds 64" in printed
    assert "rejected 'empty': empty answer" in printed
    assert "rejected 'nothing': empty text" in printed

    found, _, facts = read_scores(out)
    assert [r["sample_id"] for r in facts["rejected"]] == ["long", "empty", "nothing"]
    assert found["sample_id"].to_pylist() == [record["id"] for record in good]
    # The same batches, so the same to the last bit.
    assert found.equals(expected)


def test_no_scored_token(tmp_path: Path) -> None:
    """A text of one token and no bos: nothing predicts it."""
    from scoring.samples import Text, encode

    bare = tokenizer(bos=False)
    samples, rejected = encode([Text("one", "w1"), Text("two", "w1 w2")], bare, 64)
    assert [(r.sample_id, r.reason) for r in rejected] == [("one", "no scored token")]
    assert samples[0].input_ids.tolist() == [token_id("w1"), token_id("w2")]
    assert BOS not in samples[0].input_ids
