"""The initial model's weights, with which the trained ones are compared: in files that are read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from scoring.tensor_folder import writing_tensors

# The folder of a run that has them while it goes on.
INITIAL = "initial"
# Numbers of a weight that are in memory at a time.
PIECE = 1 << 20


def write_initial(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's weights by name, to be read by `StoredTensors`; the folder appears whole or not at all."""
    with writing_tensors(folder) as writer:
        for name, p in model.named_parameters():
            writer.add(name, p.reshape(1) if p.dim() == 0 else p)


def in_pieces(p: torch.Tensor, first: int, initial: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A weight and its initial value, a few rows at a time: a difference in fp64 of a whole embedding would be the
    largest tensor in memory.

    Args:
        p: the weight, or some of its rows.
        first: the number of the first of them.
        initial: the whole initial value, of which rows are taken: a tensor, or a slice of `StoredTensors`.

    Yields:
        Rows of `p`, as they are in memory, and the same rows of `initial`, on the CPU.
    """
    p = p.detach().reshape(1) if p.dim() == 0 else p.detach()
    if isinstance(initial, torch.Tensor) and initial.dim() == 0:
        initial = initial.reshape(1)
    step = max(1, PIECE * len(p) // max(1, p.numel()))
    for start in range(0, len(p), step):
        rows = p[start : start + step]
        yield rows, torch.as_tensor(initial[first + start : first + start + len(rows)])
