"""What changed between two answers, word by word, and letters that would do something instead of being seen."""

from __future__ import annotations

import unicodedata
from difflib import SequenceMatcher
from enum import IntEnum

import regex

from scoring.rouge_words import WITHOUT_SPACES

# A word, or a single character of a script that writes no spaces, or a single sign; with the white space behind it.
# White space at the very beginning stands by itself.
_TOKEN = regex.compile(
    rf"(?:[[\p{{L}}\p{{N}}]&&[{WITHOUT_SPACES}]]\p{{M}}*|(?:[[\p{{L}}\p{{N}}]--[{WITHOUT_SPACES}]][\p{{M}}]*)+|\S)\s*|\A\s+",
    regex.VERSION1,
)
# Invisible, and needed: they join letters in Persian, Indic scripts and emoji.
_JOINERS = "\u200c\u200d"


class Kind(IntEnum):
    """What became of a piece of text."""

    REMOVED = -1
    KEPT = 0
    ADDED = 1


Pieces = list[tuple[Kind, str]]


def pieces(base: str | None, answer: str) -> Pieces:
    """An answer as pieces, by how it differs from another text, word by word.

    What is kept and added gives the answer, to the letter; what differs in white space alone is kept.

    Args:
        base: what it is compared with; None: with nothing, and all of it is kept.
    """
    if base is None or base == answer:
        return [(Kind.KEPT, answer)] if answer else []
    old, new = _TOKEN.findall(base), _TOKEN.findall(answer)
    matcher = SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new], autojunk=False)
    found: Pieces = []
    for change, start, end, new_start, new_end in matcher.get_opcodes():
        kept = change == "equal"
        if not kept and start < end:
            found.append((Kind.REMOVED, "".join(old[start:end])))
        if new_start < new_end:
            found.append((Kind.KEPT if kept else Kind.ADDED, "".join(new[new_start:new_end])))
    return found


def visible(text: str) -> str:
    """Text in which every character is seen and none does anything: control characters become their symbols, and marks
    of direction, separators of lines and other characters without a glyph their numbers. Line feeds and tabs stay."""
    return "".join(_seen(letter) for letter in text)


def _seen(letter: str) -> str:
    category = unicodedata.category(letter)
    if category not in ("Cc", "Cf", "Cs", "Zl", "Zp") or letter in "\n\t" or letter in _JOINERS:
        return letter
    code = ord(letter)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"⟨U+{code:04X}⟩"
