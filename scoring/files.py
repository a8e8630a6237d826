"""Files that appear whole or not at all, and what they are called in messages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file to write instead of `path`. Once whole, it becomes `path`; if writing fails, nothing is left."""
    unfinished = path.with_name(f".{os.getpid()}.{path.name}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def shown(path: Path) -> str:
    """A path as messages show it: relative to the working folder if it lies below that, else whole."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
