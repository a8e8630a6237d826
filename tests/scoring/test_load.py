"""Loading a model: what would silently be another model is refused or avoided."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM

from bench.models.find import find_model
from scoring.abilities import check_fp64
from scoring.errors import UserError
from scoring.generation import greedy_continuations
from scoring.load import load_model, loading_notes
from scoring.logprob import scored_logprobs
from scoring.samples import collate, make_batches
from tests.tiny_folders import save_model, tokenizer
from tests.tiny_models import VOCABULARY, random_samples, tiny_model


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


# --- Folders as people have them --------------------------------------------------------------------------------


def edit(file: Path, **values: Any) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | values))


def adapter(folder: Path, base: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model: Any = LlamaForCausalLM.from_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return folder


def test_an_adapter_is_merged_into_the_base_that_it_names(tmp_path: Path):
    base, folder = save_model(tmp_path / "base"), tmp_path / "adapter"
    adapter(folder, base)
    model = load_model(folder)
    lora = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    wanted = (
        load_model(base).model.layers[0].self_attn.q_proj.weight + 8 / 2 * lora[key.format("B")] @ lora[key.format("A")]
    )
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight, wanted, rtol=1e-6, atol=1e-7)
    assert loading_notes(model) == ["adapter adapter merged into base"]
    found, plain = find_model(str(folder)), find_model(str(base))
    assert (found.source, found.vocabulary) == (str(folder), VOCABULARY)
    assert found.fingerprint != plain.fingerprint
    edit(folder / "adapter_config.json", base_model_name_or_path="./nowhere")
    with pytest.raises(UserError, match=r"is for the model './nowhere', which does not exist: mend its path"):
        find_model(str(folder))


def indexed(folder: Path, shard: str) -> None:
    """Weights in a shard that an index names."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / shard).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / shard)
    edit(folder / "model.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(names, shard))


def half_attached(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def no_number(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", model_max_length="long")


def renamed_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights |= {"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (half_attached, "has full weights and an adapter"),
        (no_number, "model_max_length is 'long', expected a number"),
        (lambda folder: indexed(folder, "weights.bin"), "names 'weights.bin': expected a safetensors file within"),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=0), "num_hidden_layers .* is 0: expected at"),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=-1), "num_hidden_layers .* is -1"),
        (lambda folder: edit(folder / "config.json", hidden_act="magic"), "cannot be loaded .*: .*magic"),
        (lambda folder: edit(folder / "config.json", rope_parameters={"rope_type": "spiral"}), "cannot be loaded.*"),
        (
            lambda folder: edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
            "is quantised by gptq, whose weights can be neither perturbed nor differentiated",
        ),
    ],
)  # fmt: skip
def test_folders_that_are_refused(tmp_path: Path, change: Callable[[Path], None], message: str):
    change(save_model(tmp_path))
    with pytest.raises(UserError, match=message) as error:
        load_model(find_model(str(tmp_path)).source)
    assert "\n" not in str(error.value)


def test_what_is_changed_is_said(tmp_path: Path):
    save_model(tmp_path)
    renamed_layer(tmp_path)
    edit(tmp_path / "generation_config.json", do_sample=False, temperature=0.9)
    model = load_model(tmp_path)
    one, other = loading_notes(model)
    assert one.startswith("1 weights of the checkpoint have no place in the model, such as 'model.layers.7")
    assert other.startswith("generation_config.json asks for no sampling")
    model.save_pretrained(tmp_path / "saved")


def test_the_fingerprint_covers_all_that_is_read(tmp_path: Path):
    """Shards in a folder below, and the tokens that end an answer."""
    indexed(save_model(tmp_path), "shards/one.safetensors")
    before = find_model(str(tmp_path)).fingerprint
    weights = load_file(tmp_path / "shards" / "one.safetensors")
    save_file(
        weights | {"model.norm.weight": weights["model.norm.weight"] + 1}, tmp_path / "shards" / "one.safetensors"
    )
    after = find_model(str(tmp_path)).fingerprint
    edit(tmp_path / "generation_config.json", eos_token_id=[2, 6])
    assert len({before, after, find_model(str(tmp_path)).fingerprint}) == 3


def test_every_end_token_ends_an_answer(tmp_path: Path):
    model: Any = load_model(save_model(tmp_path))
    (whole,) = greedy_continuations(model, [np.array([5, 9])], 12, None)
    assert len(whole) == 12
    end = int(whole[4])
    model.generation_config.eos_token_id = [2, end]
    (short,) = greedy_continuations(model, [np.array([5, 9])], 12, 2)
    assert short.tolist() == whole[: whole.tolist().index(end)].tolist()


def test_block_quantised_weights_become_plain_ones(tmp_path: Path):
    """fp8 in blocks, as DeepSeek and Qwen publish it: a weight is the stored number times the scale of its block."""
    save_model(tmp_path, tied=False)
    weights = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        weights[name + "_scale_inv"] = torch.full((1, 1), 0.5)
        weights[name] = (weights[name] * 2).to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit(tmp_path / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    model: Any = load_model(tmp_path)
    torch.testing.assert_close(dict(model.named_parameters())[key], weights[key].float() * 0.5, rtol=0, atol=0)
    assert loading_notes(model) == ["weights dequantised from fp8 to float32"]


def test_what_reads_both_ways_is_refused():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertLMHeadModel(BertConfig(vocab_size=VOCABULARY, **size)).eval()
    with pytest.raises(UserError, match="BertLMHeadModel is not causal: a later token changes the logits of earlier"):
        scored_logprobs(model, collate(random_samples(2)))


def test_fp64_that_rounds_is_noticed():
    """A norm in fp32 that is hidden from what mends those of transformers."""
    model: Any = tiny_model("llama").double()
    check_fp64(model)
    norm = model.model.norm.forward
    model.model.norm.forward = lambda x: torch.from_numpy(norm(x).detach().numpy().astype(np.float32)).to(x)
    with pytest.raises(UserError, match="computes in less than fp64 with fp64 weights"):
        check_fp64(model)


def test_warnings_about_a_tokenizer_are_passed_on(tmp_path: Path):
    """A large vocabulary of Mistral's, saved by an old version of transformers, splits words wrongly."""
    save_model(tmp_path, "mistral")
    tokenizer(extra=(f"x{number}" for number in range(100_001))).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_model(str(tmp_path))
    edit(tmp_path / "config.json", transformers_version="4.40.0")
    with pytest.warns(UserWarning, match="tokenizer: .* incorrect regex pattern"):
        find_model(str(tmp_path))
