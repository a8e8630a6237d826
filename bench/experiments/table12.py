"""Table 12: from how many draws is MRD stable, by the size of the model?

Of draws that are linear in the perturbation, |Delta_k| is half-normal whatever the model: its relative spread is
HALF_NORMAL_SPREAD, and the K at which the relative standard error passes a tolerance is (HALF_NORMAL_SPREAD /
tolerance)^2. So a measured K says whether draws are linear, and nothing about the model.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bench.experiments.experiment import Answer, Experiment, Setting
from bench.experiments.shared.verdicts import lies_within
from bench.jobs.draws import HALF_NORMAL_SPREAD, Point, measure_draws
from bench.jobs.resources import Resources
from bench.models.find import ModelReference, find_model
from bench.report.figures import BLUE, INK, MUTED, VERMILLION, Draw
from bench.report.words import interval_columns, markdown_table, with_ci
from bench.stats.estimates import LEVEL, Estimate, over_sets
from bench.tasks.datasets import load_dataset
from scoring.errors import UserError
from scoring.mrd import reduce_draws
from scoring.samples import encode, evenly_spaced
from scoring.settings import build, current_naming, naming

PAPER = {"Qwen3 4B": (4e9, 60), "Qwen3 8B": (8e9, 80), "Qwen3 14B": (14e9, 50), "Qwen3 32B": (32e9, 80)}
HEAD_SIZE = 32  # of the attention of random models
# The change of K by a tenfold size, as a factor, that would still be called minimal.
MINIMAL = 1.25


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model and the samples that are scored under it.

    Attributes:
        model: see bench.models.find; of a random one, where its tokenizer is from.
        task, split: of the samples.
        hidden_size, layers: of a randomly initialised Llama in the model's stead; 0: the model itself.
    """

    model: str
    task: str
    split: str | None = None
    hidden_size: int = 0
    layers: int = 0

    @property
    def name(self) -> str:
        return f"random {self.layers} x {self.hidden_size}" if self.hidden_size else self.model


@dataclass(frozen=True, kw_only=True)
class Table12Spec:
    """What is measured.

    Attributes:
        models: fields of a ModelSpec each, from small to large.
        samples: of each, evenly spaced over the split.
        draws: of Monte Carlo; more than are needed.
        tolerance: of the relative standard error, median over samples.
        sigma: of the perturbation.
        seed: addresses the noise, and the weights of random models.
    """

    models: list[dict[str, Any]]
    samples: int
    draws: int
    tolerance: float = 0.1
    sigma: float = 1e-5
    seed: int = 0

    def checked(self) -> Table12Spec:
        """The same.

        Raises:
            UserError: a value out of range.
        """
        names = [each.name for each in self.model_specs()]
        if len(set(names)) < 2 or len(set(names)) != len(names):
            raise UserError(f"models are {', '.join(names) or 'none'}: expected two or more different ones")
        if not 0 < self.tolerance < 1:
            raise UserError(f"tolerance is {self.tolerance:g}: expected a number between 0 and 1")
        if self.draws < 2 * self.expected:
            raise UserError(f"draws is {self.draws}: expected {2 * self.expected} or more for this tolerance")
        return self

    def model_specs(self) -> list[ModelSpec]:
        specs = []
        for number, fields in enumerate(self.models):
            with naming(current_naming().under("models", number)):
                specs.append(build(ModelSpec, fields))
        for n, spec in enumerate(specs, 1):
            if (spec.hidden_size > 0) != (spec.layers > 0) or spec.hidden_size % HEAD_SIZE:
                raise UserError(
                    f"models, entry {n}: hidden_size {spec.hidden_size}, layers {spec.layers}: expected both, the "
                    f"former a multiple of {HEAD_SIZE}, or none"
                )
        return specs

    @property
    def expected(self) -> int:
        """K of half-normal draws."""
        return math.ceil((HALF_NORMAL_SPREAD / self.tolerance) ** 2)


@dataclass(frozen=True)
class Measured:
    """The draws of one model.

    Attributes:
        name: of the model.
        parameters: how many it has.
        values: (N, K) by Monte Carlo.
    """

    name: str
    parameters: int
    values: np.ndarray


def run(setting: Setting) -> Answer:
    spec = setting.spec(Table12Spec, "stability").checked()
    return answer([_measure(each, spec, setting) for each in spec.model_specs()], spec)


def _measure(each: ModelSpec, spec: Table12Spec, setting: Setting) -> Measured:
    model = find_model(each.model)
    if each.hidden_size:
        folder = setting.work / "models" / f"{each.name.replace(' ', '-')}-seed{spec.seed}"
        model = find_model(str(random_model(folder, model, each, spec.seed)))
    dataset = load_dataset(each.task, each.split, model.tokenizer)
    samples, _ = encode(evenly_spaced(dataset.texts, spec.samples), model.tokenizer, model.max_length)
    shared = setting.resources
    resources = Resources(shared.concurrent, shared.cpus_per_trial, shared.gpus_per_trial)
    path = setting.work / f"{each.name.replace(' ', '-').replace('/', '-').replace(':', '-')}.parquet"
    points = [Point("monte-carlo", spec.sigma, spec.draws)]
    (drawn,) = measure_draws(path, model, samples, points, resources, spec.seed, setting.progress)
    return Measured(each.name, count_parameters(model), drawn.values)


def random_model(folder: Path, like: ModelReference, spec: ModelSpec, seed: int) -> Path:
    """A Llama with random weights and the tokenizer of another model; made if it is not there."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = like.tokenizer
    config = LlamaConfig(
        vocab_size=like.vocabulary,
        hidden_size=spec.hidden_size,
        intermediate_size=3 * spec.hidden_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.hidden_size // HEAD_SIZE,
        num_key_value_heads=spec.hidden_size // HEAD_SIZE,
        max_position_embeddings=like.max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def count_parameters(model: ModelReference) -> int:
    """Of its architecture, tied weights once; no weights are read."""
    config = AutoConfig.from_pretrained(model.source, revision=model.revision or "main", trust_remote_code=False)
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


# --- The answer ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stable:
    """What the draws of one model say.

    Attributes:
        measured: the model.
        count: the K from which on the relative standard error, median over samples, stays at or below the tolerance;
            nan: none.
        spread: sd / mean of |Delta_k|, median over samples.
    """

    measured: Measured
    count: Estimate
    spread: Estimate


def answer(models: Sequence[Measured], spec: Table12Spec) -> Answer:
    """From the draws of each model."""
    found = [stable(each, spec.tolerance) for each in models]
    factor = by_size(models, spec.tolerance)
    sentences = [_summary(found, spec), _markdown(found), _theory(found, spec), _claim(factor, found)]
    table = pa.Table.from_pylist([_row(each, spec) for each in found])
    panels = [_counts(found, spec), _errors(models, spec)]
    return Answer(table, panels, sentences, inches=(14.0, 6.0))


def relative_errors(values: np.ndarray) -> np.ndarray:
    """Standard error / MRD after 2, 3, ... K draws, (K - 1, N), of (N, K)."""
    pairs = [reduce_draws(values[:, :count], "mean_abs") for count in range(2, values.shape[1] + 1)]
    return np.stack([stderr / mrd for mrd, stderr in pairs])


def stable_count(errors: np.ndarray, rows: np.ndarray, tolerance: float) -> np.ndarray:
    """The K from which on the median over the samples `rows`, (..., n), stays at or below the tolerance; nan: none.

    The first that passes would not do: after two or three draws some samples look exact by chance.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    counts = np.full(len(flat), 2.0)  # the first row is of two draws
    for place, chosen in enumerate(flat):
        above = np.flatnonzero(np.median(errors[:, chosen], axis=1) > tolerance)
        if len(above):
            counts[place] = above[-1] + 3 if above[-1] + 1 < len(errors) else np.nan
    return counts.reshape(rows.shape[:-1])


def stable(measured: Measured, tolerance: float) -> Stable:
    errors, size = np.abs(measured.values), len(measured.values)
    spread = errors.std(axis=1, ddof=1) / errors.mean(axis=1)
    after = relative_errors(measured.values)
    return Stable(
        measured,
        over_sets(lambda rows: stable_count(after, rows[0], tolerance), [size]),
        over_sets(lambda rows: np.median(spread[rows[0]], axis=-1), [size]),
    )


def by_size(models: Sequence[Measured], tolerance: float) -> Estimate:
    """The factor by which K changes with a tenfold size: 10 to the slope of log K against log10 of the parameters.

    The interval is over the samples of each model; the models are those that they are.
    """
    errors = [relative_errors(each.values) for each in models]
    size = np.log10([each.parameters for each in models])
    size -= size.mean()

    def factor(rows: list[np.ndarray]) -> np.ndarray:
        counts = np.stack([stable_count(after, chosen, tolerance) for after, chosen in zip(errors, rows, strict=True)])
        return np.exp(np.tensordot(size, np.log(counts), 1) / (size @ size))

    return over_sets(factor, [len(each.values) for each in models])


def _summary(found: Sequence[Stable], spec: Table12Spec) -> str:
    counts = [each.count.value for each in found]
    known = [count for count in counts if math.isfinite(count)]
    never = f"; {len(counts) - len(known)} are not stable after {spec.draws}" if len(known) < len(counts) else ""
    between = f"{min(known):.0f} to {max(known):.0f}" if known else "no K up to the last"
    return (
        f"**Stable from K = {between}**, {len(found)} models of {millions(found[0])} to {millions(found[-1])} "
        f"parameters{never}: from there on the relative standard error of MRD by Monte Carlo, median of samples, stays "
        f"below {spec.tolerance:.0%}."
    )


def _theory(found: Sequence[Stable], spec: Table12Spec) -> str:
    agree = [each for each in found if each.count.low <= spec.expected <= each.count.high]
    half_normal = [each for each in found if each.spread.low <= HALF_NORMAL_SPREAD <= each.spread.high]
    papers = [count for _, count in PAPER.values()]
    implied = [HALF_NORMAL_SPREAD / math.sqrt(count) for count in papers]
    by_chance = stats.binom.ppf(LEVEL, len(found), 1 - LEVEL)
    follows = ""
    if len(found) - min(len(agree), len(half_normal)) <= by_chance:
        follows = (
            " No more intervals miss it than do by chance: that the model does not matter says something of the "
            "statistic, and nothing of models."
        )
    return (
        f"If draws are linear in the perturbation |Delta| is half-normal under any model, its relative spread is "
        f"{HALF_NORMAL_SPREAD:.4f}, and K = ({HALF_NORMAL_SPREAD:.4f} / tolerance)² = {spec.expected}. That lies "
        f"in the interval of K of {len(agree)} of {len(found)} models, and the spread in that of {len(half_normal)}. "
        f"The paper's K of {min(papers)} to {max(papers)} are what tolerances of {min(implied):.1%} to "
        f"{max(implied):.1%} give; it names none.{follows}"
    )


def _claim(factor: Estimate, found: Sequence[Stable]) -> str:
    return (
        f"The claim that the size of the model hardly matters for K {lies_within(factor, 1 / MINIMAL, MINIMAL)} here: "
        f"a tenfold size changes it by a factor of {with_ci(factor)}, over {len(found)} models (hardly: by less than "
        f"{MINIMAL:g} either way)."
    )


def _markdown(found: Sequence[Stable]) -> str:
    rows = [[each.measured.name, millions(each), _whole(each.count), with_ci(each.spread, 3)] for each in found]
    rows += [[f"the paper, {name}", f"{size / 1e9:.0f}B", str(count), ""] for name, (size, count) in PAPER.items()]
    return markdown_table(["model", "parameters", "stable K", "sd / mean of abs(Delta)"], rows)


def millions(each: Stable) -> str:
    return (
        f"{each.measured.parameters / 1e6:.2g}M"
        if each.measured.parameters < 1e9
        else (f"{each.measured.parameters / 1e9:.2g}B")
    )


def _whole(count: Estimate) -> str:
    return with_ci(count, 0) if math.isfinite(count.value) else "more than were drawn"


def _row(each: Stable, spec: Table12Spec) -> dict[str, Any]:
    measured = each.measured
    samples, draws = measured.values.shape
    row: dict[str, Any] = {"model": measured.name, "parameters": measured.parameters, "samples": samples}
    row |= {"draws": draws, "tolerance": spec.tolerance, "expected_count": spec.expected}
    return row | interval_columns("stable_count", each.count) | interval_columns("spread", each.spread)


# --- Panels -------------------------------------------------------------------------------------------------


def _counts(found: Sequence[Stable], spec: Table12Spec) -> Draw:
    def draw(axes: Axes) -> None:
        names = [f"{each.measured.name}, {millions(each)}" for each in found]
        place = -np.arange(len(names) + len(PAPER), dtype=float)
        mine, paper = place[: len(names)], place[len(names) :]
        axes.hlines(
            mine, [each.count.low for each in found], [each.count.high for each in found], color=BLUE, linewidth=2
        )
        axes.plot([each.count.value for each in found], mine, "o", color=BLUE, markersize=8, label="here, 95 % CI")
        axes.plot([count for _, count in PAPER.values()], paper, "D", color=VERMILLION, label="the paper")
        axes.axvline(spec.expected, color=INK, linestyle="--", label=f"half-normal: {spec.expected}")
        axes.set_yticks(place, [*names, *(f"the paper, {name}" for name in PAPER)])
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"K from which on the relative standard error is below {spec.tolerance:.0%}")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, columnspacing=1)

    return draw


def _errors(models: Sequence[Measured], spec: Table12Spec) -> Draw:
    def draw(axes: Axes) -> None:
        for place, each in enumerate(models):
            errors = np.median(relative_errors(each.values), axis=1)
            counts = np.arange(2, len(errors) + 2)
            label = "models" if place == 0 else None
            axes.plot(counts, errors, color=BLUE, alpha=0.5, linewidth=1.2, label=label)
        counts = np.arange(2, max(each.values.shape[1] for each in models) + 1)
        axes.plot(counts, HALF_NORMAL_SPREAD / np.sqrt(counts), "--", color=INK, label="half-normal draws")
        axes.axhline(spec.tolerance, color=MUTED, linewidth=1, label="tolerance")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("draws K")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("relative standard error, median of samples")
        axes.legend()

    return draw


EXPERIMENT = Experiment(
    name="table12",
    title="stable K by model size",
    question="From how many draws is MRD stable, and does that depend on the size of the model?",
    claim="Stable K is 50 to 80 for Qwen3 models of 4B to 32B; the size of the model hardly matters.",
    run=run,
)
