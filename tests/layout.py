"""How the folders import each other: `python -m tests.layout` prints the floors, the arrows that run back up, and the
circles.

A folder's floor is one above the highest that it imports. FLOORS is where each folder is meant to stand: an import that
does not go to a floor below is an arrow back up.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.paths import ROOT

FLOORS = (
    ("scoring",),
    ("algorithms", "bench.stats", "bench.files"),
    ("bench.tasks", "bench.report"),
    ("bench.models",),
    ("bench.metrics",),
    ("bench.attacks",),
    ("bench.jobs",),
    ("bench.results", "bench.answers", "bench.watch", "bench.demo", "bench.experiments"),
    ("bench.boards", "bench.speed"),
    ("bench.cli",),
)
PACKAGES = ("scoring", "algorithms", "bench")
Graph = Mapping[str, set[str]]


def module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def folder_of(module: str) -> str:
    """The folder that a module belongs to: a package, or a folder of bench."""
    first, _, rest = module.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "bench" and rest else first


def imports_of(path: Path, root: Path) -> Iterator[str]:
    """The modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.partition(".")[0] in PACKAGES:
                # What is imported from a module may be a module itself.
                place = root.joinpath(*name.split("."))
                is_module = place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()
                yield name if is_module or "." not in name else name.rpartition(".")[0]


def module_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {module_of(path, root): set(imports_of(path, root)) for path in paths}


def folder_graph(modules: Graph) -> dict[str, set[str]]:
    """Folder -> the folders that it imports. What stands in `bench/__init__.py` is the door, and of no folder."""
    graph: dict[str, set[str]] = {}
    for module, imported in modules.items():
        folder = folder_of(module)
        if folder != "bench":
            graph.setdefault(folder, set()).update({folder_of(other) for other in imported} - {folder, "bench"})
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """The groups of nodes that reach each other, by Tarjan's algorithm."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        path.append(node)
        for other in graph.get(node, ()):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in path:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            place = path.index(node)
            group = path[place:]
            del path[place:]
            if len(group) > 1 or node in graph.get(node, ()):
                found.append(sorted(group))

    for node in graph:
        if node not in number:
            visit(node)
    return found


def floors(graph: Graph) -> dict[str, int]:
    """Folder -> its floor, from 1; of a graph without circles."""
    known: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in known:
            known[node] = 1 + max((floor(other) for other in graph.get(node, ())), default=0)
        return known[node]

    for node in graph:
        floor(node)
    return known


def arrows_up(modules: Graph) -> list[str]:
    """The imports that do not go down, by FLOORS: "bench.stats.x -> bench.jobs.y"."""
    meant = {folder: number for number, group in enumerate(FLOORS) for folder in group}
    wrong = []
    for module, imported in modules.items():
        for other in sorted(imported):
            here, there = folder_of(module), folder_of(other)
            if here != there and "bench" not in (here, there) and meant[there] >= meant[here]:
                wrong.append(f"{module} -> {other}")
    return wrong


def main() -> int:
    modules = module_graph()
    graph = folder_graph(modules)
    rings, up = circles(graph), arrows_up(modules)
    levels = floors(graph) if not rings else {}
    for level in range(max(levels.values(), default=0), 0, -1):
        print(f"floor {level}  {', '.join(sorted(name for name in levels if levels[name] == level))}")
    print(f"{len(graph)} folders, {max(levels.values(), default=0)} floors")
    print(f"arrows back up: {len(up)}", *up, sep="\n  ")
    print(f"circles between folders: {len(rings)}", *map(" <-> ".join, rings), sep="\n  ")
    inside = circles(modules)
    print(f"circles between files: {len(inside)}", *map(" <-> ".join, inside), sep="\n  ")
    return int(bool(rings or up or inside))


if __name__ == "__main__":
    sys.exit(main())
