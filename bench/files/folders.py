"""Output folders: each belongs to one spec, and to one process at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from bench.files.identity import differences
from scoring.errors import UserError
from scoring.files import has_no_locks, is_held, locks_nothing, replacing, shown
from scoring.reading import exists, read_json
from scoring.settings import named, settings_of

LOCK = ".lock"
# In the folder of a run that trains a model: the record, which is written last, and the model.
RUN_RECORD, RUN_MODEL = "run.json", "model"
# The kind of a run of `mrd-bench train`, in its identity and in messages; and the folders of a pair of them.
TRAINING_RUN = "training run"
# The kind of several requests, each of which is a run in the folder, see `bench.jobs.requests`.
SEVERAL_REQUESTS = "run of several requests"
ORIGINAL, RETAIN_ONLY = "original", "retain-only"
# Of a page, that its title stands in.
HEAD_BYTES = 1000


def locked(folder: Path, out: Path, kind: str, name: str = LOCK) -> FileLock:
    """Make a folder, and be the only process that writes there, until the lock is released.

    Args:
        folder: to be locked.
        out: the file or folder that the user named.
        kind: of work that another process may be doing there, for messages: "run".
        name: of the lock file.

    Raises:
        UserError: another process is writing there, or nothing can be written.
    """
    lock = FileLock(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        if locks_nothing(folder / name):
            _warn_of_no_locks(out)
    except Timeout:
        raise _busy(out, kind) from None
    except (OSError, NotImplementedError) as error:
        if not has_no_locks(error):
            raise unwritable(out, error if isinstance(error, OSError) else OSError(errno.ENOSYS, str(error))) from error
        _warn_of_no_locks(out)
    return lock


def _busy(out: Path, kind: str) -> UserError:
    return UserError(f"{named('out')} {shown(out)}: another {kind} is writing here; wait for it, or choose another")


def refuse_locked(folder: Path, out: Path, kind: str, name: str = LOCK) -> None:
    """Refuse what `locked` would refuse, without making or locking anything.

    Raises:
        UserError: another process is writing there, or nothing can be written.
    """
    nearest = next(path for path in (folder, *folder.parents) if exists(path))
    if not nearest.is_dir():
        raise unwritable(out, OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(nearest, os.W_OK):
        raise unwritable(out, OSError(errno.EACCES, os.strerror(errno.EACCES)))
    if (folder / name).is_file() and is_held(folder / name):
        raise _busy(out, kind)


def _warn_of_no_locks(out: Path) -> None:
    print(
        f"mrd-bench: {shown(out)}: this file system has no locks: start nothing else that writes there",
        file=sys.stderr,
    )


class MadeFolders:
    """Folders on the way to a place that are not there yet: whoever makes them and does not use them removes them.

    Args:
        place: that will be made with all its parents.
    """

    def __init__(self, place: Path) -> None:
        self._missing = [folder for folder in (place, *place.parents) if not exists(folder)]

    def remove_unused(self) -> None:
        """Remove those that are empty, the innermost first."""
        for folder in self._missing:
            with suppress(OSError):
                folder.rmdir()


def refuse_foreign(path: Path, mark: str, kind: str, within: int = 0, setting: str = "out") -> None:
    """Refuse to replace a file that somebody else has written.

    Args:
        path: may be missing.
        mark: text that ours has.
        kind: what ours is of, for the message.
        within: how many bytes may stand before the mark.
        setting: that names the file, or its folder.

    Raises:
        UserError: one line.
    """
    wanted = mark.encode()
    if exists(path) and not (path.is_file() and wanted in path.read_bytes()[: within + len(wanted)]):
        where = "another folder" if setting == "out" else "another file"
        raise UserError(f"{named(setting)}: {shown(path)} exists and is not of {kind}: choose {where}")


def refuse_inputs(out: Path, settings: Any) -> None:
    """Refuse an output that is one of the inputs.

    Args:
        settings: whose values may name files: PATH, TASK:PATH or PATH:COLUMN.

    Raises:
        UserError: one line.
    """
    for setting in settings_of(type(settings)):
        value = getattr(settings, setting.name)
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and any(_same_file(out, part) for part in (text, *_parts(text))):
                raise UserError(
                    f"{named('out')} {shown(out)} is what {named(setting.name)} names: choose another file, so that "
                    "it is not lost"
                )


def _parts(text: str) -> tuple[str, str]:
    return text.partition(":")[2], text.rpartition(":")[0]


def _same_file(one: Path, other: str) -> bool:
    try:
        return bool(other) and os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def unwritable(out: Path, error: OSError, setting: str = "out") -> UserError:
    """What to say where nothing can be written, at the place that a setting names."""
    return UserError(f"{named(setting)} {shown(out)}: cannot be written to ({error.strerror})")


def check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that is not there and could not be made, before the work whose results go there.

    Args:
        name: of the setting that names it.
        folder: an absolute path.

    Raises:
        UserError: a file stands in the way, or nothing can be written there.
    """
    nearest = next(path for path in (folder, *folder.parents) if exists(path))
    if not nearest.is_dir():
        raise UserError(f"{named(name)} {shown(folder)}: {shown(nearest)} is a file; expected a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"{named(name)} {shown(folder)}: cannot be written to")


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Note whose a folder is, unless it is noted already."""
    if not (folder / "spec.json").is_file():
        with replacing(folder / "spec.json") as unfinished:
            unfinished.write_text(json.dumps(identity, indent=2) + "\n")


class Hashed(TypedDict):
    """A spec with its hash."""

    spec_hash: str


def owner_of(folder: Path) -> dict[str, Any] | None:
    """The identity of the run that a folder belongs to; None where nothing sound is noted."""
    try:
        owner: dict[str, Any] = read_json(folder / "spec.json", Hashed, "the spec of a run")
    except UserError:
        return None
    return owner


def last_request(folder: Path) -> Path:
    """The run folder of the last of several requests, whose model is that of the whole; of another folder itself."""
    if (owner_of(folder) or {}).get("kind") != SEVERAL_REQUESTS:
        return folder
    return max(request_folders(folder), key=_number, default=folder)


def request_folders(folder: Path) -> list[Path]:
    """The run folders of several requests that have begun, in their order."""
    return sorted((path.parent for path in folder.glob("*/spec.json") if _number(path.parent)), key=_number)


def _number(folder: Path) -> int:
    """Of a request, by the name of its folder; 0: it is none."""
    number = folder.name.partition("-")[0]
    return int(number) if number.isdecimal() else 0


def runs_within(folder: Path) -> list[Path]:
    """The runs in the subfolders of a folder, such as the two of a pair."""
    return sorted(path.parent for path in folder.glob("*/spec.json") if owner_of(path.parent) is not None)


def refuse_several(folder: Path, expected: str) -> None:
    """Refuse a folder that is no run's and holds some.

    Args:
        expected: of one of them.

    Raises:
        UserError: one line that names them.
    """
    if owner_of(folder) is None and (runs := runs_within(folder)):
        raise UserError(f"{folder} holds several runs, {', '.join(map(str, runs))}: expected {expected}")


class OwnedFolder:
    """An output folder, claimed for one spec and one process.

    Args:
        out: the folder; made if it is not there.
        identity: what is run, with its "spec_hash".
    """

    # The kind of work, for messages; files that are there once it has begun; the one that is written last.
    KIND: ClassVar[str]
    BEGUN: ClassVar[tuple[str, ...]]
    RECORD: ClassVar[str]

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self._out, self._identity = out, identity
        self._lock: FileLock | None = None
        self._made = MadeFolders(out)

    def __enter__(self) -> Self:
        out = self._out
        self._check_place()
        try:
            self._lock = locked(out, out, self.KIND)
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                self._leave_nothing()
            raise
        try:
            for leftover in out.glob(".*.tmp"):
                leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
            claim(out, self._identity)
            if self.is_finished():
                self.tidy()
        except OSError as error:
            self.__exit__()
            raise unwritable(out, error) from error
        return self

    def check(self) -> None:
        """Refuse what entering would refuse, without writing anything.

        Raises:
            UserError: the folder is of another spec, of another process, or cannot be written to.
        """
        self._check_place()
        refuse_locked(self._out, self._out, self.KIND)

    def _check_place(self) -> None:
        out = self._out
        if exists(out) and not out.is_dir():
            raise UserError(f"{named('out')} {shown(out)} is a file: expected a folder to write to")
        if (out / "spec.json").is_file():
            self._check_owner()
        # What a killed start may have left does not make the folder someone else's.
        elif out.is_dir() and any(path.name != LOCK and path.suffix != ".tmp" for path in out.iterdir()):
            raise self._foreign()

    def _foreign(self) -> UserError:
        return UserError(
            f"{named('out')} {shown(self._out)} is not empty and holds no {self.KIND}: choose another folder"
        )

    def _check_owner(self) -> None:
        owner = owner_of(self._out)
        if owner is None:
            raise self._foreign()
        if owner["spec_hash"] != self._identity["spec_hash"]:
            raise UserError(
                f"{named('out')} {shown(self._out)} holds a {self.KIND} of another spec (different: "
                f"{differences(owner, self._identity)}): choose another, or remove it"
            )

    def __exit__(self, *_: object) -> None:
        # Refused before anything was done: the next command, mended, must not find the claim of this one.
        if not any((self._out / name).exists() for name in (*self.BEGUN, self.RECORD)):
            (self._out / "spec.json").unlink(missing_ok=True)
            self._leave_nothing()
        if self._lock is not None:
            self._lock.release()

    def _leave_nothing(self) -> None:
        with suppress(OSError):
            (self._out / LOCK).unlink(missing_ok=True)
            self._made.remove_unused()

    def is_finished(self) -> bool:
        return (self._out / self.RECORD).is_file()

    def tidy(self) -> None:
        """Remove files that only unfinished work needs."""
