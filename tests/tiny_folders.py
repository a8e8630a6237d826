"""Model folders and data files on disk: a tiny random model with a tokenizer whose every word is one token."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny_models import VOCABULARY, tiny_model

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<end>", "Question:", "Answer:"]
WORDS = [f"w{number}" for number in range(VOCABULARY - len(SPECIAL))]
CONTEXT = 64
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def token_id(word: str) -> int:
    """The id of a word: its place in the vocabulary."""
    return [*SPECIAL, *WORDS].index(word)


def tokenizer(chat: bool = False, extra: Iterable[str] = (), bos: bool = True) -> PreTrainedTokenizerFast:
    """Splits at white space, and between words that touch, as a completion and its prompt may. Ids are positions in
    SPECIAL + WORDS + extra. Texts begin with BOS, as Llama's do; with `bos` False with nothing."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS, *extra])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words = pre_tokenizers.Split(Regex(r"w\d+"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if bos:
        inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_model(
    folder: Path, architecture: str = "llama", tied: bool = True, seed: int = 0, chat: bool = False, head_dim: int = 8
) -> Path:
    """A tiny model and its tokenizer. Weights are numbers that bfloat16 holds exactly, so that reading them in
    bfloat16 changes the arithmetic only."""
    model: Any = tiny_model(architecture, tied, seed, head_dim)
    model.config.max_position_embeddings = CONTEXT
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
    model.save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, kind: str = "Lora", **settings: Any) -> Path:
    """An adapter with random weights for the model of a folder, as PEFT writes it: LoRA of rank 2, or another kind."""
    import peft

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    rank = {"r": 2} if kind == "Lora" else {}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(1)
        config = getattr(peft, f"{kind}Config")(**({"task_type": "CAUSAL_LM"} | rank | settings))
        adapted = peft.get_peft_model(model, config)
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
        adapted.save_pretrained(folder)
    return folder


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Records of random words: prompts of 1 to 6, completions of 2 to 20, ids that are not positions."""
    rng = random.Random(seed)

    def words(shortest: int, longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(shortest, longest)))

    return [{"id": f"r{n}", "prompt": words(1, 6), "completion": words(2, 20)} for n in range(count)]


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
