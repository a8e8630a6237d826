"""`mrd-bench benchmark costs`: what an unlearning run takes beside its updates, as it was and as it is, in turns.

update      one of its batches: in one padded micro-batch, or in several with little padding
refresh     MRD by gradients: in batches of 4,096 tokens however padded, or in those that suit the device
look        by the paper's rule: every prompt of extraction likelihood read by itself, or a text once a batch
look, MA    by the rule that is the default now; once there was none but the paper's
evaluation  of 100 answers of each set, or of as many as is the default now
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from algorithms.corpus import Corpus, answers_evaluation
from algorithms.group import ALONE
from algorithms.micro_batches import share_of_batch
from algorithms.recipe import EVALUATED, Objectives, updates_per_epoch
from algorithms.stopping import measure_memorization
from bench.files.origin import origin
from bench.jobs.unlearn import UnlearnSpec, datasets_of, encoder_of
from bench.models.find import find_model
from bench.speed.figures import device_name, interval, peak_bytes, require_at_least, seconds_in_turns, write_figures
from bench.speed.unlearning.inputs import benchmarked, load, load_corpus
from bench.speed.unlearning.loop import TrainingLoop
from bench.stats.estimates import geometric_mean
from scoring.generation import greedy_continuations
from scoring.logprob import scored_logits
from scoring.memorization import extraction_by, memorization_accuracy
from scoring.mrd import Request, estimate
from scoring.replica import TransformersReplica
from scoring.samples import BATCH_TOKENS, Batch, Sample, collate, default_batch_tokens, make_batches

BEFORE, NOW = "before", "now"
UPDATE, REFRESH, LOOK, LOOK_MA, EVALUATION = "update", "refresh", "look", "look, MA", "evaluation"
# The bound on padding is a share of this: there is none.
BOUNDLESS = 1 << 20
EVALUATED_BEFORE = 100
Works = dict[tuple[str, str], Callable[[], object]]


def run_benchmark(
    model: str, data: str, split: str | None, retain: str | None, samples: int, epochs: int, turns: int, out: str | None
) -> dict[str, Any]:
    """Measure, print, write the figures as JSON if asked to, and return them.

    Args:
        model, data, split, retain: as in UnlearnSpec.
        samples: of the forget set, at most.
        epochs: of the run whose costs are added up.
        turns: how often each part is timed.
        out: JSON file.
    """
    require_at_least(1, samples=samples, epochs=epochs)
    require_at_least(2, turns=turns)
    spec = benchmarked(model, data, split, retain).checked()
    corpus = load_corpus(spec)
    corpus = dataclasses.replace(corpus, forget=corpus.forget[:samples])
    initial = load(spec).eval()
    loops = {when: _loop(spec, turns + 1, tokens) for when, tokens in ((BEFORE, BOUNDLESS), (NOW, None))}
    works: Works = {(UPDATE, when): partial(loop.advance, 1) for when, loop in loops.items()}
    works |= _refreshes(initial, corpus.forget) | _looks(spec, initial, corpus) | _evaluations(spec, initial, corpus)
    for work in works.values():
        work()  # a first time that does not count
    seconds = seconds_in_turns(works, turns)
    figures: dict[str, Any] = {
        "forget_samples": len(corpus.forget),
        "weights": sum(p.numel() for p in initial.parameters()),
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "seconds": {f"{part}, {when}": taken for (part, when), taken in seconds.items()},
        "update_padding": {when: _padding(loop) for when, loop in loops.items()},
        "refresh_peak_bytes": {when: peak_bytes(initial, works[REFRESH, when]) for when in (BEFORE, NOW)},
        "largest_difference_of_el": _difference(works),
        **origin(),
    }
    _print_parts(figures, seconds)
    figures["run"] = _run(seconds, epochs, updates_per_epoch(len(corpus.forget), spec))
    write_figures(figures, out)
    return figures


# --- The parts ----------------------------------------------------------------------------------------------


def _loop(spec: UnlearnSpec, updates: int, batch_tokens: int | None) -> TrainingLoop:
    with tempfile.TemporaryDirectory() as folder:
        return TrainingLoop(dataclasses.replace(spec, batch_tokens=batch_tokens), updates, Path(folder))


def _padding(loop: TrainingLoop) -> float:
    """The share of padding in the micro-batches of a loop's first updates."""
    spec, corpus, objectives = loop.spec, loop.corpus, Objectives.of(loop.spec)
    tokens = spec.batch_tokens or default_batch_tokens(loop.unlearner.trained.device)
    used = padded = 0
    for batch in loop.batches(len(loop.steps)):
        forget = [pair["forget"].index for pair in batch]
        retain = [pair["retain"].index for pair in batch if "retain" in pair]
        for micro_batch in share_of_batch(corpus, objectives, forget, retain, ALONE, tokens):
            used += micro_batch.tokens
            padded += micro_batch.batch.input_ids.numel()
    return 1 - used / padded


def _refreshes(model: PreTrainedModel, samples: Sequence[Sample]) -> Works:
    replica = TransformersReplica(model)

    def refresh(batches: Sequence[Batch]) -> object:
        return estimate(replica, batches, Request("gradient", 1e-5, 0, 0, 1))

    now = make_batches(samples, default_batch_tokens(model.device))
    return {
        (REFRESH, BEFORE): partial(refresh, _padded_batches(samples, BATCH_TOKENS)),
        (REFRESH, NOW): partial(refresh, now),
    }


def _padded_batches(samples: Sequence[Sample], most: int) -> list[Batch]:
    """Samples in order of length, as many in a batch as fit, however padded."""
    batches: list[list[Sample]] = [[]]
    for sample in sorted(samples, key=lambda sample: sample.length):
        if (len(batches[-1]) + 1) * sample.length > most and batches[-1]:
            batches.append([])
        batches[-1].append(sample)
    return [collate(batch) for batch in batches]


def _looks(spec: UnlearnSpec, model: PreTrainedModel, corpus: Corpus) -> Works:
    samples, end = corpus.forget, corpus.eos_token_id

    @torch.no_grad()
    def hits(batch: Batch) -> np.ndarray:
        batch = batch.to(model.device)
        return (scored_logits(model, batch).argmax(-1) == batch.targets).cpu().numpy()

    def write(texts: Sequence[np.ndarray], starts: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        prompts = [texts[row][:at] for row, at in starts]
        return greedy_continuations(model, prompts, [len(texts[row]) - at for row, at in starts], end)

    def before() -> np.ndarray:
        for batch in _padded_batches(samples, BATCH_TOKENS):
            memorization_accuracy(model, batch.to(model.device))
        found: np.ndarray = extraction_by(hits, write, samples, BATCH_TOKENS // 2, spec.el_n, end).likelihood.numpy()
        return found

    def now(el_below: float | None) -> np.ndarray:
        return measure_memorization(model, samples, spec.el_n, end, None, el_below).el

    return {(LOOK, BEFORE): before, (LOOK, NOW): partial(now, None), (LOOK_MA, NOW): partial(now, 0.0)}


def _evaluations(spec: UnlearnSpec, model: PreTrainedModel, corpus: Corpus) -> Works:
    reference = find_model(spec.model)
    _, retain = datasets_of(spec, reference.tokenizer)

    def of(count: int) -> Callable[[], object]:
        texts = retain.text_set if retain else None
        return partial(answers_evaluation(encoder_of(reference), corpus, texts, count).results, model, ALONE)

    return {(EVALUATION, BEFORE): of(EVALUATED_BEFORE), (EVALUATION, NOW): of(EVALUATED)}


def _difference(works: Works) -> float:
    """Between EL as it was measured and as it is; where it is not defined in one, it must not be in the other."""
    before, now = (np.asarray(works[LOOK, when]()) for when in (BEFORE, NOW))
    np.testing.assert_array_equal(np.isnan(before), np.isnan(now))
    return float(np.abs(before - now)[~np.isnan(now)].max(initial=0.0))


# --- Words --------------------------------------------------------------------------------------------------


def _print_parts(figures: dict[str, Any], seconds: dict[tuple[str, str], list[float]]) -> None:
    print(
        f"{figures['forget_samples']} samples to forget, {figures['weights'] / 1e6:.2f} M weights, "
        f"{figures['threads']} threads, {figures['device']}; EL differs by "
        f"{figures['largest_difference_of_el']:.1e} at most"
    )
    print(f"{'':<12}{'before, s':>10}{'now, s':>10}   before / now")
    for part in (UPDATE, REFRESH, LOOK, EVALUATION):
        before, now = (np.array(seconds[part, when]) for when in (BEFORE, NOW))
        ratio = dataclasses.asdict(geometric_mean(before / now))
        figures.setdefault("ratios", {})[part] = ratio
        spread = f" {interval(ratio, '.2f')}" if len(before) > 2 else ""
        print(f"{part:<12}{np.median(before):>10.2f}{np.median(now):>10.2f}   {ratio['value']:.2f}{spread}")
    print(f"{LOOK_MA:<12}{'':>10}{np.median(seconds[LOOK_MA, NOW]):>10.2f}")
    padding, peaks = figures["update_padding"], figures["refresh_peak_bytes"]
    print(f"padding of updates {padding[BEFORE]:.0%} -> {padding[NOW]:.0%}; ", end="")
    print(f"memory of a refresh, weights included: {peaks[BEFORE] / 1e9:.2f} GB -> {peaks[NOW] / 1e9:.2f} GB")


def _run(seconds: dict[tuple[str, str], list[float]], epochs: int, updates: int) -> dict[str, Any]:
    """A run of some epochs, looked at and evaluated at first and after each: what that adds to its updates."""
    took = {name: float(np.median(taken)) for name, taken in seconds.items()}
    rows = {}
    for title, when, look in (("before", BEFORE, LOOK), ("now, paper's rule", NOW, LOOK), ("now", NOW, LOOK_MA)):
        training = took[UPDATE, when] * epochs * updates
        looks, evaluations = ((epochs + 1) * took[part, when] for part in (look, EVALUATION))
        share = (looks + evaluations) / training
        rows[title] = {"training": training, "looks": looks, "evaluations": evaluations, "share": share}
        print(
            f"{epochs} epochs, {title:<18} training {training:.0f} s, looks {looks:.0f} s, evaluations "
            f"{evaluations:.0f} s: these add {share:.0%}"
        )
    return {"epochs": epochs, "updates": epochs * updates, **rows}
