"""An algorithm's loss on a sample alone: what a forecast of its updates follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from algorithms.objectives import find_algorithm, inputs_of, with_settings
from scoring.errors import UserError
from scoring.flip_time import Outputs
from scoring.sample_gradients import negative_log_likelihood
from scoring.settings import named

# The inputs of objectives that follow from a sample, the model and the initial one.
INPUTS_ALONE = ("logprobs", "mask", "targets", "logits", "reference_nll", "reference_logits")


@dataclass(frozen=True)
class LossAlone:
    """The forget objective of an algorithm, a `scoring.flip_time.ForgetLoss`; there is no retain term.

    Attributes:
        algorithm: a key of ALGORITHMS.
        settings: of its objective.

    Raises:
        UserError: no such algorithm or setting, or an objective that takes more than the sample: a refusal, a hidden
            state, or a random direction.
    """

    algorithm: str
    settings: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        algorithm = find_algorithm(self.algorithm)
        objective = algorithm.forget
        with_settings(objective, self.settings)
        if algorithm.negation:
            raise UserError(
                f"{named('algorithm')} {self.algorithm} has no forecast: what it trains learns the sample; forecast by "
                "GA, NPO or another that pushes the answer down"
            )
        if more := [name for name in inputs_of(objective) if name not in INPUTS_ALONE]:
            raise UserError(
                f"{named('algorithm')} {self.algorithm} has no forecast: its objective takes {', '.join(more)}, which "
                "the sample alone does not give; forecast by GA, NPO or another that pushes the answer down"
            )

    @property
    def compares(self) -> str | None:
        """With what of the initial model the objective compares; see `scoring.flip_time.InitialOutputs`."""
        inputs = inputs_of(find_algorithm(self.algorithm).forget)
        return "logits" if "reference_logits" in inputs else "logprobs" if "reference_nll" in inputs else None

    def __call__(self, now: Outputs, initial: Outputs) -> torch.Tensor:
        """The objective's term of each sample, (B,)."""
        objective = find_algorithm(self.algorithm).forget
        values = {
            "logprobs": now.logprobs,
            "mask": now.mask,
            "targets": now.targets,
            "logits": now.logits,
            "reference_nll": negative_log_likelihood(initial.logprobs.double(), initial.mask),
            "reference_logits": initial.logits,
        }
        return with_settings(objective, self.settings)(*(values[name] for name in inputs_of(objective)))
