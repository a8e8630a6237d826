"""The experts of mixture-of-experts models, spelled out.

transformers keeps the weights of all experts of a layer in one tensor and multiplies by them in a grouped kernel, which
has no forward-mode derivative and does not say which token met which expert. Here each expert is a linear layer over
the tokens that were routed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Seen:
    """What a linear layer of an expert saw in a forward pass.

    Attributes:
        weight: the name of its weight in the module.
        number: of the expert.
        tokens: N, how many tokens came to the module.
        places: (R,) int64, which of them came to this expert, ascending.
        inputs: (R, m).
        outputs: (R, n).
    """

    weight: str
    number: int
    tokens: int
    places: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor


Tell = Callable[[Seen], None]


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of experts that can be spelled out, by name: those that transformers itself runs in several ways."""
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, mark) for mark in ("has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj"))
        and isinstance(module.down_proj, nn.Parameter)
    }


@contextmanager
def spelled_out(
    experts: dict[str, nn.Module], teller: Callable[[str, nn.Module], Tell] | None = None
) -> Iterator[None]:
    """Within the context these experts are linear layers, one after the other.

    Args:
        experts: see `experts_of`; those that are spelled out already stay as they are.
        teller: gives, for a module of experts, what is told of each linear layer.
    """
    changed = {name: module for name, module in experts.items() if "forward" not in vars(module)}
    for name, module in changed.items():
        vars(module)["forward"] = partial(_forward, module, teller(name, module) if teller else None)
    try:
        yield
    finally:
        for module in changed.values():
            del vars(module)["forward"]


def _forward(
    module: Any, tell: Tell | None, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """The sum over each token's experts. hidden (N, d), chosen and shares (N, k) -> (N, d)."""
    tokens, picks = chosen.shape
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=module.num_experts)[: module.num_experts]
    borders = [0, *counts.cumsum(0).tolist()]
    first, activation = ("gate_up_proj", module._apply_gate) if module.has_gate else ("up_proj", module.act_fn)
    outputs = []
    # All rows at once: the gradient of a choice of rows is as large as what they were chosen from.
    rows = hidden[order[: borders[-1]] // picks].split(counts.tolist())
    for number, (start, stop) in enumerate(pairwise(borders)):
        if start == stop:
            continue
        places, inner = order[start:stop] // picks, rows[number]
        for name, function in ((first, activation), ("down_proj", nn.Identity())):
            result = _linear(module, name, number, inner)
            if tell is not None:
                tell(Seen(name, number, tokens, places, inner, result))
            inner = function(result)
        outputs.append(inner)
    order = order[: borders[-1]]
    weighted = torch.cat(outputs) * shares.flatten()[order].unsqueeze(-1)
    # In the order of the tokens again, for the sum over a token's picks. A pick beyond the last expert counts nothing.
    by_pick = weighted.new_zeros(tokens * picks, weighted.shape[-1]).index_add(0, order, weighted)
    return by_pick.view(tokens, picks, -1).sum(1).to(hidden.dtype)


def _linear(module: Any, name: str, number: int, inputs: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = getattr(module, name)[number]
    outputs: torch.Tensor = inputs @ (weight if module.is_transposed else weight.mT)
    return outputs + getattr(module, f"{name}_bias")[number] if module.has_bias else outputs
