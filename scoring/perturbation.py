"""Gaussian perturbations of all weights, addressed by (seed, draw, parameter name).

delta_k depends on nothing else: not on the replica, the shard, the batch or the order of evaluation. So scores
are the same for 1 or 100 replicas, sharded over samples or over draws. (CPU and CUDA have different generators:
the noise is the same on all devices of one type.)
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn


def _generator(device: torch.device, seed: int, draw: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{draw}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def fill_gaussian_(tensor: torch.Tensor, sigma: float, seed: int, draw: int, name: str) -> torch.Tensor:
    """Overwrite `tensor` with this parameter's part of delta_k ~ N(0, sigma^2 I)."""
    return tensor.normal_(0.0, sigma, generator=_generator(tensor.device, seed, draw, name))


def fill_signs_(tensor: torch.Tensor, seed: int, draw: int, name: str) -> torch.Tensor:
    """Overwrite `tensor` with random signs: the Hutchinson direction of least variance (E[v v^T] = I)."""
    generator = _generator(tensor.device, seed, draw, name)
    return tensor.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def squared_distance(moved: torch.Tensor, base: torch.Tensor) -> float:
    """Sum of (moved - base)^2 in fp64. In pieces: an fp64 copy of a whole embedding matrix would be the largest tensor
    in memory."""
    total = 0.0
    for moved_piece, base_piece in zip(moved.flatten().split(1 << 20), base.flatten().split(1 << 20), strict=True):
        total += (moved_piece.double() - base_piece.double()).square_().sum().item()
    return total


class Perturbation:
    """Moves a model's weights to theta + delta_k and back.

    It holds one copy of the weights, the base. Noise is generated in the live tensors and the base added to it, so
    there is never a third copy. Restoring copies the base: the weights are bitwise the same after any number of draws,
    while subtracting the noise would drift. Tied weights are one parameter and get one noise.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live = {name: p.detach() for name, p in model.named_parameters()}
        self._base = {name: p.clone() for name, p in self._live.items()}

    @property
    def kept(self) -> list[torch.Tensor]:
        """What is held in memory beside the weights."""
        return list(self._base.values())

    def apply(self, sigma: float, seed: int, draw: int) -> None:
        """theta <- base + delta_k."""
        for name, live in self._live.items():
            fill_gaussian_(live, sigma, seed, draw, name).add_(self._base[name])

    def mirror(self) -> None:
        """base + delta -> base - delta, for the delta that storage kept.

        2*base - (base + delta) is exact wherever base and the perturbed weight share their exponent, so the
        pair is symmetric to the last bit and first-order terms cancel.
        """
        for name, live in self._live.items():
            live.neg_().add_(self._base[name], alpha=2)

    def restore(self) -> None:
        """theta <- base."""
        for name, live in self._live.items():
            live.copy_(self._base[name])

    def is_restored(self) -> bool:
        """Whether every weight is bitwise equal to the base."""
        return all(torch.equal(live, self._base[name]) for name, live in self._live.items())

    def survival(self, sigma: float) -> float:
        """std(stored(theta + delta) - theta) / sigma over all weights: 1 if the noise survived storage."""
        total, count = 0.0, 0
        for name, live in self._live.items():
            total += squared_distance(live, self._base[name])
            count += live.numel()
        return math.sqrt(total / count) / sigma
