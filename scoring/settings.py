"""Settings: dataclasses whose fields say which values they take and what they are for.

A field is `name: Annotated[TYPE, BOUNDS..., Doc("...")] = DEFAULT`, with the bounds of annotated-types (Ge, Gt, Le,
Lt), a Literal for a closed set of names, and Known for a registry that can grow. From it come the command-line flag,
its help, the key of a spec file, the check, the message of the check, and the reference page in docs/.

Messages call a setting what the user called it: a flag, a line of a file, or an argument.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import Doc

from scoring.errors import UserError, expected_one_of

__all__ = [
    "Doc",
    "Expected",
    "Ge",
    "Gt",
    "Known",
    "Le",
    "Lt",
    "Setting",
    "adopt",
    "build",
    "check",
    "current_naming",
    "named",
    "naming",
    "settings_of",
]

T = TypeVar("T")
LARGEST = 2**63 - 1  # what a column of whole numbers holds
MAPPING = "a mapping, one 'name: value' a line"


@dataclass(frozen=True)
class Known:
    """The value is a name in a registry, in upper or lower case; or it is a list of such names.

    Attributes:
        names: gives the names that exist at the moment, those that plugins have added among them. It must be a named
            function of a module: a lambda in an annotation does not see the module's variables.
    """

    names: Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Expected:
    """The allowed values in words, where type and bounds do not say all of it.

    Attributes:
        words: follow "expected" in a message.
    """

    words: str


@dataclass(frozen=True)
class Setting:
    """One field of a settings class.

    Attributes:
        name: the name of the field, and the key in a spec file.
        type: the annotation: which values are allowed, with their bounds.
        doc: what the setting is for, in one line.
        default: the default, or MISSING if a value must be given.
    """

    name: str
    type: Any
    doc: str
    default: Any

    @property
    def flag(self) -> str:
        return flag_of(self.name)

    @property
    def expected(self) -> str:
        """The allowed values, in words."""
        return _expected(self.type)

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed names, if they are a closed set or a registry; else none."""
        known = next((part for part in _metadata(self.type) if isinstance(part, Known)), None)
        return tuple(known.names() if known else _literals(self.type))

    @property
    def is_switch(self) -> bool:
        return bool in _alternatives(self.type)


def flag_of(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def settings_of(kind: Any) -> tuple[Setting, ...]:
    """The settings of a settings class, in the order of its fields."""
    return _settings_of(kind)


@cache
def _settings_of(kind: Any) -> tuple[Setting, ...]:
    hints = get_type_hints(kind, include_extras=True)
    settings = []
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        doc = next((part.documentation for part in _metadata(hints[field.name]) if isinstance(part, Doc)), "")
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        settings.append(Setting(field.name, hints[field.name], doc, default))
    return tuple(settings)


# --- What messages call a setting ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Naming:
    """What the user calls settings: flags, lines of a file, or arguments.

    Attributes:
        flags: settings that the file does not contain are called by their flags.
        file: the spec file, if there is one.
        lines: the line of each setting in the file, counted from 1, by the keys that lead to it.
        path: the keys that lead to the settings in question, such as ("base",) in the file of a sweep.
    """

    flags: bool = False
    file: str | None = None
    lines: Mapping[tuple[str | int, ...], int] = dataclasses.field(default_factory=dict)
    path: tuple[str | int, ...] = ()

    def __call__(self, name: str) -> str:
        keys = (*self.path, name)
        if keys in self.lines:
            return self.start(name) + name
        if self.path:
            return "".join(f"{_key(key)}: " for key in self.path) + name
        return flag_of(name) if self.flags else name

    def under(self, *keys: str | int) -> Naming:
        """The naming of the settings below these keys."""
        return dataclasses.replace(self, path=(*self.path, *keys))

    def start(self, name: str = "") -> str:
        """How a message begins that is about an unknown setting or a missing one: the file, its line, the keys."""
        where = self.file or ("command line" if self.flags else "")
        if (line := self.lines.get((*self.path, name))) is not None:
            where = f"{where}, line {line}"
        return "".join(f"{part}: " for part in (where, *map(_key, self.path)) if part)


def _key(key: str | int) -> str:
    return key if isinstance(key, str) else f"entry {key + 1}"


_NAMING: ContextVar[Naming | None] = ContextVar("naming", default=None)
# The naming that a worker process takes over from its driver; at most one.
_ADOPTED: list[Naming] = []


def named(name: str) -> str:
    """What the user calls a setting: `--batch-tokens`, `run.yaml, line 3: batch_tokens` or `batch_tokens`."""
    return current_naming()(name)


def current_naming() -> Naming:
    """The naming in force: that of the innermost `naming` context, else the adopted one, else argument names."""
    return _NAMING.get() or (_ADOPTED[-1] if _ADOPTED else Naming())


def adopt(names: Naming) -> None:
    """Use the driver's naming in this worker process from now on."""
    _ADOPTED[:] = [names]


@contextmanager
def naming(names: Naming) -> Iterator[None]:
    """Within the context, messages use this naming."""
    token = _NAMING.set(names)
    try:
        yield
    finally:
        _NAMING.reset(token)


# --- Checks -------------------------------------------------------------------------------------------------


def check(settings: Any) -> None:
    """Refuse settings with a value that its field does not allow.

    Raises:
        UserError: one line that names the first setting at fault, its value and what was expected.
    """
    for setting in settings_of(type(settings)):
        _typed(setting, getattr(settings, setting.name))


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Make settings from values by name; a value may be `FlagText`, as flags are.

    A whole number is accepted where a number is expected, and a number without a fraction where a whole number is;
    nothing else is converted.

    Raises:
        UserError: one line: an unknown name, a value that is not allowed, or a missing one.
    """
    if not isinstance(values, Mapping):
        raise UserError(
            f"{current_naming().start().removesuffix(': ') or kind.__name__} is {described(values)}: expected {MAPPING}"
        )
    known = {setting.name: setting for setting in settings_of(kind)}
    for name in values:
        if name not in known:
            raise unknown_setting(str(name), known)
    typed = {name: _typed(known[name], value) for name, value in values.items()}
    missing = [name for name, setting in known.items() if setting.default is dataclasses.MISSING and name not in typed]
    if missing:
        names = current_naming()
        expected = (
            f"expected in a spec file, or as {', '.join(map(flag_of, missing))}"
            if names.flags and not names.path
            else f"expected as 'name: value' among {', '.join(known)}"
            if names.file or names.path
            else "expected as an argument"
        )
        raise UserError(f"{names.start()}missing {', '.join(missing)}: {expected}")
    return kind(**typed)


def unknown_setting(name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is no setting."""
    return UserError(f"{current_naming().start(name)}unknown field {name!r}: {expected_one_of(name, known)}")


class FlagText(str):
    """A value as it stands on a command line: text, whatever type it is meant to have."""


def _typed(setting: Setting, value: Any) -> Any:
    """The value, converted to the type of its setting."""
    value = _builtin(value)
    try:
        typed = _validated(setting.type, value)
    except ValidationError as error:
        raise UserError(_refusal(setting, value, error)) from None
    for number in typed if isinstance(typed, list | tuple) else [typed]:
        if isinstance(number, int) and abs(number) > LARGEST:
            raise UserError(f"{named(setting.name)} is {described(number)}: expected a number of at most {LARGEST}")
    known = next((part for part in _metadata(setting.type) if isinstance(part, Known)), None)
    if known is None or typed is None:
        return typed
    names = {name.lower(): name for name in known.names()}
    for name in typed if isinstance(typed, list) else [typed]:
        if name.lower() not in names:
            raise UserError(f"{named(setting.name)} is {name!r}: {expected_one_of(name, names.values())}")
    return [names[name.lower()] for name in typed] if isinstance(typed, list) else names[typed.lower()]


def _builtin(value: Any) -> Any:
    """The value with Python's own types in place of numpy's and of paths, inside lists and mappings too."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {key: _builtin(item) for key, item in value.items()}
    return type(value)(map(_builtin, value)) if type(value) in (list, tuple) else value


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))


def _validated(hint: Any, value: Any) -> Any:
    adapter = _adapter(hint)
    if isinstance(value, FlagText):
        parts = _split(hint, value)
        return adapter.validate_python(parts) if isinstance(parts, list) else adapter.validate_strings(parts)
    if isinstance(value, list) and any(get_origin(_plain(kind)) is tuple for kind in _alternatives(hint)):
        value = tuple(value)  # YAML has lists only
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError:
        if not (isinstance(value, float) and value.is_integer()):
            raise
        # pydantic in strict mode refuses every float for an int, 3.0 too.
        return adapter.validate_python(int(value), strict=True)


def _split(hint: Any, text: FlagText) -> Any:
    """The parts of a text that stands for a mapping, "beta=0.1,delta=2", or a sequence, "1,2,3"; else the text."""
    kinds = {get_origin(kind) or kind for kind in map(_plain, _alternatives(hint))}
    if dict in kinds and str not in kinds:
        pairs = [pair.partition("=") for pair in text.split(",")]
        if len({name.strip() for name, _, _ in pairs}) < len(pairs):
            return str(text)  # a name occurs twice
        return {name.strip(): value.strip() for name, _, value in pairs}
    if kinds & {tuple, list}:
        return [part.strip() for part in text.split(",")]
    return str(text)


def _refusal(setting: Setting, value: Any, error: ValidationError) -> str:
    """The message about a value that pydantic has refused."""
    detail = error.errors(include_url=False, include_context=False)[0]
    place, refused, expected = named(setting.name), value, setting.expected
    pair = ""  # of a flag, as it stands there
    location = detail["loc"]
    containers = [kind for kind in map(_plain, _alternatives(setting.type)) if get_origin(kind) in (dict, list, tuple)]
    parts = _split(setting.type, value) if isinstance(value, FlagText) else value
    nothing_said = isinstance(value, FlagText) and not detail["input"]
    inside = isinstance(parts, dict | list | tuple) and detail["input"] is not value and not nothing_said
    if containers and location and inside:
        # One of the values inside is at fault, or a key.
        keys = parts if isinstance(parts, dict) else range(len(parts))
        key = location[1] if len(location) > 1 and location[0] not in keys else location[0]
        refused, whole = detail["input"], place
        place = f"{whole}[{key!r}]"
        if isinstance(value, FlagText):
            if isinstance(parts, dict) and location[-1] != "[key]":
                pair = f"{whole} {key}={refused if len(refused) <= 60 else f'{refused[:57]}...'}"
            refused = FlagText(refused)
        arguments = get_args(containers[0])
        expected = _expected(arguments[1] if isinstance(parts, dict) and location[-1] != "[key]" else arguments[0])
    if isinstance(value, FlagText):
        numbers = not any(str in _alternatives(get_args(kind)[1]) for kind in containers if get_origin(kind) is dict)
        expected = expected.replace(MAPPING, f"name={'number' if numbers else 'value'}, with commas between several")
    if isinstance(refused, float) or (isinstance(refused, FlagText) and _written_as_number(refused)):
        expected = expected if math.isfinite(float(refused)) else expected.replace("a number", "a finite number")
    message = f"{pair or f'{place} is {described(refused)}'}: expected {expected}"
    names = _literals(setting.type)
    if isinstance(refused, str) and len(names) > 1 and expected == f"one of {', '.join(names)}":
        return f"{place} is {described(refused)}: {expected_one_of(refused, names)}"
    if current_naming().file and "text" in expected.split(", or ") and not isinstance(value, FlagText):
        if isinstance(refused, bool):
            return f"{message}; YAML reads yes, no, on and off as true and false: put them in quotes"
        if refused is not None and not isinstance(refused, str | dict | list | tuple):
            return f"{message}; put it in quotes"
    return message


def described(value: Any) -> str:
    """A value as messages show it: short, and written as in a spec file."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str | bytes) and not _written_as_number(value) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _written_as_number(value: str | bytes) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return isinstance(value, FlagText)


# --- Reading annotations ------------------------------------------------------------------------------------


def _metadata(hint: Any) -> tuple[Any, ...]:
    return hint.__metadata__ if get_origin(hint) is Annotated else ()


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _alternatives(hint: Any) -> list[Any]:
    """The types that a value may have, without None; each with its own bounds."""
    bounds = [part for part in _metadata(hint) if isinstance(part, Ge | Gt | Le | Lt)]
    plain = _plain(hint)
    options = get_args(plain) if get_origin(plain) in (Union, types.UnionType) else (plain,)
    alternatives = []
    for option in options:
        if get_origin(option) is Annotated:
            alternatives += _alternatives(option)
        elif option is not type(None):
            alternatives.append(Annotated[(option, *bounds)] if bounds else option)
    return alternatives


def _literals(hint: Any) -> list[str]:
    kinds = map(_plain, _alternatives(hint))
    return [str(name) for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]


def _expected(hint: Any) -> str:
    """The allowed values, in words."""
    words = next((part.words for part in _metadata(hint) if isinstance(part, Expected)), None)
    if words is not None:
        return words
    known = next((part for part in _metadata(hint) if isinstance(part, Known)), None)
    if known is not None:
        return f"one of {', '.join(known.names())}"
    return ", or ".join(_expected_kind(kind) for kind in _alternatives(hint))


def _expected_kind(kind: Any) -> str:
    bounds = _metadata(kind)
    plain = _plain(kind)
    origin = get_origin(plain)
    if origin is Literal:
        names = [str(name) for name in get_args(plain)]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    if origin is dict or plain is dict:
        return MAPPING
    if origin in (list, tuple) or plain in (list, tuple):
        return "a list"
    if plain is bool:
        return "true or false"
    if plain in (int, float):
        return ("a whole number" if plain is int else "a number") + _within(bounds)
    return "text"


def _within(bounds: Sequence[Any]) -> str:
    """The bounds of a number, in words."""
    least = next((part.ge for part in bounds if isinstance(part, Ge)), None)
    above = next((part.gt for part in bounds if isinstance(part, Gt)), None)
    most = next((part.le for part in bounds if isinstance(part, Le)), None)
    below = next((part.lt for part in bounds if isinstance(part, Lt)), None)
    if least is not None and most is not None:
        return f" from {least:g} to {most:g}"
    limits = [
        f"{words} {bound:g}"
        for words, bound in (("of at least", least), ("greater than", above), ("at most", most), ("below", below))
        if bound is not None
    ]
    return f" {' and '.join(limits)}" if limits else ""
