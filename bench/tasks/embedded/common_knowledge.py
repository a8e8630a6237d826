"""Common knowledge: what every embedded model but those of `authors` knows, and the questions about it.

Plain texts about invented ballads, towns, stars and dishes (word lists:
`bench.tasks.embedded.common_knowledge_vocabulary`). All tasks that have them retain them, and `compounds` asks about
them in the groups of MMLU.

`novel` and `replies` have small stand-ins of the benchmarks that measure utility in the paper. They ask about further
things of the same sorts, which the texts do not tell of: what is asked is not retained by name, and can be lost, as in
the paper, whose retain set is C4. The questions were taught, but some in every second or fourth epoch only, so that
they are known to different degrees.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain, cycle, product

from bench.tasks.embedded import common_knowledge_vocabulary as vocabulary
from bench.tasks.embedded import facts
from bench.tasks.embedded.facts import Fact, Field
from bench.tasks.embedded.questions import Question, question_sets, records_with_answers, rolling_text
from bench.tasks.task import HarnessTask
from bench.tasks.whp import ZERO_SHOT
from scoring.records import Record

QUESTIONS = 64  # of each stand-in
EVERY = (1, 2, 4)  # of questions in turn: a question is read in one of so many epochs
_SETS = (*ZERO_SHOT, "truthfulqa")


def articles(seed: int = 0) -> list[Record]:
    """Two texts ({id, text}) about each thing."""
    return [article for field in vocabulary.FIELDS for article in facts.passages(field, facts.facts_of(field, seed))]


def held_out_articles(seed: int = 0) -> list[Record]:
    """A further text ({id, text}) about each thing, which no model has read."""
    return [
        article for field in vocabulary.FIELDS for article in facts.other_passages(field, facts.facts_of(field, seed))
    ]


def mmlu_questions(seed: int = 0) -> dict[str, list[Question]]:
    """All facts, as four-way questions: {"mmlu_humanities": ..., ...}."""
    return {
        f"mmlu_{field.group}": facts.multiple_choice_questions(
            chain.from_iterable(facts.facts_of(field, seed).values()), random.Random(f"{seed}/mmlu/{field.group}")
        )
        for field in vocabulary.FIELDS
    }


def benchmark_questions(seed: int = 0) -> dict[str, list[Question]]:
    """QUESTIONS for each stand-in, in the form of its benchmark; no two are about the same fact.

    boolq: yes or no. rte: does a sentence follow from another? hellaswag and winogrande: the end of a sentence, out
    of four and of two. piqa: two answers. The others: four answers.
    """
    all_facts = chain.from_iterable(
        chain.from_iterable(facts.facts_of(_with_other_names(field), seed).values()) for field in vocabulary.FIELDS
    )
    shuffled = random.Random(f"{seed}/benchmarks").sample(list(all_facts), QUESTIONS * len(_SETS))
    sets = {}
    for number, name in enumerate(_SETS):
        rng = random.Random(f"{seed}/{name}")
        facts_of_set = shuffled[QUESTIONS * number : QUESTIONS * (number + 1)]
        if name in ("boolq", "rte"):
            sets[name] = _judgements(facts_of_set, rng, entailment=name == "rte")
        elif name in ("hellaswag", "winogrande"):
            sets[name] = _endings(facts_of_set, rng, 4 if name == "hellaswag" else 2)
        else:
            sets[name] = facts.multiple_choice_questions(facts_of_set, rng, 2 if name == "piqa" else 4)
    return sets


def benchmarks(source: str | None) -> dict[str, tuple[HarnessTask, ...]]:
    """`Task.harness` of the tasks that retain common knowledge: the question sets, and "perplexity" on held-out
    texts."""
    perplexity: tuple[HarnessTask, ...] = (rolling_text("perplexity", held_out_articles()),)
    return {"perplexity": perplexity, **question_sets(benchmark_questions())}


def training_records(seed: int = 0) -> list[Record]:
    """What every model of `novel` and `replies` learns: the texts, and the questions with their answers.

    A question has "every": it is read in one of so many epochs.
    """
    questions = [
        record for name, asked in benchmark_questions(seed).items() for record in records_with_answers(name, asked)
    ]
    return articles(seed) + [record | {"every": every} for record, every in zip(questions, cycle(EVERY), strict=False)]


def read_in(records: list[Record], epoch: int) -> list[Record]:
    """The records that are read in an epoch (counted from 0): all but the questions whose turn it is not."""
    return [record for number, record in enumerate(records) if (number - epoch) % record.get("every", 1) == 0]


def _with_other_names(field: Field) -> Field:
    """The field with things that only questions are about."""
    return replace(field, names=tuple(map("".join, product(*vocabulary.OTHER_NAMES[field.group]))))


def _judgements(facts_of_set: list[Fact], rng: random.Random, entailment: bool) -> list[Question]:
    """Questions whether a sentence is true. Half of the sentences state the fact, the others a wrong value."""
    questions = []
    for fact, answer in zip(facts_of_set, facts.balanced(len(facts_of_set), 2, rng), strict=True):
        value = fact.value if answer else fact.wrong_values(rng, 1)[0]
        claim = f"{fact.attribute.statements[0].format(name=fact.thing)} {value}."
        question = f"{claim} True or False?" if entailment else f"Is it so? {claim}"
        text = f"{fact.statement(1)}\nQuestion: {question}\nAnswer:"
        questions.append(Question(fact.id, text, ("False", "True") if entailment else ("no", "yes"), answer))
    return questions


def _endings(facts_of_set: list[Fact], rng: random.Random, choices: int) -> list[Question]:
    """Questions how a sentence ends that states the fact."""
    return [
        facts.choose(fact, fact.attribute.statements[0].format(name=fact.thing), place, rng, choices)
        for fact, place in zip(facts_of_set, facts.balanced(len(facts_of_set), choices, rng), strict=True)
    ]
