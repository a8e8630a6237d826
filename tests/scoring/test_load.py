"""Loading a model: what would silently be another model is refused or avoided."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from bench.models.find import find_model
from scoring.abilities import check_fp64
from scoring.adapters import adapter_base
from scoring.errors import UserError
from scoring.generation import greedy_continuations
from scoring.load import load_model, loading_notes
from scoring.logprob import scored_logprobs
from scoring.samples import collate, make_batches
from tests.tiny_folders import save_adapter, save_model, tokenizer
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


def test_an_adapter_is_merged_into_the_base_that_it_names(tmp_path: Path):
    base, folder = save_model(tmp_path / "base"), tmp_path / "adapter"
    save_adapter(folder, base, target_modules=["q_proj"])
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
    edit(folder / "adapter_config.json", base_model_name_or_path="org/base", revision="v1")
    assert adapter_base(folder) == ("org/base", "v1"), "the base is read at the revision that the adapter is for"


LINEAR = ["q_proj", "up_proj"]
ENDS = ["embed_tokens", "lm_head"]
UNTIED = "changes head and embedding differently"
# Architecture, kind and settings of an adapter of a model whose head is the embedding, and what is said of it.
ADAPTERS: dict[str, tuple[str, str, dict[str, Any], str | None]] = {
    "DoRA": ("llama", "Lora", {"target_modules": LINEAR, "use_dora": True}, None),
    "rsLoRA": ("llama", "Lora", {"target_modules": LINEAR, "use_rslora": True, "lora_dropout": 0.5}, None),
    "patterns": (
        "llama",
        "Lora",
        {"target_modules": LINEAR, "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"q_proj": 5}},
        None,
    ),
    "own biases": ("llama-bias", "Lora", {"target_modules": LINEAR, "bias": "lora_only"}, None),
    "all biases": ("gpt2", "Lora", {"target_modules": ["c_fc"], "bias": "all"}, None),
    "bias of LoRA": ("llama-bias", "Lora", {"target_modules": ["q_proj"], "lora_bias": True}, None),
    "one layer": ("llama", "Lora", {"target_modules": LINEAR, "layers_to_transform": [1]}, None),
    "parameters": ("llama", "Lora", {"target_parameters": ["mlp.down_proj.weight"]}, None),
    "PiSSA": ("llama", "Lora", {"target_modules": LINEAR, "init_lora_weights": "pissa"}, None),
    "Conv1D": ("gpt2", "Lora", {"target_modules": ["c_attn", "c_fc"], "use_dora": True}, None),
    "norm saved": ("llama", "Lora", {"target_modules": LINEAR, "modules_to_save": ["norm"]}, None),
    "head saved": ("llama", "Lora", {"target_modules": LINEAR, "modules_to_save": ["lm_head"]}, UNTIED),
    "embedding saved": ("llama", "Lora", {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}, UNTIED),
    "both saved": ("llama", "Lora", {"target_modules": LINEAR, "modules_to_save": ENDS}, UNTIED),
    "saved as one": (
        "llama",
        "Lora",
        {"target_modules": LINEAR, "modules_to_save": ENDS, "ensure_weight_tying": True},
        None,
    ),
    "head": ("llama", "Lora", {"target_modules": ["lm_head"]}, UNTIED),
    "embedding": ("llama", "Lora", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, UNTIED),
    "both": ("llama", "Lora", {"target_modules": ENDS}, UNTIED),
    "both as one": ("llama", "Lora", {"target_modules": ENDS, "ensure_weight_tying": True, "lora_alpha": 0.1}, UNTIED),
    "GPT-2's embedding": ("gpt2", "Lora", {"target_modules": ["c_attn", "wte", "wpe"]}, UNTIED),
    "tokens": ("llama", "Lora", {"target_modules": LINEAR, "trainable_token_indices": [1, 5, 9]}, None),
    "tokens of both": ("llama", "Lora", {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [7]}}, UNTIED),
    "tokens alone": ("llama", "TrainableTokens", {"token_indices": [1, 5, 9]}, None),
    "IA3": ("llama", "IA3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, None),
    "LoHa": ("llama", "LoHa", {"target_modules": LINEAR, "init_weights": False}, None),
    "LoKr": ("llama", "LoKr", {"target_modules": LINEAR, "init_weights": False}, None),
    "AdaLoRA": ("llama", "AdaLora", {"target_modules": LINEAR, "total_step": 10, "init_r": 3, "target_r": 2}, None),
    "OFT": ("llama", "OFT", {"target_modules": LINEAR, "oft_block_size": 4, "r": 0}, None),
    "BOFT": ("llama", "BOFT", {"target_modules": LINEAR, "boft_block_size": 4}, None),
    "VeRA": ("llama", "Vera", {"target_modules": ["q_proj"], "r": 2, "save_projection": False}, None),
    "FourierFT": ("llama", "FourierFT", {"target_modules": ["q_proj"], "n_frequency": 20}, None),
    "HRA": ("llama", "HRA", {"target_modules": LINEAR}, None),
    "VB-LoRA": (
        "llama",
        "VBLoRA",
        {"target_modules": LINEAR, "r": 2, "num_vectors": 8, "vector_length": 16, "save_only_topk_weights": True},
        None,
    ),
    "norms": ("llama", "LNTuning", {"target_modules": ["input_layernorm"]}, None),
    "MiSS": ("llama", "Miss", {"target_modules": LINEAR, "r": 2}, None),
    "RandLoRA": ("llama", "RandLora", {"target_modules": LINEAR, "r": 2, "randlora_alpha": 2}, None),
    "SHiRA": ("llama", "Shira", {"target_modules": ["q_proj"], "r": 2}, None),
    "C3A": ("llama", "C3A", {"target_modules": ["q_proj"], "block_size": 8}, None),
    "RoAd": ("llama", "Road", {"target_modules": ["q_proj"], "group_size": 8}, None),
}


@pytest.mark.parametrize(("architecture", "kind", "settings", "note"), ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.filterwarnings("ignore")
def test_every_adapter_becomes_the_model_that_peft_has(
    tmp_path: Path, architecture: str, kind: str, settings: dict[str, Any], note: str | None
):
    """The log-probs are those of PEFT's own model in fp64, which merges nothing; so are those of a saved copy. In
    bfloat16 each weight is rounded once."""
    base = save_model(tmp_path / "base", architecture)
    folder = save_adapter(tmp_path / "adapter", base, kind, **settings)
    whole: Any = AutoModelForCausalLM.from_pretrained(base)
    expected = PeftModel.from_pretrained(whole, folder).eval().double().get_base_model()
    model = load_model(find_model(str(folder)).source)
    assert all(p.requires_grad for p in model.parameters())
    load_model(folder).save_pretrained(tmp_path / "saved")
    batch = collate(random_samples(8))
    with torch.no_grad():
        truth = scored_logprobs(expected, batch).double()
        assert (truth - scored_logprobs(load_model(base), batch)).abs().max() > 0.02
        for same in (model, load_model(tmp_path / "saved")):
            torch.testing.assert_close(scored_logprobs(same, batch).double(), truth, atol=1e-5, rtol=0)
    merge, *others = loading_notes(model)
    assert merge == "adapter adapter merged into base"
    assert [note in other for other in others] == [True] if note else not others
    rounded, exact = load_model(folder, "bfloat16"), load_model(folder, "float64")
    assert loading_notes(rounded)[0].endswith("merged into base, in float32 and rounded to bfloat16")
    for name, p in model.named_parameters():
        assert torch.equal(rounded.get_parameter(name), p.bfloat16())
        assert torch.equal(exact.get_parameter(name), p.double())
    plain = load_model(base, "bfloat16")
    assert rounded.dtype == plain.dtype
    for name, buffer in plain.named_buffers():
        assert torch.equal(rounded.get_buffer(name), buffer)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_an_adapter_of_an_adapter(tmp_path: Path):
    """The base may have an adapter of its own."""
    base = save_model(tmp_path / "base")
    first = save_adapter(tmp_path / "first", base, target_modules=["q_proj"])
    second = save_adapter(tmp_path / "second", base, target_modules=["up_proj"])
    edit(second / "adapter_config.json", base_model_name_or_path="../first", invented=7)
    model, one = load_model(second), load_model(first)
    two = AutoModelForCausalLM.from_pretrained(base)
    for folder in (first, second):
        two = PeftModel.from_pretrained(two, folder).merge_and_unload()
    for name, p in two.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-6, atol=1e-7)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, one.model.layers[0].mlp.up_proj.weight)
    assert loading_notes(model)[-1] == "adapter second has settings that this PEFT leaves out: invented"


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


def without(folder: Path, *parts: str) -> None:
    """Leave out the adapter's weights whose names have one of the parts."""
    kept = {
        name: value
        for name, value in load_file(folder / "adapter_model.safetensors").items()
        if not any(part in name for part in parts)
    }
    save_file(kept, folder / "adapter_model.safetensors")


def renamed(folder: Path, old: str, new: str) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name.replace(old, new): value for name, value in weights.items()}, folder / "adapter_model.safetensors")


def for_another_base(folder: Path, architecture: str = "llama", **size: Any) -> None:
    other = save_model(folder.with_name("other"), architecture, **size)
    edit(folder / "adapter_config.json", base_model_name_or_path=str(other))


def larger_vocabulary(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    weights[name] = torch.ones(VOCABULARY + 3, weights[name].shape[1])
    save_file(weights, folder / "adapter_model.safetensors")


SAVED = {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}
UNFIT: dict[str, tuple[dict[str, Any], Callable[[Path], object], str]] = {
    "a tensor too few": (
        {},
        lambda folder: without(folder, "layers.1.self_attn.q_proj.lora_A", "layers.0.self_attn.q_proj.lora_B"),
        r"it lacks 2 weights that its adapter_config.json calls for, such as '.*layers.0.self_attn.q_proj.lora_B",
    ),
    "no magnitude": ({"use_dora": True}, lambda folder: without(folder, "magnitude"), "it lacks 2 weights .*magnitude"),
    "no bias": ({"bias": "lora_only"}, lambda folder: without(folder, ".bias"), "it lacks 2 weights .*q_proj.*bias"),
    "nothing saved": (SAVED, lambda folder: without(folder, "embed_tokens"), "it lacks '.*embed_tokens"),
    "no such layer": ({}, lambda folder: renamed(folder, "layers.1", "layers.7"), "2 of its weights have .*7"),
    "another name": ({}, lambda folder: renamed(folder, "self_attn", "attention"), "4 of its weights have no place"),
    "another rank": ({}, lambda folder: edit(folder / "adapter_config.json", r=3), r"size mismatch for .*lora_A"),
    "fewer targets": (
        {"target_modules": LINEAR},
        lambda folder: edit(folder / "adapter_config.json", target_modules=["q_proj"]),
        "4 of its weights have no place there, such as '.*up_proj",
    ),
    "more targets": (
        {},
        lambda folder: edit(folder / "adapter_config.json", target_modules=["q_proj", "k_proj"]),
        "it lacks 4 weights .*k_proj",
    ),
    "another architecture": ({}, lambda folder: for_another_base(folder, "gpt2"), "Target modules .* not found"),
    "another size": ({}, lambda folder: for_another_base(folder, head_dim=16), "size mismatch for .*q_proj"),
    "another vocabulary": (SAVED, larger_vocabulary, "size mismatch for .*embed_tokens"),
    "no tensors": (
        {},
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"none"),
        "cannot be put on .*header",
    ),
    "no weights": ({}, lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safe"),
    "no JSON": ({}, lambda folder: (folder / "adapter_config.json").write_text("{"), "expected what PEFT's save_pre"),
    "of no kind": ({}, lambda folder: edit(folder / "adapter_config.json", peft_type="X"), "kind .*'X', which PEFT"),
    "bias of LoRA": ({"lora_bias": True}, lambda _: None, "cannot be merged .*base layer has no bias"),
    "switched by a token": ({"alora_invocation_tokens": [1]}, lambda _: None, "cannot be merged .*aLoRA"),
    "layers twice": ({"layer_replication": [[0, 2], [1, 2]]}, lambda _: None, "repeats layers"),
    "prompt": ({"kind": "PromptTuning", "num_virtual_tokens": 3}, lambda _: None, "PROMPT_TUNING, which cannot be"),
    "prefix": ({"kind": "PrefixTuning", "num_virtual_tokens": 3}, lambda _: None, "PREFIX_TUNING, which cannot be"),
    "encoder": (
        {"kind": "PromptEncoder", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
        lambda _: None,
        "P_TUNING, which cannot be merged",
    ),
    "attention": (
        {"kind": "AdaptionPrompt", "adapter_len": 3, "adapter_layers": 1},
        lambda _: None,
        "ADAPTION_PROMPT, which cannot be merged",
    ),
    "mixture": (
        {"kind": "Poly", "target_modules": ["q_proj"], "n_tasks": 1, "n_skills": 2, "n_splits": 1, "r": 4},
        lambda _: None,
        "cannot be merged",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "change", "message"), UNFIT.values(), ids=UNFIT)
def test_adapters_that_are_refused(
    tmp_path: Path, settings: dict[str, Any], change: Callable[[Path], object], message: str
):
    """PEFT leaves initial values where there is nothing, and leaves out what has no place."""
    targets = {} if "kind" in settings else {"target_modules": ["q_proj"]}
    base = save_model(tmp_path / "base", "llama-bias" if settings.get("bias") else "llama")
    folder = save_adapter(tmp_path / "adapter", base, **(targets | settings))
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        load_model(find_model(str(folder)).source)
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
