"""Task files: your own sets in the protocol of one of the tasks.

A task file is YAML, named .yaml or .yml, and stands wherever a task can be named. Paths are relative to its folder:

    protocol: tofu              # tofu, wmdp, whp, safe, muse, rwku or lume: which metrics are measured
    forget: forget.jsonl        # data files: .jsonl, .json or .parquet
    retain: retain.jsonl
    holdout: others.jsonl       # further sets of the protocol, see SETS; without a set its metrics are missing
    name: my authors            # the file's name if left out

The forget and the retain set may have any layout of records (`scoring.records`), and are not cut; those of tofu and
lume have the fields of these tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from bench.files.spec import spec_file
from bench.tasks import lume, muse, rwku, safe, tofu, whp, wmdp
from bench.tasks.sources import TEXT, Fields, read_file, with_fields
from bench.tasks.task import Task
from scoring.errors import UserError, unknown_name
from scoring.records import Record
from scoring.settings import Doc, Naming, named, naming

SUFFIXES = (".yaml", ".yml")
ANY: Fields = {}
COMPLETION: Fields = {"prompt": TEXT, "completion": TEXT}
PROMPT: Fields = {"prompt": TEXT}
# Protocol -> its sets, with the fields that their records must have.
SETS: dict[str, dict[str, Fields]] = {
    "tofu": {
        "forget": tofu.PARAPHRASED,
        "retain": tofu.PARAPHRASED,
        "real_authors": tofu.OPTIONS,
        "world_facts": tofu.OPTIONS,
        "holdout": tofu.QUESTION,
    },
    "wmdp": {"forget": ANY, "retain": ANY},
    "whp": {"forget": ANY, "retain": ANY, "seen": COMPLETION, "unseen": COMPLETION},
    "safe": {"forget": ANY, "retain": ANY, "safe_prompts": PROMPT, "real_toxicity_prompts": PROMPT},
    "muse": muse.SETS,
    "rwku": rwku.SETS,
    "lume": lume.SETS,
}
PROTOCOLS = {task.name: task for task in (tofu.TASK, wmdp.TASK, whp.TASK, safe.TASK, muse.TASK, rwku.TASK, lume.TASK)}
# Protocols whose records are put in words of their own, or whose sets are parts of others: what makes them, and the set
# that each is part of.
MADE = {
    "muse": (muse.of_files, muse.set_of),
    "rwku": (rwku.of_files, rwku.set_of),
    "lume": (lume.of_files, lume.set_of),
}

DataFile = Annotated[str | None, Doc("a data file: .jsonl, .json or .parquet, relative to this file's folder")]


@dataclass(frozen=True)
class TaskFile:
    """What a task file may say: its protocol, its name, and a data file for each set."""

    protocol: Annotated[
        Literal["tofu", "wmdp", "whp", "safe", "muse", "rwku", "lume"], Doc("which metrics are measured")
    ]
    forget: Annotated[str, Doc("data file of what is forgotten")]
    retain: Annotated[str, Doc("data file of what is kept")]
    name: Annotated[str | None, Doc("of the task (default: the file's name)")] = None
    real_authors: DataFile = None
    world_facts: DataFile = None
    holdout: DataFile = None
    seen: DataFile = None
    unseen: DataFile = None
    safe_prompts: DataFile = None
    real_toxicity_prompts: DataFile = None
    verbmem: DataFile = None
    knowmem_forget: DataFile = None
    knowmem_retain: DataFile = None
    knowmem_forget_icl: DataFile = None
    knowmem_retain_icl: DataFile = None
    forget_level1: DataFile = None
    forget_level2: DataFile = None
    forget_level3: DataFile = None
    neighbor_level1: DataFile = None
    neighbor_level2: DataFile = None
    mia_forget: DataFile = None
    mia_retain: DataFile = None
    utility_reason: DataFile = None
    utility_factuality: DataFile = None
    utility_fluency: DataFile = None
    members: DataFile = None
    nonmembers: DataFile = None


def read_task(path: str | Path) -> Task:
    """The task that a task file describes. Its data files are read when they are loaded.

    Raises:
        UserError: one line that names the file and the field at fault.
    """
    path = Path(path)
    # Its fields have no flags.
    with naming(Naming()), spec_file(path, {}, TaskFile, what="task file") as task_file:
        values = dataclasses.asdict(task_file)
        protocol, name = values.pop("protocol"), values.pop("name")
        task, fields_of = PROTOCOLS[protocol], SETS[protocol]
        files = {set_name: path.parent / file for set_name, file in values.items() if file is not None}
        for set_name in files:
            if set_name not in fields_of:
                unknown = unknown_name(f"set of protocol {protocol!r}", set_name, fields_of)
                raise UserError(f"{named(set_name)}: {unknown}")

    made, set_of = MADE.get(protocol, (None, lambda split: split))

    def read(set_name: str) -> list[Record] | None:
        if set_name not in files:
            return None
        return with_fields(read_file(files[set_name]), fields_of[set_name], str(files[set_name]))

    def load(split: str, source: str | None, tokenizer: Any) -> list[Record]:
        records = (read(split) or []) if made is None else made(split, read, tokenizer)
        return [{"id": f"{split}-{row:05d}"} | record for row, record in enumerate(records)]

    def evaluation(split: str) -> Mapping[str, str]:
        return {name: name for name in task.evaluation(task.default_split) if set_of(name) in files}

    return dataclasses.replace(
        task,
        name=name or path.stem,
        about=f"own data in the protocol of {protocol}",
        load=load,
        splits=tuple(dict.fromkeys((*files, *evaluation("forget")))),
        default_split="forget",
        retain_of={"forget": "retain"},
        evaluation=evaluation,
        source=None,
        source_is="",
    )
