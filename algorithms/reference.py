"""What the initial model gives for the samples, computed once before training.

NPO and IdkDPO need the summed log-probability of each sample, one number. The objectives that compare whole
distributions (UNDIAL, KL on the retain set) need the hidden states before the output head, and RMU those of its layer.
No second model runs during training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from algorithms.objectives import REFUSAL_PREFIX
from algorithms.passes import Head, layer_output
from scoring.errors import UserError
from scoring.logprob import last_hidden, scored_logprobs
from scoring.replica import TransformersReplica
from scoring.samples import Batch, Sample, make_batches
from scoring.settings import named
from scoring.tensor_folder import StoredTensors, writing_tensors
from scoring.work import Pool

# The folder of a run that has it while it goes on.
REFERENCE = "reference"
# The sets that objectives are computed on; and the roles of samples, which have refusals as well.
SetName = Literal["forget", "retain"]
Role = Literal["forget", "refusal", "retain"]
# What is stored of a sample: summed NLL, hidden states before the output head, hidden states of RMU's layer.
Quantity = Literal["nll", "last", "layer"]
# Which quantity of the initial model an input of an objective needs; see algorithms.objectives.INPUTS.
QUANTITY_OF_INPUT: dict[str, Quantity] = {
    "reference_nll": "nll",
    "reference_logits": "last",
    "reference_hidden": "layer",
    "refusal_reference_nll": "nll",
}
# How far logits from the stored hidden states may be from the model's, relative to the largest logit.
HEAD_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ReferenceTask:
    """Compute quantities of samples of one role, for a replica.

    Attributes:
        shard: the number of the shard.
        role: the role of the samples.
        quantities: the quantities.
        layer: the decoder layer of the quantity "layer", counted from 1.
    """

    shard: int
    role: Role
    quantities: tuple[Quantity, ...]
    layer: int | None = None

    @property
    def key(self) -> str:
        return f"{self.role}-{self.shard:06d}"

    @torch.no_grad()
    def do(
        self, replica: TransformersReplica, batches: Sequence[Batch], cache: dict[str, Any]
    ) -> dict[int, dict[str, np.ndarray]]:
        """Position of each sample -> "nll" (), "last" (S, d), "layer" (S, d)."""
        model = replica.model
        values_of_sample = {}
        for batch in batches:
            on_device = batch.to(replica.device)
            values: dict[str, torch.Tensor] = {}
            if "nll" in self.quantities:
                replica.forwards += 1
                values["nll"] = -scored_logprobs(model, on_device).double().sum(-1)
            if "last" in self.quantities:
                replica.forwards += 1
                values["last"], logits = last_hidden(model, on_device)
                _check_head(model, values["last"], logits)
            if "layer" in self.quantities:
                assert self.layer is not None
                replica.forwards += 1
                values["layer"] = layer_output(model, on_device, self.layer)
            fetched = {
                name: (value if value.dim() == 1 else value.float()).cpu().numpy() for name, value in values.items()
            }
            for row, index in enumerate(batch.indices.tolist()):
                tokens = int(batch.mask[row].sum())
                values_of_sample[index] = {
                    name: value[row] if value.ndim == 1 else value[row, :tokens].copy()
                    for name, value in fetched.items()
                }
        return values_of_sample


def _check_head(model: PreTrainedModel, hidden: torch.Tensor, logits: torch.Tensor) -> None:
    """Refuse a model whose logits are not those of its output head."""
    error = (Head(model)(hidden) - logits).abs().max() / logits.abs().max()
    if not error <= HEAD_TOLERANCE:
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head in a way that is not known here: "
            f"use {named('retain_term')} nll instead of kl, and another {named('algorithm')} than UNDIAL"
        )


class Reference:
    """The stored values by role and sample position, in a folder of files that are read as they are needed."""

    def __init__(self, path: Path) -> None:
        self._stored = StoredTensors(path)
        # One number a sample, which is not worth a look into another file each time.
        self._nll = {name: self._stored[name][:] for name in self._stored if name.endswith(".nll")}

    def nll(self, role: Role, indices: Sequence[int]) -> torch.Tensor:
        """Summed NLL of samples, (B,) fp64 nats."""
        return torch.from_numpy(self._nll[f"{role}.nll"][indices])

    def states(
        self, role: Role, quantity: Literal["last", "layer"], indices: Sequence[int], width: int
    ) -> torch.Tensor:
        """Hidden states "last" or "layer" of samples, padded with zeros to `width` tokens: (B, width, d) fp32."""
        stored = [torch.from_numpy(self._stored[f"{role}.{quantity}.{i}"][:]) for i in indices]
        states = torch.zeros(len(stored), width, stored[0].shape[-1])
        for row, states_of_sample in enumerate(stored):
            states[row, : len(states_of_sample)] = states_of_sample
        return states


def needed_quantities(inputs_of_set: Mapping[SetName, Sequence[str]]) -> dict[Role, tuple[Quantity, ...]]:
    """Which quantities of which samples the objectives need.

    Args:
        inputs_of_set: set -> names of the inputs of its objective.

    Returns:
        role -> quantities, without roles of which nothing is needed.
    """
    needed: dict[Role, set[Quantity]] = {}
    for set_name, inputs in inputs_of_set.items():
        for name in inputs:
            if name in QUANTITY_OF_INPUT:
                role: Role = "refusal" if name.startswith(REFUSAL_PREFIX) else set_name
                needed.setdefault(role, set()).add(QUANTITY_OF_INPUT[name])
    return {role: tuple(sorted(quantities)) for role, quantities in needed.items()}


def compute_reference(
    path: Path,
    samples: Mapping[Role, Sequence[Sample]],
    quantities: Mapping[Role, tuple[Quantity, ...]],
    layer: int | None,
    pool: Pool,
    batch_tokens: int,
) -> int:
    """Compute quantities of each role's samples and write them to `path` as they come.

    Args:
        path: the folder to write, see `Reference`; it appears whole or not at all.
        samples: role -> samples; a sample's position is its `index`.
        quantities: role -> quantities, see `needed_quantities`.
        layer: the decoder layer of the quantity "layer", counted from 1.
        pool: replicas of the initial model.
        batch_tokens: padded tokens in a batch.

    Returns:
        The number of forward passes.
    """
    shards: list[list[Batch]] = []
    tasks = []
    for role, quantities_of_role in quantities.items():
        for batch in make_batches(samples[role], batch_tokens):
            tasks.append(ReferenceTask(len(shards), role, quantities_of_role, layer))
            shards.append([batch])
    nlls = {role: np.zeros(1 + max(sample.index for sample in samples[role])) for role in quantities}
    forwards = 0
    with writing_tensors(path) as writer:
        for task, values_of_sample, facts in pool.run(tasks, shards):
            forwards += facts.forwards
            for index, values in values_of_sample.items():
                for name, value in values.items():
                    if name == "nll":
                        nlls[task.role][index] = value
                    else:
                        writer.add(f"{task.role}.{name}.{index}", torch.tensor(value))
        for role, quantities_of_role in quantities.items():
            if "nll" in quantities_of_role:
                writer.add(f"{role}.nll", torch.from_numpy(nlls[role]))
    return forwards
