"""Programs that work on a cluster of several nodes, some of which are lost on the way; `test_many_nodes` runs each in a
process of its own, since a process is on one cluster at a time. Usage: python -m tests.many_nodes NAME MODEL FOLDER."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from bench.jobs.resources import SweepResources
from bench.jobs.sweep import sweep
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.sweep_tables import SweepResult
from bench.jobs.unlearn import UnlearnSpec, unlearn
from scoring.cluster import Footprint, connect, how_many_fit
from scoring.errors import UserError
from scoring.pool import ReplicaPool
from scoring.settings import build
from scoring.work import ReplicaSpec
from tests.algorithms.test_ray_train import TOLERANCE, assert_close
from tests.bench.jobs.test_sweep import Inputs, timeless
from tests.processes import wait_for
from tests.scoring.test_pool import assert_same, cut, groups, in_this_process, join
from tests.tiny_folders import pairs, write_jsonl

# A lost node is noticed by the health check, by default after half a minute.
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 6}


@contextmanager
def nodes(*cpus: int) -> Iterator[tuple[Cluster, list[Any]]]:
    """This process on a cluster of a head without cores and nodes with so many."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": QUICK})
    try:
        added = [cluster.add_node(num_cpus=count) for count in cpus]
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = cluster.address
        connect()
        yield cluster, added
    finally:
        ray.shutdown()
        cluster.shutdown()


def meanwhile(work: Callable[[], Any], reached: Callable[[], bool], action: Callable[[], None]) -> Any:
    """What `work` gives; as soon as something is reached, the action, here: only a main thread may start nodes."""
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(work)
        wait_for(lambda: reached() or result.done(), 120)
        assert not result.done(), result.result()
        action()
        return result.result()


class Where:
    """A work that says where it was done, and takes its time."""

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.key = str(shard)

    def do(self, replica: Any, batches: Sequence[Any], kept: dict[str, Any]) -> str:
        time.sleep(0.3)
        return ray.get_runtime_context().get_node_id()


def scoring(model: Path, folder: Path) -> None:
    """Replicas on one node, which is lost; two nodes join in its place."""
    with nodes(3) as (cluster, (node,)):
        shards = groups()
        tasks = cut("monte-carlo", 0, len(shards), 1)
        results = {}
        with ReplicaPool(ReplicaSpec(str(model)), Footprint(cpus=1), 2) as pool:
            for task, draws, _ in pool.run(tasks, shards):
                results[task.key] = draws
                if len(results) == 3:
                    cluster.remove_node(node, allow_graceful=False)
                    for _ in range(2):
                        cluster.add_node(num_cpus=1)
        for shard, expected in enumerate(in_this_process(model, shards, "monte-carlo")):
            assert_same(join(tasks, results, shard), expected)
        assert pool.replaced >= 1
        # Two cores are there, on two nodes: no room for a replica of two.
        assert how_many_fit(Footprint(cpus=1)) == 2
        with pytest.raises(UserError, match="fits on no node"):
            how_many_fit(Footprint(cpus=2))


def joining(model: Path, folder: Path) -> None:
    """Three replicas are wanted, one fits. Nodes that join, one of them after another has been lost, are given work."""
    with nodes(1) as (cluster, (first,)):
        nodes_seen: list[str] = []
        # Far more tasks than it takes until all three nodes have done one, however slow this machine is.
        tasks = [Where(number) for number in range(400)]
        with ReplicaPool(ReplicaSpec(str(model)), Footprint(cpus=1), 3) as pool:
            for _, node, _ in pool.run(tasks, [[] for _ in tasks]):
                if node in nodes_seen:
                    continue
                nodes_seen.append(node)
                if node == first.node_id:
                    joined = [cluster.add_node(num_cpus=1)]
                elif len(joined) == 1:
                    cluster.remove_node(first, allow_graceful=False)
                    joined.append(cluster.add_node(num_cpus=1))
                else:
                    break
        assert nodes_seen == [first.node_id, *(node.node_id for node in joined)]


def unlearning(model: Path, folder: Path) -> None:
    """Two workers on two nodes of one core; one is lost, and another joins in its place."""
    spec = UnlearnSpec(
        model=str(model),
        task=str(write_jsonl(folder / "forget.jsonl", pairs(12))),
        retain=str(write_jsonl(folder / "retain.jsonl", pairs(6, seed=1))),
        algorithm="GradDiff",
        epochs=4,
        batch_size=3,
        learning_rate=1e-4,
        el_n=2,
        checkpoint_every=1,
        evaluate_samples=5,
        stopping="paper",
        workers=0,
    )
    torch.set_num_threads(1)
    alone = unlearn(spec, folder / "alone", progress=False)
    with nodes(1, 1) as (cluster, (_, second)):

        def replace() -> None:
            cluster.remove_node(second, allow_graceful=False)
            cluster.add_node(num_cpus=1)

        run = folder / "run"

        def half_way() -> bool:
            return any(int(path.name.removeprefix("step-")) >= 5 for path in run.glob("checkpoints/step-*"))

        two = dataclasses.replace(spec, workers=2)
        found = meanwhile(lambda: unlearn(two, run, progress=False), half_way, replace)
    assert_close(found, alone, TOLERANCE)


def sweeping(model: Path, folder: Path) -> None:
    """Trials on two nodes; one is lost while it works, and nothing joins in its place."""
    for name in ("there", "here"):
        (folder / name).mkdir()
    inputs = Inputs(folder / "there", model)
    fields = inputs.spec(vary={"algorithm": ["GA", "NPO"], "seed": [0, 1]})
    spec = build(SweepSpec, fields)

    def swept(place: str, concurrent: int) -> SweepResult:
        resources = SweepResources(concurrent=concurrent)
        return sweep(spec, folder / place / "out", folder / place / "trials", resources, progress=False)

    with nodes(1, 1) as (cluster, (_, second)):

        def some() -> bool:
            return len(list((folder / "there" / "trials").glob("*.json"))) >= 2

        disturbed = meanwhile(
            lambda: swept("there", 2), some, lambda: cluster.remove_node(second, allow_graceful=False)
        )
    undisturbed = swept("here", 0)
    assert disturbed.record["counts"] == undisturbed.record["counts"] == {"finished": 8}
    assert timeless(disturbed.folder) == timeless(undisturbed.folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {each.__name__: each for each in (scoring, joining, unlearning, sweeping)}[sys.argv[1]](*map(Path, sys.argv[2:]))
