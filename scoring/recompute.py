"""Activations that are computed again in the backward pass, instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def recomputed(model: nn.Module) -> Iterator[int]:
    """Within the context the decoder layers of a model in eval mode keep their inputs alone; gives how many do: 0 for a
    model that cannot.

    The first pass of a layer runs without gradients and the second, when the backward pass comes to it, with them: so
    hooks see which is which.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    with ExitStack() as stack:
        for layer in layers:
            # Layers look at their own mode alone; what is in them stays in eval mode.
            changes = {
                "training": True,
                "gradient_checkpointing": True,
                "_gradient_checkpointing_func": partial(checkpoint, use_reentrant=True, preserve_rng_state=False),
            }
            if isinstance(getattr(layer, "dropout", None), float):
                changes["dropout"] = 0.0
            for name, value in changes.items():
                stack.callback(_put_back, layer, name, vars(layer).get(name, _MISSING))
                setattr(layer, name, value)
        yield len(layers)


_MISSING = object()


def _put_back(layer: nn.Module, name: str, value: Any) -> None:
    if value is _MISSING:
        vars(layer).pop(name, None)
    else:
        setattr(layer, name, value)
