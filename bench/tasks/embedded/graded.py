"""The embedded task whose samples are memorised to different degrees, so that some are harder to forget than others.

The model of `bench.tasks.embedded.authors` knows every answer by heart. Here the forget set is 400 QA about 40 other
authors, in the same grammar, which a small model reads once to 16 times in each of a few epochs; the retain set is 120
QA about 12 more.

    frequency   how often the record is repeated in each training epoch, one of `FREQUENCIES`
    complexity  of the answer. "low": main clauses only; "high": subordinate clauses
    length      of the answer. "short": about 29 tokens (20 to 41); "long": about 44 (32 to 59)
    rare_words  "low": common words fill the two wording slots; "high": rare, hard words do

The four are crossed, 5 x 2 x 2 x 2, and every topic has each of the 40 cells once, so that none of them, nor the topic,
is confounded with another. Every author has each frequency twice.

Complexity hardly tells the length: answers of low complexity have 20 to 56 tokens (36 on average), those of high
complexity 24 to 59 (38), and 90 and 95 % of them lie between 25 and 53. The rank correlation with length is .10, that
of rare words .12 and that of frequency .03.

What the model "full" knows of the forget set, by frequency: the mean share of an answer's tokens that it predicts (MA),
and the mean loss of a token (nats).

    frequency   1     2     4     8     16
    MA          .70   .86   .98   .997  1.00
    loss        1.43  .60   .16   .05   .02

Of the retain set it predicts .996, of the holdout .46; the model "retain" .998 of the retain set, .24 of the forget
set.

The model "joined" has read texts of one, two and three records in place of these: 160 at each of three levels, about
authors of their own, so that no level is known through another. All records of a text are of one cell of the design,
and each of the 40 cells has four texts at every level; chance says which of the topics it meets. A text is read as it
is, its questions included, `frequency` times in each epoch, and all but its first question counts in the MA:

    frequency   1     2     4     8     16    mean  tokens
    sentences   .84   .95   .99   .999  1.00  .956  37 to 79
    paragraphs  .77   .90   .98   .998  1.00  .928  82 to 150
    long_texts  .72   .82   .94   .986  .998  .893  122 to 220
"""

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

from bench.tasks import tofu
from bench.tasks.embedded import authors
from bench.tasks.embedded import authors_vocabulary as vocabulary
from bench.tasks.embedded import graded_vocabulary as templates
from bench.tasks.embedded.authors_vocabulary import Topic
from bench.tasks.joined import joined
from bench.tasks.task import Task
from scoring.errors import unknown_name
from scoring.records import Record, texts_of

FREQUENCIES = (1, 2, 4, 8, 16)  # of the forget set
OTHER_FREQUENCIES = {"retain": 8, "holdout": 0, "real_authors": 8, "world_facts": 8}

_LENGTHS = ("short", "long")
_DESIGN = tuple(
    (complexity, FREQUENCIES[number % len(FREQUENCIES)], rare_words, _LENGTHS[level])
    for number, (complexity, level, rare_words) in enumerate(authors.EIGHT_CELLS * len(FREQUENCIES))
)
# Of all the authors. The numbers are multiples of four, the size of a block of the design, but for the famous.
_AUTHORS = {
    "forget": slice(0, 40),
    "retain": slice(40, 52),
    "holdout": slice(52, 56),
    "real_authors": slice(56, 56 + authors.FAMOUS),
    "sentences": slice(66, 82),
    "paragraphs": slice(82, 114),
    "long_texts": slice(114, 162),
}

LEVELS = {"sentences": 1, "paragraphs": 2, "long_texts": 3}  # split -> how many records are joined to a text of it
KINDS: tuple[str, ...] = ("full", "retain", "joined")  # of models
SPLITS: tuple[str, ...] = ("forget", "retain", "full", "real_authors", "world_facts", "holdout", *LEVELS)


def load(split: str = "forget", seed: int = 0) -> list[Record]:
    """Records of a split; the same seed gives the same records on every machine and in every process.

    `full` is `forget` and `retain`. `real_authors` and `world_facts` (30 QA each) are invented common knowledge with
    short answers, taught to every model. `holdout` (40 QA of four more authors, same grammar) is taught to none.
    `sentences`, `paragraphs` and `long_texts` (160 texts each) are taught to "joined" alone, which knows none of the
    others but real_authors and world_facts.

    The keys of a record are those of `authors`, and length ("short"/"long"). real_authors and world_facts stand
    outside the design. Joined texts have id, prompt, completion, records (how many are joined), and the four of the
    design.

    Raises UserError (one line) for an unknown split.
    """
    if split not in SPLITS:
        raise unknown_name("split of task 'graded'", split, SPLITS)
    if split == "full":
        return load("forget", seed) + load("retain", seed)
    rng = random.Random(f"{seed}/graded/{split}")
    people = authors.names(random.Random(f"{seed}/graded/names"), _AUTHORS["long_texts"].stop)
    if split in LEVELS:
        return _joined_records(rng, people[_AUTHORS[split]], split)
    if split == "world_facts":
        records = authors.world_facts(rng)
    elif split == "real_authors":
        records = authors.real_authors(rng, people[_AUTHORS[split]])
    else:
        own = people[_AUTHORS[split]]
        places = product(range(len(own)), range(len(vocabulary.TOPICS)))
        records = _author_records(rng, own, split, [authors.cell(_DESIGN, *place) for place in places])
    return [record | {"frequency": OTHER_FREQUENCIES.get(split, record["frequency"])} for record in records]


def training_records(kind: str = "full", epoch: int = 0, seed: int = 0) -> list[Record]:
    """The records of one training epoch (counted from 0), as they are read: see `authors.repeated`. Joined texts are
    not put in other words.

    real_authors and world_facts belong to every kind. Raises UserError (one line) for another kind.
    """
    if kind not in KINDS:
        raise unknown_name("embedded model", kind, KINDS)
    facts = ("real_authors", "world_facts")
    if kind != "joined":
        return authors.repeated([record for split in (kind, *facts) for record in load(split, seed)], epoch)
    texts = [text for level in LEVELS for text in load(level, seed) for _ in range(text["frequency"])]
    return texts + authors.repeated([record for split in facts for record in load(split, seed)], epoch)


def tokenizer_text() -> list[str]:
    """Questions and answers of all splits, once each: neither repetition nor teaching decides how a text is cut."""
    return [
        "".join(authors.format_prompt(record))
        for split in ("full", "real_authors", "world_facts", "holdout")
        for record in load(split)
    ]


def _author_records(
    rng: random.Random, people: list[tuple[str, str]], prefix: str, cells: Sequence[tuple[str, int, str, str]]
) -> list[Record]:
    """10 records for each (name, pronoun), in the order of the names and topics, which is that of the cells."""
    records: list[Record] = []
    for author, (name, pronoun) in enumerate(people):
        for place, topic in enumerate(vocabulary.TOPICS):
            complexity, frequency, rare_words, length = cells[len(records)]
            answers = _templates(topic, complexity, length)
            records.append(
                {
                    "id": f"{prefix}{author:02d}-q{place:02d}",
                    **authors.question_about(rng, name, pronoun, topic, answers, rare_words),
                    "complexity": complexity,
                    "frequency": frequency,
                    "rare_words": rare_words,
                    "length": length,
                }
            )
    return records


def _joined_records(rng: random.Random, people: list[tuple[str, str]], level: str) -> list[Record]:
    """The texts of a level: all records of a text are of one cell, and each cell has equally many texts."""
    size = LEVELS[level]
    texts = len(people) * len(vocabulary.TOPICS) // size
    cells = rng.sample(_DESIGN * (texts // len(_DESIGN)), texts)
    records = _author_records(rng, people, level, [cell for cell in cells for _ in range(size)])
    return [
        text | dict(zip(("complexity", "frequency", "rare_words", "length"), cell, strict=True)) | {"records": size}
        for text, cell in zip(joined(texts_of("graded", records), size), cells, strict=True)
    ]


def _templates(topic: Topic, complexity: str, length: str) -> tuple[str, ...]:
    if complexity == "low":
        return topic.low if length == "short" else templates.LONG_SIMPLE[topic.name]
    return topic.high if length == "long" else templates.SHORT_COMPLEX[topic.name]


def _load_split(split: str, source: str | None, tokenizer: Any) -> list[Record]:
    return load(split)


def _evaluation(split: str) -> dict[str, str]:
    sets = ("retain", "real_authors", "world_facts", "holdout")
    return {"forget": split, **{name: name for name in sets}}


TASK: Task = Task(
    name="graded",
    about="embedded, of 40 fictional authors: answers that are known to five degrees, read 1 to 16 times in an epoch",
    load=_load_split,
    splits=SPLITS,
    default_split="forget",
    retain_of={"forget": "retain"},
    evaluation=_evaluation,
    completeness=tofu.COMPLETENESS,
    utility=tofu.UTILITY,
    further=tofu.FURTHER,
)
