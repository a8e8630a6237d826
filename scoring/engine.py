"""What every engine must be able to do: the protocol that its replicas fulfil."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
import torch

from scoring.mrd import Perturbable
from scoring.samples import Batch, Sample

if TYPE_CHECKING:  # a driver that only plans tasks does not load the code of models
    from scoring.generation import Drawn

Engine = Literal["transformers", "vllm"]
Dtype = Literal["float32", "bfloat16", "float64"]


@runtime_checkable
class Replica(Perturbable, Protocol):
    """A copy of a model that answers questions about samples, whichever engine computes them.

    Attributes:
        forwards, backwards: passes over a batch so far.
        perturbation_survival, gradient_error, rounding_share, notes: see `Facts`.
    """

    forwards: int
    backwards: int
    perturbation_survival: float | None
    gradient_error: float | None
    rounding_share: float | None
    notes: list[str]

    def token_scores(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs of the scored tokens, (B, S) fp64 in nats, and whether each is the most likely token, (B, S) bool;
        both arbitrary at padding."""

    def token_moments(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The same two, and mean and standard deviation of log p over the vocabulary at each scored token, (B, S) fp64
        in nats; see `scoring.logprob.vocabulary_moments`.

        Raises:
            UserError: the engine does not give them.
        """

    def nll_gradient_norms(self, batch: Batch) -> torch.Tensor:
        """2-norm over all parameters of the gradient of each sample's mean NLL, (B,) fp64.

        Raises:
            UserError: the engine has no gradients.
        """

    def greedy_continuations(
        self, prompts: Sequence[np.ndarray], limits: Sequence[int], eos_token_id: int | None
    ) -> list[np.ndarray]:
        """What the model writes after each prompt, up to its limit of tokens, without the end token."""

    def drawn_continuations(
        self, prompts: Sequence[np.ndarray], limits: Sequence[int], drawn: Drawn, eos_token_id: int | None
    ) -> list[np.ndarray]:
        """The same, if it draws every token."""

    def extraction_likelihood(self, samples: Sequence[Sample], n: int, eos_token_id: int | None) -> torch.Tensor:
        """EL_n of each sample, (B,) fp64; see `scoring.memorization`."""

    def measure_gradient_error(self, batch: Batch) -> None:
        """Set `gradient_error` from a few samples of the batch, where the dtype is coarser than fp32."""
