"""Answers: ROUGE-L by hand and by a plain LCS, probabilities by fp64 log_softmax, greedy answers by `generate`."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from scoring.answers import answer_probability, rouge_l_recall, score_answers, true_answers, written_answers
from scoring.errors import UserError
from scoring.rouge_words import Words
from scoring.samples import Sample, Text, encode
from tests.tiny_folders import CONTEXT, EOS, WORDS, pairs, save_model, token_id
from tests.tiny_models import random_samples, tiny_model


def lcs(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """The length of the longest common subsequence, as it is defined."""

    @cache
    def longest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


@pytest.mark.parametrize(
    ("written", "truth", "recall"),
    [
        ("a b c", "a b c", 1.0),
        ("a x b y c z", "a b c", 1.0),  # what is written besides costs nothing
        ("c b a", "a b c", 1 / 3),  # the order counts
        ("a b", "a b c d", 2 / 4),
        ("a", "a a a", 1 / 3),
        ("The Town, of OULD.", "the town of ould", 1.0),  # neither case nor punctuation
        ("she was writing novels", "she writes a novel", 3 / 4),  # she, write, novel
        ("cats", "cat", 1.0),  # four letters are stemmed
        ("as", "a", 0.0),  # up to three are not
        ("1 2", "1 2 3", 2 / 3),
        ("x", "a b", 0.0),
        ("", "a b", 0.0),
        (" .", "a b", 0.0),
        ("a", "", 0.0),
        ("été", "été", 1.0),  # "t" and "t": letters with accents separate words
        ("ete", "été", 0.0),
        ("她住在北京。", "她住在巴黎", 3 / 5),  # a script without spaces: each character counts
        ("パリに住む", "ﾊﾟﾘに住む", 1.0),  # half-width letters are the same
        ("เขาอยู่", "เขาอยู่", 1.0),
        ("Она живёт в Париже", "она жила в париже.", 3 / 4),  # scripts with spaces have words
        ("वह पेरिस में", "वह पेरिस में रहती", 3 / 4),  # signs belong to their letters
        ("파리에", "파리에 살다", 1 / 2),
        ("في باريس", "هي في باريس", 2 / 3),
        ("GPT-4 在 Paris", "在 the Paris of 4", 2 / 5),  # 在 and paris, of 在, the, paris, of, 4
    ],
)
def test_rouge_l_recall_by_hand(written, truth, recall):
    assert rouge_l_recall([written], [truth]).tolist() == [recall]


def test_words_of_english_are_those_of_the_package():
    """Whatever stands between them: digits, signs, quotes, accents, line feeds."""
    rng = np.random.default_rng(0)
    letters = list("aaeioszThing9 2  \n.,-'’“”–…&%$éïÀßøñ_")
    texts = ["".join(rng.choice(letters, 40)) for _ in range(400)]
    package = DefaultTokenizer(use_stemmer=True)
    assert [Words().tokenize(text) for text in texts] == [package.tokenize(text) for text in texts]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [scorer.score(truth, written)["rougeL"].recall for written, truth in pairwise(texts)]
    assert rouge_l_recall(texts[:-1], texts[1:]).tolist() == expected


def test_rouge_l_recall_is_the_longest_common_subsequence():
    rng = np.random.default_rng(0)
    # Short words: the stemmer leaves them alone.
    texts = [tuple(rng.choice(list("abcdef"), rng.integers(1, 12)).tolist()) for _ in range(60)]
    written, truth = texts[:30], texts[30:]
    recall = rouge_l_recall([" ".join(w) for w in written], [" ".join(y) for y in truth])
    assert recall.dtype == np.float64
    assert recall.tolist() == [lcs(w, y) / len(y) for w, y in zip(written, truth, strict=True)]
    assert len(set(recall)) > 5


def test_rouge_l_recall_of_none_and_of_unequally_many():
    empty = rouge_l_recall([], [])
    assert (empty.shape, empty.dtype) == ((0,), np.float64)
    with pytest.raises(ValueError, match=r"longer|shorter"):
        rouge_l_recall(["a"], ["a", "b"])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_probability_is_the_geometric_mean(architecture):
    model: Any = tiny_model(architecture)
    # Their own indices are neither places in this list nor distinct.
    samples = [replace(s, index=7) for s in random_samples(9, seed=2)]
    expected = []
    for sample in samples:
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.input_ids).unsqueeze(0)).logits[0]
        where = np.flatnonzero(sample.scored)
        logprobs = logits.double().log_softmax(-1)[where - 1, sample.input_ids[where]]
        expected.append(float(logprobs.exp().prod() ** (1 / len(where))))
    probability = answer_probability(model, samples)
    assert probability.dtype == np.float64
    np.testing.assert_allclose(probability, expected, rtol=1e-5)
    np.testing.assert_allclose(answer_probability(model, samples, batch_tokens=40), expected, rtol=1e-5)
    np.testing.assert_allclose(answer_probability(model, samples[::-1]), expected[::-1], rtol=1e-5)
    assert answer_probability(model, []).shape == (0,)


def load(folder: Path) -> tuple[Any, Any]:
    """A model whose greedy text varies, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model_and_tokenizer(request, tmp_path_factory):
    return load(save_model(tmp_path_factory.mktemp(request.param), request.param, tied=False, seed=3))


def answers_to(tokenizer: Any, count: int = 10) -> list[Sample]:
    texts = [Text(r["id"], r["prompt"], r["completion"]) for r in pairs(count)]
    samples, rejected = encode(texts, tokenizer, CONTEXT)
    assert not rejected
    return samples


def generated(model: Any, tokenizer: Any, sample: Sample, extra: int) -> tuple[str, int]:
    """What `generate` writes for one sample, and how many tokens that is without the end token."""
    first = int(np.flatnonzero(sample.scored)[0])
    ids = torch.from_numpy(sample.input_ids[:first]).unsqueeze(0)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    limit = min(sample.num_scored + extra, CONTEXT + 1 - first)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit)
    tokens = output[0, first:].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return text, len(tokens) - (tokens[-1] == tokenizer.eos_token_id)


def test_written_answers_are_those_of_generate(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    samples = answers_to(tokenizer)
    # An end token that this model does write, so that answers end at different places.
    free = " ".join(written_answers(model, tokenizer, samples)).split()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"eos_token": sorted(set(free), key=lambda word: (free.count(word), word))[-3]})
    samples = answers_to(tokenizer)  # which end with it
    for extra in (20, 0):
        expected, lengths = zip(*[generated(model, tokenizer, s, extra) for s in samples], strict=True)
        written = written_answers(model, tokenizer, samples, extra_tokens=extra)
        assert written == list(expected)
        ended = [n < s.num_scored + extra for n, s in zip(lengths, samples, strict=True)]
        assert any(ended)
        assert not all(ended)
        # Neither the batches nor the order matter.
        assert written_answers(model, tokenizer, samples, 60, extra) == written
        assert written_answers(model, tokenizer, samples[::-1], extra_tokens=extra) == written[::-1]


def test_answers_end_where_the_context_does(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    full = Text("full", " ".join(WORDS[:49]), " ".join(WORDS[:13]))
    [sample], _ = encode([full], tokenizer, CONTEXT)
    assert sample.length == CONTEXT
    # 1 + 49 tokens of prompt; 14 of the answer. The last new token needs no position.
    text, length = generated(model, tokenizer, sample, 20)
    assert length == 15
    assert written_answers(model, tokenizer, [sample]) == [text]
    too_long = Sample("long", np.full(CONTEXT + 3, 10), np.arange(CONTEXT + 3) > CONTEXT)
    with pytest.raises(UserError, match=r"^prompt 0 has 65 tokens and asks for 1 more, .* holds 64: .*$"):
        written_answers(model, tokenizer, [too_long])


def test_true_answers_are_the_scored_tokens(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    assert true_answers(tokenizer, answers_to(tokenizer)) == [r["completion"] for r in pairs(10)]
    assert true_answers(tokenizer, []) == []


def test_score_answers_does_it_all_in_eval_mode(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    samples = answers_to(tokenizer)
    written = written_answers(model, tokenizer, samples)
    probability = answer_probability(model, samples)
    # Dropout everywhere but in one part, which stays in eval mode.
    model.train()
    frozen = model.get_input_embeddings().eval()
    modes = []
    handle = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    scores = score_answers(model, tokenizer, samples)
    handle.remove()
    assert not any(modes)
    assert model.training
    assert not frozen.training
    model.eval()
    np.testing.assert_array_equal(scores.rouge_l_recall, rouge_l_recall(written, true_answers(tokenizer, samples)))
    np.testing.assert_array_equal(scores.probability, probability)


def test_a_model_that_writes_the_true_answer_has_full_recall(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    # The true answers are what the model writes: at most six words, and the end token.
    samples = []
    for sample in answers_to(tokenizer, 4):
        prompt = sample.input_ids[: np.argmax(sample.scored)]
        dummy = Sample("d", np.append(prompt, EOS), np.arange(len(prompt) + 1) == len(prompt))
        [text] = written_answers(model, tokenizer, [dummy], extra_tokens=5)
        assert text
        answer = [token_id(word) for word in text.split()] + [EOS]
        ids = np.concatenate([prompt, answer])
        samples.append(Sample(sample.sample_id, ids, np.arange(len(ids)) >= len(prompt)))
    assert score_answers(model, tokenizer, samples).rouge_l_recall.tolist() == [1.0] * 4
