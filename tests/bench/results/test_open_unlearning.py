"""What open-unlearning's evaluation writes, in a store and on a leaderboard; and what is refused of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer

from bench import leaderboard
from bench.boards.board import Board
from bench.cli import main
from bench.results.store import read_stores

RUN = "unlearn_tofu_Llama-3.2-1B-Instruct_forget10_NPO_lr1e-05_beta0.5_seed7_epoch10"


def indexed(*values: Any) -> dict[str, Any]:
    return {str(number): value for number, value in enumerate(values)}


def tofu_eval() -> dict[str, Any]:
    """In the layout of its files: a value, and values by index, of which one may be missing."""
    written = [
        {"rouge1_recall": 0.5, "rougeL_f1": 0.6, "rougeL_recall": recall, "input": "Who?", "ground_truth": "A B"}
        | {"generation": text}
        for recall, text in ((0.5, "A C"), (0.0, "none"))
    ]
    attacks = {"value_by_index": indexed({"score": 1.0})}
    return {
        "exact_memorization": {"agg_value": 0.6, "value_by_index": indexed({"score": 0.7}, {"score": 0.5}, None)},
        "extraction_strength": {"agg_value": 0.1, "value_by_index": indexed({"score": 0.1})},
        "forget_Q_A_PARA_Prob": {"agg_value": 0.1, "value_by_index": indexed({"prob": 0.1, "avg_loss": 2.3})},
        "forget_Q_A_Prob": {"agg_value": 0.4, "value_by_index": indexed({"prob": 0.4, "avg_loss": 0.92})},
        "forget_Q_A_ROUGE": {"agg_value": 0.25, "value_by_index": indexed(*written)},
        "forget_quality": {"agg_value": 2.6e-10},
        # The mean, which newer versions take; the forget set's score here is that of min(r, 1/r).
        "forget_truth_ratio": {"agg_value": 1.25, "value_by_index": indexed({"score": 0.5}, {"score": 2.0})},
        "mia_gradnorm": {"agg_value": 0.3, "auc": 0.3},
        "mia_min_k": {"forget": attacks, "holdout": attacks, "auc": 0.9, "agg_value": 0.9},
        "model_utility": {"agg_value": 0.55},
        "privleak": {"agg_value": -90.5},
        "retain_Q_A_ROUGE": {"agg_value": 0.8, "value_by_index": indexed(written[0])},
    }


def write(folder: Path, content: Any, name: str = "TOFU_EVAL.json") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_a_run_of_tofu_stands_on_a_board_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(tmp_path / "store")
    file = write(tmp_path / RUN / "evals", tofu_eval())
    summary = {"forget_Q_A_Prob": 0.2, "forget_quality": None, "forget_truth_ratio": 0.7, "model_utility": 0.6}
    other = write(tmp_path / "whatever", summary, "TOFU_SUMMARY.json")
    assert main(["results", "add", store, file]) == 0
    assert "left out: forget_Q_A_PARA_Prob, mia_gradnorm (is none of ours)" in capsys.readouterr().err
    said = ["--algorithm", "GradDiff", "--model", "Llama-3.2-1B-Instruct", "--split", "forget10", "--seed", "7"]
    assert main(["results", "add", store, other, *said]) == 0
    told = capsys.readouterr().err
    assert "left out: forget_quality (has no value)" in told
    assert "left out: forget_truth_ratio (needs the values of its samples (*_EVAL.json))" in told
    # The same again changes nothing.
    assert main(["results", "add", store, file]) == 0

    results = read_stores([store])
    npo, grad_diff = sorted(results.runs.to_pylist(), key=lambda row: row["algorithm"] != "NPO")
    assert dict(npo["metrics"]) == pytest.approx(
        {
            "exact_memorization": 0.6,
            "extraction_strength": 0.1,
            "forget_probability": 0.4,
            "rr": 0.75,
            "forget_quality": 2.6e-10,
            "forget_truth_ratio": 0.5,
            "mia_min_40_auc": 0.9,
            "model_utility": 0.55,
            "priv_leak": -90.5,
            "retain_rr": 0.8,
        }
    )
    assert (npo["task"], npo["experiment"], npo["split"], npo["seed"]) == ("tofu", "open-unlearning", "forget10", 7)
    assert (grad_diff["algorithm"], grad_diff["seed"], dict(grad_diff["metrics"])) == (
        "GradDiff",
        7,
        {"forget_probability": 0.2, "model_utility": 0.6},
    )
    assert npo["mean_log_mrd"] is None
    spec = json.loads(npo["spec"])
    assert (spec["measured_by"], spec["settings"]) == ("open-unlearning", "lr1e-05_beta0.5_epoch10")
    samples = [row["sample_id"] for row in results.samples.to_pylist()]
    assert samples == ["forget10-0000", "forget10-0001"]
    answers = {(row["set"], row["sample_id"]): row for row in results.answers.to_pylist()}
    assert answers.keys() == {("forget", "forget10-0000"), ("forget", "forget10-0001"), ("retain", "retain-0000")}
    first = answers["forget", "forget10-0000"]
    assert (first["after"], first["truth"], first["rouge_after"]) == ("A C", "A B", 0.5)

    boards, notes = leaderboard(store, tmp_path / "board")
    assert notes == []
    (board,) = boards
    assert isinstance(board, Board)
    assert set(board.entries) == {"NPO (open-unlearning)", "GradDiff (open-unlearning)"}
    assert board.about["measured by"] == "open-unlearning"
    ranks = [(row.entry.split()[0], row.rank, row.adjusted) for row in board.standings["model_utility"]]
    assert ranks == [("GradDiff", 1, None), ("NPO", 2, None)]
    assert "NPO (open-unlearning)" in (tmp_path / "board" / "index.html").read_text()
    assert (tmp_path / "board" / f"answers-{npo['run']}.html").is_file()
    assert main(["results", "show", store, npo["run"][:6]]) == 0
    assert main(["compare", "NPO", "GradDiff", "--results", store, "--metric", "model_utility"]) == 0


def test_a_run_of_muse_is_scored_from_its_texts(tmp_path: Path) -> None:
    """ROUGE-L F1 without a stemmer, as MUSE has it; its own has one."""
    texts = [("he walked home", "he walks home today"), ("nothing", "at all")]
    verbatim = [{"rougeL_f1": 0.9, "rougeL_recall": 0.9, "generation": g, "ground_truth": t} for g, t in texts]
    content = {
        "forget_verbmem_ROUGE": {"agg_value": 0.9, "value_by_index": indexed(*verbatim)},
        "retain_knowmem_ROUGE": {"agg_value": 0.5},
        "privleak": {"agg_value": 23.4},
    }
    file = write(tmp_path / "muse_Llama-2-7b-hf_News_SimNPO", content, "MUSE_EVAL.json")
    assert main(["results", "add", str(tmp_path / "store"), file]) == 0
    results = read_stores([tmp_path / "store"])
    (row,) = results.runs.to_pylist()
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = sum(scorer.score(truth, written)["rougeL"].fmeasure for written, truth in texts) / 2
    assert dict(row["metrics"]) == pytest.approx({"verbmem_f": expected, "priv_leak": 23.4})
    assert (row["task"], row["algorithm"], row["split"], row["model"]) == ("muse", "SimNPO", "News", "Llama-2-7b-hf")
    assert [each["set"] for each in results.answers.to_pylist()] == ["verbmem", "verbmem"]
    assert results.answers["sample_id"].to_pylist() == ["verbmem-00000", "verbmem-00001"]


@pytest.mark.parametrize(
    ("folder", "content", "said"),
    [
        (RUN, '{"forget_Q_A_Prob": ', "TOFU_EVAL.json, line 1: not JSON"),
        (RUN, "[1]", "expected what open-unlearning's evaluation writes"),
        (RUN, {"wikitext": 3.0}, "none of its metrics (wikitext) is one of ours"),
        (RUN, {"forget_Q_A_Prob": None}, "none of its metrics (forget_Q_A_Prob) is one of ours and has a value"),
        (RUN, {}, "none of its metrics (there are none)"),
        (RUN, {"forget_Q_A_Prob": "high"}, "metric 'forget_Q_A_Prob'"),
        (RUN, {"forget_Q_A_Prob": {"agg_value": [1]}}, "a number as agg_value"),
        (RUN, {"forget_Q_A_Prob": {"agg_value": 1, "value_by_index": [2]}}, "values by index"),
        (RUN, {"forget_Q_A_Prob": {"agg_value": 1, "value_by_index": {"x": {}}}}, "index 'x' is no number of a row"),
        (RUN, {"forget_Q_A_Prob": 40.0}, "metric 'forget_Q_A_Prob' is 40: expected a number from 0 to 1"),
        ("runs", {"forget_Q_A_Prob": 0.4}, "nothing says the algorithm: name it as --algorithm, or the folder as"),
    ],
)
def test_what_is_at_fault_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str, content: Any, said: str
) -> None:
    good = write(tmp_path / "good" / RUN, tofu_eval())
    bad = write(tmp_path / folder, content)
    assert main(["results", "add", str(tmp_path / "store"), good, bad]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_flags_are_for_its_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", "add", str(tmp_path / "store"), str(tmp_path), "--seed", "1"]) == 2
    assert "open-unlearning's files alone" in capsys.readouterr().err
