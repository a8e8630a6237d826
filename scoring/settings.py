"""Settings: dataclasses whose fields say what they may be and what they are for.

A field is `name: Annotated[TYPE, BOUNDS..., Doc("...")] = DEFAULT`, with the bounds of annotated-types (Ge, Gt, Le,
Lt), a Literal for a closed set of names, and Known for a registry that can grow. From it come the command-line flag,
its help, the key of a spec file, the check, the message of the check, and the reference page in docs/.

Messages call a setting what whoever set it called it: a flag, a line of a file, or an argument.
"""

from __future__ import annotations

import dataclasses
import difflib
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

from scoring.errors import UserError

__all__ = [
    "Doc",
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
MAPPING = "a mapping, one 'name: value' a line"


@dataclass(frozen=True)
class Known:
    """The value is a name in a registry, in upper or lower case.

    Attributes:
        names: gives the names there are now, with those that a plugin has added. A function of its module by name: a
            lambda in an annotation does not see the module.
    """

    names: Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Setting:
    """One field of a settings class.

    Attributes:
        name: of the field, and the key in a spec file.
        type: what it may be, with bounds.
        doc: what it is for, one line.
        default: MISSING if it must be given.
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
        """What it may be, in words."""
        return _expected(self.type)

    @property
    def choices(self) -> tuple[str, ...]:
        """The names that it may be, where they are a closed set or a registry."""
        known = next((part for part in _metadata(self.type) if isinstance(part, Known)), None)
        return tuple(known.names() if known else _literals(self.type))

    @property
    def is_switch(self) -> bool:
        return bool in _alternatives(self.type)


def flag_of(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def settings_of(kind: Any) -> tuple[Setting, ...]:
    """The settings of a settings class, in order."""
    return _settings_of(kind)


@cache
def _settings_of(kind: Any) -> tuple[Setting, ...]:
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        doc = next((part.documentation for part in _metadata(hints[field.name]) if isinstance(part, Doc)), "")
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found.append(Setting(field.name, hints[field.name], doc, default))
    return tuple(found)


# --- How a setting is called --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Naming:
    """How those who set settings call them.

    Attributes:
        flags: by flags, where a file does not name them.
        file: that names some of them.
        lines: its lines, counted from 1, by the keys that lead to a setting.
        path: the keys that lead to the settings that are spoken of: ("base",) of a sweep.
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
        """The settings below these keys."""
        return dataclasses.replace(self, path=(*self.path, *keys))

    def start(self, name: str = "") -> str:
        """What a message begins with that is about a name which is no setting, or about one that is not there."""
        where = self.file or ("command line" if self.flags else "")
        if (line := self.lines.get((*self.path, name))) is not None:
            where = f"{where}, line {line}"
        return "".join(f"{part}: " for part in (where, *map(_key, self.path)) if part)


def _key(key: str | int) -> str:
    return key if isinstance(key, str) else f"entry {key + 1}"


_NAMING: ContextVar[Naming | None] = ContextVar("naming", default=None)
# Of a process that works for another one, and speaks as that does.
_ADOPTED: list[Naming] = []


def named(name: str) -> str:
    """A setting as whoever set it calls it: `--batch-tokens`, `run.yaml, line 3: batch_tokens` or `batch_tokens`."""
    return current_naming()(name)


def current_naming() -> Naming:
    """How settings are called at this point: as arguments, unless somebody has said otherwise."""
    return _NAMING.get() or (_ADOPTED[-1] if _ADOPTED else Naming())


def adopt(names: Naming) -> None:
    """Call settings so in this process, which works for one where they are called so."""
    _ADOPTED[:] = [names]


@contextmanager
def naming(names: Naming) -> Iterator[None]:
    """Within the context settings are called so."""
    token = _NAMING.set(names)
    try:
        yield
    finally:
        _NAMING.reset(token)


# --- Checks -------------------------------------------------------------------------------------------------


def check(settings: Any) -> None:
    """Refuse settings whose values are not what their fields may be.

    Raises:
        UserError: one line that names the first one at fault, its value and what was expected.
    """
    for setting in settings_of(type(settings)):
        _typed(setting, getattr(settings, setting.name))


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Settings from values by name, which may be text, as flags are.

    A whole number is taken for a number, and a number without a fraction for a whole one; nothing else is converted.

    Raises:
        UserError: one line: an unknown name, a value that cannot be, or one that is missing.
    """
    known = {setting.name: setting for setting in settings_of(kind)}
    for name in values:
        if name not in known:
            raise unknown_setting(str(name), known)
    typed = {name: _typed(known[name], value) for name, value in values.items()}
    missing = [name for name, setting in known.items() if setting.default is dataclasses.MISSING and name not in typed]
    if missing:
        how = current_naming()
        expected = (
            f"expected in a spec file, or as {', '.join(map(flag_of, missing))}"
            if how.flags and not how.path
            else f"expected as 'name: value' among {', '.join(known)}"
            if how.file or how.path
            else "expected as an argument"
        )
        raise UserError(f"{how.start()}missing {', '.join(missing)}: {expected}")
    return kind(**typed)


def unknown_setting(name: str, known: Iterable[str]) -> UserError:
    """What to say of a name that is no setting."""
    return UserError(f"{current_naming().start(name)}unknown field {name!r}: {one_of(name, known)}")


class Text(str):
    """A value as it stands on a command line, whatever it is meant to be."""


def _typed(setting: Setting, value: Any) -> Any:
    """The value in the type of its setting."""
    if isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    try:
        typed = _validated(setting.type, value)
    except ValidationError as error:
        raise UserError(_refusal(setting, value, error)) from None
    known = next((part for part in _metadata(setting.type) if isinstance(part, Known)), None)
    if known is None or typed is None:
        return typed
    names = {name.lower(): name for name in known.names()}
    if typed.lower() not in names:
        raise UserError(f"{named(setting.name)} is {typed!r}: {one_of(typed, names.values())}")
    return names[typed.lower()]


def one_of(value: str, names: Iterable[str]) -> str:
    """What was expected in place of a name, with the nearest one."""
    names = list(names)
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(value.lower(), lower, n=1, cutoff=0.4)
    hint = f"; did you mean {lower[near[0]]!r}?" if near else ""
    return f"expected one of {', '.join(names)}{hint}"


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))


def _validated(hint: Any, value: Any) -> Any:
    adapter = _adapter(hint)
    if isinstance(value, Text):
        parts = _split(hint, value)
        return adapter.validate_python(parts) if isinstance(parts, list) else adapter.validate_strings(parts)
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError:
        if not (isinstance(value, float) and value.is_integer()):
            raise
        # As text, since a float is no whole number to pydantic, however whole it is.
        return adapter.validate_python(int(value), strict=True)


def _split(hint: Any, text: Text) -> Any:
    """The parts of a text that stands for a mapping, "beta=0.1,delta=2", or for a sequence, "1,2,3"."""
    kinds = {get_origin(kind) or kind for kind in _alternatives(hint)}
    if dict in kinds:
        pairs = [pair.partition("=") for pair in text.split(",")]
        if len({name.strip() for name, _, _ in pairs}) < len(pairs):
            return str(text)  # a name occurs twice
        return {name.strip(): value.strip() for name, _, value in pairs}
    if kinds & {tuple, list}:
        return [part.strip() for part in text.split(",")]
    return str(text)


def _refusal(setting: Setting, value: Any, error: ValidationError) -> str:
    details = error.errors(include_url=False, include_context=False)
    place, found, expected = named(setting.name), value, setting.expected
    inside = details[0]["loc"]
    kinds = [kind for kind in map(_plain, _alternatives(setting.type)) if get_origin(kind) in (dict, list, tuple)]
    if kinds and inside and isinstance(value, dict | list | tuple) and details[0]["input"] is not value:
        # One of the values inside is at fault, or a key.
        key = inside[1] if len(inside) > 1 and inside[0] not in value else inside[0]
        found, place = details[0]["input"], f"{place}[{key!r}]"
        arguments = get_args(kinds[0])
        expected = _expected(arguments[0] if inside[-1] == "[key]" else arguments[-1 if len(arguments) == 2 else 0])
    if isinstance(value, Text):
        expected = expected.replace(MAPPING, "name=number, with commas between several")
    message = f"{place} is {described(found)}: expected {expected}"
    names = _literals(setting.type)
    if isinstance(found, str) and len(names) > 1:
        return f"{place} is {described(found)}: {one_of(found, names)}"
    if current_naming().file and "text" in expected.split(", or ") and not isinstance(value, Text):
        if isinstance(found, bool):
            return f"{message}; YAML reads yes, no, on and off as true and false: put them in quotes"
        if found is not None and not isinstance(found, str | dict | list | tuple):
            return f"{message}; put it in quotes"
    return message


def described(value: Any) -> str:
    """A value in a message: briefly, and as a spec file has it."""
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
    return isinstance(value, Text)


# --- What a type says ---------------------------------------------------------------------------------------


def _metadata(hint: Any) -> tuple[Any, ...]:
    return hint.__metadata__ if get_origin(hint) is Annotated else ()


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _alternatives(hint: Any) -> list[Any]:
    """The types that a value may have, None left out; each with its own bounds."""
    bounds = [part for part in _metadata(hint) if isinstance(part, Ge | Gt | Le | Lt)]
    plain = _plain(hint)
    options = get_args(plain) if get_origin(plain) in (Union, types.UnionType) else (plain,)
    kinds = []
    for option in options:
        if get_origin(option) is Annotated:
            kinds += _alternatives(option)
        elif option is not type(None):
            kinds.append(Annotated[(option, *bounds)] if bounds else option)
    return kinds


def _literals(hint: Any) -> list[str]:
    kinds = map(_plain, _alternatives(hint))
    return [str(name) for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]


def _expected(hint: Any) -> str:
    """What a value may be, in words."""
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
    said = [
        f"{words} {bound:g}"
        for words, bound in (("of at least", least), ("greater than", above), ("at most", most), ("below", below))
        if bound is not None
    ]
    return f" {' and '.join(said)}" if said else ""
