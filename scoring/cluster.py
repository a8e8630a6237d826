"""Joining a Ray cluster, or starting one here; and what fits on it."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

import ray

from scoring.errors import UserError

START_TIMEOUT_S = 60.0


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names (as under `ray job submit`), else start a private local one.

    A private one is asked for by name: a bare `ray.init()` would follow the address file of a dead cluster and
    wait for it. A start that takes more than a minute is an error.

    Args:
        num_cpus: size of a local cluster; all cores by default. Ignored when joining one.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    options: dict = {"logging_level": "ERROR"}
    if not address:
        options |= {
            "address": "local",
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "log_to_driver": False,
        }
        # Silences a note about a future default for GPUs; replicas choose their device themselves.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    failure: list[BaseException] = []

    def start() -> None:
        try:
            ray.init(**options)
        except BaseException as error:
            failure.append(error)

    # A hanging start cannot be interrupted from within; a daemon thread can be left behind.
    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join(START_TIMEOUT_S)
    where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "a local Ray cluster"
    if thread.is_alive():
        raise UserError(
            f"{where} did not answer within {START_TIMEOUT_S:.0f} s: check that its head is running, "
            "or unset RAY_ADDRESS to run locally"
        )
    if failure:
        reason = (str(failure[0]).strip() or type(failure[0]).__name__).splitlines()[0]
        raise UserError(f"could not connect to {where}: {reason}")


@dataclass(frozen=True)
class Footprint:
    """What one replica takes: CPU cores (= threads) and GPUs."""

    cpus: int = 1
    gpus: float = 0.0

    def ray_options(self) -> dict[str, float]:
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


def how_many_fit(footprint: Footprint) -> int:
    """Replicas that fit on the cluster as it is now, node by node.

    Raises:
        UserError: no single node can hold one. (Ray itself would wait for such a node for ever.)
    """
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
            f"a replica of {footprint.cpus} CPU and {footprint.gpus:g} GPU fits on no node: the largest of "
            f"{len(nodes)} node(s) has {cores:g} CPU and {largest:g} GPU; lower --cpus-per-replica or "
            "--gpus-per-replica, or add a node"
        )
    return fits
