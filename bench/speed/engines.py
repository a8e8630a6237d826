"""`mrd-bench benchmark engines`: a replica of vLLM against one of transformers, in one run.

    log-probs   of all samples, by teacher forcing
    draw        one draw of Monte Carlo MRD: the weights are perturbed, and the log-probs computed again
    answers     greedy, to the prompts of the samples

Both replicas are loaded before anything is timed, have one thread (or GPU) each and the batches that a command would
give them, and take turns. Their results are compared as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from bench.files.origin import origin
from bench.jobs.resources import Resources
from bench.models.find import find_model
from bench.speed.figures import interval, require_at_least, seconds_in_turns, write_figures
from bench.speed.made import monte_carlo_tasks, samples_of
from bench.stats.estimates import geometric_mean
from scoring.answers import question_ids
from scoring.cluster import Footprint, connect, default_gpus
from scoring.engine import Engine
from scoring.pool import ReplicaPool
from scoring.readings import Reader
from scoring.samples import BATCH_TOKENS, make_batches
from scoring.work import ReplicaSpec

SIGMA = 1e-4
ENGINES: tuple[Engine, ...] = ("transformers", "vllm")
TURNS = 5
DRAWS = 4
NEW_TOKENS = 24


def run_benchmark(model: str, data: str, split: str | None, samples: int, out: str | None) -> None:
    """Measure, print ratios, and write the figures as JSON if asked to.

    Args:
        model: embedded one, folder or Hugging Face id.
        data: a task or a data file.
        split: of a task.
        samples: so many are measured, at most.
        out: JSON file.
    """
    require_at_least(2, samples=samples)
    reference = find_model(model)
    measured = samples_of(data, split, reference, reference.max_length - NEW_TOKENS)[:samples]
    prompts = question_ids(measured)
    connect()
    footprint = Footprint(1, default_gpus())
    seconds: dict[str, dict[Engine, list[float]]] = {}
    results: dict[Engine, dict[str, Any]] = {}
    pools = {
        engine: ReplicaPool(ReplicaSpec(reference.source, reference.revision, engine=engine), footprint, 1)
        for engine in ENGINES
    }
    try:
        works: dict[Engine, dict[str, Callable[[], Any]]] = {}
        for engine, pool in pools.items():
            batch_tokens = Resources(1, engine=engine).batch_tokens()
            reader = Reader(pool, reference.tokenizer.eos_token_id, batch_tokens, writing_tokens=4 * BATCH_TOKENS)
            works[engine] = {
                "log-probs": partial(reader.likelihoods, measured),
                "draw": partial(_draws, pool, [make_batches(measured, batch_tokens)]),
                "answers": partial(reader.continuations, prompts, [NEW_TOKENS] * len(prompts)),
            }
            # Loads the replica, and computes the unperturbed log-probs.
            results[engine] = {name: work() for name, work in works[engine].items()}
        for name in works[ENGINES[0]]:
            turns = seconds_in_turns({engine: works[engine][name] for engine in ENGINES}, TURNS)
            count = DRAWS if name == "draw" else 1
            seconds[name] = {engine: [taken / count for taken in of_engine] for engine, of_engine in turns.items()}
    finally:
        for pool in pools.values():
            pool.close()
    figures: dict[str, Any] = {"model": model, "samples": len(measured), "turns": TURNS, "seconds": seconds}
    figures["gain"] = {
        name: asdict(geometric_mean(np.array(turns["transformers"]) / np.array(turns["vllm"])))
        for name, turns in seconds.items()
    }
    figures |= _agreement(results) | origin(*Resources(engine="vllm").packages())
    _print(figures)
    write_figures(figures, out)


def _draws(pool: ReplicaPool, shards: Any) -> np.ndarray:
    """The relative changes of N samples in K draws, (N, K), in the order of the samples."""
    ((_, draws, _),) = list(pool.run(monte_carlo_tasks(DRAWS, DRAWS, SIGMA), shards))
    return draws.values[np.argsort(draws.indices)]


def _agreement(results: dict[Engine, dict[str, Any]]) -> dict[str, float]:
    """How far the engines are apart: log-probs at most; draws, relative, in the median; answers that are the same."""
    one, two = (results[engine] for engine in ENGINES)
    logprobs = [np.abs(a.logprobs - b.logprobs).max() for a, b in zip(one["log-probs"], two["log-probs"], strict=True)]
    mrd = [np.abs(result["draw"]).mean(axis=1) for result in (one, two)]
    same = [np.array_equal(a, b) for a, b in zip(one["answers"], two["answers"], strict=True)]
    return {
        "largest_difference_of_logprobs": float(max(logprobs)),
        "median_difference_of_mrd": float(np.median(np.abs(mrd[1] / mrd[0] - 1))),
        "same_answers": float(np.mean(same)),
    }


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['samples']} samples, {figures['turns']} turns; vLLM against transformers")
    for name, turns in figures["seconds"].items():
        gain = figures["gain"][name]
        means = {engine: float(np.mean(seconds)) for engine, seconds in turns.items()}
        print(
            f"{name:<10} transformers {means['transformers']:6.2f} s, vLLM {means['vllm']:6.2f} s: vLLM is "
            f"{gain['value']:.2f} x as fast {interval(gain, '.2f')}"
        )
    print(
        f"they differ by {figures['largest_difference_of_logprobs']:.1e} in log-probs, "
        f"{figures['median_difference_of_mrd']:.2%} in MRD; {figures['same_answers']:.0%} of the answers are the same"
    )
