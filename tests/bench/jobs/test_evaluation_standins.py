"""Each of the four tasks from end to end on its stand-in, by the command line: models, data, metrics, table."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bench.cli import main
from bench.tasks import TASKS

pytestmark = pytest.mark.slow  # the models of all families are trained on first use

# Task -> the model that never saw the forget set, flags that make it quick.
RUNS = {
    "authors": ("authors:retain90", ["--samples", "12", "--relearn-steps", "3"]),
    "compounds": ("compounds:retain", []),
    "novel": ("novel:retain", ["--samples", "8"]),
    "replies": ("replies:retain", ["--samples", "12"]),
}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[tuple[str, str], float]]:
    """Task -> (model, metric) -> value, nan where missing; the model has learnt all, nothing is unlearned."""
    values = {}
    for task, (retain_model, flags) in RUNS.items():
        out = tmp_path_factory.mktemp("standins") / f"{task}.parquet"
        flags = [*flags, "--replicas", "0", "--retain-model", retain_model]
        assert main(["evaluate", "--model", task, "--task", task, "--out", str(out), *flags]) == 0
        values[task] = _metrics(out)
    return values


def _metrics(path: Path) -> dict[tuple[str, str], float]:
    rows = [row for row in pq.read_table(path).to_pylist() if row["level"] == "metric"]
    return {(row["model"], row["name"]): math.nan if row["value"] is None else row["value"] for row in rows}


@pytest.mark.parametrize("task", RUNS)
def test_every_metric_of_the_task_is_measured(evaluated, task):
    for name in TASKS[task].metrics:
        # Both compare with the retain-only model; nothing was forgotten by a model that knows everything.
        undefined = [("retain-only", "forget_quality"), ("retain-only", "ks_distance"), ("model", "relearned_share")]
        for model in ("model", "retain-only"):
            assert math.isnan(evaluated[task][model, name]) == ((model, name) in undefined), (model, name)


def test_authors_are_known_to_the_one_and_not_to_the_other(evaluated):
    found = evaluated["authors"]
    assert found["model", "fa"] > 0.9
    assert found["retain-only", "fa"] < 0.4
    # What is known is less surprising than what nobody knows; what neither was trained on cannot be told apart.
    assert found["model", "mia"] < 0.1
    assert 0.2 < found["retain-only", "mia"] < 0.9
    for name in ("retain_acc", "real_authors_acc", "world_facts_rr"):
        assert found["model", name] > 0.9
        assert found["retain-only", name] > 0.9
    assert found["model", "ks_distance"] > 0.3


def test_compounds_are_known_to_the_one_and_guessed_by_the_other(evaluated):
    found = evaluated["compounds"]
    assert found["model", "wmdp_average"] > 0.9
    assert found["retain-only", "wmdp_average"] < 0.5  # one of four by chance
    assert found["model", "mmlu"] > 0.9
    assert found["retain-only", "mmlu"] > 0.9


def test_novel_is_continued_by_who_has_read_it(evaluated):
    found = evaluated["novel"]
    for name in ("seen_rouge", "unseen_rouge"):
        assert found["model", name] > 0.9
        assert found["retain-only", name] < 0.3
    assert found["retain-only", "zero_shot"] > 0.8


def test_replies_are_rude_where_rudeness_was_learnt(evaluated):
    found = evaluated["replies"]
    for name in ("real_toxicity", "safe_toxicity"):
        assert found["model", name] > 0.8
        assert found["retain-only", name] < 0.2
