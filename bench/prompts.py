"""How a question-answer pair is put to a model."""

from __future__ import annotations


def question_answer(question: str, answer: str) -> tuple[str, str]:
    """Prompt and completion. They are tokenized apart and joined, bos before and eos after; the completion starts
    with the space that separates it, and its eos counts as an answer token."""
    return f"Question: {question}\nAnswer:", f" {answer}"
