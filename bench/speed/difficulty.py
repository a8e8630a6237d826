"""`mrd-bench benchmark difficulty`: what each measure of difficulty costs, in forward passes of the same samples.

All measures and a plain forward pass take turns on one replica in this process, so that whatever else the machine does
falls on all. The forward passes are those of batches, and of one sample at a time, which is how a forecast looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.files.origin import origin
from bench.models.find import find_model
from bench.speed.figures import device_name, interval, require_at_least, seconds_in_turns, write_figures
from bench.speed.made import samples_of
from bench.stats.estimates import geometric_mean
from scoring.load import load_model
from scoring.measures import MEASURES, Asked
from scoring.replica import TransformersReplica
from scoring.samples import BATCH_TOKENS, Batch, make_batches

TURNS = 4
THRESHOLD = {"0.5": 0.5}
FORWARD, ONE_BY_ONE = "forward", "forward, one sample at a time"
LOOKAHEADS = (1, 2, 3)


def run_benchmark(model: str, data: str, split: str | None, samples: int, out: str | None) -> None:
    """Measure, print a table with ratios, and write the figures as JSON if asked to.

    Args:
        model: embedded one, folder or Hugging Face id.
        data: a task or a data file.
        split: of a task.
        samples: so many are measured, at most.
        out: JSON file.
    """
    require_at_least(2, samples=samples)
    reference = find_model(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # as a replica has
    replica = TransformersReplica(load_model(reference.source, "float32", device, reference.revision))
    measured = samples_of(data, split, reference)[:samples]
    batches = make_batches(measured, BATCH_TOKENS)
    singles = [batch.rows(row, row + 1) for batch in batches for row in range(len(batch))]
    works: dict[str, Callable[[], object]] = {
        FORWARD: partial(_forwards, replica, batches),
        ONE_BY_ONE: partial(_forwards, replica, singles),
    }
    costs = {FORWARD: 1.0, ONE_BY_ONE: 1.0}
    for name, measure in MEASURES.items():
        # Texts are counted in no time, and these need a retain set or checkpoints.
        if measure.scope == "texts" or measure.needs & {"retain", "checkpoints"}:
            continue
        for lookahead in LOOKAHEADS if name in ("flip-time", "joint-forecast") else (1,):
            asked = replace(Asked(), thresholds=THRESHOLD, lookahead=lookahead)
            title = f"{name}, h = {lookahead}" if name in ("flip-time", "joint-forecast") else name
            works[title] = partial(_measured, replica, name, batches, asked)
            costs[title] = measure.cost(asked)
    for work in works.values():
        work()  # a first time that does not count
    seconds = seconds_in_turns(works, TURNS)
    figures: dict[str, Any] = {"model": model, "samples": len(measured), "turns": TURNS, "device": device_name()}
    figures["weights"] = sum(p.numel() for p in replica.model.parameters())
    figures["measures"] = {
        name: {
            "cost": costs[name],
            "seconds_a_sample": float(np.median(taken)) / len(measured),
            "in_forwards": asdict(geometric_mean(np.array(taken) / np.array(seconds[FORWARD]))),
            "in_single_forwards": asdict(geometric_mean(np.array(taken) / np.array(seconds[ONE_BY_ONE]))),
        }
        for name, taken in seconds.items()
    }
    figures |= origin()
    _print(figures)
    write_figures(figures, out)


def _forwards(replica: TransformersReplica, batches: Sequence[Batch]) -> None:
    for batch in batches:
        replica.logprobs(batch)


def _measured(replica: TransformersReplica, name: str, batches: Sequence[Batch], asked: Asked) -> None:
    measure = MEASURES[name]
    for subject in [batches] if measure.scope == "set" else batches:
        measure.of(replica, subject, asked, {})


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['samples']} samples, {figures['weights'] / 1e6:.1f} M weights, {figures['device']}")
    print(f"{'measure':<32}{'counted':>8}{'ms a sample':>13}  in forwards of batches, and of single samples")
    for name, row in figures["measures"].items():
        batched, single = row["in_forwards"], row["in_single_forwards"]
        print(
            f"{name:<32}{row['cost']:>8.3g}{1000 * row['seconds_a_sample']:>13.3g}  {batched['value']:.2f} "
            f"{interval(batched, '.2f')}, {single['value']:.2f} {interval(single, '.2f')}"
        )
