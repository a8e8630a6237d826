"""When a sample counts as forgotten (Appendix E.4 of the paper).

A sample is forgotten when its extraction likelihood and its memorization accuracy are both below the averages over
all forget samples on the initial model. Where no prefix leaves n tokens (T <= n) EL is not defined, and MA alone
decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from scoring.memorization import extraction_likelihood, memorization_accuracy
from scoring.samples import Sample, make_batches


@dataclass(frozen=True)
class Thresholds:
    """What both must be below. `el` is nan where it is defined for no sample."""

    ma: float
    el: float

    @classmethod
    def from_initial(cls, ma: np.ndarray, el: np.ndarray) -> Thresholds:
        """The averages over all samples, (N,) each."""
        return cls(float(ma.mean()), float(el[np.isfinite(el)].mean()) if np.isfinite(el).any() else np.nan)

    def forgotten(self, ma: np.ndarray, el: np.ndarray) -> np.ndarray:
        """Which samples are forgotten, (N,) bool."""
        return (ma < self.ma) & (np.isnan(el) | (el < self.el))


def measure_memorization(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    n: int,
    eos_token_id: int | None,
    batch_tokens: int,
    below: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """MA and EL_n of samples, (N,) each.

    Args:
        below: measure EL only where MA is below this: elsewhere it decides nothing, and it is the dearer of the two.
            There it is inf.
    """
    ma = np.empty(len(samples))
    where = {sample.index: row for row, sample in enumerate(samples)}
    device = next(model.parameters()).device
    for batch in make_batches(samples, batch_tokens):
        rows = [where[index] for index in batch.indices.tolist()]
        ma[rows] = memorization_accuracy(model, batch.to(device)).cpu().numpy()
    el = np.full(len(samples), np.inf)
    asked = np.flatnonzero(ma < below) if below is not None else np.arange(len(samples))
    if len(asked):
        chosen = [samples[row] for row in asked.tolist()]
        el[asked] = extraction_likelihood(model, chosen, n, eos_token_id, batch_tokens=4 * batch_tokens).numpy()
    return ma, el
