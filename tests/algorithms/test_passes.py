"""What a forward pass yields, against the whole model run on one unpadded sample at a time."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from algorithms.passes import ForwardPass, Head, decoder_layers, layer_output
from scoring.errors import UserError
from scoring.logprob import last_hidden
from scoring.samples import Batch, Sample, collate
from tests.tiny_models import ARCHITECTURES, VOCABULARY, random_samples, tiny_model

SAMPLES = random_samples(4, seed=3)
WIDTH = max(sample.num_scored for sample in SAMPLES)
DEPTH = 2
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture
def batch() -> Batch:
    found = collate(SAMPLES)
    assert not found.mask.all(), "nothing is padded"
    return found


def layers_by_name(model: nn.Module) -> dict[int, nn.Module]:
    """Number, from 1 -> decoder layer, found by the names that transformers gives them."""
    named = {
        int(match[1]) + 1: module
        for name, module in model.named_modules()
        if (match := re.search(r"\.(?:layers|h)\.(\d+)$", name))
    }
    assert sorted(named) == list(range(1, DEPTH + 1))
    return named


@contextmanager
def counted(modules: dict[Any, nn.Module]) -> Iterator[Counter]:
    """How often each module runs."""
    calls: Counter = Counter()
    handles = [module.register_forward_hook(lambda *_, key=key: calls.update([key])) for key, module in modules.items()]
    yield calls
    for handle in handles:
        handle.remove()


def predicting(sample: Sample) -> np.ndarray:
    """Positions from which the scored tokens are predicted."""
    return np.flatnonzero(sample.scored) - 1


def own(sample: Sample) -> np.ndarray:
    """Positions of the scored tokens."""
    return np.flatnonzero(sample.scored)


def whole_model_output(model: Any, sample: Sample, layer: int) -> torch.Tensor:
    """Output of a decoder layer when the whole model runs on one sample, (T, d)."""
    seen = []
    handle = layers_by_name(model)[layer].register_forward_hook(lambda _, __, output: seen.append(output))
    model(input_ids=torch.from_numpy(sample.input_ids).unsqueeze(0))
    handle.remove()
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return output.reshape(sample.length, -1)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@each_architecture
@pytest.mark.parametrize("layer", [1, 2])
@torch.no_grad()
def test_layer_output(architecture: str, layer: int, batch: Batch):
    model: Any = tiny_model(architecture)
    found = layer_output(model, batch, layer)
    assert found.shape == (len(SAMPLES), WIDTH, 32)
    for row, sample in zip(found, SAMPLES, strict=True):
        ids = torch.from_numpy(sample.input_ids).unsqueeze(0)
        want = whole_model_output(model, sample, layer)[own(sample)]
        torch.testing.assert_close(row[: sample.num_scored], want, atol=2e-6, rtol=1e-5)
        if layer < DEPTH:
            # What transformers calls hidden_states[DEPTH] has gone through the final norm.
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0, own(sample)]
            torch.testing.assert_close(row[: sample.num_scored], states, atol=2e-6, rtol=1e-5)


@each_architecture
@torch.no_grad()
def test_layers_above_do_not_run(architecture: str, batch: Batch):
    model: Any = tiny_model(architecture)
    before = dict(model.named_modules())
    with counted(layers_by_name(model)) as calls:
        layer_output(model, batch, 1)
        assert calls == {1: 1}
        layer_output(model, batch, 2)
        assert calls == {1: 2, 2: 1}
    assert dict(model.named_modules()) == before
    assert hooks(model) == 0


@each_architecture
@torch.no_grad()
def test_layers_are_put_back_after_an_exception(architecture: str, batch: Batch):
    model: Any = tiny_model(architecture)
    ids = batch.input_ids
    before, logits = dict(model.named_modules()), model(input_ids=ids).logits

    def fail(*_: object) -> None:
        raise FloatingPointError("in the middle")

    handle = layers_by_name(model)[1].register_forward_pre_hook(fail)
    with pytest.raises(FloatingPointError, match="in the middle"):
        layer_output(model, batch, 1)
    with pytest.raises(FloatingPointError, match="in the middle"):
        last_hidden(model, batch)
    handle.remove()
    assert dict(model.named_modules()) == before
    assert hooks(model) == 0
    torch.testing.assert_close(model(input_ids=ids).logits, logits, atol=0, rtol=0)


@each_architecture
def test_gradient_of_layer_output(architecture: str, batch: Batch):
    """It is that of the whole model, and reaches the first layer, what is before it, and nothing else."""
    model = tiny_model(architecture, tied=False)
    weights = torch.randn(len(SAMPLES), WIDTH, 32, generator=torch.Generator().manual_seed(0))
    (layer_output(model, batch, 1) * weights * batch.mask.unsqueeze(-1)).sum().backward()
    reached = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    behind = r"\.(layers|h)\.1\.|final|norm\.weight$|ln_f|lm_head|embed_out|project_out"
    first_layer = {name for name, _ in model.named_parameters() if re.search(r"\.(layers|h)\.0\.", name)}
    assert first_layer <= set(reached)
    assert not [name for name in set(reached) - first_layer if re.search(behind, name)]
    assert {name for name, _ in model.named_parameters()} - set(reached) == {
        name for name, _ in model.named_parameters() if name not in first_layer and re.search(behind, name)
    }

    model.zero_grad()
    for sample, weight in zip(SAMPLES, weights, strict=True):
        states = whole_model_output(model, sample, 1)[own(sample)]
        (states * weight[: sample.num_scored]).sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if name in reached}
    for name, gradient in reached.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_model_without_a_list_of_layers():
    model: Any = tiny_model("llama")
    assert decoder_layers(model) is model.model.layers
    model.config.num_hidden_layers = 5
    with pytest.raises(UserError, match="LlamaForCausalLM has no list of 5 decoder layers"):
        decoder_layers(model)


@each_architecture
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_head_gives_the_logits_again(architecture: str, tied: bool, batch: Batch):
    model: Any = tiny_model(architecture, tied)
    # Logits large enough for Gemma 2's cap to bend them.
    model.get_output_embeddings().weight.mul_(8)
    hidden, logits = last_hidden(model, batch)
    head = Head(model)
    assert logits.shape == (len(SAMPLES), WIDTH, VOCABULARY)
    want = [
        model(input_ids=torch.from_numpy(s.input_ids).unsqueeze(0)).logits[0, predicting(s)] for s in SAMPLES
    ]  # before the model is changed
    for p in model.parameters():
        p.add_(torch.randn_like(p))
    again = head(hidden)
    for row, sample in enumerate(SAMPLES):
        tolerance = 2e-5 * want[row].abs().max().item()
        torch.testing.assert_close(logits[row, : sample.num_scored], want[row], atol=tolerance, rtol=0)
        torch.testing.assert_close(again[row, : sample.num_scored], want[row], atol=tolerance, rtol=0)
    if cap := getattr(model.config, "final_logit_softcapping", None):
        assert max(w.abs().max().item() for w in want) > 0.5 * cap, "the cap is not felt"


def test_soft_capping_by_hand():
    model: Any = tiny_model("gemma2")
    hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)) * 60
    weight = model.get_output_embeddings().weight.detach().double()
    plain = hidden.double() @ weight.T
    assert plain.abs().max() > 60
    want = 30 * torch.tanh(plain / 30)
    torch.testing.assert_close(Head(model)(hidden).double(), want, atol=1e-3, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt"])
def test_passes_yield_what_is_wanted(architecture: str, batch: Batch):
    model: Any = tiny_model(architecture)
    passes = ForwardPass(model, layer=1)
    exact = copy.deepcopy(model).double()
    for wanted in (["logprobs"], ["logits"], ["hidden"], ["logprobs", "logits"], ["hidden", "logits", "logprobs"], []):
        found = passes(batch, wanted)
        assert set(found) == set(wanted)
        shapes = {"logprobs": (4, WIDTH), "logits": (4, WIDTH, VOCABULARY), "hidden": (4, WIDTH, 32)}
        assert {name: tuple(value.shape) for name, value in found.items()} == {name: shapes[name] for name in wanted}
        for row, sample in enumerate(SAMPLES):
            scored = sample.num_scored
            with torch.no_grad():
                logits = exact(input_ids=torch.from_numpy(sample.input_ids).unsqueeze(0)).logits[0, predicting(sample)]
                hidden = whole_model_output(exact, sample, 1)[own(sample)]
            tokens = torch.from_numpy(sample.input_ids[sample.scored])
            want = {
                "logprobs": logits.log_softmax(-1)[torch.arange(scored), tokens],
                "logits": logits,
                "hidden": hidden,
            }
            for name in wanted:
                got = found[name][row, :scored].detach().double()
                torch.testing.assert_close(got, want[name], atol=2e-5, rtol=1e-5)
            if "logprobs" in wanted:
                assert (found["logprobs"][row, scored:] == 0).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padding_has_no_gradient(architecture: str, batch: Batch):
    """The gradient of summed log-probs is the sum of those of the samples by themselves."""
    model = tiny_model(architecture)
    ForwardPass(model)(batch, ["logprobs"])["logprobs"].sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for sample in SAMPLES:
        ids = torch.from_numpy(sample.input_ids)
        table = model(input_ids=ids.unsqueeze(0)).logits[0].log_softmax(-1)
        table[predicting(sample), ids[sample.scored]].sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-4, rtol=1e-4)


def test_one_pass_for_logits_and_logprobs(batch: Batch):
    model: Any = tiny_model("llama")
    with counted({"model": model}) as calls:
        ForwardPass(model, layer=1)(batch, ["logits", "logprobs"])
    assert calls == {"model": 1}
