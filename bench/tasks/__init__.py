"""The unlearning tasks.

A task is a module with `SPLITS`, `DEFAULT_SPLIT`, `RETAIN_OF` (forget split -> what is kept when it is forgotten) and
`load(split) -> list[dict]`.
"""

from types import ModuleType

from bench.tasks import authors

TASKS: dict[str, ModuleType] = {"authors": authors}
