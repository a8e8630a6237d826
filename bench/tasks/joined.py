"""Texts of several records: consecutive records of a data set, joined to one."""

from __future__ import annotations

from collections.abc import Sequence

from scoring.errors import UserError
from scoring.records import Record
from scoring.samples import Text
from scoring.settings import named


def joined(texts: Sequence[Text], records: int) -> list[Record]:
    """Texts of so many consecutive records each, without overlap; what is left at the end is left out.

    The first prompt is the prompt of the joined text, and all that follows is scored, so one record alone stays what
    it is. Plain texts are joined to a plain text.

    Raises:
        UserError: there are chats among them.
    """
    return [_join(texts[start : start + records]) for start in range(0, len(texts) - records + 1, records)]


def _join(group: Sequence[Text]) -> Record:
    first = group[0]
    name = first.sample_id if len(group) == 1 else f"{first.sample_id}+{len(group) - 1}"
    if any(text.messages is not None for text in group):
        raise UserError(
            f"{named('task')}: {first.sample_id!r} is a chat; expected prompts with completions, or plain texts"
        )
    if first.completion is None:
        return {"id": name, "text": " ".join(text.prompt for text in group)}
    rest = "".join(f"\n{text.prompt}{text.completion or ''}" for text in group[1:])
    return {"id": name, "prompt": first.prompt, "completion": first.completion + rest}
