"""Joining a Ray cluster or starting a local one, and how much fits on it. Ray is imported only when it is needed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from scoring.errors import UserError, first_line
from scoring.settings import named

JOIN_TIMEOUT_S = 60.0
# The packages that results depend on. Ray itself refuses nodes with another version of Ray or Python.
PACKAGES = ("torch", "transformers", "numpy")


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names (as under `ray job submit`), else start a private local one.

    A local cluster is requested by name: a bare `ray.init()` would follow the address file of a dead cluster and
    wait for it.

    Args:
        num_cpus: cores of a local cluster; all by default. Ignored when joining one.

    Raises:
        UserError: the cluster does not answer within a minute, or cannot be started.
    """
    # Ray takes SIGTERM for itself where it is imported: it would abort with the stack of its C++ side.
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _connect(num_cpus)
    finally:
        if threading.current_thread() is threading.main_thread() and on_sigterm is not None:
            signal.signal(signal.SIGTERM, on_sigterm)


def _connect(num_cpus: int | None) -> None:
    import ray

    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        _join(address)
        return
    # Silences a note about a future default for GPUs; replicas choose their device themselves.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # By default Ray's workers are nice and get next to nothing on a machine that others use too.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # In this thread, not in one of its own: the processes of a local cluster end with the thread that started them.
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        raise UserError(f"a local Ray cluster could not be started: {first_line(error)}") from error


def _join(address: str) -> None:
    """Join a running cluster.

    A separate process checks first whether the cluster answers: an attempt that hangs inside Ray cannot be cancelled,
    and leaving it behind in a thread may crash this process at its end.
    """
    cluster = f"the Ray cluster at RAY_ADDRESS={address}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        check = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=JOIN_TIMEOUT_S
        )
        answers, reason = check.returncode == 0, (check.stderr.strip().splitlines() or [""])[-1]
    except subprocess.TimeoutExpired:
        answers, reason = False, f"nothing within {JOIN_TIMEOUT_S:.0f} s"
    import ray

    if not answers:
        raise UserError(
            f"{cluster} did not answer ({reason or 'not healthy'}): check that its head is running, or unset "
            "RAY_ADDRESS to run locally"
        )
    try:
        ray.init(logging_level=logging.ERROR)
    except Exception as error:
        raise UserError(f"{cluster} cannot be joined: {first_line(error)}; unset RAY_ADDRESS to run locally") from error


@dataclass(frozen=True)
class Footprint:
    """What one replica or worker occupies: CPU cores (and as many threads) and GPUs."""

    cpus: int = 1
    gpus: float = 0.0

    def device(self) -> str:
        """The device of a model, as `scoring.load.load_model` takes it."""
        return "cpu" if not self.gpus else "cuda" if self.gpus <= 1 else "auto"

    def ray_options(self) -> dict[str, Any]:
        """Keyword arguments for `.options()` of an actor or task. The default scheduling strategy keeps what a trial
        of a sweep starts out of the trial's own placement group."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "scheduling_strategy": "DEFAULT"}


def versions() -> dict[str, str]:
    """The versions of `PACKAGES` in this process, without "+cpu" and the like: a head node may lack GPUs."""
    return {name: version(name).partition("+")[0] for name in PACKAGES}


def check_versions(driver_versions: Mapping[str, str]) -> None:
    """Refuse to work on a node whose packages differ from the driver's.

    Raises:
        UserError: one line that names node, package and both versions.
    """
    import ray

    here = versions()
    different = [name for name in here if here[name] != driver_versions[name]]
    if different:
        differences = ", ".join(f"{name} {here[name]} (the driver has {driver_versions[name]})" for name in different)
        raise UserError(
            f"node {ray.util.get_node_ip_address()} has {differences}: install the same versions on all nodes, as "
            "constraints.txt pins them"
        )


def default_gpus() -> float:
    """GPUs of a replica when the user names none: 1 if the cluster has any, else 0."""
    import ray

    return 1.0 if ray.cluster_resources().get("GPU", 0.0) >= 1 else 0.0


# What a number of GPUs may be, in words.
GPU_SHARE = "a fraction of one GPU, or a whole number"


def is_gpu_share(gpus: float) -> bool:
    """Whether Ray can assign so many GPUs: a fraction of one, or a whole number."""
    return 0 <= gpus <= 1 or (gpus > 1 and gpus % 1 == 0)


def how_many_fit(footprint: Footprint, kind: Literal["replica", "worker", "trial"] = "replica") -> int:
    """How many replicas (workers, trials) fit on the cluster as it is now, counted node by node.

    Raises:
        UserError: no single node can hold one. (Ray itself would wait for such a node forever.)
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = 0
    for resources in nodes:
        room = int(resources.get("CPU", 0.0) // footprint.cpus)
        if footprint.gpus:
            room = min(room, int(resources.get("GPU", 0.0) / footprint.gpus))
        fits += room
    if fits == 0:
        largest = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
        cores = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
        raise UserError(
            f"a {kind} of {footprint.cpus} CPU and {footprint.gpus:g} GPU fits on no node: the largest of "
            f"{len(nodes)} node(s) has {cores:g} CPU and {largest:g} GPU; lower "
            f"{named(f'cpus_per_{kind}')} or {named(f'gpus_per_{kind}')}, or add a node"
        )
    return fits
