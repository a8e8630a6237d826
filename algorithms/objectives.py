"""The unlearning objectives, and the algorithms that are made of them.

An objective is a pure function of tensors, with no model inside, and is minimised. It returns one term a sample,
(B,). The loss of a batch is the mean over its samples, so it does not depend on how the batch is cut into
micro-batches or spread over workers.

The signature of an objective tells the training loop all about it: its positional parameters are the inputs that
the loop gives it, keys of INPUTS; its keyword-only parameters with defaults are its settings, which a spec may
override. Adding an algorithm is one function and one line in ALGORITHMS.

Written here: P_t = log p_t of a scored token, l_t = -P_t, l = mean_t l_t and L = Sum_t l_t of one sample, all over
its scored tokens only. Padding never contributes, whatever is stored there, and gets a gradient of 0. The
arithmetic is fp32, or fp64 for fp64 inputs.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from scoring.errors import UserError, unknown_name
from scoring.registry import Registry
from scoring.sample_gradients import mean_negative_log_likelihood, negative_log_likelihood

# An objective: inputs, then settings -> one term per sample, (B,).
Objective = Callable[..., torch.Tensor]

# The inputs that the training loop can give an objective. S, R: scored tokens of the longest sample or refusal.
# What is said of refusals holds for alternative answers too, see Algorithm.teaches.
INPUTS: dict[str, str] = {
    "logprobs": "(B, S) fp32 nats: log-probs P_t of the sample's scored tokens; 0 where mask is False",
    "mask": "(B, S) bool: which entries are scored tokens and not padding; at least one a sample",
    "targets": "(B, S) int64: the scored tokens",
    "logits": "(B, S, V): logits at the scored positions",
    "hidden": "(B, S, d): output of decoder layer `layer` at the positions of the scored tokens themselves",
    "reference_nll": "(B,) fp64 nats: summed NLL L of the sample under the initial model",
    "reference_logits": "(B, S, V): logits of the initial model at the scored positions",
    "reference_hidden": "(B, S, d): `hidden` of the initial model",
    "refusal_logprobs": "(B, R) fp32 nats: log-probs of the refusal drawn for the sample, put after its question",
    "refusal_mask": "(B, R) bool: which entries of refusal_logprobs are tokens and not padding",
    "refusal_reference_nll": "(B,) fp64 nats: summed NLL of the same refusal under the initial model",
    "direction": "(d,): RMU's random unit vector u",
}
# The names of inputs that belong to a sample's refusal begin so.
REFUSAL_PREFIX = "refusal_"


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32; fp64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _blank(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A (B, S) or (B, S, n) tensor with zeros at padding, in fp32 at least. This comes before any arithmetic: a nan
    that is masked only afterwards still makes gradients nan, as 0 * nan."""
    return _precise(tensor).masked_fill(~mask if tensor.dim() == mask.dim() else ~mask.unsqueeze(-1), 0.0)


def _token_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the scored tokens of each sample, (B, S) -> (B,)."""
    return values.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)


def _log_ratio(logprobs: torch.Tensor, mask: torch.Tensor, reference_nll: torch.Tensor) -> torch.Tensor:
    """log pi(x) - log pi_ref(x) of each sample, summed over its tokens, (B,)."""
    summed = negative_log_likelihood(_precise(logprobs), mask)
    return (reference_nll - summed).to(summed.dtype)


def _softened(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """-(2/beta) log sigmoid(beta margin), (B,) -> (B,): falls with slope -2 far below 0, and levels off above."""
    return -(2 / beta) * F.logsigmoid(beta * margin)


# Forget objectives.


def ga(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Gradient ascent: -l. Jang et al. 2023."""
    return -nll(logprobs, mask)


def po(refusal_logprobs: torch.Tensor, refusal_mask: torch.Tensor) -> torch.Tensor:
    """Preference optimisation: the mean NLL of a refusal after the question. Maini et al. 2024."""
    return nll(refusal_logprobs, refusal_mask)


def npo(logprobs: torch.Tensor, mask: torch.Tensor, reference_nll: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """Negative preference optimisation: -(2/beta) log sigmoid(beta (L - L_ref)). Zhang et al. 2024.

    L is the sum over the answer's tokens, not their mean: the log-ratio is that of the whole answer. As
    beta -> 0 the gradient is that of -L.
    """
    return _softened(-_log_ratio(logprobs, mask, reference_nll), beta)


def simnpo(logprobs: torch.Tensor, mask: torch.Tensor, *, beta: float = 4.5, delta: float = 0.0) -> torch.Tensor:
    """NPO without a reference: -(2/beta) log sigmoid(beta (l - delta)), l the mean. Fan et al. 2024.

    ALGORITHMS weighs the forget term by 0.125 and the retain term by 1, as the authors' code and open-unlearning do.
    In the paper's formula 0.125 stands at the retain term: a balance 64 times as much towards forgetting.
    """
    return _softened(nll(logprobs, mask) - delta, beta)


def dpo(
    logprobs: torch.Tensor,
    mask: torch.Tensor,
    refusal_logprobs: torch.Tensor,
    refusal_mask: torch.Tensor,
    reference_nll: torch.Tensor,
    refusal_reference_nll: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    """DPO with another answer preferred, and with NPO's factor 2/beta. Rafailov et al. 2023; with a refusal IdkDPO,
    Maini et al. 2024; with a plausible alternative AltPO, Mekala et al. 2024.

    -(2/beta) log sigmoid(beta [(log pi(other) - log pi_ref(other)) - (log pi(answer) - log pi_ref(answer))]),
    log pi a sum over tokens.
    """
    refusal = _log_ratio(refusal_logprobs, refusal_mask, refusal_reference_nll)
    return _softened(refusal - _log_ratio(logprobs, mask, reference_nll), beta)


def rmu(hidden: torch.Tensor, mask: torch.Tensor, direction: torch.Tensor, *, c: float = 6.5) -> torch.Tensor:
    """Representation misdirection: the mean of (h - c u)^2 over the scored tokens and features. Li et al. 2024.

    h is the output at a token's own position, as in the authors' code, and not where the token is predicted.
    """
    return hidden_mse(hidden, mask, (c * _precise(direction)).expand_as(hidden))


def undial(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    reference_logits: torch.Tensor,
    *,
    beta: float = 10.0,
) -> torch.Tensor:
    """Self-distillation with adjusted logits: cross-entropy to softmax(reference_logits - beta onehot(target)),
    the mean over the answer's tokens. Dong et al. 2024."""
    indices = targets.masked_fill(~mask, 0).unsqueeze(-1)  # padding may hold -100, which is no index
    teacher = _blank(reference_logits, mask)
    teacher = teacher.scatter(-1, indices, teacher.gather(-1, indices) - beta)
    cross_entropy = -(teacher.softmax(-1) * _blank(logits, mask).log_softmax(-1)).sum(-1)
    return _token_mean(cross_entropy, mask)


def ceu(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross-entropy unlearning: cross-entropy to the model's own distribution without the target, the mean over the
    answer's tokens. Yang 2025.

    The teacher is softmax of the logits with the target's at -inf; no gradient passes through it. All tokens of the
    answer count, where open-unlearning leaves out the first.
    """
    indices = targets.masked_fill(~mask, 0).unsqueeze(-1)  # padding may hold -100, which is no index
    logits = _blank(logits, mask)
    teacher = logits.detach().scatter(-1, indices, -math.inf).softmax(-1)
    return _token_mean(-(teacher * logits.log_softmax(-1)).sum(-1), mask)


def flat(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logit-margin flattening: (max_v z_v - mean_v z_v)^2, the mean over the answer's tokens. Entesari et al. 2025.

    It is 0 where all tokens are equally likely. The published code takes the mean over every position of the padded
    batch, prompts and padding included; here, as for every objective, the answer's tokens count.
    """
    logits = _blank(logits, mask)
    return _token_mean((logits.amax(-1) - logits.mean(-1)).square(), mask)


def wga(logprobs: torch.Tensor, mask: torch.Tensor, *, beta: float = 1.0) -> torch.Tensor:
    """Weighted gradient ascent: -mean_t p_t^beta l_t. Wang et al. 2025.

    The weights are constants: no gradient passes through them, as in the publication.
    """
    logprobs = _blank(logprobs, mask)
    weights = (beta * logprobs.detach()).exp()
    return _token_mean(weights * logprobs, mask)


def satimp(logprobs: torch.Tensor, mask: torch.Tensor, *, beta1: float = 5.0, beta2: float = 1.0) -> torch.Tensor:
    """Saturation and importance: -mean_t p_t^beta1 (1 - p_t)^beta2 l_t. Yang et al. 2025.

    The weights are constants: no gradient passes through them, as in the publication. 1 - p comes from P_t without
    a difference of nearly equal numbers, so it keeps its digits as p -> 1. ALGORITHMS weighs this term by 0.1 and the
    retain term by 1, as the published configuration does.
    """
    logprobs = _blank(logprobs, mask)
    fixed = logprobs.detach()
    weights = (beta1 * fixed).exp() * (-torch.expm1(fixed)) ** beta2
    return _token_mean(weights * logprobs, mask)


# Retain terms. The first also learns a forget set: TaskVector and Relearn.


def nll(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """l, the mean NLL of the sample's tokens."""
    return mean_negative_log_likelihood(_precise(logprobs), mask)


def kl(logits: torch.Tensor, mask: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || current) of the next-token distribution, the mean over the sample's scored tokens."""
    current = _blank(logits, mask).log_softmax(-1)
    reference = _blank(reference_logits, mask).log_softmax(-1)
    return _token_mean((reference.exp() * (reference - current)).sum(-1), mask)


def hidden_mse(hidden: torch.Tensor, mask: torch.Tensor, reference_hidden: torch.Tensor) -> torch.Tensor:
    """The mean of (h - h_ref)^2 over scored positions and features."""
    difference = _blank(hidden, mask) - _blank(reference_hidden, mask)
    return _token_mean(difference.square().mean(-1), mask)


# The terms that an algorithm can add on the retain set, by the names that a spec uses.
RETAIN_TERMS: Registry[Objective] = Registry("retain term", {"nll": nll, "kl": kl, "hidden": hidden_mse}, of=Callable)


def inputs_of(function: Objective) -> tuple[str, ...]:
    """The inputs of an objective: its positional parameters, keys of INPUTS, in order.

    Raises:
        TypeError: a parameter that is not in INPUTS.
    """
    parameters = inspect.signature(function).parameters.values()
    names = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
    for name in names:
        if name not in INPUTS:
            raise TypeError(
                f"{_name(function)}: parameter {name!r} is no input: expected one of {', '.join(INPUTS)}; "
                "a setting is keyword-only and has a default"
            )
    return names


def settings_of(function: Objective) -> dict[str, float]:
    """The settings of an objective and their defaults: its keyword-only parameters.

    Raises:
        TypeError: a keyword-only parameter without a default.
    """
    settings = {}
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            if p.default is p.empty:
                raise TypeError(f"{_name(function)}: setting {p.name!r} has no default")
            settings[p.name] = p.default
    return settings


def with_settings(function: Objective, settings: Mapping[str, float]) -> Objective:
    """The objective with some of its settings changed.

    Raises:
        UserError: a name that is no setting of the objective, or a value that is not a finite number.
    """
    known = settings_of(function)
    for name, value in settings.items():
        if not known:
            raise UserError(f"unknown setting of {_name(function)} {name!r}: it has no settings")
        if name not in known:
            raise unknown_name(f"setting of {_name(function)}", name, known)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"setting {name} of {_name(function)} is {value!r}: expected a finite number")
    return functools.partial(function, **settings)


def _name(function: Objective) -> str:
    """The name of a function, also if some of its settings were changed."""
    name: str = getattr(function, "func", function).__name__
    return name


@dataclass(frozen=True)
class Algorithm:
    """A forget objective, a retain term, and how they are trained; a spec may override all but `forget`.

    The loss of a step is forget_weight * mean of `forget` over the forget batch + retain_weight * mean of the retain
    term over the retain batch.

    Attributes:
        forget: the objective on the forget set.
        retain: the key of RETAIN_TERMS of the term on the retain set; None: the retain set is not used.
        forget_weight: weight of the forget objective.
        retain_weight: weight of the retain term.
        epochs: passes over the forget set.
        batch_size: forget samples a step; None: the spec's default.
        alpha: forget sample i is drawn with probability proportional to MRD_i^alpha; 0: uniformly; None: the
            spec's default.
        teaches: what the refusal inputs of `forget` are: one of the refusals, or one of the sample's own alternative
            answers.
        retain_limit, dual_step, dual_warmup: see `Recipe`; None: the retain weight is a constant.
        negation: see `Recipe`; 0: the model is the one that was trained.

    Raises:
        TypeError: a function with an input that is not in INPUTS, or a setting without a default.
        UserError: an unknown retain term.
    """

    forget: Objective
    retain: str | None = None
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    epochs: int = 5
    batch_size: int | None = None
    alpha: float | None = None
    teaches: Literal["refusals", "alternatives"] = "refusals"
    retain_limit: float | None = None
    dual_step: float | None = None
    dual_warmup: int | None = None
    negation: float = 0.0

    def __post_init__(self) -> None:
        if self.retain is not None and self.retain not in RETAIN_TERMS:
            raise unknown_name("retain term", self.retain, RETAIN_TERMS)
        for function in (self.forget, *([] if self.retain is None else [RETAIN_TERMS[self.retain]])):
            inputs_of(function)
            settings_of(function)


# The epochs are those of the MRD paper on TOFU: 4 for NPO, 5 for the others.
ALGORITHMS: Registry[Algorithm] = Registry(
    "algorithm",
    {
        "GA": Algorithm(ga),
        "SGA": Algorithm(ga, batch_size=1, alpha=0.0),
        "CGA": Algorithm(ga, batch_size=1, alpha=1.0),
        "GradDiff": Algorithm(ga, "nll"),
        "GradDiff-KL": Algorithm(ga, "kl"),
        "PO": Algorithm(po, "nll"),
        "NPO": Algorithm(npo, epochs=4),
        "NPO-GradDiff": Algorithm(npo, "nll", epochs=4),
        "SimNPO": Algorithm(simnpo, "nll", forget_weight=0.125),
        "IdkDPO": Algorithm(dpo, "nll"),
        "AltPO": Algorithm(dpo, "nll", teaches="alternatives"),
        "RMU": Algorithm(rmu, "hidden"),
        "UNDIAL": Algorithm(undial),
        "CE-U": Algorithm(ceu),
        "WGA": Algorithm(wga, "nll"),
        "SatImp": Algorithm(satimp, "nll", forget_weight=0.1),
        # As published for TOFU.
        "PDU": Algorithm(flat, "nll", retain_weight=100.0, epochs=10, retain_limit=0.3, dual_step=5.0, dual_warmup=5),
        "TaskVector": Algorithm(nll, negation=1.0),
        # Learns the forget set again, as an attacker and the metric Relearn do with a model that has forgotten.
        "Relearn": Algorithm(nll),
    },
    of=Algorithm,
)


def algorithm_name(name: str) -> str:
    """An algorithm's name as ALGORITHMS spells it, given in upper or lower case.

    Raises:
        UserError: there is none; the message has the nearest name.
    """
    for known in ALGORITHMS:
        if known.lower() == name.lower():
            return known
    raise unknown_name("algorithm", name, ALGORITHMS)


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of that name; see `algorithm_name`."""
    return ALGORITHMS[algorithm_name(name)]
