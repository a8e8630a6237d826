"""Spec files: YAML, a mapping of settings to values, read so that every message can name the line.

The fields of a settings class (`scoring.settings`) are the names that a file may set; the flag of `learning_rate` is
`--learning-rate`. A value that YAML reads as another type than its field has is refused, never guessed at.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from scoring.errors import UserError
from scoring.reading import read_text
from scoring.settings import MAPPING, build, current_naming, described, naming, settings_of, unknown_setting

Lines = dict[tuple[str | int, ...], int]


@contextmanager
def spec_file(
    path: str | Path | None, others: Mapping[str, Any], *kinds: type[Any], what: str = "spec file"
) -> Iterator[Any]:
    """Settings from a file, if there is one, with others in place of the file's; within the context messages
    name the file's lines.

    Paths among the values stay as they are: relative ones are relative to the working directory.

    Args:
        path: a YAML file, a mapping of settings to values; None: there is none.
        others: values by name that were set elsewhere: by flags, or by arguments.
        kinds: the settings classes; the context gives one of each, or the one alone.
        what: the file is, for messages.

    Raises:
        UserError: one line that names the file and line, or the flag, at fault.
    """
    values, lines = read_mapping(path, what) if path else ({}, {})
    # A value of the file that is replaced is not looked at, and its line not named.
    values = {name: value for name, value in values.items() if name not in others} | dict(others)
    lines = {keys: line for keys, line in lines.items() if keys[0] not in others}
    with naming(dataclasses.replace(current_naming(), file=str(path) if path else None, lines=lines)):
        names = {kind: [setting.name for setting in settings_of(kind)] for kind in kinds}
        known = [name for kind in kinds for name in names[kind]]
        for name in values:
            if name not in known:
                raise unknown_setting(str(name), known)
        made = [build(kind, {name: values[name] for name in names[kind] if name in values}) for kind in kinds]
        yield made[0] if len(made) == 1 else made


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


class _Dumper(yaml.SafeDumper):
    """YAML that `_Loader` reads as what it was: text that would be a number there, such as 5e-5, is put in quotes."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def as_yaml(values: Mapping[str, Any]) -> str:
    """A mapping as a spec file has it, a setting a line, in order; `read_mapping` gives it back."""
    return yaml.dump(
        dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )


def read_mapping(path: str | Path, what: str = "spec file") -> tuple[dict[Any, Any], Lines]:
    """A YAML file, as a mapping; and the line of each of its keys, by the keys that lead there.

    Args:
        what: the file is, for messages.

    Raises:
        UserError: one line that names the file, and the line at fault.
    """
    text = read_text(path, "a YAML file", f"{what} {str(path)!r}")
    loader = _Loader("")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except Exception as error:  # bare ones too: the date 2024-13-45 is a ValueError
        raise UserError(f"{path}{_at_line(error, text)}: not valid YAML ({_problem(error)})") from error
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise UserError(f"{path} is {described(values)}: expected {MAPPING}")
    lines: Lines = {}
    try:
        for keys, line in _lines(node):
            lines[keys] = line
            if len(lines) > MOST_ENTRIES:
                raise UserError(f"{path} has more than {MOST_ENTRIES} entries, aliases counted: expected a spec")
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}{_at_line(error, text)}: {error.problem}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML (an alias contains itself)") from None
    return values, lines


# The kinds of values that JSON has too: specs are kept as JSON, and so are their hashes made.
_KINDS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}
MOST_ENTRIES, MOST_DIGITS = 10_000, 400


def _lines(node: yaml.Node | None, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """The line of each key and entry below a node, by the keys that lead there; other kinds of values are refused."""
    if node is not None and node.tag not in _KINDS:
        kind = node.tag.rpartition(":")[2]
        found = "a date" if kind == "timestamp" else f"of YAML's kind {kind!r}"
        raise _at(node, f"{path[-1] if path else 'the file'} is {found}: expected text; put it in quotes")
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > MOST_DIGITS:
        raise _at(node, f"{path[-1] if path else 'the file'} has {len(node.value)} digits: expected a smaller number")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise _at(key, f"the key {key.value!r} is no text: put it in quotes")
            keys = (*path, str(key.value))
            yield keys, key.start_mark.line + 1
            yield from _lines(value, keys)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*path, number), value.start_mark.line + 1
            yield from _lines(value, (*path, number))


def _at(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


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
