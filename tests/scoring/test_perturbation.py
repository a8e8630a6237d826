"""Noise is addressed, survives storage, and is undone bitwise."""

import pytest
import torch
from torch import nn

from scoring.perturbation import Perturbation, fill_gaussian_, fill_signs_
from scoring.replica import LostPerturbation, TransformersReplica
from tests.tiny_models import tiny_model

SIGMA = 1e-5


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_noise_depends_on_seed_draw_and_name_alone():
    def noise(seed: int, draw: int, name: str) -> torch.Tensor:
        return fill_gaussian_(torch.empty(64, 3), 1.0, seed, draw, name)

    first = noise(0, 0, "a.weight")
    torch.manual_seed(123)  # the global generator is neither read ...
    before = torch.get_rng_state()
    assert torch.equal(noise(0, 0, "a.weight"), first)
    assert torch.equal(torch.get_rng_state(), before)  # ... nor moved
    for other in (noise(1, 0, "a.weight"), noise(0, 1, "a.weight"), noise(0, 0, "b.weight")):
        assert not torch.equal(other, first)
        assert abs(torch.corrcoef(torch.stack([other.flatten(), first.flatten()]))[0, 1]) < 0.25


def test_noise_is_standard_normal_times_sigma():
    noise = torch.cat([fill_gaussian_(torch.empty(20_000), 0.5, 3, draw, "w") for draw in range(10)])
    assert noise.mean().abs() < 4 * 0.5 / 200_000**0.5
    assert noise.std().item() == pytest.approx(0.5, rel=0.01)
    # Kurtosis of a normal distribution is 3, with standard error sqrt(24/n).
    assert ((noise / noise.std()) ** 4).mean().item() == pytest.approx(3, abs=5 * (24 / 200_000) ** 0.5)


def test_signs_are_plus_and_minus_one():
    signs = fill_signs_(torch.empty(10_000), 0, 0, "w")
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean().abs() < 0.05


def test_the_same_draw_in_any_order_and_on_any_copy():
    one, two = Perturbation(first := tiny_model()), Perturbation(second := tiny_model())
    for draw in (0, 1, 2, 7):
        one.apply(SIGMA, 5, draw)
    two.apply(SIGMA, 5, 7)
    for name, weight in weights(first).items():
        assert torch.equal(weight, weights(second)[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_bitwise_after_many_draws(dtype: torch.dtype):
    model = tiny_model().to(dtype)
    before = weights(model)
    perturbation = Perturbation(model)
    for draw in range(50):
        perturbation.apply(1e-3, 0, draw)
        perturbation.mirror()
    assert not perturbation.is_restored()
    perturbation.restore()
    assert perturbation.is_restored()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_mirror_is_the_exact_opposite():
    model = tiny_model()
    base = weights(model)
    perturbation = Perturbation(model)
    perturbation.apply(SIGMA, 0, 0)
    ahead = {name: weight.double() - base[name].double() for name, weight in weights(model).items()}
    perturbation.mirror()
    behind = {name: weight.double() - base[name].double() for name, weight in weights(model).items()}
    exact = sum(int((ahead[n] == -behind[n]).sum()) for n in base) / sum(w.numel() for w in base.values())
    assert exact > 0.999
    worst = max((ahead[n] + behind[n]).abs().max().item() for n in base)
    assert worst < 1e-7, "an exception is a weight whose exponent changes: off by one unit in its last place"


def test_tied_weights_are_one_parameter():
    model = tiny_model("llama", tied=True)
    Perturbation(model).apply(0.1, 0, 0)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_survival():
    model = tiny_model()
    perturbation = Perturbation(model)
    perturbation.apply(SIGMA, 0, 0)
    # By hand from the weights themselves.
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    perturbation.restore()
    base = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    perturbation.apply(SIGMA, 0, 0)
    assert perturbation.survival(SIGMA) == pytest.approx((moved - base).square().mean().sqrt().item() / SIGMA, rel=1e-9)
    assert perturbation.survival(SIGMA) == pytest.approx(1, abs=0.02)


def test_bfloat16_loses_the_perturbation_and_is_refused():
    model = tiny_model().to(torch.bfloat16)
    before = weights(model)
    replica = TransformersReplica(model)
    with pytest.raises(
        LostPerturbation, match=r"does not survive bfloat16 storage: measured .* = [\d.]+ at sigma=1e-05"
    ):
        replica.perturb(SIGMA, 0, 0)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    permitted = TransformersReplica(model, allow_lost_perturbation=True)
    permitted.perturb(SIGMA, 0, 0)
    assert len(permitted.notes) == 1
    assert abs(permitted.perturbation_survival - 1) > 0.05


def test_survival_is_checked_for_every_sigma():
    replica = TransformersReplica(tiny_model().to(torch.bfloat16), allow_lost_perturbation=False)
    replica.perturb(0.5, 0, 0)  # large enough for bfloat16
    assert replica.perturbation_survival == pytest.approx(1, abs=0.05)
    with pytest.raises(LostPerturbation):
        replica.perturb(SIGMA, 0, 0)
