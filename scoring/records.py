"""Records: what a data set holds before anything is tokenized, and how each layout becomes a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from scoring.errors import UserError
from scoring.samples import Text

Record = dict[str, Any]


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


def as_text(name: str, number: int, record: Record) -> Text:
    """What is tokenized of a record; without an "id" its place is its name.

    Args:
        name: of the data set, for messages.
        number: of the record, counted from 1.
        record: in one of the layouts.

    Raises:
        UserError: one line that names the record and field at fault.
    """
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


def question_answer(question: str, answer: str) -> tuple[str, str]:
    """Prompt and completion. They are tokenized apart and joined, bos before and eos after; the completion starts
    with the space that separates it, and its eos counts as an answer token."""
    return f"Question: {question}\nAnswer:", f" {answer}"


def check_ids(name: str, ids: Sequence[str], places: Sequence[int] | np.ndarray | None = None) -> None:
    """Refuse ids that name two records of the data set `name`.

    Args:
        places: of the ids' records, counted from 0; None: they are all records.

    Raises:
        UserError: one line with the record, counted from 1.
    """
    seen: set[str] = set()
    for place, sample_id in zip(range(len(ids)) if places is None else places, ids, strict=True):
        if sample_id in seen:
            raise UserError(f"{name}, record {place + 1}: id {sample_id!r} occurs twice; ids must be unique")
        seen.add(sample_id)


def texts_of(name: str, records: Iterable[Record | str]) -> list[Text]:
    """What is tokenized of records in memory; a plain text is a record of its own.

    Raises:
        UserError: one line that names the record and field at fault, or an id that occurs twice.
    """
    if isinstance(records, str | Mapping):
        raise UserError(f"{name} is one record: expected a list of them")
    texts = [
        as_text(name, number, {"text": record} if isinstance(record, str) else record)
        for number, record in enumerate(records, start=1)
    ]
    check_ids(name, [text.sample_id for text in texts])
    return texts
