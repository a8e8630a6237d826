"""Whatever comes in from outside: every verb does its work or refuses in one line, and a refusal leaves nothing behind.

Flags, spec files, data files and files of our own that are damaged are drawn at random, the same ones every time.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bench.cli import main
from bench.cli.main import make_parser
from bench.tasks import TASKS
from scoring.files import work_folder
from tests.made_answers import write_difficulty, write_evaluation
from tests.paths import ROOT
from tests.tiny_folders import pairs, write_jsonl
from tests.tiny_tofu import write_task

pytestmark = pytest.mark.slow
OLD = ROOT / "tests" / "old_results"


def drawn(cases: int) -> Callable[[Any], Any]:
    """As many cases, the same ones every time; which fail is said as they are, and not made smaller for a minute."""
    return settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


# --- The promise --------------------------------------------------------------------------------------------


@dataclass
class World:
    """A tiny model, data and finished work; and an empty folder in which each case works.

    Attributes:
        sound: not to be changed.
        scratch: emptied before each case.
        temporary: where Python makes its temporary files.
    """

    sound: Path
    scratch: Path
    temporary: Path

    @property
    def model(self) -> str:
        return str(self.sound / "model")

    @property
    def data(self) -> str:
        return str(self.sound / "data.jsonl")

    def keeps_promise(self, command: Sequence[str], codes: Collection[int] = (0, 2), keeps_work: bool = False) -> None:
        """Run a command: it must be done, or be refused in one line and leave everything as it was.

        Args:
            codes: the exit codes that it may have.
            keeps_work: it may be refused when work has been done, which the next start goes on from.
        """
        before = self.listing()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(list(command))
            except SystemExit as end:  # of argparse
                code = int(end.code or 0)
        printed = err.getvalue()
        said = f"{' '.join(command)}\n{printed}"
        fault = "".join(path.read_text() for path in self.temporary.glob("mrd-bench-fault-*"))
        assert code in codes, f"exit code {code}: {said}\n{fault}"
        assert "Traceback" not in printed + out.getvalue(), said
        assert list(self.temporary.iterdir()) == [], said
        if code == 2:
            # What a progress bar drew before the error is no line of its own.
            lines = [line for line in printed.splitlines() if line.startswith("mrd-bench")]
            others = [line for line in printed.splitlines() if line.strip() and "it/s" not in line and "%|" not in line]
            assert len(lines) == 1, said
            assert others[-1:] == lines, said
            assert keeps_work or self.listing() == before, said

    def listing(self) -> dict[str, int]:
        """Files and folders in reach of the case, with their sizes; locks come and go."""
        paths = [*self.scratch.rglob("*"), *self.sound.rglob("*")]
        return {str(path): path.stat().st_size if path.is_file() else -1 for path in paths}

    def emptied(self) -> Path:
        for path in [*self.scratch.iterdir(), *self.temporary.iterdir()]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return self.scratch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[World]:
    root = tmp_path_factory.mktemp("borders")
    world = World(root / "sound", root / "scratch", root / "temporary")
    for folder in (world.sound, world.scratch, world.temporary):
        folder.mkdir()
    shutil.copytree(model_folder, world.model)
    write_jsonl(Path(world.data), pairs(4))
    write_task(world.sound / "task")
    write_odd_files(world.sound / "odd")
    write_evaluation(world.sound / "evaluation.parquet")
    write_difficulty(world.sound / "difficulty.parquet")
    shutil.copytree(OLD, world.sound / "old")
    before = tempfile.tempdir, os.getcwd()
    tempfile.tempdir = str(world.temporary)
    os.chdir(world.scratch)
    try:
        for command in (
            score_command(world, world.sound / "scores.parquet"),
            unlearn_command(world, world.sound / "run"),
            ["sweep", write_sweep(world.sound / "sweep.yaml", world), *SWEEP, "--out", str(world.sound / "sweep")],
            ["results", "add", str(world.sound / "store"), str(OLD / "sweep"), str(OLD / "run")],
        ):
            assert main(command) == 0, command
        yield world
    finally:
        tempfile.tempdir = before[0]
        os.chdir(before[1])


SWEEP = ["--concurrent", "0"]


def score_command(world: World, out: Path, data: str = "") -> list[str]:
    return ["score", "--model", world.model, "--data", data or world.data, "--replicas", "0", "--out", str(out)]


def unlearn_command(world: World, out: Path, data: str = "") -> list[str]:
    return [
        *("unlearn", "--model", world.model, "--task", data or world.data, "--algorithm", "GA", "--epochs", "1"),
        *("--workers", "0", "--evaluate-samples", "1", "--el-n", "3", "--out", str(out)),
    ]


def show_command(world: World) -> list[str]:
    return ["show", str(world.sound / "evaluation.parquet"), str(world.sound / "difficulty.parquet")]


def write_sweep(path: Path, world: World) -> str:
    base = {"model": world.model, "task": world.data, "epochs": 1, "evaluate": False, "early_stopping": False}
    base |= {"check_every": 0}
    path.write_text(json.dumps({"base": base, "vary": {"algorithm": ["GA"]}, "selections": [{"kind": "all"}]}))
    return str(path)


# --- Odd things ---------------------------------------------------------------------------------------------


def write_odd_files(folder: Path) -> None:
    """Files of which no reader can make anything, under names of every kind of file."""
    folder.mkdir()
    table = io.BytesIO()
    pq.write_table(pa.table({"sample_id": ["a"] * 50, "text": [f"w{n}" for n in range(50)]}), table)
    parquet = table.getvalue()
    contents = {
        "empty": b"",
        "zeros": b"\0" * 64,
        "latin": "text: é".encode("latin-1"),
        "deep": b"[" * 100_000,
        "deep-whole": b'{"a": ' * 900 + b"1" + b"}" * 900,
        "digits": b'{"text": ' + b"9" * 5000 + b"}",
        "list": b"[1, 2]",
        "number": b"3",
        "null": b"null",
        "cut": b'{"text": "w1',
        "cut-parquet": parquet[: len(parquet) // 2],
        "bent-parquet": parquet[:60] + b"\xff" * 20 + parquet[80:],
        "date": b"model: 2024-01-01\nout: !!set {a, b}\n",
        "binary": b"base: !!binary aGVsbG8=\n",
        "loop": b"base: &x [*x]\n",
        "pickle": b"\x80\x04.",
    }
    for name, content in contents.items():
        for suffix in ("jsonl", "json", "parquet", "yaml", "txt", "py"):
            (folder / f"{name}.{suffix}").write_bytes(content)
    (folder / "folder.jsonl").mkdir()
    os.mkfifo(folder / "pipe.jsonl")
    os.mkfifo(folder / "pipe.yaml")


WORDS = (
    "",
    " ",
    "x",
    "none",
    "auto",
    "true",
    ",",
    "=",
    "a=1",
    "a=nan",
    "1,2",
    "a\nb",
    "..",
    "/",
    "/dev/null",
    "x" * 300,
)
NUMBERS = ("nan", "inf", "-inf", "1e308", "-1e308", "-1", "0", "1", "2", "0.5", "1e-320", "9" * 30, "9" * 5000, "0x10")
# They would start Ray, or take minutes: what these flags are given is never sound.
NEVER_SOUND = {"replicas", "workers", "concurrent", "relearn_workers", "most_updates", "harness_limit"}


def odd_values(world: World, name: str) -> st.SearchStrategy[str]:
    files = sorted(str(path) for path in (world.sound / "odd").iterdir())
    if name in NEVER_SOUND:
        return st.sampled_from(["nan", "", "-1", "x", "1.5", "9" * 5000])
    small = st.sampled_from(["0", "1", "2", "0.5"])
    return st.one_of(small, st.sampled_from(WORDS), st.sampled_from(NUMBERS), st.sampled_from(files))


def flags_of(*verbs: str) -> list[argparse.Action]:
    """The flags of a verb, and of what may follow it."""
    parser: argparse.ArgumentParser = make_parser(verbs[0])
    for verb in verbs:
        (choice,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = choice.choices[verb]
    return [action for action in parser._actions if action.option_strings and action.dest not in ("help", "overwrite")]


# Of each verb a sound beginning, which the flags that are drawn follow.
COMMANDS: dict[str, Callable[[World], list[str]]] = {
    "score": lambda w: score_command(w, w.scratch / "out.parquet"),
    "difficulty": lambda w: [
        *("difficulty", "--model", w.model, "--data", w.data, "--measure", "nll", "--replicas", "0"),
        *("--out", str(w.scratch / "out.parquet")),
    ],
    "train": lambda w: [
        *("train", "--model", w.model, "--task", w.data, "--epochs", "1", "--workers", "0", "--evaluate-samples", "1"),
        *("--out", str(w.scratch / "out")),
    ],
    "unlearn": lambda w: unlearn_command(w, w.scratch / "out"),
    "evaluate": lambda w: [
        *("evaluate", "--model", w.model, "--task", str(w.sound / "task" / "tiny.yaml"), "--metrics", "ua"),
        *("--samples", "2", "--replicas", "0", "--out", str(w.scratch / "out.parquet")),
    ],
    "sweep": lambda w: [
        "sweep",
        write_sweep(w.sound / "sweep.yaml", w),
        *SWEEP,
        "--out",
        str(w.scratch / "out"),
        "--trials",
        str(w.sound / "trials"),
    ],
    "plan": lambda w: ["plan", "--model-params", "1e9", "--samples", "1e4"],
    "show": lambda w: [*show_command(w), "--page", str(w.scratch / "page.html")],
    "results list": lambda w: ["results", "list", str(w.sound / "store")],
    "results export": lambda w: ["results", "export", str(w.sound / "store")],
    "leaderboard": lambda w: ["leaderboard", str(w.sound / "store"), "--out", str(w.scratch / "board")],
}


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_what_the_cases_begin_with_is_sound(world: World, verb: str) -> None:
    """Else all that follows would be refused for one and the same reason."""
    world.emptied()
    assert main(COMMANDS[verb](world)) == 0


@given(data=st.data())
@drawn(120)
def test_flags(world: World, data: st.DataObject) -> None:
    verb = data.draw(st.sampled_from(sorted(COMMANDS)))
    world.emptied()
    command = COMMANDS[verb](world)
    for action in data.draw(st.lists(st.sampled_from(flags_of(*verb.split())), min_size=1, max_size=3)):
        flag = data.draw(st.sampled_from(action.option_strings))
        command += [flag] if action.nargs == 0 else [f"{flag}={data.draw(odd_values(world, action.dest))}"]
    world.keeps_promise(command)


# Verbs that would take minutes: of these flags every value must be refused.
REFUSED = ("nan", "inf", "-1", "0", "1e400", "x", "", "9" * 5000, "1e308")
BENCHMARKS = {
    "scoring": ("--samples", "--draws"),
    "evaluation": ("--generations",),
    "difficulty": ("--samples",),
    "experts": ("--experts", "--samples", "--turns"),
    "peers": ("--params", "--samples", "--batch", "--draws", "--turns"),
    "sweep": ("--trials",),
    "cluster": ("--sizes",),
    "engines": ("--samples",),
    "gpu": ("--model-params", "--samples", "--tokens", "--draws", "--batch-tokens"),
    "leaderboard": ("--runs",),
    "statistics": ("--replications",),
}


def test_benchmarks(world: World) -> None:
    for name, flags in BENCHMARKS.items():
        for flag, value in itertools.product(flags, REFUSED):
            world.keeps_promise(["benchmark", name, f"{flag}={value}"], {2})


@given(data=st.data())
@drawn(40)
def test_long_verbs(world: World, data: st.DataObject) -> None:
    world.emptied()
    odd = data.draw(st.sampled_from(sorted(str(path) for path in (world.sound / "odd").iterdir())))
    value = data.draw(st.sampled_from(REFUSED))
    command = data.draw(
        st.sampled_from(
            [
                ["benchmark", "scoring", "--out", str(world.scratch / "no" / "out.json")],
                ["benchmark", "scoring", "--out", odd, "--samples", "0"],
                ["demo", f"--replicas={data.draw(st.sampled_from(['-1', 'nan', '']))}", "--out", "demo"],
                ["demo", "--split", f"x{value}", "--out", "demo"],
                ["demo", "--out", odd],
                ["reproduce", f"x{value}", "--out", "answers"],
                ["reproduce", "table6", "--preset", f"x{value}", "--out", "answers"],
                ["reproduce", "table6", "--spec", odd, "--out", "answers"],
                ["plan", "--model-params", "1e9", "--samples", "10", "--profile", odd],
                ["compare", odd, str(world.sound / "store")],
                ["compare", f"GA,{value}", f"NPO,{value}=", "--results", str(world.sound / "store")],
                ["results", "show", str(world.sound / "store"), f"x{value}"],
                ["results", "add", str(world.scratch / "store"), odd],
                ["--plugin", odd, "tasks"],
                ["tasks", "--plugin", odd.replace(".yaml", ".jsonl")],
            ]
        )
    )
    world.keeps_promise(command)
    assert list(world.scratch.iterdir()) == []


# --- Spec files ---------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, -1, 10**30, 0.5, -0.5, float("nan"), float("inf"), 1e308]),
    st.sampled_from(["", "x", "GA", "NPO", "all", "random", "none", "nan", "2024-01-01", "é\x00", "x" * 300]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)


def bent(value: Any, draw: Callable[[Any], Any]) -> Any:
    """The value with one node of it replaced, removed or renamed."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 3)) == 0:
        return draw(VALUES)
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    copy = dict(value) if isinstance(value, dict) else list(value)
    if draw(st.integers(0, 4)) == 0:
        del copy[key]
    else:
        copy[key] = bent(copy[key], draw)
    return copy


def sound_specs(world: World) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Of each verb that reads specs the command, and a sound spec."""
    out = ["--out", str(world.scratch / "out.parquet")]
    on_model = {"model": world.model, "data": world.data, "replicas": 0}
    base = {"model": world.model, "task": world.data, "epochs": 1, "evaluate": False, "early_stopping": False}
    base |= {"check_every": 0}
    answers = ["--out", str(world.scratch / "answers"), "--concurrent", "0"]
    return {
        "score": (["score", *out, "--spec"], {**on_model, "estimator": "gradient", "sigma": 1e-3}),
        "difficulty": (["difficulty", *out, "--spec"], {**on_model, "measure": ["nll", "mrd"], "thresholds": [0.5]}),
        "unlearn": (
            ["unlearn", "--workers", "0", "--out", str(world.scratch / "out"), "--spec"],
            {**base, "algorithm": "NPO", "settings": {"beta": 0.1}, "retain_term": "none"},
        ),
        "sweep": (
            ["sweep", *answers[:1], str(world.scratch / "out"), *SWEEP, "--trials", str(world.scratch / "trials")],
            {
                "base": base,
                "vary": {"algorithm": ["GA"], "seed": [0]},
                "selections": [{"kind": "random", "size": 2, "count": 1}],
            },
        ),
        "task": (
            [
                "evaluate",
                "--model",
                world.model,
                "--metrics",
                "ua",
                "--samples",
                "1",
                "--replicas",
                "0",
                *out,
                "--task",
            ],
            {
                "protocol": "tofu",
                "forget": str(world.sound / "task" / "forget.jsonl"),
                "retain": str(world.sound / "task" / "retain.jsonl"),
            },
        ),
        **{
            name: (["reproduce", name, *answers, "--spec"], {"demo": dict.fromkeys(keys)})
            for name, keys in {"fig2": ("sweep", "verdict"), "table8": ("model", "noise"), "fig7": ("models",)}.items()
        },
    }


@given(data=st.data())
@drawn(60)
def test_spec_files(world: World, data: st.DataObject) -> None:
    folder = world.emptied()
    specs = sound_specs(world)
    name = data.draw(st.sampled_from(sorted(specs)))
    command, spec = specs[name]
    bent_spec = bent(spec, data.draw)
    text = json.dumps(bent_spec)
    if data.draw(st.integers(0, 5)) == 0:
        cut = data.draw(st.integers(0, len(text)))
        text = text[:cut] + data.draw(st.sampled_from(["", "\t", "\x07", "&a *a", "!!set {x}", ": :", "\ud800"]))
    path = folder / "spec.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    # A number of replicas that is drawn would start Ray.
    if isinstance(bent_spec, dict) and bent_spec.get("replicas", 0) != 0:
        command = [*command[:-1], "--replicas", "0", command[-1]]
    world.keeps_promise([*command, str(path)])


# --- Data files ---------------------------------------------------------------------------------------------

FIELDS = st.sampled_from(["id", "text", "prompt", "completion", "question", "answer", "messages", "x"])
TEXTS = st.one_of(st.sampled_from(["w1 w2", "", " ", "</s>", "<s> w1", "\ufeffw1", "中文", "\ud800"]), VALUES)
TURNS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": TEXTS}))
RECORDS = st.one_of(st.dictionaries(FIELDS, st.one_of(TEXTS, TURNS), max_size=4), VALUES)
COLUMNS: list[pa.Array] = [
    pa.array(["w1 w2", "w3 w4"]),
    pa.array([None, None], pa.null()),
    pa.array([b"\xff\xfe", b"w1"]),
    pa.array([2**62, -(2**62)], pa.timestamp("ms")),
    pa.array([2**62, 1], pa.timestamp("ns", tz="Nowhere/Land")),
    pa.array([-(2**31), 2**31 - 1], pa.int32()).cast(pa.date32()),
    pa.array([2**62, 1], pa.duration("us")),
    pa.array([["w1"], None], pa.list_(pa.string())),
    pa.array([[("role", "user")], []], pa.map_(pa.string(), pa.string())),
    pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array(["w1 w2", "w3"])),
    pa.array(["w1", "w2"], pa.large_string()),
    pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffw")]),
    pa.array([1.5, float("nan")]),
    pa.array([{"role": "user"}, None]),
]


def parquet_bytes(draw: Callable[[Any], Any]) -> bytes:
    names = draw(st.lists(FIELDS, min_size=1, max_size=3))  # a name may come twice
    table = pa.Table.from_arrays([draw(st.sampled_from(COLUMNS)) for _ in names], names)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=draw(st.sampled_from(["none", "snappy", "gzip", "zstd"])))
    content = bytearray(sink.getvalue())
    if draw(st.booleans()):
        rng = random.Random(draw(st.integers(0, 1000)))
        for _ in range(draw(st.integers(1, 8))):
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content[: draw(st.sampled_from([len(content), len(content), len(content) - 9, len(content) // 2]))])


@given(data=st.data())
@drawn(80)
def test_data_files(world: World, data: st.DataObject) -> None:
    folder = world.emptied()
    suffix = data.draw(st.sampled_from(["jsonl", "json", "parquet"]))
    path = folder / f"data.{suffix}"
    if suffix == "parquet":
        path.write_bytes(parquet_bytes(data.draw))
    else:
        records = data.draw(st.lists(RECORDS, min_size=1, max_size=3))
        lines = json.dumps(records) if data.draw(st.booleans()) else "\n".join(map(json.dumps, records))
        path.write_text(lines[: data.draw(st.sampled_from([len(lines), len(lines) // 2]))], encoding="utf-8")
    out = folder / "out.parquet"
    weights = folder / "weights.jsonl"
    shutil.copy(path, weights)
    commands = [
        score_command(world, out, str(path)),
        unlearn_command(world, folder / "run", str(path)),
        [*unlearn_command(world, folder / "run"), "--order", "weighted", "--weights", str(path)],
        [*unlearn_command(world, folder / "run"), "--selection", str(path)],
        [*unlearn_command(world, folder / "run"), "--refusals", str(path)],
        ["results", "add", str(folder / "store"), str(path)],
    ]
    world.keeps_promise(data.draw(st.sampled_from(commands)))


# --- Files of our own ---------------------------------------------------------------------------------------

# What is damaged, and the commands that read it.
STATE: dict[str, Callable[[Path, World], list[str]]] = {
    "old/run": lambda path, w: ["results", "add", str(w.scratch / "to"), str(path)],
    "old/sweep": lambda path, w: ["results", "add", str(w.scratch / "to"), str(path)],
    "run": lambda path, w: unlearn_command(w, path),
    "sweep": lambda path, w: [
        *("sweep", str(w.sound / "sweep.yaml"), *SWEEP, "--out", str(path), "--trials", str(w.sound / "trials"))
    ],
    "trials": lambda path, w: [
        *("sweep", str(w.sound / "sweep.yaml"), *SWEEP, "--out", str(w.scratch / "to"), "--trials", str(path))
    ],
    "store": lambda path, w: ["leaderboard", str(path), "--task", "authors", "--out", str(w.scratch / "board")],
    "store ": lambda path, w: ["results", "export", str(path)],
    "store  ": lambda path, w: ["results", "list", str(path)],
    "store   ": lambda path, w: ["compare", "GA", "NPO", "--results", str(path)],
    "store    ": lambda path, w: ["results", "show", str(path), ""],
    "scores.parquet": lambda path, w: score_command(w, path),
    "evaluation.parquet": lambda path, w: ["show", str(path), "--page", str(w.scratch / "page.html")],
    "difficulty.parquet": lambda path, w: [*show_command(w)[:-1], str(path), "--sort", "mrd"],
}


def bent_parquet(path: Path, draw: Callable[[Any], Any]) -> None:
    """A row, a column or the metadata of a table changed, as no version of ours writes it."""
    table = pq.ParquetFile(path).read()
    metadata = dict(table.schema.metadata or {})
    what = draw(st.sampled_from(["column", "null", "type", "rows", "metadata", "text"]))
    name = draw(st.sampled_from(table.column_names))
    place = table.column_names.index(name)
    if what == "column":
        table = table.drop_columns([name])
    elif what == "null":
        table = table.set_column(place, name, pa.nulls(table.num_rows, table.schema.field(name).type))
    elif what == "type":
        table = table.set_column(
            place, name, pa.array([draw(st.sampled_from([[1], b"\xff", 1.5, "x"]))] * table.num_rows)
        )
    elif what == "text" and pa.types.is_string(table.schema.field(name).type):
        column = pa.array([draw(st.sampled_from(["", "null", "[]", "{}", "[" * 2000, '{"a": 1}']))] * table.num_rows)
        table = table.set_column(place, name, column)
    elif what == "rows":
        table = table.slice(0, draw(st.sampled_from([0, 1])))
    elif metadata:
        key = draw(st.sampled_from(sorted(metadata)))
        metadata[key] = draw(st.sampled_from([b"", b"null", b"[]", b"{}", b"\xff", b"[" * 2000, b"3"]))
    pq.write_table(table.replace_schema_metadata(metadata), path)


@given(data=st.data())
@drawn(80)
def test_files_of_our_own(world: World, data: st.DataObject) -> None:
    folder = world.emptied()
    name = data.draw(st.sampled_from(sorted(STATE)))
    sound, path = world.sound / name.strip(), folder / Path(name.strip()).name
    (shutil.copytree if sound.is_dir() else shutil.copy)(sound, path)
    files = sorted(f for f in path.rglob("*") if f.suffix in (".json", ".parquet") and "model" not in f.parts)
    file = data.draw(st.sampled_from(files)) if sound.is_dir() else path
    how = data.draw(st.sampled_from(["empty", "cut", "zeros", "bent", "bent", "bent", "gone"]))
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    elif how == "bent" and file.suffix == ".json":
        file.write_text(json.dumps(bent(json.loads(content), data.draw)))
    elif how == "bent":
        bent_parquet(file, data.draw)
    else:
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "zeros": b"\0" * len(content)}[how])
    world.keeps_promise(STATE[name](path, world), keeps_work=name == "trials")


def test_a_finished_file_without_rows_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    path = world.emptied() / "scores.parquet"
    pq.write_table(pq.read_table(world.sound / path.name).slice(0, 0), path)
    assert main(STATE[path.name](path, world)) == 2
    assert "scores.parquet has no rows" in capsys.readouterr().err


# --- What is never written over -----------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], command: Sequence[str]) -> str:
    capsys.readouterr()
    assert main(list(command)) == 2
    return capsys.readouterr().err


def test_inputs_and_foreign_files_stay_as_they_are(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder, store = world.emptied(), world.scratch / "store"
    shutil.copytree(world.sound / "store", store)
    mine = folder / "mine.parquet"
    pq.write_table(pa.table({"text": ["w1 w2", "w3 w4"]}), mine)
    inside = next(store.rglob("*.parquet"))
    board = folder / "board"
    board.mkdir()
    (board / "README.md").write_text("# My project\n")
    site = folder / "site"
    site.mkdir()
    (site / "index.html").write_text('<!doctype html>\n<html lang="en"><head><title>Mine</title></head></html>\n')
    figures = folder / "notes.json"
    figures.write_text("not figures")
    scores = folder / "scores.parquet"
    shutil.copy(world.sound / "scores.parquet", scores)
    unlearning = [*unlearn_command(world, folder / "run"), "--order", "weighted"]
    before = {
        path: path.read_bytes() for path in (mine, inside, board / "README.md", site / "index.html", figures, scores)
    }
    for command, said in (
        ([*score_command(world, mine, str(mine)), "--overwrite"], "is what --data names: choose another file"),
        ([*score_command(world, mine), "--overwrite"], "was not written by mrd-bench: choose another file, or remove"),
        (["results", "export", str(store), "--out", str(inside)], "lies in the store"),
        (["leaderboard", str(store), "--out", str(board)], "exists and is not of a leaderboard: choose another folder"),
        (["demo", "--replicas", "0", "--out", str(site)], "exists and is not of a demo: choose another folder"),
        (["leaderboard", str(store), "--out", str(site)], "exists and is not of a leaderboard: choose another folder"),
        (["benchmark", "gpu", "--samples", "0", "--out", str(figures)], "not JSON"),
        ([*unlearning[:-3], str(scores), "--order", "weighted"], "is a file: expected a folder to write to"),
    ):
        assert said in refusal(capsys, command), command
    assert {path: path.read_bytes() for path in before} == before
    # What an earlier run has left is replaced.
    assert main([*score_command(world, scores), "--overwrite", "--tokens", "all"]) == 0
    assert scores.read_bytes() != before[scores]


# --- How a command ends -------------------------------------------------------------------------------------


def test_a_fault_of_our_own_is_one_line_and_a_file(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = world.emptied() / "own.py"
    # A task whose list of splits breaks where it is printed.
    plugin.write_text(
        "import dataclasses\nfrom bench.tasks import TASKS\n"
        "TASKS['broken'] = dataclasses.replace(TASKS['authors'], name='broken', splits=(1,))\n"
    )
    monkeypatch.setattr("bench.tasks.TASKS", dict(TASKS))
    monkeypatch.setattr("scoring.plugins._LOADED", {})
    assert main(["tasks", "--plugin", str(plugin)]) == 70
    (line,) = capsys.readouterr().err.splitlines()
    (saved,) = world.temporary.iterdir()
    assert line.startswith("mrd-bench: a fault of mrd-bench itself (TypeError: ")
    assert line.endswith(f"please report it with {saved}")
    assert "Traceback" in saved.read_text()
    assert "mrd-bench tasks --plugin" in saved.read_text()
    saved.unlink()


@pytest.mark.parametrize("end", ["closed pipe", "SIGTERM"])
def test_ends_of_a_process(end: str, tmp_path: Path) -> None:
    """Nobody reads: quiet. Terminated at work: one line."""
    waiting = tmp_path / "waiting.py"
    waiting.write_text("print('at work', flush=True)\nimport time\ntime.sleep(100)\n")
    command = [sys.executable, "-m", "bench.cli", "measures"]
    command += ["--plugin", str(waiting)] if end == "SIGTERM" else []
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    if end == "SIGTERM":
        assert process.stdout.readline() == "at work\n"
        process.terminate()
    process.stdout.close()
    said = process.stderr.read().strip()
    assert (process.wait(), said) == {
        "closed pipe": (141, ""),
        "SIGTERM": (143, "mrd-bench: terminated; the same command continues"),
    }[end]


def test_work_folders_of_killed_processes_are_removed(world: World) -> None:
    world.emptied()
    script = "import os, tempfile\ntempfile.tempdir = os.environ['AT']\nfrom scoring.files import work_folder\n"
    script += "with work_folder() as folder:\n    (folder / 'x').touch()\n    os.kill(os.getpid(), 9)\n"
    killed = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"AT": str(world.temporary)}, check=False
    )
    assert killed.returncode == -9
    assert len(list(world.temporary.glob("mrd-bench-work-*/x"))) == 1
    with work_folder() as mine:
        (mine / "y").touch()
        with work_folder() as other:
            assert other != mine
            assert (mine / "y").exists(), "its process lives"
        assert list(world.temporary.glob("mrd-bench-work-*/*")) == [mine / "y"]
    assert list(world.temporary.iterdir()) == []


def test_threads_of_this_process(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin sees those of the command; afterwards the process has its own again."""
    monkeypatch.setattr("scoring.plugins._LOADED", {})  # what is in it is in the identity of all that follows
    seen, plugin = tmp_path / "seen", tmp_path / "look.py"
    plugin.write_text(f"import torch\nopen({str(seen)!r}, 'w').write(str(torch.get_num_threads()))\n")
    before = torch.get_num_threads()
    try:
        command = score_command(world, world.emptied() / "out.parquet")
        assert "--threads is 0: expected a whole number from 1 to" in refusal(capsys, [*command, "--threads", "0"])
        torch.set_num_threads(2)
        assert main([*command, "--threads", "1", "--plugin", str(plugin)]) == 0
        assert seen.read_text() == "1"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("says_so", [True, False])
def test_a_file_system_without_locks_is_named(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, says_so: bool
) -> None:
    """Whether locking fails there, or succeeds and keeps nobody out."""

    def no_locks(*_: object) -> None:
        if says_so:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    command = score_command(world, world.emptied() / "out.parquet")
    assert main(command) == 0
    assert "locks" not in capsys.readouterr().err
    command = score_command(world, world.emptied() / "out.parquet")
    monkeypatch.setattr("fcntl.flock", no_locks)
    capsys.readouterr()
    assert main(command) == 0
    assert "this file system has no locks: start nothing else that writes there" in capsys.readouterr().err
