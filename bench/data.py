"""Reading what is to be scored: a task by name, or a JSON Lines or Parquet file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench.prompts import question_answer
from bench.tasks import TASKS, Record
from scoring.errors import UserError, unknown_name
from scoring.samples import Text


@dataclass(frozen=True)
class Dataset:
    """Records in order, as texts and as they were read.

    Attributes:
        name: the task and split, or the file's name.
        texts: what is tokenized.
        records: the whole records (attributes included), same order.
    """

    name: str
    texts: list[Text]
    records: list[Record]

    @property
    def sha256(self) -> str:
        """Hash of all that scoring sees of the data."""
        content = [[t.sample_id, t.prompt, t.completion, t.messages] for t in self.texts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_dataset(source: str, split: str | None = None) -> Dataset:
    """A task's split, or a file.

    Args:
        source: a name in TASKS, or a path ending in .jsonl, .json or .parquet.
        split: of a task; the task's own default if None.

    Raises:
        UserError: one line that names the file, line or field at fault.
    """
    if source in TASKS:
        task = TASKS[source]
        split = split or task.default_split
        return _dataset(f"{source}/{split}", task.load(split, task.source, None))
    path = Path(source)
    if path.is_dir():
        raise UserError(f"data file {source!r} is a folder: expected a JSON Lines or Parquet file")
    if not path.is_file():
        if path.suffix or "/" in source:
            raise UserError(f"data file {source!r} does not exist: expected a JSON Lines or Parquet file")
        raise unknown_name("task", source, TASKS)
    if split is not None:
        raise UserError(f"split {split}: a data file has no splits; name the file of the split instead of {source!r}")
    records = _read_parquet(path) if path.suffix == ".parquet" else _read_json_lines(path)
    if not records:
        raise UserError(f"{path}: the data file is empty; expected at least one record")
    return _dataset(str(path), records)


def _read_parquet(path: Path) -> list[Record]:
    try:
        return pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _read_json_lines(path: Path) -> list[Record]:
    records = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; expected JSON Lines") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); expected one object a line"
            ) from error
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number}: a JSON {type(record).__name__}; expected one object a line (JSON Lines)"
            )
        if "\\ud" in line.lower() and not _is_unicode(record):
            raise UserError(f"{path}, line {number}: half of a surrogate pair, which is no text; expected UTF-8")
        records.append(record)
    return records


def _is_unicode(record: Record) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _pair(record: Record) -> tuple[str, str]:
    return record["prompt"], record["completion"]


def _question(record: Record) -> tuple[str, str]:
    return question_answer(record["question"], record["answer"])


def _text(record: Record) -> tuple[str, None]:
    return record["text"], None


# The fields a record may have, in the order of preference, and how they become prompt and completion.
LAYOUTS: dict[tuple[str, ...], Callable[[Record], tuple[str, str | None]]] = {
    ("prompt", "completion"): _pair,
    ("question", "answer"): _question,
    ("text",): _text,
}


def _dataset(name: str, records: list[Record]) -> Dataset:
    texts = [_as_text(name, number, record) for number, record in enumerate(records, start=1)]
    seen: set[str] = set()
    for number, text in enumerate(texts, start=1):
        if text.sample_id in seen:
            raise UserError(f"{name}, record {number}: id {text.sample_id!r} occurs twice; ids must be unique")
        seen.add(text.sample_id)
    return Dataset(name, texts, records)


def _as_text(name: str, number: int, record: Record) -> Text:
    sample_id = record.get("id")
    sample_id = str(number - 1) if sample_id is None else str(sample_id)
    if "messages" in record:
        return Text(sample_id, messages=_messages(name, number, record["messages"]))
    for fields, layout in LAYOUTS.items():
        if all(field in record for field in fields):
            for field in fields:
                if not isinstance(record[field], str):
                    raise UserError(
                        f"{name}, record {number}: field {field!r} is {type(record[field]).__name__}, expected text"
                    )
            return Text(sample_id, *layout(record))
    raise UserError(
        f"{name}, record {number}: fields {', '.join(map(repr, record)) or 'none'}; expected 'prompt'+'completion', "
        "'question'+'answer', 'text' or 'messages'"
    )


def _messages(name: str, number: int, turns: Any) -> tuple[dict[str, str], ...]:
    sound = isinstance(turns, list) and all(
        isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
    )
    if not sound or not turns or turns[-1]["role"] != "assistant":
        raise UserError(
            f"{name}, record {number}: 'messages' must be a list of {{'role', 'content'}} that ends with an "
            "assistant turn, which is what is scored"
        )
    return tuple({"role": t["role"], "content": t["content"]} for t in turns)
