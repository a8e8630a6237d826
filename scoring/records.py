"""Records: the entries of a data set before tokenization, and how each layout becomes a text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from scoring.errors import UserError
from scoring.samples import Text
from scoring.templates import Template

Record = dict[str, Any]
# The prompt that `question_answer` makes.
ASKED = re.compile(r"Question: (.*)\nAnswer:", re.DOTALL)


def _pair(record: Record) -> tuple[str, str]:
    return record["prompt"], record["completion"]


def _question(record: Record) -> tuple[str, str]:
    return question_answer(record["question"], record["answer"])


def _text(record: Record) -> tuple[str, None]:
    return record["text"], None


# The layouts of a record in order of preference: its fields, and how they become prompt and completion.
LAYOUTS: dict[tuple[str, ...], Callable[[Record], tuple[str, str | None]]] = {
    ("prompt", "completion"): _pair,
    ("question", "answer"): _question,
    ("text",): _text,
}


def as_text(name: str, number: int, record: Record, template: Template | None = None) -> Text:
    """The text of a record. A record without an "id" gets its position as one.

    A field that is null is one that is not there: formats with columns have it for every record. A prompt and its
    completion may be lists of turns; they are one conversation.

    Args:
        name: name of the data set, for messages.
        number: number of the record, counted from 1.
        record: a record in one of the layouts.
        template: of pairs and conversations; None: pairs are plain, and conversations have the tokenizer's.

    Raises:
        UserError: one line that names the record and field at fault.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{name}, record {number}: {type(record).__name__}; expected a mapping of fields")
    sample_id = record.get("id")
    sample_id = str(number - 1) if sample_id is None else str(sample_id)
    if record.get("messages") is not None:
        return Text(sample_id, messages=_turns(name, number, "messages", record["messages"]), template=template)
    if isinstance(record.get("prompt"), list) and record.get("completion") is not None:
        return Text(sample_id, messages=_turns(name, number, *_joined(record)), template=template)
    there = [field for field, value in record.items() if value is not None]
    # A layout whose fields are all there but one that is null is the next best, for what is said of it.
    fields = next((fields for names in (there, record) for fields in LAYOUTS if set(fields) <= set(names)), None)
    if fields is None:
        raise UserError(
            f"{name}, record {number}: fields {', '.join(map(repr, record)) or 'none'}; expected "
            "'prompt'+'completion', 'question'+'answer', 'text' or 'messages'"
        )
    for field in fields:
        if not isinstance(record[field], str):
            raise UserError(
                f"{name}, record {number}: field {field!r} is {type(record[field]).__name__}, expected text"
            )
    prompt, completion = LAYOUTS[fields](record)
    return Text(sample_id, prompt) if completion is None else pair_text(sample_id, prompt, completion, template)


def pair_text(sample_id: str, prompt: str, completion: str, template: Template | None = None) -> Text:
    """The text of a prompt and its completion. In a chat template the prompt is the user's turn, without the words that
    the plain layout has around a question, and the completion the assistant's; white space around them is left out."""
    if template is None:
        return Text(sample_id, prompt, completion)
    question = match[1] if (match := ASKED.fullmatch(prompt)) else prompt
    turns = (("user", question), ("assistant", completion))
    return Text(
        sample_id,
        messages=tuple({"role": role, "content": content.strip()} for role, content in turns),
        template=template,
    )


def _joined(record: Record) -> tuple[str, Any]:
    """The fields prompt and completion as one conversation, and their name."""
    completion = record["completion"]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return "prompt+completion", [*record["prompt"], *completion] if isinstance(completion, list) else None


def _turns(name: str, number: int, field: str, turns: Any) -> tuple[dict[str, str], ...]:
    """The turns of a conversation. A content that comes in parts is their text."""
    well_formed = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str | list)
        for turn in turns
    )
    if not well_formed or not turns or turns[-1]["role"] != "assistant":
        raise UserError(
            f"{name}, record {number}: {field!r} must be a list of {{'role', 'content'}} that ends with an "
            "assistant turn, which is what is scored"
        )
    where = f"{name}, record {number}: {field!r}"
    return tuple({"role": turn["role"], "content": _content(where, turn["content"])} for turn in turns)


def _content(where: str, content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"{where} has a part of type {kind!r}: expected parts {{'type': 'text', 'text': ...}}")
    return "".join(part["text"] for part in content)


def question_answer(question: str, answer: str) -> tuple[str, str]:
    """Prompt and completion of a question-answer pair. The completion starts with the space that separates the two, and
    an EOS token after it counts as one of its tokens."""
    return f"Question: {question}\nAnswer:", f" {answer}"


def check_ids(name: str, ids: Sequence[str], places: Sequence[int] | np.ndarray | None = None) -> None:
    """Refuse an id that two records share.

    Args:
        name: name of the data set, for messages.
        ids: ids of records.
        places: positions of these records in the data set, counted from 0; None if they are all of its records.

    Raises:
        UserError: one line with the second of the two records, counted from 1.
    """
    seen: set[str] = set()
    for place, sample_id in zip(range(len(ids)) if places is None else places, ids, strict=True):
        if sample_id in seen:
            raise UserError(f"{name}, record {place + 1}: id {sample_id!r} occurs twice; ids must be unique")
        seen.add(sample_id)


# What is said of a record that no tokenizer would take.
HALF_A_PAIR = "half of a surrogate pair, which is no text; expected UTF-8"


def is_unicode(record: Record | str) -> bool:
    """Whether all text of a record can be written as UTF-8: half of a surrogate pair cannot."""
    try:
        json.dumps(record, ensure_ascii=False, skipkeys=True, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def texts_of(name: str, records: Iterable[Record | str], template: Template | None = None) -> list[Text]:
    """The texts of records in memory; a plain string is a record by itself.

    Args:
        name: name of the data set, for messages.
        records: in one of the layouts.
        template: see `as_text`.

    Raises:
        UserError: one line that names the record and field at fault, or an id that occurs twice.
    """
    if isinstance(records, str | Mapping):
        raise UserError(f"{name} is one record: expected a list of them")
    if hasattr(records, "to_dict") and hasattr(records, "columns"):
        # A DataFrame gives the names of its columns when it is gone through, and they would pass for texts.
        raise UserError(f"{name} is a {type(records).__name__}: expected a list of records; use to_dict('records')")
    if not isinstance(records, Iterable):
        raise UserError(f"{name} is {records!r}: expected a list of records")
    texts = []
    for number, record in enumerate(records, start=1):
        if not is_unicode(record):
            raise UserError(f"{name}, record {number}: {HALF_A_PAIR}")
        texts.append(as_text(name, number, {"text": record} if isinstance(record, str) else record, template))
    check_ids(name, [text.sample_id for text in texts])
    return texts
