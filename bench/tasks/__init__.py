"""The unlearning tasks. A task is a module with `SPLITS`, `DEFAULT_SPLIT` and `load(split) -> list[dict]`."""

from types import ModuleType

from bench.tasks import authors

TASKS: dict[str, ModuleType] = {"authors": authors}
