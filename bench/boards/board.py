"""Leaderboards: which algorithm forgets best, and whether that is the algorithm or the samples that were drawn.

stores -> boards of runs that can be compared -> standings under every metric, raw and at equal difficulty

A board has the runs of one task, one experiment and one setting: the same model, data and way of measuring. An entry is
an algorithm with its settings, averaged over selections of forget samples and over seeds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from bench.boards.conflicts import canonical_json, conflicting_specs, setting_differences, shortened, without_repeats
from bench.boards.standings import MetricLabel, SelectionLabel, Standing, failed_runs, standings
from bench.files.status import FINISHED
from bench.metrics import METRICS, limits_of
from bench.results.store import Results, identity_of
from scoring.errors import UserError

# Fields of a run's spec that are the same for all runs of a board: the model, the data and how it is measured.
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
# Fields that tell neither settings nor entries apart: names of things that are hashed, and what is averaged over.
_NOT_COMPARED = ("model", "task", "selection", "forget_sha256", "seed", "schema_version", "spec_hash")


@dataclass(frozen=True)
class RankedRun:
    """A run as the page shows it.

    Attributes:
        run: the hash of its spec, unique.
        entry, selection: their names.
        status: "finished", or what happened instead.
        reason: why it did not finish, in one line; None for a finished run.
        values: the metrics that were measured, by name.
        updates_until_forgotten: by sample id, for the samples that were forgotten; {} where forgetting was not checked.
        origin: index into `Board.origins`.
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
class SampleText:
    """What a forget sample says, and its Memory Removal Difficulty (low: hard to forget)."""

    prompt: str
    completion: str
    mrd: float | None
    num_tokens: int | None


@dataclass(frozen=True)
class Board:
    """Runs that can be compared.

    Attributes:
        name: unique on the page: "authors, fig2".
        task, experiment: those of its runs.
        about: what all its runs have in common, by name: model, forget split, epochs and so on.
        entries: by name, the fields of the spec in which entries differ.
        metrics: by name, the most important first.
        standings: by metric, the best entry first, entries without a rank last.
        sentences: by metric, what a reader must know; each is computed from the data, with its interval.
        trade_off: the metrics of completeness and utility that are drawn against each other; None without both.
        runs: all of them, also those that failed.
        selections: by name.
        texts: by sample id, for all samples of the selections whose text is known.
        origins: where runs come from: model, model fingerprint, data hash, packages, hardware, commit, store.
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
    texts: Mapping[str, SampleText]
    origins: tuple[Mapping[str, str], ...]


# Metrics that the training loop measures itself; all others belong to the task.
_LOOP_METRICS = {
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
# Metrics of completeness and utility; a board draws the first pair that it has: a task's averages, else the loop's own.
TRADE_OFFS = (("uc_average", "ut_average"), ("wmdp_average", "mmlu"), ("completeness", "utility"))


def boards(
    results: Results, task: str | None = None, experiment: str | None = None, keep_conflicts: bool = False
) -> tuple[list[Board], list[str]]:
    """The boards of the runs in stores, and notes on files that were skipped and stores that contradict each other.

    Args:
        keep_conflicts: show runs even where stores contradict each other: runs of different settings get boards of
            their own, and of a run with two results the first store's is shown.

    Raises:
        UserError: there is no run, or stores contradict each other.
    """
    filters = {"task": task, "experiment": experiment}
    rows = [row for row in results.runs.to_pylist() if all(v in (None, row[name]) for name, v in filters.items())]
    if not rows:
        restriction = "".join(f", {name} {value}" for name, value in filters.items() if value)
        raise UserError(f"no runs{restriction}; expected runs that `mrd-bench results add` has put into the store")
    for row in rows:
        row["metrics"] = dict(row["metrics"] or ())
        row["identity"] = identity_of(row)
        row["setting"] = setting_of(row["identity"])
    rows, contradictions = without_repeats(rows)
    experiments: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}  # (task, experiment) -> setting -> runs
    for row in rows:
        settings = experiments.setdefault((row["task"], row["experiment"]), {})
        settings.setdefault(canonical_json(row["setting"]), []).append(row)
    conflicts = contradictions + [
        conflict for key, settings in experiments.items() if (conflict := conflicting_specs(*key, settings))
    ]
    if conflicts and not keep_conflicts:
        more = f" (and {len(conflicts) - 1} more)" if len(conflicts) > 1 else ""
        raise UserError(f"{conflicts[0]}{more}; leave out a store, name another --experiment, or --keep-conflicts")
    lookup = _SampleLookup(results)
    ranked = [
        _board(*key, runs_of_setting, lookup, [json.loads(setting) for setting in settings])
        for key, settings in sorted(experiments.items())
        for runs_of_setting in settings.values()
    ]
    return ranked, [*conflicts, *(f"{file.path}: {file.reason}" for file in results.skipped)]


def setting_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run's identity that must be the same for runs to be compared."""
    return {name: identity.get(name) for name in SETTING}


def entry_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run's identity that say which entry it belongs to: the algorithm with its settings."""
    return {name: value for name, value in identity.items() if name not in (*SETTING, *_NOT_COMPARED)}


# --- A board ------------------------------------------------------------------------------------------------


class _SampleLookup:
    """Finds the samples of a run, and the texts of samples."""

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
        """Ids of the run's samples, each once: a run of two experiments has them twice."""
        return tuple(dict.fromkeys(self._ids[self._place.get(run, slice(0))]))

    def until_forgotten(self, run: str) -> dict[str, int]:
        """Updates until the run's samples were forgotten, by id of those that were."""
        place = self._place.get(run, slice(0))
        samples = zip(self._ids[place], self._until[place], strict=True)
        return {name: updates for name, updates in samples if updates is not None}

    def texts(self, model: str, ids: set[str]) -> dict[str, SampleText]:
        """Texts of these samples, as far as a score file has them under this model."""
        of_model = self.scores.filter(pc.equal(self.scores["model_fingerprint"], model))
        columns = ("sample_id", "prompt", "completion", "mrd", "num_tokens")
        return {
            row["sample_id"]: SampleText(row["prompt"] or "", row["completion"] or "", row["mrd"], row["num_tokens"])
            for row in of_model.select(columns).to_pylist()
            if row["sample_id"] in ids
        }


def _board(
    task: str,
    experiment: str,
    rows: Sequence[dict[str, Any]],
    lookup: _SampleLookup,
    settings: Sequence[Mapping[str, Any]],
) -> Board:
    entries, entry_names = _entries(rows)
    measured = dict.fromkeys(name for row in rows for name in row["metrics"])
    metrics = {name: metric_label(name) for name in sorted(measured, key=_metric_order)}
    selections, selection_names = _selections(rows, lookup)
    origins: dict[tuple[tuple[str, str], ...], int] = {}
    runs = []
    for row, entry, selection in zip(rows, entry_names, selection_names, strict=True):
        origin = tuple(_origin(row).items())
        runs.append(
            RankedRun(
                row["run"],
                entry,
                selection,
                row["seed"],
                row["status"],
                row["reason"],
                row["metrics"],
                row["updates"],
                row["seconds"],
                lookup.until_forgotten(row["run"]),
                origins.setdefault(origin, len(origins)),
            )
        )
    failures = failed_runs([(run.entry, run.status == FINISHED) for run in runs])
    standings_by_metric, sentences = {}, {}
    for name, metric in metrics.items():
        values = [(r.entry, r.selection, r.values[name]) for r in runs if r.status == FINISHED and name in r.values]
        standings_by_metric[name], remarks = standings(metric, values, list(entries), selections)
        sentences[name] = (*remarks, *failures)
    setting = rows[0]["setting"]
    ids = {name for selection in selections.values() for name in selection.ids}
    others = [other for other in settings if other != setting]
    differences = setting_differences([setting, *others]) if len(settings) > 1 else ""
    number = [canonical_json(other) for other in settings].index(canonical_json(setting)) + 1
    return Board(
        f"{task}, {experiment}" + (f" (setting {number} of {len(settings)})" if differences else ""),
        task,
        experiment,
        _about(rows, differences),
        entries,
        metrics,
        standings_by_metric,
        sentences,
        next((pair for pair in TRADE_OFFS if all(name in metrics for name in pair)), None),
        tuple(runs),
        selections,
        lookup.texts(setting["model_fingerprint"], ids),
        tuple(dict(origin) for origin in origins),
    )


def _entries(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The fields in which entries differ, by the entry's name; and the name of each row's entry."""
    specs = [entry_of(row["identity"]) for row in rows]
    keys = [canonical_json(spec) for spec in specs]
    distinct = dict(zip(keys, specs, strict=True))
    varying = [
        name
        for name in dict.fromkeys(n for spec in distinct.values() for n in spec)
        if len({canonical_json(spec.get(name)) for spec in distinct.values()}) > 1
    ]
    names = {}
    for key, spec in distinct.items():
        siblings = [other for other in distinct.values() if other["algorithm"] == spec["algorithm"]]
        differing = [
            name
            for name in varying
            if name != "algorithm" and len({canonical_json(sibling.get(name)) for sibling in siblings}) > 1
        ]
        names[key] = ", ".join([spec["algorithm"], *(f"{name} {shortened(spec.get(name))}" for name in differing)])
    if len(set(names.values())) < len(names):  # long values were shortened to the same text
        names = {key: f"{name} ({n})" for n, (key, name) in enumerate(names.items(), 1)}
    fields = {names[key]: {name: _first_of_list(spec.get(name)) for name in varying} for key, spec in distinct.items()}
    return fields, [names[key] for key in keys]


def _first_of_list(value: Any) -> Any:
    """The value; of a list, such as that of refusals, the start of its first item."""
    return shortened(value[0]) if isinstance(value, list) and value else value


def _selections(
    rows: Sequence[Mapping[str, Any]], lookup: _SampleLookup
) -> tuple[dict[str, SelectionLabel], list[str]]:
    """Selections by name, and the name of each row's selection.

    Two selections that have one name and different samples get the hash of their data added.
    """
    hashes: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["data_sha256"] not in hashes[row["selection"]]:
            hashes[row["selection"]].append(row["data_sha256"])
    selections: dict[str, SelectionLabel] = {}
    names = []
    for row in rows:
        ambiguous = len(hashes[row["selection"]]) > 1
        name = f"{row['selection']} ({row['data_sha256'][:8]})" if ambiguous else row["selection"]
        names.append(name)
        if name not in selections or not selections[name].ids:
            ids = lookup.ids(row["run"])
            selections[name] = SelectionLabel(
                name, row["level"] or "", row["mean_log_mrd"], ids, row["mean_log_flip_time"]
            )
    return selections, names


def _metric_order(name: str) -> tuple[int, int, str]:
    """Sort key of a metric: first averages and what they sum up, as tasks list them; then what the loop measures."""
    trade_off_metrics = [metric for pair in TRADE_OFFS for metric in pair]
    ranked = [*trade_off_metrics, "balance", *METRICS, *_LOOP_METRICS]
    return (0, ranked.index(name), name) if name in ranked else (1, 0, name)


def metric_label(name: str) -> MetricLabel:
    """The label of a metric of a task or of the training loop."""
    if name in METRICS:
        metric = METRICS[name]
        label = MetricLabel(metric.title, metric.definition, metric.higher_is_better)
    else:
        label = _LOOP_METRICS.get(name, MetricLabel(name, "", True))
    return replace(label, limits=limits_of(name))


def _about(rows: Sequence[Mapping[str, Any]], differences: str) -> dict[str, str]:
    """What all rows have in common; `differences` of their setting to others, empty if there is one setting only."""
    first = rows[0]
    identities = [row["identity"] for row in rows]
    about = {"model": first["model"], "forget split": first["split"]}
    for field in ("epochs", "learning_rate", "batch_size", "evaluate_samples"):
        if len({shortened(identity.get(field)) for identity in identities}) == 1:
            about[field.replace("_", " ")] = identities[0].get(field)
    # What there is none of, such as epochs where updates are counted, is not worth a word.
    said = {name: value if name == "model" else shortened(value) for name, value in about.items() if value is not None}
    return said | ({"settings differ in": differences} if differences else {})


def _origin(row: Mapping[str, Any]) -> dict[str, str]:
    """Where a run comes from. Its spec's hash is not part of that: it is the run's name."""
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
