"""How much of a sample a model has memorised: MA, EL_n, extraction strength, Min-k% and Min-k%++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from scoring.errors import UserError, unknown_name
from scoring.generation import greedy_continuations_within
from scoring.logprob import scored_logits
from scoring.samples import Batch, Sample, make_batches

Denominator = Literal["generated", "reference"]
DENOMINATORS: tuple[Denominator, ...] = ("generated", "reference")


@torch.no_grad()
def memorization_accuracy(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """MA: the share of scored tokens that the model predicts, in one teacher-forced pass.

        MA(x) = Sum_t 1{argmax f(. | x_<t; theta) = x_t} / (number of scored tokens)

    Tirumala et al. 2022; the paper scores all tokens but the first. Of tied logits the one that argmax returns
    counts.

    Args:
        model: a causal LM in eval mode.
        batch: B samples on the model's device.

    Returns:
        (B,) fp64, between 0 and 1.
    """
    hits = (scored_logits(model, batch).argmax(-1) == batch.targets) & batch.mask
    return hits.sum(-1).double() / batch.mask.sum(-1)


def ngram_overlap(
    generated: Sequence[int] | np.ndarray,
    reference: Sequence[int] | np.ndarray,
    n: int,
    denominator: Denominator = "generated",
) -> float:
    """OVERLAP_n: the share of the n-grams of `generated` that occur in `reference`.

        OVERLAP_n(a, b) = Sum_{c in ng(a)} 1{c in ng(b)} / |ng(a)|

    Jang et al. 2023. ng is a list: an n-gram counts as often as it is generated.

    Args:
        generated: a, token ids.
        reference: b, token ids.
        n: tokens in an n-gram.
        denominator: "generated" divides by |ng(a)|, as printed; "reference" by |ng(b)|, as the code that Jang
            et al. published does, which marks a continuation down for ending early.

    Returns:
        0 to 1 (with "reference", where `generated` is no longer than `reference`); 0 where either has fewer
        than n tokens and so no n-grams.

    Raises:
        UserError: n below 1, or an unknown denominator.
    """
    _check_ngrams(n, denominator)
    in_generated, in_reference = _ngrams(generated, n), _ngrams(reference, n)
    if not in_generated or not in_reference:
        return 0.0
    known = set(in_reference)
    count = len(in_generated if denominator == "generated" else in_reference)
    return sum(ngram in known for ngram in in_generated) / count


def _check_ngrams(n: int, denominator: str) -> None:
    if n < 1:
        raise UserError(f"n is {n}: expected the number of tokens in an n-gram, 1 or more")
    if denominator not in DENOMINATORS:
        raise unknown_name("denominator", denominator, DENOMINATORS)


def _ngrams(tokens: Sequence[int] | np.ndarray, n: int) -> list[tuple[int, ...]]:
    ids = np.asarray(tokens).tolist()
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def extraction_likelihood(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    n: int = 10,
    eos_token_id: int | None = None,
    denominator: Denominator = "generated",
    scored_only: bool = False,
    batch_tokens: int = 16384,
) -> torch.Tensor:
    """EL_n: how much of the rest of a sample the model writes by itself, averaged over where it begins.

        EL_n(x) = (1/(T-n)) Sum_{t=1}^{T-n} OVERLAP_n(greedy continuation of x_<t, x_>=t)

    Jang et al. 2023. Here t is the length of the prefix: 1, ..., T-n, the longest that leaves n tokens. A
    continuation has at most |x_>=t| tokens; the end token, if it comes, is the last of them, so that a sample
    which ends with it and is reproduced throughout scores 1.

    Where the model predicts the true next token nothing has to be decoded: greedy decoding from x_<t is then
    x_t followed by greedy decoding from one token later. One teacher-forced pass finds the tokens that the
    model gets wrong, and it has to write only from those, which for a memorised sample are few.

    Args:
        model: a causal LM in eval mode.
        samples: B samples.
        n: tokens in an n-gram.
        eos_token_id: the token that ends a continuation; None: only the limit ends one.
        denominator: see `ngram_overlap`.
        scored_only: False: prefixes of the whole sequence, as in the paper, so also those that end inside the
            question. True: the shortest prefix is all that stands before the first scored token, and the
            average is over the prefixes that are left.
        batch_tokens: padded tokens decoded at a time.

    Returns:
        (B,) fp64 on the CPU in the order of `samples`, 0 to 1; nan where no prefix leaves n tokens (T <= n).
        A continuation of fewer than n tokens has no n-grams: its overlap is 0.

    Raises:
        UserError: n below 1, or an unknown denominator.
    """
    return extraction(model, samples, n, eos_token_id, denominator, scored_only, batch_tokens).likelihood


@dataclass(frozen=True)
class Extraction:
    """What an attempt to extract samples has found, and what it took.

    Attributes:
        likelihood: EL_n, see `extraction_likelihood`.
        tokens: that it read and wrote, as if each text were read once: in however many batches that really was, so that
            nothing that goes by this number depends on their size.
    """

    likelihood: torch.Tensor
    tokens: int


def extraction(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    n: int,
    eos_token_id: int | None,
    denominator: Denominator = "generated",
    scored_only: bool = False,
    batch_tokens: int = 16384,
) -> Extraction:
    """The same with what it took; see `extraction_likelihood`."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def hits(batch: Batch) -> np.ndarray:
        batch = batch.to(device)
        return (scored_logits(model, batch).argmax(-1) == batch.targets).cpu().numpy()

    def write(texts: Sequence[np.ndarray], starts: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        return greedy_continuations_within(model, texts, starts, eos_token_id, batch_tokens)

    # Smaller batches than for decoding: logits are computed at every position, not only at the last.
    hit_tokens = max(1, batch_tokens // 8)
    return extraction_by(hits, write, samples, hit_tokens, n, eos_token_id, denominator, scored_only)


def extraction_by(
    hits: Callable[[Batch], np.ndarray],
    write: Callable[[Sequence[np.ndarray], Sequence[tuple[int, int]]], list[np.ndarray]],
    samples: Sequence[Sample],
    batch_tokens: int,
    n: int = 10,
    eos_token_id: int | None = None,
    denominator: Denominator = "generated",
    scored_only: bool = False,
) -> Extraction:
    """EL_n of any model that gives hits and continuations, whatever its engine; see `extraction_likelihood`.

    Args:
        hits: whether each scored token of a batch is the model's most likely one, (B, S) bool.
        write: greedy continuations of texts, from positions within them up to the texts' own lengths, without the end
            token; see `scoring.generation.greedy_continuations_within`.
        batch_tokens: padded tokens in a batch for `hits`.
    """
    _check_ngrams(n, denominator)
    # The shortest prefix of each sample; and for it and each longer one, where its continuation leaves the text.
    firsts = [int(np.argmax(s.scored)) if scored_only else 1 for s in samples]
    departures = [
        _departures(sample, predicted)[first - 1 : max(0, sample.length - n)]
        for sample, predicted, first in zip(samples, _predicted(hits, samples, batch_tokens), firsts, strict=True)
    ]
    starts = [
        (row, int(at)) for row, sample in enumerate(samples) for at in np.unique(departures[row]) if at < sample.length
    ]
    written = write([sample.input_ids for sample in samples], starts)
    # A continuation shorter than what is left of its text has ended with the end token.
    continuations = {
        (row, at): tokens
        if eos_token_id is None or len(tokens) == samples[row].length - at
        else np.append(tokens, eos_token_id)
        for (row, at), tokens in zip(starts, written, strict=True)
    }
    nothing = np.empty(0, dtype=np.int64)

    scores = []
    for row, (sample, first) in enumerate(zip(samples, firsts, strict=True)):
        overlaps = []
        for start, at in enumerate(departures[row].tolist(), start=first):
            generated = np.concatenate([sample.input_ids[start:at], continuations.get((row, at), nothing)])
            generated = _through_end(generated, eos_token_id)
            overlaps.append(ngram_overlap(generated, sample.input_ids[start:], n, denominator))
        scores.append(np.mean(overlaps) if overlaps else np.nan)
    read = sum(sample.length for sample in samples) + sum(samples[row].length for row in {row for row, _ in starts})
    return Extraction(torch.tensor(scores, dtype=torch.float64), read + sum(map(len, written)))


def _departures(sample: Sample, predicted: np.ndarray) -> np.ndarray:
    """For prefixes of 1 to T-1 tokens, the position of the next token that is predicted wrongly; T if none is."""
    wrong = np.where(predicted, sample.length, np.arange(1, sample.length))
    return np.minimum.accumulate(wrong[::-1])[::-1]


def _through_end(tokens: np.ndarray, eos_token_id: int | None) -> np.ndarray:
    """The tokens up to and including the first end token."""
    ends = [] if eos_token_id is None else np.flatnonzero(tokens == eos_token_id).tolist()
    return tokens[: ends[0] + 1] if ends else tokens


def _predicted(hits: Callable[[Batch], np.ndarray], samples: Sequence[Sample], batch_tokens: int) -> list[np.ndarray]:
    """Whether the model's argmax is the true token, for every token but the first, (T-1,) for each sample."""
    all_scored = []
    for i, sample in enumerate(samples):
        scored = np.ones(sample.length, dtype=bool)
        scored[0] = False
        all_scored.append(replace(sample, scored=scored, index=i))
    predicted: list[np.ndarray] = [np.empty(0, dtype=bool)] * len(samples)
    for batch in make_batches(all_scored, batch_tokens):
        for i, row in zip(batch.indices.tolist(), hits(batch), strict=True):
            predicted[i] = row[: samples[i].length - 1]
    return predicted


def extraction_strength(hits: np.ndarray) -> float:
    """ES: 1 less the share of a sample's tokens in the shortest prefix after which the greedy rest is all right.

        ES(x) = 1 - (1/n) min{k : argmax f(. | x_<t) = x_t for all t >= k},  0 <= k < n

    Carlini et al. 2021, by teacher forcing, which is the same: greedy decoding stays on the text as long as every
    token is right. As in open-unlearning the prefix is one of at most n - 1 tokens, so that a sample whose last token
    is wrong has 1/n.

    Args:
        hits: (n,) bool, whether each token is the most likely one.

    Returns:
        1/n to 1; 0 for a sample without tokens.
    """
    if not len(hits):
        return 0.0
    wrong = np.flatnonzero(~hits)
    prefix = min(int(wrong[-1]) + 1, len(hits) - 1) if len(wrong) else 0
    return 1 - prefix / len(hits)


# The least variance of log p that Min-k%++ divides by: below, one token has all the mass, and nothing is told apart.
LEAST_VARIANCE = 1e-6


def min_k_plus_plus(logprobs: np.ndarray, means: np.ndarray, deviations: np.ndarray, k: float = 0.2) -> float:
    """Min-k%++: Min-k% of log-probs that are standardised by mean and standard deviation over the vocabulary.

    Zhang et al. 2024, with the sign turned: higher means less likely to have been trained on.

    Args:
        logprobs: (n,) of a sample's tokens, nats.
        means, deviations: (n,) of log p over the vocabulary, nats; variances below LEAST_VARIANCE count as that.
        k: the share of tokens, in (0, 1].
    """
    scores = torch.from_numpy((logprobs - means) / np.sqrt(np.maximum(deviations**2, LEAST_VARIANCE)))[None]
    return float(min_k_percent(scores, torch.ones_like(scores, dtype=torch.bool), k).item())


def min_k_percent(logprobs: torch.Tensor, mask: torch.Tensor, k: float = 0.2) -> torch.Tensor:
    """Min-k%: the mean of the lowest max(1, floor(k n)) of a sample's n log-probs, negated.

    Shi et al. 2023, with the sign turned: higher means less likely to have been trained on.

    Args:
        logprobs: (B, S) log-probs of the scored tokens, nats.
        mask: (B, S) bool, which entries are tokens.
        k: the share of tokens, in (0, 1].

    Returns:
        (B,) fp64 nats, >= 0; nan for a row without tokens.

    Raises:
        UserError: k outside (0, 1].
    """
    if not 0 < k <= 1:
        raise UserError(f"min-k% got k = {k:g}: expected a share of tokens in (0, 1], such as 0.2")
    # 0.29 * 100 is 28.999999999999996: the small addend keeps floor from losing a token to rounding.
    counts = (k * mask.sum(-1).double() + 1e-9).floor().clamp_min(1).unsqueeze(-1)
    # nan sorts behind every number.
    ascending = logprobs.double().masked_fill(~mask, torch.nan).sort(-1).values
    lowest = torch.arange(ascending.shape[-1], device=mask.device) < counts
    return -torch.where(lowest, ascending, 0.0).sum(-1) / counts.squeeze(-1)
