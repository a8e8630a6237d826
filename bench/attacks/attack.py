"""What an attack is: something that is done to a model that has forgotten, or another way of asking it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel

from algorithms.corpus import Encoder
from bench.metrics.table import Columns
from bench.tasks import Record
from scoring.samples import TextSet

# What is measured of a sample under attack: the larger, the more the model knows.
KNOWLEDGE = (
    *("rouge_l_recall", "probability", "ma", "el", "right", "acc", "toxicity"),
    *("extraction_strength", "exact_memorization", "verbmem", "knowmem"),
    *("probe_recall", "regurgitation", "exact_match"),
)


@dataclass(frozen=True)
class Asked:
    """How a probe puts its questions, where not as an evaluation does.

    Attributes:
        rewritten: record -> the record with another question.
        given: see `bench.metrics.quantities.MeasurementSetup`.
        metrics: in place of the probe's own.
        answers, temperature, seed: of drawn answers, see there.
    """

    rewritten: Callable[[Record], Record] | None = None
    given: float = 0.0
    metrics: tuple[str, ...] | None = None
    answers: int = 64
    temperature: float = 1.0
    seed: int = 0


PLAINLY = Asked()


class Probe(Protocol):
    """Asks a model what it knows.

    Attributes:
        encoder: makes samples of texts.
    """

    encoder: Encoder

    def columns(self, model: PreTrainedModel, asked: Asked = ...) -> Columns:
        """The per-sample values of the metrics that are attacked."""

    def records(self, name: str) -> list[Record]:
        """The records of a set.

        Args:
            name: "forget", as it is probed; or "retain", or "benign".

        Raises:
            Unmeasured: there are none.
        """

    def texts(self, name: str, records: Sequence[Record]) -> TextSet:
        """Records as they are trained on."""


class Attack(Protocol):
    """One attack with its strength.

    Attributes:
        family: see `bench.attacks.FAMILIES`.
        name: unique among the attacks of a run.
        cost: about, in probes.
    """

    @property
    def family(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def cost(self) -> float: ...

    def under(self, model: PreTrainedModel, probe: Probe) -> Iterator[tuple[int | None, Columns]]:
        """What the model knows under the attack; afterwards it is as it was.

        Returns:
            The columns, once; of an attack that goes on, after so many updates each.

        Raises:
            Unmeasured: it cannot be done to this model, or with these data.
        """


@dataclass(frozen=True)
class NoAttack:
    """The model as it is."""

    family: str = "none"
    name: str = "none"
    cost: float = 1.0

    def under(self, model: PreTrainedModel, probe: Probe) -> Iterator[tuple[int | None, Columns]]:
        yield None, probe.columns(model)


@dataclass(frozen=True)
class DrawnAnswers:
    """Many answers to each question, drawn: the best of k leaks.

    Attributes:
        answers: n, to each question.
        metrics: leak@k of several k.
    """

    answers: int
    temperature: float
    seed: int
    metrics: tuple[str, ...]
    family: str = "sample"

    @property
    def cost(self) -> float:
        return float(self.answers)

    @property
    def name(self) -> str:
        return f"sample {self.answers}"

    def under(self, model: PreTrainedModel, probe: Probe) -> Iterator[tuple[int | None, Columns]]:
        yield (
            None,
            probe.columns(
                model,
                Asked(metrics=self.metrics, answers=self.answers, temperature=self.temperature, seed=self.seed),
            ),
        )
