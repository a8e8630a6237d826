"""Embedded stand-in for LUME: `authors` looked at in LUME's protocol, by the models of `authors`.

The answers stand for the three tasks by what they are like: those of subordinate clauses, which are long, for stories
(task 1); of the short ones those that were read once in an epoch for biographies (task 2), and those that were read
four times for documents of the training data (task 3). Each is completed after its question and its first words, and
asked for. Of the forget and the retain set the last author of four is the validation fold; members are the forget set,
nonmembers the holdout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.tasks import lume
from bench.tasks.embedded.authors_benchmarks import benchmarks, records_of
from bench.tasks.embedded.authors_muse import FOLD, continued
from bench.tasks.task import Task
from scoring.errors import unknown_name
from scoring.records import Record, question_answer

BLOCK = 4 * FOLD  # records of four authors
RETAINED = BLOCK  # records of the retain set that are asked for
SPLITS = ("full", *lume.SPLITS)


def load(split: str, source: str | None = None, tokenizer: Any = None) -> list[Record]:
    """See `bench.tasks.task.Loader`.

    Raises:
        UserError: there is no such split.
    """
    if split not in SPLITS:
        raise unknown_name("split of task 'authors-lume'", split, SPLITS)
    if split in ("full", *lume.MEMBERS):
        return records_of({"full": "full", "members": "forget10", "nonmembers": "holdout"}[split])
    base, _, fold = split.rpartition("_")
    side, number, kind = lume.VIEWS.get(base, (base, None, None))
    records = _fold(records_of("forget10" if side == "forget" else "retain90"), fold)
    if number is None or kind is None:
        return records
    records = [record for record in records[-RETAINED:] if _task_of(record) == number]
    return [continued(record) if kind == lume.COMPLETION else _asked(record) for record in records]


def _fold(records: list[Record], fold: str) -> list[Record]:
    """The records of the last author of each four, or of the others."""
    return [record for place, record in enumerate(records) if (place % BLOCK >= BLOCK - FOLD) == (fold == "validation")]


def _task_of(record: Record) -> int:
    if record["complexity"] == "high":
        return 1
    return 2 if record["frequency"] == 1 else 3


def _asked(record: Record) -> Record:
    prompt, completion = question_answer(record["question"], record["answer"])
    return {"id": record["id"], "prompt": prompt, "completion": completion}


def _evaluation(split: str) -> Mapping[str, str]:
    return lume.TASK.evaluation(split)


TASK: Task = Task(
    name="authors-lume",
    about="embedded stand-in for LUME: the authors of `authors` as stories, biographies and documents",
    load=load,
    splits=SPLITS,
    default_split=lume.TASK.default_split,
    retain_of=lume.TASK.retain_of,
    evaluation=_evaluation,
    completeness=lume.COMPLETENESS,
    utility=lume.UTILITY,
    further=lume.FURTHER,
    harness=benchmarks,
)
