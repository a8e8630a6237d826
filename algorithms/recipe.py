"""How a model is made to forget, as plain values, and what they say about objectives, layers and numbers of updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from algorithms.objectives import RETAIN_TERMS, find_algorithm, inputs_of, with_settings
from algorithms.reference import needs
from algorithms.samplers import ORDERS
from scoring.errors import UserError, unknown_name
from scoring.mrd import ESTIMATORS

UNITS = ("epochs", "steps")
DTYPES = ("float32", "bfloat16")
# Begins the names of what an objective is given of a sample's refusal.
REFUSAL = "refusal_"
DEFAULT_BATCH_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is made to forget. None takes the algorithm's own value.

    Attributes:
        algorithm: a key of ALGORITHMS.
        settings: of its objective, such as {"beta": 0.1}.
        retain_term: a key of RETAIN_TERMS, or "none".
        forget_weight, retain_weight: factors of the two terms.
        layer: whose output RMU works on, counted from 1; None: 7/32 of the depth, as published for 32 layers.
        trainable: regular expression searched in parameter names; None: all, and for RMU `layer` and the two before.
        lora_rank: 0 trains full weights. lora_alpha: None for twice the rank. lora_targets: None for all linear layers.
        epochs: an epoch is as many updates as it takes to draw the forget set once.
        max_steps: updates at most, whatever the epochs.
        batch_size: forget samples an update, over all workers; as many retain samples go with them.
        learning_rate, weight_decay, warmup_steps, clip_norm: of AdamW; the rate is constant after a linear warm-up.
            clip_norm None does not clip.
        dtype: "bfloat16" computes by autocast; weights stay in fp32.
        order: "weighted" draws p_i ∝ MRD_i^alpha; the others are fixed orders, see samplers.
        alpha: 1 is Algorithm 2 (easy first), 0 uniform, -1 Appendix B (hard first).
        replacement: draw with replacement within an epoch, as Algorithm 2 does.
        refresh, refresh_unit: m, how often MRD is measured again; 0: only before the first update.
        estimator, statistic, sigma, draws: of MRD, see scoring.mrd.
        early_stopping: a forgotten sample leaves the draw, and the run ends when all are forgotten.
        check_every, check_unit: how often samples are looked at; 0: never, as EL is dear where it is not asked for.
        el_n: tokens in an n-gram of EL.
        ma_threshold, el_threshold: what MA and EL of a forgotten sample are below; None: the averages over the forget
            set on the initial model. For parts of a forget set that are to be held to the same rule.
        seed: of everything that is drawn.
    """

    algorithm: str
    settings: dict[str, float] = field(default_factory=dict)
    retain_term: str | None = None
    forget_weight: float | None = None
    retain_weight: float | None = None
    layer: int | None = None
    trainable: str | None = None
    lora_rank: int = 0
    lora_alpha: int | None = None
    lora_targets: str | None = None
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    dtype: str = "float32"
    order: str = "weighted"
    alpha: float | None = None
    replacement: bool = True
    refresh: int = 2
    refresh_unit: str = "epochs"
    estimator: str = "gradient"
    statistic: str | None = None
    sigma: float = 1e-5
    draws: int | str | None = None
    early_stopping: bool = True
    check_every: int = 1
    check_unit: str = "epochs"
    el_n: int = 10
    ma_threshold: float | None = None
    el_threshold: float | None = None
    seed: int = 0

    def resolved(self) -> dict[str, Any]:
        """The fields that the algorithm decides, filled in.

        Raises:
            UserError: a value out of range or a combination that does not exist.
        """
        algorithm = find_algorithm(self.algorithm)
        with_settings(algorithm.forget, self.settings)
        if self.settings.get("beta", 1.0) <= 0:
            raise UserError(f"setting beta is {self.settings['beta']:g}: expected a number greater than 0")
        retain = self.retain_term or algorithm.retain
        if retain not in (None, "none", *RETAIN_TERMS):
            raise unknown_name("retain term", str(retain), ["none", *RETAIN_TERMS])
        for name, value, known in (
            ("order", self.order, ORDERS),
            ("dtype", self.dtype, DTYPES),
            ("refresh_unit", self.refresh_unit, UNITS),
            ("check_unit", self.check_unit, UNITS),
        ):
            if value not in known:
                raise unknown_name(name, value, known)
        if self.estimator not in ESTIMATORS:
            raise unknown_name("estimator", self.estimator, ESTIMATORS)
        estimator = ESTIMATORS[self.estimator]
        filled: dict[str, Any] = {
            "statistic": self.statistic or estimator.statistics[0],
            "draws": _or(self.draws, estimator.default_draws),
            "retain_term": retain or "none",
            "forget_weight": _or(self.forget_weight, algorithm.forget_weight),
            "retain_weight": _or(self.retain_weight, algorithm.retain_weight),
            # A number of updates alone is not cut by the algorithm's epochs.
            "epochs": _or(self.epochs, None if self.max_steps else algorithm.epochs),
            "batch_size": _or(self.batch_size, algorithm.batch_size or DEFAULT_BATCH_SIZE),
            "alpha": float(_or(self.alpha, algorithm.alpha or 0.0)),
            "lora_alpha": _or(self.lora_alpha, 2 * self.lora_rank) if self.lora_rank else None,
        }
        for name, least in (
            ("epochs", 1),
            ("max_steps", 1),
            ("batch_size", 1),
            ("refresh", 0),
            ("check_every", 0),
            ("warmup_steps", 0),
            ("lora_rank", 0),
            ("el_n", 1),
            ("layer", 1),
            ("seed", 0),
        ):
            value = filled.get(name, getattr(self, name))
            if value is not None and value < least:
                raise UserError(f"{name} is {value}: expected {least} or more")
        for name in ("learning_rate", "clip_norm", "forget_weight", "retain_weight", "weight_decay", "lora_alpha"):
            value = filled.get(name, getattr(self, name))
            least_open = name in ("learning_rate", "clip_norm", "lora_alpha")
            if value is not None and not (math.isfinite(value) and (value > 0 if least_open else value >= 0)):
                raise UserError(f"{name} is {value:g}: expected a number {'greater than' if least_open else 'from'} 0")
        for name in ("ma_threshold", "el_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} is {value:g}: expected a share in [0, 1]")
        if not math.isfinite(filled["alpha"]):
            raise UserError(f"alpha is {filled['alpha']}: expected a number; 1 easy first, 0 uniform, -1 hard first")
        if self.early_stopping and not self.check_every:
            raise UserError("check_every is 0: nobody looks which samples are forgotten; expected early_stopping false")
        if self.lora_rank and self.trainable:
            raise UserError("trainable and lora_rank exclude each other: adapters take lora_targets instead")
        return filled


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


@dataclass(frozen=True)
class Objectives:
    """The two terms of a resolved recipe and what they must be given."""

    forget: Callable[..., torch.Tensor]
    retain: Callable[..., torch.Tensor] | None
    forget_inputs: tuple[str, ...]
    retain_inputs: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> Objectives:
        algorithm = find_algorithm(recipe.algorithm)
        retain = None if recipe.retain_term in (None, "none") else RETAIN_TERMS[recipe.retain_term]
        return cls(
            with_settings(algorithm.forget, recipe.settings),
            retain,
            inputs_of(algorithm.forget),
            inputs_of(retain) if retain else (),
        )

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.forget_inputs, *self.retain_inputs)

    @property
    def needs_refusals(self) -> bool:
        return any(name.startswith(REFUSAL) for name in self.forget_inputs)

    @property
    def needs_layer(self) -> bool:
        return "hidden" in self.inputs

    def reference(self) -> dict[str, tuple[str, ...]]:
        """Role -> what of the initial model must be known, see `algorithms.reference`."""
        return needs({"forget": self.forget_inputs, "retain": self.retain_inputs})


def layer_of(recipe: Recipe, config: PreTrainedConfig) -> int | None:
    """The layer of a model that the objectives look at, None if they look at none.

    Raises:
        UserError: the model has not so many.
    """
    if not Objectives.of(recipe).needs_layer:
        return None
    depth = config.get_text_config().num_hidden_layers
    layer = recipe.layer or max(1, round(depth * 7 / 32))
    if layer > depth:
        raise UserError(f"layer is {layer}: the model has {depth} decoder layers")
    return layer


def updates_per_epoch(forget_samples: int, recipe: Recipe) -> int:
    """Updates that it takes to draw as many samples as there are. The same for every sampler, and however many are
    forgotten."""
    return math.ceil(forget_samples / (recipe.batch_size or 1))


def total_updates(forget_samples: int, recipe: Recipe) -> int:
    """Updates of a run in which nothing stops early."""
    limits = [recipe.max_steps] if recipe.max_steps else []
    if recipe.epochs:
        limits.append(recipe.epochs * updates_per_epoch(forget_samples, recipe))
    return min(limits)
