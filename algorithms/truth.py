"""How many updates it really takes until a sample is forgotten: what forecasts are held against.

Alone, every sample is unlearnt by itself from the initial weights, update by update, until each of several rules says
that it is forgotten. Together, samples are drawn uniformly for every update, and the update is noted at which each of
them falls; nobody leaves the draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from algorithms.samplers import Sampler
from scoring.flip_time import ForgetLoss, InitialOutputs, Outputs, outputs_of
from scoring.memorization import extraction_likelihood, memorization_accuracy
from scoring.progress import advance, expect
from scoring.replica import TransformersReplica
from scoring.samples import Batch, Sample, collate
from scoring.updates import TrialUpdates, UpdateSettings, clip_gradients


@dataclass(frozen=True)
class Rule:
    """When a sample counts as forgotten: all that are given must hold.

    Attributes:
        ma: MA is below this.
        el: EL_n is below this, or not defined.
    """

    ma: float | None = None
    el: float | None = None

    def holds(self, ma: float, el: float) -> bool:
        """Whether a sample with this MA and EL_n is forgotten."""
        return (self.ma is None or ma < self.ma) and (self.el is None or math.isnan(el) or el < self.el)


@dataclass(frozen=True)
class ExtractionTask:
    """EL_n of the samples of a shard under the initial model, for the rules that compare with its average."""

    shard: int
    el_n: int
    eos_token_id: int | None

    @property
    def key(self) -> str:
        return f"el-{self.shard:06d}"

    def do(
        self, replica: TransformersReplica, batches: Sequence[Batch], cache: dict[str, Any]
    ) -> dict[str, np.ndarray]:
        """Columns "index" and "el", (n,) each; el is nan for a sample of at most n tokens."""
        samples = [batch.sample(row) for batch in batches for row in range(len(batch))]
        el = extraction_likelihood(replica.model, samples, self.el_n, self.eos_token_id)
        return {"index": np.array([sample.index for sample in samples]), "el": el.numpy()}


@dataclass(frozen=True)
class AloneTask:
    """Forget each sample of a shard by itself.

    Attributes:
        shard: the number of the shard.
        loss: of the algorithm.
        update: of the optimiser.
        rules: by name.
        most_updates: after so many a sample is given up.
        el_n: tokens in an n-gram of EL.
        eos_token_id: the token that ends a continuation.
    """

    shard: int
    loss: ForgetLoss
    update: UpdateSettings
    rules: Mapping[str, Rule]
    most_updates: int
    el_n: int
    eos_token_id: int | None

    @property
    def key(self) -> str:
        return f"alone-{self.shard:06d}"

    def do(
        self, replica: TransformersReplica, batches: Sequence[Batch], cache: dict[str, Any]
    ) -> dict[str, np.ndarray]:
        """Columns, (n,) each: index; and for each rule NAME updates@NAME, mean_abs_delta@NAME and delta_norm@NAME: the
        updates until it holds, inf if it never does, and how far the weights were then; nan if it never does."""
        trial = TrialUpdates(replica.model, self.update)
        columns: dict[str, list[float]] = {"index": []}
        for batch in batches:
            for row in range(len(batch)):
                columns["index"].append(int(batch.indices[row]))
                try:
                    found = self._forget(replica, trial, batch.rows(row, row + 1))
                finally:
                    trial.restore()
                for name, value in found.items():
                    columns.setdefault(name, []).append(value)
        return {name: np.array(values, dtype=int if name == "index" else float) for name, values in columns.items()}

    def _forget(self, replica: TransformersReplica, trial: TrialUpdates, one: Batch) -> dict[str, float]:
        """Forget a sample, starting from the initial weights."""
        on_device = one.to(replica.device)
        parameters = trial.parameters
        optimizer = trial.make_optimizer()
        found: dict[str, float] = {}
        for name in self.rules:
            found |= {f"updates@{name}": math.inf, f"mean_abs_delta@{name}": math.nan, f"delta_norm@{name}": math.nan}
        pending = dict(self.rules)
        initial = InitialOutputs(self.loss)
        for updates in range(self.most_updates + 1):
            with torch.enable_grad():
                now = outputs_of(replica.model, on_device)
            replica.forwards += 1
            if not updates:
                initial.keep(on_device, now)
            if not np.isfinite(now.margins()[0]).all():
                break  # it has diverged, which is not to forget
            met = self._met(replica, pending, now, one)
            if met:
                mean_abs_delta, delta_norm = trial.distance_moved()
            for name in met:
                found[f"updates@{name}"] = float(updates)
                found[f"mean_abs_delta@{name}"], found[f"delta_norm@{name}"] = mean_abs_delta, delta_norm
                del pending[name]
            if not pending or updates == self.most_updates:
                break
            self.loss(now, initial.of(on_device, now)).sum().backward()
            replica.backwards += 1
            clip_gradients(parameters, self.update.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        return found

    def _met(self, replica: TransformersReplica, pending: Mapping[str, Rule], now: Outputs, one: Batch) -> list[str]:
        """The rules that hold now. EL is measured only where it decides."""
        ma = float((now.margins()[0] > 0).mean())
        el = math.inf
        if any(rule.el is not None and (rule.ma is None or ma < rule.ma) for rule in pending.values()):
            el = float(extraction_likelihood(replica.model, [one.sample(0)], self.el_n, self.eos_token_id)[0])
        return [name for name, rule in pending.items() if rule.holds(ma, el)]


@dataclass(frozen=True)
class TogetherTask:
    """Forget all samples together, with uniform draws.

    Attributes:
        shard: of all samples.
        seed: of the draws.
        loss, update: see AloneTask.
        thresholds: of MA, by name.
        updates: how many are made.
        batch_size: samples of one.
    """

    shard: int
    seed: int
    loss: ForgetLoss
    update: UpdateSettings
    thresholds: Mapping[str, float]
    updates: int
    batch_size: int

    @property
    def key(self) -> str:
        return f"together-{self.seed:06d}"

    def do(
        self, replica: TransformersReplica, batches: Sequence[Batch], cache: dict[str, Any]
    ) -> dict[str, np.ndarray]:
        """Columns, (N,) each: index; and updates@NAME for each threshold: the update after which MA was below it for
        the first time, inf if it never was."""
        on_device = [batch.to(replica.device) for batch in batches]
        samples = [batch.sample(row) for batch in batches for row in range(len(batch))]
        trial = TrialUpdates(replica.model, self.update)
        parameters = trial.parameters
        optimizer = trial.make_optimizer()
        sampler = Sampler(len(samples), alpha=0.0, seed=self.seed)
        initial = InitialOutputs(self.loss)
        for batch in on_device if initial.compares else ():
            with torch.no_grad():
                initial.keep(batch, outputs_of(replica.model, batch))
        fell = {name: np.full(len(samples), np.inf) for name in self.thresholds}
        expect(self.updates)
        try:
            for updates in range(self.updates + 1):
                ma = np.concatenate([memorization_accuracy(replica.model, batch).cpu().numpy() for batch in on_device])
                replica.forwards += len(on_device)
                for name, threshold in self.thresholds.items():
                    fell[name][(ma < threshold) & np.isinf(fell[name])] = updates
                if updates == self.updates or all(np.isfinite(places).all() for places in fell.values()):
                    break
                advance()
                drawn = sampler.draw(updates, self.batch_size, np.ones(len(samples), dtype=bool)).tolist()
                self._loss_of(replica, [samples[place] for place in drawn], initial).backward()
                clip_gradients(parameters, self.update.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
        finally:
            trial.restore()
        return {"index": np.array([sample.index for sample in samples])} | {
            f"updates@{name}": places for name, places in fell.items()
        }

    def _loss_of(self, replica: TransformersReplica, drawn: Sequence[Sample], initial: InitialOutputs) -> torch.Tensor:
        """The mean loss of the drawn samples, with its graph."""
        batch = collate(drawn).to(replica.device)
        with torch.enable_grad():
            now = outputs_of(replica.model, batch)
            loss = self.loss(now, initial.of(batch, now)).mean()
        replica.forwards += 1
        replica.backwards += 1
        return loss
