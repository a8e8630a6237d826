"""Greedy continuations of many prompts at once.

This is not transformers' `generate`, for two reasons. `generate` applies a model's generation_config.json (a
repetition penalty, suppressed tokens) even to greedy decoding, while the metrics ask for the argmax of the model's
distribution and nothing else. And it goes on computing finished rows until the whole batch ends, which is costly for
extraction likelihood, where every prompt has its own limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from scoring.errors import UserError


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
        eos_token_id: the token that ends a row; None: only the limit ends it.
        batch_tokens: rows times (prompt + new) tokens in one batch. A longer row gets a batch of its own.

    Returns:
        The new tokens of each prompt, int64, in the order of `prompts`, without the end token.

    Raises:
        UserError: a prompt is empty, or does not fit into the model's context with its new tokens.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(limits)} limits")
    check_fit(getattr(model.config.get_text_config(), "max_position_embeddings", None), prompts, limits)
    continuations = [np.empty(0, dtype=np.int64) for _ in prompts]
    for group in group_prompts(prompts, limits, batch_tokens):
        written = _decode(model, [prompts[i] for i in group], [limits[i] for i in group], eos_token_id)
        for i, tokens in zip(group, written, strict=True):
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


def _decode(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], limits: Sequence[int], eos_token_id: int | None
) -> list[list[int]]:
    """Decode one batch. Padding is on the left, so that the last column predicts every row's next token."""
    longest = max(len(p) for p in prompts)
    ids = np.zeros((len(prompts), longest), dtype=np.int64)
    attended = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        attended[row, longest - len(prompt) :] = 1
    device = next(model.parameters()).device
    input_ids, mask = torch.from_numpy(ids).to(device), torch.from_numpy(attended).to(device)
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    written: list[list[int]] = [[] for _ in prompts]
    # The prompt of each row: rows leave the batch as they end.
    prompt_of_row = list(range(len(prompts)))
    while True:
        output = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = output.logits[:, -1].argmax(-1)
        unfinished = []
        for row, (prompt_number, token) in enumerate(zip(prompt_of_row, tokens.tolist(), strict=True)):
            if token == eos_token_id:
                continue
            written[prompt_number].append(token)
            if len(written[prompt_number]) < limits[prompt_number]:
                unfinished.append(row)
        if not unfinished:
            return written
        if len(unfinished) < len(prompt_of_row):
            selected = torch.tensor(unfinished, device=device)
            cache.batch_select_indices(selected)
            tokens, mask, position_ids = tokens[selected], mask[selected], position_ids[selected]
            prompt_of_row = [prompt_of_row[row] for row in unfinished]
        input_ids = tokens.unsqueeze(-1)
        mask = torch.cat([mask, mask.new_ones(len(prompt_of_row), 1)], dim=1)
        position_ids = position_ids[:, -1:] + 1
