"""Second derivatives along a line, carried forward with the values.

A `Series` is what a tensor is at theta + s v, up to s^2: its value, its slope d/ds and its curve d^2/ds^2 at s = 0. A
function of series is a series again, by the chain rule; for a product

    (x w)'' = x'' w + 2 x' w' + x w'',

so that a matrix product with a weight, which moves straight (w'' = 0), takes 5 products, where differentiating twice
by dual numbers takes 9. Nothing is kept for a backward pass, and the slopes of weights are made where they are used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# Makes the slope of a weight.
Lazy = Callable[[], torch.Tensor]
Times = Callable[[Any, Any], torch.Tensor]
AddTimes = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


class NoRule(RuntimeError):
    """An operation whose series is not known here."""


@dataclass
class _Memory:
    """What writing in place has to know of a value and all its views.

    Attributes:
        viewed: there are views.
        parts_apart: slope or curve are also those of another series, or those of a view are copies.
    """

    viewed: bool = False
    parts_apart: bool = False


class Series(torch.Tensor):
    """Value, slope and curve of a tensor along a line; torch's functions take it as they take any other tensor.

    Attributes:
        value: the tensor itself, of any shape.
        slope: d/ds, of the same shape; of a weight a function that makes it; None: 0.
        curve: d^2/ds^2, of the same shape; None: 0.
    """

    value: torch.Tensor
    slope: torch.Tensor | Lazy | None
    curve: torch.Tensor | None
    memory: _Memory

    @staticmethod
    def __new__(
        cls, value: torch.Tensor, slope: torch.Tensor | Lazy | None = None, curve: torch.Tensor | None = None
    ) -> Series:
        self = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, value.stride(), value.storage_offset(), dtype=value.dtype, device=value.device
        )
        self.value, self.slope, self.curve = value, slope, curve
        self.memory = _Memory()
        result: Series = self
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Series({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func.overloadpacket)
        if rule is not None:
            return rule(func, args, kwargs)
        if func._schema.is_mutable:
            return _in_place(func, args, kwargs)
        result = func(*tree_map(_value, args), **tree_map(_value, kwargs))
        if not any(_can_move(x) for x in tree_leaves(result)):
            return result  # comparisons, shapes, places: they do not move
        raise NoRule(f"{func} has no rule for series")


def straight(value: torch.Tensor, slope: Lazy) -> Series:
    """A weight that moves along a line, whose direction is made whenever it is needed."""
    return Series(value, slope)


class Recent:
    """The last few results of functions without arguments, as one module uses a weight several times in a row.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int = 2) -> None:
        self._most = most
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(self, name: str, make: Lazy) -> torch.Tensor:
        if name not in self._kept:
            while len(self._kept) >= self._most:
                self._kept.popitem(last=False)
            self._kept[name] = make()
        self._kept.move_to_end(name)
        return self._kept[name]


# --- Parts of a series --------------------------------------------------------------------------------------


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Series) else x


def _can_move(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def _is_made_when_used(x: Series) -> bool:
    return x.slope is not None and not isinstance(x.slope, torch.Tensor)


def _shares_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _slope(x: Any) -> torch.Tensor | None:
    if not isinstance(x, Series):
        return None
    return x.slope if x.slope is None or isinstance(x.slope, torch.Tensor) else x.slope()


def _curve(x: Any) -> torch.Tensor | None:
    return x.curve if isinstance(x, Series) else None


def _sum(*terms: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of those that are not 0."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def _times(factor: float | torch.Tensor, x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x * factor


# --- Rules --------------------------------------------------------------------------------------------------

Rule = Callable[[Any, Sequence[Any], dict[str, Any]], Any]


def _linear_in_first(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What does the same to value, slope and curve: views, sums, choices of places."""
    first, *rest = args
    if any(isinstance(x, Series) for x in tree_leaves((rest, kwargs))):
        raise NoRule(f"{func} of several series")

    def of(x: torch.Tensor) -> Any:
        # Slopes may lie otherwise in memory than values.
        return (
            x.reshape(rest[0]) if func in (aten.view.default, aten._reshape_alias.default) else func(x, *rest, **kwargs)
        )

    value = func(first.value, *rest, **kwargs)
    if isinstance(value, torch.Tensor):
        if not _can_move(value):
            return value
        if not _shares_storage(value, first.value):
            return Series(value, *(None if x is None else of(x) for x in (_slope(first), first.curve)))
        if _is_made_when_used(first):
            return Series(value, lambda: of(_slope(first)))  # type: ignore[arg-type]  # it is not None
    slope, curve = (None if x is None else of(x) for x in (_slope(first), first.curve))
    if isinstance(value, torch.Tensor):
        return _view_of(first, value, slope, curve)
    nothing = [None] * len(value)
    return [_view_of(first, *parts) for parts in zip(value, slope or nothing, curve or nothing, strict=True)]


def _view_of(first: Series, value: torch.Tensor, slope: torch.Tensor | None, curve: torch.Tensor | None) -> Series:
    """The series of a view, which shares its memory with what it is a view of."""
    view = Series(value, slope, curve)
    view.memory = first.memory
    view.memory.viewed = True
    for own, new in ((first.slope, slope), (first.curve, curve)):
        if new is not None and not (isinstance(own, torch.Tensor) and _shares_storage(own, new)):
            view.memory.parts_apart = True
    return view


def _linear_in_all(*places: int) -> Rule:
    """What is linear in all its tensors together: sums, concatenations, choices between them.

    Args:
        places: arguments that say where.
    """

    def rule(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if any(isinstance(x, torch.Tensor) for x in tree_leaves(kwargs)):
            raise NoRule(f"{func} with tensors by name")

        def part(of: Callable[[Any], torch.Tensor | None]) -> torch.Tensor | None:
            moves = False

            def one(x: Any) -> Any:
                nonlocal moves
                if not isinstance(x, torch.Tensor):
                    return x
                found = of(x)
                moves = moves or found is not None
                return torch.zeros_like(_value(x)) if found is None else found

            parts = [
                tree_map(_value, arg)
                if place in places
                else tree_map(one, arg, is_leaf=lambda x: isinstance(x, torch.Tensor))
                for place, arg in enumerate(args)
            ]
            return func(*parts, **kwargs) if moves else None

        value = func(*tree_map(_value, tuple(args)), **kwargs)
        return Series(value, part(_slope), part(_curve))

    return rule


_scattered_tensors = _linear_in_all(2)


def _scattered(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if func is aten.scatter.src:
        return _scattered_tensors(func, args, kwargs)
    if func is not aten.scatter.value or len(args) != 4 or not isinstance(args[0], Series):
        raise NoRule(f"{func} with settings")
    x, dim, places, number = args
    slope, curve = (None if part is None else func(part, dim, places, 0.0) for part in (_slope(x), x.curve))
    return Series(func(x.value, dim, places, number), slope, curve)


def _padded(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, sizes, *_ = args
    slope, curve = (None if part is None else func(part, sizes) for part in (_slope(x), x.curve))
    return Series(func(x.value, *args[1:], **kwargs), slope, curve)


def _reversed_difference(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    a, b, *alpha = args
    factor = alpha[0] if alpha else kwargs.get("alpha", 1)
    return a * -factor + b


def _sums(sign: float) -> Rule:
    def rule(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        a, b = args[:2]
        value = func(_value(a), _value(b), *args[2:], **kwargs)
        alpha = sign * (kwargs.get("alpha", 1) if len(args) < 3 else args[2])

        def part(x: torch.Tensor | None, y: torch.Tensor | None) -> torch.Tensor | None:
            total = x if y is None else alpha * y if x is None else torch.add(x, y, alpha=alpha)
            return None if total is None else total.expand(value.shape).to(value.dtype)

        parts = [(_slope(a), _slope(b)), (_curve(a), _curve(b))]
        result = Series(value, *(part(x, y) for x, y in parts))
        if isinstance(a, Series) and any(x is not None and y is None for x, y in parts):
            # What nothing is added to is not copied.
            a.memory.parts_apart = result.memory.parts_apart = True
        return result

    return rule


def _product(times: Times, a: Any, b: Any, add: AddTimes | None = None) -> Series:
    """The series of what is linear in each of two arguments.

    Args:
        times: the product.
        a, b: its arguments.
        add: adds a number of times a product to a tensor in place; None: by making it first.
    """

    def total(*terms: tuple[float, Any, Any]) -> torch.Tensor | None:
        result: torch.Tensor | None = None
        for factor, x, y in terms:
            if x is None or y is None:
                continue
            if result is None:
                result = times(x, y) if factor == 1 else times(x, y) * factor
            elif add is not None:
                add(result, x, y, factor)
            else:
                result = result.add(times(x, y), alpha=factor)
        return result

    a0, b0, a1, b1, a2, b2 = _value(a), _value(b), _slope(a), _slope(b), _curve(a), _curve(b)
    curve = total((1, a2, b0), (1, a0, b2), (2, a1, b1))
    return Series(times(a0, b0), total((1, a1, b0), (1, a0, b1)), curve)


def _products(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return _product(lambda x, y: func(x, y, *args[2:], **kwargs), *args[:2])


def _elementwise_products(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    a, b = args
    if not isinstance(a, Series) or (isinstance(b, torch.Tensor) and b.dtype != a.dtype) or not isinstance(b, Series):
        return _product(func, a, b)
    return _product(func, a, b, lambda total, x, y, factor: total.addcmul_(x, y, value=factor))


def _matrix_products(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    a, b = args[:2]
    return _product(func, a, b, _ADD[func.overloadpacket])


_ADD: dict[Any, AddTimes] = {
    aten.mm: lambda total, x, y, factor: total.addmm_(x, y, alpha=factor),
    aten.bmm: lambda total, x, y, factor: total.baddbmm_(x, y, alpha=factor),
}


def _convolution(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    a, b, bias, *settings = args
    product = _product(lambda x, y: func(x, y, None, *settings, **kwargs), a, b)
    if bias is None:
        return product
    return product + bias.view(-1, *(1,) * (product.dim() - 2))


def _affine(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """beta bias + alpha x w: linear layers, and scores of attention with a bias for each place."""
    bias, a, b = args
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    times = aten.mm if func.overloadpacket is aten.addmm else aten.bmm
    product = _product(times, a, b, _ADD[times])
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (bias if beta == 1 else bias * beta)


def _quotients(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    a, b = args
    if kwargs.get("rounding_mode") is not None:
        return _as_value(func, args, kwargs)
    if not isinstance(b, Series):
        return _linear_in_first(func, args, kwargs)
    return _elementwise_products(torch.mul, (a, _chained(b, *_reciprocal(b.value))), {})


def _chained(x: Series, value: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None) -> Series:
    """f(x), from f, f' and f'' at the value; f'' None: 0."""
    slope, curve = _slope(x), x.curve
    if slope is None:
        return Series(value, None, _times(first, curve))
    bend = None if second is None else second * slope.square()
    return Series(value, first * slope, _sum(bend, _times(first, curve)))


def _reciprocal(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value = x.reciprocal()
    square = value.square()
    return value, -square, 2 * square * value


def _rsqrt(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value = x.rsqrt()
    return value, -0.5 * value / x, 0.75 * value / x.square()


def _sqrt(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value = x.sqrt()
    return value, 0.5 / value, -0.25 / (value * x)


def _exp(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value = x.exp()
    return value, value, value


def _expm1(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first = x.exp()
    return x.expm1(), first, first


def _log(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inverse = x.reciprocal()
    return x.log(), inverse, -inverse.square()


def _sin(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value = x.sin()
    return value, x.cos(), -value


def _cos(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value = x.cos()
    return value, -x.sin(), -value


def _tanh(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value = x.tanh()
    first = 1 - value.square()
    return value, first, -2 * value * first


def _sigmoid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value = x.sigmoid()
    first = value * (1 - value)
    return value, first, first * (1 - 2 * value)


def _silu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, first, second = _sigmoid(x)
    return x * gate, torch.addcmul(gate, x, first), second.mul_(x).add_(first, alpha=2)


def _relu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    return x.relu(), (x > 0).to(x.dtype), None


def _chain(of: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]) -> Rule:
    def rule(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1 or kwargs:
            raise NoRule(f"{func} with settings")
        return _chained(args[0], *of(args[0].value))

    return rule


def _softplus(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, settings = args[0], list(args[1:])
    beta, threshold = settings + [1, 20][len(settings) :]
    gate, first, _ = _sigmoid(x.value * beta)
    is_straight = x.value * beta > threshold
    return _chained(
        x,
        func(x.value, beta, threshold),
        gate.masked_fill(is_straight, 1.0),
        first.masked_fill(is_straight, 0.0) * beta,
    )


def _log_sigmoid(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    value, buffer = func(args[0].value)
    gate, first, _ = _sigmoid(-args[0].value)
    return _chained(args[0], value, gate, -first), buffer


# The density of the normal distribution at 0, and the constants of its approximation in GELU.
_DENSITY, _INNER, _CUBE = 0.3989422804014327, 0.7978845608028654, 0.044715


def _gelu(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0].value
    if kwargs.get("approximate", "none") == "none":
        density = _DENSITY * (-0.5 * x.square()).exp()
        below = 0.5 * (1 + torch.erf(x * 0.5**0.5))
        return _chained(args[0], x * below, below + x * density, density * (2 - x.square()))
    t, t1, t2 = _tanh(_INNER * (x + _CUBE * x**3))
    u1, u2 = _INNER * (1 + 3 * _CUBE * x.square()), _INNER * 6 * _CUBE * x
    first, second = t1 * u1, t2 * u1.square() + t1 * u2
    return _chained(args[0], 0.5 * x * (1 + t), 0.5 * (1 + t + x * first), first + 0.5 * x * second)


def _power(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, exponent = args
    if not isinstance(x, Series) or not isinstance(exponent, int | float):
        raise NoRule(f"{func} whose exponent moves")
    if exponent == 2:
        return _product(torch.mul, x, x)
    value = x.value.pow(exponent)
    if exponent == 0:
        return Series(value)
    if exponent == 1:
        return _chained(x, value, torch.ones_like(value), None)
    first = exponent * x.value.pow(exponent - 1)
    return _chained(x, value, first, exponent * (exponent - 1) * x.value.pow(exponent - 2))


def _absolute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if args[0].value.is_complex():
        raise NoRule(f"{func} of complex numbers")
    return _chained(args[0], args[0].value.abs(), args[0].value.sign(), None)


def _greater_or_less(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    a, b = args
    value = func(_value(a), _value(b))
    is_first = value == _value(a)

    def part(x: torch.Tensor | None, y: torch.Tensor | None) -> torch.Tensor | None:
        if x is None and y is None:
            return None
        nothing = torch.zeros_like(value)
        return torch.where(is_first, nothing if x is None else x, nothing if y is None else y)

    return Series(value, part(_slope(a), _slope(b)), part(_curve(a), _curve(b)))


def _clamped(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, *bounds = args
    if any(isinstance(bound, torch.Tensor) for bound in tree_leaves((bounds, kwargs))):
        if func.overloadpacket is aten.clamp_max:
            bounds = [None, *bounds]
        least, most = bounds[0] if bounds else kwargs.get("min"), bounds[1] if bounds[1:] else kwargs.get("max")
        x = x if least is None else torch.maximum(x, least)
        return x if most is None else torch.minimum(x, most)
    value = func(x.value, *bounds, **kwargs)
    return _chained(x, value, (value == x.value).to(value.dtype), None)


def _softmax(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, dim, half_to_float = args
    p = func(x.value, dim, half_to_float)
    slope, curve = (None if part is None else part.to(p.dtype) for part in (_slope(x), x.curve))
    if slope is None:
        return Series(p)
    rest = slope - (p * slope).sum(dim, keepdim=True)
    first = p * rest
    # p'' = p' rest + p rest', whose rest' = x'' - <p, x''> - <p', x'>.
    bend = (first * slope).sum(dim, keepdim=True)
    second = first * rest
    if curve is None:
        return Series(p, first, second.sub_(p * bend))
    bend += (p * curve).sum(dim, keepdim=True)
    return Series(p, first, second.addcmul_(p, curve - bend))


def _log_softmax(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, dim, half_to_float = args
    log_p = func(x.value, dim, half_to_float)
    parts = _slope(x), x.curve
    means = _over_all(log_p.exp(), *parts, [dim], True)
    slope, curve = (_sum(part, _times(-1, mean)) for part, mean in zip(parts, means, strict=True))
    return Series(log_p, slope, None if curve is None else curve.expand(log_p.shape))


def _over_all(
    p: torch.Tensor, slope: torch.Tensor | None, curve: torch.Tensor | None, dims: list[int], keep: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Slope and curve of log Sum exp: <p, x'>, and <p, x''> + <p, (x' - <p, x'>)^2>."""
    if slope is None:
        return None, None if curve is None else (p * curve).sum(dims, keepdim=keep)
    mean = (p * slope).sum(dims, keepdim=True)
    spread = (slope - mean).square_()
    curve_sum = (p * (spread if curve is None else spread.add_(curve))).sum(dims, keepdim=keep)
    return (mean if keep else mean.reshape(curve_sum.shape)), curve_sum


def _log_sum_exp(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, dims = args[0], list(args[1])
    keep = bool(args[2]) if len(args) > 2 else False
    whole = func(x.value, dims, True)
    p = (x.value - whole.masked_fill(whole == -torch.inf, 0.0)).exp_()
    return Series(whole if keep else func(x.value, dims, False), *_over_all(p, _slope(x), x.curve, dims, keep))


def _chosen(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What gives values and their places: the greatest, a sorted row."""
    if func is aten.max.default:
        raise NoRule(f"{func} of all")
    x, *settings = args
    value, places = func(x.value, *settings, **kwargs)
    dim = settings[1] if func.overloadpacket is aten.topk and len(settings) > 1 else settings[0] if settings else -1
    dim = kwargs.get("dim", -1 if func.overloadpacket is aten.topk and len(settings) < 2 else dim)
    at = places if places.dim() == x.dim() else places.unsqueeze(dim)

    def of(part: torch.Tensor | None) -> torch.Tensor | None:
        return None if part is None else part.gather(dim, at).reshape(value.shape)

    return Series(value, of(_slope(x)), of(x.curve)), places


def _filled(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, mask, fill = args
    if not isinstance(x, Series) or isinstance(fill, Series):
        raise NoRule(f"{func} with what moves")
    slope, curve = (None if part is None else part.masked_fill(mask, 0.0) for part in (_slope(x), x.curve))
    return Series(func(x.value, mask, fill), slope, curve)


def _as_value(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What depends on the shape alone, or does not move."""
    return func(*tree_map(_value, tuple(args)), **tree_map(_value, kwargs))


def _to_be_filled(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A new tensor, which does not move yet, but may be written to."""
    value = func(args[0].value, *args[1:], **kwargs)
    return Series(value, torch.zeros_like(value), torch.zeros_like(value)) if _can_move(value) else value


def _in_place(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """By the rule of the same operation that is not in place; its result is written into the parts."""
    target = args[0]
    name = func.overloadpacket.__name__.removesuffix("_")
    pure = getattr(getattr(aten, name, None), func._overloadname, None)
    if not isinstance(target, Series) or _is_made_when_used(target) or pure is None:
        raise NoRule(f"{func} writes into what does not move")
    memory, parts_apart = target.memory, target.memory.parts_apart
    result = Series.__torch_dispatch__(pure, (), args, kwargs)
    memory.parts_apart = parts_apart  # what the target shares with a result that is let go of does not matter
    if not isinstance(result, Series):
        result = Series(result)  # as rounding gives it
    if _shares_storage(result.value, target.value):
        raise NoRule(f"{func} changes how a tensor lies in memory")
    for part in ("slope", "curve"):
        own, new = getattr(target, part), getattr(result, part)
        if not memory.viewed:
            setattr(target, part, None if new is None else new.to(target.dtype))
        elif memory.parts_apart or (own is None and new is not None):
            raise NoRule(f"{func} writes into what has views")
        elif own is not None:
            own.zero_() if new is None else own.copy_(new)
    target.value.copy_(result.value)
    return target


def _table(rule: Rule, names: Iterable[str]) -> dict[Any, Rule]:
    return {getattr(aten, name): rule for name in names if hasattr(aten, name)}


# fmt: off
_RULES: dict[Any, Rule] = {
    **_table(_linear_in_first, (
        "view", "_unsafe_view", "_reshape_alias", "transpose", "t", "permute", "unsqueeze", "squeeze", "expand",
        "select", "slice", "split", "split_with_sizes", "unbind", "alias", "detach", "clone", "_to_copy", "neg", "sum",
        "mean", "cumsum", "repeat", "index", "gather", "index_select", "embedding", "roll", "flip",
        "diagonal", "tril", "triu", "unfold", "view_as_real", "view_as_complex",
    )),
    **_table(_linear_in_all(), ("cat", "stack", "copy")),
    **_table(_linear_in_all(0), ("where",)),
    **_table(_linear_in_all(1), ("index_put",)),
    **_table(_linear_in_all(2), ("scatter_add", "index_add")),
    **_table(_products, ("dot", "mv")),
    **_table(_matrix_products, ("mm", "bmm")),
    **_table(_affine, ("addmm", "baddbmm")),
    **_table(_clamped, ("clamp", "clamp_min", "clamp_max")),
    **_table(_chosen, ("max", "topk", "sort")),
    **_table(_as_value, (
        "ones_like", "full_like", "rand_like", "new_ones", "new_full", "sign", "floor", "ceil", "round",
        "_local_scalar_dense",
    )),
    **_table(_to_be_filled, ("zeros_like", "empty_like", "new_zeros", "new_empty")),
    **_table(_greater_or_less, ("maximum", "minimum")),
    aten.convolution: _convolution,
    aten.constant_pad_nd: _padded,
    aten.scatter: _scattered,
    aten.rsub: _reversed_difference,
    aten.log_sigmoid_forward: _log_sigmoid,
    aten.mul: _elementwise_products,
    aten.add: _sums(1),
    aten.sub: _sums(-1),
    aten.div: _quotients,
    aten.exp: _chain(_exp),
    aten.expm1: _chain(_expm1),
    aten.log: _chain(_log),
    aten.sqrt: _chain(_sqrt),
    aten.rsqrt: _chain(_rsqrt),
    aten.reciprocal: _chain(_reciprocal),
    aten.sin: _chain(_sin),
    aten.cos: _chain(_cos),
    aten.tanh: _chain(_tanh),
    aten.sigmoid: _chain(_sigmoid),
    aten.silu: _chain(_silu),
    aten.relu: _chain(_relu),
    aten.abs: _absolute,
    aten.softplus: _softplus,
    aten.gelu: _gelu,
    aten.pow: _power,
    aten._softmax: _softmax,
    aten._log_softmax: _log_softmax,
    aten.logsumexp: _log_sum_exp,
    aten.masked_fill: _filled,
}
# fmt: on
