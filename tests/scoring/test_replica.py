"""Loading a model: what would silently be another model is refused or avoided."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from scoring.errors import UserError
from scoring.load import load_model
from scoring.logprob import scored_logprobs
from scoring.samples import collate, make_batches
from tests.tiny_models import random_samples, tiny_model


def test_missing_weights_are_not_made_up(tmp_path):
    tiny_model("llama", tied=False).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no weights for 'model.layers.1.mlp.up_proj.weight' \(1 missing\)"):
        load_model(tmp_path)


def test_weights_of_another_shape(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(5)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded as a causal language model") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_bitwise(tmp_path, tied: bool):
    model = tiny_model("llama", tied)
    model.save_pretrained(tmp_path)
    back = load_model(tmp_path)
    assert not back.training
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in back.named_parameters())


def test_soft_capped_attention_is_not_left_out(tmp_path):
    """Gemma 2 caps its attention scores; the fused kernels do not, and the log-probs differ."""
    model = tiny_model("gemma2")
    model.save_pretrained(tmp_path)
    batch = collate(random_samples(4))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        capped = scored_logprobs(model, batch)
        assert torch.equal(scored_logprobs(load_model(tmp_path), batch), capped)
        model.set_attn_implementation("sdpa")
        assert not torch.equal(scored_logprobs(model, batch), capped)


def test_batches_do_not_depend_on_the_order_of_the_samples():
    samples = random_samples(30)
    one, other = make_batches(samples, 100), make_batches(samples[::-1], 100)
    assert [batch.sample_ids for batch in one] == [batch.sample_ids for batch in other]
    assert all(len(b) * b.input_ids.shape[1] <= 100 for b in one)
    assert sorted(name for batch in one for name in batch.sample_ids) == sorted(s.sample_id for s in samples)
