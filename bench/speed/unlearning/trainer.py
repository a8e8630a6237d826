"""Our training loop against transformers' Trainer: the same objective on the same batches, in alternating segments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from algorithms.objectives import npo, settings_of
from algorithms.recipe import Objectives
from bench.jobs.unlearn import UnlearnSpec
from bench.models.find import find_model
from bench.speed.figures import as_json, now, with_interval
from bench.speed.unlearning.inputs import COMPARED, Sizes, load
from bench.speed.unlearning.loop import TrainingLoop
from bench.stats.estimates import Estimate, over_samples
from scoring.samples import Sample

IGNORED = -100  # label of tokens that are not scored
# Losses must agree to this, relative; below LOSS_FLOOR absolute, in units of it: a cross-entropy in fp32 has no more
# digits where the model is certain.
LOSS_TOLERANCE, LOSS_FLOOR = 1e-3, 1e-3
BETA = settings_of(npo)["beta"]


class PlainTrainer(Trainer):
    """GA, GradDiff, PO and NPO as they are commonly written for Trainer: logits of whole padded sequences, labels
    that leave out prompt and padding, and for NPO a frozen copy of the model that runs in every step.

    Args:
        algorithm: its name.
        frozen: the initial model, for algorithms that compare with it.
        settings: of Trainer.
    """

    def __init__(self, algorithm: str, frozen: PreTrainedModel | None, **settings: Any) -> None:
        super().__init__(**settings)
        self._algorithm, self.frozen = algorithm, frozen
        self.losses: list[torch.Tensor] = []

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor:
        nll, counts = _sequence_nll(model, inputs["forget"])
        if self.frozen is not None:
            with torch.no_grad():
                reference_nll, _counts = _sequence_nll(self.frozen, inputs["forget"])
            loss = (-2 / BETA * F.logsigmoid(BETA * (nll - reference_nll))).mean()
        else:
            loss = (nll / counts).mean() * (1 if self._algorithm == "PO" else -1)
        if "retain" in inputs:
            nll, counts = _sequence_nll(model, inputs["retain"])
            loss = loss + (nll / counts).mean()
        self.losses.append(loss.detach())
        return loss


def _sequence_nll(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed NLL of the labelled tokens of each row, and their number, (B,) each."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    labels = inputs["labels"][:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    return losses.sum(-1), (labels != IGNORED).sum(-1)


def padded(samples: Sequence[Sample], pad: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, (B, T) each, padded on the right."""
    shape = (len(samples), max(sample.length for sample in samples))
    input_ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids = torch.from_numpy(sample.input_ids)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = ids.where(torch.from_numpy(sample.scored), IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _padded_by_role(pad: int, pairs: Sequence[dict[str, Sample]]) -> dict[str, dict[str, torch.Tensor]]:
    return {role: padded([pair[role] for pair in pairs], pad) for role in pairs[0]}


class Alternating(TrainerCallback):
    """At the end of each segment, stops Trainer's clock and advances our loop by the same updates.

    Args:
        loop: ours.
        sizes: of the segments.
        clock: that both are timed by.

    Attributes:
        ours, theirs: seconds of each segment.
    """

    def __init__(self, loop: TrainingLoop, sizes: Sizes, clock: Callable[[], float] = now) -> None:
        self._loop, self._sizes, self._clock = loop, sizes, clock
        self._resumed = 0.0
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        segments, steps_within = divmod(state.global_step - self._sizes.warm_up, self._sizes.segment)
        if segments < 0 or steps_within:
            return
        stopped = self._clock()
        if segments:
            self.theirs.append(stopped - self._resumed)
        else:
            self._loop.advance(self._sizes.warm_up)
        if segments < self._sizes.pairs:
            self.ours.append(self._loop.advance(self._sizes.segment, self._clock))
        self._resumed = self._clock()


def compare_with_trainer(spec: UnlearnSpec, sizes: Sizes, folder: Path) -> dict[str, dict[str, Any]]:
    """Algorithm -> the speed of both, the median ratio with its interval, and the largest difference of the losses.

    Raises:
        RuntimeError: the losses differ, so that the two do not train the same.
    """
    print(
        f"\n{'against Trainer':<16}{'ours':>8}{'Trainer':>9}  tokens/s, medians of {sizes.pairs} pairs of "
        f"{sizes.segment} updates; one thread"
    )
    return {name: _compare(dataclasses.replace(spec, algorithm=name), sizes, folder) for name in COMPARED}


def _compare(spec: UnlearnSpec, sizes: Sizes, folder: Path) -> dict[str, Any]:
    updates = sizes.warm_up + sizes.pairs * sizes.segment
    loop = TrainingLoop(spec, updates, folder)
    checked, alternating = loop.spec, Alternating(loop, sizes)
    trainer = trainer_beside(loop, updates, folder, [alternating])
    trainer.train()

    tokens = np.array([step["tokens"] for step in loop.steps[sizes.warm_up :]]).reshape(sizes.pairs, -1).sum(1)
    ours, theirs = np.array(alternating.ours), np.array(alternating.theirs)
    difference = loss_difference(loop, trainer, sizes.losses)
    ratio = median(theirs / ours)
    print(
        f"{checked.algorithm:<16}{np.median(tokens / ours):>8.0f}{np.median(tokens / theirs):>9.0f}  ours / Trainer "
        f"{with_interval(ratio, '.2f')}; losses of the first {sizes.losses} updates differ by {difference:.0e} at "
        "most"
    )
    return {
        "ours_tokens_per_second": float(np.median(tokens / ours)),
        "trainer_tokens_per_second": float(np.median(tokens / theirs)),
        "ratio": as_json(ratio),
        "ratios": (theirs / ours).tolist(),
        "loss_difference": difference,
    }


def trainer_beside(
    loop: TrainingLoop, updates: int, folder: Path, callbacks: Sequence[TrainerCallback] = ()
) -> PlainTrainer:
    """Trainer with the same initial model, algorithm and settings as a loop, and the same batches in the same order."""
    spec = loop.spec
    trainer = PlainTrainer(
        spec.algorithm,
        load(spec) if Objectives.of(spec).reference_quantities() else None,
        model=_without_dropout(load(spec)),
        args=TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=updates,
            per_device_train_batch_size=spec.batch_size or 1,
            train_sampling_strategy="sequential",
            learning_rate=spec.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=spec.weight_decay,
            max_grad_norm=spec.clip_norm or 0.0,
            optim="adamw_torch_fused",
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=[pair for pairs in loop.batches(updates) for pair in pairs],
        data_collator=partial(_padded_by_role, find_model(spec.model).tokenizer.pad_token_id or 0),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def loss_difference(loop: TrainingLoop, trainer: PlainTrainer, updates: int) -> float:
    """The largest relative difference between the losses of both in the first updates.

    Raises:
        RuntimeError: the losses differ, so that the two do not train the same.
    """
    ours = np.array([step["loss"] for step in loop.steps[:updates]])
    theirs = np.array([loss.item() for loss in trainer.losses[:updates]])
    difference = float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), LOSS_FLOOR)))
    if not difference < LOSS_TOLERANCE:
        raise RuntimeError(f"{loop.spec.algorithm}: our loss and Trainer's differ by {difference:.1e}, relative")
    return difference


def median(values: np.ndarray) -> Estimate:
    """The median, and its interval by the bootstrap."""
    return over_samples(lambda rows: float(np.median(values[rows])), len(values))


def _without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model, made deterministic: Trainer puts it into training mode, while ours stays in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model
