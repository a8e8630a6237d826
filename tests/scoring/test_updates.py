"""Trial updates against torch's own optimisers, and that they leave no trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from scoring.errors import UserError
from scoring.flip_time import Forecaster, Outputs, gradient_ascent
from scoring.samples import collate
from scoring.updates import (
    Direction,
    TrialUpdates,
    UpdateSettings,
    clip_gradients,
    gradients_put_aside,
    make_optimizer,
)
from tests.scoring.toys import LEARNT, bigram, memorised_model, sample
from tests.tiny_models import random_samples, tiny_model

BATCH = collate(random_samples(3))
# So high that the change of the weights has as many digits as the weights.
RATE = 0.5


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_bitwise(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def differentiate(model: Any) -> None:
    """Gradients of some loss, by transformers alone."""
    model(input_ids=BATCH.input_ids, labels=BATCH.input_ids).loss.backward()


def norm(tensors: Any) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


# The norm of the gradient is 2.4: it is clipped, or not.
@pytest.mark.parametrize("clip", [None, 0.3, 100.0])
@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_the_direction_is_the_first_step_of_torch(name: Any, decay: float, clip: float | None) -> None:
    """Of GPT-2 in fp64, a layer of it frozen; by torch.optim's own code for single tensors."""
    model: Any = tiny_model("gpt2").double()
    model.transformer.h[0].requires_grad_(False)
    stepped = copy.deepcopy(model)
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adafactor": torch.optim.Adafactor}
    optimizer: Any = kinds[name](stepped.parameters(), lr=RATE, weight_decay=decay, foreach=False)
    differentiate(stepped)
    length = torch.nn.utils.clip_grad_norm_(stepped.parameters(), clip or math.inf).item()
    assert 0.3 < length < 100
    optimizer.step()

    settings = UpdateSettings(optimizer=name, learning_rate=RATE, weight_decay=decay, clip_norm=clip)
    trial = TrialUpdates(model, settings)
    before = weights(model)
    differentiate(model)
    direction = trial.take_direction()
    assert_bitwise(weights(model), before)
    assert all(p.grad is None for p in model.parameters())
    expected = {key: p.detach() - before[key] for key, p in stepped.named_parameters() if p.requires_grad}
    assert set(direction.change) == set(expected)
    assert not any(key.startswith("transformer.h.0.") for key in direction.change)
    error = norm(change - expected[key] for key, change in direction.change.items())
    assert error <= 1e-12 * norm(expected.values())
    assert direction.length == pytest.approx(norm(expected.values()), rel=1e-12)

    # The optimiser that truths are found by takes the same step.
    differentiate(model)
    assert clip_gradients(trial.parameters, clip) == pytest.approx(length, rel=1e-12)
    make_optimizer(trial.parameters, name, RATE, decay).step()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), dict(stepped.named_parameters())[key].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_the_direction_of_moments_in_8_bits(decay: float) -> None:
    """The first step of bitsandbytes, of a matrix with moments of 8 bits and of a vector, whose moments stay fp32."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer: Any = torch.nn.Linear(128, 64)
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    stepped = copy.deepcopy(layer)
    for p, q in zip(stepped.parameters(), layer.parameters(), strict=True):
        p.grad = q.grad.clone()
    optimizer = make_optimizer(stepped.parameters(), "adamw-8bit", 0.1, decay)
    optimizer.step()
    dtypes = [{v.dtype for v in optimizer.state[p].values() if torch.is_tensor(v)} for p in stepped.parameters()]
    assert [torch.uint8 in kinds for kinds in dtypes] == [True, False]
    before = weights(layer)
    settings = UpdateSettings(optimizer="adamw-8bit", learning_rate=0.1, weight_decay=decay, clip_norm=None)
    direction = TrialUpdates(layer, settings).take_direction()
    for name, p in stepped.named_parameters():
        torch.testing.assert_close(direction.change[name], p.detach() - before[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="adamw-8bit does not update float64 weights"):
        make_optimizer(layer.double().parameters(), "adamw-8bit", 0.1)


def test_moves_add_up_and_are_taken_back_bitwise() -> None:
    model: Any = tiny_model("llama", tied=True)
    model.model.layers[1].requires_grad_(False)
    before = weights(model)
    trial = TrialUpdates(model, UpdateSettings(learning_rate=0.01))
    differentiate(model)
    direction = trial.take_direction()
    for updates in (1.0, 2.5):
        trial.move(direction, updates)
    moved = weights(model)
    for name, change in direction.change.items():
        torch.testing.assert_close(moved[name], before[name] + 3.5 * change, rtol=0, atol=1e-6)
    frozen = set(before) - set(direction.change)
    assert frozen == {name for name in before if ".layers.1." in name}
    assert_bitwise({name: moved[name] for name in frozen}, {name: before[name] for name in frozen})
    # Over the weights that take part.
    mean_abs, length = trial.distance_moved()
    changed = torch.cat([(moved[name] - before[name]).double().flatten() for name in direction.change])
    assert mean_abs == pytest.approx(changed.abs().mean().item(), rel=1e-12)
    assert length == pytest.approx(changed.norm().item(), rel=1e-12)
    trial.restore()
    assert_bitwise(weights(model), before)
    assert trial.distance_moved() == (0.0, 0.0)


def test_norms_of_bfloat16_are_sums_in_fp32() -> None:
    """bfloat16 has 8 bits, and would round a norm by up to 0.4 %."""
    model: Any = tiny_model("llama").bfloat16()
    differentiate(model)
    exact = norm(p.grad for p in model.parameters())
    kept = [p.grad.clone() for p in model.parameters()]
    assert clip_gradients(model.parameters(), None) == pytest.approx(exact, rel=1e-6)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept, strict=True))
    clip_gradients(model.parameters(), exact / 3)
    for p, g in zip(model.parameters(), kept, strict=True):
        torch.testing.assert_close(p.grad.float(), g.float() / 3, rtol=2**-8, atol=0)
    direction = TrialUpdates(model, UpdateSettings(learning_rate=0.01)).take_direction()
    assert direction.length == pytest.approx(norm(direction.change.values()), rel=1e-6)


def test_distance_by_hand() -> None:
    model = bigram([[0.0, 0.0], [0.0, 0.0]])
    trial = TrialUpdates(model, UpdateSettings())
    trial.move(Direction({"table": torch.tensor([[3.0, 0.0], [-4.0, 0.0]]).double()}, 5.0), 2.0)
    # 6 and 8 of four weights: mean 14 / 4, norm 10.
    assert trial.distance_moved() == (3.5, 10.0)


def test_no_trace_after_an_exception() -> None:
    """The loss fails at the first gradient with one done, on the way with the weights moved, and at the end."""
    model = memorised_model()
    before = weights(model)
    batches = [collate([one]) for one in LEARNT[:2]]
    for last in (2, 3, 6):
        calls = iter(range(1, 9))

        def fails_later(now: Outputs, initial: Outputs, last: int = last, calls: Iterator[int] = calls) -> torch.Tensor:
            if next(calls) == last:
                raise KeyboardInterrupt
            return gradient_ascent(now, initial)

        trial = TrialUpdates(model, UpdateSettings(learning_rate=1e-3))
        with pytest.raises(KeyboardInterrupt):
            Forecaster(model, trial, fails_later).forecast(batches, [0.5], lookahead=4)
        assert_bitwise(weights(model), before)
        assert all(p.grad is None for p in model.parameters())


def test_gradients_of_the_caller_are_put_aside() -> None:
    model = bigram([[1.0, 0.0], [0.0, 0.0]])
    model.table.grad = given = torch.ones(2, 2).double()
    with gradients_put_aside(model):
        assert model.table.grad is None
        model.table.sum().backward()
    assert model.table.grad is given
    assert given.eq(1).all()


def test_a_format_that_does_not_hold_the_update_is_refused() -> None:
    """Weights near 1 have gaps of 2^-8 in bfloat16: an update of 1e-5 is lost, one of 2^-5 is kept."""
    one = collate([sample([0, 1])])
    table = torch.ones(2, 4)
    table[0, 1] = 1.5

    def looks(dtype: torch.dtype, rate: float) -> int:
        model = bigram(table, dtype)
        forecaster = Forecaster(model, TrialUpdates(model, UpdateSettings(learning_rate=rate)))
        try:
            return len(forecaster.first_looks([one]))
        finally:
            assert torch.equal(model.table.detach(), table.to(dtype))

    with pytest.raises(UserError, match=r"^the update does not survive bfloat16 storage: .* use dtype float32$") as e:
        looks(torch.bfloat16, 1e-5)
    assert "\n" not in str(e.value)
    assert "learning_rate 1e-05" in str(e.value)
    assert looks(torch.bfloat16, 2**-5) == looks(torch.float32, 1e-5) == looks(torch.float32, 2**-5) == 1


def test_the_fastest_update() -> None:
    """Steps of SGD grow with the gradient up to the norm that it is clipped to; those of AdamW do not."""

    def fastest(**settings: Any) -> float | None:
        return TrialUpdates(bigram([[0.0]]), UpdateSettings(**settings)).fastest

    assert fastest(learning_rate=0.1) is None
    assert fastest(optimizer="sgd", learning_rate=0.1, clip_norm=0.5) == 0.05
    assert fastest(optimizer="sgd", learning_rate=0.1, clip_norm=None) == math.inf


def test_moves_are_as_long_as_rounding_demands() -> None:
    """A ten-thousandth of the norm of the weights, which is 5, at least; and one update at least."""
    model = bigram([[3.0, 4.0]])
    trial = TrialUpdates(model, UpdateSettings())
    assert [trial.measurable_updates(Direction({}, length)) for length in (1e-5, 5e-4, 0.1, 0.0)] == [
        pytest.approx(50),
        1,
        1,
        1,
    ]


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"^no weight of the model requires a gradient"):
        TrialUpdates(bigram([[0.0]]).requires_grad_(False), UpdateSettings())
