"""Attacks on the weights: coarser ones, noise, and fewer of them. Does what was pushed aside return?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bench.attacks.attack import Probe
from bench.metrics.table import Columns
from bench.metrics.values import Unmeasured
from scoring.perturbation import Perturbation

Format = Literal["int8", "int4", "fp8"]
BITS = {"int8": 8, "int4": 4}
GROUP = 128
FP8 = torch.float8_e4m3fn


@contextmanager
def put_back(model: PreTrainedModel) -> Iterator[Perturbation]:
    """Within the context the weights may be changed; afterwards they are, bitwise, what they were."""
    weights = Perturbation(model)
    try:
        yield weights
    finally:
        with torch.no_grad():
            weights.restore()
        if not weights.is_restored():
            raise RuntimeError("weights differ from what they were before an attack: non-finite weights in the model?")


@dataclass(frozen=True)
class Quantise:
    """Round the weights of linear layers to a coarser format, and compute with what is left. Zhang et al. 2024.

    int8 and int4: to the nearest of 2^b - 1 levels, symmetric about 0, by groups of 128 along the inputs of an output.
    fp8: e4m3, scaled so that the largest weight of an output is the largest number. Embeddings, norms and the output
    head stay, as in the formats that are in use.
    """

    format: Format
    family: str = "quantise"
    cost: float = 1.0

    @property
    def name(self) -> str:
        return f"quantise {self.format}"

    def under(self, model: PreTrainedModel, probe: Probe) -> Iterator[tuple[int | None, Columns]]:
        with put_back(model):
            for weight in linear_weights(model):
                weight.copy_(quantised(weight, self.format))
            yield None, probe.columns(model)


def quantised(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """A weight (out, in) as it is after storage in the format, in its own dtype."""
    if format == "fp8":
        scale = weight.abs().amax(1, keepdim=True).float() / torch.finfo(FP8).max
        scale = torch.where(scale == 0, 1, scale)
        return ((weight.float() / scale).to(FP8).float() * scale).to(weight.dtype)
    largest = 2 ** (BITS[format] - 1) - 1
    columns = weight.shape[1]
    rest = -columns % GROUP
    groups = nn.functional.pad(weight.float(), (0, rest)).unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / largest
    scale = torch.where(scale == 0, 1, scale)
    rounded = (groups / scale).round().clamp(-largest, largest) * scale
    return rounded.flatten(1)[:, :columns].to(weight.dtype)


def linear_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights of linear layers but the output head, (out, in) each, as views that can be written to.

    Raises:
        Unmeasured: there are none.
    """
    head = model.get_output_embeddings()
    embedded = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    found = []
    for module in model.modules():
        if module is head or not isinstance(module, nn.Linear | Conv1D) or id(module.weight) in embedded:
            continue
        # Conv1D of GPT-2 keeps (in, out).
        found.append(module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach())
    if not found:
        raise Unmeasured(f"{type(model).__name__} has no linear layers that are known here")
    return found


@dataclass(frozen=True)
class Noise:
    """Add noise N(0, sigma^2) to every weight: the same that MRD perturbs with."""

    sigma: float
    seed: int
    family: str = "noise"
    cost: float = 1.0

    @property
    def name(self) -> str:
        return f"noise {self.sigma:g}"

    def under(self, model: PreTrainedModel, probe: Probe) -> Iterator[tuple[int | None, Columns]]:
        with put_back(model) as weights:
            with torch.no_grad():
                weights.apply(self.sigma, self.seed, 0)
            yield None, probe.columns(model)


@dataclass(frozen=True)
class Prune:
    """Set the smallest weights of each linear layer to 0, by their absolute values."""

    share: float
    family: str = "prune"
    cost: float = 1.0

    @property
    def name(self) -> str:
        return f"prune {self.share:g}"

    def under(self, model: PreTrainedModel, probe: Probe) -> Iterator[tuple[int | None, Columns]]:
        with put_back(model):
            for weight in linear_weights(model):
                prune_(weight, self.share)
            yield None, probe.columns(model)


def prune_(weight: torch.Tensor, share: float) -> None:
    """Set that share of a weight, rounded down, to 0 in place: its smallest by absolute value, the first of equals."""
    count = int(share * weight.numel())
    order = weight.abs().flatten().argsort(stable=True)[:count]
    keep = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    keep[order] = False
    weight.mul_(keep.view_as(weight))
