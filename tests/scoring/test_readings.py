"""Readings on replicas against transformers alone, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from scoring.cluster import Footprint
from scoring.errors import UserError
from scoring.memorization import extraction_likelihood
from scoring.pool import ReplicaPool
from scoring.readings import Reader, TokenScores
from scoring.samples import Sample
from scoring.work import ReplicaSpec
from tests.tiny_folders import CONTEXT, EOS, save_model
from tests.tiny_models import VOCABULARY, random_samples

pytestmark = pytest.mark.usefixtures("cluster")

# Rotary and learned positions; grouped queries, scores that are capped and windows that are shorter than the samples.
ARCHITECTURES = ("llama", "gpt2", "gemma2")
# Few padded tokens, so that there are many batches of different shapes.
BATCH_TOKENS = 70

Pools = Callable[..., ReplicaPool]
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A tiny model of an architecture, saved once."""
    root = tmp_path_factory.mktemp("readings")

    def saved(architecture: str) -> Path:
        path = root / architecture
        return path if path.is_dir() else save_model(path, architecture)

    return saved


@pytest.fixture(scope="module")
def pool(cluster: None, folder: Folders) -> Iterator[Pools]:
    """Pools of an architecture, which stay up as long as the module."""
    pools: dict[tuple[str, int], ReplicaPool] = {}

    def of(architecture: str = "llama", replicas: int = 1) -> ReplicaPool:
        key = architecture, replicas
        if key not in pools:
            pools[key] = ReplicaPool(ReplicaSpec(str(folder(architecture))), Footprint(1), replicas)
        return pools[key]

    yield of
    for each in pools.values():
        each.close()


def reader(pool: ReplicaPool) -> Reader:
    return Reader(pool, EOS, BATCH_TOKENS)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    # As it is written down: the fused kernels leave out the capped scores of Gemma 2.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def half_known(model: Any) -> list[Sample]:
    """What the model itself writes after a few tokens, with a token in the middle that is another."""
    found = []
    for number in range(4):
        prompt = np.array([1, 20 + number, 30 - number])
        ids = np.concatenate([prompt, generated(model, prompt, 12)])
        ids[len(ids) * 2 // 3] = 50
        found.append(Sample(f"half {number}", ids, np.arange(len(ids)) >= 3))
    return found


def samples_of_all_kinds() -> list[Sample]:
    """Random ones; some twice; one with each of several last tokens; the same ids with other tokens scored; the
    shortest that there can be, and one of the whole context and a token more."""
    rng = np.random.default_rng(5)
    found = random_samples(14, seed=3)
    found += [found[2], found[7], found[2]]
    stem = found[0]
    for last in (3, 40, 96, 40):
        ids = stem.input_ids.copy()
        ids[-1] = last
        # As a multiple-choice question is: only its letter is scored.
        found.append(Sample(f"choice {last}", ids, np.arange(len(ids)) == len(ids) - 1))
    found.append(Sample("all of it", stem.input_ids, np.arange(stem.length) > 0))
    found.append(Sample("two tokens", np.array([1, 5]), np.array([False, True])))
    longest = rng.integers(0, VOCABULARY, CONTEXT + 1)
    found.append(Sample("longest", longest, np.arange(CONTEXT + 1) >= CONTEXT - 9))
    rng.shuffle(found)  # type: ignore[arg-type]
    return found


@torch.no_grad()
def alone(model: Any, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs and hits of the scored tokens, from a plain forward pass of what stands before the last token."""
    ids = torch.from_numpy(sample.input_ids)
    logits = model(input_ids=ids[None, :-1]).logits[0].double()
    scored = torch.from_numpy(np.flatnonzero(sample.scored))
    logprobs = logits.log_softmax(-1)[scored - 1, ids[scored]]
    return logprobs.numpy(), (logits.argmax(-1)[scored - 1] == ids[scored]).numpy()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_likelihoods(pool: Pools, folder: Folders, architecture: str) -> None:
    """In fp64 one sample at a time, against batches in fp32: log-probs agree to rounding, hits exactly."""
    model = loaded(folder(architecture), torch.float64)
    samples = [*samples_of_all_kinds(), *half_known(model)]
    found = reader(pool(architecture)).likelihoods(samples)
    assert len(found) == len(samples)
    hits = np.zeros(0, dtype=bool)
    for sample, scores in zip(samples, found, strict=True):
        logprobs, right = alone(model, sample)
        assert scores.logprobs.dtype == np.float64
        np.testing.assert_allclose(scores.logprobs, logprobs, rtol=2e-5, err_msg=sample.sample_id)
        np.testing.assert_array_equal(scores.hits, right, sample.sample_id)
        assert scores.mean_nll == pytest.approx(-logprobs.mean(), rel=1e-5)
        hits = np.append(hits, right)
    assert 10 < hits.sum() < len(hits) - 10


def test_hits_are_those_of_the_own_text(pool: Pools, folder: Folders) -> None:
    """What the model writes by itself are hits throughout, and a wrong token among them is the one that is not."""
    prompt = np.array([1, 20, 30])
    (written,) = reader(pool()).continuations([prompt], [12])
    ids = np.concatenate([prompt, written])
    sample = Sample("own", ids, np.arange(len(ids)) >= 3)
    wrong = ids.copy()
    wrong[-1] = (wrong[-1] + 1) % VOCABULARY
    own, spoilt = reader(pool()).likelihoods([sample, replace(sample, input_ids=wrong)])
    assert len(written) > 3
    assert own.hits.all()
    assert spoilt.hits.tolist() == [True] * (len(written) - 1) + [False]


def prompts_and_limits() -> tuple[list[np.ndarray], list[int]]:
    """Prompts of 1 to 30 tokens, one of them twice with the same limit and with another, and some that ask for nothing;
    one that fills the context to its last token."""
    rng = np.random.default_rng(9)
    prompts = [rng.integers(3, VOCABULARY, int(length)) for length in rng.integers(1, 31, 12)]
    limits = rng.integers(1, 25, 12).tolist()
    limits[3] = limits[8] = 0
    prompts += [prompts[5], prompts[5], prompts[6], rng.integers(3, VOCABULARY, CONTEXT - 10)]
    limits += [limits[5], limits[5] + 4, 0, 11]
    return prompts, limits


@torch.no_grad()
def generated(model: Any, prompt: np.ndarray, limit: int) -> list[int]:
    """As everybody does it, one prompt at a time; without the end token."""
    if limit == 0:
        return []
    ids = torch.from_numpy(prompt)[None]
    whole = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    written = whole[0, len(prompt) :].tolist()
    return written[: written.index(EOS)] if EOS in written else written


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_continuations(pool: Pools, folder: Folders, architecture: str) -> None:
    model = loaded(folder(architecture))
    prompts, limits = prompts_and_limits()
    found = reader(pool(architecture)).continuations(prompts, limits)
    expected = [generated(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert [tokens.tolist() for tokens in found] == expected
    assert all(tokens.dtype == np.int64 for tokens in found)
    assert max(map(len, expected)) > 5


def test_the_end_token_ends_an_answer(pool: Pools) -> None:
    """The same pool with another end token: what is written is the same up to it."""
    prompts, limits = prompts_and_limits()
    without_end = Reader(pool(), None, BATCH_TOKENS).continuations(prompts, limits)
    end = int(np.bincount(np.concatenate(without_end)).argmax())
    found = Reader(pool(), end, BATCH_TOKENS).continuations(prompts, limits)
    cut = 0
    for tokens, whole, limit in zip(found, without_end, limits, strict=True):
        assert len(whole) == limit
        expected = whole.tolist()[: whole.tolist().index(end)] if end in whole else whole.tolist()
        assert tokens.tolist() == expected
        cut += len(expected) < limit
    assert cut > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_extraction(pool: Pools, folder: Folders, architecture: str) -> None:
    model = loaded(folder(architecture))
    samples = [*random_samples(4, seed=4), *half_known(model)]
    samples.insert(3, samples[1])
    samples.append(Sample("too short", np.array([1, 5, 6]), np.array([False, True, True])))
    found = reader(pool(architecture)).extraction(samples, 3)
    # Each by itself: nothing of the others can be in it.
    expected = [extraction_likelihood(model, [sample], 3, EOS).item() for sample in samples]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert np.isnan(found).tolist() == [False] * 9 + [True]
    assert 0.2 < np.nanmax(found) < 1


def test_any_number_of_replicas_to_the_bit(pool: Pools) -> None:
    samples, (prompts, limits) = samples_of_all_kinds(), prompts_and_limits()
    one, three = reader(pool()), reader(pool("llama", 3))
    assert_same(one.likelihoods(samples), three.likelihoods(samples))
    written = [[tokens.tolist() for tokens in one.continuations(prompts, limits)] for reader in (one, three)]
    assert written[0] == written[1]
    np.testing.assert_array_equal(one.extraction(samples[:12], 3), three.extraction(samples[:12], 3))


def assert_same(found: Sequence[TokenScores], expected: Sequence[TokenScores]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.logprobs, other.logprobs, strict=True)
        np.testing.assert_array_equal(one.hits, other.hits, strict=True)


def test_the_order_of_the_samples_changes_no_bit(pool: Pools) -> None:
    samples = samples_of_all_kinds()
    straight = reader(pool()).likelihoods(samples)
    assert_same(reader(pool()).likelihoods(samples[::-1])[::-1], straight)
    # A sample that is asked for twice is the same twice.
    twice = [i for i, sample in enumerate(samples) if sum(sample is other for other in samples) > 1]
    assert len(twice) == 5
    for i in twice:
        same = next(j for j in twice if samples[j] is samples[i])
        assert_same([straight[i]], [straight[same]])


def test_choices_of_one_question_are_read_once(pool: Pools) -> None:
    """A question with each of four letters is one row of a batch, and takes one pass."""
    stem = np.array([1, 9, 8, 7, 6])
    choices = [Sample(str(last), np.append(stem, last), np.arange(6) == 5) for last in (10, 20, 30, 40)]
    passes = []

    def counted(works: Any, shards: Any) -> Iterator[Any]:
        for work, result, facts in pool().run(works, shards):
            passes.append((len(shards[work.shard][0]), facts.forwards))
            yield work, result, facts

    class Watched:
        run = staticmethod(counted)

    scores = Reader(Watched(), EOS).likelihoods(choices)  # type: ignore[arg-type]
    assert passes == [(1, 1)]
    # Four of the probabilities of one distribution.
    assert sum(np.exp(score.logprobs[0]) for score in scores) < 1
    assert len({score.logprobs[0] for score in scores}) == 4
    assert_same(reader(pool()).likelihoods(choices[2:3]), scores[2:3])


def test_nothing_asked_is_nothing_answered(pool: Pools) -> None:
    one = reader(pool())
    assert one.likelihoods([]) == []
    assert one.continuations([], []) == []
    assert [tokens.tolist() for tokens in one.continuations([np.array([1, 2])] * 2, [0, 0])] == [[], []]
    assert one.extraction([], 3).shape == (0,)


def test_errors_are_one_line_and_the_replicas_go_on(pool: Pools) -> None:
    one = reader(pool())
    for prompts, limits, expected in (
        ([np.array([1]), np.empty(0, dtype=np.int64)], [3, 3], "is empty"),
        ([np.arange(1, CONTEXT - 8)], [11], f"the model's context holds {CONTEXT}"),
    ):
        with pytest.raises(UserError, match=expected) as error:
            one.continuations(prompts, limits)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="n is 0"):
        one.extraction(random_samples(2), 0)
    assert len(one.continuations([np.array([1, 5])], [4])) == 1
