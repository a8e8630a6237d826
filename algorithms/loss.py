"""The terms of the loss: an objective's inputs for a micro-batch, from the model in training and the initial model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from algorithms.micro_batches import MicroBatch
from algorithms.objectives import REFUSAL_PREFIX, Objective, inputs_of
from algorithms.passes import OUTPUTS, Head, Output
from algorithms.recipe import Objectives
from algorithms.reference import Reference
from algorithms.trainable import Trainable
from scoring.errors import UserError
from scoring.samples import sent

# Keeps RMU's direction apart from other random numbers of the same seed.
DIRECTION = 102


class LossTerms:
    """Computes the objectives' terms of micro-batches.

    Args:
        objectives: the objectives.
        trained: the model in training.
        reference: what the initial model gives for the samples; None if no objective needs it.
        head: the initial model's output head; None if no objective compares distributions.
        seed: seed of RMU's direction.
    """

    def __init__(
        self, objectives: Objectives, trained: Trainable, reference: Reference | None, head: Head | None, seed: int
    ) -> None:
        self._objectives, self._trained = objectives, trained
        self._reference, self._head = reference, head
        self._seed = seed

    def __call__(self, micro_batch: MicroBatch, groups: np.ndarray | None = None) -> torch.Tensor:
        """The objectives' terms, one per sample, (B,); their gradients reach the trained weights.

        Args:
            groups: (N,) the group of every forget sample, if there are several objectives.
        """
        plain_names = {name.removeprefix(REFUSAL_PREFIX) for name in self._inputs(micro_batch)}
        names: list[Output] = [name for name in OUTPUTS if name in plain_names]
        return self.of_outputs(self._trained.forward(micro_batch.batch, names), micro_batch, groups)

    def of_outputs(
        self, outputs: Mapping[str, torch.Tensor], micro_batch: MicroBatch, groups: np.ndarray | None = None
    ) -> torch.Tensor:
        """The terms that follow from what the model gave for a micro-batch, by name; see `ForwardPass`."""
        device, of_samples = self._trained.device, micro_batch.num_samples
        batch = micro_batch.batch.to(device)
        outputs = {
            **outputs,
            "mask": batch.mask,
            "targets": batch.targets,
        }
        values = {name: output[:of_samples] for name, output in outputs.items()}
        values |= {REFUSAL_PREFIX + name: output[of_samples:] for name, output in outputs.items()}
        for name in self._inputs(micro_batch):
            if name == "direction":
                values[name] = sent(self._direction(outputs["hidden"].shape[-1]), device)
            elif name not in values:
                values[name] = sent(self._from_initial_model(name, micro_batch), device)
        positions = micro_batch.positions
        if micro_batch.set_name == "retain":
            assert self._objectives.retain is not None
            return _terms(self._objectives.retain, values, len(positions))
        if groups is None or len(self._objectives.forget) == 1:
            return _terms(self._objectives.forget[0], values, len(positions))
        terms = torch.zeros(len(positions), device=device)
        for number, objective in enumerate(self._objectives.forget):
            rows = sent(torch.from_numpy(np.flatnonzero(groups[positions] == number)), device)
            if len(rows):
                of_group = {name: values[name][rows] for name in inputs_of(objective)}
                terms = terms.index_copy(0, rows, _terms(objective, of_group, len(rows)).to(terms.dtype))
        return terms

    def _inputs(self, micro_batch: MicroBatch) -> tuple[str, ...]:
        of_forget_set = micro_batch.set_name == "forget"
        return self._objectives.forget_inputs if of_forget_set else self._objectives.retain_inputs

    def _from_initial_model(self, name: str, micro_batch: MicroBatch) -> torch.Tensor:
        assert self._reference is not None
        set_name, width = micro_batch.set_name, micro_batch.batch.mask.shape[1]
        indices = micro_batch.batch.indices.tolist()
        samples, refusals = indices[: micro_batch.num_samples], indices[micro_batch.num_samples :]
        if name == "reference_nll":
            return self._reference.nll(set_name, samples)
        if name == "refusal_reference_nll":
            return self._reference.nll("refusal", refusals)
        if name == "reference_hidden":
            return self._reference.states(set_name, "layer", samples, width)
        assert name == "reference_logits", name
        assert self._head is not None
        return self._head(sent(self._reference.states(set_name, "last", samples, width), self._trained.device))

    def _direction(self, size: int) -> torch.Tensor:
        """RMU's u: uniform in [0, 1), scaled to norm 1."""
        u = np.random.default_rng([self._seed, DIRECTION]).uniform(size=size)
        return torch.from_numpy(u / np.linalg.norm(u)).float()


def _terms(objective: Objective, values: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
    """The terms of `count` samples, (count,)."""
    terms = objective(*(values[name] for name in inputs_of(objective)))
    if not isinstance(terms, torch.Tensor) or terms.shape != (count,):
        shape = tuple(terms.shape) if isinstance(terms, torch.Tensor) else type(terms).__name__
        function = getattr(objective, "func", objective)
        raise UserError(
            f"objective {getattr(function, '__name__', function)!r} gave {shape} for {count} samples: expected a "
            f"tensor of one loss a sample, ({count},)"
        )
    return terms
