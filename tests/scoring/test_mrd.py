"""The two statistics and the four estimators against known answers."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from torch import nn
from transformers import PreTrainedConfig

from scoring.errors import UserError
from scoring.mrd import (
    Precision,
    Request,
    estimate,
    median_relative_error,
    reduce_draws,
    relative_change,
    scaling_slope,
)
from scoring.perturbation import fill_signs_
from scoring.replica import TransformersReplica
from scoring.samples import Sample, collate, make_batches
from tests.tiny_models import ARCHITECTURES, random_samples, tiny_model


class Softmax(nn.Module):
    """One token, four classes, the parameters are the logits: everything is known in closed form."""

    def __init__(self, logits: list[float], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(logits, dtype=dtype))
        self.head = nn.Identity()
        self.config = PreTrainedConfig(vocab_size=4)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return nn.Embedding(1, 1)

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.theta.expand(*input_ids.shape, 4)))


ONE_TOKEN = [Sample("x", np.array([1, 0]), np.array([False, True]))]
SIGMA = 0.1
# theta, P, Theorem 3.2, abs_mean and mean_abs by 4 million draws, first-order closed form.
KNOWN = [
    ([0.0, 0, 0, 0], -1.386294, 2.7051e-3, 2.6986e-3, 4.9872e-2, 4.9844e-2),
    ([2.0, 0, 0, 0], -0.340753, 6.8429e-3, 6.8502e-3, 7.8453e-2, 7.8076e-2),
    ([5.0, 0, 0, 0], -0.020012, 9.7698e-3, 9.8156e-3, 9.1998e-2, 9.1216e-2),
]


@pytest.fixture(params=KNOWN, ids=lambda known: f"theta{known[0][0]:.0f}")
def known(request: pytest.FixtureRequest):
    return request.param


def scores(model: nn.Module, estimator: str, statistic: str, draws: int) -> tuple[float, float]:
    batches = [collate(ONE_TOKEN)]
    result = estimate(TransformersReplica(model), batches, Request(estimator, SIGMA, 0, 0, draws))
    mrd, error = reduce_draws(result.values, statistic)
    return mrd.item(), error.item()


def test_known_log_probability(known):
    theta, logprob, *_ = known
    result = estimate(TransformersReplica(Softmax(theta)), [collate(ONE_TOKEN)], Request("monte-carlo", 0.1, 0, 0, 2))
    assert -result.nll.item() == pytest.approx(logprob, abs=5e-7)


@pytest.mark.filterwarnings("ignore:gradient")
def test_known_gradient_estimate(known):
    theta, *_, closed_form = known
    assert scores(Softmax(theta), "gradient", "mean_abs", 1)[0] == pytest.approx(closed_form, rel=2e-5)


@pytest.mark.slow
def test_known_curvature(known):
    """Theorem 3.2 twice: by the Hessian itself, and by the estimator averaged over all 16 sign vectors' draws."""
    theta, _, theorem, *_ = known
    logits = torch.tensor(theta, dtype=torch.float64)
    hessian = torch.func.hessian(lambda z: torch.log_softmax(z, 0)[0])(logits)
    exact = abs(SIGMA**2 / 2 * hessian.trace() / torch.log_softmax(logits, 0)[0]).item()
    assert exact == pytest.approx(theorem, rel=2e-5)
    mrd, error = scores(Softmax(theta), "curvature", "abs_mean", 500)
    assert abs(mrd - exact) <= 4 * error
    assert error < 0.05 * exact


@pytest.mark.slow
def test_known_monte_carlo(known):
    theta, _, _, _, mean_abs, _ = known
    mrd, error = scores(Softmax(theta), "monte-carlo", "mean_abs", 5000)
    assert abs(mrd - mean_abs) <= 4 * error
    assert error == pytest.approx(0.76 * mean_abs / math.sqrt(5000), rel=0.1)


@pytest.mark.slow
def test_known_antithetic(known):
    theta, _, _, abs_mean, _, _ = known
    mrd, error = scores(Softmax(theta), "antithetic", "abs_mean", 3000)
    assert abs(mrd - abs_mean) <= 4 * error
    assert error < 0.03 * abs_mean


def test_relative_change_by_hand():
    base = torch.tensor([[-1.0, -2.0, 0.0], [-4.0, -0.5, -0.1]])
    moved = torch.tensor([[-1.1, -1.0, 0.0], [-4.0, -0.4, -0.2]])
    # (-1 + 1.1)/-1 + (-2 + 1)/-2 = -0.1 + 0.5; the third token is saturated and left out.
    # 0 + (-0.5 + 0.4)/-0.5 + (-0.1 + 0.2)/-0.1 = 0.2 - 1.
    np.testing.assert_allclose(relative_change(base, moved), [0.4, -0.8], atol=1e-6)


def test_statistics_by_hand():
    values = np.array([[1.0, -3.0, 2.0, -4.0], [0.0, 0.0, 0.0, 0.0]])
    mrd, error = reduce_draws(values, "mean_abs")
    # |1|, |-3|, |2|, |-4|: mean 2.5, standard deviation sqrt(5/3), over sqrt(4).
    np.testing.assert_allclose((mrd, error), ([2.5, 0], [math.sqrt(5 / 3) / 2, 0]))
    mrd, error = reduce_draws(values, "abs_mean")
    # Mean -1; squared deviations 4, 4, 9, 9: standard deviation sqrt(26/3), over sqrt(4).
    np.testing.assert_allclose((mrd, error), ([1, 0], [math.sqrt(26 / 3) / 2, 0]))
    assert median_relative_error(values[:1], "abs_mean") == pytest.approx(math.sqrt(26 / 3) / 2)


def test_algorithm_1_as_printed():
    """A second implementation, in fp64, of the paper's loop over draws and tokens with the same noise."""
    model = tiny_model("gpt2", tied=True).double()  # which transformers computes in fp64 as it is
    samples = random_samples(3)
    result = estimate(TransformersReplica(model), make_batches(samples, 40), Request("monte-carlo", 1e-4, 7, 0, 6))
    base = {name: p.detach().clone() for name, p in model.named_parameters()}

    def logprobs(sample: Sample) -> list[float]:
        ids = torch.from_numpy(sample.input_ids).unsqueeze(0)
        with torch.no_grad():
            table = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        return [table[t - 1, ids[0, t]].item() for t in np.flatnonzero(sample.scored)]

    reference = TransformersReplica(copy.deepcopy(model))
    for sample in samples:
        own = np.flatnonzero(result.indices == sample.index).item()
        before = logprobs(sample)
        for draw in range(6):
            reference.perturb(1e-4, 7, draw)
            model.load_state_dict(reference.model.state_dict())
            after = logprobs(sample)
            delta = sum((p - q) / p for p, q in zip(before, after, strict=True))
            assert result.values[own, draw] == pytest.approx(delta, rel=1e-7)
            model.load_state_dict(base, strict=False)
        assert result.nll[own] == pytest.approx(-sum(before), rel=1e-9)


@pytest.mark.slow
def test_monte_carlo_agrees_with_the_gradient_form():
    """At sigma = 1e-5 in fp32, within 3 standard errors for at least 95 % of the samples."""
    model, batches = tiny_model("llama", tied=True), make_batches(random_samples(60), 400)
    drawn = estimate(TransformersReplica(model), batches, Request("monte-carlo", 1e-5, 0, 0, 200))
    closed, _ = reduce_draws(
        estimate(TransformersReplica(model), batches, Request("gradient", 1e-5, 0)).values, "mean_abs"
    )
    mrd, error = reduce_draws(drawn.values, "mean_abs")
    assert np.mean(np.abs(mrd - closed) <= 3 * error) >= 0.95
    # ... and not because the errors are wide: the relative standard error is 0.76 / sqrt(K).
    assert np.median(error / mrd) == pytest.approx(0.755 / math.sqrt(200), rel=0.15)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_curvature_along_a_direction(architecture: str):
    """Series in fp32 on a padded batch against fp64 reverse mode twice, token by token."""
    model, samples = tiny_model(architecture), random_samples(2)
    implementation = "eager" if architecture == "gemma2" else "sdpa"  # the other leaves out its soft-capping
    model.set_attn_implementation(implementation)
    got = TransformersReplica(model).second_derivatives(collate(samples), 3, 1).double()
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    for module in exact.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # torch would leave out a row that the perturbation moves
    parameters = dict(exact.named_parameters())
    signs = [fill_signs_(torch.empty(p.shape), 3, 1, n).double() for n, p in parameters.items()]

    def along(gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return sum((g * v).sum() for g, v in zip(gradients, signs, strict=True))

    for row, sample in enumerate(samples):
        ids = torch.from_numpy(sample.input_ids)
        where = torch.from_numpy(sample.scored).nonzero()[:, 0]
        logits = exact(input_ids=ids.unsqueeze(0), attention_mask=torch.ones(1, len(ids))).logits[0, where - 1]
        logprobs = torch.log_softmax(logits, -1).gather(-1, ids[where].unsqueeze(-1))[:, 0]
        want = []
        for logprob in logprobs:
            first = torch.autograd.grad(logprob, list(parameters.values()), create_graph=True)
            second = torch.autograd.grad(along(first), list(parameters.values()), retain_graph=True)
            want.append(along(second).item())
        scale = max(abs(value) for value in want)
        np.testing.assert_allclose(got[row, : len(want)].numpy(), want, rtol=1e-5, atol=1e-5 * scale)
    assert model.config._attn_implementation == implementation


class HalfDifferentiated(torch.autograd.Function):
    """A square whose derivative forward mode believes to be constant, by a function that has no series."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.hypot(torch.zeros_like(x), x).square()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.double = 2 * inputs[0].detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * gradient

    @staticmethod
    def jvp(ctx, tangent: torch.Tensor) -> torch.Tensor:
        return ctx.double * tangent


def test_a_function_that_is_not_differentiated_twice_is_noticed():
    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return HalfDifferentiated.apply(x)

    model = tiny_model()
    model.model.layers[0].mlp.act_fn = Square()
    with pytest.raises(UserError, match=r"^curvature: Llama.*forward and reverse mode differ .*antithetic"):
        TransformersReplica(model).second_derivatives(collate(random_samples(3)), 0, 0)


@pytest.mark.slow
def test_curvature_against_the_hessian_trace(monkeypatch: pytest.MonkeyPatch):
    """Theorem 3.2 with the fp64 Hessian of a model small enough to form it.

    The columns of a Hadamard matrix are orthogonal, so the mean of v^T H v over its rows v is the trace itself: in
    place of random signs they leave no sampling error, and the bound can be tight.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, tie_word_embeddings=True, **size)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    rng = np.random.default_rng(0)
    samples = [Sample(str(i), rng.integers(0, 11, 6), np.arange(6) > 1, i) for i in range(2)]
    batch = collate(samples)
    exact = copy.deepcopy(model).double()
    names = [name for name, _ in exact.named_parameters()]
    shapes = [p.shape for _, p in exact.named_parameters()]
    flat = torch.cat([p.detach().flatten() for p in exact.parameters()])

    def weighted(vector: torch.Tensor, row: int) -> torch.Tensor:
        pieces = vector.split([s.numel() for s in shapes])
        values = {n: piece.view(s) for n, piece, s in zip(names, pieces, shapes, strict=True)}
        ids = batch.input_ids[row : row + 1]
        logits = torch.func.functional_call(exact, values, (), {"input_ids": ids, "use_cache": False}).logits[0]
        logprobs = torch.log_softmax(logits[1:-1], -1).gather(-1, ids[0, 2:].unsqueeze(-1))[:, 0]
        return (logprobs / logprobs.detach()).sum()

    exact.set_attn_implementation("eager")
    want = []
    for row in range(2):
        hessian = torch.autograd.functional.hessian(lambda v, row=row: weighted(v, row), flat)
        want.append(abs(0.5 * SIGMA**2 * hessian.trace().item()))
    rows, offsets = hadamard(256), dict(zip(names, np.cumsum([0] + [s.numel() for s in shapes]), strict=False))
    assert len(flat) <= 256

    def fill(tensor: torch.Tensor, seed: int, draw: int, name: str) -> torch.Tensor:
        own = rows[draw, offsets[name] : offsets[name] + tensor.numel()]
        return tensor.copy_(torch.from_numpy(own).view_as(tensor))

    monkeypatch.setattr("scoring.curvature.fill_signs_", fill)
    result = estimate(TransformersReplica(model), [batch], Request("curvature", SIGMA, 0, 0, 256))
    np.testing.assert_allclose(reduce_draws(result.values, "abs_mean")[0], want, rtol=1e-3)


@pytest.mark.slow
def test_antithetic_agrees_with_curvature():
    model = tiny_model("gpt2").double()
    batches = make_batches(random_samples(6), 200)
    pairs = estimate(TransformersReplica(model), batches, Request("antithetic", 1e-4, 0, 0, 60)).values
    curved = estimate(TransformersReplica(model), batches, Request("curvature", 1e-4, 0, 0, 60)).values
    error = np.hypot(pairs.std(1, ddof=1), curved.std(1, ddof=1)) / math.sqrt(60)
    assert np.all(np.abs(pairs.mean(1) - curved.mean(1)) <= 4 * error)


@pytest.mark.slow
def test_antithetic_in_fp32_says_when_rounding_is_not_small():
    """At sigma = 2e-4 the errors are those that the standard error announces; at 1e-5 rounding is reported."""
    model, batches = tiny_model("llama"), make_batches(random_samples(40), 400)
    replica = TransformersReplica(model)
    single = estimate(replica, batches, Request("antithetic", 2e-4, 0, 0, 60)).values
    assert replica.rounding_share < 0.05
    double = estimate(TransformersReplica(copy.deepcopy(model).double()), batches, Request("curvature", 2e-4, 0, 0, 60))
    error = np.hypot(single.std(1, ddof=1), double.values.std(1, ddof=1)) / math.sqrt(60)
    deviation = (single.mean(1) - double.values.mean(1)) / error
    assert np.mean(np.abs(deviation) <= 3) >= 0.95
    small = TransformersReplica(model)
    estimate(small, batches, Request("antithetic", 1e-5, 0, 0, 10))
    assert small.rounding_share > 0.1


@pytest.mark.slow
def test_scaling_slopes():
    """1 for mean_abs, 2 for abs_mean; bfloat16 with the noise lost in storage shows neither."""
    model, batches = tiny_model("llama"), make_batches(random_samples(12), 200)
    sigmas = [1e-5, 1e-4, 1e-3]

    def slope(replica: TransformersReplica, estimator: str, statistic: str, at: list[float]) -> float:
        values = [estimate(replica, batches, Request(estimator, s, 0, 0, 16)).values for s in at]
        return scaling_slope(at, np.stack([reduce_draws(v, statistic)[0] for v in values]))

    assert slope(TransformersReplica(model), "monte-carlo", "mean_abs", sigmas) == pytest.approx(1, abs=0.05)
    # GPT-2, since Llama's norms compute in fp32 even in an fp64 model, and the O(sigma^2) term drowns.
    double = TransformersReplica(tiny_model("gpt2").double())
    assert slope(double, "antithetic", "abs_mean", sigmas) == pytest.approx(2, abs=0.05)
    rounded = TransformersReplica(copy.deepcopy(model).bfloat16(), allow_lost_perturbation=True)
    assert slope(rounded, "monte-carlo", "mean_abs", [1e-6, 1e-5, 1e-4]) < 0.8


def test_slope_by_hand():
    assert scaling_slope([1.0, 10.0, 100.0], np.array([[3.0], [30.0], [300.0]])) == pytest.approx(1)
    assert scaling_slope([1.0, 2.0], np.array([[5.0, 1, 9], [20.0, 4, 36]])) == pytest.approx(2)


def test_draws_are_the_same_however_they_are_cut():
    model, batches = tiny_model("qwen2"), make_batches(random_samples(6), 60)
    replica = TransformersReplica(model)
    whole = estimate(replica, batches, Request("monte-carlo", 1e-3, 0, 0, 9)).values
    pieces = [estimate(replica, batches, Request("monte-carlo", 1e-3, 0, a, b)).values for a, b in ((0, 4), (4, 9))]
    assert np.array_equal(whole, np.concatenate(pieces, axis=1))


@pytest.mark.slow
def test_auto_stops_at_the_tolerance():
    model, batches = tiny_model(), make_batches(random_samples(20), 200)
    replica = TransformersReplica(model)
    request = Request("monte-carlo", 1e-4, 0)
    rough = estimate(replica, batches, request, precision=Precision("mean_abs", 0.1, draws_per_step=10))
    fine = estimate(replica, batches, request, precision=Precision("mean_abs", 0.05, draws_per_step=10))
    assert median_relative_error(rough.values, "mean_abs") <= 0.1
    assert median_relative_error(fine.values, "mean_abs") <= 0.05
    # (0.756 / tolerance)^2: 57 and 229.
    assert 40 <= rough.values.shape[1] <= 80
    assert 180 <= fine.values.shape[1] <= 280
    assert np.array_equal(rough.values, fine.values[:, : rough.values.shape[1]])
    bounded = estimate(
        replica, batches, request, precision=Precision("abs_mean", 0.01, draws_per_step=10, most_draws=25)
    )
    assert bounded.values.shape[1] == 25


def test_saturated_tokens_are_counted_and_left_out():
    model = Softmax([300.0, 0, 0, 0], torch.float32)
    samples = [*ONE_TOKEN, Sample("y", np.array([1, 1, 0]), np.array([False, True, True]), 1)]
    result = estimate(TransformersReplica(model), [collate(samples)], Request("monte-carlo", 1e-3, 0, 0, 4))
    assert result.saturated.tolist() == [1, 1]
    assert np.all(result.values[0] == 0)
    assert np.all(np.isfinite(result.values[1]))
    assert np.all(result.values[1] != 0)
