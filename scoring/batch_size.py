"""How many tokens a batch had best have: as few as are nearly as fast as any, and fit into a replica's memory. Time and
memory are measured on two small batches, and extrapolated."""

from __future__ import annotations

import time
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

# Tokens of the first of the two measured batches; the other has so many times as many.
FIRST_TOKENS, LARGER = 512, 4
# Smaller batches are slow, larger ones gain nothing.
LEAST_TOKENS, MOST_TOKENS = 256, 65536
# The share of its time that a batch may spend on what does not depend on its tokens.
MOST_OVERHEAD = 0.05
# The share of the free memory that is used: allocators cannot use all of it.
USABLE_SHARE = 0.7
SIGMA = 1e-5


@dataclass(frozen=True)
class BatchSizeTask:
    """A task for a replica: find the size of batches that is fastest, of those that fit.

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
        small, large = measure_batches(replica, self.estimator, self.length)
        fitting = fitting_tokens(small, large, free_bytes(replica.device) / self.sharing)
        return min(fitting, fastest_tokens(small, large))


@dataclass(frozen=True)
class Measured:
    """What a batch took.

    Attributes:
        tokens: in it; every sample has the same length.
        seconds: that it took.
        peak: bytes of the tensors that it made, at most at any time.
    """

    tokens: int
    seconds: float
    peak: float


def fastest_tokens(small: Measured, large: Measured) -> int:
    """Tokens of the smallest batch that is nearly as fast, for each token, as any: a power of two.

    A batch takes a time of its own and a time for each token. Where the larger of the two is not faster, for each
    token, caches hold no more, and the smaller one is it.
    """
    each = (large.seconds - small.seconds) / (large.tokens - small.tokens)
    if each <= 0:
        return MOST_TOKENS  # a GPU that neither of the two has filled
    tokens = (small.seconds / each - small.tokens) * (1 / MOST_OVERHEAD - 1)
    return 1 << (int(np.clip(tokens, small.tokens, MOST_TOKENS)) - 1).bit_length()


def fitting_tokens(small: Measured, large: Measured, free: float) -> int:
    """Tokens of the largest batch that fits, when every sample has the same length.

    Its tensors take at most `USABLE_SHARE` of the free memory. The result is a power of two, so that a run that is
    continued finds the same number although a little more or less is free.

    Args:
        small, large: two batches; a batch takes some memory of its own, and some for each token.
        free: free memory, bytes.
    """
    bytes_per_token = max(1.0, (large.peak - small.peak) / (large.tokens - small.tokens))
    fixed = small.peak - bytes_per_token * small.tokens
    tokens = int(np.clip((USABLE_SHARE * free - fixed) / bytes_per_token, LEAST_TOKENS, MOST_TOKENS))
    return 1 << (tokens.bit_length() - 1)


def measure_batches(replica: TransformersReplica, estimator: EstimatorName, length: int) -> tuple[Measured, Measured]:
    """What a small batch and a larger one take, of samples of a length."""
    rng = np.random.default_rng(0)
    scored = np.arange(max(2, length)) > 0
    vocabulary = replica.model.config.get_text_config().vocab_size

    def measured(rows: int) -> Measured:
        ids = rng.integers(0, vocabulary, (rows, len(scored)))
        batch = collate([Sample(str(i), row, scored, i) for i, row in enumerate(ids)])

        def work() -> None:
            estimate(replica, [batch], Request(estimator, SIGMA, 0, 0, 1))
            if replica.device.type == "cuda":
                torch.cuda.synchronize(replica.device)

        # The first call makes copies of the weights, which must not count as the batch's.
        work()
        started = time.perf_counter()
        work()
        return Measured(rows * len(scored), time.perf_counter() - started, peak_bytes(work, replica.device))

    rows = max(1, FIRST_TOKENS // len(scored))
    return measured(rows), measured(LARGER * rows)


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
