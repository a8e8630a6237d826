"""The table of attacks: what each model knows under each attack, and how much of that is the attack's own doing.

    level       rows
    metric      a metric of a model under an attack, with its interval
    difference  model - retain-only, under the same attack: what is left of what was to be forgotten
    recovered   a metric under the attack less the same without it, of each model
    excess      what the model recovers beyond what the retain-only model "recovers", which never knew it
    area        of an attack that goes on: the metric's mean over the updates, from none to the last
    half        the updates after which half of what was lost is back; missing where it does not come back
    back        share of the forgotten samples that are known again: known is a value of .5 or more of `name`, and
                forgotten is known by the original model (if there is one) and not by this one without attack
    worst       the attack under which most is known, and what is known then
    sample      every sample's value

All intervals are 95 %, by bootstrap over samples, which are the same for all models and attacks. Of a relearning attack
that is taught a part of the forget set, the rows of `NAME (untaught)` are of the others alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from bench.attacks import Attack
from bench.jobs.probe import Measured as Points
from bench.jobs.probe import only
from bench.metrics import METRICS, knowledge_sign
from bench.metrics.table import MODEL, ORIGINAL, RETAIN_ONLY, Columns, estimated, sample_rows
from bench.metrics.values import Column, Measured, Missing, Scores, Unmeasured
from bench.stats.estimates import mean, over_sets

# A sample is known with this value or more.
KNOWN = 0.5
# The quantities whose samples can be called known or forgotten.
TELLS = ("rouge_l_recall", "ma", "probability")
UNTAUGHT = " (untaught)"
SCHEMA = pa.schema(
    [
        ("level", pa.string()),
        ("attack", pa.string()),
        ("family", pa.string()),
        ("updates", pa.int64()),
        ("model", pa.string()),
        ("name", pa.string()),
        ("set", pa.string()),
        ("sample_id", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("samples", pa.int64()),
        ("missing", pa.string()),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True)
class Met:
    """An attack that a model has met.

    Attributes:
        attack: which.
        measured: its columns after so many updates each, or why there are none.
        untaught: samples of the forget set that it has not trained on, where it trained on the others.
    """

    attack: Attack
    measured: Points | Missing
    untaught: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """One attack of all models, of all samples or of some.

    Attributes:
        points: role -> updates -> columns.
        without: role -> the columns of the same samples without attack.
    """

    attack: str
    family: str
    points: dict[str, dict[int | None, Columns]]
    without: dict[str, Columns]
    missing: dict[str, str]


def attack_table(metrics: Sequence[str], met: Mapping[str, Sequence[Met]], seed: int) -> pa.Table:
    """The table, see above.

    Args:
        metrics: that were attacked.
        met: by role, the attacks in one order; the first is none.
        seed: of the bootstrap.
    """
    parts = list(_parts(met))
    rows: list[dict[str, Any]] = []
    for part in parts:
        names = list(dict.fromkeys([*metrics, *_own_metrics(part)]))
        rows += _metric_rows(part, names, seed)
        rows += _curve_rows(part, metrics, seed)
        rows += _back_rows(part)
    rows += _worst_rows(rows, metrics)
    return pa.concat_tables([pa.Table.from_pylist(rows, SCHEMA), *(_sample_table(met))])


def _parts(met: Mapping[str, Sequence[Met]]) -> Iterator[_Part]:
    none = {role: _columns(attacks[0]) for role, attacks in met.items()}
    for place, one in enumerate(met[MODEL]):
        of_all = {role: attacks[place] for role, attacks in met.items()}
        missing = {role: each.measured.reason for role, each in of_all.items() if isinstance(each.measured, Missing)}
        points = {role: dict(each.measured) for role, each in of_all.items() if not isinstance(each.measured, Missing)}
        yield _Part(one.attack.name, one.attack.family, points, none, missing)
        if one.untaught:
            yield _Part(
                one.attack.name + UNTAUGHT,
                one.attack.family,
                {
                    role: {updates: only(columns, one.untaught, "forget") for updates, columns in of_role.items()}
                    for role, of_role in points.items()
                },
                {role: only(columns, one.untaught, "forget") for role, columns in none.items()},
                missing,
            )


def _columns(met: Met) -> Columns:
    if isinstance(met.measured, Missing):
        raise Unmeasured(met.measured.reason)
    return met.measured[0][1]


def _own_metrics(part: _Part) -> list[str]:
    """Metrics that an attack measures beside those of all."""
    columns: set[Column] = set()
    for of_role in part.points.values():
        columns |= {column for each in of_role.values() for column in each}
    return [name for name in METRICS if name.startswith("leak_at_") and set(METRICS[name].columns) <= columns]


def _metric_rows(part: _Part, names: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    base = {"attack": part.attack, "family": part.family}
    for role, reason in part.missing.items():
        yield from ({**base, "level": "metric", "model": role, "name": name, "missing": reason} for name in names)
    for role, points in part.points.items():
        without = Measured(part.without[role])
        for updates, columns in points.items():
            at = {**base, "updates": updates, "model": role}
            for name in names:
                if not set(METRICS[name].columns) <= set(columns):
                    continue
                now = Measured(columns)
                yield {**at, "level": "metric", "name": name, **estimated(name, [(1, now)], seed)}
                had = set(METRICS[name].columns) <= set(part.without[role])
                if had and part.attack != "none":
                    terms = [(1, now), (-1, without)]
                    yield {**at, "level": "recovered", "name": name, **estimated(name, terms, seed)}
                if role != MODEL or updates not in part.points.get(RETAIN_ONLY, {}):
                    continue
                never = Measured(part.points[RETAIN_ONLY][updates])
                between = {**at, "model": f"{MODEL} - {RETAIN_ONLY}"}
                yield {**between, "level": "difference", "name": name, **estimated(name, [(1, now), (-1, never)], seed)}
                if had and part.attack != "none":
                    never_without = Measured(part.without[RETAIN_ONLY])
                    terms = [(1, now), (-1, without), (-1, never), (1, never_without)]
                    yield {**between, "level": "excess", "name": name, **estimated(name, terms, seed)}


# --- Attacks that go on -------------------------------------------------------------------------------------


def _curve_rows(part: _Part, metrics: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    for role, points in part.points.items():
        for name in metrics:
            updates = [at for at, columns in points.items() if at is not None and _all_there(name, columns)]
            if len(updates) < 2:
                continue
            at = {"attack": part.attack, "family": part.family, "updates": updates[-1], "model": role, "name": name}
            try:
                curve = _Curve.of(name, part, role, updates)
            except Unmeasured:
                continue
            area = over_sets(lambda rows, curve=curve: curve.area(rows[0]), [curve.count], seed=seed)  # type: ignore[misc]
            yield {**at, "level": "area", **_fields(area.value, area.low, area.high, curve.count)}
            if role == ORIGINAL or ORIGINAL not in part.points:
                continue
            half = over_sets(lambda rows, curve=curve: curve.half(rows[0]), [curve.count], seed=seed)  # type: ignore[misc]
            if math.isfinite(half.value):
                yield {**at, "level": "half", **_fields(half.value, half.low, half.high, curve.count)}
            else:
                reason = f"not within {updates[-1]} updates" if curve.has_lost() else "nothing was lost"
                yield {**at, "level": "half", "missing": reason}


def _all_there(name: str, columns: Columns) -> bool:
    return all(isinstance(columns.get(column), Scores) for column in METRICS[name].columns)


@dataclass(frozen=True)
class _Curve:
    """A metric over the updates of an attack.

    Attributes:
        name: of the metric.
        at: (P,) updates, from 0.
        columns: the metric's columns at each.
        original: those of the original model without attack; None: there is none.
        count: of samples.
    """

    name: str
    at: np.ndarray
    columns: list[Columns]
    original: Columns | None
    count: int

    @classmethod
    def of(cls, name: str, part: _Part, role: str, updates: Sequence[int]) -> _Curve:
        sets = {set_name for set_name, _ in METRICS[name].columns}
        if len(sets) != 1:
            raise Unmeasured("a curve is of one set")
        columns = [part.without[role], *(part.points[role][at] for at in updates)]
        count = len(Measured(columns[0])(*METRICS[name].columns[0]))
        return cls(name, np.array([0, *updates], dtype=float), columns, part.without.get(ORIGINAL), count)

    def values(self, rows: np.ndarray) -> np.ndarray:
        """(P, ...) of the metric on these samples, (..., n)."""
        return np.stack([self._value(columns, rows) for columns in self.columns])

    def _value(self, columns: Columns, rows: np.ndarray) -> np.ndarray:
        (set_name,) = {set_name for set_name, _ in METRICS[self.name].columns}
        value: np.ndarray = METRICS[self.name].statistic(Measured(columns).resampled({set_name: rows}))
        return value

    def area(self, rows: np.ndarray) -> np.ndarray:
        """The mean of the metric over the updates, by trapezoids."""
        area: np.ndarray = np.trapezoid(self.values(rows), self.at, axis=0) / self.at[-1]
        return area

    def half(self, rows: np.ndarray) -> np.ndarray:
        """Updates until half of the way from the unattacked model to the original is made, linearly between points; nan
        where it is not, or where nothing was lost."""
        values, lost = self.values(rows), self._lost(rows)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = (values - values[0]) / lost
        reached = share >= 0.5
        first = reached.argmax(0)
        before = np.maximum(first - 1, 0)
        here, there = (np.take_along_axis(share, place[None], 0)[0] for place in (first, before))
        with np.errstate(invalid="ignore", divide="ignore"):
            found = self.at[before] + (0.5 - there) / (here - there) * (self.at[first] - self.at[before])
        return np.where(reached.any(0) & (first > 0) & (lost * knowledge_sign(self.name) > 0), found, np.nan)

    def has_lost(self) -> bool:
        """Whether the original model knows more than the unattacked one."""
        return bool(self._lost(np.arange(self.count)) * knowledge_sign(self.name) > 0)

    def _lost(self, rows: np.ndarray) -> np.ndarray:
        assert self.original is not None
        return self._value(self.original, rows) - self._value(self.columns[0], rows)


# --- Samples that come back ---------------------------------------------------------------------------------


def _back_rows(part: _Part) -> Iterator[dict[str, Any]]:
    if part.attack == "none":
        return
    for role, points in part.points.items():
        if role == ORIGINAL:
            continue
        for updates, columns in points.items():
            for column, scores in columns.items():
                before, knew = part.without[role].get(column), part.without.get(ORIGINAL, {}).get(column)
                if column[1] not in TELLS or not isinstance(scores, Scores) or not isinstance(before, Scores):
                    continue
                forgotten = before.values < KNOWN
                if isinstance(knew, Scores):
                    forgotten &= knew.values >= KNOWN
                row = {
                    "level": "back",
                    "attack": part.attack,
                    "family": part.family,
                    "updates": updates,
                    "model": role,
                    "set": column[0],
                    "name": column[1],
                }
                if not forgotten.any():
                    yield {**row, "missing": "no sample is forgotten"}
                    continue
                share = mean((scores.values[forgotten] >= KNOWN).astype(float))
                yield {**row, **_fields(share.value, share.low, share.high, int(forgotten.sum()))}


def _worst_rows(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Of each model, the attack under which most is known; attacks on the untaught are those of all once more."""
    roles = dict.fromkeys(row["model"] for row in rows)
    for role in roles:
        for name in metrics:
            values = [
                row
                for row in rows
                if (row["level"], row["model"], row["name"]) == ("metric", role, name)
                and row.get("value") is not None
                and not row["attack"].endswith(UNTAUGHT)
            ]
            if values:
                sign = knowledge_sign(name)
                yield {**max(values, key=lambda row: sign * row["value"]), "level": "worst"}


def _fields(value: float, low: float, high: float, samples: int) -> dict[str, Any]:
    low, high = (bound if math.isfinite(bound) else None for bound in (low, high))  # type: ignore[assignment]
    return {"value": value, "low": low, "high": high, "samples": samples}


def _sample_table(met: Mapping[str, Sequence[Met]]) -> Iterator[pa.Table]:
    for role, attacks in met.items():
        for one in attacks:
            for updates, columns in [] if isinstance(one.measured, Missing) else one.measured:
                rows = sample_rows(columns)
                count = rows.num_rows
                fixed = {
                    "level": pa.array(["sample"] * count, pa.string()),
                    "attack": pa.array([one.attack.name] * count, pa.string()),
                    "family": pa.array([one.attack.family] * count, pa.string()),
                    "updates": pa.array([updates] * count, pa.int64()),
                    "model": pa.array([role] * count, pa.string()),
                    **{name: rows[name] for name in rows.column_names},
                }
                yield pa.table([fixed.get(f.name, pa.nulls(count, f.type)) for f in SCHEMA], schema=SCHEMA)
