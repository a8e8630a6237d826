"""`mrd-bench plan`: how long a job will take, what memory it needs and what it will cost, before anything is started.

    seconds = start + work / replicas
    work    = calls x layers x overhead + activations x seconds each + operations x seconds each
              + weights written x seconds each + tasks x scheduling

The operations are counted from the model's shape, as below; the constants are measured, on a machine of the kind that
is planned for, by `mrd-bench benchmark plan`, which also checks the sums against runs. A call is one batch through the
model in one of these ways: forward, gradient (with per-sample norms), curvature (one direction) or training (forward,
backward and update). Measures of difficulty are counted in forward passes, each by itself: two that share passes take
less.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources as packaged
from typing import Annotated, Any, Literal

from pydantic import AllowInfNan

from algorithms.recipe import DEFAULT_BATCH_SIZE
from scoring.api import BATCHES_PER_TASK, DRAWS_PER_TASK
from scoring.engine import Dtype
from scoring.errors import UserError, unknown_name
from scoring.measures import MEASURES, Asked
from scoring.mrd import ESTIMATORS, EstimatorName
from scoring.reading import parse_json, read_text, shaped
from scoring.samples import BATCH_TOKENS
from scoring.settings import Doc, Ge, Gt, Known, Le, check, named

KINDS = ("forward", "gradient", "curvature", "training")
# The share of a device's memory that may be planned with.
USABLE = 0.9
# Of a weight, by dtype.
BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
# More than any job has, and so little that sums of its costs stay numbers.
MOST, MANY = 1e18, 1e9
# A constant of a machine.
Amount = Annotated[float, Ge(0), AllowInfNan(False)]


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder, as far as costs depend on it.

    Attributes:
        params: number of weights.
        layers, hidden, vocabulary: see the model's configuration.
    """

    params: float
    layers: int
    hidden: int
    vocabulary: int

    @classmethod
    def of_size(cls, params: float) -> Shape:
        """The usual shape of a Llama of so many weights: 16 layers at 1e9, 32 at 7e9."""
        layers = max(1, round(2.2 * (params / 1e6) ** 0.3))
        vocabulary = 32_000 if params > 3e8 else 4_000
        # 12 L d^2 in the layers and V d twice, in and out.
        hidden = (-2 * vocabulary + math.sqrt(4 * vocabulary**2 + 48 * layers * params)) / (24 * layers)
        return cls(params, layers, max(1, round(hidden)), vocabulary)

    @classmethod
    def of_model(cls, model: Any) -> Shape:
        """The shape of a transformers model."""
        config = model.config
        params = sum(p.numel() for p in model.parameters())
        return cls(params, config.num_hidden_layers, config.hidden_size, config.vocab_size)

    def widths(self, tokens: float, scored: float) -> float:
        """The activations of so many tokens: one for each unit of width in all layers, and logits."""
        return tokens * self.hidden * self.layers + scored * self.vocabulary

    def forward_flops(self, tokens: float, scored: float, length: float) -> float:
        """The operations for so many tokens in samples of a length. Only the scored ones reach the head."""
        table = self.vocabulary * self.hidden
        body = max(self.params - 2 * table, 12 * self.layers * self.hidden**2)
        return tokens * (2 * body + 4 * length * self.hidden * self.layers) + scored * 2 * table


@dataclass(frozen=True)
class UnitCost:
    """What one kind of call costs.

    Attributes:
        layer: seconds for each layer, however many tokens go through it.
        width: seconds for each activation (token and unit of width, in every layer).
        flop: seconds for each operation of the forward pass, with the time of further passes.
        activation: bytes for each token and unit of width, at the peak; in `gradient` and `training` for every layer.
        logit: bytes for each logit.
        copies: of the weights that are held during the call, the weights themselves included.
    """

    layer: Amount
    width: Amount
    flop: Amount
    activation: Amount
    logit: Amount
    copies: Amount


@dataclass(frozen=True)
class Profile:
    """The speed of a replica on one kind of machine.

    Attributes:
        name: of the profile.
        hardware: one line.
        measured: by the benchmark; else the values are from a data sheet.
        costs: by kind of call.
        noise: seconds for each weight and perturbation, restoring included.
        update: seconds for each weight and update of the optimizer.
        start: seconds until a replica has begun.
        load: seconds for each byte of a model.
        task: seconds that a task waits for its replica.
        sharing: share of its speed that a replica keeps beside others on the machine.
        memory: bytes that a replica may have.
    """

    name: str
    hardware: str
    measured: bool
    costs: dict[str, UnitCost]
    noise: Amount
    update: Amount
    start: Amount
    load: Amount
    task: Amount
    sharing: Annotated[Amount, Gt(0)]
    memory: Annotated[Amount, Gt(0)]

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Profile:
        """A profile from JSON."""
        return cls(**{**content, "costs": {kind: UnitCost(**cost) for kind, cost in content["costs"].items()}})


def profiles() -> dict[str, Profile]:
    """The profiles that come with the package, by name."""
    contents = json.loads((packaged.files("bench.speed") / "profiles.json").read_text())
    return {content["name"]: Profile.read(content) for content in contents}


def find_profile(name: str) -> Profile:
    """A profile by its name, or from the file that `mrd-bench benchmark plan --out FILE` wrote.

    Raises:
        UserError: there is none, or the file cannot be read.
    """
    known = profiles()
    if name in known:
        return known[name]
    if not name.endswith(".json"):
        raise unknown_name("profile", name, [*known, "FILE.json"])
    expected = "what `mrd-bench benchmark plan --out FILE` writes"
    text = read_text(name, expected, f"profile {name!r}")
    profile: Profile = shaped(parse_json(text, name, expected, lines=True), _ProfileFile, name, expected).profile
    if missing := [kind for kind in KINDS if kind not in profile.costs]:
        raise UserError(f"profile {name!r} has no costs of {', '.join(missing)}: expected {expected}")
    return profile


@dataclass(frozen=True)
class _ProfileFile:
    profile: Profile


@dataclass(frozen=True)
class PlannedJob:
    """A job: scoring, measures of difficulty, unlearning, or several of them.

    Attributes:
        shape: of the model.
        samples: N.
        tokens, scored: of a sample, on average.
        estimator, draws: of MRD; None: nothing is scored.
        epochs, retained: of unlearning: passes over the samples, and retain samples for each forgotten one; 0 epochs:
            nothing is unlearned.
        batch_tokens: in a call.
        batch_size: samples forgotten in an update.
        dtype: of the weights.
        measure: measures of difficulty, by name.
        lookahead: h of forecasts among them.
    """

    shape: Shape
    samples: Annotated[float, Ge(1)]
    tokens: Annotated[float, Ge(1)]
    scored: Annotated[float, Ge(1)]
    estimator: EstimatorName | None = "gradient"
    draws: Annotated[int | None, Ge(1)] = None
    epochs: Annotated[float, Ge(0)] = 0
    retained: Annotated[float, Ge(0)] = 1
    batch_tokens: Annotated[int, Ge(1)] = BATCH_TOKENS
    batch_size: Annotated[int, Ge(1)] = DEFAULT_BATCH_SIZE
    dtype: Dtype = "float32"
    measure: tuple[str, ...] = ()
    lookahead: Annotated[int, Ge(1)] = 1

    def measure_costs(self) -> dict[str, float]:
        """Forward passes a sample of each measure by itself, with one threshold, and one earlier state for vog."""
        asked = Asked(thresholds={"average": 0.0}, lookahead=self.lookahead, checkpoints=(("", None),))
        return {name: MEASURES[name].cost(asked) for name in self.measure}

    def checked(self) -> PlannedJob:
        """The same with the estimator's default number of draws, if none is set.

        Raises:
            UserError: a value that cannot be.
        """
        if not self.shape.params >= 1000:
            raise UserError(
                f"{named('model_params')} is {self.shape.params:g}: expected a number of weights, such as 7e9"
            )
        if not self.scored <= self.tokens:
            raise UserError(
                f"{named('scored')} is {self.scored:g}: expected at most {named('tokens')}, {self.tokens:g}"
            )
        if self.estimator is None:
            return self
        default_draws = ESTIMATORS[self.estimator].default_draws
        return replace(self, draws=(self.draws or default_draws) if default_draws else 0)


def _measures() -> Iterable[str]:
    return MEASURES


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What is planned, and for which machines."""

    model_params: Annotated[float, Gt(0), Le(MOST), Doc("weights of the model, such as 7e9")]
    samples: Annotated[float, Ge(1), Le(MOST), Doc("to be scored, or to be forgotten, such as 1e6")]
    tokens: Annotated[float, Ge(1), Le(MANY), Doc("of a sample, on average")] = 100
    scored: Annotated[float | None, Ge(1), Le(MANY), Doc("those of them that are scored (default: half)")] = None
    estimator: Annotated[EstimatorName | Literal["none"], Doc("of MRD; none plans no scoring")] = "gradient"
    draws: Annotated[int | None, Ge(1), Le(MANY), Doc("K (default: the estimator's own)")] = None
    measure: Annotated[
        list[str],
        Known(_measures),
        Doc("also take these measures of difficulty, with commas; see `mrd-bench measures` (default: none)"),
    ] = field(default_factory=list)
    lookahead: Annotated[int, Ge(1), Le(MANY), Doc("h of forecasts among them")] = 1
    epochs: Annotated[float, Ge(0), Le(MANY), Doc("also unlearn for so many")] = 0
    retained: Annotated[float, Ge(0), Le(MANY), Doc("retain samples for each forgotten")] = 1
    batch_size: Annotated[int, Ge(1), Le(MANY), Doc("samples an update")] = DEFAULT_BATCH_SIZE
    batch_tokens: Annotated[int, Ge(1), Le(MANY), Doc("padded tokens in a batch")] = BATCH_TOKENS
    dtype: Annotated[Dtype, Doc("of the weights")] = "float32"
    gpus: Annotated[int, Ge(1), Le(MANY), Doc("devices in all; cores, with a profile of a CPU")] = 1
    profile: Annotated[str, Doc("a machine that is known, or what `benchmark plan --out FILE` wrote")] = "h100"
    price: Annotated[float | None, Ge(0), Le(MANY), Doc("of a device and hour, in any currency")] = None

    def job(self) -> PlannedJob:
        """The job that the settings describe.

        Raises:
            UserError: a value that cannot be.
        """
        check(self)
        return PlannedJob(
            Shape.of_size(max(self.model_params, 1.0)),
            self.samples,
            self.tokens,
            self.tokens / 2 if self.scored is None else self.scored,
            None if self.estimator == "none" else self.estimator,
            self.draws,
            self.epochs,
            self.retained,
            self.batch_tokens,
            self.batch_size,
            self.dtype,
            tuple(dict.fromkeys(self.measure)),
            self.lookahead,
        )


@dataclass
class Calls:
    """All that a job asks of its replicas.

    Attributes:
        count: calls by kind.
        widths: activations that the calls compute, by kind.
        flops: operations of the calls' forward passes, by kind.
        written: weights that perturbations write.
        updated: weights that the optimizer moves.
        tasks: handed to replicas.
    """

    count: dict[str, float] = field(default_factory=dict)
    widths: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    written: float = 0
    updated: float = 0
    tasks: float = 0

    def add(self, kind: str, job: PlannedJob, times: float, count: float) -> None:
        """Add `count` calls that put all samples through the model `times` times."""
        tokens, scored = times * job.samples * job.tokens, times * job.samples * job.scored
        for sums, value in (
            (self.count, count),
            (self.widths, job.shape.widths(tokens, scored)),
            (self.flops, job.shape.forward_flops(tokens, scored, job.tokens)),
        ):
            sums[kind] = sums.get(kind, 0) + value


def calls_of(job: PlannedJob) -> Calls:
    """The calls of a job, for scoring and for unlearning."""
    calls, shape = Calls(), job.shape
    if job.estimator is not None:
        batches = math.ceil(job.samples / max(1, job.batch_tokens // job.tokens))
        draws = job.draws or 0
        perturbs = ESTIMATORS[job.estimator].perturbs
        shards = math.ceil(batches / BATCHES_PER_TASK[perturbs])
        calls.tasks = shards * max(1, math.ceil(draws / DRAWS_PER_TASK))
        # Unperturbed log-probs are computed once by each replica that works on a shard; once, as is counted here.
        forwards = {"monte-carlo": draws + 1, "antithetic": 2 * draws + 1, "gradient": 0, "curvature": 1}[job.estimator]
        if forwards:
            calls.add("forward", job, forwards, batches * forwards)
        if job.estimator == "antithetic":
            # Unperturbed log-probs in fp64, at twice the cost; those in fp32 show the rounding, and are counted above.
            calls.add("forward", job, 2, batches * 2)
        elif job.estimator == "gradient":
            calls.add("gradient", job, 1, batches)
        elif job.estimator == "curvature":
            calls.add("curvature", job, draws, batches * draws)
        writes = {"monte-carlo": 1, "antithetic": 2}.get(job.estimator, 0)
        calls.written = shape.params * shards * (draws * writes)
    _add_measures(calls, job)
    if job.epochs:
        updates = math.ceil(job.samples / job.batch_size) * job.epochs
        calls.add("training", job, job.epochs * (1 + job.retained), updates * (1 + (job.retained > 0)))
        calls.updated += shape.params * updates
    return calls


def _add_measures(calls: Calls, job: PlannedJob) -> None:
    """Add the measures of difficulty, in forward passes: that is how their costs are given."""
    batches = math.ceil(job.samples / max(1, job.batch_tokens // job.tokens))
    for name, cost in job.measure_costs().items():
        alone = takes_samples_alone(name)
        if cost:
            calls.add("forward", job, cost, cost * (job.samples if alone else batches))
        if alone:
            calls.updated += job.shape.params * job.samples * job.lookahead
    if any(MEASURES[name].scope == "batch" for name in job.measure):
        calls.tasks += batches
    calls.tasks += any(MEASURES[name].scope == "set" for name in job.measure)


def takes_samples_alone(name: str) -> bool:
    """Whether a measure moves the weights for every sample: one sample is a batch then, and the weights are written."""
    return MEASURES[name].scope == "batch" and "thresholds" in MEASURES[name].needs


@dataclass(frozen=True)
class JobPlan:
    """What a job will take.

    Attributes:
        seconds: until it ends.
        parts: of the seconds, by what they are spent on.
        replicas: that work side by side.
        devices: of each replica.
        memory: bytes of each replica.
        device_hours: of all replicas.
        limit: the part that takes longest.
    """

    seconds: float
    parts: dict[str, float]
    replicas: int
    devices: int
    memory: float
    device_hours: float
    limit: str


def memory_of(job: PlannedJob, profile: Profile) -> float:
    """The bytes that a replica holds at its peak."""
    weights = job.shape.params * BYTES[job.dtype]
    peak = 0.0
    if job.estimator is not None:
        kind = job.estimator if job.estimator in KINDS else "forward"
        active = activation_bytes(job, profile, kind)
        peak = weights * profile.costs[kind].copies + active
        if ESTIMATORS[job.estimator].perturbs:
            peak += weights  # the base
        if job.estimator == "antithetic":
            # It begins with a copy of the model in fp64, and the activations of that.
            peak = max(peak, weights + 8 * job.shape.params + 2 * active)
    for name in job.measure:
        measure = MEASURES[name]
        if "thresholds" in measure.needs:
            # Weights, a copy that they are restored from, gradients, and the update; of one sample, or of a batch.
            at_once = replace(job, samples=1) if takes_samples_alone(name) else job
            peak = max(peak, 4 * weights + activation_bytes(at_once, profile, "training"))
        elif measure.scope != "texts":
            kind = "gradient" if "model" in measure.needs else "forward"
            peak = max(peak, weights * profile.costs[kind].copies + activation_bytes(job, profile, kind))
    if job.epochs:
        # In fp32: weights, gradients and the two moments of AdamW.
        peak = max(peak, 16 * job.shape.params + activation_bytes(job, profile, "training"))
    return peak


def activation_bytes(job: PlannedJob, profile: Profile, kind: str) -> float:
    """The bytes of the tensors that a call computes, at their peak."""
    tokens = min(job.batch_tokens, job.samples * job.tokens)
    units, logits = units_and_logits(job.shape, kind, tokens, tokens * job.scored / job.tokens)
    return profile.costs[kind].activation * units + profile.costs[kind].logit * logits


def units_and_logits(shape: Shape, kind: str, tokens: float, scored: float) -> tuple[float, float]:
    """How many units of width and logits a call holds at once. Units of one layer are enough where no backward pass
    needs the others."""
    layers = shape.layers if kind in ("gradient", "training") else 1
    return tokens * shape.hidden * layers, scored * shape.vocabulary


def plan(job: PlannedJob, profile: Profile, devices: int) -> JobPlan:
    """The plan of a job on so many devices (GPUs, or cores of one thread each).

    Raises:
        UserError: the model does not fit on them.
    """
    job = job.checked()
    if devices < 1:
        raise UserError(f"{named('gpus')} is {devices}: expected at least 1")
    memory = memory_of(job, profile)
    devices_each = max(1, math.ceil(memory / (profile.memory * USABLE)))
    if devices_each > devices:
        raise UserError(
            f"a replica needs {memory / 1e9:.0f} GB, which is {devices_each} of {profile.hardware}; there are "
            f"{devices}: take more of them, a lower {named('batch_tokens')}, or {named('estimator')} gradient with "
            f"{named('dtype')} bfloat16"
        )
    replicas = devices // devices_each
    calls = calls_of(job)
    parts = {
        f"{kind} passes": job.shape.layers * calls.count[kind] * profile.costs[kind].layer
        + calls.widths[kind] * profile.costs[kind].width
        + calls.flops[kind] * profile.costs[kind].flop
        for kind in KINDS
        if calls.count.get(kind)
    }
    parts |= {"noise": calls.written * profile.noise, "updates": calls.updated * profile.update}
    parts["scheduling"] = calls.tasks * profile.task
    # A replica of several devices is taken to use them all; communication between them is not counted.
    speed_up = 1 if replicas == 1 else replicas * profile.sharing
    if calls.tasks:
        # The last round of tasks may leave replicas without work.
        speed_up *= calls.tasks / replicas / math.ceil(calls.tasks / replicas)
    parts = {name: seconds / speed_up / devices_each for name, seconds in parts.items() if seconds}
    parts["start"] = profile.start + profile.load * job.shape.params * BYTES[job.dtype]
    seconds = sum(parts.values())
    limit = max(parts, key=lambda name: parts[name])
    device_hours = seconds / 3600 * replicas * devices_each
    return JobPlan(seconds, parts, replicas, devices_each, memory, device_hours, limit)


def print_plan(job: PlannedJob, job_plan: JobPlan, profile: Profile, price: float | None) -> None:
    """Print a plan on the terminal.

    Args:
        job: that is planned.
        job_plan: of the job.
        profile: of the machines.
        price: of a device and hour; None: unknown.
    """
    job = job.checked()
    work = [f"{job.estimator}" + (f" with {job.draws} draws" if job.draws else "")] if job.estimator else []
    work += [f"{name} at {cost:g} forward passes a sample" for name, cost in job.measure_costs().items()]
    work += [f"unlearning for {job.epochs:g} epochs"] if job.epochs else []
    print(
        f"{job.samples:,.0f} samples of {job.tokens:g} tokens, a model of {_short(job.shape.params)} weights: "
        f"{', then '.join(work)}"
    )
    print(f"on {job_plan.replicas} replica(s) of {job_plan.devices} x {profile.hardware}")
    hours = job_plan.seconds / 3600
    print(f"time    {_duration(job_plan.seconds)} ({hours:.3g} h), {job_plan.device_hours:.3g} device hours")
    for name, seconds in sorted(job_plan.parts.items(), key=lambda part: -part[1]):
        print(f"        {seconds / job_plan.seconds:>4.0%} {name}")
    print(f"memory  {job_plan.memory / 1e9:.3g} GB a replica, of {job_plan.devices * profile.memory / 1e9:.3g} GB")
    if price is not None:
        print(f"cost    {job_plan.device_hours * price:.2f} at {price:g} an hour and device")
    draws_limit = job_plan.limit == "forward passes" and not job.measure
    print(f"limit   {job_plan.limit}" + (f": see {named('estimator')} gradient" if draws_limit else ""))
    if alone := [name for name in job.measure if takes_samples_alone(name)]:
        print(f"note: {' and '.join(alone)}: a sample at a time, each along its own updates; nothing is batched")
    if together := [name for name in job.measure if MEASURES[name].scope == "set"]:
        print(f"note: {' and '.join(together)}: the work of one replica, which takes longer than its share")
    if not profile.measured:
        print(
            f"note: {profile.name} is from its data sheet and was not measured; `mrd-bench benchmark plan --out FILE` "
            f"measures a machine, and {named('profile')} FILE plans with that"
        )


def _short(count: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= u), (1, ""))
    return f"{count / unit:.3g} {name}".strip()


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
