"""When a sample counts as forgotten.

ma=NUMBER   its memorization accuracy is below the number.
paper       its extraction likelihood and its memorization accuracy are both below the averages over all forget samples
            on the initial model (Appendix E.4 of the paper). Where no prefix leaves n tokens (T <= n) EL is not
            defined, and MA alone decides. On a model that knows the forget set by heart one wrong token is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from algorithms.group import ALONE, Group
from scoring.errors import UserError
from scoring.memorization import extraction, memorization_accuracy
from scoring.progress import advance, expect
from scoring.samples import BATCH_TOKENS, Sample, default_batch_tokens, make_batches
from scoring.settings import described, named

PAPER, DEFAULT = "paper", "ma=0.5"
RULES = "paper, or ma= and a number above 0 and at most 1, such as ma=0.5"


def ma_of_rule(rule: str) -> float | None:
    """The number that MA of a forgotten sample is below; None by the paper's rule, which takes an average.

    Raises:
        UserError: there is no such rule.
    """
    if rule == PAPER:
        return None
    key, _, text = rule.partition("=")
    try:
        number = float(text) if key.strip().lower() == "ma" else math.nan
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise UserError(f"{named('stopping')} is {described(rule)}: expected {RULES}")
    return number


@dataclass(frozen=True)
class Thresholds:
    """The values that MA and EL of a forgotten sample are below. Where `el` is nan MA alone decides: the rule does not
    ask for EL, or it is not defined for any sample."""

    ma: float
    el: float

    @classmethod
    def from_initial(cls, ma: np.ndarray, el: np.ndarray) -> Thresholds:
        """The averages over all samples, (N,) each."""
        return cls(float(ma.mean()), float(el[np.isfinite(el)].mean()) if np.isfinite(el).any() else np.nan)

    @property
    def el_asked_below(self) -> float:
        """The MA below which EL decides: 0, nowhere, if the rule does not ask for EL or nothing can be below 0."""
        return self.ma if self.el > 0 else 0.0

    def forgotten(self, ma: np.ndarray, el: np.ndarray) -> np.ndarray:
        """Which samples are forgotten, (N,) bool."""
        is_forgotten: np.ndarray = (ma < self.ma) & (math.isnan(self.el) | np.isnan(el) | (el < self.el))
        return is_forgotten

    def blind_spots(self, ma: np.ndarray, el: np.ndarray, n: int) -> list[str]:
        """Notes on what these thresholds cannot tell, from MA and EL_n of the initial model, (N,) each."""
        notes = []
        if below := int(self.forgotten(ma, el).sum()):
            limits = f"MA {self.ma:.4g}" + ("" if math.isnan(self.el) else f", EL {self.el:.4g}")
            notes.append(
                f"{below} of {len(ma)} samples are below the stopping rule's thresholds ({limits}) before any update; "
                "they count as forgotten when first looked at"
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


@dataclass(frozen=True)
class Look:
    """What a look at which samples are forgotten has found, and what it took.

    Attributes:
        ma, el: of N samples, (N,) each. EL is nan where it is not defined, inf where it was not measured.
        tokens: that went through the model, of all workers: those that were read, and those that were written.
    """

    ma: np.ndarray
    el: np.ndarray
    tokens: int


def measure_memorization(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    n: int,
    eos_token_id: int | None,
    batch_tokens: int | None,
    el_below: float | None = None,
    group: Group = ALONE,
) -> Look:
    """MA and EL_n of samples; each worker measures its share.

    Args:
        model: the whole model, in eval mode.
        samples: N samples.
        n: tokens in an n-gram.
        eos_token_id: the token that ends a continuation; None: only the limit ends one.
        batch_tokens: padded tokens in a batch; None: as many as suit the device.
        el_below: measure EL only where MA is below this number; elsewhere it decides nothing, and it is by far the more
            expensive of the two. 0: nowhere; None: everywhere.
        group: this worker.
    """
    mine = samples[group.rank :: group.size]
    look = _measure(model, mine, n, eos_token_id, batch_tokens, el_below)
    pairs = zip(look.ma.tolist(), look.el.tolist(), strict=True)
    pair_of = group.gathered({sample.index: pair for sample, pair in zip(mine, pairs, strict=True)})
    both = np.array([pair_of[sample.index] for sample in samples], dtype=np.float64).reshape(-1, 2)
    return Look(both[:, 0], both[:, 1], sum(group.gathered({group.rank: look.tokens}).values()))


def _measure(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    n: int,
    eos_token_id: int | None,
    batch_tokens: int | None,
    el_below: float | None,
) -> Look:
    ma = np.empty(len(samples))
    row_of = {sample.index: row for row, sample in enumerate(samples)}
    device = next(model.parameters()).device
    expect(len(samples))
    for batch in make_batches(samples, batch_tokens or default_batch_tokens(device)):
        rows = [row_of[index] for index in batch.indices.tolist()]
        ma[rows] = memorization_accuracy(model, batch.to(device)).cpu().numpy()
        advance(len(rows))
    tokens = sum(sample.length for sample in samples)
    el = np.full(len(samples), np.inf)
    undecided = np.flatnonzero(ma < el_below) if el_below is not None else np.arange(len(samples))
    if len(undecided):
        chosen = [samples[row] for row in undecided.tolist()]
        measured = extraction(model, chosen, n, eos_token_id, batch_tokens=4 * (batch_tokens or BATCH_TOKENS))
        el[undecided] = measured.likelihood.numpy()
        tokens += measured.tokens
    return Look(ma, el, tokens)
