"""Second derivatives of log-probs along random signs.

By series that are carried forward with the values, see `scoring.taylor`; for a model that uses an operation whose
series is not known there, by torch's forward mode twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from scoring.abilities import abilities_of
from scoring.experts import experts_of, spelled_out
from scoring.logprob import row_by_row, scored_logprobs
from scoring.perturbation import fill_signs_
from scoring.precision import as_precise_as_weights
from scoring.sample_gradients import without_padding_index
from scoring.samples import Batch
from scoring.taylor import NoRule, Recent, Series, straight

# What second derivatives are made of: series, dual numbers of dual numbers.
Way = Literal["series", "forward mode"]


# Draws whose signs are kept together: a bit each.
DRAWS_IN_A_BYTE = 8


class Signs:
    """Random signs for all weights of a model, drawn when they are first asked for, and kept for the next batches as
    long as the same few draws are asked for: a byte a weight for eight of them.

    Args:
        seed: of the signs.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._first_draw = 0
        self._bits: dict[str, torch.Tensor] = {}
        self._drawn: set[tuple[str, int]] = set()

    @property
    def kept(self) -> list[torch.Tensor]:
        """What is held in memory."""
        return list(self._bits.values())

    def of(self, draw: int, name: str, p: torch.Tensor) -> torch.Tensor:
        """Those of a parameter, of its shape and dtype."""
        bit = draw % DRAWS_IN_A_BYTE
        if draw - bit != self._first_draw:
            self._first_draw, self._bits, self._drawn = draw - bit, {}, set()
        if (name, draw) in self._drawn:
            ones = self._bits[name].bitwise_right_shift(bit).bitwise_and_(1)
            return ones.to(p.dtype).mul_(2).sub_(1)
        signs = fill_signs_(torch.empty_like(p), self.seed, draw, name)
        ones = (signs > 0).to(torch.uint8).bitwise_left_shift_(bit)
        self._bits[name] = self._bits[name].bitwise_or_(ones) if name in self._bits else ones
        self._drawn.add((name, draw))
        return signs


@contextmanager
def _twice_differentiable(model: PreTrainedModel, replacements: Replacements) -> Iterator[None]:
    """Within the context fused functions are spelled out, and so are mixtures of experts."""
    abilities_of(model)  # before anything is differentiated
    with spelled_out(experts_of(model)), as_precise_as_weights(model), _SpelledOut(replacements):
        yield


@torch.no_grad()
def second_derivatives_along_signs(
    model: PreTrainedModel, batch: Batch, signs: Signs, draw: int, way: Way = "series"
) -> torch.Tensor:
    """d^2/ds^2 P_t(theta + s v) at s = 0 along random signs v, (B, S).

    Args:
        model: a causal LM in eval mode.
        batch: B samples.
        signs, draw: v.
        way: of differentiating. Series take 5 matrix products for each of the model's and no copy of the weights,
            forward mode 9 and several.

    Raises:
        NoRule: the model uses an operation whose series is not known.
    """
    if way == "series":
        return row_by_row(model, batch, lambda rows, _: (_by_series(model, rows, signs, draw),))[0]
    everything = {name: signs.of(draw, name, p) for name, p in model.named_parameters()}
    return row_by_row(model, batch, lambda rows, _: (_by_forward_mode(model, rows, everything),))[0]


def _by_series(model: PreTrainedModel, batch: Batch, signs: Signs, draw: int) -> torch.Tensor:
    recent = Recent()

    def moving(name: str, p: nn.Parameter) -> Series:
        # As numbers signs are there where they are used: all of them would be as much as the weights.
        return straight(p.detach(), partial(recent.get, name, partial(signs.of, draw, name, p.detach())))

    moved: dict[str, torch.Tensor] = {f"model.{name}": moving(name, p) for name, p in model.named_parameters()}
    with _twice_differentiable(model, SERIES):
        logprobs = functional_call(_LogProbs(model), moved, (batch,))
    if not isinstance(logprobs, Series) or logprobs.curve is None:
        raise NoRule("the log-probs do not bend")
    return logprobs.curve


def _by_forward_mode(model: PreTrainedModel, batch: Batch, signs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def logprobs(step: torch.Tensor) -> torch.Tensor:
        moved = {f"model.{name}": w + step * signs[name] for name, w in weights.items()}
        values: torch.Tensor = functional_call(_LogProbs(model), moved, (batch,))
        return values

    def slope(step: torch.Tensor) -> torch.Tensor:
        derivative: torch.Tensor = jvp(logprobs, (step,), (torch.ones_like(step),))[1]
        return derivative

    zero = torch.zeros((), device=batch.input_ids.device, dtype=next(model.parameters()).dtype)
    with _twice_differentiable(model, FORWARD_MODE):
        curvature: torch.Tensor = jvp(slope, (zero,), (torch.ones_like(zero),))[1]
    return curvature


@torch.enable_grad()
def second_derivative_sum_by_reverse_mode(model: PreTrainedModel, batch: Batch, signs: Signs, draw: int) -> float:
    """The sum over tokens of `second_derivatives_along_signs`, by differentiating a gradient."""
    # All parameters, as forward mode does, frozen ones too.
    parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}

    def derivative(scalar: torch.Tensor, create_graph: bool) -> torch.Tensor:
        gradients = torch.autograd.grad(scalar, list(parameters.values()), create_graph=create_graph, allow_unused=True)
        pairs = zip(gradients, parameters, strict=True)
        return torch.stack([(g * signs.of(draw, name, g.detach())).sum() for g, name in pairs if g is not None]).sum()

    with _twice_differentiable(model, REVERSE_MODE), without_padding_index(model):
        moved = {f"model.{name}": p for name, p in parameters.items()}
        logprobs = functional_call(_LogProbs(model), moved, (batch,))
        slope = derivative(logprobs.sum(), create_graph=True)
        return derivative(slope, create_graph=False).item()


class _LogProbs(nn.Module):
    """The model and the log-probs of its scored tokens as one function of the weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        return scored_logprobs(self.model, batch)


def _layer_norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def _silu(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    return x * torch.sigmoid(x)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """softmax(Q K^T scale + mask) V, without dropout: models are in eval mode."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


Replacements = Mapping[Callable[..., Any], Callable[..., Any]]
# Fused attention cannot be differentiated twice.
REVERSE_MODE: Replacements = {F.scaled_dot_product_attention: _attention}
# Series have no rule for this one.
SERIES: Replacements = {**REVERSE_MODE, F.layer_norm: _layer_norm}
# In forward mode neither can these: the derivative of silu has no derivative, and that of layer_norm silently holds
# mean and variance fixed.
FORWARD_MODE: Replacements = {**SERIES, F.silu: _silu}


class _SpelledOut(TorchFunctionMode):
    """Replaces fused functions by plain arithmetic."""

    def __init__(self, replacements: Replacements) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function: Callable[..., Any] = self._replacements.get(func, func)
        return function(*args, **(kwargs or {}))
