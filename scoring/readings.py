"""Readings: what a model says, and how likely it finds what others say, taken on all replicas of a pool at once.

Work is cut before it is distributed, by the samples alone, so a reading does not depend on the number of replicas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from scoring.generation import group_prompts
from scoring.pool import ReplicaPool
from scoring.replica import TransformersReplica
from scoring.samples import Batch, Sample, make_batches

# Prompts decoded together, at most: few enough that a small data set keeps several replicas busy.
ROWS = 64
T = TypeVar("T")


@dataclass(frozen=True)
class TokenScores:
    """One sample's scored tokens, n of them, under a model.

    Attributes:
        logprobs: (n,) fp64, nats.
        hits: (n,) bool, whether the token is the model's most likely one.
    """

    logprobs: np.ndarray
    hits: np.ndarray

    @property
    def mean_nll(self) -> float:
        """Mean NLL of the tokens, nats."""
        return -float(self.logprobs.mean())


@dataclass(frozen=True)
class LikelihoodWork:
    """The scores of every token of a group of batches."""

    shard: int

    @property
    def key(self) -> str:
        return f"likelihood-{self.shard:06d}"

    def do(
        self, replica: TransformersReplica, batches: Sequence[Batch], kept: dict[str, Any]
    ) -> list[tuple[int, TokenScores]]:
        scores = []
        for batch in batches:
            logprobs, hits = replica.token_scores(batch)
            for row, index in enumerate(batch.indices.tolist()):
                own = batch.mask[row].numpy()
                scores.append((index, TokenScores(logprobs[row][own], hits[row][own])))
        return scores


@dataclass(frozen=True)
class ContinuationWork:
    """What is written after a group of prompts."""

    shard: int
    indices: tuple[int, ...]
    prompts: tuple[np.ndarray, ...]
    limits: tuple[int, ...]
    eos_token_id: int | None

    @property
    def key(self) -> str:
        return f"continuation-{self.shard:06d}"

    def do(
        self, replica: TransformersReplica, batches: Sequence[Batch], kept: dict[str, Any]
    ) -> list[tuple[int, np.ndarray]]:
        written = replica.greedy_continuations(self.prompts, self.limits, self.eos_token_id)
        return list(zip(self.indices, written, strict=True))


@dataclass(frozen=True)
class ExtractionWork:
    """EL_n of a group of batches."""

    shard: int
    n: int
    eos_token_id: int | None

    @property
    def key(self) -> str:
        return f"extraction-{self.shard:06d}"

    def do(
        self, replica: TransformersReplica, batches: Sequence[Batch], kept: dict[str, Any]
    ) -> list[tuple[int, float]]:
        samples = [batch.sample(row) for batch in batches for row in range(len(batch))]
        values = replica.extraction_likelihood(samples, self.n, self.eos_token_id)
        return [(sample.index, value) for sample, value in zip(samples, values.tolist(), strict=True)]


class Reader:
    """Takes readings of one model.

    Args:
        pool: its replicas.
        eos_token_id: the token that ends what is written.
        batch_tokens: padded tokens in a batch.
        progress: show a bar for each kind of reading.
    """

    def __init__(
        self, pool: ReplicaPool, eos_token_id: int | None, batch_tokens: int = 4096, progress: bool = False
    ) -> None:
        self._pool = pool
        self._eos = eos_token_id
        self._batch_tokens = batch_tokens
        self._progress = progress

    def likelihoods(self, samples: Sequence[Sample]) -> list[TokenScores]:
        """The scored tokens of N samples, in their order, by teacher forcing."""
        shards = self._shards(samples)
        works = [LikelihoodWork(shard) for shard in range(len(shards))]
        return self._in_order(self._run(works, shards, len(samples), "log-probabilities"), len(samples))

    def continuations(self, prompts: Sequence[np.ndarray], limits: Sequence[int]) -> list[np.ndarray]:
        """What the model writes after each of N prompts by greedy decoding, see `greedy_continuations`.

        Args:
            prompts: token ids, each (T_i,) int64 with T_i >= 1.
            limits: the most tokens to write, for each prompt.

        Returns:
            The new tokens of each prompt, int64, in their order, without the end token.

        Raises:
            UserError: a prompt is empty, or does not fit into the model's context with its new tokens.
        """
        nothing = [i for i, limit in enumerate(limits) if limit <= 0]
        groups = list(group_prompts(prompts, limits, self._batch_tokens * 4, ROWS))
        works = [
            ContinuationWork(
                shard, tuple(group), tuple(prompts[i] for i in group), tuple(limits[i] for i in group), self._eos
            )
            for shard, group in enumerate(groups)
        ]
        written = dict(self._run(works, [[] for _ in works], len(prompts) - len(nothing), "greedy answers"))
        written |= {i: np.empty(0, dtype=np.int64) for i in nothing}
        return [written[i] for i in range(len(prompts))]

    def extraction(self, samples: Sequence[Sample], n: int) -> np.ndarray:
        """EL_n of N samples, (N,) fp64, see `extraction_likelihood`."""
        shards = self._shards(samples)
        works = [ExtractionWork(shard, n, self._eos) for shard in range(len(shards))]
        values = self._run(works, shards, len(samples), "extraction likelihood")
        return np.array(self._in_order(values, len(samples)), dtype=np.float64)

    def _shards(self, samples: Sequence[Sample]) -> list[list[Batch]]:
        # A sample's own index is its place in its data set; here it is its place in what was asked.
        numbered = [replace(sample, index=i) for i, sample in enumerate(samples)]
        return [[batch] for batch in make_batches(numbered, self._batch_tokens)]

    def _run(
        self, works: Sequence[Any], shards: Sequence[Sequence[Batch]], count: int, what: str
    ) -> Iterator[tuple[int, Any]]:
        with tqdm(total=count, unit="sample", desc=what, disable=not self._progress or not count) as bar:
            for _, results, _ in self._pool.run(works, shards):
                bar.update(len(results))
                yield from results

    @staticmethod
    def _in_order(results: Iterator[tuple[int, T]], count: int) -> list[T]:
        found = dict(results)
        return [found[i] for i in range(count)]
