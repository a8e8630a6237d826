"""Files that appear whole or not at all, and what they are called in messages."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

WORK = "mrd-bench-work-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file to write instead of `path`. Once whole, it becomes `path`; if writing fails, nothing is left."""
    unfinished = path.with_name(f".{os.getpid()}.{path.name}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def work_folder() -> Iterator[Path]:
    """A temporary folder, which is removed at the end; those of processes that were killed are removed at the start.

    Each has a lock beside it that ends with its process: a number of a process may be given again, or belong to
    another container that shares the folder of temporary files.
    """
    _remove_abandoned()
    with FileLock(Path(tempfile.gettempdir()) / f"{WORK}{uuid.uuid4().hex}.lock") as lock:
        folder = Path(lock.lock_file).with_suffix("")
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)


def _remove_abandoned() -> None:
    """Remove the work folders whose processes are gone; those of other users stay."""
    for path in Path(tempfile.gettempdir()).glob(f"{WORK}*.lock"):
        with suppress(OSError, NotImplementedError, Timeout):
            if path.stat().st_uid != os.getuid():
                continue
            with FileLock(path).acquire(timeout=0):
                if locks_nothing(path):
                    continue  # its process may be alive: the lock says nothing here
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink(missing_ok=True)


def has_no_locks(error: Exception) -> bool:
    """Whether a lock failed because the file system has none, as some that are shared between machines."""
    # filelock raises NotImplementedError where flock is not implemented.
    return isinstance(error, NotImplementedError) or (
        isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
    )


def locks_nothing(path: Path) -> bool:
    """Whether the lock that this process has on a file keeps nobody out: some file systems say yes and lock nothing."""
    if os.name != "posix":
        return False  # there is no flock to ask
    import fcntl

    with path.open() as again:
        try:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def shown(path: Path) -> str:
    """A path as messages show it: relative to the working folder if it lies below that, else whole."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
