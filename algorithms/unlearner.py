"""The training loop of unlearning, the same for every algorithm, sampler and number of workers.

    draw forget samples by difficulty -> update -> which are forgotten? -> evaluate -> checkpoint

Every worker runs all of it and knows the whole batch: it draws what the others draw, and computes its share.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from algorithms.alone import LossAlone
from algorithms.checkpoints import Checkpoint, Checkpoints
from algorithms.corpus import Corpus, Evaluation
from algorithms.ease import FLIP_TIME, MRD, ZEROS, ease_of_forecasts, rewards
from algorithms.history import CLOCKS, History, Progress, seconds_left
from algorithms.hold import log_odds_gradient_norm
from algorithms.live import LiveTables
from algorithms.loss import LossTerms
from algorithms.measurements import measure_forecasts, measure_mrd
from algorithms.micro_batches import MicroBatch, share_of_batch
from algorithms.passes import Head
from algorithms.recipe import Objectives, Recipe, Unit, total_updates, updates_per_epoch
from algorithms.reference import Reference, SetName
from algorithms.samplers import Sampler, retain_order
from algorithms.schedule import groups_of_samples
from algorithms.stopping import Look, Thresholds, ma_of_rule, measure_memorization
from algorithms.target import TRAINED_MA, Target
from algorithms.trainable import Trainable
from scoring.errors import UserError
from scoring.flip_time import Outputs
from scoring.progress import advance, expect, phase
from scoring.samples import Batch, collate, default_batch_tokens, sent

# How often a term of the loss may outgrow that of the first update (or 1, if that was less). A mean NLL of 10,000 nats
# per token is far beyond what even a wholly lost model has.
DIVERGED = 1e4
# What a token costs in training, in forward passes over a token: a backward pass takes twice as long as a forward one.
PASSES = 3


# What the seconds of a clock are spent on, in words.
PHASES = dict(
    zip(CLOCKS, ("training", "measuring difficulty", "checking", "evaluating", "writing a checkpoint"), strict=True)
)


class Diverged(UserError):
    """The loss or the gradient is no longer a number that training can go on from."""


class Unlearner:
    """One run of a recipe, on this worker.

    Args:
        recipe: a resolved recipe.
        corpus: the samples.
        trained: the initial model, ready for training.
        initial: the initial weights by name, see `weight_change`; {} compares nothing.
        reference: what the initial model gives for the samples; None if no objective needs it.
        head: the initial model's output head; None if no objective compares distributions.
        checkpoints: where to continue from and to save to.
        evaluation: what to measure after each epoch; None measures nothing.
        observe: is shown the progress after each update, on the first worker.
        report: is given the row of each epoch, on every worker.
        batch_tokens: padded tokens in a micro-batch: gradients are accumulated over as many as a batch needs; None: as
            many as suit the device.
        checkpoint_every: updates from one checkpoint to the next; None: one after each epoch.
        live: where the tables grow, on the first worker.
        target: of a model that learns: how well it must know its samples for training to end; None: nobody looks.
    """

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        trained: Trainable,
        initial: Mapping[str, Any],
        reference: Reference | None,
        head: Head | None,
        checkpoints: Checkpoints,
        evaluation: Evaluation | None = None,
        observe: Callable[[Progress], None] = lambda _: None,
        report: Callable[[Mapping[str, Any]], None] = lambda _: None,
        batch_tokens: int | None = None,
        checkpoint_every: int | None = None,
        live: LiveTables | None = None,
        target: Target | None = None,
    ) -> None:
        self.recipe, self.corpus, self.trained, self.group = recipe, corpus, trained, trained.group
        self._objectives = Objectives.of(recipe)
        if self._objectives.retain is not None and not corpus.retain:
            raise ValueError(f"{recipe.algorithm} has a retain term, and the corpus has no sample to retain")
        self._terms = LossTerms(self._objectives, trained, reference, head, recipe.seed)
        self._initial = initial
        self._checkpoints, self._evaluation, self._target = checkpoints, evaluation, target
        self._observe, self._report = observe, report
        self._live = live or LiveTables(None)
        self._resumed = 0
        self._chosen_batch_tokens = batch_tokens
        self._batch_tokens = batch_tokens or default_batch_tokens(trained.device)
        self._newest_is_trusted = False
        self.updates_per_epoch = updates_per_epoch(len(corpus.forget), recipe)
        self.total = total_updates(len(corpus.forget), recipe)
        self._checkpoint_every = checkpoint_every or self.updates_per_epoch
        self.sampler = Sampler(
            len(corpus.forget), recipe.order, recipe.alpha or 0.0, recipe.replacement, seed=recipe.seed
        )
        self.history = History.of(len(corpus.forget))
        if recipe.retain_limit is not None:
            self.history.retain_weight = recipe.retain_weight
        self._group_by = recipe.schedule["by"] if isinstance(recipe.schedule, dict) else None
        draws_by_forecast = self.sampler.needs_difficulty and recipe.weights == FLIP_TIME
        self._needs_forecasts = draws_by_forecast or recipe.reward > 0 or self._group_by == FLIP_TIME
        for setting, needs_whole_weights in (
            ("weights", draws_by_forecast),
            ("reward", recipe.reward),
            ("schedule", self._group_by == FLIP_TIME),
            ("hold_penalty", recipe.hold_penalty),
        ):
            if needs_whole_weights:
                trained.refuse_shards(setting)

    def run(self) -> History:
        """Train until every sample is forgotten, the target is reached, or the updates are used up.

        Raises:
            Diverged: training diverged; the last checkpoint is kept.
        """
        with self._checkpoints.held() if self.group.rank == 0 else nullcontext():
            self.group.wait()  # until the first worker may write: only then is it known where to continue from
            return self._run()

    def _run(self) -> History:
        if saved := self._checkpoints.latest():
            self._continue_from(saved)
        else:
            self._measure_initial_model()
            self._checkpoint()
        history = self.history
        self._resumed = history.step
        if history.step < self.total and self._in_draw().any() and not self._has_reached_target():
            self._live.begin(history)
        while history.step < self.total and self._in_draw().any() and not self._has_reached_target():
            epoch, step_of_epoch = divmod(history.step, self.updates_per_epoch)
            if step_of_epoch == 0:
                self.sampler.begin_epoch()
            if self._refresh_is_due():
                self.refresh()
            self.step(self.sampler.draw(history.step, self.recipe.batch_size or 1, self._in_draw()))
            self._trust_newest_checkpoint()
            if self._check_is_due():
                self._check()
            self._show_progress()
            is_end_of_epoch = history.step % self.updates_per_epoch == 0 or history.step == self.total
            is_last = not self._in_draw().any()
            if is_end_of_epoch or is_last:
                self._close_epoch(epoch)
            self._live.follow(history, now=is_end_of_epoch or is_last)
            if is_end_of_epoch or is_last or history.step % self._checkpoint_every == 0:
                self._checkpoint()
        self._trust_newest_checkpoint()
        self._put_together()
        return history

    def _in_draw(self) -> np.ndarray:
        """Which samples can be drawn, (N,) bool."""
        active = self.history.active
        return active if self.recipe.early_stopping else np.ones_like(active)

    def _has_reached_target(self) -> bool:
        """Whether the samples were known well enough at the end of the last epoch."""
        return self._target is not None and self._target.is_reached(self.history.epochs[-1])

    # --- One update -----------------------------------------------------------------------------------------

    def step(self, drawn: np.ndarray) -> None:
        """One update on these forget samples, and on as many retain samples.

        Args:
            drawn: (k,) positions of the forget samples of the whole batch, whatever this worker's share is.

        Raises:
            Diverged: the loss or the gradient is no longer a number to go on from; nothing is updated.
        """
        history, recipe = self.history, self.recipe
        positions = drawn.tolist()
        with self._clock("training") as clock:
            micro_batches = share_of_batch(
                self.corpus,
                self._objectives,
                positions,
                self._retain_draw(len(drawn)),
                self.group,
                self._batch_tokens,
            )
            # Sums over the batch: terms on the forget set, terms on the retain set, tokens, and the former with the
            # factors of their samples.
            sums = torch.zeros(4, dtype=torch.float64, device=self.trained.device)
            factors, groups = self._factors(positions), self._groups()
            expect(len(micro_batches))
            for number, micro_batch in enumerate(micro_batches):
                with self.trained.accumulating(last=number == len(micro_batches) - 1):
                    terms = weighed = self._terms(micro_batch, groups)
                    if micro_batch.set_name == "forget":
                        of_samples = torch.from_numpy(factors[micro_batch.positions]).to(terms.dtype)
                        weighed = terms * sent(of_samples, terms.device)
                    weight = self._weight(micro_batch.set_name) * micro_batch.counts / len(drawn)
                    # The workers' gradients are averaged, so each is multiplied by the number of workers.
                    (weighed.sum() * (weight * self.group.size)).backward()
                sums[int(micro_batch.set_name == "retain")] += terms.detach().double().sum() * micro_batch.counts
                sums[2] += micro_batch.tokens * micro_batch.counts
                if micro_batch.set_name == "forget":
                    sums[3] += weighed.detach().double().sum() * micro_batch.counts
                advance()
            counts = sums.new([len(drawn), len(drawn), 1, len(drawn)])
            forget, retain, tokens, weighed_forget = (self.group.summed(sums) / counts).tolist()
            penalty = self._add_hold_penalty(positions)
            norm = self.trained.clip(recipe.clip_norm)
            rate = recipe.learning_rate * min(1.0, (history.step + 1) / max(1, recipe.warmup_steps))
            self._refuse_divergence(forget, retain, norm)
            self.trained.step(rate)
        # The penalty differentiates twice.
        held = len(positions[self.group.rank :: self.group.size]) if recipe.hold_penalty else 0
        forwards, backwards = len(micro_batches) + held, len(micro_batches) + 2 * held
        history.passes["training"][0] += forwards
        history.passes["training"][1] += backwards
        for position in positions:
            history.drawn[position] += 1
        loss = self._weight("forget") * weighed_forget + penalty
        loss += self._weight("retain") * retain if self._objectives.retain else 0.0
        retain_weight = self._weight("retain") if self._objectives.retain else None
        self._follow_retain_loss(retain)
        history.steps.append(
            {
                "step": history.step + 1,
                "epoch": history.step // self.updates_per_epoch + 1,
                "loss": loss,
                "forget_loss": forget,
                "retain_loss": retain if self._objectives.retain else None,
                "retain_weight": retain_weight,
                "gradient_norm": norm,
                "learning_rate": rate,
                "samples": [self.corpus.forget[position].sample_id for position in positions],
                "tokens": int(tokens),
                "forwards": forwards,
                "backwards": backwards,
                "seconds": clock.seconds,
            }
        )
        history.step += 1

    def _retain_draw(self, count: int) -> list[int]:
        """Positions of as many retain samples: the set is gone through in a new random order each time."""
        if self._objectives.retain is None:
            return []
        first = self.history.step * (self.recipe.batch_size or 1)
        return retain_order(first, count, len(self.corpus.retain), self.recipe.seed)

    def _weight(self, set_name: SetName) -> float:
        if set_name == "forget" and self._group_by is not None:
            return 1.0  # each group has its own, see `_factors`
        weight = self.recipe.forget_weight
        if set_name == "retain":
            weight = self.recipe.retain_weight if self.history.retain_weight is None else self.history.retain_weight
        return 1.0 if weight is None else weight

    def _follow_retain_loss(self, loss: float) -> None:
        """One step of dual ascent: the retain weight is the multiplier of "retain loss <= limit". Entesari et al. 2025.

        Args:
            loss: of the update on the current retain batch, before the update.
        """
        history, recipe = self.history, self.recipe
        if recipe.retain_limit is None or history.step < (recipe.dual_warmup or 0) * self.updates_per_epoch:
            return
        assert history.retain_weight is not None
        history.retain_weight = max(
            0.0, history.retain_weight + (recipe.dual_step or 0.0) * (loss - recipe.retain_limit)
        )

    def _groups(self) -> np.ndarray | None:
        """The group of each forget sample, (N,); None without a schedule."""
        return np.array(self.history.groups) if self._group_by is not None else None

    def _strengths(self) -> np.ndarray:
        """What the terms of the forget samples are multiplied by besides the forget weight, (N,)."""
        groups = self._groups()
        if groups is None:
            return np.ones(len(self.corpus.forget))
        strengths: np.ndarray = np.array([group.forget_weight for group in self.recipe.groups])[groups]
        return strengths

    def _factors(self, drawn: list[int]) -> np.ndarray:
        """The same with rewards, whose mean over the batch is 1."""
        if not self.recipe.reward:
            return self._strengths()
        reward = rewards(np.array(self.history.forecasts[-1]["forecast"]), self.recipe.reward)
        factors: np.ndarray = self._strengths() * reward / reward[drawn].mean()
        return factors

    def _add_hold_penalty(self, drawn: list[int]) -> float:
        """Add the penalty's gradient, and give what it adds to the loss."""
        if not self.recipe.hold_penalty:
            return 0.0
        share = [self.corpus.forget[position] for position in drawn[self.group.rank :: self.group.size]]
        batches = (collate([sample]).to(self.trained.device) for sample in share)
        factor = self.recipe.hold_penalty / len(drawn)
        with self.trained.model_itself() as model:
            parameters = self.trained.parameters
            return self.trained.add_gradients(
                factor * log_odds_gradient_norm(model, parameters, batch) for batch in batches
            )

    def _refuse_divergence(self, forget: float, retain: float, norm: float) -> None:
        # The gradient of a term that has grown without bound may still be finite.
        first = self.history.steps[0] if self.history.steps else {"forget_loss": forget, "retain_loss": retain}
        has_grown = any(
            abs(term) >= DIVERGED * max(1.0, abs(first[name] or 0.0))
            for name, term in (("forget_loss", forget), ("retain_loss", retain))
        )
        if has_grown or not all(math.isfinite(number) for number in (forget, retain, norm)):
            raise self._diverged(
                f"at update {self.history.step + 1}: forget loss {forget:g}, retain loss {retain:g}, gradient norm "
                f"{norm:g}"
            )

    def _diverged(self, place: str) -> Diverged:
        """The error. The checkpoint of the weights that diverged is removed, if there is an earlier one."""
        if self.group.rank == 0:
            self._checkpoints.discard(self.history.step)
        return Diverged(
            f"training diverged {place}; the last good checkpoint is kept; lower learning_rate "
            f"({self.recipe.learning_rate:g}) or clip_norm, and write to a new folder"
        )

    def _show_progress(self) -> None:
        if self.group.rank == 0:
            self._observe(self.progress())

    def progress(self) -> Progress:
        """How far the run is; may be asked in another thread."""
        history = self.history
        last = history.steps[-1] if history.steps else {}
        return Progress(
            history.step,
            self.total,
            last.get("epoch", 0),
            last.get("loss"),
            last.get("forget_loss"),
            last.get("retain_loss"),
            self._share_forgotten(),
            self._resumed,
            seconds_left(history, self.total, self.updates_per_epoch),
            notes=tuple(history.notes),
        )

    # --- Difficulty -----------------------------------------------------------------------------------------

    def _refresh_is_due(self) -> bool:
        if not (self.sampler.needs_difficulty or self.recipe.reward):
            return False
        return self.history.step == 0 or self._is_due(self.recipe.refresh, self.recipe.refresh_unit)

    def refresh(self) -> None:
        """Measure how easy the samples are on the current weights, and draw and reward by that from now on."""
        if self.recipe.reward:
            self._forecast()
        if not self.sampler.needs_difficulty:
            return
        source = self.recipe.weights
        ids, zero_is = [sample.sample_id for sample in self.corpus.forget], ZEROS.get(source, f"by {source}")
        try:
            notes = self.sampler.set_difficulty(self._ease(source), ids, zero_is)
        except UserError as error:
            raise self._diverged(f"before update {self.history.step + 1}: {error}") from error
        self.history.note(*notes)

    def _ease(self, source: str) -> np.ndarray:
        """How easy the samples are on the current weights, (N,); see `algorithms.ease`."""
        if source == MRD:
            return self._mrd()
        return ease_of_forecasts(self._forecast()) if source == FLIP_TIME else self.corpus.values[source]

    def _mrd(self) -> np.ndarray:
        """MRD of the samples on the current weights, (N,), measured once on the same weights."""
        history = self.history
        if not history.mrd or history.mrd[-1]["step"] != history.step:
            by_gradient = self.recipe.estimator == "gradient"
            measured = self.trained.differentiable_model if by_gradient else self.trained.whole_model
            with self._clock("mrd") as clock, measured() as model:
                mrd, replica = measure_mrd(
                    model,
                    self.corpus.forget,
                    self.recipe,
                    self.group,
                    self._batch_tokens,
                    (self.trained.batched_gradients or None) if by_gradient else None,
                    self.trained.recomputes,
                )
            self._count_passes(replica.forwards, replica.backwards)
            history.note(*replica.notes)
            history.mrd.append({"step": history.step, "mrd": mrd.tolist(), "seconds": clock.seconds})
        return np.array(history.mrd[-1]["mrd"])

    def _forecast(self) -> np.ndarray:
        """The updates that each sample takes until it is forgotten, (N,), forecast once on the same weights."""
        history = self.history
        if not history.forecasts or history.forecasts[-1]["step"] != history.step:
            assert history.forecast_threshold is not None
            with self._clock("mrd") as clock, self.trained.model_itself() as model:
                updates, forecaster = measure_forecasts(
                    model, self.corpus.forget, self._loss_alone, self.recipe, history.forecast_threshold, self.group
                )
            self._count_passes(forecaster.forwards, forecaster.backwards)
            history.forecasts.append({"step": history.step, "forecast": updates.tolist(), "seconds": clock.seconds})
        return np.array(history.forecasts[-1]["forecast"])

    def _loss_alone(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        """The loss that an update on a sample alone brings down, (1,): of the run, and of its group once there are
        groups."""
        if self._group_by is not None and not self.history.groups:
            loss = LossAlone(self.recipe.algorithm, self.recipe.settings)(outputs, outputs.detached())
            return loss * (self.recipe.forget_weight or 0.0)
        micro_batch = MicroBatch("forget", batch, 1, True)
        given = {"logprobs": outputs.logprobs, "logits": outputs.logits}
        (position,) = micro_batch.positions
        weight = self._weight("forget") * float(self._strengths()[position])
        return weight * self._terms.of_outputs(given, micro_batch, self._groups())

    def _count_passes(self, forwards: int, backwards: int) -> None:
        self.history.passes["mrd"][0] += forwards
        self.history.passes["mrd"][1] += backwards

    def _is_due(self, every: int, unit: Unit) -> bool:
        """Whether the step is a multiple of so many units; 0 is never due."""
        return every > 0 and self.history.step % (every * (self.updates_per_epoch if unit == "epochs" else 1)) == 0

    # --- Which samples are forgotten ------------------------------------------------------------------------

    def _measure_initial_model(self) -> None:
        """Set the thresholds of the stopping rule, and fill in the row of epoch 0."""
        if self.recipe.check_every != 0:
            self._set_thresholds()
        if self.recipe.weights != MRD and not self.sampler.needs_difficulty:
            self.history.note(
                f"weights {self.recipe.weights} are not used: these draws do not depend on how easy samples are"
            )
        if self._needs_forecasts:
            self.history.forecast_threshold = self._forecast_threshold()
        if self._group_by is not None:
            shares = [group.share for group in self.recipe.groups]
            self.history.groups = groups_of_samples(self._ease(self._group_by), shares)
        self._close_epoch(-1)

    def _set_thresholds(self) -> None:
        """The thresholds of the stopping rule, and which samples are below them already."""
        recipe, everyone = self.recipe, range(len(self.corpus.forget))
        if (fixed := self._fixed_ma()) is not None:
            look = self._look(everyone, el_below=0.0)
            thresholds = Thresholds(fixed, math.nan)
        else:
            look = self._look(everyone)
            averages = Thresholds.from_initial(look.ma, look.el)
            thresholds = Thresholds(
                averages.ma if recipe.ma_threshold is None else recipe.ma_threshold,
                averages.el if recipe.el_threshold is None else recipe.el_threshold,
            )
        self.history.thresholds = dataclasses.asdict(thresholds)
        self.history.memory = {key: {"ma": look.ma.tolist(), "el": look.el.tolist()} for key in ("initial", "last")}
        self.history.note(*thresholds.blind_spots(look.ma, look.el, recipe.el_n))

    def _fixed_ma(self) -> float | None:
        """What MA of a forgotten sample is below, where the stopping rule says so itself."""
        return None if self.recipe.stopping is None else ma_of_rule(self.recipe.stopping)

    def _forecast_threshold(self) -> float:
        """What MA of a forgotten sample falls below: as the stopping rule has it, also if nobody checks."""
        if self.history.thresholds:
            return self.history.thresholds["ma"]
        if (fixed := self._fixed_ma()) is not None:
            return fixed
        if self.recipe.ma_threshold is not None:
            return self.recipe.ma_threshold
        return float(self._look(range(len(self.corpus.forget)), el_below=0.0).ma.mean())

    def _check_is_due(self) -> bool:
        history, recipe = self.history, self.recipe
        if recipe.check_every is not None:
            is_last = recipe.check_every > 0 and history.step == self.total
            return is_last or self._is_due(recipe.check_every, recipe.check_unit)
        if history.step == self.total:
            return True
        if not self._is_due(1, recipe.check_unit):
            return False
        trained = PASSES * sum(step["tokens"] for step in history.steps[history.look["step"] :])
        if trained < history.look["tokens"]:
            history.note(
                "looking which samples are forgotten cost as much as training for "
                f"{history.look['tokens'] / trained:.1f} {recipe.check_unit}, and was done less often than each "
                "of them (check_every 1 looks every time)"
            )
            return False
        return True

    def _check(self) -> None:
        """Find out which samples are forgotten. A forgotten sample stays so, and is not measured again."""
        history, thresholds = self.history, Thresholds(**self.history.thresholds)
        positions = np.flatnonzero(history.active).tolist()
        if not positions:
            return
        look = self._look(positions, thresholds.el_asked_below)
        # Whether EL is defined depends on the length of a text alone, and is known where EL is not measured again.
        undefined = np.isnan(np.array(history.memory["initial"]["el"])[positions])
        el = np.where(undefined & (look.ma < thresholds.ma), np.nan, look.el)
        is_forgotten = thresholds.forgotten(look.ma, el)
        for row, position in enumerate(positions):
            history.memory["last"]["ma"][position] = float(look.ma[row])
            history.memory["last"]["el"][position] = float(el[row])
            if is_forgotten[row]:
                history.forgotten_at[position] = history.step
                history.drawn_until_forgotten[position] = history.drawn[position]

    def _look(self, positions: range | list[int], el_below: float | None = None) -> Look:
        """MA and EL of the forget samples at these positions, (n,) each; see `measure_memorization`."""
        samples = [self.corpus.forget[position] for position in positions]
        with self._clock("checks"), self.trained.readable_model() as model:
            look = measure_memorization(
                model,
                samples,
                self.recipe.el_n,
                self.corpus.eos_token_id,
                self._chosen_batch_tokens,
                el_below,
                self.group,
            )
        self.history.look = {"step": self.history.step, "tokens": look.tokens}
        return look

    def _share_forgotten(self) -> float | None:
        """The share of forgotten samples; None if nobody checks."""
        return None if self.recipe.check_every == 0 else float(1 - self.history.active.mean())

    # --- The row of an epoch --------------------------------------------------------------------------------

    def _close_epoch(self, epoch: int) -> None:
        """Evaluate, and add the row of an epoch, counted from 0; -1 is the initial model."""
        history = self.history
        row: dict[str, Any] = {"epoch": epoch + 1, "step": history.step}
        steps_of_epoch = [step for step in history.steps if step["epoch"] == epoch + 1]
        for name in ("loss", "forget_loss", "retain_loss"):
            losses = [step[name] for step in steps_of_epoch if step[name] is not None]
            row[name] = float(np.mean(losses)) if losses else None
        row["forgotten"] = self._share_forgotten()
        with self._clock("evaluation"):
            row |= self.trained.weight_change(self._initial)
            # Metrics of the whole model may do more than read it.
            does_more = self._evaluation is not None and self._evaluation.whole is not None
            with self.trained.whole_model() if does_more else self.trained.readable_model() as model:
                if self._target:
                    row[TRAINED_MA] = self._target.measured(model, self._batch_tokens, self.group)
                if self._evaluation and self._evaluation_is_due(self._evaluation.every, row):
                    row |= self._evaluation.results(model, self.group)
        row["tokens"] = sum(step["tokens"] for step in history.steps)
        for name in ("training", "mrd"):
            row[f"forwards_{name}"], row[f"backwards_{name}"] = history.passes[name]
        row |= {f"seconds_{name}": history.seconds.get(name, 0.0) for name in CLOCKS}
        history.epochs.append(row)
        self._report(row)

    def _evaluation_is_due(self, every: int, row: Mapping[str, Any]) -> bool:
        is_last = self.history.step == self.total or not self._in_draw().any()
        is_last = is_last or (self._target is not None and self._target.is_reached(row))
        return is_last or (every > 0 and row["epoch"] % every == 0)

    # --- Checkpoints ----------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        if not self.trained.is_finite():
            raise self._diverged(f"at update {self.history.step}: weights are no longer finite")
        self._newest_is_trusted = False
        with self._clock("checkpoints"):
            self.history.sampler = self.sampler.state()
            if self.trained.is_sharded:
                self._save_shards()
                return
            training = self.trained.state()
            # A model that follows from the initial one and what was trained is put together at the end.
            with nullcontext() if self.trained.keeps_own_weights else self.trained.whole_model() as model:
                if self.group.rank == 0:
                    self._checkpoints.save(
                        self.history.step, model, training, dataclasses.asdict(self.history), self.trained.save_adapter
                    )
            self.group.wait()

    def _save_shards(self) -> None:
        """Save a checkpoint of which every worker writes its part."""
        step = self.history.step
        if self.group.rank == 0:
            self._checkpoints.begin(step)
        self.group.wait()
        if folder := self._checkpoints.unfinished_shards(step):
            self.trained.save_shards(folder)
        self.group.wait()
        if self.group.rank == 0:
            self._checkpoints.finish(step, dataclasses.asdict(self.history))
        self.group.wait()

    def _put_together(self) -> None:
        """Add the model to the last checkpoint, if it has none; nothing is trained any more."""
        saved = self._checkpoints.latest()
        if saved is None or saved.model.is_dir():
            return
        with self._clock("checkpoints"):
            model = self.trained.finished_model(None if saved.adapter.is_dir() else saved.adapter)
            if self.group.rank == 0:
                self._checkpoints.add_model(saved, model)
            self.group.wait()

    def _trust_newest_checkpoint(self) -> None:
        """Remove the checkpoints before it: its weights have given a sound loss, or are the last."""
        if not self._newest_is_trusted and self.group.rank == 0:
            self._checkpoints.keep_newest()
        self._newest_is_trusted = True

    def _continue_from(self, saved: Checkpoint) -> None:
        self.history = History(**saved.history())
        self.sampler.restore(self.history.sampler)
        if saved.shards.is_dir():
            self.trained.load_shards(saved.shards)
            return
        self.trained.restore({} if self.trained.keeps_own_weights else saved.weights(), saved.training())

    @contextmanager
    def _clock(self, name: str) -> Iterator[_Clock]:
        """Add the seconds of the context to the history; they are in the clock afterwards."""
        clock = _Clock()
        start = time.perf_counter()
        with phase(PHASES[name]):
            yield clock
        if self.trained.device.type == "cuda":
            torch.cuda.synchronize()
        clock.seconds = time.perf_counter() - start
        self.history.seconds[name] = self.history.seconds.get(name, 0.0) + clock.seconds


@dataclass
class _Clock:
    seconds: float = 0.0
