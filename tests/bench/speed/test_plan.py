"""Plans: sums by hand with round constants, and what is refused. How far they are from runs, `benchmark plan` says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.cli import main
from bench.speed.calibration import fit
from bench.speed.plan import PlannedJob, Profile, Shape, UnitCost, calls_of, find_profile, memory_of, plan, profiles
from scoring.errors import UserError
from tests.paths import ROOT

SHAPE = Shape(params=1e6, layers=2, hidden=100, vocabulary=1000)
# A forward pass at 1 GFLOP/s and 1 ms a layer; the others 2, 10 and 3 times as dear.
PROFILE = Profile(
    name="round",
    hardware="a round machine",
    measured=True,
    costs={
        "forward": UnitCost(1e-3, 1e-7, 1e-9, 8.0, 4.0, 1.0),
        "gradient": UnitCost(2e-3, 2e-7, 2e-9, 20.0, 4.0, 2.0),
        "curvature": UnitCost(10e-3, 10e-7, 10e-9, 16.0, 4.0, 4.0),
        "training": UnitCost(3e-3, 3e-7, 3e-9, 20.0, 4.0, 2.0),
        "decoding": UnitCost(4e-3, 4e-7, 4e-9, 8.0, 4.0, 1.0, weight=1e-9),
    },
    noise=1e-9,
    update=2e-9,
    start=5.0,
    load=1e-6,
    task=0.01,
    sharing=0.5,
    memory=1e9,
)
# 100 samples of 40 tokens: 4,000 tokens, 10 batches of 10.
JOB = PlannedJob(SHAPE, samples=100, tokens=40, scored=10, batch_tokens=400)
# 2 (1e6 - 2e5) weights of the layers and 4 * 40 * 100 * 2 of attention for each token; 2 * 1e5 for each that is scored.
FLOPS = 4000 * (2 * 8e5 + 32_000) + 1000 * 2e5
# 100 units in 2 layers, and logits of the scored.
WIDTHS = 4000 * 200 + 1000 * 1000
# Of all samples, at the forward pass's price.
PASS = 1e-7 * WIDTHS + 1e-9 * FLOPS


def seconds_of(job: PlannedJob, devices: int = 1, profile: Profile = PROFILE) -> dict[str, float]:
    return plan(job, profile, devices).parts


def test_forward_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=500,
            hidden_size=64,
            intermediate_size=171,
            num_hidden_layers=3,
            num_attention_heads=2,
            attn_implementation="eager",
        )
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(5, 30, dtype=torch.long), use_cache=False)
    shape = Shape.of_model(model)
    assert shape.forward_flops(150, 150, 30) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_shape_of_a_size() -> None:
    for params, layers, hidden in ((1e9, 16, 2048), (7e9, 32, 4096), (70e9, 80, 8192)):
        shape = Shape.of_size(params)
        assert shape.layers == pytest.approx(layers, rel=0.3)
        assert shape.hidden == pytest.approx(hidden, rel=0.3)
        assert 12 * shape.layers * shape.hidden**2 + 2 * shape.vocabulary * shape.hidden == pytest.approx(
            params, rel=0.02
        )


def test_gradient_by_hand() -> None:
    assert seconds_of(JOB) == {
        "gradient passes": pytest.approx(10 * 2 * 2e-3 + 2 * PASS),
        # A task for each batch.
        "scheduling": pytest.approx(10 * 0.01),
        # 4e6 bytes of weights.
        "start": pytest.approx(5 + 4.0),
    }


def test_monte_carlo_by_hand() -> None:
    """10 batches are one shard; 20 draws are two tasks. Every draw writes all weights once."""
    parts = seconds_of(dataclasses.replace(JOB, estimator="monte-carlo", draws=20))
    assert parts["forward passes"] == pytest.approx(21 * (10 * 2 * 1e-3 + PASS))
    assert parts["noise"] == pytest.approx(20 * 1e6 * 1e-9)
    assert parts["scheduling"] == pytest.approx(2 * 0.01)
    assert calls_of(dataclasses.replace(JOB, estimator="monte-carlo").checked()).count["forward"] == 2010


def test_the_other_estimators_by_hand() -> None:
    parts = seconds_of(dataclasses.replace(JOB, estimator="antithetic", draws=5))
    assert parts["forward passes"] == pytest.approx((2 * 5 + 1 + 2) * (10 * 2 * 1e-3 + PASS))
    assert parts["noise"] == pytest.approx(2 * 5 * 1e6 * 1e-9)
    parts = seconds_of(dataclasses.replace(JOB, estimator="curvature"))
    assert parts["curvature passes"] == pytest.approx(8 * (10 * 2 * 10e-3 + 10 * PASS))


def test_unlearning_by_hand() -> None:
    """100 samples, 4 an update, for 3 epochs: 75 updates, each of two calls."""
    parts = seconds_of(dataclasses.replace(JOB, estimator=None, epochs=3, retained=1))
    assert parts["training passes"] == pytest.approx(150 * 2 * 3e-3 + 2 * 3 * 3 * PASS)
    assert parts["updates"] == pytest.approx(75 * 1e6 * 2e-9)
    assert "scheduling" not in parts


def test_evaluation_by_hand() -> None:
    """Two rounds of 50 texts, in 5 batches each, and as many answers of 5 tokens after 30, each round in one batch."""
    job = dataclasses.replace(JOB, estimator=None, reads=100, answers=100, rounds=2, new_tokens=5)
    reading = 10 * 2 * 1e-3 + PASS
    before = 2 * 2 * 1e-3 + 1e-7 * (3000 * 200 + 100 * 1000) + 1e-9 * (3000 * (2 * 8e5 + 24_000) + 100 * 2e5)
    steps = 10 * (2 * 4e-3 + 1e6 * 1e-9)
    written = steps + 4e-7 * (500 * 200 + 500 * 1000) + 4e-9 * (500 * (2 * 8e5 + 26_000) + 500 * 2e5)
    parts = seconds_of(job)
    assert parts["evaluation"] == pytest.approx(reading + before + written)
    assert parts["scheduling"] == pytest.approx((10 + 2) * 0.01)
    # Three tasks each on four replicas, which keep half of their speed.
    assert seconds_of(job, 4)["evaluation"] == pytest.approx(parts["evaluation"] / 2)
    # The weights, and the greater of a batch that is read and of the keys and values of 50 answers.
    kept = max(8 * 400 * 100 + 4 * 100 * 1000, 8 * 50 * 35 * 200 + 4 * 50 * 1000)
    assert memory_of(job.checked(), PROFILE) == pytest.approx(4e6 + kept)
    # A profile from before decoding was measured.
    early = dataclasses.replace(PROFILE, costs={k: v for k, v in PROFILE.costs.items() if k != "decoding"})
    assert seconds_of(job, profile=early)["evaluation"] < parts["evaluation"]


def test_looks_and_refreshes_by_hand() -> None:
    """Four looks of 10 batches; 100 continuations of 20 tokens after 20, 100 at once; MRD twice."""
    trained = dataclasses.replace(JOB, estimator=None, epochs=3, retained=1)
    job = dataclasses.replace(trained, looks=4, refreshes=2)
    parts = seconds_of(job)
    assert parts["checks"] == pytest.approx(40 * 2 * 1e-3 + 4 * PASS)
    assert parts["refreshes"] == pytest.approx(20 * 2 * 2e-3 + 2 * 2 * PASS)
    assert parts["training passes"] == seconds_of(trained)["training passes"]
    by_el = seconds_of(dataclasses.replace(job, continuations=400))["checks"] - parts["checks"]
    before = 40 * 2 * 1e-3 + 4 * PASS
    steps = 4 * 20 * (2 * 4e-3 + 1e6 * 1e-9)
    written = steps + 4e-7 * (8000 * 200 + 8000 * 1000) + 4e-9 * (8000 * (2 * 8e5 + 24_000) + 8000 * 2e5)
    assert by_el == pytest.approx(before + written)


def test_training_that_fits_on_no_device_is_sharded() -> None:
    """16 MB of weights, gradients and moments on devices of 9 MB: a quarter each, a layer of 2 MB with its gradient,
    and the activations of 40 tokens."""
    job = dataclasses.replace(JOB, estimator=None, epochs=1, batch_tokens=40)
    small = dataclasses.replace(PROFILE, memory=1e7)
    found = plan(job, small, 4)
    assert (found.strategy, found.devices, found.replicas) == ("fsdp", 4, 1)
    assert found.memory == pytest.approx(4e6 + 4e6 + 20 * 40 * 200 + 4 * 10 * 1000)
    # 25 updates of two calls each, which every worker makes, on a sample each; a quarter of the weights is moved.
    assert found.parts["training passes"] == pytest.approx((50 * 2 * 3e-3 + 2 * 3 * PASS / 4) / 0.5)
    assert found.parts["updates"] == pytest.approx(25 * 1e6 * 2e-9 / 4 / 0.5)
    with pytest.raises(UserError, match=r"training needs .* on each of 3 x .* by fsdp, .*: take 4 of them"):
        plan(job, small, 3)
    # Where it fits, whole models: no more than four of eight workers have a sample of an update.
    found, alone = plan(job, PROFILE, 8), plan(job, PROFILE, 1)
    assert (found.strategy, found.devices, found.replicas) == ("ddp", 1, 8)
    assert found.parts["training passes"] == pytest.approx((50 * 2 * 3e-3 + 2 * 3 * PASS / 4) / 0.5)
    assert found.parts["updates"] == pytest.approx(alone.parts["updates"] / 0.5)


def test_each_dtype_has_its_own_speed() -> None:
    faster = {kind: dataclasses.replace(cost, flop=cost.flop / 8) for kind, cost in PROFILE.costs.items()}
    both = dataclasses.replace(PROFILE, other_dtypes={"bfloat16": faster})
    in_bf16 = dataclasses.replace(JOB, dtype="bfloat16")
    slow, fast = (seconds_of(job, profile=both)["gradient passes"] for job in (JOB, in_bf16))
    assert slow - fast == pytest.approx(7 / 8 * 2e-9 * FLOPS)
    assert seconds_of(in_bf16)["gradient passes"] == slow
    assert both.knows("bfloat16")
    assert not PROFILE.knows("bfloat16")


def test_measures_of_difficulty_by_hand() -> None:
    """Flip time: 4 forward passes, a call for each of 100 samples, and an update; nll: 1 for each of 10 batches."""
    forecast = dataclasses.replace(JOB, estimator=None, measure=("flip-time",))
    parts = seconds_of(forecast)
    assert parts["forward passes"] == pytest.approx(4 * (100 * 2 * 1e-3 + PASS))
    assert parts["updates"] == pytest.approx(100 * 1e6 * 2e-9)
    assert parts["scheduling"] == pytest.approx(10 * 0.01)
    both = dataclasses.replace(forecast, measure=("flip-time", "nll"))
    assert seconds_of(both)["forward passes"] - parts["forward passes"] == pytest.approx(10 * 2 * 1e-3 + PASS)
    # h = 3: 4 at first, and two gradients and a look on the way.
    assert dataclasses.replace(forecast, lookahead=3).measure_costs() == {"flip-time": 4 + 3 * 2 + 1}
    assert seconds_of(dataclasses.replace(forecast, measure=("length",))).keys() == {"scheduling", "start"}
    # Weights, their copy, gradients and the update; 40 tokens of one sample in 2 layers, and its 10 logits.
    assert memory_of(forecast.checked(), PROFILE) == pytest.approx(4 * 4e6 + 20 * 40 * 200 + 4 * 10 * 1000)
    together = dataclasses.replace(forecast, measure=("joint-forecast",))
    assert memory_of(together.checked(), PROFILE) == pytest.approx(4 * 4e6 + 20 * 400 * 200 + 4 * 100 * 1000)
    assert seconds_of(together)["scheduling"] == pytest.approx(0.01)
    assert memory_of(dataclasses.replace(forecast, measure=("nll",)).checked(), PROFILE) == pytest.approx(
        4e6 + 8 * 400 * 100 + 4 * 100 * 1000
    )


def test_replicas_share_the_work() -> None:
    """Two keep half of their speed each here; of ten tasks three replicas do four, three and three."""
    alone, two, three = (seconds_of(JOB, devices) for devices in (1, 2, 3))
    assert two["gradient passes"] == pytest.approx(alone["gradient passes"])
    assert three["gradient passes"] == pytest.approx(alone["gradient passes"] / (3 * 0.5 * (10 / 3 / 4)))
    assert alone["start"] == two["start"] == three["start"]


def test_memory_by_hand() -> None:
    # 400 tokens in 2 layers of 100, and 1,000 logits of each of the 100 that are scored.
    active = 20 * 400 * 100 * 2 + 4 * 100 * 1000
    assert memory_of(JOB.checked(), PROFILE) == pytest.approx(2 * 4e6 + active)
    drawn = dataclasses.replace(JOB, estimator="monte-carlo").checked()
    shallow = 8 * 400 * 100 + 4 * 100 * 1000
    assert memory_of(drawn, PROFILE) == pytest.approx(4e6 + 4e6 + shallow)
    pairs = dataclasses.replace(JOB, estimator="antithetic").checked()
    assert memory_of(pairs, PROFILE) == pytest.approx(4e6 + 8e6 + 2 * shallow)
    taught = dataclasses.replace(JOB, estimator=None, epochs=1).checked()
    assert memory_of(taught, PROFILE) == pytest.approx(16e6 + active)


def test_a_model_larger_than_a_device_takes_several() -> None:
    small = dataclasses.replace(PROFILE, memory=5e6)
    found = plan(JOB, small, 8)
    assert found.memory == pytest.approx(8e6 + 20 * 400 * 200 + 4 * 100 * 1000)
    # 10 MB, of which a device has 4.5.
    assert (found.devices, found.replicas) == (3, 2)
    with pytest.raises(UserError, match=r"a replica needs .* which is 3 of a round machine; there are 2"):
        plan(JOB, small, 2)


def test_costs_are_found_again() -> None:
    rows = np.array(
        [(layers, flops, 2e-3 * layers + 3e-10 * flops) for layers, flops in ((2, 1e6), (6, 1e8), (4, 1e9))]
    )
    assert fit(rows) == pytest.approx((2e-3, 3e-10))


def test_profiles(tmp_path: Path) -> None:
    known = profiles()
    assert known["cpu-core"].measured
    assert not known["h100"].measured
    kept = tmp_path / "here.json"
    kept.write_text(json.dumps({"profile": dataclasses.asdict(PROFILE)}))
    assert find_profile(str(kept)) == PROFILE
    # As earlier versions wrote them.
    early = dataclasses.asdict(PROFILE)
    del early["dtype"], early["other_dtypes"], early["costs"]["decoding"]
    for cost in early["costs"].values():
        del cost["weight"]
    kept.write_text(json.dumps({"profile": early}))
    assert find_profile(str(kept)).cost("decoding", "float32") == PROFILE.costs["forward"]  # 8 bytes: a key and a value


def test_the_checks_that_are_kept_are_within_30_percent() -> None:
    """Of the committed run of the benchmark: seconds, and bytes."""
    figures = json.loads((ROOT / "results" / "benchmark" / "plan-2-cores.json").read_text())
    seconds = [check["planned"] / check["measured"] for check in figures["checks"]]
    sizes = [c["planned_bytes"] / c["measured_bytes"] for c in figures["checks"] if c["measured_bytes"]]
    assert len(seconds) >= 6
    assert all(0.7 <= ratio <= 1.3 for ratio in [*seconds, *sizes])
    # The profile that comes along is the one that was measured then.
    commands = json.loads((ROOT / "results" / "benchmark" / "plan-commands-2-cores.json").read_text())
    assert all(0.75 <= check["planned"] / check["measured"] <= 1.25 for check in commands["checks"])
    kept = Profile.read(figures["profile"]).costs
    # Decoding and second derivatives by series were measured with the commands.
    kept |= {kind: Profile.read(commands["profile"]).costs[kind] for kind in ("decoding", "curvature")}
    for kind, cost in profiles()["cpu-core"].costs.items():
        assert dataclasses.astuple(cost) == pytest.approx(dataclasses.astuple(kept[kind]), rel=1e-3)


def test_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    command = "plan --model-params 7e9 --samples 1e6 --estimator monte-carlo --gpus 16 --price 3"
    assert main(command.split()) == 0
    said = capsys.readouterr().out
    assert "1,000,000 samples of 100 tokens, a model of 7 G weights: monte-carlo with 200 draws" in said
    assert "limit   forward passes: see --estimator gradient" in said
    assert "at 3 an hour and device" in said
    assert "h100 is from its data sheet and was not measured" in said
    assert "on 16 replica(s) of 1 x H100 80 GB, float32" in said
    train = ["plan", "--model-params", "7e9", "--samples", "4e3", "--command", "train", "--dtype", "bfloat16"]
    assert main([*train, "--gpus", "3"]) == 0
    said = capsys.readouterr().out
    assert "on 3 x H100 80 GB, bfloat16; fsdp: weights, gradients and moments are split over all" in said
    assert "training for 5 epochs, then 6 looks at MA, then evaluation of 144 texts and 144" in said
    assert "bfloat16 was not measured" not in said
    assert main([*train, "--gpus", "2", "--model-params", "1e8", "--profile", "cpu-core"]) == 0
    said = capsys.readouterr().out
    assert "ddp: a whole model on each" in said
    assert "note: bfloat16 was not measured on cpu-core: the speed is that of float32" in said
    measures = "--estimator none --measure flip-time,joint-forecast --lookahead 2"
    assert main(["plan", "--model-params", "1e6", "--samples", "100", *measures.split()]) == 0
    said = capsys.readouterr().out
    assert "flip-time at 8 forward passes a sample, then joint-forecast at 8 forward passes a sample" in said
    assert "note: flip-time: a sample at a time" in said
    assert "note: joint-forecast: the work of one replica" in said
    assert main(["plan", "--model-params", "1e6", "--samples", "100", "--profile", "cpu-core", "--gpus", "2"]) == 0
    assert "was not measured" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--samples 0", "--samples is 0: expected a number from 1 to 1e+18"),
        ("--samples 1e4 --scored 200", "--scored is 200: expected at most --tokens, 100"),
        ("--samples 1e4 --estimator gradiant", "--estimator is 'gradiant': expected one of"),
        ("--samples 1e4 --measure flip-tim", "'flip-tim'"),
        ("--samples 1e4 --lookahead 0", "--lookahead is 0: expected a whole number from 1 to 1e+09"),
        ("--samples 1e4 --profile h10", "unknown profile 'h10': expected one of"),
        ("--samples 1e4 --profile none.json", "profile 'none.json' cannot be read"),
        ("--samples 1e4 --gpus 0", "--gpus is 0: expected a whole number from 1 to 1e+09"),
        ("--samples 1e4 --model-params 5", "--model-params is 5: expected a number of weights"),
        ("--samples 1e4 --model-params 7e11 --gpus 4", "a replica needs"),
        ("--samples 1e4 --dtype float8", "--dtype is 'float8': expected one of"),
        ("--samples nan", "--samples is nan: expected a finite number from 1 to 1e+18"),
        ("--samples 1e308", "--samples is 1e308: expected a number from 1 to 1e+18"),
        ("--samples 1e4 --model-params inf", "--model-params is inf: expected a finite number greater than 0"),
        ("--samples 1e4 --price=-inf", "--price is -inf: expected a finite number from 0"),
        ("--samples 1e4 --new-tokens nan", "--new-tokens is nan: expected a finite number from 0"),
        ("--samples 1e4 --model-params 70e9 --command train --gpus 64", "training needs"),
        ("--samples 1e4 --epochs -1", "--epochs is -1: expected a number from 0 to 1e+09"),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    given = flags if "--model-params" in flags else f"--model-params 1e9 {flags}"
    assert main(["plan", *given.split()]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
