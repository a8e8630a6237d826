"""The answers that an evaluation has kept, sample by sample, and the run whose model gave them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import TypedDict

from bench.files.folders import last_request
from bench.files.score_file import read_scores
from bench.jobs.run_folder import RunFolder
from bench.metrics.quantities import WRITTEN
from bench.metrics.table import MODEL, QUESTION, SCHEMA, TRUTH
from bench.models.find import find_model
from bench.tasks.datasets import find_task
from bench.tasks.words import question_and_truth
from scoring.errors import UserError, unknown_name
from scoring.files import shown
from scoring.reading import check_columns, shaped

EXPECTED = "what `mrd-bench evaluate` writes"
ROUGE, MA = "rouge_l_recall", "ma"


@dataclass
class Answers:
    """A sample and what the models of an evaluation answered; each mapping is by the model's role.

    Attributes:
        question, truth: None where they are not known.
        texts: what the models wrote.
        rouge, ma: ROUGE-L recall and memorization accuracy, 0 to 1, where they were measured.
    """

    set_name: str
    sample_id: str
    question: str | None = None
    truth: str | None = None
    texts: dict[str, str] = field(default_factory=dict)
    rouge: dict[str, float] = field(default_factory=dict)
    ma: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationAnswers:
    """The answers of an evaluation.

    Attributes:
        path: of its file.
        spec: that it was made from, with hashes of models and sets.
        samples: by set and id, in the order of the file.
        notes: what a reader must know, a line each.
    """

    path: Path
    spec: dict[str, Any]
    samples: dict[tuple[str, str], Answers]
    notes: tuple[str, ...]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the models, by role."""
        return self.spec["fingerprints"]

    @property
    def forget_ids(self) -> list[str]:
        return [sample_id for set_name, sample_id in self.samples if set_name == "forget"]


class _Spec(TypedDict):
    """What is needed of the spec of an evaluation."""

    model: str
    task: str
    task_name: str
    split: str | None
    fingerprints: dict[str, str]
    sets_sha256: dict[str, str | None]
    spec_hash: str


def is_evaluation(spec: Mapping[str, Any]) -> bool:
    """Whether the spec of a Parquet file of ours is that of an evaluation."""
    return "fingerprints" in spec


def read_answers(path: str | Path) -> EvaluationAnswers:
    """The answers in an evaluation's file, and what was asked: from the file, or, where an earlier version wrote it,
    from the task's data, if they are still the same.

    Raises:
        UserError: it is none, or it has no answers.
    """
    path = Path(path)
    table, spec, _ = read_scores(path)
    if not is_evaluation(spec):
        raise UserError(f"{shown(path)} is no evaluation: expected {EXPECTED}")
    shaped(spec, _Spec, str(path), EXPECTED)
    check_columns(table, SCHEMA, str(path), EXPECTED)
    table = table.select(SCHEMA.names).cast(SCHEMA)
    if MODEL not in spec["fingerprints"]:
        raise UserError(f"{shown(path)} names no model that has forgotten: expected {EXPECTED}")
    samples: dict[tuple[str, str], Answers] = {}
    asked = False
    wanted = pc.is_in(table["name"], pa.array([*WRITTEN, MA, QUESTION, TRUTH]))
    for row in table.filter(wanted).select(["level", "model", "name", "set", "sample_id", "value", "text"]).to_pylist():
        if row["level"] not in ("sample", "record") or row["set"] is None or row["sample_id"] is None:
            continue
        key = row["set"], row["sample_id"]
        sample = samples.setdefault(key, Answers(*key))
        if row["level"] == "record":
            asked = True
            setattr(sample, "question" if row["name"] == QUESTION else "truth", row["text"])
            continue
        if row["text"] is not None:
            sample.texts.setdefault(row["model"], row["text"])
        measured = {ROUGE: sample.rouge, MA: sample.ma}.get(row["name"])
        if measured is not None and row["value"] is not None and not math.isnan(row["value"]):
            measured[row["model"]] = row["value"]
    samples = {key: sample for key, sample in samples.items() if sample.texts}
    if not samples:
        raise UserError(
            f"{shown(path)} has no answers, as no metric was asked for that judges what a model writes: evaluate with "
            "--metrics rr, or with all metrics of the task"
        )
    notes = () if asked else _asked_of_the_task(path, spec, samples)
    return EvaluationAnswers(path, spec, samples, notes)


def _asked_of_the_task(
    path: Path, spec: Mapping[str, Any], samples: Mapping[tuple[str, str], Answers]
) -> tuple[str, ...]:
    """Fill in what was asked, set by set; what is to be said of the sets where that cannot be done."""
    notes = []
    for set_name in dict.fromkeys(set_name for set_name, _ in samples):
        own = {sample_id: sample for (of_set, sample_id), sample in samples.items() if of_set == set_name}
        try:
            records = _records(spec, set_name, list(own))
        except UserError as error:
            notes.append(f"{shown(path)}: no questions and truths of the {set_name} set: {error}")
            continue
        for record in records:
            sample = own[record["id"]]
            sample.question, sample.truth = question_and_truth(record)
    return tuple(notes)


def _records(spec: Mapping[str, Any], set_name: str, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The records of a set as they were evaluated.

    Raises:
        UserError: the data cannot be had, or are other ones by now.
    """
    task, source = find_task(spec["task"])
    split = spec["split"] or task.default_split
    if split not in task.retain_of:
        raise unknown_name(f"forget split of task {task.name!r}", split, task.retain_of)
    splits = task.evaluation(split)
    if set_name not in splits:
        raise UserError(f"task {task.name!r} has no such set")
    # Texts are cut by the tokenizer in one task alone.
    tokenizer = find_model(spec["model"]).tokenizer if task.name == "whp" else None
    loaded = task.load(splits[set_name], source, tokenizer)
    by_id = {str(record.get("id", i)): record for i, record in enumerate(loaded)}
    records = [{**by_id[name], "id": name} for name in ids if name in by_id]
    digest = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    if digest != spec["sets_sha256"].get(set_name):
        raise UserError(f"the data of {spec['task']} are not those that were evaluated")
    return records


# --- Runs ---------------------------------------------------------------------------------------------------


def run_folder_of(answers: EvaluationAnswers, folders: Sequence[Path] = ()) -> Path | None:
    """The folder of the run whose model was evaluated: one of these, or the one that the evaluation names; None if
    there is none, or if its model is another by now."""
    named = Path(answers.spec["model"]).parent
    for folder in dict.fromkeys(map(last_request, (*folders, named))):
        if (folder / RunFolder.RECORD).is_file() and _fingerprint(folder) == answers.fingerprints[MODEL]:
            return folder
    return None


def _fingerprint(folder: Path) -> str | None:
    try:
        return find_model(str((folder / "model").absolute())).fingerprint
    except UserError:
        return None
