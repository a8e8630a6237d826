"""How a model is made to forget, as settings, and the objectives, layer and number of updates that follow from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from transformers import PreTrainedConfig

from algorithms.alone import LossAlone
from algorithms.ease import FLIP_TIME, MRD, SOURCES, check_source, is_file
from algorithms.group import Strategy
from algorithms.objectives import (
    ALGORITHMS,
    REFUSAL_PREFIX,
    RETAIN_TERMS,
    Algorithm,
    find_algorithm,
    inputs_of,
    with_settings,
)
from algorithms.reference import Quantity, Role, needed_quantities
from algorithms.samplers import ORDERS
from algorithms.schedule import ForgetGroup, Schedule, resolved_schedule
from algorithms.stopping import DEFAULT, PAPER, RULES, ma_of_rule
from scoring.cluster import GPU_SHARE
from scoring.errors import UserError
from scoring.mrd import EstimatorName, NumberOfDraws, Sigma, StatisticChoice, statistic_and_draws
from scoring.samples import BATCH_TOKENS_ARE
from scoring.settings import Doc, Expected, Ge, Gt, Known, Le, build, check, current_naming, described, named, naming
from scoring.updates import ABOUT_OPTIMIZERS, OptimizerName

Unit = Literal["epochs", "steps"]
DEFAULT_BATCH_SIZE = 4
# Answers of each set that are measured after an epoch: writing them takes as long as training on about as many.
EVALUATED = 24
# Learning, as an objective of the loop: each sample once an epoch, and nobody looks what is forgotten.
LEARNS = "Relearn"
LEARNING = {"alpha": 0.0, "replacement": False, "early_stopping": False, "check_every": 0}
# The settings of a retain weight that follows the retain loss.
DUAL = ("retain_limit", "dual_step", "dual_warmup")


# Settings of everything that is trained by the loop.
LoraRank = Annotated[int, Ge(0), Doc("rank of adapters; 0 trains full weights")]
LoraAlpha = Annotated[int | None, Gt(0), Doc("of the adapters (default: twice the rank)")]
LoraTargets = Annotated[str | None, Doc("regular expression of layers that get adapters (default: all linear ones)")]
MaxSteps = Annotated[int | None, Ge(1), Doc("updates at most, whatever the epochs")]
Optimizer = Annotated[OptimizerName, Doc(ABOUT_OPTIMIZERS)]
LearningRate = Annotated[float, Gt(0), Doc("of the optimiser, constant after the warm-up")]
WeightDecay = Annotated[float, Ge(0), Doc("of the optimiser")]
WarmupSteps = Annotated[int, Ge(0), Doc("updates over which the learning rate grows linearly")]
ClipNorm = Annotated[
    float | None, Gt(0), Doc("the gradient is scaled down to this norm; an empty value in a spec file turns it off")
]
ComputeType = Annotated[Literal["float32", "bfloat16"], Doc("bfloat16 computes by autocast; weights stay in fp32")]
Seed = Annotated[int, Ge(0), Doc("of everything that is drawn")]


def _algorithms() -> Iterable[str]:
    return ALGORITHMS


def _retain_terms() -> Iterable[str]:
    return ["none", *RETAIN_TERMS]


def _orders() -> Iterable[str]:
    return ORDERS


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is made to forget. None takes the algorithm's default."""

    algorithm: Annotated[str, Known(_algorithms), Doc("see the table of algorithms")]
    settings: Annotated[dict[str, float], Doc("of the objective, such as beta=0.1; several: beta1=5,beta2=1")] = field(
        default_factory=dict
    )
    retain_term: Annotated[
        str | None,
        Known(_retain_terms),
        Doc("what is minimised on the retain set (default: the algorithm's)"),
    ] = None
    forget_weight: Annotated[float | None, Ge(0), Doc("factor of the forget term (default: the algorithm's)")] = None
    retain_weight: Annotated[float | None, Ge(0), Doc("factor of the retain term (default: the algorithm's)")] = None
    retain_limit: Annotated[
        float | None,
        Gt(0),
        Doc(
            "nats: the retain weight grows by dual_step times what the retain loss of an update exceeds this by, and "
            "falls likewise, down to 0 (default: the algorithm's, mostly none: the weight is constant)"
        ),
    ] = None
    dual_step: Annotated[float | None, Gt(0), Doc("see retain_limit (default: the algorithm's, else 1)")] = None
    dual_warmup: Annotated[
        int | None,
        Ge(0),
        Doc("epochs with a constant retain weight before retain_limit acts (default: likewise, else 0)"),
    ] = None
    negation: Annotated[
        float | None,
        Ge(0),
        Doc("s: the model is initial - s (trained - initial); 0: the trained one (default: 1 for TaskVector, else 0)"),
    ] = None
    layer: Annotated[
        int | None,
        Ge(1),
        Doc("whose output RMU works on, counted from 1 (default: 7/32 of the depth, as published for 32 layers)"),
    ] = None
    trainable: Annotated[
        str | None,
        Doc("regular expression searched in parameter names (default: all; RMU: its layer and the two before)"),
    ] = None
    lora_rank: LoraRank = 0
    lora_alpha: LoraAlpha = None
    lora_targets: LoraTargets = None
    epochs: Annotated[
        int | None,
        Ge(1),
        Doc("an epoch is as many updates as it takes to draw the forget set once (default: the algorithm's)"),
    ] = None
    max_steps: MaxSteps = None
    batch_size: Annotated[
        int | None, Ge(1), Doc("forget samples an update, over all workers (default: 4; 1 for SGA and CGA)")
    ] = None
    optimizer: Optimizer = "adamw"
    learning_rate: LearningRate = 5e-5
    weight_decay: WeightDecay = 0.0
    warmup_steps: WarmupSteps = 0
    clip_norm: ClipNorm = 1.0
    dtype: ComputeType = "float32"
    order: Annotated[str, Known(_orders), Doc("weighted draws p_i ∝ MRD_i^alpha; the others are fixed orders")] = (
        "weighted"
    )
    weights: Annotated[
        str,
        Expected(SOURCES),
        Doc("what draws and orders go by instead of MRD: flip-time is 1/forecast; FILE:COLUMN has sample_id, numbers"),
    ] = MRD
    alpha: Annotated[
        float | None,
        Expected("a number; 1 easy first, 0 uniform, -1 hard first"),
        Doc("1 easy first (Algorithm 2), 0 uniform, -1 hard first (Appendix B) (default: the algorithm's, mostly 0)"),
    ] = None
    replacement: Annotated[bool, Doc("draw with replacement within an epoch, as Algorithm 2 does")] = True
    refresh: Annotated[
        int, Ge(0), Doc("m: measure MRD or forecast again every so many refresh units; 0: only before the first update")
    ] = 2
    refresh_unit: Annotated[Unit, Doc("of refresh")] = "epochs"
    estimator: Annotated[EstimatorName, Doc("of MRD")] = "gradient"
    statistic: StatisticChoice = None
    sigma: Sigma = 1e-5
    draws: NumberOfDraws = None
    schedule: Annotated[
        str | dict[str, Any] | None,
        Expected("a mapping with groups, or the YAML file of one"),
        Doc("YAML file: groups of forget samples, from easy to hard, each with its own algorithm or strength"),
    ] = None
    hold_penalty: Annotated[
        float,
        Ge(0),
        Doc("factor of the norm of the gradient of a forget sample's log-odds, which is added to the loss"),
    ] = 0.0
    reward: Annotated[
        float, Ge(0), Doc("a forget sample's term is multiplied by forecast^reward, scaled to mean 1 over the batch")
    ] = 0.0
    early_stopping: Annotated[
        bool | None,
        Doc(
            "a forgotten sample leaves the draw, and the run ends when all are forgotten (default: yes, unless "
            "check_every is 0)"
        ),
    ] = None
    stopping: Annotated[
        str | None,
        Expected(RULES),
        Doc(
            "when a sample counts as forgotten: ma=NUMBER when its MA is below; paper when MA and EL are both below "
            "their averages on the initial model (default: ma=0.5; paper where ma_threshold or el_threshold is given)"
        ),
    ] = None
    check_every: Annotated[
        int | None,
        Ge(0),
        Doc(
            "how often to look which samples are forgotten, in check units; 0: never (default: every epoch, or less "
            "often where a look costs more than the training since the last one)"
        ),
    ] = None
    check_unit: Annotated[Unit, Doc("of check_every")] = "epochs"
    el_n: Annotated[int, Ge(1), Doc("tokens in an n-gram of extraction likelihood")] = 10
    ma_threshold: Annotated[
        float | None, Ge(0), Le(1), Doc("by the paper's rule, instead of the average MA on the initial model")
    ] = None
    el_threshold: Annotated[
        float | None, Ge(0), Le(1), Doc("by the paper's rule, instead of the average EL on the initial model")
    ] = None
    seed: Seed = 0

    def resolved(self) -> dict[str, Any]:
        """The fields whose defaults depend on the algorithm, with their values.

        Raises:
            UserError: a value that is not allowed, or a combination that does not exist.
        """
        check(self)
        algorithm = find_algorithm(self.algorithm)
        with_settings(algorithm.forget, self.settings)
        if self.settings.get("beta", 1.0) <= 0:
            raise UserError(
                f"{named('settings')}['beta'] is {self.settings['beta']:g}: expected a number greater than 0"
            )
        statistic, draws = statistic_and_draws(self.estimator, self.statistic, self.draws)
        filled: dict[str, Any] = {
            "statistic": statistic,
            "draws": draws,
            "retain_term": self.retain_term or algorithm.retain or "none",
            "forget_weight": _value_or(self.forget_weight, algorithm.forget_weight),
            "retain_weight": _value_or(self.retain_weight, algorithm.retain_weight),
            # If only a number of updates is given, the algorithm's epochs do not limit it.
            "epochs": _value_or(self.epochs, None if self.max_steps else algorithm.epochs),
            "batch_size": _value_or(self.batch_size, algorithm.batch_size or DEFAULT_BATCH_SIZE),
            "alpha": float(_value_or(self.alpha, algorithm.alpha or 0.0)),
            "lora_alpha": _value_or(self.lora_alpha, 2 * self.lora_rank) if self.lora_rank else None,
            **self._dual(algorithm),
            # Who never looks cannot stop early.
            "early_stopping": _value_or(self.early_stopping, self.check_every != 0),
            "stopping": self._rule(),
            # None where nobody asked for it, as in the identities of runs from before there was such a setting.
            "negation": _value_or(self.negation, algorithm.negation or None),
        }
        check_source("weights", self.weights)
        schedule = self._resolved_schedule(filled["forget_weight"])
        self._check_forecasts(schedule)
        if schedule is not None:
            filled["schedule"] = dataclasses.asdict(schedule)
        if self.early_stopping and self.check_every == 0:
            raise UserError(
                f"{named('early_stopping')} and {named('check_every')} 0 exclude each other: nobody looks which "
                "samples are forgotten; leave out one of them"
            )
        if filled["retain_limit"] is not None and filled["retain_term"] == "none":
            raise UserError(
                f"{named('retain_limit')} limits the retain term, and there is none: give {named('retain_term')}"
            )
        forecasts = FLIP_TIME in (self.weights, schedule.by if schedule else None) or self.reward
        if filled["negation"] and (forecasts or self.hold_penalty):
            raise UserError(
                f"{named('negation')} does not go with {named('hold_penalty')} or forecasts ({named('weights')} "
                f"{FLIP_TIME}, {named('reward')}, a schedule by it): they "
                "are of the model that is trained, which learns the forget set"
            )
        for name in ("lora_alpha", "lora_targets") if not self.lora_rank else ():
            if getattr(self, name) is not None:
                raise UserError(f"{named(name)} is of adapters, and there are none: give {named('lora_rank')} too")
        if self.lora_rank and self.trainable:
            raise UserError(
                f"{named('trainable')} and {named('lora_rank')} exclude each other: adapters take "
                f"{named('lora_targets')} instead"
            )
        return filled

    def _rule(self) -> str | None:
        """The stopping rule, see `algorithms.stopping`; None where nobody looks, and nobody has asked for one."""
        replaced = [name for name in ("ma_threshold", "el_threshold") if getattr(self, name) is not None]
        if self.stopping is None:
            return PAPER if replaced else None if self.check_every == 0 else DEFAULT
        number = ma_of_rule(self.stopping)
        if number is None:
            return PAPER
        if replaced:
            raise UserError(
                f"{named(replaced[0])} replaces an average of {named('stopping')} {PAPER}, and {named('stopping')} is "
                f"{described(self.stopping)}: leave one of them out"
            )
        return f"ma={number:g}"

    def _dual(self, algorithm: Algorithm) -> dict[str, float | None]:
        """How the retain weight follows the retain loss; Nones where it is constant."""
        limit = _value_or(self.retain_limit, algorithm.retain_limit)
        if limit is None:
            for name in DUAL[1:]:
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{named(name)} is of a retain weight that changes: give {named('retain_limit')} too"
                    )
            return dict.fromkeys(DUAL)
        return {
            "retain_limit": limit,
            "dual_step": _value_or(self.dual_step, _value_or(algorithm.dual_step, 1.0)),
            "dual_warmup": _value_or(self.dual_warmup, algorithm.dual_warmup or 0),
        }

    def _resolved_schedule(self, forget_weight: float | None) -> Schedule | None:
        if self.schedule is None:
            return None
        if not isinstance(self.schedule, dict):
            raise UserError(f"{named('schedule')} is {described(self.schedule)}: expected a mapping with groups")
        with naming(current_naming().under("schedule")):
            return resolved_schedule(self.schedule, self.algorithm, self.settings, forget_weight)

    def _check_forecasts(self, schedule: Schedule | None) -> None:
        """Refuse forecasts of objectives that have none."""
        of_groups = self.weights == FLIP_TIME or self.reward > 0
        if schedule.by == FLIP_TIME if schedule else of_groups:
            LossAlone(self.algorithm, self.settings)
        for group in schedule.forget_groups() if schedule and of_groups else ():
            LossAlone(group.algorithm or self.algorithm, group.settings)

    @property
    def groups(self) -> list[ForgetGroup]:
        """Of the schedule of a resolved recipe; none without one."""
        return Schedule(**self.schedule).forget_groups() if isinstance(self.schedule, dict) else []

    @property
    def files(self) -> list[str]:
        """The files that draws and groups go by, as `algorithms.ease` takes them."""
        sources = [self.weights, *([self.schedule["by"]] if isinstance(self.schedule, dict) else [])]
        return [source for source in dict.fromkeys(sources) if is_file(source)]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a recipe is carried out. None of it changes the resulting model, beyond rounding."""

    workers: Annotated[int, Ge(0), Doc("Ray Train workers; 0 trains in this process")] = 1
    strategy: Annotated[Strategy, Doc("ddp: a whole model a worker; fsdp: sharded (FSDP2)")] = "ddp"
    cpus_per_worker: Annotated[int, Ge(1), Doc("cores and threads of a worker")] = 1
    gpus_per_worker: Annotated[
        float | None,
        Ge(0),
        Expected(GPU_SHARE),
        Doc("a share of one, or several (default: 1 where there are any, else 0)"),
    ] = None
    batch_tokens: Annotated[
        int | None,
        Ge(2),
        Doc(f"padded tokens in a micro-batch, of which an update takes as many as it needs {BATCH_TOKENS_ARE}"),
    ] = None
    gradient_checkpointing: Annotated[bool, Doc("recompute activations in the backward pass")] = False
    checkpoint_every: Annotated[int | None, Ge(1), Doc("updates (default: each epoch)")] = None
    max_failures: Annotated[int, Ge(0), Doc("how often workers are started again when one dies")] = 3


@dataclass(frozen=True, kw_only=True)
class AnswersMeasured:
    """How answers are measured while a model forgets."""

    evaluate: Annotated[
        bool, Doc("measure ROUGE-L recall and probability of forget and retain answers after each epoch")
    ] = True
    evaluate_every: Annotated[
        int, Ge(0), Doc("epochs from one measurement to the next; the last is always made, and 0 makes no other")
    ] = 1
    evaluate_samples: Annotated[int, Ge(1), Doc("of each set at most, evenly spaced")] = EVALUATED


def _value_or(value: Any, default: Any) -> Any:
    return default if value is None else value


def learning(**settings: Any) -> Recipe:
    """How a model is made to learn, resolved.

    Args:
        settings: fields of Recipe.

    Raises:
        UserError: a combination that does not exist.
    """
    recipe = build(Recipe, {"algorithm": LEARNS, **LEARNING, **settings})
    return dataclasses.replace(recipe, **recipe.resolved())


@dataclass(frozen=True)
class Objectives:
    """The objectives of a resolved recipe and their inputs.

    Attributes:
        forget: the objectives on the forget set: one for each group of the schedule; without one, that of all samples.
        retain: the objective on the retain set; None: the retain set is not used.
        forget_inputs, retain_inputs: the names of their inputs, see `algorithms.objectives.INPUTS`.
        teaches: what the refusal inputs are, see `algorithms.objectives.Algorithm`; None: there are none.
    """

    forget: tuple[Callable[..., torch.Tensor], ...]
    retain: Callable[..., torch.Tensor] | None
    forget_inputs: tuple[str, ...]
    retain_inputs: tuple[str, ...]
    teaches: str | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Objectives:
        retain = None if recipe.retain_term in (None, "none") else RETAIN_TERMS[recipe.retain_term]
        algorithms = [(group.algorithm or recipe.algorithm, group.settings) for group in recipe.groups]
        algorithms = algorithms or [(recipe.algorithm, recipe.settings)]
        forget = tuple(with_settings(find_algorithm(name).forget, settings) for name, settings in algorithms)
        inputs = dict.fromkeys(name for objective in forget for name in inputs_of(objective))
        teaches = {
            find_algorithm(algorithm).teaches
            for (algorithm, _), objective in zip(algorithms, forget, strict=True)
            if any(name.startswith(REFUSAL_PREFIX) for name in inputs_of(objective))
        }
        if len(teaches) > 1:
            raise UserError(
                f"{named('schedule')}: one group teaches refusals and another alternative answers; expected one of them"
            )
        return cls(forget, retain, tuple(inputs), inputs_of(retain) if retain else (), next(iter(teaches), None))

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.forget_inputs, *self.retain_inputs)

    @property
    def needs_refusals(self) -> bool:
        """Whether there are answers that are taught: refusals or alternatives."""
        return self.teaches is not None

    @property
    def needs_layer(self) -> bool:
        return "hidden" in self.inputs

    def reference_quantities(self) -> dict[Role, tuple[Quantity, ...]]:
        """Role -> the quantities of the initial model that the objectives need, see `algorithms.reference`."""
        return needed_quantities({"forget": self.forget_inputs, "retain": self.retain_inputs})


def layer_of(recipe: Recipe, config: PreTrainedConfig) -> int | None:
    """The decoder layer whose output the objectives need, counted from 1; None if they need none.

    Raises:
        UserError: the model has not so many layers.
    """
    if not Objectives.of(recipe).needs_layer:
        return None
    depth = config.get_text_config().num_hidden_layers
    layer = recipe.layer or max(1, round(depth * 7 / 32))
    if layer > depth:
        raise UserError(f"{named('layer')} is {layer}: the model has {depth} decoder layers")
    return layer


def updates_per_epoch(forget_samples: int, recipe: Recipe) -> int:
    """The updates that it takes to draw as many samples as there are: the same for every sampler, and however many
    samples are forgotten."""
    return math.ceil(forget_samples / (recipe.batch_size or 1))


def total_updates(forget_samples: int, recipe: Recipe) -> int:
    """The updates of a run that does not stop early."""
    limits = [recipe.max_steps] if recipe.max_steps else []
    if recipe.epochs:
        limits.append(recipe.epochs * updates_per_epoch(forget_samples, recipe))
    return min(limits)
