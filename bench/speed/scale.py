"""`mrd-bench benchmark scale`: what everything costs as models grow, as it was and as it is, in one run and in turns.

On Llamas of random weights, one batch of samples, one thread. Times are the processor's, or a GPU's, in forward passes
over the same tokens; memory is in multiples of the weights, with these and what an optimizer keeps. Beside both stands
what `mrd-bench plan` says by the profile of a machine. "Before" are all logits at once, and second derivatives by
forward mode twice.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

import scoring.logprob
from bench.files.origin import origin
from bench.jobs.unlearn import UnlearnSpec
from bench.models.embedded import FAMILIES, train_tokenizer
from bench.speed.figures import (
    device_name,
    interval,
    matmul_flops,
    now,
    peak_bytes,
    processor_now,
    require_at_least,
    seconds_in_turns,
    write_figures,
)
from bench.speed.made import random_data_file, random_llama_folder
from bench.speed.plan import TRAINED, Profile, Shape, find_profile, units_and_logits
from bench.speed.unlearning.inputs import benchmarked, load, load_corpus
from bench.speed.unlearning.loop import TrainingLoop
from bench.stats.estimates import geometric_mean
from scoring.curvature import Signs, second_derivatives_along_signs
from scoring.flip_time import Forecaster, gradient_ascent
from scoring.logprob import scored_logprobs
from scoring.replica import TransformersReplica
from scoring.sample_gradients import log_abs_logprob, per_sample_gradient_norms
from scoring.samples import Batch, collate
from scoring.updates import TrialUpdates, UpdateSettings, clip_gradients, make_optimizer

SIGMA = 1e-5
HEAD_DIM = 64
NEW_TOKENS = 16
MATMUL_SIZE = 2048
LENGTH = 3  # how many times the words of a made text there are
FORWARD, DRAW, FLIP_TIME, ANSWER = "forward", "Monte Carlo draw", "flip time", "answer"
GRADIENT, CURVATURE, RECOMPUTED = "gradient", "curvature", "gradient, recomputed"
BARE = "bare loop, GradDiff"
UPDATES: dict[str, dict[str, Any]] = {
    "update, GradDiff": {"algorithm": "GradDiff"},
    "update, NPO": {"algorithm": "NPO-GradDiff"},
    "update, GradDiff with LoRA": {"algorithm": "GradDiff", "lora_rank": 8},
}
# What is measured as it was, too.
BEFORE = {name: f"{name}, before" for name in (FORWARD, GRADIENT, CURVATURE)}
# The memory, in weights, without which a part is left out: the trainings hold gradients and moments of several models.
NEEDED = dict.fromkeys(UPDATES, 12) | {BARE: 12, FLIP_TIME: 6, BEFORE[CURVATURE]: 14}
Works = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class _Held:
    """What a part needs beside the tensors that it makes.

    Attributes:
        model: whose weights.
        kept: gives what is kept beside them.
    """

    model: nn.Module
    kept: Callable[[], Sequence[torch.Tensor]]

    def peak(self, work: Callable[[], object]) -> int:
        """The bytes of all that while the part runs, at their peak."""
        return peak_bytes(self.model, work, self.kept())


def _moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]


def run_benchmark(
    sizes: Sequence[float], tokens: int, turns: int, profile: str | None, out: str | None
) -> dict[str, Any]:
    """Measure, print a table for each size, write the figures as JSON if asked to, and return them.

    Args:
        sizes: weights of the models, about.
        tokens: of the batch, about; an update has as many of the retain set beside them.
        turns: how often each part is timed.
        profile: of a machine, whose plans stand beside; None: none do.
        out: JSON file, written after each size.
    """
    for size in sizes:
        require_at_least(1e5, sizes=size)
    require_at_least(64, tokens=tokens)
    require_at_least(1, turns=turns)
    machine = find_profile(profile) if profile else None
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"turns": turns, "device": device_name(), "sizes": {}, **origin()}
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="mrd-bench-") as folder:
            figures["sizes"][f"{size:g}"] = _measure(size, tokens, turns, machine, Path(folder))
        write_figures(figures, out)
    return figures


def _measure(size: float, tokens: int, turns: int, machine: Profile | None, folder: Path) -> dict[str, Any]:
    spec = _made(size, tokens, folder)
    corpus, model = load_corpus(spec), load(spec).eval()
    batch = collate(corpus.forget).to(model.device)
    shape = Shape.of_model(model)
    weights = sum(p.nbytes for p in model.parameters())
    free = psutil.virtual_memory().available
    works, held = _parts(model, batch)
    fits = {name: free > NEEDED.get(name, 0) * weights for name in (*works, *UPDATES, BARE)}
    works = {name: work for name, work in works.items() if fits[name]}
    for name, changes in UPDATES.items():
        if fits[name]:
            loop = _loop(dataclasses.replace(spec, **changes), turns + 2, folder)
            trained = loop.unlearner.trained
            works[name] = partial(loop.advance, 1)
            held[name] = _Held(trained.model, partial(_moments, trained.optimizer))
            if changes["algorithm"] == "GradDiff" and "lora_rank" not in changes:
                bare = _BareLoop(model, loop)
                works[BARE], held[BARE] = bare.update, _Held(bare.model, partial(_moments, bare.optimizer))
    print(
        f"\n{shape.params / 1e6:.1f} M weights, {shape.layers} layers of {shape.hidden}, vocabulary "
        f"{shape.vocabulary}, {len(batch)} samples, {int(batch.lengths.sum())} tokens, {int(batch.mask.sum())} scored"
    )
    for name, fit in fits.items():
        if not fit:
            print(f"{name}: left out, the memory that is free is less than {NEEDED[name]} times the weights")
    for work in works.values():
        work()  # a first time that does not count
    clock = now if torch.cuda.is_available() else processor_now
    seconds = seconds_in_turns(works, turns, clock)
    peak = matmul_flops(MATMUL_SIZE, model.device.type, clock=clock)
    flops = shape.forward_flops(int(batch.lengths.sum()), int(batch.mask.sum()), float(batch.lengths.float().mean()))
    planned = _planned(machine, shape, batch) if machine else {}
    nothing = _Held(model, list)
    rows = {
        name: _row(name, seconds, held.get(name, nothing).peak(work) / weights, planned, weights)
        for name, work in works.items()
    }
    _print(rows)
    result: dict[str, Any] = {
        "weights": shape.params,
        "layers": shape.layers,
        "width": shape.hidden,
        "vocabulary": shape.vocabulary,
        "samples": len(batch),
        "tokens": int(batch.lengths.sum()),
        "scored": int(batch.mask.sum()),
        "seconds": seconds,
        "rows": rows,
        "share_of_matmul_peak": {
            name: flops / float(np.median(seconds[name])) / peak for name in (FORWARD, DRAW) if name in seconds
        },
    }
    # The noise of a draw is made once for all batches of a task; here there is one.
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["share_of_matmul_peak"].items())
    print(f"of the speed of a matrix product: {shares}")
    for name, one, other in (
        ("loop against bare loop", BARE, "update, GradDiff"),
        ("curvature, before / now", BEFORE[CURVATURE], CURVATURE),
        ("gradient, before / now", BEFORE[GRADIENT], GRADIENT),
    ):
        if one in seconds and other in seconds:
            ratio = dataclasses.asdict(geometric_mean(np.array(seconds[one]) / np.array(seconds[other])))
            result[name] = ratio
            print(f"{name}: {ratio['value']:.2f} {interval(ratio, '.2f') if turns > 2 else ''}")
    return result


# --- What is measured on --------------------------------------------------------------------------------------


def _made(size: float, tokens: int, folder: Path) -> UnlearnSpec:
    """A run on a made model and made texts, whose update has all forget samples."""
    usual = Shape.of_size(size)
    heads = max(1, round(usual.hidden / HEAD_DIM))
    tokenizer = train_tokenizer(FAMILIES["authors"].tokenizer_text())
    model = random_llama_folder(
        folder / "model", tokenizer, heads * HEAD_DIM, usual.layers, heads, vocabulary=usual.vocabulary
    )
    few = benchmarked(str(model), str(random_data_file(folder, 8, LENGTH)), None, None, evaluate=False)
    length = np.mean([sample.length for sample in load_corpus(dataclasses.replace(few, algorithm="GA")).forget])
    count = max(2, round(tokens / length))
    forget, retain = (random_data_file(folder, count, LENGTH, seed) for seed in (0, 1))
    return benchmarked(
        str(model),
        str(forget),
        None,
        str(retain),
        batch_size=count,
        batch_tokens=8 * tokens,
        evaluate=False,
        learning_rate=1e-7,
    )


def _parts(model: PreTrainedModel, batch: Batch) -> tuple[Works, dict[str, _Held]]:
    replica, drawing = TransformersReplica(model), TransformersReplica(model)
    trial = TrialUpdates(model, UpdateSettings())
    forecaster = Forecaster(model, trial, gradient_ascent)
    prompts = [batch.input_ids[row, : int(batch.positions[row, 0]) + 1].cpu().numpy() for row in range(len(batch))]
    gradient = partial(per_sample_gradient_norms, model, batch, log_abs_logprob)

    def forward() -> None:
        with torch.no_grad():
            scored_logprobs(model, batch)

    def draw() -> None:
        # The weights stay where they are, as within a task; what else is measured takes as long with them.
        drawing.perturb(SIGMA, 0, 1)
        drawing.logprobs(batch)

    def at_once(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with _all_logits_at_once():
                work()

        return run

    works: Works = {
        FORWARD: forward,
        BEFORE[FORWARD]: at_once(forward),
        GRADIENT: gradient,
        BEFORE[GRADIENT]: at_once(gradient),
        RECOMPUTED: partial(gradient, recompute=True),
        DRAW: draw,
        CURVATURE: partial(replica.second_derivatives, batch, 0, 0),
        BEFORE[CURVATURE]: at_once(lambda: second_derivatives_along_signs(model, batch, Signs(0), 0, "forward mode")),
        FLIP_TIME: partial(forecaster.forecast, [batch], [0.5]),
        ANSWER: partial(replica.greedy_continuations, prompts, [NEW_TOKENS] * len(prompts), None),
    }
    return works, {
        DRAW: _Held(model, lambda: drawing.kept),
        CURVATURE: _Held(model, lambda: replica.kept),
        FLIP_TIME: _Held(model, lambda: trial.kept),
    }


@contextmanager
def _all_logits_at_once() -> Iterator[None]:
    usual = scoring.logprob.LOGITS_AT_A_TIME
    scoring.logprob.LOGITS_AT_A_TIME = 1 << 62
    try:
        yield
    finally:
        scoring.logprob.LOGITS_AT_A_TIME = usual


def _loop(spec: UnlearnSpec, updates: int, folder: Path) -> TrainingLoop:
    own = folder / f"{spec.algorithm}-{spec.lora_rank}"
    own.mkdir()
    return TrainingLoop(spec, updates, own)


class _BareLoop:
    """The updates of GradDiff by torch alone: two forward and backward passes, clipping, AdamW."""

    def __init__(self, model: PreTrainedModel, loop: TrainingLoop) -> None:
        self.model = copy.deepcopy(model)
        spec = loop.spec
        self._clip = spec.clip_norm
        self._weights = spec.forget_weight or 1.0, spec.retain_weight or 1.0
        self._batches = iter(loop.batches(spec.max_steps or 1))
        self.optimizer = make_optimizer(self.model.parameters(), "adamw", spec.learning_rate)

    def update(self) -> None:
        pairs = next(self._batches)
        for sign, name, weight in ((-1, "forget", self._weights[0]), (1, "retain", self._weights[1])):
            batch = collate([pair[name] for pair in pairs]).to(self.model.device)
            positions = torch.arange(batch.input_ids.shape[1], device=self.model.device).expand_as(batch.input_ids)
            logits = self.model(input_ids=batch.input_ids, position_ids=positions, use_cache=False).logits
            rows = torch.arange(len(batch), device=self.model.device).unsqueeze(-1)
            losses = nn.functional.cross_entropy(
                logits[rows, batch.positions].flatten(0, 1), batch.targets.flatten(), reduction="none"
            ).view(batch.targets.shape)
            mean = (losses * batch.mask).sum(-1) / batch.mask.sum(-1)
            (sign * weight * mean.mean()).backward()
        clip_gradients(self.model.parameters(), self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


# --- Rows -----------------------------------------------------------------------------------------------------


def _row(
    name: str, seconds: dict[str, list[float]], peak: float, planned: dict[str, tuple[float, float]], weights: int
) -> dict[str, Any]:
    taken = np.array(seconds[name])
    row: dict[str, Any] = {
        "seconds": float(np.median(taken)),
        "forwards": dataclasses.asdict(geometric_mean(taken / np.array(seconds[FORWARD]))),
        "peak_weights": peak,
    }
    if name in planned:
        in_time, in_bytes = planned[name]
        row |= {
            "planned_seconds": in_time,
            "planned_error": in_time / row["seconds"] - 1,
            "planned_peak_weights": in_bytes / weights,
            "planned_peak_error": in_bytes / weights / peak - 1,
        }
    return row


def _planned(machine: Profile, shape: Shape, batch: Batch) -> dict[str, tuple[float, float]]:
    """Seconds and bytes that a plan gives for parts of which it has constants."""
    tokens, scored = int(batch.lengths.sum()), int(batch.mask.sum())
    length = tokens / len(batch)
    weights = 4 * shape.params

    def seconds(kind: str, count: float = 1, tokens: float = tokens, scored: float = scored) -> float:
        work = shape.widths(tokens, scored), shape.forward_flops(tokens, scored, length)
        return machine.seconds(kind, count, shape, *work, "float32")

    def held(kind: str, copies: float | None = None, tokens: float = tokens, scored: float = scored) -> float:
        cost = machine.cost(kind, "float32")
        units, logits = units_and_logits(shape, kind, tokens, scored)
        return weights * (cost.copies if copies is None else copies) + cost.activation * units + cost.logit * logits

    moved = machine.update * shape.params
    update = seconds("training", 2, 2 * tokens, 2 * scored) + moved, held("training", TRAINED / 4)
    prompt, new = tokens - scored, len(batch) * NEW_TOKENS
    steps = machine.seconds(
        "decoding",
        NEW_TOKENS,
        shape,
        shape.widths(new, new),
        shape.forward_flops(new, new, prompt / len(batch) + NEW_TOKENS / 2),
        "float32",
    )
    return {
        FORWARD: (seconds("forward"), held("forward")),
        GRADIENT: (seconds("gradient"), held("gradient")),
        DRAW: (seconds("forward") + machine.noise * shape.params, held("forward") + weights),
        CURVATURE: (seconds("curvature"), held("curvature")),
        ANSWER: (
            seconds("forward", 1, prompt, len(batch)) + steps,
            held("decoding", None, prompt + new, len(batch)),
        ),
        "update, GradDiff": update,
        "update, NPO": update,
    }


def _print(rows: dict[str, dict[str, Any]]) -> None:
    print(f"{'':<28}{'seconds':>9}{'forwards':>10}{'peak/weights':>14}   plan: seconds, error   peak/weights, error")
    for name, row in rows.items():
        plan = ""
        if "planned_seconds" in row:
            plan = (
                f"{row['planned_seconds']:>15.2f}{row['planned_error']:>+7.0%}"
                f"{row['planned_peak_weights']:>17.2f}{row['planned_peak_error']:>+7.0%}"
            )
        print(f"{name:<28}{row['seconds']:>9.2f}{row['forwards']['value']:>10.2f}{row['peak_weights']:>14.2f}{plan}")
