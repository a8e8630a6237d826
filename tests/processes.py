"""Finding and ending the processes that a test started, and no others."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


def _status(pid: int) -> tuple[int, str] | None:
    """Parent and command line of a running process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    state, parent = stat.rpartition(")")[2].split()[:2]
    return None if state == "Z" else (int(parent), command)


def descendants(ancestor: int) -> dict[int, str]:
    """Running processes below `ancestor`, with their command lines."""
    known = {int(p.name): s for p in Path("/proc").iterdir() if p.name.isdigit() and (s := _status(int(p.name)))}
    below = {ancestor}
    while more := {pid for pid, (parent, _) in known.items() if parent in below} - below:
        below |= more
    return {pid: known[pid][1] for pid in below - {ancestor} if pid in known}


def replicas(driver: int) -> list[int]:
    """The replica actors of a driver that started its own Ray."""
    return sorted(pid for pid, command in descendants(driver).items() if "ReplicaActor" in command)


def kill(pid: int) -> None:
    """SIGKILL: nothing of the process's own runs any more."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_for(what: Callable[[], object], seconds: float = 60.0, pause: float = 0.02) -> None:
    """Until `what()` is true; an AssertionError after `seconds`, so that nothing hangs."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)
