"""`mrd-bench benchmark peers`: what others run against what runs here, in one run, in turns, by processor time.

MRD   the public implementation's way: batch by batch K times noise is added to the weights in place, and taken away
      again; against `monte-carlo` with the same K, whose noise all batches share and which copies the weights back,
      and `gradient`, the closed form of the same statistic
NPO   a plain Trainer with a frozen copy of the model that runs in every step, as open-unlearning has it, against our
      loop, which notes what the initial model says once; same batches, same AdamW, the retain NLL in both

Both are on a Llama of random weights and texts of random words, in this process, on one thread. What a loop computes
is processor time, so another process at work moves the ratios little.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from bench.files.origin import origin
from bench.jobs.unlearn import UnlearnSpec
from bench.models.embedded import FAMILIES, train_tokenizer
from bench.speed.figures import (
    device_name,
    interval,
    peak_bytes,
    processor_now,
    require_at_least,
    seconds_in_turns,
    seconds_of,
    write_figures,
)
from bench.speed.made import random_data_file, random_llama_folder
from bench.speed.scoring import in_order
from bench.speed.unlearning.inputs import Sizes, benchmarked, load, load_corpus
from bench.speed.unlearning.loop import TrainingLoop
from bench.speed.unlearning.trainer import IGNORED, Alternating, loss_difference, padded, trainer_beside
from bench.stats.estimates import geometric_mean
from scoring.errors import UserError
from scoring.load import copied
from scoring.mrd import EstimatorName, Request, estimate
from scoring.replica import TransformersReplica
from scoring.sample_gradients import autograd_norms, log_abs_logprob
from scoring.samples import Batch, Sample, collate
from scoring.updates import distance

SIGMA = 1e-5
HEAD_DIM = 64
# Layers and heads grow together, so that a model of n layers has 12 (64 n)^2 n weights in them.
WEIGHTS_OF_ONE_LAYER = 12 * HEAD_DIM**2
# How many times the words of a made text there are, so that it is about as long as one of TOFU.
LENGTH = 3
WARM_UP, SEGMENT, REMEMBERED = 2, 2, 3
KEPT, DRAWN_AGAIN = "public way, noise kept", "public way, noise drawn again"
MONTE_CARLO, GRADIENT = "monte-carlo", "gradient"
PUBLIC = {KEPT: True, DRAWN_AGAIN: False}
OURS: dict[str, EstimatorName] = {MONTE_CARLO: "monte-carlo", GRADIENT: "gradient"}
Inputs = dict[str, torch.Tensor]


def run_benchmark(params: float, samples: int, batch: int, draws: int, turns: int, out: str | None) -> dict[str, Any]:
    """Measure, print tables with ratios, write the figures as JSON if asked to, and return them.

    Args:
        params: weights of the model, about.
        samples: that are scored, and forgotten.
        batch: samples in a batch, of every way.
        draws: K.
        turns: how often each way is timed.
        out: JSON file.
    """
    require_at_least(1e5, params=params)
    require_at_least(1, batch=batch, draws=draws)
    require_at_least(2, samples=samples, turns=turns)
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("comparing with transformers' Trainer needs accelerate: pip install 'mrd-bench[trainer]'")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mrd-bench-") as name:
        folder = Path(name)
        layers = max(1, round((params / WEIGHTS_OF_ONE_LAYER) ** (1 / 3)))
        tokenizer = train_tokenizer(FAMILIES["authors"].tokenizer_text())
        model = random_llama_folder(folder / "model", tokenizer, HEAD_DIM * layers, layers, layers)
        forget, retain = (random_data_file(folder, samples, LENGTH, seed) for seed in (0, 1))
        spec = benchmarked(str(model), str(forget), None, str(retain), batch_size=batch, evaluate=False)
        spec = dataclasses.replace(spec, algorithm="NPO-GradDiff")
        scored, loaded = load_corpus(spec).forget, load(spec).eval()
        figures: dict[str, Any] = {
            "weights": sum(p.numel() for p in loaded.parameters()),
            "samples": len(scored),
            "tokens": sum(sample.length for sample in scored),
            "batch_size": batch,
            "draws": draws,
            "turns": turns,
            "device": device_name(),
        }
        print(
            f"{len(scored)} samples, {figures['tokens']} tokens, batches of {batch}, "
            f"{figures['weights'] / 1e6:.2f} M weights, one thread, {figures['device']}"
        )
        figures["mrd"] = _compare_scoring(loaded, scored, batch, draws, turns)
        figures["npo"] = _compare_training(spec, turns, folder)
    figures |= origin()
    write_figures(figures, out)
    return figures


# --- MRD ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def public_scores(
    model: PreTrainedModel, batches: Sequence[Inputs], sigma: float, draws: int, kept: bool, first_seed: int = 0
) -> np.ndarray:
    """Algorithm 1 over batches, the noise added to the weights and taken away in place; (N,) mean_abs.

    Args:
        model: in eval mode; its weights drift by rounding.
        batches: input_ids, attention_mask and labels, (B, T) each.
        sigma: standard deviation of the noise.
        draws: K, of every batch.
        kept: the noise is kept until it is taken away; else it is drawn once more from its seed.
        first_seed: of the first draw; the others have the next ones.
    """
    parameters = list(model.parameters())
    scores = []
    for number, batch in enumerate(batches):
        before, scored = _label_logprobs(model, batch)
        total = before.new_zeros(len(before))
        for draw in range(draws):
            seed = first_seed + number * draws + draw
            torch.manual_seed(seed)
            noise = []
            for p in parameters:
                added = torch.randn_like(p).mul_(sigma)
                p.add_(added)
                if kept:
                    noise.append(added)
            after, _ = _label_logprobs(model, batch)
            total += torch.where(scored, (before - after) / before, 0.0).sum(-1).abs()
            torch.manual_seed(seed)
            for place, p in enumerate(parameters):
                p.sub_(noise[place] if kept else torch.randn_like(p).mul_(sigma))
        scores.append((total / draws).cpu().double().numpy())
    return np.concatenate(scores)


def _label_logprobs(model: PreTrainedModel, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of all labels by log_softmax, and which tokens have one, (B, T - 1) each."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    labels = inputs["labels"][:, 1:]
    scored = labels != IGNORED
    logprobs = torch.log_softmax(logits[:, :-1].float(), -1)
    return logprobs.gather(-1, labels.where(scored, 0).unsqueeze(-1)).squeeze(-1), scored


def _compare_scoring(
    model: PreTrainedModel, samples: Sequence[Sample], size: int, draws: int, turns: int
) -> dict[str, Any]:
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    batches, inputs = [collate(part) for part in parts], [padded(part, 0) for part in parts]
    batches = [batch.to(model.device) for batch in batches]
    inputs = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in inputs]
    exact = _exact_scores(model, batches)
    own = {name: copy.deepcopy(model) for name in PUBLIC}
    replica = TransformersReplica(model)
    # Of every time that a way is run, each with other noise.
    scores: dict[str, list[np.ndarray]] = {name: [] for name in (*PUBLIC, *OURS)}

    def ours(name: str, on: TransformersReplica) -> None:
        estimator, seed = OURS[name], len(scores[name])
        found = estimate(on, batches, Request(estimator, SIGMA, seed, 0, 1 if estimator == "gradient" else draws))
        scores[name].append(in_order(found, "mean_abs"))

    def theirs(name: str) -> None:
        first_seed = len(scores[name]) * draws * len(batches)
        scores[name].append(public_scores(own[name], inputs, SIGMA, draws, PUBLIC[name], first_seed))

    works: dict[str, Callable[[], None]] = {name: partial(theirs, name) for name in PUBLIC}
    works |= {name: partial(ours, name, replica) for name in OURS}
    # A first time that is not timed: it checks, and drifts by as much as one run does.
    for work in works.values():
        work()
    drifts = {name: _drift(own[name], model) for name in PUBLIC} | dict.fromkeys(OURS, 0.0)
    seconds = seconds_in_turns(works, turns, processor_now)
    peaks = {name: peak_bytes(own[name], works[name]) for name in PUBLIC}
    # A new replica, so that the copy of the weights is made, and counted.
    peaks |= {name: peak_bytes(model, partial(_with_new_replica, model, partial(ours, name))) for name in OURS}
    weights = sum(p.nbytes for p in model.parameters())
    rows: dict[str, Any] = {}
    print(
        f"\nMRD, K = {draws:<22}  CPU s  public / this             peak/weights     error, rms  weights' drift / sigma"
    )
    for name in works:
        ratio = dataclasses.asdict(geometric_mean(np.array(seconds[KEPT]) / np.array(seconds[name])))
        rows[name] = row = {
            "cpu_seconds": seconds[name],
            "ratio": ratio,
            "peak_weights": peaks[name] / weights,
            "error": float(np.sqrt(np.mean((np.stack(scores[name]) / exact - 1) ** 2))),
            "drift": drifts[name],
        }
        faster = f"{ratio['value']:.2f} {interval(ratio, '.2f')}" if name != KEPT else "1"
        print(
            f"{name:<31}{np.median(seconds[name]):>8.2f}  {faster:<26}{row['peak_weights']:>12.2f}"
            f"{row['error']:>15.1e}{row['drift']:>24.1e}"
        )
    return rows


def _with_new_replica(model: PreTrainedModel, work: Callable[[TransformersReplica], None]) -> None:
    work(TransformersReplica(model))


def _exact_scores(model: PreTrainedModel, batches: Sequence[Batch]) -> np.ndarray:
    """What all ways approach with K, in fp64 by plain autograd."""
    double = copied(model, torch.float64)
    norms = torch.cat([autograd_norms(double, batch, log_abs_logprob)[0] for batch in batches])
    return SIGMA * math.sqrt(2 / math.pi) * norms.cpu().numpy()


def _drift(moved: nn.Module, base: nn.Module) -> float:
    """How far weights are from where they were, root mean square in units of sigma."""
    pairs = zip(moved.parameters(), base.parameters(), strict=True)
    _, norm = distance((p.detach(), before.detach()) for p, before in pairs)
    return norm / math.sqrt(sum(p.numel() for p in base.parameters())) / SIGMA


# --- NPO ------------------------------------------------------------------------------------------------------


def _compare_training(spec: UnlearnSpec, turns: int, folder: Path) -> dict[str, Any]:
    sizes = Sizes(warm_up=WARM_UP, pairs=turns, segment=SEGMENT)
    updates = sizes.warm_up + sizes.pairs * sizes.segment
    loop = TrainingLoop(spec, updates, folder)
    initial = load(spec)
    samples = loop.corpus.forget
    noting = [collate(samples[start : start + 8]) for start in range(0, len(samples), 8)]
    replica = TransformersReplica(initial)
    once = seconds_of(lambda: [replica.logprobs(batch) for batch in noting], processor_now)
    alternating = Alternating(loop, sizes, processor_now)
    trainer = trainer_beside(loop, updates, folder, [alternating])
    trainer.train()
    losses = loss_difference(loop, trainer, updates)
    apart, moved = (
        distance((p.detach(), q.detach().to(p.device)) for p, q in zip(ours, theirs, strict=True))[1]
        for ours, theirs in (
            (loop.unlearner.trained.model.parameters(), trainer.model.parameters()),  # type: ignore[union-attr]
            (loop.unlearner.trained.model.parameters(), initial.parameters()),
        )
    )
    ours, theirs = np.array(alternating.ours) / sizes.segment, np.array(alternating.theirs) / sizes.segment
    peaks = _training_peaks(spec, folder)
    weights = sum(p.nbytes for p in initial.parameters())
    figures: dict[str, Any] = {
        "updates": updates,
        "cpu_seconds_an_update": {"ours": ours.tolist(), "trainer": theirs.tolist()},
        "ratio": dataclasses.asdict(geometric_mean(theirs / ours)),
        "noting_updates": once / float(np.median(ours)),
        "peak_weights": {name: peak / weights for name, peak in peaks.items()},
        "peak_ratio": peaks["trainer"] / peaks["ours"],
        "loss_difference": losses,
        "weights_difference": apart / moved,
    }
    print(f"\nNPO + retain NLL, {updates} updates   CPU s an update  peak/weights")
    for name, taken in (("Trainer and a frozen copy", theirs), ("our loop", ours)):
        peak = figures["peak_weights"]["ours" if name == "our loop" else "trainer"]
        print(f"{name:<31}{np.median(taken):>18.2f}{peak:>14.2f}")
    ratio = figures["ratio"]
    print(
        f"Trainer / ours: CPU seconds {ratio['value']:.2f} {interval(ratio, '.2f')}, peak memory "
        f"{figures['peak_ratio']:.2f}; noting what the initial model says takes as long as "
        f"{figures['noting_updates']:.1f} updates, once"
    )
    print(
        f"same training: losses differ by {losses:.0e} at most, weights by {figures['weights_difference']:.0e} of the "
        "way that they went"
    )
    return figures


def _training_peaks(spec: UnlearnSpec, folder: Path) -> dict[str, int]:
    """The bytes of weights, gradients, moments and all that some updates make, of each way by itself."""
    loop = TrainingLoop(spec, REMEMBERED, folder)
    trainer = trainer_beside(loop, REMEMBERED, folder)
    models = nn.ModuleList([trainer.model, trainer.frozen])  # type: ignore[list-item]
    return {
        "trainer": peak_bytes(models, trainer.train),
        "ours": peak_bytes(loop.unlearner.trained.model, partial(loop.advance, REMEMBERED)),
    }
