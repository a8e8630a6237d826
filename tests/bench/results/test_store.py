"""The result store: written by many, killed at any moment, damaged, read without this project."""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bench.cli import main
from bench.results import store as store_module
from bench.results.export import exported
from bench.results.store import SCHEMAS, TABLE_KEY, VERSION_KEY, Results, Store, merge, read_stores
from scoring.errors import UserError
from tests.paths import ROOT


def run_row(name: str, **more: Any) -> dict[str, Any]:
    return {
        "run": name,
        "status": "finished",
        "algorithm": "NPO",
        "selection": "all",
        "seed": 0,
        "metrics": [("completeness", 0.25), ("utility", 0.5)],
        "spec": json.dumps({"algorithm": "NPO", "seed": 0}),
        "packages": "{}",
    } | more


def runs(*names: str, **more: Any) -> pa.Table:
    return pa.Table.from_pylist([run_row(name, **more) for name in names], SCHEMAS["runs"])


def names(results: Results) -> list[str]:
    return sorted(results.runs["run"].to_pylist())


def only_file(root: Path, table: str = "runs") -> Path:
    (path,) = (root / table).rglob("*.parquet")
    return path


# --- What is written is read --------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store.write("runs", runs("a", "b", updates=7), "authors", "fig2")
    store.write("runs", runs("c"), "tofu", "fig2")
    store.write("samples", pa.table({"run": ["a"], "sample_id": ["x"], "updates": [3]}), "authors", "fig2")
    store.write("scores", pa.table({"scores": ["h"], "sample_id": ["x"], "mrd": [0.5]}), "authors", "fig2")
    found = store.read()
    assert names(found) == ["a", "b", "c"]
    row = next(row for row in found.runs.to_pylist() if row["run"] == "a")
    assert row["task"] == "authors"
    assert row["experiment"] == "fig2"
    assert row["store"] == str(tmp_path / "s")
    assert dict(row["metrics"]) == {"completeness": 0.25, "utility": 0.5}
    assert row["updates"] == 7
    assert row["reason"] is None
    assert found.samples.to_pylist()[0]["updates"] == 3
    assert found.scores.to_pylist()[0]["mrd"] == 0.5
    assert found.skipped == ()
    assert names(store.read(task="tofu")) == ["c"]
    assert names(store.read(experiment="fig2")) == ["a", "b", "c"]
    assert names(store.read(task="tofu", experiment="other")) == []
    both = merge([found, store.read(task="tofu")])
    assert names(both) == ["a", "b", "c", "c"]


def test_the_same_again_changes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.write("runs", runs("a"), "authors", "x")
    written = Path(first).read_bytes()
    assert store.write("runs", runs("a"), "authors", "x") == first
    assert Path(first).read_bytes() == written
    assert names(store.read()) == ["a"]
    assert store.write("runs", runs("a", seed=1), "authors", "x") != first
    assert names(store.read()) == ["a", "a"]


def test_others_read_it_without_this_project(tmp_path: Path) -> None:
    """One table in files of one schema, with partitions as columns, also where a file has nothing in a column."""
    store = Store(tmp_path)
    store.write("runs", runs("a", mean_log_mrd=-5.5), "authors", "fig2")
    store.write("runs", runs("b"), "tofu", "my-sweep.1")
    frame = pd.read_parquet(tmp_path / "runs").sort_values("run")
    assert frame["task"].tolist() == ["authors", "tofu"]
    assert frame["experiment"].tolist() == ["fig2", "my-sweep.1"]
    assert dict(frame["metrics"].iloc[0]) == {"completeness": 0.25, "utility": 0.5}
    assert frame["mean_log_mrd"].iloc[0] == -5.5
    assert pd.isna(frame["mean_log_mrd"].iloc[1])

    source = f"read_parquet('{tmp_path}/runs/**/*.parquet', hive_partitioning=true)"
    rows = duckdb.sql(f"SELECT run, task, metrics['utility'] FROM {source} ORDER BY run").fetchall()
    assert rows == [("a", "authors", 0.5), ("b", "tofu", 0.5)]

    lazy = pl.scan_parquet(tmp_path / "runs" / "**" / "*.parquet", hive_partitioning=True)
    read = lazy.sort("run").collect()
    assert read["experiment"].to_list() == ["fig2", "my-sweep.1"]
    assert read["metrics"].to_list()[0] == {"completeness": 0.25, "utility": 0.5}


def test_an_optional_column_is_in_a_file_where_it_has_a_value(tmp_path: Path) -> None:
    """Files without it are the same bytes as before there was one, and read beside those that have it."""
    store = Store(tmp_path)
    without = store.write("runs", runs("a"), "authors", "x")
    assert "mean_log_flip_time" not in pq.read_schema(without).names
    with_it = store.write("runs", runs("b", mean_log_flip_time=1.5), "authors", "x")
    assert "mean_log_flip_time" in pq.read_schema(with_it).names
    assert {row["run"]: row["mean_log_flip_time"] for row in store.read().runs.to_pylist()} == {"a": None, "b": 1.5}
    source = f"read_parquet('{tmp_path}/runs/**/*.parquet', hive_partitioning=true, union_by_name=true)"
    assert duckdb.sql(f"SELECT run, mean_log_flip_time FROM {source} ORDER BY run").fetchall() == [
        ("a", None),
        ("b", 1.5),
    ]
    lazy = pl.scan_parquet([with_it, without], hive_partitioning=True, missing_columns="insert")
    assert lazy.sort("run").collect()["mean_log_flip_time"].to_list() == [None, 1.5]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A store's URI in an object store: moto's S3 in a process of its own."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _host, port = server.get_host_and_port()
    import boto3

    key = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **key).create_bucket(Bucket="results")
    yield f"s3://k:s@results/team?scheme=http&endpoint_override=127.0.0.1%3A{port}&region=us-east-1"
    server.stop()


@pytest.mark.slow
def test_an_object_store(bucket: str) -> None:
    root, _, query = bucket.partition("?")
    store = Store(f"{root}/one?{query}")
    with pytest.raises(UserError, match="no results"):
        store.read()
    store.write("runs", runs("a", "b"), "authors", "fig2")
    store.write("runs", runs("a", "b"), "authors", "fig2")
    again = Store(f"{root}/one?{query}")
    assert names(again.read(task="authors")) == ["a", "b"]
    assert again.read().skipped == ()
    # Its name goes on a page that is published: without key and options.
    assert set(again.read().runs["store"].to_pylist()) == {"s3://results/team/one"}


def test_a_file_uri(tmp_path: Path) -> None:
    Store(f"file://{tmp_path}/s").write("runs", runs("a"), "authors", "x")
    assert names(Store(tmp_path / "s").read()) == ["a"]


# --- Many writers, and killed ones --------------------------------------------------------------------------

WRITER = """
import sys
from tests.bench.results.test_store import runs
from bench.results.store import Store
root, who, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = Store(root)
for n in range(count):
    store.write("runs", runs(f"{who}-{n}"), "authors", f"e{n % 3}")
"""


@pytest.mark.slow
def test_eight_writers_lose_nothing(tmp_path: Path) -> None:
    """1,000 runs each, a file a run, while somebody reads: no run is lost, and none is ever seen half."""
    each = 1000
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(who), str(each)], cwd=ROOT)
        for who in range(8)
    ]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        time.sleep(2)
        if (tmp_path / "runs").is_dir():
            found = Store(tmp_path).read()
            assert found.skipped == ()
            assert found.runs.num_rows >= seen
            seen = found.runs.num_rows
    assert [writer.returncode for writer in writers] == [0] * 8
    found = Store(tmp_path).read()
    assert found.skipped == ()
    assert names(found) == sorted(f"{who}-{n}" for who in range(8) for n in range(each))


# Each child writes samples and then their run, as `collect.add` does, says so, and is killed at some moment.
KILLER = """
import os, random, signal, sys, time
import pyarrow as pa
from tests.bench.results.test_store import runs
from bench.results.store import Store
root, kills, rng = sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))
store = Store(root)
for round in range(kills):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        for n in range(10**6):
            name = f"{round}-{n}"
            ids = [f"s{i}" for i in range(200)]
            store.write("samples", pa.table({"run": [name] * 200, "sample_id": ids}), "authors", "x")
            store.write("runs", runs(name), "authors", "x")
            os.write(tell, f"{name}\\n".encode())
    os.close(tell)
    os.read(told, 1)
    time.sleep(rng.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    rest = b""
    while chunk := os.read(told, 65536):
        rest += chunk
    os.close(told)
    print(f"{round}-0", *[line for line in rest.decode().split("\\n")[1:] if line], flush=True)
"""


@pytest.mark.slow
def test_a_hundred_kills_leave_a_readable_store(tmp_path: Path) -> None:
    """What was said to be written is there, whole, with its samples; what was not is there whole or not at all."""
    kills = 100
    process = subprocess.Popen(
        [sys.executable, "-c", KILLER, str(tmp_path), str(kills), "7"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    told: set[str] = set()
    for number, line in enumerate(process.stdout):
        told |= set(line.split())
        if number % 10 == 9 or number == kills - 1:
            found = Store(tmp_path).read()
            assert found.skipped == ()
            written = names(found)
            assert told <= set(written)
            assert len(written) == len(set(written))
            samples: dict[str, int] = {}
            for run in found.samples["run"].to_pylist():
                samples[run] = samples.get(run, 0) + 1
            assert all(samples[run] == 200 for run in written)
    assert process.wait() == 0
    assert number == kills - 1
    # Killed in the midst of a write, most of the time: else this would test nothing.
    assert list(tmp_path.rglob(".*.tmp"))


# --- What cannot be read ------------------------------------------------------------------------------------


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    Store(tmp_path).write("runs", runs("sound"), "authors", "x")
    return tmp_path


def skipped(root: Path) -> str:
    """Why the one file is skipped that is; the other is read all the same."""
    found = Store(root).read()
    assert names(found) == ["sound"]
    (each,) = found.skipped
    assert each.path.startswith(str(root))
    return each.reason


def test_a_truncated_file(sound: Path) -> None:
    other = Path(Store(sound).write("runs", runs("other"), "authors", "y"))
    whole = other.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        other.write_bytes(whole[:size])
        assert "damaged" in skipped(sound)


def test_flipped_bits_are_noticed(sound: Path) -> None:
    """Every page has a checksum: a changed number is not read as another."""
    many = pa.Table.from_pylist([run_row(f"r{n}", seconds=float(n)) for n in range(500)], SCHEMAS["runs"])
    other = Path(Store(sound).write("runs", many, "authors", "y"))
    whole = other.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    rng = random.Random(3)
    for _ in range(20):
        place = rng.randrange(4, len(whole) - footer)
        other.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        found = Store(sound).read()
        if found.skipped:
            assert "damaged" in found.skipped[0].reason
            assert names(found) == ["sound"]
        else:
            # A bit that means nothing, such as one of a page's header that is not used.
            assert [row["seconds"] for row in found.runs.to_pylist() if row["run"] == "r499"] == [499.0]
            assert found.runs.num_rows == 501


def test_foreign_files(sound: Path) -> None:
    folder = only_file(sound).parent
    foreign = folder / "foreign.parquet"
    pq.write_table(pa.table({"run": ["x"]}), foreign)
    assert "none of runs" in skipped(sound)
    foreign.unlink()
    (folder / "notes.txt").write_text("hello")
    assert "not where runs" in skipped(sound)
    (folder / "notes.txt").unlink()
    stray = sound / "runs" / "stray.parquet"
    stray.write_bytes(only_file(sound).read_bytes())
    assert "not where runs" in skipped(sound)
    stray.unlink()
    samples = Path(Store(sound).write("samples", pa.table({"run": ["a"], "sample_id": ["b"]}), "authors", "x"))
    samples.rename(folder / "samples.parquet")
    assert "none of runs" in skipped(sound)


def test_a_column_of_another_type(sound: Path) -> None:
    table = runs("other").drop(["seed"]).append_column("seed", pa.array(["three"]))
    path = only_file(sound).parent / "typed.parquet"
    pq.write_table(table.replace_schema_metadata({VERSION_KEY: "1", TABLE_KEY: "runs"}), path)
    assert "damaged" in skipped(sound)


def test_a_newer_version(sound: Path) -> None:
    path = only_file(sound).parent / "new.parquet"
    pq.write_table(runs("new").replace_schema_metadata({VERSION_KEY: "99", TABLE_KEY: "runs"}), path)
    assert "newer mrd-bench" in skipped(sound)


def test_older_versions_are_brought_up_to_date(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2 counts seconds in milliseconds, version 3 renames a column; files of all three lie side by side."""
    old = SCHEMAS["runs"]
    new = pa.schema([*(each for each in old if each.name != "seconds"), ("milliseconds", pa.float64())])

    def to_2(name: str, table: pa.Table) -> pa.Table:
        place = table.column_names.index("seconds")
        return table.set_column(place, "ms", pc.multiply(table["seconds"], 1000.0))

    def to_3(name: str, table: pa.Table) -> pa.Table:
        return table.rename_columns(["milliseconds" if each == "ms" else each for each in table.column_names])

    Store(sound).write("runs", runs("first", seconds=2.0), "authors", "x")
    second = to_2("runs", runs("second", seconds=3.0))
    pq.write_table(
        second.replace_schema_metadata({VERSION_KEY: "2", TABLE_KEY: "runs"}),
        next((sound / "runs").rglob("*.parquet")).parent / "second.parquet",
    )
    monkeypatch.setattr(store_module, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(store_module, "MIGRATIONS", {1: to_2, 2: to_3})
    monkeypatch.setitem(SCHEMAS, "runs", new)
    fresh = pa.Table.from_pylist([{"run": "third", "milliseconds": 4.0}], new)
    Store(sound).write("runs", fresh, "authors", "x")
    found = Store(sound).read()
    assert found.skipped == ()
    read = {row["run"]: row["milliseconds"] for row in found.runs.to_pylist()}
    assert {name: read[name] for name in ("first", "second", "third")} == {
        "first": 2000.0,
        "second": 3000.0,
        "third": 4.0,
    }


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results; expected a store"):
        Store(tmp_path / "nothing").read()
    with pytest.raises(UserError, match=r"cannot be opened"):
        Store("ftp://host/x")
    with pytest.raises(UserError, match=r"experiment 'a/b': expected letters"):
        Store(tmp_path).write("runs", runs("a"), "authors", "a/b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to"):
        Store(tmp_path / "file").write("runs", runs("a"), "authors", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_killed_write_is_not_in_the_way(sound: Path) -> None:
    folder = only_file(sound).parent
    (folder / ".1.abc.parquet.tmp").write_bytes(b"PAR1 half")
    found = Store(sound).read()
    assert names(found) == ["sound"]
    assert found.skipped == ()


# --- list, show, export -------------------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    store = Store(tmp_path / "store")
    store.write("runs", runs("abc1", "abd2"), "authors", "fig2")
    store.write("runs", runs("eee3", status="diverged", reason="loss is nan", metrics=[]), "tofu", "fig3")
    store.write("samples", pa.table({"run": ["abc1"], "sample_id": ["s 1"], "num_tokens": [4]}), "authors", "fig2")
    store.write("scores", pa.table({"scores": ["h"], "sample_id": ["s 1"], "mrd": [0.125]}), "authors", "fig2")
    return tmp_path / "store"


def test_list(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (filled / "runs" / "odd.parquet").write_bytes(b"?")
    assert main(["results", "list", str(filled)]) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[1] == ["authors", "fig2", "2", "0", "1", "1", "1", "NPO"]
    assert lines[2] == ["tofu", "fig3", "1", "1", "1", "1", "0", "NPO"]
    assert "odd.parquet: not where runs" in err


def test_a_list_needs_no_pytorch(filled: Path) -> None:
    """Which takes seconds to load, and a list of a million runs less than one."""
    program = f"""
import sys
from bench.cli import main
assert main(["results", "list", {str(filled)!r}]) == 0
print(*(name in sys.modules for name in ("torch", "transformers", "ray")))
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.splitlines()[-1] == "False False False"


def test_a_list_of_several_stores(filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Algorithms, selections and seeds that both have count once; a run without a status has not finished."""
    other = Store(tmp_path / "other")
    other.write("runs", runs("x", "y", algorithm="GA", seed=3), "authors", "fig2")
    other.write("runs", runs("z", status=None, selection=None), "authors", "fig2")
    other.write("answers", pa.table({"run": ["x"], "set": ["forget"], "sample_id": ["s 1"]}), "authors", "fig2")
    assert main(["results", "list", str(filled), str(tmp_path / "other")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["authors", "fig2", "5", "1", "2", "2", "1", "GA,", "NPO"]
    assert [line[:2] for line in lines[1:]] == [["authors", "fig2"], ["tofu", "fig3"]]


def test_show(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", "show", str(filled), "abc"]) == 0
    out = capsys.readouterr().out
    assert "completeness                  0.25" in out
    assert out.splitlines()[-1].split() == ["s", "1", "4", "0.125", "–", "–"]
    assert main(["results", "show", str(filled), "ab"]) == 2
    assert "beginning of 2: abc1, abd2" in capsys.readouterr().err
    assert main(["results", "show", str(filled), "zzz"]) == 2
    assert "run 'zzz' is not there" in capsys.readouterr().err


def test_export_csv_and_json(filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs.csv"
    assert main(["results", "export", str(filled), "--out", str(out)]) == 0
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["run"] for row in rows] == ["abc1", "abd2", "eee3"]
    assert [row["utility"] for row in rows] == ["0.5", "0.5", ""]
    assert rows[2]["reason"] == "loss is nan"
    capsys.readouterr()
    assert main(["results", "export", str(filled), "--format", "json", "--task", "authors"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["run"], row["completeness"]) for row in found] == [("abc1", 0.25), ("abd2", 0.25)]
    assert main(["results", "export", str(filled), "--table", "scores", "--format", "csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["mrd"] == "0.125"
    for flags, problem in (
        (["--format", "cvs"], "did you mean 'csv'"),
        (["--table", "run"], "did you mean 'runs'"),
        (["--out", str(tmp_path / "no" / "x.csv")], "cannot be written to"),
    ):
        assert main(["results", "export", str(filled), *flags]) == 2
        assert problem in capsys.readouterr().err


def test_export_latex_escapes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("samples", pa.table({"run": ["a"], "sample_id": ["50%_of {x} & $y$ \\ ~ ^ #"]}), "authors", "x")
    text = exported(read_stores([tmp_path]), "samples", "latex")
    assert r"50\%\_of \{x\} \& \$y\$ \textbackslash{} \textasciitilde{} \textasciicircum{} \#" in text
    assert text.count(r"\\") == 2
    assert text.startswith(r"\begin{tabular}{")
    assert text.endswith("\\end{tabular}\n")
