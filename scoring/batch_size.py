"""How many tokens of a batch fit into a replica's memory: measured on two small batches, and extrapolated."""

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

# Tokens of the first of the two measured batches.
FIRST_TOKENS = 512
# Smaller batches are slow, larger ones gain nothing.
LEAST_TOKENS, MOST_TOKENS = 256, 65536
# The share of the free memory that is used: allocators cannot use all of it.
USABLE_SHARE = 0.7
SIGMA = 1e-5


@dataclass(frozen=True)
class BatchSizeTask:
    """A task for a replica: find the largest batch that fits.

    Attributes:
        estimator: the estimator of MRD that the batches are for.
        length: tokens of the longest sample; all samples of a batch are taken to be as long.
        sharing: how many replicas share the memory of a CPU.
    """

    estimator: EstimatorName
    length: int
    sharing: int = 1

    shard = 0
    key = "fit"

    def do(self, replica: Any, batches: Sequence[Batch], cache: dict[str, Any]) -> int:
        """Tokens of the batch, padding counted; a fixed number for vLLM's engine, which cuts batches itself."""
        # Imported here, so that a driver that only hands out tasks does not load the code of models.
        from scoring.replica import TransformersReplica

        if not isinstance(replica, TransformersReplica):
            return LEAST_TOKENS * 16
        return fitting_tokens(replica, self.estimator, self.length, free_bytes(replica.device) / self.sharing)


def fitting_tokens(replica: TransformersReplica, estimator: EstimatorName, length: int, free: float) -> int:
    """Tokens of the largest batch that fits, when every sample has the same length.

    Its tensors take at most `USABLE_SHARE` of the free memory. The result is a power of two, so that a run that is
    continued finds the same number although a little more or less is free.

    Args:
        length: tokens of each sample.
        free: free memory, bytes.
    """
    rng = np.random.default_rng(0)
    scored = np.arange(max(2, length)) > 0
    vocabulary = replica.model.config.get_text_config().vocab_size

    def peak(rows: int) -> float:
        ids = rng.integers(0, vocabulary, (rows, len(scored)))
        batch = collate([Sample(str(i), row, scored, i) for i, row in enumerate(ids)])
        return peak_bytes(lambda: estimate(replica, [batch], Request(estimator, SIGMA, 0, 0, 1)), replica.device)

    rows = max(1, FIRST_TOKENS // len(scored))
    # The first call makes copies of the weights, which must not count as the batch's.
    peak(rows)
    small, large = peak(rows), peak(2 * rows)
    bytes_per_token = max(1.0, (large - small) / (rows * len(scored)))
    fixed = small - bytes_per_token * rows * len(scored)
    tokens = int(np.clip((USABLE_SHARE * free - fixed) / bytes_per_token, LEAST_TOKENS, MOST_TOKENS))
    return 1 << (tokens.bit_length() - 1)


def peak_bytes(work: Callable[[], object], device: torch.device) -> float:
    """The most bytes that the tensors made by `work` take on a device at any time."""
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
    """Bytes of a device's memory that are not in use."""
    if device.type != "cuda":
        return float(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
