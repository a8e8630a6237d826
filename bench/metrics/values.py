"""Per-sample values, from which every metric is formed, and drawing them again for its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scoring.errors import UserError
from scoring.settings import named

Column = tuple[str, str]
"""A set of samples and a quantity that each of them has, such as ("forget", "rouge_l_recall")."""


@dataclass(frozen=True)
class Scores:
    """The values of a column.

    Attributes:
        ids: of the N samples.
        values: (N,) fp64; nan where the quantity does not exist for a sample.
        texts: what the model wrote, where the quantity judges that.
    """

    ids: tuple[str, ...]
    values: np.ndarray
    texts: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Missing:
    """Why something could not be measured."""

    reason: str


class Unmeasured(UserError):
    """A column that a metric needs is missing."""


class Measured:
    """The columns of one model, and those of the retain-only model where there is one.

    Args:
        columns: of the model.
        retain_only: of the retain-only model; None: there is none.
        rows: set -> positions of the samples to take, (..., n), with repetitions; None: every sample once.
    """

    def __init__(
        self,
        columns: Mapping[Column, Scores | Missing],
        retain_only: Mapping[Column, Scores | Missing] | None = None,
        rows: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._columns, self._retain_only, self._rows = columns, retain_only, rows

    def __call__(self, set_name: str, quantity: str) -> np.ndarray:
        """The values of a quantity on a set, (..., n).

        Raises:
            Unmeasured: they are missing; the message says why.
        """
        return self._values(self._columns, set_name, quantity)

    def of_retain_only(self, set_name: str, quantity: str) -> np.ndarray:
        """The same of the retain-only model."""
        if self._retain_only is None:
            raise Unmeasured(f"needs a retain-only model: name one with {named('retain_model')}")
        return self._values(self._retain_only, set_name, quantity)

    def resampled(self, rows: Mapping[str, np.ndarray] | None) -> Measured:
        """The same columns with other samples of each set; None: every sample once."""
        return Measured(self._columns, self._retain_only, rows)

    def length(self, set_name: str) -> int:
        """How many samples a set has."""
        columns = (scores for (name, _), scores in self._columns.items() if name == set_name)
        return next(len(scores.ids) for scores in columns if isinstance(scores, Scores))

    def count(self, set_name: str, quantity: str) -> int:
        """How many samples of a column have a value."""
        return int(np.isfinite(self(set_name, quantity)).sum())

    def _values(self, columns: Mapping[Column, Scores | Missing], set_name: str, quantity: str) -> np.ndarray:
        scores = columns.get((set_name, quantity), Missing(f"{quantity} was not measured on {set_name}"))
        if isinstance(scores, Missing):
            raise Unmeasured(scores.reason)
        return scores.values if self._rows is None else scores.values[self._rows[set_name]]
