"""Joining a Ray cluster, or starting one here; and what fits on it. Ray is loaded when it is needed first."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from scoring.errors import UserError, first_line
from scoring.settings import named

JOIN_TIMEOUT_S = 60.0
# On which numbers depend; that Ray and Python are the same everywhere Ray sees to itself.
PACKAGES = ("torch", "transformers", "numpy")


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names (as under `ray job submit`), else start a private local one.

    A private one is asked for by name: a bare `ray.init()` would follow the address file of a dead cluster and
    wait for it.

    Args:
        num_cpus: size of a local cluster; all cores by default. Ignored when joining one.

    Raises:
        UserError: the cluster does not answer within a minute, or cannot be started.
    """
    import ray

    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        _join(address)
        return
    # Silences a note about a future default for GPUs; replicas choose their device themselves.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # In this thread: the processes of a local cluster end with the thread that started them.
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

    Whether it answers is asked in a process of its own: an attempt that hangs in Ray cannot be taken back, and a
    process that leaves one behind in a thread may crash when it ends.
    """
    where = f"the Ray cluster at RAY_ADDRESS={address}"
    ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        asked = subprocess.run(ask, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=JOIN_TIMEOUT_S)
        answers, why = asked.returncode == 0, (asked.stderr.strip().splitlines() or [""])[-1]
    except subprocess.TimeoutExpired:
        answers, why = False, f"nothing within {JOIN_TIMEOUT_S:.0f} s"
    import ray

    if not answers:
        raise UserError(
            f"{where} did not answer ({why or 'not healthy'}): check that its head is running, or unset RAY_ADDRESS "
            "to run locally"
        )
    try:
        ray.init(logging_level=logging.ERROR)
    except Exception as error:
        raise UserError(f"{where} cannot be joined: {first_line(error)}; unset RAY_ADDRESS to run locally") from error


@dataclass(frozen=True)
class Footprint:
    """What one replica takes: CPU cores (= threads) and GPUs."""

    cpus: int = 1
    gpus: float = 0.0

    def device(self) -> str:
        """Where a model of this footprint goes, as `scoring.replica.load_model` takes it."""
        return "cpu" if not self.gpus else "cuda" if self.gpus <= 1 else "auto"

    def ray_options(self) -> dict[str, Any]:
        """For `.options()` of an actor or task: a place of its own, also where a trial of a sweep asks for it."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "scheduling_strategy": "DEFAULT"}


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on, here; without "+cpu" and the like, as a head may lack GPUs."""
    return {name: version(name).partition("+")[0] for name in PACKAGES}


def check_versions(driver_versions: Mapping[str, str]) -> None:
    """Refuse to work on a node whose packages are others than the driver's.

    Raises:
        UserError: one line that names node, package and both versions.
    """
    import ray

    here = versions()
    different = [name for name in here if here[name] != driver_versions[name]]
    if different:
        found = ", ".join(f"{name} {here[name]} (the driver has {driver_versions[name]})" for name in different)
        raise UserError(
            f"node {ray.util.get_node_ip_address()} has {found}: install the same versions on all nodes, as "
            "constraints.txt pins them"
        )


def default_gpus() -> float:
    """GPUs of a replica when none are named: one where the cluster has any."""
    import ray

    return 1.0 if ray.cluster_resources().get("GPU", 0.0) >= 1 else 0.0


def is_gpu_share(gpus: float) -> bool:
    """Whether Ray can give it: it shares one GPU in fractions, and gives several whole."""
    return 0 <= gpus <= 1 or (gpus > 1 and gpus % 1 == 0)


def how_many_fit(footprint: Footprint, what: str = "replica") -> int:
    """Replicas (or workers) that fit on the cluster as it is now, node by node.

    Raises:
        UserError: no single node can hold one. (Ray itself would wait for such a node for ever.)
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
            f"a {what} of {footprint.cpus} CPU and {footprint.gpus:g} GPU fits on no node: the largest of "
            f"{len(nodes)} node(s) has {cores:g} CPU and {largest:g} GPU; lower "
            f"{named(f'cpus_per_{what}')} or {named(f'gpus_per_{what}')}, or add a node"
        )
    return fits
