"""From text to token ids: which special tokens are added, and which tokens are the answer's.

One rule for all verbs. A text begins with what the tokenizer itself begins texts with: a BOS token, or nothing; and an
answer ends with its EOS token. A conversation has the special tokens that its template writes, and no others. What
people wrote is text, also where it reads like a special token; only a BOS that begins a text, and an EOS that ends one,
are taken for what they are, so that there never are two.

Prompt and answer are tokenized together, as in training. A token that reaches over the border belongs to the answer: it
cannot be known without it, and generation starts before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from scoring.templates import Template, Turn, rendered

Ids = list[int]
# The first tokens of the embedded models' tokenizers. They add none by themselves, and the models have learnt texts
# that begin with the first of them.
EMBEDDED = ["<s>", "</s>", "<pad>", "<unk>"]


class Tokenization:
    """The token ids of texts.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def text(self, text: str) -> tuple[Ids, Ids]:
        """What stands before a plain text, and the text's own tokens. It gets no EOS token: that it ends there was not
        memorised."""
        begin, text = self._begun(text)
        text, end = self._ended(text)
        return begin, self._spans(text)[0] + end

    def pair(self, prompt: str, completion: str) -> tuple[Ids, Ids]:
        """The tokens of a prompt, and those of its completion, the EOS token last."""
        begin, text = self._begun(prompt + completion)
        prompt = text[: max(0, len(text) - len(completion))]
        text, _ = self._ended(text)
        ids, spans = self._spans(text)
        border = self._border(ids, spans, prompt)
        return begin + ids[:border], ids[border:] + ([] if self._eos is None else [self._eos])

    def conversation(self, template: Template, turns: Sequence[Turn]) -> tuple[Ids, Ids]:
        """The tokens of a conversation before its last answer, and those of the answer through the special token that
        ends it, or through what else the template ends it with. What follows, such as a line feed, is left out: no
        model has to write it, and nothing that is scored sees it.

        Raises:
            UserError: see `scoring.templates.rendered`.
        """
        chat = rendered(template, self._tokenizer, turns, self._special)
        ids, spans = self._spans(chat.text, special=True)
        # Where the answer ends, and where the text does but for white space.
        places = chat.end, max(chat.end, len(chat.text.rstrip()))
        if spans is None:
            border = self._border(ids, None, chat.text[: chat.start], special=True)
            after, last = (len(ids) - len(self._spans(chat.text[place:], special=True)[0]) for place in places)
        else:
            ids, spans = self._as_text(ids, spans, chat.text, chat.literals)
            border = self._border(ids, spans, chat.text[: chat.start])
            after, last = (sum(start < place for start, _ in spans) for place in places)
        end = next((place + 1 for place in range(after, len(ids)) if ids[place] in self._added), last)
        return ids[:border], ids[border:end]

    @cached_property
    def begin(self) -> Ids:
        """What the tokenizer puts before a text: its BOS token, or nothing."""
        bare, full = self._spans("a")[0], list(self._tokenizer("a", verbose=False)["input_ids"])
        places = (n for n in range(len(full) - len(bare) + 1) if full[n : n + len(bare)] == bare)
        return [self._bos] if self.begin_is_unsaid else full[: next(places, 0)]

    @cached_property
    def begin_is_unsaid(self) -> bool:
        """Whether texts begin with a BOS token that the tokenizer itself does not put there."""
        tokenizer = self._tokenizer
        adds = list(tokenizer("a", verbose=False)["input_ids"]) != self._spans("a")[0]
        return not adds and self._bos == 0 and tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == EMBEDDED

    @cached_property
    def _added(self) -> set[int]:
        return {*self._tokenizer.added_tokens_decoder, *self._tokenizer.all_special_ids}

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """Matches the special tokens in a text."""
        added = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        names = sorted({*added, *self._tokenizer.all_special_tokens}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    def _begun(self, text: str) -> tuple[Ids, str]:
        """What stands before a text, and the text without a BOS token of its own."""
        bos = self._tokenizer.bos_token
        return ([self._bos], text[len(bos) :]) if bos and text.startswith(bos) else (self.begin, text)

    def _ended(self, text: str) -> tuple[str, Ids]:
        """A text without an EOS token of its own, and that token."""
        eos = self._tokenizer.eos_token
        return (text[: -len(eos)], [self._eos]) if eos and text.endswith(eos) else (text, [])

    def _spans(self, text: str, special: bool = False) -> tuple[Ids, list[tuple[int, int]] | None]:
        """The ids of a text, and where each token begins and ends in it; None for tokenizers that do not say.

        Args:
            special: special tokens in the text are such, and not text.
        """
        fast = bool(getattr(self._tokenizer, "is_fast", False))
        found = self._tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=not special,
            return_offsets_mapping=fast,
            verbose=False,
        )
        return list(found["input_ids"]), [(start, end) for start, end in found["offset_mapping"]] if fast else None

    def _border(self, ids: Ids, spans: Sequence[tuple[int, int]] | None, prompt: str, special: bool = False) -> int:
        """How many tokens are the prompt's. Without their places: those that the prompt has by itself."""
        if spans is not None:
            return next((place for place, (_, end) in enumerate(spans) if end > len(prompt)), len(ids))
        alone = self._spans(prompt, special)[0]
        same = (place for place, (one, other) in enumerate(zip(ids, alone, strict=False)) if one != other)
        return next(same, min(len(ids), len(alone)))

    def _as_text(
        self, ids: Ids, spans: Sequence[tuple[int, int]], text: str, literals: Sequence[tuple[int, int]]
    ) -> tuple[Ids, list[tuple[int, int]]]:
        """The same with the special tokens at these places tokenized as text."""
        places = set(literals)
        split: list[tuple[int, tuple[int, int]]] = []
        for token, span in zip(ids, spans, strict=True):
            is_text = span in places and token in self._added
            tokens = self._spans(text[slice(*span)])[0] if is_text else [token]
            split += [(each, span) for each in tokens]
        return [token for token, _ in split], [span for _, span in split]
