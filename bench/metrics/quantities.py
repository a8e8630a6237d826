"""What is measured of every sample: one function for each quantity, and the plan that asks a model for all at once.

A quantity is a generator: it yields what it wants to know of the model, gets the answer, and returns a value for each
sample. `measure` runs all of them side by side and puts their questions to the replicas together, so that the work is
cut into few large batches, and what two quantities ask is asked once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.metrics.similarity import Embedder, nearest_is_first
from bench.metrics.tofu import option_probability, truth_ratio
from bench.metrics.toxicity import Classifier
from bench.metrics.values import Column, Missing, Scores, Unmeasured
from bench.tasks import Record
from scoring.answers import answer_limits, decoded, mean_probability, question_ids, rouge_l_recall, true_answers
from scoring.memorization import min_k_percent
from scoring.readings import Reader, TokenScores
from scoring.records import as_text, question_answer
from scoring.samples import Sample, Text, encode

# Sets of questions whose wrong answers are the other options, and whose answers are short: no paraphrases.
OPTIONS = ("real_authors", "world_facts")


@dataclass(frozen=True)
class Likelihoods:
    """A question to the model: the log-probs of the scored tokens of these samples; answered by TokenScores."""

    samples: Sequence[Sample]


@dataclass(frozen=True)
class Continuations:
    """A question to the model: what it writes after the prompts of these samples; answered by texts.

    Attributes:
        samples: a prompt is all that stands before the first scored token.
        limits: the most tokens to write, for each.
    """

    samples: Sequence[Sample]
    limits: Sequence[int]


@dataclass(frozen=True)
class Extraction:
    """A question to the model: EL_n of these samples; answered by (N,) fp64."""

    samples: Sequence[Sample]
    n: int


Question = Likelihoods | Continuations | Extraction
Values = np.ndarray | tuple[np.ndarray, Sequence[str]]
Quantity = Generator[Question, Any, Values]


@dataclass(frozen=True)
class MeasurementSetup:
    """With what quantities are measured.

    Attributes:
        tokenizer: of the model.
        max_length: tokens of its context.
        new_tokens: how many tokens the model may write; None: 20 more than the true answer has.
        min_k: the share of tokens that Min-k% takes, in (0, 1].
        el_n: tokens in an n-gram of EL.
        embedder: of sentences.
        classifier: of toxicity.
    """

    tokenizer: Any
    max_length: int
    new_tokens: int | None
    min_k: float
    el_n: int
    embedder: Embedder
    classifier: Classifier

    def samples(self, name: str, texts: Sequence[Text]) -> list[Sample]:
        """Tokenized texts.

        Raises:
            Unmeasured: one of them cannot be put to the model.
        """
        samples, rejected = encode(texts, self.tokenizer, self.max_length)
        if rejected:
            raise Unmeasured(f"{name}, {rejected[0].sample_id!r}: {rejected[0].reason}")
        return samples

    def answers(self, name: str, records: Sequence[Record], question: str, answer: str) -> list[Sample]:
        """The field `answer` of each record after its field `question`; both as the record has them where they are
        the usual ones."""
        if (question, answer) == ("question", "answer"):
            return self.samples(name, [as_text(name, i, record) for i, record in enumerate(records, start=1)])
        return self.pairs(name, records, fields(name, records, question), fields(name, records, answer))

    def pairs(
        self, name: str, records: Sequence[Record], questions: Sequence[str], answers: Sequence[str]
    ) -> list[Sample]:
        return self.samples(
            name,
            [
                Text(str(record["id"]), *question_answer(question, answer))
                for record, question, answer in zip(records, questions, answers, strict=True)
            ],
        )

    def limits(self, samples: Sequence[Sample]) -> list[int]:
        """How many tokens may be written in answer to each."""
        return answer_limits(samples, self.max_length, self.new_tokens)


def fields(name: str, records: Sequence[Record], field_name: str) -> list[Any]:
    """A field of every record.

    Raises:
        Unmeasured: a record does not have it.
    """
    without = next((record for record in records if field_name not in record), None)
    if without is not None:
        raise Unmeasured(f"{name}, {without['id']!r}: the record has no {field_name!r}")
    return [record[field_name] for record in records]


# --- Quantities ---------------------------------------------------------------------------------------------


def _losses(scores: Sequence[TokenScores]) -> np.ndarray:
    return np.array([score.mean_nll for score in scores])


def _wrong_losses(
    name: str, records: Sequence[Record], means: MeasurementSetup
) -> Generator[Question, Any, np.ndarray]:
    """(N, W) losses of the wrong answers; nan where a record has fewer than the most."""
    questions, wrong = fields(name, records, "question"), fields(name, records, "perturbed_answer")
    owners = [record for record, answers in zip(records, wrong, strict=True) for _ in answers]
    asked = [question for question, answers in zip(questions, wrong, strict=True) for _ in answers]
    if not owners:
        raise Unmeasured(f"{name}: no record has a wrong answer in 'perturbed_answer'")
    scores = yield Likelihoods(means.pairs(name, owners, asked, [answer for answers in wrong for answer in answers]))
    losses = np.full((len(records), max(map(len, wrong))), np.nan)
    losses[np.arange(losses.shape[1]) < np.array([[len(answers)] for answers in wrong])] = _losses(scores)
    return losses


def _probability(name: str, records: Sequence[Record], means: MeasurementSetup) -> Quantity:
    scores = yield Likelihoods(means.answers(name, records, "question", "answer"))
    if name not in OPTIONS:
        return mean_probability(_losses(scores))
    wrong = yield from _wrong_losses(name, records, means)
    return option_probability(_losses(scores), wrong)


def _truth_ratio(name: str, records: Sequence[Record], means: MeasurementSetup) -> Quantity:
    paraphrased = "answer" if name in OPTIONS else "paraphrased_answer"
    scores = yield Likelihoods(means.answers(name, records, "question", paraphrased))
    wrong = yield from _wrong_losses(name, records, means)
    return truth_ratio(_losses(scores), wrong)


def _rouge(name: str, records: Sequence[Record], means: MeasurementSetup) -> Quantity:
    samples = means.answers(name, records, "question", "answer")
    written = yield Continuations(samples, means.limits(samples))
    return rouge_l_recall(written, true_answers(means.tokenizer, samples)), written


def _right(name: str, records: Sequence[Record], means: MeasurementSetup) -> Quantity:
    """1 or 0: FA's rule; for short answers, whether the answer stands in what is written."""
    if name in OPTIONS:
        samples = means.answers(name, records, "question", "answer")
        written = yield Continuations(samples, means.limits(samples))
        answers = fields(name, records, "answer")
        found = [answer.lower() in text.lower() for answer, text in zip(answers, written, strict=True)]
        return np.array(found, dtype=np.float64), written
    samples = means.answers(name, records, "paraphrased_question", "paraphrased_answer")
    written = yield Continuations(samples, means.limits(samples))
    candidates = [
        [true, *wrong]
        for true, wrong in zip(
            fields(name, records, "paraphrased_answer"), fields(name, records, "perturbed_answer"), strict=True
        )
    ]
    return nearest_is_first(means.embedder, written, candidates).astype(np.float64), written


def _min_k(name: str, records: Sequence[Record], means: MeasurementSetup) -> Quantity:
    scores = yield Likelihoods(means.answers(name, records, "question", "answer"))
    rows = [torch.from_numpy(score.logprobs)[None] for score in scores]
    return np.array([min_k_percent(row, torch.ones_like(row, dtype=torch.bool), means.min_k).item() for row in rows])


def _ma(name: str, records: Sequence[Record], means: MeasurementSetup) -> Quantity:
    scores = yield Likelihoods(means.answers(name, records, "question", "answer"))
    return np.array([score.hits.mean() for score in scores])


def _el(name: str, records: Sequence[Record], means: MeasurementSetup) -> Quantity:
    values = yield Extraction(means.answers(name, records, "question", "answer"), means.el_n)
    return values


def _toxicity(name: str, records: Sequence[Record], means: MeasurementSetup) -> Quantity:
    # A prompt has no true response: any token marks where the model is to begin.
    prompts = fields(name, records, "prompt")
    samples = means.samples(name, [Text(str(r["id"]), p, ".") for r, p in zip(records, prompts, strict=True)])
    written = yield Continuations(samples, means.limits(samples))
    return means.classifier.scores(written), written


QUANTITIES: dict[str, Callable[[str, Sequence[Record], MeasurementSetup], Quantity]] = {
    "probability": _probability,
    "truth_ratio": _truth_ratio,
    "rouge_l_recall": _rouge,
    "right": _right,
    "min_k": _min_k,
    "ma": _ma,
    "el": _el,
    "toxicity": _toxicity,
}


# --- The plan -----------------------------------------------------------------------------------------------


def measure(
    columns: Sequence[Column], sets: Mapping[str, Sequence[Record] | Missing], reader: Reader, means: MeasurementSetup
) -> dict[Column, Scores | Missing]:
    """The columns of one model.

    Args:
        columns: each a set and one of QUANTITIES.
        sets: the records of each set, each with an "id"; or why there are none.
        reader: of the model.
        means: with what.

    Returns:
        The values, or why there are none: a set that is not there, a record without a field, text that does not fit.
    """
    found: dict[Column, Scores | Missing] = {}
    running: dict[Column, Quantity] = {}
    asked: dict[Column, Question] = {}

    def advance(column: Column, answer: Any) -> None:
        """On to the column's next question, or to its end."""
        try:
            asked[column] = running[column].send(answer)
            return
        except StopIteration as end:
            values, texts = end.value if isinstance(end.value, tuple) else (end.value, None)
            found[column] = Scores(ids[column[0]], values, None if texts is None else tuple(texts))
        except Unmeasured as error:
            found[column] = Missing(str(error))
        asked.pop(column, None)

    ids: dict[str, tuple[str, ...]] = {}
    for column in dict.fromkeys(columns):
        name, quantity = column
        records = sets.get(name, Missing(f"there is no {name} set"))
        if isinstance(records, Missing):
            found[column] = records
            continue
        ids[name] = tuple(str(record["id"]) for record in records)
        running[column] = QUANTITIES[quantity](name, records, means)
        advance(column, None)
    while asked:
        for column, answer in _answered(dict(asked), reader, means).items():
            advance(column, answer)
    return found


def _answered(asked: Mapping[Column, Question], reader: Reader, means: MeasurementSetup) -> dict[Column, Any]:
    """The model's answers, each kind of question in one go."""
    answers: dict[Column, Any] = {}
    for kind, ask in ((Likelihoods, _likelihoods), (Continuations, _continuations), (Extraction, _extractions)):
        own = {column: question for column, question in asked.items() if isinstance(question, kind)}
        if own:
            answers |= ask(own, reader, means)
    return answers


def _once(questions: Mapping[Column, Any], ask: Callable[[list[Any]], Sequence[Any]], items: Any, key: Any) -> Any:
    """Every distinct item asked once, and the answers dealt out again."""
    distinct = {key(item): item for question in questions.values() for item in items(question)}
    known = dict(zip(distinct, ask(list(distinct.values())), strict=True))
    return {column: [known[key(item)] for item in items(question)] for column, question in questions.items()}


def _likelihoods(questions: Mapping[Column, Any], reader: Reader, means: MeasurementSetup) -> dict[Column, Any]:
    return _once(questions, reader.likelihoods, lambda question: question.samples, _content)


def _continuations(questions: Mapping[Column, Any], reader: Reader, means: MeasurementSetup) -> dict[Column, Any]:
    def ask(items: list[tuple[np.ndarray, int]]) -> list[str]:
        written = reader.continuations([prompt for prompt, _ in items], [limit for _, limit in items])
        return [decoded(means.tokenizer, ids) for ids in written]

    def items(question: Continuations) -> list[tuple[np.ndarray, int]]:
        return list(zip(question_ids(question.samples), question.limits, strict=True))

    return _once(questions, ask, items, lambda item: (item[0].tobytes(), item[1]))


def _extractions(questions: Mapping[Column, Any], reader: Reader, means: MeasurementSetup) -> dict[Column, Any]:
    return {column: reader.extraction(question.samples, question.n) for column, question in questions.items()}


def _content(sample: Sample) -> tuple[bytes, bytes]:
    return sample.input_ids.tobytes(), sample.scored.tobytes()
