"""TOFU: fictitious authors, 20 questions each (Maini et al., 2024).

Hub: locuslab/TOFU, a configuration for each split. A folder has a file for each split that is used, such as

    forget10.jsonl             question, answer
    forget10_perturbed.jsonl   question, answer, paraphrased_answer, perturbed_answer (list), maybe paraphrased_question
    world_facts_perturbed.jsonl    question, answer, perturbed_answer (list)

and so on for the splits below. The rows of a forget set and of its perturbed set are the same questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.tasks.sources import TEXT, TEXTS, Fields, HubSet, read_records
from bench.tasks.task import Task
from scoring.records import Record

COMPLETENESS = ("ua", "mia", "rr", "relearn", "uc_average")
UTILITY = (
    "retain_acc",
    "retain_rr",
    "real_authors_acc",
    "real_authors_rr",
    "world_facts_acc",
    "world_facts_rr",
    "ut_average",
)
FURTHER = (
    "fa",
    "relearned_share",
    "ma",
    "el",
    "forget_probability",
    "forget_truth_ratio",
    "retain_probability",
    "retain_truth_ratio",
    "real_authors_probability",
    "real_authors_truth_ratio",
    "world_facts_probability",
    "world_facts_truth_ratio",
    "model_utility",
    "forget_quality",
    "ks_distance",
)

SOURCE = "locuslab/TOFU"
PERTURBED = "_perturbed"
SIZES = ("01", "05", "10")  # per cent of the authors that are forgotten
PLAIN = (
    "full",
    *(f"forget{size}" for size in SIZES),
    *(f"retain{100 - int(size)}" for size in SIZES),
    *(f"holdout{size}" for size in SIZES),
    "real_authors",
    "world_facts",
)
SPLITS = (
    *PLAIN,
    *(f"forget{size}{PERTURBED}" for size in SIZES),
    f"retain{PERTURBED}",
    f"real_authors{PERTURBED}",
    f"world_facts{PERTURBED}",
)
RETAIN_OF = {f"forget{size}{perturbed}": f"retain{100 - int(size)}" for size in SIZES for perturbed in ("", PERTURBED)}
QUESTION: Fields = {"question": TEXT, "answer": TEXT}
# Real authors and world facts have wrong options, and nothing is paraphrased.
OPTIONS: Fields = {**QUESTION, "perturbed_answer": TEXTS}
PARAPHRASED: Fields = {**OPTIONS, "paraphrased_answer": TEXT}


def fields_of(split: str) -> Fields:
    """The fields that the records of a split must have."""
    if not split.endswith(PERTURBED):
        return QUESTION
    return OPTIONS if split.startswith(("real_authors", "world_facts")) else PARAPHRASED


def load(split: str, source: str | None, tokenizer: Any) -> list[Record]:
    """See `bench.tasks.task.Loader`. A record's id is its split and row, without the ending of perturbed splits.

    Raises:
        UserError: one line.
    """
    source = source or SOURCE
    records = read_records("tofu", source, split, HubSet(source, split), fields_of(split))
    name = split.removesuffix(PERTURBED)
    return [record | {"id": f"{name}-{row:04d}"} for row, record in enumerate(records)]


def _evaluation(split: str) -> Mapping[str, str]:
    forget = split.removesuffix(PERTURBED)
    sets = {
        "forget": forget + PERTURBED if forget + PERTURBED in SPLITS else split,
        "retain": f"retain{PERTURBED}",
        "real_authors": f"real_authors{PERTURBED}",
        "world_facts": f"world_facts{PERTURBED}",
    }
    holdout = forget.replace("forget", "holdout")
    return sets | ({"holdout": holdout} if holdout in SPLITS else {})


TASK: Task = Task(
    name="tofu",
    about="200 fictitious authors, 20 questions each",
    load=load,
    splits=SPLITS,
    default_split="forget10",
    retain_of=RETAIN_OF,
    evaluation=_evaluation,
    completeness=COMPLETENESS,
    utility=UTILITY,
    further=FURTHER,
    source=SOURCE,
    source_is="a Hugging Face id, or a folder with files such as forget10.jsonl",
)
