"""fp64 that is fp64 throughout.

Models of transformers compute norms, rotations and routing in fp32 whatever their weights are. For weights in fp64 that
is a rounding to 7 digits in the middle of a computation of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from scoring.experts import experts_of, spelled_out


class _Fp64Throughout(TorchFunctionMode):
    """What asks for fp32 gets fp64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def as_precise_as_weights(model: nn.Module) -> Iterator[None]:
    """Within the context a model whose weights are fp64 computes in nothing less; others compute as they do."""
    with ExitStack() as stack:
        if next(model.parameters()).dtype == torch.float64:
            stack.enter_context(spelled_out(experts_of(model)))  # grouped kernels have no fp64
            stack.enter_context(_Fp64Throughout())
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)  # for tensors that are made without saying in what
        yield
