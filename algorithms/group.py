"""This process among the workers of a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

Strategy = Literal["ddp", "fsdp"]
T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """This worker and how many there are; the default is a process that works alone.

    Attributes:
        rank: the number of this worker, from 0.
        size: how many workers there are.
        strategy: "ddp": every worker holds the whole model; "fsdp": each holds a shard of it.
        before_meeting: is called before workers wait for each other here.
    """

    rank: int = 0
    size: int = 1
    strategy: Strategy = "ddp"
    before_meeting: Callable[[], None] = field(default=lambda: None, compare=False)

    def gathered(self, mine: Mapping[int, T]) -> dict[int, T]:
        """The union of all workers' results."""
        if self.size == 1:
            return dict(mine)
        self.before_meeting()
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, dict(mine))
        return {key: value for part in parts for key, value in part.items()}

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all workers, in place."""
        if self.size > 1:
            self.before_meeting()
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait until all workers are here."""
        if self.size > 1:
            self.before_meeting()
            dist.barrier()


# The group of a process that works alone.
ALONE = Group()
