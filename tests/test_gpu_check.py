"""`make gpu-check` on parts that pass, fail, hang and lack something."""

from __future__ import annotations

import json
import os
import runpy
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.paths import ROOT

CHECK = runpy.run_path(str(ROOT / "deploy" / "gpu_check.py"))


def result_of(figures: Path, arguments: list[str], reads: str = "read_figures", **settings: Any) -> dict[str, Any]:
    part = CHECK["Part"]("part", settings.get("seconds", 30), arguments, settings.get("needs", []), CHECK[reads])
    result: dict[str, Any] = CHECK["run_part"](part, dict(os.environ), figures, settings.get("left", 30))
    return result


def test_parts_end_each_by_itself(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    figures.write_text('{"of": "the part before"}')
    passed = result_of(figures, ["-c", f"open({str(figures)!r}, 'w').write('{{\"seconds\": 2}}')"])
    assert (passed["outcome"], passed["figures"]) == ("passed", {"seconds": 2})
    failed = result_of(figures, ["-c", "raise RuntimeError('no kernel image')"])
    assert (failed["outcome"], failed["why"]) == ("failed", "RuntimeError: no kernel image")
    assert "figures" not in failed
    damaged = result_of(figures, ["-c", f"open({str(figures)!r}, 'w').write('{{')"])
    assert damaged["outcome"] == "failed"
    missing = result_of(figures, ["-c", ""], needs=["json", "no_such_package"])
    assert missing == {"outcome": "skipped", "why": "not installed: no_such_package"}
    assert result_of(figures, ["-c", ""], left=0) == {"outcome": "skipped", "why": "no time was left"}


def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    hangs = f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(child)!r}, "w").write(str(child.pid))
        time.sleep(60)
    """
    result = result_of(tmp_path / "figures.json", ["-c", textwrap.dedent(hangs)], seconds=3)
    assert (result["outcome"], result["why"]) == ("stopped", "took longer than 3 s")
    process = int(child.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_tests_are_counted_also_when_they_are_stopped(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import time\n\ndef test_good(): pass\n\ndef test_bad(): assert 1 == 2\n\ndef test_slow(): time.sleep(60)\n"
    )
    command = [*CHECK["TESTS"], str(tmp_path), "--rootdir", str(tmp_path)]
    done = result_of(tmp_path / "figures.json", [*command, "-k", "not slow"], "read_tests")
    assert (done["outcome"], done["tests"]) == ("failed", {"failed": 1, "passed": 1})
    (failure,) = done["failures"]
    assert "test_bad" in failure
    assert "assert 1 == 2" in failure
    stopped = result_of(tmp_path / "figures.json", command, "read_tests", seconds=5)
    assert (stopped["outcome"], stopped["tests"]) == ("stopped", {"failed": 1, "passed": 1})


def test_without_a_gpu_there_is_nothing_to_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch

    assert {part.name for part in CHECK["parts_for"]("cuda", tmp_path)} >= {"tests", "benchmark gpu"}
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "out.json"
    assert CHECK["main"](["--out", str(out)]) == 2
    assert "torch sees no CUDA GPU" in capsys.readouterr().err
    assert not out.exists()
    json.dumps(CHECK["machine"]("cpu"))
