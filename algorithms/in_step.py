"""Workers that look at a sharded model, each at its own pace.

A forward pass of a sharded model is a matter of all workers: each has a part of every layer. But they have different
samples, and one writes longer answers than another. So a worker that has nothing to do makes passes whose result
nobody looks at, as long as any other makes one; before each pass they agree on whether there is to be one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class InStep:
    """Keeps the passes of all workers through a sharded model in step.

    Args:
        model: the sharded model.
        device: of this worker.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._idle_pass: Callable[[], Any] | None = None
        # Before anything else, as what comes first for a busy worker has to come first for an idle one.
        model.register_forward_pre_hook(self._before_pass, prepend=True)

    @contextmanager
    def passes(self, idle_pass: Callable[[], Any]) -> Iterator[None]:
        """Within the context, which all workers enter and leave together, each makes passes as it likes.

        Args:
            idle_pass: makes a pass of the same kind, forward alone or forward and backward, for nothing.
        """
        self._idle_pass = idle_pass
        try:
            yield
            self.catch_up()
        finally:
            self._idle_pass = None

    def catch_up(self) -> None:
        """Wait until no worker makes a pass any more, and take part in those of the others until then."""
        idle_pass = self._idle_pass
        if idle_pass is None:
            return
        while self._is_there_a_pass(False):
            self._idle_pass = None  # its own is none of those that are agreed upon
            idle_pass()
            self._idle_pass = idle_pass

    def _before_pass(self, *_: Any) -> None:
        if self._idle_pass is not None:
            self._is_there_a_pass(True)

    def _is_there_a_pass(self, here: bool) -> bool:
        busy = torch.tensor(int(here), device=self._device)
        dist.all_reduce(busy)
        return bool(busy.item())
