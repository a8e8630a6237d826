"""Results written by older code still read: to the same leaderboard, the same store files and the same identities."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from bench.boards.board import Board, boards
from bench.boards.page import page
from bench.boards.text import standings_latex
from bench.boards.write import overview
from bench.experiments.reproduce import EXPERIMENTS
from bench.files.identity import with_spec_hash
from bench.files.score_file import Scores, read_scores
from bench.files.spec import read_mapping
from bench.jobs.run_folder import read_run
from bench.jobs.score import ScoreSpec
from bench.jobs.sweep_tables import read_sweep
from bench.jobs.unlearn import NOT_HASHED, UnlearnSpec, identity_of
from bench.report.verdicts import as_table, effect
from bench.results.collect import add
from bench.results.store import Results, Store, read_stores
from bench.stats.estimates import Estimate
from bench.tasks.datasets import load_dataset

ROOT = Path(__file__).parents[3]
LEADERBOARD = ROOT / "results" / "leaderboard"
ANSWERS = sorted((ROOT / "results" / "reproduce-demo").glob("*/record.json"))
DECIDED = sorted((ROOT / "results" / "reproduce-decide").glob("*/record.json"))
OLD = ROOT / "tests" / "old_results"
SPECS = ROOT / "bench" / "experiments" / "specs"
NOT_HASHED_OF_SCORES = ("model", "data", "split")


@pytest.fixture(scope="module")
def committed_store() -> Results:
    return read_stores([LEADERBOARD / "store"])


@pytest.fixture(scope="module")
def committed_board(committed_store: Results) -> Board:
    ranked, notes = boards(dataclasses.replace(committed_store, runs=_with_store_name(committed_store)))
    assert notes == []
    (board,) = ranked
    return board


def _with_store_name(results: Results) -> Any:
    """The runs, with the store named as on the command line that wrote the page, wherever this repository lies."""
    column = results.runs.column_names.index("store")
    names = ["results/leaderboard/store"] * results.runs.num_rows
    return results.runs.set_column(column, "store", [names])


# --- The leaderboard ----------------------------------------------------------------------------------------


def _data(html: str) -> bytes:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return found[1].encode()


def test_the_data_of_the_leaderboard_are_the_same(committed_board: Board) -> None:
    """To the last digit that is printed, which processors round differently."""
    data = _data((LEADERBOARD / "index.html").read_text(encoding="utf-8"))
    assert len(json.loads(data)[0]["runs"]) == 720
    number = re.compile(rb"-?\d+\.?\d*(?:e[+-]?\d+)?")
    today = _data(page([committed_board]))
    assert number.split(today) == number.split(data)
    for before, now in zip(number.findall(data), number.findall(today), strict=True):
        last_digit = 10.0 ** -len(before.partition(b".")[2].partition(b"e")[0])
        assert before == now or float(now) == pytest.approx(float(before), rel=1e-9, abs=1.01 * last_digit)


def test_readme_and_table_of_the_leaderboard_are_the_same(committed_board: Board) -> None:
    assert overview([committed_board], []) == (LEADERBOARD / "README.md").read_text(encoding="utf-8")
    first = next(iter(committed_board.metrics))
    assert standings_latex(committed_board, first) == (LEADERBOARD / "board-0.tex").read_text(encoding="utf-8")


# --- Identities ---------------------------------------------------------------------------------------------


def hash_again(identity: Mapping[str, Any], not_hashed: Sequence[str]) -> str:
    """The hash of a stored identity."""
    content = {name: value for name, value in identity.items() if name != "spec_hash"}
    return with_spec_hash(content, not_hashed)["spec_hash"]


def identity_today(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity that a run with these settings, this model and these data would have today."""
    names = {field.name for field in dataclasses.fields(UnlearnSpec)} - set(UnlearnSpec.EXECUTION)
    spec = UnlearnSpec(**{name: value for name, value in identity.items() if name in names - {"refusals"}})
    model = SimpleNamespace(fingerprint=identity["model_fingerprint"])
    forget = SimpleNamespace(sha256=identity["forget_sha256"])
    retain = SimpleNamespace(sha256=identity["retain_sha256"]) if identity["retain_sha256"] else None
    return identity_of(spec, model, forget, retain)  # type: ignore[arg-type]


def check_score_identity(identity: Mapping[str, Any]) -> None:
    """A score file's identity has the hash and the fields that it would have today."""
    assert hash_again(identity, NOT_HASHED_OF_SCORES) == identity["spec_hash"]
    later = set(ScoreSpec.ADDED_LATER) - identity.keys()  # left out while they have their defaults
    names = {field.name for field in dataclasses.fields(ScoreSpec)} - later
    hashes = {"schema_version", "data_sha256", "model_fingerprint", "spec_hash"}
    assert identity.keys() == hashes | names
    assert load_dataset(identity["data"], identity["split"]).sha256 == identity["data_sha256"]


def test_runs_of_the_store_have_the_same_identity(committed_store: Results) -> None:
    rows = committed_store.runs.to_pylist()
    assert len(rows) == 720
    for row in rows:
        identity = json.loads(row["spec"])
        assert hash_again(identity, NOT_HASHED) == identity["spec_hash"] == row["run"]
        assert identity_today(identity) == identity


def test_scores_of_the_store_have_the_same_identity(committed_store: Results) -> None:
    rows = committed_store.scores.to_pylist()
    assert len(rows) == 400
    identities = {row["spec"] for row in rows}
    assert {json.loads(identity)["spec_hash"] for identity in identities} == {row["scores"] for row in rows}
    for identity in identities:
        check_score_identity(json.loads(identity))


def test_there_are_answers_of_all_experiments() -> None:
    assert [path.parent.name for path in ANSWERS] == sorted(EXPERIMENTS)


@pytest.mark.parametrize("path", [*ANSWERS, *DECIDED], ids=lambda path: "-".join(path.parts[-3:-1]))
def test_answers_of_experiments_have_the_same_identity(path: Path) -> None:
    """Committed answers are of the specs as they stand; those that were made before specs had margins are without."""
    record = json.loads(path.read_text())
    identity = {name: record[name] for name in ("experiment", "preset", "values", "schema_version")}
    assert hash_again(identity, ()) == record["spec_hash"]
    sections, _ = read_mapping(SPECS / f"{record['experiment']}.yaml")
    margins = record["values"].get("margins")
    assert sections[record["preset"]] == {name: value for name, value in record["values"].items() if name != "margins"}
    assert margins in (None, sections.get("margins"))


@pytest.mark.parametrize("path", DECIDED, ids=lambda path: path.parent.name)
def test_verdicts_on_the_page_are_those_of_the_tables(path: Path) -> None:
    """Each claim's number is in its Parquet file, in the finding and on the page of all claims; and it follows from the
    measurements of the experiment, of which some are computed again here."""
    if not (path.parent / "claims.parquet").is_file():
        assert path.parent.name == "tournament"  # asks what the paper does not claim
        return
    rows = pq.read_table(path.parent / "claims.parquet").to_pylist()
    finding = (path.parent / "finding.md").read_text(encoding="utf-8")
    glance = (path.parents[1] / "README.md").read_text(encoding="utf-8")
    assert as_table(rows) in finding
    for row in rows:
        name = effect(Estimate(row["value"], row["low"], row["high"]), row["scale"])
        assert row["low"] <= row["value"] <= row["high"]
        assert any(row["effect"] in line and name in line and row["verdict"] in line for line in glance.splitlines())
    if path.parent.name == "fig3":
        measured = pq.read_table(path.parent / "fig3.parquet")
        hard = np.where(measured["forgotten"].to_numpy(zero_copy_only=False), measured["mean_abs_delta"], np.inf)
        again = stats.spearmanr(-measured["mrd"].to_numpy(), hard).statistic
        assert rows[0]["value"] == pytest.approx(again)
    if path.parent.name == "table1":
        measured = pq.read_table(path.parent / "table1.parquet").to_pylist()
        for row, metric in zip(rows, ("uc_average", "ut_average"), strict=False):
            of_metric = [other for other in measured if other["metric"] == metric and other["arm"] == "MRD"]
            single = [other["difference"] for other in of_metric if other["algorithm"] != "average"]
            assert len(single) == 4
            assert row["value"] == pytest.approx(np.mean(single))


NUMBER = r"[×]?(−?[\d.,]+(?:e[−+]?\d+)?)(%?)"
PRINTED = re.compile(rf"{NUMBER} \[95 % CI {NUMBER} to {NUMBER}\]")


def _numbers(folder: Path) -> np.ndarray:
    """Every value in the tables of an answer that has an interval, with its ends, (N, 3)."""
    found = []
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        stems = [name.removesuffix("_low") for name in table.column_names if name.endswith("_low")]
        names = [(stem, f"{stem}_low", f"{stem}_high") for stem in stems] + [("value", "low", "high")]
        # The rate of reversals, and the selections that are needed, are named apart from their ends.
        names += [(f"{stem}{end}", f"{stem}_low", f"{stem}_high") for stem in stems for end in ("_rate", "_needed")]
        for triple in names:
            if set(triple) <= set(table.column_names):
                found.append(np.array([table[name].to_pylist() for name in triple], dtype=float).T)
    return np.concatenate(found)


@pytest.mark.parametrize("folder", [path.parent for path in DECIDED], ids=lambda folder: folder.name)
def test_numbers_of_a_finding_are_in_its_tables(folder: Path) -> None:
    """Each with its interval, to the digits that are printed; ratios as their logarithms, shares as per cent."""
    known = _numbers(folder)
    with np.errstate(over="ignore"):
        known = np.concatenate([known, np.exp(known), 100 * known])
    for match in PRINTED.finditer((folder / "finding.md").read_text(encoding="utf-8")):
        texts = [text.replace("\N{MINUS SIGN}", "-").replace(",", "") for text in match.groups()[::2]]
        digits = [len(text.partition(".")[2]) if "e" not in text else 0 for text in texts]
        printed = np.array(texts, dtype=float)
        near = np.abs(known - printed) <= 0.51 * 10.0 ** -np.array(digits) + 0.005 * np.abs(printed) * [
            "e" in t for t in texts
        ]
        assert near.all(axis=1).any(), match[0]


# --- Score files, runs and sweeps ---------------------------------------------------------------------------


def test_a_score_file_is_read() -> None:
    table, identity, record = read_scores(OLD / "scores.parquet")
    assert table["sample_id"].to_pylist() == [f"author39-q0{number}" for number in (6, 7, 8, 9)]
    check_score_identity(identity)
    assert identity["estimator"] == "monte-carlo"
    assert record["packages"].keys() >= {"torch", "transformers"}
    scores = Scores.read(OLD / "scores.parquet")
    assert np.isfinite(scores["mrd"]).all()
    assert np.isfinite(scores["mrd_stderr"]).all()
    assert ((scores.probability > 0) & (scores.probability < 1)).all()


def test_a_run_is_read() -> None:
    result = read_run(OLD / "run")
    identity = result.record["spec"]
    assert json.loads((OLD / "run" / "spec.json").read_text()) == identity
    assert hash_again(identity, NOT_HASHED) == identity["spec_hash"]
    assert identity_today(identity) == identity
    assert load_dataset("authors", "forget01").sha256 == identity["forget_sha256"]
    assert result.steps.num_rows == result.record["updates"] == 2
    assert result.epochs["epoch"].to_pylist() == [0, 1, 2]
    assert result.samples.num_rows == 4


def test_a_sweep_is_read() -> None:
    result = read_sweep(OLD / "sweep")
    identity = result.record["spec"]
    assert json.loads((OLD / "sweep" / "spec.json").read_text()) == identity
    assert hash_again(identity, ()) == identity["spec_hash"]
    assert result.record["counts"] == {"finished": 4}
    assert (result.epochs.num_rows, result.samples.num_rows) == (12, 8)
    rows = result.trials.to_pylist()
    assert [(row["algorithm"], row["status"]) for row in rows] == [
        (algorithm, "finished") for algorithm in ("GA", "NPO") for _ in range(2)
    ]
    for row in rows:
        trial = json.loads(row["identity"])
        assert hash_again(trial, NOT_HASHED) == trial["spec_hash"] == row["trial"]
        assert identity_today(trial) == trial
    _, difficulty, _ = read_scores(OLD / "sweep" / "difficulty.parquet")
    check_score_identity(difficulty)


def test_a_store_gets_the_same_files(tmp_path: Path) -> None:
    """Their names are the hashes of what is in them."""
    for name in ("sweep", "run", "scores.parquet"):
        add(Store(tmp_path), OLD / name, "before")
    files = {f"{path.relative_to(tmp_path).parts[0]}/{path.stem}" for path in tmp_path.rglob("*.parquet")}
    assert files == {
        "runs/7d23cf690f88d81fb3e51d5b",
        "runs/c985fc1b86ddfc8b20282e81",
        "samples/401c71d0875a0d5cdb0e7ae2",
        "samples/b2b35efa467ff22943f681cd",
        "scores/c00e111bfc15916ac73cd6ab",
        "scores/f2f4699052b94f1e1ca68842",
    }
    ranked, notes = boards(read_stores([tmp_path]))
    assert notes == []
    assert sum(len(board.runs) for board in ranked) == 5
