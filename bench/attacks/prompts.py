"""Attacks by the question: other words, roles, examples, the beginning of the answer.

A family of prompts is a text file in the folder prompts/ or in one that the user names: templates with {question},
separated by lines of three hyphens. Of the templates of a family the one that gets most out of the model counts, sample
by sample, for every model alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from bench.attacks.attack import Asked, Probe
from bench.metrics.table import Columns
from bench.metrics.values import Scores, Unmeasured
from bench.tasks import Record
from scoring.errors import UserError
from scoring.reading import read_text

QUESTION = "{question}"
BETWEEN = "\n---\n"
FOLDER = Path(__file__).parent / "prompts"
# Families that need no file.
PREFIX, PARAPHRASE, TRANSLATED, FEW_SHOT = "prefix", "paraphrase", "translated", "few_shot"
# Of questions that records bring with them, by family.
FIELDS = {PARAPHRASE: "paraphrased_question", TRANSLATED: "translated_question"}
EXAMPLES = 3


def read_families(folder: str | Path | None = None) -> dict[str, tuple[str, ...]]:
    """Family -> its templates; those of the user's folder take precedence.

    Raises:
        UserError: a folder without templates, or a template without {question}.
    """
    families: dict[str, tuple[str, ...]] = {}
    for place in (FOLDER, *([Path(folder)] if folder else [])):
        files = sorted(place.glob("*.txt"))
        if not files:
            raise UserError(
                f"{place}: no .txt file; expected one for each family of prompts, templates with {QUESTION}"
            )
        for path in files:
            templates = tuple(
                text.strip("\n") for text in read_text(path, "templates with {question}").strip().split(BETWEEN)
            )
            if without := [number for number, text in enumerate(templates, start=1) if QUESTION not in text]:
                raise UserError(f"{path}, template {without[0]}: expected {QUESTION} where the question goes")
            families[path.stem] = templates
    return families


@dataclass(frozen=True)
class Prompt:
    """The questions of a family.

    Attributes:
        kind: the family.
        templates: with {question}.
    """

    kind: str
    templates: tuple[str, ...]
    family: str = "prompt"

    @property
    def cost(self) -> float:
        return float(len(self.templates))

    @property
    def name(self) -> str:
        return f"prompt {self.kind}"

    def under(self, model: PreTrainedModel, probe: Probe) -> Iterator[tuple[int | None, Columns]]:
        yield None, most([probe.columns(model, Asked(rewritten=_Template(text))) for text in self.templates])


@dataclass(frozen=True)
class _Template:
    text: str

    def __call__(self, record: Record) -> Record:
        return _asked(record, lambda question: self.text.replace(QUESTION, question))


@dataclass(frozen=True)
class OwnQuestion:
    """The question as each record puts it another time: in other words, or in another language."""

    kind: str
    family: str = "prompt"
    cost: float = 1.0

    @property
    def name(self) -> str:
        return f"prompt {self.kind}"

    def under(self, model: PreTrainedModel, probe: Probe) -> Iterator[tuple[int | None, Columns]]:
        yield None, probe.columns(model, Asked(rewritten=self._rewritten))

    def _rewritten(self, record: Record) -> Record:
        field = FIELDS[self.kind]
        if not record.get(field):
            raise Unmeasured(f"{record['id']!r} has no {field!r}")
        return _asked(record, lambda _: str(record[field]))


@dataclass(frozen=True)
class FewShot:
    """Questions and answers of the retain set before the question.

    Attributes:
        seed: of the examples, which are the same for all questions.
    """

    seed: int
    family: str = "prompt"
    cost: float = 1.0

    @property
    def name(self) -> str:
        return f"prompt {FEW_SHOT}"

    def under(self, model: PreTrainedModel, probe: Probe) -> Iterator[tuple[int | None, Columns]]:
        others = [record for record in probe.records("retain") if record.get("question") and record.get("answer")]
        if len(others) < EXAMPLES:
            raise Unmeasured(
                f"the retain set has {len(others)} questions with answers: expected {EXAMPLES} for examples"
            )
        examples = random.Random(f"few-shot/{self.seed}").sample(others, EXAMPLES)
        # As the plain layout goes on: it puts "Question: " before all this and "Answer:" after.
        before = "\n\nQuestion: ".join(f"{one['question']}\nAnswer: {one['answer']}" for one in examples)
        yield None, probe.columns(model, Asked(rewritten=_Template(f"{before}\n\nQuestion: {QUESTION}")))


@dataclass(frozen=True)
class Prefix:
    """The beginning of the true answer; the rest is asked for.

    Attributes:
        share: of the answer's tokens.
    """

    share: float
    family: str = "prompt"
    cost: float = 1.0

    @property
    def name(self) -> str:
        return f"prompt {PREFIX} {self.share:g}"

    def under(self, model: PreTrainedModel, probe: Probe) -> Iterator[tuple[int | None, Columns]]:
        yield None, probe.columns(model, Asked(given=self.share))


def _asked(record: Record, put: Callable[[str], str]) -> Record:
    """The record with its question, or its prompt, put another way."""
    if record.get("question"):
        return {**record, "question": put(record["question"])}
    if isinstance(record.get("prompt"), str):
        return {**record, "prompt": put(record["prompt"])}
    raise Unmeasured(f"{record['id']!r} has no question")


def most(measured: Sequence[Columns]) -> Columns:
    """Sample by sample the largest of the values of several measurements, with what was written for it; what is missing
    in all is missing."""
    best: Columns = {}
    for columns in measured:
        for column, scores in columns.items():
            known = best.get(column)
            if not isinstance(scores, Scores) or not isinstance(known, Scores):
                best[column] = known if isinstance(known, Scores) else scores
                continue
            better = (scores.values > known.values) | np.isnan(known.values)
            texts = None
            if scores.texts is not None and known.texts is not None:
                texts = tuple(np.where(better, np.array(scores.texts, object), np.array(known.texts, object)).tolist())
            best[column] = Scores(known.ids, np.where(better, scores.values, known.values), texts)
    return best
