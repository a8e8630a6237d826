"""The record of a run, and the progress that it shows."""

from __future__ import annotations

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
    """What the progress bar shows."""

    step: int
    total: int
    epoch: int
    loss: float
    forget_loss: float
    retain_loss: float
    forgotten: float | None
