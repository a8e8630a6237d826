"""How a trial or a run ended."""

from __future__ import annotations

# What became of a run.
FINISHED, DIVERGED, OUT_OF_MEMORY, ERROR, DIED, STOPPED = (
    "finished",
    "diverged",
    "out of memory",
    "error",
    "died",
    "stopped",
)
