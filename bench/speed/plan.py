"""`mrd-bench plan`: how long a job will take, what memory it needs and what it will cost, before anything is started.

    seconds = start + work / replicas
    work    = calls x (layers x overhead + weights x seconds each) + activations x seconds each
              + operations x seconds each + weights written x seconds each + tasks x scheduling

The operations are counted from the model's shape, as below; the constants are measured, on a machine of the kind that
is planned for, by `mrd-bench benchmark plan`, which also checks the sums against runs. A call is one batch through the
model in one of these ways: forward, gradient (with per-sample norms), curvature (one direction), training (forward,
backward and update) or decoding (one step of writing: a token for each row of a batch, for which all weights are read).
Measures of difficulty are counted in forward passes, each by itself: two that share passes take less.

Training is spread by DDP where weights, gradients and moments fit on a device, else by FSDP over all devices. Workers
split an update's samples among them; what a call costs however many samples there are is not split. What devices say to
each other is not counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources as packaged
from typing import Annotated, Any, Literal

from pydantic import AllowInfNan

from algorithms.recipe import DEFAULT_BATCH_SIZE, EVALUATED
from scoring.answers import EXTRA_TOKENS
from scoring.api import BATCHES_PER_TASK, DRAWS_PER_TASK
from scoring.engine import Dtype
from scoring.errors import UserError, unknown_name
from scoring.logprob import LOGITS_AT_A_TIME
from scoring.measures import MEASURES, Asked
from scoring.mrd import ESTIMATORS, EstimatorName
from scoring.reading import parse_json, read_text, shaped
from scoring.readings import PROMPTS_PER_TASK
from scoring.samples import BATCH_TOKENS
from scoring.settings import Doc, Ge, Gt, Known, Le, check, named

KINDS = ("forward", "gradient", "curvature", "training", "decoding")
# The share of a device's memory that may be planned with.
USABLE = 0.9
# Of a weight, by dtype.
BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
# Of a weight that is trained, in fp32: itself, its gradient and the two moments of AdamW.
TRAINED = 16
Verb = Literal["score", "difficulty", "unlearn", "train", "evaluate"]
# Rows times tokens that are decoded at a time, see `scoring.generation`.
DECODED_TOKENS = 16_384
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
        weight: seconds for each weight and call, however many tokens go through it.
    """

    layer: Amount
    width: Amount
    flop: Amount
    activation: Amount
    logit: Amount
    copies: Amount
    weight: Amount = 0.0


@dataclass(frozen=True)
class Profile:
    """The speed of a replica on one kind of machine.

    Attributes:
        name: of the profile.
        hardware: one line.
        measured: by the benchmark; else the values are from a data sheet.
        costs: by kind of call, of weights of `dtype`. Without those of decoding, which early profiles lack, a step is
            taken for a forward pass.
        noise: seconds for each weight and perturbation, restoring included.
        update: seconds for each weight and update of the optimizer.
        start: seconds until a replica has begun.
        load: seconds for each byte of a model.
        task: seconds that a task waits for its replica.
        sharing: share of its speed that a replica keeps beside others on the machine.
        memory: bytes that a replica may have.
        dtype: that the costs are of.
        other_dtypes: the costs of others, by dtype.
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
    dtype: Dtype = "float32"
    other_dtypes: dict[str, dict[str, UnitCost]] = field(default_factory=dict)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Profile:
        """A profile from JSON."""
        others = {dtype: _costs(costs) for dtype, costs in content.get("other_dtypes", {}).items()}
        return cls(**{**content, "costs": _costs(content["costs"]), "other_dtypes": others})

    def knows(self, dtype: str) -> bool:
        """Whether there are costs of a dtype."""
        return dtype == self.dtype or dtype in self.other_dtypes

    def cost(self, kind: str, dtype: str) -> UnitCost:
        """Of a kind of call, with weights of a dtype; that of the profile's own dtype where it is not known."""
        costs = self.other_dtypes.get(dtype, self.costs) if dtype != self.dtype else self.costs
        # Of what is written, keys and values are kept in all layers.
        return costs.get(kind) or replace(costs["forward"], activation=2.0 * BYTES[dtype])

    def seconds(self, kind: str, count: float, shape: Shape, widths: float, flops: float, dtype: str) -> float:
        """Of so many calls of a kind that compute so many activations by so many operations."""
        cost = self.cost(kind, dtype)
        fixed = count * (shape.layers * cost.layer + shape.params * cost.weight)
        return fixed + widths * cost.width + flops * cost.flop


def _costs(content: Mapping[str, Any]) -> dict[str, UnitCost]:
    return {kind: UnitCost(**cost) for kind, cost in content.items()}


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
    if missing := [kind for kind in KINDS[:-1] if kind not in profile.costs]:
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
        looks: passes over the samples that ask which are forgotten, by MA.
        continuations: that EL decodes in all these looks, each from the middle of a sample.
        refreshes: of MRD while it trains, by `gradient`.
        reads, answers: texts that are read by teacher forcing, and answers that are written, in all evaluations.
        rounds: of evaluation that they are spread over: sets, models and epochs.
        new_tokens: of an answer.
        rows: answers that are written together, at most.
        models: that are loaded one after the other.
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
    looks: Annotated[float, Ge(0)] = 0
    continuations: Annotated[float, Ge(0)] = 0
    refreshes: Annotated[float, Ge(0)] = 0
    reads: Annotated[float, Ge(0)] = 0
    answers: Annotated[float, Ge(0)] = 0
    rounds: Annotated[float, Ge(1)] = 1
    new_tokens: Annotated[float, Ge(0)] = 0
    rows: Annotated[float, Ge(1)] = MANY
    models: Annotated[int, Ge(1)] = 1

    @property
    def prompt(self) -> float:
        """Tokens before an answer; at least one is read."""
        return max(1.0, self.tokens - self.scored)

    @property
    def answers_at_once(self) -> float:
        """Rows of a batch that is decoded."""
        return max(1.0, min(self.rows, self.answers / self.rounds, DECODED_TOKENS // (self.prompt + self.new_tokens)))

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
    command: Annotated[
        Verb | None,
        Doc(
            "whose costs: those of unlearn and train with looks and evaluations, those of evaluate with answers "
            "(default: what estimator, measure and epochs say, and nothing else)"
        ),
    ] = None
    estimator: Annotated[
        EstimatorName | Literal["none"] | None,
        Doc("of MRD; none plans no scoring (default: gradient, without a command or of score; else none)"),
    ] = None
    draws: Annotated[int | None, Ge(1), Le(MANY), Doc("K (default: the estimator's own)")] = None
    measure: Annotated[
        list[str],
        Known(_measures),
        Doc("also take these measures of difficulty, with commas; see `mrd-bench measures` (default: none)"),
    ] = field(default_factory=list)
    lookahead: Annotated[int, Ge(1), Le(MANY), Doc("h of forecasts among them")] = 1
    epochs: Annotated[
        float | None, Ge(0), Le(MANY), Doc("also unlearn for so many (default: 5 of unlearn and train, else 0)")
    ] = None
    retained: Annotated[
        float | None, Ge(0), Le(MANY), Doc("retain samples for each forgotten (default: 0 of train, else 1)")
    ] = None
    check_every: Annotated[
        float, Ge(0), Le(MANY), Doc("epochs of unlearn and train between looks at MA of all samples; 0: never")
    ] = 1
    el_share: Annotated[
        float, Ge(0), Le(1), Doc("of a sample's tokens, from which EL is decoded at each look; 0: MA alone decides")
    ] = 0
    refresh: Annotated[
        float, Ge(0), Le(MANY), Doc("epochs of unlearn between measurements of MRD by gradient; 0: none")
    ] = 0
    evaluate_samples: Annotated[
        float | None,
        Ge(0),
        Le(MOST),
        Doc("of each set, each epoch of unlearn and train (default: 32 of these, else samples)"),
    ] = None
    sets: Annotated[int | None, Ge(1), Le(MANY), Doc("that are evaluated (default: 2 of unlearn, else 1)")] = None
    models: Annotated[int, Ge(1), Le(MANY), Doc("that evaluate compares")] = 1
    reads: Annotated[float, Ge(0), Le(MANY), Doc("texts that are read for each sample that is evaluated")] = 1
    new_tokens: Annotated[
        float | None, Ge(0), Le(MANY), Doc("of an answer; 0: none is written (default: 20 more than scored)")
    ] = None
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
        scored = self.tokens / 2 if self.scored is None else self.scored
        estimator = self.estimator or ("gradient" if self.command in (None, "score") else "none")
        trains = self.command in ("unlearn", "train")
        epochs = self.epochs if self.epochs is not None else 5 if trains else 0
        job = PlannedJob(
            Shape.of_size(max(self.model_params, 1.0)),
            self.samples,
            self.tokens,
            scored,
            None if estimator == "none" else estimator,
            self.draws,
            epochs,
            self.retained if self.retained is not None else float(self.command != "train"),
            self.batch_tokens,
            self.batch_size,
            self.dtype,
            tuple(dict.fromkeys(self.measure or (["flip-time"] if self.command == "difficulty" else []))),
            self.lookahead,
        )
        if not trains and self.command != "evaluate":
            return job
        looks = 1 + math.floor(epochs / self.check_every) if trains and self.check_every else 0
        each = self.evaluate_samples if self.evaluate_samples is not None else EVALUATED if trains else self.samples
        rounds = (self.sets or (2 if self.command == "unlearn" else 1)) * (epochs + 1 if trains else self.models)
        new_tokens = self.new_tokens if self.new_tokens is not None else scored + EXTRA_TOKENS
        return replace(
            job,
            looks=looks,
            continuations=looks * self.samples * self.tokens * self.el_share,
            refreshes=math.ceil(epochs / self.refresh) if self.command == "unlearn" and self.refresh else 0,
            reads=each * rounds * self.reads,
            answers=each * rounds if new_tokens else 0,
            rounds=rounds,
            new_tokens=new_tokens,
            rows=MANY if trains else PROMPTS_PER_TASK,
            models=1 if trains else self.models,
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
        self.add_tokens(kind, job.shape, tokens, scored, job.tokens, count)

    def add_tokens(self, kind: str, shape: Shape, tokens: float, scored: float, length: float, count: float) -> None:
        """Add `count` calls of so many tokens, in texts of a length, all together."""
        for sums, value in (
            (self.count, count),
            (self.widths, shape.widths(tokens, scored)),
            (self.flops, shape.forward_flops(tokens, scored, length)),
        ):
            sums[kind] = sums.get(kind, 0) + value

    def add_written(self, shape: Shape, texts: float, prompt: float, new: float, batches: float) -> None:
        """Add the writing of so many texts: one pass over their beginnings, then a step for each new token, in which
        every row of a batch is one token that looks back at all before it."""
        self.add_tokens("forward", shape, texts * prompt, texts, prompt, batches)
        self.add_tokens("decoding", shape, texts * new, texts * new, prompt + new / 2, batches * new)

    def parts(self, shape: Shape, profile: Profile, dtype: str) -> dict[str, float]:
        """Seconds of one replica, by kind of call."""
        return {
            kind: profile.seconds(kind, self.count[kind], shape, self.widths[kind], self.flops[kind], dtype)
            for kind in KINDS
            if self.count.get(kind)
        }


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
        writes = {"monte-carlo": 1, "antithetic": 2, "curvature": 1}.get(job.estimator, 0)  # curvature: signs
        calls.written = shape.params * shards * (draws * writes)
    _add_measures(calls, job)
    if job.epochs:
        updates = _updates(job)
        calls.add("training", job, job.epochs * (1 + job.retained), updates * (1 + (job.retained > 0)))
        calls.updated += shape.params * updates
    return calls


def _updates(job: PlannedJob) -> float:
    """Of the optimizer, while it trains."""
    return math.ceil(job.samples / job.batch_size) * job.epochs


def readings_of(job: PlannedJob) -> dict[str, Calls]:
    """The calls that look at a model and do not change it: which samples are forgotten, how difficult they are, and
    what it answers."""
    shape = job.shape
    batches = math.ceil(job.samples / max(1, job.batch_tokens // job.tokens))
    readings: dict[str, Calls] = {}
    if job.looks:
        calls = readings["checks"] = Calls()
        calls.add("forward", job, job.looks, job.looks * batches)
        if job.continuations:
            # Each text is read once more, and all continuations begin in the cache of that.
            calls.add("forward", job, job.looks, job.looks * batches)
            at_once = max(1.0, min(job.continuations / job.looks, DECODED_TOKENS // job.tokens))
            steps = math.ceil(job.continuations / at_once) * job.tokens / 2
            written = job.continuations * job.tokens / 2
            calls.add_tokens("decoding", shape, written, written, job.tokens * 3 / 4, steps)
    if job.refreshes:
        readings["refreshes"] = Calls()
        readings["refreshes"].add("gradient", job, job.refreshes, job.refreshes * batches)
    if job.reads or job.answers:
        calls = readings["evaluation"] = Calls()
        each = job.reads / job.rounds
        reading = job.rounds * math.ceil(each / max(1, job.batch_tokens // job.tokens))
        calls.add_tokens("forward", shape, job.reads * job.tokens, job.reads * job.scored, job.tokens, reading)
        writing = 0.0
        if job.answers:
            writing = job.rounds * math.ceil(job.answers / job.rounds / job.answers_at_once)
            calls.add_written(shape, job.answers, job.prompt, job.new_tokens, writing)
        if not job.epochs:
            calls.tasks = reading + writing  # of replicas; workers that train share texts evenly
    return readings


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
        memory: bytes of each replica; of each device where training is sharded.
        device_hours: of all replicas.
        limit: the part that takes longest.
        strategy: of training, ddp or fsdp; None: nothing is trained.
    """

    seconds: float
    parts: dict[str, float]
    replicas: int
    devices: int
    memory: float
    device_hours: float
    limit: str
    strategy: str | None = None


def memory_of(job: PlannedJob, profile: Profile) -> float:
    """The bytes that a replica holds at its peak; of training, one that has all weights."""
    peak = scoring_memory(job, profile)
    if job.epochs:
        peak = max(peak, TRAINED * job.shape.params + _training_activations(job, profile))
    return peak


def scoring_memory(job: PlannedJob, profile: Profile) -> float:
    """The same of all but training."""
    weights = job.shape.params * BYTES[job.dtype]
    peak = 0.0
    if job.estimator is not None:
        kind = job.estimator if job.estimator in KINDS else "forward"
        active = activation_bytes(job, profile, kind)
        peak = weights * profile.cost(kind, job.dtype).copies + active
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
            active = activation_bytes(job, profile, kind)
            peak = max(peak, weights * profile.cost(kind, job.dtype).copies + active)
    if (job.reads or job.answers) and not job.epochs:
        peak = max(peak, weights * profile.cost("forward", job.dtype).copies + _reading_activations(job, profile))
    return peak


def sharded_memory(job: PlannedJob, profile: Profile, devices: int) -> float:
    """The bytes of each of so many devices that train by FSDP: its share of weights, gradients and moments, and the
    greater of what an update needs (a whole layer with its gradient, activations) and of what looking at the model
    needs (a whole layer, activations); but at least the whole weights, which are there before they are sharded."""
    params = job.shape.params
    updating = 2 * 4 * params / job.shape.layers + activation_bytes(job, profile, "training")
    looking = 4 * params / job.shape.layers + _reading_activations(job, profile)
    return max(TRAINED * params / devices + max(updating, looking), 4 * params)


def _training_activations(job: PlannedJob, profile: Profile) -> float:
    active = activation_bytes(job, profile, "training")
    if job.refreshes:
        active = max(active, activation_bytes(job, profile, "gradient"))
    return max(active, _reading_activations(job, profile))


def _reading_activations(job: PlannedJob, profile: Profile) -> float:
    """Of looks and evaluations: those of a pass, or the keys and values of what is being written."""
    active = activation_bytes(job, profile, "forward") if job.looks or job.reads else 0.0
    if job.answers:
        tokens = job.answers_at_once * (job.prompt + job.new_tokens)
        cost = profile.cost("decoding", job.dtype)
        units, logits = units_and_logits(job.shape, "decoding", tokens, job.answers_at_once)
        active = max(active, cost.activation * units + cost.logit * logits)
    return active


def activation_bytes(job: PlannedJob, profile: Profile, kind: str) -> float:
    """The bytes of the tensors that a call computes, at their peak."""
    tokens = min(job.batch_tokens, job.samples * job.tokens)
    units, logits = units_and_logits(job.shape, kind, tokens, tokens * job.scored / job.tokens)
    cost = profile.cost(kind, job.dtype)
    return cost.activation * units + cost.logit * logits


def units_and_logits(shape: Shape, kind: str, tokens: float, scored: float) -> tuple[float, float]:
    """How many units of width and logits a call holds at once. Units of one layer are enough where no backward pass
    and no later step needs the others."""
    layers = shape.layers if kind in ("gradient", "training", "decoding") else 1
    logits = scored * shape.vocabulary
    # Training has them all, for its objective.
    return tokens * shape.hidden * layers, logits if kind == "training" else min(logits, LOGITS_AT_A_TIME)


def plan(job: PlannedJob, profile: Profile, devices: int, starts: bool = True) -> JobPlan:
    """The plan of a job on so many devices (GPUs, or cores of one thread each).

    Args:
        starts: replicas have to be started; else the work is done in a process that is there.

    Raises:
        UserError: the model does not fit on them.
    """
    job = job.checked()
    if devices < 1:
        raise UserError(f"{named('gpus')} is {devices}: expected at least 1")
    usable = profile.memory * USABLE
    memory = scoring_memory(job, profile)
    devices_each = max(1, math.ceil(memory / usable))
    if devices_each > devices:
        raise _too_large(memory, devices_each, profile, devices)
    replicas = devices // devices_each
    calls, readings = calls_of(job), readings_of(job)
    # A replica of several devices is taken to use them all; communication between them is not counted.
    speed_up = devices_each * (1 if replicas == 1 else replicas * profile.sharing)
    tasks = calls.tasks + sum(reading.tasks for reading in readings.values())
    if tasks:
        # The last round of tasks may leave replicas without work.
        speed_up *= tasks / replicas / math.ceil(tasks / replicas)
    seconds_of = calls.parts(job.shape, profile, job.dtype)
    training = {"training": seconds_of.pop("training")} if "training" in seconds_of else {}
    parts = {f"{kind} passes": seconds / speed_up for kind, seconds in seconds_of.items()}
    parts |= {"noise": calls.written * profile.noise / speed_up, "updates": calls.updated * profile.update / speed_up}
    strategy = None
    if training:
        strategy, of_training = _spread_training(job, profile, devices)
        memory = max(memory, of_training)
        parts |= _training_parts(job, calls, profile, devices, strategy)
        speed_up = 1.0 if devices == 1 else devices * profile.sharing
        replicas, devices_each = (devices, 1) if strategy == "ddp" else (1, devices)
    for name, reading in readings.items():
        parts[name] = sum(reading.parts(job.shape, profile, job.dtype).values()) / speed_up
    parts["scheduling"] = tasks * profile.task / speed_up
    parts = {name: seconds for name, seconds in parts.items() if seconds}
    if starts:
        parts["start"] = profile.start + profile.load * job.shape.params * BYTES[job.dtype] * job.models
    seconds = sum(parts.values())
    limit = max(parts, key=lambda name: parts[name]) if parts else "nothing"
    device_hours = seconds / 3600 * replicas * devices_each
    return JobPlan(seconds, parts, replicas, devices_each, memory, device_hours, limit, strategy)


def _too_large(memory: float, needed: int, profile: Profile, devices: int) -> UserError:
    return UserError(
        f"a replica needs {memory / 1e9:.0f} GB, which is {needed} of {profile.hardware}; there are "
        f"{devices}: take more of them, a lower {named('batch_tokens')}, or {named('estimator')} gradient with "
        f"{named('dtype')} bfloat16"
    )


def _spread_training(job: PlannedJob, profile: Profile, devices: int) -> tuple[str, float]:
    """How training is spread, and the bytes of each device: a whole model each where that fits, else shares of it.

    Raises:
        UserError: it does not fit either way.
    """
    usable = profile.memory * USABLE
    whole = TRAINED * job.shape.params + _training_activations(job, profile)
    if whole <= usable:
        return "ddp", whole
    memory = sharded_memory(job, profile, devices)
    if memory <= usable:
        return "fsdp", memory
    shared = TRAINED * job.shape.params
    alone = max(memory - shared / devices, 4 * job.shape.params)
    more = f"take {math.ceil(shared / (usable - alone))} of them, or " if alone < usable else "take "
    raise UserError(
        f"training needs {memory / 1e9:.0f} GB on each of {devices} x {profile.hardware} by fsdp, and "
        f"{usable / 1e9:.0f} GB can be had: {more}a smaller model or a lower {named('batch_tokens')}"
    )


def _training_parts(job: PlannedJob, calls: Calls, profile: Profile, devices: int, strategy: str) -> dict[str, float]:
    """Seconds of passes and updates. Workers split the samples of an update, of which there may be fewer than workers;
    each makes all calls, and with DDP each moves all weights."""
    kind, sharing = "training", 1.0 if devices == 1 else profile.sharing
    busy = min(devices, job.batch_size)
    fixed = profile.seconds(kind, calls.count[kind], job.shape, 0, 0, job.dtype)
    passes = profile.seconds(kind, 0, job.shape, calls.widths[kind], calls.flops[kind], job.dtype) / busy
    moved = _updates(job) * job.shape.params * profile.update
    forecasts = calls.updated * profile.update - moved
    updates = moved / (devices if strategy == "fsdp" else 1)
    return {"training passes": (fixed + passes) / sharing, "updates": (updates + forecasts) / sharing}


def print_plan(job: PlannedJob, job_plan: JobPlan, profile: Profile, price: float | None) -> None:
    """Print a plan on the terminal.

    Args:
        job: that is planned.
        job_plan: of the job.
        profile: of the machines.
        price: of a device and hour; None: unknown.
    """
    job = job.checked()
    print(
        f"{job.samples:,.0f} samples of {job.tokens:g} tokens, a model of {_short(job.shape.params)} weights: "
        f"{', then '.join(_work(job))}"
    )
    for line in machine_lines(job, job_plan, profile):
        print(line)
    if price is not None:
        print(f"cost    {job_plan.device_hours * price:.2f} at {price:g} an hour and device")
    draws_limit = job_plan.limit == "forward passes" and not job.measure
    print(f"limit   {job_plan.limit}" + (f": see {named('estimator')} gradient" if draws_limit else ""))
    for note in notes_on(job, profile):
        print(f"note: {note}")


def _work(job: PlannedJob) -> list[str]:
    """What is done, in words."""
    work = [f"{job.estimator}" + (f" with {job.draws} draws" if job.draws else "")] if job.estimator else []
    work += [f"{name} at {cost:g} forward passes a sample" for name, cost in job.measure_costs().items()]
    work += [f"training for {job.epochs:g} epochs"] if job.epochs else []
    work += [f"{job.looks:g} looks at MA"] if job.looks else []
    work += [f"{job.refreshes:g} measurements of MRD"] if job.refreshes else []
    written = f" and {job.answers:,.0f} answers of {job.new_tokens:g} tokens" if job.answers else ""
    work += [f"evaluation of {job.reads:,.0f} texts{written}"] if job.reads or job.answers else []
    return work


def machine_lines(job: PlannedJob, job_plan: JobPlan, profile: Profile) -> list[str]:
    """Machines, time and memory of a plan."""
    hours = job_plan.seconds / 3600
    spread = {
        None: f"{job_plan.replicas} replica(s) of {job_plan.devices} x {profile.hardware}, {job.dtype}",
        "ddp": f"{job_plan.replicas} x {profile.hardware}, {job.dtype}; ddp: a whole model on each",
        "fsdp": f"{job_plan.devices} x {profile.hardware}, {job.dtype}; fsdp: weights, gradients and moments are split "
        "over all",
    }[job_plan.strategy]
    lines = [f"on {spread}"]
    lines.append(f"time    {_duration(job_plan.seconds)} ({hours:.3g} h), {job_plan.device_hours:.3g} device hours")
    for name, seconds in sorted(job_plan.parts.items(), key=lambda part: -part[1]):
        lines.append(f"        {seconds / job_plan.seconds:>4.0%} {name}")
    each, of = ("a replica", job_plan.devices) if job_plan.strategy is None else ("a device", 1)
    lines.append(f"memory  {job_plan.memory / 1e9:.3g} GB {each}, of {of * profile.memory / 1e9:.3g} GB")
    return lines


def notes_on(job: PlannedJob, profile: Profile) -> list[str]:
    """What a reader of a plan must know to trust it."""
    notes = []
    if alone := [name for name in job.measure if takes_samples_alone(name)]:
        notes.append(f"{' and '.join(alone)}: a sample at a time, each along its own updates; nothing is batched")
    if together := [name for name in job.measure if MEASURES[name].scope == "set"]:
        notes.append(f"{' and '.join(together)}: the work of one replica, which takes longer than its share")
    if job.answers:
        notes.append("answers are taken to be as long as they may be; those that end earlier take less")
    if not profile.knows(job.dtype):
        notes.append(
            f"{job.dtype} was not measured on {profile.name}: the speed is that of {profile.dtype}, which is what is "
            "known"
        )
    if (job.answers or job.continuations) and "decoding" not in profile.costs:
        notes.append(f"decoding was not measured on {profile.name}: a step is taken for a forward pass of its tokens")
    if not profile.measured:
        notes.append(
            f"{profile.name} is from its data sheet and was not measured; `mrd-bench benchmark plan --out FILE` "
            f"measures a machine, and {named('profile')} FILE plans with that"
        )
    return notes


def _short(count: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= u), (1, ""))
    return f"{count / unit:.3g} {name}".strip()


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
