"""From texts to the samples that a run trains on: what is forgotten, the refusals that answer it, what is kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from algorithms.recipe import Objectives, Recipe
from scoring.answers import score_answers
from scoring.errors import UserError
from scoring.samples import Rejected, Sample, Text, TextSet, check_tokens, encode, evenly_spaced
from scoring.settings import named

# Refusals of the paper's Table 3 come first.
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
    """The samples; every `index` is the position in its list.

    Attributes:
        forget: N samples to be forgotten.
        refusals: for each of them the same question with a refusal; empty if the algorithm needs none.
        retain: samples to be kept; empty if the algorithm needs none.
        eos_token_id: ends a continuation when EL is measured.
    """

    forget: Sequence[Sample]
    refusals: Sequence[Sample] = ()
    retain: Sequence[Sample] = ()
    eos_token_id: int | None = None


@dataclass(frozen=True)
class Encoder:
    """What turns texts into samples that a model can take.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        max_length: the model's context length in tokens.
        vocabulary: tokens that the model embeds.
        name: of the tokenizer, for messages.
    """

    tokenizer: Any
    max_length: int
    vocabulary: int
    name: str = "the tokenizer"

    def samples(self, texts: TextSet) -> tuple[list[Sample], list[Rejected]]:
        """Samples whose index is their position among those that could be encoded.

        Raises:
            UserError: none could, or the model does not know a token.
        """
        samples, rejected = encode(texts.texts, self.tokenizer, self.max_length)
        largest = max((int(sample.input_ids.max()) for sample in samples), default=-1)
        check_tokens(len(samples), largest, rejected, self.vocabulary, self.name, texts.name)
        return [replace(sample, index=place) for place, sample in enumerate(samples)], rejected


def make_corpus(
    recipe: Recipe, encoder: Encoder, forget: TextSet, retain: TextSet | None, phrases: Sequence[str] = REFUSALS
) -> tuple[Corpus, list[dict[str, str]]]:
    """The samples of a resolved recipe; and those that cannot be used, with their set and the reason.

    Args:
        phrases: of which each sample gets one, by seed and sample, where the objective needs refusals.

    Raises:
        UserError: a set has no sample that can be used, or a sample has no question that could be refused.
    """
    objectives = Objectives.of(recipe)
    samples, rejected = encoder.samples(forget)
    refusals: list[Sample] = []
    if objectives.needs_refusals:
        texts = {text.sample_id: text for text in forget.texts}
        refused = [_refused(texts[sample.sample_id], phrases, recipe.seed, forget.name) for sample in samples]
        refusals, unfit = encode(refused, encoder.tokenizer, encoder.max_length)
        if unfit:
            raise UserError(f"{forget.name}, {unfit[0].sample_id!r}: with a refusal as its answer: {unfit[0].reason}")
    kept: list[Sample] = []
    also_rejected: list[Rejected] = []
    if objectives.retain is not None:
        if retain is None:
            raise UserError(
                f"algorithm {recipe.algorithm} has a retain term and there is no retain set: give "
                f"{named('retain')}, or take {named('retain_term')} none"
            )
        kept, also_rejected = encoder.samples(retain)
    unused = [
        {"set": name, "sample_id": each.sample_id, "reason": each.reason}
        for name, group in (("forget", rejected), ("retain", also_rejected))
        for each in group
    ]
    return Corpus(samples, refusals, kept, encoder.tokenizer.eos_token_id), unused


def _refused(text: Text, phrases: Sequence[str], seed: int, name: str) -> Text:
    """The question with a refusal for an answer: one for each sample, drawn by seed and sample."""
    phrase = random.Random(f"{seed}/{text.sample_id}").choice(phrases)
    if text.messages is not None:
        return replace(text, messages=(*text.messages[:-1], {**text.messages[-1], "content": phrase}))
    if text.completion is None:
        raise UserError(
            f"{name}, {text.sample_id!r}: a plain text has no question to refuse; PO and IdkDPO need "
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
        every: epochs from one measurement to the next, from the initial model on; the last is always made, and 0 makes
            no other.
        whole: model -> metric -> value, of what is no mean over samples; the first worker measures it. None: none.
    """

    sets: Mapping[str, Sequence[Sample]]
    measure: Callable[[PreTrainedModel, Sequence[Sample]], Mapping[str, np.ndarray]]
    every: int = 1
    whole: Callable[[PreTrainedModel], Mapping[str, float]] | None = None


def answers_evaluation(
    encoder: Encoder, corpus: Corpus, retain: TextSet | None, most: int | None, every: int = 1
) -> Evaluation:
    """ROUGE-L recall of the greedy answers and the true answers' probability, on the forget and the retain set.

    Args:
        retain: what is to be kept; None leaves it out.
        most: samples of each set, evenly spaced; None: all.
        every: see Evaluation.
    """
    sets = {"forget": evenly_spaced(corpus.forget, most)}
    if retain is not None:
        sets["retain"] = evenly_spaced(corpus.retain or encoder.samples(retain)[0], most)
    return Evaluation(sets, partial(_answers, encoder.tokenizer), every)


def _answers(tokenizer: Any, model: PreTrainedModel, samples: Sequence[Sample]) -> Mapping[str, np.ndarray]:
    scores = score_answers(model, tokenizer, samples)
    return {"rouge_l_recall": scores.rouge_l_recall, "probability": scores.probability}
