"""The pool as a model of lm-evaluation-harness. lm_eval is slow to import and optional: `harness` imports this late.

Texts become tokens as in the harness's own transformers model, so that results agree with it. The embedded models alone
begin with a BOS token that their tokenizers do not put there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from scoring.errors import UserError
from scoring.readings import Reader
from scoring.samples import Sample
from scoring.templates import Template
from scoring.tokens import Tokenization

# The settings of generation that a task may have: the length, the end, and what can also say greedy decoding.
GREEDY_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class PoolLM(TemplateLM):
    """A model of the harness that answers on a pool; see `bench.metrics.harness.pool_model`."""

    def __init__(
        self, reader: Reader, tokenizer: Any, max_length: int, add_bos_token: bool | None, template: Template | None
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._reader = reader
        self.template = template
        self._special = {} if add_bos_token is None else {"add_special_tokens": add_bos_token}
        if self.prefix_token_id is None:
            raise UserError("the tokenizer has neither a BOS nor an EOS token: one of them has to begin a text")
        self._prefix = tokenizer.decode(self.prefix_token_id)
        # What a text begins with everywhere, see scoring.tokens, where the tokenizer has not put it there by then.
        rule = Tokenization(tokenizer)
        self._begin = rule.begin if rule.begin_is_unsaid and add_bos_token is None else []

    @property
    def eot_token_id(self) -> Any:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> Any:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is not None:
            special = {"add_special_tokens": add_special_tokens}
        elif has_bos_prefix(string, self._prefix):
            special = {"add_special_tokens": False}
        else:
            return [*self._begin, *self.tokenizer.encode(string, **self._special)]
        return self.tokenizer.encode(string, **special)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """What a question is put as, where there is a template; a begun answer is left open."""
        assert self.template is not None
        turns = self.template.with_system(chat_history)
        return self.template.render(self.tokenizer, turns, add_generation_prompt, unfinished=not add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        scores = self._reader.likelihoods([self._sample(*request) for request in requests])
        return [(float(score.logprobs.sum()), bool(score.hits.all())) for score in scores]

    def _sample(self, text: Any, context: list[int], continuation: list[int]) -> Sample:
        """The last max_length + 1 tokens: the last one is only predicted."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"{str(text)[-200:]!r} has {len(context)} tokens of context and {len(continuation)} to be scored: "
                f"expected 1 or more of each, and no more than the model's context of {self.max_length} to be scored"
            )
        ids = np.array((context + continuation)[-(self.max_length + 1) :], dtype=np.int64)
        return Sample("", ids, np.arange(len(ids)) >= len(ids) - len(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        owners: list[int] = []
        windows: list[tuple[str, list[int], list[int]]] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            # The prefix is the BOS that the tokenizer has not put there. Where it has, the harness has two, and so has
            # this, so that perplexities compare.
            tokens = self.tok_encode(text)[len(self._begin) :]
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                owners.append(owner)
                windows.append((text, *make_disjoint_window(window)))
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [logprob for logprob, _ in self._loglikelihood_tokens(windows)])
        return totals.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        prompts, limits, ends = [], [], []
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        for request in requests:
            context, generation = request.args
            settings: dict[str, Any] = dict(normalize_gen_kwargs(generation, DEFAULT_MAX_GEN_TOKS))
            if settings.keys() - GREEDY_SETTINGS or settings["do_sample"]:
                raise UserError(
                    f"task {request.task_name!r} asks for generation with {generation}: expected greedy decoding, with "
                    f"no settings but {', '.join(sorted(GREEDY_SETTINGS))}"
                )
            limit = settings["max_gen_toks"]
            if limit >= self.max_length:
                raise UserError(
                    f"task {request.task_name!r} asks for {limit} new tokens, the model's context holds "
                    f"{self.max_length}: lower max_gen_toks"
                )
            prompts.append(np.array(self.tok_encode(context)[limit - self.max_length :], dtype=np.int64))
            limits.append(limit)
            ends.append(handle_stop_sequences(settings["until"], eos))
        written = self._reader.continuations(prompts, limits)
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
        return [postprocess_generated_text(text, end, None) for text, end in zip(texts, ends, strict=True)]
