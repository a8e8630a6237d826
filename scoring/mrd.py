"""Memory Removal Difficulty: two statistics and four estimators.

P_t(theta) = log p(x_t | x_<t; theta) over the scored tokens of a sample, delta ~ N(0, sigma^2 I) over all
parameters, and the relative change of one draw is

    Delta_k = Sum_t (P_t(theta) - P_t(theta + delta_k)) / P_t(theta).

Statistics (the paper gives both under one name):
    mean_abs   (1/K) Sum_k |Delta_k|     Algorithm 1                  O(sigma)
    abs_mean   |(1/K) Sum_k Delta_k|     Definition 3.1, Theorem 3.2  O(sigma^2)

Estimators, all returning one number per sample and draw, which `reduce_draws` turns into the statistic:
    monte-carlo  both       Delta_k as printed
    antithetic   abs_mean   (Delta(delta_k) + Delta(-delta_k)) / 2: first-order terms cancel exactly
    gradient     mean_abs   sigma * sqrt(2/pi) * ||grad Sum_t log|P_t|||: exact as sigma -> 0, no sampling
    curvature    abs_mean   -(sigma^2/2) Sum_t v^T H_t v / P_t with random signs v: Hutchinson on Theorem 3.2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol

import numpy as np
import torch

from scoring.errors import UserError
from scoring.progress import advance, expect
from scoring.samples import Batch
from scoring.settings import Doc, Ge, Gt, named

Statistic = Literal["mean_abs", "abs_mean"]
EstimatorName = Literal["monte-carlo", "antithetic", "gradient", "curvature"]

# Largest median relative standard error of draws "auto".
DEFAULT_TOLERANCE = 0.05

# Settings that scoring and unlearning share.
Sigma = Annotated[float, Gt(0), Doc("standard deviation of the perturbation of every weight; the paper uses 1e-5")]
NumberOfDraws = Annotated[
    Annotated[int, Ge(0)] | Literal["auto"] | None,
    Doc("K, or auto: until the standard error is within the tolerance (default: the estimator's own)"),
]
StatisticChoice = Annotated[
    Statistic | None, Doc("mean_abs (Algorithm 1) or abs_mean (Definition 3.1) (default: the estimator's own)")
]


@dataclass(frozen=True)
class Estimator:
    """Which statistics an estimator gives, and by how many draws.

    Attributes:
        statistics: the statistics it estimates; the first is its default.
        default_draws: the number of draws if the user names none; 0 if it draws nothing.
        perturbs: whether it moves stored weights, which must then hold sigma: fp32, not bfloat16.
    """

    statistics: tuple[Statistic, ...]
    default_draws: int
    perturbs: bool


ESTIMATORS: dict[EstimatorName, Estimator] = {
    "monte-carlo": Estimator(("mean_abs", "abs_mean"), 200, True),
    "antithetic": Estimator(("abs_mean",), 64, True),
    "gradient": Estimator(("mean_abs",), 0, False),
    "curvature": Estimator(("abs_mean",), 8, False),
}


def no_gradients(estimator: str) -> UserError:
    """The error for an estimator that differentiates on an engine, vLLM, that cannot."""
    return UserError(
        f"{named('estimator')} {estimator} differentiates, which vLLM does not: use {named('engine')} transformers, or "
        f"{named('estimator')} monte-carlo or antithetic"
    )


def statistic_and_draws(
    estimator: EstimatorName, statistic: Statistic | None, draws: int | Literal["auto"] | None
) -> tuple[Statistic, int | Literal["auto"]]:
    """Fill in the estimator's defaults where statistic or draws are None; 0 draws for an estimator that draws nothing.

    Raises:
        UserError: the estimator does not estimate the statistic; or there is a single draw, which has no standard
            error.
    """
    defaults = ESTIMATORS[estimator]
    statistic = statistic or defaults.statistics[0]
    if statistic not in defaults.statistics:
        alternatives = [name for name, other in ESTIMATORS.items() if statistic in other.statistics]
        raise UserError(
            f"{named('estimator')} {estimator} does not estimate {statistic}: it is for "
            f"{', '.join(defaults.statistics)}; for {statistic} use {' or '.join(alternatives)}"
        )
    if not defaults.default_draws:
        return statistic, 0
    draws = defaults.default_draws if draws is None else draws
    if draws != "auto" and draws < 2:
        raise UserError(
            f"{named('draws')} is {draws}: expected a whole number of at least 2, so that a standard error exists, or "
            "auto"
        )
    return statistic, draws


class Perturbable(Protocol):
    """What the estimators need from a model replica."""

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """P_t under the current weights, (B, S); 0 at padding and at saturated tokens."""

    def exact_logprobs(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """P_t under the base weights in fp64, (B, S) a batch."""

    def perturb(self, sigma: float, seed: int, draw: int) -> None:
        """theta <- base + delta_k."""

    def mirror(self) -> None:
        """theta <- base - delta_k, after `perturb`."""

    def restore(self) -> None:
        """theta <- base, bitwise."""

    def report_rounding(self, share: float) -> None:
        """Record how large the rounding of log-probs is, relative to the scores."""

    def log_abs_gradient_norms(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """||grad Sum_t log|P_t||| over all parameters, (B,); and P_t, (B, S), of the same forward pass."""

    def second_derivatives(self, batch: Batch, seed: int, draw: int) -> torch.Tensor:
        """v^T H_t v of every P_t along random signs v, (B, S)."""


def relative_change(base: torch.Tensor, moved: torch.Tensor) -> np.ndarray:
    """Delta of one draw: Sum_t (P_t - P'_t) / P_t. (B, S) twice -> (B,) fp64.

    Tokens with P_t = 0 (padding, or saturated) are left out.
    """
    return _over_base(base, base.double() - moved.double())


def _over_base(base: torch.Tensor, numerator: torch.Tensor) -> np.ndarray:
    """Sum_t numerator_t / P_t over the tokens with P_t < 0."""
    nonzero = base < 0
    terms = numerator.double() / torch.where(nonzero, base, -1.0).double()
    return torch.where(nonzero, terms, 0.0).sum(-1).cpu().numpy()


@dataclass(frozen=True)
class Draws:
    """The values that one replica drew for the samples of some batches; rows in batch order.

    Attributes:
        indices: (N,) data-set positions.
        values: (N, K) fp64, one value a draw (K = 1 and no sampling for `gradient`).
        nll: (N,) fp64, -Sum_t P_t in nats.
        saturated: (N,) int64, scored tokens whose probability is exactly 1.
    """

    indices: np.ndarray
    values: np.ndarray
    nll: np.ndarray
    saturated: np.ndarray

    def followed_by(self, more: Draws) -> Draws:
        """The same samples with further draws appended."""
        return replace(self, values=np.concatenate([self.values, more.values], axis=1))


@dataclass(frozen=True)
class Request:
    """What a replica is to estimate.

    Attributes:
        estimator: a key of ESTIMATORS.
        sigma: standard deviation of the perturbation.
        seed: seed of the noise.
        first_draw, last_draw: the draws k with first_draw <= k < last_draw.
    """

    estimator: EstimatorName
    sigma: float
    seed: int
    first_draw: int = 0
    last_draw: int = 1


@dataclass(frozen=True)
class Precision:
    """When there are enough draws: the median relative standard error over the samples is at most `tolerance`.

    Attributes:
        statistic: the statistic whose standard error counts.
        tolerance: the largest median relative standard error.
        draws_per_step: draws between two looks at the error.
        most_draws: the limit at which drawing ends in any case.
    """

    statistic: Statistic
    tolerance: float
    draws_per_step: int = 25
    most_draws: int = 2000


def request_for(
    estimator: EstimatorName,
    statistic: Statistic,
    sigma: float,
    seed: int,
    draws: int | Literal["auto"] | None,
    tolerance: float = DEFAULT_TOLERANCE,
) -> tuple[Request, Precision | None]:
    """The request for all draws of a sample; and the precision to draw to, for draws "auto"."""
    if draws == "auto":
        precision = Precision(statistic, tolerance)
        return Request(estimator, sigma, seed, 0, precision.most_draws), precision
    return Request(estimator, sigma, seed, 0, draws or 1), None


def base_logprobs(replica: Perturbable, batches: Sequence[Batch], estimator: EstimatorName) -> list[torch.Tensor]:
    """The unperturbed log-probs that an estimator compares with, (B, S) a batch.

    For `antithetic` in fp64: the first-order term cancels within a pair, but the rounding of P_t(theta), which all
    pairs share, would not. It can be as large as the O(sigma^2) result, and no standard error would show it.
    """
    if estimator == "antithetic":
        return replica.exact_logprobs(batches)
    return [replica.logprobs(batch) for batch in batches]


def estimate(
    replica: Perturbable,
    batches: Sequence[Batch],
    request: Request,
    base: Sequence[torch.Tensor] | None = None,
    precision: Precision | None = None,
) -> Draws:
    """Run an estimator over batches, one pass over all of them per draw, and leave the weights as they were.

    Args:
        replica: the replica of the model.
        batches: the samples.
        request: what to estimate.
        base: the unperturbed log-probs of each batch if they are known already; None computes them.
        precision: draw until this precision is reached, whatever the draws of the request; None makes those.
    """
    if precision is not None:
        return _estimate_to_precision(replica, batches, request, base, precision)
    if request.estimator == "gradient":
        values, base = _gradient(replica, batches, request)
    else:
        if base is None:
            base = base_logprobs(replica, batches, request.estimator)
        values = _DRAWING_ESTIMATORS[request.estimator](replica, batches, base, request)
    return Draws(
        indices=np.concatenate([batch.indices.cpu().numpy() for batch in batches]),
        values=values,
        nll=np.concatenate([-p.double().sum(-1).cpu().numpy() for p in base]),
        saturated=np.concatenate(
            [((p == 0) & b.mask.to(p.device)).sum(-1).cpu().numpy() for p, b in zip(base, batches, strict=True)]
        ),
    )


def _estimate_to_precision(
    replica: Perturbable,
    batches: Sequence[Batch],
    request: Request,
    base: Sequence[torch.Tensor] | None,
    precision: Precision,
) -> Draws:
    """Draw in steps until the standard error is small enough (`draws="auto"`), or `most_draws` are made."""
    if base is None:
        base = base_logprobs(replica, batches, request.estimator)
    draws: Draws | None = None
    for first in range(0, precision.most_draws, precision.draws_per_step):
        last = min(first + precision.draws_per_step, precision.most_draws)
        step = replace(request, first_draw=first, last_draw=last)
        more = estimate(replica, batches, step, base)
        draws = more if draws is None else draws.followed_by(more)
        if median_relative_error(draws.values, precision.statistic) <= precision.tolerance:
            break
    assert draws is not None
    return draws


def _relative_changes(replica: Perturbable, batches: Sequence[Batch], base: Sequence[torch.Tensor]) -> np.ndarray:
    """Delta of the current perturbation for all samples, (N,)."""
    changes = []
    for p, batch in zip(base, batches, strict=True):
        changes.append(relative_change(p, replica.logprobs(batch)))
        advance()
    return np.concatenate(changes)


def _monte_carlo(
    replica: Perturbable, batches: Sequence[Batch], base: Sequence[torch.Tensor], request: Request
) -> np.ndarray:
    """Algorithm 1, with each draw's noise shared by all samples: a sample's estimate is as accurate as with noise of
    its own, and the noise costs one pass over the weights instead of one per sample."""
    columns = []
    expect((request.last_draw - request.first_draw) * len(batches))
    try:
        for draw in range(request.first_draw, request.last_draw):
            replica.perturb(request.sigma, request.seed, draw)
            columns.append(_relative_changes(replica, batches, base))
    finally:
        replica.restore()
    return np.stack(columns, axis=1)


def _antithetic(
    replica: Perturbable, batches: Sequence[Batch], base: Sequence[torch.Tensor], request: Request
) -> np.ndarray:
    columns = []
    expect((2 * (request.last_draw - request.first_draw) + 1) * len(batches))
    try:
        for draw in range(request.first_draw, request.last_draw):
            replica.perturb(request.sigma, request.seed, draw)
            forward = _relative_changes(replica, batches, base)
            replica.mirror()
            columns.append((forward + _relative_changes(replica, batches, base)) / 2)
    finally:
        replica.restore()
    values = np.stack(columns, axis=1)
    # The perturbed log-probs are rounded too, and part of that rounding is common to all draws. How much is not known,
    # but it is at most the rounding of the unperturbed ones, which is measured here.
    rounding = np.median(np.abs(_relative_changes(replica, batches, base)))
    replica.report_rounding(float(rounding / max(np.median(np.abs(values.mean(axis=1))), np.finfo(float).tiny)))
    return values


def _gradient(
    replica: Perturbable, batches: Sequence[Batch], request: Request
) -> tuple[np.ndarray, list[torch.Tensor]]:
    """The closed form, and the log-probs of its forward pass."""
    expect(len(batches))
    pairs = []
    for batch in batches:
        pairs.append(replica.log_abs_gradient_norms(batch))
        advance()
    norms = np.concatenate([norm.double().cpu().numpy() for norm, _ in pairs])
    return (request.sigma * math.sqrt(2 / math.pi) * norms)[:, None], [logprobs for _, logprobs in pairs]


def _curvature(
    replica: Perturbable, batches: Sequence[Batch], base: Sequence[torch.Tensor], request: Request
) -> np.ndarray:
    columns = []
    expect((request.last_draw - request.first_draw) * len(batches))
    for draw in range(request.first_draw, request.last_draw):
        column = []
        for p, batch in zip(base, batches, strict=True):
            column.append(_over_base(p, -replica.second_derivatives(batch, request.seed, draw)))
            advance()
        columns.append(np.concatenate(column))
    return np.stack(columns, axis=1) * (request.sigma**2 / 2)


_DRAWING_ESTIMATORS = {
    "monte-carlo": _monte_carlo,
    "antithetic": _antithetic,
    "curvature": _curvature,
}


def reduce_draws(values: np.ndarray, statistic: Statistic) -> tuple[np.ndarray, np.ndarray]:
    """The statistic and its standard error from draws, (N, K) -> (N,), (N,).

    For abs_mean the standard error is that of the mean before the absolute value is taken. One column means
    no sampling (`gradient`): the standard error is 0.
    """
    signed = np.abs(values) if statistic == "mean_abs" else values
    count = signed.shape[1]
    error = signed.std(axis=1, ddof=1) / math.sqrt(count) if count > 1 else np.zeros(len(signed))
    return np.abs(signed.mean(axis=1)), error


def median_relative_error(values: np.ndarray, statistic: Statistic) -> float:
    """The median over samples of standard error / value, which `draws="auto"` brings below its tolerance (the
    paper's "stable K", Table 12)."""
    score, error = reduce_draws(values, statistic)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.median(np.where(score > 0, error / score, np.inf)))


def scaling_slope(sigmas: Sequence[float], scores: np.ndarray) -> float:
    """Slope of log MRD against log sigma, by least squares on the median over samples.

    Args:
        sigmas: M perturbation sizes.
        scores: (M, N) MRD of N samples at each.

    Returns:
        1 for a sound mean_abs, 2 for a sound abs_mean, 0 where rounding was measured instead of the model.
    """
    return float(np.polyfit(np.log(sigmas), np.log(np.median(scores, axis=1)), 1)[0])
