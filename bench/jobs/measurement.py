"""What an evaluation asks of a model: columns of per-sample values, by way of its replicas."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench.jobs.evaluation_sets import Sets
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.relearn import taught_again
from bench.metrics import METRICS
from bench.metrics.harness import HARNESS, pool_model, run_harness
from bench.metrics.quantities import QUANTITIES, MeasurementSetup, measure, tokens_to_read
from bench.metrics.relearning import RELEARNING, forgotten, nothing_relearned, relearned
from bench.metrics.similarity import Embedder
from bench.metrics.table import MODEL, ORIGINAL, Columns
from bench.metrics.toxicity import Classifier
from bench.metrics.values import Missing, Scores
from bench.models.find import ModelReference
from bench.tasks import Task
from scoring.engine import Engine
from scoring.errors import UserError
from scoring.readings import Reader
from scoring.samples import NO_LIMIT

# How much it scores at once under a model that does not say how much it can read: its own default.
HARNESS_CONTEXT = 2048
RIGHT, FORGOTTEN, RELEARNED = (("forget", quantity) for quantity in ("right", *RELEARNING))


# Key, contents and measurement -> columns: those that the measurement gives, or gave when it was asked before. A
# measurement gives columns, and facts to be recorded with them.
Piece = Callable[[str, Sequence[Any], Callable[[], tuple[Columns, dict[str, Any]]]], Columns]


@dataclass
class Measurement:
    """The measurements of one evaluation.

    Attributes:
        spec, task, source: what is evaluated, and where its data are.
        models, sets: by role, and by name.
        metrics: names.
        reader_of: the replicas of a model, by its source and revision.
        piece: keeps what was measured; pieces are few.
        folder: to work in.
        engine: that computes the models.
        how: further fields of MeasurementSetup: how questions are put where they are not put plainly.
    """

    spec: EvaluateSpec
    task: Task
    source: str | None
    models: Mapping[str, ModelReference]
    sets: Sets
    metrics: Sequence[str]
    reader_of: Callable[[str, str | None], AbstractContextManager[Reader]]
    piece: Piece
    folder: Path
    engine: Engine = "transformers"
    how: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec, task = self.spec, self.task
        # The models share a tokenizer, and what does not fit into one is put to none.
        self.setup = MeasurementSetup(
            self.models[MODEL].tokenizer,
            min(model.max_length for model in self.models.values()),
            spec.new_tokens or task.new_tokens,
            spec.min_k,
            spec.el_n,
            _embedder(spec.sentence_model),
            _classifier(spec.toxicity_model or task.toxicity_model, spec.toxicity_label),
            spec.chosen_template(),
            self.engine,
            **self.how,
        )

    def _answers_asked(self) -> list[tuple[str, str]]:
        """The columns that are measured of a model's answers."""
        needed = list(dict.fromkeys(column for name in self.metrics for column in METRICS[name].columns))
        answers = [column for column in needed if column[1] in QUANTITIES]
        if any(quantity in RELEARNING for _, quantity in needed):
            answers.append(RIGHT)
        return answers

    def tokens_to_read(self) -> float:
        """About how many tokens a model has to read, see there; benchmarks and relearning are not foreseen."""
        return tokens_to_read(self._answers_asked(), self.sets, self.setup)

    def columns_of(self, role: str, earlier: Mapping[str, Columns]) -> Columns:
        """All columns of one model.

        Args:
            role: of the model.
            earlier: columns of the models that were measured before it, by role.
        """
        needed = list(dict.fromkeys(column for name in self.metrics for column in METRICS[name].columns))
        relearning = any(quantity in RELEARNING for _, quantity in needed)
        answers = self._answers_asked()
        benchmarks = list(dict.fromkeys(name for name, quantity in needed if quantity in HARNESS))
        model = self.models[role]
        with self.reader_of(model.source, model.revision) as reader:
            reader.about = f"{role}, "
            columns = self.piece(
                f"{role}-answers", answers, lambda: (measure(answers, self.sets, reader, self.setup), {})
            )
            columns |= self.piece(f"{role}-benchmarks", benchmarks, lambda: self._benchmarks(reader, benchmarks))
        if relearning:
            known = None if role == ORIGINAL else earlier.get(ORIGINAL, {}).get(RIGHT)
            columns |= self.piece(
                f"{role}-relearning", RELEARNING, lambda: (self._relearning(role, columns, known), {})
            )
        return columns

    def _benchmarks(self, reader: Reader, names: Sequence[str]) -> tuple[Columns, dict[str, Any]]:
        """The columns of lm-evaluation-harness, and the versions of its tasks."""
        tasks = self.task.harness(self.source)
        absent = {
            name: Missing(f"task {self.task.name!r} has no benchmark for {name}") for name in names if name not in tasks
        }
        folder = self.spec.harness_tasks
        context = self.setup.max_length if self.setup.max_length < NO_LIMIT else HARNESS_CONTEXT
        try:
            # What vLLM predicts it has to read: a window has its last token in the context.
            spare = 1 if self.engine == "vllm" else 0
            lm = pool_model(reader, self.setup.tokenizer, context - spare, template=self.setup.template)
        except UserError as error:  # the harness is not installed, or cannot handle this tokenizer
            return {(name, quantity): Missing(str(error)) for name in names for quantity in HARNESS}, {}
        present = {name: tasks[name] for name in names if name in tasks}
        tasks_folder = Path(folder) if folder else None
        as_turns = self.setup.template is not None
        results = run_harness(lm, present, tasks_folder, self.spec.harness_limit, as_turns)
        columns: Columns = {}
        versions: dict[str, Any] = {}
        for name, scores in {**absent, **results}.items():
            if isinstance(scores, Missing):
                columns |= {(name, quantity): scores for quantity in HARNESS}
                continue
            versions[name] = scores.tasks
            quantity = "acc" if scores.metric == "acc" else "log_likelihood"
            columns[name, quantity] = Scores(tuple(scores.ids), scores.values)
            columns[name, "words"] = Scores(tuple(scores.ids), scores.weights)
        return columns, versions

    def _relearning(self, role: str, columns: Columns, known: Scores | Missing | None) -> Columns:
        """Which samples the model has forgotten, and which come back when it is taught some of them again.

        Args:
            known: FA's column of the original model; None: everything was known.
        """
        right = columns[RIGHT]
        missing = next((column for column in (right, known) if isinstance(column, Missing)), None)
        if missing is not None:
            return {("forget", quantity): missing for quantity in RELEARNING}
        assert isinstance(right, Scores)
        assert not isinstance(known, Missing)
        # The original model has forgotten nothing.
        gone = forgotten(right, right if role == ORIGINAL else known)
        if not gone.values.any():
            return {FORGOTTEN: gone, RELEARNED: nothing_relearned(gone)}
        records = self.sets["forget"]
        assert not isinstance(records, Missing)
        folder = self.folder / f"{role}-relearning"
        model = self.models[role]
        source = model.source
        if model.loaded is not None:
            # It is trained further from a folder, and stays as it is.
            source = str(folder / "model")
            model.loaded.save_pretrained(source)
            model.tokenizer.save_pretrained(source)
        taught = taught_again(source, records, self.spec.relearning(), folder, progress=False)
        with self.reader_of(str(taught), None) as reader:
            reader.about = f"{role}, taught again, "
            right_again = measure([RIGHT], self.sets, reader, self.setup)[RIGHT]
        shutil.rmtree(folder)
        if isinstance(right_again, Missing):
            return {("forget", quantity): right_again for quantity in RELEARNING}
        return {FORGOTTEN: gone, RELEARNED: relearned(gone, right_again)}


# Loaded once in a process: trials of a sweep measure one model after the other.
_embedder, _classifier = lru_cache(maxsize=1)(Embedder), lru_cache(maxsize=1)(Classifier)
