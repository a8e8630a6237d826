"""What must hold on every device: on CPUs, and on CUDA where there is one (`make gpu-check`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import algorithms
from bench.cli import main
from scoring.generation import greedy_continuations
from scoring.load import load_model
from scoring.mrd import Request, estimate, reduce_draws
from scoring.perturbation import Perturbation, fill_gaussian_
from scoring.replica import LostPerturbation, TransformersReplica
from scoring.sample_gradients import autograd_norms, log_abs_logprob
from scoring.samples import make_batches
from tests.tiny_folders import pairs, save_model, tokenizer, write_jsonl
from tests.tiny_models import random_samples, tiny_model

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
)
DEVICES = ["cpu", CUDA]
BATCHES = make_batches(random_samples(16), 100)


def replica(device: str, dtype: torch.dtype = torch.float32) -> TransformersReplica:
    model = tiny_model("llama", tied=True)
    return TransformersReplica(model.to(device, dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_made_where_the_weights_are(device: str) -> None:
    """Of unit variance and zero mean, the same every time, and in the weights themselves: no second tensor of it."""
    model = torch.nn.Linear(1000, 1000, bias=False, device=device)
    base = model.weight.detach().clone()
    perturbation = Perturbation(model)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    perturbation.apply(1e-3, 5, 2)
    if device == "cuda":
        assert torch.cuda.max_memory_allocated() - before < base.nbytes / 2
    noise = (model.weight.detach() - base).double()
    assert noise.std().item() == pytest.approx(1e-3, rel=0.01)
    assert abs(noise.mean().item()) < 5e-6
    again = fill_gaussian_(torch.empty_like(base), 1e-3, 5, 2, "weight").add_(base)
    assert torch.equal(model.weight.detach(), again)
    perturbation.restore()
    assert torch.equal(model.weight.detach(), base)


@pytest.mark.parametrize("device", DEVICES)
def test_log_probs_are_those_of_fp64(device: str) -> None:
    ours = replica(device)
    (exact,) = ours.exact_logprobs(BATCHES[:1])
    got = ours.logprobs(BATCHES[0])
    torch.testing.assert_close(got.double(), exact.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_that_of_autograd_in_fp64(device: str, dtype: torch.dtype) -> None:
    ours = replica(device, dtype)
    got = estimate(ours, BATCHES, Request("gradient", 1e-5, 0)).values[:, 0]
    exact = replica(device, torch.float64)
    exact.model.load_state_dict({name: p.double() for name, p in ours.model.state_dict().items()})
    norms = [autograd_norms(exact.model, batch.to(exact.device), log_abs_logprob)[0] for batch in BATCHES]
    want = 1e-5 * np.sqrt(2 / np.pi) * torch.cat(norms).cpu().numpy()
    error = np.abs(got / want - 1)
    assert error.max() < (1e-4 if dtype == torch.float32 else 0.3)
    assert np.median(error) < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_monte_carlo_is_the_gradient_but_for_sampling(device: str) -> None:
    """TF32 would round the perturbation away, and the mean over many draws with it."""
    ours = replica(device)
    drawn = reduce_draws(estimate(ours, BATCHES, Request("monte-carlo", 1e-5, 0, 0, 300)).values, "mean_abs")[0]
    closed = estimate(ours, BATCHES, Request("gradient", 1e-5, 0)).values[:, 0]
    # 0.76 / sqrt(300) = 4.4 % for each sample.
    assert np.median(np.abs(drawn / closed - 1)) < 0.08
    assert ours.perturbation_survival == pytest.approx(1, abs=0.02)
    with pytest.raises(LostPerturbation):
        replica(device, torch.bfloat16).perturb(1e-5, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_the_other_statistic(device: str) -> None:
    ours = replica(device)
    curved = reduce_draws(estimate(ours, BATCHES, Request("curvature", 1e-3, 0, 0, 64)).values, "abs_mean")[0]
    paired = reduce_draws(estimate(ours, BATCHES, Request("antithetic", 1e-3, 0, 0, 64)).values, "abs_mean")[0]
    assert np.corrcoef(curved, paired)[0, 1] > 0.9


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_continuations_do_not_depend_on_the_device(device: str) -> None:
    prompts, limits = [sample.input_ids[:4] for sample in random_samples(8)], [10] * 8
    here = greedy_continuations(replica(device).model, prompts, limits, None)
    for one, two in zip(here, greedy_continuations(replica("cpu").model, prompts, limits, None), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "recipe",
    [
        {"algorithm": "NPO-GradDiff", "weights": "mrd", "alpha": 1.0, "refresh": 1},
        {"algorithm": "IdkDPO"},
        {"algorithm": "RMU", "layer": 1},
        {"algorithm": "UNDIAL", "gradient_checkpointing": True},
        {"algorithm": "GradDiff", "dtype": "bfloat16"},
    ],
    ids=lambda recipe: recipe["algorithm"],
)
def test_training_is_that_of_the_cpu(device: str, recipe: dict[str, Any]) -> None:
    def steps(on: str) -> pd.DataFrame:
        model: Any = tiny_model("llama", tied=True)
        settings = {"epochs": 1, "batch_size": 3, "learning_rate": 1e-4, "el_n": 8, "evaluate": False, **recipe}
        # Several micro-batches an update, and looks at which samples are forgotten.
        forgotten = algorithms.unlearn(
            model.to(on), tokenizer(), pairs(6), pairs(6, seed=1), stopping="paper", batch_tokens=24, **settings
        )
        assert {p.device.type for p in forgotten.model.parameters()} == {on}
        return forgotten.steps

    there, here = steps(device), steps("cpu")
    assert list(there["samples"].map(list)) == list(here["samples"].map(list))
    for name in ("forget_loss", "retain_loss", "gradient_norm"):
        tolerance = 0.05 if recipe.get("dtype") else 1e-3
        np.testing.assert_allclose(there[name].astype(float), here[name].astype(float), rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_score(device: str, cluster: None, tmp_path: Path) -> None:
    """Through Ray, on a GPU where there is one, and as a replica in this process has it on a CPU."""
    folder, data = save_model(tmp_path / "model"), write_jsonl(tmp_path / "data.jsonl", pairs(12))
    command = f"score --model {folder} --data {data} --estimator gradient --replicas 1 --out {tmp_path / 'out.parquet'}"
    assert main([*command.split(), "--gpus-per-replica", "1" if device == "cuda" else "0"]) == 0
    table = pq.read_table(tmp_path / "out.parquet")
    from bench.models.find import find_model
    from bench.tasks.datasets import load_dataset
    from scoring.samples import encode

    samples, _ = encode(load_dataset(str(data)).texts, find_model(str(folder)).tokenizer, 64)
    here = TransformersReplica(load_model(folder))
    draws = estimate(here, make_batches(samples, 4096), Request("gradient", 1e-5, 0))
    want = draws.values[np.argsort(draws.indices), 0]
    np.testing.assert_allclose(table["mrd"].to_numpy(), want, rtol=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs")
def test_a_replica_of_several_gpus(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    spread = TransformersReplica(load_model(folder, device="auto"))
    alone = TransformersReplica(load_model(folder, device="cuda"))
    for batch in BATCHES:
        torch.testing.assert_close(spread.logprobs(batch), alone.logprobs(batch), rtol=1e-5, atol=1e-5)
    drawn = [estimate(each, BATCHES, Request("monte-carlo", 1e-3, 0, 0, 5)).values for each in (spread, alone)]
    np.testing.assert_allclose(*drawn, rtol=1e-2)


@pytest.mark.slow
def test_the_benchmark_of_cards_runs_on_a_cpu_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    command = f"benchmark gpu --model-params 2e5 --samples 6 --tokens 16 --draws 20 --out {out}"
    assert main(command.split()) == 0
    figures = json.loads(out.read_text())
    assert set(figures["rows"]) == {"gradient, float32", "monte-carlo, float32", "gradient, bfloat16"}
    assert all(row["share"] > 0 and row["seconds"] > 0 for row in figures["rows"].values())
    assert "gradient is" in capsys.readouterr().out
    assert main(["benchmark", "gpu", "--samples", "1"]) == 2
    assert "--samples is 1: expected at least 2" in capsys.readouterr().err
