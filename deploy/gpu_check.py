"""What this project does on the GPU of a machine, in one file of figures: `make gpu-check`.

    python3 deploy/gpu_check.py [--out FILE] [--device cpu]

Every part is a process of its own with a limit in time. A part that fails, takes too long or lacks a package is an
entry in the file like the others, and the next one begins; the file is written anew after each. All of it takes less
than eight minutes. Where there is a folder of wheels (`deploy/carry_wheels.sh`), they are first installed from it into
a temporary folder, without a network, so that Python and torch are all that has to be there.

With `--device cpu` the same parts run small and without a GPU, to try this file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "wheels"
RESULTS = ROOT / "results" / "gpu"
# Of all parts together, in seconds: eight minutes less what installing takes.
BUDGET = 440.0
INSTALLING = 120.0
# Those whose versions are noted, beside what the figures of benchmarks say.
PACKAGES = ("torch", "transformers", "numpy", "pyarrow", "ray", "vllm")
# Characters of an error that are kept.
LONGEST_LINE = 300

TESTS = ("-m", "pytest", "-o", "addopts=", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider")
OUTCOME = re.compile(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
SUMMARY = re.compile(r"^(?:FAILED|ERROR) (\S+::.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        name: in the file.
        seconds: that it may take.
        arguments: of Python.
        needs: packages without which it is skipped.
        read: what to keep of its output and of the file that it was to write, if it did.
    """

    name: str
    seconds: float
    arguments: Sequence[str]
    needs: Sequence[str]
    read: Callable[[str, Path], dict[str, Any]]


def parts_for(device: str, figures: Path) -> list[Part]:
    """The parts, in their order; what a benchmark measures goes to `figures`."""
    on_gpu = device == "cuda"
    # These files alone: others import packages that may not be there, and none of their tests would be run.
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    ours = [str(path.relative_to(ROOT)) for path in paths if "mark.cuda" in path.read_text(encoding="utf-8")]
    marked = "cuda and" if on_gpu else "not cuda and not slow and"
    benchmark = ["-m", "bench.cli", "benchmark"]
    small = [] if on_gpu else ["--model-params", "2e5", "--samples", "6", "--tokens", "16", "--draws", "20"]
    few = ["--samples", "200" if on_gpu else "4"]
    return [
        Part("tests", 150, [*TESTS, *ours, "-m", f"{marked} not ray and not vllm"], ["pytest"], read_tests),
        Part("benchmark gpu", 170, [*benchmark, "gpu", *small, "--out", str(figures)], [], read_figures),
        Part("tests with Ray", 120, [*TESTS, *ours, "-m", f"{marked} ray and not vllm"], ["pytest", "ray"], read_tests),
        Part(
            "benchmark engines",
            170,
            [*benchmark, "engines", *few, "--out", str(figures)],
            ["ray", "vllm"],
            read_figures,
        ),
    ]


def read_tests(output: str, _: Path) -> dict[str, Any]:
    """How many tests had which outcome, also of a run that was stopped, and the failures in a line each."""
    outcomes = OUTCOME.findall(output)
    counts = {outcome.lower(): outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    return {"tests": counts, "failures": [line[:LONGEST_LINE] for line in SUMMARY.findall(output)]}


def read_figures(_: str, figures: Path) -> dict[str, Any]:
    """What a benchmark measured."""
    return {"figures": json.loads(figures.read_text())} if figures.is_file() else {}


def run_part(part: Part, environment: dict[str, str], figures: Path, left: float) -> dict[str, Any]:
    """Run a part, and say what came of it."""
    search = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if missing := [package for package in part.needs if not is_there(package, search)]:
        return {"outcome": "skipped", "why": f"not installed: {', '.join(missing)}"}
    limit = min(part.seconds, left)
    if limit < 1:
        return {"outcome": "skipped", "why": "no time was left"}
    figures.unlink(missing_ok=True)
    started = time.monotonic()
    # Its output goes to a file, which can be read also if the part is stopped.
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *part.arguments],
            cwd=ROOT,
            env={**environment, "COLUMNS": str(LONGEST_LINE)},  # pytest cuts its lines to fit
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
        log.seek(0)
        output = log.read()
    result: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
    if code is None:
        result |= {"outcome": "stopped", "why": f"took longer than {limit:.0f} s"}
    elif code:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        result |= {"outcome": "failed", "why": (lines[-1] if lines else f"exit code {code}")[:LONGEST_LINE]}
    else:
        result["outcome"] = "passed"
    try:
        result |= part.read(output, figures)
    except ValueError as error:
        result |= {"outcome": "failed", "why": f"its figures cannot be read: {error}"}
    if result["outcome"] != "passed":
        result["end of output"] = output[-4000:]
    return result


def end(process: subprocess.Popen[Any]) -> None:
    """End a part and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def is_there(package: str, search: Sequence[str]) -> bool:
    """Whether a package can be imported, here or from one of these folders."""
    return any((Path(folder) / package).is_dir() for folder in search) or importlib.util.find_spec(package) is not None


def install_wheels(folder: Path) -> dict[str, Any]:
    """Install the wheels that were carried along into a folder; nothing is fetched."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if not wheels:
        return {"outcome": "skipped", "why": f"there is no wheel in {WHEELS.name}/"}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    try:
        done = subprocess.run(
            [*command, "--no-cache-dir", "--disable-pip-version-check", "--target", str(folder), *wheels],
            capture_output=True,
            text=True,
            timeout=INSTALLING,
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "stopped", "why": f"took longer than {INSTALLING:.0f} s"}
    if done.returncode:
        return {"outcome": "failed", "why": done.stderr.strip()[-LONGEST_LINE:]}
    return {"outcome": "passed", "wheels": [Path(wheel).name for wheel in wheels]}


def machine(device: str) -> dict[str, Any]:
    """What this machine is."""
    import torch

    facts: dict[str, Any] = {"card": card(device), "python": platform.python_version(), "cores": os.cpu_count()}
    facts |= {"packages": {name: version_of(name) for name in PACKAGES}, "cuda": torch.version.cuda}
    facts["git_commit"] = output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if device == "cuda":
        facts["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        facts["cards"] = torch.cuda.device_count()
        facts["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def card(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def output_of(*command: str) -> str | None:
    """The first line that a command prints; None if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(unfinished, path)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="the file (default: results/gpu/ and the name of the card)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args(given)
    try:
        import torch
    except ImportError as error:
        print(f"gpu-check: torch cannot be imported here: {error}", file=sys.stderr)
        return 2
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA GPU here", file=sys.stderr)
        return 2
    out: Path = arguments.out or RESULTS / f"{card(arguments.device).lower().replace(' ', '-')}.json"
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mrd-bench-gpu-check-") as folder:
        site, figures = Path(folder) / "site", Path(folder) / "figures.json"
        search = [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, search)),
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        report: dict[str, Any] = {"machine": machine(arguments.device), "parts": {"wheels": install_wheels(site)}}
        write(out, report)
        for part in parts_for(arguments.device, figures):
            print(f"{part.name} ...", flush=True)
            result = run_part(part, environment, figures, BUDGET - (time.monotonic() - started))
            report["parts"][part.name] = result
            report["seconds"] = round(time.monotonic() - started, 1)
            write(out, report)
            told = (result["outcome"], result.get("why"), result.get("tests"))
            print("  " + ", ".join(str(each) for each in told if each), flush=True)
    print(f"written to {out}")
    return int(any(part["outcome"] in ("failed", "stopped") for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
