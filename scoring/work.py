"""Replicas, the tasks that they do, and a pool of one replica in this process.

`scoring.pool` has the pool of many replicas on Ray, which is used in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from scoring.engine import Dtype, Engine, Replica
from scoring.mrd import ESTIMATORS, Draws, Precision, Request, base_logprobs, estimate
from scoring.plugins import Plugin, loaded_plugins
from scoring.progress import Meter, current_meter, metered, tasks_in_flight
from scoring.samples import Batch

if TYPE_CHECKING:  # a driver that only plans tasks does not load the code of models
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ReplicaSpec:
    """Which model a replica holds, and how.

    Attributes:
        source: folder or Hugging Face id; a folder must be visible from every node.
        revision: commit of a Hugging Face id.
        dtype: number format of weights and activations.
        allow_lost_perturbation: score although storage rounds the perturbation away.
        engine: the engine that computes.
        tensor_parallel: processes of a vLLM engine that share the model.
        gradient_checkpointing: gradients compute activations twice instead of keeping them.
        plugins: files that add to the registries.
    """

    source: str
    revision: str | None = None
    dtype: Dtype = "float32"
    allow_lost_perturbation: bool = False
    engine: Engine = "transformers"
    tensor_parallel: int = 1
    gradient_checkpointing: bool = False
    plugins: tuple[Plugin, ...] = field(default_factory=loaded_plugins)


class ReplicaTask(Protocol):
    """Something that a replica does with a group of batches, a shard."""

    @property
    def shard(self) -> int:
        """The number of the shard."""

    @property
    def key(self) -> str:
        """The name of the task, unique within a run."""

    def do(self, replica: Any, batches: Sequence[Batch], cache: dict[str, Any]) -> Any:
        """Do the task.

        Args:
            replica: a `Replica`; tasks that look inside the model name the class that they need.
            batches: the shard.
            cache: what earlier tasks on the same shard left at this replica; this task may add to it.
        """


AnyTask = TypeVar("AnyTask", bound=ReplicaTask)


@dataclass(frozen=True)
class DrawTask:
    """Scoring: the draws to make for a shard.

    Attributes:
        shard: the number of the shard.
        request: which draws.
        precision: draw until this precision is reached; None makes the draws of the request.
    """

    shard: int
    request: Request
    precision: Precision | None = None

    @property
    def key(self) -> str:
        return f"{self.shard:06d}-{self.request.first_draw:06d}-{self.request.last_draw:06d}"

    def do(self, replica: Replica, batches: Sequence[Batch], cache: dict[str, Any]) -> Draws:
        """Make the draws. The tasks of a shard share its unperturbed log-probs by the cache."""
        estimator = self.request.estimator
        if ESTIMATORS[estimator].default_draws and "base" not in cache:
            cache["base"] = base_logprobs(replica, batches, estimator)
        draws = estimate(replica, batches, self.request, cache.get("base"), self.precision)
        if estimator == "gradient" and replica.gradient_error is None:
            replica.measure_gradient_error(batches[0])
        return draws


@dataclass
class Facts:
    """Facts that replicas noticed while they worked.

    Attributes:
        perturbation_survival: std(stored(theta + delta) - theta) / sigma; None if nothing was perturbed.
        gradient_error: largest relative error of gradient norms against fp32; None if they are in fp32.
        rounding_share: median rounding of log-probs relative to the median score, for `antithetic`; else None.
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


class TaskRunner:
    """Does tasks on a replica, one after the other."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        # The cache belongs to one shard of one run.
        self._cached_shard: tuple[int, int] | None = None
        self._cache: dict[str, Any] = {}

    def run(self, task: ReplicaTask, batches: Sequence[Batch], run_number: int) -> tuple[Any, Facts]:
        """The result of a task, and what the replica noticed.

        Args:
            task: the task.
            batches: its shard.
            run_number: number of the pool's run; different runs have shards of the same numbers.
        """
        replica = self.replica
        forwards, backwards = replica.forwards, replica.backwards
        if self._cached_shard != (run_number, task.shard):
            self._cached_shard, self._cache = (run_number, task.shard), {}
        result = task.do(replica, batches, self._cache)
        return result, Facts(
            replica.perturbation_survival,
            replica.gradient_error,
            replica.rounding_share,
            list(replica.notes),
            replica.forwards - forwards,
            replica.backwards - backwards,
        )


class Pool(Protocol):
    """Replicas of one model that share the tasks.

    Attributes:
        replaced: how many replicas have died and were replaced.
    """

    replaced: int

    def run(self, tasks: Sequence[AnyTask], shards: Sequence[Sequence[Batch]]) -> Iterator[tuple[AnyTask, Any, Facts]]:
        """Results as they finish, in no particular order.

        Args:
            tasks: the tasks.
            shards: the groups of batches; a task's shard is a position in it.

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
    """One transformers replica in this process, used as a pool on Ray is. Its model is loaded when it is first needed.

    Args:
        model: the spec of a model, or a loaded model in eval mode.
        device: device of the models that the pool loads, see `scoring.load.load_model`.
        loaded: models that are loaded already, by the source that specs name.
        allow_lost_perturbation: see `ReplicaSpec`; for a loaded model.
    """

    def __init__(
        self,
        model: ReplicaSpec | PreTrainedModel,
        device: str = "cpu",
        loaded: Mapping[str, PreTrainedModel] | None = None,
        allow_lost_perturbation: bool = False,
    ) -> None:
        self.replaced = 0
        self._run_number = 0
        self._device, self._loaded = device, dict(loaded or {})
        if not isinstance(model, ReplicaSpec):
            self._loaded[""] = model
            model = ReplicaSpec("", allow_lost_perturbation=allow_lost_perturbation)
        self._spec = model
        self._runner: TaskRunner | None = None

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def replica(self) -> Replica:
        """The replica, with its model loaded."""
        return self._ready_runner().replica

    def _ready_runner(self) -> TaskRunner:
        if self._runner is None:
            from scoring.load import load_model
            from scoring.replica import TransformersReplica

            spec = self._spec
            model = self._loaded.get(spec.source)
            if model is None:
                model = load_model(spec.source, spec.dtype, self._device, spec.revision)
            self._runner = TaskRunner(
                TransformersReplica(model, spec.allow_lost_perturbation, spec.gradient_checkpointing)
            )
        return self._runner

    def run(self, tasks: Sequence[AnyTask], shards: Sequence[Sequence[Batch]]) -> Iterator[tuple[AnyTask, Any, Facts]]:
        """Results in the order of the tasks."""
        self._run_number += 1
        run_number, in_flight = self._run_number, tasks_in_flight()
        for task in tasks:
            meter = current_meter() if in_flight is None else in_flight.setdefault(task.key, Meter())
            with metered(meter):
                result, facts = self._ready_runner().run(task, shards[task.shard], run_number)
            yield task, result, facts

    def exchange(self, spec: ReplicaSpec) -> None:
        """Work on another model from now on."""
        if spec != self._spec:
            self._spec, self._runner = spec, None

    def close(self) -> None:
        """Let go of the model."""
        self._runner = None
