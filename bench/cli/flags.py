"""Flags: one for each setting, made from its type and documentation; and how they become settings."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING
from typing import Any, NoReturn, TypeVar

from bench.files.spec import spec_file
from scoring.errors import UserError, unknown_name
from scoring.settings import FlagText, Setting, settings_of

USER_ERROR = 2
Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """Errors are one line and exit code 2; an unknown flag or verb comes with the nearest known one."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(USER_ERROR)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = action.metavar if isinstance(action.metavar, str) else action.dest
            raise argparse.ArgumentError(None, str(unknown_name(kind.lower(), str(value), action.choices)))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            chosen = getattr(parsed, "parser", self)
            near = difflib.get_close_matches(unknown[0].split("=")[0], chosen._option_string_actions, n=1)
            chosen.error(f"unknown argument {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
        return parsed


def add_settings(
    parser: argparse.ArgumentParser, *kinds: type, spec: bool = True, only: Collection[str] | None = None
) -> None:
    """A flag for each setting, those that must be given first.

    Args:
        spec: also --spec, for a file of them.
        only: the names of the settings that get one; None: all.
    """
    # Kinds may share settings.
    shown: dict[str, Setting] = {}
    for kind in kinds:
        for setting in settings_of(kind):
            if setting.doc and (only is None or setting.name in only):
                shown.setdefault(setting.name, setting)
    for setting in sorted(shown.values(), key=lambda setting: setting.default is not MISSING):
        # A flag that is not set leaves nothing: the spec file decides, or the default.
        options: dict[str, Any] = {"help": help_of(setting).replace("%", "%%"), "default": argparse.SUPPRESS}
        if setting.is_switch:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": FlagText, "metavar": "VALUE"}
        parser.add_argument(setting.flag, **options)
    if spec:
        parser.add_argument(
            "--spec", metavar="FILE", help="YAML file of any of these, by name (learning_rate: 1e-5); flags win"
        )


def help_of(setting: Setting) -> str:
    """The help of a flag: its purpose, its choices and its default."""
    parts = [setting.doc]
    if setting.choices:
        parts.append(f"[{', '.join(setting.choices)}]")
    if setting.default not in (None, MISSING) and not isinstance(setting.default, dict | list):
        parts.append(f"(default: {setting.default})")
    return " ".join(parts)


@contextmanager
def settings_from(arguments: argparse.Namespace, *kinds: type) -> Iterator[Any]:
    """The settings that flags and spec file say; within the context messages name the file's lines.

    Raises:
        UserError: one line that names the flag, or the file and line, at fault.
    """
    names = [setting.name for kind in kinds for setting in settings_of(kind)]
    set_by_flags = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    with spec_file(getattr(arguments, "spec", None), set_by_flags, *kinds) as made:
        yield made


def refuse_flags_of(other: type, arguments: argparse.Namespace, kind: type, when: str) -> None:
    """Refuse flags that another kind of settings has and this one has not.

    Args:
        other: the kind that they are for.
        kind: the kind that is being made.
        when: they can be given, in words.

    Raises:
        UserError: one line that names the flag.
    """
    known = {setting.name for setting in settings_of(kind)}
    for setting in settings_of(other):
        if setting.name not in known and hasattr(arguments, setting.name):
            raise UserError(f"{setting.flag} is for the command {when}: leave it out, or give it {when}")


def whole_numbers(text: str) -> tuple[int, ...]:
    """Numbers with commas between them."""
    return _numbers(text, int, "whole numbers")


def amounts(text: str) -> tuple[float, ...]:
    """The same, of any numbers: 1e7,1.35e8."""
    return _numbers(text, float, "numbers")


def _numbers(text: str, kind: Callable[[str], Number], called: str) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of {called} with commas between them") from None
