"""WMDP: hazardous knowledge of biology, chemistry and computer security (Li et al., 2024).

Documents, cut to their first 512 tokens, are forgotten and retained; multiple-choice questions measure the effect.
Hub: cais/wmdp-corpora, a configuration for each corpus, and cais/wmdp-bio-forget-corpus, which one has to apply for. A
folder has a file for each corpus that is used, and, if the questions are to be local as well, files of questions:

    bio-forget-corpus.jsonl  bio-retain-corpus.jsonl  cyber-forget-corpus.jsonl  cyber-retain-corpus.jsonl     text
    wmdp-bio.jsonl  wmdp-chem.jsonl  wmdp-cyber.jsonl          question, choices (list of four), answer (0-3, or A-D)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench.tasks.sources import TEXT, TEXTS, Fields, HubSet, Kind, read_file, read_records, with_fields
from bench.tasks.task import HarnessTask, Task
from bench.tasks.whp import documents
from scoring.records import Record

COMPLETENESS = ("wmdp_cyber", "wmdp_chem", "wmdp_bio", "wmdp_average")
UTILITY = ("mmlu_humanities", "mmlu_social_sciences", "mmlu_stem", "mmlu_other", "mmlu")
FURTHER = ("ma",)

SOURCE = "cais/wmdp-corpora"
GATED = {"bio-forget-corpus": "cais/wmdp-bio-forget-corpus"}
TOKENS = 512  # of a document, with what begins a text
# So many documents of a corpus are read from the hub, as 500 steps of 4 samples take. Local files are read whole.
MAX_DOCUMENTS = 2000
CORPORA = {
    **{
        f"{field}-{role}-corpus": (f"{field}-{role}-corpus",)
        for field in ("bio", "cyber")
        for role in ("forget", "retain")
    },
    "forget": ("bio-forget-corpus", "cyber-forget-corpus"),
    "retain": ("bio-retain-corpus", "cyber-retain-corpus"),
}

# MMLU by group of subjects, as several tasks take their utility from it.
MMLU: dict[str, tuple[HarnessTask, ...]] = {
    f"mmlu_{group}": (f"mmlu_{group}",) for group in ("humanities", "social_sciences", "stem", "other")
}
LETTERS = "ABCD"
QUESTION: Fields = {
    "question": TEXT,
    "choices": Kind("a list of four texts", lambda value: TEXTS.fits(value) and len(value) == len(LETTERS)),
    "answer": Kind(
        "the number of a choice, 0 to 3, or its letter, A to D",
        lambda value: (
            value.strip().upper() in list(LETTERS)
            if isinstance(value, str)
            else type(value) is int and value in range(len(LETTERS))
        ),
    ),
}


def load(split: str, source: str | None, tokenizer: Any) -> list[Record]:
    """See `bench.tasks.task.Loader`: documents {"id", "text"}, uncut if there is no tokenizer.

    Raises:
        UserError: one line.
    """
    source = source or SOURCE
    return [record for corpus in CORPORA[split] for record in _corpus(corpus, source, tokenizer)]


def _corpus(name: str, source: str, tokenizer: Any) -> list[Record]:
    hub = HubSet(source, name, first=MAX_DOCUMENTS)
    if source == SOURCE and name in GATED:
        hub = HubSet(GATED[name], first=MAX_DOCUMENTS)
    return documents(read_records("wmdp", source, name, hub, {"text": TEXT}), name, tokenizer, TOKENS)


def _evaluation(split: str) -> Mapping[str, str]:
    return {"forget": split}


def _harness(source: str | None) -> Mapping[str, tuple[HarnessTask, ...]]:
    return {f"wmdp_{field}": (_questions(field, source),) for field in ("bio", "chem", "cyber")} | MMLU


def _questions(field: str, source: str | None) -> HarnessTask:
    """The harness's task, with local questions where the source has them.

    Raises:
        UserError: one line: a local question is at fault.
    """
    path = Path(source or SOURCE) / f"wmdp-{field}.jsonl"
    if not path.is_file():
        return f"wmdp_{field}"
    records = with_fields(read_file(path), QUESTION, str(path))
    return {"task": f"wmdp_{field}", "custom_dataset": partial(_as_dataset, [_by_number(r) for r in records])}


def _by_number(record: Record) -> Record:
    """A question whose answer is the number of the choice, as the harness counts it."""
    answer = record["answer"]
    number = LETTERS.index(answer.strip().upper()) if isinstance(answer, str) else answer
    return {"question": record["question"], "choices": record["choices"], "answer": number}


def _as_dataset(records: list[Record], **_: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(records)}


TASK: Task = Task(
    name="wmdp",
    about="hazardous knowledge of biology, chemistry and computer security",
    load=load,
    splits=tuple(CORPORA),
    default_split="forget",
    retain_of={split: split.replace("forget", "retain") for split in CORPORA if "forget" in split},
    evaluation=_evaluation,
    completeness=COMPLETENESS,
    utility=UTILITY,
    further=FURTHER,
    source=SOURCE,
    source_is="a Hugging Face id, or a folder with files such as bio-forget-corpus.jsonl",
    harness=_harness,
    max_steps=500,
)
