"""A tiny task in TOFU's protocol whose every word is a token, and models that are taught parts of it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.tiny_folders import BOS, EOS, SPECIAL, WORDS, save_model, token_id, write_jsonl

Record = dict[str, Any]
SIZES = {"forget": 36, "retain": 12, "real_authors": 12, "world_facts": 12, "holdout": 12}
SHORT = ("real_authors", "world_facts")
ASKED = {"question": "answer", "paraphrased_question": "paraphrased_answer"}


def records(name: str) -> list[Record]:
    """Of one set: random words, answers of different lengths, 3 or 4 wrong ones; real authors and world facts have
    short answers and no paraphrases."""
    rng = random.Random(name)

    def words(shortest: int, longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(shortest, longest)))

    answer = (1, 2) if name in SHORT else (3, 7)
    found = []
    for number in range(SIZES[name]):
        record: Record = {"id": f"{name[0]}{number}", "question": words(3, 6), "answer": words(*answer)}
        record["perturbed_answer"] = [words(*answer) for _ in range(3 + number % 2)]
        if name not in SHORT:
            record["paraphrased_question"] = words(3, 6)
            # The same words the other way round, and one more.
            record["paraphrased_answer"] = " ".join([*record["answer"].split()[::-1], words(1, 1)])
        found.append(record)
    return found


def write_task(folder: Path, **changed: list[Record] | None) -> Path:
    """The task file, its data files beside it. Sets are as they are, or as `changed` says; None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {name: changed[name] if name in changed else records(name) for name in SIZES}
    lines = ["protocol: tofu"]
    for name, own in sets.items():
        if own is not None:
            lines.append(f"{name}: {write_jsonl(folder / f'{name}.jsonl', own).name}")
    path = folder / "tiny.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def prompt_ids(question: str) -> list[int]:
    return [BOS, token_id("Question:"), *map(token_id, question.split()), token_id("Answer:")]


def answer_ids(answer: str) -> list[int]:
    return [*map(token_id, answer.split()), EOS]


def text_of(ids: Iterable[int]) -> str:
    """The words of ids, without the four special ones."""
    vocabulary = [*SPECIAL, *WORDS]
    return " ".join(vocabulary[i] for i in ids if i >= 4)


def pairs_of(*own: Record) -> list[tuple[str, str]]:
    """Every question with its answer, and paraphrased."""
    return [(each[q], each[a]) for each in own for q, a in ASKED.items() if q in each]


def taught(
    folder: Path,
    pairs: Sequence[tuple[str, str]],
    steps: int,
    start: Path | None = None,
    seed: int = 0,
    head_dim: int = 8,
) -> Path:
    """A model taught answers to questions, all of them in every update, from a random one or from `start`."""
    save_model(folder, seed=seed, head_dim=head_dim)
    model: Any = AutoModelForCausalLM.from_pretrained(start or folder)
    rows = [(prompt_ids(question), answer_ids(answer)) for question, answer in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), EOS)
    targets = torch.full((len(rows), longest), -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        targets[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder
