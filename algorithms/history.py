"""The record of a run, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# What the seconds of a run are spent on.
CLOCKS = ("training", "mrd", "checks", "evaluation", "checkpoints")


@dataclass
class History:
    """The record of a run, all of it JSON.

    Attributes:
        step: number of updates made.
        forgotten_at: for each forget sample, the number of updates after which it was found forgotten, or None.
        drawn: how often each forget sample was drawn: with replacement an update may draw it twice.
        drawn_until_forgotten: how often it had been drawn when it was found forgotten, or None.
        thresholds: the thresholds of MA and EL; empty, as `memory` is, if nobody checks which samples are forgotten.
        memory: MA and EL of each sample on the initial model ("initial") and when last measured ("last"): a forgotten
            sample is not measured again.
        look: of the last look at which samples are forgotten: the step, and the tokens that went through the model.
        mrd: one entry per refresh: the step and the scores.
        forecasts: the same of forecasts, in updates.
        forecast_threshold: what MA falls below in a forecast; None if there are none.
        groups: the group of each forget sample, counted from 0; none without a schedule.
        steps, epochs: rows, see `algorithms.tables`.
        seconds: seconds by what they were spent on, see `CLOCKS`.
        passes: forwards and backwards of the first worker over a micro-batch, for "training" and "mrd", which counts
            forecasts too.
        notes: what a reader must know, each once.
        sampler: the state of the sampler at the last checkpoint.
        retain_weight: of the next update, where it follows the retain loss; else None.
    """

    step: int = 0
    forgotten_at: list[int | None] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    drawn_until_forgotten: list[int | None] = field(default_factory=list)
    thresholds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    look: dict[str, int] = field(default_factory=dict)
    mrd: list[dict[str, Any]] = field(default_factory=list)
    forecasts: list[dict[str, Any]] = field(default_factory=list)
    forecast_threshold: float | None = None
    groups: list[int] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, list[int]] = field(default_factory=lambda: {"training": [0, 0], "mrd": [0, 0]})
    notes: list[str] = field(default_factory=list)
    sampler: dict[str, Any] = field(default_factory=dict)
    retain_weight: float | None = None

    @classmethod
    def of(cls, forget_samples: int) -> History:
        """The record of a run that has not begun."""
        return cls(
            forgotten_at=[None] * forget_samples,
            drawn=[0] * forget_samples,
            drawn_until_forgotten=[None] * forget_samples,
        )

    @property
    def active(self) -> np.ndarray:
        """Which samples are not forgotten, (N,) bool."""
        return np.array([step is None for step in self.forgotten_at])

    @property
    def known_thresholds(self) -> dict[str, float | None]:
        """The thresholds, with None for one that does not decide: JSON has no nan."""
        return {name: None if np.isnan(value) else value for name, value in self.thresholds.items()}

    def note(self, *notes: str) -> None:
        """Add notes, each once."""
        self.notes += [note for note in dict.fromkeys(notes) if note not in self.notes]


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step, total: updates made, and those of a run that does not stop early.
        epoch, loss, forget_loss, retain_loss: of the last update; None before the first.
        forgotten: the share of samples; None if nobody checks.
        resumed: the update that this start has continued from; 0: it has begun.
        seconds_left: of the whole run, with all that is measured on the way; None where nobody can tell yet.
        phase, done, of: what is being done, and how far that is, see `scoring.progress.Meter`.
        failed: why it has ended, if it was for an error.
        notes: what a reader must know, as far as the run has found it out.
    """

    step: int
    total: int
    epoch: int = 0
    loss: float | None = None
    forget_loss: float | None = None
    retain_loss: float | None = None
    forgotten: float | None = None
    resumed: int = 0
    seconds_left: float | None = None
    phase: str = ""
    done: float = 0
    of: float = 0
    failed: str | None = None
    notes: Sequence[str] = ()


def seconds_left(history: History, total: int, updates_per_epoch: int) -> float | None:
    """Seconds until a run ends that does not stop early: its updates, and as much beside them in each epoch as there
    has been so far, the initial model's measurements included."""
    if not history.step:
        return None
    training = history.seconds.get("training", 0.0)
    beside = sum(list(history.seconds.values())) - training  # a list: another thread may be adding one
    left = total - history.step
    epochs = -(-left // updates_per_epoch)
    return left * training / history.step + epochs * beside / max(1, len(history.epochs))
