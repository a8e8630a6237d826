"""What a record says, for readers: what is asked, and the true answer."""

from __future__ import annotations

from scoring.records import ASKED, Record, as_text
from scoring.samples import Text


def prompt_and_completion(text: Text) -> tuple[str, str]:
    """The words of a text; of a conversation, what comes before its last turn, a line a turn, and that turn."""
    if text.messages:
        before = "\n".join(f"{turn['role']}: {turn['content']}" for turn in text.messages[:-1])
        return before, text.messages[-1]["content"]
    return text.prompt or "", text.completion or ""


def question_and_truth(record: Record) -> tuple[str | None, str | None]:
    """What a model is asked, and the true answer, without white space around it; None where a record has none, as a
    prompt has no truth and a text no question."""
    if isinstance(record.get("prompt"), str) and record.get("completion") is None:
        return record["prompt"], None
    text = as_text("record", 1, record)
    prompt, completion = prompt_and_completion(text)
    if text.is_plain:
        return None, prompt
    asked = ASKED.fullmatch(prompt)
    return (asked[1] if asked else prompt), completion.strip()
