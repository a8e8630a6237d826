"""Looking at a model that somebody else may be training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
