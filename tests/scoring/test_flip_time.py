"""Forecasts of updates against closed forms, and against updates that are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.alone import LossAlone
from scoring.errors import UserError
from scoring.flip_time import Forecaster, InitialOutputs, Outputs, outputs_of
from scoring.samples import Sample, collate, make_batches
from scoring.updates import TrialUpdates, UpdateSettings
from tests.scoring.toys import LEARNT, bigram, memorised_model, sample

GA = LossAlone("GA")


def forecast(
    model: Any,
    batches: Sequence[Sequence[Sample]],
    thresholds: Sequence[float] = (1.0,),
    lookahead: int = 1,
    loss: Any = GA,
    **settings: Any,
) -> np.ndarray:
    forecaster = Forecaster(model, TrialUpdates(model, UpdateSettings(**settings)), loss)
    return forecaster.forecast([collate(batch) for batch in batches], thresholds, lookahead)


# --- AdamW on a table of logits ------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [GA, LossAlone("NPO", {"beta": 2.0}), LossAlone("WGA")], ids=lambda x: x.algorithm)
@pytest.mark.parametrize("lookahead", [1, 2, 5])
def test_adamw_takes_twice_the_rate_off_every_margin(loss: LossAlone, lookahead: int) -> None:
    """The gradient of Sum_t log p_t by a row of the table is onehot(target) - p, times something positive: the target's
    logit is above 0 in it, all others are below. The first step of AdamW is eta times the sign: the target's logit
    falls by eta, all others rise by eta, and the margin shrinks by 2 eta, whatever the loss: n_t = m_t / (2 eta).

    Up to eps = 1e-8 beside the gradient, which is 1e-3 and more here."""
    table = [[2.0, 0.5, 0.0, 1.0], [0.0, 3.0, 1.0, 0.5], [1.0, 2.0, 0.0, 1.5], [0.0, 1.0, 0.0, 1.75]]
    one = sample([0, 0]), sample([1, 1]), sample([2, 1]), sample([2, 3, 3])
    # Margins: 2 - 1; 3 - 1; 2 - 1.5; and 1.5 - 2 (wrong already) and 1.75 - 1.
    expected = ([1.0], [2.0], [0.5], [-0.5, 0.75])
    for each, margins in zip(one, expected, strict=True):
        found = forecast(bigram(table), [[each]], (1.0, 0.5), lookahead, loss, learning_rate=0.01)
        times = np.sort(np.maximum(margins, 0.0)) / 0.02
        # MA falls below 1 with the first flip, below .5 with all of one or two.
        np.testing.assert_allclose(found[0], [times[0], times[-1]], rtol=1e-5)


def test_several_tokens_and_thresholds() -> None:
    """Four margins .4, .8, 1.2 and 2 in rows of their own; 2 eta = .1."""
    margins = [0.8, 2.0, 0.4, 1.2]
    table = torch.zeros(5, 6, dtype=torch.float64)
    for row, margin in enumerate(margins):
        table[row, row + 1] = margin
    walk = sample([0, 1, 2, 3, 4])
    thresholds = [1.0, 0.75, 0.5, 0.25, 0.0]
    found = forecast(bigram(table), [[walk]], thresholds, learning_rate=0.05)
    np.testing.assert_allclose(found, [[4, 8, 12, 20, math.inf]], rtol=1e-5)


# --- SGD on two logits ---------------------------------------------------------------------------------------


def in_updates(margin: float, rate: float, clip: float | None) -> float:
    """The closed form. With p = sigma(m) the gradient of log p by the two logits is (1 - p, -(1 - p)), and a step takes

        dm/dt = -2 eta (1 - p) = -2 eta / (1 + e^m),    so    (1 + e^m) dm = -2 eta dt

    and m + e^m falls by 2 eta a step: from m to m' in (m + e^m - m' - e^m') / (2 eta) steps. The norm of the gradient
    is sqrt(2) (1 - p). Where that is above the clip norm c, dm/dt = -sqrt(2) eta c; it gets there at
    e^m = sqrt(2) / c - 1."""
    until = 0.0
    if clip is not None and math.sqrt(2) / clip > 2:
        until = min(margin, math.log(math.sqrt(2) / clip - 1))
    free = (margin + math.exp(margin) - until - math.exp(until)) / (2 * rate)
    return free + (until / (math.sqrt(2) * rate * clip) if clip else 0.0)


def simulated(margin: float, rate: float, clip: float | None, beta: float | None) -> int:
    """Updates of SGD on GA, or on NPO with r = p / p_0: -(2 / beta) log sigmoid(-beta log r), whose slope in log p is
    2 r^beta / (1 + r^beta)."""

    def log_p(m: float) -> float:
        return -math.log1p(math.exp(-m))

    first, updates = log_p(margin), 0
    while margin > 0:
        power = math.exp((beta or 0.0) * (log_p(margin) - first))
        gradient = 2 * power / (1 + power) / (1 + math.exp(margin)) * np.array([1.0, -1.0])
        norm = np.linalg.norm(gradient)
        if clip is not None and norm > clip:
            gradient *= clip / norm
        margin -= rate * float(gradient[0] - gradient[1])
        updates += 1
    return updates


# The margin, and the rate that takes some hundred updates to it.
@pytest.mark.parametrize(("margin", "rate"), [(1.0, 0.01), (4.0, 0.05), (8.0, 1.0)])
@pytest.mark.parametrize("clip", [None, 1.0, 0.3])
def test_sgd_is_told_when_it_gets_faster(margin: float, rate: float, clip: float | None) -> None:
    def found(lookahead: int, loss: Any = GA) -> float:
        model = bigram([[margin, 0.0], [0.0, 0.0]])
        settings = {"optimizer": "sgd", "learning_rate": rate, "clip_norm": clip}
        return float(forecast(model, [[sample([0, 0])]], (1.0,), lookahead, loss, **settings)[0, 0])

    exact = in_updates(margin, rate, clip)
    assert simulated(margin, rate, clip, None) == pytest.approx(exact, rel=0.01)
    # One gradient: a straight line at the first speed. (torch clips to a millionth less than it says.)
    first = math.sqrt(2) / (1 + math.exp(margin))
    straight = margin / (math.sqrt(2) * rate * min(first, clip or math.inf))
    assert found(1) == pytest.approx(straight, rel=1e-5)
    for lookahead, tolerance in ((2, 0.03), (3, 0.01), (5, 0.01)):
        assert found(lookahead) == pytest.approx(exact, rel=tolerance)
    # NPO slows down as it gets away from the initial model, which only looks on the way can see. At the start it is GA.
    for beta in (0.1, 3.0):
        npo = LossAlone("NPO", {"beta": beta})
        assert found(1, npo) == pytest.approx(straight, rel=1e-5)
        assert found(5, npo) == pytest.approx(simulated(margin, rate, clip, beta), rel=0.03)


def test_a_loss_that_levels_off_on_the_way() -> None:
    """Its gradient is 0 from log p = -.2 on: the forecast is what was seen before, without a division by 0."""

    def levelled(now: Outputs, initial: Outputs) -> torch.Tensor:
        return now.logprobs.sum(-1).clamp_min(-0.2)

    model = bigram([[4.0, 0.0], [0.0, 0.0]])
    for optimizer in ("adamw", "sgd"):
        settings: dict[str, Any] = {"optimizer": optimizer, "learning_rate": 0.01}
        straight = forecast(model, [[sample([0, 0])]], loss=levelled, **settings)
        assert np.isfinite(straight).all()
        # The second of three gradients is taken at a margin of 4 * 2 / 3, log p = -.07; the third is 0.
        found = forecast(model, [[sample([0, 0])]], (1.0,), 3, levelled, **settings)
        assert 0 < found.item() <= straight.item() * (1 + 1e-9)


# --- Together -----------------------------------------------------------------------------------------------


def test_samples_that_do_not_touch_each_other() -> None:
    """Rows of their own: AdamW steps as for each alone. SGD goes by the mean gradient, of which each has half: it takes
    twice the updates."""
    table = [[2.0, 0.0], [0.0, 1.0]]
    pair = sample([0, 0]), sample([1, 1], 1)
    for optimizer, factor in (("adamw", 1), ("sgd", 2)):
        settings: dict[str, Any] = {"optimizer": optimizer, "learning_rate": 0.01, "clip_norm": None}
        alone = [forecast(bigram(table), [[one]], **settings).item() for one in pair]
        for batches in ([list(pair)], [[one] for one in pair]):
            together = forecast(bigram(table), batches, **settings)[:, 0]
            np.testing.assert_allclose(together, np.multiply(alone, factor), rtol=1e-6)


def test_samples_that_contradict_each_other() -> None:
    """Of row 0 one sample says 0 and one 1. Alone, 0 is forgotten in m / (2 eta) updates. Together the sum of the two
    gradients by the logit of 0 is 1 - 2 p < 0: forgetting both makes 0 likelier yet, and the other is wrong already."""
    model = bigram([[2.0, 0.0], [0.0, 0.0]])
    likely, unlikely = sample([0, 0]), sample([0, 1], 1)
    assert forecast(model, [[likely]], learning_rate=0.01).item() == pytest.approx(100, rel=1e-5)
    assert forecast(model, [[likely, unlikely]], learning_rate=0.01)[:, 0].tolist() == [math.inf, 0.0]


@pytest.mark.parametrize(
    ("loss", "optimizer", "lookahead"), [("GA", "adamw", 1), ("NPO", "adamw", 2), ("UNDIAL", "sgd", 3)]
)
def test_a_set_of_one_and_of_copies(loss: str, optimizer: str, lookahead: int) -> None:
    """N copies have the mean gradient of one, however they are batched."""
    model = memorised_model()
    settings: dict[str, Any] = {"loss": LossAlone(loss), "learning_rate": 3e-4 if optimizer == "adamw" else 0.03}
    settings |= {"optimizer": optimizer, "lookahead": lookahead, "thresholds": (1.0, 0.6)}
    one = LEARNT[9]
    alone = forecast(model, [[one]], **settings)
    assert np.isfinite(alone).all()
    assert (alone > 0).all()
    copies = [Sample(f"copy {i}", one.input_ids, one.scored, i) for i in range(3)]
    for batches in ([copies], [copies[:1], copies[1:]]):
        np.testing.assert_allclose(forecast(model, batches, **settings), np.repeat(alone, 3, axis=0), rtol=1e-5)


# In fp32 margins and their small drops are rounded; and AdamW takes the sign of gradients that rounding may turn.
@pytest.mark.parametrize(
    ("optimizer", "dtype", "bound"),
    [
        ("sgd", torch.float64, 1e-10),
        ("adamw", torch.float64, 1e-10),
        ("sgd", torch.float32, 2e-4),
        ("adamw", torch.float32, 5e-3),
    ],
)
def test_batches_change_no_forecast(optimizer: Any, dtype: torch.dtype, bound: float) -> None:
    """The samples one by one, and in batches with padding."""
    model = memorised_model(dtype)
    found = []
    for batch_tokens in (1, 30, 4096):
        batches = make_batches(LEARNT[:8], batch_tokens)
        settings = UpdateSettings(optimizer=optimizer, learning_rate={"sgd": 0.03, "adamw": 3e-4}[optimizer])
        forecaster = Forecaster(model, TrialUpdates(model, settings), LossAlone("NPO"))
        in_order = np.concatenate([batch.indices.numpy() for batch in batches]).argsort()
        found.append(forecaster.forecast(batches, (1.0, 0.6), 2)[in_order])
        # A gradient and a look after the trial move; for each threshold another gradient and another look.
        assert (forecaster.forwards, forecaster.backwards) == (6 * len(batches), 3 * len(batches))
    assert len(np.unique(found[0])) > 10
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=bound)


def test_initial_outputs_of_other_batches() -> None:
    """What is kept of one batching is given back for another, without its padding."""
    model = memorised_model()
    loss = LossAlone("UNDIAL")
    kept = InitialOutputs(loss)
    with torch.no_grad():
        whole = collate(LEARNT[:5])
        kept.keep(whole, outputs_of(model, whole))
        model.lm_head.weight.mul_(0.5)
        for rows in ([3], [4, 1], [2, 0, 3]):
            batch = collate([LEARNT[row] for row in rows])
            now = outputs_of(model, batch)
            initial = kept.of(batch, now)
            model.lm_head.weight.mul_(2)
            before = outputs_of(model, batch)
            model.lm_head.weight.mul_(0.5)
            torch.testing.assert_close(initial.logprobs, before.logprobs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(initial.logits[batch.mask], before.logits[batch.mask], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(now.logits, before.logits, atol=0.1)
    assert InitialOutputs(GA).of(batch, now).logits.equal(now.logits)


def test_a_sample_that_is_not_finite_spoils_no_other_silently() -> None:
    model = bigram([[2.0, 0.0], [math.nan, 0.0]])
    good, bad = sample([0, 0]), sample([1, 0], 1)
    assert np.isnan(forecast(model, [[bad]])).all()
    assert np.isfinite(forecast(model, [[good]])).all()
    for batches in ([[good, bad]], [[good], [bad]]):
        with pytest.raises(UserError, match=r"^the model's log-probabilities of sample 's1' are not finite") as e:
            forecast(model, batches)
        assert "\n" not in str(e.value)
    assert model.table.grad is None
