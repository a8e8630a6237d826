"""The benchmark measures what it says it measures; its speeds are read, not asserted."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from bench.cli import main
from bench.speed.scoring import algorithm_1
from scoring.logprob import scored_logprobs
from scoring.memory import TensorMemory
from scoring.mrd import Request, estimate
from scoring.replica import TransformersReplica
from scoring.samples import collate, make_batches
from tests.tiny_models import random_samples, tiny_model

MEGA = 1 << 20


def test_tensor_memory_by_hand():
    with TensorMemory() as memory:
        kept = torch.zeros(MEGA)  # 4 MiB
        view = kept.view(2, -1)  # no memory of its own
        assert memory.live == 4 * MEGA
        large = torch.cat([kept, kept])  # 8 MiB more
        assert (memory.live, memory.peak) == (12 * MEGA, 12 * MEGA)
        del large
        assert (memory.live, memory.peak) == (4 * MEGA, 12 * MEGA)
        view.add_(1)  # in place
    assert memory.peak == 12 * MEGA


def test_monte_carlo_needs_two_copies_of_the_weights_and_one_batch():
    model = tiny_model("llama")
    batches = make_batches(random_samples(40), 100)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with TensorMemory() as one_batch, torch.no_grad():
        for batch in batches:
            scored_logprobs(model, batch)
    with TensorMemory() as memory:
        memory.count(*model.parameters())
        result = estimate(TransformersReplica(model), batches, Request("monte-carlo", 1e-4, 0, 0, 3))
    # What is kept for the result: log-probs of every scored token, and numbers per sample.
    kept = sum(b.mask.numel() * 4 for b in batches) + result.values.nbytes
    assert memory.peak <= 2 * weights + one_batch.peak + kept + 4096
    assert memory.peak >= 2 * weights


@pytest.mark.slow
@pytest.mark.parametrize("hoist", [False, True])
def test_algorithm_1_estimates_the_same_as_the_closed_form(hoist: bool):
    replica = TransformersReplica(tiny_model("llama"))
    samples = random_samples(6)
    before = copy.deepcopy(replica.model.state_dict())
    torch.manual_seed(0)
    got = algorithm_1(replica, samples, 1e-5, 200, hoist)
    closed = estimate(replica, [collate(samples)], Request("gradient", 1e-5, 0)).values[:, 0]
    # The relative standard error of 200 draws is 0.756 / sqrt(200).
    assert np.all(np.abs(got / closed - 1) <= 4 * 0.756 / math.sqrt(200))
    assert all(torch.equal(value, before[name]) for name, value in replica.model.state_dict().items())


def test_the_command_prints_ratios_and_writes_figures(cluster, model_folder, data_file, tmp_path, capsys):
    out = tmp_path / "figures.json"
    arguments = ["--model", str(model_folder), "--data", str(data_file), "--draws", "8", "--out", str(out)]
    assert main(["benchmark", "scoring", *arguments]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(out.read_text())
    rows = figures["one_thread"]
    assert set(rows) == {"a", "a_hoisted", "b", "c", "curvature", "antithetic"}
    ratio = rows["b"]["seconds"] / rows["c"]["seconds"]
    assert f"(c) is {ratio:.1f} x faster than (b)" in printed
    assert (rows["a"]["forwards"], rows["b"]["forwards"], rows["c"]["forwards"]) == (16, 9, 1)
    assert rows["c"]["error"] < 1e-5
    assert 0 < figures["share_of_matmul_peak"] < 1.5


def test_statistics(tmp_path, capsys):
    out = tmp_path / "statistics.json"
    assert main(f"benchmark statistics --replications 10 --out {out}".split()) == 0
    printed = capsys.readouterr().out
    rows = {row["case"]: row for row in json.loads(out.read_text())["cases"]}
    shared = rows["no selection effect, shared seeds, normal, 10 × 40 × 4"]
    assert shared["now"]["value"] < 0.5 < shared["before"]["value"]
    missing = "mean of an algorithm, hard selections fail, normal, 4 × 40 × 2"
    for name in ("selections needed, 10 × 12 × 2", "selections needed by two neighbours, 10 × 12 × 2", missing):
        assert rows[name]["before"]["value"] < 0.5 < rows[name]["now"]["value"]
    outliers = rows["share within an algorithm, 10 % outliers, 10 × 12 × 3"]
    assert outliers["before"]["value"] < 0.8 < outliers["now"]["value"]
    for name, row in rows.items():
        assert name in printed
        assert row["replications"] == 10


def test_experts(tmp_path, capsys):
    out = tmp_path / "experts.json"
    before = torch.get_num_threads()
    try:
        assert main(f"benchmark experts --experts 4,8 --samples 3 --turns 2 --out {out}".split()) == 0
    finally:
        torch.set_num_threads(before)
    figures = json.loads(out.read_text())
    printed = capsys.readouterr().out
    for experts in ("4", "8"):
        row = figures[experts]
        assert 0 < row["largest_error"] < 1e-5
        assert f"{row['ratio']['value']:.2f}" in printed
    # Four layers, three matrices of 256 x 96 an expert and its row in the router.
    assert figures["8"]["weights"] - figures["4"]["weights"] == 4 * 4 * (3 * 256 * 96 + 256)
