"""An adaptive search over configurations, which is continued where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from bench.jobs.sweep_plan import SweepPlan
from bench.jobs.trial import Trial
from scoring.errors import UserError
from scoring.files import replacing
from scoring.reading import read_json

# What an adaptive search maximises, and what a configuration is given that has no value: all that have are shares.
OBJECTIVE, WORST = "objective", -1.0


class _Tried(TypedDict):
    values: dict[str, Any]
    objective: float
    reason: str | None


class Search:
    """An adaptive search: what was tried is kept next to the tables.

    Attributes:
        total: how many configurations are to be tried.
    """

    def __init__(self, plan: SweepPlan) -> None:
        self._plan, self._path = plan, plan.out / "search.json"
        self.total = plan.spec.trials or 0
        # Of each configuration its values, the objective, and the reason where its values do not go together.
        expected = "what the search has tried: remove it, and the search begins again with the trials that are there"
        self._tried: list[dict[str, Any]] = (
            read_json(self._path, list[_Tried], expected) if self._path.is_file() else []
        )

    @property
    def folder(self) -> Path:
        """Of the sweep."""
        return self._path.parent

    @property
    def left(self) -> int:
        return self.total - len(self._tried)

    def add(self, values: Mapping[str, Any], objective: float, reason: str | None) -> None:
        self._tried.append({"values": dict(values), OBJECTIVE: objective, "reason": reason})
        with replacing(self._path) as unfinished:
            unfinished.write_text(json.dumps(self._tried, indent=2) + "\n")

    def algorithm(self) -> Any:
        """The search, knowing what was tried.

        Raises:
            UserError: Optuna is not installed.
        """
        try:
            import optuna
        except ImportError:
            raise UserError("search optuna needs the package optuna: pip install 'mrd-bench[optuna]'") from None
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        points = [trial["values"] for trial in self._tried]
        return OptunaSearch(
            # Begun again with the same seed, it would draw the same first points.
            seed=self._plan.spec.seed + 1000 * len(points),
            points_to_evaluate=points or None,
            evaluated_rewards=[trial[OBJECTIVE] for trial in self._tried] or None,
        )

    def trials(self) -> list[Trial]:
        """The trials of all configurations that go together, in the order in which they were tried."""
        sound = [configuration for configuration in self._tried if not configuration["reason"]]
        trials = [trial for configuration in sound for trial in self._plan.trials(configuration["values"])]
        return list({trial.hash: trial for trial in trials}.values())
