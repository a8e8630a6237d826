"""What a command would do, found out without doing it: `--dry-run`.

Data and models are read as the command reads them, so that whatever it would refuse before it computes is refused here,
by the same code. Nothing is written, and Ray is not started.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.files.parts import Parts
from bench.models.find import ModelReference
from scoring.sample_file import SampleFile
from scoring.samples import Sample

NEW, DONE = "new", "done already: the command has nothing to do"


@dataclass(frozen=True)
class SetSize:
    """A set of samples.

    Attributes:
        name: such as "forget".
        samples, rejected: how many can be used, and cannot.
        tokens, scored: of a sample, on average.
        longest: tokens of the longest.
    """

    name: str
    samples: int
    rejected: int
    tokens: float
    scored: float
    longest: int

    @classmethod
    def of(cls, name: str, samples: Sequence[Sample] | SampleFile, rejected: int = 0) -> SetSize:
        """The size of at least one sample."""
        each = (samples[row] for row in range(len(samples)))
        counts = np.array([(sample.length, sample.num_scored) for sample in each])
        tokens, scored = counts.mean(axis=0).tolist()
        return cls(name, len(samples), rejected, tokens, scored, int(counts[:, 0].max()))


@dataclass(frozen=True)
class Preview:
    """What a command would do.

    Attributes:
        spec: what it would do, checked.
        identity: of that, with its "spec_hash".
        state: of its output, in words.
        model: that it would load.
        sets: the samples, by set.
        counts: further numbers, by what they count.
        resources: how the work would be spread; None: the spec says it.
        settings: what a spec file has to say for the same; None: all of spec and resources.
    """

    spec: Any
    identity: Mapping[str, Any]
    state: str
    model: ModelReference
    sets: tuple[SetSize, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    resources: Any = None
    settings: Mapping[str, Any] | None = None

    def as_settings(self) -> dict[str, Any]:
        """What a spec file has to say, by name: every setting, with its value."""
        if self.settings is not None:
            return dict(self.settings)
        return dataclasses.asdict(self.spec) | (dataclasses.asdict(self.resources) if self.resources else {})


def state_of(parts: Parts, is_finished: bool) -> str:
    """The state of a file that is put together from parts.

    Raises:
        UserError: the command would be refused.
    """
    if is_finished:
        return DONE
    finished = parts.check()
    return f"would continue: {finished} finished pieces are there" if finished else NEW
