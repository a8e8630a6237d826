"""Schedules: parts of the forget set, from easy to hard, each forgotten in its own way.

    by: flip-time
    groups:
      - {share: 0.5, algorithm: GA, forget_weight: 0.5}
      - {share: 0.5, algorithm: NPO, settings: {beta: 0.1}}

Who belongs to which group is decided once, on the initial model. The retain term stays that of the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np

from algorithms.ease import FLIP_TIME, SOURCES, check_source
from algorithms.objectives import ALGORITHMS, algorithm_name, find_algorithm, inputs_of, with_settings
from scoring.errors import UserError
from scoring.settings import Doc, Expected, Ge, Gt, Known, Le, build, current_naming, named, naming


def _algorithms() -> Iterable[str]:
    return ALGORITHMS


@dataclass(frozen=True, kw_only=True)
class ForgetGroup:
    """A part of the forget set that is forgotten in its own way."""

    share: Annotated[float, Gt(0), Le(1), Doc("of the forget samples; those of all groups add up to 1")]
    algorithm: Annotated[str | None, Known(_algorithms), Doc("whose forget term (default: the run's)")] = None
    settings: Annotated[dict[str, float], Doc("of the objective (default: the run's, or those of algorithm)")] = field(
        default_factory=dict
    )
    forget_weight: Annotated[float | None, Ge(0), Doc("factor of the forget term (default: the run's)")] = None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which forget samples are forgotten in which way."""

    groups: Annotated[list[dict[str, Any]], Doc("settings of a group each, see the next table; from easy to hard")]
    by: Annotated[str, Expected(SOURCES), Doc("what is easy: flip-time, mrd or a file, as for weights")] = FLIP_TIME

    def forget_groups(self) -> list[ForgetGroup]:
        return [ForgetGroup(**fields) for fields in self.groups]


def resolved_schedule(
    fields: Mapping[str, Any], algorithm: str, settings: Mapping[str, float], forget_weight: float | None
) -> Schedule:
    """A schedule with its defaults filled in.

    Args:
        fields: as a spec file has them.
        algorithm, settings, forget_weight: of the run.

    Raises:
        UserError: a value that is not allowed, shares that do not add up to 1, or an algorithm that trains other
            weights than the others do.
    """
    schedule = build(Schedule, fields)
    check_source("by", schedule.by)
    groups = []
    for number, values in enumerate(schedule.groups):
        with naming(current_naming().under("groups", number)):
            group = build(ForgetGroup, values)
            own = group.settings or (settings if group.algorithm is None else {})
            group = dataclasses.replace(
                group,
                algorithm=algorithm_name(group.algorithm or algorithm),
                settings=dict(own),
                forget_weight=forget_weight if group.forget_weight is None else group.forget_weight,
            )
            objective = find_algorithm(group.algorithm or "").forget
            with_settings(objective, group.settings)
            if "hidden" in inputs_of(objective):
                raise UserError(
                    f"{named('algorithm')} is {group.algorithm}, which trains a few layers only: expected another in "
                    "a schedule"
                )
            groups.append(group)
    if abs(sum(group.share for group in groups) - 1) > 1e-6:
        raise UserError(
            f"{named('groups')} have shares {', '.join(f'{group.share:g}' for group in groups) or 'of none'}: expected "
            "them to add up to 1"
        )
    return Schedule(groups=[dataclasses.asdict(group) for group in groups], by=schedule.by)


def groups_of_samples(ease: np.ndarray, shares: Sequence[float]) -> list[int]:
    """The number of each sample's group, N of them.

    Args:
        ease: (N,), greater for easier samples; ties by position.
        shares: of the groups, from easy to hard.
    """
    place = np.empty(len(ease), dtype=int)
    place[np.argsort(-ease, kind="stable")] = np.arange(len(ease))
    ends = np.round(np.cumsum(shares) * len(ease))
    groups: list[int] = np.searchsorted(ends[:-1], place, side="right").tolist()
    return groups
