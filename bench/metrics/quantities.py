"""What is measured of every sample: a function for each quantity, and `measure`, which asks a model for all at once.

A quantity is a generator: it yields what it wants to know of the model, gets the answer, and returns a value for each
sample. `measure` runs all of them side by side and puts their questions to the replicas together, so that the work is
cut into few large batches, and a question that two quantities ask is answered once.

A plugin adds one by `QUANTITIES["mine"] = function`, with the parameters of those here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from bench.metrics.leakage import KS, best_of
from bench.metrics.membership import packed_bytes
from bench.metrics.similarity import Embedder, nearest_is_first
from bench.metrics.tofu import OPTION_SETS, option_probability, truth_ratio
from bench.metrics.toxicity import Classifier
from bench.metrics.values import Column, Missing, Scores, Unmeasured
from bench.metrics.written import (
    best_f1,
    first_line,
    is_exactly,
    n_gram_entropy,
    reasoned_answer,
    same_words,
    union_recall,
)
from bench.tasks import Record
from scoring.answers import (
    answer_limits,
    decoded,
    mean_probability,
    question_ids,
    rouge_l_f1,
    rouge_l_recall,
    true_answers,
)
from scoring.engine import Engine
from scoring.memorization import extraction_strength, min_k_percent, min_k_plus_plus
from scoring.readings import GRADIENT_COST, Reader, TokenScores, continuation_cost, extraction_cost
from scoring.records import as_text, pair_text, question_answer
from scoring.registry import Registry
from scoring.samples import Sample, Text, encode
from scoring.settings import named
from scoring.templates import Template


@dataclass(frozen=True)
class Likelihoods:
    """A question to the model: the log-probs of the scored tokens of these samples; answered by TokenScores.

    Attributes:
        moments: with mean and standard deviation of log p over the vocabulary.
    """

    samples: Sequence[Sample]
    moments: bool = False


@dataclass(frozen=True)
class GradientNorms:
    """A question to the model: the 2-norms of the gradients of these samples' mean NLL; answered by (N,) fp64."""

    samples: Sequence[Sample]


@dataclass(frozen=True)
class Continuations:
    """A question to the model: what it writes after the prompts of these samples; answered by texts.

    Attributes:
        samples: a prompt is all that stands before the first scored token.
        limits: the most tokens to write after each prompt.
    """

    samples: Sequence[Sample]
    limits: Sequence[int]


@dataclass(frozen=True)
class DrawnAnswers:
    """A question to the model: what it writes after the prompts of these samples if it draws every token; answered by
    lists of texts.

    Attributes:
        samples, limits: see Continuations.
        count: of answers to each prompt.
        temperature: that logits are divided by.
        seed: of all draws.
    """

    samples: Sequence[Sample]
    limits: Sequence[int]
    count: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Extraction:
    """A question to the model: EL_n of these samples; answered by (N,) fp64."""

    samples: Sequence[Sample]
    n: int


# MUSE: how many tokens are written after a passage, and in answer to a question, where another question would follow.
VERBMEM_TOKENS, KNOWMEM_TOKENS = 128, 32
KNOWMEM_STOPS = ("\n\n", "\nQuestion", "Question:")
# RWKU: how many tokens are written in answer to a probe, and where the model may reason; LUME: of any text.
PROBE_TOKENS, REASONING_TOKENS, LUME_TOKENS = 30, 256, 256

Question = Likelihoods | Continuations | DrawnAnswers | Extraction | GradientNorms
Values = np.ndarray | tuple[np.ndarray, Sequence[str]]
Quantity = Generator[Question, Any, Values]


@dataclass(frozen=True)
class MeasurementSetup:
    """What quantities need besides the model.

    Attributes:
        tokenizer: of the model.
        max_length: tokens of the model's context.
        new_tokens: how many tokens the model may write; None: 20 more than the true answer has.
        min_k: the share of tokens that Min-k% takes, in (0, 1].
        el_n: tokens in an n-gram of EL.
        embedder: embeds sentences.
        classifier: scores toxicity.
        template: how questions are put, see `scoring.records.as_text`.
        engine: that computes the model.
        answers_drawn: of each sample, for leak@k.
        temperature: at which they are drawn.
        seed: of the draws.
        given: the share of an answer's tokens that the model is given, in [0, 1); it is judged by the rest.
    """

    tokenizer: Any
    max_length: int
    new_tokens: int | None
    min_k: float
    el_n: int
    embedder: Embedder
    classifier: Classifier
    template: Template | None = None
    engine: Engine = "transformers"
    answers_drawn: int = 64
    temperature: float = 1.0
    seed: int = 0
    given: float = 0.0

    def samples(self, set_name: str, texts: Sequence[Text]) -> list[Sample]:
        """The texts, tokenized.

        Raises:
            Unmeasured: one of them does not fit the model.
        """
        samples, rejected = encode(texts, self.tokenizer, self.max_length)
        if rejected:
            raise Unmeasured(f"{set_name}, {rejected[0].sample_id!r}: {rejected[0].reason}")
        return samples

    def answers(self, set_name: str, records: Sequence[Record]) -> list[Sample]:
        """Each record's answer, or completion, after what it answers."""
        texts = [as_text(set_name, i, record, self.template) for i, record in enumerate(records, start=1)]
        samples = self.samples(set_name, texts)
        return [_begun(sample, self.given) for sample in samples] if self.given else samples

    def paraphrased_answers(self, set_name: str, records: Sequence[Record], question: str = "question") -> list[Sample]:
        """Each record's paraphrased answer after its field `question`."""
        questions, answers = fields(set_name, records, question), fields(set_name, records, "paraphrased_answer")
        return self.pairs(set_name, records, questions, answers)

    def pairs(
        self, set_name: str, records: Sequence[Record], questions: Sequence[str], answers: Sequence[str]
    ) -> list[Sample]:
        """An answer after a question for each record."""
        return self.samples(
            set_name,
            [
                pair_text(str(record["id"]), *question_answer(question, answer), self.template)
                for record, question, answer in zip(records, questions, answers, strict=True)
            ],
        )

    def limits(self, samples: Sequence[Sample]) -> list[int]:
        """How many tokens may be written in place of each sample's answer."""
        return answer_limits(samples, self.max_length, self.new_tokens)

    def without_end(self, samples: Sequence[Sample], scores: Sequence[TokenScores]) -> list[TokenScores]:
        """The scores of the words alone: without that of the special token which ends an answer, where one does."""
        ends = [sample.scored[-1] and int(sample.input_ids[-1]) in self._special for sample in samples]
        return [score.at(slice(-1)) if end else score for score, end in zip(scores, ends, strict=True)]

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset({*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids})

    def check_engine(self, what: str) -> None:
        """Refuse to measure what only transformers gives.

        Raises:
            Unmeasured: another engine computes.
        """
        if self.engine != "transformers":
            raise Unmeasured(f"{self.engine} gives no {what}: use {named('engine')} transformers")


def _begun(sample: Sample, share: float) -> Sample:
    """The sample with the first tokens of its answer given; at least one is left to be scored."""
    scored = sample.scored.copy()
    scored[np.flatnonzero(scored)[: min(int(share * sample.num_scored), sample.num_scored - 1)]] = False
    return dataclasses.replace(sample, scored=scored)


def fields(set_name: str, records: Sequence[Record], field_name: str) -> list[Any]:
    """A field of every record.

    Raises:
        Unmeasured: a record does not have it.
    """
    without = next((record for record in records if field_name not in record), None)
    if without is not None:
        raise Unmeasured(f"{set_name}, {without['id']!r}: the record has no {field_name!r}")
    return [record[field_name] for record in records]


# --- Quantities ---------------------------------------------------------------------------------------------


def _losses(scores: Sequence[TokenScores]) -> np.ndarray:
    return np.array([score.mean_nll for score in scores])


def _wrong_losses(
    set_name: str, records: Sequence[Record], setup: MeasurementSetup
) -> Generator[Question, Any, np.ndarray]:
    """(N, W) losses of the wrong answers, W the most that a record has; nan where a record has fewer."""
    questions, wrong_answers = fields(set_name, records, "question"), fields(set_name, records, "perturbed_answer")
    counts = [len(answers) for answers in wrong_answers]
    if not sum(counts):
        raise Unmeasured(f"{set_name}: no record has a wrong answer in 'perturbed_answer'")
    scores = yield Likelihoods(
        setup.pairs(
            set_name,
            [record for record, count in zip(records, counts, strict=True) for _ in range(count)],
            [question for question, count in zip(questions, counts, strict=True) for _ in range(count)],
            [answer for answers in wrong_answers for answer in answers],
        )
    )
    losses = np.full((len(records), max(counts)), np.nan)
    losses[np.arange(max(counts)) < np.array(counts)[:, None]] = _losses(scores)
    return losses


def _probability(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    scores = yield Likelihoods(setup.answers(set_name, records))
    if set_name not in OPTION_SETS:
        return mean_probability(_losses(scores))
    wrong = yield from _wrong_losses(set_name, records, setup)
    return option_probability(_losses(scores), wrong)


def _truth_ratio(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    if set_name in OPTION_SETS:
        scores = yield Likelihoods(setup.answers(set_name, records))
    else:
        scores = yield Likelihoods(setup.paraphrased_answers(set_name, records))
    wrong = yield from _wrong_losses(set_name, records, setup)
    return truth_ratio(_losses(scores), wrong)


def _rouge(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    samples = setup.answers(set_name, records)
    written = yield Continuations(samples, setup.limits(samples))
    return rouge_l_recall(written, true_answers(setup.tokenizer, samples)), written


def _right(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    """1 or 0: FA's rule; for short answers, whether the answer stands in what is written."""
    if set_name in OPTION_SETS:
        samples = setup.answers(set_name, records)
        written = yield Continuations(samples, setup.limits(samples))
        answers = fields(set_name, records, "answer")
        right = [answer.lower() in text.lower() for answer, text in zip(answers, written, strict=True)]
        return np.array(right, dtype=np.float64), written
    samples = setup.paraphrased_answers(set_name, records, "paraphrased_question")
    written = yield Continuations(samples, setup.limits(samples))
    candidates = [
        [true, *wrong]
        for true, wrong in zip(
            fields(set_name, records, "paraphrased_answer"), fields(set_name, records, "perturbed_answer"), strict=True
        )
    ]
    return nearest_is_first(setup.embedder, written, candidates).astype(np.float64), written


def _min_k(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    scores = yield Likelihoods(setup.answers(set_name, records))
    return _lowest(scores, setup.min_k)


def _min_share(set_name: str, records: Sequence[Record], setup: MeasurementSetup, *, share: float) -> Quantity:
    """Min-k% of the words alone, with a k that no setting changes."""
    samples = setup.answers(set_name, records)
    scores = yield Likelihoods(samples)
    return _lowest(setup.without_end(samples, scores), share)


def _lowest(scores: Sequence[TokenScores], share: float) -> np.ndarray:
    rows = [torch.from_numpy(score.logprobs)[None] for score in scores]
    return np.array([min_k_percent(row, torch.ones_like(row, dtype=torch.bool), share).item() for row in rows])


def _min_k_plus_plus(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    setup.check_engine("log-probabilities of the whole vocabulary")
    scores = yield Likelihoods(setup.answers(set_name, records), moments=True)
    return np.array([min_k_plus_plus(s.logprobs, s.means, s.deviations, setup.min_k) for s in scores])


def _loss(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    scores = yield Likelihoods(setup.answers(set_name, records))
    return _losses(scores)


def _zlib(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    samples = setup.answers(set_name, records)
    scores = yield Likelihoods(samples)
    return _losses(scores) / packed_bytes(true_answers(setup.tokenizer, samples))


def _gradient_norm(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    setup.check_engine("gradients")
    values = yield GradientNorms(setup.answers(set_name, records))
    return np.asarray(values, dtype=np.float64)


def _extraction_strength(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    samples = setup.answers(set_name, records)
    scores = yield Likelihoods(samples)
    return np.array([extraction_strength(score.hits) for score in setup.without_end(samples, scores)])


def _exact_memorization(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    samples = setup.answers(set_name, records)
    scores = yield Likelihoods(samples)
    hits = [score.hits for score in setup.without_end(samples, scores)]
    return np.array([words.mean() if len(words) else np.nan for words in hits])


def _verbmem(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    samples = setup.answers(set_name, records)
    written = yield Continuations(samples, answer_limits(samples, setup.max_length, VERBMEM_TOKENS))
    truth = [decoded(setup.tokenizer, sample.input_ids[sample.scored][:VERBMEM_TOKENS]) for sample in samples]
    return rouge_l_f1(written, truth), written


def _knowmem(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    samples = setup.answers(set_name, records)
    written = yield Continuations(samples, answer_limits(samples, setup.max_length, KNOWMEM_TOKENS))
    for stop in KNOWMEM_STOPS:
        written = [text.split(stop)[0] for text in written]
    return rouge_l_f1(written, true_answers(setup.tokenizer, samples)), written


def _judged(
    set_name: str,
    records: Sequence[Record],
    setup: MeasurementSetup,
    *,
    tokens: int,
    judge: Callable[[str, str, Record], float],
) -> Quantity:
    """What is written in so many tokens, judged by a function of it, of the true answer and of the record."""
    samples = setup.answers(set_name, records)
    written = yield Continuations(samples, answer_limits(samples, setup.max_length, tokens))
    truths = true_answers(setup.tokenizer, samples)
    values = [judge(*each) for each in zip(written, truths, records, strict=True)]
    return np.array(values, dtype=np.float64), written


def _regurgitation(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    samples = setup.answers(set_name, records)
    written = yield Continuations(samples, answer_limits(samples, setup.max_length, LUME_TOKENS))
    return rouge_l_recall(written, true_answers(setup.tokenizer, samples)), written


def _answer_f1(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    fields(set_name, records, "answers")
    values = yield from _judged(
        set_name, records, setup, tokens=PROBE_TOKENS, judge=lambda text, _, record: best_f1(text, record["answers"])
    )
    return values


def _fluency(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    samples = _prompts(set_name, records, setup)
    written = yield Continuations(samples, answer_limits(samples, setup.max_length, REASONING_TOKENS))
    return np.array([n_gram_entropy(text) for text in written]), written


def _ma(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    scores = yield Likelihoods(setup.answers(set_name, records))
    return np.array([score.hits.mean() for score in scores])


def _el(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    values = yield Extraction(setup.answers(set_name, records), setup.el_n)
    return values


def _prompts(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> list[Sample]:
    """Prompts that have no true response: any token marks where the model is to begin."""
    prompts = fields(set_name, records, "prompt")
    texts = [
        pair_text(str(record["id"]), prompt, ".", setup.template)
        for record, prompt in zip(records, prompts, strict=True)
    ]
    return setup.samples(set_name, texts)


def _toxicity(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
    samples = _prompts(set_name, records, setup)
    written = yield Continuations(samples, setup.limits(samples))
    return setup.classifier.scores(written), written


def _leak(k: int) -> Callable[[str, Sequence[Record], MeasurementSetup], Quantity]:
    """ROUGE-L recall of the best of k answers; the text is the worst leak of all."""

    def of(set_name: str, records: Sequence[Record], setup: MeasurementSetup) -> Quantity:
        if k > setup.answers_drawn:
            raise Unmeasured(f"needs {k} drawn answers to each question, and {setup.answers_drawn} are drawn")
        samples = setup.answers(set_name, records)
        drawn = yield DrawnAnswers(samples, setup.limits(samples), setup.answers_drawn, setup.temperature, setup.seed)
        truths = true_answers(setup.tokenizer, samples)
        scores = np.stack(
            [rouge_l_recall(texts, [truth] * len(texts)) for texts, truth in zip(drawn, truths, strict=True)]
        )
        worst = [texts[place] for texts, place in zip(drawn, scores.argmax(-1).tolist(), strict=True)]
        return best_of(scores, k), worst

    return of


QUANTITIES: Registry[Callable[[str, Sequence[Record], MeasurementSetup], Quantity]] = Registry(
    "quantity",
    {
        "probability": _probability,
        "truth_ratio": _truth_ratio,
        "rouge_l_recall": _rouge,
        "right": _right,
        "min_k": _min_k,
        "min_40": partial(_min_share, share=0.4),
        "min_k_plus_plus": _min_k_plus_plus,
        "loss": _loss,
        "zlib": _zlib,
        "gradient_norm": _gradient_norm,
        "extraction_strength": _extraction_strength,
        "exact_memorization": _exact_memorization,
        "ma": _ma,
        "el": _el,
        "toxicity": _toxicity,
        "verbmem": _verbmem,
        "knowmem": _knowmem,
        **{f"leak_{k}": _leak(k) for k in KS},
        "probe_recall": partial(
            _judged, tokens=PROBE_TOKENS, judge=lambda text, truth, _: union_recall(first_line(text), truth)
        ),
        "reasoned": partial(
            _judged, tokens=REASONING_TOKENS, judge=lambda text, truth, _: same_words(reasoned_answer(text), truth)
        ),
        "answer_f1": _answer_f1,
        "fluency": _fluency,
        "regurgitation": _regurgitation,
        "exact_match": partial(_judged, tokens=LUME_TOKENS, judge=lambda text, truth, _: is_exactly(text, truth)),
    },
)


# Quantities that read the true answer alone, and those that judge what is written after the question itself. (FA's asks
# in other words.)
READ = {
    *("probability", "min_k", "min_40", "min_k_plus_plus", "loss", "zlib"),
    *("ma", "extraction_strength", "exact_memorization"),
}
WRITTEN = (
    *("rouge_l_recall", "toxicity", "verbmem", "knowmem"),
    *("probe_recall", "reasoned", "answer_f1", "fluency", "regurgitation", "exact_match"),
)


def asked_of_a_model(columns: Collection[Column], sets: Mapping[str, Sequence[Record] | Missing]) -> tuple[int, int]:
    """How many texts columns want to be read (or differentiated, which is counted by itself), and how many answers
    written; what two ask is counted once. Those of plugins, and EL, are not counted."""
    texts = answers = 0
    for set_name, records in sets.items():
        if isinstance(records, Missing):
            continue
        asked = {quantity for name, quantity in columns if name == set_name}
        has_options = set_name in OPTION_SETS
        wrong = "truth_ratio" in asked or (has_options and "probability" in asked)
        paraphrased = "truth_ratio" in asked and not has_options
        true = asked & READ or (has_options and "truth_ratio" in asked)
        texts += len(records) * (bool(true) + paraphrased + ("gradient_norm" in asked))
        texts += sum(len(record.get("perturbed_answer") or ()) for record in records) if wrong else 0
        own = asked & set(WRITTEN) or (has_options and "right" in asked)
        answers += len(records) * (bool(own) + ("right" in asked and not has_options))
    return texts, answers


# --- Measuring ----------------------------------------------------------------------------------------------


def measure(
    columns: Sequence[Column], sets: Mapping[str, Sequence[Record] | Missing], reader: Reader, setup: MeasurementSetup
) -> dict[Column, Scores | Missing]:
    """The columns of one model.

    Args:
        columns: each a set and one of QUANTITIES.
        sets: the records of each set, each with an "id"; or why there are none.
        reader: of the model.
        setup: what quantities need besides the model.

    Returns:
        The values, or why there are none: a set that is not there, a record without a field, text that does not fit.
    """
    measured: dict[Column, Scores | Missing] = {}
    running: dict[Column, Quantity] = {}
    questions: dict[Column, Question] = {}

    def advance(column: Column, answer: Any) -> None:
        """Take a column on to its next question, or to its end."""
        try:
            questions[column] = running[column].send(answer)
            return
        except StopIteration as end:
            values, texts = end.value if isinstance(end.value, tuple) else (end.value, None)
            measured[column] = Scores(ids[column[0]], values, None if texts is None else tuple(texts))
        except Unmeasured as error:
            measured[column] = Missing(str(error))
        questions.pop(column, None)

    ids: dict[str, tuple[str, ...]] = {}
    for column in dict.fromkeys(columns):
        set_name, quantity = column
        records = sets.get(set_name, Missing(f"there is no {set_name} set"))
        if isinstance(records, Missing):
            measured[column] = records
            continue
        ids[set_name] = tuple(str(record["id"]) for record in records)
        running[column] = QUANTITIES[quantity](set_name, records, setup)
        advance(column, None)
    while questions:
        for column, answer in _answers(dict(questions), reader, setup).items():
            advance(column, answer)
    return measured


def tokens_to_read(
    columns: Sequence[Column], sets: Mapping[str, Sequence[Record] | Missing], setup: MeasurementSetup
) -> float:
    """About how many tokens `measure` will have a model read for these columns: what a progress bar counts.

    Questions that follow from what a model writes are not foreseen.
    """
    read: dict[Any, float] = {}
    for set_name, quantity in dict.fromkeys(columns):
        records = sets.get(set_name)
        if records is None or isinstance(records, Missing):
            continue
        asking = QUANTITIES[quantity](set_name, records, setup)
        with suppress(Exception):  # what cannot be measured is for `measure` to say
            question = next(asking)
            while isinstance(question, Likelihoods):
                # Samples that differ in the last token alone are read once.
                read |= {("read", s.input_ids[:-1].tobytes()): s.length - 1.0 for s in question.samples}
                zeros = [np.zeros(sample.num_scored) for sample in question.samples]
                question = asking.send([TokenScores(each, each.astype(bool), each, each) for each in zeros])
            if isinstance(question, DrawnAnswers):
                prompts = question_ids(question.samples)
                for prompt, limit in zip(prompts, question.limits, strict=True):
                    read["drawn", prompt.tobytes(), limit] = question.count * continuation_cost([prompt], [limit])
            elif isinstance(question, Continuations):
                for prompt, limit in zip(question_ids(question.samples), question.limits, strict=True):
                    read["written", prompt.tobytes(), limit] = continuation_cost([prompt], [limit])
            elif isinstance(question, GradientNorms):
                read |= {("differentiated", _content(s)): GRADIENT_COST * float(s.length) for s in question.samples}
            elif isinstance(question, Extraction):
                read |= {("extracted", _content(s)): extraction_cost([s.length]) for s in question.samples}
        asking.close()
    return sum(read.values())


def _answers(questions: Mapping[Column, Question], reader: Reader, setup: MeasurementSetup) -> dict[Column, Any]:
    """The model's answers, the questions of each kind put together."""
    answers: dict[Column, Any] = {}
    about = reader.about
    kinds: tuple[tuple[type, Callable[..., dict[Column, Any]]], ...] = (
        (Likelihoods, _likelihoods),
        (Continuations, _continuations),
        (DrawnAnswers, _drawn_answers),
        (Extraction, _extractions),
        (GradientNorms, _gradient_norms),
    )
    for kind, ask in kinds:
        of_kind = {column: question for column, question in questions.items() if isinstance(question, kind)}
        if of_kind:
            names = dict.fromkeys(name for name, _ in of_kind), dict.fromkeys(quantity for _, quantity in of_kind)
            reader.about = f"{about}{', '.join(names[0])}: {', '.join(names[1])}"
            answers |= ask(of_kind, reader, setup)
    reader.about = about
    return answers


def _ask_once(questions: Mapping[Column, Any], ask: Callable[[list[Any]], Sequence[Any]], items: Any, key: Any) -> Any:
    """Ask for every distinct item of the questions once, and deal the answers out again.

    Args:
        ask: items -> their answers.
        items: question -> its items.
        key: item -> what tells it from others.
    """
    distinct = {key(item): item for question in questions.values() for item in items(question)}
    answers = dict(zip(distinct, ask(list(distinct.values())), strict=True))
    return {column: [answers[key(item)] for item in items(question)] for column, question in questions.items()}


def _likelihoods(questions: Mapping[Column, Any], reader: Reader, setup: MeasurementSetup) -> dict[Column, Any]:
    with_moments = {_content(s) for question in questions.values() if question.moments for s in question.samples}

    def ask(samples: list[Sample]) -> list[TokenScores]:
        # Moments take time: they are computed of those samples alone that somebody wants them of.
        scores: dict[Any, TokenScores] = {}
        for moments in (False, True):
            some = [sample for sample in samples if (_content(sample) in with_moments) == moments]
            read = reader.likelihoods(some, moments) if some else []
            scores |= dict(zip(map(_content, some), read, strict=True))
        return [scores[_content(sample)] for sample in samples]

    return _ask_once(questions, ask, lambda question: question.samples, _content)


def _continuations(questions: Mapping[Column, Any], reader: Reader, setup: MeasurementSetup) -> dict[Column, Any]:
    def ask(items: list[tuple[np.ndarray, int]]) -> list[str]:
        written = reader.continuations([prompt for prompt, _ in items], [limit for _, limit in items])
        return [decoded(setup.tokenizer, ids) for ids in written]

    return _ask_once(questions, ask, _prompts_and_limits, lambda item: (item[0].tobytes(), item[1]))


def _drawn_answers(questions: Mapping[Column, Any], reader: Reader, setup: MeasurementSetup) -> dict[Column, Any]:
    # All questions of one measurement draw alike.
    first = next(iter(questions.values()))

    def ask(items: list[tuple[np.ndarray, int]]) -> list[list[str]]:
        prompts, limits = [prompt for prompt, _ in items], [limit for _, limit in items]
        answers = reader.drawn(prompts, limits, first.count, first.temperature, first.seed)
        return [[decoded(setup.tokenizer, ids) for ids in drawn] for drawn in answers]

    return _ask_once(questions, ask, _prompts_and_limits, lambda item: (item[0].tobytes(), item[1]))


def _prompts_and_limits(question: Continuations | DrawnAnswers) -> list[tuple[np.ndarray, int]]:
    return list(zip(question_ids(question.samples), question.limits, strict=True))


def _extractions(questions: Mapping[Column, Any], reader: Reader, setup: MeasurementSetup) -> dict[Column, Any]:
    return {column: reader.extraction(question.samples, question.n) for column, question in questions.items()}


def _gradient_norms(questions: Mapping[Column, Any], reader: Reader, setup: MeasurementSetup) -> dict[Column, Any]:
    return _ask_once(
        questions,
        lambda samples: reader.gradient_norms(samples).tolist(),
        lambda question: question.samples,
        _content,
    )


def _content(sample: Sample) -> tuple[bytes, bytes]:
    return sample.input_ids.tobytes(), sample.scored.tobytes()
