"""LUME: synthetic stories, synthetic biographies and real documents to forget (Ramakrishna et al., 2025), as in
SemEval-2025 task 4.

Hub: llmunlearningsemeval2025organization/semeval25-unlearning-dataset-public, which one has to register for. A folder,
or the folder data in it, as a copy of the hub's has, has

    forget_train.jsonl  retain_train.jsonl  forget_validation.jsonl  retain_validation.jsonl
                            id, input, output, task (Task1 to Task3)
    mia_data/member.jsonl  mia_data/nonmember.jsonl                   document

Task 1 are long stories, task 2 short biographies with personal data, task 3 documents that the model has been trained
on. Each is asked for in two ways, which the id tells: ...sc1 is a text to be completed, ...qa0 a question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tasks.sources import TEXT, Fields, HubSet, Kind, is_local, read_records
from bench.tasks.task import HarnessTask, Task, Unreachable
from bench.tasks.wmdp import MMLU
from scoring.errors import UserError
from scoring.records import Record

TASKS = (1, 2, 3)
COMPLETION, QUESTION = "completion", "question"
KINDS = (COMPLETION, QUESTION)
SIDES = ("forget", "retain")
# Kind -> what it says.
SAYS = {COMPLETION: "regurgitation", QUESTION: "knowledge"}
COMPLETENESS = (
    *("lume_aggregate", "lume_task_aggregate", "lume_mia_score"),
    *("lume_forget_regurgitation", "lume_forget_knowledge"),
)
UTILITY = ("lume_retain_regurgitation", "lume_retain_knowledge", "mmlu")
FURTHER = (
    *(f"lume_{side}_task{number}_{what}" for side in SIDES for number in TASKS for what in SAYS.values()),
    *("lume_mia_auc", "ma", "el"),
)

SOURCE = "llmunlearningsemeval2025organization/semeval25-unlearning-dataset-public"
FOLDS = ("train", "validation")
# Set -> side, number of the task, kind.
VIEWS = {f"{side}_task{n}_{kind}": (side, n, kind) for side in SIDES for n in TASKS for kind in KINDS}
MEMBERS = {"members": "mia_data/member", "nonmembers": "mia_data/nonmember"}
SPLITS = (
    *(f"{side}_{fold}" for fold in FOLDS for side in SIDES),
    *(f"{name}_{fold}" for fold in FOLDS for name in VIEWS),
    *MEMBERS,
)

# The end of an id, as "sc1" or "qa0".
KIND = re.compile(r"(sc|qa)\d*$")
RECORD: Fields = {
    "id": Kind(
        "text that ends in sc or qa and a number", lambda value: isinstance(value, str) and bool(KIND.search(value))
    ),
    "input": TEXT,
    "output": TEXT,
    "task": Kind(
        "Task1, Task2 or Task3",
        lambda value: isinstance(value, str) and value.lower() in [f"task{number}" for number in TASKS],
    ),
}
DOCUMENT: Fields = {"document": TEXT}
SETS: dict[str, Fields] = {"forget": RECORD, "retain": RECORD, "members": DOCUMENT, "nonmembers": DOCUMENT}


def load(split: str, source: str | None, tokenizer: Any) -> list[Record]:
    """See `bench.tasks.task.Loader`: {"id", "prompt", "completion", "task"}, and documents {"id", "text"}.

    Raises:
        UserError: one line. Unreachable: there is no sample of that task and kind.
    """
    place = source or SOURCE
    if split in MEMBERS:
        file = MEMBERS[split]
        return documents(read_records("lume", place, file, HubSet(place, file=f"{file}.jsonl"), DOCUMENT), split)
    base, _, fold = split.rpartition("_")
    side = VIEWS[base][0] if base in VIEWS else base
    file = f"{side}_{fold}"
    within = "data/" if is_local(place) and (Path(place) / "data").is_dir() else ""
    records = read_records("lume", place, within + file, HubSet(place, split=file), RECORD)
    return samples(records) if base not in VIEWS else view(records, base)


def of_files(split: str, read: Callable[[str], list[Record] | None], tokenizer: Any) -> list[Record]:
    """The same of a task file.

    Args:
        read: one of SETS -> its records, None if the task file names none.
    """
    records = read(set_of(split)) or []
    if split in MEMBERS:
        return documents(records, split)
    return view(records, split) if split in VIEWS else samples(records)


def set_of(split: str) -> str:
    """The set of a task file that a split is part of."""
    return VIEWS[split][0] if split in VIEWS else split


def samples(records: Sequence[Record]) -> list[Record]:
    """Records as they are taught, asked and forgotten."""
    return [
        {
            "id": record["id"],
            "prompt": record["input"],
            "completion": _after(record["input"], record["output"]),
            "task": record["task"],
        }
        for record in records
    ]


def _after(text: str, output: str) -> str:
    """An output with the white space that separates it from its input."""
    return output if text[-1:].isspace() or output[:1].isspace() else f" {output}"


def view(records: Sequence[Record], name: str) -> list[Record]:
    """The samples of one task and kind.

    Raises:
        Unreachable: there are none.
    """
    _, number, kind = VIEWS[name]
    found = [r for r in records if r["task"].lower() == f"task{number}" and kind_of(r["id"]) == kind]
    if not found:
        raise Unreachable(f"lume: no {kind} of task {number} among {len(records)} samples")
    return samples(found)


def kind_of(sample_id: str) -> str:
    """Whether a sample is to be completed or answered."""
    found = KIND.search(sample_id)
    if found is None:
        raise UserError(f"lume: id {sample_id!r}: expected one that ends in sc or qa and a number")
    return COMPLETION if found[1] == "sc" else QUESTION


def documents(records: Sequence[Record], name: str) -> list[Record]:
    return [{"id": f"{name}-{number:05d}", "text": record["document"]} for number, record in enumerate(records)]


def _evaluation(split: str) -> Mapping[str, str]:
    _, _, fold = split.rpartition("_")
    return {"forget": split, **{name: f"{name}_{fold}" for name in VIEWS}, **{name: name for name in MEMBERS}}


def _harness(source: str | None) -> Mapping[str, tuple[HarnessTask, ...]]:
    return MMLU


TASK: Task = Task(
    name="lume",
    about="stories, biographies with personal data, and real documents (LUME, SemEval-2025 task 4)",
    load=load,
    splits=SPLITS,
    default_split="forget_train",
    retain_of={f"forget_{fold}": f"retain_{fold}" for fold in FOLDS},
    evaluation=_evaluation,
    completeness=COMPLETENESS,
    utility=UTILITY,
    further=FURTHER,
    source=SOURCE,
    source_is="a Hugging Face id, or a folder with files such as forget_train.jsonl",
    harness=_harness,
)
