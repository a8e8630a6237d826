"""Per-sample values, from which every metric is formed, and drawing them again for its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scoring.errors import UserError

Column = tuple[str, str]
"""A set of samples and a quantity that each of them has, such as ("forget", "rouge_l_recall")."""


@dataclass(frozen=True)
class Scores:
    """A column's values.

    Attributes:
        ids: N names of samples.
        values: (N,) fp64; nan where the quantity does not exist for a sample.
        texts: what the model wrote, where the quantity is of that.
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
    """One model's columns, and those of the retain-only model where there is one.

    Args:
        columns: of the model.
        retain_only: of the retain-only model; None: there is none.
        rows: set -> positions of the samples to take, (..., n), with repetitions; None: all as they are.
    """

    def __init__(
        self,
        columns: Mapping[Column, Scores | Missing],
        retain_only: Mapping[Column, Scores | Missing] | None = None,
        rows: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._columns, self._retain_only, self._rows = columns, retain_only, rows

    def __call__(self, name: str, quantity: str) -> np.ndarray:
        """(..., n) values of a quantity on the set `name`.

        Raises:
            Unmeasured: it is missing; says why.
        """
        return self._drawn(self._columns, name, quantity)

    def of_retain_only(self, name: str, quantity: str) -> np.ndarray:
        """The same of the retain-only model."""
        if self._retain_only is None:
            raise Unmeasured("needs a retain-only model: name one with --retain-model")
        return self._drawn(self._retain_only, name, quantity)

    def resampled(self, rows: Mapping[str, np.ndarray] | None) -> Measured:
        """The same with other samples of each set; None: all as they are."""
        return Measured(self._columns, self._retain_only, rows)

    def length(self, name: str) -> int:
        """Samples of a set."""
        return next(len(c.ids) for (own, _), c in self._columns.items() if own == name and isinstance(c, Scores))

    def count(self, name: str, quantity: str) -> int:
        """Samples of a column, without those that have no value."""
        return int(np.isfinite(self(name, quantity)).sum())

    def _drawn(self, columns: Mapping[Column, Scores | Missing], name: str, quantity: str) -> np.ndarray:
        column = columns.get((name, quantity), Missing(f"{quantity} was not measured on {name}"))
        if isinstance(column, Missing):
            raise Unmeasured(column.reason)
        return column.values if self._rows is None else column.values[self._rows[name]]
