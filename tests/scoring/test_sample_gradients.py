"""Batched per-sample gradient norms against per-sample autograd in fp64."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bench.speed.figures import peak_bytes
from bench.speed.made import random_llama
from scoring.curvature import Signs, second_derivatives_along_signs
from scoring.logprob import scored_logprobs
from scoring.replica import TransformersReplica
from scoring.sample_gradients import (
    UnsupportedModule,
    autograd_norms,
    log_abs_logprob,
    mean_negative_log_likelihood,
    negative_log_likelihood,
    per_sample_gradient_norms,
)
from scoring.samples import Sample, collate
from tests.tiny_models import ARCHITECTURES, random_samples, tiny_model


def exact_norms(model: nn.Module, samples: list[Sample], tokens: str = "log") -> torch.Tensor:
    """fp64, a sample at a time, from the model's full logits: shares no code with what is tested."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # torch would leave out a row that the perturbation moves
    for p in model.parameters():
        p.requires_grad_(True)
    norms = []
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids)
        logits = model(input_ids=ids.unsqueeze(0), attention_mask=torch.ones(1, len(ids))).logits[0]
        where = torch.from_numpy(sample.scored).nonzero()[:, 0]
        logprobs = torch.log_softmax(logits[where - 1].double(), -1).gather(-1, ids[where].unsqueeze(-1))[:, 0]
        scalar = {"log": (-logprobs).log().sum(), "sum": -logprobs.sum(), "mean": -logprobs.mean()}[tokens]
        model.zero_grad()
        scalar.backward()
        norms.append(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt())
    return torch.stack(norms).detach()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str, tied: bool):
    model, samples = tiny_model(architecture, tied), random_samples(7)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    got, _ = per_sample_gradient_norms(model, collate(samples), log_abs_logprob)
    torch.testing.assert_close(got, exact_norms(model, samples), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_pieces_and_computed_twice(architecture: str, tied: bool, monkeypatch: pytest.MonkeyPatch):
    """A few logits at a time, and activations that are not kept: the same log-probs, norms and second derivatives."""
    model, batch = tiny_model(architecture, tied), collate(random_samples(7))
    whole = scored_logprobs(model, batch)
    signs = Signs(0)
    bent = second_derivatives_along_signs(model, batch, signs, 1)
    norms, _ = per_sample_gradient_norms(model, batch, log_abs_logprob)
    monkeypatch.setattr("scoring.logprob.LOGITS_AT_A_TIME", 20 * model.config.vocab_size)
    before = copy.deepcopy([vars(module) for module in model.modules() if not module._parameters])
    got, logprobs = per_sample_gradient_norms(model, batch, log_abs_logprob, recompute=True)
    assert [vars(module).keys() for module in model.modules() if not module._parameters] == [v.keys() for v in before]
    torch.testing.assert_close(got, norms, rtol=1e-6, atol=0)
    double = copy.deepcopy(model).double()
    exact = per_sample_gradient_norms(double, batch, log_abs_logprob)[0]
    twice = per_sample_gradient_norms(double, batch, log_abs_logprob, recompute=True)[0]
    torch.testing.assert_close(twice, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(logprobs, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scored_logprobs(model, batch), whole, rtol=1e-5, atol=1e-6)
    scale = float(bent.abs().max())
    torch.testing.assert_close(
        second_derivatives_along_signs(model, batch, signs, 1), bent, rtol=1e-4, atol=1e-5 * scale
    )


def test_memory(monkeypatch: pytest.MonkeyPatch):
    """Gradients hold what training holds, and recomputed ones one layer; second derivatives no graph and no copies."""
    model = random_llama(2048, 64, 8, 2).eval()
    batch = collate([Sample(str(i), torch.arange(64).numpy() + i, torch.arange(64).numpy() > 31, i) for i in range(16)])
    weights = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr("scoring.logprob.LOGITS_AT_A_TIME", 1 << 17)

    def peak(work: Callable[[], object]) -> int:
        work()
        return peak_bytes(model, work) - weights

    def train() -> None:
        with torch.enable_grad():
            scored_logprobs(model, batch).sum().backward()
        model.zero_grad()

    training = peak(train)
    assert peak(lambda: per_sample_gradient_norms(model, batch, log_abs_logprob)) < 1.3 * (training - weights)
    assert peak(lambda: per_sample_gradient_norms(model, batch, log_abs_logprob, recompute=True)) < 0.4 * training
    by_series = peak(lambda: second_derivatives_along_signs(model, batch, Signs(0), 0))
    assert by_series < 0.25 * peak(lambda: second_derivatives_along_signs(model, batch, Signs(0), 0, "forward mode"))


@pytest.mark.parametrize(
    ("objective", "name"), [(negative_log_likelihood, "sum"), (mean_negative_log_likelihood, "mean")]
)
def test_other_objectives(objective, name: str):
    model, samples = tiny_model("qwen3"), random_samples(5, seed=3)
    got, logprobs = per_sample_gradient_norms(model, batch := collate(samples), objective)
    torch.testing.assert_close(got, exact_norms(model, samples, name), rtol=1e-5, atol=0)
    nll = -(logprobs * batch.mask).sum(-1)
    torch.testing.assert_close(negative_log_likelihood(logprobs, batch.mask), nll)


def test_long_samples_take_the_other_route():
    """More tokens than the layers are wide: gradients are formed instead of Gram matrices."""
    model, samples = tiny_model("llama"), random_samples(3, longest=60)
    samples = [s for s in samples if s.length > 40] + random_samples(2, seed=9, longest=60)
    assert max(s.length for s in samples) > 40
    got, _ = per_sample_gradient_norms(model, collate(samples), log_abs_logprob)
    torch.testing.assert_close(got, exact_norms(model, samples), rtol=1e-5, atol=0)


def test_a_sample_that_repeats_one_token():
    """Rows of the embedding used many times by one sample add up before they are squared."""
    sample = random_samples(1, seed=4)[0]
    repeated = Sample("r", sample.input_ids * 0 + 5, sample.scored, 0)
    model = tiny_model("llama", tied=True)
    got, _ = per_sample_gradient_norms(model, collate([repeated, sample]), log_abs_logprob)
    torch.testing.assert_close(got, exact_norms(model, [repeated, sample]), rtol=1e-5, atol=0)


def test_batch_composition_and_padding_change_nothing():
    model, samples = tiny_model("gpt2"), random_samples(8)
    together, _ = per_sample_gradient_norms(model, collate(samples), log_abs_logprob)
    for row, sample in enumerate(samples):
        alone, _ = per_sample_gradient_norms(model, collate([sample]), log_abs_logprob)
        assert alone.item() == pytest.approx(together[row].item(), rel=1e-5)


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    model.model.norm.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    per_sample_gradient_norms(model, collate(random_samples(3)), log_abs_logprob)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def shared(model: nn.Module) -> nn.Module:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


class RunTwice(nn.Module):
    """Runs its layer twice in a forward pass, as blocks with shared weights do (Zamba 2)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.layer(2 * x)


class Crossed(RunTwice):
    """Mixes the samples of a batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x.mean(0, keepdim=True)


class Pair(nn.Linear):
    """A linear layer by name, which gives more than one does: as routers do (PhiMoE)."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = super().forward(x)
        return output, output.softmax(-1)


class Paired(RunTwice):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.pair = Pair(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits, shares = self.pair(x)
        return self.layer(x) + logits * shares


class OwnScale(RunTwice):
    """Owns a parameter beside its layer, takes keyword arguments, and torch cannot run it under vmap."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.scale = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: torch.Tensor, *, factor: float = 1.5) -> torch.Tensor:
        return self.layer(x) * self.scale * (factor if x.abs().max().item() >= 0 else 1.0)


def test_layers_that_run_twice_and_samples_that_see_each_other():
    for kind in (RunTwice, Crossed, Paired, OwnScale):
        model, samples = tiny_model(), random_samples(4)
        model.model.layers[0].self_attn.o_proj = kind(model.model.layers[0].self_attn.o_proj)
        model.model.layers[1].input_layernorm = kind(model.model.layers[1].input_layernorm)
        model = copy.deepcopy(model)  # what it can be asked was tried before the change
        got, _ = per_sample_gradient_norms(model, collate(samples), log_abs_logprob)
        torch.testing.assert_close(got, exact_norms(model, samples), rtol=1e-5, atol=0)


def test_what_cannot_be_batched_falls_back_and_says_so():
    model, samples = shared(tiny_model()), random_samples(4)
    with pytest.raises(UnsupportedModule):
        per_sample_gradient_norms(model, collate(samples), log_abs_logprob)
    assert not any(m._forward_hooks for m in model.modules())
    replica = TransformersReplica(model)
    with pytest.warns(UserWarning, match="differentiated by itself"):
        got, _ = replica.log_abs_gradient_norms(collate(samples))
    torch.testing.assert_close(got, exact_norms(model, samples), rtol=1e-5, atol=0)
    assert len(replica.notes) == 1


def test_a_silent_difference_from_autograd_is_noticed():
    model, samples = tiny_model(), random_samples(4)
    # Not the layer that it says it is.
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, output: 2 * output)
    replica = TransformersReplica(model)
    with pytest.warns(UserWarning, match="batched and plain gradients differ"):
        got, _ = replica.log_abs_gradient_norms(collate(samples))
    torch.testing.assert_close(got, exact_norms(model, samples), rtol=1e-5, atol=0)


def test_autograd_norms_agree_with_the_reference():
    model, samples = tiny_model("opt"), random_samples(4)
    got, _ = autograd_norms(model, collate(samples), log_abs_logprob)
    torch.testing.assert_close(got, exact_norms(model, samples), rtol=1e-5, atol=0)


def test_one_backward_for_the_whole_batch():
    """The replica's own count, which the benchmark and the run's facts report."""
    replica = TransformersReplica(tiny_model())
    replica.log_abs_gradient_norms(collate(random_samples(6)))
    assert (replica.forwards, replica.backwards) == (1, 1)
