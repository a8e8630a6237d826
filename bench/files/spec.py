"""Reading a spec: a frozen dataclass, filled from a YAML file, from command-line flags, or from both.

The fields of the dataclass are the names that a file may set; the flag of `learning_rate` is `--learning-rate`.
A value that YAML reads as another type than its field has is refused, never guessed at.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from scoring.errors import UserError, unknown_name

T = TypeVar("T")

# What to say for pydantic's error types.
EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a mapping, one 'name: value' a line",
}


def read_spec(path: str | Path, kind: type[T], given: Mapping[str, Any] | None) -> T:
    """A spec from a file, with the flags that were given in place of what the file says.

    Paths among the values stay as they are: relative ones are relative to the working directory.

    Args:
        path: a YAML file, a mapping of fields to values.
        kind: the dataclass; its fields are str, int, float, bool, dict[str, float], or one of these or None.
        given: values by field, of those flags only that were really given; None: there are no flags.

    Raises:
        UserError: one line that names the file, and the line or field at fault.
    """
    from_file = read_mapping(path)
    flags = given is not None
    given = given or {}
    # What a flag replaces is not looked at, and what a flag says is not the file's fault.
    kept = {name: value for name, value in from_file.items() if name not in given}
    values = _typed(kind, kept, str(path)) | _typed(kind, given, "command line")
    return _build(kind, values, str(path), flags)


def make_spec(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """A spec from values by field.

    A whole number is taken for a float field, and a float without a fraction for an int field; nothing else is
    converted.

    Args:
        kind: see `read_spec`.
        values: by field; those left out take their defaults.
        where: what the values come from, for messages, such as "command line".

    Raises:
        UserError: one line: an unknown field, a value of the wrong type, or a field that is missing.
    """
    return _build(kind, _typed(kind, values, where), where)


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it safely, but 5e-5 is a number, and a key that occurs twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"{key.value!r} occurs twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


# YAML 1.1 asks for a point in the mantissa and for a sign of the exponent; YAML 1.2 does not.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def read_mapping(path: str | Path) -> dict[Any, Any]:
    """A YAML file, as a mapping.

    Raises:
        UserError: one line that names the file, and the line at fault.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"spec file {str(path)!r} cannot be read ({error.strerror}): expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; expected a YAML file") from error
    try:
        values = yaml.load(text, _Loader)
    except Exception as error:  # bare ones too: the date 2024-13-45 is a ValueError
        raise UserError(f"{path}{_at_line(error, text)}: not valid YAML ({_problem(error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is {_described(values)}: expected {EXPECTED['dict_type']}")
    return values


def _at_line(error: Exception, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position)
    elif isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        line = error.problem_mark.line
    else:
        return ""
    return f", line {line + 1}"


def _problem(error: Exception) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return error.reason
    if isinstance(error, yaml.MarkedYAMLError):
        return " ".join(part for part in (error.context, error.problem) if part)
    return (str(error) or type(error).__name__).splitlines()[0]


def _fields(kind: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.init]


def _typed(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values in the types of their fields."""
    known = [field.name for field in _fields(kind)]
    hints = get_type_hints(kind)
    typed = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{where}: {unknown_name('field', str(name), known)}")
        field = TypeAdapter(hints[name])
        try:
            typed[name] = field.validate_python(value, strict=True)
        except ValidationError as error:
            if not (isinstance(value, float) and value.is_integer()):
                raise _wrong_type(where, name, value, error) from error
            try:
                typed[name] = field.validate_python(int(value), strict=True)
            except ValidationError:
                raise _wrong_type(where, name, value, error) from error
    return typed


def _wrong_type(where: str, name: str, value: Any, error: ValidationError) -> UserError:
    details = error.errors(include_url=False)
    found = details[0]["input"]
    # A place inside the value; for one of several types, pydantic names the type there.
    place = name if found is value else f"{name}[{details[0]['loc'][0]!r}]"
    types = {EXPECTED.get(d["type"], d["msg"]): None for d in details if d["input"] is found}
    hint = ""
    if any(d["type"] == "string_type" for d in details):
        if isinstance(found, bool):
            hint = "; YAML reads yes, no, on and off as true and false: put them in quotes"
        elif found is not None and not isinstance(found, dict | list):
            hint = "; put it in quotes"
    return UserError(f"{where}: {place} is {_described(found)}: expected {' or '.join(types)}{hint}")


def _described(value: Any) -> str:
    """A value in a message: briefly, and as YAML has it."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str | bytes) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _build(kind: type[T], values: Mapping[str, Any], where: str, flags: bool = True) -> T:
    nothing = dataclasses.MISSING
    missing = [
        field.name
        for field in _fields(kind)
        if field.default is nothing and field.default_factory is nothing and field.name not in values
    ]
    if missing:
        known = [field.name for field in _fields(kind)]
        how = ", or as " + ", ".join("--" + name.replace("_", "-") for name in missing) if flags else ""
        where_expected = "in a spec file" if flags else f"as 'name: value' among {', '.join(known)}"
        raise UserError(f"{where}: missing {', '.join(missing)}: expected {where_expected}{how}")
    return kind(**values)
