"""The metrics of a task under the model that a trial ends with, in the process where it ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from bench.jobs.evaluation_sets import Sets, end_of_answers, sets_of
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.measurement import Measurement
from bench.metrics.table import MODEL, ORIGINAL, RETAIN_ONLY, Columns, metric_value
from bench.metrics.values import Measured, Missing, Scores
from bench.models.find import ModelReference
from bench.tasks.datasets import find_task
from scoring.files import work_folder
from scoring.load import load_model
from scoring.readings import Reader
from scoring.samples import BATCH_TOKENS, default_batch_tokens
from scoring.work import LocalPool


class TrialMetrics:
    """The metrics of a task under models in this process.

    Args:
        spec: what is evaluated.
        model: whose tokenizer the trained models have.
        references: columns of the original and the retain-only model, by role, for metrics that compare.
        device: where a model goes that is loaded here.
    """

    def __init__(
        self, spec: EvaluateSpec, model: ModelReference, references: Mapping[str, Columns], device: str
    ) -> None:
        self._spec, self._model, self._references, self._device = spec, model, references, device
        self._task, self._source = find_task(spec.task)
        self._metrics = spec.metrics_of(self._task)
        self._sets, _ = sets_of(spec, self._task, self._source, {MODEL: model}, self._metrics)

    @property
    def sets(self) -> Sets:
        """The records of the sets that the metrics speak of."""
        return self._sets

    def of(self, trained: PreTrainedModel) -> dict[str, float]:
        """Metric -> value; nan where it cannot be measured."""
        measured = Measured(self.columns(trained), self._of_reference(RETAIN_ONLY).get(RETAIN_ONLY))
        return {name: metric_value(name, measured) for name in self._metrics}

    def columns(
        self,
        trained: PreTrainedModel,
        sets: Sets | None = None,
        metrics: Sequence[str] | None = None,
        how: Mapping[str, Any] | None = None,
    ) -> Columns:
        """The per-sample values that the metrics are formed from.

        Args:
            sets: records in place of those of the task, with the same ids.
            metrics: in place of the evaluation's.
            how: see `Measurement`.
        """
        sets = sets or self._sets
        with work_folder() as folder:
            model = dataclasses.replace(self._model, source="trained", revision=None, loaded=trained)

            @contextmanager
            def reader_of(source: str, revision: str | None) -> Iterator[Reader]:
                read = trained if source == model.source else load_model(source, "float32", self._device)
                end = end_of_answers(self._sets, model.tokenizer, self._spec.chosen_template())
                chosen = self._spec.batch_tokens
                batch_tokens = chosen or default_batch_tokens(self._device)
                yield Reader(LocalPool(read), end, batch_tokens, writing_tokens=4 * (chosen or BATCH_TOKENS))

            def piece(
                key: str, contents: Sequence[Any], measure: Callable[[], tuple[Columns, dict[str, Any]]]
            ) -> Columns:
                return measure()[0] if contents else {}

            measurement = Measurement(
                self._spec,
                self._task,
                self._source,
                {MODEL: model},
                sets,
                metrics or self._metrics,
                reader_of,
                piece,
                folder,
                how=how or {},
            )
            return measurement.columns_of(MODEL, self._of_reference(ORIGINAL))

    def _of_reference(self, role: str) -> dict[str, Columns]:
        """A reference model's columns by role, of the samples that are measured here."""
        if role not in self._references:
            return {}
        ids = {
            name: [record["id"] for record in records]
            for name, records in self._sets.items()
            if not isinstance(records, Missing)
        }
        columns = self._references[role]
        return {role: {key: of_ids(column, ids.get(key[0])) for key, column in columns.items()}}


def of_ids(column: Scores | Missing, ids: Sequence[str] | None) -> Scores | Missing:
    """The values of these samples alone; None: of all."""
    if isinstance(column, Missing) or ids is None:
        return column
    row_of = {name: row for row, name in enumerate(column.ids)}
    rows = [row_of[name] for name in ids]
    texts = tuple(column.texts[row] for row in rows) if column.texts is not None else None
    return Scores(tuple(ids), column.values[rows], texts)
