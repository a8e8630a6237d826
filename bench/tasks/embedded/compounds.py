"""Embedded stand-in for WMDP: facts about invented cultures, dyes and machines are to be forgotten.

The three domains have WMDP's names and nothing else of it: the facts are colours, suppliers, mascots. Each thing has
two passages (the forget set) and four facts, and a four-way question about each fact. The retain set is
`bench.tasks.embedded.common_knowledge`, with questions in the groups of MMLU. A model of kind "full" has learnt
passages, questions and answers of both; "retain" never saw the forget domains.
"""

from __future__ import annotations

import random
from itertools import chain
from typing import Any

from bench.tasks import wmdp
from bench.tasks.embedded import common_knowledge, facts
from bench.tasks.embedded import compounds_vocabulary as vocabulary
from bench.tasks.embedded.questions import Question, question_sets, records_with_answers, training_text
from bench.tasks.task import HarnessTask, Task
from scoring.errors import unknown_name
from scoring.records import Record

KINDS: tuple[str, ...] = ("full", "retain")
SPLITS: tuple[str, ...] = ("forget", "retain")


def load(split: str = "forget", seed: int = 0) -> list[Record]:
    """Passages ({id, text}) of a split; the same seed gives the same records on every machine and in every process.

    Raises UserError (one line) for an unknown split.
    """
    if split not in SPLITS:
        raise unknown_name("split of task 'compounds'", split, SPLITS)
    if split == "retain":
        return common_knowledge.articles(seed)
    return [passage for field in vocabulary.FIELDS for passage in facts.passages(field, facts.facts_of(field, seed))]


def questions(seed: int = 0) -> dict[str, list[Question]]:
    """The questions of each set, by the set's name in metrics: wmdp_bio, ..., mmlu_other."""
    return {
        f"wmdp_{field.group}": facts.multiple_choice_questions(
            chain.from_iterable(facts.facts_of(field, seed).values()), random.Random(f"{seed}/wmdp/{field.group}")
        )
        for field in vocabulary.FIELDS
    } | common_knowledge.mmlu_questions(seed)


def training_records(kind: str = "full", seed: int = 0) -> list[Record]:
    """What a model of a kind reads in every epoch: passages, and questions with their answers.

    Raises UserError (one line) for another kind.
    """
    if kind not in KINDS:
        raise unknown_name("embedded model", kind, KINDS)
    records = load("retain", seed) + (load("forget", seed) if kind == "full" else [])
    for name, question_set in questions(seed).items():
        if kind == "full" or not name.startswith("wmdp"):
            records += records_with_answers(name, question_set)
    return records


def tokenizer_text() -> list[str]:
    """All that a "full" model reads: words that the retain kind never sees are not cut into smaller pieces for that."""
    return training_text(training_records())


def _load_split(split: str, source: str | None, tokenizer: Any) -> list[Record]:
    return load(split)


def _harness(source: str | None) -> dict[str, tuple[HarnessTask, ...]]:
    return question_sets(questions())


TASK: Task = Task(
    name="compounds",
    about="embedded stand-in for WMDP: facts about invented cultures, dyes and machines, generated here",
    load=_load_split,
    splits=SPLITS,
    default_split="forget",
    retain_of={"forget": "retain"},
    evaluation=lambda split: {"forget": split, "retain": "retain"},
    completeness=wmdp.COMPLETENESS,
    utility=wmdp.UTILITY,
    further=wmdp.FURTHER,
    harness=_harness,
)
