"""Two sides compared on equal terms: the same selections of forget samples, the same seeds, measured alike."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.boards.board import entry_of, setting_of, shown
from bench.files.status import FINISHED
from bench.results.store import Results
from bench.stats import selection_bias as bias
from bench.stats.estimates import LEVEL, Estimate, t_interval
from scoring.errors import UserError, unknown_name


@dataclass(frozen=True)
class Paired:
    """Two sides under one metric.

    Attributes:
        metric: its name.
        pairs: runs of either side that have a partner.
        units: how many differences the intervals are over; unit: "selection", the differences of whose seeds are
            averaged, or "run" where there are fewer than three selections.
        first, second: means over the units.
        difference: second - first, with its t interval.
        effect: Hedges' g of paired differences, mean over standard deviation; positive where the second is better.
    """

    metric: str
    pairs: int
    units: int
    unit: str
    first: float
    second: float
    difference: Estimate
    effect: Estimate


@dataclass(frozen=True)
class Comparison:
    """What two sides have in common.

    Attributes:
        metrics: of those that both sides have measured.
        alone: runs of the first and of the second side without a partner.
    """

    metrics: tuple[Paired, ...]
    alone: tuple[int, int]


@dataclass(frozen=True)
class Side:
    """Finished runs by what they are paired by."""

    name: str
    runs: Mapping[Hashable, Mapping[str, float]]


def entries_side(name: str, results: Results) -> Side:
    """The runs of one algorithm with one set of settings.

    Args:
        name: "NPO", or "NPO,learning_rate=1e-4" with fields of the spec.

    Raises:
        UserError: there are none, or they are of several settings.
    """
    algorithm, _, rest = name.partition(",")
    wanted = dict(_field(each, name) for each in rest.split(",") if each)
    rows = _rows(results)
    known = sorted({row["algorithm"] for row in rows})
    if algorithm not in known:
        raise unknown_name("algorithm with finished runs", algorithm, known)
    own = [row for row in rows if row["algorithm"] == algorithm]
    for field, value in wanted.items():
        if field not in own[0]["identity"]:
            raise UserError(f"{name}: {unknown_name('field of a run', field, own[0]['identity'])}")
        left = [row for row in own if _same(row["identity"][field], value)]
        if not left:
            there = sorted({str(row["identity"][field]) for row in own})
            raise UserError(f"{name}: no run has {field} {value}; expected one of {', '.join(there)}")
        own = left
    kinds = {_entry(row["identity"]) for row in own}
    if len(kinds) > 1:
        specs = [json.loads(kind) for kind in kinds]
        fields = [field for field in specs[0] if len({json.dumps(spec.get(field)) for spec in specs}) > 1]
        values = sorted({str(spec[fields[0]]) for spec in specs})
        raise UserError(
            f"{name} has runs of {len(kinds)} settings, which differ in {', '.join(fields)}; name one, such as "
            f"{name},{fields[0]}={values[0]}"
        )
    return Side(name, {(*_where(row), row["data_sha256"], row["seed"]): dict(row["metrics"]) for row in own})


def store_side(name: str, results: Results) -> Side:
    """All runs of a store, each to be paired with the same run of another: before and after, or two machines."""
    return Side(
        name,
        {
            (*_where(row), row["data_sha256"], row["seed"], _entry(row["identity"])): dict(row["metrics"])
            for row in _rows(results)
        },
    )


def compare(first: Side, second: Side, metric: str | None = None) -> Comparison:
    """The paired difference under every metric, or one.

    Raises:
        UserError: no run of one side has a partner on the other, or none of a pair has the metric.
    """
    shared = [key for key in first.runs if key in second.runs]
    if not shared:
        raise UserError(
            f"{first.name} and {second.name} have no selection and seed in common, of the same task, experiment, model "
            "and way of measuring: expected runs on the same samples, as one sweep makes them"
        )
    names = dict.fromkeys(name for key in shared for name in first.runs[key] if name in second.runs[key])
    if metric is not None and metric not in names:
        raise unknown_name("metric of both sides", metric, list(names))
    return Comparison(
        tuple(_paired(name, shared, first, second) for name in names if metric in (None, name)),
        (len(first.runs) - len(shared), len(second.runs) - len(shared)),
    )


def _paired(name: str, shared: Sequence[Any], first: Side, second: Side) -> Paired:
    keys = [key for key in shared if name in first.runs[key] and name in second.runs[key]]
    # All of a key but the seed, which comes fifth, is one selection under one setting, of one entry.
    groups: defaultdict[Hashable, list[tuple[float, float]]] = defaultdict(list)
    for key in keys:
        groups[key[:4], key[5:]].append((first.runs[key][name], second.runs[key][name]))
    unit = "selection"
    values = np.array([np.mean(own, axis=0) for own in groups.values()])
    if len(values) < bias.FEWEST_SELECTIONS:
        unit, values = "run", np.array([pair for own in groups.values() for pair in own])
    difference = values[:, 1] - values[:, 0]
    sign = 1.0 if shown(name).higher_is_better else -1.0
    one, two = (float(mean) for mean in values.mean(axis=0))
    return Paired(name, len(keys), len(values), unit, one, two, t_interval(difference), paired_g(sign * difference))


def paired_g(differences: np.ndarray, level: float = LEVEL) -> Estimate:
    """Hedges' g of paired differences (n,).

        g = J mean / sd,   J = 1 - 3 / (4 (n - 1) - 1)

    The interval turns round the noncentral t distribution of sqrt(n) mean / sd (Cumming & Finch 2001). nan with fewer
    than three, or where they do not differ.
    """
    n = len(differences)
    if n < 3 or (spread := float(differences.std(ddof=1))) <= bias.SAME * max(1.0, float(np.abs(differences).max())):
        return Estimate(math.nan, math.nan, math.nan)
    d = float(differences.mean()) / spread
    correction = 1 - 3 / (4 * (n - 1) - 1)
    limits = bias.noncentrality(np.array([d * math.sqrt(n)]), n - 1, level)[:, 0] / math.sqrt(n)
    return Estimate(correction * d, *(correction * float(limit) for limit in limits))


def _rows(results: Results) -> list[dict[str, Any]]:
    rows = [row for row in results.runs.to_pylist() if row["status"] == FINISHED]
    if not rows:
        raise UserError("no finished runs; expected runs that `mrd-bench results add` has put into the store")
    for row in rows:
        row["identity"] = json.loads(row["spec"])
    return rows


def _where(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["task"], row["experiment"], json.dumps(setting_of(row["identity"]), sort_keys=True)


def _entry(identity: Mapping[str, Any]) -> str:
    return json.dumps(entry_of(identity), sort_keys=True)


def _field(text: str, where: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{where}: {text!r}: expected field=value behind the algorithm, such as NPO,learning_rate=1e-4")
    return name.strip(), value.strip()


def _same(value: Any, text: str) -> bool:
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):
        return str(value).lower() == text.lower()
