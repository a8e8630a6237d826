"""The folders import one way."""

from __future__ import annotations

import ast
from pathlib import Path

from tests import layout
from tests.paths import ROOT


def test_imports_go_down() -> None:
    modules = layout.module_graph()
    graph = layout.folder_graph(modules)
    assert set(graph) == {folder for group in layout.FLOORS for folder in group}
    assert layout.arrows_up(modules) == []
    assert layout.circles(graph) == []
    assert layout.circles(modules) == []
    assert max(layout.floors(graph).values()) <= 10


def test_what_is_looked_for_is_found(tmp_path: Path) -> None:
    """An import inside a function counts, and so does a ring of three."""
    for name, text in {
        "bench/stats/a.py": "def f():\n    from bench.jobs import b\n",
        "bench/jobs/b.py": "import bench.report.c\n",
        "bench/report/c.py": "from bench.stats.a import f\n",
        "scoring/d.py": "from torch import nn\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    modules = layout.module_graph(tmp_path)
    assert modules["bench.stats.a"] == {"bench.jobs.b"}
    assert layout.arrows_up(modules) == ["bench.stats.a -> bench.jobs.b"]
    assert layout.circles(layout.folder_graph(modules)) == [["bench.jobs", "bench.report", "bench.stats"]]
    assert layout.circles(modules) == [["bench.jobs.b", "bench.report.c", "bench.stats.a"]]


def test_every_folder_says_what_lives_there() -> None:
    for package in layout.PACKAGES:
        for folder in (ROOT / package, *(path for path in (ROOT / package).rglob("*") if any(path.glob("*.py")))):
            said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
            assert said, folder
