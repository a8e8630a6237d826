"""`mrd-bench difficulty` and `--truth` end to end: their files, that kills and replicas change none, and bad input."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

import scoring
from algorithms.alone import LossAlone
from algorithms.truth import AloneTask, Rule, TogetherTask
from bench.cli import main
from bench.files.score_file import FACTS_KEY, SPEC_KEY, read_scores
from scoring.load import load_model
from scoring.memorization import extraction_likelihood, memorization_accuracy
from scoring.replica import TransformersReplica
from scoring.samples import collate, make_batches
from scoring.updates import UpdateSettings
from tests.processes import wait_for
from tests.scoring.toys import LEARNT, RECORDS, save_memorised
from tests.tiny_folders import CONTEXT, EOS, pairs, save_model, token_id, tokenizer, write_jsonl

TOO_LONG = {"id": "long", "prompt": "w1 " * CONTEXT, "completion": "w2"}
REJECTED = [{"sample_id": "long", "reason": f"{CONTEXT + 3} tokens, the model's context holds {CONTEXT}"}]
RATE = 3e-4
MEASURES = ["flip-time", "joint-forecast", "mrd", "nll", "knn-similarity", "gradient-cosine", "frequency"]
DIFFICULTY = f"--measure {','.join(MEASURES)} --thresholds average,0.7 --lookahead 2 --batch-tokens 40"
TRUTH = "--truth --until paper,average,0.7 --most-updates 12 --el-n 3 --algorithm NPO --settings beta=0.5"
TOGETHER = "--truth --together --until average,0.7 --most-updates 10 --batch-size 3 --seeds 0,5"


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows RECORDS by heart; not to be changed."""
    return save_memorised(tmp_path_factory.mktemp("memorised") / "model")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RECORDS, with one that the model cannot take among them, and next to it the last four by themselves."""
    folder = tmp_path_factory.mktemp("records")
    write_jsonl(folder / "retain.jsonl", RECORDS[-4:])
    return write_jsonl(folder / "records.jsonl", [*RECORDS[:2], TOO_LONG, *RECORDS[2:]])


def command(model: Path, data: Path, out: Path, flags: str, replicas: int = 0) -> list[str]:
    more = ["--retain", str(data.with_name("retain.jsonl"))] if "gradient-cosine" in flags else []
    places = ["--model", str(model), "--data", str(data), "--out", str(out), "--replicas", str(replicas)]
    return ["difficulty", *places, "--learning-rate", str(RATE), *flags.split(), *more]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- The files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(memorised: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pa.Table]:
    """What the three commands write, undisturbed, in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tables = {}
    for flags in (DIFFICULTY, TRUTH, TOGETHER):
        out = folder / "out.parquet"
        assert main(command(memorised, records, out, flags)) == 0
        assert left_in(folder) == ["out.parquet"]
        tables[flags] = pq.read_table(out)
        out.unlink()
    return tables


def test_measures_are_those_of_the_front_door(tables: dict[str, pa.Table], memorised: Path) -> None:
    table = tables[DIFFICULTY]
    model = AutoModelForCausalLM.from_pretrained(memorised)
    given: dict[str, Any] = {"thresholds": ["average", 0.7], "lookahead": 2, "batch_tokens": 40, "learning_rate": RATE}
    same = scoring.difficulty(
        model, tokenizer(), [*RECORDS, TOO_LONG], measure=MEASURES, retain=RECORDS[-4:], **given
    ).dropna(subset="ma")
    assert table.column_names == [*list(same)[:-1]]
    assert table["sample_id"].to_pylist() == [record["id"] for record in RECORDS] == same["sample_id"].tolist()
    for name in table.column_names[1:]:
        # The same batches: the same to the last bit.
        np.testing.assert_array_equal(table[name].to_numpy(), same[name].to_numpy(table[name].to_numpy().dtype))

    spec, record = (json.loads(table.schema.metadata[key]) for key in (SPEC_KEY, FACTS_KEY))
    assert (spec["measure"], spec["thresholds"], spec["lookahead"]) == (MEASURES, ["average", 0.7], 2)
    assert len(spec["spec_hash"]) == 16
    assert len(spec["data_sha256"]) == len(spec["retain_sha256"]) == len(spec["model_fingerprint"]) == 64
    assert record["rejected"] == REJECTED
    assert record["thresholds"] == {"average": np.mean(table["ma"].to_numpy()), "0.7": 0.7}
    # 3 h + 2 for each threshold, of which the first looks are shared.
    assert record["cost"]["flip-time"] == 4 + 2 * 4
    assert set(record["seconds_of_measures"]) == {*MEASURES} - {"frequency"}
    assert record["packages"]["torch"] == torch.__version__


def test_truths_are_those_of_the_tasks(tables: dict[str, pa.Table], memorised: Path) -> None:
    replica = TransformersReplica(load_model(memorised))
    ma = np.array([memorization_accuracy(replica.model, collate([one])).item() for one in LEARNT])
    el = extraction_likelihood(replica.model, LEARNT, 3, EOS).numpy()
    update = UpdateSettings(learning_rate=RATE)

    alone = tables[TRUTH]
    assert alone["sample_id"].to_pylist() == [record["id"] for record in RECORDS]
    np.testing.assert_array_equal(alone["ma"].to_numpy(), ma)
    np.testing.assert_allclose(alone["el"].to_numpy(), el)
    rules = {"paper": Rule(ma.mean(), el.mean()), "average": Rule(ma.mean()), "0.7": Rule(0.7)}
    task = AloneTask(0, LossAlone("NPO", {"beta": 0.5}), update, rules, 12, 3, EOS)
    expected = task.do(replica, [collate(LEARNT)], {})
    assert alone.column_names == ["sample_id", "num_tokens", "ma", "el", *list(expected)[1:]]
    for name in list(expected)[1:]:
        np.testing.assert_array_equal(alone[name].to_numpy(), expected[name])
    # One was below the average at the start; some took longer than 12 updates for .7.
    assert (alone["updates@average"].to_numpy() == 0).any()
    never = np.isinf(alone["updates@0.7"].to_numpy())
    assert np.isnan(alone["delta_norm@0.7"].to_numpy()).tolist() == never.tolist()
    spec, record = (json.loads(alone.schema.metadata[key]) for key in (SPEC_KEY, FACTS_KEY))
    assert spec["truth"] is True
    assert record["rejected"] == REJECTED
    assert record["rules"]["paper"] == {"ma": pytest.approx(ma.mean()), "el": pytest.approx(el.mean())}
    assert record["rules"]["average"]["el"] is None
    assert record["backwards"] > len(LEARNT)

    together = tables[TOGETHER]
    assert together["sample_id"].to_pylist() == [record["id"] for record in RECORDS] * 2
    assert together["seed"].to_pylist() == [0] * len(RECORDS) + [5] * len(RECORDS)
    thresholds = {"average": float(ma.mean()), "0.7": 0.7}
    for number, seed in enumerate((0, 5)):
        run = TogetherTask(0, seed, LossAlone("GA"), update, thresholds, 10, 3).do(
            replica, make_batches(LEARNT, 4096), {}
        )
        order = run["index"].argsort()
        for name in ("updates@average", "updates@0.7"):
            mine = together[name].to_numpy()[number * len(RECORDS) :][: len(RECORDS)]
            np.testing.assert_array_equal(mine, run[name][order])
    assert together["updates@0.7"].to_pylist()[: len(RECORDS)] != together["updates@0.7"].to_pylist()[len(RECORDS) :]


def test_a_finished_file_is_kept_and_told_from_others(
    memorised: Path, records: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.parquet"
    first = "--measure nll,length,frequency"
    assert main(command(memorised, records, out, first)) == 0
    printed = capfd.readouterr().out
    assert "20 samples measured" in printed
    assert "rejected 'long': 67 tokens" in printed
    written = out.read_bytes(), out.stat().st_mtime_ns
    assert main(command(memorised, records, out, first)) == 0
    again = capfd.readouterr()
    assert "already done, nothing to do" in again.err
    assert again.out.splitlines()[1:] == printed.splitlines()[1:]
    for flags, message in (
        ("--measure nll,length", "holds measures of another spec (different: measure): choose another file"),
        ("--measure nll,length,frequency --sigma 1e-4", "(different: sigma)"),
        ("--truth --until 0.7", "out.parquet"),
    ):
        assert main(command(memorised, records, out, flags)) == 2
        error = capfd.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert (out.read_bytes(), out.stat().st_mtime_ns) == written
    assert main([*command(memorised, records, out, "--measure nll"), "--overwrite"]) == 0
    assert read_scores(out)[0].column_names == ["sample_id", "num_tokens", "nll"]
    assert left_in(tmp_path) == ["out.parquet"]


def test_a_column_that_no_sample_has(memorised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sample has no neighbours: it is said, and nothing breaks."""
    data = write_jsonl(tmp_path / "one.jsonl", RECORDS[:1])
    assert main(command(memorised, data, tmp_path / "out.parquet", "--measure knn-similarity,nll")) == 0
    printed = capsys.readouterr().out
    assert "knn-similarity" in printed
    assert "not defined for any sample" in printed
    assert np.isnan(read_scores(tmp_path / "out.parquet")[0]["knn-similarity"].to_numpy()).all()


# --- Kills and replicas -------------------------------------------------------------------------------------


# With what is loaded only when it is first used.
LOADED = [f"bench.jobs.{name}" for name in ("truth", "difficulty", "resources")]
LOADED += ["scoring.replica", "torch._dynamo", "transformers.models.llama.modeling_llama"]


def assert_same(found: pa.Table, expected: pa.Table) -> None:
    """The same to the last bit, nan included."""
    assert found.schema.equals(expected.schema)
    for name in expected.column_names:
        np.testing.assert_array_equal(found[name].to_numpy(), expected[name].to_numpy(), err_msg=name, strict=True)


@pytest.mark.slow
def test_killed_processes_continue(
    tables: dict[str, pa.Table], memorised: Path, records: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at three random moments a command: some parts further than the last time, and up to a tenth of a second
    later. The processes are forked off one that has loaded the packages, and has done nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    rng = np.random.default_rng(0)
    out, parts = tmp_path / "out.parquet", tmp_path / "out.parquet.parts"

    def finished() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}

    def killed(flags: str, goal: int) -> bool:
        """Whether the command was killed with so many parts or more; it may have been done before that."""
        process = context.Process(target=main, args=(command(memorised, records, out, flags),))
        process.start()
        wait_for(lambda: len(finished()) >= goal or not process.is_alive(), seconds=300)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        return not out.exists()

    for flags, table in tables.items():
        kills = 0
        while kills < 3:
            before = finished()
            if killed(flags, len(before) + int(rng.integers(0 if before else 1, 2 if flags == TOGETHER else 8))):
                kills += 1
                assert before.items() <= finished().items()
            else:
                out.unlink()
                shutil.rmtree(parts, ignore_errors=True)
        assert main(command(memorised, records, out, flags)) == 0
        assert not parts.exists()
        assert_same(pq.read_table(out), table)
        assert json.loads(pq.read_schema(out).metadata[SPEC_KEY]) == json.loads(table.schema.metadata[SPEC_KEY])
        out.unlink()
        capfd.readouterr()


@pytest.mark.usefixtures("cluster")
def test_replicas_change_no_bit(tables: dict[str, pa.Table], memorised: Path, records: Path, tmp_path: Path) -> None:
    for number, (flags, table) in enumerate(tables.items()):
        out = tmp_path / f"{number}.parquet"
        assert main(command(memorised, records, out, flags, replicas=2)) == 0
        assert_same(pq.read_table(out), table)
    assert left_in(tmp_path) == ["0.parquet", "1.parquet", "2.parquet"]


# --- Samples that overflow ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for which w5 is too much."""
    folder = save_model(tmp_path_factory.mktemp("overflowing") / "model", "gpt-neox", tied=False)
    model: Any = GPTNeoXForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        weights = model.get_input_embeddings().weight
        weights[token_id("w5")] = torch.where(torch.arange(weights.shape[1]) % 2 == 0, 3e38, -3e38)
    model.save_pretrained(folder)
    return folder


BAD = {"id": "bad", "prompt": "w5 w6", "completion": "w7 w8"}
CLEAN = [r for r in pairs(9) if "w5" not in f"{r['prompt']} {r['completion']}".split()]
NOT_FINITE = "the model's log-probabilities are not finite"


@pytest.mark.parametrize(
    "flags",
    [
        "--measure flip-time,knn-similarity --thresholds average,1",
        "--truth --until paper,0.9 --el-n 3 --most-updates 3",
    ],
)
def test_a_sample_that_overflows_is_rejected(overflowing: Path, tmp_path: Path, flags: str) -> None:
    """It spoils no other, nor the averages."""
    found = []
    for name, records in (("mixed", [CLEAN[0], BAD, *CLEAN[1:]]), ("clean", CLEAN)):
        data, out = write_jsonl(tmp_path / f"{name}.jsonl", records), tmp_path / f"{name}.parquet"
        assert main(command(overflowing, data, out, flags)) == 0
        found.append(read_scores(out))
    (mixed, _, record), (clean, _, clean_record) = found
    assert record["rejected"] == [{"sample_id": "bad", "reason": NOT_FINITE}]
    assert clean_record["rejected"] == []
    assert record.get("thresholds") == clean_record.get("thresholds")
    assert mixed["sample_id"].equals(clean["sample_id"])
    for name in mixed.column_names[1:]:
        np.testing.assert_allclose(mixed[name].to_numpy(), clean[name].to_numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "bad_too", "message"),
    [
        ("--measure joint-forecast,nll", True, r"sample 'bad' are not finite"),
        ("--truth --together --until 0.9", True, r"sample 'bad': the model's log-probabilities are not finite"),
        (
            "--truth --until el --el-n 60",
            False,
            r"--until asks for EL, which is not defined for any sample.*--el-n = 60",
        ),
        ("--measure flip-time --dtype bfloat16", False, r"does not survive bfloat16 storage.*use --dtype float32"),
    ],
)
def test_what_is_refused_under_way_leaves_nothing(
    overflowing: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    bad_too: bool,
    message: str,
) -> None:
    """MA has been measured by then; the mended command must not find it in its way."""
    data = write_jsonl(tmp_path / "data.jsonl", [*CLEAN, *[BAD] * bad_too])
    out = tmp_path / "out.parquet"
    assert main(command(overflowing, data, out, flags)) == 2
    assert_one_line(capsys.readouterr(), message)
    assert left_in(tmp_path) == ["data.jsonl"]
    assert main(command(overflowing, data, out, "--measure nll")) == 0


def assert_one_line(printed: Any, message: str) -> None:
    """On stderr, beside what progress bars draw."""
    assert printed.out == ""
    lines = [line for line in printed.err.replace("\r", "\n").splitlines() if line.startswith("mrd-bench")]
    assert "Traceback" not in printed.err
    assert len(lines) == 1, printed.err
    assert re.search(message, lines[0]), lines[0]


# --- Bad input ----------------------------------------------------------------------------------------------

FLAGS = {
    "a flag of truths": ("--measure nll --until 0.5", "--until is for the command with --truth: leave it out, or give"),
    "a flag of measures": ("--truth --measure nll", "--measure is for the command without --truth"),
    "no measure": ("", "command line: missing measure: expected in a spec file, or as --measure"),
    "empty measure": ("--measure=", "--measure is '': expected one of flip-time"),
    "unknown measure": ("--measure nll,mdr", "--measure is 'mdr': expected one of .*did you mean 'mrd'"),
    "threshold": (
        "--measure flip-time --thresholds 0.5,2",
        r"--thresholds\[1\] is 2: expected a number from 0 to 1, or",
    ),
    "no number": (
        "--measure flip-time --thresholds low",
        r"--thresholds\[0\] is 'low': expected a number from 0 to 1, or",
    ),
    "algorithm": ("--measure flip-time --algorithm NOP", "unknown algorithm 'NOP': .*did you mean 'NPO'"),
    "no forecast": (
        "--measure nll --algorithm PO",
        "--algorithm PO has no forecast: its objective takes refusal_logprobs",
    ),
    "setting": ("--measure nll --settings beta=1", "unknown setting of ga 'beta'"),
    "look-ahead": ("--measure flip-time --lookahead 0", "--lookahead is 0: expected a whole number of at least 1"),
    "learning rate": (
        "--measure flip-time --learning-rate=-1",
        "--learning-rate is -1: expected a number greater than 0",
    ),
    "checkpoints": ("--measure vog", "--checkpoints is empty: vog needs earlier states"),
    "retain": ("--measure GRADIENT-COSINE", "--measure gradient-cosine compares with a retain set, and there is none"),
    "engine": ("--measure nll,grand --engine vllm --replicas 1", "--measure grand looks inside the model"),
    "truth of PO": ("--truth --algorithm PO", "--algorithm PO has no forecast"),
    "truth in bfloat16": ("--truth --dtype bfloat16", "--dtype is bfloat16: updates need float32 or float64"),
    "truth by vLLM": ("--truth --engine vllm --replicas 1", "--engine vllm does not train"),
    "a rule of 0": (
        "--truth --until 0",
        r"--until\[0\] is 0: expected a number greater than 0 and at most 1, or one of",
    ),
    "a rule above 1": ("--truth --until average,1.5", r"--until\[1\] is 1.5: expected a number greater than 0 and at"),
    "EL together": ("--truth --together", "--until has paper: EL of all samples .* expected average, or numbers"),
    "seed": (
        "--truth --together --until 0.5 --seeds 1,-1",
        r"--seeds\[1\] is -1: expected a whole number of at least 0",
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags(memorised: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    flags, message = FLAGS[name]
    assert_refused(capsys, command(memorised, records, tmp_path / "out.parquet", flags), message)
    assert left_in(tmp_path) == []


def assert_refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str], message: str) -> None:
    assert main(arguments) == 2
    assert_one_line(capsys.readouterr(), message)


@pytest.mark.parametrize("flags", ["--measure nll", "--truth --until 0.5"])
def test_places(memorised: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str) -> None:
    spoil: dict[str, Callable[[], tuple[Path, Path, Path]]] = {
        "out.csv: expected a file name ending in .parquet": lambda: (memorised, records, tmp_path / "out.csv"),
        "folder.parquet exists and is not a .* file: choose another": lambda: (
            memorised,
            records,
            tmp_path / "folder.parquet",
        ),
        "none.jsonl": lambda: (memorised, tmp_path / "none.jsonl", tmp_path / "out.parquet"),
        "model folder .* does not exist": lambda: (tmp_path / "none", records, tmp_path / "out.parquet"),
    }
    (tmp_path / "folder.parquet").mkdir()
    for message, places in spoil.items():
        assert_refused(capsys, command(*places(), flags), message)
    assert left_in(tmp_path) == ["folder.parquet"]


def test_a_spec_file(memorised: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is of one of the two; a line of the other is no field of it."""
    spec, out = tmp_path / "spec.yaml", tmp_path / "out.parquet"
    lines = f"model: {memorised}\ndata: {records}\nreplicas: 0\nlearning_rate: {RATE}\n"
    given = ["difficulty", "--spec", str(spec), "--out", str(out)]
    spec.write_text(f"{lines}measure: [nll]\nuntil: [0.5]\n")
    assert_refused(capsys, given, r"spec.yaml, line 6: unknown field 'until'")
    spec.write_text(f"{lines}measure: [flip-time]\nthresholds: [0.7, 2]\n")
    assert_refused(capsys, given, r"spec.yaml, line 6: thresholds\[1\] is 2: expected a number from 0 to 1, or average")
    spec.write_text(f"{lines}until: [0.9, average]\nmost_updates: 3\n")
    assert main([*given, "--truth"]) == 0
    table = read_scores(out)[0]
    assert [name for name in table.column_names if name.startswith("updates")] == ["updates@0.9", "updates@average"]
    assert {*table["updates@0.9"].to_pylist()} <= {0.0, 1.0, 2.0, 3.0, math.inf}
