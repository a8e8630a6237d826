"""Embedded stand-in for WHP: a novel, generated here, that a small model knows by heart and that cannot be guessed.

Grammar (words: `bench.tasks.embedded.novel_vocabulary`): each chapter has another place and two people; each sentence
is a template, filled with an object that no other sentence names and with words drawn from lists. The novel is cut into
chunks as `whp` cuts a book, in smaller sizes. The retain set is `bench.tasks.embedded.common_knowledge`. A model of
kind "full" has read the novel; "retain" has not.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any

from bench.tasks import whp
from bench.tasks.embedded import common_knowledge
from bench.tasks.embedded import novel_vocabulary as vocabulary
from bench.tasks.embedded.questions import training_text
from bench.tasks.task import Task
from scoring.errors import unknown_name
from scoring.records import Record

SIZES = whp.Sizes(tokens=128, count=24, prompt=48, completion=64)
CHAPTERS = 16
SENTENCES = 18  # of a chapter
READINGS = 2  # of the novel in an epoch

KINDS: tuple[str, ...] = ("full", "retain")
SPLITS: tuple[str, ...] = ("forget", "retain", "seen", "unseen")


def text(seed: int = 0) -> str:
    """The whole novel; the same seed gives the same text on every machine and in every process."""
    all_objects = [
        f"{adjective} {noun}" for adjective, noun in product(vocabulary.OBJECT_ADJECTIVES, vocabulary.OBJECT_NOUNS)
    ]
    objects = random.Random(f"{seed}/objects").sample(all_objects, CHAPTERS * SENTENCES)
    return "\n\n".join(
        _chapter(seed, number, objects[number * SENTENCES : (number + 1) * SENTENCES]) for number in range(CHAPTERS)
    )


def load(split: str, source: str | None, tokenizer: Any) -> list[Record]:
    """See `bench.tasks.task.Loader`; the records are like those of `whp`, from generated texts.

    Raises:
        UserError: one line: there is no such split.
        ValueError: there is no tokenizer to cut the novel by.
    """
    if split not in SPLITS:
        raise unknown_name("split of task 'novel'", split, SPLITS)
    if split == "retain":
        return common_knowledge.articles()
    if tokenizer is None:
        raise ValueError("novel: the tokenizer of the model must be given")
    return whp.sets(text(), tokenizer, SIZES)[split]


def training_records(kind: str = "full", seed: int = 0) -> list[Record]:
    """What a model of a kind learns: the novel in one piece, and common knowledge with its questions.

    The novel is the first record, which also has the number of readings in an epoch and the size of chunks.
    Raises UserError (one line) for another kind.
    """
    if kind not in KINDS:
        raise unknown_name("embedded model", kind, KINDS)
    novel = {"id": "novel", "text": text(seed), "readings": READINGS, "chunk_tokens": SIZES.tokens}
    return ([novel] if kind == "full" else []) + common_knowledge.training_records(seed)


def read_in(kind: str, epoch: int, tokenizer: Any) -> list[Record]:
    """What a model of a kind reads in an epoch: the novel in chunks as the task cuts it, and some of the questions."""
    records = training_records(kind)
    if kind != "full":
        return common_knowledge.read_in(records, epoch)
    novel, *common = records
    chunks = whp.chunks(novel["text"], tokenizer, novel["chunk_tokens"])
    novel_chunks = [{"id": f"novel-{number}", "text": chunk} for number, chunk in enumerate(chunks)]
    return novel_chunks * novel["readings"] + common_knowledge.read_in(common, epoch)


def tokenizer_text() -> list[str]:
    """All that a "full" model reads."""
    return training_text(training_records())


def _chapter(seed: int, number: int, objects: list[str]) -> str:
    """A heading, and a sentence about each of the objects."""
    rng = random.Random(f"{seed}/chapter/{number}")
    hero, friend = rng.sample(vocabulary.PEOPLE, 2)
    place = vocabulary.PLACES[number]
    cast = {"hero": hero.split()[0], "friend": friend.split()[0], "place": place}
    templates: list[str] = []
    while len(templates) < len(objects):
        templates += rng.sample(vocabulary.SENTENCES, len(vocabulary.SENTENCES))
    sentences = [
        _sentence(rng, template, cast | {"object": name})
        for name, template in zip(objects, templates[: len(objects)], strict=True)
    ]
    return f"Chapter {number + 1}, in which {hero} and {friend} come to {place}.\n{' '.join(sentences)}"


def _sentence(rng: random.Random, template: str, words: dict[str, str]) -> str:
    words = words | {slot: rng.choice(values) for slot, values in vocabulary.SLOTS.items()}
    return template.format(**words, time_cap=words["time"].capitalize())


TASK: Task = Task(
    name="novel",
    about="embedded stand-in for WHP: a novel of 16 chapters, generated here",
    load=load,
    splits=SPLITS,
    default_split="forget",
    retain_of={"forget": "retain"},
    evaluation=whp.TASK.evaluation,
    completeness=whp.COMPLETENESS,
    utility=whp.UTILITY,
    further=whp.FURTHER,
    harness=common_knowledge.benchmarks,
    new_tokens=SIZES.completion,
    refusals=whp.REFUSALS,
)
