"""Runs that forget one sample each: what it took, and how that goes with difficulty."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from algorithms.stopping import Thresholds
from bench.files.status import FINISHED
from bench.jobs.sweep_tables import as_table
from bench.report.figures import BLUE, GREEN, ORANGE, VERMILLION
from bench.stats.estimates import Estimate, partial_spearman, spearman
from scoring.errors import UserError

COLOURS, MARKERS = (BLUE, VERMILLION, GREEN, ORANGE), ("o", "s", "^", "D")


@dataclass(frozen=True)
class SingleSampleRun:
    """What it took to make one sample forgotten, the mean over the seeds.

    Attributes:
        group: the task, or whatever else sets runs apart.
        algorithm, sample: what was run.
        mrd: of the sample under the initial model.
        tokens: scored ones of the sample.
        updates: made until it was forgotten, or until the run ended.
        change: mean |Δθ| when the run ended.
        forgotten: whether it was, with every seed; else `updates` and `change` are only known to be exceeded.
        below: whether it was below both thresholds before any update: nothing was there to be forgotten.
    """

    group: str
    algorithm: str
    sample: str
    mrd: float
    tokens: int
    updates: float
    change: float
    forgotten: bool
    below: bool


def runs(trials: pa.Table, samples: pa.Table, group: str) -> list[SingleSampleRun]:
    """Finished trials on one sample that has an MRD, by algorithm and sample.

    Args:
        trials, samples: tables of a sweep, see `bench.jobs.sweep`.
        group: name of them all.
    """
    measured = {row["trial"]: row for row in samples.to_pylist()}
    seeds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in trials.to_pylist():
        if _is_usable(row):
            seeds.setdefault((row["algorithm"], row["selection"]), []).append(row | {"own": measured[row["trial"]]})
    return [
        SingleSampleRun(
            group,
            algorithm,
            own[0]["own"]["sample_id"],
            math.exp(own[0]["mean_log_mrd"]),
            own[0]["own"]["num_tokens"],
            float(np.mean([row["updates"] for row in own])),
            float(np.mean([row["mean_abs_delta"] for row in own])),
            all(row["forgotten"] == 1 for row in own),
            _is_below(own[0]),
        )
        for (algorithm, _), own in seeds.items()
    ]


def _is_usable(row: Mapping[str, Any]) -> bool:
    difficulty = row["mean_log_mrd"]
    return row["status"] == FINISHED and difficulty is not None and math.isfinite(difficulty)


def _is_below(row: Mapping[str, Any]) -> bool:
    # Where a threshold is not given it is the sample's own value, and nothing is below itself.
    ma, el = (math.nan if row[f"{name}_threshold"] is None else row[f"{name}_threshold"] for name in ("ma", "el"))
    own = row["own"]
    return bool(Thresholds(ma, el).forgotten(np.array([own["ma_initial"]]), np.array([own["el_initial"]]))[0])


def difficulty(of: Sequence[SingleSampleRun], name: str) -> np.ndarray:
    """`updates` or `change`, (N,); inf, the tied last rank, for what was not forgotten at the cap."""
    return np.array([getattr(run, name) if run.forgotten else math.inf for run in of])


@dataclass(frozen=True)
class Relation:
    """MRD against difficulty, over the samples of one algorithm.

    Attributes:
        group, algorithm: see Run.
        runs: those that had something to forget.
        correlation: Spearman's, of MRD with the difficulty.
        beyond_length: the same with the number of scored tokens partialled out.
        with_length: Spearman's, of the number of scored tokens with the difficulty.
    """

    group: str
    algorithm: str
    runs: Sequence[SingleSampleRun]
    correlation: Estimate
    beyond_length: Estimate
    with_length: Estimate


def relations(of: Sequence[SingleSampleRun], name: str) -> list[Relation]:
    """One for each group and algorithm, in the order in which they appear; the difficulty is `updates` or `change`.

    Raises:
        UserError: there is no run.
    """
    if not of:
        raise UserError("no trial on a sample with an MRD has finished: there is nothing to set against it")
    found = []
    for group, algorithm in dict.fromkeys((run.group, run.algorithm) for run in of):
        own = [run for run in of if (run.group, run.algorithm) == (group, algorithm) and not run.below]
        mrd, tokens = np.array([run.mrd for run in own]), np.array([float(run.tokens) for run in own])
        hard = difficulty(own, name)
        found.append(
            Relation(
                group,
                algorithm,
                own,
                spearman(mrd, hard),
                partial_spearman(mrd, hard, tokens),
                spearman(tokens, hard),
            )
        )
    return found


def agreements(of: Sequence[SingleSampleRun], name: str) -> dict[tuple[str, str, str], Estimate]:
    """(group, first, second algorithm) -> Spearman's correlation of their difficulties, over the samples of both."""
    found = {}
    for group in dict.fromkeys(run.group for run in of):
        by_algorithm: dict[str, dict[str, SingleSampleRun]] = {}
        for run in of:
            if run.group == group and not run.below:
                by_algorithm.setdefault(run.algorithm, {})[run.sample] = run
        for first, second in combinations(by_algorithm, 2):
            shared = [sample for sample in by_algorithm[first] if sample in by_algorithm[second]]
            x, y = (difficulty([by_algorithm[each][s] for s in shared], name) for each in (first, second))
            found[group, first, second] = spearman(x, y)
    return found


def left_out(of: Sequence[SingleSampleRun], lost: int) -> list[str]:
    """Sentences on what had nothing to forget, what was not forgotten, and what did not finish.

    Args:
        of: all runs.
        lost: trials that are none of them, see `unusable`.
    """
    sentences = []
    if below := sum(run.below for run in of):
        sentences.append(
            f"{below} of {len(of)} runs are left out: their sample was below both thresholds before any update, so "
            "nothing was there to be forgotten."
        )
    if kept := [run for run in of if not run.forgotten]:
        sentences.append(
            f"{len(kept)} of {len(of)} runs ended at the cap, after {max(run.updates for run in kept):g} updates, with "
            "the sample not forgotten: all that is known is that it needs more, and they share the last rank."
        )
    if lost:
        sentences.append(f"{lost} trials did not finish, or their sample has no MRD; they are left out.")
    return sentences


def unusable(trials: pa.Table) -> int:
    """How many trials `runs` leaves out."""
    return sum(not _is_usable(row) for row in trials.to_pylist())


def estimated(name: str, estimate: Estimate) -> dict[str, float]:
    """Columns of a table."""
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def run_table(of: Sequence[SingleSampleRun], group: str) -> pa.Table:
    """A row for each run; what sets them apart is in the column `group`."""
    rows = [dataclasses.asdict(run) for run in of]
    return as_table([{group: row.pop("group"), **row} for row in rows])


def relation_row(each: Relation, group: str) -> dict[str, Any]:
    """A row of a table; what sets relations apart is in the column `group`."""
    return {
        group: each.group,
        "algorithm": each.algorithm,
        "samples": len(each.runs),
        **estimated("spearman", each.correlation),
        **estimated("length_partialled_out", each.beyond_length),
        **estimated("length_alone", each.with_length),
    }
