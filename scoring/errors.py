"""Errors that are the user's to mend: one line, no traceback, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something in the input is wrong. The message is one line: what, where, what was expected, what to do."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a list, with the nearest one that is."""
    known = list(known)
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    hint = f"; did you mean {by_lower[near[0]]!r}?" if near else ""
    return UserError(f"unknown {kind} {name!r}: expected one of {', '.join(known)}{hint}")


def first_line(error: BaseException) -> str:
    """Of what it says; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
