"""A metric, a quantity and a task from a plugin file are measured like those that come along."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import bench
from bench.cli import main
from bench.jobs.resources import Resources
from bench.metrics import METRICS
from bench.metrics.choice import choose_metrics
from bench.metrics.quantities import QUANTITIES
from bench.metrics.registry import Metric, mean_of
from bench.metrics.table import MODEL
from bench.tasks import TASKS
from scoring import plugins
from scoring.errors import UserError
from scoring.plugins import load_plugins, read_plugin

PLUGIN = """
import numpy as np

from bench.metrics.quantities import QUANTITIES, Continuations
from bench.metrics.registry import METRICS, Metric, mean_of
from bench.tasks import TASKS, Task

RECORDS = [{"id": f"s{n}", "prompt": f"w{n} w{n + 1}", "completion": f"w{n + 2}"} for n in range(12)]


def words_written(set_name, records, setup):
    samples = setup.answers(set_name, records)
    written = yield Continuations(samples, setup.limits(samples))
    return np.array([float(len(text.split())) for text in written]), written


QUANTITIES["words_written"] = words_written
METRICS["verbosity"] = Metric(
    title="Verbosity",
    definition="mean number of words in the greedy answer on the forget set",
    source="this test",
    higher_is_better=False,
    statistic=mean_of("forget", "words_written"),
    columns=(("forget", "words_written"),),
)
TASKS["squares"] = Task(
    name="squares",
    about="twelve squares",
    load=lambda split, source, tokenizer: RECORDS,
    splits=("forget", "retain"),
    default_split="forget",
    retain_of={"forget": "retain"},
    evaluation=lambda split: {"forget": "forget", "retain": "retain"},
    completeness=("verbosity", "ma"),
    utility=(),
    new_tokens=5,
)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The plugin file; what it adds is taken out again, and no later run has it in its identity."""
    monkeypatch.setattr(plugins, "_LOADED", {})
    before = {id(registry): list(registry) for registry in (METRICS, QUANTITIES, TASKS)}
    path = tmp_path / "squares.py"
    path.write_text(PLUGIN)
    yield path
    for registry in (METRICS, QUANTITIES, TASKS):
        for name in [name for name in registry if name not in before[id(registry)]]:
            del registry[name]


def test_a_task_and_its_metric(plugin: Path, model_folder: Path, tmp_path: Path) -> None:
    load_plugins([read_plugin(plugin)])
    result = bench.evaluate(str(model_folder), "squares", resources=Resources(replicas=0), out=tmp_path / "out.parquet")
    metrics = result.metrics.set_index("name")
    assert list(metrics.index) == ["verbosity", "ma"]
    samples = result.rows("sample").query("name == 'words_written'")
    assert list(samples["sample_id"]) == [f"s{n}" for n in range(12)]
    assert list(samples["value"]) == [len(text.split()) for text in samples["text"]]
    verbosity = metrics.loc["verbosity"]
    assert verbosity["value"] == pytest.approx(samples["value"].mean())
    assert 0 < verbosity["value"] <= 5
    assert verbosity["low"] <= verbosity["value"] <= verbosity["high"]
    assert verbosity["samples"] == 12
    # What was loaded is part of what was run.
    assert result.record["spec"]["plugins"] == [read_plugin(plugin).sha256]


def test_a_metric_by_name_on_a_task_that_does_not_name_it(
    plugin: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.parquet"
    # The task does not name the metric, but has a forget set of prompts and completions.
    command = ["evaluate", "--plugin", str(plugin), "--model", str(model_folder), "--task", "replies"]
    command += ["--metrics", "verbosity,ma", "--samples", "3", "--replicas", "0", "--out", str(out)]
    assert main(command) == 0
    rows = [row for row in pq.read_table(out).to_pylist() if row["level"] == "metric"]
    assert {(row["model"], row["name"]) for row in rows} == {(MODEL, "ma"), (MODEL, "verbosity")}
    assert all(row["value"] is not None for row in rows)
    assert "verbosity ↓" in capsys.readouterr().out
    assert main(["metrics", "--plugin", str(plugin)]) == 0
    listed = capsys.readouterr().out
    about = "mean number of words in the greedy answer on the forget set"
    assert re.search(rf"^verbosity +↓ {about}$", listed, re.MULTILINE)
    assert main(["tasks", "--plugin", str(plugin)]) == 0
    assert re.search("^squares +twelve squares", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nsys.exit(5)", "line 2: SystemExit: 5"),
        (
            "from bench.metrics.registry import METRICS\nMETRICS['mine'] = 3",
            "line 2: metric 'mine' is int: expected Metric",
        ),
        (
            "from algorithms.objectives import ALGORITHMS as A\nA['mine'] = len",
            "'mine' is builtin_function_or_method: expected",
        ),
    ],
)
def test_plugins_at_fault_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "mine.py").write_text(text)
    assert main(["metrics", "--plugin", str(tmp_path / "mine.py")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mrd-bench: error: plugin {tmp_path / 'mine.py'}, line 2: ")
    assert message in line


def test_names_that_are_taken_are_refused(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin.write_text(PLUGIN.replace('METRICS["verbosity"]', 'METRICS["UA"]'))
    assert main(["metrics", "--plugin", str(plugin)]) == 2
    line = next(number for number, text in enumerate(PLUGIN.splitlines(), 1) if text.startswith("METRICS["))
    assert capsys.readouterr().err == (
        f"mrd-bench: error: plugin {plugin}, line {line}: metric 'UA': there is 'ua' already; choose another name\n"
    )


def made(*columns: tuple[str, str]) -> Metric:
    return Metric("Made", "made", "this test", True, mean_of(*columns[0]), columns)


def test_any_metric_whose_sets_the_task_has_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, columns in {
        "answered": [("retain", "right"), ("negatives", "min_k")],
        "returned": [("forget", "relearned")],
        "guessed": [("arc_easy", "acc")],
        "slip": [("forget", "rigth")],
    }.items():
        monkeypatch.setitem(METRICS, name, made(*columns))
    authors, novel = TASKS["authors"], TASKS["novel"]
    assert choose_metrics(authors) == authors.metrics
    # The task's own in its order, then the others as they were asked for; each once.
    assert choose_metrics(authors, ["returned", "rr", "answered", "ua", "rr"]) == ("ua", "rr", "returned", "answered")
    assert choose_metrics(novel, ["guessed", "ma"]) == ("ma", "guessed")
    with pytest.raises(UserError, match=r"^metric 'guessed' needs acc of the arc_easy set, which task 'authors' does"):
        choose_metrics(authors, ["guessed"])
    with pytest.raises(UserError, match=r"^metric 'answered' needs right of the retain set, which task 'novel' does"):
        choose_metrics(novel, ["answered"])
    with pytest.raises(UserError, match=r"^unknown quantity of metric 'slip' 'rigth': .*did you mean 'right'"):
        choose_metrics(authors, ["slip"])
    del METRICS["slip"]
    with pytest.raises(UserError, match=r"^unknown metric of task 'authors' 'answerd': .*did you mean 'answered'"):
        choose_metrics(authors, ["answerd"])
    monkeypatch.setitem(METRICS, "slip", made(("forget", "right")))


def test_a_task_that_names_what_is_no_metric_is_refused(plugin: Path, model_folder: Path, tmp_path: Path) -> None:
    plugin.write_text(PLUGIN.replace('completeness=("verbosity", "ma")', 'completeness=("verbose",)'))
    load_plugins([read_plugin(plugin)])
    with pytest.raises(UserError, match=r"^unknown metric of task 'squares' 'verbose': .*did you mean 'verbosity'"):
        bench.evaluate(str(model_folder), "squares", resources=Resources(replicas=0))
