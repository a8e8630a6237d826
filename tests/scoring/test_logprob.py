"""Log-probs against fp64, where log_softmax in fp32 has lost its digits."""

import math

import pytest
import torch

from scoring.logprob import scored_logprobs, token_logprobs
from scoring.samples import collate
from tests.tiny_models import ARCHITECTURES, VOCABULARY, random_samples, tiny_model


def reference(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """fp64: -log(1 + sum_{j != t} exp(z_j - z_t)), by log1p of a plain sum."""
    own = logits.double().gather(-1, targets.unsqueeze(-1))
    odds = (logits.double() - own).exp().scatter(-1, targets.unsqueeze(-1), 0.0).sum(-1)
    return -torch.log1p(odds)


def test_by_hand():
    # Odds against token 0: (e^0 + e^0 + e^0) / e^2 = 3 e^-2; log p = -log(1 + 3 e^-2) = -0.340753.
    logprob = token_logprobs(torch.tensor([2.0, 0.0, 0.0, 0.0]), torch.tensor(0))
    assert logprob.item() == pytest.approx(-0.340753, abs=5e-7)
    assert token_logprobs(torch.zeros(4), torch.tensor(3)).item() == pytest.approx(-math.log(4), rel=1e-7)


@pytest.mark.parametrize("confidence", [1e-2, 1e-4, 1e-6, 1e-8, 1e-12])
def test_confident_tokens_keep_their_digits(confidence: float):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 50, generator=generator)
    targets = torch.randint(50, (2000, 1), generator=generator)
    # Lift the target so that the others together have the probability `confidence`.
    others = logits.scatter(-1, targets, -torch.inf).logsumexp(-1, keepdim=True)
    logits = logits.scatter(-1, targets, others - math.log(confidence))
    got, want = token_logprobs(logits, targets[:, 0]), reference(logits, targets[:, 0])
    assert ((got.double() - want) / want).abs().median() <= 1e-6
    assert ((got.double() - want) / want).abs().max() <= 1e-5
    if confidence == 1e-6:
        plain = torch.log_softmax(logits, -1).gather(-1, targets)[:, 0]
        assert ((plain.double() - want) / want).abs().median() > 1e-3, "log_softmax would have done"


def test_confident_model_end_to_end():
    """A whole model whose tokens have p = 1 - 1e-6: P_t against the same weights in fp64."""
    model = tiny_model("llama", tied=False)
    batch = collate(random_samples(16))
    with torch.no_grad():
        # A head that prefers one token per position: the targets are what the model itself is sure of.
        model.lm_head.weight.mul_(40)
        logits = model(input_ids=batch.input_ids).logits.double()
        best = logits.gather(1, batch.positions.unsqueeze(-1).expand(-1, -1, VOCABULARY))
        targets = best.argmax(-1)
        batch = type(batch)(**{**vars(batch), "targets": targets})
        got = scored_logprobs(model, batch)
        want = scored_logprobs(model.double(), batch)
    sure = batch.mask & (want > -1e-4) & (want < -1e-8)
    assert sure.sum() >= 20
    assert ((got.double() - want) / want)[sure].abs().median() <= 1e-5


def test_saturated_tokens_are_exactly_zero():
    logits = torch.tensor([[200.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    logprobs = token_logprobs(logits, torch.zeros(2, dtype=torch.long))
    assert logprobs[0] == 0
    assert logprobs[1] < 0


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_chunks_of_the_vocabulary_change_nothing(chunk: int):
    logits = torch.randn(5, 3, 50, generator=torch.Generator().manual_seed(1)) * 10
    targets = torch.arange(15).reshape(5, 3) * 3
    got = token_logprobs(logits, targets, chunk)
    torch.testing.assert_close(got.double(), reference(logits, targets), rtol=1e-6, atol=0)


def test_gradient_is_softmax_minus_onehot():
    logits = (torch.randn(6, 9, generator=torch.Generator().manual_seed(2)) * 4).double().requires_grad_()
    targets = torch.arange(6)
    token_logprobs(logits, targets, chunk=4).sum().backward()
    with torch.no_grad():
        want = torch.nn.functional.one_hot(targets, 9) - torch.softmax(logits, -1)
    torch.testing.assert_close(logits.grad, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scored_logprobs_are_those_of_the_whole_model(architecture: str):
    """Against the model's own full logits, one sample at a time, without padding."""
    model = tiny_model(architecture)
    samples = random_samples(6)
    with torch.no_grad():
        got = scored_logprobs(model, batch := collate(samples))
        for row, sample in enumerate(samples):
            ids = torch.from_numpy(sample.input_ids)
            full = model(input_ids=ids.unsqueeze(0), attention_mask=torch.ones(1, len(ids))).logits[0].double()
            where = torch.from_numpy(sample.scored).nonzero()[:, 0]
            want = torch.log_softmax(full[where - 1], -1).gather(-1, ids[where].unsqueeze(-1))[:, 0]
            torch.testing.assert_close(got[row][batch.mask[row]].double(), want, rtol=1e-5, atol=1e-6)
        assert (got[~batch.mask] == 0).all()
