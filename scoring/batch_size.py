"""How many tokens of a batch fit into a replica's memory: measured on small batches, and carried on from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from scoring.memory import TensorMemory
from scoring.mrd import EstimatorName, Request, estimate
from scoring.samples import Batch, Sample, collate

if TYPE_CHECKING:
    from scoring.replica import TransformersReplica

# Tokens of the first of two measurements, and what is never left: smaller batches are slow, larger ones gain nothing.
FIRST, LEAST, MOST = 512, 256, 65536
# Of what is free: allocators cannot use all of it.
USABLE = 0.7
SIGMA = 1e-5


@dataclass(frozen=True)
class FitWork:
    """A work for a replica: the largest batch that fits.

    Attributes:
        estimator: of MRD.
        length: tokens of the longest sample; all of a batch are taken to be as long.
        shared: replicas that share a CPU's memory.
    """

    estimator: EstimatorName
    length: int
    shared: int = 1

    shard = 0
    key = "fit"

    def do(self, replica: Any, batches: Sequence[Batch], cache: dict[str, Any]) -> int:
        """Tokens, padding counted. An engine that cuts batches itself, as vLLM's does, takes any."""
        # Here, as in the pool: who only asks for a work need not load the models' code.
        from scoring.replica import TransformersReplica

        if not isinstance(replica, TransformersReplica):
            return LEAST * 16
        return fitting_tokens(replica, self.estimator, self.length, free_bytes(replica.device) / self.shared)


def fitting_tokens(replica: TransformersReplica, estimator: EstimatorName, length: int, free: float) -> int:
    """Tokens of the largest batch of samples of a length whose tensors take `USABLE` of so many free bytes; a power of
    two, so that a run that is continued finds the same number though a little more or less is free."""
    rng = np.random.default_rng(0)
    scored = np.arange(max(2, length)) > 0
    vocabulary = replica.model.config.get_text_config().vocab_size

    def peak(rows: int) -> float:
        ids = rng.integers(0, vocabulary, (rows, len(scored)))
        batch = collate([Sample(str(i), row, scored, i) for i, row in enumerate(ids)])
        return peak_bytes(lambda: estimate(replica, [batch], Request(estimator, SIGMA, 0, 0, 1)), replica.device)

    rows = max(1, FIRST // len(scored))
    # Copies of the weights that are made once must not count as the batch's.
    peak(rows)
    small, large = peak(rows), peak(2 * rows)
    each = max(1.0, (large - small) / (rows * len(scored)))
    fixed = small - each * rows * len(scored)
    tokens = int(np.clip((USABLE * free - fixed) / each, LEAST, MOST))
    return 1 << (tokens.bit_length() - 1)


def peak_bytes(work: Callable[[], object], device: torch.device) -> float:
    """Of the tensors that `work` makes on a device, at their most."""
    if device.type != "cuda":
        with TensorMemory() as memory:
            work()
        return float(memory.peak)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - before)


def free_bytes(device: torch.device) -> float:
    """Memory of a device that nobody uses."""
    if device.type != "cuda":
        return float(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
