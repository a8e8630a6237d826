"""Ray actors that hold replicas, and the queue that feeds them.

Work is cut into tasks before it is distributed (a group of batches, a range of draws), each task's result depends
on the task alone, and results are put together in task order. So the scores are the same for any number of
replicas and any schedule. A replica that dies is replaced and its task done again; replicas that the cluster
cannot place yet join when it can.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from scoring.cluster import Footprint, how_many_fit
from scoring.errors import UserError
from scoring.mrd import Draws, Request, Until, estimate, estimate_until
from scoring.samples import Batch

MAX_ATTEMPTS = 4


@dataclass(frozen=True)
class ReplicaSpec:
    """Which model a replica holds, and how.

    Attributes:
        source: folder or Hugging Face id; a folder must be visible from every node.
        revision: commit of a Hugging Face id.
        dtype: "float32", "bfloat16" or "float64".
        allow_lost_perturbation: score although storage rounds the perturbation away.
    """

    source: str
    revision: str | None = None
    dtype: str = "float32"
    allow_lost_perturbation: bool = False


@dataclass(frozen=True)
class Task:
    """A group of batches (by number) and the draws to make of it."""

    shard: int
    request: Request
    until: Until | None = None

    @property
    def key(self) -> str:
        return f"{self.shard:06d}-{self.request.first_draw:06d}-{self.request.last_draw:06d}"


@dataclass
class Facts:
    """What replicas noticed while they worked.

    Attributes:
        perturbation_survival: std(stored(theta + delta) - theta) / sigma; None if nothing was perturbed.
        gradient_error: largest relative error of gradient norms against fp32; None if they are in fp32.
        notes: fall-backs and overridden refusals, each once.
        forwards, backwards: passes over a batch.
    """

    perturbation_survival: float | None = None
    gradient_error: float | None = None
    notes: list[str] = field(default_factory=list)
    forwards: int = 0
    backwards: int = 0

    def add(self, other: Facts) -> None:
        self.perturbation_survival = self.perturbation_survival or other.perturbation_survival
        errors = [e for e in (self.gradient_error, other.gradient_error) if e is not None]
        self.gradient_error = max(errors, default=None)
        self.notes += [note for note in other.notes if note not in self.notes]
        self.forwards += other.forwards
        self.backwards += other.backwards


class ReplicaActor:
    """One replica in a process of its own."""

    def __init__(self, threads: int, device: str) -> None:
        # Ray fixes OMP_NUM_THREADS per worker; torch started from it must agree, or two replicas share cores.
        torch.set_num_threads(threads)
        self._device = device
        self._replica: Any = None
        self._base: tuple[int, list[torch.Tensor]] | None = None

    def load(self, spec: ReplicaSpec) -> int:
        """Load the model; the process id, for those who watch. Not in __init__, so that errors arrive typed."""
        from scoring.replica import TransformersReplica, load_model

        model = load_model(spec.source, spec.dtype, self._device, spec.revision)
        self._replica = TransformersReplica(model, spec.allow_lost_perturbation)
        return os.getpid()

    def run(self, task: Task, batches: list[Batch]) -> tuple[Draws, Facts]:
        replica = self._replica
        before = replica.forwards, replica.backwards
        # The draws of a group are cut into several tasks; its unperturbed log-probs are the same for all.
        if self._base is None or self._base[0] != task.shard:
            self._base = (task.shard, [replica.logprobs(batch) for batch in batches])
        if task.until is None:
            draws = estimate(replica, batches, task.request, self._base[1])
        else:
            draws = estimate_until(replica, batches, task.request, task.until, self._base[1])
        if task.request.estimator == "gradient" and replica.gradient_error is None:
            replica.measure_gradient_error(batches[0])
        return draws, Facts(
            replica.perturbation_survival,
            replica.gradient_error,
            list(replica.notes),
            replica.forwards - before[0],
            replica.backwards - before[1],
        )


class ReplicaPool:
    """Runs tasks on up to `replicas` actors.

    Args:
        spec: the model.
        footprint: CPU cores and GPUs of one replica.
        replicas: how many are wanted; None for as many as fit. More than fit now is no error: the rest join when
            nodes do.
    """

    def __init__(self, spec: ReplicaSpec, footprint: Footprint, replicas: int | None = None) -> None:
        fits = how_many_fit(footprint)
        self._spec = spec
        self._footprint = footprint
        self.wanted = replicas or fits
        self.replaced = 0

    def run(self, tasks: Sequence[Task], shards: Sequence[Sequence[Batch]]) -> Iterator[tuple[Task, Draws, Facts]]:
        """Results as they finish, in no particular order.

        Raises:
            UserError: a task's own error (a lost perturbation, say), or a task whose replicas keep dying.
        """
        waiting = deque(tasks)
        attempts = {task.key: 0 for task in tasks}
        stored: dict[int, ray.ObjectRef] = {}
        loading = dict(self._start() for _ in range(min(self.wanted, len(tasks))))
        running: dict[ray.ObjectRef, tuple[Task, Any]] = {}
        deaths_at_start = 0
        try:
            while waiting or running:
                finished, _ = ray.wait([*loading, *running], num_returns=1)
                reference = finished[0]
                task, actor = running.pop(reference) if reference in running else (None, loading.pop(reference))
                try:
                    value = ray.get(reference)
                except RayTaskError as error:
                    raise _plain(error) from None
                except RayActorError as error:
                    self.replaced += 1
                    if task is None:
                        deaths_at_start += 1
                        if deaths_at_start >= MAX_ATTEMPTS:
                            raise UserError(f"replicas die while loading the model: {_reason(error)}") from None
                    else:
                        attempts[task.key] += 1
                        if attempts[task.key] >= MAX_ATTEMPTS:
                            raise UserError(
                                f"{attempts[task.key]} replicas died on the same {len(shards[task.shard])} batch(es), "
                                f"out of memory? Lower --batch-tokens. Last: {_reason(error)}"
                            ) from None
                        waiting.appendleft(task)
                    loading.update([self._start()])
                    continue
                if task is not None:
                    yield (task, *value)
                if waiting:
                    task = waiting.popleft()
                    if task.shard not in stored:
                        stored[task.shard] = ray.put(list(shards[task.shard]))
                    running[actor.run.remote(task, stored[task.shard])] = (task, actor)
                    _drop_finished(stored, waiting, running)
                else:
                    ray.kill(actor)
        finally:
            for actor in [*loading.values(), *(actor for _, actor in running.values())]:
                ray.kill(actor)

    def _start(self) -> tuple[ray.ObjectRef, Any]:
        device = "cuda" if self._footprint.gpus else "cpu"
        options = self._footprint.ray_options()
        actor: Any = ray.remote(ReplicaActor).options(**options).remote(self._footprint.cpus, device)
        return actor.load.remote(self._spec), actor


def _drop_finished(stored: dict, waiting: deque[Task], running: dict) -> None:
    """Let go of batches that no task needs any more, so that the object store does not hold the whole set."""
    needed = {task.shard for task in waiting} | {task.shard for task, _ in running.values()}
    for shard in [s for s in stored if s not in needed]:
        del stored[shard]


def _plain(error: RayTaskError) -> BaseException:
    """The exception that the replica raised, without Ray's wrapping where it is the user's to mend."""
    cause = error.cause
    if isinstance(cause, UserError):
        return type(cause)(*cause.args)
    if isinstance(cause, torch.OutOfMemoryError):
        return UserError("a replica ran out of GPU memory: lower --batch-tokens, or use more GPUs")
    return error


def _reason(error: RayActorError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
