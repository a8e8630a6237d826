"""Greedy continuations of many prompts at once.

An own loop instead of transformers' `generate`, for two reasons. `generate` takes over what a model's
generation_config.json says (a repetition penalty, suppressed tokens), also for greedy decoding, while the
metrics ask for the argmax of the model's distribution and nothing else. And it computes finished rows until
the whole batch ends, which is costly for extraction likelihood, where every prompt has a limit of its own.
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
    """What the model writes after each prompt when it always takes its most likely token.

    A row's result does not depend on the rows it is batched with, save that batches of different shape round
    differently: where two logits tie to within rounding, either may win.

    Args:
        model: a transformers causal LM in eval mode.
        prompts: token ids, each (T_i,) int64 with T_i >= 1.
        max_new_tokens: the most tokens to write, for all prompts or one number for each; 0 writes nothing.
        eos_token_id: the token that ends a row; None: only the limit does.
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
    """Refuse prompts that are empty, or do not fit into a context of so many tokens with what is to be written.

    Raises:
        UserError: see above.
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
    """Positions of prompts of similar length that are decoded together; those that write nothing are left out.

    Args:
        prompts, limits, batch_tokens: see `greedy_continuations`.
        rows: prompts in a group at most.
    """
    group: list[int] = []
    most = 0
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), limits[i]))
    for i in order:
        if limits[i] <= 0:
            continue
        most = max(most, limits[i])
        if group and ((len(group) + 1) * (len(prompts[i]) + most) > batch_tokens or len(group) == rows):
            yield group
            group, most = [], limits[i]
        group.append(i)
    if group:
        yield group


def _decode(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], limits: Sequence[int], eos_token_id: int | None
) -> list[list[int]]:
    """One batch. Padding is on the left, so that every row's next token is predicted at the last column."""
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
    # The prompt that each row of the shrinking batch belongs to.
    rows = list(range(len(prompts)))
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
        going = []
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if token == eos_token_id:
                continue
            written[row].append(token)
            if len(written[row]) < limits[row]:
                going.append(place)
        if not going:
            return written
        if len(going) < len(rows):
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            tokens, mask, position_ids = tokens[kept], mask[kept], position_ids[kept]
            rows = [rows[place] for place in going]
        input_ids = tokens.unsqueeze(-1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        position_ids = position_ids[:, -1:] + 1
