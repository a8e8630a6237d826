"""The words that ROUGE counts, in every script.

The package rouge_score knows a-z and 0-9 alone: an answer in Chinese has no word there, and counts as forgotten before
any unlearning. Its words stay as they are, accents between them too, so that numbers compare with others'; letters of
other scripts are added. Scripts that write spaces have words, and of those that do not each character counts as one.
"""

from __future__ import annotations

import unicodedata

import regex
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

SCRIPTS_WITHOUT_SPACES = ("Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
WITHOUT_SPACES = "".join(rf"\p{{scx={script}}}" for script in SCRIPTS_WITHOUT_SPACES)
HALF_WIDTH_KANA = regex.compile("[\uff65-\uff9f]+")
WORD = regex.compile(
    rf"(?P<latin>[a-z0-9]+)|[[\p{{L}}\p{{N}}]&&[{WITHOUT_SPACES}]]\p{{M}}*"
    rf"|(?:[[\p{{L}}\p{{N}}]--[0-9\p{{Latin}}{WITHOUT_SPACES}]]\p{{M}}*)+",
    regex.VERSION1,
)


class Words(Tokenizer):  # type: ignore[misc]
    """Splits a text for rouge_score; words of a-z are stemmed as by its own tokenizer, or stay as they are."""

    def __init__(self, stem: bool = True) -> None:
        self._latin = DefaultTokenizer(use_stemmer=stem)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in their order."""
        words: list[str] = []
        text = HALF_WIDTH_KANA.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text.lower())
        for match in WORD.finditer(text):
            if match["latin"]:
                words += self._latin.tokenize(match[0])
            else:
                # A letter and its signs in one character or in several are the same letter.
                words.append(unicodedata.normalize("NFKC", match[0]))
        return words
