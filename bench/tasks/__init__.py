"""The unlearning tasks: each a file with a `TASK`, all of them here by name."""

from bench.tasks import authors
from bench.tasks.task import Record, Task

__all__ = ["TASKS", "Record", "Task"]

TASKS: dict[str, Task] = {task.name: task for task in (authors.TASK,)}
