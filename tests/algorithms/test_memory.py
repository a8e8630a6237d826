"""What a run of unlearning holds in memory, and that looking at a model with adapters on it gives what the merged one
gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.corpus import evaluation_of_answers
from algorithms.group import Group
from algorithms.measurements import measure_mrd
from algorithms.ray_train import train_here
from algorithms.stopping import measure_memorization
from algorithms.trainable import Lora, Trainable
from bench.speed.made import random_llama
from scoring.adapters import adds_a_product
from scoring.memory import TensorMemory
from scoring.replica import TransformersReplica
from scoring.sample_gradients import autograd_norms, log_abs_logprob, per_sample_gradient_norms
from scoring.samples import collate
from tests.algorithms.test_unlearner import CORPUS, FORGET, job, recipe
from tests.tiny_folders import tokenizer
from tests.tiny_models import VOCABULARY, tiny_model


def adapted(architecture: str = "llama", **fields: Any) -> Trainable:
    """A model in training, with adapters that have learnt something."""
    trained = Trainable(tiny_model(architecture, tied=False), adapter=Lora(2, 8, **fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained.parameters:
            p.normal_(0.0, 0.1, generator=generator)
    return trained


@pytest.mark.parametrize(
    ("architecture", "fields"), [("llama", {}), ("llama", {"targets": ".*(embed_tokens|down_proj)"}), ("gpt2", {})]
)
@pytest.mark.filterwarnings("ignore")
def test_gradient_norms_with_adapters_are_those_of_the_merged_model(architecture: str, fields: dict[str, Any]):
    trained = adapted(architecture, **fields)
    batch = collate(FORGET)
    required = [p.requires_grad for p in trained.model.parameters()]
    with trained.whole_model() as whole:
        expected, logprobs = per_sample_gradient_norms(whole, batch, log_abs_logprob)
    with trained.differentiable_model() as model:
        assert model is trained.model
        for norms in (per_sample_gradient_norms, autograd_norms):
            found, found_logprobs = norms(model, batch, log_abs_logprob)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
            torch.testing.assert_close(found_logprobs.float(), logprobs.float(), rtol=1e-4, atol=1e-5)
        assert not TransformersReplica(model).notes
    assert [p.requires_grad for p in trained.model.parameters()] == required
    assert all(p.grad is None for p in trained.model.parameters())


def test_looks_at_adapters_in_place():
    trained = adapted()
    made = recipe("GA", alpha=1.0)

    def looked_at(model: Any) -> dict[str, Any]:
        look = measure_memorization(model, FORGET, 3, CORPUS.eos_token_id, None)
        answers = evaluation_of_answers(tokenizer(), {"forget": FORGET}, None).results(model, Group())
        return {"ma": look.ma, "el": look.el, "mrd": measure_mrd(model, FORGET, made, Group(), 60)[0], **answers}

    with trained.readable_model() as model:
        assert model is trained.model
        found = looked_at(model)
    with trained.whole_model() as whole:
        expected = looked_at(whole)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)
    initial = {name: p.detach().clone() for name, p in tiny_model("llama", tied=False).named_parameters()}
    change = trained.weight_change(initial)
    moved = [(p.detach() - initial[name]).double() for name, p in whole.named_parameters()]
    assert change["delta_norm"] == pytest.approx(sum(d.square().sum().item() for d in moved) ** 0.5)
    assert change["mean_abs_delta"] == pytest.approx(
        sum(d.abs().sum().item() for d in moved) / sum(d.numel() for d in moved)
    )
    finished = trained.finished_model()
    torch.testing.assert_close(dict(finished.named_parameters()), dict(whole.named_parameters()), rtol=0, atol=0)


def test_adapters_that_do_more_are_merged_for_gradients():
    peft = pytest.importorskip("peft")
    dora = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["up_proj"], use_dora=True))
    assert not adds_a_product(dora)


@pytest.mark.parametrize(("fields", "most"), [({"lora_rank": 1}, 1.9), ({}, 4.9)], ids=["adapters", "full weights"])
@pytest.mark.filterwarnings("ignore")
def test_no_copy_of_the_model_is_made(tmp_path: Path, fields: dict[str, Any], most: float):
    """Of a run with everything that looks at the model: the weights; of full weights, gradients and two moments too."""
    folder = tmp_path / "model"
    model = random_llama(VOCABULARY, 256, 4, 4, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    size = sum(p.nbytes for p in model.parameters())
    made = recipe("NPO", alpha=1.0, batch_size=7, epochs=1, early_stopping=True, check_every=1, el_n=2, **fields)
    evaluation = evaluation_of_answers(tokenizer(), {"forget": FORGET}, None)
    with TensorMemory() as memory:
        train_here(job(folder, tmp_path, made, evaluation=evaluation, batch_tokens=40))
    assert memory.peak <= most * size
