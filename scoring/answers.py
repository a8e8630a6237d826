"""What a model answers to questions: how much of the true answer it writes, and how likely that answer is to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from scoring.eval_mode import in_eval_mode
from scoring.generation import greedy_continuations
from scoring.logprob import scored_logprobs
from scoring.progress import advance, expect
from scoring.samples import Sample, answer_end, default_batch_tokens, make_batches

# How much longer than the true answer a written answer may be.
EXTRA_TOKENS = 20


@dataclass(frozen=True)
class AnswerScores:
    """N samples' scores, in the order of the samples.

    Attributes:
        rouge_l_recall: (N,) fp64, 0 to 1, of the greedy answer against the true one.
        probability: (N,) fp64, 0 to 1, of the true answer; see `answer_probability`.
    """

    rouge_l_recall: np.ndarray
    probability: np.ndarray


def score_answers(model: PreTrainedModel, tokenizer: Any, samples: Sequence[Sample]) -> AnswerScores:
    """Both scores of every sample. The model is in eval mode meanwhile, and afterwards in the mode it was in.

    Args:
        model: a causal LM.
        tokenizer: the one that made the samples.
        samples: N samples; the scored tokens are the true answer.

    Raises:
        UserError: a question does not fit into the model's context.
    """
    with in_eval_mode(model):
        written = written_answers(model, tokenizer, samples)
        probability = answer_probability(model, samples)
    return AnswerScores(rouge_l_recall(written, true_answers(tokenizer, samples)), probability)


def mean_probability(mean_nll: np.ndarray) -> np.ndarray:
    """exp(-L/|y|), the geometric mean of the answer tokens' probabilities; same shape as the mean NLL L/|y|."""
    return np.exp(-np.asarray(mean_nll, dtype=np.float64))


def rouge_l_recall(written: Sequence[str], truth: Sequence[str]) -> np.ndarray:
    """ROUGE-L recall: the share of the true answer's words that are written, in the same order.

        recall(w, y) = |longest common subsequence of w and y| / |y|

    Lin 2004, as the package rouge_score computes it with the Porter stemmer; what words are, see `scoring.rouge_words`.

    Args:
        written: N answers of a model.
        truth: N true answers.

    Returns:
        (N,) fp64, 0 to 1; 0 where either has no word.
    """
    return np.array([score.recall for score in _rouge_l(written, truth, stem=True)], dtype=np.float64)


def rouge_l_f1(written: Sequence[str], truth: Sequence[str]) -> np.ndarray:
    """ROUGE-L F1, the harmonic mean of recall and precision, of words as they stand, without a stemmer: as MUSE has it.

    Args and result are those of `rouge_l_recall`.
    """
    return np.array([score.fmeasure for score in _rouge_l(written, truth, stem=False)], dtype=np.float64)


def _rouge_l(written: Sequence[str], truth: Sequence[str], stem: bool) -> list[Any]:
    """Precision, recall and F1 of each answer, as rouge_score has them."""
    from rouge_score.rouge_scorer import RougeScorer  # loads nltk, which takes a while

    from scoring.rouge_words import Words

    scorer = RougeScorer(["rougeL"], tokenizer=Words(stem))
    return [
        scorer.score(target=true_answer, prediction=answer)["rougeL"]
        for answer, true_answer in zip(written, truth, strict=True)
    ]


@torch.no_grad()
def answer_probability(
    model: PreTrainedModel, samples: Sequence[Sample], batch_tokens: int | None = None
) -> np.ndarray:
    """exp(-L/|y|): the geometric mean of the probabilities of the scored tokens.

    Maini et al. 2024 (TOFU). L is the summed NLL of the |y| scored tokens, the end token among them.

    Args:
        model: a causal LM in eval mode.
        samples: N samples.
        batch_tokens: padded tokens in a batch; None: as many as suit the model's device.

    Returns:
        (N,) fp64, 0 to 1, in the order of `samples`.
    """
    device = next(model.parameters()).device
    probability = np.empty(len(samples))
    expect(len(samples))
    # Indices are renumbered: `samples` may be any part of the data set that they count.
    numbered = [replace(sample, index=i) for i, sample in enumerate(samples)]
    for batch in make_batches(numbered, batch_tokens or default_batch_tokens(device)):
        summed = scored_logprobs(model, batch.to(device)).double().sum(-1).cpu()
        probability[batch.indices.numpy()] = mean_probability(-(summed / batch.mask.sum(-1)).numpy())
        advance(len(batch))
    return probability


def written_answers(
    model: PreTrainedModel,
    tokenizer: Any,
    samples: Sequence[Sample],
    batch_tokens: int = 16384,
    extra_tokens: int = EXTRA_TOKENS,
) -> list[str]:
    """What the model writes after each sample's question by greedy decoding, up to the length of `answer_limits`.

    The question is all that stands before the first scored token.

    Args:
        model: a causal LM in eval mode.
        tokenizer: the one that made the samples; what ends an answer, see `scoring.samples.answer_end`.
        samples: N samples.
        batch_tokens: rows times (prompt + new) tokens in one batch.
        extra_tokens: see `answer_limits`.

    Returns:
        N texts without special tokens and surrounding white space, in the order of `samples`.

    Raises:
        UserError: a question does not fit into the model's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = answer_limits(samples, context, extra_tokens=extra_tokens)
    end = answer_end(tokenizer, samples)
    written = greedy_continuations(model, question_ids(samples), limits, end, batch_tokens)
    return [decoded(tokenizer, tokens) for tokens in written]


def question_ids(samples: Sequence[Sample]) -> list[np.ndarray]:
    """The token ids of all that stands before the first scored token."""
    return [sample.input_ids[: np.argmax(sample.scored)] for sample in samples]


def answer_limits(
    samples: Sequence[Sample], context: int | None, new_tokens: int | None = None, extra_tokens: int = EXTRA_TOKENS
) -> list[int]:
    """How many tokens may be written in answer to each sample's question.

    Args:
        samples: N samples; the scored tokens are the true answer.
        context: tokens that the model can read; None: no limit.
        new_tokens: the number wanted for every sample; None: `extra_tokens` more than its true answer has.
        extra_tokens: see `new_tokens`.

    Returns:
        N limits: the number wanted, or what the context has room for if that is less, but 1 at least, so that a
        question which does not fit is an error of generation and not an empty answer.
    """
    limits = [sample.num_scored + extra_tokens if new_tokens is None else new_tokens for sample in samples]
    if context is None:
        return limits
    # The last new token needs no position.
    room = [context + 1 - len(question) for question in question_ids(samples)]
    return [max(1, min(pair)) for pair in zip(limits, room, strict=True)]


def true_answers(tokenizer: Any, samples: Sequence[Sample]) -> list[str]:
    """The scored tokens of N samples as text, without special tokens and surrounding white space."""
    return [decoded(tokenizer, sample.input_ids[sample.scored]) for sample in samples]


def decoded(tokenizer: Any, tokens: np.ndarray) -> str:
    """Tokens as text, without special tokens and surrounding white space."""
    text: str = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    return text.strip()
