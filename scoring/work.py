"""What a replica is, what it can be asked to do, and a pool of one replica in this process.

`scoring.pool` has the pool of many replicas on Ray, which is asked in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar

import numpy as np
import torch

from scoring.mrd import ESTIMATORS, Draws, Perturbable, Request, Until, base_logprobs, estimate, estimate_until
from scoring.plugins import Plugin, loaded_plugins
from scoring.samples import Batch, Sample

if TYPE_CHECKING:  # who only plans work need not load the models' code
    from transformers import PreTrainedModel

Engine = Literal["transformers", "vllm"]
Dtype = Literal["float32", "bfloat16", "float64"]


class Replica(Perturbable, Protocol):
    """A copy of a model that answers questions about samples, whichever engine computes them.

    Attributes:
        forwards, backwards: passes over a batch so far.
        perturbation_survival, gradient_error, rounding_share, notes: see `Facts`.
    """

    forwards: int
    backwards: int
    perturbation_survival: float | None
    gradient_error: float | None
    rounding_share: float | None
    notes: list[str]

    def token_scores(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs of the scored tokens, (B, S) fp64 in nats, and whether each is the most likely token, (B, S) bool;
        without meaning at padding."""

    def greedy_continuations(
        self, prompts: Sequence[np.ndarray], limits: Sequence[int], eos_token_id: int | None
    ) -> list[np.ndarray]:
        """What the model writes after each prompt, at most so many tokens, without the end token."""

    def extraction_likelihood(self, samples: Sequence[Sample], n: int, eos_token_id: int | None) -> torch.Tensor:
        """EL_n of each sample, (B,) fp64; see `scoring.memorization`."""

    def measure_gradient_error(self, batch: Batch) -> None:
        """Set `gradient_error` from a few samples of the batch, where the dtype is coarser than fp32."""


@dataclass(frozen=True)
class ReplicaSpec:
    """Which model a replica holds, and how.

    Attributes:
        source: folder or Hugging Face id; a folder must be visible from every node.
        revision: commit of a Hugging Face id.
        dtype: of weights and activations.
        allow_lost_perturbation: score although storage rounds the perturbation away.
        engine: what computes.
        tensor_parallel: processes of a vLLM engine that share the model.
        plugins: files that add to the registries.
    """

    source: str
    revision: str | None = None
    dtype: str = "float32"
    allow_lost_perturbation: bool = False
    engine: str = "transformers"
    tensor_parallel: int = 1
    plugins: tuple[Plugin, ...] = field(default_factory=loaded_plugins)


class Work(Protocol):
    """What a replica can be asked to do with a group of batches."""

    @property
    def shard(self) -> int:
        """The number of the group."""

    @property
    def key(self) -> str:
        """Its name, unique within a run."""

    def do(self, replica: Any, batches: Sequence[Batch], cache: dict[str, Any]) -> Any:
        """Do it.

        Args:
            replica: a `Replica`; works that look inside the model name the class that they need.
            batches: the group.
            cache: what earlier works on the same group have left in this replica; to be added to.
        """


AnyWork = TypeVar("AnyWork", bound=Work)


@dataclass(frozen=True)
class DrawTask:
    """Scoring: a group of batches and the draws to make of it."""

    shard: int
    request: Request
    until: Until | None = None

    @property
    def key(self) -> str:
        return f"{self.shard:06d}-{self.request.first_draw:06d}-{self.request.last_draw:06d}"

    def do(self, replica: Replica, batches: Sequence[Batch], cache: dict[str, Any]) -> Draws:
        """The draws. The unperturbed log-probs are formed once for all draws of a group: they are several tasks."""
        estimator = self.request.estimator
        if ESTIMATORS[estimator].default_draws and "base" not in cache:
            cache["base"] = base_logprobs(replica, batches, estimator)
        if self.until is None:
            draws = estimate(replica, batches, self.request, cache.get("base"))
        else:
            draws = estimate_until(replica, batches, self.request, self.until, cache.get("base"))
        if estimator == "gradient" and replica.gradient_error is None:
            replica.measure_gradient_error(batches[0])
        return draws


@dataclass
class Facts:
    """What replicas noticed while they worked.

    Attributes:
        perturbation_survival: std(stored(theta + delta) - theta) / sigma; None if nothing was perturbed.
        gradient_error: largest relative error of gradient norms against fp32; None if they are in fp32.
        rounding_share: rounding of log-probs relative to the scores, medians, for `antithetic`; None elsewhere.
        notes: fall-backs and overridden refusals, each once.
        forwards, backwards: passes over a batch.
    """

    perturbation_survival: float | None = None
    gradient_error: float | None = None
    rounding_share: float | None = None
    notes: list[str] = field(default_factory=list)
    forwards: int = 0
    backwards: int = 0

    def add(self, other: Facts) -> None:
        self.perturbation_survival = self.perturbation_survival or other.perturbation_survival
        self.gradient_error = _larger(self.gradient_error, other.gradient_error)
        self.rounding_share = _larger(self.rounding_share, other.rounding_share)
        self.notes += [note for note in other.notes if note not in self.notes]
        self.forwards += other.forwards
        self.backwards += other.backwards


def _larger(one: float | None, other: float | None) -> float | None:
    return max((value for value in (one, other) if value is not None), default=None)


class Worker:
    """A replica and the works that it does, one after the other."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self._group: tuple[int, int] | None = None
        self._cache: dict[str, Any] = {}

    def do(self, work: Work, batches: Sequence[Batch], run: int) -> tuple[Any, Facts]:
        """A work's result, and what the replica noticed.

        Args:
            run: tells the runs of a pool apart: their groups have the same numbers.
        """
        replica = self.replica
        forwards, backwards = replica.forwards, replica.backwards
        if self._group != (run, work.shard):
            self._group, self._cache = (run, work.shard), {}
        result = work.do(replica, batches, self._cache)
        return result, Facts(
            replica.perturbation_survival,
            replica.gradient_error,
            replica.rounding_share,
            list(replica.notes),
            replica.forwards - forwards,
            replica.backwards - backwards,
        )


class Pool(Protocol):
    """Replicas of one model that share the work on it."""

    # How many replicas have died and were replaced.
    replaced: int

    def run(self, tasks: Sequence[AnyWork], shards: Sequence[Sequence[Batch]]) -> Iterator[tuple[AnyWork, Any, Facts]]:
        """Results as they finish, in no particular order.

        Args:
            tasks: what is to be done.
            shards: the groups of batches that the tasks' numbers mean.

        Raises:
            UserError: a task's own error (a lost perturbation, say).
        """

    def exchange(self, spec: ReplicaSpec) -> None:
        """Work on another model from now on."""

    def close(self) -> None:
        """End all replicas."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class LocalPool:
    """One transformers replica in this process, asked as a pool on Ray is. A model is loaded when it is first needed.

    Args:
        model: what to work on: the spec of a model, or a loaded one in eval mode.
        device: where models go that are loaded here, see `scoring.replica.load_model`.
        loaded: models that are loaded already, by the source that specs name.
        allow_lost_perturbation: of a loaded model, see `ReplicaSpec`.
    """

    def __init__(
        self,
        model: ReplicaSpec | PreTrainedModel,
        device: str = "cpu",
        loaded: Mapping[str, PreTrainedModel] | None = None,
        allow_lost_perturbation: bool = False,
    ) -> None:
        self.replaced = 0
        self._runs = 0
        self._device, self._loaded = device, dict(loaded or {})
        if not isinstance(model, ReplicaSpec):
            self._loaded[""] = model
            model = ReplicaSpec("", allow_lost_perturbation=allow_lost_perturbation)
        self._spec = model
        self._worker: Worker | None = None

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def replica(self) -> Replica:
        """The replica itself."""
        if self._worker is None:
            from scoring.replica import TransformersReplica, load_model

            spec = self._spec
            model = self._loaded.get(spec.source)
            if model is None:
                model = load_model(spec.source, spec.dtype, self._device, spec.revision)
            self._worker = Worker(TransformersReplica(model, spec.allow_lost_perturbation))
        return self._worker.replica

    def run(self, tasks: Sequence[AnyWork], shards: Sequence[Sequence[Batch]]) -> Iterator[tuple[AnyWork, Any, Facts]]:
        """Results in the order of the tasks."""
        self._runs += 1
        run = self._runs
        for task in tasks:
            assert self.replica
            assert self._worker is not None
            result, facts = self._worker.do(task, shards[task.shard], run)
            yield task, result, facts

    def exchange(self, spec: ReplicaSpec) -> None:
        """Work on another model from now on."""
        if spec != self._spec:
            self._spec, self._worker = spec, None

    def close(self) -> None:
        """Let go of the model."""
        self._worker = None
