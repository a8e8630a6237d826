"""Table 12: from how many draws is MRD stable, by the size of the model?

If draws are linear in the perturbation, |Delta_k| is half-normal under any model: its relative spread is
HALF_NORMAL_SPREAD, and the K at which the relative standard error passes a tolerance is (HALF_NORMAL_SPREAD /
tolerance)^2. So a measured K says whether draws are linear, and nothing about the model.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from scipy import stats
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.jobs.draws import HALF_NORMAL_SPREAD, Point, measure_draws
from bench.models.find import ModelName, ModelReference, find_model
from bench.report.figures import BLUE, INK, MUTED, VERMILLION, Draw
from bench.report.words import interval_columns, markdown_table, with_ci
from bench.stats.estimates import LEVEL, Estimate, exponential, over_sets
from bench.stats.verdicts import Claim, Verdict, bootstrapped, decide
from bench.tasks.datasets import DataName, load_dataset
from scoring.errors import UserError
from scoring.load import read_config
from scoring.mrd import reduce_draws
from scoring.samples import encode, evenly_spaced
from scoring.settings import Doc, Ge, Gt, Lt, build, check, current_naming, named, naming

PAPER = {"Qwen3 4B": (4e9, 60), "Qwen3 8B": (8e9, 80), "Qwen3 14B": (14e9, 50), "Qwen3 32B": (32e9, 80)}
HEAD_SIZE = 32  # of the attention of random models
MARGIN = "log factor of K by tenfold size"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model and the samples that are scored under it."""

    model: Annotated[
        ModelName, Doc("an embedded model, a folder, or a Hugging Face id; a random model takes its tokenizer")
    ]
    task: Annotated[DataName, Doc("whose samples are scored")]
    split: Annotated[str | None, Doc("of the task (default: the task's own)")] = None
    hidden_size: Annotated[
        int, Ge(0), Doc(f"of a random Llama instead of the model, a multiple of {HEAD_SIZE}; 0: the model itself")
    ] = 0
    layers: Annotated[int, Ge(0), Doc("of the random Llama")] = 0

    def checked(self) -> Self:
        """The same.

        Raises:
            UserError: a value that is not allowed, or a random model without one of its sizes.
        """
        check(self)
        if (self.hidden_size > 0) != (self.layers > 0) or self.hidden_size % HEAD_SIZE:
            raise UserError(
                f"{named('hidden_size')} is {self.hidden_size} with {named('layers')} {self.layers}: expected both, "
                f"the former a multiple of {HEAD_SIZE}, or none"
            )
        return self

    @property
    def name(self) -> str:
        return f"random {self.layers} x {self.hidden_size}" if self.hidden_size else self.model


@dataclass(frozen=True, kw_only=True)
class Table12Spec:
    """What is measured."""

    models: Annotated[list[dict[str, Any]], Doc("settings of a model each, see the next table; from small to large")]
    samples: Annotated[int, Ge(1), Doc("of each model, evenly spaced over the split")]
    draws: Annotated[int, Ge(1), Doc("of Monte Carlo; more than are needed")]
    tolerance: Annotated[float, Gt(0), Lt(1), Doc("of the relative standard error, median over samples")] = 0.1
    sigma: Annotated[float, Gt(0), Doc("of the perturbation")] = 1e-5
    seed: Annotated[int, Ge(0), Doc("addresses the noise, and the weights of random models")] = 0

    def checked(self) -> Self:
        """The same.

        Raises:
            UserError: a value that is not allowed, in one of the models as well.
        """
        check(self)
        names = [model.name for model in self.model_specs()]
        if len(set(names)) < 2 or len(set(names)) != len(names):
            raise UserError(f"{named('models')} has {', '.join(names) or 'none'}: expected two or more different ones")
        if self.draws < 2 * self.expected_count:
            raise UserError(
                f"{named('draws')} is {self.draws}: expected {2 * self.expected_count} or more for "
                f"{named('tolerance')} {self.tolerance:g}"
            )
        return self

    def model_specs(self) -> list[ModelSpec]:
        specs = []
        for number, values in enumerate(self.models):
            with naming(current_naming().under("models", number)):
                specs.append(build(ModelSpec, values).checked())
        return specs

    @property
    def expected_count(self) -> int:
        """K of half-normal draws."""
        return math.ceil((HALF_NORMAL_SPREAD / self.tolerance) ** 2)


@dataclass(frozen=True)
class ModelDraws:
    """The draws of one model.

    Attributes:
        name: of the model.
        parameters: how many it has.
        values: (N, K) by Monte Carlo.
    """

    name: str
    parameters: int
    values: np.ndarray


def run(setup: Setup) -> Answer:
    spec = setup.spec(Table12Spec, "stability")
    margins = setup.margins(MARGIN)
    return answer([_measure(model, spec, setup) for model in spec.model_specs()], spec, margins)


def _measure(model_spec: ModelSpec, spec: Table12Spec, setup: Setup) -> ModelDraws:
    name, model = model_spec.name, find_model(model_spec.model)
    if model_spec.hidden_size:
        folder = setup.work / "models" / f"{name.replace(' ', '-')}-seed{spec.seed}"
        model = find_model(str(random_model(folder, model, model_spec, spec.seed)))
    dataset = load_dataset(model_spec.task, model_spec.split, model.tokenizer)
    samples, _ = encode(evenly_spaced(dataset.texts, spec.samples), model.tokenizer, model.max_length)
    path = setup.work / f"{name.replace(' ', '-').replace('/', '-').replace(':', '-')}.parquet"
    points = [Point("monte-carlo", spec.sigma, spec.draws)]
    (draws,) = measure_draws(path, model, samples, points, setup.resources.replicas(), spec.seed, setup.progress)
    return ModelDraws(name, count_parameters(model), draws.values)


def random_model(folder: Path, like: ModelReference, spec: ModelSpec, seed: int) -> Path:
    """The folder of a Llama with random weights and the tokenizer of another model; made if it is not there."""
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
    """The parameters of a model's architecture, tied ones once; no weights are read."""
    config = read_config(model.source, model.revision)
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


# --- The answer ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stability:
    """How many draws one model needs.

    Attributes:
        name, parameters, samples, draws: of the model, and of what was measured under it.
        count: the K from which on the relative standard error, median over samples, stays at or below the tolerance;
            nan: none.
        spread: sd / mean of |Delta_k|, median over samples.
    """

    name: str
    parameters: int
    samples: int
    draws: int
    count: Estimate
    spread: Estimate


def answer(models: Sequence[ModelDraws], spec: Table12Spec, margins: Mapping[str, float]) -> Answer:
    """From the draws of each model.

    Args:
        margins: the smallest factor that matters, as a logarithm by the name MARGIN.
    """
    stabilities = [stability_of(model, spec.tolerance) for model in models]
    verdicts = decide([size_claim(models, spec.tolerance, margins[MARGIN])])
    sentences = [
        _headline(stabilities, spec),
        _table(stabilities),
        _theory(stabilities, spec),
        _claim(verdicts[0], stabilities),
    ]
    table = pa.Table.from_pylist([_row(stability, spec) for stability in stabilities])
    panels = [_count_dots(stabilities, spec), _error_lines(models, spec)]
    return Answer(table, panels, sentences, verdicts, inches=(14.0, 6.0))


def relative_errors(values: np.ndarray) -> np.ndarray:
    """Standard error / MRD after 2, 3, ... K draws, (K - 1, N), of (N, K)."""
    pairs = [reduce_draws(values[:, :count], "mean_abs") for count in range(2, values.shape[1] + 1)]
    return np.stack([stderr / mrd for mrd, stderr in pairs])


def stable_count(errors: np.ndarray, rows: np.ndarray, tolerance: float) -> np.ndarray:
    """The K from which on the median error stays at or below the tolerance, (...,); nan: none.

    Not the first K that passes: after two or three draws some samples look exact by chance.

    Args:
        errors: see `relative_errors`.
        rows: (..., n) the samples of each median.
    """
    sets = rows.reshape(-1, rows.shape[-1])
    counts = np.full(len(sets), 2.0)  # the first row of errors is after two draws
    for place, samples in enumerate(sets):
        above = np.flatnonzero(np.median(errors[:, samples], axis=1) > tolerance)
        if len(above):
            counts[place] = above[-1] + 3 if above[-1] + 1 < len(errors) else np.nan
    return counts.reshape(rows.shape[:-1])


def stability_of(model: ModelDraws, tolerance: float) -> Stability:
    samples, draws = model.values.shape
    sizes = np.abs(model.values)
    spread = sizes.std(axis=1, ddof=1) / sizes.mean(axis=1)
    errors = relative_errors(model.values)
    return Stability(
        model.name,
        model.parameters,
        samples,
        draws,
        over_sets(lambda sets: stable_count(errors, sets[0], tolerance), [samples]),
        over_sets(lambda sets: np.median(spread[sets[0]], axis=-1), [samples]),
    )


def size_claim(models: Sequence[ModelDraws], tolerance: float, margin: float) -> Claim:
    """That K hardly changes with the size: the slope of log K against log10 of the parameters is near 0.

    The interval is over the samples of each model, for just these models.
    """
    errors_of = [relative_errors(model.values) for model in models]
    parameters = [model.parameters for model in models]

    def log_factor(sets: list[np.ndarray]) -> np.ndarray:
        counts = [stable_count(errors, rows, tolerance) for errors, rows in zip(errors_of, sets, strict=True)]
        return slope_by_size(parameters, np.stack(counts))

    paper_sizes, paper_counts = zip(*PAPER.values(), strict=True)
    samples = [len(model.values) for model in models]
    return Claim(
        "the size of the model hardly matters for K",
        f"factor of K by tenfold size, {len(models)} models",
        0,
        margin,
        bootstrapped(over_sets, log_factor, samples),
        min(samples),
        "samples of each model",
        "log ratio",
        float(slope_by_size(paper_sizes, np.array(paper_counts, dtype=float))),
    )


def slope_by_size(parameters: Sequence[float], counts: np.ndarray) -> np.ndarray:
    """The slope of log K, (M, ...), against log10 of the numbers of parameters, (M,)."""
    size = np.log10(parameters)
    size -= size.mean()
    return np.tensordot(size, np.log(counts), 1) / (size @ size)


def _headline(stabilities: Sequence[Stability], spec: Table12Spec) -> str:
    counts = [stability.count.value for stability in stabilities]
    known = [count for count in counts if math.isfinite(count)]
    never = f"; {len(counts) - len(known)} are not stable after {spec.draws}" if len(known) < len(counts) else ""
    between = f"{min(known):.0f} to {max(known):.0f}" if known else "no K up to the last"
    smallest, largest = stabilities[0].parameters, stabilities[-1].parameters
    return (
        f"**Stable from K = {between}**, {len(stabilities)} models of {in_millions(smallest)} to "
        f"{in_millions(largest)} parameters{never}: from there on the relative standard error of MRD by Monte Carlo, "
        f"median of samples, stays below {spec.tolerance:.0%}."
    )


def _theory(stabilities: Sequence[Stability], spec: Table12Spec) -> str:
    expected = spec.expected_count
    agree = [stability for stability in stabilities if stability.count.low <= expected <= stability.count.high]
    half_normal = [
        stability for stability in stabilities if stability.spread.low <= HALF_NORMAL_SPREAD <= stability.spread.high
    ]
    papers = [count for _, count in PAPER.values()]
    implied = [HALF_NORMAL_SPREAD / math.sqrt(count) for count in papers]
    by_chance = stats.binom.ppf(LEVEL, len(stabilities), 1 - LEVEL)
    follows = ""
    if len(stabilities) - min(len(agree), len(half_normal)) <= by_chance:
        follows = (
            " No more intervals miss it than do by chance: that the model does not matter says something of the "
            "statistic, and nothing of models."
        )
    return (
        f"If draws are linear in the perturbation |Delta| is half-normal under any model, its relative spread is "
        f"{HALF_NORMAL_SPREAD:.4f}, and K = ({HALF_NORMAL_SPREAD:.4f} / tolerance)² = {expected}. That lies in the "
        f"interval of K of {len(agree)} of {len(stabilities)} models, and the spread in that of {len(half_normal)}. "
        f"The paper's K of {min(papers)} to {max(papers)} are what tolerances of {min(implied):.1%} to "
        f"{max(implied):.1%} give; it names none.{follows}"
    )


def _claim(verdict: Verdict, stabilities: Sequence[Stability]) -> str:
    factor = exponential(verdict.estimate)
    return (
        f"The claim that {verdict.claim.text} {verdict.word} here: a tenfold size changes it by a factor of "
        f"{with_ci(factor)}, over {len(stabilities)} models (hardly: by less than {math.exp(verdict.claim.margin):.3g} "
        "either way)."
    )


def _table(stabilities: Sequence[Stability]) -> str:
    rows = [
        [
            stability.name,
            in_millions(stability.parameters),
            _whole_with_ci(stability.count),
            with_ci(stability.spread, 3),
        ]
        for stability in stabilities
    ]
    rows += [[f"the paper, {name}", f"{size / 1e9:.0f}B", str(count), ""] for name, (size, count) in PAPER.items()]
    return markdown_table(["model", "parameters", "stable K", "sd / mean of abs(Delta)"], rows)


def in_millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2g}M" if parameters < 1e9 else f"{parameters / 1e9:.2g}B"


def _whole_with_ci(count: Estimate) -> str:
    return with_ci(count, 0) if math.isfinite(count.value) else "more than were drawn"


def _row(stability: Stability, spec: Table12Spec) -> dict[str, Any]:
    return {
        "model": stability.name,
        "parameters": stability.parameters,
        "samples": stability.samples,
        "draws": stability.draws,
        "tolerance": spec.tolerance,
        "expected_count": spec.expected_count,
        **interval_columns("stable_count", stability.count),
        **interval_columns("spread", stability.spread),
    }


# --- Panels -------------------------------------------------------------------------------------------------


def _count_dots(stabilities: Sequence[Stability], spec: Table12Spec) -> Draw:
    def draw(axes: Axes) -> None:
        names = [f"{stability.name}, {in_millions(stability.parameters)}" for stability in stabilities]
        counts = [stability.count for stability in stabilities]
        heights = -np.arange(len(names) + len(PAPER), dtype=float)
        here, paper = heights[: len(names)], heights[len(names) :]
        axes.hlines(here, [count.low for count in counts], [count.high for count in counts], color=BLUE, linewidth=2)
        axes.plot([count.value for count in counts], here, "o", color=BLUE, markersize=8, label="here, 95 % CI")
        axes.plot([count for _, count in PAPER.values()], paper, "D", color=VERMILLION, label="the paper")
        expected = spec.expected_count
        axes.axvline(expected, color=INK, linestyle="--", label=f"half-normal: {expected}")
        axes.set_yticks(heights, [*names, *(f"the paper, {name}" for name in PAPER)])
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"K from which on the relative standard error is below {spec.tolerance:.0%}")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, columnspacing=1)

    return draw


def _error_lines(models: Sequence[ModelDraws], spec: Table12Spec) -> Draw:
    def draw(axes: Axes) -> None:
        for place, model in enumerate(models):
            errors = np.median(relative_errors(model.values), axis=1)
            counts = np.arange(2, len(errors) + 2)
            label = "models" if place == 0 else None
            axes.plot(counts, errors, color=BLUE, alpha=0.5, linewidth=1.2, label=label)
        counts = np.arange(2, max(model.values.shape[1] for model in models) + 1)
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
