"""Plugins: files of one's own that add algorithms, samplers, metrics or tasks to the registries.

A plugin is a Python file that is run once in every process of a job: in the driver, and in each of Ray's workers, to
which its text travels, so that it need not be on every node. Packages offer theirs by an entry point of the group
`mrd_bench.plugins` that names a module. What was loaded is part of a run's identity, by the hash of its text.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from scoring.errors import UserError, first_line

GROUP = "mrd_bench.plugins"


@dataclass(frozen=True)
class Plugin:
    """A file that adds to the registries.

    Attributes:
        name: of the file, for messages.
        text: what is in it.
        module: where it is installed as a module of that name; None for a file.
    """

    name: str
    text: str
    module: str | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


_LOADED: dict[str, Plugin] = {}


def loaded_plugins() -> tuple[Plugin, ...]:
    """Those of this process, in the order in which they were loaded."""
    return tuple(_LOADED.values())


def read_plugin(path: str | Path) -> Plugin:
    """A plugin file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Plugin(str(path), Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"plugin {str(path)!r} cannot be read ({first_line(error)}): expected a Python file") from error


def installed_plugins() -> list[Plugin]:
    """Those that installed packages offer.

    Raises:
        UserError: a module of that name cannot be found.
    """
    plugins = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.value, point.name)):
        module = _imported(point.name, point.module)
        file = getattr(module, "__file__", None)
        plugins.append(Plugin(point.name, Path(file).read_text(encoding="utf-8") if file else "", point.module))
    return plugins


def load_plugins(plugins: Iterable[Plugin]) -> None:
    """Run each plugin that this process has not run yet.

    Raises:
        UserError: one fails; the message names the file, the line and the error.
    """
    for plugin in plugins:
        if plugin.sha256 in _LOADED:
            continue
        if plugin.module is not None:
            _imported(plugin.name, plugin.module)
        else:
            _run(plugin)
        _LOADED[plugin.sha256] = plugin


def _imported(name: str, module: str) -> ModuleType:
    try:
        return import_module(module)
    except Exception as error:
        raise _failed(name, error, None) from error


def _run(plugin: Plugin) -> None:
    # A name of its own, by which pickle finds its classes in every process.
    module = ModuleType(f"mrd_bench_plugin_{plugin.sha256[:16]}")
    module.__file__ = plugin.name
    sys.modules[module.__name__] = module
    try:
        exec(compile(plugin.text, plugin.name, "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[module.__name__]
        raise _failed(plugin.name, error, plugin.name) from error


def _failed(name: str, error: Exception, file: str | None) -> UserError:
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f", line {line}" if line else ""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return UserError(f"plugin {name}{where}: {kind}{first_line(error)}")
