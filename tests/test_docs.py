"""The documentation says what is so: the reference is not stale, links lead somewhere, commands and examples run."""

from __future__ import annotations

import ast
import os
import pydoc
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from algorithms.schedule import Schedule
from bench.cli.flags import settings_from
from bench.cli.main import VERBS, make_parser
from bench.cli.reference import PAGE, SETTINGS, parsers_below
from bench.files.spec import spec_file
from bench.jobs.sweep_plan import SweepSpec
from bench.tasks.custom import TaskFile
from scoring.settings import build, settings_of
from tests.paths import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "first_steps.ipynb"
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
)
PACKAGES = ("scoring", "algorithms", "bench")
# Flags of other programs that the pages name.
FOREIGN_FLAGS = {"--working-dir", "--runtime-env-json", "--address"}
# Commands whose settings are complete without a file.
COMPLETE = ("score", "train", "unlearn", "evaluate", "plan")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", read(page), re.S | re.M) if kind == language]


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)


def spans(page: str) -> list[str]:
    """What stands in backticks, outside of blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def each(language: str) -> list[pytest.ParameterSet]:
    """Every block of a language, in all pages."""
    return [
        pytest.param(page, body, id=f"{page}-{number}")
        for page in PAGES
        for number, body in enumerate(blocks(page, language), start=1)
    ]


def environment() -> dict[str, str]:
    """Of a process that imports this project, from whatever folder."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def python(*arguments: str, folder: Path) -> str:
    """Run Python in a folder; what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- Pages --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_reference_is_what_the_code_says(tmp_path: Path) -> None:
    """In a process of its own: here, other tests may have added to the registries."""
    python("-m", "bench.cli.reference", "--out", str(tmp_path / "reference.md"), folder=tmp_path)
    assert (tmp_path / "reference.md").read_text(encoding="utf-8") == read(PAGE), "stale: run `make docs`"


def test_the_reference_has_every_setting() -> None:
    text = read(PAGE)
    for kind in {kind for kinds in SETTINGS.values() for kind in kinds}:
        assert [setting.name for setting in settings_of(kind) if f"`{setting.flag}`" not in text] == []
    for kind in (SweepSpec, TaskFile):
        assert [setting.name for setting in settings_of(kind) if f"`{setting.name}`" not in text] == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.cli import reference

    assert reference.main(["--out", str(tmp_path / "nowhere" / "page.md")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 150


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, "examples/first_steps.ipynb"])
def test_links_and_pictures_are_there(page: str) -> None:
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M), re.M)
            assert anchor in map(slug, headings), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_and_names_are_there(page: str) -> None:
    """Files of ours and names that can be imported, in backticks."""
    text = prose(page)
    if page == "CHANGELOG.md":  # what was before is there no more
        text = "\n".join(line.split("|")[2] if line.startswith("| `") else line for line in text.splitlines())
    for span in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(rf"({'|'.join(PACKAGES)}|tests|docs|examples)/[\w./-]*", span) and "NAME" not in span:
            assert (ROOT / span).exists(), f"{page}: {span}"
        if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", span):
            assert pydoc.locate(span) is not None, f"{page}: {span}"


# --- Commands -----------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every command of ours in lines of a shell."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[-1:] == ["&"]:
            words.pop()
        for start in (["mrd-bench"], ["python", "-m", "bench.cli"]):
            for place in range(len(words)):
                if words[place : place + len(start)] == start:
                    yield words[place + len(start) :]


@pytest.mark.parametrize(("page", "body"), each("bash"))
def test_commands_are_taken(page: str, body: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in commands(body):
        try:
            parsed = make_parser(arguments[0]).parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{page}: mrd-bench {shlex.join(arguments)}: {capsys.readouterr().err}")
        # A plugin may add the names that a setting has, and a file the settings that are missing.
        if parsed.verb in COMPLETE and not parsed.plugin and not getattr(parsed, "spec", None):
            with settings_from(parsed, *SETTINGS[parsed.verb]):
                pass


def check_flags(page: str, arguments: Sequence[str]) -> None:
    """A command in a sentence: it need not be whole, but its verb and flags are known. PLACEHOLDERS are."""
    verb, *rest = arguments
    if verb.isupper():
        return
    assert verb in {known.name for known in VERBS}, f"{page}: mrd-bench {verb}"
    below = parsers_below(parsers_below(make_parser(verb))[verb])
    if below and rest and not rest[0].isupper() and rest[0] != "...":
        assert rest[0] in below, f"{page}: mrd-bench {' '.join(arguments)}"
    flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
    assert flags <= flags_of(verb), f"{page}: mrd-bench {' '.join(arguments)}"


def flags_of(verb: str) -> set[str]:
    """The flags of a verb and of its sub-commands."""
    parser = parsers_below(make_parser(verb))[verb]
    parsers = [parser, *parsers_below(parser).values()]
    return {flag for parser in parsers for action in parser._actions for flag in action.option_strings}


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_sentences_are_known(page: str) -> None:
    known = FOREIGN_FLAGS.union(*(flags_of(verb.name) for verb in VERBS))
    for span in spans(page):
        if span.startswith("mrd-bench "):
            check_flags(page, span.split()[1:])
        elif span.startswith("--"):
            assert span.split()[0].partition("=")[0] in known, f"{page}: {span}"


@pytest.mark.parametrize(("page", "body"), each("yaml"))
def test_spec_files_are_taken(page: str, body: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(body, encoding="utf-8")
    keys = set(re.findall(r"^(\w+):", body, re.M))
    kinds: tuple[type, ...] = SETTINGS["score"]
    for key, meant in (
        ("base", (SweepSpec,)),
        ("protocol", (TaskFile,)),
        ("groups", (Schedule,)),
        ("algorithm", SETTINGS["unlearn"]),
    ):
        if key in keys:
            kinds = meant
    with spec_file(path, {}, *kinds) as made:
        if isinstance(made, SweepSpec):
            made.checked()


# --- Python -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "body"), each("python"))
def test_python_compiles_and_its_imports_are_there(page: str, body: str) -> None:
    compile(body, page, "exec")
    for node in ast.walk(ast.parse(body)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in PACKAGES:
            module = import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], page


PLUGINS = """
import sys
from pathlib import Path

import numpy as np

from algorithms.samplers import Sampler
from bench.cli import main
from bench.metrics.registry import METRICS, Metric
from scoring.plugins import Plugin, load_plugins

model, data, own_algorithm, *blocks = sys.argv[1:]
load_plugins(Plugin(f"block {number}", text) for number, text in enumerate(blocks))

sampler = Sampler(3, "middle-first")
sampler.set_difficulty(np.array([1.0, 5.0, 2.0]), "abc")
assert sampler.draw(0, 3, np.ones(3, bool)).tolist() == [2, 0, 1]

columns = (("forget", "least_probable"),)
METRICS["least"] = Metric("Least", "", "", False, lambda measured: measured(*columns[0]).mean(-1), columns)
command = ["evaluate", "--model", model, "--task", "towers", "--metrics", "rr,ma,verbatim,least", "--replicas", "0"]
assert main([*command, "--out", "towers.parquet"]) == 0

command = ["difficulty", "--model", model, "--data", data, "--measure", "weakest-token,nll", "--replicas", "0"]
assert main([*command, "--out", "difficulty.parquet"]) == 0

command = ["unlearn", "--plugin", own_algorithm, "--algorithm", "cappedga", "--settings", "cap=3", "--model", model]
command += ["--task", data, "--retain", data, "--max-steps", "2", "--no-early-stopping", "--check-every", "0"]
assert main([*command, "--workers", "0", "--out", "run"]) == 0
"""


@pytest.mark.slow
def test_plugins_of_the_page_and_of_the_example(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """The blocks of docs/extending.md that add to a registry, and the algorithm of examples/, loaded and used. In a
    process of its own: what is loaded changes what runs are known by."""
    added = [body for body in blocks("docs/extending.md", "python") if re.search(r"^[A-Z]+\[\"", body, re.M)]
    assert len(added) == 6
    assert 'ALGORITHMS["CappedGA"]' in added.pop(0)
    own_algorithm = str(EXAMPLES / "own_algorithm.py")
    printed = python("-c", PLUGINS, str(model_folder), str(data_file), own_algorithm, *added, folder=tmp_path)
    for metric in ("rr", "ma", "verbatim", "least"):
        assert re.search(rf"^{metric} [↑↓] +\d", printed, re.M), printed
    assert re.search(r"^weakest-token +\d", printed, re.M), printed
    assert "CappedGA, alpha 0: 2 updates" in printed


# --- Examples -----------------------------------------------------------------------------------------------


def test_score_a_model(model_folder: Path, data_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "score_a_model.py"))["main"](str(model_folder), str(data_file))
    printed = capsys.readouterr().out
    assert "24 records by gradient" in printed


def test_the_sweep_of_the_example_is_one() -> None:
    spec = runpy.run_path(str(EXAMPLES / "sweep.py"))["SPEC"]
    assert build(SweepSpec, spec).checked().vary == {"algorithm": ["GradDiff", "NPO"]}


@pytest.mark.slow
def test_sweep(tmp_path: Path) -> None:
    printed = python(str(EXAMPLES / "sweep.py"), folder=tmp_path)
    assert re.search(r"^selection +\n(random-\S+ +[\d.]+ +[\d.]+\n){3}", printed, re.M), printed


@pytest.mark.slow
def test_unlearn_and_evaluate(tmp_path: Path) -> None:
    printed = python(str(EXAMPLES / "unlearn_and_evaluate.py"), folder=tmp_path)
    assert "GradDiff: 30 updates" in printed
    assert len(re.findall(r"^ *(?:original|model) +(?:rr|ma|retain_rr) ", printed, re.M)) == 6, printed


@pytest.mark.slow
def test_forecast(tmp_path: Path) -> None:
    printed = python(str(EXAMPLES / "forecast.py"), "2", folder=tmp_path)
    assert "40 records forecast, 2 of them forgotten" in printed
    rows = re.findall(r"^ *author\S+ +\d+ +[\d.]+ +([\d.]+) +([\d.]+)$", printed, re.M)
    assert len(rows) == 2, printed
    for forecast, real in rows:
        assert 0.5 < float(forecast) / float(real) < 2, printed


def test_the_notebook_is_saved_with_its_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.execution_count
            assert not [output for output in cell.outputs if output.output_type == "error"]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert "(40, 360)" in str(notebook.cells)
