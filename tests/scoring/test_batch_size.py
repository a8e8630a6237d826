"""Batches that fill a memory: predicted from small ones, against what large ones really take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bench.cli import main
from bench.files.score_file import FACTS_KEY
from scoring.batch_size import (
    LEAST_TOKENS,
    MOST_TOKENS,
    USABLE_SHARE,
    BatchSizeTask,
    Measured,
    fastest_tokens,
    fitting_tokens,
    free_bytes,
    measure_batches,
    peak_bytes,
)
from scoring.mrd import Request, estimate
from scoring.replica import TransformersReplica
from scoring.samples import Sample, collate, make_batches
from tests.tiny_models import VOCABULARY, tiny_model

LENGTH = 32


def peak_of(replica: TransformersReplica, estimator: str, tokens: int) -> float:
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, VOCABULARY, LENGTH) for _ in range(tokens // LENGTH)]
    batch = collate([Sample(str(i), row, np.arange(LENGTH) > 0, i) for i, row in enumerate(rows)])
    return peak_bytes(lambda: estimate(replica, [batch], Request(estimator, 1e-5, 0, 0, 1)), replica.device)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["gradient", "monte-carlo", "antithetic", "curvature"])
def test_what_is_found_fits_and_twice_as_much_would_not(estimator: str) -> None:
    replica = TransformersReplica(tiny_model())  # type: ignore[arg-type]
    free = peak_of(replica, estimator, 3000) / USABLE_SHARE
    tokens = fitting_tokens(*measure_batches(replica, estimator, LENGTH), free)
    # 3,000 fit, so the power of two below does.
    assert tokens == 2048
    assert peak_of(replica, estimator, tokens) <= USABLE_SHARE * free
    assert peak_of(replica, estimator, 2 * tokens) > USABLE_SHARE * free


def test_the_ends() -> None:
    small, large = Measured(500, 1.5, 1e6), Measured(2000, 3.0, 4e6)
    assert fitting_tokens(small, large, 1.0) == LEAST_TOKENS
    assert fitting_tokens(small, large, 1e15) == MOST_TOKENS
    # A second for the batch and 1 ms for each token: 19,000 tokens until the second is a twentieth; then 2^15.
    assert fastest_tokens(small, large) == 32768
    # No faster for each token, or slower: the smaller one.
    assert fastest_tokens(small, Measured(2000, 6.0, 4e6)) == fastest_tokens(small, Measured(2000, 9.0, 4e6)) == 512
    assert free_bytes(torch.device("cpu")) > 1e8
    # An engine that cuts its own batches.
    assert BatchSizeTask("monte-carlo", LENGTH).do(object(), [], {}) == 4096


def test_little_of_a_batch_is_padding() -> None:
    """A fifth, or an eighth of what a batch may have; and every sample is in one batch."""
    rng = np.random.default_rng(0)
    for most in (1, 64, 600):
        lengths = rng.integers(2, 90, 70)
        samples = [Sample(str(i), rng.integers(0, 9, n), np.arange(n) > 0, i) for i, n in enumerate(lengths)]
        batches = make_batches(samples, most)
        assert sorted(i for batch in batches for i in batch.indices.tolist()) == list(range(70))
        for batch in batches:
            padded, used = batch.input_ids.numel(), int(batch.lengths.sum())
            assert len(batch) == 1 or padded <= most
            assert padded - used <= max(0.2 * padded, most / 8)
    # Eight of 10 tokens and one of 20: 80 of 180 would be padding. One of 10 and one of 20: 10 of 40, as an eighth may.
    alone, together = (
        [Sample("a", np.ones(n, int), np.arange(n) > 0, i) for i, n in enumerate(ns)]
        for ns in ([10] * 8 + [20], [10, 20])
    )
    assert [len(batch) for batch in make_batches(alone, 200)] == [8, 1]
    assert [len(batch) for batch in make_batches(together, 200)] == [2]


def test_score(cluster: None, model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """The same scores, and the file says how large its batches were."""
    tables = {}
    for size in ("auto", "4096"):
        out = tmp_path / f"{size}.parquet"
        command = f"score --model {model_folder} --data {data_file} --estimator gradient --replicas 1 --out {out}"
        assert main([*command.split(), "--batch-tokens", size]) == 0
        tables[size] = pq.read_table(out)
    tokens = json.loads(tables["auto"].schema.metadata[FACTS_KEY])["batch_tokens"]
    assert LEAST_TOKENS <= tokens <= MOST_TOKENS
    assert tokens & (tokens - 1) == 0
    assert json.loads(tables["4096"].schema.metadata[FACTS_KEY])["batch_tokens"] == 4096
    np.testing.assert_allclose(tables["auto"]["mrd"].to_numpy(), tables["4096"]["mrd"].to_numpy(), rtol=1e-5)


def test_a_run_that_is_continued_keeps_its_batches(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier start found is not found again: the memory may be another's by now."""
    out = tmp_path / "scores.parquet"
    command = f"score --model {model_folder} --data {data_file} --estimator gradient --replicas 0 --out {out}".split()

    def stopped(*_: object, **__: object) -> None:
        # After the first part, as a kill would.
        (tmp_path / "scores.parquet.parts" / "kept.parquet").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("bench.jobs.score.run_tasks", stopped)
        assert main([*command, "--batch-tokens", "auto"]) == 130
    (tmp_path / "scores.parquet.parts" / "kept.parquet").unlink()
    (tmp_path / "scores.parquet.parts" / "batch_tokens").write_text("512")
    assert main([*command, "--batch-tokens", "auto"]) == 0
    assert json.loads(pq.read_table(out).schema.metadata[FACTS_KEY])["batch_tokens"] == 512


def test_refused(model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"score --model {model_folder} --data {data_file} --out {tmp_path / 'x.parquet'} --batch-tokens".split()
    assert main([*command, "0"]) == 2
    assert "--batch-tokens is 0: expected a whole number of at least 1, or auto" in capsys.readouterr().err
    assert main([*command, "many"]) == 2
    assert "--batch-tokens is 'many': expected a whole number of at least 1, or auto" in capsys.readouterr().err
