"""What tests share: one local Ray, a tiny model folder, a data file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything reads them. No test reaches the network, and replicas take one thread whatever the machine has.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# Ray and models are imported by the fixtures: the process that only hands tests out to others needs neither.

# A number of cores that Ray believes in: three replicas run side by side on any machine.
LOGICAL_CPUS = 4


@pytest.fixture(autouse=True)
def threads_stay() -> Iterator[None]:
    """Sums depend on the number of threads in their last bits: a test that leaves another would fail others."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if torch and before:
        after = torch.get_num_threads()
        torch.set_num_threads(before)
        assert after == before, "the test left another number of threads than it met"


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A private local Ray, started by the code under test, for the whole session."""
    import ray

    from scoring.cluster import connect

    os.environ.pop("RAY_ADDRESS", None)
    connect(num_cpus=LOGICAL_CPUS)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its tokenizer; not to be changed."""
    from tests.tiny_folders import save_model

    return save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 prompt-completion pairs of random words; not to be changed."""
    from tests.tiny_folders import pairs, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs(24))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who uses the shared Ray needs Ray, and who uses the browser a browser."""
    for item in items:
        for fixture, marker in (("cluster", pytest.mark.ray), ("browser", pytest.mark.browser)):
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
