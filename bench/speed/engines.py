"""`mrd-bench benchmark engines`: a replica of vLLM against one of transformers, in one run.

    log-probs   of all samples, by teacher forcing
    draw        one draw of Monte Carlo MRD: the weights are perturbed, and the log-probs formed again
    answers     greedy, to the prompts of the samples

Both replicas are loaded before anything is timed, have one thread (or GPU) each, and take turns. What they give is
compared as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.files.origin import origin
from bench.jobs.resources import Resources
from bench.models.find import find_model
from bench.stats.estimates import geometric_mean
from bench.tasks.datasets import load_dataset
from scoring.cluster import Footprint, connect, default_gpus
from scoring.errors import UserError
from scoring.mrd import Request
from scoring.pool import ReplicaPool
from scoring.readings import Reader
from scoring.samples import BATCH_TOKENS, encode, make_batches
from scoring.work import DrawTask, Engine, ReplicaSpec

SIGMA = 1e-4
ENGINES: tuple[Engine, ...] = ("transformers", "vllm")
TURNS = 5
DRAWS = 4
NEW_TOKENS = 24


def run_benchmark(model: str, data: str, split: str | None, samples: int, out: str | None) -> None:
    """Measure, print ratios, and write the figures as JSON if asked to."""
    if samples < 2:
        raise UserError(f"--samples {samples}: expected at least 2")
    reference = find_model(model)
    dataset = load_dataset(data, split or ("full" if data == "authors" else None), reference.tokenizer)
    encoded, _ = encode(dataset.texts, reference.tokenizer, reference.max_length - NEW_TOKENS)
    chosen = encoded[:samples]
    prompts = [sample.input_ids[: int(np.argmax(sample.scored))] for sample in chosen]
    shards = [make_batches(chosen, BATCH_TOKENS)]
    connect()
    footprint = Footprint(1, default_gpus())
    seconds: dict[str, dict[str, list[float]]] = {}
    found: dict[str, dict[str, Any]] = {}
    pools = {
        engine: ReplicaPool(ReplicaSpec(reference.source, reference.revision, engine=engine), footprint, 1)
        for engine in ENGINES
    }
    try:
        works: dict[str, dict[str, Callable[[], Any]]] = {}
        for engine, pool in pools.items():
            reader = Reader(pool, reference.tokenizer.eos_token_id, BATCH_TOKENS)
            works[engine] = {
                "log-probs": partial(reader.likelihoods, chosen),
                "draw": partial(_draws, pool, shards),
                "answers": partial(reader.continuations, prompts, [NEW_TOKENS] * len(prompts)),
            }
            # Loads the replica, and forms what is unperturbed.
            found[engine] = {name: work() for name, work in works[engine].items()}
        for name in works[ENGINES[0]]:
            seconds[name] = {engine: [] for engine in ENGINES}
            for turn in range(TURNS):
                for engine in ENGINES if turn % 2 else reversed(ENGINES):
                    started = time.perf_counter()
                    works[engine][name]()
                    seconds[name][engine].append((time.perf_counter() - started) / (DRAWS if name == "draw" else 1))
    finally:
        for pool in pools.values():
            pool.close()
    figures: dict[str, Any] = {"model": model, "samples": len(chosen), "turns": TURNS, "seconds": seconds}
    figures["gain"] = {
        name: asdict(geometric_mean(np.array(own["transformers"]) / np.array(own["vllm"])))
        for name, own in seconds.items()
    }
    figures |= _agreement(found) | origin(*Resources(engine="vllm").packages())
    _print(figures)
    if out:
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")


def _draws(pool: ReplicaPool, shards: Any) -> np.ndarray:
    """(N, K) changes."""
    ((_, draws, _),) = list(pool.run([DrawTask(0, Request("monte-carlo", SIGMA, 0, 0, DRAWS))], shards))
    return draws.values


def _agreement(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How far the engines are apart: log-probs at most; draws, relative, in the median; answers that are the same."""
    one, two = (found[engine] for engine in ENGINES)
    logprobs = [np.abs(a.logprobs - b.logprobs).max() for a, b in zip(one["log-probs"], two["log-probs"], strict=True)]
    mrd = [np.abs(each["draw"]).mean(axis=1) for each in (one, two)]
    same = [np.array_equal(a, b) for a, b in zip(one["answers"], two["answers"], strict=True)]
    return {
        "largest_difference_of_logprobs": float(max(logprobs)),
        "median_difference_of_mrd": float(np.median(np.abs(mrd[1] / mrd[0] - 1))),
        "same_answers": float(np.mean(same)),
    }


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['samples']} samples, {figures['turns']} turns; vLLM against transformers")
    for name, own in figures["seconds"].items():
        gain = figures["gain"][name]
        times = {engine: float(np.mean(taken)) for engine, taken in own.items()}
        print(
            f"{name:<10} transformers {times['transformers']:6.2f} s, vLLM {times['vllm']:6.2f} s: vLLM is "
            f"{gain['value']:.2f} x as fast [95 % CI {gain['low']:.2f} to {gain['high']:.2f}]"
        )
    print(
        f"they differ by {figures['largest_difference_of_logprobs']:.1e} in log-probs, "
        f"{figures['median_difference_of_mrd']:.2%} in MRD; {figures['same_answers']:.0%} of the answers are the same"
    )
