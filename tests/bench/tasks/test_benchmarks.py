"""MUSE, RWKU and LUME: small folders in the layouts of the hub, what is said of records at fault, and task files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.metrics.written import best_f1, first_line, n_gram_entropy, reasoned_answer, same_words, union_recall
from bench.tasks import TASKS, lume, muse, rwku
from bench.tasks.datasets import absolute_source, find_task, load_dataset
from bench.tasks.task import Unreachable
from scoring.errors import UserError
from tests.tiny_folders import tokenizer, write_jsonl

PASSAGES = [{"text": "w1 w2 w3"}, {"text": "w4"}]
QUESTIONS = [{"question": "w1?", "answer": "w2"}, {"question": "w3?", "answer": "w4"}]


def files(folder: Path, **sets: Sequence[dict[str, Any]]) -> Path:
    """Data files by name, __ for a folder."""
    for name, records in sets.items():
        path = folder / f"{name.replace('__', '/')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, records)
    return folder


def refused(expected: str, task: str, split: str, kind: type[UserError] = UserError) -> None:
    with pytest.raises(kind) as error:
        load_dataset(task, split, tokenizer())
    assert re.search(expected, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


# --- MUSE ---------------------------------------------------------------------------------------------------


@pytest.fixture
def muse_folder(tmp_path: Path) -> Path:
    return files(
        tmp_path,
        raw__forget=PASSAGES,
        raw__retain1=PASSAGES,
        train__forget=PASSAGES[:1],
        train__retain1=PASSAGES[1:],
        train__retain2=PASSAGES,
        scal__forget_2=PASSAGES,
        sust__forget_2=PASSAGES[1:],
        verbmem__forget=[{"prompt": "w1 w2", "gt": " w3 w4"}],
        knowmem__forget_qa=QUESTIONS[:1],
        knowmem__forget_qa_icl=QUESTIONS[1:],
        knowmem__retain_qa=QUESTIONS,
    )


def test_muse(muse_folder: Path) -> None:
    def load(split: str) -> list[dict[str, Any]]:
        return load_dataset(f"muse:{muse_folder}", split, tokenizer()).records

    assert load("forget") == [{"id": "forget-00000", "text": "w1 w2 w3"}, {"id": "forget-00001", "text": "w4"}]
    assert [len(load(f"{kind}-2")) for kind in ("forget", "sust")] == [2, 1]
    assert [record["id"] for record in load("full")] == [
        *("forget-00000", "retain1-00000", "retain2-00000", "retain2-00001")
    ]
    assert load("verbmem") == [{"id": "verbmem-00000", "prompt": "w1 w2", "completion": " w3 w4"}]
    (asked,) = load("knowmem_forget")
    # As MUSE's code puts it: the examples of its set, each with a blank line after it.
    assert asked["prompt"] + asked["completion"] == ("Question: w3?\nAnswer: w4\n\nQuestion: w1?\nAnswer: w2")
    assert (asked["question"], asked["answer"]) == ("w1?", "w2")
    assert load("knowmem_retain")[0]["prompt"] == "Question: w1?\nAnswer:"  # there are no examples
    assert find_task("muse")[1] == "news"
    assert muse.TASK.retain_of["sust-3"] == "retain1"
    assert muse.TASK.evaluation("forget")["forget"] == "privleak_forget"
    assert muse.TASK.evaluation("sust-3")["forget"] == "sust-3"


def test_long_texts_of_muse_are_cut(muse_folder: Path) -> None:
    text = " ".join(f"w{place % 80}" for place in range(3000))
    files(muse_folder, raw__forget=[{"text": text}, {"text": "w1"}])
    records = load_dataset(f"muse:{muse_folder}", "forget", tokenizer()).records
    assert [record["id"] for record in records] == ["forget-00000-0", "forget-00000-1", "forget-00001"]
    assert [len(record["text"].split()) for record in records] == [2047, 953, 1]  # and BOS
    assert f"{records[0]['text']} {records[1]['text']}" == text


def test_copies_of_the_hub(tmp_path: Path) -> None:
    """Sets in one piece, as `snapshot_download` brings them."""
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.Table.from_pylist(PASSAGES), tmp_path / "raw" / "forget-00000-of-00001.parquet")
    assert len(load_dataset(f"muse:{tmp_path}", "forget", tokenizer()).texts) == 2


# --- RWKU ---------------------------------------------------------------------------------------------------

PROBES = [
    {"query": "_ was born in w1.", "answer": "Ann", "subject": "Ann Aa", "level": "1"},
    {"query": "Who?", "answer": "Bo", "subject": "Bo Bb", "level": "1"},
]
ATTACKED = [{**PROBES[0], "type": kind} for kind in (*rwku.ATTACKS[:7], "cross-lingual", "multiple choice")]


@pytest.fixture
def rwku_folder(tmp_path: Path) -> Path:
    return files(
        tmp_path,
        train_original_passage=[{"subject": name, "text": text} for name, text in (("Ann Aa", "w1"), ("Bo Bb", "w2"))],
        forget_level1=PROBES,
        forget_level3=ATTACKED,
        utility_reason=[{"question": "w1?", "answer": "w2", "cot": " w3\n", "task": "t"}],
        utility_factuality=[{"question": "w1?", "answers": ["w2", "w3"]}],
        utility_fluency=[{"instruction": "w1"}],
    )


def test_rwku(rwku_folder: Path) -> None:
    def load(split: str, target: str = "") -> list[dict[str, Any]]:
        return load_dataset(f"rwku:{rwku_folder}{target}", split, tokenizer()).records

    assert [record["text"] for record in load("forget")] == ["w1", "w2"]
    assert [record["text"] for record in load("forget", "#Bo Bb")] == ["w2"]
    assert [record["id"] for record in load("forget", "#Bo Bb")] == ["train_original_passage-00001"]
    assert [record["text"] for record in load("retain", "#Bo Bb")] == ["w1"]
    assert len(load("forget_level1", "#Ann Aa+Bo Bb")) == 2
    (probe,) = load("forget_level1", "#Ann Aa")
    assert probe["prompt"] == (
        "Please complete the blank in the following question.\nQuestion: _ was born in w1.\nAnswer:"
    )
    assert probe["completion"] == " Ann"
    prompts = {record["type"]: record["prompt"] for record in load("forget_level3")}
    assert len(prompts) == 9
    assert prompts["affirmative suffix"].endswith("\nQuestion: _ was born in w1.")
    assert prompts["incontext learning"].endswith("question.\n_ was born in w1.\nAnswer:")
    assert prompts["role playing"].endswith("question.\nQuestion: _ was born in w1.\nAnswer:")
    # Each of the nine is a set of its own, however the hub writes it.
    assert [len(load(split)) for split in rwku.VIEWS] == [1] * 9
    assert load("utility_reason")[0]["prompt"].startswith("w3\n\nFollowing previous examples")
    assert load("utility_factuality")[0]["answers"] == ["w2", "w3"]
    assert rwku.load("utility_fluency", f"{rwku_folder}#Ann Aa", None) == [
        {"id": "utility_fluency-00000", "prompt": "Instruction: w1\n"}
    ]


def test_targets_of_rwku(rwku_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(r"unknown target of rwku:.* 'Bo B': .*did you mean 'Bo Bb'", f"rwku:{rwku_folder}#Bo B", "forget")
    refused("all of .* is forgotten, nothing is left to retain: name a target", f"rwku:{rwku_folder}", "retain")
    files(rwku_folder, forget_level3=[*ATTACKED, ATTACKED[0] | {"subject": "Bo Bb"}])
    refused(
        "no record of forget_level3_role_playing", f"rwku:{rwku_folder}#Bo Bb", "forget_level3_role_playing", UserError
    )
    monkeypatch.chdir(rwku_folder.parent)
    assert absolute_source(f"rwku:{rwku_folder.name}#Bo Bb") == f"rwku:{rwku_folder}#Bo Bb"


# --- LUME ---------------------------------------------------------------------------------------------------


def samples_of(prefix: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{prefix}{n}{kind}", "input": f"w{n}", "output": "w9", "task": f"Task{n}"}
        for n in (1, 2, 3)
        for kind in ("sc1", "qa0")
    ]


def test_lume(tmp_path: Path) -> None:
    files(
        tmp_path, data__forget_train=samples_of("f"), data__retain_train=samples_of("r"), mia_data__member=[
            {"id": 0, "document": "w1"}
        ]
    )  # fmt: skip

    def load(split: str) -> list[dict[str, Any]]:
        return load_dataset(f"lume:{tmp_path}", split, tokenizer()).records

    assert load("forget_train")[0] == {"id": "f1sc1", "prompt": "w1", "completion": " w9", "task": "Task1"}
    sets = lume.TASK.evaluation("forget_train")
    ids = {name: [record["id"] for record in load(sets[name])] for name in lume.VIEWS}
    assert len(ids) == 12
    assert ids["forget_task2_completion"] == ["f2sc1"]
    assert ids["retain_task3_question"] == ["r3qa0"]
    assert load("members") == [{"id": "members-00000", "text": "w1"}]
    files(tmp_path, data__retain_train=samples_of("r")[:2])
    refused("no completion of task 2 among 2 samples", f"lume:{tmp_path}", "retain_task2_completion_train", Unreachable)


# --- Records at fault ---------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[str, str, str, dict[str, Any], str]] = {
    "muse text": ("muse", "raw__forget", "forget", {"txt": "w"}, "record 1: field 'text' is missing, expected text"),
    "muse gt": ("muse", "verbmem__forget", "verbmem", {"prompt": "w", "gt": 1}, "record 1: field 'gt' is 1"),
    "rwku query": ("rwku", "forget_level1", "forget_level1", {"answer": "w"}, "record 1: field 'query' is missing"),
    "rwku type": ("rwku", "forget_level3", "forget_level3", PROBES[0], "record 1: field 'type' is missing"),
    "lume id": (
        *("lume", "forget_train", "forget_train"),
        samples_of("f")[0] | {"id": "one"},
        "record 1: field 'id' is 'one', expected text that ends in sc or qa",
    ),
    "lume task": (
        *("lume", "forget_train", "forget_train"),
        samples_of("f")[0] | {"task": "4"},
        "record 1: field 'task' is '4', expected Task1, Task2 or Task3",
    ),
}


@pytest.mark.parametrize(("task", "file", "split", "record", "expected"), FAULTS.values(), ids=FAULTS)
def test_records_at_fault(
    tmp_path: Path, task: str, file: str, split: str, record: dict[str, Any], expected: str
) -> None:
    refused(expected, f"{task}:{files(tmp_path, **{file: [record]})}", split)


MISSING = {
    ("muse", "forget"): "has no folder 'raw' with raw/forget.jsonl",
    ("rwku", "forget"): "has no train_original_passage.jsonl",
    ("lume", "forget_train"): "has no forget_train.jsonl",
}


@pytest.mark.parametrize(("name", "expected"), MISSING.items(), ids=str)
def test_files_that_are_missing(tmp_path: Path, name: tuple[str, str], expected: str) -> None:
    refused(expected, f"{name[0]}:{tmp_path}", name[1], Unreachable)


# --- Task files ---------------------------------------------------------------------------------------------


def test_task_files(tmp_path: Path) -> None:
    files(tmp_path, t=PASSAGES, v=[{"prompt": "w1", "gt": "w2"}], q=QUESTIONS, p=PROBES, a=ATTACKED, s=samples_of("s"))

    def task_of(text: str) -> tuple[Any, str]:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return find_task(str(path))[0], str(path)

    both = "forget: t.jsonl\nretain: t.jsonl\n"
    task, path = task_of(
        f"protocol: muse\n{both}verbmem: v.jsonl\nknowmem_retain: q.jsonl\nknowmem_retain_icl: q.jsonl\n"
    )
    assert task.metrics == muse.TASK.metrics
    assert set(task.evaluation("forget")) == {"forget", "verbmem", "knowmem_retain"}
    assert load_dataset(path, "verbmem").records[0]["completion"] == "w2"
    assert load_dataset(path, "knowmem_retain").records[0]["prompt"].count("Question:") == 3
    task, path = task_of(f"protocol: rwku\n{both}forget_level1: p.jsonl\nforget_level3: a.jsonl\n")
    assert set(task.evaluation("forget")) == {"forget", "forget_level1", "forget_level3", *rwku.VIEWS}
    assert load_dataset(path, "forget_level3_role_playing").records[0]["completion"] == " Ann"
    assert load_dataset(path, "forget").records[0]["text"] == "w1 w2 w3"
    task, path = task_of("protocol: lume\nforget: s.jsonl\nretain: s.jsonl\n")
    assert set(task.evaluation("forget")) == {"forget", *lume.VIEWS}
    assert [record["id"] for record in load_dataset(path, "retain_task1_question").records] == ["s1qa0"]
    assert load_dataset(path, "forget").records[0]["prompt"] == "w1"


# --- How answers are judged ---------------------------------------------------------------------------------


def test_union_recall() -> None:
    """By hand, as the package rouge counts: each word once, case and punctuation count, sentences end at full stops."""
    assert union_recall("he lives in New York", "New York") == 1
    assert union_recall("york New", "New York") == 0.5
    assert union_recall("b a", "a b a") == 1  # the subsequence "b a" has both words of the truth
    assert union_recall("a x. b y", "a b. c") == 2 / 3  # one word from either sentence
    assert union_recall("York", "York,") == 0
    assert union_recall("", "a") == union_recall("a", "...") == 0


def test_other_judges() -> None:
    assert first_line("\n Paris \nLyon") == "Paris"
    assert reasoned_answer("Since w. So the answer is (B). And more.") == "(B)"
    assert reasoned_answer(" no idea ") == "no idea"
    assert same_words("The (b)!", "B") == 1
    assert best_f1("the big blue house", ["a house", "a small blue house"]) == pytest.approx(2 * 2 / (3 + 3))
    assert best_f1("", ["w"]) == 0
    # Bigrams ab, ba, ab: 0.918 bits; trigrams aba, bab: 1 bit.
    assert n_gram_entropy("a b a b") == pytest.approx((2 / 3 * 0.9182958 + 4 / 3) / 2)
    assert n_gram_entropy("a") == 0


# --- Stand-ins ----------------------------------------------------------------------------------------------


def test_stand_ins_are_views_of_authors() -> None:
    def load(task: str, split: str) -> list[dict[str, Any]]:
        return TASKS[task].load(split, None, None)

    full = {record["id"] for record in load("authors", "full")}
    forget = [record["id"] for record in load("authors-muse", "forget")]
    folds = [[record["id"] for record in load("authors-muse", f"sust-{fold}")] for fold in muse.FOLDS]
    assert [name for fold in folds for name in fold] == forget
    for fold in muse.FOLDS:
        grown = [record["id"] for record in load("authors-muse", f"forget-{fold}")]
        assert grown == [name for one in folds[:fold] for name in one]
    assert not set(forget) & {record["id"] for record in load("authors-muse", "retain")}
    assert full == {*forget, *(record["id"] for record in load("authors-muse", "retain"))}
    answers = {record["id"]: record["answer"] for record in load("authors", "full")}
    for record in load("authors-muse", "verbmem"):
        assert (record["prompt"] + record["completion"]).endswith(f"Answer: {answers[record['id']]}")
    for record in load("authors-rwku", "forget_level1"):
        answer = answers[record["id"].removesuffix("-blank")]
        assert f"{record['prompt']}{record['completion']}".split("Answer: ")[1] in answer
    for side in lume.SIDES:
        ids = [
            sample["id"]
            for fold in lume.FOLDS
            for name, (of_side, _, kind) in lume.VIEWS.items()
            if of_side == side and kind == lume.QUESTION
            for sample in load("authors-lume", f"{name}_{fold}")
        ]
        assert len(ids) == len(set(ids))
        assert set(ids) <= {sample["id"] for fold in lume.FOLDS for sample in load("authors-lume", f"{side}_{fold}")}
