"""Objectives against hand-computed values, finite differences and scipy; the registry against its promises."""

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from algorithms import objectives
from algorithms.objectives import (
    ALGORITHMS,
    INPUTS,
    RETAIN_TERMS,
    Algorithm,
    ceu,
    dpo,
    find_algorithm,
    flat,
    ga,
    hidden_mse,
    inputs_of,
    kl,
    nll,
    npo,
    po,
    rmu,
    satimp,
    settings_of,
    simnpo,
    undial,
    wga,
    with_settings,
)
from scoring.errors import UserError

FUNCTIONS = [ga, po, npo, simnpo, dpo, rmu, undial, ceu, flat, wga, satimp, nll, kl, hidden_mse]
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
DIFFERENTIATED = {"logprobs", "refusal_logprobs", "logits", "hidden"}
# Which mask says what of an input is padding.
PADDED = {
    **dict.fromkeys(["logprobs", "targets", "logits", "hidden", "reference_logits", "reference_hidden"], "mask"),
    "refusal_logprobs": "refusal_mask",
}
JUNK = 123.0  # a padded entry: would be noticed


def random_inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """Everything in INPUTS in fp64: 3 samples of 4, 2 and 1 tokens, refusals of 1, 3 and 2, 5 classes, 3 features."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "logprobs": -normal(3, 4).abs() - 0.05,
        "mask": torch.arange(4) < torch.tensor([[4], [2], [1]]),
        "targets": torch.randint(5, (3, 4), generator=g),
        "logits": 2 * normal(3, 4, 5),
        "hidden": normal(3, 4, 3),
        "reference_nll": 3 * normal(3).abs(),
        "reference_logits": 4 * normal(3, 4, 5),
        "reference_hidden": normal(3, 4, 3),
        "refusal_logprobs": -normal(3, 3).abs() - 0.05,
        "refusal_mask": torch.arange(3) < torch.tensor([[1], [3], [2]]),
        "refusal_reference_nll": 3 * normal(3).abs(),
        "direction": torch.nn.functional.normalize(torch.rand(3, generator=g, dtype=torch.float64), dim=0),
    }


def call(function: Callable, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return function(*[inputs[name] for name in inputs_of(function)])


def value_and_gradients(function: Callable, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """The terms, and the gradients of their sum with weights 1, 2, 3: a mix-up of samples would be seen."""
    leaves = {n: inputs[n].clone().requires_grad_() for n in inputs_of(function) if n in DIFFERENTIATED}
    terms = call(function, {**inputs, **leaves})
    weights = torch.arange(1, len(terms) + 1)
    gradients = torch.autograd.grad((terms * weights).sum(), list(leaves.values()))
    return terms.detach(), dict(zip(leaves, gradients, strict=True))


# By hand. Two samples of two tokens and of one; what stands in the padded place is JUNK.

LOGPROBS = torch.tensor([[-1.0, -2.0], [-0.5, JUNK]])
MASK = torch.tensor([[True, True], [True, False]])


def test_ga_nll_and_po_by_hand():
    # (1 + 2) / 2 and 0.5 / 1.
    assert nll(LOGPROBS, MASK).tolist() == [1.5, 0.5]
    assert ga(LOGPROBS, MASK).tolist() == [-1.5, -0.5]
    assert po(LOGPROBS, MASK).tolist() == [1.5, 0.5]


# At 0: 20 log 2. +5: 20 log(1 + e^-.5) = 20 * .4740770. -5: that of +5, and 20 * .5. +20: 20 log(1 + e^-2).
@pytest.mark.parametrize(("excess", "want"), [(0, 13.862944), (5, 9.481540), (-5, 19.481540), (20, 2.538560)])
def test_npo_by_hand(excess: float, want: float):
    # L is 1 + 2 and 0.5; the second sample's L - L_ref is always 5.
    reference = torch.tensor([3.0 - excess, 0.5 - 5], dtype=torch.float64)
    got = npo(LOGPROBS, MASK, reference)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, [want, 9.481540], atol=2e-6)
    assert want == pytest.approx(20 * math.log(1 + math.exp(-0.1 * excess)), abs=1e-6)
    # beta = 1: 2 log(1 + e^-5) for the second sample.
    assert npo(LOGPROBS, MASK, reference, beta=1.0)[1].item() == pytest.approx(2 * 0.006715348, rel=1e-5)


def test_npo_takes_the_sum_and_not_the_mean():
    # l = 1 for both, L = 2 and 4: 20 log(1 + e^-.2) = 20 * .5981389 and 20 log(1 + e^-.4) = 20 * .5130153.
    logprobs = torch.tensor([[-1.0, -1.0, JUNK, JUNK], [-0.5, -1.5, -1.0, -1.0]])
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    got = npo(logprobs, mask, torch.zeros(2, dtype=torch.float64))
    assert got.tolist() == pytest.approx([11.962778, 10.260306], rel=1e-6)
    assert simnpo(logprobs, mask)[0] == simnpo(logprobs, mask)[1]


def test_simnpo_by_hand():
    # (2 / 4.5) log(1 + e^-.45) = .444444 * .493249; (2 / 4.5) log(1 + e^-4.5) = .444444 * .0110477.
    logprobs = torch.tensor([[-0.05, -0.15], [-1.0, JUNK]])
    assert simnpo(logprobs, MASK).tolist() == pytest.approx([0.219222, 0.00491011], rel=3e-6)
    # l - delta is -1 and -0.1, so e^+1 and e^+.1 with beta = 1: 2 * 1.3132617 and 2 * .7443967.
    deltas = torch.tensor([[-0.5, -0.5], [-1.4, JUNK]])
    assert simnpo(deltas, MASK, beta=1.0, delta=1.5).tolist() == pytest.approx([2.6265234, 1.4887933], rel=1e-6)


def test_dpo_by_hand():
    # Answers: log pi = -3, -0.5; log pi_ref = -2, -4.5: -1 and +4.
    # Refusals: log pi = -2, -6; log pi_ref = -6, -7: +4 and +1. Margins: 4 - (-1) = 5 and 1 - 4 = -3.
    # 20 log(1 + e^-.5) = 9.481540; 20 log(1 + e^.3) = 20 * .8543552.
    refusal, refusal_mask = torch.tensor([[-2.0, JUNK, JUNK], [-1.0, -2.0, -3.0]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
    references = torch.tensor([2.0, 4.5]).double(), torch.tensor([6.0, 7.0]).double()
    got = dpo(LOGPROBS, MASK, refusal, refusal_mask.bool(), *references)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([9.481540, 17.087105], rel=1e-6)
    # beta = 1: 2 log(1 + e^-5) and 2 log(1 + e^3) = 2 * 3.0485874.
    got = dpo(LOGPROBS, MASK, refusal, refusal_mask.bool(), *references, beta=1.0)
    assert got.tolist() == pytest.approx([2 * 0.006715348, 6.0971747], rel=1e-5)


def test_rmu_and_hidden_mse_by_hand():
    hidden = torch.tensor([[[3.0, 1.0], [0.0, 2.0]], [[0.0, 0.0], [JUNK, JUNK]]])
    # c u = (2, 0): ((1 + 1) + (4 + 4)) / 4 and (4 + 0) / 2.
    assert rmu(hidden, MASK, torch.tensor([1.0, 0.0]), c=2.0).tolist() == [2.5, 2.0]
    # c u = 6.5 (.6, .8) = (3.9, 5.2): ((.81 + 17.64) + (15.21 + 10.24)) / 4 and 6.5^2 / 2.
    assert rmu(hidden, MASK, torch.tensor([0.6, 0.8])).tolist() == pytest.approx([10.975, 21.125], rel=1e-6)
    # Differences (1, 1), (0, -1) and (3, 0): (1 + 1 + 0 + 1) / 4 and 9 / 2.
    reference = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[-3.0, 0.0], [-JUNK, 0.0]]])
    assert hidden_mse(hidden, MASK, reference).tolist() == [0.75, 4.5]


def test_undial_by_hand():
    # Teachers: (10 - 10, 0) -> (1/2, 1/2); (0, 10 + log 3 - 10) -> (1/4, 3/4); (0, 0 - 10) -> (1, e^-10) / (1 + e^-10).
    reference = torch.tensor([[[10.0, 0.0], [0.0, 10 + math.log(3)]], [[0.0, 0.0], [JUNK, 0.0]]])
    targets = torch.tensor([[0, 1], [1, -100]])
    # Students: (1/4, 3/4), (1/2, 1/2), (1/4, 3/4).
    logits = torch.tensor([[[0.0, math.log(3)], [7.0, 7.0]], [[0.0, math.log(3)], [0.0, JUNK]]])
    # (1/2) log 4 + (1/2) log(4/3) = .8369882; log 2 = .6931472; .99995460 log 4 + .00004540 log(4/3) = 1.3862445.
    got = undial(logits, targets, MASK, reference)
    assert got.tolist() == pytest.approx([(0.8369882 + 0.6931472) / 2, 1.3862445], rel=1e-6)
    # beta = 0: CE to (e^10, 1) / (e^10 + 1) is .9999546 log 4 + .0000454 log(4/3); to (1, 3 e^10) / ...: log 2;
    # to (1/2, 1/2): .8369882.
    got = undial(logits, targets, MASK, reference, beta=0.0)
    assert got.tolist() == pytest.approx([(1.3862445 + 0.6931472) / 2, 0.8369882], rel=1e-6)


def test_ceu_by_hand():
    # Of (1/2, 1/4, 1/4) without the first: (0, 1/2, 1/2), CE = log 4; without the second: (2/3, 0, 1/3), CE =
    # (2/3) log 2 + (1/3) log 4 = .9241962. Of (1/4, 1/2, 1/4) without the third: (1/3, 2/3, 0), CE the same.
    quarter, half = math.log(1 / 4), math.log(1 / 2)
    first = [half, quarter, quarter]
    logits = torch.tensor([[first, first], [[quarter + 7, half + 7, quarter + 7], [JUNK, 0.0, 0.0]]])
    targets = torch.tensor([[0, 1], [2, -100]])
    assert ceu(logits, targets, MASK).tolist() == pytest.approx([(1.3862944 + 0.9241962) / 2, 0.9241962], rel=1e-6)


def test_flat_by_hand():
    # (3, 0, 0): (3 - 1)^2; all alike: 0; (-1, 2, 5): (5 - 2)^2.
    logits = torch.tensor([[[3.0, 0.0, 0.0], [7.0, 7.0, 7.0]], [[-1.0, 2.0, 5.0], [JUNK, 0.0, 0.0]]])
    assert flat(logits, MASK).tolist() == [2.0, 9.0]


HALVES = torch.tensor([[math.log(1 / 2), math.log(1 / 4)], [math.log(1 / 2), JUNK]])


def test_wga_by_hand():
    # (1/2 * .6931472 + 1/4 * 1.3862944) / 2 and 1/2 * .6931472.
    assert wga(HALVES, MASK).tolist() == pytest.approx([-0.3465736, -0.3465736], rel=1e-6)
    # beta = 2: (1/4 * .6931472 + 1/16 * 1.3862944) / 2 and 1/4 * .6931472; beta = 0 is GA.
    assert wga(HALVES, MASK, beta=2.0).tolist() == pytest.approx([-0.1299651, -0.1732868], rel=1e-6)
    assert wga(HALVES, MASK, beta=0.0).tolist() == ga(HALVES, MASK).tolist()


def test_satimp_by_hand():
    # 2^-5 * 1/2 * .6931472 = .01083042; 4^-5 * 3/4 * 1.3862944 = .001015352.
    assert satimp(HALVES, MASK).tolist() == pytest.approx([-(0.01083042 + 0.001015352) / 2, -0.01083042], rel=1e-6)
    # 1/2 * 1/4 * .6931472 = .0866434; 1/4 * 9/16 * 1.3862944 = .1949477.
    got = satimp(HALVES, MASK, beta1=1.0, beta2=2.0).tolist()
    assert got == pytest.approx([-(0.0866434 + 0.1949477) / 2, -0.0866434], rel=1e-6)
    assert satimp(HALVES, MASK, beta1=0.0, beta2=0.0).tolist() == ga(HALVES, MASK).tolist()


@pytest.mark.parametrize("gap", [1e-6, 1e-3, 0.5])
def test_satimp_keeps_the_digits_of_confident_tokens(gap: float):
    logprob = torch.tensor([[math.log1p(-gap)]])
    want = logprob.item() * (p := math.exp(logprob.item())) ** 5 * -math.expm1(logprob.item())
    assert satimp(logprob, torch.tensor([[True]])).item() == pytest.approx(want, rel=1e-6)
    # For p = 1 - 1e-6: p^5 (1 - p) log p = -(1 - 5e-6) 1e-6 (1e-6 + .5e-12), to the rounding of P_t to fp32.
    if gap == 1e-6:
        assert want == pytest.approx(-(1 - 5e-6) * 1e-6 * (1e-6 + 0.5e-12), rel=3e-7)
        assert abs((1 - logprob.exp()).item() / (1 - p) - 1) > 1e-3, "1 - exp would have done"


def test_kl_by_hand():
    # Reference (1/2, 1/2), current (1/4, 3/4): (1/2) log 2 + (1/2) log(2/3) = .1438410; equal ones: 0.
    # The second sample the other way round: (1/4) log(1/2) + (3/4) log(3/2) = .1308120.
    three = [0.0, math.log(3)]
    current = torch.tensor([[three, [5.0, 6.0]], [[1.0, 1.0], [JUNK, 0.0]]])
    reference = torch.tensor([[[2.0, 2.0], [0.0, 1.0]], [three, [0.0, 0.0]]])
    assert kl(current, MASK, reference).tolist() == pytest.approx([0.1438410 / 2, 0.1308120], rel=1e-5)


# Against other implementations.


@pytest.mark.parametrize("beta", [10.0, 1.5])
def test_undial_against_scipy(beta: float):
    x = random_inputs(1)
    got = undial(*[x[name] for name in inputs_of(undial)], beta=beta)
    for row in range(3):
        tokens = []
        for t in np.flatnonzero(x["mask"][row]):
            teacher = x["reference_logits"][row, t].numpy().copy()
            teacher[x["targets"][row, t]] -= beta
            tokens.append(-softmax(teacher) @ log_softmax(x["logits"][row, t].numpy()))
        assert got[row].item() == pytest.approx(np.mean(tokens), rel=1e-12)


def test_kl_against_scipy():
    x = random_inputs(2)
    got = call(kl, x)
    for row in range(3):
        tokens = [
            entropy(softmax(x["reference_logits"][row, t].numpy()), softmax(x["logits"][row, t].numpy()))
            for t in np.flatnonzero(x["mask"][row])
        ]
        assert got[row].item() == pytest.approx(np.mean(tokens), rel=1e-12)


# What holds for all of them.


def with_fixed_teacher(at: torch.Tensor) -> Callable:
    """CE-U with the teacher of the logits `at`, token by token."""

    def fixed(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, length in enumerate(mask.sum(-1).tolist()):
            losses = []
            for t in range(length):
                others = [v for v in range(at.shape[-1]) if v != targets[row, t]]
                student = logits[row, t] - torch.logsumexp(logits[row, t], 0)
                losses.append(-(torch.from_numpy(softmax(at[row, t, others].numpy())) * student[others]).sum())
            rows.append(sum(losses) / length)
        return torch.stack(rows)

    fixed.__signature__ = inspect.signature(ceu)  # type: ignore[attr-defined]
    return fixed


def with_fixed_weights(function: Callable, at: torch.Tensor) -> Callable:
    """WGA and SatImp with the weights of the log-probs `at`, token by token."""

    def weight(p: float) -> float:
        return p if function is wga else p**5 * (1 - p)

    weights = [[weight(math.exp(value)) for value in row] for row in at.tolist()]

    def fixed(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, length in enumerate(mask.sum(-1).tolist()):
            rows.append(sum(weights[row][t] * logprobs[row, t] for t in range(length)) / length)
        return torch.stack(rows)

    return fixed


@each_function
def test_gradient_is_that_of_finite_differences(function: Callable):
    inputs = random_inputs(3)
    values, gradients = value_and_gradients(function, inputs)
    plain = with_fixed_weights(function, inputs["logprobs"]) if function in (wga, satimp) else function
    plain = with_fixed_teacher(inputs["logits"]) if function is ceu else plain
    torch.testing.assert_close(call(plain, inputs), values, rtol=1e-12, atol=0)
    assert gradients
    step, weights = 1e-5, torch.arange(1, 4)
    for name, gradient in gradients.items():
        differences = torch.zeros_like(gradient).flatten()
        for i in range(len(differences)):
            ends = []
            for sign in (1, -1):
                moved = inputs[name].clone()
                moved.view(-1)[i] += sign * step
                ends.append((call(plain, {**inputs, name: moved}) * weights).sum())
            differences[i] = (ends[0] - ends[1]) / (2 * step)
        assert differences.abs().max() > 1e-3
        error = (gradient.flatten() - differences).abs().max() / differences.abs().max()
        assert error < 1e-6


@pytest.mark.parametrize("junk", [JUNK, math.nan, math.inf, -math.inf])
@each_function
def test_padding_contributes_nothing(function: Callable, junk: float):
    inputs = random_inputs(4)
    changed = dict(inputs)
    for name, mask in PADDED.items():
        padding = ~inputs[mask].view(inputs[mask].shape + (1,) * (inputs[name].dim() - 2))
        changed[name] = inputs[name].masked_fill(padding, -100 if name == "targets" else junk)
    assert set(PADDED) & set(inputs_of(function))
    (values, gradients), (others, other_gradients) = (value_and_gradients(function, x) for x in (inputs, changed))
    assert torch.equal(values, others)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name])
        assert (gradient[~inputs[PADDED[name]]] == 0).all()
        assert (gradient[inputs[PADDED[name]]] != 0).any()


@each_function
def test_one_term_a_sample_however_the_batch_is_cut(function: Callable):
    inputs = random_inputs(5)
    together = call(function, inputs)
    assert together.shape == (3,)
    for row in range(3):
        one = {n: x if n == "direction" else x[row : row + 1] for n, x in inputs.items()}
        # Without the padding as well.
        for name, mask in [*PADDED.items(), ("mask", "mask"), ("refusal_mask", "refusal_mask")]:
            one[name] = one[name][:, : int(inputs[mask][row].sum())]
        torch.testing.assert_close(call(function, one), together[row : row + 1], rtol=1e-14, atol=0)


@each_function
def test_arithmetic_is_fp32_at_least(function: Callable):
    """Half-precision logits and hidden states are widened before anything is done with them."""
    inputs = random_inputs(6)
    half = {
        name: x if not x.is_floating_point() or name.endswith("nll") else x.bfloat16() for name, x in inputs.items()
    }
    # The same numbers in fp64.
    exact = {name: x.double() if x.is_floating_point() else x for name, x in half.items()}
    got, want = call(function, half), call(function, exact)
    assert got.dtype == torch.float32
    assert want.dtype == torch.float64
    torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=1e-6)


# The registry.


def test_algorithms_are_those_of_the_table():
    rows = {
        name: (a.forget.__name__, a.retain, a.forget_weight, a.retain_weight, a.epochs, a.batch_size, a.alpha)
        for name, a in ALGORITHMS.items()
    }
    assert rows == {
        "GA": ("ga", None, 1, 1, 5, None, None),
        "SGA": ("ga", None, 1, 1, 5, 1, 0),
        "CGA": ("ga", None, 1, 1, 5, 1, 1),
        "GradDiff": ("ga", "nll", 1, 1, 5, None, None),
        "GradDiff-KL": ("ga", "kl", 1, 1, 5, None, None),
        "PO": ("po", "nll", 1, 1, 5, None, None),
        "NPO": ("npo", None, 1, 1, 4, None, None),
        "NPO-GradDiff": ("npo", "nll", 1, 1, 4, None, None),
        "SimNPO": ("simnpo", "nll", 0.125, 1, 5, None, None),
        "IdkDPO": ("dpo", "nll", 1, 1, 5, None, None),
        "AltPO": ("dpo", "nll", 1, 1, 5, None, None),
        "RMU": ("rmu", "hidden", 1, 1, 5, None, None),
        "UNDIAL": ("undial", None, 1, 1, 5, None, None),
        "CE-U": ("ceu", None, 1, 1, 5, None, None),
        "WGA": ("wga", "nll", 1, 1, 5, None, None),
        "SatImp": ("satimp", "nll", 0.1, 1, 5, None, None),
        "PDU": ("flat", "nll", 1, 100, 10, None, None),
        "TaskVector": ("nll", None, 1, 1, 5, None, None),
        "Relearn": ("nll", None, 1, 1, 5, None, None),
    }


def test_what_few_algorithms_have():
    rows = {name: (a.teaches, a.retain_limit, a.dual_step, a.dual_warmup, a.negation) for name, a in ALGORITHMS.items()}
    assert {name: row for name, row in rows.items() if row != ("refusals", None, None, None, 0.0)} == {
        "AltPO": ("alternatives", None, None, None, 0.0),
        "PDU": ("refusals", 0.3, 5.0, 5, 0.0),
        "TaskVector": ("refusals", None, None, None, 1.0),
    }


def test_inputs_and_settings_are_read_off_the_signature():
    assert inputs_of(npo) == ("logprobs", "mask", "reference_nll")
    assert settings_of(npo) == {"beta": 0.1}
    assert settings_of(satimp) == {"beta1": 5.0, "beta2": 1.0}
    assert settings_of(ga) == {}
    used = set()
    for function in [*(a.forget for a in ALGORITHMS.values()), *RETAIN_TERMS.values()]:
        positional = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert inputs_of(function) == tuple(p.name for p in positional)
        used |= set(inputs_of(function))
    assert used == set(INPUTS)
    assert set(random_inputs()) == set(INPUTS)


def test_find_algorithm():
    assert find_algorithm("NPO-GradDiff") is ALGORITHMS["NPO-GradDiff"]
    assert find_algorithm("graddiff-kl") is ALGORITHMS["GradDiff-KL"]
    assert find_algorithm("SATIMP") is ALGORITHMS["SatImp"]
    assert len({name.lower() for name in ALGORITHMS}) == len(ALGORITHMS)
    with pytest.raises(
        UserError, match=r"^unknown algorithm 'SimNP': expected one of GA, .*; did you mean 'SimNPO'\?$"
    ):
        find_algorithm("SimNP")


def test_with_settings():
    changed = with_settings(simnpo, {"beta": 1.0, "delta": 1.5})
    logprobs = torch.tensor([[-0.5, -0.5], [-1.4, JUNK]])
    assert changed(logprobs, MASK).tolist() == simnpo(logprobs, MASK, beta=1.0, delta=1.5).tolist()
    assert settings_of(with_settings(simnpo, {"delta": 1})) == {"beta": 4.5, "delta": 1}
    assert inputs_of(changed) == ("logprobs", "mask")
    assert with_settings(ga, {})(LOGPROBS, MASK).tolist() == [-1.5, -0.5]
    with pytest.raises(UserError, match=r"^unknown setting of simnpo 'dleta': .*; did you mean 'delta'\?$"):
        with_settings(changed, {"dleta": 1.0})
    with pytest.raises(UserError, match=r"^unknown setting of npo 'mask': expected one of beta$"):
        with_settings(npo, {"mask": 1.0})
    with pytest.raises(UserError, match=r"^unknown setting of ga 'beta': it has no settings$"):
        with_settings(ga, {"beta": 1.0})
    for value in (math.nan, math.inf, "0.1", True, None):
        with pytest.raises(UserError, match=r"^setting beta of npo is .*: expected a finite number$"):
            with_settings(npo, {"beta": value})


def test_a_new_algorithm_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch):
    def bounded(logprobs: torch.Tensor, mask: torch.Tensor, *, most: float = 4.0) -> torch.Tensor:
        return -nll(logprobs, mask).clamp_max(most)

    monkeypatch.setitem(ALGORITHMS, "BoundedGA", Algorithm(bounded, "nll"))

    found = find_algorithm("boundedga")
    assert inputs_of(found.forget) == ("logprobs", "mask")
    assert settings_of(found.forget) == {"most": 4.0}
    assert with_settings(found.forget, {"most": 1.0})(LOGPROBS, MASK).tolist() == [-1.0, -0.5]


def test_a_function_that_the_loop_cannot_serve_is_a_programming_error(monkeypatch: pytest.MonkeyPatch):
    def misspelt(logprobs, masks):
        return logprobs

    def positional_setting(logprobs, mask, beta=0.1):
        return logprobs

    def anything(logprobs, **others):
        return logprobs

    def no_default(logprobs, mask, *, beta):
        return logprobs

    for function, parameter in ((misspelt, "masks"), (positional_setting, "beta"), (anything, "others")):
        with pytest.raises(TypeError, match=rf"{function.__name__}: parameter '{parameter}' is no input"):
            inputs_of(function)
        with pytest.raises(TypeError, match=rf"{function.__name__}: parameter '{parameter}' is no input"):
            Algorithm(function)
    with pytest.raises(TypeError, match="no_default: setting 'beta' has no default"):
        Algorithm(no_default)
    monkeypatch.setitem(objectives.RETAIN_TERMS, "bad", misspelt)
    with pytest.raises(TypeError, match="misspelt: parameter 'masks'"):
        Algorithm(ga, "bad")
    with pytest.raises(UserError, match=r"^unknown retain term 'nil': .*; did you mean 'nll'\?$"):
        Algorithm(ga, "nil")
