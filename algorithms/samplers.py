"""Which forget samples come next.

One family of weighted draws,

    p_i = MRD_i^alpha / Sum_j MRD_j^alpha    over the samples that are still active,

with alpha = 1 for Algorithm 2 (easy first), 0 for uniform draws, -1 for Appendix B (hard first: p_i is proportional
to the updates that a sample needs, I_i ~ 1/MRD_i), with or without replacement within an epoch; and three fixed
orders. In the place of MRD any other ease may stand, see `algorithms.ease`: a greater value is an easier sample.
A sampler is an endless stream: it decides which samples an update sees, never how many updates there are.

Draws depend on (seed, step) and not on a running generator. So a sampler has to remember only the difficulties and the
samples already drawn, and a resumed run draws the samples that an undisturbed one would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from scoring.errors import UserError, unknown_name
from scoring.registry import Registry

# N, MRD by position (N,), a generator that gives the same numbers throughout a run -> all positions, (N,), in the order
# in which they are drawn. MRD is None for an order that does not depend on it.
Ranking = Callable[[int, np.ndarray | None, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Order:
    """A way of going through the forget samples.

    Attributes:
        about: a description in one line.
        ranking: the ranking of a fixed order; None for weighted draws.
        by_difficulty: whether a fixed order depends on MRD.
    """

    about: str
    ranking: Ranking | None = None
    by_difficulty: bool = True


def _easy_first(count: int, mrd: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    assert mrd is not None
    return np.argsort(-mrd, kind="stable")


def _hard_first(count: int, mrd: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    assert mrd is not None
    return np.argsort(mrd, kind="stable")


def _random(count: int, mrd: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(count)


ORDERS: Registry[Order] = Registry(
    "order",
    {
        "weighted": Order("draws p_i ∝ MRD_i^alpha"),
        "easy-first": Order("descending MRD, ties by position", _easy_first),
        "hard-first": Order("ascending MRD, ties by position", _hard_first),
        "random": Order("one permutation, kept throughout", _random, by_difficulty=False),
    },
    of=Order,
)

# Keep the uses of a seed apart from each other and from whatever else a run seeds with it.
_DRAW, _PERMUTATION, _RETAIN_ORDER = 2101, 2102, 101


class Sampler:
    """Draws positions of forget samples.

    weighted    p_i as above. With replacement all draws are independent. Without, each draw is by p_i among the samples
                that are left: no sample comes twice before every active one has come.
    easy-first  descending MRD, ties by position.
    hard-first  ascending MRD, ties by position.
    random      one permutation, kept throughout.

    Weighted draws without replacement and the fixed orders go through the active samples in passes. When a pass ends,
    even in the middle of a batch, the next begins; a batch never holds a sample twice. New difficulties reorder the
    samples that are left in a pass.

    Args:
        count: N, the forget samples.
        order: one of ORDERS.
        alpha: the exponent, any real number; for weighted draws.
        replacement: whether a sample may come again at once; for weighted draws.
        seed: seed of the draws, 0 or more.

    Raises:
        UserError: no samples, an unknown order, alpha not finite, or a negative seed.
    """

    def __init__(
        self, count: int, order: str = "weighted", alpha: float = 1.0, replacement: bool = True, seed: int = 0
    ) -> None:
        if count < 1:
            raise UserError(f"{count} forget samples: expected at least 1")
        if order not in ORDERS:
            raise unknown_name("order", order, ORDERS)
        if not math.isfinite(alpha):
            raise UserError(f"alpha is {alpha}: expected a finite number, such as 1 (easy first) or -1 (hard first)")
        if seed < 0:
            raise UserError(f"seed is {seed}: expected 0 or more")
        self._order = ORDERS[order]
        self.count, self.order, self.alpha, self.replacement, self.seed = count, order, alpha, replacement, seed
        self._difficulty: np.ndarray | None = None
        # The samples drawn in this pass. A mask and not a place in the ranking: a refresh reorders the samples.
        self._drawn = np.zeros(count, dtype=bool)

    @property
    def needs_difficulty(self) -> bool:
        """Whether the draws depend on MRD."""
        return self.alpha != 0 if self._order.ranking is None else self._order.by_difficulty

    def set_difficulty(
        self, mrd: np.ndarray, sample_ids: Sequence[str], zero_is: str = "every scored token is saturated"
    ) -> list[str]:
        """Draw by these difficulties from now on.

        Args:
            mrd: (N,) MRD, or another ease, by position; not used if the draws do not depend on it.
            sample_ids: N names, for messages.
            zero_is: why one may be 0, for messages.

        Returns:
            Notes for the user about difficulties of 0, which p_i does not rank; mostly none.

        Raises:
            ValueError: not N difficulties, or not N names.
            UserError: a difficulty is nan, infinite or negative.
        """
        mrd = np.array(mrd, dtype=np.float64)
        if mrd.shape != (self.count,) or len(sample_ids) != self.count:
            raise ValueError(f"{mrd.shape} difficulties and {len(sample_ids)} ids for {self.count} samples")
        if not self.needs_difficulty:
            return []
        wrong = np.flatnonzero(~(np.isfinite(mrd) & (mrd >= 0)))
        if len(wrong):
            names = ", ".join(str(sample_ids[i]) for i in wrong[:3]) + (", ..." if len(wrong) > 3 else "")
            raise UserError(
                f"difficulty of {len(wrong)} of {self.count} samples ({names}) is not a finite number >= 0: the model "
                "has diverged, or the sample's log-probabilities are not finite; lower the learning rate, or leave "
                "these samples out"
            )
        self._difficulty = mrd
        return self._notes(int(np.sum(mrd == 0)), zero_is)

    def _notes(self, zeros: int, zero_is: str) -> list[str]:
        if self.count == 1:
            return ["one sample: always drawn, its difficulty does not matter"]
        if zeros == 0 or (self._order.ranking is not None and zeros < self.count):
            return []
        if zeros == self.count:
            effect = "drawn uniformly" if self._order.ranking is None else "taken in the order of the data"
            return [f"all {self.count} samples have difficulty 0 ({zero_is}): {effect}"]
        if self.alpha < 0:
            effect = "drawn as the smallest positive difficulty is"
        else:
            effect = "not drawn while others are active" if self.replacement else "drawn last in each epoch"
        return [f"{zeros} of {self.count} samples have difficulty 0 ({zero_is}): {effect}"]

    def probabilities(self, active: np.ndarray) -> np.ndarray:
        """p_i of a draw from the active samples; without replacement, of the first draw of a pass.

        Args:
            active: (N,) bool, samples not forgotten yet.

        Returns:
            (N,) fp64, sum 1, 0 at inactive samples. For a fixed order 1 / (active samples): each sample's share of
            a pass.

        Raises:
            ValueError: no sample is active.
            RuntimeError: the draws need difficulties, and none are set.
        """
        active = self._checked(active)
        weights: np.ndarray = np.exp(self._log_weights(active) if self._order.ranking is None else _uniform(active))
        probabilities: np.ndarray = weights / weights.sum()
        return probabilities

    def begin_epoch(self) -> None:
        """Begin a new pass, whether the last one has ended or not."""
        self._drawn[:] = False

    def draw(self, step: int, size: int, active: np.ndarray) -> np.ndarray:
        """The samples of one update.

        Args:
            step: number of the update, which with the seed determines the draw.
            size: number of samples to draw, 1 or more.
            active: (N,) bool, samples not forgotten yet.

        Returns:
            (k,) int64 positions, in the order in which they were drawn. With replacement k = size; else they are
            distinct, and k = min(size, active samples).

        Raises:
            ValueError: no sample is active, or size is below 1.
            RuntimeError: the draws need difficulties, and none are set.
        """
        active = self._checked(active)
        if size < 1:
            raise ValueError(f"size is {size}: expected 1 or more")
        rng = np.random.default_rng([self.seed, _DRAW, step])
        if self._order.ranking is None and self.replacement:
            return rng.choice(self.count, size, p=self.probabilities(active))
        ranked = self._ranking(rng, active)
        ranked = ranked[active[ranked]]
        batch: np.ndarray = ranked[~self._drawn[ranked]][:size]
        self._drawn[batch] = True
        if len(batch) < min(size, len(ranked)):
            # The pass has ended. The new one begins with samples that are not in this batch; those that are come later
            # in the pass.
            next_pass = ranked[~np.isin(ranked, batch)][: size - len(batch)]
            self.begin_epoch()
            self._drawn[next_pass] = True
            batch = np.concatenate([batch, next_pass])
        return batch

    def _ranking(self, rng: np.random.Generator, active: np.ndarray) -> np.ndarray:
        """All positions, (N,), in the order in which they are drawn."""
        if self._order.ranking is not None:
            mrd = self._known_difficulty() if self._order.by_difficulty else None
            rng = np.random.default_rng([self.seed, _PERMUTATION])
            ranking = np.asarray(self._order.ranking(self.count, mrd, rng))
            if not np.array_equal(np.sort(ranking), np.arange(self.count)):
                raise UserError(
                    f"order {self.order!r} does not rank each of {self.count} positions once: got {ranking}"
                )
            return ranking
        # To sort by descending log w_i + G_i with standard Gumbel G_i is the same as to draw one after the other by
        # p_i among the samples that are left, from any subset of the samples (Efraimidis & Spirakis 2006, whose keys
        # u^(1/w_i) these are, as -log(-log .)). Samples of weight 0 come last, in uniform order: the limit of ever
        # smaller weights.
        weights = self._log_weights(active)
        drawable = np.isfinite(weights)
        keys = np.where(drawable, weights, 0.0) + rng.gumbel(size=self.count)
        order: np.ndarray = np.lexsort((-keys, ~drawable))
        return order

    def _log_weights(self, active: np.ndarray) -> np.ndarray:
        """alpha log MRD_i less its maximum over the active samples, (N,); -inf where p_i is 0.

        In log space, because MRD^alpha may overflow, as (1e-70)^-5 does.
        """
        if not self.needs_difficulty:
            return _uniform(active)
        mrd = self._known_difficulty()
        if self.alpha < 0 and mrd.any():
            mrd = np.maximum(mrd, mrd[mrd > 0].min())
        drawable = active & (mrd > 0)
        if not drawable.any():
            return _uniform(active)
        logs = np.log(mrd[drawable])
        weights = np.full(self.count, -np.inf)
        # The likeliest sample is subtracted before alpha is applied, so that no alpha gives inf - inf.
        with np.errstate(over="ignore"):
            weights[drawable] = self.alpha * (logs - (logs.max() if self.alpha > 0 else logs.min()))
        return weights

    def _known_difficulty(self) -> np.ndarray:
        if self._difficulty is None:
            raise RuntimeError(f"order {self.order!r} draws by difficulty: call set_difficulty before the first draw")
        return self._difficulty

    def _checked(self, active: np.ndarray) -> np.ndarray:
        active = np.asarray(active, dtype=bool)
        if active.shape != (self.count,):
            raise ValueError(f"active has shape {active.shape}: expected ({self.count},)")
        if not active.any():
            raise ValueError("no sample is active: there is nothing left to draw")
        return active

    def state(self) -> dict[str, Any]:
        """The state that `restore` needs, JSON: the difficulties, and the samples that this pass has drawn."""
        return {
            "difficulty": None if self._difficulty is None else self._difficulty.tolist(),
            "drawn": np.flatnonzero(self._drawn).tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state()` of a sampler with the same arguments."""
        difficulty = state["difficulty"]
        self._difficulty = None if difficulty is None else np.array(difficulty, dtype=np.float64)
        self._drawn[:] = False
        self._drawn[state["drawn"]] = True


def _uniform(active: np.ndarray) -> np.ndarray:
    """Equal log-weights for the active samples, -inf for the others."""
    return np.where(active, 0.0, -np.inf)


def retain_order(first: int, count: int, size: int, seed: int) -> list[int]:
    """The order of the retain samples: positions `first` to `first + count - 1` of the endless sequence of random
    permutations of `size` samples."""
    return [int(_permutation(place // size, size, seed)[place % size]) for place in range(first, first + count)]


@lru_cache(maxsize=4)
def _permutation(turn: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, _RETAIN_ORDER, turn]).permutation(size)
