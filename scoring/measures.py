"""Measures of how hard a sample is to forget, by name: MRD, forecasts of updates, and what others have proposed.

A measure looks at a batch of samples under one model, at the whole set together, or at the texts alone, and gives one
number a sample. It says whether a higher number should mean harder, and what it costs in forward passes a sample: a
backward pass counts 2, or 1 where only activations are differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from scoring.characteristics import characteristics
from scoring.engine import Replica
from scoring.flip_time import Forecaster, ForgetLoss, Path, gradient_ascent
from scoring.load import load_model
from scoring.margins import flips_needed
from scoring.mrd import Request, estimate, reduce_draws
from scoring.registry import Registry
from scoring.replica import TransformersReplica
from scoring.samples import Batch
from scoring.similarity import gradient_cosines, mean_hidden_states, similarity_to_neighbours
from scoring.training_difficulty import el2n, empirical_fisher, grand, vog
from scoring.updates import TrialUpdates, UpdateSettings

Scope = Literal["batch", "set", "texts"]
# What a measure needs beyond samples and a model that gives log-probabilities.
Need = Literal["model", "thresholds", "retain", "checkpoints"]
# Ending of a column's name -> values of the samples, (B,).
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Asked:
    """What measures are asked for.

    Attributes:
        update: how the algorithm makes an update of a gradient.
        thresholds: of MA below which a sample counts as forgotten, by the name that its column bears.
        lookahead: h, gradients on the way to a threshold, see `scoring.flip_time`.
        sigma: of the perturbation that MRD is about.
        neighbours: k of kNN similarity.
        loss: that the algorithm brings down.
        retain_gradient: safetensors file with the mean gradient over the retain set.
        checkpoints: source and revision of earlier states of the model, the earliest first.
    """

    update: UpdateSettings = field(default_factory=UpdateSettings)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    lookahead: int = 1
    sigma: float = 1e-5
    neighbours: int = 5
    loss: ForgetLoss = gradient_ascent
    retain_gradient: str | None = None
    checkpoints: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True)
class Measure:
    """A measure of difficulty.

    Attributes:
        about: one line.
        source: where it is from.
        harder: +1 if a higher value should mean harder to forget, -1 if easier.
        cost: forward passes a sample, from what is asked for.
        of: for scope "batch" a function of a replica, a batch, what is asked for, and a cache that the measures of a
            batch share; for "set" the same with a list of batches; for "texts" a function of texts and of the corpus.
            It gives an array with a row a sample, or columns where it needs thresholds.
        scope: what `of` looks at.
        needs: see Need; a measure without "model" can be had from vLLM too.
        finish: the rows of all samples -> their values, (N,), for a measure that compares samples.
    """

    about: str
    source: str
    harder: int
    cost: Callable[[Asked], float]
    of: Callable[..., Any]
    scope: Scope = "batch"
    needs: frozenset[Need] = frozenset()
    finish: Callable[[np.ndarray, Asked], np.ndarray] | None = None

    def columns(self, name: str, thresholds: Sequence[str]) -> list[str]:
        """The names of its columns: one, or one for each threshold."""
        return [f"{name}@{threshold}" for threshold in thresholds] if "thresholds" in self.needs else [name]


# --- Of a batch ---------------------------------------------------------------------------------------------


def _nll(replica: Replica, batch: Batch, asked: Asked, cache: dict[str, Any]) -> np.ndarray:
    values: np.ndarray = -replica.logprobs(batch).double().sum(-1).cpu().numpy()
    return values


def _length(replica: Replica, batch: Batch, asked: Asked, cache: dict[str, Any]) -> np.ndarray:
    return batch.mask.sum(-1).double().cpu().numpy()


def _mrd(replica: Replica, batch: Batch, asked: Asked, cache: dict[str, Any]) -> np.ndarray:
    draws = estimate(replica, [batch], Request("gradient", asked.sigma, 0))
    return reduce_draws(draws.values, "mean_abs")[0]


def _distance_over_mrd(replica: TransformersReplica, batch: Batch, asked: Asked, cache: dict[str, Any]) -> np.ndarray:
    """Sum_t a_t / ||grad Sum_t log|P_t|||, with a_t = P_t - log(1 - p_t) the log-odds. Saturated tokens, whose log-odds
    are infinite, are left out of both."""
    norms, logprobs = replica.log_abs_gradient_norms(batch)
    counts = batch.mask.to(logprobs.device) & (logprobs < 0)
    exact = torch.where(counts, logprobs, -1.0).double()
    log_odds = torch.where(counts, exact - torch.log(-torch.expm1(exact)), 0.0)
    values: np.ndarray = (log_odds.sum(-1).to(norms.device) / norms).cpu().numpy()
    return values


def _flip_time(replica: TransformersReplica, batch: Batch, asked: Asked, cache: dict[str, Any]) -> Columns:
    thresholds = list(asked.thresholds.values())
    forecaster = _forecaster(replica, asked, cache)
    if asked.lookahead == 1:
        fastest = forecaster.trial.fastest
        rows = [
            [path.updates_until(threshold, fastest) for threshold in thresholds]
            for path in _looks(replica, batch, asked, cache)
        ]
    else:
        with _counted(replica, forecaster):
            rows = [forecaster.forecast([one], thresholds, asked.lookahead)[0] for one in _one_by_one(replica, batch)]
    return _by_threshold(rows, asked)


def _margin_over_drop(replica: TransformersReplica, batch: Batch, asked: Asked, cache: dict[str, Any]) -> Columns:
    """The k-th smallest margin, which must be gone before MA is below the threshold, over the mean drop an update."""
    rows = []
    for path in _looks(replica, batch, asked, cache):
        before, after = path.margins
        drop = float(np.mean(before - after)) / path.places[1]
        distances = [_kth_margin(before, threshold) for threshold in asked.thresholds.values()]
        # A drop that is no number gives none.
        rows.append([0.0 if d <= 0 else math.inf if drop <= 0 else d / drop for d in distances])
    return _by_threshold(rows, asked)


def _kth_margin(margins: np.ndarray, threshold: float) -> float:
    if np.isnan(margins).any():
        return math.nan
    k = flips_needed(len(margins), threshold)
    return math.inf if k is None else 0.0 if k == 0 else float(np.sort(margins)[k - 1])


def _grand(replica: TransformersReplica, batch: Batch, asked: Asked, cache: dict[str, Any]) -> np.ndarray:
    return grand(replica.model, batch.to(replica.device)).cpu().numpy()


def _el2n(replica: TransformersReplica, batch: Batch, asked: Asked, cache: dict[str, Any]) -> np.ndarray:
    return el2n(replica.model, batch.to(replica.device)).cpu().numpy()


def _empirical_fisher(replica: TransformersReplica, batch: Batch, asked: Asked, cache: dict[str, Any]) -> np.ndarray:
    return empirical_fisher(replica.model, batch.to(replica.device)).cpu().numpy()


def _vog(replica: TransformersReplica, batch: Batch, asked: Asked, cache: dict[str, Any]) -> np.ndarray:
    def states() -> Iterator[PreTrainedModel]:
        for source, revision in asked.checkpoints:
            yield load_model(source, "float32", str(replica.device), revision)
        yield replica.model

    return vog(states(), batch.to(replica.device)).cpu().numpy()


def _gradient_cosine(replica: TransformersReplica, batch: Batch, asked: Asked, cache: dict[str, Any]) -> np.ndarray:
    assert asked.retain_gradient is not None
    direction = load_file(asked.retain_gradient, device=str(replica.device))
    return gradient_cosines(replica.model, batch.to(replica.device), direction).numpy()


def _hidden_states(replica: TransformersReplica, batch: Batch, asked: Asked, cache: dict[str, Any]) -> np.ndarray:
    return mean_hidden_states(replica.model, batch.to(replica.device)).cpu().numpy()


def _one_by_one(replica: TransformersReplica, batch: Batch) -> Iterator[Batch]:
    """The samples as batches of their own: each takes the weights along its own updates."""
    return (batch.rows(row, row + 1).to(replica.device) for row in range(len(batch)))


@contextmanager
def _counted(replica: TransformersReplica, forecaster: Forecaster) -> Iterator[None]:
    """Within the context the passes of a forecaster are its replica's too."""
    forwards, backwards = forecaster.forwards, forecaster.backwards
    yield
    replica.forwards += forecaster.forwards - forwards
    replica.backwards += forecaster.backwards - backwards


def _forecaster(replica: TransformersReplica, asked: Asked, cache: dict[str, Any]) -> Forecaster:
    if "forecaster" not in cache:
        cache["forecaster"] = Forecaster(replica.model, TrialUpdates(replica.model, asked.update), asked.loss)
    forecaster: Forecaster = cache["forecaster"]
    return forecaster


def _looks(replica: TransformersReplica, batch: Batch, asked: Asked, cache: dict[str, Any]) -> list[Path]:
    """The first looks at each sample, which the measures of a batch share."""
    if "looks" not in cache:
        forecaster = _forecaster(replica, asked, cache)
        with _counted(replica, forecaster):
            cache["looks"] = [path for one in _one_by_one(replica, batch) for path in forecaster.first_looks([one])]
    looks: list[Path] = cache["looks"]
    return looks


def _by_threshold(rows: Any, asked: Asked) -> Columns:
    values = np.asarray(rows, dtype=np.float64).reshape(-1, len(asked.thresholds))
    return {name: values[:, i] for i, name in enumerate(asked.thresholds)}


# --- Of the set together ------------------------------------------------------------------------------------


def _joint_forecast(
    replica: TransformersReplica, batches: Sequence[Batch], asked: Asked, cache: dict[str, Any]
) -> Columns:
    forecaster = _forecaster(replica, asked, cache)
    on_device = [batch.to(replica.device) for batch in batches]
    with _counted(replica, forecaster):
        rows = forecaster.forecast(on_device, list(asked.thresholds.values()), asked.lookahead)
    return _by_threshold(rows, asked)


# --- Of the texts -------------------------------------------------------------------------------------------


def _frequency(texts: Sequence[str], corpus: Sequence[str]) -> np.ndarray:
    return np.array([found.occurrence_frequency for found in characteristics(texts, corpus)])


# --- By name ------------------------------------------------------------------------------------------------

BATCHED_GRADIENT = 2.4  # measured, see docs/speed.md: a forward, a backward of activations, and the norms


def _forecast_cost(asked: Asked) -> float:
    """The first looks take 4; each threshold with a look-ahead h > 1 takes h - 1 gradients and a last look more."""
    return 4.0 + (3 * (asked.lookahead - 1) + 1) * len(asked.thresholds) * (asked.lookahead > 1)


_FORECAST = frozenset[Need]({"model", "thresholds"})
_MODEL = frozenset[Need]({"model"})

MEASURES: Registry[Measure] = Registry(
    "measure",
    {
        "flip-time": Measure(
            "updates until MA is below a threshold, the sample forgotten alone: distance over speed of its margins",
            "this suite, docs/forecast.md",
            +1,
            _forecast_cost,
            _flip_time,
            needs=_FORECAST,
        ),
        "joint-forecast": Measure(
            "the same where all samples are forgotten together, along the mean gradient of all",
            "this suite, docs/forecast.md",
            +1,
            _forecast_cost,
            _joint_forecast,
            "set",
            needs=_FORECAST,
        ),
        "margin-over-drop": Measure(
            "the margin that must be lost, over the mean margin that the first update takes",
            "this suite, docs/forecast.md",
            +1,
            lambda asked: 4.0,
            _margin_over_drop,
            needs=_FORECAST,
        ),
        "distance-over-mrd": Measure(
            "log-odds over the norm of the gradient that MRD is: distance over speed without an update",
            "this suite, docs/forecast.md",
            +1,
            lambda asked: BATCHED_GRADIENT,
            _distance_over_mrd,
            needs=_MODEL,
        ),
        "mrd": Measure(
            "change of log-probabilities under noise on the weights, by the gradient",
            "the MRD paper, Algorithm 1",
            -1,
            lambda asked: BATCHED_GRADIENT,
            _mrd,
            needs=_MODEL,
        ),
        "nll": Measure(
            "negative log-likelihood of the scored tokens, summed",
            "Carlini et al. 2021",
            -1,
            lambda asked: 1.0,
            _nll,
        ),
        "length": Measure("scored tokens", "-", +1, lambda asked: 0.0, _length),
        "frequency": Measure(
            "how often the corpus has the text's content-word trigrams",
            "the MRD paper, Table 11",
            +1,
            lambda asked: 0.0,
            _frequency,
            "texts",
        ),
        "grand": Measure(
            "norm of the gradient of the training loss",
            "Paul et al. 2021",
            -1,
            lambda asked: BATCHED_GRADIENT,
            _grand,
            needs=_MODEL,
        ),
        "el2n": Measure(
            "distance of the predicted distribution from the true token",
            "Paul et al. 2021",
            -1,
            lambda asked: 1.0,
            _el2n,
            needs=_MODEL,
        ),
        "vog": Measure(
            "how much the input gradient varies over checkpoints of the training",
            "Agarwal et al. 2022",
            +1,
            lambda asked: 2.0 * (1 + len(asked.checkpoints)),
            _vog,
            needs=frozenset({"model", "checkpoints"}),
        ),
        "empirical-fisher": Measure(
            "squared norm of the gradient of the log-likelihood",
            "Kirkpatrick et al. 2017",
            -1,
            lambda asked: BATCHED_GRADIENT,
            _empirical_fisher,
            needs=_MODEL,
        ),
        "gradient-cosine": Measure(
            "cosine of the sample's gradient and the mean gradient over the retain set",
            "gradient conflict, Yu et al. 2020",
            +1,
            lambda asked: 3.0,
            _gradient_cosine,
            needs=frozenset({"model", "retain"}),
        ),
        "knn-similarity": Measure(
            "mean cosine similarity of the hidden states to those of the k nearest samples",
            "Papernot and McDaniel 2018, with cosines",
            +1,
            lambda asked: 1.0,
            _hidden_states,
            needs=_MODEL,
            finish=lambda rows, asked: similarity_to_neighbours(rows, asked.neighbours),
        ),
    },
    of=Measure,
)
