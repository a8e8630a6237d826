"""Errors that are the user's to mend: one line, no traceback, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# A message names no more than these of what exists.
NAMES_LISTED = 100


class UserError(ValueError):
    """Something in the input is wrong. The message is one line: what, where, what was expected, what to do.

    Args:
        message: line breaks in it, of a path or of another library's message, become spaces, and half of a surrogate
            pair, which no terminal takes, is written as its number.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class RefusedUnderWay(UserError):
    """Input that must be mended, as only the work itself could tell: what is done of it is of no further use."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a list, with the nearest one that is."""
    return UserError(f"unknown {kind} {name!r}: {expected_one_of(name, known)}")


def expected_one_of(name: str, known: Iterable[str]) -> str:
    """The second half of a message about an unknown name: the first names that exist, and the nearest of
    all."""
    known = list(known)
    by_lower = {known_name.lower(): known_name for known_name in known}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    hint = f"; did you mean {by_lower[nearest[0]]!r}?" if nearest else ""
    more = f", ... ({len(known):,} in all)" if len(known) > NAMES_LISTED else ""
    return f"expected one of {', '.join(known[:NAMES_LISTED])}{more}{hint}"


def one_line(text: str) -> str:
    """Text on one line that any terminal can show."""
    joined = " ".join(part for line in text.splitlines() if (part := line.strip()))
    return joined.encode("utf-8", "backslashreplace").decode("utf-8")


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank; its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
