"""Generated questions and texts as tasks of lm-evaluation-harness, which need no download."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.tasks.task import HarnessTask
from scoring.records import Record


@dataclass(frozen=True)
class Question:
    """A text that continues with a space and one of the choices.

    Attributes:
        id: unique in its set.
        text: up to the choice.
        choices: right and wrong ones.
        answer: index of the right choice.
    """

    id: str
    text: str
    choices: tuple[str, ...]
    answer: int


def multiple_choice(name: str, questions: Iterable[Question]) -> dict[str, Any]:
    """A configuration that scores `acc`: is the summed log-probability of the right choice the highest?"""
    rows = [
        {"id": question.id, "text": question.text, "choices": list(question.choices), "answer": question.answer}
        for question in questions
    ]
    return {
        **_test_set(name, rows),
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def rolling_text(name: str, records: Iterable[Record]) -> dict[str, Any]:
    """A configuration that scores `word_perplexity`: exp(-summed log-probability / number of words) of all texts.

    White space separates words. Each record has an "id" and a "text".
    """
    return {
        **_test_set(name, [{"id": record["id"], "text": record["text"]} for record in records]),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    }


def question_sets(sets: Mapping[str, Iterable[Question]]) -> dict[str, tuple[HarnessTask, ...]]:
    """Question sets by name, as `Task.harness` gives them."""
    return {name: (multiple_choice(name, questions),) for name, questions in sets.items()}


def records_with_answers(set_name: str, questions: Iterable[Question]) -> list[Record]:
    """Records that teach a model the questions with their right answers."""
    return [
        {
            "id": f"{set_name}-{question.id}",
            "prompt": question.text,
            "completion": f" {question.choices[question.answer]}",
        }
        for question in questions
    ]


def training_text(records: Iterable[Record]) -> list[str]:
    """The text of each record, of a prompt together with its completion."""
    return [record["text"] if "text" in record else record["prompt"] + record["completion"] for record in records]


def _test_set(name: str, rows: list[Record]) -> dict[str, Any]:
    # Under the name of one of its tasks the harness would merge this with that task's configuration.
    return {"task": f"standin_{name}", "custom_dataset": _dataset(rows), "test_split": "test"}


def _dataset(rows: list[Record]) -> Callable[..., dict[str, Any]]:
    def load(**metadata: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    return load
