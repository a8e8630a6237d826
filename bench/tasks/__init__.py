"""The unlearning tasks: each a file with a `TASK`, all of them here by name."""

from bench.tasks import safe, tofu, whp, wmdp
from bench.tasks.embedded import authors, compounds, novel, replies
from bench.tasks.task import HarnessTask, Task
from scoring.records import Record

__all__ = ["TASKS", "HarnessTask", "Record", "Task"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        authors.TASK,
        compounds.TASK,
        novel.TASK,
        replies.TASK,
        tofu.TASK,
        wmdp.TASK,
        whp.TASK,
        safe.TASK,
    )
}
