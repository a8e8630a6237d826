"""One forward pass of a causal LM, and the outputs that an objective can take from it.

The output head sees only the scored positions, whatever the outputs, and for an objective on the hidden states of a
layer the model runs up to that layer and no further.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from scoring.abilities import Abilities
from scoring.errors import UserError
from scoring.logprob import at_positions, row_by_row, scored_logits, token_logprobs
from scoring.samples import Batch

# The outputs of a pass; objectives call their inputs by the same names.
Output = Literal["logprobs", "logits", "hidden"]
OUTPUTS: tuple[Output, ...] = ("logprobs", "logits", "hidden")


class ForwardPass(nn.Module):
    """A causal LM as a module whose forward takes a Batch, so that it can be wrapped for several workers.

    Args:
        model: the causal LM.
        layer: the decoder layer, counted from 1, whose output is `hidden`.
    """

    def __init__(self, model: PreTrainedModel, layer: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.layer = layer

    def forward(self, batch: Batch, names: Sequence[Output]) -> dict[str, torch.Tensor]:
        """The named outputs: logprobs (B, S), 0 at padding; logits (B, S, V); hidden (B, S, d)."""
        outputs: dict[str, torch.Tensor] = {}
        if "hidden" in names:
            assert self.layer is not None
            outputs["hidden"] = layer_output(self.model, batch, self.layer)
        if "logits" in names or "logprobs" in names:
            logits = scored_logits(self.model, batch)
            if "logits" in names:
                outputs["logits"] = logits
            if "logprobs" in names:
                outputs["logprobs"] = token_logprobs(logits, batch.targets).masked_fill(~batch.mask, 0.0)
        return outputs


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of decoder layers.

    Raises:
        UserError: there is no list of as many modules as the model has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__} has no list of {count} decoder layers: RMU cannot find its layer")


def layer_output(model: PreTrainedModel, batch: Batch, layer: int) -> torch.Tensor:
    """Output of decoder layer `layer` (1 is the first) at the positions of the scored tokens, (B, S, d).

    `batch.positions` are those from which the tokens are predicted, one earlier.
    """
    decoder_layer = decoder_layers(model)[layer - 1]

    def compute(rows: Batch, _: Abilities) -> tuple[torch.Tensor]:
        hidden: list[torch.Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            hidden.append(output[0] if isinstance(output, tuple) else output)

        handle = decoder_layer.register_forward_hook(keep)
        try:
            with _only_first_layers(model, layer):
                scored_logits(model, rows)
        finally:
            handle.remove()
        return (at_positions(hidden[0], rows.positions + 1),)

    return row_by_row(model, batch, compute)[0]


@contextmanager
def _only_first_layers(model: PreTrainedModel, count: int) -> Iterator[None]:
    """Within the context the model has only its first `count` layers (and its embeddings and head)."""
    layers = decoder_layers(model)
    owner, name = next(
        (module, name) for module in model.modules() for name, child in module.named_children() if child is layers
    )
    setattr(owner, name, layers[:count])
    try:
        yield
    finally:
        setattr(owner, name, layers)


class Head:
    """The initial model's output head, which turns stored hidden states into the logits that the model gave.

    So a few thousand numbers per token are stored instead of one for each token of the vocabulary, and the reference
    costs one matrix product per step instead of a second model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head: Any = model.get_output_embeddings()
        self._weight = head.weight.detach().clone()
        self._bias = None if getattr(head, "bias", None) is None else head.bias.detach().clone()
        self._cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, S, d) -> (B, S, V)."""
        logits = torch.nn.functional.linear(hidden.to(self._weight), self._weight, self._bias)
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap
