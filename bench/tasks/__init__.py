"""The unlearning tasks: each a file with a `TASK`, all of them here by name.

A plugin adds one by `TASKS["mine"] = Task("mine", ...)`.
"""

from bench.tasks import lume, muse, rwku, safe, tofu, whp, wmdp
from bench.tasks.embedded import (
    authors,
    authors_lume,
    authors_muse,
    authors_rwku,
    compounds,
    graded,
    novel,
    replies,
)
from bench.tasks.task import HarnessTask, Task
from scoring.records import Record
from scoring.registry import Registry

__all__ = ["TASKS", "HarnessTask", "Record", "Task"]

TASKS: Registry[Task] = Registry("task", of=Task)
for _module in (
    *(authors, compounds, graded, novel, replies, authors_muse, authors_rwku, authors_lume),
    *(tofu, wmdp, whp, safe, muse, rwku, lume),
):
    TASKS[_module.TASK.name] = _module.TASK
