"""What a model has written, judged as RWKU and LUME judge it: plain functions of texts."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
ANSWER = re.compile(r"[tT]he answer is (.*?)\.")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def first_line(text: str) -> str:
    """Up to the first line break, where RWKU's code stops writing."""
    return text.strip().partition("\n")[0].strip()


def union_recall(written: str, truth: str) -> float:
    """ROUGE-L recall of whole texts, as the package `rouge` has it, which RWKU's code uses.

    A text is cut into sentences at every full stop, and these into words at white space; case and commas count.
    The words of the longest common subsequences of all pairs of sentences, each word once, over the different words of
    the truth. 0 where either has no word.
    """
    known, said = _sentences(truth), _sentences(written)
    words = {word for sentence in known for word in sentence}
    common = {word for one in known for other in said for word in _common_subsequence(one, other)}
    return len(common) / len(words) if words else 0.0


def _sentences(text: str) -> list[list[str]]:
    # White space between two full stops is a sentence of one empty word there.
    return [part.split() or [""] for part in text.split(".") if part]


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> Iterator[str]:
    """The words of the longest common subsequence; of several the one that the package `rouge` finds."""
    lengths = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, word in enumerate(one, start=1):
        for j, opposite in enumerate(other, start=1):
            same = word == opposite
            lengths[i, j] = lengths[i - 1, j - 1] + 1 if same else max(lengths[i - 1, j], lengths[i, j - 1])
    i, j = len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            yield one[i - 1]
            i, j = i - 1, j - 1
        elif lengths[i - 1, j] > lengths[i, j - 1]:
            i -= 1
        else:
            j -= 1


def is_exactly(written: str, truth: str) -> float:
    """1 where the answers are equal but for case and the white space around them, else 0; as LUME counts."""
    return float(written.strip().lower() == truth.strip().lower())


def reasoned_answer(written: str) -> str:
    """What stands after "the answer is", up to the next full stop; without that all that was written."""
    found = ANSWER.search(written)
    return found[1].strip() if found else written.strip()


def same_words(written: str, truth: str) -> float:
    """1 where both have the same words, as `plain_words` has them, else 0."""
    return float(plain_words(written) == plain_words(truth))


def best_f1(written: str, truths: Sequence[str]) -> float:
    """F1 of the words that answers share, order aside; against the nearest of several true answers."""
    return max(_f1(plain_words(written), plain_words(truth)) for truth in truths)


def _f1(one: Sequence[str], other: Sequence[str]) -> float:
    if not one or not other:
        return float(not one and not other)
    shared = sum((Counter(one) & Counter(other)).values())
    return 2 * shared / (len(one) + len(other))


def plain_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def n_gram_entropy(text: str) -> float:
    """How varied a text is: the mean of 2/3 of its bigrams' and 4/3 of its trigrams' entropy, in bits.

    Words are those of NLTK's tokenizer of the Penn Treebank. 0 of a text that has fewer than two words.
    """
    from nltk.tokenize import NLTKWordTokenizer  # takes a while to load

    words = NLTKWordTokenizer().tokenize(text)
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[place:] for place in range(n)), strict=False))
    shares = np.array(list(counts.values()), dtype=np.float64) / max(1, counts.total())
    return float(-(shares * np.log2(shares)).sum()) if counts else 0.0
