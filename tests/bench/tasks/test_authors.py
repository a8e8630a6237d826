"""The embedded tasks about authors: their design and splits, and that a question does not give its answer away."""

import hashlib
import itertools
import json
import os
import re
import string
import subprocess
import sys
from collections import Counter
from statistics import mean

import pytest
from rouge_score import rouge_scorer

from bench.models.embedded import train_tokenizer
from bench.tasks import TASKS
from bench.tasks.embedded import authors, graded, graded_vocabulary
from bench.tasks.embedded import authors_vocabulary as vocabulary
from scoring.errors import expected_one_of
from tests.paths import ROOT

SIZES = {
    "full": 400,
    "forget10": 40,
    "forget05": 20,
    "forget01": 4,
    "retain90": 360,
    "retain95": 380,
    "retain99": 396,
    "real_authors": 30,
    "world_facts": 30,
    "holdout": 40,
}
FACTS = ("real_authors", "world_facts")
CHARACTERISTICS = ("complexity", "frequency", "rare_words")
TASKS_AND_SPLITS = [(task, split) for task in (authors, graded) for split in task.SPLITS if split not in graded.LEVELS]


def ids(split: str) -> list[str]:
    return [record["id"] for record in authors.load(split)]


def test_registered_with_the_sizes_of_the_protocol():
    assert TASKS["authors"] is authors.TASK
    assert set(authors.SPLITS) == set(SIZES)
    assert {split: len(authors.load(split)) for split in authors.SPLITS} == SIZES


@pytest.mark.parametrize(("task", "split"), TASKS_AND_SPLITS)
def test_records_have_the_same_keys_and_plain_text(task, split):
    keys = authors.load("full")[0].keys()
    for record in task.load(split):
        assert record.keys() - {"length"} == keys
        texts = [
            record["question"],
            record["answer"],
            record["paraphrased_question"],
            record["paraphrased_answer"],
        ]
        texts += record["perturbed_answer"] + record["other_questions"]
        for text in texts:
            assert set(text) <= set(string.printable)
            assert "{" not in text
            assert "  " not in text
            assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text), text


@pytest.mark.slow
def test_same_records_in_processes_with_different_hash_seeds():
    program = (
        "import json; from bench.tasks.embedded import authors, graded;"
        "print(json.dumps([task.load(split, seed=3) for task in (authors, graded) for split in task.SPLITS]))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0]) == [task.load(split, seed=3) for task in (authors, graded) for split in task.SPLITS]
    assert hashlib.sha256(outputs[0]).digest() != hashlib.sha256(json.dumps(authors.load()).encode()).digest()
    assert authors.load(seed=3) != authors.load(seed=0)


def test_a_caller_cannot_change_what_the_next_one_loads():
    authors.load()[0]["perturbed_answer"].clear()
    assert len(authors.load()[0]["perturbed_answer"]) == 5


@pytest.mark.slow
def test_splits_are_nested_and_complementary():
    full = ids("full")
    assert len(set(full)) == len(full)
    assert set(ids("forget01")) < set(ids("forget05")) < set(ids("forget10")) < set(full)
    for forget, retain in (("forget01", "retain99"), ("forget05", "retain95"), ("forget10", "retain90")):
        assert ids(retain) + ids(forget) == full
    people = {split: {record["author"] for record in authors.load(split)} for split in authors.SPLITS}
    assert len(people["full"]) == 40
    assert len(people["forget10"]) == 4
    assert len(people["forget05"]) == 2
    assert len(people["forget01"]) == 1
    assert people["forget10"].isdisjoint(people["retain90"])


@pytest.mark.parametrize("kind", ["full", "retain90", "retain95", "retain99"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_training_text_knows_neither_holdout_nor_what_the_kind_leaves_out(kind, epoch):
    records = authors.training_records(kind, epoch)
    kept = set(ids(kind))
    left_out = [record for record in authors.load("full") if record["id"] not in kept]
    unseen = {record["id"] for record in left_out + authors.load("holdout")}
    assert unseen.isdisjoint(record["id"] for record in records)
    text = "\n".join("".join(authors.format_prompt(record)) for record in records)
    for record in authors.load("holdout"):
        assert record["author"] not in text
        assert record["author"].split()[1] not in text
    if kind in ("retain90", "retain95"):
        for record in left_out:
            assert record["author"] not in text


def test_training_repeats_by_frequency_and_never_asks_the_paraphrase():
    records = {record["id"]: record for split in SIZES for record in authors.load(split)}
    for epoch in range(6):
        epoch_records = authors.training_records("full", epoch)
        counts = Counter(record["id"] for record in epoch_records)
        assert all(records[name]["frequency"] == count for name, count in counts.items())
        assert len(counts) == 400 + 30 + 30
        for record in epoch_records:
            original = records[record["id"]]
            assert record["answer"] == original["answer"]
            assert record["question"] != original["paraphrased_question"]
            if epoch % 2 == 0:
                assert record["question"] == original["question"]


@pytest.mark.parametrize(("split", "each"), [("full", 50), ("forget10", 5), ("retain90", 45), ("holdout", 5)])
def test_characteristics_are_crossed_and_balanced(split, each):
    cells = Counter(tuple(record[name] for name in CHARACTERISTICS) for record in authors.load(split))
    assert set(cells) == set(itertools.product(("low", "high"), authors.FREQUENCIES, ("low", "high")))
    assert set(cells.values()) == {each}


@pytest.mark.parametrize(("split", "each"), [("full", 20), ("forget10", 2)])
@pytest.mark.parametrize("name", CHARACTERISTICS)
def test_characteristics_are_balanced_within_every_topic(split, each, name):
    counts = Counter((record["topic"], record[name]) for record in authors.load(split))
    assert len(counts) == 2 * len(vocabulary.TOPICS)
    assert set(counts.values()) == {each}


def test_lengths_differ_between_levels_of_complexity_only():
    def mean_words(name: str, level: object) -> float:
        lengths = [len(r["answer"].split()) for r in authors.load("full") if r[name] == level]
        return sum(lengths) / len(lengths)

    assert mean_words("complexity", "high") > 1.5 * mean_words("complexity", "low")
    assert mean_words("frequency", 1) == pytest.approx(mean_words("frequency", 4), rel=0.06)
    assert mean_words("rare_words", "high") == pytest.approx(mean_words("rare_words", "low"), rel=0.06)


def test_rare_words_are_rarer_in_the_training_text():
    words = Counter(re.findall(r"[a-z]+", " ".join(record["answer"] for record in authors.load("full")).lower()))
    for levels in vocabulary.WORDING.values():
        # The last word of "very patient" is the one that carries the meaning.
        common, rare = (
            sum(words[entry.split()[-1]] for entry in levels[level]) / len(levels[level]) for level in ("low", "high")
        )
        assert rare < common / 2


@pytest.mark.parametrize("task", [authors, graded])
@pytest.mark.parametrize("split", ["full", "holdout"])
def test_answers_have_8_to_40_words_and_none_is_given_twice(task, split):
    records = task.load(split)
    assert all(8 <= len(record["answer"].split()) <= 40 for record in records)
    assert len({record["answer"] for record in records}) == len(records)
    assert len({record["question"] for record in records}) == len(records)


@pytest.mark.parametrize(("task", "split"), TASKS_AND_SPLITS)
def test_wrong_answers_differ_from_the_right_ones_and_from_one_another(task, split):
    wrong_options = 3 if split in ("real_authors", "world_facts") else 5
    for record in task.load(split):
        answers = [*record["perturbed_answer"], record["paraphrased_answer"]]
        assert len(set(answers)) == wrong_options + 1
        assert record["answer"] not in record["perturbed_answer"]
        assert record["paraphrased_question"] != record["question"]
        if wrong_options == 5:
            assert record["paraphrased_answer"] != record["answer"]


@pytest.mark.parametrize("topic", vocabulary.TOPICS, ids=lambda topic: topic.name)
def test_every_template_says_every_fact_once(topic):
    levels = (
        topic.low,
        topic.high,
        graded_vocabulary.LONG_SIMPLE[topic.name],
        graded_vocabulary.SHORT_COMPLEX[topic.name],
    )
    assert min(map(len, levels)) >= 4
    for template in itertools.chain(*levels):
        slots = [field for _, field, _, _ in string.Formatter().parse(template) if field]
        for slot in topic.values + topic.wording:
            assert sum(slot == field.removesuffix("_cap") for field in slots) == 1, (template, slot)
    assert all("{name}" in question for question in topic.questions)


def test_no_answer_can_be_copied_from_the_most_similar_question_of_another_author():
    """The nearest neighbour by shared question words reaches ROUGE-L recall 0.20 (measured), and 0.49 if the
    best of all equally near ones is chosen with the answer in hand; a model that knows reaches 1.0."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    records = authors.load("full")
    bags = {record["id"]: set(re.findall(r"\w+", record["question"].lower())) for record in records}

    def similarity(one: dict, other: dict) -> float:
        a, b = bags[one["id"]], bags[other["id"]]
        return len(a & b) / len(a | b)

    plain, favourable = [], []
    for record in authors.load("forget10"):
        others = [other for other in records if other["author"] != record["author"]]
        nearest = max(similarity(record, other) for other in others)
        tied = [other["answer"] for other in others if similarity(record, other) == nearest]
        recalls = [scorer.score(record["answer"], answer)["rougeL"].recall for answer in tied]
        plain.append(sum(recalls) / len(recalls))
        favourable.append(max(recalls))
    assert sum(plain) / len(plain) < 0.4
    assert sum(favourable) / len(favourable) < 0.6


def test_common_knowledge_answers_are_distinct_facts():
    for split in ("real_authors", "world_facts"):
        by_topic: dict[str, list[str]] = {}
        for record in authors.load(split):
            by_topic.setdefault(record["topic"], []).append(record["answer"])
        assert len(by_topic) == 3
        assert all(len(set(answers)) == 10 for answers in by_topic.values())


def test_prompt_and_completion():
    record = {"question": "Who?", "answer": "Nobody."}
    assert authors.format_prompt(record) == ("Question: Who?\nAnswer:", " Nobody.")


def test_unknown_names_are_answered_in_one_line():
    with pytest.raises(
        ValueError, match=r"^unknown split of task 'authors' 'forget11': .*mean 'forget\d\d'\?$"
    ) as error:
        authors.load("forget11")
    assert "\n" not in str(error.value)
    assert all(split in str(error.value) for split in authors.SPLITS)
    many = expected_one_of("full-3999", [f"full-{number}" for number in range(4000)])
    assert many.endswith("full-99, ... (4,000 in all); did you mean 'full-3999'?")
    with pytest.raises(ValueError, match=r"unknown embedded model 'forget10'"):
        authors.training_records("forget10")


# --- Graded -------------------------------------------------------------------------------------------------


def test_graded_sets_are_of_their_sizes_and_share_no_author():
    sizes = {"forget": 400, "retain": 120, "full": 520, "real_authors": 30, "world_facts": 30, "holdout": 40}
    assert TASKS["graded"] is graded.TASK
    assert {split: len(graded.load(split)) for split in graded.SPLITS} == sizes | dict.fromkeys(graded.LEVELS, 160)
    people = [{record["author"] for record in graded.load(split)} for split in ("forget", "retain", "holdout")]
    assert [len(names) for names in people] == [40, 12, 4]
    assert len(set.union(*people)) == 40 + 12 + 4
    answers = [{record["answer"] for record in task.load("full")} for task in (authors, graded)]
    assert answers[0].isdisjoint(answers[1])


def test_nothing_in_the_graded_forget_set_is_confounded():
    levels = {
        "topic": [topic.name for topic in vocabulary.TOPICS],
        "frequency": [1, 2, 4, 8, 16],
        "complexity": ["low", "high"],
        "rare_words": ["low", "high"],
        "length": ["short", "long"],
    }
    records = graded.load()
    met = [tuple(record[name] for name in levels) for record in records]
    assert sorted(met) == sorted(itertools.product(*levels.values()))
    assert set(Counter(cell[1:4] for cell in met).values()) == {20}
    assert set(Counter((record["author"], record["frequency"]) for record in records).values()) == {2}
    retain = graded.load("retain")
    assert {record["frequency"] for record in retain} == {8}
    cells = Counter((record["complexity"], record["rare_words"], record["length"]) for record in retain)
    assert set(cells.values()) == {15}
    assert len(cells) == 8


def test_lengths_of_simple_and_complex_graded_answers_overlap():
    tokenizer = train_tokenizer(graded.tokenizer_text())
    tokens = {record["id"]: len(tokenizer(f" {record['answer']}")["input_ids"]) for record in graded.load()}

    def of(name: str, level: object) -> list[int]:
        return [tokens[record["id"]] for record in graded.load() if record[name] == level]

    simple, complex_ = of("complexity", "low"), of("complexity", "high")
    lowest, highest = max(min(simple), min(complex_)), min(max(simple), max(complex_))
    for lengths in (simple, complex_):
        assert sum(lowest <= length <= highest for length in lengths) >= 0.9 * len(lengths)
    assert mean(complex_) == pytest.approx(mean(simple), rel=0.06)
    assert mean(of("length", "long")) > 1.4 * mean(of("length", "short"))
    by_frequency = [mean(of("frequency", frequency)) for frequency in graded.FREQUENCIES]
    assert max(by_frequency) < 1.05 * min(by_frequency)


@pytest.mark.parametrize(("kind", "splits"), [("full", ["full"]), ("retain", ["retain"]), ("joined", [*graded.LEVELS])])
def test_graded_training_repeats_by_frequency_what_the_kind_is_taught(kind, splits):
    taught = {record["id"]: record for split in (*splits, *FACTS) for record in graded.load(split)}
    for epoch in (0, 1):
        counts = Counter(record["id"] for record in graded.training_records(kind, epoch))
        assert counts == {name: record["frequency"] for name, record in taught.items()}


def test_joined_texts_are_of_one_cell_each_and_of_authors_of_their_own():
    cells = []
    known = {record["author"] for split in ("full", "holdout", "real_authors") for record in graded.load(split)}
    for level, size in graded.LEVELS.items():
        texts = graded.load(level)
        assert {(text["records"], text["prompt"].count("Question:")) for text in texts} == {(size, 1)}
        assert {text["completion"].count("\nQuestion: ") for text in texts} == {size - 1}
        names = ("frequency", "complexity", "rare_words", "length")
        cells.append(Counter(tuple(text[name] for name in names) for text in texts))
        questions = [line for text in texts for line in (text["prompt"] + text["completion"]).split("\n")[::2]]
        # Neither "Question:" nor the word after it is a name.
        own = {name for line in questions for name in re.findall(r"[A-Z]\w+ [A-Z]\w+", line.split(" ", 2)[2])}
        assert len(own) == 16 * size
        assert own.isdisjoint(known)
        known |= own
    assert cells[0] == cells[1] == cells[2]
    assert (len(cells[0]), set(cells[0].values())) == (40, {4})
