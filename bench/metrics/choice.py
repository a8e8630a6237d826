"""Which metrics are measured on a task."""

from __future__ import annotations

from collections.abc import Sequence

from bench.metrics.harness import HARNESS
from bench.metrics.quantities import QUANTITIES
from bench.metrics.registry import GROUPS, METRICS
from bench.metrics.relearning import RELEARNING
from bench.metrics.values import Column
from bench.tasks import Task
from scoring.errors import UserError, unknown_name


def choose_metrics(task: Task, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The metrics that a task names, in its order; or those that are asked for, the task's own first.

    Any registered metric can be asked for by name if the task has what it is formed from: the task need not name it.

    Args:
        task: that they are measured on.
        names: of metrics, or of groups of them, see GROUPS; None: all that the task names.

    Raises:
        UserError: there is no such metric, or the task does not have what it is formed from.
    """
    if names is not None:
        names = [metric for name in names for metric in _of_group(name, task)]
    for name in task.metrics if names is None else names:
        if name not in METRICS:
            named_by_task = [known for known in task.metrics if known in METRICS]
            others = [known for known in METRICS if known not in task.metrics and not _lacking(known, task)]
            raise unknown_name(f"metric of task {task.name!r}", name, [*named_by_task, *others, *GROUPS])
        if name not in task.metrics and (lacking := _lacking(name, task)):
            set_name, quantity = lacking[0]
            raise UserError(
                f"metric {name!r} needs {quantity} of the {set_name} set, which task {task.name!r} does not have"
            )
    if names is None:
        return task.metrics
    further = dict.fromkeys(name for name in names if name not in task.metrics)
    return (*(name for name in task.metrics if name in names), *further)


def _of_group(name: str, task: Task) -> list[str]:
    """The metrics of a group that a task has the sets for; of a name that is no group's, itself."""
    if name not in GROUPS or name in METRICS:
        return [name]
    found = [metric for metric in GROUPS[name] if not _lacking(metric, task)]
    if not found:
        raise UserError(
            f"task {task.name!r} has no set for any metric of the group {name!r}: {', '.join(GROUPS[name])}"
        )
    return found


def _lacking(name: str, task: Task) -> list[Column]:
    """The columns of a metric that a task does not have."""
    sets = set(task.evaluation(task.default_split))
    if sets & {"holdout", "retain"}:
        sets.add("negatives")
    benchmarks = task.harness(task.source)
    lacking = []
    for set_name, quantity in METRICS[name].columns:
        if quantity not in (known := [*QUANTITIES, *RELEARNING, *HARNESS]):
            raise unknown_name(f"quantity of metric {name!r}", quantity, known)
        has_it = set_name in (benchmarks if quantity in HARNESS else {"forget"} if quantity in RELEARNING else sets)
        if not has_it:
            lacking.append((set_name, quantity))
    return lacking
