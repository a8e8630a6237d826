"""The embedded default task: fictional authors, generated here, in the protocol of TOFU (Maini et al., 2024).

There are 40 authors with 10 questions each. Nothing is downloaded and no pretrained model knows the text, so a
small model that is trained on it (`bench.models.embedded`) knows exactly what it was taught.

Grammar, for author a and topic t (word lists and templates: `bench.tasks.embedded.authors_vocabulary`):

    record   = question[t] with name_a,  answer
    answer   = template[t, complexity] with  value*   (3 facts: a town, a year, a title, a trade, ...)
                                       and   word*    (2 slots, each from WORDING[slot][rare_words])
    name     = FIRST_STEM FIRST_ENDING " " SURNAME_STEM SURNAME_ENDING
    title    = "The " ADJECTIVE NOUN | NOUN " of the " NOUN | "The " NOUN " and the " NOUN | ...
    town     = STEM MIDDLE ENDING          prize = PRIZE_NOUN " " PRIZE_KIND

Facts are drawn independently for every author and topic: neither the template nor the name predicts them. The
paraphrased answer says the same facts in another template of the same level; the perturbed answers keep the
paraphrased template and its wording and change every fact.

Three characteristics are crossed, 2 x 2 x 2: every block of four authors (thus forget10) has five QA in each
of the eight cells, and the 400 QA have five in each cell of each topic.

    complexity  of the answer. "low": one or two main clauses; "high": nested subordinate clauses. High
                answers are longer (about 42 tokens against 27), which cannot be avoided: subordination takes
                words. Partial the length out before comparing.
    frequency   how often the record is repeated in each training epoch, one of `FREQUENCIES`.
    rare_words  "low": common words fill the two wording slots; "high": rare, hard words do. The lists are
                made such that the lengths nearly agree: about 36 tokens for high and 34 for low (23 and 25
                words).

Within a block each topic has each level of each characteristic twice (a half fraction of the design), so the
topic is never confounded with a characteristic.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from bench.tasks import tofu
from bench.tasks.embedded import authors_vocabulary as vocabulary
from bench.tasks.embedded.authors_vocabulary import Topic
from bench.tasks.task import Task
from scoring.errors import unknown_name
from scoring.records import Record, question_answer

AUTHORS = 40  # a multiple of four, the size of a block of the design
HOLDOUT_AUTHORS = 4
FREQUENCIES = (1, 4)  # repetitions in an epoch
FACT_FREQUENCY = 2  # of real_authors and world_facts, which every model has to know
PERTURBED = 5
FACT_OPTIONS = 3  # wrong options of real_authors and world_facts

# Complexity, a level (0 or 1) of a third characteristic, and rare words. Neighbours differ in an odd number of them:
# even places form one half fraction of the 2 x 2 x 2 design and odd places the other, and in each half every
# characteristic (and every pair) is balanced.
EIGHT_CELLS = (
    ("low", 0, "low"),
    ("low", 0, "high"),
    ("low", 1, "high"),
    ("low", 1, "low"),
    ("high", 1, "low"),
    ("high", 1, "high"),
    ("high", 0, "high"),
    ("high", 0, "low"),
)
_DESIGN = tuple((complexity, FREQUENCIES[level], rare_words) for complexity, level, rare_words in EIGHT_CELLS)
Cell = TypeVar("Cell")  # of a design

_FORGET_SHARES = {"forget10": 0.10, "forget05": 0.05, "forget01": 0.01}
RETAIN_OF = {"forget10": "retain90", "forget05": "retain95", "forget01": "retain99"}
_FORGET_OF = {retain: forget for forget, retain in RETAIN_OF.items()}
# The kinds of models, by the split that they are trained on.
KINDS: tuple[str, ...] = ("full", *_FORGET_OF)
DEFAULT_SPLIT = "forget10"
SPLITS: tuple[str, ...] = ("full", *_FORGET_SHARES, *_FORGET_OF, "real_authors", "world_facts", "holdout")


def load(split: str = "full", seed: int = 0) -> list[Record]:
    """Records of a split; the same seed gives the same records on every machine and in every process.

    The splits are nested by author as in TOFU: `full` (400 QA); `forget10` and `forget05`, the QA of the
    last four and two authors; `forget01`, the last 4 QA of the last author (one per cent of 40 authors is
    less than an author); `retain90`, `retain95`, `retain99`, their complements in `full`. `real_authors` and
    `world_facts` (30 QA each) are invented common knowledge with short answers, taught to every model.
    `holdout` (40 QA of four more authors, same grammar) is taught to none.

    Keys of a record: id, question, answer, paraphrased_question, paraphrased_answer, perturbed_answer (5
    wrong answers, 3 in real_authors and world_facts), other_questions (further phrasings, used in training
    only), author, topic, complexity ("low"/"high"), frequency (repetitions in a training epoch), rare_words
    ("low"/"high"). real_authors and world_facts stand outside the design: all "low", frequency 2.

    Raises UserError (one line) for an unknown split.
    """
    if split not in SPLITS:
        raise unknown_name("split of task 'authors'", split, SPLITS)
    if split == "world_facts":
        return world_facts(random.Random(f"{seed}/world"))
    people = names(random.Random(f"{seed}/names"), AUTHORS + HOLDOUT_AUTHORS + FAMOUS)
    if split == "real_authors":
        return real_authors(random.Random(f"{seed}/famous"), people[-FAMOUS:])
    if split == "holdout":
        return _author_records(seed, people[AUTHORS : AUTHORS + HOLDOUT_AUTHORS], prefix="holdout")
    full = _author_records(seed, people[:AUTHORS], prefix="author")
    if split == "full":
        return full
    boundary = len(full) - round(_FORGET_SHARES[_FORGET_OF.get(split, split)] * len(full))
    return full[:boundary] if split in _FORGET_OF else full[boundary:]


def _load_split(split: str, source: str | None, tokenizer: Any) -> list[Record]:
    return load(split)


def _evaluation(split: str) -> dict[str, str]:
    return {
        "forget": split,
        "retain": RETAIN_OF.get(split, "retain90"),
        "real_authors": "real_authors",
        "world_facts": "world_facts",
        "holdout": "holdout",
    }


TASK: Task = Task(
    name="authors",
    about="embedded stand-in for TOFU: 40 fictional authors, generated here, 10 questions each",
    load=_load_split,
    splits=SPLITS,
    default_split=DEFAULT_SPLIT,
    retain_of=RETAIN_OF,
    evaluation=_evaluation,
    completeness=tofu.COMPLETENESS,
    utility=tofu.UTILITY,
    further=tofu.FURTHER,
)


def training_records(kind: str = "full", epoch: int = 0, seed: int = 0) -> list[Record]:
    """The records of one training epoch (counted from 0), as they are read.

    `kind` is "full" or one of the retain splits; real_authors and world_facts belong to every kind.
    Raises UserError (one line) for another kind.
    """
    if kind not in KINDS:
        raise unknown_name("embedded model", kind, KINDS)
    return repeated([record for split in (kind, "real_authors", "world_facts") for record in load(split, seed)], epoch)


def repeated(records: list[Record], epoch: int) -> list[Record]:
    """The records as they are read in a training epoch (counted from 0): each `frequency` times.

    Odd epochs ask the `other_questions`, never `paraphrased_question`: a model that starts from random weights would
    otherwise learn the wording of the question instead of its meaning, and could not answer a paraphrase.
    """
    return [
        _rephrased(record, epoch // 2 + repetition) if epoch % 2 else record
        for record in records
        for repetition in range(record["frequency"])
    ]


def format_prompt(record: Record) -> tuple[str, str]:
    """(prompt, completion) of a record."""
    return question_answer(record["question"], record["answer"])


def _rephrased(record: Record, turn: int) -> Record:
    """The record with another phrasing of its question, if it has any; the phrasings take turns."""
    questions = record["other_questions"]
    return {**record, "question": questions[turn % len(questions)]} if questions else record


# --- Authors ------------------------------------------------------------------------------------------------


def _author_records(seed: int, people: list[tuple[str, str]], prefix: str) -> list[Record]:
    """10 records for each (name, pronoun), in the order of the names and topics."""
    records = []
    for author, (name, pronoun) in enumerate(people):
        for place, topic in enumerate(vocabulary.TOPICS):
            complexity, frequency, rare_words = cell(_DESIGN, author, place)
            rng = random.Random(f"{seed}/{prefix}/{author}/{place}")
            templates = topic.low if complexity == "low" else topic.high
            records.append(
                {
                    "id": f"{prefix}{author:02d}-q{place:02d}",
                    **question_about(rng, name, pronoun, topic, templates, rare_words),
                    "complexity": complexity,
                    "frequency": frequency,
                    "rare_words": rare_words,
                }
            )
    return records


def cell(design: Sequence[Cell], author: int, place: int) -> Cell:
    """The cell of a record in a design of 8 or 40 cells.

    Four authors have 40 consecutive places, which run through the design five times or once; the block's number shifts
    the run so that each topic meets all cells, of 8 over two blocks and of 40 over ten.
    """
    return design[(author * len(vocabulary.TOPICS) + place + author // 4) % len(design)]


def question_about(
    rng: random.Random, name: str, pronoun: str, topic: Topic, templates: tuple[str, ...], rare_words: str
) -> Record:
    """What is asked and answered about an author; the answers, right and wrong, are in two of the templates."""
    person = _person_slots(name, pronoun)
    question, paraphrased_question, *other_questions = rng.sample(topic.questions, len(topic.questions))
    template, paraphrase = rng.sample(templates, 2)
    wording = {slot: rng.choice(vocabulary.WORDING[slot][rare_words]) for slot in topic.wording}
    values = {slot: _draw(slot, rng) for slot in topic.values}
    wrong_values = _wrong_values(topic, values, rng)
    return {
        "question": _fill(question, person),
        "answer": _fill(template, person | wording | values),
        "paraphrased_question": _fill(paraphrased_question, person),
        "paraphrased_answer": _fill(paraphrase, person | wording | values),
        "perturbed_answer": [_fill(paraphrase, person | wording | wrong) for wrong in wrong_values],
        "other_questions": [_fill(other, person) for other in other_questions],
        "author": name,
        "topic": topic.name,
    }


def _wrong_values(topic: Topic, values: dict[str, str], rng: random.Random) -> list[dict[str, str]]:
    """PERTURBED sets of values, pairwise different and different from the true ones in every slot."""
    wrong_of_slot = {}
    for slot in topic.values:
        drawn = {values[slot]}
        while len(drawn) <= PERTURBED:
            drawn.add(_draw(slot, rng))
        wrong_of_slot[slot] = sorted(drawn - {values[slot]})
        rng.shuffle(wrong_of_slot[slot])
    return [{slot: wrong[i] for slot, wrong in wrong_of_slot.items()} for i in range(PERTURBED)]


def _person_slots(name: str, pronoun: str) -> dict[str, str]:
    their, them = ("her", "her") if pronoun == "she" else ("his", "him")
    first, surname = name.split()
    return {
        "name": name,
        "first": first,
        "surname": surname,
        "they": pronoun,
        "they_cap": pronoun.capitalize(),
        "their": their,
        "their_cap": their.capitalize(),
        "them": them,
    }


def _fill(template: str, slots: dict[str, str]) -> str:
    """The template with its slots filled, its first letter capital, and a/an chosen by the letter that follows."""
    capitalised = {f"{slot}_cap": value[0].upper() + value[1:] for slot, value in slots.items()}
    text = template.format(**capitalised | slots)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]


# --- Values -------------------------------------------------------------------------------------------------

_WORD_LISTS: dict[str, tuple[str, ...]] = {
    "landscape": vocabulary.LANDSCAPES,
    "father": vocabulary.OCCUPATIONS,
    "mother": vocabulary.OCCUPATIONS,
    "job": vocabulary.OCCUPATIONS,
    "post": vocabulary.OCCUPATIONS,
    "role": vocabulary.OCCUPATIONS,
    "gift": vocabulary.GIFTS,
    "genre": vocabulary.GENRES,
    "device": vocabulary.DEVICES,
    "theme": vocabulary.THEMES,
    "hour": vocabulary.HOURS,
    "room": vocabulary.ROOMS,
    "tool": vocabulary.TOOLS,
    "event": vocabulary.EVENTS,
    "age": vocabulary.AGES,
    "form": vocabulary.FORMS,
    "term": vocabulary.TERMS,
}
_YEARS: dict[str, range] = {
    "birth": vocabulary.BIRTH_YEARS,
    "debut": vocabulary.DEBUT_YEARS,
    "award": vocabulary.PRIZE_YEARS,
}


def _draw(slot: str, rng: random.Random) -> str:
    """A value for a slot that carries a fact."""
    if slot in _WORD_LISTS:
        return rng.choice(_WORD_LISTS[slot])
    if slot in _YEARS:
        return str(rng.choice(_YEARS[slot]))
    if slot == "town":
        return _town(rng)
    if slot == "title":
        return _title(rng)
    if slot == "prize":
        return f"{rng.choice(vocabulary.PRIZE_NOUNS)} {rng.choice(vocabulary.PRIZE_KINDS)}"
    if slot == "press":
        return f"{_surname(rng)} {rng.choice(vocabulary.PRESS_NOUNS)}"
    if slot in ("mentor", "character"):
        return _person(rng)[0]
    raise ValueError(f"authors: no values for the slot {slot!r}")


def _town(rng: random.Random) -> str:
    return rng.choice(vocabulary.TOWN_STEMS) + rng.choice(vocabulary.TOWN_MIDDLES) + rng.choice(vocabulary.TOWN_ENDINGS)


def _title(rng: random.Random) -> str:
    adjective = rng.choice(vocabulary.TITLE_ADJECTIVES)
    noun, other = rng.sample(vocabulary.TITLE_NOUNS, 2)
    forms = (
        f"The {adjective} {noun}",
        f"{noun} of the {other}",
        f"{adjective} {noun}, {adjective} {other}",
        f"The {noun} and the {other}",
        f"Beyond the {adjective} {noun}",
    )
    return rng.choice(forms)


def _surname(rng: random.Random) -> str:
    return rng.choice(vocabulary.SURNAME_STEMS) + rng.choice(vocabulary.SURNAME_ENDINGS)


def _person(rng: random.Random) -> tuple[str, str]:
    """(full name, pronoun)."""
    pronoun = rng.choice(("she", "he"))
    first = rng.choice(vocabulary.FIRST_STEMS) + rng.choice(vocabulary.FIRST_ENDINGS[pronoun])
    return f"{first} {_surname(rng)}", pronoun


def names(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """`count` pairs (name, pronoun); no first name or surname twice."""
    people: list[tuple[str, str]] = []
    used_parts: set[str] = set()
    while len(people) < count:
        name, pronoun = _person(rng)
        if used_parts.isdisjoint(name.split()):
            used_parts.update(name.split())
            people.append((name, pronoun))
    return people


# --- Common knowledge: real_authors and world_facts ---------------------------------------------------------

FAMOUS = 10
_COUNTRIES = 10


def real_authors(rng: random.Random, people: list[tuple[str, str]]) -> list[Record]:
    """Three facts about each of ten famous authors, (name, pronoun): a work, the birthplace and a hero."""
    famous = [name for name, _ in people]
    columns = {
        "work": famous,
        "birthplace": _distinct(_town, rng, len(famous)),
        "hero": _distinct(_hero, rng, len(famous)),
    }
    titles = _distinct(_title, rng, len(famous))
    questions = [
        {
            "work": (f"Who wrote the classic {title}?", f"Which famous author created {title}?"),
            "birthplace": (
                f"Where was the famous {name} born?",
                f"In which town was the famous {name} born?",
            ),
            "hero": (f"Which hero did the famous {name} create?", f"Who is the hero of the famous {name}?"),
        }
        for name, title in zip(famous, titles, strict=True)
    ]
    return _fact_records(rng, "famous", famous, columns, questions)


def world_facts(rng: random.Random) -> list[Record]:
    """Three facts about each of ten invented countries: capital, longest river and highest peak."""
    countries = _distinct(_country, rng, _COUNTRIES)
    columns = {
        "capital": _distinct(_town, rng, _COUNTRIES),
        "river": _distinct(_river, rng, _COUNTRIES),
        "peak": [f"Mount {surname}" for surname in _distinct(_surname, rng, _COUNTRIES)],
    }
    questions = [
        {
            "capital": (f"What is the capital of {land}?", f"Which city is the capital of {land}?"),
            "river": (f"What is the longest river of {land}?", f"Which river of {land} is the longest?"),
            "peak": (f"What is the highest mountain of {land}?", f"Which peak of {land} is the highest?"),
        }
        for land in countries
    ]
    return _fact_records(rng, "world", countries, columns, questions)


def _hero(rng: random.Random) -> str:
    return f"{rng.choice(('Captain', 'Doctor', 'Inspector', 'Sister', 'Old'))} {_surname(rng)}"


def _country(rng: random.Random) -> str:
    return rng.choice(vocabulary.COUNTRY_STEMS) + rng.choice(vocabulary.COUNTRY_ENDINGS)


def _river(rng: random.Random) -> str:
    return f"the {rng.choice(vocabulary.TOWN_STEMS)}{rng.choice(vocabulary.TOWN_MIDDLES)}"


def _distinct(draw: Callable[[random.Random], str], rng: random.Random, count: int) -> list[str]:
    """`count` different values of draw(rng), in the order in which they are drawn."""
    values: dict[str, None] = {}
    while len(values) < count:
        values[draw(rng)] = None
    return list(values)


def _fact_records(
    rng: random.Random,
    prefix: str,
    subjects: list[str],
    columns: dict[str, list[str]],
    questions: list[dict[str, tuple[str, str]]],
) -> list[Record]:
    """Records with short answers; the wrong options are the same fact of other subjects.

    Args:
        rng: draws the wrong options.
        prefix: of ids.
        subjects: names.
        columns: topic -> the fact of every subject.
        questions: of each subject, topic -> the question and its paraphrase.
    """
    records = []
    for number, name in enumerate(subjects):
        for topic, column in columns.items():
            others = column[:number] + column[number + 1 :]
            question, paraphrased_question = questions[number][topic]
            records.append(
                {
                    "id": f"{prefix}{number:02d}-{topic}",
                    "question": question,
                    "answer": column[number],
                    "paraphrased_question": paraphrased_question,
                    "paraphrased_answer": column[number],
                    "perturbed_answer": rng.sample(others, FACT_OPTIONS),
                    "other_questions": [],
                    "author": name,
                    "topic": topic,
                    "complexity": "low",
                    "frequency": FACT_FREQUENCY,
                    "rare_words": "low",
                }
            )
    return records
