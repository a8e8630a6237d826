"""Data files: every layout in both formats, and which tokens of each are scored, written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.tasks.datasets import is_data_file, load_dataset
from scoring.errors import UserError
from scoring.samples import Sample, encode
from tests.tiny_folders import BOS, CONTEXT, EOS, token_id, tokenizer, write_jsonl

CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]
# One record of each layout; its tokens, and those that are scored by --tokens answer.
LAYOUTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "prompt-completion": ({"prompt": "w1 w2", "completion": "w3 w4"}, "<s> w1 w2 w3 w4 </s>", "w3 w4 </s>"),
    "question-answer": (
        {"question": "w1 w2", "answer": "w3"},
        "<s> Question: w1 w2 Answer: w3 </s>",
        "w3 </s>",
    ),
    # Plain text ends where its author stopped: no end mark.
    "text": ({"text": "w1 w2 w3"}, "<s> w1 w2 w3", "w1 w2 w3"),
    # The template's own marks; nothing is put around them.
    "messages": (
        {"messages": CHAT},
        "<user> w1 w2 <end> <assistant> w3 <end> <user> w4 <end> <assistant> w5 w6 <end>",
        "w5 w6 <end>",
    ),
    "prompt is empty": ({"prompt": "", "completion": "w3 w4"}, "<s> w3 w4 </s>", "w3 w4 </s>"),
}


def ids(words: str) -> list[int]:
    return [token_id(word) for word in words.split()]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return path
    return write_jsonl(path, records)


def encoded(path: Path, tokens: str = "answer") -> list[Sample]:
    samples, rejected = encode(load_dataset(str(path)).texts, tokenizer(chat=True), CONTEXT, tokens)
    assert rejected == []
    return samples


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.parquet"])
@pytest.mark.parametrize(("record", "words", "scored"), LAYOUTS.values(), ids=LAYOUTS)
def test_layout(tmp_path: Path, name: str, record: dict[str, Any], words: str, scored: str) -> None:
    path = write(tmp_path / name, [record])
    (answer,) = encoded(path)
    assert answer.input_ids.tolist() == ids(words)
    assert answer.input_ids[answer.scored].tolist() == ids(scored)
    # The scored tokens are the last ones.
    assert answer.scored.tolist() == sorted(answer.scored.tolist())
    (everything,) = encoded(path, "all")
    assert everything.input_ids.tolist() == ids(words)
    assert everything.input_ids[everything.scored].tolist() == ids(words)[1:]


def test_bos_and_eos_are_what_the_tokenizer_has(tmp_path: Path) -> None:
    texts = load_dataset(str(write_jsonl(tmp_path / "d.jsonl", [{"prompt": "w1", "completion": "w2"}]))).texts
    bare = tokenizer(bos=False)
    bare.eos_token = None
    ((sample,), _) = encode(texts, bare, CONTEXT)
    assert sample.input_ids.tolist() == ids("w1 w2")
    assert sample.scored.tolist() == [False, True]
    ((sample,), _) = encode(texts, tokenizer(), CONTEXT)
    assert sample.input_ids.tolist() == [BOS, *ids("w1 w2"), EOS]


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_ids(tmp_path: Path, name: str) -> None:
    """Given ones as text, else positions; other fields stay in the records."""
    named = write(tmp_path / name, [{"id": 7, "text": "w1", "topic": "x"}, {"id": 3, "text": "w2", "topic": "y"}])
    dataset = load_dataset(str(named))
    assert [text.sample_id for text in dataset.texts] == ["7", "3"]
    assert [record["topic"] for record in dataset.records] == ["x", "y"]
    unnamed = write(tmp_path / f"other-{name}", [{"text": "w1"}, {"text": "w2"}])
    assert [text.sample_id for text in load_dataset(str(unnamed)).texts] == ["0", "1"]
    # An id that is not there for one record only: its position, in Parquet a null.
    some = write(tmp_path / f"some-{name}", [{"id": "a", "text": "w1"}, {"id": None, "text": "w2"}])
    assert [text.sample_id for text in load_dataset(str(some)).texts] == ["a", "1"]
    twice = write(tmp_path / f"twice-{name}", [{"id": "a", "text": "w1"}, {"id": "b", "text": "w2"}] * 2)
    with pytest.raises(UserError, match="record 3: id 'a' occurs twice; ids must be unique"):
        load_dataset(str(twice))


def test_layouts_of_one_file_may_differ(tmp_path: Path) -> None:
    records = [record for record, _, _ in LAYOUTS.values()]
    samples = encoded(write_jsonl(tmp_path / "mixed.jsonl", records))
    assert [sample.input_ids.tolist() for sample in samples] == [ids(words) for _, words, _ in LAYOUTS.values()]


READ: dict[str, dict[str, Any]] = {
    "a column of messages that is null": {"messages": None, "question": "w1 w2", "answer": "w3"},
    "other columns that are null": {
        "text": None,
        "prompt": None,
        "completion": None,
        "question": "w1 w2",
        "answer": "w3",
    },
}
PART = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
CHATS: dict[str, dict[str, Any]] = {
    "content in parts": {
        "messages": [
            {"role": "user", "content": PART},
            {"role": "assistant", "content": [{"type": "text", "text": "w3"}]},
        ]
    },
    "prompt and completion are turns": {
        "prompt": [{"role": "user", "content": "w1 w2"}],
        "completion": [{"role": "assistant", "content": "w3"}],
    },
    "prompt is turns": {"prompt": [{"role": "user", "content": "w1 w2"}], "completion": "w3"},
}


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_layouts_that_people_have(tmp_path: Path, name: str) -> None:
    for number, record in enumerate(READ.values()):
        (sample,) = encoded(write(tmp_path / f"{number}-{name}", [record]))
        assert sample.input_ids.tolist() == ids("<s> Question: w1 w2 Answer: w3 </s>")
    for number, record in enumerate(CHATS.values()):
        (sample,) = encoded(write(tmp_path / f"chat-{number}-{name}", [record]))
        assert sample.input_ids.tolist() == ids("<user> w1 w2 <end> <assistant> w3 <end>")
        assert sample.input_ids[sample.scored].tolist() == ids("w3 <end>")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
    lines = '{"text": "w1"}\n{"text": "\ufeffw2"}' if suffix == ".jsonl" else '[{"text": "w1"}, {"text": "\ufeffw2"}]'
    path = tmp_path / f"d{suffix}"
    path.write_text(lines, encoding="utf-8-sig")
    # Inside a text it belongs to it.
    assert [text.prompt for text in load_dataset(str(path)).texts] == ["w1", "\ufeffw2"]


def test_empty_answers_are_named(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": " "}]
    records: list[dict[str, Any]] = [
        {"id": "qa", "question": "w1", "answer": ""},
        {"id": "pair", "prompt": "w1", "completion": " \n"},
        {"id": "chat", "messages": turns},
        {"id": "plain", "text": ""},
        {"id": "good", "question": "w1", "answer": "w2"},
    ]
    texts = load_dataset(str(write_jsonl(tmp_path / "d.jsonl", records))).texts
    samples, rejected = encode(texts, tokenizer(chat=True), CONTEXT)
    assert [sample.sample_id for sample in samples] == ["good"]
    reasons = [(each.sample_id, each.reason) for each in rejected]
    assert reasons == [*((name, "empty answer") for name in ("qa", "pair", "chat")), ("plain", "empty text")]


def test_lines_are_ended_by_newlines_only(tmp_path: Path) -> None:
    """JSON allows U+2028 inside text; Windows ends lines with a carriage return; a last newline may be missing."""
    path = tmp_path / "d.jsonl"
    path.write_bytes('{"text": "w1\u2028w2"}\r\n\n{"text": "w3 \\ud83d\\ude00"}'.encode())
    texts = load_dataset(str(path)).texts
    assert [text.prompt for text in texts] == ["w1\u2028w2", "w3 \U0001f600"]


def test_hash_is_of_what_scoring_sees(tmp_path: Path) -> None:
    def sha256(name: str, **record: str) -> str:
        return load_dataset(str(write(tmp_path / name, [{"prompt": "w1", "completion": "w2"} | record]))).sha256

    first = sha256("a.jsonl")
    assert sha256("b.parquet") == first
    assert sha256("c.jsonl", topic="x") == first
    changed = {sha256("d.jsonl", **record) for record in ({"id": "a"}, {"prompt": "w3"}, {"completion": "w1"})}
    assert len(changed | {first}) == 4


def test_hash_of_what_is_chosen_is_by_what_was_asked_for(tmp_path: Path) -> None:
    """It is remembered, and "a" twice is not "a" and another sample whose id reads like the second "a"."""
    records = [{"id": name, "text": f"text of {name}"} for name in ("a", "b", "a#2")]
    path = write_jsonl(tmp_path / "data.jsonl", records)
    data, wanted = load_dataset(str(path)), [("a", "b"), ("b", "a"), ("a", "a"), ("a", "a#2"), ("b", "a#2", "a")]
    hashes = [data.chosen(ids, "here").sha256 for ids in wanted]
    assert hashes == [data.chosen(ids, "here").sha256 for ids in wanted]
    assert hashes == [load_dataset(str(path)).chosen(ids, "here").sha256 for ids in wanted]
    assert len({data.sha256, *hashes}) == 6
    # Of a part of a part.
    part = data.chosen(("b", "a"), "here")
    assert part.chosen(("a",), "here").sha256 == data.chosen(("a",), "here").sha256 != part.sha256


def test_a_task(tmp_path: Path) -> None:
    dataset = load_dataset("authors", "forget01")
    assert dataset.name == "authors/forget01"
    assert len(dataset.texts) == len(dataset.records) > 0
    assert len({text.sample_id for text in dataset.texts}) == len(dataset.texts)


def test_files_and_tasks(tmp_path: Path) -> None:
    """A name is a data file's if it looks like one, or is one; the rest are tasks, known or not."""
    bare = tmp_path / "forget"
    bare.write_text("")
    files = [str(bare), "forget.jsonl", "data/forget", "C.parquet", "/data/a:b.jsonl"]
    tasks = ["authors", "author", "tofu:/data/tofu", "whp:novel.txt", "tofo:a/b", "mine.yaml", "data/mine.yml"]
    assert [name for name in [*files, *tasks] if is_data_file(name)] == files
