"""What an experiment is: a question of the paper, a spec for each scale, and an answer computed from the data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import pyarrow as pa

from algorithms.stopping import PAPER
from bench.jobs.resources import SweepResources
from bench.jobs.sweep import sweep
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.sweep_tables import SweepResult
from bench.report.figures import Draw
from bench.stats.verdicts import Verdict
from scoring.errors import UserError, expected_one_of
from scoring.settings import Naming, build, naming

T = TypeVar("T")


@runtime_checkable
class Checked(Protocol):
    """Settings that check themselves."""

    def checked(self) -> Any:
        """The same settings.

        Raises:
            UserError: a value or a combination that is not allowed.
        """


@dataclass(frozen=True)
class Setup:
    """What an experiment is run with.

    Attributes:
        name: of the experiment.
        values: the preset's section of the spec file.
        names: how messages call the values.
        work: the experiment's own folder for its measurements; what is in it is not measured again.
        trials: the folder of trials that all sweeps share.
        resources: of trials, and of replicas.
        progress: show bars.
        stand_ins: what stands for "{name}" in the values: a model's folder, a task, ...; the values themselves go into
            records as they are.
    """

    name: str
    values: Mapping[str, Any]
    names: Naming
    work: Path
    trials: Path
    resources: SweepResources
    progress: bool = True
    stand_ins: Mapping[str, str] = field(default_factory=dict)

    def filled(self, key: str) -> Any:
        """The values under `key`, with what stands for their names; {} where there are none."""
        return _filled(self.values.get(key, {}), self.stand_ins)

    def sweep(self, key: str = "sweep", resources: SweepResources | None = None) -> SweepResult:
        """The sweep that the spec file describes under `key`; trials that have been run before are read."""
        with self.section(key):
            spec = build(SweepSpec, self.filled(key))
            # Experiments are the paper's, and so is their stopping rule, unless the spec says otherwise.
            spec = dataclasses.replace(spec, base={"stopping": PAPER, "check_every": 1} | spec.base)
            return sweep(spec, self.work / key, self.trials, resources or self.resources, self.progress)

    def sweep_keys(self) -> list[str]:
        """The sections of the spec file that are sweeps, in order: algorithms may need different settings."""
        return [key for key in self.values if key.startswith("sweep")]

    def spec(self, kind: type[T], key: str) -> T:
        """The settings in the spec file under `key`, checked."""
        with self.section(key):
            spec = build(kind, self.filled(key))
            return spec.checked() if isinstance(spec, Checked) else spec

    def margins(self, *effects: str) -> Mapping[str, float]:
        """The smallest effects that matter, as the spec file has them under `margins`.

        Args:
            effects: the names that must be there.

        Raises:
            UserError: one is missing, unknown, or not a number of at least 0.
        """
        margins = self.values.get("margins", {})
        names = self.names.under("margins")
        if not isinstance(margins, dict):
            raise UserError(f"{names.start()}expected a mapping: effect -> the smallest that matters")
        for name in (*effects, *margins):
            margin = margins.get(name)
            if name not in effects:
                raise UserError(f"{names.start(name)}unknown effect {name!r}: {expected_one_of(name, effects)}")
            if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < math.inf:
                raise UserError(
                    f"{names.start(name)}{name} is {'missing' if margin is None else margin!r}: expected the smallest "
                    "effect that matters, a number of at least 0"
                )
        return margins

    def section(self, key: str) -> AbstractContextManager[None]:
        """A context in which messages name settings of the section `key`, with their lines in the spec file."""
        return naming(self.names.under(key))


def _filled(value: Any, stand_ins: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _filled(each, stand_ins) for name, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, stand_ins) for each in value]
    if isinstance(value, str) and value[:1] == "{" and value[-1:] == "}":
        return stand_ins.get(value[1:-1], value)
    return value


@dataclass(frozen=True)
class Answer:
    """An experiment's answer to its question.

    Attributes:
        table: the numbers behind the picture.
        panels: of the picture, from left to right.
        sentences: the answer, each number with its interval.
        verdicts: on the paper's claims.
        polar: the panels have a centre and angles.
        inches: width and height of the picture; None: 5 by 5 for each panel.
        tables: further tables by name.
    """

    table: pa.Table
    panels: Sequence[Draw]
    sentences: Sequence[str]
    verdicts: Sequence[Verdict] = ()
    polar: bool = False
    inches: tuple[float, float] | None = None
    tables: Mapping[str, pa.Table] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A question and how it is answered.

    Attributes:
        name: as on the command line, such as "fig2".
        title: a few words.
        question: in one sentence.
        claim: the paper's answer, in one sentence.
        run: gives the answer of this code.
        on_model: the values of a preset, a model, data and split -> values for those, where it can be run on any; None
            where it cannot.
    """

    name: str
    title: str
    question: str
    claim: str
    run: Callable[[Setup], Answer]
    on_model: Callable[[Mapping[str, Any], str, str, str | None], dict[str, Any]] | None = None
