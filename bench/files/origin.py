"""Where a result comes from: packages, hardware and commit, so that two that differ can be told apart."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

PACKAGES = ("mrd-bench", "torch", "transformers", "ray", "numpy", "pyarrow")
# Of a job whose working folder was sent without its history.
COMMIT_VARIABLE = "MRD_BENCH_COMMIT"


class Origin(TypedDict):
    """What `origin` says; files of early versions lack some of it."""

    packages: dict[str, str | None]
    hardware: NotRequired[str | None]
    git_commit: NotRequired[str | None]


def origin(*packages: str) -> dict[str, Any]:
    """Fields of a record: "packages" (name -> version), "hardware" (one line) and "git_commit" (None if not known).

    Args:
        packages: further ones whose versions matter.
    """
    versions = {name: package_version(name) for name in (*PACKAGES, *packages)}
    return {"packages": versions, "hardware": hardware(), "git_commit": git_commit()}


def package_version(package: str) -> str | None:
    """Installed version; under `ray job submit --working-dir` the project itself is not installed, and has none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def hardware() -> str:
    """This machine's processor, cores, memory and accelerators."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [_processor(), f"{os.cpu_count()} cores", f"{memory:.0f} GiB"]
    if torch.cuda.is_available():
        parts += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def git_commit() -> str | None:
    """The commit of this code, "-dirty" behind it where files differ; None outside a checkout."""
    if named_commit := os.environ.get(COMMIT_VARIABLE):
        return named_commit
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():  # not that of a project which this was copied into
        return None
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("-dirty" if changed else "")
