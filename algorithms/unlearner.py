"""The training loop of unlearning, the same for every algorithm, sampler and number of workers.

    draw forget samples by difficulty -> update -> which are forgotten? -> evaluate -> checkpoint

Every worker runs all of it and knows the whole batch: it draws what the others draw, and computes its share.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from algorithms.checkpoints import Checkpoint, Checkpoints
from algorithms.corpus import Corpus, Evaluation
from algorithms.passes import OUTPUTS, Head
from algorithms.recipe import REFUSAL, Objectives, Recipe, layer_of, total_updates, updates_per_epoch
from algorithms.reference import Reference
from algorithms.samplers import Sampler
from algorithms.stopping import Thresholds, measure_memorization
from algorithms.trainable import Group, Lora, Trainable
from scoring.errors import UserError
from scoring.mrd import estimate, reduce_draws, request_for
from scoring.replica import TransformersReplica
from scoring.samples import BATCH_TOKENS, Batch, Sample, collate, make_batches

# How often a term of the loss may outgrow that of the first update (or 1, if that was less). A mean NLL of 10,000 nats
# a token is far beyond what even a wholly lost model has.
DIVERGED = 1e4
# Purposes of random numbers, so that no two share a stream.
RETAIN_ORDER, DIRECTION = 101, 102


def trainable_for(
    recipe: Recipe, model: PreTrainedModel, group: Group, gradient_checkpointing: bool = False
) -> Trainable:
    """The initial model made ready for training as the recipe wants it."""
    layer = layer_of(recipe, model.config)
    pattern = recipe.trainable
    if pattern is None and layer is not None and not recipe.lora_rank:
        # RMU moves the layer and the two before it: their numbers stand between dots, counted from 0.
        pattern = r"\.(" + "|".join(str(i) for i in range(max(0, layer - 3), layer)) + r")\."
    lora = Lora(recipe.lora_rank, recipe.lora_alpha or 0, recipe.lora_targets) if recipe.lora_rank else None
    return Trainable(
        model,
        group,
        lora=lora,
        trainable=pattern,
        layer=layer,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        bfloat16=recipe.dtype == "bfloat16",
        gradient_checkpointing=gradient_checkpointing,
        seed=recipe.seed,
    )


@dataclass
class History:
    """The record of a run, all of it JSON.

    Attributes:
        step: updates made.
        forgotten_at: for each forget sample the updates after which it was found forgotten, or None.
        drawn: how often each forget sample was drawn: with replacement an update may draw it twice.
        drawn_until_forgotten: the same when it was found forgotten, or None.
        thresholds: MA and EL, the averages on the initial model; empty if nobody looks, as is `memory`.
        memory: MA and EL of each sample at first ("initial") and when last measured: what is forgotten is not measured
            again.
        mrd: one entry a refresh: the step and the scores.
        steps, epochs: rows, see the columns.
        seconds: on "training", "mrd", "checks", "evaluation" and "checkpoints".
        passes: forwards and backwards of the first worker over a micro-batch, "training" and "mrd".
        notes: what a reader must know, each once.
    """

    step: int = 0
    forgotten_at: list[int | None] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    drawn_until_forgotten: list[int | None] = field(default_factory=list)
    thresholds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    mrd: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, list[int]] = field(default_factory=lambda: {"training": [0, 0], "mrd": [0, 0]})
    notes: list[str] = field(default_factory=list)
    sampler: dict[str, Any] = field(default_factory=dict)

    @property
    def active(self) -> np.ndarray:
        """Which samples are not forgotten, (N,) bool."""
        return np.array([step is None for step in self.forgotten_at])


class Diverged(UserError):
    """The loss or the gradient is no longer a number that training can go on from."""


@dataclass(frozen=True)
class Progress:
    """What the progress bar shows."""

    step: int
    total: int
    epoch: int
    loss: float
    forget_loss: float
    retain_loss: float
    forgotten: float | None


class Unlearner:
    """One run of a recipe, on this worker.

    Args:
        recipe: resolved.
        corpus: the samples.
        trained: the initial model.
        initial: its weights by name on the CPU, on the first worker; {} elsewhere.
        reference: what the initial model says of the samples, where the objectives need it.
        head: its output head, where they compare distributions.
        checkpoints: where to continue from and to save to.
        evaluation: None measures nothing.
        observe: is shown the progress after each update, on the first worker.
        report: is given the row of each epoch, on every worker.
        batch_tokens: padded tokens in a micro-batch: gradients are accumulated over as many as a batch needs.
        checkpoint_every: updates; None for each epoch.
    """

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        trained: Trainable,
        initial: Mapping[str, torch.Tensor],
        reference: Reference | None,
        head: Head | None,
        checkpoints: Checkpoints,
        evaluation: Evaluation | None = None,
        observe: Callable[[Progress], None] = lambda _: None,
        report: Callable[[Mapping[str, Any]], None] = lambda _: None,
        batch_tokens: int = BATCH_TOKENS,
        checkpoint_every: int | None = None,
    ) -> None:
        self.recipe, self.corpus, self.trained, self.group = recipe, corpus, trained, trained.group
        self._objectives = Objectives.of(recipe)
        if self._objectives.retain is not None and not corpus.retain:
            raise ValueError(f"{recipe.algorithm} has a retain term, and the corpus has no sample to retain")
        self._initial, self._reference, self._head = initial, reference, head
        self._checkpoints, self._evaluation = checkpoints, evaluation
        self._observe, self._report = observe, report
        self._batch_tokens = batch_tokens
        self._untrusted = True
        self.updates_per_epoch = updates_per_epoch(len(corpus.forget), recipe)
        self.total = total_updates(len(corpus.forget), recipe)
        self._checkpoint_every = checkpoint_every or self.updates_per_epoch
        self.sampler = Sampler(
            len(corpus.forget), recipe.order, recipe.alpha or 0.0, recipe.replacement, seed=recipe.seed
        )
        self.history = History(
            forgotten_at=[None] * len(corpus.forget),
            drawn=[0] * len(corpus.forget),
            drawn_until_forgotten=[None] * len(corpus.forget),
        )

    def run(self) -> History:
        """Train until every sample is forgotten or the updates are used up.

        Raises:
            Diverged: the last checkpoint is what is left.
        """
        if saved := self._checkpoints.latest():
            self._continue_from(saved)
        else:
            self._look_at_initial_model()
            self._checkpoint()
        history = self.history
        while history.step < self.total and self._left().any():
            epoch, place = divmod(history.step, self.updates_per_epoch)
            if place == 0:
                self.sampler.begin_epoch()
            if self._refresh_is_due(history.step):
                self.refresh()
            self.step(self.sampler.draw(history.step, self.recipe.batch_size or 1, self._left()))
            self._trust_newest_checkpoint()
            end_of_epoch = history.step % self.updates_per_epoch == 0 or history.step == self.total
            if self._check_is_due():
                self._check()
            self._show_progress()
            if end_of_epoch or not self._left().any():
                self._close_epoch(epoch)
            if end_of_epoch or history.step % self._checkpoint_every == 0 or not self._left().any():
                self._checkpoint()
        self._trust_newest_checkpoint()
        return history

    def _left(self) -> np.ndarray:
        """Which samples are in the draw, (N,) bool."""
        active = self.history.active
        return active if self.recipe.early_stopping else np.ones_like(active)

    # --- One update -----------------------------------------------------------------------------------------

    def step(self, drawn: np.ndarray) -> None:
        """One update on these forget samples, and on as many retain samples.

        Args:
            drawn: (k,) positions of forget samples; those of the whole batch, whatever this worker's share.

        Raises:
            Diverged: the loss or the gradient is no longer a number to go on from; nothing is updated.
        """
        epoch = self.history.step // self.updates_per_epoch
        with self._clock("training") as clock:
            retained = self._retain_draw(len(drawn))
            passes = self._passes(drawn, retained)
            sums = torch.zeros(3, dtype=torch.float64, device=self.trained.device)
            for number, each in enumerate(passes):
                with self.trained.accumulating(last=number == len(passes) - 1):
                    terms = self._terms(each)
                    weight = self._weight(each.role) * each.counts / len(drawn)
                    # Workers' gradients are averaged; the batch is divided by its whole size.
                    (terms.sum() * (weight * self.group.size)).backward()
                sums[int(each.role == "retain")] += terms.detach().double().sum() * each.counts
                sums[2] += each.tokens * each.counts
            forget, retain, tokens = (self.group.summed(sums) / sums.new([len(drawn), len(drawn), 1])).tolist()
            norm = self.trained.clip(self.recipe.clip_norm)
            rate = self.recipe.learning_rate * min(1.0, (self.history.step + 1) / max(1, self.recipe.warmup_steps))
            self._refuse_divergence(forget, retain, norm)
            self.trained.step(rate)
        self.history.passes["training"][0] += len(passes)
        self.history.passes["training"][1] += len(passes)
        for index in drawn.tolist():
            self.history.drawn[index] += 1
        loss = self._weight("forget") * forget + (self._weight("retain") * retain if self._objectives.retain else 0.0)
        self.history.steps.append(
            {
                "step": self.history.step + 1,
                "epoch": epoch + 1,
                "loss": loss,
                "forget_loss": forget,
                "retain_loss": retain if self._objectives.retain else None,
                "gradient_norm": norm,
                "learning_rate": rate,
                "samples": [self.corpus.forget[i].sample_id for i in drawn.tolist()],
                "tokens": int(tokens),
                "forwards": len(passes),
                "backwards": len(passes),
                "seconds": clock.seconds,
            }
        )
        self.history.step += 1

    def _share_forgotten(self) -> float | None:
        """None if nobody looks."""
        return float(1 - self.history.active.mean()) if self.recipe.check_every else None

    def _show_progress(self) -> None:
        if self.group.rank == 0:
            last = self.history.steps[-1]
            self._observe(
                Progress(
                    last["step"],
                    self.total,
                    last["epoch"],
                    last["loss"],
                    last["forget_loss"],
                    last["retain_loss"] or 0.0,
                    self._share_forgotten(),
                )
            )

    def _weight(self, role: str) -> float:
        value = self.recipe.forget_weight if role == "forget" else self.recipe.retain_weight
        return 1.0 if value is None else value

    def _refuse_divergence(self, forget: float, retain: float, norm: float) -> None:
        # The gradient of a term that has left every bound may still be finite.
        first = self.history.steps[0] if self.history.steps else {"forget_loss": forget, "retain_loss": retain}
        grown = any(
            abs(term) >= DIVERGED * max(1.0, abs(first[name] or 0.0))
            for name, term in (("forget_loss", forget), ("retain_loss", retain))
        )
        if grown or not all(math.isfinite(x) for x in (forget, retain, norm)):
            raise self._diverged(
                f"at update {self.history.step + 1}: forget loss {forget:g}, retain loss {retain:g}, gradient norm "
                f"{norm:g}"
            )

    def _diverged(self, how: str) -> Diverged:
        """The error; the checkpoint of the weights that it was found on is not one to continue from."""
        if self.group.rank == 0:
            self._checkpoints.distrust(self.history.step)
        return Diverged(
            f"training diverged {how}; the last good checkpoint is kept; lower learning_rate "
            f"({self.recipe.learning_rate:g}) or clip_norm, and write to a new folder"
        )

    def _retain_draw(self, count: int) -> list[int]:
        """As many retain samples as forget samples: the set is gone through in a new random order each time."""
        size = len(self.corpus.retain)
        if self._objectives.retain is None:
            return []
        first = self.history.step * (self.recipe.batch_size or 1)
        return retain_order(first, count, size, self.recipe.seed)

    def _passes(self, drawn: np.ndarray, retained: Sequence[int]) -> list[Pass]:
        """This worker's share of a batch, in micro-batches; every worker gets the same number of them."""
        shares = []
        for rank in range(self.group.size):
            # A worker without a sample of its own does the first one again, and it does not count.
            forget = drawn[rank :: self.group.size].tolist()
            retain = list(retained[rank :: self.group.size])
            share = self._forget_passes(forget or drawn[:1].tolist(), bool(forget))
            if self._objectives.retain:
                share += self._retain_passes(retain or list(retained[:1]), bool(retain))
            shares.append(share)
        mine = shares[self.group.rank]
        idle = dataclasses.replace(mine[0], counts=False)
        return [idle] * (max(map(len, shares)) - len(mine)) + mine

    def _forget_passes(self, indices: Sequence[int], counts: bool) -> list[Pass]:
        corpus, inputs = self.corpus, self._objectives.forget_inputs
        own = any(name in (*OUTPUTS, "mask", "targets") for name in inputs)
        if not self._objectives.needs_refusals:
            groups = make_batches([corpus.forget[i] for i in indices], self._batch_tokens)
            return [Pass("forget", batch, len(batch), counts) for batch in groups]
        if not own:
            groups = make_batches([corpus.refusals[i] for i in indices], self._batch_tokens)
            return [Pass("forget", batch, 0, counts) for batch in groups]
        # Answer and refusal of a sample meet in one term: they go through the model together.
        groups = make_batches([corpus.forget[i] for i in indices], self._batch_tokens // 2)
        return [
            Pass(
                "forget",
                collate([*(corpus.forget[i] for i in group), *(corpus.refusals[i] for i in group)]),
                len(group),
                counts,
            )
            for group in (batch.indices.tolist() for batch in groups)
        ]

    def _retain_passes(self, indices: Sequence[int], counts: bool) -> list[Pass]:
        groups = make_batches([self.corpus.retain[i] for i in indices], self._batch_tokens)
        return [Pass("retain", batch, len(batch), counts) for batch in groups]

    def _terms(self, each: Pass) -> torch.Tensor:
        """The objective's terms of a pass, one a sample."""
        inputs = self._objectives.forget_inputs if each.role == "forget" else self._objectives.retain_inputs
        objective = self._objectives.forget if each.role == "forget" else self._objectives.retain
        assert objective is not None
        wanted = {name.removeprefix(REFUSAL) for name in inputs} & set(OUTPUTS)
        found = self.trained.forward(each.batch, wanted)
        device = self.trained.device
        found |= {"mask": each.batch.mask.to(device), "targets": each.batch.targets.to(device)}
        given = {name: value[: each.own] for name, value in found.items()}
        given |= {REFUSAL + name: value[each.own :] for name, value in found.items()}
        for name in inputs:
            if name == "direction":
                given[name] = self._direction(found["hidden"].shape[-1]).to(device)
            elif name not in given:
                given[name] = self._remembered(name, each).to(device)
        return objective(*(given[name] for name in inputs))

    def _remembered(self, name: str, each: Pass) -> torch.Tensor:
        """An input that the initial model gives."""
        assert self._reference is not None
        own, width = each.batch.indices[: each.own].tolist(), each.batch.mask.shape[1]
        if name == "reference_nll":
            return self._reference.nll(each.role, own)
        if name == "refusal_reference_nll":
            return self._reference.nll("refusal", each.batch.indices[each.own :].tolist())
        if name == "reference_hidden":
            return self._reference.states(each.role, "layer", own, width)
        assert name == "reference_logits", name
        assert self._head is not None
        return self._head(self._reference.states(each.role, "last", own, width).to(self.trained.device))

    def _direction(self, size: int) -> torch.Tensor:
        """RMU's u: uniform in [0, 1), of norm 1."""
        u = np.random.default_rng([self.recipe.seed, DIRECTION]).uniform(size=size)
        return torch.from_numpy(u / np.linalg.norm(u)).float()

    # --- Between updates ------------------------------------------------------------------------------------

    def _refresh_is_due(self, step: int) -> bool:
        if not self.sampler.needs_difficulty:
            return False
        every, unit = self.recipe.refresh, self.recipe.refresh_unit
        return step == 0 or (every > 0 and _due(step, every, unit, self.updates_per_epoch))

    def refresh(self) -> None:
        """Measure MRD on the current weights, each worker its share of the samples."""
        with self._clock("mrd") as clock, self.trained.plain() as model:
            scores, replica = measure_mrd(model, self.corpus.forget, self.recipe, self.group, self._batch_tokens)
        self.history.passes["mrd"][0] += replica.forwards
        self.history.passes["mrd"][1] += replica.backwards
        try:
            notes = self.sampler.set_difficulty(scores, [s.sample_id for s in self.corpus.forget])
        except UserError as error:
            raise self._diverged(f"before update {self.history.step + 1}: {error}") from error
        self._note(*replica.notes, *notes)
        self.history.mrd.append({"step": self.history.step, "mrd": scores.tolist(), "seconds": clock.seconds})

    def _look_at_initial_model(self) -> None:
        if self.recipe.check_every:
            with self._clock("checks"), self.trained.plain() as model:
                ma, el = self._memory(model, self.corpus.forget, None)
            given = {"ma": self.recipe.ma_threshold, "el": self.recipe.el_threshold}
            self.history.thresholds = dataclasses.asdict(Thresholds.from_initial(ma, el)) | {
                name: value for name, value in given.items() if value is not None
            }
            self.history.memory = {key: {"ma": ma.tolist(), "el": el.tolist()} for key in ("initial", "last")}
            self._note_what_the_rule_cannot_tell(ma, el)
        self._close_epoch(-1)

    def _note_what_the_rule_cannot_tell(self, ma: np.ndarray, el: np.ndarray) -> None:
        thresholds = Thresholds(**self.history.thresholds)
        if below := int(thresholds.forgotten(ma, el).sum()):
            self._note(
                f"{below} of {len(ma)} samples are below both thresholds (MA {thresholds.ma:.4g}, EL "
                f"{thresholds.el:.4g}) before any update; they count as forgotten when first looked at"
            )
        if undefined := int(np.isnan(el).sum()):
            self._note(
                f"EL is not defined for {undefined} samples of at most {self.recipe.el_n} tokens: MA alone decides"
            )
        for name, threshold in (("MA", thresholds.ma), ("EL", thresholds.el)):
            if threshold == 0:
                self._note(
                    f"{name} of all samples is 0 on the initial model, and nothing is below: no sample can count as "
                    "forgotten" + ("; a smaller el_n may tell" if name == "EL" else "")
                )

    def _check_is_due(self) -> bool:
        every, unit, step = self.recipe.check_every, self.recipe.check_unit, self.history.step
        return every > 0 and (_due(step, every, unit, self.updates_per_epoch) or step == self.total)

    def _memory(
        self, model: PreTrainedModel, samples: Sequence[Sample], below: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """MA and EL of samples, (N,) each; each worker measures its share."""
        mine = samples[self.group.rank :: self.group.size]
        ma, el = measure_memorization(
            model, mine, self.recipe.el_n, self.corpus.eos_token_id, self._batch_tokens, below
        )
        pairs = zip(ma.tolist(), el.tolist(), strict=True)
        found = self.group.gathered({s.index: pair for s, pair in zip(mine, pairs, strict=True)})
        both = np.array([found[s.index] for s in samples])
        return both[:, 0], both[:, 1]

    def _check(self) -> None:
        """Which samples are forgotten now? What was forgotten stays so, and is not looked at again."""
        history, thresholds = self.history, Thresholds(**self.history.thresholds)
        known = [self.corpus.forget[i] for i in np.flatnonzero(history.active)]
        if not known:
            return
        with self._clock("checks"), self.trained.plain() as model:
            ma, el = self._memory(model, known, thresholds.ma)
        for row, forgotten in enumerate(thresholds.forgotten(ma, el).tolist()):
            index = known[row].index
            history.memory["last"]["ma"][index], history.memory["last"]["el"][index] = float(ma[row]), float(el[row])
            if forgotten:
                history.forgotten_at[index] = history.step
                history.drawn_until_forgotten[index] = history.drawn[index]

    def _close_epoch(self, epoch: int) -> None:
        """The row of an epoch; -1 is the initial model."""
        row: dict[str, Any] = {"epoch": epoch + 1, "step": self.history.step}
        own = [step for step in self.history.steps if step["epoch"] == epoch + 1]
        for name in ("loss", "forget_loss", "retain_loss"):
            values = [step[name] for step in own if step[name] is not None]
            row[name] = float(np.mean(values)) if values else None
        row["forgotten"] = self._share_forgotten()
        with self._clock("evaluation"), self.trained.plain() as model:
            row |= self._moved(model)
            if self._evaluation and self._evaluation_is_due(self._evaluation.every, epoch + 1):
                row |= self._evaluate(model, self._evaluation)
        row["tokens"] = sum(step["tokens"] for step in self.history.steps)
        for name in ("training", "mrd"):
            row[f"forwards_{name}"], row[f"backwards_{name}"] = self.history.passes[name]
        row |= {f"seconds_{name}": self.history.seconds.get(name, 0.0) for name in CLOCKS}
        self.history.epochs.append(row)
        self._report(row)

    def _evaluation_is_due(self, every: int, epoch: int) -> bool:
        last = self.history.step == self.total or not self._left().any()
        return last or (every > 0 and epoch % every == 0)

    def _moved(self, model: PreTrainedModel) -> dict[str, float | None]:
        """Mean |Δθ| over all weights and ‖Δθ‖, against the initial model."""
        total, squares, count = 0.0, 0.0, 0
        for name, p in model.named_parameters():
            if name in self._initial:
                difference = (p.detach().cpu() - self._initial[name]).double()
                total += difference.abs().sum().item()
                squares += difference.square().sum().item()
                count += difference.numel()
        found = [total / count, math.sqrt(squares)] if count else [None, None]
        # Only the first worker knows the initial weights.
        found = self.group.gathered({0: found} if self.group.rank == 0 else {})[0]
        return {"mean_abs_delta": found[0], "delta_norm": found[1]}

    def _evaluate(self, model: PreTrainedModel, evaluation: Evaluation) -> dict[str, float]:
        row = {}
        for name, samples in evaluation.sets.items():
            mine = range(self.group.rank, len(samples), self.group.size)
            metrics = evaluation.measure(model, [samples[i] for i in mine]) if mine else {}
            found = self.group.gathered(
                {i: {key: float(value[at]) for key, value in metrics.items()} for at, i in enumerate(mine)}
            )
            for key in next(iter(found.values())):
                row[f"{name}_{key}"] = float(np.mean([found[i][key] for i in sorted(found)]))
        if evaluation.whole:
            row |= self.group.gathered({0: dict(evaluation.whole(model))} if self.group.rank == 0 else {})[0]
        return row

    # --- Checkpoints ----------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        if not self.trained.is_finite():
            raise self._diverged(f"at update {self.history.step}: weights are no longer finite")
        self._untrusted = True
        with self._clock("checkpoints"):
            training = self.trained.state()
            with self.trained.plain() as model:
                if self.group.rank == 0:
                    self.history.sampler = self.sampler.state()
                    self._checkpoints.save(self.history.step, model, training, dataclasses.asdict(self.history))
            self.group.wait()

    def _trust_newest_checkpoint(self) -> None:
        """Its weights have given a sound loss, or are the last: those before it can go."""
        if self._untrusted and self.group.rank == 0:
            self._checkpoints.keep_newest()
        self._untrusted = False

    def _continue_from(self, saved: Checkpoint) -> None:
        self.history = History(**saved.history())
        self.sampler.restore(self.history.sampler)
        adapted = self.recipe.lora_rank > 0
        self.trained.restore({} if adapted else saved.weights(), saved.training())

    def _note(self, *notes: str) -> None:
        self.history.notes += [note for note in dict.fromkeys(notes) if note not in self.history.notes]

    @contextmanager
    def _clock(self, name: str) -> Iterator[_Clock]:
        clock = _Clock()
        start = time.perf_counter()
        yield clock
        if self.trained.device.type == "cuda":
            torch.cuda.synchronize()
        clock.seconds = time.perf_counter() - start
        self.history.seconds[name] = self.history.seconds.get(name, 0.0) + clock.seconds


CLOCKS = ("training", "mrd", "checks", "evaluation", "checkpoints")


@dataclass
class _Clock:
    seconds: float = 0.0


@dataclass(frozen=True)
class Pass:
    """One forward and backward.

    Attributes:
        role: "forget" or "retain".
        batch: the first `own` rows are samples themselves, the others their refusals.
        counts: False for the repetition that keeps a worker busy: it adds nothing to loss and gradient.
    """

    role: str
    batch: Batch
    own: int
    counts: bool

    @property
    def tokens(self) -> int:
        return int(self.batch.lengths.sum())


def _due(step: int, every: int, unit: str, updates_per_epoch: int) -> bool:
    return step % (every * (updates_per_epoch if unit == "epochs" else 1)) == 0


def retain_order(first: int, count: int, size: int, seed: int) -> list[int]:
    """Positions `first` to `first + count - 1` of the endless sequence of random orders of `size` samples."""
    return [int(_order(place // size, size, seed)[place % size]) for place in range(first, first + count)]


@lru_cache(maxsize=4)
def _order(turn: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, RETAIN_ORDER, turn]).permutation(size)


def measure_mrd(
    model: PreTrainedModel, samples: Sequence[Sample], recipe: Recipe, group: Group, batch_tokens: int
) -> tuple[np.ndarray, TransformersReplica]:
    """MRD of samples under a model in fp32, (N,), each worker its share; and the replica that measured it."""
    replica = TransformersReplica(model)
    batches = make_batches(samples, batch_tokens)[group.rank :: group.size]
    found: dict[int, float] = {}
    if batches:
        assert recipe.statistic is not None
        request, precision = request_for(recipe.estimator, recipe.statistic, recipe.sigma, recipe.seed, recipe.draws)
        draws = estimate(replica, batches, request, precision=precision)
        mrd, _ = reduce_draws(draws.values, recipe.statistic)
        found = dict(zip(draws.indices.tolist(), mrd.tolist(), strict=True))
    found = group.gathered(found)
    return np.array([found[s.index] for s in samples]), replica
