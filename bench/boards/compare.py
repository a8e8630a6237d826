"""Two sides compared on equal terms: the same selections of forget samples, the same seeds, the same measurement."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.boards.board import entry_of, metric_label, setting_of
from bench.boards.conflicts import canonical_json
from bench.files.status import FINISHED
from bench.results.store import Results, identity_of
from bench.stats import selection_bias as bias
from bench.stats.estimates import Estimate, t_interval
from bench.stats.paired import paired_g
from scoring.errors import UserError, unknown_name


@dataclass(frozen=True)
class PairedMetric:
    """Two sides under one metric.

    Attributes:
        metric: its name.
        pairs: how many runs of a side have a partner on the other.
        units: how many differences the intervals are over.
        unit: "selection", a difference being the mean over its seeds, or "run" with fewer than three selections.
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
    """Two sides under every metric that both have measured.

    Attributes:
        metrics: one for each metric.
        unpaired: how many runs of the first and of the second side have no partner.
    """

    metrics: tuple[PairedMetric, ...]
    unpaired: tuple[int, int]


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: as it is shown.
        runs: metrics of the finished runs, by what they are paired by: setting, samples and seed.
    """

    name: str
    runs: Mapping[Hashable, Mapping[str, float]]


def entry_side(name: str, results: Results) -> Side:
    """The runs of one algorithm with one set of settings.

    Args:
        name: "NPO", or "NPO,learning_rate=1e-4" with fields of the spec.

    Raises:
        UserError: there are no such runs, or they have several settings.
    """
    algorithm, _, rest = name.partition(",")
    fields_wanted = dict(_field(text, name) for text in rest.split(",") if text)
    rows = _finished_rows(results)
    algorithms = sorted({row["algorithm"] for row in rows})
    if algorithm not in algorithms:
        raise unknown_name("algorithm with finished runs", algorithm, algorithms)
    rows = [row for row in rows if row["algorithm"] == algorithm]
    for field, value in fields_wanted.items():
        if field not in rows[0]["identity"]:
            raise UserError(f"{name}: {unknown_name('field of a run', field, rows[0]['identity'])}")
        matching = [row for row in rows if _same_value(row["identity"][field], value)]
        if not matching:
            values = sorted({str(row["identity"][field]) for row in rows})
            raise UserError(f"{name}: no run has {field} {value}; expected one of {', '.join(values)}")
        rows = matching
    entries = {_entry_key(row["identity"]) for row in rows}
    if len(entries) > 1:
        specs = [json.loads(entry) for entry in entries]
        fields = [field for field in specs[0] if len({json.dumps(spec.get(field)) for spec in specs}) > 1]
        values = sorted({str(spec[fields[0]]) for spec in specs})
        raise UserError(
            f"{name} has runs of {len(entries)} settings, which differ in {', '.join(fields)}; name one, such as "
            f"{name},{fields[0]}={values[0]}"
        )
    return Side(name, {(*_board_key(row), row["data_sha256"], row["seed"]): dict(row["metrics"]) for row in rows})


def store_side(name: str, results: Results) -> Side:
    """All runs of a store, each to be paired with the same run of another: before and after, or two machines."""
    return Side(
        name,
        {
            (*_board_key(row), row["data_sha256"], row["seed"], _entry_key(row["identity"])): dict(row["metrics"])
            for row in _finished_rows(results)
        },
    )


def compare(first: Side, second: Side, metric: str | None = None) -> Comparison:
    """The paired difference under every metric, or under one.

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


def _paired(name: str, shared: Sequence[Any], first: Side, second: Side) -> PairedMetric:
    keys = [key for key in shared if name in first.runs[key] and name in second.runs[key]]
    # A key without the seed, which comes fifth, stands for one selection under one setting, of one entry.
    pairs_of_selection: defaultdict[Hashable, list[tuple[float, float]]] = defaultdict(list)
    for key in keys:
        pairs_of_selection[key[:4], key[5:]].append((first.runs[key][name], second.runs[key][name]))
    unit = "selection"
    values = np.array([np.mean(pairs, axis=0) for pairs in pairs_of_selection.values()])
    if len(values) < bias.FEWEST_SELECTIONS:
        unit, values = "run", np.array([pair for pairs in pairs_of_selection.values() for pair in pairs])
    difference = values[:, 1] - values[:, 0]
    sign = 1.0 if metric_label(name).higher_is_better else -1.0
    first_mean, second_mean = (float(mean) for mean in values.mean(axis=0))
    return PairedMetric(
        name,
        len(keys),
        len(values),
        unit,
        first_mean,
        second_mean,
        t_interval(difference),
        paired_g(sign * difference),
    )


def _finished_rows(results: Results) -> list[dict[str, Any]]:
    rows = [row for row in results.runs.to_pylist() if row["status"] == FINISHED]
    if not rows:
        raise UserError("no finished runs; expected runs that `mrd-bench results add` has put into the store")
    for row in rows:
        row["identity"] = identity_of(row)
    return rows


def _board_key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Task, experiment and setting of a run: runs of one board have the same."""
    return row["task"], row["experiment"], canonical_json(setting_of(row["identity"]))


def _entry_key(identity: Mapping[str, Any]) -> str:
    return canonical_json(entry_of(identity))


def _field(text: str, side_name: str) -> tuple[str, str]:
    """Name and value of "learning_rate=1e-4", a part of the name of a side."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(
            f"{side_name}: {text!r}: expected field=value behind the algorithm, such as NPO,learning_rate=1e-4"
        )
    return name.strip(), value.strip()


def _same_value(value: Any, text: str) -> bool:
    """Whether a spec's value is what the text says: 1e-4 is 0.0001, true is True."""
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):
        return str(value).lower() == text.lower()
