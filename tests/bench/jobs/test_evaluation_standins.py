"""Each of the tasks from end to end on its stand-in, by the command line: models, data, metrics, table."""

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
    # Views of authors, by its models.
    "authors-muse": ("authors:retain90", ["--samples", "8"]),
    "authors-rwku": ("authors:retain90", ["--samples", "8"]),
    "authors-lume": ("authors:retain90", ["--samples", "6"]),
}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[tuple[str, str], float]]:
    """Task -> (model, metric) -> value, nan where missing; the model has learnt all, nothing is unlearned."""
    values = {}
    for task, (retain_model, flags) in RUNS.items():
        out = tmp_path_factory.mktemp("standins") / f"{task}.parquet"
        flags = [*flags, "--replicas", "0", "--retain-model", retain_model]
        assert main(["evaluate", "--model", task.partition("-")[0], "--task", task, "--out", str(out), *flags]) == 0
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
        undefined.append(("retain-only", "priv_leak"))
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


def test_views_of_authors_tell_the_two_apart_in_what_is_forgotten_alone(evaluated):
    known = {
        "authors-muse": ("verbmem_f", "knowmem_f", "extraction_strength"),
        "authors-rwku": ("rwku_fb", "rwku_qa", "rwku_aa", "rwku_forget"),
        "authors-lume": ("lume_forget_regurgitation", "lume_forget_knowledge", "lume_mia_auc"),
    }
    for task, names in known.items():
        for name in names:
            assert evaluated[task]["model", name] > evaluated[task]["retain-only", name] + 0.4, name
    for task, name in (("muse", "knowmem_r"), ("rwku", "rwku_neighbor_qa"), ("lume", "lume_retain_knowledge")):
        for model in ("model", "retain-only"):
            assert evaluated[f"authors-{task}"][model, name] > 0.9
    muse, rwku, lume = (evaluated[f"authors-{name}"] for name in ("muse", "rwku", "lume"))
    assert muse["model", "priv_leak"] < -90
    assert rwku["model", "rwku_fm"] < 0.1 < rwku["retain-only", "rwku_fm"]
    # What is known by heart has a part of 0, and so has the harmonic mean; the rest is the mean of three.
    assert lume["model", "lume_task_aggregate"] == 0
    assert lume["retain-only", "lume_aggregate"] == pytest.approx(
        (lume["retain-only", "lume_task_aggregate"] + lume["retain-only", "lume_mia_score"] + 1) / 3
    )


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
