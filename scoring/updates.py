"""Updates of an optimiser that are tried out and taken back: what training on a sample would do to the weights.

Forecasts of difficulty look along the path that these updates take. The weights that take part are those that require
a gradient: all of them, or adapters alone. Afterwards they are bitwise as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from scoring.errors import RefusedUnderWay, UserError
from scoring.settings import Doc, Ge, Gt, named

OptimizerName = Literal["adamw", "sgd", "adafactor", "adamw-8bit"]
ABOUT_OPTIMIZERS = (
    "AdamW; plain gradient descent; Adafactor, whose rate is relative to a matrix's size; AdamW with 8-bit moments"
)

# Of Adafactor: the learning rate is relative to the root mean square of a matrix, at least this, and an update is
# scaled down to that one (Shazeer and Stern 2018).
LEAST_SIZE, CLIP_THRESHOLD = 1e-3, 1.0

# A trial move is at least this long, relative to the norm of the weights: a shorter one drowns in rounding.
SHORTEST_MOVE = 1e-4
# How far the length of a stored update may be from that of the intended one before a forecast measures rounding.
SURVIVAL_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """How an update is made of a gradient."""

    optimizer: Annotated[OptimizerName, Doc(ABOUT_OPTIMIZERS)] = "adamw"
    learning_rate: Annotated[float, Gt(0), Doc("of the optimiser")] = 5e-5
    weight_decay: Annotated[float, Ge(0), Doc("of the optimiser")] = 0.0
    clip_norm: Annotated[
        float | None, Gt(0), Doc("the gradient is scaled down to this norm; an empty value in a spec file turns it off")
    ] = 1.0

    @classmethod
    def of(cls, settings: Any) -> UpdateSettings:
        """Those of any settings that have fields of the same names."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(UpdateSettings)})


def make_optimizer(
    parameters: Iterable[nn.Parameter], name: OptimizerName, learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """The optimiser of a training, of whose first updates forecasts are made.

    Raises:
        UserError: its package is not installed, or it does not update weights of this number format.
    """
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=weight_decay)
    if name == "adafactor":
        return torch.optim.Adafactor(
            parameters, lr=learning_rate, weight_decay=weight_decay, eps=(None, LEAST_SIZE), d=CLIP_THRESHOLD
        )
    if name == "adamw-8bit":
        parameters = list(parameters)
        if any(p.dtype == torch.float64 for p in parameters):
            raise UserError(
                f"{named('optimizer')} adamw-8bit does not update float64 weights: use {named('dtype')} float32"
            )
        try:
            from bitsandbytes.optim.adamw import AdamW8bit
        except ImportError:
            raise UserError(
                f"{named('optimizer')} adamw-8bit needs the package bitsandbytes: pip install 'mrd-bench[8bit]'"
            ) from None
        kind: Any = AdamW8bit
        made: torch.optim.Optimizer = kind(parameters, lr=learning_rate, weight_decay=weight_decay)
        return made
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
    """Scale the gradients down to the norm `max_norm`; returns the norm before that, in fp32 at least."""
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if all(g.dtype in (torch.float32, torch.float64) for g in gradients):
        return float(nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm))
    norm = math.sqrt(sum(map(_squares, gradients)))
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm, device=gradients[0].device))
    return norm


@contextmanager
def gradients_put_aside(model: nn.Module) -> Iterator[None]:
    """Within the context no weight holds a gradient at first; afterwards each holds the one that it held before."""
    held = [(p, p.grad) for p in model.parameters()]
    for p, _ in held:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in held:
            p.grad = gradient


@dataclass(frozen=True)
class Direction:
    """What one update would add to the weights.

    Attributes:
        change: by the parameter's name.
        length: its norm over all weights.
    """

    change: Mapping[str, torch.Tensor]
    length: float


class TrialUpdates:
    """Moves the trainable weights of a model along updates of an optimiser whose moments are empty, and back.

    It holds a copy of the weights, the base, from which they are restored bitwise.

    Args:
        model: the model, in eval mode.
        settings: of the optimiser.
    """

    def __init__(self, model: PreTrainedModel, settings: UpdateSettings) -> None:
        self._settings = settings
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._live:
            raise UserError("no weight of the model requires a gradient: there is nothing that an update would change")
        self._base = {name: p.detach().clone() for name, p in self._live.items()}
        self._survival_is_checked = False
        self._length_of_weights = math.sqrt(sum(_squares(base) for base in self._base.values()))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights that take part."""
        return list(self._live.values())

    @property
    def kept(self) -> list[torch.Tensor]:
        """What is held in memory beside the weights."""
        return list(self._base.values())

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of real updates, with empty moments."""
        settings = self._settings
        return make_optimizer(self.parameters, settings.optimizer, settings.learning_rate, settings.weight_decay)

    @property
    def fastest(self) -> float | None:
        """The largest length of an update, where updates grow with the gradient, as those of SGD do; None where they do
        not, as those of all others."""
        if self._settings.optimizer != "sgd":
            return None
        return self._settings.learning_rate * (self._settings.clip_norm or math.inf)

    def take_direction(self) -> Direction:
        """The first update that the optimiser would make of the gradients that the weights hold; takes them away.

        AdamW from empty moments, of however many bits: -eta (g / (|g| + eps) + lambda theta), eps = 1e-8; SGD:
        -eta (g + lambda theta); Adafactor: see `_adafactor_step`; g is clipped.
        """
        settings = self._settings
        clip_gradients(self._live.values(), settings.clip_norm)
        change = {}
        with torch.no_grad():
            for name, p in self._live.items():
                if p.grad is None:
                    continue
                g = p.grad
                if settings.optimizer == "adafactor":
                    g = _adafactor_step(g, p, min(settings.learning_rate, 1.0) / settings.learning_rate)
                elif settings.optimizer != "sgd":
                    g = g.div_(g.abs().add_(1e-8))
                change[name] = g.add_(p, alpha=settings.weight_decay).mul_(-settings.learning_rate)
                p.grad = None
        return Direction(change, math.sqrt(sum(_squares(part) for part in change.values())))

    def measurable_updates(self, direction: Direction) -> float:
        """One update, or as many as it takes to move the weights by a length at which margins differ by more than
        rounding."""
        if not direction.length or not math.isfinite(self._length_of_weights):
            return 1.0
        return max(1.0, SHORTEST_MOVE * self._length_of_weights / direction.length)

    @torch.no_grad()
    def move(self, direction: Direction, updates: float) -> None:
        """theta <- theta + so many times the change of one update."""
        for name, change in direction.change.items():
            self._live[name].add_(change, alpha=updates)

    @torch.no_grad()
    def restore(self) -> None:
        """theta <- base, bitwise."""
        for name, p in self._live.items():
            p.copy_(self._base[name])
            p.grad = None

    @torch.no_grad()
    def distance_moved(self) -> tuple[float, float]:
        """How far the weights are from the base: mean |delta theta| over all of them, and the norm."""
        return distance((p.detach(), self._base[name]) for name, p in self._live.items())

    @torch.no_grad()
    def check_survival(self, direction: Direction, updates: float) -> None:
        """Refuse to go on if the weights' number format has rounded away the first move; later ones are not looked at.

        Raises:
            RefusedUnderWay: the weights have not moved by the length that they should have.
        """
        if self._survival_is_checked:
            return
        _, moved = self.distance_moved()
        survival = moved / (direction.length * updates) if direction.length else 1.0
        if math.isnan(survival):
            return  # an update that is no number says nothing of the format
        if abs(survival - 1) > SURVIVAL_TOLERANCE:
            dtype = str(next(iter(self._live.values())).dtype).removeprefix("torch.")
            self.restore()
            raise RefusedUnderWay(
                f"the update does not survive {dtype} storage: the weights moved {survival:.3g} times as far as they "
                f"should have at {named('learning_rate')} {self._settings.learning_rate:g}, expected 1 ± "
                f"{SURVIVAL_TOLERANCE}; use {named('dtype')} float32"
            )
        self._survival_is_checked = True


def _adafactor_step(g: torch.Tensor, theta: torch.Tensor, rate: float) -> torch.Tensor:
    """What Adafactor moves a weight by from empty moments, without its decay, in units of -eta.

    The second moments of a matrix are an outer product of the means of its rows' and its columns' squares, over the
    mean of all: v = r c^T / mean(r). The move is rho a u / max(1, rms(u) / d), with u = g / sqrt(v), a the root mean
    square of the weights, at least 1e-3, and rho = min(eta, 1) / eta.

    Args:
        g: its gradient; overwritten.
        theta: the weights.
        rate: rho.
    """
    eps = torch.finfo(theta.dtype).eps
    squares = g.square()
    if g.dim() > 1:
        rows, columns = squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)
        squares = rows @ columns / rows.mean(-2, keepdim=True).clamp_(min=eps)
    update = g.mul_(squares.clamp_(min=eps**2).rsqrt_())
    size = max(LEAST_SIZE, _root_mean_square(theta))
    return update.mul_(rate * size / max(1.0, _root_mean_square(update) / CLIP_THRESHOLD))


def _root_mean_square(tensor: torch.Tensor) -> float:
    return math.sqrt(_squares(tensor) / tensor.numel())


def distance(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """How far weights have moved: mean |delta theta| over all of them, and the norm.

    Args:
        pairs: the weights of each parameter, at least one, and where they were.
    """
    total, squares, count = sums_of_changes(pairs)
    return total / count, math.sqrt(squares)


def sums_of_changes(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float, int]:
    """Sum of |delta theta|, sum of its squares, and how many weights there are.

    Args:
        pairs: weights, and where they were.
    """
    total, squares, count = 0.0, 0.0, 0
    for moved, base in pairs:
        difference = (moved - base).double()
        total += difference.abs().sum().item()
        squares += difference.square().sum().item()
        count += difference.numel()
    return total, squares, count


def _squares(tensor: torch.Tensor) -> float:
    precise = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return float(torch.linalg.vector_norm(tensor, dtype=precise)) ** 2
