"""Tiny random causal LMs of every supported architecture, and random samples for them."""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from scoring.abilities import abilities_of
from scoring.samples import Sample

VOCABULARY = 97


def config(architecture: str, tied: bool, head_dim: int = 8) -> PreTrainedConfig:
    """A 2-layer configuration; grouped-query attention, biases and sliding windows where the family has them.

    `head_dim` is that of 4 heads (vLLM's attention on a CPU wants 32 or more).
    """
    common = {
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": tied,
    }
    size = {"hidden_size": 4 * head_dim, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    grouped = {**size, "num_key_value_heads": 2}
    gemma = {**grouped, "head_dim": head_dim}
    match architecture:
        case "llama":
            return LlamaConfig(**grouped, **common)
        case "llama-bias":
            return LlamaConfig(**grouped, attention_bias=True, mlp_bias=True, **common)
        case "qwen2":
            return Qwen2Config(**grouped, **common)
        case "qwen3":
            return Qwen3Config(**grouped, head_dim=head_dim, **common)
        case "mistral":
            return MistralConfig(**grouped, sliding_window=5, **common)
        case "phi3":
            return Phi3Config(**grouped, **common)
        case "gpt2":
            return GPT2Config(n_embd=4 * head_dim, n_layer=2, n_head=4, n_positions=64, **common)
        case "gpt-neox":
            return GPTNeoXConfig(**size, **common)
        case "opt":
            return OPTConfig(
                hidden_size=4 * head_dim,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=16,
                max_position_embeddings=64,
                **common,
            )
        case "gemma":
            return GemmaConfig(**gemma, **common)
        case "gemma2":
            return Gemma2Config(**gemma, query_pre_attn_scalar=head_dim, **common)
        case "gemma3":
            return Gemma3TextConfig(**gemma, query_pre_attn_scalar=head_dim, **common)
    raise KeyError(architecture)


ARCHITECTURES = (
    "llama",
    "llama-bias",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "gpt2",
    "gpt-neox",
    "opt",
    "gemma",
    "gemma2",
    "gemma3",
)


def tiny_model(architecture: str = "llama", tied: bool = True, seed: int = 0, head_dim: int = 8) -> torch.nn.Module:
    """A random fp32 model; norms and biases are moved off their initial ones and zeros, so that every
    parameter matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(architecture, tied, head_dim), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3 if p.dim() == 1 else 0.1)
    abilities_of(model)  # which are tried at the first use: tests count passes
    return model


def random_samples(count: int, seed: int = 0, longest: int = 20) -> list[Sample]:
    """Samples of 5 to `longest` random tokens with prompts of 1 to 3 tokens; ids may repeat, pad ids occur."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        length = int(rng.integers(5, longest + 1))
        scored = np.zeros(length, dtype=bool)
        scored[int(rng.integers(1, 4)) :] = True
        samples.append(Sample(f"s{index}", rng.integers(0, VOCABULARY, length), scored, index))
    return samples
