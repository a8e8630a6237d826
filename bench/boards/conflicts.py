"""What result stores contradict each other in: runs with two results, and experiments with two settings."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from bench.files.status import FINISHED

TOLERANCE = 1e-6  # relative; the same run on another machine differs by rounding


def without_repeats(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Each run of an experiment once, and a message for each run that has different results in two stores."""
    first: dict[tuple[str, str, str], dict[str, Any]] = {}
    contradictions = []
    for row in rows:
        known = first.setdefault((row["task"], row["experiment"], row["run"]), row)
        both_finished = known["status"] == row["status"] == FINISHED
        if known is row or (both_finished and _same_results(known["metrics"], row["metrics"])):
            continue
        if known["status"] != FINISHED and row["status"] == FINISHED:
            first[row["task"], row["experiment"], row["run"]] = row  # it failed first, and was tried again
        elif both_finished:
            contradictions.append(
                f"{row['task']}, {row['experiment']}: run {row['run']} has different results in {known['store']} and "
                f"{row['store']} ({_first_difference(known['metrics'], row['metrics'])})"
            )
    return list(first.values()), contradictions


def _same_results(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return all(
        math.isclose(one[name], other[name], rel_tol=TOLERANCE, abs_tol=TOLERANCE) for name in one.keys() & other.keys()
    )


def _first_difference(one: Mapping[str, float], other: Mapping[str, float]) -> str:
    name = next(name for name in one if name in other and not _same_results({name: one[name]}, {name: other[name]}))
    return f"{name}: {one[name]:.6g} and {other[name]:.6g}"


def conflicting_specs(
    task: str, experiment: str, runs_by_setting: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str | None:
    """A message if two stores have an experiment in different settings, so that their runs cannot be compared.

    One store may hold an experiment in several settings: that is no conflict.
    """
    settings_of_store: defaultdict[str, set[str]] = defaultdict(set)
    for setting, rows in runs_by_setting.items():
        for row in rows:
            settings_of_store[row["store"]].add(setting)
    for (one, settings), (other, other_settings) in combinations(settings_of_store.items(), 2):
        if settings != other_settings:
            differing = (min(settings - other_settings or settings), min(other_settings - settings or other_settings))
            return (
                f"conflicting specs of {task}, {experiment} in {one} and {other}: "
                f"{setting_differences([json.loads(setting) for setting in differing])}: their runs cannot be compared"
            )
    return None


def setting_differences(settings: Sequence[Mapping[str, Any]]) -> str:
    """The fields in which settings differ, each with its values: "el_n 5 and 10"."""
    flat_settings = [_flattened(setting) for setting in settings]
    fields = dict.fromkeys(field for setting in flat_settings for field in setting)
    differing = [field for field in fields if len({str(setting.get(field)) for setting in flat_settings}) > 1]
    return "; ".join(
        f"{field} {' and '.join(shortened(setting.get(field)) for setting in flat_settings)}" for field in differing
    )


def _flattened(setting: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of nested mappings as "outer.inner"."""
    fields: dict[str, Any] = {}
    for name, value in setting.items():
        fields |= _flattened(value, f"{name}.") if isinstance(value, dict) else {prefix + name: value}
    return fields


def shortened(value: Any) -> str:
    """A value of a spec in at most 24 letters."""
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:16]}…"


def canonical_json(value: Any) -> str:
    """One text for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True)
