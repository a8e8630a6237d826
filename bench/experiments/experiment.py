"""What an experiment is: a question of the paper, a spec for each scale, and an answer computed from the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import pyarrow as pa

from bench.jobs.resources import SweepResources
from bench.jobs.sweep import sweep
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.sweep_tables import SweepResult
from bench.report.figures import Draw
from scoring.settings import Naming, build, naming

T = TypeVar("T")


@runtime_checkable
class Checked(Protocol):
    """Settings with checks of their own."""

    def checked(self) -> Any:
        """The same, or a UserError."""


@dataclass(frozen=True)
class Setting:
    """What an experiment is given.

    Attributes:
        name: of the experiment.
        values: the preset's section of its spec file.
        names: how messages call the values.
        work: a folder of its own for what it measures on the way; what is there already is not measured again.
        trials: the folder of trials that all sweeps share.
        resources: of trials, and of replicas.
        progress: show bars.
    """

    name: str
    values: Mapping[str, Any]
    names: Naming
    work: Path
    trials: Path
    resources: SweepResources
    progress: bool = True

    def sweep(self, key: str = "sweep", resources: SweepResources | None = None) -> SweepResult:
        """The sweep that the spec file describes under `key`, run or found."""
        with naming(self.names.under(key)):
            spec = build(SweepSpec, self.values[key])
            return sweep(spec, self.work / key, self.trials, resources or self.resources, self.progress)

    def spec(self, kind: type[T], key: str) -> T:
        """What the spec file says under `key`, as a dataclass of its own."""
        with naming(self.names.under(key)):
            spec = build(kind, self.values.get(key, {}))
            return spec.checked() if isinstance(spec, Checked) else spec


@dataclass(frozen=True)
class Answer:
    """What an experiment found.

    Attributes:
        table: one row for what the picture shows, with the numbers behind it.
        panels: of the picture, from left to right.
        sentences: the answer, each number with its interval; the last says whether the paper's claim holds here.
        polar: whether the panels have a centre and angles.
        inches: of the picture; None: 5 by 5 for each panel.
        tables: further tables by name.
    """

    table: pa.Table
    panels: Sequence[Draw]
    sentences: Sequence[str]
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
        claim: what the paper says, in one sentence.
        run: answers it.
    """

    name: str
    title: str
    question: str
    claim: str
    run: Callable[[Setting], Answer]
