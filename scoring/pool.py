"""Ray actors that hold replicas, and the queue that feeds them.

Work is cut into tasks before it is distributed (a group of batches, a range of draws), each task's result depends
on the task alone, and results are put together in task order. So the scores are the same for any number of
replicas and any schedule. A replica that dies is replaced and its task done again; replicas that the cluster
cannot place yet join when it can.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import ray
import torch
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from scoring.cluster import Footprint, check_versions, how_many_fit, versions
from scoring.errors import UserError, first_line
from scoring.mrd import ESTIMATORS, Draws, Request, Until, base_logprobs, estimate, estimate_until
from scoring.samples import Batch

if TYPE_CHECKING:
    from scoring.replica import TransformersReplica

ENGINES = ("transformers", "vllm")
MAX_ATTEMPTS = 4
# What a call to a replica raises when its process or node is gone. Ray's memory monitor and a result lost with its
# node have types of their own.
DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)


@dataclass(frozen=True)
class ReplicaSpec:
    """Which model a replica holds, and how.

    Attributes:
        source: folder or Hugging Face id; a folder must be visible from every node.
        revision: commit of a Hugging Face id.
        dtype: "float32", "bfloat16" or "float64".
        allow_lost_perturbation: score although storage rounds the perturbation away.
        engine: one of ENGINES.
        tensor_parallel: processes of a vLLM engine that share the model.
    """

    source: str
    revision: str | None = None
    dtype: str = "float32"
    allow_lost_perturbation: bool = False
    engine: str = "transformers"
    tensor_parallel: int = 1


class Work(Protocol):
    """What a replica can be asked to do with a group of batches."""

    @property
    def shard(self) -> int:
        """The number of the group."""

    @property
    def key(self) -> str:
        """Its name, unique within a run."""

    def do(self, replica: TransformersReplica, batches: Sequence[Batch], kept: dict[str, Any]) -> Any:
        """Do it.

        Args:
            replica: of transformers, or a `VllmReplica`, which has the same methods but those that differentiate.
            kept: what earlier works on the same group have left in this replica; to be added to.
        """


AnyWork = TypeVar("AnyWork", bound=Work)


@dataclass(frozen=True)
class Task:
    """Scoring: a group of batches and the draws to make of it."""

    shard: int
    request: Request
    until: Until | None = None

    @property
    def key(self) -> str:
        return f"{self.shard:06d}-{self.request.first_draw:06d}-{self.request.last_draw:06d}"

    def do(self, replica: TransformersReplica, batches: Sequence[Batch], kept: dict[str, Any]) -> Draws:
        """The draws. The unperturbed log-probs are formed once for all draws of a group: they are several tasks."""
        estimator = self.request.estimator
        if ESTIMATORS[estimator].default_draws and "base" not in kept:
            kept["base"] = base_logprobs(replica, batches, estimator)
        if self.until is None:
            draws = estimate(replica, batches, self.request, kept.get("base"))
        else:
            draws = estimate_until(replica, batches, self.request, self.until, kept.get("base"))
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


class ReplicaActor:
    """One replica in a process of its own."""

    def __init__(self, footprint: Footprint) -> None:
        # Ray fixes OMP_NUM_THREADS per worker; torch started from it must agree, or two replicas share cores.
        torch.set_num_threads(footprint.cpus)
        self._footprint = footprint
        self._replica: Any = None
        self._group: tuple[int, int] | None = None
        self._kept: dict[str, Any] = {}

    def load(self, spec: ReplicaSpec, of_driver: Mapping[str, str]) -> int:
        """Load a model, in place of the one that is there; the process id, for those who watch. Not in __init__, so
        that errors arrive typed.

        Args:
            of_driver: versions of its packages.
        """
        check_versions(of_driver)
        self._group = None
        if spec.engine == "vllm":
            self._load_vllm(spec)
        else:
            from scoring.replica import TransformersReplica, load_model

            self._replica = None
            model = load_model(spec.source, spec.dtype, self._footprint.device(), spec.revision)
            self._replica = TransformersReplica(model, spec.allow_lost_perturbation)
        return os.getpid()

    def _load_vllm(self, spec: ReplicaSpec) -> None:
        from scoring.vllm_replica import OtherShape, VllmReplica

        if isinstance(self._replica, VllmReplica):
            try:
                self._replica.refresh(spec.source, spec.revision)
                return
            except OtherShape:
                self._replica.close()
        # The engine's processes share what Ray gave.
        os.environ["OMP_NUM_THREADS"] = str(max(1, self._footprint.cpus // spec.tensor_parallel))
        self._replica = VllmReplica(
            spec.source,
            spec.dtype,
            "cuda" if self._footprint.gpus else "cpu",
            spec.revision,
            spec.tensor_parallel,
            min(1.0, self._footprint.gpus),
            spec.allow_lost_perturbation,
        )

    def run(self, work: Work, batches: list[Batch], run: int) -> tuple[Any, Facts]:
        """Do a work. `run` tells the pool's runs apart: their groups have the same numbers."""
        replica = self._replica
        before = replica.forwards, replica.backwards
        if self._group != (run, work.shard):
            self._group, self._kept = (run, work.shard), {}
        result = work.do(replica, batches, self._kept)
        return result, Facts(
            replica.perturbation_survival,
            replica.gradient_error,
            replica.rounding_share,
            list(replica.notes),
            replica.forwards - before[0],
            replica.backwards - before[1],
        )


class ReplicaPool:
    """Runs tasks on up to `replicas` actors, which stay loaded between runs until the pool is closed.

    Args:
        spec: the model.
        footprint: CPU cores and GPUs of one replica.
        replicas: how many are wanted; None for as many as fit. More than fit now is no error: the rest join when
            nodes do.

    Raises:
        UserError: no node can hold a replica.
    """

    def __init__(self, spec: ReplicaSpec, footprint: Footprint, replicas: int | None = None) -> None:
        fits = how_many_fit(footprint)
        self._spec = spec
        self._footprint = footprint
        self._wanted = replicas or fits
        self._loading: dict[ray.ObjectRef, Any] = {}
        self._idle: list[Any] = []
        self._deaths_in_a_row = 0
        self._runs = 0
        self.replaced = 0

    def __enter__(self) -> ReplicaPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exchange(self, spec: ReplicaSpec) -> None:
        """Work on another model from now on; replicas take over its weights and stay.

        Args:
            spec: of the same engine.
        """
        self._spec = spec
        # What still loads is loaded once more: an actor does one thing after the other.
        actors = [*self._loading.values(), *self._idle]
        self._loading, self._idle = {}, []
        for actor in actors:
            self._load(actor)

    def close(self) -> None:
        """End all replicas."""
        for actor in [*self._loading.values(), *self._idle]:
            ray.kill(actor)
        self._loading, self._idle = {}, []

    def run(self, tasks: Sequence[AnyWork], shards: Sequence[Sequence[Batch]]) -> Iterator[tuple[AnyWork, Any, Facts]]:
        """Results as they finish, in no particular order.

        Raises:
            UserError: a task's own error (a lost perturbation, say), or replicas that keep dying.
        """
        self._runs += 1
        waiting = deque(tasks)
        left = Counter(task.shard for task in tasks)
        attempts: Counter[str] = Counter()
        stored: dict[int, ray.ObjectRef] = {}
        running: dict[ray.ObjectRef, tuple[AnyWork, Any]] = {}
        for _ in range(min(self._wanted, len(tasks)) - len(self._idle) - len(self._loading)):
            self._start()
        try:
            while waiting or running:
                self._deal(waiting, running, stored, shards)
                (reference,), _ = ray.wait([*self._loading, *running], num_returns=1)
                if reference in self._loading:
                    self._finish_loading(reference)
                    continue
                task, actor = running.pop(reference)
                try:
                    result, facts = ray.get(reference)
                except RayTaskError as error:
                    self._idle.append(actor)
                    raise _plain(error) from None
                except DEATHS as error:
                    self._replace()
                    attempts[task.key] += 1
                    if attempts[task.key] >= MAX_ATTEMPTS:
                        raise UserError(
                            f"{MAX_ATTEMPTS} replicas died on the same {len(shards[task.shard])} batch(es), out of "
                            f"memory? Lower --batch-tokens. Last: {first_line(error)}"
                        ) from None
                    waiting.appendleft(task)
                    continue
                self._idle.append(actor)
                left[task.shard] -= 1
                if not left[task.shard]:
                    del stored[task.shard]
                # Before the caller takes its time over the result.
                self._deal(waiting, running, stored, shards)
                yield task, result, facts
        finally:
            # Left early: what still runs is of no use to anyone, and its replica is in an unknown state.
            for _, actor in running.values():
                ray.kill(actor)

    def _deal(
        self,
        waiting: deque[AnyWork],
        running: dict[ray.ObjectRef, tuple[AnyWork, Any]],
        stored: dict[int, ray.ObjectRef],
        shards: Sequence[Sequence[Batch]],
    ) -> None:
        """Give every idle replica a task. A group of batches is put in the object store once."""
        while self._idle and waiting:
            task, actor = waiting.popleft(), self._idle.pop()
            if task.shard not in stored:
                stored[task.shard] = ray.put(list(shards[task.shard]))
            running[actor.run.remote(task, stored[task.shard], self._runs)] = task, actor

    def _start(self) -> None:
        options = self._footprint.ray_options()
        actor: Any = ray.remote(ReplicaActor).options(**options).remote(self._footprint)
        self._load(actor)

    def _load(self, actor: Any) -> None:
        self._loading[actor.load.remote(self._spec, versions())] = actor

    def _replace(self) -> None:
        self.replaced += 1
        self._start()

    def _finish_loading(self, reference: ray.ObjectRef) -> None:
        actor = self._loading.pop(reference)
        try:
            ray.get(reference)
        except RayTaskError as error:
            raise _plain(error) from None
        except DEATHS as error:
            # A lost node takes all that were loading on it along: that is one attempt, not several.
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row >= MAX_ATTEMPTS * (len(self._loading) + 1):
                raise UserError(f"replicas die while loading the model: {first_line(error)}") from None
            self._replace()
            return
        self._deaths_in_a_row = 0
        self._idle.append(actor)


class LocalPool:
    """One replica in this process, asked as a ReplicaPool is."""

    def __init__(self, replica: TransformersReplica) -> None:
        self._replica = replica

    def run(self, tasks: Sequence[AnyWork], shards: Sequence[Sequence[Batch]]) -> Iterator[tuple[AnyWork, Any, Facts]]:
        """Results in order; what a replica notices stays with it."""
        kept: dict[int, dict[str, Any]] = {}
        for task in tasks:
            yield task, task.do(self._replica, shards[task.shard], kept.setdefault(task.shard, {})), Facts()


def _plain(error: RayTaskError) -> BaseException:
    """The exception that the replica raised, without Ray's wrapping where it is the user's to mend."""
    cause = error.cause
    if isinstance(cause, UserError):
        return type(cause)(*cause.args)
    if isinstance(cause, torch.OutOfMemoryError):
        return UserError("a replica ran out of GPU memory: lower --batch-tokens, or use more GPUs")
    return error
