"""Models that forecasts are tried on: one whose updates are known by hand, and one that has memorised its samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from scoring.samples import Sample, Text, encode
from tests.tiny_folders import CONTEXT, WORDS, tokenizer
from tests.tiny_models import tiny_model


class Bigram(nn.Module):
    """The logits of the next token are the row of the last one in a table, and the table is all there is: what is
    learnt or forgotten of one row leaves the others as they are."""

    def __init__(self, table: Sequence[Sequence[float]] | torch.Tensor, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table, dtype=dtype).clone())
        self.head = nn.Identity()
        self.config = PreTrainedConfig(vocab_size=len(self.table))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.table[input_ids]))


def bigram(table: Sequence[Sequence[float]] | torch.Tensor, dtype: torch.dtype = torch.float64) -> Any:
    """A Bigram, which stands for a causal LM of transformers."""
    return Bigram(table, dtype).eval()


def sample(ids: Sequence[int], index: int = 0, prompt: int = 1) -> Sample:
    """A sample of these tokens, scored after the prompt."""
    return Sample(f"s{index}", np.array(ids), np.arange(len(ids)) >= prompt, index)


def _records() -> list[dict[str, str]]:
    rng = np.random.default_rng(4)
    return [
        {
            "id": f"r{number}",
            "prompt": " ".join(rng.choice(WORDS, rng.integers(1, 4))),
            "completion": " ".join(rng.choice(WORDS, rng.integers(3, 11))),
        }
        for number in range(20)
    ]


# What `memorised_model` knows by heart, the first ones better than the last.
RECORDS = _records()
LEARNT, _ = encode([Text(r["id"], r["prompt"], r["completion"]) for r in RECORDS], tokenizer(), CONTEXT)


@cache
def _memorised_weights() -> dict[str, torch.Tensor]:
    model: Any = tiny_model("llama", tied=False, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    longest = max(one.length for one in LEARNT)
    ids = torch.zeros(len(LEARNT), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, one in enumerate(LEARNT):
        ids[row, : one.length] = labels[row, : one.length] = torch.from_numpy(one.input_ids)
    # The first sample is seen in every step, the last one in one of five.
    seen = np.random.default_rng(0).random((80, len(LEARNT))) < np.linspace(1, 0.2, len(LEARNT))
    for rows in map(torch.from_numpy, seen):
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def memorised_model(dtype: torch.dtype = torch.float32) -> Any:
    """A fresh copy of a tiny llama that has memorised LEARNT to different degrees."""
    model: Any = tiny_model("llama", tied=False, seed=1)
    model.config.max_position_embeddings = CONTEXT
    weights = _memorised_weights()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return model.to(dtype)


def save_memorised(folder: Path) -> Path:
    """The model and its tokenizer, for the command line."""
    memorised_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
