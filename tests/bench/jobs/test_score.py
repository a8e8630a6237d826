"""The main job end to end: the file it writes against independent computations, and what kills do not change."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

import scoring.api
from bench.cli import main
from bench.files.score_file import FACTS_KEY, SPEC_KEY, read_scores
from bench.jobs.resources import Resources
from bench.jobs.score import ScoreResult, ScoreSpec, score
from scoring.errors import UserError
from scoring.load import load_model
from scoring.mrd import ESTIMATORS, Request, estimate, reduce_draws
from scoring.replica import TransformersReplica
from scoring.samples import Text, encode, make_batches
from tests.paths import ROOT
from tests.processes import descendants, kill, replicas, wait_for
from tests.tiny_folders import BOS, CONTEXT, EOS, pairs, save_model, token_id, tokenizer, write_jsonl

DATA = ROOT.parent / "shared" / "data"
COLUMNS = {
    "sample_id": pa.string(),
    "num_tokens": pa.int64(),
    "tokens_saturated": pa.int64(),
    "nll": pa.float64(),
    "mrd": pa.float64(),
    "mrd_stderr": pa.float64(),
    "mrd_per_token": pa.float64(),
    "draws": pa.int64(),
}
HERE = Resources(replicas=0)


@pytest.fixture(scope="module")
def gradient(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> ScoreResult:
    """The 24 pairs, scored by the closed form in batches of up to 4096 tokens."""
    out = tmp_path_factory.mktemp("gradient") / "scores.parquet"
    return score(
        ScoreSpec(model=str(model_folder), data=str(data_file), estimator="gradient"), out, HERE, progress=False
    )


def ids_of(record: dict[str, str]) -> tuple[list[int], int]:
    """Token ids and the place of the first scored one, from the words themselves."""
    prompt = [BOS, *map(token_id, record["prompt"].split())]
    return [*prompt, *map(token_id, record["completion"].split()), EOS], len(prompt)


def in_fp64(folder: Path, records: Sequence[dict[str, str]]) -> tuple[list[float], list[float]]:
    """Per record, by transformers and torch alone: the sum of cross-entropies and the norm of grad Sum_t log|P_t|."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    nll, norms = [], []
    for record in records:
        ids, first = ids_of(record)
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        losses = F.cross_entropy(logits[first - 1 : -1], torch.tensor(ids[first:]), reduction="none")
        gradients = torch.autograd.grad(losses.log().sum(), list(model.parameters()))
        nll.append(losses.sum().item())
        norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients)))
    return nll, norms


def test_columns_and_types(gradient: ScoreResult) -> None:
    plain = pq.read_table(gradient.path)
    assert dict(zip(plain.schema.names, plain.schema.types, strict=True)) == COLUMNS
    assert plain.schema.names == list(COLUMNS)
    frame = pd.read_parquet(gradient.path)
    assert list(frame.columns) == list(COLUMNS)
    assert not frame.isna().any().any()
    assert plain.equals(gradient.table)


def test_rows_against_fp64(gradient: ScoreResult, model_folder: Path) -> None:
    records = pairs(24)
    frame = pd.read_parquet(gradient.path)
    assert frame["sample_id"].tolist() == [record["id"] for record in records]
    assert frame["num_tokens"].tolist() == [len(record["completion"].split()) + 1 for record in records]
    nll, norms = in_fp64(model_folder, records)
    np.testing.assert_allclose(frame["nll"], nll, rtol=1e-5)
    np.testing.assert_allclose(frame["mrd"], 1e-5 * math.sqrt(2 / math.pi) * np.array(norms), rtol=1e-5)
    np.testing.assert_array_equal(frame["mrd_per_token"], frame["mrd"] / frame["num_tokens"])
    # Nothing is drawn, so there is no sampling error; a random model is sure of nothing.
    assert (frame[["mrd_stderr", "draws", "tokens_saturated"]] == 0).all().all()


def test_metadata(gradient: ScoreResult, model_folder: Path, data_file: Path) -> None:
    metadata = pq.read_schema(gradient.path).metadata
    spec, facts = json.loads(metadata[SPEC_KEY]), json.loads(metadata[FACTS_KEY])
    assert {"estimator": "gradient", "statistic": "mean_abs", "sigma": 1e-5}.items() <= spec.items()
    assert (spec["model"], spec["data"]) == (str(model_folder), str(data_file))
    assert len(spec["spec_hash"]) == 16
    assert len(spec["model_fingerprint"]) == len(spec["data_sha256"]) == 64
    assert facts["packages"]["torch"] == torch.__version__
    assert all(facts["packages"][name] for name in ("mrd-bench", "transformers", "ray", "numpy", "pyarrow"))
    assert facts["rejected"] == []
    assert facts["notes"] == []
    assert (facts["replaced_replicas"], facts["gradient_error"], facts["perturbation_survival"]) == (0, None, None)
    assert facts["forwards"] >= facts["backwards"] >= 1


def test_fingerprint_is_of_weights_configuration_and_tokenizer(tmp_path: Path) -> None:
    from bench.models.find import find_model

    folder = save_model(tmp_path / "model")
    seen = {find_model(str(folder)).fingerprint}
    assert find_model(str(save_model(tmp_path / "again"))).fingerprint in seen
    tokenizer(extra=["one-more"]).save_pretrained(folder)
    seen.add(find_model(str(folder)).fingerprint)
    save_model(folder, seed=1)
    seen.add(find_model(str(folder)).fingerprint)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    seen.add(find_model(str(folder)).fingerprint)
    assert len(seen) == 4


# The same samples in other batches, orders and padding: log-probs move by rounding alone. Monte Carlo divides that by
# sigma, so that in fp32 its bound grows as sigma falls; in fp64 nothing is left to hide behind.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "dtype", "sigma", "draws", "bound"),
    [
        ("gradient", "float32", 1e-5, 1, 1e-5),
        ("curvature", "float32", 1e-5, 1, 1e-5),
        ("monte-carlo", "float32", 1e-3, 20, 5e-5),
        ("monte-carlo", "float32", 1e-5, 20, 5e-3),
        ("monte-carlo", "float64", 1e-5, 20, 1e-10),
    ],
)
def test_batches_order_and_padding(
    model_folder: Path, estimator: str, dtype: str, sigma: float, draws: int, bound: float
) -> None:
    replica = TransformersReplica(load_model(model_folder, dtype))
    samples, _ = encode(texts(pairs(12)), tokenizer(), CONTEXT)
    statistic = ESTIMATORS[estimator].statistics[0]

    def scores(order: Sequence[int], batch_tokens: int) -> np.ndarray:
        """In the order of `samples`, whatever the order they are given in."""
        moved = [dataclasses.replace(samples[at], index=index) for index, at in enumerate(order)]
        found = estimate(replica, make_batches(moved, batch_tokens), Request(estimator, sigma, 0, 0, draws))
        back = np.empty(len(samples))
        back[np.array(order)[found.indices]] = reduce_draws(found.values, statistic)[0]
        return back

    straight = list(range(len(samples)))
    alone = scores(straight, 1)
    worst = 0.0
    for order, batch_tokens in ((straight, 4096), (straight[::-1], 70), (straight[::2] + straight[1::2], 130)):
        worst = max(worst, np.max(np.abs(scores(order, batch_tokens) / alone - 1)).item())
    print(f"\n{estimator} in {dtype} at sigma={sigma:g}: largest relative difference {worst:.1e}")
    assert 0 < worst < bound


def texts(records: Sequence[dict[str, str]]) -> list[Text]:
    return [Text(record["id"], record["prompt"], record["completion"]) for record in records]


def test_order_of_the_file_changes_no_score(gradient: ScoreResult, model_folder: Path, tmp_path: Path) -> None:
    records = pairs(24)[::-1]
    spec = ScoreSpec(
        model=str(model_folder),
        data=str(write_jsonl(tmp_path / "reversed.jsonl", records)),
        estimator="gradient",
        batch_tokens=100,
    )
    turned = score(spec, tmp_path / "scores.parquet", HERE, progress=False).table
    assert turned["sample_id"].to_pylist() == [record["id"] for record in records]
    for column in ("nll", "mrd"):
        np.testing.assert_allclose(turned[column].to_numpy()[::-1], gradient.table[column].to_numpy(), rtol=1e-5)


@pytest.mark.usefixtures("cluster")
def test_cut_replicas_and_kills_change_no_bit(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica in this process and one task, against three on Ray and 24 tasks with a replica killed on the way."""
    spec = ScoreSpec(
        model=str(model_folder), data=str(data_file), estimator="monte-carlo", sigma=1e-3, draws=12, batch_tokens=100
    )
    monkeypatch.setattr(scoring.api, "DRAWS_PER_TASK", 12)
    whole = score(spec, tmp_path / "whole.parquet", HERE, progress=False)
    assert whole.facts["perturbation_survival"] == pytest.approx(1, abs=0.01)

    monkeypatch.setattr(scoring.api, "DRAWS_PER_TASK", 1)
    monkeypatch.setattr(scoring.api, "BATCHES_PER_TASK", {True: 2, False: 1})
    out = tmp_path / "cut.parquet"
    killed: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: list((tmp_path / "cut.parquet.parts").glob("*.parquet")))
        killed.append(replicas(os.getpid())[0])
        kill(killed[0])

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    cut = score(spec, out, Resources(replicas=3), progress=False)
    killer.join()
    assert cut.facts["replaced_replicas"] == len(killed) == 1
    assert cut.table.equals(whole.table)
    assert not (tmp_path / "cut.parquet.parts").exists()


@pytest.fixture
def driver_of() -> Iterator[Any]:
    """Starts drivers in processes of their own; afterwards ends what they have left behind, and nothing else."""
    left: dict[int, str] = {}
    drivers: list[subprocess.Popen[bytes]] = []

    class Driver:
        def __init__(self, command: list[str]) -> None:
            environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.cli", *command],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            drivers.append(self._process)

        def runs(self) -> bool:
            return self._process.poll() is None

        def kill(self) -> None:
            left.update(descendants(self._process.pid))
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    yield Driver
    for process in drivers:
        if process.poll() is None:
            left.update(descendants(process.pid))
            process.kill()
            process.wait()
    # A pid may have been given to another process since: its command line tells.
    for pid, command in left.items():
        if Path(f"/proc/{pid}/cmdline").exists() and "ray" in command and "ray" in _command(pid):
            kill(pid)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.usefixtures("cluster")
def test_a_killed_driver_continues(
    model_folder: Path, data_file: Path, tmp_path: Path, driver_of: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed with its replicas on Ray, then while it works by itself, and ended by one that does."""
    out, undisturbed = tmp_path / "scores.parquet", tmp_path / "undisturbed.parquet"
    parts = tmp_path / "scores.parquet.parts"

    def command(target: Path, sigma: str = "1e-3", replicas: int = 0) -> list[str]:
        named = {"model": model_folder, "data": data_file, "out": target, "sigma": sigma, "draws": 400}
        named |= {"estimator": "monte-carlo", "replicas": replicas}
        return ["score", *(part for key, value in named.items() for part in (f"--{key}", str(value)))]

    def finished() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}

    assert main(command(undisturbed)) == 0

    # Killed twice: the second driver must have gone on from the first one's parts.
    before: dict[str, int] = {}
    for count in (1, 0):
        driver = driver_of(command(out, replicas=count))
        wait_for(lambda: len(finished()) >= len(before) + 2 or not driver.runs())  # noqa: B023
        assert driver.runs(), "the driver ended before it could be killed"
        driver.kill()
        assert not out.exists()
        after = finished()
        assert before.items() <= after.items()
        before = after
    assert 4 <= len(before) < 40
    # Who cannot wait reads what there is: of each sample, by name, the draws so far.
    half_done = [pq.read_table(parts / name) for name in before]
    (ids,) = {tuple(part["sample_id"].to_pylist()) for part in half_done}
    assert sorted(ids) == sorted(each["id"] for each in map(json.loads, data_file.read_text().splitlines()))
    assert {part["values"].type.list_size for part in half_done} == {10}

    # Another spec does not take the parts over.
    capfd.readouterr()
    assert main(command(out, sigma="2e-3")) == 2
    assert "holds the unfinished work of another spec" in capfd.readouterr().err
    assert finished() == before

    assert main(command(out)) == 0
    # The bar counts sample-draws, 24 samples times 10 draws a task, and begins where the first start has ended.
    error = capfd.readouterr().err
    assert f"continuing from {len(before) * 240} of 9600 sample-draws" in error
    assert " 9600/9600 " in error
    assert not parts.exists()
    assert read_scores(out)[0].equals(read_scores(undisturbed)[0])

    # Once more: there is nothing to do.
    written = out.read_bytes(), out.stat().st_mtime_ns
    assert main(command(out)) == 0
    assert "already done, nothing to do" in capfd.readouterr().err
    # Another spec: refused.
    assert main(command(out, sigma="2e-3")) == 2
    error = capfd.readouterr().err
    assert "holds scores of another spec (different: sigma)" in error
    assert len(error.splitlines()) == 1
    assert (out.read_bytes(), out.stat().st_mtime_ns) == written
    assert not parts.exists()


def test_two_runs_do_not_share_an_output(
    gradient: ScoreResult, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    from filelock import FileLock

    parts = tmp_path / "scores.parquet.parts"
    parts.mkdir()
    with FileLock(parts / "lock"), pytest.raises(UserError, match="another run is writing here"):
        score(ScoreSpec(model=str(model_folder), data=str(data_file)), tmp_path / "scores.parquet", HERE)


@pytest.mark.parametrize("estimator", ["gradient", "monte-carlo"])
def test_samples_that_overflow(tmp_path: Path, estimator: str) -> None:
    """A word whose embedding overflows in fp32 spoils its own samples and no others; where it is in all, nothing
    can be scored and the error says so."""
    folder = save_model(tmp_path / "model", "gpt-neox", tied=False)
    model: Any = GPTNeoXForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        weights = model.get_input_embeddings().weight
        weights[token_id("w5")] = torch.where(torch.arange(weights.shape[1]) % 2 == 0, 3e38, -3e38)
    model.save_pretrained(folder)

    clean = [r for r in pairs(12) if "w5" not in f"{r['prompt']} {r['completion']}".split()]
    bad = {"id": "bad", "prompt": "w5 w6", "completion": "w7 w8"}
    draws = 2 if estimator == "monte-carlo" else None

    def run(name: str, records: list[dict[str, str]]) -> ScoreResult:
        data = write_jsonl(tmp_path / f"{name}.jsonl", records)
        spec = ScoreSpec(model=str(folder), data=str(data), estimator=estimator, draws=draws)
        return score(spec, tmp_path / f"{name}.parquet", HERE, progress=False)

    mixed = run("mixed", [bad, *clean])
    assert [(r.sample_id, r.reason) for r in mixed.rejected] == [
        ("bad", "the model's log-probabilities are not finite")
    ]
    assert mixed.table["sample_id"].to_pylist() == [record["id"] for record in clean]
    nll, norms = in_fp64(folder, clean)
    np.testing.assert_allclose(mixed.table["nll"].to_numpy(), nll, rtol=1e-5)
    if estimator == "gradient":
        expected = 1e-5 * math.sqrt(2 / math.pi) * np.array(norms)
        np.testing.assert_allclose(mixed.table["mrd"].to_numpy(), expected, rtol=1e-5)

    with pytest.raises(UserError, match="none of 1 samples can be scored; the first, 'bad': the model's log-prob") as e:
        run("all", [bad])
    assert "\n" not in str(e.value)
    assert not list(tmp_path.glob("all.parquet*"))


def test_settings_in_a_file(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same scores as by flags; a flag goes before the file, and a mistake is found on its line."""
    by_flags, by_file, mixed = (tmp_path / f"{name}.parquet" for name in ("flags", "file", "mixed"))
    spec = tmp_path / "score.yaml"
    spec.write_text(
        f"model: {model_folder}\ndata: {data_file}\nestimator: monte-carlo\nsigma: 1e-3\ndraws: 3\nreplicas: 0\n"
    )
    flags = f"--model {model_folder} --data {data_file} --estimator monte-carlo --sigma 1e-3 --draws 3 --replicas 0"
    assert main(["score", *flags.split(), "--out", str(by_flags)]) == 0
    assert main(["score", "--spec", str(spec), "--out", str(by_file)]) == 0
    assert main(["score", "--spec", str(spec), "--draws", "2", "--out", str(mixed)]) == 0
    (table, settings, _), (same, same_settings, _), (other, _, _) = map(read_scores, (by_flags, by_file, mixed))
    assert same.equals(table)
    assert same_settings == settings
    assert set(other["draws"].to_pylist()) == {2}
    spec.write_text(spec.read_text().replace("sigma: 1e-3", "sigma: -1e-3"))
    capsys.readouterr()
    assert main(["score", "--spec", str(spec), "--out", str(tmp_path / "none.parquet")]) == 2
    error = capsys.readouterr().err
    assert "score.yaml, line 4: sigma is -0.001: expected a number greater than 0" in error
    assert not (tmp_path / "none.parquet").exists()


def test_bfloat16(model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(tmp_path / "few.jsonl", pairs(8))
    out = tmp_path / "scores.parquet"

    def command(*more: str, target: Path = out) -> list[str]:
        return [*f"score --model {model_folder} --data {data} --out {target} --replicas 0".split(), *more]

    monte_carlo = ["--estimator", "monte-carlo", "--draws", "2", "--dtype", "bfloat16"]
    assert main(command(*monte_carlo)) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "the perturbation does not survive bfloat16 storage: measured" in error
    measured = float(error.split("/sigma = ")[1].split()[0])
    assert not 0.95 < measured < 1.05
    assert "use --dtype float32, or --estimator gradient or curvature" in error

    # The mended command, with the same --out.
    assert main(command("--estimator", "gradient", "--dtype", "bfloat16")) == 0
    assert "largest relative error of gradient norms against fp32" in capfd.readouterr().out
    rough, _, facts = read_scores(out)
    exact = 1e-5 * math.sqrt(2 / math.pi) * np.array(in_fp64(model_folder, pairs(8))[1])
    error_of = np.max(np.abs(rough["mrd"].to_numpy() / exact - 1))
    # The weights are exact in bfloat16: all of the error is arithmetic, and the replica has compared all 8 samples.
    assert 1e-4 < error_of < 0.3
    assert facts["gradient_error"] == pytest.approx(error_of, rel=0.02)

    lost = tmp_path / "lost.parquet"
    assert main(command(*monte_carlo, "--allow-lost-perturbation", target=lost)) == 0
    assert f"survival: {measured:.2f}"[:-1] in capfd.readouterr().out
    _, spec, facts = read_scores(lost)
    assert spec["allow_lost_perturbation"] is True
    assert facts["perturbation_survival"] == pytest.approx(measured, rel=0.01)
    (note,) = facts["notes"]
    assert "does not survive bfloat16 storage" in note


@pytest.mark.slow
def test_draws_until_a_tolerance(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """|N(0, 1)| has mean sqrt(2/pi) and relative standard deviation sqrt(pi/2 - 1) = 0.756: it takes (0.756 / t)^2."""
    counts = {}
    for tolerance in (0.15, 0.06):
        spec = ScoreSpec(
            model=str(model_folder),
            data=str(data_file),
            estimator="monte-carlo",
            sigma=1e-3,
            draws="auto",
            tolerance=tolerance,
        )
        table = score(spec, tmp_path / f"{tolerance}.parquet", HERE, progress=False).table
        (counts[tolerance],) = set(table["draws"].to_pylist())
        assert np.median(table["mrd_stderr"].to_numpy() / table["mrd"].to_numpy()) <= tolerance
        # In steps of 25.
        assert 0.6 < counts[tolerance] / (0.756 / tolerance) ** 2 < 2
    assert counts[0.15] < counts[0.06]


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")
def test_tofu(tmp_path: Path) -> None:
    spec = ScoreSpec(
        model=str(DATA / "models" / "stories260K-hf"),
        data=str(DATA / "tofu" / "forget10.json"),
        estimator="gradient",
    )
    result = score(spec, tmp_path / "tofu.parquet", HERE, progress=False)
    assert result.rejected == []
    assert result.table["sample_id"].to_pylist() == [str(number) for number in range(400)]
    assert (result.table["mrd"].to_numpy() > 0).all()
    # A model of children's stories is surprised by every answer: over a nat a token.
    assert (result.table["nll"].to_numpy() / result.table["num_tokens"].to_numpy() > 1).all()
