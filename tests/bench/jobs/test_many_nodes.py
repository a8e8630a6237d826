"""Real clusters of several nodes on this machine: the same results, whatever node is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT


@pytest.mark.ray
@pytest.mark.parametrize("program", ["scoring", "joining", "unlearning", "sweeping"])
def test_nodes_come_and_go(program: str, model_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.many_nodes", program, str(model_folder), str(tmp_path)],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
