"""`mrd-bench benchmark evaluation`: greedy answers by the replica pool against one question at a time, in one run.

Methods, on the same questions with the same limits on the length of an answer:
    (a)  one at a time: transformers' `generate`, a batch of one, with a thread a core
    (b)  `scoring.readings.Reader`, one replica of one thread
    (c)  the same on as many replicas as there are cores, or GPUs

(a) and (b) take turns, then (a) and (c), so that whatever else the machine does falls on both; in each turn (a) answers
a tenth of the questions and the other all.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.models.find import ModelReference, find_model
from bench.stats.estimates import Estimate, over_samples
from bench.tasks import Record
from bench.tasks.datasets import find_task
from scoring.answers import EXTRA_TOKENS, answer_limits, question_ids
from scoring.cluster import Footprint, connect, default_gpus
from scoring.errors import UserError
from scoring.pool import ReplicaPool
from scoring.readings import Reader
from scoring.records import question_answer
from scoring.replica import load_model
from scoring.samples import Sample, Text, encode
from scoring.work import ReplicaSpec

TURNS = 10  # fewer give no interval
ANSWERS = {"question": "answer", "paraphrased_question": "paraphrased_answer"}


def run_benchmark(model: str, data: str, split: str | None, generations: int, out: str | None) -> None:
    """Measure, print a table with ratios, and write the figures as JSON if asked to."""
    if generations < TURNS:
        raise UserError(f"--generations {generations}: expected at least {TURNS}")
    reference = find_model(model)
    samples = _questions(data, split, reference, generations)
    prompts, limits = question_ids(samples), answer_limits(samples, reference.max_length)
    connect()
    gpus = default_gpus()
    cores = len(os.sched_getaffinity(0))
    replicas = torch.cuda.device_count() if gpus else cores
    device = "cuda" if gpus else "cpu"
    one = load_model(reference.source, "float32", device, reference.revision)
    spec, eos = ReplicaSpec(reference.source, reference.revision), reference.tokenizer.eos_token_id
    torch.set_num_threads(cores)
    seconds: dict[str, list[float]] = {name: [] for name in ("a beside b", "b", "a beside c", "c")}
    written: dict[str, dict[int, np.ndarray]] = {"a": {}, "b": {}, "c": {}}

    def timed(name: str, own: Sequence[int], work: Callable[[list[np.ndarray], list[int]], list[np.ndarray]]) -> None:
        started = time.perf_counter()
        answers = work([prompts[i] for i in own], [limits[i] for i in own])
        seconds[name].append((time.perf_counter() - started) * len(samples) / len(own))
        written[name[0]] |= dict(zip(own, answers, strict=True))

    def one_at_a_time(own: Sequence[np.ndarray], most: Sequence[int]) -> list[np.ndarray]:
        return [_generated(one, each, limit, eos) for each, limit in zip(own, most, strict=True)]

    everything = range(len(samples))
    for name, count in (("b", 1), ("c", replicas)):
        with ReplicaPool(spec, Footprint(1, gpus), count) as pool:
            reader = Reader(pool, eos)
            reader.continuations(prompts, limits)  # loads the replicas
            one_at_a_time(prompts[:1], limits[:1])  # starts the threads
            for turn in range(TURNS):
                timed(f"a beside {name}", everything[turn::TURNS], one_at_a_time)
                timed(name, everything, reader.continuations)
    figures = _figures(seconds, written, len(samples))
    figures |= {"model": model, "data": data, "cores": cores, "replicas": replicas, "device": device}
    _print(figures)
    if out:
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")


def _questions(data: str, split: str | None, reference: ModelReference, count: int) -> list[Sample]:
    """The questions of the forget and the retain set, then the same paraphrased, `count` at most."""
    task, source = find_task(data)
    sets = task.evaluation(split or task.default_split)
    records = [
        (name, record)
        for name in ("forget", "retain")
        if name in sets
        for record in task.load(sets[name], source, reference.tokenizer)
    ]
    texts = [
        Text(f"{name}/{record['id']}/{question}", *question_answer(record[question], record[answer]))
        for question, answer in ANSWERS.items()
        for name, record in records
        if _has(record, question, answer)
    ]
    if not texts:
        raise UserError(f"{data}: expected a task of questions and answers, such as authors or tofu")
    samples, _ = encode(texts, reference.tokenizer, reference.max_length - EXTRA_TOKENS)
    if len(samples) < TURNS:
        raise UserError(f"{data}: {len(samples)} questions fit into the model's context, expected at least {TURNS}")
    return samples[:count]


def _has(record: Record, *names: str) -> bool:
    return all(record.get(name) for name in names)


@torch.no_grad()
def _generated(model: Any, prompt: np.ndarray, limit: int, eos: int | None) -> np.ndarray:
    """As evaluation code commonly does it: one prompt, greedy `generate`."""
    ids = torch.from_numpy(prompt)[None].to(model.device)
    whole = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    new = whole[0, ids.shape[1] :].cpu().numpy()
    return new[:-1] if len(new) and new[-1] == eos else new


def _figures(seconds: dict[str, list[float]], written: dict[str, dict[int, np.ndarray]], count: int) -> dict[str, Any]:
    """Seconds for all questions, ratios with intervals over the turns, and how many answers are the same."""
    spent = {name: np.array(each) for name, each in seconds.items()}

    def gain(name: str) -> Estimate:
        slow, fast = spent[f"a beside {name}"], spent[name]
        return over_samples(lambda rows: slow[rows].sum() / fast[rows].sum(), TURNS)

    return {
        "generations": count,
        "new_tokens": sum(len(tokens) for tokens in written["c"].values()),
        "seconds": {name: float(each.mean()) for name, each in spent.items()},
        "gain": {name: asdict(gain(name)) for name in ("b", "c")},
        "same_answers": {
            name: float(np.mean([np.array_equal(written["a"][i], written[name][i]) for i in range(count)]))
            for name in ("b", "c")
        },
    }


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['generations']} greedy answers, {figures['new_tokens']} new tokens, {figures['device']}")
    names: Sequence[tuple[str, str]] = (
        ("a beside b", f"(a) one at a time, {figures['cores']} threads"),
        ("b", "(b) one replica"),
        ("a beside c", f"(a) one at a time, {figures['cores']} threads"),
        ("c", f"(c) {figures['replicas']} replicas"),
    )
    for name, title in names:
        line = f"{title:<34}{figures['seconds'][name]:>9.1f} s"
        if name in figures["gain"]:
            gain = figures["gain"][name]
            line += f"   {gain['value']:.1f} x faster, 95 % interval {gain['low']:.1f} to {gain['high']:.1f}"
            line += f"; {figures['same_answers'][name]:.1%} of the answers as in (a)"
        print(line)
