"""The training loop against plain torch loops, and against what it promises of draws, stopping and continuing."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from algorithms import live
from algorithms.checkpoints import Checkpoint, Checkpoints
from algorithms.corpus import Corpus, Evaluation
from algorithms.group import Group
from algorithms.history import History, Progress
from algorithms.loss import DIRECTION
from algorithms.objectives import ALGORITHMS
from algorithms.ray_train import TrainingJob, train_here
from algorithms.recipe import Execution, Recipe, total_updates, updates_per_epoch
from algorithms.samplers import retain_order
from algorithms.stopping import Thresholds, measure_memorization
from algorithms.tables import tables_of
from algorithms.trainable import Lora, Trainable, trainable_for
from algorithms.unlearner import Diverged, Unlearner
from bench.speed.made import random_llama
from scoring.adapters import adapter_base
from scoring.errors import UserError
from scoring.load import load_model
from scoring.logprob import scored_logprobs
from scoring.memorization import extraction, extraction_likelihood, memorization_accuracy
from scoring.mrd import ESTIMATORS, Request, estimate, reduce_draws
from scoring.replica import TransformersReplica
from scoring.samples import Sample, collate
from tests.paths import ROOT
from tests.tiny_folders import EOS, save_adapter, save_model, tokenizer
from tests.tiny_models import ARCHITECTURES, VOCABULARY, config, random_samples, tiny_model

BATCH = 3
# Of weights that change by up to 1e-3: AdamW divides by a gradient's size, and so enlarges what machines round
# differently. A wrong gradient is off by 1e-4 and more.
ROUNDING = 5e-6
# A KL near 0 is the difference of fp32 log-probabilities of size 5.
KL_ROUNDING = 2e-7


def refused(sample: Sample) -> Sample:
    """The same prompt with another answer."""
    prompt = sample.input_ids[~sample.scored]
    answer = np.random.default_rng(sample.index).integers(3, VOCABULARY, 3 + sample.index % 4)
    scored = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return Sample(sample.sample_id, np.concatenate([prompt, answer]), scored, sample.index)


# 7 samples in batches of 3: the last batch of an epoch has samples of a second pass. 5 retain samples: they are gone
# through in the midst of a batch.
FORGET = random_samples(7)
RETAIN = [dataclasses.replace(sample, sample_id=f"kept {sample.index}") for sample in random_samples(5, seed=9)]
CORPUS = Corpus(FORGET, [refused(sample) for sample in FORGET], RETAIN, EOS)


def recipe(algorithm: str = "GA", **fields: Any) -> Recipe:
    """Resolved; short, and without early stopping unless it is asked for, with the paper's rule. EL_30 is defined for
    no sample: its decoding would take most of the time."""
    estimator = ESTIMATORS[fields.get("estimator", "gradient")]
    common = {"batch_size": BATCH, "epochs": 2, "learning_rate": 2e-4, "early_stopping": False, "el_n": 30}
    common |= {"stopping": "paper", "check_every": 1}
    common |= {"statistic": estimator.statistics[0], "draws": 3 if estimator.default_draws else 0}
    made = Recipe(algorithm=algorithm, **{**common, **fields})
    return dataclasses.replace(made, **made.resolved())


def job(
    model: Path,
    folder: Path,
    made: Recipe,
    corpus: Corpus = CORPUS,
    evaluation: Evaluation | None = None,
    **execution: Any,
) -> TrainingJob:
    return TrainingJob(made, Execution(**execution), corpus, str(model), None, folder, tokenizer(), evaluation)


@dataclass
class Run:
    """A finished run and what it left."""

    job: TrainingJob
    history: History

    @property
    def saved(self) -> Checkpoint:
        found = self.job.checkpoints.latest()
        assert found is not None
        return found

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.saved.weights()

    @property
    def draws(self) -> list[list[str]]:
        return [row["samples"] for row in self.history.steps]


def run(model: Path, folder: Path, made: Recipe, corpus: Corpus = CORPUS, **more: Any) -> Run:
    observe = more.pop("observe", lambda _: None)
    folder.mkdir(exist_ok=True)
    this = job(model, folder, made, corpus, **more)
    return Run(this, train_here(this, observe=observe))


def read(folder: Path) -> dict[str, torch.Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: p.detach() for name, p in model.named_parameters()}


def largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    assert set(one) == set(other)
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def assert_bitwise(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with a head of its own; not to be changed."""
    return save_model(tmp_path_factory.mktemp("plain") / "initial", tied=False)


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama that has partly memorised the forget samples, some more than others; not to be changed."""
    model: Any = tiny_model("llama")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(18):
        losses = [
            model(input_ids=ids, labels=ids).loss for s in FORGET for ids in [torch.from_numpy(s.input_ids)[None]]
        ]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("memorised") / "initial"
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


# A second implementation: one sample at a time, whole sequences, fp64, formulas as they are printed


@dataclass
class Plain:
    """Losses of single samples under `model`, given the initial model."""

    model: Any
    initial: Any
    recipe: Recipe

    def table(self, model: Any, sample: Sample) -> torch.Tensor:
        """log p(. | x_<t) at the scored tokens, (S, V)."""
        logits = model(input_ids=torch.from_numpy(sample.input_ids)[None]).logits[0]
        return torch.log_softmax(logits, -1)[np.flatnonzero(sample.scored) - 1]

    def logps(self, sample: Sample, model: Any = None) -> torch.Tensor:
        targets = torch.from_numpy(sample.input_ids[sample.scored])
        return self.table(model or self.model, sample)[torch.arange(len(targets)), targets]

    def ratio(self, sample: Sample) -> torch.Tensor:
        with torch.no_grad():
            before = self.logps(sample, self.initial).sum()
        return self.logps(sample).sum() - before

    def state(self, model: Any, sample: Sample) -> torch.Tensor:
        ids = torch.from_numpy(sample.input_ids)[None]
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[self.recipe.layer]
        return states[0, np.flatnonzero(sample.scored)]

    def setting(self, name: str, default: float) -> float:
        return self.recipe.settings.get(name, default)

    # Forget objectives: the sample, and the same question with a refusal

    def ga(self, sample: Sample, _: Sample) -> torch.Tensor:
        return self.logps(sample).mean()

    def po(self, _: Sample, refusal: Sample) -> torch.Tensor:
        return -self.logps(refusal).mean()

    def npo(self, sample: Sample, _: Sample) -> torch.Tensor:
        beta = self.setting("beta", 0.1)
        return 2 / beta * torch.log(1 + torch.exp(self.ratio(sample)) ** beta)

    def dpo(self, sample: Sample, refusal: Sample) -> torch.Tensor:
        beta = self.setting("beta", 0.1)
        return -2 / beta * torch.log(torch.sigmoid(beta * (self.ratio(refusal) - self.ratio(sample))))

    def simnpo(self, sample: Sample, _: Sample) -> torch.Tensor:
        beta, delta = self.setting("beta", 4.5), self.setting("delta", 0.0)
        return -2 / beta * torch.log(torch.sigmoid(-beta * self.logps(sample).mean() - beta * delta))

    def wga(self, sample: Sample, _: Sample) -> torch.Tensor:
        logps = self.logps(sample)
        return (torch.exp(logps.detach()) ** self.setting("beta", 1.0) * logps).mean()

    def satimp(self, sample: Sample, _: Sample) -> torch.Tensor:
        logps = self.logps(sample)
        p = torch.exp(logps.detach())
        return (p**5 * (1 - p) * logps).mean()

    def undial(self, sample: Sample, _: Sample) -> torch.Tensor:
        targets = torch.from_numpy(sample.input_ids[sample.scored])
        with torch.no_grad():
            # Log-probs are logits: softmax does not see what is the same for all tokens.
            teacher = self.table(self.initial, sample) - self.setting("beta", 10.0) * F.one_hot(targets, VOCABULARY)
        return F.cross_entropy(self.table(self.model, sample), torch.softmax(teacher, -1))

    def ceu(self, sample: Sample, _: Sample) -> torch.Tensor:
        student, targets = self.table(self.model, sample), torch.from_numpy(sample.input_ids[sample.scored])
        others = torch.exp(student.detach()) * (1 - F.one_hot(targets, VOCABULARY))
        return F.cross_entropy(student, others / others.sum(-1, keepdim=True))

    def flat(self, sample: Sample, _: Sample) -> torch.Tensor:
        # The margin of log-probs is that of logits.
        table = self.table(self.model, sample)
        return sum((row.max() - row.sum() / VOCABULARY) ** 2 for row in table) / len(table)

    def rmu(self, sample: Sample, _: Sample) -> torch.Tensor:
        u = np.random.default_rng([self.recipe.seed, DIRECTION]).uniform(size=32)
        steered = torch.from_numpy(self.setting("c", 6.5) * u / np.sqrt((u**2).sum()))
        return ((self.state(self.model, sample) - steered) ** 2).mean()

    # Retain terms

    def none(self, _: Sample) -> torch.Tensor:
        return torch.zeros(())

    def nll(self, sample: Sample, _: Any = None) -> torch.Tensor:
        return -self.logps(sample).mean()

    def kl(self, sample: Sample) -> torch.Tensor:
        with torch.no_grad():
            before = self.table(self.initial, sample)
        return F.kl_div(self.table(self.model, sample), before, log_target=True, reduction="batchmean")

    def hidden(self, sample: Sample) -> torch.Tensor:
        with torch.no_grad():
            before = self.state(self.initial, sample)
        return F.mse_loss(self.state(self.model, sample), before)


@dataclass
class Trace:
    """What the second implementation has seen, an entry an update."""

    forget: list[float] = field(default_factory=list)
    retain: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    retain_weight: list[float] = field(default_factory=list)


def plain_training(
    model: Any,
    draws: Sequence[Sequence[str]],
    made: Recipe,
    corpus: Corpus = CORPUS,
    parameters: Sequence = (),
    forgotten: Callable[[Plain], Callable[[list[int], Sequence[Sample]], torch.Tensor]] | None = None,
) -> Trace:
    """Train `model`, in fp64, in place, on the samples drawn.

    `forgotten` makes of the losses a function of drawn positions and refusals, which is the forget term with its
    weight; by default it is the weighed mean of the algorithm's objective.
    """
    place = {sample.sample_id: sample.index for sample in corpus.forget}
    losses = Plain(model, copy.deepcopy(model), made)
    forget = getattr(losses, ALGORITHMS[made.algorithm].forget.__name__)
    retain = getattr(losses, made.retain_term or "none")
    parameters = list(parameters or model.parameters())
    adafactor = functools.partial(torch.optim.Adafactor, eps=(torch.finfo(torch.float32).eps, 1e-3))
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adafactor": adafactor}
    optimizer: Any = kinds[made.optimizer](parameters, lr=1.0, weight_decay=made.weight_decay)
    own_term = forgotten and forgotten(losses)
    trace = Trace()
    retain_weight = made.retain_weight
    for step, names in enumerate(draws):
        drawn = [place[name] for name in names]
        kept = retain_order(step * made.batch_size, len(drawn), len(corpus.retain), made.seed)
        if own_term:
            term = weighed = own_term(drawn, corpus.refusals)
        else:
            term = torch.stack([forget(corpus.forget[i], corpus.refusals[i]) for i in drawn]).mean()
            weighed = made.forget_weight * term
        retained = torch.stack([retain(corpus.retain[i]) for i in kept]).mean()
        optimizer.zero_grad()
        (weighed + retain_weight * retained).backward()
        trace.retain_weight.append(retain_weight)
        if made.retain_limit and step // math.ceil(len(corpus.forget) / made.batch_size) >= made.dual_warmup:
            retain_weight = max(0, retain_weight + made.dual_step * (retained.item() - made.retain_limit))
        norm = torch.nn.utils.clip_grad_norm_(parameters, made.clip_norm or math.inf).item()
        rate = made.learning_rate
        if step + 1 < made.warmup_steps:
            rate *= (step + 1) / made.warmup_steps
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        for values, value in zip(
            (trace.forget, trace.retain, trace.norm, trace.rate),
            (term.item(), retained.item(), norm, rate),
            strict=True,
        ):
            values.append(value)
    return trace


def exact_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize(
    ("algorithm", "fields"),
    [
        ("GA", {"clip_norm": None}),
        ("GA", {"alpha": 1.0, "replacement": False}),
        ("GA", {"optimizer": "sgd", "learning_rate": 0.05}),
        ("GA", {"optimizer": "adafactor", "learning_rate": 0.01, "weight_decay": 0.1}),
        ("GradDiff", {"forget_weight": 0.5, "retain_weight": 2.0}),
        ("GradDiff-KL", {"order": "hard-first"}),
        ("PO", {}),
        ("NPO", {}),
        ("NPO-GradDiff", {"settings": {"beta": 0.5}}),
        ("IdkDPO", {"settings": {"beta": 0.3}}),
        ("SimNPO", {"settings": {"beta": 2.0, "delta": 0.5}}),
        ("UNDIAL", {"clip_norm": 0.03}),
        ("CE-U", {"clip_norm": 0.03}),
        ("AltPO", {"settings": {"beta": 0.3}}),
        # The retain loss is about 4.6 nats: the weight grows; under the other limit it falls to 0.
        ("PDU", {"dual_warmup": 1, "retain_limit": 2.0, "dual_step": 0.5, "retain_weight": 1.0}),
        ("PDU", {"dual_warmup": 0, "retain_limit": 9.0, "dual_step": 0.5, "retain_weight": 3.0}),
        ("TaskVector", {"negation": 0.5}),
        ("WGA", {"settings": {"beta": 0.5}}),
        ("SatImp", {}),
        ("RMU", {"layer": 1, "settings": {"c": 3.0}}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "defaults",
)
def test_same_as_plain_training(model_folder: Path, plain: Path, tmp_path: Path, algorithm: str, fields: dict):
    """Weights, losses, gradient norms and rates of 6 updates, in several micro-batches each."""
    # KL of a model with itself has a gradient of rounding errors, which AdamW blows up where there is no other: in the
    # embeddings of words that only the retain set has. A tied head gives those another.
    folder = model_folder if algorithm == "GradDiff-KL" else plain
    made = recipe(algorithm, **{"weight_decay": 0.1, "warmup_steps": 4, "clip_norm": 0.25, "seed": 5, **fields})
    done = run(folder, tmp_path, made, batch_tokens=40)
    assert done.history.passes["training"][0] > len(done.draws) * (1 if made.retain_term == "none" else 2)
    model = exact_model(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for name, p in model.named_parameters() if algorithm != "RMU" or ".layers.0." in name]
    trace = plain_training(model, done.draws, made, parameters=trained)
    after = {name: p.detach() for name, p in model.named_parameters()}
    if made.negation:
        after = {name: (1 + made.negation) * before[name] - made.negation * p for name, p in after.items()}
    assert largest_difference(done.weights, after) <= ROUNDING
    assert largest_difference(before, after) >= 5e-4

    rows = done.history.steps
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [1, 1, 1, 2, 2, 2]
    np.testing.assert_allclose([row["forget_loss"] for row in rows], trace.forget, rtol=1e-4)
    np.testing.assert_allclose([row["gradient_norm"] for row in rows], trace.norm, rtol=1e-4)
    np.testing.assert_allclose([row["learning_rate"] for row in rows], trace.rate, rtol=1e-12)
    if made.retain_term == "none":
        assert [row["retain_loss"] for row in rows] == [None] * 6
    else:
        np.testing.assert_allclose([row["retain_loss"] for row in rows], trace.retain, rtol=1e-4, atol=KL_ROUNDING)
    retain_weights = np.array(trace.retain_weight)
    if made.retain_limit:
        assert len(set(trace.retain_weight)) >= 3
        np.testing.assert_allclose([row["retain_weight"] for row in rows], retain_weights, rtol=1e-5)
    weighed = made.forget_weight * np.array(trace.forget) + retain_weights * np.array(trace.retain)
    np.testing.assert_allclose([row["loss"] for row in rows], weighed, rtol=1e-4)
    assert made.clip_norm is None or max(trace.norm) > made.clip_norm, "nothing is clipped"


def test_tokens_are_counted(plain: Path, tmp_path: Path):
    """All tokens that went through the model, prompts included, padding not."""
    done = run(plain, tmp_path, recipe("IdkDPO"), batch_tokens=64)
    lengths = {s.sample_id: s.length + CORPUS.refusals[s.index].length for s in FORGET}
    for step, row in enumerate(done.history.steps):
        kept = retain_order(step * BATCH, BATCH, len(RETAIN), 0)
        assert row["tokens"] == sum(lengths[name] for name in row["samples"]) + sum(RETAIN[i].length for i in kept)
    assert done.history.epochs[-1]["tokens"] == sum(row["tokens"] for row in done.history.steps)


def test_retain_set_is_gone_through():
    """Each turn has every sample once, in an order of its own, whatever it is cut into."""
    whole = retain_order(0, 40, 5, 3)
    turns = [whole[start : start + 5] for start in range(0, 40, 5)]
    assert all(sorted(turn) == list(range(5)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) >= 6
    assert [i for first in range(0, 40, 4) for i in retain_order(first, 4, 5, 3)] == whole
    assert retain_order(7, 12, 5, 3) == whole[7:19]
    assert retain_order(0, 40, 5, 4) != whole


# Micro-batches and recomputed activations


@pytest.mark.parametrize("algorithm", ["GradDiff", "IdkDPO", "GradDiff-KL", "PO"])
def test_micro_batches_do_not_matter(model_folder: Path, tmp_path: Path, algorithm: str):
    made = recipe(algorithm, alpha=1.0)
    runs = [run(model_folder, tmp_path / str(tokens), made, batch_tokens=tokens) for tokens in (2, 4096)]
    small, large = (one.history for one in runs)
    assert small.passes["training"][0] == 6 * BATCH * (1 if ALGORITHMS[algorithm].retain is None else 2)
    assert large.passes["training"][0] == 6 * 2
    assert runs[0].draws == runs[1].draws
    assert largest_difference(runs[0].weights, runs[1].weights) <= ROUNDING


DROPOUT: dict[str, dict[str, float]] = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "gpt-neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "lora_rank"), [*((architecture, 0) for architecture in DROPOUT), ("gpt2", 2)])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_no_dropout_and_recomputed_activations(tmp_path: Path, architecture: str, lora_rank: int):
    """Dropout that a model is configured with does not act, nor do recomputed activations change anything."""
    without = save_model(tmp_path / "without", architecture)
    configured = shutil.copytree(without, tmp_path / "with")
    stored = json.loads((without / "config.json").read_text())
    (without / "config.json").write_text(json.dumps(stored | dict.fromkeys(DROPOUT[architecture], 0.0)))
    (configured / "config.json").write_text(json.dumps(stored | DROPOUT[architecture]))
    made = recipe("GradDiff", alpha=1.0, epochs=1, lora_rank=lora_rank, early_stopping=True, el_n=2)
    reference = run(without, tmp_path / "a", made)
    plainly = run(configured, tmp_path / "b", made)
    recomputed = run(configured, tmp_path / "c", made, gradient_checkpointing=True)
    assert_bitwise(plainly.weights, reference.weights)
    for done in (plainly, recomputed):
        assert largest_difference(done.weights, reference.weights) <= ROUNDING
        assert done.draws == reference.draws
        np.testing.assert_allclose(done.history.mrd[0]["mrd"], reference.history.mrd[0]["mrd"], rtol=1e-6)
        assert done.history.memory == reference.history.memory
    moved = largest_difference(read(without), read(reference.saved.model))
    assert moved >= 2e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bfloat16", [False, True], ids=["fp32", "bf16"])
def test_activations_are_recomputed(architecture: str, bfloat16: bool):
    """In the backward pass, to the same gradients; and not where somebody else looks at the model."""
    batch, gradients, calls = collate(FORGET[:4]), [], []
    for recomputing in (False, True):
        model: Any = tiny_model(architecture)
        trained = Trainable(model, gradient_checkpointing=recomputing, bfloat16=bfloat16)
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        count = Counter()
        for layer in layers:
            inner = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear) or "Conv1D" in type(m).__name__)
            inner.register_forward_hook(lambda *_, c=count: c.update(["forward"]))
        total = trained.forward(batch, ["logprobs"])["logprobs"].sum()
        assert count["forward"] == len(layers) == 2
        total.backward()
        calls.append(count["forward"])
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        for _ in range(2):
            with trained.whole_model() as whole:
                assert whole is model
                assert not any(m.training for m in whole.modules())
        with pytest.raises(FloatingPointError), trained.whole_model():
            raise FloatingPointError
        assert [m for m in model.modules() if m.training] == (layers if recomputing else [])
    assert calls == [2, 4]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4 * gradient.abs().max().item(), rtol=0)


# What is known of the first update


@pytest.mark.parametrize("algorithm", ["NPO", "NPO-GradDiff", "IdkDPO"])
@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_first_loss_of_preference_objectives(plain: Path, tmp_path: Path, algorithm: str, beta: float):
    """The model is its own reference: -(2/beta) log sigmoid(0)."""
    done = run(plain, tmp_path, recipe(algorithm, settings={"beta": beta}, max_steps=2), batch_tokens=40)
    first, second = (row["forget_loss"] for row in done.history.steps)
    # Both log-probs are sums near 100 nats, in fp32.
    assert first == pytest.approx(2 / beta * math.log(2), rel=1e-6, abs=4e-6)
    assert second < first - 1e-3


@pytest.mark.parametrize(
    ("algorithm", "fields"), [("GradDiff-KL", {}), ("RMU", {"layer": 1}), ("RMU", {"layer": 2})], ids=str
)
def test_first_retain_loss_is_nothing(plain: Path, tmp_path: Path, algorithm: str, fields: dict):
    """Nothing has moved yet; after one update something has."""
    made = recipe(algorithm, max_steps=2, learning_rate=1e-3, **fields)
    first, second = (row["retain_loss"] for row in run(plain, tmp_path, made, batch_tokens=40).history.steps)
    assert abs(first) <= 1e-6
    assert second >= 2e-5


# Continuing


class Stopped(Exception):
    """Raised in the middle of a run."""


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if not k.startswith("seconds")}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def record(history: History) -> str:
    """All of it but the seconds, nan and infinity included."""
    return json.dumps(without_seconds(dataclasses.asdict(history)))


CONTINUED: dict[str, tuple[str, dict]] = {
    "with replacement": ("GradDiff-KL", {"alpha": 1.0, "refresh": 1}),
    "without replacement": ("NPO-GradDiff", {"alpha": -1.0, "replacement": False}),
    "fixed order": ("IdkDPO", {"order": "easy-first"}),
    "random order": ("UNDIAL", {"order": "random", "weight_decay": 0.1}),
    "refresh by steps": ("GA", {"alpha": 1.0, "refresh": 2, "refresh_unit": "steps", "check_unit": "steps"}),
    "monte-carlo": ("GA", {"alpha": 0.5, "refresh": 3, "refresh_unit": "steps", "estimator": "monte-carlo"}),
    "bfloat16": ("NPO", {"dtype": "bfloat16"}),
    # One layer: adapters are merged for whoever looks at the model, and that takes time.
    "lora": ("GradDiff", {"lora_rank": 2, "lora_targets": r".*1.*_proj", "alpha": 1.0, "replacement": False}),
    "rmu": ("RMU", {"layer": 1, "warmup_steps": 5, "learning_rate": 1e-3}),
    "sgd": ("GA", {"optimizer": "sgd", "learning_rate": 0.05}),
    "adafactor": ("GA", {"optimizer": "adafactor", "learning_rate": 0.01}),
    "task vector": ("TaskVector", {"negation": 0.7, "alpha": 1.0, "refresh": 1}),
    "retain weight": ("PDU", {"retain_limit": 4.0, "dual_step": 0.5, "dual_warmup": 0, "retain_weight": 1.0}),
    "forecasts": (
        "NPO",
        {
            "weights": "flip-time",
            "alpha": 1.0,
            "refresh": 2,
            "refresh_unit": "steps",
            "schedule": {"groups": [{"share": 0.5, "algorithm": "GA", "forget_weight": 0.5}, {"share": 0.5}]},
            "hold_penalty": 0.1,
            "reward": 1.0,
        },
    ),
}


@pytest.fixture(scope="module")
def undisturbed(memorised: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """One run of each of CONTINUED."""
    runs: dict[str, Run] = {}

    def of(name: str) -> Run:
        if name not in runs:
            runs[name] = run(memorised, tmp_path_factory.mktemp("undisturbed"), continued(name))
        return runs[name]

    return of


def continued(name: str) -> Recipe:
    algorithm, fields = CONTINUED[name]
    common = {"learning_rate": 5e-4, "early_stopping": True, "el_n": 2}
    return recipe(algorithm, **{**common, **fields})


def stop_at(step: int) -> Callable[[Progress], None]:
    def observe(progress: Progress) -> None:
        if progress.step == step:
            raise Stopped

    return observe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpoint_every", "stops"),
    [
        *((name, 1, (4,)) for name in CONTINUED),
        *((name, 4, (5,)) for name in ("with replacement", "without replacement", "refresh by steps", "lora")),
        ("with replacement", None, (2, 5)),
    ],
)
def test_continued_run_ends_the_same(
    undisturbed: Callable[[str], Run],
    memorised: Path,
    tmp_path: Path,
    name: str,
    checkpoint_every: int | None,
    stops: tuple[int, ...],
):
    """To the last bit: weights, optimizer and record."""
    whole = undisturbed(name)
    assert whole.history.step == 6
    this = job(memorised, tmp_path, continued(name), checkpoint_every=checkpoint_every)
    for stop in stops:
        with pytest.raises(Stopped):
            train_here(this, observe=stop_at(stop))
    # There is one at the end of each epoch in any case.
    last = {1: 3, 4: 4, None: 3}[checkpoint_every]
    saved = this.checkpoints.latest()
    assert saved is not None
    assert saved.history()["step"] == last
    seen: list[int] = []
    done = Run(this, train_here(this, observe=lambda progress: seen.append(progress.step)))
    assert seen == list(range(last + 1, whole.history.step + 1))
    assert record(done.history) == record(whole.history)
    assert record(History(**done.saved.history())) == record(whole.history)
    assert_bitwise(done.weights, whole.weights)
    assert_bitwise(done.saved.training(), whole.saved.training())


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "adamw-8bit"])
def test_the_state_of_every_optimizer_goes_through_a_file(name: Any, tmp_path: Path) -> None:
    """Three updates on, a model that was restored after the second has the weights of one that was never stopped, to
    the bit. Matrices are large enough for moments of 8 bits."""
    if name == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    batch = collate(random_samples(4))

    def update(trained: Trainable, times: int) -> None:
        for _ in range(times):
            trained.forward(batch, ["logprobs"])["logprobs"].sum().backward()
            trained.step(1e-2)

    def made() -> Trainable:
        return Trainable(random_llama(128, 64, 1, 2).eval(), optimizer=name, weight_decay=0.1)

    whole, stopped, restored = made(), made(), made()
    update(whole, 3)
    update(stopped, 2)
    state = stopped.state()
    assert (torch.uint8 in {value.dtype for value in state.values()}) == (name == "adamw-8bit")
    save_file(state, tmp_path / "state.safetensors")
    saved = load_file(tmp_path / "state.safetensors")
    restored.restore({n: p.detach() for n, p in stopped.model.named_parameters()}, saved)
    assert_bitwise(restored.state(), state)
    update(restored, 1)
    assert_bitwise(dict(restored.model.named_parameters()), dict(whole.model.named_parameters()))
    assert_bitwise(restored.state(), whole.state())


def test_continuing_a_finished_run_does_nothing(undisturbed: Callable[[str], Run]):
    done = undisturbed("with replacement")

    def times() -> dict[Path, int]:
        files = (path for path in done.job.folder.rglob("*") if path.is_file() and path.name != "progress.json")
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    again = train_here(done.job, observe=stop_at(1))
    assert record(again) == record(done.history)
    assert times() == before


def test_tables_grow_and_no_update_is_read_twice(
    memorised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is stopped three updates after its last checkpoint and continued: who reads after any update finds
    the updates so far, each once."""
    monkeypatch.setattr(live, "TABLES_S", 0.0)
    monkeypatch.setattr(live, "ROWS_PER_PART", 2)
    this = job(memorised, tmp_path, recipe("GA", epochs=2, batch_size=1, early_stopping=False))
    read: list[list[int]] = []

    def look(progress: Progress) -> None:
        if progress.step > this_start:
            read.append(pd.read_parquet(tmp_path / "steps.parquet")["step"].tolist())
        if progress.step == stop:
            raise Stopped

    this_start, stop = 0, len(this.corpus.forget) + 3
    with pytest.raises(Stopped):
        train_here(this, observe=look)
    whole = train_here(job(memorised, tmp_path / "whole", this.recipe))
    # The tables are written after the observer has looked: they have the updates before.
    assert read == [list(range(1, seen)) for seen in range(1, stop + 1)]
    this_start, stop, read = len(this.corpus.forget), 0, []
    history = train_here(this, observe=look)
    assert read == [list(range(1, seen)) for seen in range(this_start + 1, whole.step + 1)]
    steps, epochs = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("steps", "epochs"))
    final = tables_of(history, this.corpus)
    assert steps.equals(final["steps"])
    assert epochs.equals(final["epochs"])
    assert steps.drop(["seconds"]).equals(tables_of(whole, this.corpus)["steps"].drop(["seconds"]))


# Early stopping


def memory_by_itself(model: Any, samples: Sequence[Sample], n: int) -> tuple[np.ndarray, np.ndarray]:
    """MA and EL_n, a sample at a time."""
    ma = [memorization_accuracy(model, collate([sample])).item() for sample in samples]
    el = [extraction_likelihood(model, [sample], n, EOS).item() for sample in samples]
    return np.array(ma), np.array(el)


@dataclass
class Witness:
    """An evaluation that keeps what it is shown; MA and EL_n too, if n is given."""

    n: int | None = None
    models: list[Any] = field(default_factory=list)
    memory: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def evaluation(self, samples: Sequence[Sample] = FORGET) -> Evaluation:
        return Evaluation({"forget": samples}, self.measure)

    def measure(self, model: Any, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        self.models.append(copy.deepcopy(model))
        if self.n is not None:
            self.memory.append(memory_by_itself(model, samples, self.n))
        lengths = np.array([sample.length for sample in samples])
        return {"length": lengths, "first": next(model.parameters())[0, 0].item() * lengths}


STOPPING = {"learning_rate": 1e-3, "early_stopping": True, "el_n": 2, "epochs": 12, "batch_size": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 1.0},
        {"alpha": -1.0, "replacement": False},
        {"order": "easy-first"},
        {"order": "random", "check_unit": "steps"},
        {"alpha": 1.0, "refresh_unit": "steps", "check_every": 2},
        {"order": "random", "stopping": "ma=0.6"},
    ],
    ids=lambda fields: ",".join(f"{k}={v}" for k, v in fields.items()),
)
def test_early_stopping(memorised: Path, tmp_path: Path, fields: dict):
    witness = Witness(2)
    made = recipe("GA", **{**STOPPING, **fields})
    done = run(memorised, tmp_path, made, evaluation=witness.evaluation())
    history = done.history

    # By the paper's rule thresholds are averages on the initial model; else EL is never looked at.
    ma, el = memory_by_itself(load_model(memorised), FORGET, 2)
    thresholds = {"ma": ma.mean(), "el": el.mean()}
    if asks_el := fields.get("stopping", "paper") == "paper":
        np.testing.assert_allclose(history.memory["initial"]["el"], el, rtol=1e-12)
    else:
        thresholds = {"ma": 0.6, "el": np.nan}
        assert np.isinf([history.memory[when]["el"] for when in ("initial", "last")]).all()
    assert history.thresholds == pytest.approx(thresholds, rel=1e-12, nan_ok=True)
    np.testing.assert_allclose(history.memory["initial"]["ma"], ma, rtol=1e-12)
    assert 0.2 < ma.mean() < 1

    # Forgotten when found below both, at a look, and not before.
    every = (made.check_every) * (1 if made.check_unit == "steps" else 4)
    assert all(step is not None and step % every == 0 for step in history.forgotten_at)
    assert len(set(history.forgotten_at)) >= 2, "all are forgotten at once"
    for row, (ma_then, el_then) in zip(history.epochs, witness.memory, strict=True):
        below = (ma_then < thresholds["ma"]) & ((not asks_el) | (el_then < thresholds["el"]))
        forgotten = [step is not None and step <= row["step"] for step in history.forgotten_at]
        assert row["forgotten"] == pytest.approx(np.mean(forgotten))
        if row["step"] and row["step"] % every == 0:
            newly = [step == row["step"] for step in history.forgotten_at]
            assert below[newly].all()
            assert all(np.array(forgotten)[below])
            # What is forgotten is not looked at again.
            last = history.memory["last"]
            np.testing.assert_allclose(np.array(last["ma"])[newly], ma_then[newly], rtol=1e-12)
            if asks_el:
                np.testing.assert_allclose(np.array(last["el"])[newly], el_then[newly], rtol=1e-12)

    # A forgotten sample is never drawn again; the run ends with the last one.
    for sample, step, count in zip(FORGET, history.forgotten_at, history.drawn_until_forgotten, strict=True):
        times = [row["step"] for row in history.steps for name in row["samples"] if name == sample.sample_id]
        assert max(times, default=0) <= step
        assert count == len(times) == history.drawn[sample.index]
    assert history.step == max(history.forgotten_at) < total_updates(7, made)
    assert history.epochs[-1]["forgotten"] == 1
    assert history.epochs[-1]["step"] == history.step == done.saved.history()["step"]


def test_without_early_stopping_all_are_drawn_on(memorised: Path, tmp_path: Path):
    made = recipe("GA", **{**STOPPING, "early_stopping": False, "epochs": 8, "order": "random"})
    history = run(memorised, tmp_path, made).history
    assert history.step == 8 * 4
    at = history.forgotten_at
    assert sum(step is not None and step <= 20 for step in at) >= 2
    for sample, step, count in zip(FORGET, at, history.drawn_until_forgotten, strict=True):
        if step is not None:
            times = [row["step"] for row in history.steps if sample.sample_id in row["samples"]]
            assert count == sum(time <= step for time in times)
            assert step > 20 or history.drawn[sample.index] > count


def test_forgotten_before_any_update(memorised: Path, tmp_path: Path):
    """Those are drawn until the first look, and a note says how many they are."""
    ma, el = memory_by_itself(load_model(memorised), FORGET, 2)
    below = (ma < ma.mean()) & (el < el.mean())
    assert 0 < below.sum() < 7
    made = recipe("GA", **{**STOPPING, "learning_rate": 1e-9, "epochs": 2, "order": "random"})
    history = run(memorised, tmp_path, made).history
    assert history.forgotten_at == [4 if was else None for was in below]
    first = {name for row in history.steps[:4] for name in row["samples"]}
    assert first == {sample.sample_id for sample in FORGET}
    assert any(note.startswith(f"{below.sum()} of 7 samples are below the stopping rule's") for note in history.notes)


def test_looks_cost_no_more_than_training(memorised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is said how often to look: at the first end of an epoch at which as many tokens have been trained on,
    forward and backward, as the last look has read and written; and after the last update."""
    made = recipe("GA", **{**STOPPING, "learning_rate": 1e-9, "epochs": 12, "check_every": None, "order": "random"})
    looks = []

    def look(model: Any, samples: Any, *given: Any) -> Any:
        looks.append(len(samples))
        return measure_memorization(model, samples, *given)

    monkeypatch.setattr("algorithms.unlearner.measure_memorization", look)
    history = run(memorised, tmp_path, made).history

    model = load_model(memorised)

    def cost(samples: Sequence[Any], el_below: float) -> int:
        ma = np.array([memory_by_itself(model, [sample], 2)[0][0] for sample in samples])
        some = [sample for sample, value in zip(samples, ma, strict=True) if value < el_below]
        return sum(s.length for s in samples) + (extraction(model, some, 2, EOS).tokens if some else 0)

    ma, _ = memory_by_itself(model, FORGET, 2)
    expected, due, active = [7], cost(FORGET, np.inf), list(FORGET)
    trained = 0
    for row in history.steps:
        trained += 3 * row["tokens"]
        if row["step"] == 48 or (row["step"] % 4 == 0 and trained >= due):
            expected.append(len(active))
            due, trained = cost(active, ma.mean()), 0
            active = [s for s in active if history.forgotten_at[s.index] is None]
    assert looks == expected
    assert 3 <= len(looks) < 13
    assert any("looking which samples are forgotten cost as much as training for" in note for note in history.notes)


@pytest.mark.slow
def test_extraction_likelihood_that_is_not_defined(memorised: Path, tmp_path: Path):
    """Where no prefix leaves n tokens MA alone decides, and a note says of how many samples."""
    lengths = sorted(sample.length for sample in FORGET)
    n = lengths[3]
    short = np.array([sample.length <= n for sample in FORGET])
    assert 0 < short.sum() < 7
    witness = Witness(n)
    done = run(memorised, tmp_path, recipe("GA", **{**STOPPING, "el_n": n}), evaluation=witness.evaluation())
    ma, el = memory_by_itself(load_model(memorised), FORGET, n)
    assert np.isnan(el).tolist() == short.tolist()
    assert done.history.thresholds == pytest.approx({"ma": ma.mean(), "el": el[~short].mean()}, rel=1e-12)
    assert f"EL is not defined for {short.sum()} samples of at most {n} tokens: MA alone decides" in done.history.notes
    for index in np.flatnonzero(short).tolist():
        below = [
            row["step"]
            for row, (ma_then, _) in zip(done.history.epochs, witness.memory, strict=True)
            if row["step"] and ma_then[index] < ma.mean()
        ]
        assert done.history.forgotten_at[index] == (below[0] if below else None)


def test_extraction_likelihood_that_cannot_decide_is_not_measured(
    memorised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is below 0. Samples of which EL is not defined are forgotten by MA, as ever."""
    n = sorted(sample.length for sample in FORGET)[3]
    short = np.array([sample.length <= n for sample in FORGET])
    measured = []

    def counted(model: Any, samples: Any, *given: Any, **more: Any) -> Any:
        measured.append(len(samples))
        return extraction(model, samples, *given, **more)

    monkeypatch.setattr("algorithms.stopping.extraction", counted)
    made = recipe("GA", **{**STOPPING, "el_n": n, "el_threshold": 0.0, "epochs": 6, "order": "random"})
    done = run(memorised, tmp_path, made)
    assert measured == [7]
    forgotten = np.array([step is not None for step in done.history.forgotten_at])
    assert forgotten.any()
    assert not (forgotten & ~short).any()
    rows = tables_of(done.history, CORPUS)["samples"].to_pylist()
    assert any(row["ma_last"] < row["ma_initial"] for row in rows if row["num_tokens"] > n)
    assert all(row["el_last"] is None for row, is_short in zip(rows, short, strict=True) if not is_short)


def test_thresholds_by_hand():
    ma, el = np.array([0.2, 0.6, 1.0, 0.2]), np.array([0.0, np.nan, 0.4, 0.5])
    thresholds = Thresholds.from_initial(ma, el)
    assert (thresholds.ma, thresholds.el) == pytest.approx((0.5, 0.3))
    assert thresholds.forgotten(ma, el).tolist() == [True, False, False, False]
    # Below, not at, the average; nan counts as below.
    now = np.array([0.49, 0.49, 0.5, 0.4]), np.array([0.3, np.nan, 0.0, 0.29])
    assert thresholds.forgotten(*now).tolist() == [False, True, False, True]
    undefined = Thresholds.from_initial(ma, np.full(4, np.nan))
    assert undefined.forgotten(ma, np.full(4, np.nan)).tolist() == [True, False, False, True]


# Draws


ORDERS = [
    {"alpha": 0.0},
    {"alpha": 1.0},
    {"alpha": -1.0},
    {"alpha": 3.0, "replacement": False},
    {"alpha": 0.0, "replacement": False},
    {"order": "easy-first"},
    {"order": "hard-first"},
    {"order": "random"},
]


@pytest.mark.parametrize(
    ("fields", "batch_size", "updates"),
    [*((fields, 3, 3) for fields in ORDERS), *((fields, 7, 1) for fields in ORDERS[-4:])],
    ids=str,
)
def test_as_many_updates_and_samples_for_every_order(
    plain: Path, tmp_path: Path, fields: dict, batch_size: int, updates: int
):
    made = recipe("GA", batch_size=batch_size, **fields)
    history = run(plain, tmp_path, made).history
    assert updates_per_epoch(7, made) == updates
    assert history.step == total_updates(7, made) == 2 * updates
    assert [row["epoch"] for row in history.steps] == [1] * updates + [2] * updates
    assert [row["step"] for row in history.epochs] == [0, updates, 2 * updates]
    assert all(len(row["samples"]) == batch_size for row in history.steps)
    counts = Counter(name for row in history.steps for name in row["samples"])
    assert [counts[sample.sample_id] for sample in FORGET] == history.drawn
    assert sum(history.drawn) == 2 * updates * batch_size
    if fields.get("order", "weighted") != "weighted" or not fields.get("replacement", True):
        for epoch in (0, 1):
            rows = history.steps[epoch * updates : (epoch + 1) * updates]
            assert {name for row in rows for name in row["samples"]} == {sample.sample_id for sample in FORGET}
    if batch_size == 7 and fields.get("order") in ("easy-first", "hard-first"):
        order = np.argsort(history.mrd[0]["mrd"])
        easy = [FORGET[i].sample_id for i in order[::-1]]
        assert history.steps[0]["samples"] == (easy if fields["order"] == "easy-first" else easy[::-1])


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"refresh": 2}, [0, 6]),
        ({"refresh": 1}, [0, 3, 6, 9]),
        ({"refresh": 3, "refresh_unit": "steps"}, [0, 3, 6, 9]),
        ({"refresh": 5, "refresh_unit": "steps"}, [0, 5, 10]),
        ({"refresh": 0}, [0]),
        ({"refresh": 0, "order": "hard-first"}, [0]),
        ({"refresh": 2, "order": "easy-first"}, [0, 6]),
        ({"alpha": 0.0, "refresh": 1}, []),
        ({"order": "random", "refresh": 1}, []),
    ],
    ids=str,
)
def test_when_difficulty_is_measured(plain: Path, tmp_path: Path, fields: dict, steps: list[int]):
    history = run(plain, tmp_path, recipe("GA", **{"alpha": 1.0, "epochs": 4, **fields})).history
    assert history.step == 12
    assert [entry["step"] for entry in history.mrd] == steps
    # One batch: a forward and a backward a measurement.
    assert history.passes["mrd"] == [len(steps), len(steps)]
    assert history.epochs[-1]["forwards_mrd"] == history.epochs[-1]["backwards_mrd"] == len(steps)


def difficulty(model: Any, made: Recipe) -> np.ndarray:
    """By `scoring.mrd`, of all weights, in the order of FORGET."""
    for p in model.parameters():
        p.requires_grad_(True)
    request = Request(made.estimator, made.sigma, made.seed, 0, made.draws or 1)
    draws = estimate(TransformersReplica(model), [collate(FORGET[:2]), collate(FORGET[2:])], request)
    return reduce_draws(draws.values, made.statistic)[0]


@pytest.mark.parametrize(
    ("algorithm", "fields"),
    [
        ("GradDiff", {}),
        ("GradDiff", {"trainable": "layers.1.mlp"}),
        ("GradDiff", {"lora_rank": 2}),
        ("RMU", {"layer": 1}),
        ("GradDiff", {"dtype": "bfloat16"}),
        ("GradDiff", {"estimator": "monte-carlo", "sigma": 1e-3, "seed": 3}),
    ],
    ids=str,
)
def test_difficulties_are_those_of_the_current_weights(plain: Path, tmp_path: Path, algorithm: str, fields: dict):
    """Over all weights, also where only some are trained."""
    witness = Witness()
    made = recipe(algorithm, **{"alpha": 1.0, "batch_size": 7, "refresh": 1, "learning_rate": 4e-3, **fields})
    history = run(plain, tmp_path, made, evaluation=witness.evaluation()).history
    assert [entry["step"] for entry in history.mrd] == [0, 1]
    found = np.array([entry["mrd"] for entry in history.mrd])
    initial = difficulty(load_model(plain), made)
    rtol = 1e-5 if made.estimator in ("gradient", "curvature") else 1e-2
    np.testing.assert_allclose(found[0], initial, rtol=rtol)
    np.testing.assert_allclose(found[1], difficulty(witness.models[1], made), rtol=rtol)
    assert np.abs(found[1] / found[0] - 1).max() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "trainable"),
    [("gradient", r"\.1\."), ("monte-carlo", r"\.1\."), ("antithetic", r"\.1\."), ("curvature", None)],
)
def test_measuring_difficulty_changes_nothing(plain: Path, tmp_path: Path, estimator: str, trainable: str | None):
    """Neither weights nor gradients, nor what is trained: to the last bit."""
    made = recipe("GA", alpha=1.0, estimator=estimator, sigma=1e-2, trainable=trainable)
    model = load_model(plain)
    this = job(plain, tmp_path, made)
    unlearner = Unlearner(made, CORPUS, trainable_for(made, model, Group()), {}, None, None, this.checkpoints)
    trained = unlearner.trained.forward(collate(FORGET), ["logprobs"])["logprobs"].sum()
    trained.backward()

    def state() -> dict[str, torch.Tensor]:
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
        found |= {f"{n} gradient": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return found | {f"{n} trained": torch.tensor(p.requires_grad) for n, p in model.named_parameters()}

    before, buffers = state(), {name: b.clone() for name, b in model.named_buffers()}
    unlearner.refresh()
    assert_bitwise(state(), before)
    assert_bitwise(dict(model.named_buffers()), buffers)
    assert not model.training
    np.testing.assert_allclose(unlearner.history.mrd[0]["mrd"], difficulty(load_model(plain), made), rtol=1e-2)


# How far the weights have moved


@pytest.mark.parametrize(
    ("algorithm", "fields", "tied"),
    [
        ("GradDiff", {}, True),
        ("GradDiff", {}, False),
        ("GradDiff", {"lora_rank": 3}, True),
        ("RMU", {"layer": 2}, False),
        ("GA", {"trainable": "norm"}, True),
    ],
    ids=str,
)
def test_distance_to_the_initial_model(tmp_path: Path, algorithm: str, fields: dict, tied: bool):
    folder = save_model(tmp_path / "initial", "qwen2", tied)
    done = run(folder, tmp_path / "run", recipe(algorithm, **fields))
    before, after = read(folder), read(done.saved.model)
    assert set(before) == set(after)
    delta = np.concatenate([(after[n].double() - before[n].double()).flatten().numpy() for n in before])
    assert [row["step"] for row in done.history.epochs] == [0, 3, 6]
    first, _, last = done.history.epochs
    assert first["mean_abs_delta"] == first["delta_norm"] == 0
    assert last["mean_abs_delta"] == pytest.approx(np.abs(delta).mean(), rel=1e-6)
    assert last["delta_norm"] == pytest.approx(np.sqrt((delta**2).sum()), rel=1e-6)
    assert last["delta_norm"] > 0


def test_evaluation_is_of_the_epochs_end(plain: Path, tmp_path: Path):
    witness = Witness()
    done = run(plain, tmp_path, recipe("GradDiff"), evaluation=witness.evaluation(FORGET[:5]))
    assert len(witness.models) == len(done.history.epochs) == 3
    length = np.mean([sample.length for sample in FORGET[:5]])
    for row, model in zip(done.history.epochs, witness.models, strict=True):
        assert row["forget_length"] == pytest.approx(length)
        assert row["forget_first"] == pytest.approx(length * model.model.embed_tokens.weight[0, 0].item())
    assert_bitwise(dict(witness.models[0].named_parameters()), read(plain))
    assert_bitwise(dict(witness.models[-1].named_parameters()), done.weights)
    for number, row in enumerate(done.history.epochs[1:]):
        steps = done.history.steps[number * 3 : number * 3 + 3]
        for name in ("loss", "forget_loss", "retain_loss"):
            assert row[name] == pytest.approx(np.mean([step[name] for step in steps]), rel=1e-12)
    assert done.history.epochs[0]["loss"] is None


# What is trained


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers: numbers of one and of two digits."""
    settings = config("llama", tied=False)
    settings.num_hidden_layers = 12
    settings.layer_types = None
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(settings)
    folder = tmp_path_factory.mktemp("deep") / "initial"
    model.save_pretrained(folder)
    return folder


def changed(folder: Path, done: Run) -> set[str]:
    before, after = read(folder), done.weights
    assert set(before) == set(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (None, {0, 1, 2}),  # 7/32 of the depth: 2.625
        (1, {0}),
        (2, {0, 1}),
        (7, {4, 5, 6}),
        (12, {9, 10, 11}),
    ],
)
def test_rmu_trains_the_layer_and_two_before(deep: Path, tmp_path: Path, layer: int | None, expected: set[int]):
    done = run(deep, tmp_path, recipe("RMU", layer=layer, max_steps=2, weight_decay=0.1))
    moved = changed(deep, done)
    assert moved == {name for name in read(deep) if (m := re.search(r"\.(\d+)\.", name)) and int(m[1]) in expected}
    assert len(moved) == 9 * len(expected)


def test_layer_beyond_the_model(deep: Path, tmp_path: Path):
    with pytest.raises(UserError, match="layer is 13: the model has 12 decoder layers"):
        run(deep, tmp_path, recipe("RMU", layer=13))


@pytest.mark.parametrize("pattern", [r"layers\.0\.mlp", r"self_attn\.[qk]_proj", r"^model\.norm", r"lm_head", "."])
def test_only_what_is_trainable_moves(plain: Path, tmp_path: Path, pattern: str):
    done = run(plain, tmp_path, recipe("GradDiff", trainable=pattern, weight_decay=0.1))
    assert changed(plain, done) == {name for name in read(plain) if re.search(pattern, name)}


def test_pattern_overrides_the_layers_of_rmu(deep: Path, tmp_path: Path):
    done = run(deep, tmp_path, recipe("RMU", layer=7, trainable=r"\.5\.mlp\.down_proj", max_steps=2))
    assert changed(deep, done) == {"model.layers.5.mlp.down_proj.weight"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers.7", r"trainable: 'layers.7' matches no parameter of the model; its names look like model\.embed_tok"),
        ("(", r"trainable: '\(' is not a regular expression: missing \)"),
    ],
)
def test_pattern_that_is_of_no_use(plain: Path, tmp_path: Path, pattern: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        run(plain, tmp_path, recipe("GA", trainable=pattern))
    assert "\n" not in str(caught.value)


# Low-rank adapters


@pytest.mark.parametrize(
    ("architecture", "target", "weight"),
    [
        ("llama", r".*layers\.1\.mlp\.down_proj", "model.layers.1.mlp.down_proj.weight"),
        ("gpt2", r".*h\.0\.attn\.c_attn", "transformer.h.0.attn.c_attn.weight"),
    ],
)
@pytest.mark.parametrize(("rank", "alpha", "scale"), [(2, None, 2.0), (4, 1, 0.25)])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_adapters_are_merged(
    tmp_path: Path, architecture: str, target: str, weight: str, rank: int, alpha: int | None, scale: float
):
    """What is saved is a plain model: W + scale B A in the one layer that was adapted, the rest as it was."""
    folder = save_model(tmp_path / "initial", architecture)
    made = recipe("GradDiff", lora_rank=rank, lora_alpha=alpha, lora_targets=target, learning_rate=1e-2)
    done = run(folder, tmp_path / "run", made)
    assert not [path.name for path in done.saved.model.iterdir() if "adapter" in path.name]
    loaded: Any = AutoModelForCausalLM.from_pretrained(done.saved.model, dtype=torch.float64).eval()
    assert {type(module).__module__.split(".")[0] for module in loaded.modules()} <= {"torch", "transformers"}
    assert changed(folder, done) == {weight}

    adapters = {k.split(".")[-3]: v.double() for k, v in done.saved.training().items() if k.startswith("trained.")}
    assert adapters.keys() == {"lora_A", "lora_B"}
    product = scale * adapters["lora_B"] @ adapters["lora_A"]
    assert torch.linalg.matrix_rank(product, rtol=1e-6) == rank
    base = exact_model(folder)
    with torch.no_grad():
        p = base.get_parameter(weight)
        # GPT-2 keeps its weights transposed.
        p += product.T if architecture == "gpt2" else product
        for sample in FORGET:
            ids = torch.from_numpy(sample.input_ids)[None]
            torch.testing.assert_close(loaded(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_adapters_same_as_plain_training(plain: Path, tmp_path: Path):
    """A and B of one layer trained by a plain loop from the same beginning."""
    beginnings: list[dict[str, torch.Tensor]] = []
    this = job(
        plain,
        tmp_path,
        recipe("GradDiff", lora_rank=2, lora_targets=r".*layers\.0\.mlp\.up_proj", weight_decay=0.1, warmup_steps=2),
        batch_tokens=40,
    )

    def observe(progress: Progress) -> None:
        saved = this.checkpoints.latest()
        assert saved is not None
        if progress.step == 1:
            beginnings.append(saved.training())

    done = Run(this, train_here(this, observe=observe))
    before, after = beginnings[0], done.saved.training()
    names = sorted(name for name in before if name.startswith("trained."))
    a, b = (before[name].double().requires_grad_() for name in names)
    assert b.abs().max() == 0 < a.abs().max()

    model = exact_model(plain).requires_grad_(False)
    initial = copy.deepcopy(model)
    linear = model.model.layers[0].mlp.up_proj
    linear.forward = lambda x: F.linear(x, linear.weight + 2 * b @ a)
    losses = Plain(model, initial, this.recipe)
    optimizer = torch.optim.AdamW([a, b], weight_decay=0.1)
    place = {sample.sample_id: sample for sample in FORGET}
    for step, names_drawn in enumerate(done.draws):
        optimizer.zero_grad()
        kept = retain_order(step * BATCH, BATCH, len(RETAIN), 0)
        forget = sum(losses.ga(place[name], place[name]) for name in names_drawn) / BATCH
        retain = sum(losses.nll(RETAIN[i]) for i in kept) / BATCH
        (forget + retain).backward()
        torch.nn.utils.clip_grad_norm_([a, b], 1.0)
        optimizer.param_groups[0]["lr"] = 2e-4 * min(1, (step + 1) / 2)
        optimizer.step()
    for name, value in zip(names, (a, b), strict=True):
        assert (after[name].double() - value).abs().max() <= 1e-6
        assert (after[name] - before[name]).abs().max() >= 5e-4


KINDS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"target_modules": ["up_proj"], "lora_alpha": 3, "use_rslora": True, "lora_dropout": 0.5},
    "DoRA, head saved": {"target_modules": ["down_proj"], "use_dora": True, "modules_to_save": ["lm_head"]},
    # The head stays as it is. The adapter's file has the embedding's own weights too.
    "embedding": {"target_modules": ["up_proj", "embed_tokens"]},
    "IA3": {"kind": "IA3", "target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_trained_further(tmp_path: Path, kind: dict[str, Any]):
    """As a plain loop trains it, from what it has learnt; a stopped run ends the same; the adapter is saved, too."""
    peft = pytest.importorskip("peft")
    base = save_model(tmp_path / "base")  # its head is its embedding
    adapter = save_adapter(tmp_path / "adapter", base, **kind)
    folders = [tmp_path / name for name in ("whole", "stopped")]
    for folder in folders:
        folder.mkdir()
    this, stopped = (
        TrainingJob(
            recipe("NPO-GradDiff"), Execution(), CORPUS, str(adapter), None, folder, tokenizer(), continues_adapter=True
        )
        for folder in folders
    )
    done = Run(this, train_here(this))
    with pytest.raises(Stopped):
        train_here(stopped, observe=stop_at(4))
    assert_bitwise(Run(stopped, train_here(stopped)).weights, done.weights)
    assert done.history.epochs[0]["delta_norm"] == 0

    model = peft.PeftModel.from_pretrained(exact_model(base), adapter, is_trainable=True).eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    trace = plain_training(model, done.draws, this.recipe, parameters=[*parameters.values()])
    np.testing.assert_allclose([row["forget_loss"] for row in done.history.steps], trace.forget, rtol=1e-4)
    assert trace.forget[0] == pytest.approx(20 * math.log(2)), "the initial model has the adapter"
    assert largest_difference(before, {name: p.detach() for name, p in parameters.items()}) >= 5e-4
    again = peft.PeftModel.from_pretrained(exact_model(base), done.saved.adapter)
    for name, p in parameters.items():
        assert (again.get_parameter(name) - p).abs().max() <= ROUNDING
    assert same_logprobs(done.saved.model, exact_model(base), done.saved.adapter)


def same_logprobs(model: Path, base: Any, adapter: Path) -> bool:
    """Whether the model of a folder gives the log-probs of its base with an adapter that is not merged."""
    import peft

    batch = collate(random_samples(4))
    adapted = peft.PeftModel.from_pretrained(base, adapter).eval().get_base_model()
    with torch.no_grad():
        one, other = (scored_logprobs(each, batch) for each in (exact_model(model), adapted))
    return (one - other).abs().max().item() <= 1e-5


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_all_linear_layers(plain: Path, tmp_path: Path):
    """But the head; the initial model is what training begins with. They are saved beside the model."""
    done = run(plain, tmp_path, recipe("NPO", lora_rank=1, settings={"beta": 0.1}))
    assert changed(plain, done) == {name for name in read(plain) if "_proj." in name}
    assert done.history.steps[0]["forget_loss"] == pytest.approx(20 * math.log(2), rel=1e-6)
    assert adapter_base(done.saved.adapter) == (str(plain), None)
    assert same_logprobs(done.saved.model, exact_model(plain), done.saved.adapter)
    of_others = run(plain, tmp_path / "negated", recipe("NPO", lora_rank=1, negation=0.5))
    assert not of_others.saved.adapter.exists(), "the model is another one than the trained adapter gives"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("no_such_layer", "LoRA: .*lora_targets is a regular expression"),
        # Merged, they would change the embedding too.
        (".*lm_head", "LoRA: model.embed_tokens and lm_head share their weights, .* lora_targets that match neither"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_where_none_can_be(targets: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        Trainable(tiny_model(), adapter=Lora(2, 4, targets))
    assert "\n" not in str(caught.value)


# Divergence


def diverged(this: TrainingJob, observe: Callable[[Progress], None] = lambda _: None) -> str:
    """The message, which says what to do, of a run that diverges."""
    with pytest.raises(Diverged) as caught:
        train_here(this, observe=observe)
    message = str(caught.value)
    assert "\n" not in message
    assert f"lower learning_rate ({this.recipe.learning_rate:g})" in message
    return message


def assert_sound(this: TrainingJob, step: int) -> None:
    """There is one checkpoint, of that step, and it loads."""
    assert steps_kept(this.checkpoints) == [step]
    saved = this.checkpoints.latest()
    assert saved is not None
    assert all(p.isfinite().all() for p in saved.training().values())
    assert saved.history()["step"] == step == len(saved.history()["steps"])
    assert saved.model.is_dir() == (not this.recipe.lora_rank)
    if step == 0 and saved.model.is_dir():
        assert_bitwise(read(saved.model), read(Path(this.source)))


@pytest.mark.parametrize(
    ("algorithm", "rate"), [("GA", 1e3), ("GradDiff", 1e3), ("NPO", 1e6), ("GA", 1e30), ("RMU", 1e30)]
)
@pytest.mark.parametrize("checkpoint_every", [None, 1])
def test_divergence(plain: Path, tmp_path: Path, algorithm: str, rate: float, checkpoint_every: int | None):
    """The message says when and how. What is left is the last model with a loss, not the lost one."""
    seen: list[Progress] = []
    this = job(plain, tmp_path, recipe(algorithm, learning_rate=rate), checkpoint_every=checkpoint_every)
    message = diverged(this, seen.append)
    assert f"diverged at update {len(seen) + 1}:" in message
    assert re.search(r"forget loss \S+, retain loss \S+, gradient norm \S+;", message)
    assert_sound(this, 0 if checkpoint_every is None else len(seen) - 1)


@pytest.mark.parametrize("fields", [{"max_steps": 1}, {"max_steps": 1, "lora_rank": 1}, {"batch_size": 7}], ids=str)
def test_lost_weights_are_not_saved(plain: Path, tmp_path: Path, fields: dict):
    """Nor do they end a run: where no update follows, no loss would show it."""
    this = job(plain, tmp_path, recipe("GA", learning_rate=1e39, **fields))
    assert "diverged at update 1: weights are no longer finite" in diverged(this)
    assert_sound(this, 0)


def test_lost_model_that_a_refresh_meets_first(plain: Path, tmp_path: Path):
    made = recipe("GA", learning_rate=1e30, alpha=1.0, refresh=1, refresh_unit="steps")
    this = job(plain, tmp_path, made, checkpoint_every=1)
    assert re.search(r"diverged before update 2: difficulty of \d of 7 samples", diverged(this))
    assert_sound(this, 0)


def test_divergence_is_met_again_by_the_same_command(plain: Path, tmp_path: Path):
    this = job(plain, tmp_path, recipe("GA", learning_rate=1e3))
    assert diverged(this) == diverged(this)
    assert_sound(this, 0)


# Checkpoints


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", tokenizer())


def test_checkpoint_is_read_back(checkpoints: Checkpoints):
    assert checkpoints.latest() is None
    model: Any = tiny_model("qwen3", tied=True)
    state = {"optimizer.a.step": torch.tensor(3.0), "adapter.b": torch.randn(2, 3)}
    checkpoints.save(12, model, state, {"step": 12, "notes": ["ä"], "thresholds": {"el": math.nan}})
    saved = checkpoints.latest()
    assert saved is not None
    assert saved.folder.name == "step-00000012"
    assert_bitwise(saved.weights(), {name: p.detach() for name, p in model.named_parameters()})
    assert_bitwise(saved.training(), state)
    back = saved.history()
    assert (back["step"], back["notes"]) == (12, ["ä"])
    assert math.isnan(back["thresholds"]["el"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(saved.model)
    assert loaded.dtype == torch.float32
    ids = torch.from_numpy(FORGET[0].input_ids)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits, atol=1e-6, rtol=0)
    text = "<s> Question: w3 w7 </s>"
    assert AutoTokenizer.from_pretrained(saved.model)(text)["input_ids"] == tokenizer()(text)["input_ids"]


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def steps_kept(checkpoints: Checkpoints) -> list[int]:
    assert all(name.startswith("step-") for name in names(checkpoints))
    return [int(name.removeprefix("step-")) for name in names(checkpoints)]


def latest_step(checkpoints: Checkpoints) -> int:
    saved = checkpoints.latest()
    assert saved is not None
    assert saved.folder.name == f"step-{saved.history()['step']:08d}"
    return saved.history()["step"]


def test_newest_checkpoint_is_kept(checkpoints: Checkpoints):
    """By number, not by name; the one before it stays until the newest is trusted."""
    model: Any = tiny_model()
    for step, before in ((0, []), (9, [0]), (10, [9]), (100, [10])):
        checkpoints.save(step, model, {}, {"step": step})
        assert steps_kept(checkpoints) == [*before, step]
        assert latest_step(checkpoints) == step
        for _ in range(2):
            checkpoints.keep_newest()
            assert steps_kept(checkpoints) == [step]


def test_distrusted_checkpoint(checkpoints: Checkpoints):
    """It goes, the one before it is the newest again; but the only one stays."""
    model: Any = tiny_model()
    checkpoints.save(3, model, {}, {"step": 3})
    checkpoints.discard(3)
    assert steps_kept(checkpoints) == [3]
    checkpoints.save(5, model, {}, {"step": 5})
    # Diverged two updates later: what was saved before has been trained on.
    checkpoints.discard(7)
    assert steps_kept(checkpoints) == [3, 5]
    checkpoints.discard(5)
    assert steps_kept(checkpoints) == [3]
    assert latest_step(checkpoints) == 3


@pytest.mark.parametrize("stage", ["model", "tokenizer", "adapter", "training", "history"])
def test_checkpoint_is_whole_or_not_there(checkpoints: Checkpoints, stage: str, monkeypatch: pytest.MonkeyPatch):
    """Wherever saving fails; and what it leaves is ignored, and removed by the next."""
    model: Any = tiny_model()
    checkpoints.save(1, model, {}, {"step": 1})

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        if stage == "model":
            patched.setattr(model, "save_pretrained", fail)
        elif stage == "tokenizer":
            patched.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
        elif stage == "training":
            patched.setattr("algorithms.checkpoints.save_file", fail)
        adapter = {"save_adapter": fail} if stage == "adapter" else {}
        # What is no JSON fails by itself.
        with pytest.raises(TypeError if stage == "history" else OSError):
            checkpoints.save(2, model, {}, {"step": object() if stage == "history" else 2}, **adapter)
    assert names(checkpoints) == [".step-00000002.tmp", "step-00000001"]
    assert latest_step(checkpoints) == 1
    checkpoints.save(3, model, {}, {"step": 3})
    assert steps_kept(checkpoints) == [1, 3]
    assert latest_step(checkpoints) == 3


HOLD = """
import sys, time
from pathlib import Path
from algorithms.checkpoints import Checkpoints
with Checkpoints(Path(sys.argv[1]), None).held():
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_writes_at_a_time(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    """A worker that outlives its driver is waited for; once it is gone, the wait is over."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(checkpoints.folder)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        monkeypatch.setattr("algorithms.checkpoints.WAIT_S", 0.1)
        with pytest.raises(UserError, match="a process of an earlier start has been writing here for 0 s; end it"):
            checkpoints.held().__enter__()
    finally:
        other.kill()
        other.wait()
    with checkpoints.held():
        assert names(checkpoints) == [".lock"]
    assert not checkpoints.folder.exists()


def test_leftover_of_a_killed_process(plain: Path, tmp_path: Path):
    """It is no checkpoint: a run begins anew beside it, and removes it."""
    leftover = tmp_path / "checkpoints" / ".step-00000004.tmp"
    (leftover / "model").mkdir(parents=True)
    (leftover / "history.json").write_text('{"step": 4')
    done = run(plain, tmp_path, recipe("GA"))
    assert done.history.step == 6
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


def test_model_of_a_run_loads(plain: Path, tmp_path: Path):
    done = run(plain, tmp_path, recipe("GradDiff", dtype="bfloat16"))
    loaded = AutoModelForCausalLM.from_pretrained(done.saved.model)
    assert type(loaded) is LlamaForCausalLM
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    text = "<s> Question: w3 w7 </s>"
    assert AutoTokenizer.from_pretrained(done.saved.model)(text)["input_ids"] == tokenizer()(text)["input_ids"]


# bfloat16 and seeds


@pytest.mark.parametrize("algorithm", ["GradDiff", "NPO-GradDiff", "RMU", "GradDiff-KL"])
def test_bfloat16(plain: Path, tmp_path: Path, algorithm: str):
    """Computes in bfloat16 and keeps weights and optimizer in fp32."""
    made = recipe(algorithm, dtype="bfloat16", layer=1 if algorithm == "RMU" else None)
    low = run(plain, tmp_path / "bf16", made)
    high = run(plain, tmp_path / "fp32", dataclasses.replace(made, dtype="float32"))
    assert low.draws == high.draws
    assert {p.dtype for p in low.weights.values()} == {torch.float32}
    assert {p.dtype for p in low.saved.training().values()} == {torch.float32}
    before = read(plain)

    def moved(done: Run) -> torch.Tensor:
        return torch.cat([(done.weights[name] - before[name]).flatten() for name in before]).double()

    one, other = moved(low), moved(high)
    assert 0 < (one - other).norm() <= 0.35 * other.norm()
    for row, exact in zip(low.history.steps, high.history.steps, strict=True):
        assert row["forget_loss"] != exact["forget_loss"]
        assert row["forget_loss"] == pytest.approx(exact["forget_loss"], rel=0.02)
        assert row["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=0.1)
    # Weights that bfloat16 could not hold: the updates are smaller than its steps.
    assert any((p.bfloat16().float() != p).any() for p in low.weights.values())


@pytest.mark.parametrize("fields", [{"alpha": 1.0}, {"lora_rank": 2, "lora_targets": ".*1.*_proj"}], ids=str)
def test_seed_decides_everything(plain: Path, tmp_path: Path, fields: dict):
    """And nothing else does: not the state of torch's and numpy's own generators, which are left as they are."""
    runs = []
    for number, seed in enumerate((4, 4, 5)):
        torch.manual_seed(number)
        np.random.seed(number)
        before = torch.get_rng_state()
        runs.append(run(plain, tmp_path / str(number), recipe("GradDiff", seed=seed, **fields)))
        assert torch.equal(torch.get_rng_state(), before)
    assert_bitwise(runs[0].weights, runs[1].weights)
    assert record(runs[0].history) == record(runs[1].history)
    assert runs[2].draws != runs[0].draws
    assert largest_difference(runs[2].weights, runs[0].weights) > 1e-5


# Recipes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"algorithm": "GradDif"}, "algorithm is 'GradDif': expected one of GA, .*did you mean 'GradDiff'"),
        ({"settings": {"beta": 1.0}}, "unknown setting of ga 'beta': it has no settings"),
        ({"algorithm": "NPO", "settings": {"gamma": 1.0}}, "unknown setting of npo 'gamma': expected one of beta"),
        ({"algorithm": "NPO", "settings": {"beta": math.inf}}, r"settings\['beta'\] is inf: expected a finite number"),
        ({"algorithm": "NPO", "settings": {"beta": "x"}}, r"settings\['beta'\] is 'x': expected a number"),
        ({"algorithm": "NPO", "settings": {"beta": 0.0}}, r"settings\['beta'\] is 0: expected a number greater than 0"),
        (
            {"algorithm": "NPO", "settings": {"beta": -0.1}},
            r"settings\['beta'\] is -0.1: expected a number greater than 0",
        ),
        ({"retain_term": "nl"}, "retain_term is 'nl': expected one of none, nll, kl, hidden; did you mean 'nll'"),
        ({"order": "easyfirst"}, "order is 'easyfirst': expected one of .*did you mean 'easy-first'"),
        ({"dtype": "float16"}, "dtype is 'float16': expected one of float32, bfloat16"),
        ({"refresh_unit": "epoch"}, "refresh_unit is 'epoch': .*did you mean 'epochs'"),
        ({"check_unit": "step"}, "check_unit is 'step': .*did you mean 'steps'"),
        ({"epochs": 0}, "epochs is 0: expected a whole number of at least 1"),
        ({"max_steps": 0}, "max_steps is 0: expected a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size is 0: expected a whole number of at least 1"),
        ({"refresh": -1}, "refresh is -1: expected a whole number of at least 0"),
        ({"check_every": -1}, "check_every is -1: expected a whole number of at least 0"),
        (
            {"check_every": 0, "early_stopping": True},
            "early_stopping and check_every 0 exclude each other: nobody looks which samples are forgotten",
        ),
        ({"warmup_steps": -1}, "warmup_steps is -1: expected a whole number of at least 0"),
        ({"lora_rank": -1}, "lora_rank is -1: expected a whole number of at least 0"),
        ({"el_n": 0}, "el_n is 0: expected a whole number of at least 1"),
        ({"layer": 0}, "layer is 0: expected a whole number of at least 1"),
        ({"seed": -1}, "seed is -1: expected a whole number of at least 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: expected a number greater than 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan: expected a finite number greater than 0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0: expected a number greater than 0"),
        ({"forget_weight": -1.0}, "forget_weight is -1.0: expected a number of at least 0"),
        ({"retain_weight": math.inf}, "retain_weight is inf: expected a finite number of at least 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1: expected a number of at least 0"),
        ({"lora_rank": 2, "lora_alpha": 0}, "lora_alpha is 0: expected a whole number greater than 0"),
        ({"alpha": math.nan}, "alpha is nan: expected a finite number; 1 easy first, 0 uniform, -1 hard first"),
        ({"lora_alpha": 8}, "lora_alpha is of adapters, and there are none: give lora_rank too"),
        ({"lora_rank": 2, "trainable": "mlp"}, "trainable and lora_rank exclude each other"),
        ({"retain_limit": 1.0}, "retain_limit limits the retain term, and there is none: give retain_term"),
        ({"retain_limit": 0.0}, "retain_limit is 0.0: expected a number greater than 0"),
        ({"dual_step": 1.0}, "dual_step is of a retain weight that changes: give retain_limit too"),
        ({"negation": -1.0}, "negation is -1.0: expected a number of at least 0"),
        ({"algorithm": "TaskVector", "reward": 1.0}, "TaskVector has no forecast: what it trains learns the sample"),
        ({"negation": 1.0, "hold_penalty": 1.0}, "negation does not go with hold_penalty or forecasts"),
        (
            {"negation": 1.0, "schedule": {"groups": [{"share": 0.5, "algorithm": "NPO"}, {"share": 0.5}]}},
            "negation does not go with hold_penalty or forecasts",
        ),
    ],
    ids=str,
)
def test_recipe_that_cannot_be(fields: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        Recipe(**{"algorithm": "GA", **fields}).resolved()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("GA", {"retain_term": "none", "epochs": 5, "batch_size": 4, "alpha": 0.0}),
        ("SGA", {"retain_term": "none", "epochs": 5, "batch_size": 1, "alpha": 0.0}),
        ("CGA", {"retain_term": "none", "epochs": 5, "batch_size": 1, "alpha": 1.0}),
        ("GradDiff", {"retain_term": "nll", "epochs": 5, "forget_weight": 1.0, "retain_weight": 1.0}),
        ("GradDiff-KL", {"retain_term": "kl"}),
        ("PO", {"retain_term": "nll", "epochs": 5}),
        ("NPO", {"retain_term": "none", "epochs": 4, "lora_alpha": None}),
        ("NPO-GradDiff", {"retain_term": "nll", "epochs": 4, "batch_size": 4}),
        ("npo-graddiff", {"retain_term": "nll", "epochs": 4}),
        ("SimNPO", {"retain_term": "nll", "forget_weight": 0.125, "retain_weight": 1.0}),
        ("RMU", {"retain_term": "hidden"}),
    ],
)
def test_algorithms_own_values(algorithm: str, expected: dict):
    found = Recipe(algorithm=algorithm).resolved()
    assert {name: found[name] for name in expected} == expected


def test_values_of_the_recipe_come_first():
    given = {
        "negation": None,
        "early_stopping": True,
        "stopping": "ma=0.5",
        "retain_limit": None,
        "dual_step": None,
        "dual_warmup": None,
        "retain_term": "kl",
        "epochs": 2,
        "batch_size": 6,
        "alpha": 0.0,
        "forget_weight": 0.0,
        "retain_weight": 3.0,
        "lora_alpha": 5,
        "statistic": "abs_mean",
        "draws": 7,
    }
    assert Recipe(algorithm="CGA", lora_rank=3, estimator="monte-carlo", **given).resolved() == given
    assert Recipe(algorithm="GradDiff", retain_term="none").resolved()["retain_term"] == "none"
    assert Recipe(algorithm="GA", lora_rank=3).resolved()["lora_alpha"] == 6


def test_resolved_recipe_is_resolved():
    once = recipe("NPO", epochs=None, max_steps=9, lora_rank=2)
    assert dataclasses.replace(once, **once.resolved()) == once


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [
        (None, None, 4 * 3),
        (None, 2, 2),
        (None, 100, 100),
        (2, 100, 6),
        (2, 5, 5),
        (7, None, 21),
    ],
)
def test_number_of_updates(epochs: int | None, max_steps: int | None, expected: int):
    """7 samples in batches of 3 are 3 updates an epoch; NPO's own epochs are 4."""
    made = recipe("NPO", epochs=epochs, max_steps=max_steps)
    assert total_updates(7, made) == expected


def test_max_steps_are_not_cut_by_the_epochs(plain: Path, tmp_path: Path):
    """A run of 17 updates, where 5 epochs would be 15; the last epoch is a short one."""
    history = run(plain, tmp_path, recipe("GA", epochs=None, max_steps=17)).history
    assert history.step == 17
    assert [row["epoch"] for row in history.epochs] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in history.epochs] == [0, 3, 6, 9, 12, 15, 17]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"trainable": r"layers\.1\."}, {"lora_rank": 2}, {"algorithm": "RMU", "layer": 1}], ids=str
)
def test_curvature_where_only_some_weights_are_trained(plain: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    made = recipe(**{"algorithm": "GA", "alpha": 1.0, "max_steps": 1, "estimator": "curvature", **fields})
    done = run(plain, tmp_path, made)
    np.testing.assert_allclose(done.history.mrd[0]["mrd"], difficulty(load_model(plain), made), rtol=1e-5)


@pytest.mark.parametrize(
    ("algorithm", "settings"), [("NPO", {"beta": 1e-4}), ("IdkDPO", {"beta": 1e-4}), ("RMU", {"c": 1000.0})]
)
def test_large_loss_of_a_sound_model_is_no_divergence(
    plain: Path, tmp_path: Path, algorithm: str, settings: dict[str, float]
) -> None:
    made = recipe(algorithm, settings=settings, max_steps=1, layer=1 if algorithm == "RMU" else None)
    assert run(plain, tmp_path, made).history.step == 1
