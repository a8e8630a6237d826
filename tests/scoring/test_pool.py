"""The replica pool against the same estimators run in this process: any number of replicas, dying ones included,
gives the same numbers to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scoring.cluster import Footprint, how_many_fit, versions
from scoring.errors import UserError
from scoring.load import load_model
from scoring.mrd import ESTIMATORS, Draws, Request, estimate
from scoring.pool import ReplicaPool
from scoring.replica import LostPerturbation, TransformersReplica
from scoring.samples import Batch, make_batches
from scoring.work import DrawTask, ReplicaSpec
from tests.processes import kill, replicas, wait_for
from tests.tiny_models import random_samples

pytestmark = pytest.mark.usefixtures("cluster")

SIGMA, SEED, DRAWS = 1e-3, 7, 6
ONE_CORE = Footprint(cpus=1)


@pytest.fixture(scope="module")
def spec(model_folder: Path) -> ReplicaSpec:
    return ReplicaSpec(str(model_folder))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in a replica of one core: the number of threads can change the order of a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("environment", [{}, {"RAY_ADDRESS": "somewhere:6379"}], ids=["local", "cluster"])
def test_workers_of_a_local_cluster_have_this_python(environment: dict[str, str]) -> None:
    """Also under `uv run`, which Ray would start for each of them again; a cluster says it itself."""
    script = "import scoring.cluster, ray._private.ray_constants as c; print(c.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", script], env=bare | environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(bool(environment))], done.stderr


def groups(seed: int = 0) -> list[list[Batch]]:
    """Several batches a group, several groups."""
    batches = make_batches(random_samples(16, seed), batch_tokens=60)
    assert len(batches) >= 4
    return [batches[:2], batches[2:3], batches[3:]]


def in_this_process(folder: Path, shards: Sequence[Sequence[Batch]], estimator: str) -> list[Draws]:
    replica = TransformersReplica(load_model(folder))
    return [estimate(replica, shard, Request(estimator, SIGMA, SEED, 0, DRAWS)) for shard in shards]


def cut(estimator: str, first_shard: int, shards: int, draws_per_task: int) -> list[DrawTask]:
    step = draws_per_task if ESTIMATORS[estimator].default_draws else DRAWS
    return [
        DrawTask(first_shard + shard, Request(estimator, SIGMA, SEED, first, min(first + step, DRAWS)))
        for shard in range(shards)
        for first in range(0, DRAWS, step)
    ]


def join(tasks: Sequence[DrawTask], results: dict[str, Draws], shard: int) -> Draws:
    pieces = [results[task.key] for task in tasks if task.shard == shard]
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole.followed_by(piece)
    return whole


def assert_same(found: Draws, expected: Draws) -> None:
    for name in ("indices", "values", "nll", "saturated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), strict=True)


# Draws a task: all at once, one by one, and a cut that leaves a remainder.
@pytest.mark.parametrize(("count", "draws_per_task"), [(1, DRAWS), (2, 1), (3, 4)])
@pytest.mark.usefixtures("one_thread")
def test_bitwise_the_same_as_in_this_process(
    spec: ReplicaSpec, model_folder: Path, count: int, draws_per_task: int
) -> None:
    """All estimators in one run: each has a copy of the shards of its own."""
    own = groups()
    shards = own * len(ESTIMATORS)
    tasks = [
        task
        for number, estimator in enumerate(ESTIMATORS)
        for task in cut(estimator, number * len(own), len(own), draws_per_task)
    ]
    with ReplicaPool(spec, ONE_CORE, count) as pool:
        results = {task.key: draws for task, draws, _ in pool.run(tasks, shards)}
        assert len(replicas(os.getpid())) == count
    assert len(results) == len(tasks)
    for number, estimator in enumerate(ESTIMATORS):
        for shard, expected in enumerate(in_this_process(model_folder, own, estimator)):
            assert_same(join(tasks, results, number * len(own) + shard), expected)


@pytest.mark.usefixtures("one_thread")
def test_a_second_run_of_a_pool_is_about_its_own_samples(spec: ReplicaSpec, model_folder: Path) -> None:
    """Shard 0 of the second run is not shard 0 of the first, whatever the replicas remember."""
    with ReplicaPool(spec, ONE_CORE, 1) as pool:
        for seed in (0, 1):
            shards = groups(seed)[:1]
            ((_, found, _),) = pool.run(cut("monte-carlo", 0, 1, DRAWS), shards)
            assert_same(found, in_this_process(model_folder, shards, "monte-carlo")[0])


@pytest.mark.usefixtures("one_thread")
def test_killed_replicas_are_replaced_and_change_nothing(spec: ReplicaSpec, model_folder: Path) -> None:
    shards = groups()
    tasks = cut("monte-carlo", 0, len(shards), 1)
    with ReplicaPool(spec, ONE_CORE, 2) as pool:
        results, killed = {}, []
        for task, draws, _ in pool.run(tasks, shards):
            results[task.key] = draws
            # After the third of 18 results every replica at once, then one again.
            if len(results) in (3, 10):
                dying = replicas(os.getpid())[: 2 if len(results) == 3 else 1]
                assert dying
                killed += dying
                for pid in dying:
                    kill(pid)
        assert set(results) == {task.key for task in tasks}
        # The third may still have been loading: then the other can finish before anyone misses it.
        assert len(killed) - 1 <= pool.replaced <= len(killed)
        assert not set(replicas(os.getpid())) & set(killed)
    for shard, expected in enumerate(in_this_process(model_folder, shards, "monte-carlo")):
        assert_same(join(tasks, results, shard), expected)


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return os._exit, (1,)


def test_a_task_that_kills_every_replica_ends_in_one_error(spec: ReplicaSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scoring.pool.MAX_ATTEMPTS", 2)
    shards: list[list[Any]] = [list(groups()[0]), [Deadly()]]
    tasks = [DrawTask(shard, Request("gradient", SIGMA, SEED)) for shard in range(2)]
    with ReplicaPool(spec, ONE_CORE, 1) as pool:
        with pytest.raises(UserError, match=r"2 replicas died on the same 1 batch.*batch_tokens") as e:
            list(pool.run(tasks, shards))
        assert pool.replaced == 2
    assert "\n" not in str(e.value)


def test_replicas_that_die_while_loading_end_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scoring.pool.MAX_ATTEMPTS", 2)
    deadly: Any = Deadly()
    with (
        ReplicaPool(ReplicaSpec(deadly), ONE_CORE, 1) as pool,
        pytest.raises(UserError, match="die while loading") as e,
    ):
        list(pool.run([DrawTask(0, Request("gradient", SIGMA, SEED))], groups()[:1]))
    assert "\n" not in str(e.value)


def test_a_replica_that_refuses_raises_its_own_error_and_leaves_the_pool_usable(model_folder: Path) -> None:
    """bfloat16 does not hold a perturbation of 1e-5; the gradient needs none."""
    shards = groups()[:1]
    with ReplicaPool(ReplicaSpec(str(model_folder), dtype="bfloat16"), ONE_CORE, 1) as pool:
        with pytest.raises(LostPerturbation, match="bfloat16"):
            list(pool.run([DrawTask(0, Request("monte-carlo", 1e-5, SEED, 0, 2))], shards))
        ((_, draws, facts),) = pool.run([DrawTask(0, Request("gradient", 1e-5, SEED))], shards)
    assert np.isfinite(draws.values).all()
    assert facts.gradient_error is not None
    wait_for(lambda: not replicas(os.getpid()))


def test_a_node_with_other_packages_is_refused(spec: ReplicaSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica's process has the true ones. A build for CPUs is the same version as one for GPUs."""
    own = versions()
    assert own["torch"] == torch.__version__.partition("+")[0]
    monkeypatch.setattr("scoring.pool.versions", lambda: own | {"torch": "1.0.0"})
    with (
        ReplicaPool(spec, ONE_CORE, 1) as pool,
        pytest.raises(UserError, match=rf"^node \S+ has torch {own['torch']} \(the driver has 1.0.0\): install") as e,
    ):
        list(pool.run([DrawTask(0, Request("gradient", SIGMA, SEED))], groups()[:1]))
    assert "\n" not in str(e.value)


def test_how_many_fit_counts_whole_replicas() -> None:
    assert how_many_fit(Footprint(cpus=1)) == 4
    assert how_many_fit(Footprint(cpus=3)) == 1
    with pytest.raises(UserError, match="5 CPU and 0 GPU fits on no node"):
        how_many_fit(Footprint(cpus=5))
    with pytest.raises(UserError, match="1 CPU and 64 GPU fits on no node"):
        how_many_fit(Footprint(cpus=1, gpus=64))
