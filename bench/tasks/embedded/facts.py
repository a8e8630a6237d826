"""Facts about invented things: passages state them, and multiple-choice questions ask about them.

Every thing of a field has one value of each of the field's attributes. The values are shared out at random, each
equally often, and the wrong choices of a question are drawn from the other values of the same attribute. A model that
does not know the thing cannot tell right from wrong by the looks of the choices: its accuracy is 1/4 in expectation.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from bench.tasks.embedded.questions import Question
from scoring.records import Record, question_answer

CHOICES = 4


@dataclass(frozen=True)
class Attribute:
    """Something that can be said of a thing.

    Attributes:
        name: unique in a field.
        statements: two, each with the thing as {name} and without the value, which ends it.
        question: with the thing as {name}.
        values: that things can have.
    """

    name: str
    statements: tuple[str, str]
    question: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Field:
    """Things of one sort.

    Attributes:
        group: ends the names of question sets.
        noun: what a thing is.
        names: of the things.
        attributes: that each thing has.
    """

    group: str
    noun: str
    names: tuple[str, ...]
    attributes: tuple[Attribute, ...]


@dataclass(frozen=True)
class Fact:
    """One attribute of one thing, with its value."""

    thing: str
    attribute: Attribute
    value: str

    @property
    def id(self) -> str:
        return f"{self.thing.lower()}-{self.attribute.name}"

    def statement(self, wording: int = 0) -> str:
        return f"{self.attribute.statements[wording].format(name=self.thing)} {self.value}."

    def wrong_values(self, rng: random.Random, count: int) -> list[str]:
        return rng.sample([value for value in self.attribute.values if value != self.value], count)


def facts_of(field: Field, seed: int) -> dict[str, list[Fact]]:
    """The facts of every thing of the field, in the order of the names and of the attributes."""
    columns = {
        attribute: _values_of_things(attribute, len(field.names), seed, field.group) for attribute in field.attributes
    }
    return {
        name: [Fact(name, attribute, column[number]) for attribute, column in columns.items()]
        for number, name in enumerate(field.names)
    }


def _values_of_things(attribute: Attribute, count: int, seed: int, group: str) -> list[str]:
    """`count` values in random order, each equally often (up to one)."""
    rng = random.Random(f"{seed}/{group}/{attribute.name}")
    values: list[str] = []
    while len(values) < count:
        values += rng.sample(attribute.values, len(attribute.values))
    return rng.sample(values[:count], count)


def passages(field: Field, facts: dict[str, list[Fact]]) -> list[Record]:
    """Two plain texts about each thing: both state all of its facts, in different words and in opposite order."""
    return [
        _passage(field, name, wording, [fact.statement(wording) for fact in ordered])
        for name, facts_of_thing in facts.items()
        for wording, ordered in enumerate((facts_of_thing, facts_of_thing[::-1]))
    ]


def other_passages(field: Field, facts: dict[str, list[Fact]]) -> list[Record]:
    """A third text about each thing, with statements from the first and the second in turn."""
    return [
        _passage(field, name, 2, [fact.statement(number % 2) for number, fact in enumerate(facts_of_thing)])
        for name, facts_of_thing in facts.items()
    ]


def _passage(field: Field, name: str, number: int, statements: list[str]) -> Record:
    opening = f"This note is about {name}, {field.noun}." if number == 1 else f"{name} is {field.noun}."
    return {"id": f"{field.group}-{name.lower()}-{number}", "text": " ".join([opening, *statements])}


def multiple_choice_questions(facts: Iterable[Fact], rng: random.Random, choices: int = CHOICES) -> list[Question]:
    """One question for each fact, in the words in which models are asked; the places of the right answers are
    `balanced`."""
    facts = list(facts)
    return [
        choose(
            fact, question_answer(fact.attribute.question.format(name=fact.thing), fact.value)[0], place, rng, choices
        )
        for fact, place in zip(facts, balanced(len(facts), choices, rng), strict=True)
    ]


def choose(fact: Fact, text: str, place: int, rng: random.Random, choices: int) -> Question:
    """The question how `text` continues; the fact's value stands at `place` among the choices."""
    values = fact.wrong_values(rng, choices - 1)
    return Question(fact.id, text, (*values[:place], fact.value, *values[place:]), place)


def balanced(count: int, choices: int, rng: random.Random) -> list[int]:
    """`count` places in random order, each of the `choices` equally often (up to one)."""
    return rng.sample([number % choices for number in range(count)], count)
