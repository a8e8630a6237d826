"""Every rule of series against torch's forward mode twice, in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp

from scoring.logprob import token_logprobs
from scoring.taylor import NoRule, Series

INF = float("inf")
MASK = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]]).bool()
ROWS = torch.tensor([0, 2, 0])
PLACES = torch.tensor([[0, 1, 2, 0]])
WHOLE = torch.tensor([5, 6, 7, 8])
AHEAD = torch.tensor([0.3, 0.7], dtype=torch.float64)
POSITIVE = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(3, 4)
Shape = tuple[int, ...]
Function = Callable[..., torch.Tensor]
XY: list[Shape] = [(3, 4), (3, 4)]
XW: list[Shape] = [(5,), (3, 4), (4, 5)]
IN_BATCHES: list[Shape] = [(5,), (2, 3, 4), (2, 4, 5)]


def _written_in_place(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x * y
    view = z.view(4, 3)
    view.mul_(y.view(4, 3))
    view[0].add_(y[0, :3])
    z.t()[1].sub_(1)
    z += y[0]
    return z * x


def _filled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = torch.zeros_like(x)
    z[:, 1:3] = x[:, :2] * y[:, :2]
    z[1] += x[0]
    z[MASK] = 3.0
    return z * y


def _overwritten(x: torch.Tensor) -> torch.Tensor:
    z = x * x
    z.copy_(WHOLE)
    return z + x


def _rounded_in_place(x: torch.Tensor) -> torch.Tensor:
    z = x * x
    z.floor_()
    return z + x


def _added_to_nothing(x: torch.Tensor) -> torch.Tensor:
    z = x + 1
    z.mul_(2.0)
    return x * z


def _turned(x: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.reshape(3, 2, 2)) * torch.polar(torch.ones_like(AHEAD), AHEAD)
    return torch.view_as_real(pairs).flatten(1)


ONE: dict[str, Function] = {
    "abs": torch.abs,
    "added to nothing": _added_to_nothing,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp max": lambda x: x.clamp(max=0.5),
    "clamp tensors": lambda x: x.clamp(POSITIVE[0] - 1.2, POSITIVE[1] - 0.5),
    "clamp_max tensor": lambda x: x.clamp_max(POSITIVE - 1),
    "clamp_min tensor": lambda x: x.clamp_min(POSITIVE - 1),
    "cat": lambda x: torch.cat([x, POSITIVE, WHOLE[None]]),
    "cos": torch.cos,
    "cumsum": lambda x: x.cumsum(dim=0),
    "div by numbers": lambda x: x / WHOLE,
    "div floor": lambda x: x + torch.div(x, 0.3, rounding_mode="floor"),
    "embedding": lambda x: F.embedding(ROWS, x, padding_idx=0),
    "exp": torch.exp,
    "expm1": torch.expm1,
    "gather": lambda x: x.gather(0, PLACES),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "index": lambda x: x[ROWS, ROWS + 1],
    "log": lambda x: (x.square() + 1).log(),
    "log_softmax": lambda x: x.log_softmax(-1).mean(-1),
    "log_softmax 0": lambda x: x.log_softmax(0),
    "logsigmoid": lambda x: F.logsigmoid(30 * x),
    "logsumexp": lambda x: x.logsumexp((0, 1)),
    "logsumexp -inf": lambda x: x.masked_fill(MASK, -INF).logsumexp(-1, keepdim=True),
    "log-probs": lambda x: token_logprobs(x, ROWS, chunk=2),
    "masked_fill": lambda x: x.masked_fill(mask=MASK[:, None], value=2.0),
    "max": lambda x: x.max(0, keepdim=True)[0],
    "max of one": lambda x: torch.max(x, dim=1)[0],
    "mean": lambda x: x.mean(-1, keepdim=True, dtype=torch.float64),
    "overwritten": _overwritten,
    "pad": lambda x: F.pad(x, (1, -1), value=3.0),
    "reciprocal": lambda x: 3.0 / (x.square() + 1),
    "relu": lambda x: F.relu(x).square(),
    "repeat": lambda x: x.repeat_interleave(2, -1).roll(1, 0).flip(1),
    "rounded": lambda x: x.round() * x + (x > 0) * x,
    "rounded in place": _rounded_in_place,
    "rsqrt": lambda x: (x.square() + 1).rsqrt(),
    "rsub": lambda x: torch.rsub(x, 2.0, alpha=3),
    "scatter number": lambda x: x.scatter(0, PLACES, 3.0),
    "scatter number in place": lambda x: (x * x).scatter_(0, PLACES, 3.0),
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "softmax": lambda x: (x.masked_fill(MASK, torch.finfo(x.dtype).min)).softmax(-1),
    "softmax -inf": lambda x: x.masked_fill(MASK, -INF).softmax(0, dtype=torch.float64),
    "softplus": lambda x: F.softplus(x, beta=2.0, threshold=0.3),
    "sort": lambda x: x.sort(dim=0, descending=True)[0],
    "sort stable": lambda x: x.sort(dim=0, stable=True)[0],
    "split": lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1) * x.unbind(0)[1],
    "sqrt": lambda x: (x.square() + 1).sqrt(),
    "sum": lambda x: x.sum(0),
    "tanh": torch.tanh,
    "topk": lambda x: x.topk(2, dim=0, largest=False)[0],
    "topk last": lambda x: x.topk(2)[0],
    "tril": lambda x: x.tril() * x.triu(1) + x.diagonal().sum(),
    "turned": _turned,
    "unfold": lambda x: x.unfold(1, 2, 1),
    "view of expanded": lambda x: (torch.ones_like(POSITIVE) + x[0]).view(-1) * 2,
    "where": lambda x: torch.where(x > 0, x[:1], 3.0),
    "where of whole numbers": lambda x: torch.where(MASK, x, WHOLE),
    **{f"pow {exponent}": lambda x, e=exponent: x.pow(e) for exponent in (0, 1, 2, 3, 0.0, 1.0, 2.0, 4)},
    **{f"pow {exponent}": lambda x, e=exponent: (x.abs() + 1).pow(e) for exponent in (-1, -2, 0.5, 1.5)},
}
SEVERAL: dict[str, tuple[Function, list[Shape]]] = {
    "add": (lambda x, y: torch.add(x, y, alpha=-2), [(1, 4), (3, 1)]),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w, beta=0.5, alpha=2.0), XW),
    "addmm, beta 0": (lambda b, x, w: torch.addmm(b, x, w, beta=0), XW),
    "baddbmm": (lambda b, x, w: torch.baddbmm(b, x, w, beta=0.5, alpha=0.3), IN_BATCHES),
    "conv in groups": (lambda x, w, b: F.conv1d(x, w, b, groups=4, padding=2), [(2, 4, 7), (4, 1, 3), (4,)]),
    "conv of one": (F.conv1d, [(4, 7), (6, 4, 3), (6,)]),
    "conv transposed": (F.conv_transpose1d, [(2, 4, 7), (4, 6, 3), (6,)]),
    "div": (lambda x, y: x / (y.square() + 1), [(4,), (3, 4)]),
    "div trunc": (lambda x, y: x + torch.div(x, y, rounding_mode="trunc"), XY),
    "dot": (torch.dot, [(4,), (4,)]),
    "filled": (_filled, XY),
    "index_add": (lambda x, y: x.index_add(0, ROWS, y, alpha=2.0), XY),
    "index_put": (lambda x, y: torch.index_put(x, (ROWS[:2],), y), [(3, 4), (2, 4)]),
    "index_put added": (lambda x, y: torch.index_put(x, (ROWS,), y, accumulate=True), XY),
    "linear": (lambda b, x, w: F.linear(x, w.t(), b), [(5,), (2, 3, 4), (4, 5)]),
    "matmul": (torch.matmul, [(2, 2, 3, 4), (4, 5)]),
    "maximum": (torch.maximum, [(3, 4), (4,)]),
    "minimum": (torch.minimum, XY),
    "mul": (torch.mul, [(3, 1), (1, 4)]),
    "mv": (torch.mv, [(3, 4), (4,)]),
    "scatter": (lambda x, y: x.scatter(0, PLACES, y), [(3, 4), (1, 4)]),
    "scatter_add": (lambda x, y: x.scatter_add(0, PLACES, y), [(3, 4), (1, 4)]),
    "stack": (lambda x, y: torch.stack([x, POSITIVE, y]), XY),
    "sub": (lambda x, y: torch.sub(x, y, alpha=2), [(3, 4), (4,)]),
    "where": (lambda x, y: torch.where(MASK, x, y), [(3, 4), (4,)]),
    "written in place": (_written_in_place, XY),
}
RULES = {**{name: (function, [(3, 4)]) for name, function in ONE.items()}, **{f"{n}!": r for n, r in SEVERAL.items()}}


@pytest.mark.parametrize("is_straight", [False, True])
@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_a_rule_is_nested_forward_mode(name: str, is_straight: bool) -> None:
    function, shapes = RULES[name]
    noise = torch.Generator().manual_seed(0)
    values, slopes, curves = ([torch.randn(s, generator=noise, dtype=torch.float64) for s in shapes] for _ in range(3))
    if name in ("pow 0", "pow 1", "pow 2", "pow 3"):
        values[0][0, 0] = 0.0
    bends = 0.0 if is_straight else 0.5

    def at(step: torch.Tensor) -> torch.Tensor:
        moved = zip(values, slopes, curves, strict=True)
        return function(*(x + step * slope + bends * step * step * curve for x, slope, curve in moved))

    def slope_at(step: torch.Tensor) -> torch.Tensor:
        slope: torch.Tensor = jvp(at, (step,), (torch.ones_like(step),))[1]
        return slope

    zero = torch.zeros((), dtype=torch.float64)
    slope, curve = jvp(slope_at, (zero,), (torch.ones_like(zero),))
    series = [Series(x, s, None if is_straight else c) for x, s, c in zip(values, slopes, curves, strict=True)]
    try:
        found = function(*series)
    except NoRule:  # in place, on a part that did not move: it is said, and forward mode takes over
        assert (name, is_straight) == ("written in place!", True)
        return
    assert isinstance(found, Series)
    for mine, its in ((found.value, at(zero)), (found.slope, slope), (found.curve, curve)):
        whole = torch.zeros_like(its) if mine is None else mine
        torch.testing.assert_close(whole, its, rtol=1e-10, atol=1e-10)


def _views_first(x: torch.Tensor) -> torch.Tensor:
    z = x * 2.0
    view = z.view(-1)
    z.square_()
    return view * 1


def _views_that_are_lent(x: torch.Tensor) -> torch.Tensor:
    z = x.clone()
    view, other = z.view(-1), z + 1
    view.mul_(3.0)
    return other * z


@torch.no_grad()
@pytest.mark.parametrize(
    "function",
    [
        _views_first,
        _views_that_are_lent,
        lambda x: (x * x).t_(),
        lambda x: torch.zeros(3, 4, dtype=torch.float64).copy_(x),
        lambda x: torch.fft.rfft(x).real,
        lambda x: x.as_strided((2, 2), (1, 4)),
        lambda x: x.scatter(0, PLACES, 2.0, reduce="multiply"),
        lambda x: x.max(),
        torch.erf,
    ],
)
def test_what_has_no_rule_says_so(function: Function) -> None:
    with pytest.raises(NoRule):
        function(Series(POSITIVE.clone(), POSITIVE - 1))


@torch.no_grad()
def test_a_vocabulary_whose_last_piece_is_the_target_alone() -> None:
    """Torch's forward mode twice gives nan here; differences do not."""
    logits, slope = POSITIVE * 2, POSITIVE.cos()
    targets = torch.tensor([3, 1, 2])
    found = token_logprobs(Series(logits, slope), targets, chunk=3)
    assert isinstance(found, Series)
    step = 1e-3

    def at(steps: int) -> torch.Tensor:
        return token_logprobs(logits + steps * step * slope, targets)

    torch.testing.assert_close(found.curve, (at(1) - 2 * at(0) + at(-1)) / step**2, rtol=1e-5, atol=1e-7)
