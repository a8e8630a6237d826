"""What the initial model says of the samples, computed once before training.

NPO and IdkDPO need the summed log-probability of each sample, one number. The objectives that compare whole
distributions (UNDIAL, KL on the retain set) get the hidden states before the output head, and RMU those of its
layer. No second model runs during training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from algorithms.passes import Head, last_hidden, layer_output
from scoring.errors import UserError
from scoring.logprob import scored_logprobs
from scoring.replica import TransformersReplica
from scoring.samples import BATCH_TOKENS, Batch, Sample, make_batches
from scoring.settings import named
from scoring.work import Pool

# The input of an objective -> (which samples, what of them); see algorithms.objectives.INPUTS. `own` are the samples
# that the objective is computed on.
NEEDS = {
    "reference_nll": ("own", "nll"),
    "reference_logits": ("own", "last"),
    "reference_hidden": ("own", "layer"),
    "refusal_reference_nll": ("refusal", "nll"),
}
# The kept hidden states must give the model's logits again: relative to the largest logit.
HEAD_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ReferenceWork:
    """One group of batches of one role, for a replica.

    Attributes:
        role: "forget", "refusal" or "retain".
        wanted: of "nll", "last" and "layer".
        layer: of "layer", counted from 1.
    """

    shard: int
    role: str
    wanted: tuple[str, ...]
    layer: int | None = None

    @property
    def key(self) -> str:
        return f"{self.role}-{self.shard:06d}"

    @torch.no_grad()
    def do(
        self, replica: TransformersReplica, batches: Sequence[Batch], cache: dict[str, Any]
    ) -> dict[int, dict[str, np.ndarray]]:
        """Position of each sample -> "nll" (), "last" (S, d), "layer" (S, d)."""
        model, found = replica.model, {}
        for batch in batches:
            here = batch.to(replica.device)
            values: dict[str, torch.Tensor] = {}
            if "nll" in self.wanted:
                replica.forwards += 1
                values["nll"] = -scored_logprobs(model, here).double().sum(-1)
            if "last" in self.wanted:
                replica.forwards += 1
                values["last"], logits = last_hidden(model, here)
                _check_head(model, values["last"], logits)
            if "layer" in self.wanted:
                assert self.layer is not None
                replica.forwards += 1
                values["layer"] = layer_output(model, here, self.layer)
            for row, index in enumerate(batch.indices.tolist()):
                tokens = int(batch.mask[row].sum())
                found[index] = {
                    name: (value[row] if value.dim() == 1 else value[row, :tokens].float()).cpu().numpy()
                    for name, value in values.items()
                }
        return found


def _check_head(model: Any, hidden: torch.Tensor, logits: torch.Tensor) -> None:
    error = (Head(model)(hidden) - logits).abs().max() / logits.abs().max()
    if not error <= HEAD_TOLERANCE:
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head in a way that is not known here: "
            f"use {named('retain_term')} nll instead of kl, and another {named('algorithm')} than UNDIAL"
        )


class Reference:
    """The kept values, by role and sample position, in one safetensors file that is read as it is needed."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(str(path), "numpy")

    def nll(self, role: str, indices: Sequence[int]) -> torch.Tensor:
        """Summed NLL of samples, (B,) fp64 nats."""
        return torch.from_numpy(self._file.get_tensor(f"{role}.nll")[indices])

    def states(self, role: str, what: str, indices: Sequence[int], width: int) -> torch.Tensor:
        """Hidden states "last" or "layer" of samples, padded with zeros to `width` tokens: (B, width, d) fp32."""
        rows = [torch.from_numpy(self._file.get_tensor(f"{role}.{what}.{i}")) for i in indices]
        states = torch.zeros(len(rows), width, rows[0].shape[-1])
        for row, value in enumerate(rows):
            states[row, : len(value)] = value
        return states


def needs(objectives: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Which quantities of which samples the objectives' inputs ask for.

    Args:
        objectives: role ("forget", "retain") -> names of the objective's inputs.

    Returns:
        role -> quantities, without roles that need nothing.
    """
    found: dict[str, set[str]] = {}
    for role, inputs in objectives.items():
        for name in inputs:
            if name in NEEDS:
                samples, quantity = NEEDS[name]
                found.setdefault(role if samples == "own" else samples, set()).add(quantity)
    return {role: tuple(sorted(quantities)) for role, quantities in found.items()}


def compute_reference(
    path: Path,
    samples: Mapping[str, Sequence[Sample]],
    wanted: Mapping[str, tuple[str, ...]],
    layer: int | None,
    pool: Pool,
    batch_tokens: int = BATCH_TOKENS,
) -> int:
    """Write what is wanted of each role's samples to `path`.

    Args:
        samples: role -> samples; a sample's position is its `index`.
        wanted: see `needs`.
        layer: of "layer".
        pool: replicas of the initial model.
        batch_tokens: padded tokens in a batch.

    Returns:
        The number of forward passes.
    """
    shards: list[list[Batch]] = []
    works = []
    for role, quantities in wanted.items():
        for batch in make_batches(samples[role], batch_tokens):
            works.append(ReferenceWork(len(shards), role, quantities, layer))
            shards.append([batch])
    arrays: dict[str, np.ndarray] = {}
    numbers = {role: np.zeros(1 + max(s.index for s in samples[role])) for role in wanted}
    forwards = 0

    def keep(work: ReferenceWork, found: dict[int, dict[str, np.ndarray]]) -> None:
        for index, values in found.items():
            for name, value in values.items():
                if name == "nll":
                    numbers[work.role][index] = value
                else:
                    arrays[f"{work.role}.{name}.{index}"] = value

    for work, states, facts in pool.run(works, shards):
        keep(work, states)
        forwards += facts.forwards
    for role, quantities in wanted.items():
        if "nll" in quantities:
            arrays[f"{role}.nll"] = numbers[role]
    unfinished = path.with_name(f".{path.name}.tmp")
    save_file(arrays, str(unfinished))
    unfinished.replace(path)
    return forwards
