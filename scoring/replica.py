"""A replica: one copy of a model on one device, and what scoring asks of it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.func import functional_call, jvp
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from scoring.errors import UserError
from scoring.logprob import scored_logprobs
from scoring.perturbation import Perturbation, fill_signs_
from scoring.sample_gradients import (
    UnsupportedModule,
    autograd_norms,
    log_abs_logprob,
    per_sample_gradient_norms,
)
from scoring.samples import Batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

# How far std(stored(theta + delta) - theta) / sigma may be from 1 before a score measures rounding.
SURVIVAL_TOLERANCE = 0.05
# How far the batched gradient norms may be from plain autograd on the first batch.
GRADIENT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1}


class LostPerturbation(UserError):
    """The weights' storage format does not hold the perturbation."""


def load_model(
    source: str | Path, dtype: str = "float32", device: str = "cpu", revision: str | None = None
) -> PreTrainedModel:
    """A causal LM in eval mode, from a folder or a Hugging Face id. Safetensors only; no remote code.

    Raises:
        UserError: it cannot be loaded.
    """
    # Imported here: it costs seconds, and the driver of a scoring run does not need it.
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(source),
            revision=revision or "main",
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model {str(source)!r} cannot be loaded as a causal language model: {reason}") from error
    return cast(Any, model).to(device).eval()


class TransformersReplica:
    """A transformers causal LM that can be scored, perturbed and differentiated.

    Args:
        model: the model, in eval mode, on its device; its weights are the base that everything restores to.
        allow_lost_perturbation: score even where storage rounds the perturbation away.
    """

    def __init__(self, model: PreTrainedModel, allow_lost_perturbation: bool = False) -> None:
        # TF32 keeps 10 bits: a perturbation of 1e-5 on a weight of 0.02 would not reach the product.
        torch.set_float32_matmul_precision("highest")
        self.model = model
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.forwards = 0
        self.backwards = 0
        self.perturbation_survival: float | None = None
        self.gradient_error: float | None = None
        self.notes: list[str] = []
        self._allow_lost = allow_lost_perturbation
        self._perturbation: Perturbation | None = None
        self._batched_gradients: bool | None = None

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probs of the scored tokens under the current weights, (B, S) in nats; 0 at padding."""
        self.forwards += 1
        return scored_logprobs(self.model, batch.to(self.device))

    @torch.no_grad()
    def perturb(self, sigma: float, seed: int, draw: int) -> None:
        """theta <- base + delta_k.

        Raises:
            LostPerturbation: the weights' dtype does not hold sigma (checked at the first draw).
        """
        if self._perturbation is None:
            self._perturbation = Perturbation(self.model)
        self._perturbation.apply(sigma, seed, draw)
        if self.perturbation_survival is None:
            self.perturbation_survival = self._perturbation.survival(sigma)
            if abs(self.perturbation_survival - 1) > SURVIVAL_TOLERANCE:
                message = (
                    f"the perturbation does not survive {str(self.dtype).removeprefix('torch.')} storage: measured "
                    f"std(stored(theta+delta)-theta)/sigma = {self.perturbation_survival:.3g} at sigma={sigma:g}, "
                    f"expected 1 ± {SURVIVAL_TOLERANCE}"
                )
                if not self._allow_lost:
                    self.restore()
                    raise LostPerturbation(
                        f"{message}; use --dtype float32, or --estimator gradient or curvature, which differentiate"
                    )
                self.notes.append(message)

    @torch.no_grad()
    def mirror(self) -> None:
        """theta <- base - delta_k."""
        assert self._perturbation is not None
        self._perturbation.mirror()

    @torch.no_grad()
    def restore(self) -> None:
        """theta <- base; that it is bitwise the base again is verified."""
        if self._perturbation is None:
            return
        self._perturbation.restore()
        if not self._perturbation.is_restored():
            raise RuntimeError("weights differ from their base after restoring: non-finite weights in the model?")

    def log_abs_gradient_norms(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """||grad Sum_t log|P_t||| over all parameters, (B,) fp64; and P_t, (B, S), of the same forward pass.

        From one backward pass for the whole batch. Before the first use a few samples are compared with plain
        autograd; a model for which the two differ, or which has a module that the batched method cannot handle,
        is done by plain autograd a sample at a time, and a note says so.
        """
        batch = batch.to(self.device)
        if self._batched_gradients is None:
            self._batched_gradients = self._batched_gradients_agree(batch)
        if self._batched_gradients:
            self.forwards += 1
            self.backwards += 1
            return per_sample_gradient_norms(self.model, batch, log_abs_logprob)
        self.forwards += len(batch)
        self.backwards += len(batch)
        return autograd_norms(self.model, batch, log_abs_logprob)

    def _batched_gradients_agree(self, batch: Batch) -> bool:
        few = batch.rows(0, min(2, len(batch))).to(self.device)
        try:
            batched = per_sample_gradient_norms(self.model, few, log_abs_logprob)[0]
        except UnsupportedModule as error:
            return self._fall_back(str(error))
        plain = autograd_norms(self.model, few, log_abs_logprob)[0]
        difference = ((batched - plain).abs() / plain.clamp_min(1e-30)).max().item()
        if difference > GRADIENT_TOLERANCE[self.dtype]:
            return self._fall_back(f"batched and plain gradients differ by {difference:.1e} on the first samples")
        return True

    def _fall_back(self, why: str) -> bool:
        note = f"gradient: {why}; each sample is differentiated by itself, which is slower"
        self.notes.append(note)
        warnings.warn(note, stacklevel=3)
        return False

    @torch.no_grad()
    def second_derivatives(self, batch: Batch, seed: int, draw: int) -> torch.Tensor:
        """v^T (grad^2 P_t) v along random signs v over all parameters, (B, S).

        Differentiates twice in forward mode, so nothing cancels and bfloat16 is safe. Needs eager attention:
        the fused kernels have no forward derivative.
        """
        batch = batch.to(self.device)
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        signs = {name: fill_signs_(torch.empty_like(w), seed, draw, name) for name, w in weights.items()}

        def along(step: torch.Tensor) -> torch.Tensor:
            moved = {f"model.{name}": w + step * signs[name] for name, w in weights.items()}
            return functional_call(_LogProbs(self.model), moved, (batch,))

        def slope(step: torch.Tensor) -> torch.Tensor:
            return jvp(along, (step,), (torch.ones_like(step),))[1]

        zero = torch.zeros((), device=self.device, dtype=self.dtype)
        self.forwards += 1
        implementation = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            with _TwiceDifferentiable():
                return jvp(slope, (zero,), (torch.ones_like(zero),))[1]
        finally:
            self.model.set_attn_implementation(implementation)

    def measure_gradient_error(self, batch: Batch) -> None:
        """Set `gradient_error`: the largest relative error of this dtype's gradient norms against fp32, over at
        most 8 samples. Nothing to measure in fp32 and above."""
        if self.dtype in (torch.float32, torch.float64):
            return
        few = batch.rows(0, min(8, len(batch)))
        here, _ = self.log_abs_gradient_norms(few)
        exact, _ = TransformersReplica(copy.deepcopy(self.model).float()).log_abs_gradient_norms(few)
        self.gradient_error = ((here - exact).abs() / exact).max().item()


class _LogProbs(nn.Module):
    """The model and the log-probs of its scored tokens as one function of the weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        return scored_logprobs(self.model, batch)


class _TwiceDifferentiable(TorchFunctionMode):
    """Spells out the fused functions whose forward derivative torch cannot differentiate again."""

    _SPELLED_OUT: ClassVar = {F.silu: lambda x, inplace=False: x * torch.sigmoid(x)}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return self._SPELLED_OUT.get(func, func)(*args, **(kwargs or {}))
