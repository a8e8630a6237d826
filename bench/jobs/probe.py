"""What attacks ask of a model, in the process where the model is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from algorithms.corpus import Encoder
from bench.attacks import PLAINLY, Asked, Attack
from bench.jobs.evaluation_sets import Sets, with_ids
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.trial_metrics import TrialMetrics, of_ids
from bench.jobs.unlearn import encoder_of
from bench.metrics import METRICS
from bench.metrics.harness import HARNESS
from bench.metrics.table import Columns
from bench.metrics.values import Missing, Unmeasured
from bench.models.find import ModelReference
from bench.tasks import Record
from bench.tasks.datasets import find_task, load_dataset
from scoring.engine import Replica
from scoring.errors import UserError
from scoring.eval_mode import in_eval_mode
from scoring.records import as_text
from scoring.samples import Batch, TextSet

# Sets of general knowledge, which every model of a task has.
GENERAL = ("real_authors", "world_facts")


@dataclass(frozen=True)
class Questions:
    """What a probe asks: picklable, so that it goes with a task to a replica.

    Attributes:
        evaluation: whose metrics are asked for, checked.
        model: whose tokenizer the attacked models have.
        benign: data file of benign texts; None: the task's general knowledge.
    """

    evaluation: EvaluateSpec
    model: ModelReference
    benign: str | None = None


class TaskProbe:
    """A probe of a task, see `bench.attacks.Probe`.

    Args:
        device: where models go.
    """

    def __init__(self, questions: Questions, device: str) -> None:
        self._questions = questions
        self.encoder: Encoder = encoder_of(questions.model)
        self._metrics = TrialMetrics(questions.evaluation, questions.model, {}, device)

    def columns(self, model: PreTrainedModel, asked: Asked = PLAINLY) -> Columns:
        names = asked.metrics or self._questions.evaluation.metrics_of(find_task(self._questions.evaluation.task)[0])
        if asked.rewritten is not None or asked.given:
            for name in names:
                if any(quantity in HARNESS for _, quantity in METRICS[name].columns):
                    raise Unmeasured(
                        f"the questions of {name} are lm-evaluation-harness's, and cannot be put otherwise"
                    )
        how: dict[str, Any] = {
            "answers_drawn": asked.answers,
            "temperature": asked.temperature,
            "seed": asked.seed,
            "given": asked.given,
        }
        with in_eval_mode(model):
            return self._metrics.columns(model, self._rewritten(asked), names, how)

    def _rewritten(self, asked: Asked) -> Sets | None:
        if asked.rewritten is None:
            return None
        return {
            name: records if isinstance(records, Missing) else [asked.rewritten(record) for record in records]
            for name, records in self._metrics.sets.items()
        }

    def records(self, name: str) -> list[Record]:
        spec = self._questions.evaluation
        if name == "forget":
            return self._forget()
        task, source = find_task(spec.task)
        split = spec.split or task.default_split
        if name == "retain":
            return with_ids(task.load(task.retain_of[split], source, self.encoder.tokenizer))
        if self._questions.benign is not None:
            return with_ids(load_dataset(self._questions.benign).records)
        splits = task.evaluation(split)
        general = [splits[name] for name in GENERAL if name in splits]
        if not general:
            raise Unmeasured(f"task {task.name!r} has no set of general knowledge: name a data file with --benign")
        try:
            return with_ids([record for part in general for record in task.load(part, source, self.encoder.tokenizer)])
        except UserError as error:
            raise Unmeasured(str(error)) from None

    def _forget(self) -> list[Record]:
        """The records that are probed; of a task that asks other questions than it forgets, its forget set."""
        records = self._metrics.sets.get("forget")
        if isinstance(records, Missing):
            raise Unmeasured(records.reason)
        if records is not None:
            return records
        spec = self._questions.evaluation
        task, source = find_task(spec.task)
        return with_ids(task.load(spec.split or task.default_split, source, self.encoder.tokenizer))

    def texts(self, name: str, records: Sequence[Record]) -> TextSet:
        template = self._questions.evaluation.chosen_template()
        return TextSet(
            name, [as_text(name, number, record, template) for number, record in enumerate(records, start=1)]
        )


# Of the last questions that were asked in this process.
_PROBES: dict[str, TaskProbe] = {}

Measured = list[tuple[int | None, Columns]]


@dataclass(frozen=True)
class AttackTask:
    """An attack on a replica's model, which is afterwards as it was."""

    shard: int
    attack: Attack
    questions: Questions

    @property
    def key(self) -> str:
        return f"attack-{self.shard:06d}"

    def do(self, replica: Replica, batches: Sequence[Batch], cache: dict[str, Any]) -> Measured | Missing:
        """The columns after so many updates each, or why there are none."""
        model: PreTrainedModel = replica.model  # type: ignore[attr-defined]
        return measured_under(self.attack, model, probe_of(self.questions, str(model.device.type)))


def probe_of(questions: Questions, device: str) -> TaskProbe:
    """The probe of these questions, made once in a process."""
    model = questions.model
    key = f"{questions.evaluation!r} {model.fingerprint} {model.max_length} {questions.benign} {device}"
    if key not in _PROBES:
        _PROBES.clear()
        _PROBES[key] = TaskProbe(questions, device)
    return _PROBES[key]


def measured_under(attack: Attack, model: PreTrainedModel, probe: TaskProbe) -> Measured | Missing:
    """What a model knows under an attack; afterwards it is as it was."""
    try:
        return list(attack.under(model, probe))
    except Unmeasured as error:
        return Missing(str(error))


def only(columns: Columns, ids: Sequence[str], set_name: str) -> Columns:
    """The columns of some of the samples of a set."""
    chosen = set(ids)
    kept: Columns = {}
    for column, scores in columns.items():
        if column[0] != set_name or isinstance(scores, Missing):
            kept[column] = scores
            continue
        kept[column] = of_ids(scores, [name for name in scores.ids if name in chosen])
    return kept
