"""The transformers replica: one copy of a model on one device, which is scored, perturbed and differentiated."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from transformers import PreTrainedModel

from scoring.abilities import check_fp64, notes_on, tokens_to_try
from scoring.curvature import Signs, Way, second_derivative_sum_by_reverse_mode, second_derivatives_along_signs
from scoring.engine import Replica
from scoring.errors import UserError, first_line
from scoring.generation import Drawn, drawn_continuations, greedy_continuations
from scoring.load import copied, loading_notes
from scoring.logprob import scored_logits, scored_logprobs, token_logprobs, vocabulary_moments
from scoring.memorization import extraction_likelihood
from scoring.perturbation import Perturbation
from scoring.recompute import layers_that_recompute
from scoring.sample_gradients import (
    ScalarOfSample,
    UnsupportedModule,
    autograd_norms,
    log_abs_logprob,
    mean_negative_log_likelihood,
    per_sample_gradient_norms,
)
from scoring.samples import Batch, Sample, collate
from scoring.settings import named
from scoring.taylor import NoRule

# How far std(stored(theta + delta) - theta) / sigma may be from 1 before a score measures rounding (beyond the
# sampling error of a standard deviation, which matters for toy models alone).
SURVIVAL_TOLERANCE = 0.05
# How far the batched gradient norms may be from plain autograd on the first batch.
GRADIENT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
# How far nested forward mode may be from reverse mode, relative to the sum of the tokens' absolute values.
CURVATURE_TOLERANCE = 1e-3


class LostPerturbation(UserError):
    """The weights' storage format does not hold the perturbation."""


def check_survival(survival: float, sigma: float, dtype: torch.dtype, weights: int, allowed: bool) -> list[str]:
    """Refuse to score if storage rounds the perturbation away.

    Args:
        survival: std(stored(theta + delta) - theta) / sigma.
        sigma: standard deviation of the perturbation.
        dtype: number format of the weights.
        weights: number of weights.
        allowed: note the loss instead of refusing.

    Returns:
        The note, or nothing if the perturbation survives.

    Raises:
        LostPerturbation: the survival is not 1, and that is not allowed.
    """
    if abs(survival - 1) <= SURVIVAL_TOLERANCE + 4 / math.sqrt(2 * weights):
        return []
    message = (
        f"the perturbation does not survive {str(dtype).removeprefix('torch.')} storage: measured "
        f"std(stored(theta+delta)-theta)/sigma = {survival:.3g} at sigma={sigma:g}, "
        f"expected 1 ± {SURVIVAL_TOLERANCE}"
    )
    if not allowed:
        raise LostPerturbation(
            f"{message}; use {named('dtype')} float32, or {named('estimator')} gradient or curvature, which "
            "differentiate"
        )
    return [message]


class TransformersReplica:
    """A transformers causal LM that can be scored, perturbed and differentiated.

    Args:
        model: the model, in eval mode, on its device; its weights are the base that `restore` restores.
        allow_lost_perturbation: score even if storage rounds the perturbation away.
        gradient_checkpointing: gradients compute activations twice instead of keeping them.
        batched_gradients: whether norms of gradients of a batch at once are right; None: tried before the first use.

    Raises:
        UserError: the model cannot compute activations twice.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        allow_lost_perturbation: bool = False,
        gradient_checkpointing: bool = False,
        batched_gradients: bool | None = None,
    ) -> None:
        # TF32 keeps 10 bits: a perturbation of 1e-5 on a weight of 0.02 would not reach the product.
        torch.set_float32_matmul_precision("highest")
        self.model = model
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.forwards = 0
        self.backwards = 0
        self.perturbation_survival: float | None = None
        self.gradient_error: float | None = None
        self.rounding_share: float | None = None
        self._survivals: dict[float, float] = {}
        self.notes: list[str] = [*loading_notes(model), *notes_on(model)]
        self._allow_lost = allow_lost_perturbation
        self._perturbation: Perturbation | None = None
        self._recompute = gradient_checkpointing
        if gradient_checkpointing:
            layers_that_recompute(model)  # refuses here what it would refuse under way
        self._batched_gradients = batched_gradients
        self._curvature_way: Way | None = None
        self._signs = Signs(0)
        if self.dtype == torch.float64:
            check_fp64(model)

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probs of the scored tokens under the current weights, (B, S) in nats; 0 at padding."""
        self.forwards += 1
        return scored_logprobs(self.model, batch.to(self.device))

    @torch.no_grad()
    def token_scores(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs of the scored tokens, (B, S) fp64 in nats, and whether each is the most likely token, (B, S)
        bool; both arbitrary at padding."""
        self.forwards += 1
        batch = batch.to(self.device)
        return _scores_of(scored_logits(self.model, batch), batch)

    @torch.no_grad()
    def token_moments(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The same two, and mean and standard deviation of log p over the vocabulary, (B, S) fp64 in nats."""
        self.forwards += 1
        batch = batch.to(self.device)
        logits = scored_logits(self.model, batch)
        mean, deviation = (moment.double().cpu().numpy() for moment in vocabulary_moments(logits))
        return *_scores_of(logits, batch), mean, deviation

    def greedy_continuations(
        self, prompts: Sequence[np.ndarray], limits: Sequence[int], eos_token_id: int | None
    ) -> list[np.ndarray]:
        """What the model writes after each prompt, all of them in one batch; see `scoring.generation`."""
        tokens = sum(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        return greedy_continuations(self.model, prompts, limits, eos_token_id, batch_tokens=max(1, 4 * tokens))

    def drawn_continuations(
        self, prompts: Sequence[np.ndarray], limits: Sequence[int], drawn: Drawn, eos_token_id: int | None
    ) -> list[np.ndarray]:
        """What the model writes after each prompt if it draws every token, all of them in one batch."""
        tokens = sum(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        return drawn_continuations(self.model, prompts, limits, drawn, eos_token_id, batch_tokens=max(1, 4 * tokens))

    def extraction_likelihood(self, samples: Sequence[Sample], n: int, eos_token_id: int | None) -> torch.Tensor:
        """EL_n of each sample, (B,) fp64; see `scoring.memorization`."""
        return extraction_likelihood(self.model, samples, n, eos_token_id)

    @torch.no_grad()
    def exact_logprobs(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Log-probs in fp64, by a copy of the model that takes twice the memory of fp32 weights during the call."""
        self.forwards += len(batches)
        exact = self.model if self.dtype == torch.float64 else copied(self.model, torch.float64)
        if exact is not self.model:
            check_fp64(exact)
        return [scored_logprobs(exact, batch.to(self.device)) for batch in batches]

    @torch.no_grad()
    def perturb(self, sigma: float, seed: int, draw: int) -> None:
        """theta <- base + delta_k.

        Raises:
            LostPerturbation: the weights' dtype does not hold sigma (checked at the first draw of each sigma).
        """
        if self._perturbation is None:
            self._perturbation = Perturbation(self.model)
        self._perturbation.apply(sigma, seed, draw)
        if sigma not in self._survivals:
            self._check_survival(sigma)
        self.perturbation_survival = self._survivals[sigma]

    def _check_survival(self, sigma: float) -> None:
        assert self._perturbation is not None
        survival = self._perturbation.survival(sigma)
        weights = sum(p.numel() for p in self.model.parameters())
        try:
            self.notes += check_survival(survival, sigma, self.dtype, weights, self._allow_lost)
        except LostPerturbation:
            self.restore()
            raise
        self._survivals[sigma] = survival

    @torch.no_grad()
    def mirror(self) -> None:
        """theta <- base - delta_k."""
        assert self._perturbation is not None
        self._perturbation.mirror()

    def release_base(self) -> None:
        """Let go of the copy of the base weights, which the next perturbation makes again. Only while the weights are
        at their base."""
        self._perturbation = None

    @torch.no_grad()
    def restore(self) -> None:
        """theta <- base, and verify that the weights are bitwise the base again."""
        if self._perturbation is None:
            return
        self._perturbation.restore()
        if not self._perturbation.is_restored():
            raise RuntimeError("weights differ from their base after restoring: non-finite weights in the model?")

    @property
    def kept(self) -> list[torch.Tensor]:
        """What is held in memory beside the model: the base of perturbations, signs."""
        return [*(self._perturbation.kept if self._perturbation else ()), *self._signs.kept]

    def report_rounding(self, share: float) -> None:
        """Keep the largest rounding of log-probs relative to the scores; see `scoring.mrd`."""
        self.rounding_share = max(share, self.rounding_share or 0.0)

    def log_abs_gradient_norms(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """||grad Sum_t log|P_t||| over all parameters, (B,) fp64; and P_t, (B, S), of the same forward pass."""
        return self._gradient_norms(batch, log_abs_logprob)

    def nll_gradient_norms(self, batch: Batch) -> torch.Tensor:
        """2-norm over all parameters of the gradient of each sample's mean NLL, (B,) fp64."""
        return self._gradient_norms(batch, mean_negative_log_likelihood)[0]

    def _gradient_norms(self, batch: Batch, scalar_of: ScalarOfSample) -> tuple[torch.Tensor, torch.Tensor]:
        """The norms of each sample's gradient, and the log-probs of the same forward pass.

        One backward pass serves the whole batch. Before the first use a few samples are compared with plain autograd.
        If the two differ, or the model has a module that the batched method cannot handle, each sample is
        differentiated by plain autograd, and a note says so.
        """
        batch = batch.to(self.device)
        if self._batched_gradients is None:
            self._batched_gradients = self._batched_gradients_agree(batch, scalar_of)
        if self._batched_gradients:
            self.forwards += 1
            self.backwards += 1
            return per_sample_gradient_norms(self.model, batch, scalar_of, self._recompute)
        self.forwards += len(batch)
        self.backwards += len(batch)
        return autograd_norms(self.model, batch, scalar_of)

    def _batched_gradients_agree(self, batch: Batch, scalar_of: ScalarOfSample) -> bool:
        few = batch.rows(0, min(2, len(batch))).to(self.device)
        try:
            batched = per_sample_gradient_norms(self.model, few, scalar_of, self._recompute)[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever it is, a sample at a time does without it
            reason = (
                str(error) if isinstance(error, UnsupportedModule) else f"{type(error).__name__}: {first_line(error)}"
            )
            return self._fall_back(reason)
        difference = _relative_difference(batched, autograd_norms(self.model, few, scalar_of)[0])
        if difference > GRADIENT_TOLERANCE[self.dtype]:
            return self._fall_back(f"batched and plain gradients differ by {difference:.1e} on the first samples")
        return True

    def _fall_back(self, reason: str) -> bool:
        note = f"gradient: {reason}; each sample is differentiated by itself, which is slower"
        self.notes.append(note)
        warnings.warn(note, stacklevel=3)
        return False

    @torch.no_grad()
    def second_derivatives(self, batch: Batch, seed: int, draw: int) -> torch.Tensor:
        """v^T (grad^2 P_t) v along random signs v over all parameters, (B, S).

        It differentiates twice going forward, so nothing cancels and bfloat16 is safe. Before the first use one sample
        is compared with differentiating twice in reverse mode: first by series, and where the two differ, or an
        operation's series is not known, by torch's forward mode.

        Raises:
            UserError: neither agrees: the model has a function that torch cannot differentiate twice.
        """
        batch = batch.to(self.device)
        if self._curvature_way is None:
            self._curvature_way = self._way_to_curvature(batch, Signs(seed), draw)
        if self._signs.seed != seed:
            self._signs = Signs(seed)
        self.forwards += 1
        if self._curvature_way == "series":
            with suppress(NoRule):  # a batch may come to an operation that the sample did not
                return second_derivatives_along_signs(self.model, batch, self._signs, draw)
        return second_derivatives_along_signs(self.model, batch, self._signs, draw, "forward mode")

    def _way_to_curvature(self, batch: Batch, signs: Signs, draw: int) -> Way:
        single = batch.rows(0, 1).to(self.device)
        # In fp32, so that a difference is an error and not rounding.
        model = self.model if self.dtype in (torch.float32, torch.float64) else copied(self.model, torch.float32)
        try:
            reverse = second_derivative_sum_by_reverse_mode(model, single, signs, draw)
            if self._curvature_error(model, single, signs, draw, "series", reverse) <= CURVATURE_TOLERANCE:
                return "series"
            difference = self._curvature_error(model, single, signs, draw, "forward mode", reverse)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self._no_curvature(f"{type(error).__name__}: {first_line(error)}") from error
        if not difference <= CURVATURE_TOLERANCE:
            raise self._no_curvature(f"forward and reverse mode differ by {difference:.0%} on the first sample")
        return "forward mode"

    @staticmethod
    def _curvature_error(
        model: PreTrainedModel, single: Batch, signs: Signs, draw: int, way: Way, reverse: float
    ) -> float:
        """How far second derivatives are from reverse mode's sum, relative to the sum of their absolute values; inf
        where series stop at an operation."""
        try:
            found = second_derivatives_along_signs(model, single, signs, draw, way)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if way == "series":  # whatever it is, torch's forward mode does without it
                return math.inf
            raise
        return abs(found.sum().item() - reverse) / found.abs().sum().item()

    def _no_curvature(self, reason: str) -> UserError:
        return UserError(
            f"curvature: {type(self.model).__name__} has a function that torch does not differentiate twice "
            f"({reason}); use {named('estimator')} antithetic"
        )

    def measure_gradient_error(self, batch: Batch) -> None:
        """Set `gradient_error`: the largest relative error of this dtype's gradient norms against fp32, over at
        most 8 samples. In fp32 and above there is nothing to measure."""
        if self.dtype in (torch.float32, torch.float64):
            return
        few = batch.rows(0, min(8, len(batch)))
        norms, _ = self.log_abs_gradient_norms(few)
        exact, _ = TransformersReplica(copied(self.model, torch.float32)).log_abs_gradient_norms(few)
        self.gradient_error = ((norms - exact).abs() / exact).max().item()


def _relative_difference(batched: torch.Tensor, plain: torch.Tensor) -> float:
    return ((batched - plain).abs() / plain.clamp_min(1e-30)).max().item()


def differentiates_on_the_way(model: PreTrainedModel) -> bool:
    """Whether the norms of gradients of a batch at once come out right, and the weights of a module are needed only
    while a pass goes through it, as when they are put together for that alone; tried on a few tokens."""
    rows = tokens_to_try(model).cpu().numpy()
    scored = np.arange(rows.shape[1]) > 1
    batch = collate([Sample(str(i), row, scored, i) for i, row in enumerate(rows)]).to(next(model.parameters()).device)
    try:
        batched = per_sample_gradient_norms(model, batch, log_abs_logprob, on_the_way=True)[0]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever it is, there is another way
        return False
    difference = _relative_difference(batched, autograd_norms(model, batch, log_abs_logprob)[0])
    return difference <= GRADIENT_TOLERANCE[next(model.parameters()).dtype]


def _scores_of(logits: torch.Tensor, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of the scored tokens, (B, S) fp64, and whether each is the most likely one, (B, S) bool."""
    hits = logits.argmax(-1) == batch.targets
    return token_logprobs(logits, batch.targets).double().cpu().numpy(), hits.cpu().numpy()


# For mypy, which checks here that the class fulfils the protocol.
_REPLICA_TYPE: type[Replica] = TransformersReplica
