"""From texts to the samples of a run: those to forget, refusals in place of their answers, and those to retain."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from algorithms.ease import values_of
from algorithms.group import Group
from algorithms.recipe import Objectives, Recipe
from scoring.answers import score_answers
from scoring.errors import UserError
from scoring.samples import Rejected, Sample, Text, TextSet, answer_end, encode, encode_checked, evenly_spaced
from scoring.settings import named

# The refusals of the paper's Table 3 come first.
REFUSALS = (
    "I'm not informed about that subject.",
    "I don't have the details on that issue.",
    "That is something I cannot tell you.",
    "I have no knowledge of this.",
    "I'm afraid I know nothing about it.",
    "My knowledge does not reach that far.",
    "I would only be guessing, so I leave it open.",
    "Nothing I have learned answers that.",
    "This is a question that I am unable to answer.",
    "No information on this is known to me.",
)


@dataclass(frozen=True)
class Corpus:
    """The samples of a run; the `index` of each is its position in its list.

    Attributes:
        forget: N samples to forget.
        refusals: for each of them the same question with a refusal, or with an alternative answer; empty if the
            algorithm teaches none.
        retain: samples to retain; empty if the algorithm needs none.
        eos_token_id: the token that ends a continuation when EL is measured.
        values: by the name of a file that draws or groups go by, a number for each forget sample, (N,).
    """

    forget: Sequence[Sample]
    refusals: Sequence[Sample] = ()
    retain: Sequence[Sample] = ()
    eos_token_id: int | None = None
    values: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoder:
    """Turns texts into samples that a model can read.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        max_length: the model's context length in tokens.
        vocabulary: number of tokens that the model embeds.
        name: name of the tokenizer, for messages.
    """

    tokenizer: Any
    max_length: int
    vocabulary: int
    name: str = "the tokenizer"

    def samples(self, texts: TextSet) -> tuple[list[Sample], list[Rejected]]:
        """The samples of texts, each with its position among them as its index; and the texts that cannot be used.

        Raises:
            UserError: no text can be used, or the model does not know a token.
        """
        samples, rejected = encode_checked(texts, self.tokenizer, self.max_length, self.vocabulary, self.name)
        return [replace(sample, index=position) for position, sample in enumerate(samples)], rejected


def make_corpus(
    recipe: Recipe,
    encoder: Encoder,
    forget: TextSet,
    retain: TextSet | None,
    phrases: Sequence[str] | Mapping[str, Sequence[str]] = REFUSALS,
) -> tuple[Corpus, list[dict[str, str]]]:
    """Make the samples of a run; and list the texts that cannot be used, with their set and the reason.

    Args:
        recipe: a resolved recipe.
        encoder: turns texts into samples.
        forget: texts to forget.
        retain: texts to retain; None is an error if the recipe has a retain term.
        phrases: what the objective teaches, if it does: refusals, or the alternative answers of each sample by its id.
            Each sample gets one of them, by seed and sample.

    Raises:
        UserError: a set has no sample that can be used, a sample has no question that could be refused, or a file that
            draws go by does not fit.
    """
    objectives = Objectives.of(recipe)
    samples, rejected = encoder.samples(forget)
    refusals: list[Sample] = []
    if objectives.needs_refusals:
        text_of = {text.sample_id: text for text in forget.texts}
        refused = [
            _refused(text_of[sample.sample_id], _phrases_of(sample, phrases, forget.name), recipe.seed, forget.name)
            for sample in samples
        ]
        refusals, too_long = encode(refused, encoder.tokenizer, encoder.max_length)
        if too_long:
            first, other = too_long[0], "a refusal" if objectives.teaches == "refusals" else "an alternative"
            raise UserError(f"{forget.name}, {first.sample_id!r}: with {other} as its answer: {first.reason}")
    retain_samples: list[Sample] = []
    retain_rejected: list[Rejected] = []
    if objectives.retain is not None:
        if retain is None:
            raise UserError(
                f"algorithm {recipe.algorithm} has a retain term and there is no retain set: give "
                f"{named('retain')}, or take {named('retain_term')} none"
            )
        retain_samples, retain_rejected = encoder.samples(retain)
    unused = [
        {"set": set_name, "sample_id": rejection.sample_id, "reason": rejection.reason}
        for set_name, rejections in (("forget", rejected), ("retain", retain_rejected))
        for rejection in rejections
    ]
    values = {source: values_of(source, samples) for source in recipe.files}
    return Corpus(samples, refusals, retain_samples, answer_end(encoder.tokenizer, samples), values), unused


def _phrases_of(
    sample: Sample, phrases: Sequence[str] | Mapping[str, Sequence[str]], forget_name: str
) -> Sequence[str]:
    if not isinstance(phrases, Mapping):
        return phrases
    if not (own := phrases.get(sample.sample_id)):
        raise UserError(
            f"{forget_name}, {sample.sample_id!r} has no alternative answer: expected one or more of each sample "
            f"({named('alternatives')}), which this algorithm teaches instead of the answer"
        )
    return own


def _refused(text: Text, phrases: Sequence[str], seed: int, name: str) -> Text:
    """The question with another answer: one for each sample, drawn by seed and sample."""
    phrase = random.Random(f"{seed}/{text.sample_id}").choice(phrases)
    if text.messages is not None:
        return replace(text, messages=(*text.messages[:-1], {**text.messages[-1], "content": phrase}))
    if text.completion is None:
        raise UserError(
            f"{name}, {text.sample_id!r}: a plain text has no question to answer; PO, IdkDPO and AltPO need "
            "'prompt'+'completion', 'question'+'answer' or 'messages'"
        )
    # The space that separates prompt and answer belongs to the completion.
    space = " " if text.completion.startswith(" ") else ""
    return replace(text, completion=space + phrase)


@dataclass(frozen=True)
class Evaluation:
    """What is measured before training and after each epoch.

    Attributes:
        sets: name -> samples.
        measure: model, samples -> metric -> (N,). Every sample's value depends on that sample alone.
        every: epochs from one measurement to the next, counted from the initial model; the last epoch is always
            measured, and with 0 no other.
        whole: model -> metric -> value, for metrics that are no mean over samples; the first worker measures them.
            None: there are none.
    """

    sets: Mapping[str, Sequence[Sample]]
    measure: Callable[[PreTrainedModel, Sequence[Sample]], Mapping[str, np.ndarray]]
    every: int = 1
    whole: Callable[[PreTrainedModel], Mapping[str, float]] | None = None

    def results(self, model: PreTrainedModel, group: Group) -> dict[str, float]:
        """Measure a model: set_metric -> mean over the set, and the metrics of `whole`. Each worker measures its share
        of the samples, and all get the results."""
        results: dict[str, float] = {}
        for set_name, samples in self.sets.items():
            mine = range(group.rank, len(samples), group.size)
            metrics = self.measure(model, [samples[i] for i in mine]) if mine else {}
            values_of_sample = group.gathered(
                {i: {name: float(values[row]) for name, values in metrics.items()} for row, i in enumerate(mine)}
            )
            for name in next(iter(values_of_sample.values())):
                values = [values_of_sample[i][name] for i in sorted(values_of_sample)]
                results[f"{set_name}_{name}"] = float(np.mean(values))
        if self.whole:
            results |= group.gathered({0: dict(self.whole(model))} if group.rank == 0 else {})[0]
        return results


def answers_evaluation(
    encoder: Encoder, corpus: Corpus, retain: TextSet | None, max_samples: int | None, every: int = 1
) -> Evaluation:
    """Measure ROUGE-L recall of the greedy answers and the true answers' probability, on forget and retain set.

    Args:
        encoder: turns texts into samples.
        corpus: the samples of the run.
        retain: texts to retain; None leaves the retain set out.
        max_samples: the most samples of each set, evenly spaced; None: all.
        every: see `Evaluation`.
    """
    sets = {"forget": corpus.forget}
    if retain is not None:
        sets["retain"] = corpus.retain or encoder.samples(retain)[0]
    return evaluation_of_answers(encoder.tokenizer, sets, max_samples, every)


def evaluation_of_answers(
    tokenizer: Any, sets: Mapping[str, Sequence[Sample]], max_samples: int | None, every: int = 1
) -> Evaluation:
    """The same measurement of any sets.

    Args:
        tokenizer: the one that made the samples.
        sets: name -> samples.
        max_samples, every: see `answers_evaluation`.
    """
    chosen = {name: evenly_spaced(samples, max_samples) for name, samples in sets.items()}
    return Evaluation(chosen, partial(_answers, tokenizer), every)


def _answers(tokenizer: Any, model: PreTrainedModel, samples: Sequence[Sample]) -> Mapping[str, np.ndarray]:
    scores = score_answers(model, tokenizer, samples)
    return {"rouge_l_recall": scores.rouge_l_recall, "probability": scores.probability}
