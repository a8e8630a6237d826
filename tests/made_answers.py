"""Evaluations and score files with known answers, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from bench.files.score_file import write_scores
from bench.metrics.table import SCHEMA

# Set, id, question, truth, and by role: what was written, ROUGE-L, MA.
Made = tuple[str, str, str | None, str | None, Mapping[str, tuple[str, float, float]]]
SAMPLES: Sequence[Made] = (
    (
        "retain",
        "k0",
        "Where is it?",
        "In a box.",
        {"original": ("In a box.", 1.0, 1.0), "model": ("In a box.", 1.0, 0.9), "retain-only": ("In a box.", 1.0, 1.0)},
    ),
    (
        "forget",
        "q10",
        "Who was born?",
        "Ada was born in  London.",
        {
            "original": ("Ada was born in London.", 1.0, 1.0),
            "model": ("Bob was born in York.", 0.6, 0.5),
            "retain-only": ("No idea.", 0.0, 0.1),
        },
    ),
    (
        "forget",
        "q9",
        "Who wrote it?",
        "Ada did.",
        {"original": ("Ada did.", 1.0, 0.8), "model": ("", 0.0, 0.2), "retain-only": ("Eve did.", 0.5, 0.3)},
    ),
)
PRINTS = {"original": "o" * 64, "model": "m" * 64, "retain-only": "r" * 64}


def write_evaluation(path: Path, samples: Sequence[Made] = SAMPLES, **changed: Any) -> Path:
    """A file as `evaluate` writes it, of answers that are made up."""
    rows: list[dict[str, Any]] = []
    for set_name, sample_id, question, truth, answers in samples:
        own = {"set": set_name, "sample_id": sample_id}
        for role, (text, rouge, ma) in answers.items():
            rows.append(
                own | {"level": "sample", "model": role, "name": "rouge_l_recall", "value": rouge, "text": text}
            )
            rows.append(own | {"level": "sample", "model": role, "name": "ma", "value": ma})
        for name, said in (("question", question), ("truth", truth)):
            rows.append(own | {"level": "record", "name": name, "text": said})
    spec = {
        "model": "/nowhere/model",
        "task": "authors",
        "task_name": "authors",
        "split": "forget10",
        "fingerprints": PRINTS,
        "sets_sha256": {"forget": "f" * 64, "retain": "e" * 64},
        "spec_hash": "0" * 16,
    } | changed
    write_scores(pa.Table.from_pylist(rows, SCHEMA), path, spec, {"packages": {}})
    return path


def write_difficulty(path: Path, **changed: Any) -> Path:
    table = pa.table(
        {
            "sample_id": ["q9", "q10", "x"],
            "num_tokens": [3, 5, 4],
            "mrd": [0.5, 0.25, 0.1],
            "flip-time@0.5": [float("inf"), 4.0, 1.0],
        }
    )
    spec = {"data": "authors", "split": "forget10", "data_sha256": "d" * 64, "model_fingerprint": PRINTS["original"]}
    write_scores(table, path, spec | {"spec_hash": "1" * 16} | changed, {})
    return path
