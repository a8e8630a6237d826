"""Batched greedy decoding against transformers' `generate`, one prompt at a time."""

import numpy as np
import pytest
import torch

from scoring.errors import UserError
from scoring.generation import greedy_continuations, way_of_decoding
from tests.tiny_models import ARCHITECTURES, VOCABULARY, tiny_model

EOS = 2


def varied_model(architecture: str) -> torch.nn.Module:
    """A model whose greedy text does not settle on one token, and ends now and then.

    Random tied models repeat their last token; random heads without the tie do not.
    """
    model = tiny_model(architecture, tied=False, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model


def prompts_and_limits() -> tuple[list[np.ndarray], list[int]]:
    rng = np.random.default_rng(0)
    lengths, limits = rng.integers(1, 16, 14), rng.integers(0, 20, 14)
    # Ids below 3 (padding, begin, end) occur in prompts too: what is padding is not decided by id.
    return [rng.integers(0, VOCABULARY, n) for n in lengths], limits.tolist()


def one_at_a_time(model: torch.nn.Module, prompt: np.ndarray, limit: int, eos: int | None) -> np.ndarray:
    if limit == 0:
        return np.empty(0, dtype=np.int64)
    ids = torch.from_numpy(prompt).unsqueeze(0)
    model.generation_config.eos_token_id = eos
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit)
    new = output[0, len(prompt) :].numpy()
    return new[:-1] if eos is not None and len(new) and new[-1] == eos else new


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_tokens", [16384, 60])
def test_equals_generate_one_prompt_at_a_time(architecture, batch_tokens):
    model = varied_model(architecture)
    prompts, limits = prompts_and_limits()
    # An end token that this model does write, so that rows leave the batch in its midst.
    free = np.concatenate(greedy_continuations(model, prompts, limits, None))
    eos = int(np.bincount(free).argsort()[-3])
    continuations = greedy_continuations(model, prompts, limits, eos, batch_tokens)
    for prompt, limit, new in zip(prompts, limits, continuations, strict=True):
        assert new.dtype == np.int64
        np.testing.assert_array_equal(new, one_at_a_time(model, prompt, limit, eos))
    ended = [len(new) < limit for new, limit in zip(continuations, limits, strict=True)]
    assert any(ended)
    assert not all(ended)
    assert len(set(np.concatenate(continuations).tolist())) > 8


def test_without_an_end_token_every_row_reaches_its_limit():
    model = varied_model("llama")
    prompts, limits = prompts_and_limits()
    continuations = greedy_continuations(model, prompts, limits, None)
    assert [len(new) for new in continuations] == limits
    np.testing.assert_array_equal(continuations[0], one_at_a_time(model, prompts[0], limits[0], None))


def test_one_limit_for_all_and_no_prompts():
    model = varied_model("llama")
    prompts, _ = prompts_and_limits()
    assert [len(new) for new in greedy_continuations(model, prompts, 3, None)] == [3] * len(prompts)
    assert greedy_continuations(model, [], 3, None) == []


def test_a_repetition_penalty_in_the_generation_config_does_not_count():
    model = varied_model("qwen3")
    prompts, limits = prompts_and_limits()
    plain = greedy_continuations(model, prompts, limits, EOS)
    model.generation_config.repetition_penalty = 5.0
    for before, after in zip(plain, greedy_continuations(model, prompts, limits, EOS), strict=True):
        np.testing.assert_array_equal(before, after)


def test_leaves_no_gradient_graph_and_takes_as_many_passes_as_the_longest_row():
    model = varied_model("llama")
    way_of_decoding(model)  # which is tried at the first use
    calls = []
    handle = model.register_forward_hook(lambda m, a, out: calls.append(out.logits))
    greedy_continuations(model, [np.array([5, 6]), np.array([7])], [2, 6], None)
    handle.remove()
    # Both rows for two steps, then the longer one alone for four; one position of logits each.
    assert [tuple(logits.shape[:2]) for logits in calls] == [(2, 1)] * 2 + [(1, 1)] * 4
    assert not any(logits.requires_grad for logits in calls)


def test_errors_are_one_line():
    model = tiny_model("gpt2")  # 64 positions
    greedy_continuations(model, [np.arange(60)], 5, None)  # the fifth token needs no position
    with pytest.raises(UserError, match=r"^prompt 1 has 60 tokens and asks for 6 more, .* holds 64: .*$"):
        greedy_continuations(model, [np.arange(3), np.arange(60)], 6, None)
    with pytest.raises(UserError, match=r"^prompt 0 is empty: .*$"):
        greedy_continuations(model, [np.empty(0, dtype=np.int64)], 6, None)
    with pytest.raises(ValueError, match="1 prompts but 2 limits"):
        greedy_continuations(model, [np.arange(3)], [1, 2], None)
