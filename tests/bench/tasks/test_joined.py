"""Texts that are joined from records."""

import pytest

from bench.tasks.joined import joined
from scoring.errors import UserError
from scoring.samples import Text

QUESTIONS = [Text(f"q{number}", f"Q{number}?", f" A{number}.") for number in range(4)]


@pytest.mark.parametrize(
    ("texts", "records", "expected"),
    [
        (QUESTIONS[:2], 1, [{"id": f"q{n}", "prompt": f"Q{n}?", "completion": f" A{n}."} for n in range(2)]),
        (QUESTIONS, 3, [{"id": "q0+2", "prompt": "Q0?", "completion": " A0.\nQ1? A1.\nQ2? A2."}]),
        ([Text("a", "One."), Text("b", "Two.")], 2, [{"id": "a+1", "text": "One. Two."}]),
        (QUESTIONS[:1], 2, []),
    ],
)
def test_consecutive_records_become_one(texts, records, expected):
    assert joined(texts, records) == expected


def test_chats_are_not_joined():
    with pytest.raises(UserError, match="'c' is a chat"):
        joined([Text("c", messages=({"role": "assistant", "content": "Hi"},))], 1)
