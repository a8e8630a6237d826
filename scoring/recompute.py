"""Activations that are computed again in the backward pass, instead of being kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from scoring.errors import UserError
from scoring.precision import as_precise_as_weights
from scoring.settings import named


def layers_that_recompute(model: nn.Module) -> list[Any]:
    """The decoder layers that can compute their activations again.

    Raises:
        UserError: the model has none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{named('gradient_checkpointing')}: {type(model).__name__} does not support it; leave it out")
    return layers


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Within the context the decoder layers of a model in eval mode keep their inputs alone.

    The first pass of a layer runs without gradients and the second, when the backward pass comes to it, with them: so
    hooks see which is which.
    """
    layers = layers_that_recompute(model)

    def computed_twice(layer: Callable[..., Any], *args: Any) -> Any:
        def run(*given: Any) -> Any:
            # The second pass comes from the backward one, which knows nothing of the contexts of the first.
            with as_precise_as_weights(model):
                return layer(*given)

        return checkpoint(run, *args, use_reentrant=True, preserve_rng_state=False)

    with ExitStack() as stack:
        for layer in layers:
            # Layers look at their own mode alone; what is in them stays in eval mode.
            changes = {
                "training": True,
                "gradient_checkpointing": True,
                "_gradient_checkpointing_func": computed_twice,
            }
            if isinstance(getattr(layer, "dropout", None), float):
                changes["dropout"] = 0.0
            for name, value in changes.items():
                stack.callback(_put_back, layer, name, vars(layer).get(name, _MISSING))
                setattr(layer, name, value)
        yield


_MISSING = object()


def _put_back(layer: nn.Module, name: str, value: Any) -> None:
    if value is _MISSING:
        vars(layer).pop(name, None)
    else:
        setattr(layer, name, value)
