"""What is evaluated, and how."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from bench.jobs.relearn import Relearning
from bench.metrics.choice import choose_metrics
from bench.models.find import ModelName, absolute_model
from bench.tasks import Task
from bench.tasks.datasets import DataName, absolute_source
from scoring.engine import Dtype
from scoring.errors import UserError
from scoring.samples import BATCH_TOKENS_ARE
from scoring.settings import Doc, Ge, Gt, Le, check, named
from scoring.templates import TEMPLATE_FIELDS, TemplateSettings, absolute_template

# Settings of everything that asks a model what it knows.
Forgotten = Annotated[ModelName, Doc("the model that has forgotten: an embedded one, a folder, or a Hugging Face id")]
TaskName = Annotated[DataName, Doc("a task (see `mrd-bench tasks`), NAME:SOURCE, or a task file (.yaml)")]
ForgetSplit = Annotated[str | None, Doc("the forget split, e.g. forget10 (default: the task's own)")]
SelectionFile = Annotated[
    str | None, Doc("text file of the ids of the samples that were forgotten, one a line (default: the whole split)")
]
SentenceModel = Annotated[ModelName | None, Doc("embeds sentences for FA (default: all-MiniLM-L6-v2)")]
ToxicityModel = Annotated[
    ModelName | None, Doc("a text-classification model (default: the task's, unitary/toxic-bert)")
]
OfWeights = Annotated[Dtype, Doc("of weights and activations")]
PaddedTokens = Annotated[int | None, Ge(1), Doc(f"padded tokens in a batch {BATCH_TOKENS_ARE}")]


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec(TemplateSettings):
    """What is evaluated, and how. Its hash is the evaluation's identity."""

    EXECUTION: ClassVar = ("relearn_workers",)
    ADDED_LATER: ClassVar = (*TEMPLATE_FIELDS, "new_tokens")

    model: Forgotten
    task: TaskName
    split: ForgetSplit = None
    selection: SelectionFile = None
    original: Annotated[
        ModelName | None, Doc("the model before unlearning; without it Relearn assumes that it knew every sample")
    ] = None
    retain_model: Annotated[
        ModelName | None, Doc("the gold standard: trained without the forget set; without it no Forget Quality")
    ] = None
    metrics: Annotated[
        str | None,
        Doc(
            "names, separated by commas, or privacy for all of that kind (default: all of the task; see "
            "`mrd-bench metrics`)"
        ),
    ] = None
    samples: Annotated[int | None, Ge(1), Doc("of each set at most, evenly spaced (default: all)")] = None
    mia_negatives: Annotated[
        Literal["holdout", "retain"], Doc("samples that were never trained on, or the retain set")
    ] = "holdout"
    min_k: Annotated[float, Gt(0), Le(1), Doc("share of tokens that Min-k% takes")] = 0.2
    el_n: Annotated[int, Ge(1), Doc("tokens in an n-gram of extraction likelihood")] = 10
    new_tokens: Annotated[
        int | None, Ge(1), Doc("tokens that an answer may have (default: the task's own, or 20 more than the true one)")
    ] = None
    sentence_model: SentenceModel = None
    toxicity_model: ToxicityModel = None
    toxicity_label: Annotated[str, Doc("the classifier's label whose score is the toxicity")] = "toxic"
    harness_tasks: Annotated[
        str | None,
        Doc("folder of lm-evaluation-harness task files, which take precedence over its own of the same name"),
    ] = None
    harness_limit: Annotated[int | None, Ge(1), Doc("questions of each harness task at most (default: all)")] = None
    relearn_share: Annotated[float, Gt(0), Le(1), Doc("share of the forget set that is taught")] = Relearning.share
    relearn_steps: Annotated[int, Ge(1), Doc("updates of relearning, 4 samples each")] = Relearning.steps
    relearn_learning_rate: Annotated[float, Gt(0), Doc("of relearning")] = Relearning.learning_rate
    relearn_workers: Annotated[int, Ge(0), Doc("Ray Train workers of relearning; 0 trains in this process")] = 0
    dtype: OfWeights = "float32"
    batch_tokens: PaddedTokens = None
    seed: Annotated[int, Ge(0), Doc("of the resampling and of relearning")] = 0

    def checked(self) -> Self:
        """The same with absolute paths.

        Raises:
            UserError: a value that cannot be.
        """
        check(self)
        if self.harness_tasks is not None and not Path(self.harness_tasks).is_dir():
            raise UserError(
                f"{named('harness_tasks')} is {self.harness_tasks!r}, which is no folder: expected one with task files "
                "(.yaml)"
            )
        self.chosen_template()
        located: dict[str, Any] = {
            "task": absolute_source(self.task),
            "template": absolute_template(self.template),
        }
        for name in ("model", "original", "retain_model", "sentence_model", "toxicity_model"):
            if (model := getattr(self, name)) is not None:
                located[name] = absolute_model(model)
        for name in ("selection", "harness_tasks"):
            if (path := getattr(self, name)) is not None:
                located[name] = str(Path(path).absolute())
        return dataclasses.replace(self, **located)

    def relearning(self) -> Relearning:
        return Relearning(
            self.relearn_share,
            self.relearn_steps,
            self.relearn_learning_rate,
            self.seed,
            self.relearn_workers,
            {name: getattr(self, name) for name in TEMPLATE_FIELDS},
        )

    def metrics_of(self, task: Task) -> tuple[str, ...]:
        """The metrics that are measured, see `bench.metrics.choice`.

        Raises:
            UserError: the task has no such metric, or none is named.
        """
        if self.metrics is None:
            return choose_metrics(task)
        names = [name.strip() for name in self.metrics.split(",") if name.strip()]
        if not names:
            few = ",".join(task.metrics[:2])
            raise UserError(
                f"{named('metrics')} is {self.metrics!r}: expected names, separated by commas, such as {few}"
            )
        return choose_metrics(task, names)
