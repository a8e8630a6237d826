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

from algorithms.group import ALONE, Group
from scoring.memorization import extraction_likelihood, memorization_accuracy
from scoring.progress import advance, expect
from scoring.samples import Sample, make_batches


@dataclass(frozen=True)
class Thresholds:
    """The values that MA and EL of a forgotten sample are below. `el` is nan if EL is not defined for any sample."""

    ma: float
    el: float

    @classmethod
    def from_initial(cls, ma: np.ndarray, el: np.ndarray) -> Thresholds:
        """The averages over all samples, (N,) each."""
        return cls(float(ma.mean()), float(el[np.isfinite(el)].mean()) if np.isfinite(el).any() else np.nan)

    def forgotten(self, ma: np.ndarray, el: np.ndarray) -> np.ndarray:
        """Which samples are forgotten, (N,) bool."""
        is_forgotten: np.ndarray = (ma < self.ma) & (np.isnan(el) | (el < self.el))
        return is_forgotten

    def blind_spots(self, ma: np.ndarray, el: np.ndarray, n: int) -> list[str]:
        """Notes on what these thresholds cannot tell, from MA and EL_n of the initial model, (N,) each."""
        notes = []
        if below := int(self.forgotten(ma, el).sum()):
            notes.append(
                f"{below} of {len(ma)} samples are below both thresholds (MA {self.ma:.4g}, EL {self.el:.4g}) before "
                "any update; they count as forgotten when first looked at"
            )
        if undefined := int(np.isnan(el).sum()):
            notes.append(f"EL is not defined for {undefined} samples of at most {n} tokens: MA alone decides")
        for name, threshold in (("MA", self.ma), ("EL", self.el)):
            if threshold == 0:
                notes.append(
                    f"{name} of all samples is 0 on the initial model, and nothing is below: no sample can count as "
                    "forgotten" + ("; a smaller el_n may tell" if name == "EL" else "")
                )
        return notes


def measure_memorization(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    n: int,
    eos_token_id: int | None,
    batch_tokens: int,
    el_below: float | None = None,
    group: Group = ALONE,
) -> tuple[np.ndarray, np.ndarray]:
    """MA and EL_n of samples, (N,) each; each worker measures its share.

    Args:
        model: the whole model, in eval mode.
        samples: N samples.
        n: tokens in an n-gram.
        eos_token_id: the token that ends a continuation; None: only the limit ends one.
        batch_tokens: padded tokens in a batch.
        el_below: measure EL only where MA is below this number. Elsewhere EL decides nothing, and it is the more
            expensive of the two; it is inf there.
        group: this worker.
    """
    mine = samples[group.rank :: group.size]
    ma, el = _measure(model, mine, n, eos_token_id, batch_tokens, el_below)
    pairs = zip(ma.tolist(), el.tolist(), strict=True)
    pair_of = group.gathered({sample.index: pair for sample, pair in zip(mine, pairs, strict=True)})
    both = np.array([pair_of[sample.index] for sample in samples], dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _measure(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    n: int,
    eos_token_id: int | None,
    batch_tokens: int,
    el_below: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    ma = np.empty(len(samples))
    row_of = {sample.index: row for row, sample in enumerate(samples)}
    device = next(model.parameters()).device
    expect(len(samples))
    for batch in make_batches(samples, batch_tokens):
        rows = [row_of[index] for index in batch.indices.tolist()]
        ma[rows] = memorization_accuracy(model, batch.to(device)).cpu().numpy()
        advance(len(rows))
    el = np.full(len(samples), np.inf)
    undecided = np.flatnonzero(ma < el_below) if el_below is not None else np.arange(len(samples))
    if len(undecided):
        chosen = [samples[row] for row in undecided.tolist()]
        el[undecided] = extraction_likelihood(model, chosen, n, eos_token_id, batch_tokens=4 * batch_tokens).numpy()
    return ma, el
