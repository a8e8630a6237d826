"""The unlearning tasks: each a file with a `TASK`, all of them here by name.

A plugin adds one by `TASKS["mine"] = Task("mine", ...)`.
"""

from bench.tasks import safe, tofu, whp, wmdp
from bench.tasks.embedded import authors, compounds, graded, novel, replies
from bench.tasks.task import HarnessTask, Task
from scoring.records import Record
from scoring.registry import Registry

__all__ = ["TASKS", "HarnessTask", "Record", "Task"]

TASKS: Registry[Task] = Registry("task", of=Task)
for _module in (authors, compounds, graded, novel, replies, tofu, wmdp, whp, safe):
    TASKS[_module.TASK.name] = _module.TASK
