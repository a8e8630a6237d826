"""`mrd-bench benchmark evaluation`: greedy answers by the replica pool against one question at a time, in one run.

Methods, on the same questions with the same limits on the length of an answer:
    (a)  one at a time: transformers' `generate`, a batch of one, with a thread a core
    (b)  `scoring.readings.Reader`, one replica of one thread
    (c)  the same on as many replicas as there are cores, or GPUs

(a) and (b) take turns, then (a) and (c), so that whatever else the machine does falls on both. In each turn (a) answers
a tenth of the questions and the other method all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from bench.models.find import ModelReference, find_model
from bench.speed.figures import now, require_at_least, write_figures
from bench.stats.estimates import Estimate, over_samples
from bench.tasks import Record
from bench.tasks.datasets import find_task
from scoring.answers import EXTRA_TOKENS, answer_limits, question_ids
from scoring.cluster import Footprint, connect, default_gpus
from scoring.errors import UserError
from scoring.load import load_model
from scoring.pool import ReplicaPool
from scoring.readings import Reader
from scoring.records import question_answer
from scoring.samples import Sample, Text, encode
from scoring.work import ReplicaSpec

TURNS = 10  # fewer give no interval
# Field of a question -> field of its answer.
ANSWERS = {"question": "answer", "paraphrased_question": "paraphrased_answer"}


def run_benchmark(model: str, data: str, split: str | None, generations: int, out: str | None) -> None:
    """Measure, print a table with ratios, and write the figures as JSON if asked to.

    Args:
        model: embedded one, folder or Hugging Face id.
        data: a task of questions and answers.
        split: of the task.
        generations: questions that are answered, at most.
        out: JSON file.
    """
    require_at_least(TURNS, generations=generations)
    reference = find_model(model)
    samples = _questions(data, split, reference, generations)
    prompts, limits = question_ids(samples), answer_limits(samples, reference.max_length)
    connect()
    gpus = default_gpus()
    cores = len(os.sched_getaffinity(0))
    replicas = torch.cuda.device_count() if gpus else cores
    device = "cuda" if gpus else "cpu"
    loaded = load_model(reference.source, "float32", device, reference.revision)
    spec, eos = ReplicaSpec(reference.source, reference.revision), reference.tokenizer.eos_token_id
    torch.set_num_threads(cores)
    seconds: dict[str, list[float]] = {name: [] for name in ("a beside b", "b", "a beside c", "c")}
    written: dict[str, dict[int, np.ndarray]] = {"a": {}, "b": {}, "c": {}}

    def take_turn(
        name: str, numbers: Sequence[int], answer: Callable[[list[np.ndarray], list[int]], list[np.ndarray]]
    ) -> None:
        """Answer the questions of these numbers; the seconds are scaled to all questions."""
        started = now()
        answers = answer([prompts[i] for i in numbers], [limits[i] for i in numbers])
        seconds[name].append((now() - started) * len(samples) / len(numbers))
        written[name[0]] |= dict(zip(numbers, answers, strict=True))

    def one_at_a_time(prompts: Sequence[np.ndarray], limits: Sequence[int]) -> list[np.ndarray]:
        return [_generated(loaded, prompt, limit, eos) for prompt, limit in zip(prompts, limits, strict=True)]

    all_numbers = range(len(samples))
    for name, count in (("b", 1), ("c", replicas)):
        with ReplicaPool(spec, Footprint(1, gpus), count) as pool:
            reader = Reader(pool, eos)
            reader.continuations(prompts, limits)  # loads the replicas
            one_at_a_time(prompts[:1], limits[:1])  # starts the threads
            for turn in range(TURNS):
                take_turn(f"a beside {name}", all_numbers[turn::TURNS], one_at_a_time)
                take_turn(name, all_numbers, reader.continuations)
    figures = _summary(seconds, written, len(samples))
    figures |= {"model": model, "data": data, "cores": cores, "replicas": replicas, "device": device}
    _print(figures)
    write_figures(figures, out)


def _questions(data: str, split: str | None, reference: ModelReference, count: int) -> list[Sample]:
    """The questions of the forget and the retain set, then their paraphrases, `count` at most."""
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


def _has(record: Record, *fields: str) -> bool:
    return all(record.get(field) for field in fields)


@torch.no_grad()
def _generated(model: Any, prompt: np.ndarray, limit: int, eos: int | None) -> np.ndarray:
    """The answer to one prompt by greedy `generate`, as evaluation code commonly has it."""
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


def _summary(seconds: dict[str, list[float]], written: dict[str, dict[int, np.ndarray]], count: int) -> dict[str, Any]:
    """Seconds for all questions, ratios with intervals over the turns, and how many answers are the same.

    Args:
        seconds: of each turn, by method.
        written: tokens of the answers by number of the question, by method.
        count: of questions.
    """
    turns = {name: np.array(values) for name, values in seconds.items()}

    def gain(name: str) -> Estimate:
        slow, fast = turns[f"a beside {name}"], turns[name]
        return over_samples(lambda rows: slow[rows].sum() / fast[rows].sum(), TURNS)

    return {
        "generations": count,
        "new_tokens": sum(len(tokens) for tokens in written["c"].values()),
        "seconds": {name: float(values.mean()) for name, values in turns.items()},
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
