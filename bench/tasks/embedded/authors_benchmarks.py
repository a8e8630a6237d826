"""What the views of `authors` share: its records, and what each of its models knows, as questions in the place of MMLU
and TruthfulQA."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from bench.tasks.embedded import authors
from bench.tasks.embedded.questions import Question, question_sets
from bench.tasks.task import HarnessTask
from bench.tasks.wmdp import MMLU
from scoring.records import Record, question_answer

HALF = 15  # of the 30 questions about famous authors, and of those about the world


@cache
def _records(split: str) -> tuple[Record, ...]:
    return tuple(authors.load(split))


def records_of(split: str) -> list[Record]:
    """The records of a split of `authors`, made once in a process: they are not to be changed."""
    return list(_records(split))


def benchmarks(source: str | None) -> Mapping[str, tuple[HarnessTask, ...]]:
    """Questions of four groups, and the paraphrased ones in the place of TruthfulQA."""
    return _benchmarks()


@cache
def _benchmarks() -> Mapping[str, tuple[HarnessTask, ...]]:
    famous, world = records_of("real_authors"), records_of("world_facts")
    groups = dict(zip(MMLU, (famous[:HALF], famous[HALF:], world[:HALF], world[HALF:]), strict=True))
    sets = {name: [_question(record, "question") for record in records] for name, records in groups.items()}
    sets["truthfulqa"] = [_question(record, "paraphrased_question") for record in (*famous, *world)]
    return question_sets(sets)


def _question(record: Record, asked: str) -> Question:
    """A question whose choices are the answer and the wrong options; the answer's place follows from the id."""
    options = list(record["perturbed_answer"])
    place = sum(record["id"].encode()) % (len(options) + 1)
    choices = (*options[:place], record["answer"], *options[place:])
    return Question(record["id"], question_answer(record[asked], "")[0], choices, place)
