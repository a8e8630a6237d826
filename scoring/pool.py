"""Ray actors that hold replicas, and the queue that feeds them.

Work is cut into tasks before it is distributed (a group of batches, a range of draws), a task's result depends on
the task alone, and results are put together in the order of the tasks. So the scores are the same for any number of
replicas and any schedule. A replica that dies is replaced and its task done again; replicas for which the cluster has
no room yet join when it has.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from scoring.board import read_board, told_on
from scoring.cluster import Footprint, check_versions, how_many_fit, versions
from scoring.engine import Replica
from scoring.errors import UserError, first_line
from scoring.plugins import load_plugins
from scoring.progress import tasks_in_flight
from scoring.samples import Batch
from scoring.settings import Naming, adopt, current_naming, named
from scoring.work import AnyTask, Facts, ReplicaSpec, ReplicaTask, TaskRunner

MAX_ATTEMPTS = 4
# Seconds from one look at how far tasks are to the next.
LOOK_S = 1.0
# What a call to a replica raises when its process or node is gone, when Ray's memory monitor has ended it, or when its
# result was lost with a node.
DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)


class ReplicaActor:
    """The process of one replica."""

    def __init__(self, footprint: Footprint, names: Naming) -> None:
        adopt(names)
        # Ray fixes OMP_NUM_THREADS per worker; torch started from it must agree, or two replicas share cores.
        torch.set_num_threads(footprint.cpus)
        self._footprint = footprint
        self._runner: TaskRunner | None = None

    def load(self, spec: ReplicaSpec, driver_versions: Mapping[str, str]) -> int:
        """Load a model in place of the present one. Not in `__init__`, so that errors keep their type.

        Args:
            spec: the model.
            driver_versions: versions of the driver's packages.

        Returns:
            The id of this process.
        """
        check_versions(driver_versions)
        load_plugins(spec.plugins)
        if spec.engine == "vllm":
            self._runner = TaskRunner(self._vllm_replica(spec))
        else:
            from scoring.load import load_model
            from scoring.replica import TransformersReplica

            self._runner = None  # memory may hold one model only
            model = load_model(spec.source, spec.dtype, self._footprint.device(), spec.revision)
            self._runner = TaskRunner(
                TransformersReplica(model, spec.allow_lost_perturbation, spec.gradient_checkpointing)
            )
        return os.getpid()

    def _vllm_replica(self, spec: ReplicaSpec) -> Replica:
        """A vLLM replica: the present one with new weights if they are of the same shape, else a new one."""
        from scoring.vllm_replica import OtherShape, VllmReplica

        present = None if self._runner is None else self._runner.replica
        if isinstance(present, VllmReplica):
            try:
                present.refresh(spec.source, spec.revision)
                return present
            except OtherShape:
                present.close()
        # The engine's processes share the cores of this actor.
        os.environ["OMP_NUM_THREADS"] = str(max(1, self._footprint.cpus // spec.tensor_parallel))
        return VllmReplica(
            spec.source,
            spec.dtype,
            "cuda" if self._footprint.gpus else "cpu",
            spec.revision,
            spec.tensor_parallel,
            min(1.0, self._footprint.gpus),
            spec.allow_lost_perturbation,
        )

    def run(
        self, task: ReplicaTask, batches: list[Batch], run_number: int, board: str | None = None
    ) -> tuple[Any, Facts]:
        """See `TaskRunner.run`.

        Args:
            board: where the driver looks how far the task is; None: it does not.
        """
        assert self._runner is not None
        if board is None:
            return self._runner.run(task, batches, run_number)
        with told_on(board):
            return self._runner.run(task, batches, run_number)


class ReplicaPool:
    """Runs tasks on up to `replicas` actors, which stay loaded between runs until the pool is closed.

    Args:
        spec: the model.
        footprint: CPU cores and GPUs of one replica.
        replicas: how many to use; None uses as many as fit. More than fit now is no error: the rest join when nodes
            do.

    Raises:
        UserError: no node can hold a replica.
    """

    def __init__(self, spec: ReplicaSpec, footprint: Footprint, replicas: int | None = None) -> None:
        fits = how_many_fit(footprint)
        self._spec = spec
        self._footprint = footprint
        self._replicas = replicas or fits
        # The actors that are loading, by the reference of the call.
        self._loading: dict[ray.ObjectRef[Any], Any] = {}
        self._idle: list[Any] = []
        self._deaths_in_a_row = 0
        self._run_number = 0
        self.replaced = 0
        self._name = uuid.uuid4().hex

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
        # Actors that are still loading load once more afterwards: an actor does one call after the other.
        actors = [*self._loading.values(), *self._idle]
        self._loading, self._idle = {}, []
        for actor in actors:
            self._load(actor)

    def close(self) -> None:
        """End all replicas."""
        for actor in [*self._loading.values(), *self._idle]:
            ray.kill(actor)
        self._loading, self._idle = {}, []

    def run(self, tasks: Sequence[AnyTask], shards: Sequence[Sequence[Batch]]) -> Iterator[tuple[AnyTask, Any, Facts]]:
        """Results as they finish, in no particular order.

        Raises:
            UserError: a task's own error (a lost perturbation, say), or replicas that keep dying.
        """
        self._run_number += 1
        waiting = deque(tasks)
        unfinished = Counter(task.shard for task in tasks)
        attempts: Counter[str] = Counter()
        # The shards in the object store, and the task and actor of each call that is under way.
        stored: dict[int, ray.ObjectRef[Any]] = {}
        running: dict[ray.ObjectRef[Any], tuple[AnyTask, Any]] = {}
        for _ in range(min(self._replicas, len(tasks)) - len(self._idle) - len(self._loading)):
            self._start()
        try:
            while waiting or running:
                self._hand_out(waiting, running, stored, shards)
                ready, _ = ray.wait([*self._loading, *running], num_returns=1, timeout=self._look_s())
                if not ready:
                    self._look(task for task, _ in running.values())
                    continue
                (reference,) = ready
                if reference in self._loading:
                    self._finish_loading(reference)
                    continue
                task, actor = running.pop(reference)
                try:
                    result, facts = ray.get(reference)
                except RayTaskError as error:
                    self._idle.append(actor)
                    raise _unwrapped(error) from None
                except DEATHS as error:
                    self._replace()
                    attempts[task.key] += 1
                    if attempts[task.key] >= MAX_ATTEMPTS:
                        raise UserError(
                            f"{MAX_ATTEMPTS} replicas died on the same {len(shards[task.shard])} batch(es), out of "
                            f"memory? Lower {named('batch_tokens')}. Last: {first_line(error)}"
                        ) from None
                    waiting.appendleft(task)
                    continue
                self._idle.append(actor)
                unfinished[task.shard] -= 1
                if not unfinished[task.shard]:
                    del stored[task.shard]
                # Before the result is handed over, so that no replica is idle while the caller works on it.
                self._hand_out(waiting, running, stored, shards)
                yield task, result, facts
        finally:
            # If the caller stops early, nobody needs what still runs, and its replica is in an unknown state.
            for _, actor in running.values():
                ray.kill(actor)

    def _hand_out(
        self,
        waiting: deque[AnyTask],
        running: dict[ray.ObjectRef[Any], tuple[AnyTask, Any]],
        stored: dict[int, ray.ObjectRef[Any]],
        shards: Sequence[Sequence[Batch]],
    ) -> None:
        """Give every idle replica a task. A shard is put in the object store once."""
        while self._idle and waiting:
            task, actor = waiting.popleft(), self._idle.pop()
            if task.shard not in stored:
                stored[task.shard] = ray.put(list(shards[task.shard]))
            board = None if tasks_in_flight() is None else self._board(task)
            running[actor.run.remote(task, stored[task.shard], self._run_number, board)] = task, actor

    def _board(self, task: ReplicaTask) -> str:
        return f"{self._name}/{self._run_number}/{task.key}"

    @staticmethod
    def _look_s() -> float | None:
        """How long to wait for a result before looking how far the tasks are; None if nobody wants to know."""
        return None if tasks_in_flight() is None else LOOK_S

    def _look(self, tasks: Iterable[ReplicaTask]) -> None:
        if (in_flight := tasks_in_flight()) is not None:
            in_flight.update({task.key: read_board(self._board(task)) for task in tasks})

    def _start(self) -> None:
        options = self._footprint.ray_options()
        actor: Any = ray.remote(ReplicaActor).options(**options).remote(self._footprint, current_naming())
        self._load(actor)

    def _load(self, actor: Any) -> None:
        self._loading[actor.load.remote(self._spec, versions())] = actor

    def _replace(self) -> None:
        self.replaced += 1
        self._start()

    def _finish_loading(self, reference: ray.ObjectRef[Any]) -> None:
        actor = self._loading.pop(reference)
        try:
            ray.get(reference)
        except RayTaskError as error:
            raise _unwrapped(error) from None
        except DEATHS as error:
            # A lost node ends all replicas that were loading on it: together they count as one attempt.
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row >= MAX_ATTEMPTS * (len(self._loading) + 1):
                raise UserError(f"replicas die while loading the model: {first_line(error)}") from None
            self._replace()
            return
        self._deaths_in_a_row = 0
        self._idle.append(actor)


def _unwrapped(error: RayTaskError) -> BaseException:
    """The exception that the replica raised, without Ray's wrapping if it is the user's to mend."""
    cause = error.cause
    if isinstance(cause, UserError):
        return type(cause)(*cause.args)
    if isinstance(cause, torch.OutOfMemoryError):
        return UserError(f"a replica ran out of GPU memory: lower {named('batch_tokens')}, or use more GPUs")
    return error
