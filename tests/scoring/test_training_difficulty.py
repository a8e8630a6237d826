"""GraNd, EL2N and VoG against per-sample fp64 autograd and vectors computed by hand."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch

import scoring.training_difficulty as training_difficulty
from scoring.errors import UserError
from scoring.precision import as_precise_as_weights
from scoring.sample_gradients import UnsupportedModule
from scoring.samples import Sample, collate
from scoring.training_difficulty import el2n, grand, vog
from tests.tiny_models import random_samples, tiny_model

ARCHITECTURES = ("llama", "gpt2", "qwen3", "opt")
SAMPLES = random_samples(5, seed=1)


def plain_loss(model: torch.nn.Module, sample: Sample, **inputs: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods of the scored tokens from plain log_softmax, one sample without padding."""
    with as_precise_as_weights(model):
        logits = model(**(inputs or {"input_ids": torch.from_numpy(sample.input_ids).unsqueeze(0)})).logits[0]
    logp = torch.log_softmax(logits[:-1], -1)[range(sample.length - 1), sample.input_ids[1:]]
    return -logp[torch.from_numpy(sample.scored[1:])]


def fp64(architecture: str, seed: int = 0) -> torch.nn.Module:
    return tiny_model(architecture, seed=seed).double()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_grand_is_the_gradient_norm_of_the_mean_loss(architecture):
    model = fp64(architecture)
    expected = []
    for sample in SAMPLES:
        gradients = torch.autograd.grad(plain_loss(model, sample).mean(), list(model.parameters()))
        expected.append(math.sqrt(sum(g.square().sum().item() for g in gradients)))
    scores = grand(model, collate(SAMPLES))
    assert scores.dtype == torch.float64
    np.testing.assert_allclose(scores, expected, rtol=1e-9)
    np.testing.assert_allclose(grand(tiny_model(architecture), collate(SAMPLES)), expected, rtol=1e-4)


def test_grand_falls_back_to_plain_autograd_with_a_warning(monkeypatch):
    model, batch = fp64("llama"), collate(SAMPLES)
    batched = grand(model, batch)

    def unsupported(*_):
        raise UnsupportedModule("layer 3 is odd")

    monkeypatch.setattr(training_difficulty, "per_sample_gradient_norms", unsupported)
    with pytest.warns(UserWarning, match=r"^GraNd: layer 3 is odd; each sample is differentiated by itself.*$"):
        plain = grand(model, batch)
    np.testing.assert_allclose(plain, batched, rtol=1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_el2n_is_the_mean_norm_of_the_error(architecture):
    model = fp64(architecture)
    expected = []
    for sample in SAMPLES:
        with torch.no_grad(), as_precise_as_weights(model):
            logits = model(input_ids=torch.from_numpy(sample.input_ids).unsqueeze(0)).logits[0]
        norms = []
        for t in np.flatnonzero(sample.scored):
            error = torch.softmax(logits[t - 1], -1)
            error[sample.input_ids[t]] -= 1
            norms.append(error.norm().item())
        expected.append(np.mean(norms))
    scores = el2n(model, collate(SAMPLES))
    assert scores.dtype == torch.float64
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    np.testing.assert_allclose(el2n(tiny_model(architecture), collate(SAMPLES)), expected, rtol=1e-4)


def test_el2n_by_hand():
    # Logits log(2), log(1), log(1): p = (1/2, 1/4, 1/4).
    logits = torch.tensor([2.0, 1.0, 1.0]).log().expand(2, 3)
    # Target 0: (-1/2, 1/4, 1/4): sqrt(1/4 + 2/16) = sqrt(3/8).
    # Target 1: (1/2, -3/4, 1/4): sqrt(1/4 + 9/16 + 1/16) = sqrt(7/8).
    norms = training_difficulty.error_norms(logits, torch.tensor([0, 1]))
    np.testing.assert_allclose(norms, [math.sqrt(3 / 8), math.sqrt(7 / 8)], rtol=1e-6)


@pytest.mark.parametrize("gap", [10.0, 30.0, 60.0])
def test_el2n_keeps_its_digits_as_p_goes_to_one(gap):
    # Logits (gap, 0, 0) in fp32, target 0: p_1 = p_2 = e = exp(-gap) / (1 + 2 exp(-gap)), 1 - p_0 = 2 e:
    # the norm is sqrt(4 + 1 + 1) e. The plain difference p_0 - 1 is rounded to 0 from a gap of 17 on.
    norm = training_difficulty.error_norms(torch.tensor([[gap, 0.0, 0.0]]), torch.tensor([0]))
    expected = math.sqrt(6) * math.exp(-gap) / (1 + 2 * math.exp(-gap))
    assert norm.item() == pytest.approx(expected, rel=1e-5)


def plain_vog(models: list[torch.nn.Module], sample: Sample) -> float:
    """The definition, spelled out: gradients for embeddings handed in, then numpy's population std."""
    gradients = []
    for model in models:
        ids = torch.from_numpy(sample.input_ids).unsqueeze(0)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = plain_loss(model, sample, inputs_embeds=embedded).sum()
        gradients.append(torch.autograd.grad(-loss, embedded)[0][0].numpy())
    return np.std(gradients, axis=0).mean()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma3"])
def test_vog_is_the_mean_spread_of_input_gradients(architecture):
    models = [fp64(architecture, seed) for seed in range(3)]
    scores = vog(models, collate(SAMPLES))
    assert scores.dtype == torch.float64
    np.testing.assert_allclose(scores, [plain_vog(models, s) for s in SAMPLES], rtol=1e-9)
    assert all(p.grad is None for model in models for p in model.parameters())


def test_vog_by_hand(monkeypatch):
    # Two checkpoints, samples of 2 tokens (one a padded row of 1), embeddings of 2 dimensions. The population
    # standard deviation of two numbers is half their distance.
    first = torch.tensor([[[1.0, 0.0], [3.0, 3.0]], [[2.0, 2.0], [9.0, 9.0]]])
    second = torch.tensor([[[5.0, 0.0], [3.0, 1.0]], [[0.0, 2.0], [-9.0, 9.0]]])
    monkeypatch.setattr(training_difficulty, "_input_gradients", lambda model, batch: model)
    batch = collate([Sample("a", np.array([4, 5]), np.array([False, True]))] * 2)
    batch.lengths[1] = 1
    # Sample 0: (2 + 0 + 0 + 1) / 4. Sample 1, its only token: (1 + 0) / 2.
    assert vog([first, second], batch).tolist() == [0.75, 0.5]


def test_vog_of_identical_checkpoints_is_zero():
    model = fp64("llama")
    assert vog([model, model, model], collate(SAMPLES)).abs().max() == 0


def test_vog_needs_two_checkpoints():
    for models in ([], [tiny_model()]):
        with pytest.raises(UserError, match=rf"^VoG needs .*: found {len(models)}, expected at least 2$"):
            vog(models, collate(SAMPLES))


def test_vog_lets_go_of_a_checkpoint_before_it_asks_for_the_next():
    alive: list[weakref.ref] = []

    def load():
        for seed in range(3):
            gc.collect()
            assert all(reference() is None for reference in alive)
            model = tiny_model(seed=seed)
            alive.append(weakref.ref(model))
            yield model
            del model

    vog(load(), collate(SAMPLES))
    assert len(alive) == 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_do_not_depend_on_the_batch(architecture):
    model, other = fp64(architecture), fp64(architecture, 1)
    together = collate(SAMPLES)
    for score in (lambda b: grand(model, b), lambda b: el2n(model, b), lambda b: vog([model, other], b)):
        apart = torch.cat([score(collate([s])) for s in SAMPLES])
        np.testing.assert_allclose(score(together), apart, rtol=1e-9)
