"""Flip time: a forecast of how many updates it takes until a sample is forgotten.

MRD says how fast a sample's log-probabilities move, not how far they have to. Updates are distance over speed, and both
are to be had from a gradient and one more forward pass: the first update of the algorithm is made for a trial, and the
margin m_t of every scored token, see `scoring.margins`, gives a distance and a speed:

    n_t = m_t(theta) / (m_t(theta) - m_t(theta + u)),    u: what the first update would add to theta.

That is a look-ahead of one gradient, h = 1. The straight line is right for near thresholds. For those further away h
gradients are taken on the way there: the weights are moved a part of the way to the forecast, the gradient and the
margins are looked at again, and the forecast is renewed. A forecast costs 4 forward passes with h = 1, else 3 h + 2.

Samples that are forgotten one by one each take a path of their own. Those that are forgotten together are looked at on
one path, that of the mean gradient of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from scoring.errors import RefusedUnderWay
from scoring.logprob import scored_logits, token_logprobs
from scoring.margins import flip_times, token_margins, updates_until
from scoring.sample_gradients import mean_negative_log_likelihood
from scoring.samples import Batch
from scoring.updates import Direction, TrialUpdates

# The next look is taken at least so much further on than the last one, and never beyond so many updates.
LEAST_PROGRESS = 1.2
FARTHEST = 1e6
# Places at which the speed of growing updates is added up along a path.
PLACES = 1001


@dataclass(frozen=True)
class Outputs:
    """What a model gives for a batch.

    Attributes:
        logits: (B, S, V) at the scored positions.
        logprobs: (B, S) nats, 0 at padding.
        targets: (B, S) int64, the scored tokens.
        mask: (B, S) bool, which of them are no padding.
    """

    logits: torch.Tensor
    logprobs: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor

    def detached(self) -> Outputs:
        """The same without a graph."""
        return Outputs(self.logits.detach(), self.logprobs.detach(), self.targets, self.mask)

    def margins(self) -> list[np.ndarray]:
        """The margins of each sample's scored tokens, (T,) fp64 each."""
        margins = token_margins(self.logits.detach(), self.targets).double().cpu().numpy()
        return [row[mask] for row, mask in zip(margins, self.mask.cpu().numpy(), strict=True)]


# The outputs of the model and those of the initial one -> the loss of each sample that an update brings down, (B,).
ForgetLoss = Callable[[Outputs, Outputs], torch.Tensor]


def gradient_ascent(now: Outputs, initial: Outputs) -> torch.Tensor:
    """The loss of gradient ascent, (B,): less the mean NLL of the scored tokens. Jang et al. 2023."""
    return -mean_negative_log_likelihood(now.logprobs, now.mask)


class InitialOutputs:
    """What the initial model gave for samples, as far as a loss compares with it.

    Args:
        loss: whose attribute `compares`, if it has one, says with what: "logprobs" or "logits".
    """

    def __init__(self, loss: ForgetLoss) -> None:
        self.compares: str | None = getattr(loss, "compares", None)
        # By the sample's position in the data set: log-probs (T,), and logits (T, V) or nothing.
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def keep(self, batch: Batch, outputs: Outputs) -> None:
        """Keep the outputs of the initial model."""
        if self.compares is None:
            return
        counts = batch.mask.sum(-1).tolist()
        for row, (index, count) in enumerate(zip(batch.indices.tolist(), counts, strict=True)):
            logits = outputs.logits[row, :count].detach().clone() if self.compares == "logits" else None
            self._kept[index] = outputs.logprobs[row, :count].detach().clone(), logits

    def of(self, batch: Batch, now: Outputs) -> Outputs:
        """The initial outputs of a batch; where the loss compares with none, those of now."""
        initial = now.detached()
        if self.compares is None:
            return initial
        initial = Outputs(initial.logits, initial.logprobs.clone(), initial.targets, initial.mask)
        if self.compares == "logits":
            initial = replace(initial, logits=initial.logits.clone())
        for row, index in enumerate(batch.indices.tolist()):
            logprobs, logits = self._kept[index]
            initial.logprobs[row, : len(logprobs)] = logprobs
            if logits is not None:
                initial.logits[row, : len(logits)] = logits
        return initial


def outputs_of(model: PreTrainedModel, batch: Batch) -> Outputs:
    """One forward pass; with a graph, if gradients are switched on."""
    logits = scored_logits(model, batch)
    logprobs = token_logprobs(logits, batch.targets).masked_fill(~batch.mask, 0.0)
    return Outputs(logits, logprobs, batch.targets, batch.mask)


class Forecaster:
    """Forecasts flip times under one model, whose weights are bitwise the same after each forecast.

    Args:
        model: a causal LM in eval mode.
        trial: moves its weights.
        loss: of the algorithm.
    """

    def __init__(self, model: PreTrainedModel, trial: TrialUpdates, loss: ForgetLoss = gradient_ascent) -> None:
        self._model, self._trial, self._loss = model, trial, loss
        self.forwards = self.backwards = 0

    def first_looks(self, batches: Sequence[Batch]) -> list[Path]:
        """The margins of each sample before and after a trial move along the first update.

        Args:
            batches: of N samples that are forgotten together, one for a sample by itself, on the model's device.

        Raises:
            RefusedUnderWay: the weights' number format does not hold the update, or the log-probs of one of several
                samples are not finite.
        """
        walk = _Walk(self, batches)
        walk.begin()
        return walk.paths

    def forecast(self, batches: Sequence[Batch], thresholds: Sequence[float], lookahead: int = 1) -> np.ndarray:
        """The updates until MA of each sample falls below each threshold.

        Args:
            batches: of N samples that are forgotten together, one for a sample by itself, on the model's device.
            thresholds: of MA, 0 to 1.
            lookahead: h, how many gradients are taken on the way to each threshold, or to the median sample's.

        Returns:
            (N, thresholds), in the order of the batches; inf where no update brings the sample nearer.

        Raises:
            RefusedUnderWay: see `first_looks`.
        """
        walk = _Walk(self, batches)
        walk.begin()
        columns = []
        for threshold in thresholds:
            paths = walk.paths if lookahead == 1 else walk.towards(threshold, lookahead)
            columns.append([path.updates_until(threshold, self._trial.fastest) for path in paths])
        return np.array(columns).T

    # What a walk asks of the model.

    def gradient(
        self, batches: Sequence[Batch], initial: InitialOutputs, at_start: bool
    ) -> tuple[Direction, list[np.ndarray]]:
        """The update by the mean gradient over all samples, and the margins of every sample.

        Args:
            initial: the outputs of the initial model.
            at_start: this is the initial model: its outputs are kept.

        Raises:
            RefusedUnderWay: a sample spoils the mean: its log-probs are not finite.
        """
        margins = []
        count = sum(map(len, batches))
        for batch in batches:
            with torch.enable_grad():
                now = outputs_of(self._model, batch)
                if at_start:
                    initial.keep(batch, now)
                losses = self._loss(now, initial.of(batch, now))
                if at_start and count > 1:
                    _refuse_not_finite(losses, batch)
                (losses.sum() / count).backward()
            margins += now.margins()
        self.forwards += len(batches)
        self.backwards += len(batches)
        return self._trial.take_direction(), margins

    def initial_outputs(self) -> InitialOutputs:
        """A place for the outputs of the initial model."""
        return InitialOutputs(self._loss)

    @torch.no_grad()
    def margins(self, batches: Sequence[Batch]) -> list[np.ndarray]:
        """The margins of every sample under the weights as they are."""
        self.forwards += len(batches)
        return [margins for batch in batches for margins in outputs_of(self._model, batch).margins()]

    @property
    def trial(self) -> TrialUpdates:
        return self._trial


class _Walk:
    """The walk of the weights along the updates of some samples that are forgotten together."""

    def __init__(self, forecaster: Forecaster, batches: Sequence[Batch]) -> None:
        self._forecaster, self._trial, self._batches = forecaster, forecaster.trial, batches
        self._initial = forecaster.initial_outputs()
        self.paths: list[Path] = []

    def begin(self) -> None:
        """Take the first gradient, and look before and after a trial move along it."""
        try:
            self._direction, before = self._forecaster.gradient(self._batches, self._initial, at_start=True)
            updates = self._trial.measurable_updates(self._direction)
            self._trial.move(self._direction, updates)
            self._trial.check_survival(self._direction, updates)
            after = self._forecaster.margins(self._batches)
        finally:
            self._trial.restore()
        speed = (self._direction.length,)
        self.paths = [Path((0.0, updates), looks, speed) for looks in zip(before, after, strict=True)]

    def towards(self, threshold: float, lookahead: int) -> list[Path]:
        """What is seen on the way to a threshold, with so many gradients taken."""
        paths = [Path(path.places[:1], path.margins[:1], path.speeds) for path in self.paths]
        target, direction = _median_place(self.paths, threshold), self._direction
        at = 0.0
        if not 0 < target < FARTHEST:
            return self.paths
        try:
            for left in range(lookahead, 0, -1):
                if not direction.length:
                    break  # the loss has levelled off: nothing goes on from here
                # Places are in units of the first update, so that the whole path is measured by one length.
                step = (target - at) / left
                self._trial.move(direction, step * self._direction.length / direction.length)
                at += step
                if left == 1:
                    margins = self._forecaster.margins(self._batches)
                else:
                    direction, margins = self._forecaster.gradient(self._batches, self._initial, at_start=False)
                speed = (direction.length or None) if left > 1 else None
                paths = [path.with_look(at, row, speed) for path, row in zip(paths, margins, strict=True)]
                renewed = _median_place(paths, threshold)
                target = min(max(renewed, LEAST_PROGRESS * at), FARTHEST) if math.isfinite(renewed) else 2 * at
        finally:
            self._trial.restore()
        return paths


@dataclass(frozen=True)
class Path:
    """What was seen of a sample along the updates.

    Attributes:
        places: of the looks, in units of the first update; the first is 0.
        margins: (T,) at each look.
        speeds: length of an update at each look where a gradient was taken, the first looks.
    """

    places: tuple[float, ...]
    margins: tuple[np.ndarray, ...]
    speeds: tuple[float, ...]

    def with_look(self, place: float, margins: np.ndarray, speed: float | None) -> Path:
        """The same with one look more, and with the length of an update there if a gradient was taken."""
        speeds = self.speeds if speed is None else (*self.speeds, speed)
        return Path((*self.places, place), (*self.margins, margins), speeds)

    def place_of(self, threshold: float) -> float:
        """Where MA falls below the threshold."""
        return updates_until(flip_times(np.array(self.places), np.stack(self.margins)), threshold)

    def updates_until(self, threshold: float, fastest: float | None) -> float:
        """The updates until MA falls below the threshold.

        Args:
            fastest: the largest length of an update where updates grow with the gradient, as those of SGD do while a
                sample becomes less certain; None where all are of the same length.
        """
        place = self.place_of(threshold)
        if fastest is None or not 0 < place < FARTHEST:
            return place
        # The integral of ds / v(s), with log v a straight line between the gradients and beyond the last of them.
        places = np.array(self.places[: len(self.speeds)])
        speeds = np.log(np.array(self.speeds) / self.speeds[0])
        slope = (speeds[-1] - speeds[-2]) / (places[-1] - places[-2]) if len(places) > 1 else 0.0
        along = np.linspace(0.0, place, PLACES)
        beyond = speeds[-1] + slope * (along - places[-1])
        logs = np.where(along <= places[-1], np.interp(along, places, speeds), beyond)
        return float(np.trapezoid(np.exp(-np.minimum(logs, np.log(fastest / self.speeds[0]))), along))


def _refuse_not_finite(losses: torch.Tensor, batch: Batch) -> None:
    finite = losses.detach().isfinite().tolist()
    if not all(finite):
        raise RefusedUnderWay(
            f"the model's log-probabilities of sample {batch.sample_ids[finite.index(False)]!r} are not finite, and so "
            "is what it adds to the update of all: leave it out, or forecast without joint-forecast"
        )


def _median_place(paths: Sequence[Path], threshold: float) -> float:
    return float(np.median([path.place_of(threshold) for path in paths]))
