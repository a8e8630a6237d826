"""Tiny random causal LMs of most types that transformers has, and what can be measured on each.

python -m tests.model_zoo        writes the table of docs/models.md
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from scoring.abilities import abilities_of
from scoring.errors import UserError
from scoring.generation import greedy_continuations, way_of_decoding
from scoring.load import copied
from scoring.mrd import EstimatorName, Request, estimate
from scoring.perturbation import fill_signs_
from scoring.precision import as_precise_as_weights
from scoring.replica import TransformersReplica
from scoring.samples import Sample, collate
from tests.paths import ROOT
from tests.tiny_models import VOCABULARY, random_samples

# Small values for the settings that configurations have, by name.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_headdim", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "state_size", "mamba_d_state", "d_state"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_key_value_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "encoder_attention_heads": 4, "mamba_n_heads": 4, "rotary_dim": 4, "qk_rope_head_dim": 4, "sliding_window": 5,
}  # fmt: skip

# What a type needs besides.
MLA = {"num_key_value_heads": 4, "head_dim": None}
LONGROPE = {
    "original_max_position_embeddings": 12,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 1.0],
        "original_max_position_embeddings": 12,
    },
}  # fmt: skip
PLAIN = (
    # dense
    "llama qwen2 qwen3 mistral ministral gemma gemma2 gemma3_text phi phi3 olmo olmo2 olmo3 granite smollm3 "
    "starcoder2 stablelm cohere cohere2 glm glm4 exaone4 arcee apertus nemotron helium seed_oss ernie4_5 "
    "hunyuan_v1_dense nanochat vaultgemma diffllama doge bitnet cwm hyperclovax jais2 modernbert-decoder "
    # older
    "gpt2 gpt_bigcode gpt_neox gptj codegen opt bloom falcon mpt persimmon biogpt xglm ctrl openai-gpt roformer "
    "bart marian whisper trocr bert-generation "
    # mixtures of experts
    "mixtral qwen2_moe qwen3_moe olmoe granitemoe granitemoeshared phimoe gpt_oss minimax minimax_m2 ernie4_5_moe "
    "glm4_moe hunyuan_v1_moe flex_olmo solar_open mellum cohere2_moe aria_text afmoe jetmoe llama4_text "
    # state spaces, recurrences and hybrids
    "mamba falcon_mamba rwkv xlstm recurrent_gemma jamba bamba granitemoehybrid nemotron_h qwen3_next qwen3_5_text "
    "olmo_hybrid lfm2 "
    # refused
    "bert xlnet cpmant"
)
MODEL_TYPES: dict[str, dict[str, Any]] = {name: {} for name in PLAIN.split()} | {
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "minicpm3": MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "mamba_ngroups": 1, "n_mamba_heads": 4,
        "attention_head_dim": 16, "num_mem_blocks": 1,
    },
    "falcon:alibi": {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    "phi3:longrope": LONGROPE,
}  # fmt: skip
CAUSAL_BY_FLAG = ("bert-generation", "roformer", "bart", "marian", "whisper", "trocr")
SAMPLES = random_samples(3, seed=5)


def zoo_model(name: str) -> Any:
    """A random fp32 model of the type before the colon, in which every parameter matters."""
    kind = name.partition(":")[0]
    configuration = CONFIG_MAPPING[kind]
    known = configuration().to_dict()
    always = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
    values = {key: value for key, value in SMALL.items() if key in known or key in always}
    aliases = getattr(configuration, "attribute_map", None) or {}
    values = {key: value for key, value in values.items() if aliases.get(key) not in values}
    if known.get("layer_types"):
        values["layer_types"] = (list(dict.fromkeys(known["layer_types"])) * 2)[:2]
    values |= MODEL_TYPES[name]
    config = configuration(**{key: value for key, value in values.items() if value is not None})
    if kind in CAUSAL_BY_FLAG:
        config.is_decoder = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3 if p.dim() == 1 else 0.1)
    return model


@dataclass(frozen=True)
class Findings:
    """What was found out about a type: "yes", "alone" (right, a sample at a time), "refused" (in one line), or what is
    wrong.

    Attributes:
        logprobs: of a batch, against every sample by itself in fp64.
        gradient, monte_carlo, antithetic, curvature: the estimators, against other arithmetic in fp64.
        answers: greedy answers of a batch, against the argmax of a pass for each token.
    """

    logprobs: str
    gradient: str = "–"
    monte_carlo: str = "–"
    antithetic: str = "–"
    curvature: str = "–"
    answers: str = "–"


def findings(name: str) -> Findings:
    model = zoo_model(name)
    try:
        able = abilities_of(model)
    except UserError:
        return Findings("refused")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Findings(
            _verdict(lambda: _logprobs(model), "yes" if able.pads else "alone"),
            *(_verdict(lambda e=estimator: _estimator(model, e)) for estimator in _TOLERANCE),
            _verdict(lambda: _answers(model)),
        )


def _verdict(measure: Callable[[], tuple[bool, str] | bool], right: str = "yes") -> str:
    try:
        found = measure()
    except UserError:
        return "refused"
    ok, right = found if isinstance(found, tuple) else (found, right)
    return right if ok else "WRONG"


def _exact(model: Any) -> Callable[[Sample], torch.Tensor]:
    """Log-probs of a sample's scored tokens, by itself, in fp64, by log_softmax."""
    exact = copied(model, torch.float64)

    def logprobs(sample: Sample, twin: Any = exact) -> torch.Tensor:
        ids = torch.from_numpy(sample.input_ids)[None]
        with as_precise_as_weights(twin):
            logits = twin(input_ids=ids, use_cache=False).logits[0]
        table, places = torch.log_softmax(logits, -1), np.flatnonzero(sample.scored)
        return table[places - 1, ids[0, places]]

    logprobs.model = exact  # type: ignore[attr-defined]
    return logprobs


def _logprobs(model: Any) -> bool:
    got = TransformersReplica(model).logprobs(collate(SAMPLES))
    exact = _exact(model)
    with torch.no_grad():
        wanted = [exact(sample) for sample in SAMPLES]
    return all(
        torch.allclose(row[: len(want)].double(), want, rtol=1e-4, atol=1e-5)
        for row, want in zip(got, wanted, strict=True)
    )


# How far an estimate may be from the same in fp64, relative to the largest.
_TOLERANCE: dict[EstimatorName, float] = {
    "gradient": 1e-5, "monte-carlo": 5e-3, "antithetic": 2e-2, "curvature": 1e-3,
}  # fmt: skip
SIGMA = 3e-3


def _estimator(model: Any, estimator: EstimatorName) -> tuple[bool, str]:
    replica = TransformersReplica(model)
    found = estimate(replica, [collate(SAMPLES)], Request(estimator, SIGMA, 1, 0, 2)).values[:, -1]
    wanted = np.array([_IN_FP64[estimator](model, sample) for sample in SAMPLES])
    alone = any("differentiated by itself" in note for note in replica.notes)
    right = np.abs(found - wanted).max() <= _TOLERANCE[estimator] * np.abs(wanted).max()
    return bool(right), "alone" if alone else "yes"


def _differentiable(model: Any) -> Any:
    """The model, with gradients of all its weights: torch gives none to an embedding of padding."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    return model.requires_grad_(True)


def _gradient(model: Any, sample: Sample) -> float:
    exact = _exact(model)
    twin = exact.model  # type: ignore[attr-defined]
    parameters = list(_differentiable(twin).parameters())
    gradients = torch.autograd.grad(exact(sample).neg().log().sum(), parameters, allow_unused=True)
    norm = sum(g.square().sum() for g in gradients if g is not None) ** 0.5
    return SIGMA * np.sqrt(2 / np.pi) * float(norm)


@torch.no_grad()
def _changed(model: Any, sample: Sample, move: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Log-probs after every weight was moved, in fp64."""
    exact = _exact(model)
    for name, p in exact.model.named_parameters():  # type: ignore[attr-defined]
        p.copy_(move(name, p))
    return exact(sample)


def _relative(model: Any, sample: Sample, sign: int) -> float:
    """Delta of the second draw, with the noise that the replica adds, in fp64."""
    replica = TransformersReplica(copied(model, torch.float32))
    replica.perturb(SIGMA, 1, 1)
    moved = dict(replica.model.named_parameters())
    base = dict(model.named_parameters())
    noise = {name: (moved[name] - base[name]).double() for name in base}
    before = _changed(model, sample, lambda _, p: p)
    after = _changed(model, sample, lambda name, p: p + sign * noise[name])
    return float(((before - after) / before).sum())


def _curvature(model: Any, sample: Sample) -> float:
    """A difference of first derivatives: so small a step that it meets no kink of an activation (relu squared)."""
    signs = {name: fill_signs_(torch.empty_like(p), 1, 1, name).double() for name, p in model.named_parameters()}
    base, step = _changed(model, sample, lambda _, p: p), 1e-8

    def slope(direction: int) -> float:
        exact = _exact(model)
        twin = _differentiable(exact.model)  # type: ignore[attr-defined]
        named = dict(twin.named_parameters())
        with torch.no_grad():
            for name, p in named.items():
                p.add_(signs[name], alpha=direction * step)
        gradients = torch.autograd.grad((exact(sample) / base).sum(), list(named.values()), allow_unused=True)
        pairs = zip(gradients, named, strict=True)
        return float(sum((g * signs[name]).sum() for g, name in pairs if g is not None))

    return -(SIGMA**2) / 2 * (slope(1) - slope(-1)) / (2 * step)


_IN_FP64: dict[EstimatorName, Callable[[Any, Sample], float]] = {
    "gradient": _gradient,
    "monte-carlo": lambda model, sample: _relative(model, sample, 1),
    "antithetic": lambda model, sample: (_relative(model, sample, 1) + _relative(model, sample, -1)) / 2,
    "curvature": _curvature,
}


@torch.no_grad()
def _answers(model: Any) -> tuple[bool, str]:
    prompts, limits = [sample.input_ids[:length] for sample, length in zip(SAMPLES, (2, 5, 4), strict=True)], [6, 3, 5]
    wanted = []
    for prompt, limit in zip(prompts, limits, strict=True):
        ids = torch.from_numpy(prompt)[None]
        for _ in range(limit):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        wanted.append(ids[0, len(prompt) :].tolist())
    found = [tokens.tolist() for tokens in greedy_continuations(model, prompts, limits, None)]
    return found == wanted, {"together": "yes", "alone": "alone", "anew": "without a cache"}[way_of_decoding(model)]


HEAD = ("type", "log-probs", "gradient", "Monte Carlo", "antithetic", "curvature", "answers")


def row(name: str, found: Findings) -> str:
    return f"| {' | '.join((f'`{name}`', *astuple(found)))} |"


def main() -> None:
    path = ROOT / "docs" / "models.md"
    text = path.read_text()
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for name in sys.argv[1:] or MODEL_TYPES:
        lines.append(row(name, findings(name)))
        print(lines[-1], flush=True)
    if not sys.argv[1:]:
        start = text.index("<!-- table -->\n") + len("<!-- table -->\n")
        path.write_text(text[:start] + "\n".join(lines) + "\n" + text[text.index("<!-- end -->") :])


if __name__ == "__main__":
    main()
