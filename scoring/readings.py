"""Readings of a model, taken on all replicas of a pool at once: how likely it finds given texts, and what it writes.

How the work is cut depends on the samples alone, so a reading does not depend on the number of replicas.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from scoring.engine import Replica
from scoring.generation import Drawn, group_prompts
from scoring.progress import Bar
from scoring.samples import BATCH_TOKENS, Batch, Sample, make_batches
from scoring.work import Pool

# The most prompts decoded together: few enough that a small data set keeps several replicas busy.
PROMPTS_PER_TASK = 64
T = TypeVar("T")
# Writing a token takes about as long as reading so many; for bars.
TOKENS_READ_PER_WRITTEN = 4
# Differentiating a text costs about as much as reading it so many times.
GRADIENT_COST = 3


def continuation_cost(prompts: Sequence[np.ndarray], limits: Sequence[int]) -> float:
    """Of writing after prompts, about, in tokens that are read."""
    return float(sum(map(len, prompts)) + TOKENS_READ_PER_WRITTEN * sum(limits))


def extraction_cost(lengths: Sequence[int]) -> float:
    """Of EL of samples of so many tokens, about, in tokens that are read: half of the prefixes are written after."""
    return float(sum(length + length * length for length in lengths))


@dataclass(frozen=True)
class TokenScores:
    """One sample's scored tokens, n of them, under a model.

    Attributes:
        logprobs: (n,) fp64, nats.
        hits: (n,) bool, whether the token is the model's most likely one.
        means, deviations: (n,) fp64 nats, mean and standard deviation of log p over the vocabulary at the token, see
            `scoring.logprob.vocabulary_moments`; None where they were not asked for.
    """

    logprobs: np.ndarray
    hits: np.ndarray
    means: np.ndarray | None = None
    deviations: np.ndarray | None = None

    def at(self, places: Any) -> TokenScores:
        """Those of some of the tokens."""
        moments = (self.means, self.deviations)
        return TokenScores(self.logprobs[places], self.hits[places], *(m if m is None else m[places] for m in moments))

    @property
    def mean_nll(self) -> float:
        """Mean NLL of the tokens, nats."""
        return -float(self.logprobs.mean())


@dataclass(frozen=True)
class LikelihoodTask:
    """Score every scored token of a shard; with `moments` of the vocabulary, too."""

    shard: int
    moments: bool = False

    @property
    def key(self) -> str:
        return f"likelihood-{self.shard:06d}"

    def do(self, replica: Replica, batches: Sequence[Batch], cache: dict[str, Any]) -> list[tuple[int, TokenScores]]:
        scores = []
        for batch in batches:
            found = replica.token_moments(batch) if self.moments else replica.token_scores(batch)
            for row, index in enumerate(batch.indices.tolist()):
                scores.append((index, TokenScores(*(values[row] for values in found)).at(batch.mask[row].numpy())))
        return scores


@dataclass(frozen=True)
class GradientNormTask:
    """Norms of the gradients of a shard's samples."""

    shard: int

    @property
    def key(self) -> str:
        return f"gradient-{self.shard:06d}"

    def do(self, replica: Replica, batches: Sequence[Batch], cache: dict[str, Any]) -> list[tuple[int, float]]:
        norms = [(batch, replica.nll_gradient_norms(batch).tolist()) for batch in batches]
        return [pair for batch, values in norms for pair in zip(batch.indices.tolist(), values, strict=True)]


@dataclass(frozen=True)
class ContinuationTask:
    """Continue a group of prompts by greedy decoding."""

    shard: int
    indices: tuple[int, ...]
    prompts: tuple[np.ndarray, ...]
    limits: tuple[int, ...]
    eos_token_id: int | None

    @property
    def key(self) -> str:
        return f"continuation-{self.shard:06d}"

    def do(self, replica: Replica, batches: Sequence[Batch], cache: dict[str, Any]) -> list[tuple[int, np.ndarray]]:
        written = replica.greedy_continuations(self.prompts, self.limits, self.eos_token_id)
        return list(zip(self.indices, written, strict=True))


@dataclass(frozen=True)
class DrawnTask:
    """Continue a group of prompts by drawing every token.

    Attributes:
        prompts: each as often as answers are drawn.
        draws: the number of each answer among those of its prompt.
        temperature: that logits are divided by.
        seed: of all draws.
    """

    shard: int
    indices: tuple[int, ...]
    prompts: tuple[np.ndarray, ...]
    limits: tuple[int, ...]
    draws: tuple[int, ...]
    temperature: float
    seed: int
    eos_token_id: int | None

    @property
    def key(self) -> str:
        return f"drawn-{self.shard:06d}"

    def do(self, replica: Replica, batches: Sequence[Batch], cache: dict[str, Any]) -> list[tuple[int, np.ndarray]]:
        uniforms = [
            _uniforms(prompt, limit, draw, self.seed)
            for prompt, limit, draw in zip(self.prompts, self.limits, self.draws, strict=True)
        ]
        drawn = Drawn(uniforms, self.temperature)
        written = replica.drawn_continuations(self.prompts, self.limits, drawn, self.eos_token_id)
        return list(zip(self.indices, written, strict=True))


def _uniforms(prompt: np.ndarray, limit: int, draw: int, seed: int) -> np.ndarray:
    """Of a prompt's words, and not of its place: an answer does not depend on what else is asked."""
    digest = hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()
    return np.random.default_rng([seed, draw, int.from_bytes(digest, "little")]).random(limit)


@dataclass(frozen=True)
class ExtractionTask:
    """Measure EL_n of the samples of a shard."""

    shard: int
    n: int
    eos_token_id: int | None

    @property
    def key(self) -> str:
        return f"extraction-{self.shard:06d}"

    def do(self, replica: Replica, batches: Sequence[Batch], cache: dict[str, Any]) -> list[tuple[int, float]]:
        samples = [batch.sample(row) for batch in batches for row in range(len(batch))]
        values = replica.extraction_likelihood(samples, self.n, self.eos_token_id)
        return [(sample.index, value) for sample, value in zip(samples, values.tolist(), strict=True)]


@dataclass(frozen=True)
class _Row:
    """Samples that are the same except for their last token, and are read as one row.

    Attributes:
        sample: one of the samples.
        columns: (position that predicts it, token id) of each scored token of any of them -> its column.
    """

    sample: Sample
    columns: dict[tuple[int, int], int] = field(default_factory=dict)


def _merged(samples: Sequence[Sample]) -> tuple[list[_Row], list[tuple[int, list[int]]]]:
    """The rows that N samples need; and for each sample, the number of its row and the columns of its scored tokens."""
    rows: list[_Row] = []
    row_of: dict[bytes, int] = {}
    places: list[tuple[int, list[int]]] = [(0, [])] * len(samples)
    # Sorted by their tokens, so that rows do not depend on the order of the samples.
    for i in sorted(range(len(samples)), key=lambda i: (samples[i].input_ids.tobytes(), samples[i].scored.tobytes())):
        sample = samples[i]
        row = row_of.setdefault(sample.input_ids[:-1].tobytes(), len(rows))
        if row == len(rows):
            rows.append(_Row(replace(sample, index=row)))
        columns = rows[row].columns
        scored_places = np.flatnonzero(sample.scored)
        scored = zip((scored_places - 1).tolist(), sample.input_ids[scored_places].tolist(), strict=True)
        places[i] = row, [columns.setdefault(token, len(columns)) for token in scored]
    return rows, places


def _batches_of_rows(rows: Sequence[_Row], batch_tokens: int) -> list[Batch]:
    """Batches of rows without their last tokens, which score all columns of each row."""
    batches = []
    for batch in make_batches([row.sample for row in rows], batch_tokens):
        columns = [list(rows[index].columns) for index in batch.indices.tolist()]
        scored = np.zeros((len(batch), max(len(tokens) for tokens in columns), 2), dtype=np.int64)
        mask = np.zeros(scored.shape[:2], dtype=bool)
        for i, tokens in enumerate(columns):
            scored[i, : len(tokens)] = tokens
            mask[i, : len(tokens)] = True
        positions, targets = torch.from_numpy(scored).unbind(-1)
        batches.append(
            replace(
                batch,
                input_ids=batch.input_ids[:, :-1],
                positions=positions,
                targets=targets,
                mask=torch.from_numpy(mask),
                lengths=batch.lengths - 1,
            )
        )
    return batches


class Reader:
    """Takes readings of one model.

    Args:
        pool: replicas of the model.
        eos_token_id: the token that ends a continuation; None: only the limit ends it.
        batch_tokens: padded tokens in a batch that is read.
        bar: shows how far the readings are, in tokens; None shows nothing.
        writing_tokens: rows times (prompt + new) tokens in one batch that is written; None: four times as many.

    Attributes:
        about: what is read, for the bar.
    """

    def __init__(
        self,
        pool: Pool,
        eos_token_id: int | None,
        batch_tokens: int = BATCH_TOKENS,
        bar: Bar | None = None,
        writing_tokens: int | None = None,
    ) -> None:
        self._writing_tokens = writing_tokens or 4 * batch_tokens
        self._pool = pool
        self._eos = eos_token_id
        self._batch_tokens = batch_tokens
        self._bar = bar
        self.about = ""

    def likelihoods(self, samples: Sequence[Sample], moments: bool = False) -> list[TokenScores]:
        """The scored tokens of N samples, in their order, by teacher forcing.

        The last token of a sample is predicted, never read. So a sample may be one token longer than the model's
        context, and samples that differ in that token alone, such as a question with each of its one-letter
        choices, are read once.

        Args:
            samples: the N samples.
            moments: also mean and standard deviation of log p over the vocabulary, at each scored token.

        Raises:
            UserError: the engine does not give the moments.
        """
        rows, places = _merged(samples)
        batches = _batches_of_rows(rows, self._batch_tokens)
        tasks = [LikelihoodTask(shard, moments) for shard in range(len(batches))]
        sizes = [float(batch.lengths.sum()) for batch in batches]
        results = self._run(tasks, [[batch] for batch in batches], sizes, "log-probabilities")
        scores = self._in_order(results, len(rows))
        return [scores[row].at(columns) for row, columns in places]

    def gradient_norms(self, samples: Sequence[Sample]) -> np.ndarray:
        """2-norms over all parameters of the gradients of N samples' mean NLL, (N,) fp64.

        Raises:
            UserError: the engine has no gradients.
        """
        shards = self._shards(samples)
        tasks = [GradientNormTask(shard) for shard in range(len(shards))]
        sizes = [GRADIENT_COST * float(batch.lengths.sum()) for (batch,) in shards]
        norms = self._run(tasks, shards, sizes, "gradients")
        return np.array(self._in_order(norms, len(samples)), dtype=np.float64)

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
        unwritten = [i for i, limit in enumerate(limits) if limit <= 0]
        # Long prompts first, so that the task that ends last is a short one.
        groups = list(group_prompts(prompts, limits, self._writing_tokens, PROMPTS_PER_TASK))[::-1]
        tasks = [
            ContinuationTask(
                shard, tuple(group), tuple(prompts[i] for i in group), tuple(limits[i] for i in group), self._eos
            )
            for shard, group in enumerate(groups)
        ]
        sizes = [continuation_cost(task.prompts, task.limits) for task in tasks]
        written = dict(self._run(tasks, [[] for _ in tasks], sizes, "greedy answers"))
        written |= {i: np.empty(0, dtype=np.int64) for i in unwritten}
        return [written[i] for i in range(len(prompts))]

    def drawn(
        self, prompts: Sequence[np.ndarray], limits: Sequence[int], count: int, temperature: float, seed: int
    ) -> list[list[np.ndarray]]:
        """Answers to each of N prompts, whose tokens are drawn.

        Args:
            prompts, limits: see `continuations`.
            count: of answers to each prompt.
            temperature: that logits are divided by.
            seed: of all draws.

        Returns:
            The new tokens of `count` answers to each prompt, int64, without the end token.

        Raises:
            UserError: see `continuations`.
        """
        places = [place for place, limit in enumerate(limits) if limit > 0]
        rows = [(place, draw) for place in places for draw in range(count)]
        row_prompts, row_limits = [prompts[place] for place, _ in rows], [limits[place] for place, _ in rows]
        tasks: list[DrawnTask] = []
        sizes = []
        for group in list(group_prompts(row_prompts, row_limits, self._writing_tokens, PROMPTS_PER_TASK))[::-1]:
            of_group = tuple(row_prompts[i] for i in group), tuple(row_limits[i] for i in group)
            draws = tuple(rows[i][1] for i in group)
            tasks.append(DrawnTask(len(tasks), tuple(group), *of_group, draws, temperature, seed, self._eos))
            sizes.append(continuation_cost(*of_group))
        written = dict(self._run(tasks, [[] for _ in tasks], sizes, "drawn answers"))
        answers: list[list[np.ndarray]] = [[] for _ in prompts]
        for i, (place, _) in enumerate(rows):
            answers[place].append(written[i])
        return [each or [np.empty(0, dtype=np.int64)] * count for each in answers]

    def extraction(self, samples: Sequence[Sample], n: int) -> np.ndarray:
        """EL_n of N samples, (N,) fp64, see `extraction_likelihood`."""
        shards = self._shards(samples)
        tasks = [ExtractionTask(shard, n, self._eos) for shard in range(len(shards))]
        sizes = [extraction_cost(batch.lengths.tolist()) for (batch,) in shards]
        values = self._run(tasks, shards, sizes, "extraction likelihood")
        return np.array(self._in_order(values, len(samples)), dtype=np.float64)

    def _shards(self, samples: Sequence[Sample]) -> list[list[Batch]]:
        # Indices are renumbered: here they are positions in `samples`, not in a data set.
        numbered = [replace(sample, index=i) for i, sample in enumerate(samples)]
        return [[batch] for batch in make_batches(numbered, self._batch_tokens)]

    def _run(
        self, tasks: Sequence[Any], shards: Sequence[Sequence[Batch]], sizes: Sequence[float], kind: str
    ) -> list[tuple[int, Any]]:
        found: list[tuple[int, Any]] = []
        if self._bar is not None:
            self._bar.begin({task.key: size for task, size in zip(tasks, sizes, strict=True)})
            self._bar.say(", ".join(filter(None, (self.about, kind))))
        for task, results, _ in self._pool.run(tasks, shards):
            if self._bar is not None:
                self._bar.finish(task.key)
            found += results
        return found

    @staticmethod
    def _in_order(results: Sequence[tuple[int, T]], count: int) -> list[T]:
        result_of = dict(results)
        return [result_of[i] for i in range(count)]
