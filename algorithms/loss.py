"""The terms of the loss: an objective's inputs for a micro-batch, from the model in training and the initial model."""

from __future__ import annotations

import numpy as np
import torch

from algorithms.micro_batches import MicroBatch
from algorithms.objectives import REFUSAL_PREFIX
from algorithms.passes import OUTPUTS, Head
from algorithms.recipe import Objectives
from algorithms.reference import Reference
from algorithms.trainable import Trainable
from scoring.errors import UserError

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

    def __call__(self, micro_batch: MicroBatch) -> torch.Tensor:
        """The objective's terms, one per sample, (B,); their gradients reach the trained weights."""
        of_forget_set = micro_batch.set_name == "forget"
        objective = self._objectives.forget if of_forget_set else self._objectives.retain
        inputs = self._objectives.forget_inputs if of_forget_set else self._objectives.retain_inputs
        assert objective is not None
        plain_names = {name.removeprefix(REFUSAL_PREFIX) for name in inputs}
        device = self._trained.device
        outputs = self._trained.forward(micro_batch.batch, [name for name in OUTPUTS if name in plain_names])
        outputs |= {"mask": micro_batch.batch.mask.to(device), "targets": micro_batch.batch.targets.to(device)}
        values = {name: output[: micro_batch.num_samples] for name, output in outputs.items()}
        values |= {REFUSAL_PREFIX + name: output[micro_batch.num_samples :] for name, output in outputs.items()}
        for name in inputs:
            if name == "direction":
                values[name] = self._direction(outputs["hidden"].shape[-1]).to(device)
            elif name not in values:
                values[name] = self._from_initial_model(name, micro_batch).to(device)
        terms = objective(*(values[name] for name in inputs))
        count = micro_batch.num_samples or len(micro_batch.batch)
        if not isinstance(terms, torch.Tensor) or terms.shape != (count,):
            shape = tuple(terms.shape) if isinstance(terms, torch.Tensor) else type(terms).__name__
            function = getattr(objective, "func", objective)
            raise UserError(
                f"objective {getattr(function, '__name__', function)!r} gave {shape} for {count} samples: expected a "
                f"tensor of one loss a sample, ({count},)"
            )
        return terms

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
        return self._head(self._reference.states(set_name, "last", samples, width).to(self._trained.device))

    def _direction(self, size: int) -> torch.Tensor:
        """RMU's u: uniform in [0, 1), scaled to norm 1."""
        u = np.random.default_rng([self._seed, DIRECTION]).uniform(size=size)
        return torch.from_numpy(u / np.linalg.norm(u)).float()
