"""Margins and flip times by hand, and the number of flips against counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scoring.margins import flip_times, flips_needed, token_margins, updates_until

INF, NAN = math.inf, math.nan


def test_margins_by_hand() -> None:
    logits = torch.tensor([[[3.0, 1.0, -2.0], [0.5, 2.0, 2.0]], [[-1.0, -4.0, -1.5], [7.0, 7.0, 7.0]]])
    targets = torch.tensor([[0, 2], [1, 0]])
    # 3 - 1; 2 - 2; -4 + 1; 7 - 7.
    found = token_margins(logits, targets)
    assert found.tolist() == [[2.0, 0.0], [-3.0, 0.0]]
    assert found.dtype == torch.float32
    assert token_margins(logits.double(), targets).dtype == torch.float64
    # bfloat16 holds 3 and 1.0078125; their difference is formed in fp32, where bfloat16 would give 2.
    rough = token_margins(torch.tensor([[3.0, 1.0078125]], dtype=torch.bfloat16), torch.tensor([0]))
    assert rough.dtype == torch.float32
    assert rough.tolist() == [1.9921875]


def test_flips_needed_against_counting() -> None:
    """The fewest wrong tokens with which MA, a plain quotient, is below the threshold; thresholds are all values that
    MA can take, their neighbours among the numbers, and random ones."""
    rng = np.random.default_rng(0)
    for tokens in range(1, 61):
        values = [right / tokens for right in range(tokens + 1)]
        near = [math.nextafter(value, to) for value in values for to in (0.0, 1.0)]
        for threshold in [*values, *near, *rng.random(20).tolist(), 0.1, 0.7, 0.9]:
            enough = [wrong for wrong in range(tokens + 1) if (tokens - wrong) / tokens < threshold]
            assert flips_needed(tokens, threshold) == (min(enough) if enough else None), (tokens, threshold)
            # As in the docstring, where rounding does not decide.
            if threshold not in (*values, *near):
                assert flips_needed(tokens, threshold) == math.floor((1 - threshold) * tokens) + 1


@pytest.mark.parametrize(
    ("updates", "margins", "expected"),
    [
        # One line: 2 to 1.5 in one update falls 0.5 an update; from 3 to 1 in 4 updates 0.5 too.
        ([0, 1], [2.0, 1.5], 4.0),
        ([0, 4], [3.0, 1.0], 6.0),
        # Not predicted at the start, or tied: flipped, wherever it goes.
        ([0, 1], [-0.1, 5.0], 0.0),
        ([0, 1], [0.0, 5.0], 0.0),
        # Rising, or standing still.
        ([0, 1], [2.0, 2.1], INF),
        ([0, 1], [2.0, 2.0], INF),
        # Zero is reached between two looks: at 2 + 2 * 1 / 4; and exactly at a look.
        ([0, 2, 4], [3.0, 1.0, -3.0], 2.5),
        ([0, 2, 4], [3.0, 0.0, 1.0], 2.0),
        # The first time counts, although the margin comes back and falls again.
        ([0, 1, 2, 3], [1.0, -1.0, 2.0, -2.0], 0.5),
        # Beyond the last look the last line goes on, not the mean one: 1 left, 1 an update.
        ([0, 2, 3], [10.0, 2.0, 1.0], 4.0),
        ([0, 2, 3], [10.0, 2.0, 3.0], INF),
        # What is no number gives none, unless it has flipped before.
        ([0, 1], [NAN, NAN], NAN),
        ([0, 1], [1.0, NAN], NAN),
        ([0, 1, 2], [1.0, -1.0, NAN], 0.5),
        ([0, 1], [-1.0, NAN], 0.0),
    ],
)
def test_flip_times_by_hand(updates: list[float], margins: list[float], expected: float) -> None:
    # A token that falls from 1 by 1 / 8 an update stands beside it: columns do not mix.
    looks = np.array([margins, 1 - np.array(updates) / 8]).T
    np.testing.assert_allclose(flip_times(np.array(updates), looks), [expected, 8.0], rtol=1e-15)


def test_updates_until_by_hand() -> None:
    times = np.array([7.0, 2.0, INF, 4.0])
    # Of 4 tokens MA is 1, .75, .5, .25 and 0 after that many flips.
    for threshold, expected in ((1.0, 2), (0.76, 2), (0.75, 4), (0.6, 4), (0.5, 7), (0.26, 7), (0.25, INF), (0.0, INF)):
        assert updates_until(times, threshold) == expected
    # Two that are wrong from the start.
    assert updates_until(np.array([0.0, 5.0, 0.0, 3.0]), 0.75) == 0
    assert updates_until(np.array([0.0, 5.0, 0.0, 3.0]), 0.5) == 3
    assert math.isnan(updates_until(np.array([0.0, NAN]), 1.0))
