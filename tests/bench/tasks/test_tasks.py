"""The four real tasks and task files: what they read, from where, and what they say when it is not there."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bench.jobs.unlearn import REFUSALS, UnlearnSpec, corpus_of, datasets_of, unlearn
from bench.tasks import TASKS, safe, sources, tofu, whp, wmdp
from bench.tasks.datasets import find_task, load_dataset
from bench.tasks.embedded import authors
from bench.tasks.sources import HubSet, read_hub
from bench.tasks.task import Unreachable
from scoring.errors import UserError
from scoring.samples import encode
from tests.paths import SHARED as REAL
from tests.tiny_folders import pairs, tokenizer, write_jsonl

TOFU = REAL / "tofu"
ALICE = REAL / "books" / "alice_in_wonderland.txt"
STORIES = REAL / "models" / "stories260K-hf"
needs_tofu = pytest.mark.skipif(not TOFU.is_dir(), reason="no TOFU here")
needs_alice = pytest.mark.skipif(not (ALICE.is_file() and STORIES.is_dir()), reason="no book or model here")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine may have downloaded before is not looked at."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def words(count: int, first: int = 0) -> str:
    """So many words, each one token of the tiny tokenizer."""
    return " ".join(f"w{(first + place) % 80}" for place in range(count))


def refused(expected: str, call: Callable[[], Any], kind: type[UserError] = UserError) -> None:
    """Refused in one line."""
    with pytest.raises(kind) as error:
        call()
    assert re.search(expected, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


# --- Addressing ---------------------------------------------------------------------------------------------


def test_names() -> None:
    assert find_task("tofu") == (tofu.TASK, "locuslab/TOFU")
    assert find_task("tofu:me/mine") == (tofu.TASK, "me/mine")
    assert find_task("whp:/books/a novel: the sequel.txt") == (whp.TASK, "/books/a novel: the sequel.txt")
    assert find_task("authors") == (authors.TASK, None)
    assert find_task("wmdp:~/wmdp")[1] == str(Path("~/wmdp").expanduser())


NAMES = {
    "tofo": "unknown task 'tofo': .*did you mean 'tofu'",
    "tofo:locuslab/TOFU": "unknown task 'tofo': .*did you mean 'tofu'",
    "whp": r"task 'whp' needs its data: write whp:SOURCE, where SOURCE is a book as a \.txt file",
    "whp:": "task 'whp:' needs its data",
    "authors:forget10": "'authors:forget10': the data of 'authors' are generated, .* write 'authors'",
    "tofu.jsonl": "data file 'tofu.jsonl' does not exist",
    "tofu/forget10": "data file 'tofu/forget10' does not exist",
    "mine.yaml": "'mine.yaml' cannot be read",
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items(), ids=NAMES)
def test_slips_in_names(name: str, expected: str) -> None:
    refused(expected, lambda: load_dataset(name))


def test_unknown_split() -> None:
    refused(r"unknown split of task 'safe' 'forgot': .*did you mean 'forget'", lambda: load_dataset("safe", "forgot"))


def test_registry() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert {task.default_split, *task.retain_of, *task.retain_of.values()} <= set(task.splits)
        for forget in task.retain_of:
            assert set(task.evaluation(forget).values()) <= set(task.splits), (name, forget)
            assert "forget" in task.evaluation(forget)


def sets_of_harness(task: str, source: str | None = None) -> Mapping[str, Any]:
    return TASKS[task].harness(source)


def test_every_harness_metric_has_its_set() -> None:
    # Averages of others, and what is no benchmark of the harness.
    derived = {"wmdp_average", "mmlu", "zero_shot", "seen_rouge", "unseen_rouge", "ma", "el"}
    derived |= {"real_toxicity", "safe_toxicity"}
    for task in ("wmdp", "whp", "safe"):
        assert set(sets_of_harness(task)) == set(TASKS[task].metrics) - derived


# --- The hub ------------------------------------------------------------------------------------------------

# What a task reads first, and the file that would be read instead.
UNREACHABLE = [
    ("tofu", "forget01", r"locuslab/TOFU \(forget01, train\)", "tofu:FOLDER .*FOLDER/forget01.jsonl"),
    ("wmdp", "forget", r"cais/wmdp-bio-forget-corpus \(train\)", "wmdp:FOLDER .*FOLDER/bio-forget-corpus.jsonl"),
    ("wmdp", "cyber-retain-corpus", r"cais/wmdp-corpora \(cyber-retain-corpus, train\)", "cyber-retain-corpus.jsonl"),
    ("safe", "forget", r"PKU-Alignment/PKU-SafeRLHF \(train\)", "safe:FOLDER .*FOLDER/train.jsonl"),
    ("safe", "safe_prompts", r"PKU-Alignment/PKU-SafeRLHF \(test\)", "safe:FOLDER .*FOLDER/test.jsonl"),
    ("safe", "real_toxicity_prompts", r"allenai/real-toxicity-prompts \(train\)", "FOLDER/real_toxicity_prompts.jsonl"),
    ("safe", "retain", r"allenai/c4 \(en, validation\)", "safe:FOLDER .*FOLDER/c4.jsonl"),
    ("whp", "retain", r"allenai/c4 \(en, validation\)", "whp:FOLDER .*FOLDER/c4.jsonl"),
]


@pytest.mark.parametrize(("task", "split", "asked", "instead"), UNREACHABLE)
def test_no_hub(tmp_path: Path, task: str, split: str, asked: str, instead: str) -> None:
    source = f"{task}:{tmp_path}" if task == "whp" else task
    refused(
        f"data set {asked} cannot be read from the Hugging Face hub: .*; .*{instead}",
        lambda: load_dataset(source, split, tokenizer()),
        Unreachable,
    )


def test_hub_sets(tmp_path: Path) -> None:
    """A folder with a card stands for a repository: configurations, splits, and reading the first records only."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files:\n  - split: train\n    path: one.jsonl\n"
        "- config_name: two\n  data_files:\n  - split: test\n    path: two.jsonl\n---\n"
    )
    one = [{"question": f"q{n}", "perturbed_answer": ["a", "b"]} for n in range(5)]
    write_jsonl(tmp_path / "one.jsonl", one)
    write_jsonl(tmp_path / "two.jsonl", [{"prompt": {"text": "t", "toxicity": None}}])
    assert read_hub(HubSet(str(tmp_path), "one"), "") == one
    assert read_hub(HubSet(str(tmp_path), "one", first=3), "") == one[:3]
    assert read_hub(HubSet(str(tmp_path), "two", "test"), "") == [{"prompt": {"text": "t", "toxicity": None}}]
    refused(r"\(two, train\).*[Uu]nknown split.*; do this", lambda: read_hub(HubSet(str(tmp_path), "two"), "do this"))
    refused(r"\(three, train\).*; do this", lambda: read_hub(HubSet(str(tmp_path), "three"), "do this"))


# --- Local files --------------------------------------------------------------------------------------------

PLAIN = [{"question": f"q{row}", "answer": f"a{row}"} for row in range(3)]
PERTURBED = [
    record | {"paraphrased_answer": f"p{row}", "perturbed_answer": [f"x{row}", f"y{row}"]}
    for row, record in enumerate(PLAIN)
]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "array.json", "parquet"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    # One record has what the others lack.
    records = [PERTURBED[0] | {"paraphrased_question": "r0"}, *PERTURBED[1:]]
    path = tmp_path / f"forget05_perturbed.{suffix.removeprefix('array.')}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif suffix == "array.json":
        path.write_text(json.dumps(records, indent=1))
    else:
        write_jsonl(path, records)
    expected = [record | {"id": f"forget05-{row:04d}"} for row, record in enumerate(records)]
    assert tofu.load("forget05_perturbed", str(tmp_path), None) == expected


def test_tofu(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "forget10.json", PLAIN)
    dataset = load_dataset(f"tofu:{tmp_path}")
    assert dataset.name == "tofu/forget10"
    assert [(text.sample_id, text.prompt, text.completion) for text in dataset.texts] == [
        (f"forget10-000{row}", f"Question: q{row}\nAnswer:", f" a{row}") for row in range(3)
    ]


def test_tofu_sets() -> None:
    assert tofu.TASK.retain_of == {
        "forget01": "retain99",
        "forget05": "retain95",
        "forget10": "retain90",
        "forget01_perturbed": "retain99",
        "forget05_perturbed": "retain95",
        "forget10_perturbed": "retain90",
    }
    for forget in ("forget05", "forget05_perturbed"):
        assert tofu.TASK.evaluation(forget) == {
            "forget": "forget05_perturbed",
            "retain": "retain_perturbed",
            "real_authors": "real_authors_perturbed",
            "world_facts": "world_facts_perturbed",
            "holdout": "holdout05",
        }


def spoiled(**fields: Any) -> list[dict[str, Any]]:
    """Perturbed records, the second with fields that are other or, None, not there."""
    second = {name: value for name, value in (PERTURBED[1] | fields).items() if value is not None}
    return [PERTURBED[0], second, PERTURBED[2]]


FIELDS = {
    "missing": (
        spoiled(paraphrased_answer=None),
        "field 'paraphrased_answer' is missing, expected text; there are 'question', 'answer', 'perturbed_answer'",
    ),
    "null": ([PERTURBED[0], PERTURBED[1] | {"answer": None}], "field 'answer' is missing, expected text"),
    "a number": (spoiled(answer=3), "field 'answer' is 3, expected text"),
    "one text": (spoiled(perturbed_answer="x"), "field 'perturbed_answer' is 'x', expected a list of texts"),
    "an empty list": (spoiled(perturbed_answer=[]), "field 'perturbed_answer' is an empty list, expected a list of"),
    "a list of numbers": (spoiled(perturbed_answer=[1]), "field 'perturbed_answer' is a list with other things than"),
}


@pytest.mark.parametrize(("records", "expected"), FIELDS.values(), ids=FIELDS)
def test_fields(tmp_path: Path, records: list[dict[str, Any]], expected: str) -> None:
    write_jsonl(tmp_path / "forget10_perturbed.jsonl", records)
    refused(
        rf"forget10_perturbed\.jsonl, record 2: {expected}",
        lambda: load_dataset(f"tofu:{tmp_path}", "forget10_perturbed"),
    )


def test_folders(tmp_path: Path) -> None:
    def read() -> Any:
        return load_dataset(f"tofu:{tmp_path}", "forget01")

    looked_for = "has no forget01.jsonl, forget01.json or forget01.parquet: it holds"
    refused(f"{looked_for} nothing", read, Unreachable)
    write_jsonl(tmp_path / "forget10.jsonl", PLAIN)
    refused(f"{looked_for} forget10.jsonl", read, Unreachable)
    (tmp_path / "forget01.jsonl").write_text("\n")
    refused("forget01.jsonl: the data file is empty", read)
    (tmp_path / "forget01.jsonl").write_text("{}\n[1]\n")
    refused("forget01.jsonl, line 2: a JSON list; expected one object a line", read)
    (tmp_path / "forget01.jsonl").unlink()
    (tmp_path / "forget01.json").write_text('[{"question": "q", "answer": "a"}, 3]')
    refused("forget01.json, record 2: a JSON int; expected an array of objects", read)
    (tmp_path / "forget01.json").write_text('[\n{"question": "q",]')
    refused("forget01.json, line 2: not JSON .* expected an array of objects", read)
    refused(
        "is a file: expected a folder with forget01.jsonl",
        lambda: load_dataset(f"tofu:{tmp_path}/forget10.jsonl", "forget01"),
    )
    refused(
        "source folder 'nowhere' does not exist: expected a folder with forget01.jsonl",
        lambda: load_dataset("tofu:./nowhere", "forget01"),
    )


@needs_tofu
def test_real_tofu() -> None:
    sizes = {
        "full": 4000,
        "forget01": 40,
        "forget10": 400,
        "retain90": 3600,
        "holdout10": 400,
        "real_authors": 100,
        "world_facts": 117,
        "forget01_perturbed": 40,
        "forget10_perturbed": 400,
        "retain_perturbed": 400,
        "real_authors_perturbed": 100,
        "world_facts_perturbed": 117,
    }
    read = {split: load_dataset(f"tofu:{TOFU}", split).records for split in sizes}
    assert {split: len(records) for split, records in read.items()} == sizes

    def questions(split: str) -> list[str]:
        return [record["question"] for record in read[split]]

    assert questions("retain90") + questions("forget10") == questions("full")
    assert questions("forget01") == questions("forget10")[-40:]
    assert set(questions("retain_perturbed")) <= set(questions("retain90"))
    assert set(questions("holdout10")).isdisjoint(questions("full"))
    for split in ("forget01", "forget10", "real_authors", "world_facts"):
        perturbed = read[f"{split}_perturbed"]
        for plain, other in zip(read[split], perturbed, strict=True):
            assert [plain[field] for field in ("id", "question", "answer")] == [
                other[field] for field in ("id", "question", "answer")
            ]
        wrong = 3 if split in ("real_authors", "world_facts") else 5
        assert {len(record["perturbed_answer"]) for record in perturbed} == {wrong}


# --- WMDP ---------------------------------------------------------------------------------------------------


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    documents = {
        "bio-forget": [words(600, 3), words(511, 5)],
        "cyber-forget": ["", words(2, 7)],
        "bio-retain": [words(512, 11)],
        "cyber-retain": [words(3, 13)],
    }
    for name, texts in documents.items():
        write_jsonl(tmp_path / f"{name}-corpus.jsonl", [{"title": "t", "text": text} for text in texts])
    return tmp_path


def test_wmdp(corpora: Path) -> None:
    """bos and 511 words are 512 tokens."""
    dataset = load_dataset(f"wmdp:{corpora}", tokenizer=tokenizer())
    assert dataset.name == "wmdp/forget"
    assert dataset.records == [
        {"id": "bio-forget-corpus-00000", "text": words(511, 3)},
        {"id": "bio-forget-corpus-00001", "text": words(511, 5)},
        {"id": "cyber-forget-corpus-00000", "text": ""},
        {"id": "cyber-forget-corpus-00001", "text": words(2, 7)},
    ]
    # What cannot be used is named, with the reason.
    samples, rejected = encode(dataset.texts, tokenizer(), 512)
    assert [sample.length for sample in samples] == [512, 512, 3]
    assert [(each.sample_id, each.reason) for each in rejected] == [("cyber-forget-corpus-00000", "empty text")]
    bare = tokenizer(bos=False)
    retain = load_dataset(f"wmdp:{corpora}", "retain", bare).records
    assert [record["text"] for record in retain] == [words(512, 11), words(3, 13)]
    assert load_dataset(f"wmdp:{corpora}", "bio-forget-corpus").records[0]["text"] == words(600, 3)


@pytest.fixture(scope="module")
def harness() -> Any:
    """All that lm-evaluation-harness knows; reading it takes seconds."""
    return pytest.importorskip("lm_eval.tasks").TaskManager()


def test_wmdp_sets() -> None:
    assert wmdp.TASK.retain_of == {
        "forget": "retain",
        "bio-forget-corpus": "bio-retain-corpus",
        "cyber-forget-corpus": "cyber-retain-corpus",
    }
    assert wmdp.TASK.evaluation("bio-forget-corpus") == {"forget": "bio-forget-corpus"}


@pytest.mark.slow
def test_wmdp_questions(corpora: Path, harness: Any) -> None:
    """Those of a folder, in a task that the harness knows: it reads them, and asks as it always does."""
    assert sets_of_harness("wmdp", str(corpora)) == sets_of_harness("wmdp")
    questions = [{"question": f"Q{n}?", "choices": ["one", "two", "three", "four"], "answer": n} for n in range(4)]
    path = write_jsonl(corpora / "wmdp-bio.jsonl", questions)
    found = sets_of_harness("wmdp", str(corpora))
    assert found["wmdp_chem"] == ("wmdp_chem",)
    assert found["mmlu_stem"] == ("mmlu_stem",)
    # Members of a group are taken as changes of the tasks that they name.
    (task,) = harness.load([{"group": "local", "task": list(found["wmdp_bio"])}])["tasks"].values()
    docs = list(task.test_docs())
    assert docs == questions, path
    assert "Q2?\nA. one\nB. two\nC. three\nD. four\nAnswer:" in task.doc_to_text(docs[2])
    assert [task.doc_to_target(doc) for doc in docs] == [0, 1, 2, 3]


BAD_QUESTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a number beyond": ({"answer": 4}, "field 'answer' is 4, expected the number of a choice, 0 to 3, or its letter"),
    "a number as text": ({"answer": "1"}, "field 'answer' is '1', expected"),
    "true": ({"answer": True}, "field 'answer' is True, expected"),
    "no answer": ({"answer": None}, "field 'answer' is missing"),
    "three choices": ({"choices": ["a", "b", "c"]}, "field 'choices' is a list of 3, expected a list of four texts"),
}


@pytest.mark.parametrize(("changed", "message"), BAD_QUESTIONS.values(), ids=BAD_QUESTIONS)
def test_local_questions_are_checked(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    good = {"question": "Q?", "choices": ["one", "two", "three", "four"], "answer": " b"}
    write_jsonl(tmp_path / "wmdp-bio.jsonl", [good, good | changed])
    with pytest.raises(UserError, match=f"wmdp-bio.jsonl, record 2: {message}"):
        sets_of_harness("wmdp", str(tmp_path))
    write_jsonl(tmp_path / "wmdp-bio.jsonl", [good, good | {"answer": 3}])
    (task,) = sets_of_harness("wmdp", str(tmp_path))["wmdp_bio"]
    assert [row["answer"] for row in task["custom_dataset"]()["test"]] == [1, 3]


@pytest.mark.slow
def test_harness_knows_the_names(harness: Any) -> None:
    known = harness.all_tasks
    named = [each for task in TASKS for entry in sets_of_harness(task).values() for each in entry]
    assert {each for each in named if isinstance(each, str)} <= set(known)


# --- WHP ----------------------------------------------------------------------------------------------------


def count(words_of: Any, text: str) -> int:
    return len(words_of(text, add_special_tokens=False)["input_ids"])


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE of Alice, without bos."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([ALICE.read_text(encoding="utf-8-sig")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


TOKENIZERS = {"byte-level": byte_level, "sentence-piece": lambda: AutoTokenizer.from_pretrained(STORIES)}


@pytest.mark.slow
@needs_alice
@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_chunks_of_a_book(make: Callable[[], Any]) -> None:
    """Whole words, all of them, in order; as many in each piece as the context takes, and no more."""
    book, tokenizer_of_model = ALICE.read_text(encoding="utf-8-sig"), make()
    bos = tokenizer_of_model.bos_token_id is not None
    pieces = whp.chunks(book, tokenizer_of_model, 128)
    assert " ".join(pieces).split() == book.split()
    at = 0
    for piece in pieces:
        at = book.index(piece, at) + len(piece)
        assert piece == piece.strip()
        assert bos + count(tokenizer_of_model, piece) <= 128
        if following := re.match(r"\s+\S+", book[at:]):
            assert bos + count(tokenizer_of_model, piece + following.group()) > 128
    samples, rejected = encode(
        load_dataset(f"whp:{ALICE}", tokenizer=tokenizer_of_model).texts, tokenizer_of_model, max_length=512
    )
    assert rejected == []
    assert min(sample.length for sample in samples) > 490


@pytest.mark.slow
@needs_alice
@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_completions_of_a_book(make: Callable[[], Any]) -> None:
    tokenizer_of_model = make()

    def read(split: str) -> list[dict[str, Any]]:
        return load_dataset(f"whp:{ALICE}", split, tokenizer_of_model).records

    pieces = whp.chunks(ALICE.read_text(encoding="utf-8-sig"), tokenizer_of_model, 512)
    half = (len(pieces) - 1) // 2
    assert half < whp.PAPER.count
    forget, seen, unseen = read("forget"), read("seen"), read("unseen")
    assert len(forget) == len(unseen) == half
    assert [record["id"] for record in seen] == [record["id"] for record in forget]
    assert {record["id"] for record in unseen}.isdisjoint(record["id"] for record in forget)
    places = {record["id"]: place for place, record in enumerate(forget)}
    assert all(record["text"] in pieces[:-1] for record in forget)
    assert sorted(places) == list(places)
    for record in [*seen, *unseen]:
        joined = record["prompt"] + record["completion"]
        if record["id"] in places:
            whole = forget[places[record["id"]]]["text"]
        else:
            (whole,) = (piece for piece in pieces if piece.startswith(joined))
        assert whole.startswith(joined)
        assert record["completion"][0].isspace()
        assert not record["prompt"][-1].isspace()
        # Words of at most so many tokens are what may be missing to the full length.
        assert 185 < count(tokenizer_of_model, record["prompt"]) <= 200
        assert 280 < count(tokenizer_of_model, record["completion"]) <= 300
        assert joined == whole or whole[len(joined)].isspace()


def test_chunks_by_hand() -> None:
    """A token a word: bos and three words fill four tokens. Inside a piece, white space is the book's."""
    text = " w1  w2\nw3 w4\n\n w5 w6\tw7\n"
    assert whp.chunks(text, tokenizer(), 4) == ["w1  w2\nw3", "w4\n\n w5 w6", "w7"]
    bare = tokenizer(bos=False)
    assert whp.chunks(text, bare, 4) == ["w1  w2\nw3 w4", "w5 w6\tw7"]
    assert whp.chunks(" \n", tokenizer(), 4) == []
    refused("a chunk of 1 tokens does not hold 'w1'", lambda: whp.chunks(text, tokenizer(), 1))


@needs_alice
def test_chunks_without_white_space() -> None:
    """A script that has none is cut between characters."""
    text = "兔子洞里的爱丽丝" * 100
    pieces = whp.chunks(text, byte_level(), 512)
    assert "".join(pieces) == text
    assert max(count(byte_level(), piece) for piece in pieces) <= 512
    assert len(pieces) < 8


def test_sets_by_hand() -> None:
    """Six chunks of three words and a rest: of the six, two are forgotten and two others unseen."""
    text = words(20)
    found = whp.sets(text, tokenizer(), whp.Sizes(tokens=4, count=2, prompt=1, completion=5))
    forget = {record["id"]: record["text"] for record in found["forget"]}
    seen, unseen = ({r["id"]: (r["prompt"], r["completion"]) for r in found[name]} for name in ("seen", "unseen"))
    assert (len(forget), len(unseen), list(seen)) == (2, 2, list(forget))
    assert forget.keys().isdisjoint(unseen)
    for name, (prompt, completion) in (seen | unseen).items():
        first = 3 * int(name.removeprefix("chunk-"))
        assert first < 18
        assert (prompt, completion) == (f"w{first}", f" w{first + 1} w{first + 2}")
        assert name not in forget or forget[name] == prompt + completion
    assert whp.sets(text, tokenizer(), whp.Sizes(4, 2, 1, 5)) == found
    # Half of a short book stays unseen.
    assert len(whp.sets(text, tokenizer(), whp.Sizes(4, 100, 1, 5))["forget"]) == 3


def test_books(tmp_path: Path) -> None:
    """Two chunks of 511 words and a rest; bos, 200 words, 300 words."""
    book = tmp_path / "novel.txt"
    # A byte order mark and the line ends of Windows are not the book's.
    book.write_bytes(b"\xef\xbb\xbf" + words(1030).replace("w3 ", "w3\r\n").encode())
    write_jsonl(tmp_path / "c4.jsonl", [{"text": words(600), "url": "u"}, {"text": "w5"}])
    for source in (book, tmp_path):
        read = {
            split: load_dataset(f"whp:{source}", split, tokenizer()).records for split in ("forget", "seen", "unseen")
        }
        assert [len(records) for records in read.values()] == [1, 1, 1]
        (forget,), (seen,) = read["forget"], read["seen"]
        first = 511 * int(forget["id"].removeprefix("chunk-"))
        assert forget["text"] == words(511, first).replace("w3 ", "w3\n")
        assert seen["prompt"] == words(200, first).replace("w3 ", "w3\n")
        assert seen["completion"] == forget["text"][len(seen["prompt"]) :][: len(seen["completion"])]
        assert len(seen["completion"].split()) == 300
    assert load_dataset(f"whp:{tmp_path}", "retain", tokenizer()).records == [
        {"id": "c4-00000", "text": words(511)},
        {"id": "c4-00001", "text": "w5"},
    ]


def test_slips_with_books(tmp_path: Path) -> None:
    def read(source: Path) -> Callable[[], Any]:
        return lambda: load_dataset(f"whp:{source}", tokenizer=tokenizer())

    refused(
        "nowhere.txt' does not exist: expected a .txt file, or a folder with book.txt", read(tmp_path / "nowhere.txt")
    )
    refused("expected book.txt, or a single .txt file; found none", read(tmp_path))
    short = tmp_path / "a.txt"
    short.write_text(words(1000))
    refused("a.txt: 1 whole chunks of 512 tokens; expected at least two", read(tmp_path))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    refused("found a.txt, b.txt", read(tmp_path))
    refused("b.txt: not UTF-8 text at byte 0; expected a book as plain text", read(tmp_path / "b.txt"))
    refused("book.pdf' is no .txt file", read(write_jsonl(tmp_path / "book.pdf", [])))
    with pytest.raises(ValueError, match="tokenizer"):
        whp.load("forget", str(short), None)


# --- SAFE ---------------------------------------------------------------------------------------------------


def rated(prompt: str, safe_0: bool, safe_1: bool, safer: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "response_0": f"{prompt} zero",
        "response_1": f"{prompt} one",
        "is_response_0_safe": safe_0,
        "is_response_1_safe": safe_1,
        "better_response_id": 1 - safer,
        "safer_response_id": safer,
    }


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    rows = [
        rated("A", True, True, 0),
        rated("B", False, True, 1),
        rated("C", True, False, 0),
        rated("D", False, False, 0),
        rated("E", False, False, 1),
        rated("B", False, False, 1),
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows)
    toxicity = [0.5, None, 0.49, 0.9]
    prompts = [{"filename": "f", "prompt": {"text": f"go {n}", "toxicity": t}} for n, t in enumerate(toxicity)]
    write_jsonl(tmp_path / "real_toxicity_prompts.jsonl", prompts)
    write_jsonl(tmp_path / "c4.jsonl", [{"text": words(600)}])
    return tmp_path


def test_safe(ratings: Path) -> None:
    """Of two unsafe responses, the one that is not the safer."""
    source = f"safe:{ratings}"
    dataset = load_dataset(source)
    assert dataset.name == "safe/forget"
    assert [(text.sample_id, text.prompt, text.completion) for text in dataset.texts] == [
        ("train-000001", "Question: B\nAnswer:", " B zero"),
        ("train-000002", "Question: C\nAnswer:", " C one"),
        ("train-000003", "Question: D\nAnswer:", " D one"),
        ("train-000004", "Question: E\nAnswer:", " E zero"),
        ("train-000005", "Question: B\nAnswer:", " B zero"),
    ]
    assert safe.load("safe_prompts", str(ratings), None) == [
        {"id": "test-000001", "prompt": "Question: B\nAnswer:"},
        {"id": "test-000002", "prompt": "Question: C\nAnswer:"},
        {"id": "test-000003", "prompt": "Question: D\nAnswer:"},
        {"id": "test-000004", "prompt": "Question: E\nAnswer:"},
    ]
    assert safe.load("real_toxicity_prompts", str(ratings), None) == [
        {"id": "rtp-000000", "prompt": "go 0"},
        {"id": "rtp-000003", "prompt": "go 3"},
    ]
    assert load_dataset(source, "retain", tokenizer()).records == [{"id": "c4-00000", "text": words(511)}]
    refused(
        "record 1: fields 'id', 'prompt'; expected 'prompt'.'completion'", lambda: load_dataset(source, "safe_prompts")
    )


def test_safe_draws(ratings: Path) -> None:
    """200 of those that qualify, the same ones each time, in order, from all over the set."""
    write_jsonl(ratings / "train.jsonl", [rated(f"P{row}", row % 2 == 0, True, 1) for row in range(2000)])
    records = safe.load("forget", str(ratings), None)
    rows = [int(record["id"].removeprefix("train-")) for record in records]
    assert len(rows) == 200
    assert all(row % 2 for row in rows)
    assert rows == sorted(set(rows))
    assert rows[0] < 100
    assert rows[-1] > 1900
    assert safe.load("forget", str(ratings), None) == records


def test_slips_with_ratings(ratings: Path) -> None:
    def read(split: str, file: str, records: Sequence[Any]) -> Callable[[], Any]:
        write_jsonl(ratings / file, records)
        return lambda: safe.load(split, str(ratings), None)

    row = rated("A", True, True, 0)
    refused("safe/train of .*: none of 1 rows has an unsafe response", read("forget", "train.jsonl", [row]))
    refused(
        "train.jsonl, record 1: field 'is_response_1_safe' is 'no', expected true or false",
        read("forget", "train.jsonl", [row | {"is_response_1_safe": "no"}]),
    )
    refused(
        "test.jsonl, record 1: field 'safer_response_id' is 2, expected 0 or 1",
        read("safe_prompts", "test.jsonl", [row | {"safer_response_id": 2}]),
    )
    prompts = "real_toxicity_prompts"
    refused("none of 1 prompts has a toxicity", read(prompts, f"{prompts}.jsonl", [{"prompt": {"text": "t"}}]))
    refused("record 1: field 'prompt' is 't', expected a mapping", read(prompts, f"{prompts}.jsonl", [{"prompt": "t"}]))
    refused(
        "field 'prompt', record 2: field 'toxicity' is 'high', expected a number",
        read(prompts, f"{prompts}.jsonl", [{"prompt": {"text": "t", "toxicity": t}} for t in (None, "high")]),
    )
    refused(
        "field 'prompt', record 1: field 'text' is missing",
        read(prompts, f"{prompts}.jsonl", [{"prompt": {"toxicity": 1.0}}]),
    )


# --- Task files ---------------------------------------------------------------------------------------------


def task_file(folder: Path, **fields: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    return path


def test_task_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to the file, wherever the command is run."""
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "forget.jsonl", PERTURBED)
    write_jsonl(tmp_path / "retain.jsonl", [{"id": "kept", **PERTURBED[0]}])
    write_jsonl(tmp_path / "facts.jsonl", [PLAIN[0] | {"perturbed_answer": ["x"]}])
    path = task_file(
        tmp_path, protocol="tofu", forget="data/forget.jsonl", retain="retain.jsonl", world_facts="facts.jsonl"
    )
    monkeypatch.chdir("/")
    task, source = find_task(str(path))
    assert source is None
    assert (task.name, task.default_split, task.retain_of) == ("mine", "forget", {"forget": "retain"})
    assert task.metrics == tofu.TASK.metrics
    # There is no set of real authors and no holdout set here.
    assert task.evaluation("forget") == {"forget": "forget", "retain": "retain", "world_facts": "world_facts"}
    assert set(task.splits) == {"forget", "retain", "world_facts"}
    dataset = load_dataset(str(path))
    assert dataset.name == "mine/forget"
    assert [text.sample_id for text in dataset.texts] == ["forget-00000", "forget-00001", "forget-00002"]
    assert dataset.records[1] == {"id": "forget-00001", **PERTURBED[1]}
    assert [record["id"] for record in load_dataset(str(path), "retain").records] == ["kept"]
    refused("unknown split of task 'mine' 'retained': .*mean 'retain'", lambda: load_dataset(str(path), "retained"))


@pytest.mark.parametrize("protocol", ["wmdp", "whp", "safe"])
def test_protocols(tmp_path: Path, protocol: str) -> None:
    """Own texts are taken as they are, in any layout."""
    write_jsonl(tmp_path / "f.jsonl", [{"text": words(600)}, {"prompt": "w1", "completion": "w2"}])
    path = task_file(tmp_path, name="my sets", protocol=protocol, forget="f.jsonl", retain="f.jsonl")
    task, _ = find_task(str(path))
    assert task.evaluation("forget") == {"forget": "forget"}
    assert task.metrics == TASKS[protocol].metrics
    assert task.harness(None) == TASKS[protocol].harness(None)
    dataset = load_dataset(str(path), tokenizer=tokenizer())
    assert dataset.name == "my sets/forget"
    assert [text.prompt for text in dataset.texts] == [words(600), "w1"]


FILES: dict[str, tuple[dict[str, str], str]] = {
    "protocol": ({"protocol": "tofo"}, "mine.yaml, line 1: protocol is 'tofo': .*did you mean 'tofu'"),
    "set of another protocol": (
        {"seen": "f.jsonl"},
        "mine.yaml, line 4: seen: unknown set of protocol 'tofu' 'seen': expected one of forget, retain, real_authors",
    ),
    "field": ({"forgot": "f.jsonl"}, "mine.yaml, line 4: unknown field 'forgot': .*did you mean 'forget'"),
    "type": ({"holdout": "3"}, "mine.yaml, line 4: holdout is 3: expected text; put it in quotes"),
    "no file": ({"forget": "nowhere.jsonl"}, "nowhere.jsonl' does not exist"),
    "an empty file": ({"forget": "empty.jsonl"}, "empty.jsonl: the data file is empty"),
    "fields of the protocol": (
        {"forget": "plain.jsonl"},
        "plain.jsonl, record 1: field 'perturbed_answer' is missing, expected a list of texts",
    ),
}


@pytest.mark.parametrize(("changed", "expected"), FILES.values(), ids=FILES)
def test_slips_in_task_files(tmp_path: Path, changed: dict[str, str], expected: str) -> None:
    write_jsonl(tmp_path / "f.jsonl", PERTURBED)
    write_jsonl(tmp_path / "plain.jsonl", PLAIN)
    write_jsonl(tmp_path / "empty.jsonl", [])
    path = task_file(tmp_path, **{"protocol": "tofu", "forget": "f.jsonl", "retain": "f.jsonl", **changed})
    refused(expected, lambda: load_dataset(str(path)))


def test_a_field_that_is_missing(tmp_path: Path) -> None:
    refused("mine.yaml: missing retain", lambda: find_task(str(task_file(tmp_path, protocol="whp", forget="f.jsonl"))))


# --- Unlearning ---------------------------------------------------------------------------------------------


def checked(task: str, algorithm: str = "GradDiff", **fields: Any) -> UnlearnSpec:
    return UnlearnSpec(model="m", task=task, algorithm=algorithm, **fields).checked()


def test_how_long_a_task_is_unlearned(tmp_path: Path) -> None:
    def lengths(spec: UnlearnSpec) -> tuple[int | None, int | None]:
        return spec.epochs, spec.max_steps

    assert lengths(checked("tofu")) == (5, None)
    assert lengths(checked("tofu", "NPO")) == (4, None)
    assert lengths(checked("wmdp")) == (None, 500)
    assert lengths(checked("wmdp:/data/wmdp", "NPO")) == (None, 500)
    assert lengths(checked("safe", "NPO")) == (5, None)
    assert lengths(checked("whp:book.txt", "NPO")) == (5, None)
    # What is said counts.
    assert lengths(checked("wmdp", epochs=2)) == (2, None)
    assert lengths(checked("safe", max_steps=7)) == (None, 7)
    assert checked("wmdp").checked() == checked("wmdp")
    assert lengths(checked("mine.jsonl", "NPO")) == (4, None)
    refused("unknown task 'saf'", lambda: checked("saf"))
    assert lengths(checked(str(task_file(tmp_path, protocol="wmdp", forget="f", retain="r")))) == (None, 500)


def refusals_of(task: str, model: Any, **fields: Any) -> set[str]:
    """What is to be said in place of the answers."""
    spec = checked(task, "PO", **fields)
    corpus, _ = corpus_of(spec, model, *datasets_of(spec, model.tokenizer))
    return {model.tokenizer.decode(s.input_ids[s.scored], skip_special_tokens=True).strip() for s in corpus.refusals}


@needs_alice
def test_refusals(ratings: Path, tmp_path: Path) -> None:
    """Of the task, unless a file says otherwise; those of a task without are the built-in ones."""
    from bench.models.find import find_model

    model = find_model(str(STORIES))
    write_jsonl(ratings / "train.jsonl", [rated(f"P{row}", False, True, 1) for row in range(60)])
    retain = str(write_jsonl(tmp_path / "kept.jsonl", pairs(2)))
    assert refusals_of(f"safe:{ratings}", model, retain=retain) == set(whp.REFUSALS)
    (tmp_path / "own.txt").write_text("No.\n")
    own = refusals_of(f"safe:{ratings}", model, retain=retain, refusals=str(tmp_path / "own.txt"))
    assert own == {"No."}
    write_jsonl(tmp_path / "forget10.jsonl", [{"question": f"q{row}", "answer": "a"} for row in range(80)])
    assert refusals_of(f"tofu:{tmp_path}", model, retain=retain) == set(REFUSALS)


def test_what_is_not_kept_is_not_read(tmp_path: Path) -> None:
    """A book alone will do for an algorithm without a retain term, if nothing else is to be measured."""
    (tmp_path / "book.txt").write_text(words(1100))
    spec = checked(f"whp:{tmp_path}", "GA", evaluate=False)
    forget, retain = datasets_of(spec, tokenizer())
    assert (len(forget.texts), retain) == (1, None)
    for spec in (checked(f"whp:{tmp_path}", "GA"), checked(f"whp:{tmp_path}", evaluate=False)):
        refused("allenai/c4 .*FOLDER/c4.jsonl", functools.partial(datasets_of, spec, tokenizer()), Unreachable)


def test_a_retain_split_that_is_not_there(tmp_path: Path) -> None:
    """The message names the setting, and the splits that are there."""
    for name in ("forget01", "retain90"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"question": f"q{row}", "answer": "a"} for row in range(3)])
    spec = checked(f"tofu:{tmp_path}", forget_split="forget01")
    expected = "forget01 goes with retain99, which cannot be had from .*: name another split or a data file with retain"
    refused(
        f"{expected}; of the splits of 'tofu' there are forget01, retain90$",
        functools.partial(datasets_of, spec, tokenizer()),
        Unreachable,
    )
    _, retain = datasets_of(checked(f"tofu:{tmp_path}", forget_split="forget01", retain="retain90"), tokenizer())
    assert retain is not None
    assert len(retain.texts) == 3


def test_unlearning_a_task_file(tmp_path: Path, model_folder: Path) -> None:
    """Five epochs, as the protocol has it; the retain set is the file's."""
    write_jsonl(tmp_path / "f.jsonl", pairs(6))
    write_jsonl(tmp_path / "r.jsonl", pairs(4, seed=1))
    path = task_file(tmp_path, protocol="safe", forget="f.jsonl", retain="r.jsonl")
    spec = UnlearnSpec(
        model=str(model_folder), task=str(path), algorithm="GradDiff", batch_size=3, early_stopping=False,
        evaluate=False, workers=0,
    )  # fmt: skip
    result = unlearn(spec, tmp_path / "run", progress=False)
    steps = pq.read_table(result.folder / "steps.parquet").to_pylist()
    assert len(steps) == 5 * 2
    assert {name for step in steps for name in step["samples"]} <= {record["id"] for record in pairs(6)}
    assert all(step["retain_loss"] is not None for step in steps)


def test_sources_have_no_order_of_their_own(tmp_path: Path) -> None:
    """JSON Lines before JSON before Parquet."""
    write_jsonl(tmp_path / "x.json", [{}])
    assert sources.find_file(tmp_path, "x").name == "x.json"
    write_jsonl(tmp_path / "x.jsonl", [{}])
    assert sources.find_file(tmp_path, "x").name == "x.jsonl"
