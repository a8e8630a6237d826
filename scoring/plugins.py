"""Plugins: the user's files that add algorithms, samplers, metrics or tasks to the registries.

A plugin is a Python file that is run once in every process of a job: in the driver, and in each of Ray's workers. Its
text is sent to them, so the file need not be on every node. Packages offer plugins by an entry point of the group
`mrd_bench.plugins` that names a module. Loaded plugins are part of a run's identity, by the hashes of their texts.
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
from scoring.reading import read_text

GROUP = "mrd_bench.plugins"


@dataclass(frozen=True)
class Plugin:
    """A file that adds to the registries.

    Attributes:
        name: the name of the file, for messages.
        text: the source code in it.
        module: the name of the module, for a plugin of an installed package; None for a file.
    """

    name: str
    text: str
    module: str | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


_LOADED: dict[str, Plugin] = {}


def loaded_plugins() -> tuple[Plugin, ...]:
    """The plugins of this process, in the order in which they were loaded."""
    return tuple(_LOADED.values())


def read_plugin(path: str | Path) -> Plugin:
    """Read a plugin file.

    Raises:
        UserError: the file cannot be read, or is not named as one of Python: data may happen to be a program too.
    """
    if Path(path).suffix != ".py":
        raise UserError(f"plugin {str(path)!r}: expected a Python file, named .py")
    return Plugin(str(path), read_text(path, "a Python file", f"plugin {str(path)!r}"))


def installed_plugins() -> list[Plugin]:
    """The plugins that installed packages offer.

    Raises:
        UserError: the module of one cannot be imported.
    """
    plugins = []
    for entry_point in sorted(entry_points(group=GROUP), key=lambda entry_point: (entry_point.value, entry_point.name)):
        module = _imported(entry_point.name, entry_point.module)
        file = getattr(module, "__file__", None)
        text = Path(file).read_text(encoding="utf-8") if file else ""
        plugins.append(Plugin(entry_point.name, text, entry_point.module))
    return plugins


def load_plugins(plugins: Iterable[Plugin]) -> None:
    """Run each plugin that this process has not run yet.

    Raises:
        UserError: a plugin fails; the message names the file, the line and the error.
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
    except (Exception, SystemExit) as error:
        raise _failed(name, error, None) from error


def _run(plugin: Plugin) -> None:
    # A unique module name, by which pickle finds the plugin's classes in every process.
    module = ModuleType(f"mrd_bench_plugin_{plugin.sha256[:16]}")
    module.__file__ = plugin.name
    sys.modules[module.__name__] = module
    try:
        exec(compile(plugin.text, plugin.name, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise _failed(plugin.name, error, plugin.name) from error


def _failed(name: str, error: BaseException, file: str | None) -> UserError:
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f", line {line}" if line else ""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return UserError(f"plugin {name}{where}: {kind}{first_line(error)}")
