"""Characteristics of a sample's text: length, syntactic complexity, occurrence frequency, rare words.

The attributes by which the paper groups samples in Table 11. It does not say how it measured them; these are
counts that can be checked by hand, against a reference corpus (the fine-tuning set, say), without a model or
a parser. The markers and function words are English.

The fourth attribute, the initial generation probability, is the model's: `initial_probability`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scoring.errors import UserError

# Words that open a subordinate clause. Without a parser, "that" counts also where it is a pronoun.
_MARKERS = """
    after although as because before if once since so than that though unless until what when whenever where
    whereas wherever whether which while who whoever whom whose why
"""
# Words that carry no content of their own; content-word n-grams skip them, and the markers.
_FUNCTION_WORDS = """
    a about above against all also am an and any are at be been being below between both but by can
    could did do does doing down during each either few for from further had has have having he her
    here hers herself him himself his how i in into is it its itself just may me might more most
    must my myself neither no nor not of off on only onto or other our ours ourselves out over own
    per same shall she should some such the their theirs them themselves then there these they this
    those through to too under up upon us very via was we were will with within without would yes
    yet you your yours yourself yourselves
"""
SUBORDINATE_MARKERS = frozenset(_MARKERS.split())
FUNCTION_WORDS = SUBORDINATE_MARKERS | frozenset(_FUNCTION_WORDS.split())

_WORD = re.compile(r"[^\W_]+(?:['\-][^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+")
_SEPARATOR = re.compile(r"[,;]")


@dataclass(frozen=True)
class Characteristics:
    """The attributes of one text.

    Attributes:
        words: number of words: runs of letters and digits, "well-known" being one; possessive 's is dropped.
        tokens: number of the model's tokens; None without a tokenizer.
        subordinate_markers: words that open a subordinate clause, per sentence. The word that opens a
            question ("Where was ...?") is not one.
        separators: commas and semicolons, per sentence.
        words_per_clause: words / (sentences + subordinate markers + semicolons).
        syntactic_complexity: the mean of the three numbers above, each standardised over the corpus: 0 for a
            text as complex as the corpus is on average, 1 for one a standard deviation above it throughout.
        exact_repetitions: texts of the corpus with the same words in the same order; the sample's own record
            counts if the corpus contains it.
        occurrence_frequency: mean of log(1 + count) over the text's content-word trigrams, count being how
            often the corpus has the trigram. Fewer than three content words are taken as one n-gram; nan
            without any.
        rare_words: share of the text's words that the corpus has fewer than `rare_below` times; nan without
            words.
    """

    words: int
    tokens: int | None
    subordinate_markers: float
    separators: float
    words_per_clause: float
    syntactic_complexity: float
    exact_repetitions: int
    occurrence_frequency: float
    rare_words: float


def characteristics(
    texts: Sequence[str],
    corpus: Iterable[str],
    rare_below: int = 5,
    count_tokens: Callable[[str], int] | None = None,
) -> list[Characteristics]:
    """The attributes of each text, which depend on that text and the corpus alone.

    Args:
        texts: the samples' texts, question and answer joined by a space or newline.
        corpus: the reference texts; read once.
        rare_below: a word with fewer occurrences in the corpus is rare.
        count_tokens: gives the number of the model's tokens in a text.

    Returns:
        One record per text, in order.

    Raises:
        UserError: the corpus contains no words.
    """
    reference = _Reference(corpus)
    return [_describe(text, reference, rare_below, count_tokens) for text in texts]


def initial_probability(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The geometric mean of the scored tokens' probabilities, exp((1/n) Sum_t P_t), before any unlearning.

    The mean takes out the length, which the probability of the whole text would mostly measure.

    Args:
        logprobs: (B, S) log-probs of the scored tokens, nats.
        mask: (B, S) bool, which entries are tokens.

    Returns:
        (B,) fp64 in [0, 1]; nan for a row without tokens.
    """
    return (logprobs.double().masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)).exp()


class _Reference:
    """Counts over the reference corpus."""

    def __init__(self, corpus: Iterable[str]) -> None:
        self.words: Counter[str] = Counter()
        self.texts: Counter[tuple[str, ...]] = Counter()
        self.ngrams: Counter[tuple[str, ...]] = Counter()
        syntax = []
        for text in corpus:
            words = _words(text)
            content = _content(words)
            self.words.update(words)
            self.texts[tuple(words)] += 1
            for n in (1, 2, 3):
                self.ngrams.update(_ngrams(content, n))
            syntax.append(_syntax(text))
        if not self.words:
            raise UserError("the reference corpus contains no words: expected the texts to count occurrences in")
        self.syntax_mean = np.mean(syntax, axis=0)
        self.syntax_std = np.std(syntax, axis=0)


def _describe(
    text: str, reference: _Reference, rare_below: int, count_tokens: Callable[[str], int] | None
) -> Characteristics:
    words = _words(text)
    content = _content(words)
    syntax = _syntax(text)
    # A component that does not vary over the corpus tells nothing: it adds 0.
    scale = np.where(reference.syntax_std > 0, reference.syntax_std, np.inf)
    counts = [reference.ngrams[gram] for gram in _ngrams(content, min(3, len(content)))] if content else []
    rare = [reference.words[word] < rare_below for word in words]
    return Characteristics(
        words=len(words),
        tokens=None if count_tokens is None else count_tokens(text),
        subordinate_markers=syntax[0],
        separators=syntax[1],
        words_per_clause=syntax[2],
        syntactic_complexity=float(np.mean((np.array(syntax) - reference.syntax_mean) / scale)),
        exact_repetitions=reference.texts[tuple(words)],
        occurrence_frequency=float(np.mean(np.log1p(counts))) if counts else np.nan,
        rare_words=float(np.mean(rare)) if rare else np.nan,
    )


def _words(text: str) -> list[str]:
    """Lower-case words; composed and decomposed accents are one spelling, and so are "Lane" and "Lane's"."""
    words = _WORD.findall(unicodedata.normalize("NFC", text).casefold().replace("’", "'"))
    return [word.removesuffix("'s") for word in words]


def _content(words: Sequence[str]) -> list[str]:
    return [word for word in words if word not in FUNCTION_WORDS]


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _syntax(text: str) -> tuple[float, float, float]:
    """Subordinate markers per sentence, separators per sentence, words per clause."""
    sentences = [s for s in _SENTENCE_END.split(text) if _WORD.search(s)]
    num_words = markers = 0
    for sentence in sentences:
        words = _words(sentence)
        num_words += len(words)
        is_question = sentence.rstrip("\"'”’)] \n").endswith("?")
        markers += sum(word in SUBORDINATE_MARKERS for word in (words[1:] if is_question else words))
    if not sentences:
        return 0.0, 0.0, 0.0
    clauses = len(sentences) + markers + text.count(";")
    return markers / len(sentences), len(_SEPARATOR.findall(text)) / len(sentences), num_words / clauses
