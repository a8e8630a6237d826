"""Which tokens belong to the identity of data.

Earlier versions hashed the words alone, and made tokens of them by a rule that did not follow the tokenizer. Their
results stay valid where both rules give the same tokens. Where they do not, the tokens themselves are hashed too, and
the data are others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from scoring.samples import Text, split_ids
from scoring.tokens import Tokenization

Split = tuple[list[int], list[int]]


class TokenHash:
    """Hashes of tokens that the words alone do not tell.

    Args:
        tokenizer: of the model that reads the texts.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._tokenization = tokenizer, Tokenization(tokenizer)

    def of_changed(self, text: Text) -> str | None:
        """The hash of a text's tokens; None if they are those of earlier versions.

        Raises:
            UserError: a template cannot render it.
        """
        if text.is_empty:
            return None
        tokens = split_ids(self._tokenization, text)
        if text.template is None and tokens == self._earlier(text):
            return None
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()

    def of_all_changed(self, texts: Iterable[Text]) -> str | None:
        """One hash for several texts; None if all their tokens are those of earlier versions."""
        changed = [(text.sample_id, tokens) for text in texts if (tokens := self.of_changed(text))]
        return hashlib.sha256(json.dumps(changed).encode()).hexdigest() if changed else None

    def _earlier(self, text: Text) -> Split | None:
        """By the earlier rule: BOS and EOS tokens wherever the tokenizer has them, and the two parts by themselves."""
        tokenizer = self._tokenizer
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if text.messages is None:
            context = bos + (self._ids(text.prompt) if text.completion is not None else [])
            target = self._ids(text.prompt) if text.completion is None else self._ids(text.completion) + eos
            return context, target
        turns = list(text.messages)
        try:
            before = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # whatever a template raises: earlier versions could not read this
            return None
        return (self._ids(before), self._ids(whole[len(before) :])) if whole.startswith(before) else None

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
