"""What benchmarks measure on: made models and data, and the samples of a task or a data file.

What is made is random, and the same in every process.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.models.find import ModelReference
from bench.tasks.datasets import load_dataset
from scoring.mrd import Request
from scoring.samples import Sample, Text, encode
from scoring.work import DrawTask

WORDS = ("who", "wrote", "a", "book", "about", "the", "sea", "and", "in", "which", "year", "was", "it", "read")
# Tokens of the longest text that a made model reads; made texts are far shorter.
CONTEXT = 256


def random_llama(vocabulary: int, width: int, layers: int, heads: int, **changes: Any) -> LlamaForCausalLM:
    """A Llama with random weights.

    Args:
        vocabulary: tokens that it knows.
        width: of the hidden states; the MLPs are 8/3 as wide.
        layers, heads: how many.
        changes: further values of its configuration.
    """
    values: dict[str, Any] = {"intermediate_size": 8 * width // 3} | changes
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, **values
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def random_llama_folder(
    folder: Path, tokenizer: Any, width: int, layers: int, heads: int, vocabulary: int | None = None, **changes: Any
) -> Path:
    """A folder with a Llama of random weights and a tokenizer, see `random_llama`; it is made if it is not there.

    Args:
        vocabulary: tokens that the model knows; None: those of the tokenizer.
    """
    if not folder.exists():
        model = random_llama(
            vocabulary or len(tokenizer), width, layers, heads, max_position_embeddings=CONTEXT, **changes
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def random_samples(count: int, length: int, scored: int, vocabulary: int) -> list[Sample]:
    """Samples of one length of random tokens, the last ones of which are scored."""
    rng = np.random.default_rng(0)
    mask = np.arange(length) >= length - scored
    return [Sample(str(i), rng.integers(0, vocabulary, length), mask, i) for i in range(count)]


def random_texts(count: int) -> list[Text]:
    """Questions and answers of random words, no two alike."""
    return [Text(str(i), question, answer) for i, (question, answer) in enumerate(_random_pairs(count))]


def random_data_file(folder: Path, count: int, length: int = 1, seed: int = 0) -> Path:
    """The same as a JSON Lines file with so many lines.

    Args:
        length: how many times as many words a text has.
        seed: of the words; files of several seeds stand side by side.
    """
    path = folder / (f"{count}-{seed}.jsonl" if seed else f"{count}.jsonl")
    with path.open("w") as file:
        for question, answer in _random_pairs(count, length, seed):
            file.write(json.dumps({"prompt": question, "completion": answer}) + "\n")
    return path


def _random_pairs(count: int, length: int = 1, seed: int = 0) -> Iterable[tuple[str, str]]:
    rng = random.Random(seed)
    for number in range(count):
        question, answer = (" ".join(rng.choices(WORDS, k=words * length)) for words in (6, 5))
        yield f"{question} {number}?", f"{answer}."


def samples_of(data: str, split: str | None, model: ModelReference, max_length: int | None = None) -> list[Sample]:
    """The samples of a task's split, of all of `authors` if no split is named, or of a data file.

    Args:
        data: a task or a data file.
        split: of a task.
        model: whose tokenizer cuts the texts.
        max_length: longer samples are left out; None: those that do not fit into the model's context.
    """
    dataset = load_dataset(data, split or ("full" if data == "authors" else None), model.tokenizer)
    samples, _ = encode(dataset.texts, model.tokenizer, max_length or model.max_length)
    return samples


def monte_carlo_tasks(draws: int, draws_per_task: int, sigma: float) -> list[DrawTask]:
    """Monte Carlo on one group of batches, as tasks for a pool."""
    return [
        DrawTask(0, Request("monte-carlo", sigma, 0, first, min(first + draws_per_task, draws)))
        for first in range(0, draws, draws_per_task)
    ]
