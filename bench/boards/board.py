"""Leaderboards: which algorithm forgets best, and whether that is the algorithm or the samples that were drawn.

stores -> boards of runs that can be compared -> standings under every metric, raw and at equal difficulty

A board is of one task, one experiment and one setting: the same model, data and way of measuring. Within it an entry is
an algorithm with its settings; selections of forget samples and seeds are what it is averaged over.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow.compute as pc

from bench.boards.standings import MetricLabel, SelectionLabel, Standing, standings
from bench.files.status import FINISHED
from bench.metrics import METRICS
from bench.results.store import Results
from scoring.errors import UserError

# Fields of a run's spec in which the runs of a board are alike: the model, the data and how it is measured.
SETTING = (
    "model_fingerprint",
    "forget_split",
    "retain",
    "retain_sha256",
    "evaluate",
    "evaluate_every",
    "evaluate_samples",
    "el_n",
    "evaluation",
)
# Those that are neither that nor of the algorithm: names of what has a hash, and what results are averaged over.
_ASIDE = ("model", "task", "selection", "forget_sha256", "seed", "schema_version", "spec_hash")
SAME = 1e-6  # relative; the same run on another machine differs by rounding


@dataclass(frozen=True)
class RankedRun:
    """A run as it is shown.

    Attributes:
        run: its hash, unique.
        entry, selection: names.
        status: "finished", or what happened instead; reason: in one line, None of a finished one.
        values: by metric, of those that were measured.
        updates_until_forgotten: by sample id, for those that were forgotten; {} where it was not looked at.
        origin: place in `Board.origins`.
    """

    run: str
    entry: str
    selection: str
    seed: int
    status: str
    reason: str | None
    values: Mapping[str, float]
    updates: int | None
    seconds: float | None
    updates_until_forgotten: Mapping[str, int]
    origin: int


@dataclass(frozen=True)
class Text:
    """A forget sample: what it says, and its Memory Removal Difficulty (low: hard to forget)."""

    prompt: str
    completion: str
    mrd: float | None
    num_tokens: int | None


@dataclass(frozen=True)
class Board:
    """Runs that can be compared.

    Attributes:
        name: unique on the page: "authors, fig2".
        task, experiment: of its runs.
        about: what all its runs have in common, by name: model, forget split, epochs and so on.
        entries: name -> fields of its spec in which entries differ.
        metrics: by name, the first of them first.
        standings: by metric, the best entry first; those without a rank last.
        sentences: by metric: what a reader must know, each computed from the data with its interval.
        trade_off: the metrics of completeness and of utility that are drawn against each other; None without both.
        runs: all, also those that failed.
        selections: by name.
        texts: by sample id, of all samples that any selection has and whose text is known.
        origins: where runs come from: spec hash, model fingerprint, data hash, packages, hardware, commit, store.
    """

    name: str
    task: str
    experiment: str
    about: Mapping[str, str]
    entries: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, MetricLabel]
    standings: Mapping[str, tuple[Standing, ...]]
    sentences: Mapping[str, tuple[str, ...]]
    trade_off: tuple[str, str] | None
    runs: tuple[RankedRun, ...]
    selections: Mapping[str, SelectionLabel]
    texts: Mapping[str, Text]
    origins: tuple[Mapping[str, str], ...]


# What the training loop measures by itself; all else is a metric of the task.
_OWN = {
    "completeness": MetricLabel("completeness", "1 less the ROUGE-L recall of forget answers", True),
    "utility": MetricLabel("utility", "ROUGE-L recall of retain answers", True),
    "balance": MetricLabel("balance", "harmonic mean of completeness and utility", True),
    "forget_rouge_l_recall": MetricLabel("forget ROUGE-L", "ROUGE-L recall of forget answers", False),
    "forget_probability": MetricLabel("forget probability", "of forget answers, mean over tokens", False),
    "retain_rouge_l_recall": MetricLabel("retain ROUGE-L", "ROUGE-L recall of retain answers", True),
    "retain_probability": MetricLabel("retain probability", "of retain answers, mean over tokens", True),
    "mean_abs_delta": MetricLabel("mean |Δθ|", "mean change of a weight", False),
    "delta_norm": MetricLabel("‖Δθ‖", "norm of the change of all weights", False),
}
# Completeness and utility, from the averages of a task down to what the loop measures.
TRADE_OFFS = (("uc_average", "ut_average"), ("wmdp_average", "mmlu"), ("completeness", "utility"))


def boards(
    results: Results, task: str | None = None, experiment: str | None = None, keep_conflicts: bool = False
) -> tuple[list[Board], list[str]]:
    """The boards of what stores hold, and notes on what is not on them.

    Args:
        keep_conflicts: show what stores contradict each other in: runs of different settings on boards of their own,
            and of a run with two results the one of the first store.

    Raises:
        UserError: there is no run, or stores contradict each other.
    """
    wanted = {"task": task, "experiment": experiment}
    rows = [row for row in results.runs.to_pylist() if all(v in (None, row[name]) for name, v in wanted.items())]
    if not rows:
        asked = "".join(f", {what} {name}" for what, name in wanted.items() if name)
        raise UserError(f"no runs{asked}; expected runs that `mrd-bench results add` has put into the store")
    for row in rows:
        row["metrics"] = dict(row["metrics"] or ())
        row["identity"] = json.loads(row["spec"])
        row["setting"] = setting_of(row["identity"])
    rows, contradicted = _once(rows)
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["experiment"]), {}).setdefault(_key(row["setting"]), []).append(row)
    conflicts = contradicted + [each for where, own in groups.items() if (each := _conflict(*where, own))]
    if conflicts and not keep_conflicts:
        more = f" (and {len(conflicts) - 1} more)" if len(conflicts) > 1 else ""
        raise UserError(f"{conflicts[0]}{more}; leave out a store, name another --experiment, or --keep-conflicts")
    details = _Details(results)
    found = [
        _board(*where, own, details, [json.loads(key) for key in settings])
        for where, settings in sorted(groups.items())
        for own in settings.values()
    ]
    return found, [*conflicts, *(f"{each.path}: {each.reason}" for each in results.skipped)]


def setting_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What runs must have in common to be compared."""
    return {name: identity.get(name) for name in SETTING}


def entry_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The algorithm with its settings."""
    return {name: value for name, value in identity.items() if name not in (*SETTING, *_ASIDE)}


def _once(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Each run of an experiment once; and those whose results differ."""
    first: dict[tuple[str, str, str], dict[str, Any]] = {}
    contradicted = []
    for row in rows:
        known = first.setdefault((row["task"], row["experiment"], row["run"]), row)
        if known is row or (known["status"] == row["status"] == FINISHED and _alike(known["metrics"], row["metrics"])):
            continue
        if known["status"] != FINISHED and row["status"] == FINISHED:
            first[row["task"], row["experiment"], row["run"]] = row  # tried again, and it went well
        elif known["status"] == row["status"] == FINISHED:
            contradicted.append(
                f"{row['task']}, {row['experiment']}: run {row['run']} has different results in {known['store']} and "
                f"{row['store']} ({_first_difference(known['metrics'], row['metrics'])})"
            )
    return list(first.values()), contradicted


def _alike(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return all(math.isclose(one[name], other[name], rel_tol=SAME, abs_tol=SAME) for name in one.keys() & other.keys())


def _first_difference(one: Mapping[str, float], other: Mapping[str, float]) -> str:
    name = next(name for name in one if name in other and not _alike({name: one[name]}, {name: other[name]}))
    return f"{name}: {one[name]:.6g} and {other[name]:.6g}"


def _conflict(task: str, experiment: str, settings: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """Where stores have runs of an experiment that cannot be compared; one store may have an experiment of several."""
    of_store: defaultdict[str, set[str]] = defaultdict(set)
    for key, own in settings.items():
        for row in own:
            of_store[row["store"]].add(key)
    for (one, of_one), (other, of_other) in combinations(of_store.items(), 2):
        if of_one != of_other:
            mine, theirs = json.loads(min(of_one - of_other or of_one)), json.loads(min(of_other - of_one or of_other))
            return (
                f"conflicting specs of {task}, {experiment} in {one} and {other}: "
                f"{_differences([mine, theirs])}: their runs cannot be compared"
            )
    return None


def _differences(settings: Sequence[Mapping[str, Any]]) -> str:
    flat = [_flat(each) for each in settings]
    known = dict.fromkeys(name for each in flat for name in each)
    names = [name for name in known if len({str(each.get(name)) for each in flat}) > 1]
    return "; ".join(f"{name} {' and '.join(_short(each.get(name)) for each in flat)}" for name in names)


def _flat(setting: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in setting.items():
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _short(value: Any) -> str:
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:16]}…"


def _brief(value: Any) -> Any:
    """A list, such as that of refusals, by its first words."""
    return _short(value[0]) if isinstance(value, list) and value else value


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


# --- A board ------------------------------------------------------------------------------------------------


class _Details:
    """Samples of runs, and texts, as they are looked up."""

    def __init__(self, results: Results) -> None:
        samples = results.samples.select(["run", "sample_id", "updates_until_forgotten"]).combine_chunks()
        samples = samples.take(pc.sort_indices(samples["run"]))  # stable
        self._ids = samples["sample_id"].to_pylist()
        self._until = samples["updates_until_forgotten"].to_pylist()
        names = samples["run"].to_numpy(zero_copy_only=False)
        starts = np.flatnonzero(np.r_[True, names[1:] != names[:-1]]) if len(names) else np.array([], int)
        ends = np.r_[starts[1:], len(names)]
        self._place = {names[start]: slice(int(start), int(end)) for start, end in zip(starts, ends, strict=True)}
        self.scores = results.scores

    def ids(self, run: str) -> tuple[str, ...]:
        """Its samples, once each: a run of two experiments has them twice."""
        return tuple(dict.fromkeys(self._ids[self._place.get(run, slice(0))]))

    def until_forgotten(self, run: str) -> dict[str, int]:
        """Updates, of its samples that were forgotten."""
        place = self._place.get(run, slice(0))
        both = zip(self._ids[place], self._until[place], strict=True)
        return {name: updates for name, updates in both if updates is not None}

    def texts(self, model: str, ids: set[str]) -> dict[str, Text]:
        """Of these samples, where a score file has them under this model."""
        of_model = self.scores.filter(pc.equal(self.scores["model_fingerprint"], model))
        columns = ("sample_id", "prompt", "completion", "mrd", "num_tokens")
        return {
            row["sample_id"]: Text(row["prompt"] or "", row["completion"] or "", row["mrd"], row["num_tokens"])
            for row in of_model.select(columns).to_pylist()
            if row["sample_id"] in ids
        }


def _board(
    task: str,
    experiment: str,
    rows: Sequence[dict[str, Any]],
    details: _Details,
    settings: Sequence[Mapping[str, Any]],
) -> Board:
    entries, names = _entries(rows)
    known = dict.fromkeys(name for row in rows for name in row["metrics"])
    metrics = {name: shown(name) for name in sorted(known, key=_order)}
    selections, drawn = _selections(rows, details)
    origins: dict[tuple[tuple[str, str], ...], int] = {}
    runs = []
    for row, name, selection in zip(rows, names, drawn, strict=True):
        origin = tuple(_origin(row).items())
        runs.append(
            RankedRun(
                row["run"],
                name,
                selection,
                row["seed"],
                row["status"],
                row["reason"],
                row["metrics"],
                row["updates"],
                row["seconds"],
                details.until_forgotten(row["run"]),
                origins.setdefault(origin, len(origins)),
            )
        )
    places, sentences = {}, {}
    for name, metric in metrics.items():
        values = [(r.entry, r.selection, r.values[name]) for r in runs if r.status == FINISHED and name in r.values]
        places[name], sentences[name] = standings(metric, values, list(entries), selections)
    own = rows[0]["setting"]
    ids = {name for each in selections.values() for name in each.ids}
    apart = _differences([own, *(each for each in settings if each != own)]) if len(settings) > 1 else ""
    number = [_key(each) for each in settings].index(_key(own)) + 1
    return Board(
        f"{task}, {experiment}" + (f" (setting {number} of {len(settings)})" if apart else ""),
        task,
        experiment,
        _about(rows, apart),
        entries,
        metrics,
        places,
        sentences,
        next((pair for pair in TRADE_OFFS if all(name in metrics for name in pair)), None),
        tuple(runs),
        selections,
        details.texts(own["model_fingerprint"], ids),
        tuple(dict(each) for each in origins),
    )


def _entries(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Entries with the fields in which they differ, by name; and the name of each row's."""
    specs = [entry_of(row["identity"]) for row in rows]
    keys = [_key(spec) for spec in specs]
    distinct = dict(zip(keys, specs, strict=True))
    varying = [
        name
        for name in dict.fromkeys(n for spec in distinct.values() for n in spec)
        if len({_key(spec.get(name)) for spec in distinct.values()}) > 1
    ]
    names = {}
    for key, spec in distinct.items():
        siblings = [other for other in distinct.values() if other["algorithm"] == spec["algorithm"]]
        differing = [
            name for name in varying if name != "algorithm" and len({_key(each.get(name)) for each in siblings}) > 1
        ]
        names[key] = ", ".join([spec["algorithm"], *(f"{name} {_short(spec.get(name))}" for name in differing)])
    if len(set(names.values())) < len(names):  # shortened to the same
        names = {key: f"{name} ({n})" for n, (key, name) in enumerate(names.items(), 1)}
    found = {names[key]: {name: _brief(spec.get(name)) for name in varying} for key, spec in distinct.items()}
    return found, [names[key] for key in keys]


def _selections(rows: Sequence[Mapping[str, Any]], details: _Details) -> tuple[dict[str, SelectionLabel], list[str]]:
    """Selections by name, and the name of each row's: two of one name and different samples are told apart."""
    hashes: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["data_sha256"] not in hashes[row["selection"]]:
            hashes[row["selection"]].append(row["data_sha256"])
    found: dict[str, SelectionLabel] = {}
    names = []
    for row in rows:
        several = len(hashes[row["selection"]]) > 1
        name = f"{row['selection']} ({row['data_sha256'][:8]})" if several else row["selection"]
        names.append(name)
        if name not in found or not found[name].ids:
            ids = details.ids(row["run"])
            found[name] = SelectionLabel(name, row["level"] or "", row["mean_log_mrd"], ids)
    return found, names


def _order(name: str) -> tuple[int, int, str]:
    """Averages and what they sum up first, as tasks list them; then what the loop measures."""
    heads = [each for pair in TRADE_OFFS for each in pair]
    ranked = [*heads, "balance", *METRICS, *_OWN]
    return (0, ranked.index(name), name) if name in ranked else (1, 0, name)


def shown(name: str) -> MetricLabel:
    """What a metric is, of a task or of the training loop."""
    if name in METRICS:
        metric = METRICS[name]
        return MetricLabel(metric.title, metric.definition, metric.higher_is_better)
    return _OWN.get(name, MetricLabel(name, "", True))


def _about(rows: Sequence[Mapping[str, Any]], apart: str) -> dict[str, str]:
    first = rows[0]
    identities = [row["identity"] for row in rows]
    about = {"model": first["model"], "forget split": _short(first["split"])}
    for field in ("epochs", "learning_rate", "batch_size", "evaluate_samples"):
        values = {_short(each.get(field)) for each in identities}
        if len(values) == 1:
            about[field.replace("_", " ")] = values.pop()
    return about | ({"settings differ in": apart} if apart else {})


def _origin(row: Mapping[str, Any]) -> dict[str, str]:
    """Spec hashes are the runs' own names."""
    versions = ", ".join(f"{name} {version}" for name, version in json.loads(row["packages"] or "{}").items())
    return {
        "model": row["model"],
        "model fingerprint": row["model_fingerprint"],
        "data": row["data_sha256"],
        "packages": versions or "not recorded",
        "hardware": row["hardware"] or "not recorded",
        "commit": row["git_commit"] or "not recorded",
        "store": row["store"],
    }
