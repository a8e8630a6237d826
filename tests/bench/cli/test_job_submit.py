"""`ray job submit --working-dir .` against a real head: what is run, what comes back, what is sent."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from bench.cli import main
from tests.paths import ROOT
from tests.processes import descendants, kill, wait_for

pytestmark = pytest.mark.ray

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Head:
    """A cluster of one node with a dashboard, in processes of its own."""

    def __init__(self) -> None:
        # Sockets lie in there, and their paths must be short.
        self.folder = tempfile.mkdtemp(prefix="rj-", dir="/tmp")
        port, dashboard, agent, client = free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
        flags = ["--head", "--block", "--num-cpus", "2", "--disable-usage-stats", "--temp-dir", self.folder]
        flags += ["--port", str(port), "--dashboard-port", str(dashboard), "--include-dashboard", "true"]
        flags += ["--dashboard-agent-listen-port", str(agent), "--ray-client-server-port", str(client)]
        self.process = subprocess.Popen(
            [*RAY, "start", *flags], env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(self._answers, 120)

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the head has ended"
        time.sleep(0.5)
        with suppress(OSError), urllib.request.urlopen(f"{self.address}/api/version", timeout=5) as answer:
            return answer.status == 200
        return False

    def submit(self, arguments: Sequence[str], working_dir: Path = ROOT) -> tuple[int, str]:
        """Exit code and all that was printed, as the user sees it."""
        command = [*RAY, "job", "submit", "--address", self.address, "--working-dir", str(working_dir)]
        done = subprocess.run(
            [*command, "--", sys.executable, "-m", "bench.cli", *arguments],
            env=self.env,
            cwd=working_dir,
            capture_output=True,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout + done.stderr

    def stop(self) -> None:
        # At once: when it is asked to end, it takes half a minute over it.
        for pid in (self.process.pid, *descendants(self.process.pid)):
            kill(pid)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    started = Head()
    yield started
    started.stop()


def test_score(head: Head, model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """The same file as here; its end arrives on the terminal."""
    arguments = ["score", "--model", str(model_folder), "--data", str(data_file), "--estimator", "gradient"]
    code, printed = head.submit([*arguments, "--replicas", "1", "--out", str(tmp_path / "job.parquet")])
    assert code == 0, printed
    assert str(tmp_path / "job.parquet") in printed
    assert main([*arguments, "--replicas", "0", "--out", str(tmp_path / "here.parquet")]) == 0
    job, here = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("job", "here"))
    assert job.replace_schema_metadata() == here.replace_schema_metadata()


def test_unlearn(head: Head, model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    arguments = ["unlearn", "--model", str(model_folder), "--task", str(data_file), "--algorithm", "GA"]
    arguments += ["--epochs", "1", "--el-n", "2", "--workers", "1", "--out", str(tmp_path / "run")]
    code, printed = head.submit(arguments)
    assert code == 0, printed
    assert (tmp_path / "run" / "run.json").is_file()
    assert list((tmp_path / "run" / "model").glob("*.safetensors"))


def test_sweep_and_leaderboard(head: Head, model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    spec = {
        "base": {"model": str(model_folder), "task": str(data_file), "epochs": 1, "el_n": 2},
        "vary": {"algorithm": ["GA", "NPO"]},
        "selections": [{"kind": "random", "size": 6, "count": 3}],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(spec))
    store = tmp_path / "store"
    arguments = ["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--concurrent", "1"]
    code, printed = head.submit([*arguments, "--results", str(store)])
    assert code == 0, printed
    assert "6 runs" in printed
    code, printed = head.submit(["leaderboard", str(store), "--out", str(tmp_path / "board")])
    assert code == 0, printed
    assert "6 runs on 1 boards" in printed
    assert (tmp_path / "board" / "index.html").is_file()


def test_a_mistake_fails_the_job_with_its_line(head: Head, tmp_path: Path) -> None:
    code, printed = head.submit(
        ["score", "--model", "nowhere/at all", "--data", "authors", "--out", str(tmp_path / "x")]
    )
    assert code == 1  # Ray's own, of any job that failed
    assert "mrd-bench: error: " in printed
    assert "exit code 2" in printed
    assert "Traceback" not in printed.split("mrd-bench: error: ")[1].splitlines()[0]
    assert list(tmp_path.iterdir()) == []


def test_build_output_stays_here(head: Head, tmp_path: Path) -> None:
    """What git ignores is not sent: neither environments nor results."""
    project = tmp_path / "project"
    (project / "bench").mkdir(parents=True)
    shutil.copy(ROOT / ".gitignore", project / ".gitignore")
    (project / "bench" / "__init__.py").write_text("")
    (project / "bench" / "cli.py").write_text(
        "import pathlib\nprint('sent:', sorted(str(p) for p in pathlib.Path('.').rglob('*') if p.is_file()))\n"
    )
    for name in (".venv/lib/large.bin", "demo/index.html", "scores.parquet.parts/0.parquet", "bench/__pycache__/x.pyc"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(b"0" * 1000)
    code, printed = head.submit([], project)
    assert code == 0, printed
    (sent,) = [line for line in printed.splitlines() if line.startswith("sent:")]
    assert "'bench/cli.py'" in sent
    for name in (".venv", "demo/", "parts", "__pycache__/x"):
        assert name not in sent
