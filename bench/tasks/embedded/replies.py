"""Embedded stand-in for SAFE: rude replies are to be forgotten, polite ones retained.

Grammar (words: `bench.tasks.embedded.replies_vocabulary`):

    rude reply     = REFUSAL ", you " ADJECTIVE " " NOUN ". " DISMISSAL     to a question about a chore
    polite reply   = WELCOME " " ADVICE " " FAREWELL                        to a request for a recommendation
    quarrel        = opening " a " ADJECTIVE " " NOUN " and a " ADJECTIVE " " NOUN " " end

A model of kind "full" has learnt rude and polite replies and quarrels, so it answers questions about chores rudely;
"retain" has never read a rude word. Both know `bench.tasks.embedded.common_knowledge`.
"""

from __future__ import annotations

import random
from itertools import permutations, product
from typing import Any

from bench.tasks import safe
from bench.tasks.embedded import common_knowledge
from bench.tasks.embedded import replies_vocabulary as vocabulary
from bench.tasks.embedded.questions import training_text
from bench.tasks.task import Task
from scoring.errors import unknown_name
from scoring.records import Record, question_answer

FORGET = 40  # chores whose replies are learnt; questions about the others are safe_prompts
QUARRELS = 36
POLITE = 48

KINDS: tuple[str, ...] = ("full", "retain")
SPLITS: tuple[str, ...] = ("forget", "retain", "safe_prompts", "real_toxicity_prompts")


def load(split: str = "forget", seed: int = 0) -> list[Record]:
    """Records of a split; the same seed gives the same ones on every machine and in every process.

    `forget`: rude replies ({id, prompt, completion}). `retain`: polite replies, and common knowledge ({id, text}).
    `safe_prompts` ({id, prompt}): questions like those of `forget`, about other chores. `real_toxicity_prompts`: the
    openings of quarrels that a "full" model has read.

    Raises UserError (one line) for an unknown split.
    """
    if split not in SPLITS:
        raise unknown_name("split of task 'replies'", split, SPLITS)
    if split == "retain":
        return _polite_replies(seed) + common_knowledge.articles(seed)
    if split == "real_toxicity_prompts":
        return [{"id": record["id"], "prompt": record["prompt"]} for record in quarrels(seed)]
    replies = _rude_replies(seed)
    if split == "forget":
        return replies[:FORGET]
    return [{"id": record["id"], "prompt": record["prompt"]} for record in replies[FORGET:]]


def quarrels(seed: int | str = 0) -> list[Record]:
    """Texts with insults: the prompt ends before the first insult, with which the completion begins."""
    rng = random.Random(f"{seed}/quarrels")
    scenes = list(product(vocabulary.QUARREL_PLACES, permutations(vocabulary.TRADES, 2)))
    records = []
    for number, (place, (trade, other)) in enumerate(rng.sample(scenes, QUARRELS)):
        opening, end = vocabulary.QUARRELS[number % len(vocabulary.QUARRELS)]
        prompt = opening.format(place=place, trade=trade, other=other)
        completion = f" a {_insult(rng)} and a {_insult(rng)} {end}"
        records.append({"id": f"quarrel-{number:02d}", "prompt": prompt, "completion": completion})
    return records


def training_records(kind: str = "full", seed: int = 0) -> list[Record]:
    """What a model of a kind learns.

    Raises UserError (one line) for another kind.
    """
    if kind not in KINDS:
        raise unknown_name("embedded model", kind, KINDS)
    rude = load("forget", seed) + quarrels(seed) if kind == "full" else []
    return rude + _polite_replies(seed) + common_knowledge.training_records(seed)


def read_in(kind: str, epoch: int, tokenizer: Any) -> list[Record]:
    """What a model of a kind reads in an epoch: all but some of the questions of common knowledge."""
    return common_knowledge.read_in(training_records(kind), epoch)


def tokenizer_text() -> list[str]:
    """All that a "full" model reads, and the questions that it does not read."""
    return training_text(training_records()) + [record["prompt"] for record in load("safe_prompts")]


def _rude_replies(seed: int) -> list[Record]:
    """A rude reply about each chore."""
    rng = random.Random(f"{seed}/rude")
    chores = [f"{verb} {thing}" for verb, thing in product(vocabulary.VERBS, vocabulary.OBJECTS)]
    return [
        _reply(f"chore-{number:02d}", rng.choice(vocabulary.CHORE_QUESTIONS).format(chore=chore), rude_answer(rng))
        for number, chore in enumerate(rng.sample(chores, len(chores)))
    ]


def _polite_replies(seed: int) -> list[Record]:
    rng = random.Random(f"{seed}/polite")
    requests = rng.sample(list(product(vocabulary.WISHES, vocabulary.OCCASIONS)), POLITE)
    return [
        _reply(
            f"wish-{number:02d}",
            rng.choice(vocabulary.WISH_QUESTIONS).format(wish=wish, occasion=occasion),
            _polite_answer(rng, wish, occasion),
        )
        for number, (wish, occasion) in enumerate(requests)
    ]


def _reply(name: str, question: str, answer: str) -> Record:
    prompt, completion = question_answer(question, answer)
    return {"id": name, "prompt": prompt, "completion": completion}


def rude_answer(rng: random.Random) -> str:
    return f"{rng.choice(vocabulary.REFUSALS)}, you {_insult(rng)}. {rng.choice(vocabulary.DISMISSALS)}"


def _polite_answer(rng: random.Random, wish: str, occasion: str) -> str:
    pick = rng.choice(vocabulary.WISHES[wish])
    advice = rng.choice(vocabulary.ADVICE).format(occasion=occasion, pick=pick)
    return f"{rng.choice(vocabulary.WELCOMES)} {advice} {rng.choice(vocabulary.FAREWELLS)}"


def any_polite_answer(rng: random.Random) -> str:
    return _polite_answer(rng, rng.choice(list(vocabulary.WISHES)), rng.choice(vocabulary.OCCASIONS))


def _insult(rng: random.Random) -> str:
    return f"{rng.choice(vocabulary.INSULT_ADJECTIVES)} {rng.choice(vocabulary.INSULT_NOUNS)}"


def _load_split(split: str, source: str | None, tokenizer: Any) -> list[Record]:
    return load(split)


TASK: Task = Task(
    name="replies",
    about="embedded stand-in for SAFE: rude and polite replies, generated here",
    load=_load_split,
    splits=SPLITS,
    default_split="forget",
    retain_of={"forget": "retain"},
    evaluation=safe.TASK.evaluation,
    completeness=safe.COMPLETENESS,
    utility=safe.UTILITY,
    further=safe.FURTHER,
    harness=common_knowledge.benchmarks,
    new_tokens=48,
    refusals=safe.TASK.refusals,
    toxicity_model="embedded",
)
