"""Continuations of many prompts at once: greedy ones, and ones that are drawn.

This is not transformers' `generate`, for two reasons. `generate` applies a model's generation_config.json (a
repetition penalty, suppressed tokens) even to greedy decoding, while the metrics ask for the argmax of the model's
distribution and nothing else. And it goes on computing finished rows until the whole batch ends, which is costly for
extraction likelihood, where every prompt has its own limit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from scoring.abilities import abilities_of, positions_for, remembered, same, tokens_to_try
from scoring.errors import UserError
from scoring.precision import as_precise_as_weights
from scoring.progress import advance, expect

Way = Literal["together", "alone", "anew"]
# The next token of each row, (B,), from its logits, (B, V), given the number of each row and how many tokens it has.
Choose = Callable[[torch.Tensor, Sequence[tuple[int, int]]], torch.Tensor]


def most_likely(logits: torch.Tensor, rows: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The token that greedy decoding takes."""
    return logits.argmax(-1)


@dataclass(frozen=True)
class Drawn:
    """Tokens drawn from the model's distribution by inverting its distribution function: what a row gets does not
    depend on the rows beside it.

    Attributes:
        uniforms: of each row, (limit,) in [0, 1), one for each token that it may write.
        temperature: that logits are divided by.
    """

    uniforms: Sequence[np.ndarray]
    temperature: float = 1.0

    def __call__(self, logits: torch.Tensor, rows: Sequence[tuple[int, int]]) -> torch.Tensor:
        cumulative = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        levels = [self.uniforms[number][written] for number, written in rows]
        # Of a distribution whose rounded sum is not quite 1.
        wanted = cumulative.new_tensor(levels)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)

    def of(self, rows: Sequence[int]) -> Drawn:
        """The same for some of the rows, which are numbered anew."""
        return Drawn([self.uniforms[row] for row in rows], self.temperature)


@torch.no_grad()
def greedy_continuations(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int | Sequence[int],
    eos_token_id: int | None,
    batch_tokens: int = 16384,
) -> list[np.ndarray]:
    """What the model writes after each prompt if it always takes its most likely token.

    A row's result does not depend on the rows beside it, except that batches of different shape round differently:
    where two logits tie to within rounding, either may win.

    Args:
        model: a transformers causal LM in eval mode.
        prompts: token ids, each (T_i,) int64 with T_i >= 1.
        max_new_tokens: the most tokens to write, one number for all prompts or one for each; 0 writes nothing.
        eos_token_id: the token that ends a row, beside those of the model's generation config; None: only these, or
            the limit.
        batch_tokens: rows times (prompt + new) tokens in one batch. A longer row gets a batch of its own.

    Returns:
        The new tokens of each prompt, int64, in the order of `prompts`, without the end token.

    Raises:
        UserError: a prompt is empty, or does not fit into the model's context with its new tokens.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    return _continuations(model, prompts, limits, eos_token_id, batch_tokens, None)


@torch.no_grad()
def drawn_continuations(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    limits: Sequence[int],
    drawn: Drawn,
    eos_token_id: int | None,
    batch_tokens: int = 16384,
) -> list[np.ndarray]:
    """What the model writes after each prompt if it draws every token.

    Args:
        model, prompts, eos_token_id, batch_tokens: see `greedy_continuations`.
        limits: the most tokens to write after each prompt.
        drawn: with as many rows as there are prompts.

    Returns:
        The new tokens of each prompt, int64, without the end token.

    Raises:
        UserError: see `greedy_continuations`.
    """
    return _continuations(model, prompts, list(limits), eos_token_id, batch_tokens, drawn)


def _continuations(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    limits: list[int],
    eos_token_id: int | None,
    batch_tokens: int,
    drawn: Drawn | None,
) -> list[np.ndarray]:
    if len(limits) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(limits)} limits")
    check_fit(getattr(model.config.get_text_config(), "max_position_embeddings", None), prompts, limits)
    stops = stops_of(model, eos_token_id)
    continuations = [np.empty(0, dtype=np.int64) for _ in prompts]
    expect(sum(limit > 0 for limit in limits))
    for group in group_prompts(prompts, limits, batch_tokens):
        choose = drawn.of(group) if drawn else most_likely
        written = _decode(model, [prompts[i] for i in group], [limits[i] for i in group], stops, choose)
        for i, tokens in zip(group, written, strict=True):
            continuations[i] = np.asarray(tokens, dtype=np.int64)
    return continuations


@torch.no_grad()
def greedy_continuations_within(
    model: PreTrainedModel,
    texts: Sequence[np.ndarray],
    starts: Sequence[tuple[int, int]],
    eos_token_id: int | None,
    batch_tokens: int = 16384,
) -> list[np.ndarray]:
    """What the model writes in place of the rest of a text, from many positions of each text.

    A text is read once for all its starts in a batch, and their continuations begin from the cache of that, where the
    model allows it.

    Args:
        model, eos_token_id: see `greedy_continuations`.
        texts: token ids, each (T_i,) int64.
        starts: which text, and how many of its tokens stand before the continuation, 1 to T_i - 1. A continuation has
            at most as many tokens as it replaces.
        batch_tokens: rows times (read + new) tokens in one batch.

    Returns:
        The new tokens of each start, int64, without the end token.

    Raises:
        UserError: a text does not fit into the model's context.
    """
    prompts = [texts[row][:at] for row, at in starts]
    limits = [len(texts[row]) - at for row, at in starts]
    switch = abilities_of(model).switch
    longest = max((len(texts[row]) for row, _ in starts), default=0)
    if not starts or not shares_prefixes(model) or (switch is not None and longest > switch):
        return greedy_continuations(model, prompts, limits, eos_token_id, batch_tokens)
    check_fit(getattr(model.config.get_text_config(), "max_position_embeddings", None), prompts, limits)
    stops = stops_of(model, eos_token_id)
    continuations = [np.empty(0, dtype=np.int64) for _ in starts]
    expect(sum(limit > 0 for limit in limits))
    # Starts of one length together: rows that begin early go on for longest.
    for group in group_prompts(prompts, limits, batch_tokens):
        batch = _WithinTexts(model, texts, [starts[i] for i in group])
        for i, tokens in zip(group, _decode_rows(batch, [limits[i] for i in group], stops), strict=True):
            continuations[i] = np.asarray(tokens, dtype=np.int64)
    return continuations


def check_fit(context: int | None, prompts: Sequence[np.ndarray], limits: Sequence[int]) -> None:
    """Refuse prompts that are empty, or do not fit into the context together with the tokens to be written.

    Args:
        context: tokens that the model can read; None: no limit.
        prompts: token ids, each (T_i,).
        limits: the most tokens to write after each prompt.

    Raises:
        UserError: one line with the first such prompt.
    """
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty: expected at least one token, begin it with the BOS token")
        # The last new token is never fed back, so it needs no position.
        if context is not None and len(prompt) + limit - 1 > context:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens and asks for {limit} more, the model's context holds "
                f"{context}: shorten it or lower the number of new tokens"
            )


def group_prompts(
    prompts: Sequence[np.ndarray], limits: Sequence[int], batch_tokens: int, rows: int | None = None
) -> Iterator[list[int]]:
    """Group prompts of similar length to be decoded together: their positions. Prompts with limit 0 are left out.

    Args:
        prompts, limits, batch_tokens: see `greedy_continuations`.
        rows: the most prompts in a group.
    """
    group: list[int] = []
    highest_limit = 0
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), limits[i]))
    for i in order:
        if limits[i] <= 0:
            continue
        highest_limit = max(highest_limit, limits[i])
        full = (len(group) + 1) * (len(prompts[i]) + highest_limit) > batch_tokens or len(group) == rows
        if group and full:
            yield group
            group, highest_limit = [], limits[i]
        group.append(i)
    if group:
        yield group


def stops_of(model: Any, eos_token_id: int | None) -> frozenset[int]:
    """The tokens that end what a model writes: the one given, and those of its generation config, of which chat models
    have several."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list) else []
    return frozenset(token for token in (eos_token_id, *several) if token is not None)


def _decode(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    limits: Sequence[int],
    stops: frozenset[int],
    choose: Choose = most_likely,
) -> list[list[int]]:
    """Decode one batch, in the first way that is right for the model."""
    way = way_of_decoding(model)
    switch = abilities_of(model).switch
    if switch is not None and max(len(p) + limit for p, limit in zip(prompts, limits, strict=True)) > switch:
        way = "anew"  # what a cache holds was encoded for the shorter side
    if way == "together":
        return _decode_rows(_LeftPadded(model, prompts), limits, stops, choose)
    return [
        _decode_one(model, prompt, limits[row], stops, way == "alone", choose, row)
        for row, prompt in enumerate(prompts)
    ]


def _decode_one(
    model: PreTrainedModel,
    prompt: np.ndarray,
    limit: int,
    stops: frozenset[int],
    cached: bool,
    choose: Choose,
    number: int,
) -> list[int]:
    """Decode one prompt by itself: with a cache, or by reading everything anew for each token."""

    def own(logits: torch.Tensor, rows: Sequence[tuple[int, int]]) -> torch.Tensor:
        return choose(logits, [(number, written) for _, written in rows])

    if cached:
        return _decode_rows(_LeftPadded(model, [prompt]), [limit], stops, own)[0]
    ids = torch.from_numpy(np.asarray(prompt, dtype=np.int64))[None].to(next(model.parameters()).device)
    written: list[int] = []
    while len(written) < limit:
        token = int(own(_last_logits_anew(model, ids), [(0, len(written))])[0])
        if token in stops:
            break
        written.append(token)
        ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)
    advance()
    return written


def _last_logits_anew(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the next token of each row, (B, V)."""
    with as_precise_as_weights(model):
        output = model(input_ids=ids, use_cache=False, **positions_for(ids, abilities_of(model).takes_positions))
    logits: torch.Tensor = output.logits[:, -1]
    return logits


@remembered
def way_of_decoding(model: Any) -> Way:
    """How a model's continuations come out right: rows of a batch together, padded on the left; one at a time with a
    cache; or reading everything anew for each token. Tried at its first use."""
    return _try_ways(model)


@torch.no_grad()
def _try_ways(model: Any) -> Way:
    rows = tokens_to_try(model)
    prompts = [rows[0, :2], rows[1, :5]]
    further = rows[:, 5:8]
    training = model.training
    model.eval()
    try:
        exact = [
            torch.stack([_last_logits_anew(model, torch.cat([p, more[:n]])[None])[0] for n in range(3)])
            for p, more in zip(prompts, further, strict=True)
        ]
        if not all(logits.isfinite().all() for logits in exact):
            return "together"
        ways: dict[Way, Callable[[], list[torch.Tensor]]] = {
            "together": lambda: _led(model, prompts, further),
            "alone": lambda: [_led(model, [p], more[None])[0] for p, more in zip(prompts, further, strict=True)],
        }
        for way, logits_of in ways.items():
            try:
                if all(same(found, wanted) for found, wanted in zip(logits_of(), exact, strict=True)):
                    return way
            except Exception:  # it takes no cache of this kind, or no mask
                continue
        return "anew"
    finally:
        model.train(training)


def _led(model: Any, prompts: Sequence[torch.Tensor], further: torch.Tensor) -> list[torch.Tensor]:
    """The logits of three steps of decoding in which the model is given the tokens, (3, V) for each prompt. After the
    second, a batch of two loses its first row."""
    batch = _LeftPadded(model, [p.cpu().numpy() for p in prompts])
    steps: list[list[torch.Tensor]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    for n in range(3):
        logits = batch.next_logits()
        for place, row in enumerate(rows):
            steps[row].append(logits[place])
        if n == 1 and len(rows) > 1:
            steps[0].append(steps[0][-1])
            rows = rows[1:]
            batch.keep([1], further[1:, n])
        else:
            batch.keep(list(range(len(rows))), further[rows, n])
    if len(prompts) > 1:
        steps[0][2] = _last_logits_anew(model, torch.cat([prompts[0], further[0, :2]])[None])[0]  # it had left
    return [torch.stack(logits) for logits in steps]


@remembered
def shares_prefixes(model: Any) -> bool:
    """Whether continuations from within a text come out right from the cache of the whole text. Tried at its first
    use."""
    if way_of_decoding(model) != "together" or not abilities_of(model).takes_positions:
        return False
    return _try_sharing(model)


@torch.no_grad()
def _try_sharing(model: Any) -> bool:
    rows = tokens_to_try(model)
    texts, starts = [row.cpu().numpy() for row in rows[:2]], [(0, 2), (1, 5), (0, 4)]
    training = model.training
    model.eval()
    try:
        batch = _WithinTexts(model, texts, starts)
        if not all(type(layer) is DynamicLayer for layer in batch.cache.layers):
            return False  # a window, say, which would count the tokens that a row skips
        for n in range(2):
            exact = [_last_logits_anew(model, rows[row, : at + n][None])[0] for row, at in starts]
            if not all(same(logits, wanted) for logits, wanted in zip(batch.next_logits(), exact, strict=True)):
                return False
            batch.keep(list(range(len(starts))), torch.stack([rows[row, at + n] for row, at in starts]))
        return True
    except Exception:  # its cache is of another kind
        return False
    finally:
        model.train(training)


class _Rows:
    """Rows that are decoded together, with a cache.

    Attributes:
        cache: of what was read and written before.
    """

    def __init__(
        self, model: Any, cache: DynamicCache, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """
        Args:
            ids, positions: (B, T) of the tokens that are to be read next; the last column predicts each row's next one.
            mask: (B, cached + T), what each row looks at.
        """
        self._model, self.cache = model, cache
        self._ids, self._mask, self._positions = ids, mask, positions
        self._takes_positions = abilities_of(model).takes_positions
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters

    def next_logits(self) -> torch.Tensor:
        """Logits of the next token of each row, (B, V)."""
        with as_precise_as_weights(self._model):
            output = self._model(
                input_ids=self._ids,
                attention_mask=self._mask,
                past_key_values=self.cache,
                use_cache=True,
                **({"position_ids": self._positions} if self._takes_positions else {}),
                **({"logits_to_keep": 1} if self._keeps_last else {}),
            )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def keep(self, rows: Sequence[int], tokens: torch.Tensor) -> None:
        """Go on with these rows, and the token of each that is to be read next."""
        if len(rows) < len(self._mask):
            selected = torch.tensor(rows, device=self._mask.device)
            self.cache.batch_select_indices(selected)
            self._mask, self._positions = self._mask[selected], self._positions[selected]
        self._ids = tokens.unsqueeze(-1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1


class _LeftPadded(_Rows):
    """Prompts that are continued together. Padding is on the left, so that the last column predicts every row's next
    token."""

    def __init__(self, model: Any, prompts: Sequence[np.ndarray]) -> None:
        longest = max(len(p) for p in prompts)
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        attended = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            attended[row, longest - len(prompt) :] = 1
        device = next(model.parameters()).device
        mask = torch.from_numpy(attended).to(device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        cache = DynamicCache(config=model.config)
        _Rows.__init__(self, model, cache, torch.from_numpy(ids).to(device), mask, positions)


class _WithinTexts(_Rows):
    """Continuations from within texts. Each text is read once; a row looks at what stands before its start."""

    def __init__(self, model: Any, texts: Sequence[np.ndarray], starts: Sequence[tuple[int, int]]) -> None:
        device = next(model.parameters()).device
        # Of each text all but the last token before its last start, which is read as part of the row.
        used = list(dict.fromkeys(row for row, _ in starts))
        longest = max(at for _, at in starts) - 1
        cache = DynamicCache(config=model.config)
        if longest:
            ids = np.zeros((len(used), longest), dtype=np.int64)
            for place, row in enumerate(used):
                ids[place, : len(texts[row])] = texts[row][:longest]
            mask = torch.ones(ids.shape, dtype=torch.int64, device=device)
            positions = mask.cumsum(1) - 1
            _Rows(model, cache, torch.from_numpy(ids).to(device), mask, positions).next_logits()
            place_of = {row: place for place, row in enumerate(used)}
            cache.batch_select_indices(torch.tensor([place_of[row] for row, _ in starts], device=device))
        last = torch.tensor([[at - 1] for _, at in starts], device=device)
        before = torch.arange(longest, device=device) < last
        mask = torch.cat([before, torch.ones_like(last, dtype=torch.bool)], dim=1).long()
        tokens = torch.tensor([[int(texts[row][at - 1])] for row, at in starts], device=device)
        _Rows.__init__(self, model, cache, tokens, mask, last)


def _decode_rows(
    batch: _Rows, limits: Sequence[int], stops: frozenset[int], choose: Choose = most_likely
) -> list[list[int]]:
    """What each row writes until it comes to its limit or to a token that ends it."""
    written: list[list[int]] = [[] for _ in limits]
    # The number of each row: rows leave the batch as they end.
    numbers = list(range(len(limits)))
    while True:
        tokens = choose(batch.next_logits(), [(number, len(written[number])) for number in numbers])
        unfinished = []
        for row, (number, token) in enumerate(zip(numbers, tokens.tolist(), strict=True)):
            if token in stops:
                continue
            written[number].append(token)
            if len(written[number]) < limits[number]:
                unfinished.append(row)
        advance(len(numbers) - len(unfinished))
        if not unfinished:
            return written
        batch.keep(unfinished, tokens[torch.tensor(unfinished, device=tokens.device)])
        numbers = [numbers[row] for row in unfinished]
