"""What tests share: one local Ray, a tiny model folder, a data file."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything reads them. No test reaches the network, and replicas take one thread whatever the machine has.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

if TYPE_CHECKING:
    from tests.browser import Browser

# Ray and models are imported by the fixtures: the process that only hands tests out to others needs neither.

# A number of cores that Ray believes in: three replicas run side by side on any machine.
LOGICAL_CPUS = 4


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No test leaves another number of threads, on which the last bits of sums depend, nor a plugin, which is in the
    identity of all runs of its process: other tests would fail by it."""
    before = _left_behind()
    yield
    after = _left_behind()
    if before[0] and after[0] != before[0]:
        sys.modules["torch"].set_num_threads(before[0])
    assert not before[0] or after[0] == before[0], "the test left another number of threads than it met"
    assert after[1] == before[1], "the test left a plugin loaded"


def _left_behind() -> tuple[int | None, tuple[str, ...]]:
    """Threads of torch, None where it is not loaded yet; and the names of the loaded plugins."""
    torch, plugins = sys.modules.get("torch"), sys.modules.get("scoring.plugins")
    return (
        torch.get_num_threads() if torch else None,
        tuple(plugin.name for plugin in plugins.loaded_plugins()) if plugins else (),
    )


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


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium; the tests that need it are skipped without one."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromedriver; Debian has them in chromium and chromium-driver")
    from tests.browser import Browser

    made = Browser()
    yield made
    made.driver.quit()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who uses the shared Ray needs Ray, and who uses the browser a browser."""
    for item in items:
        for fixture, marker in (("cluster", pytest.mark.ray), ("browser", pytest.mark.browser)):
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
