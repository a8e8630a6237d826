"""Registries: what there is of one kind, by name, with what plugins add."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

from scoring.errors import UserError

Entry = TypeVar("Entry")
# Names stand in lists with commas, before a colon, and in file names.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Registry(MutableMapping[str, Entry]):
    """Entries by name. `REGISTRY["mine"] = entry` adds one; a name is given once, in upper or lower case.

    Args:
        kind: what the entries are, for messages.
        entries: those that come along.
        of: the type of the entries, such as `Algorithm`, or `Callable` for functions.

    Raises:
        UserError: a name that is taken already, or that is no name; an entry of another type.
    """

    def __init__(self, kind: str, entries: Mapping[str, Entry] | None = None, of: Any = object) -> None:
        self.kind, self._of = kind, of
        self._entries: dict[str, Entry] = {}
        self.update(entries or {})

    def __setitem__(self, name: str, entry: Entry) -> None:
        if not NAME.fullmatch(name):
            raise UserError(f"{self.kind} {name!r}: expected a name of letters, digits, - and _")
        taken = next((known for known in self if known.lower() == name.lower()), None)
        if taken is not None:
            raise UserError(f"{self.kind} {name!r}: there is {taken!r} already; choose another name")
        if not isinstance(entry, self._of):
            raise UserError(f"{self.kind} {name!r} is {type(entry).__name__}: expected {self._of.__name__}")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
