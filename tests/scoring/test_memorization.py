"""MA, EL_n and Min-k% against hand-computed vectors and the definitions spelled out one sample at a time."""

import numpy as np
import pytest
import torch

from scoring.errors import UserError
from scoring.memorization import (
    extraction_likelihood,
    memorization_accuracy,
    min_k_percent,
    ngram_overlap,
)
from scoring.samples import Sample, collate, make_batches
from tests.tiny_models import random_samples, tiny_model

# With the training steps after which a model knows some of the texts, some half, some not at all.
ARCHITECTURES = {"llama": 14, "gpt2": 18, "qwen3": 12, "opt": 28}
EOS = 2


def texts(count: int) -> list[Sample]:
    """Samples of 6 to 20 tokens that end with the end token; one has an end token in its midst."""
    samples = []
    for sample in random_samples(count, seed=4):
        ids = np.where(sample.input_ids == EOS, 3, sample.input_ids)
        ids[-1] = EOS
        if sample.index == 2:
            ids[sample.length // 2] = EOS
        samples.append(Sample(sample.sample_id, ids, sample.scored, sample.index))
    return samples


SAMPLES = texts(6)


def trained(architecture: str, steps: int) -> torch.nn.Module:
    """A model that has begun to memorise SAMPLES[:4] and has not seen the other two."""
    model = tiny_model(architecture)
    batch = collate(SAMPLES[:4])
    labels = batch.input_ids.clone()
    labels[torch.arange(labels.shape[1]) >= batch.lengths.unsqueeze(1)] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=batch.input_ids, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def partly_trained(request):
    return trained(request.param, ARCHITECTURES[request.param])


@pytest.fixture(scope="module")
def memorised():
    return trained("llama", 150)


def plain_overlap(a: list[int], b: list[int], n: int, denominator: str) -> float:
    grams = [a[i : i + n] for i in range(len(a) - n + 1)]
    targets = [b[i : i + n] for i in range(len(b) - n + 1)]
    divisor = len(grams) if denominator == "generated" else len(targets)
    return sum(gram in targets for gram in grams) / divisor if divisor else 0.0


def plain_el(
    model: torch.nn.Module, sample: Sample, n: int, eos: int | None, denominator: str, shortest: int = 1
) -> float:
    """EL_n as printed: `generate` from every prefix; its output includes the end token."""
    model.generation_config.eos_token_id = eos
    x = sample.input_ids.tolist()
    overlaps = []
    for t in range(shortest, len(x) - n + 1):
        ids = torch.tensor([x[:t]])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(x) - t)
        overlaps.append(plain_overlap(output[0, t:].tolist(), x[t:], n, denominator))
    return float(np.mean(overlaps)) if overlaps else float("nan")


def test_memorization_accuracy_is_the_share_of_right_predictions(partly_trained):
    expected = []
    for sample in SAMPLES:
        with torch.no_grad():
            logits = partly_trained(torch.from_numpy(sample.input_ids).unsqueeze(0)).logits[0]
        right = [int(logits[t - 1].argmax()) == sample.input_ids[t] for t in np.flatnonzero(sample.scored)]
        expected.append(np.mean(right))
    scores = memorization_accuracy(partly_trained, collate(SAMPLES))
    assert scores.dtype == torch.float64
    np.testing.assert_allclose(scores, expected, rtol=1e-15)
    assert 0 < np.mean(expected[:4]) < 1
    for batch in make_batches(SAMPLES, 30):
        np.testing.assert_array_equal(memorization_accuracy(partly_trained, batch), np.array(expected)[batch.indices])


def test_memorization_accuracy_of_a_memorised_sample_is_one(memorised):
    assert memorization_accuracy(memorised, collate(SAMPLES[:2])).tolist() == [1.0, 1.0]


def test_ngram_overlap_by_hand():
    # 2-grams of a: 12 23 31 12; of b: 12 24 41 12 25. Two of a's four are in b: 12 twice.
    a, b = [1, 2, 3, 1, 2], [1, 2, 4, 1, 2, 5]
    assert ngram_overlap(a, b, 2) == 2 / 4
    assert ngram_overlap(a, b, 2, "reference") == 2 / 5
    assert ngram_overlap(np.array(a), np.array(b), 1) == 4 / 5  # 3 is not in b
    assert ngram_overlap(a, a, 5) == 1.0
    assert ngram_overlap(a, b, 6) == 0.0  # a has no 6-gram
    assert ngram_overlap([], b, 1) == 0.0
    assert ngram_overlap(b, [1], 2, "reference") == 0.0  # the reference has no 2-gram


@pytest.mark.slow
@pytest.mark.parametrize("denominator", ["generated", "reference"])
def test_extraction_likelihood_is_the_definition(partly_trained, denominator):
    for n, eos in ((3, EOS), (1, None)):
        expected = [plain_el(partly_trained, s, n, eos, denominator) for s in SAMPLES]
        scores = extraction_likelihood(partly_trained, SAMPLES, n, eos, denominator)
        assert scores.dtype == torch.float64
        np.testing.assert_allclose(scores, expected, rtol=1e-12)
        # Both what is memorised and what is not has been compared.
        assert max(expected) > 0.1
        assert min(expected) < 0.9


def test_extraction_likelihood_from_the_scored_tokens_on(partly_trained):
    expected = [plain_el(partly_trained, s, 3, EOS, "generated", int(np.flatnonzero(s.scored)[0])) for s in SAMPLES]
    scores = extraction_likelihood(partly_trained, SAMPLES, 3, EOS, scored_only=True)
    np.testing.assert_allclose(scores, expected, rtol=1e-12)


def test_extraction_likelihood_of_a_memorised_sample_is_one_and_decodes_next_to_nothing(memorised):
    passes = []
    handle = memorised.register_forward_pre_hook(
        lambda m, a, k: passes.append(k.get("past_key_values")), with_kwargs=True
    )
    scores = extraction_likelihood(memorised, SAMPLES[:2], 3, EOS, scored_only=True)
    handle.remove()
    assert scores.tolist() == [1.0, 1.0]
    assert passes == [None]  # one teacher-forced pass, no decoding


def test_extraction_likelihood_does_not_depend_on_the_batches(partly_trained):
    together = extraction_likelihood(partly_trained, SAMPLES, 3, EOS)
    apart = [extraction_likelihood(partly_trained, [s], 3, EOS).item() for s in SAMPLES]
    np.testing.assert_array_equal(together, apart)
    np.testing.assert_array_equal(together, extraction_likelihood(partly_trained, SAMPLES, 3, EOS, batch_tokens=40))


def test_extraction_likelihood_needs_more_than_n_tokens(memorised):
    samples = [Sample(str(t), np.arange(3, 3 + t), np.arange(t) >= 2) for t in (4, 5, 6)]
    assert extraction_likelihood(memorised, samples, 5).isnan().tolist() == [True, True, False]
    # From the first scored token, 2, on: 6 - 5 = 1 < 2 tokens of prefix, 6 - 4 = 2 are enough.
    assert extraction_likelihood(memorised, samples, 5, scored_only=True).isnan().tolist() == [
        True,
        True,
        True,
    ]
    assert extraction_likelihood(memorised, samples, 4, scored_only=True).isnan().tolist() == [
        True,
        True,
        False,
    ]
    assert extraction_likelihood(memorised, [], 5).tolist() == []


def test_a_continuation_shorter_than_n_scores_zero():
    """A model that always writes the end token: its continuation is that token alone."""
    model = tiny_model("llama", tied=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # all logits tie, argmax takes the first: token 0
    sample = Sample("s", np.array([5, 0, 0, 0, 0, 5]), np.arange(6) >= 1)
    # Prefixes 1..3: the continuations are (0) and end, none has a 3-gram.
    assert extraction_likelihood(model, [sample], 3, eos_token_id=0).tolist() == [0.0]
    # With another end token: 00000, 0000, 000 for the suffixes 00005, 0005, 005. The 3-gram 000 is in the
    # first two of them: (3/3 + 2/2 + 0/1) / 3.
    assert extraction_likelihood(model, [sample], 3, eos_token_id=1).item() == pytest.approx(2 / 3)
    # |ng(b)| is 3, 2, 1 as well.
    assert extraction_likelihood(model, [sample], 3, 1, "reference").item() == pytest.approx(2 / 3)


def test_min_k_percent_by_hand():
    logprobs = torch.tensor([[-0.1, -2.0, -0.5, -3.0, -0.2, -1.0], [-0.1, -2.0, -0.5, -9.0, -9.0, -9.0]])
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    # floor(.2 * 6) = 1: 3. floor(.4 * 6) = 2: (3 + 2) / 2. floor(.5 * 6) = 3: (3 + 2 + 1) / 3.
    # Three tokens: floor(.2 * 3) = 0 and floor(.4 * 3) = floor(.5 * 3) = 1 all take one: 2.
    for k, expected in ((0.2, [3.0, 2.0]), (0.4, [2.5, 2.0]), (0.5, [2.0, 2.0])):
        assert min_k_percent(logprobs, mask, k).tolist() == expected
    # All of them: 6.8 / 6 and 2.6 / 3.
    assert min_k_percent(logprobs, mask, 1.0).tolist() == pytest.approx([6.8 / 6, 2.6 / 3])
    assert min_k_percent(logprobs, torch.zeros_like(mask)).isnan().all()


def test_min_k_percent_counts_a_rounded_whole_number_as_whole():
    # 0.29 * 100 is 28.999999999999996 in floating point.
    logprobs = -torch.arange(1.0, 101.0).unsqueeze(0)
    lowest_29 = sum(range(72, 101)) / 29
    assert min_k_percent(logprobs, torch.ones(1, 100, dtype=torch.bool), 0.29).item() == lowest_29


def test_errors_are_one_line(memorised):
    logprobs, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    for k in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"^min-k% got k = .*: expected a share of tokens in \(0, 1\].*$"):
            min_k_percent(logprobs, mask, k)
    with pytest.raises(UserError, match=r"^n is 0: .*$"):
        ngram_overlap([1], [1], 0)
    with pytest.raises(UserError, match=r"^unknown denominator 'refrence': .* did you mean 'reference'\?$"):
        extraction_likelihood(memorised, SAMPLES, denominator="refrence")
