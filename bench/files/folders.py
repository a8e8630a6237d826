"""Output folders: each belongs to one spec, and to one process at a time."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

from filelock import FileLock, Timeout

from bench.files.identity import differences
from scoring.errors import UserError
from scoring.files import replacing

LOCK = ".lock"


class OwnedFolder:
    """An output folder, claimed for one spec and one process.

    Args:
        out: the folder; made if it is not there.
        identity: what is run, with its "spec_hash".
    """

    # What the folder holds, for messages; what is only there once work has begun; what is written last, of the work.
    WHAT: ClassVar[str]
    BEGUN: ClassVar[tuple[str, ...]]
    RECORD: ClassVar[str]

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self._out, self._identity = out, identity
        self._lock = FileLock(out / LOCK)
        self._made = False

    def __enter__(self) -> Self:
        out, spec = self._out, self._out / "spec.json"
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file: expected a folder to write to")
        self._made = not out.exists()
        if spec.is_file():
            self._check_owner()
        # What a killed start may have left does not make the folder someone else's.
        elif out.is_dir() and any(path.name != LOCK and path.suffix != ".tmp" for path in out.iterdir()):
            raise self._foreign()
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"--out {out}: another {self.WHAT} is writing here; wait for it, or choose another"
            ) from None
        except OSError as error:
            self._leave_nothing()
            raise UserError(f"--out {out}: cannot be written to ({error.strerror})") from error
        try:
            for leftover in out.glob(".*.tmp"):
                leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
            if not spec.is_file():
                with replacing(spec) as unfinished:
                    unfinished.write_text(json.dumps(self._identity, indent=2) + "\n")
            if self.is_finished():
                self.tidy()
        except OSError as error:
            self.__exit__()
            raise UserError(f"--out {out}: cannot be written to ({error.strerror})") from error
        return self

    def _foreign(self) -> UserError:
        return UserError(f"--out {self._out} is not empty and holds no {self.WHAT}: choose another folder")

    def _check_owner(self) -> None:
        try:
            found = json.loads((self._out / "spec.json").read_text())
            owner = found["spec_hash"]
        except (OSError, ValueError, KeyError, TypeError):
            raise self._foreign() from None
        if owner != self._identity["spec_hash"]:
            raise UserError(
                f"--out {self._out} holds a {self.WHAT} of another spec (different: "
                f"{differences(found, self._identity)}): choose another, or remove it"
            )

    def __exit__(self, *_: object) -> None:
        # Refused before anything was done: the next command, mended, must not find the claim of this one.
        if not any((self._out / name).exists() for name in (*self.BEGUN, self.RECORD)):
            (self._out / "spec.json").unlink(missing_ok=True)
            self._leave_nothing()
        self._lock.release()

    def _leave_nothing(self) -> None:
        with suppress(OSError):
            (self._out / LOCK).unlink(missing_ok=True)
            if self._made:
                self._out.rmdir()

    def is_finished(self) -> bool:
        return (self._out / self.RECORD).is_file()

    def tidy(self) -> None:
        """Remove what only unfinished work needs."""
