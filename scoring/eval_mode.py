"""Looking at a model that somebody else may be training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the model is in eval mode; afterwards each of its modules is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def left_unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Within the context a replica can use the model; afterwards its mode and torch's precision are as before."""
    precision = torch.get_float32_matmul_precision()
    try:
        with in_eval_mode(model):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
