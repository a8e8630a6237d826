"""What is attacked, and how."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from bench.attacks import KNOWLEDGE, AttackSettings
from bench.jobs.evaluation_spec import (
    EvaluateSpec,
    ForgetSplit,
    Forgotten,
    OfWeights,
    PaddedTokens,
    SelectionFile,
    SentenceModel,
    TaskName,
    ToxicityModel,
)
from bench.metrics import METRICS, knowledge_sign
from bench.metrics.choice import choose_metrics
from bench.models.find import ModelName
from bench.tasks import Task
from bench.tasks.datasets import is_data_file
from scoring.errors import UserError, expected_one_of
from scoring.settings import Doc, Ge, check, named
from scoring.templates import TEMPLATE_FIELDS, TemplateSettings

# Of a task whose answers are written: what is attacked unless it is said.
WRITTEN = ("rr", "ma", "forget_probability")


@dataclass(frozen=True, kw_only=True)
class AttackSpec(AttackSettings, TemplateSettings):
    """What is attacked, and how. Its hash is the attack's identity."""

    EXECUTION: ClassVar = ()
    ADDED_LATER: ClassVar = ()

    model: Forgotten
    task: TaskName
    split: ForgetSplit = None
    selection: SelectionFile = None
    original: Annotated[
        ModelName | None, Doc("the model before unlearning: what it knew decides what half of it is")
    ] = None
    retain_model: Annotated[
        ModelName | None, Doc("never trained on the forget set: what it answers under an attack is the attack's doing")
    ] = None
    metrics: Annotated[
        str | None,
        Doc("of what is known, separated by commas (default: rr, ma, forget_probability, or the task's completeness)"),
    ] = None
    samples: Annotated[int | None, Ge(1), Doc("of the forget set at most, evenly spaced (default: all)")] = None
    benign: Annotated[
        str | None,
        Doc("data file that relearn trains on (default: the task's general knowledge, where it has a set of that)"),
    ] = None
    sentence_model: SentenceModel = None
    toxicity_model: ToxicityModel = None
    dtype: OfWeights = "float32"
    batch_tokens: PaddedTokens = None
    seed: Annotated[int, Ge(0), Doc("of everything that is drawn")] = 0

    def checked(self) -> Self:
        """The same with absolute paths.

        Raises:
            UserError: a value that cannot be.
        """
        check(self)
        self.check_strengths()
        if self.benign is not None and not is_data_file(self.benign):
            raise UserError(f"{named('benign')} is {self.benign!r}: expected a data file (.jsonl, .json or .parquet)")
        evaluation = self.evaluation().checked()
        located: dict[str, Any] = {name: getattr(evaluation, name) for name in _SHARED}
        for name in ("benign", "prompts"):
            if (path := getattr(self, name)) is not None:
                located[name] = str(Path(path).absolute())
        return dataclasses.replace(self, **located)

    def evaluation(self) -> EvaluateSpec:
        """The evaluation that is made under every attack."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _SHARED}
        return EvaluateSpec(**values)

    def metrics_of(self, task: Task) -> tuple[str, ...]:
        """What is attacked.

        Raises:
            UserError: the task has no such metric, or it does not say what is known.
        """
        if self.metrics is None:
            known = [name for name in task.completeness if name in METRICS and _says_knowledge(name)]
            written = [name for name in WRITTEN if name in task.metrics]
            # Not every task whose MA is known has answers that are judged by it.
            names = written if "rr" in written or not known else known
            if not names:
                raise UserError(
                    f"task {task.name!r} names no metric that says what is known: name some as {named('metrics')}"
                )
            return choose_metrics(task, names)
        metrics = self.evaluation().metrics_of(task)
        if wrong := next((name for name in metrics if not _says_knowledge(name)), None):
            possible = [name for name in task.metrics if name in METRICS and _says_knowledge(name)]
            raise UserError(
                f"{named('metrics')} {wrong}: cannot be attacked, as it is no mean of what is known of samples; "
                f"{expected_one_of(wrong, possible)}"
            )
        return metrics


_SHARED = (
    *("model", "task", "split", "selection", "original", "retain_model", "metrics", "samples"),
    *("sentence_model", "toxicity_model", "dtype", "batch_tokens", "seed"),
    *TEMPLATE_FIELDS,
)


def _says_knowledge(name: str) -> bool:
    metric = METRICS[name]
    knows = not metric.compares and all(quantity in KNOWLEDGE for _, quantity in metric.columns)
    return knows and knowledge_sign(name) != 0
