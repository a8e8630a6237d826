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
from bench.report.words import interval_columns, with_ci
from bench.stats.estimates import Estimate, partial_spearman, spearman
from bench.stats.verdicts import Claim, bootstrapped
from scoring.errors import UserError

COLOURS, MARKERS = (BLUE, VERMILLION, GREEN, ORANGE), ("o", "s", "^", "D")


@dataclass(frozen=True)
class SingleSampleRun:
    """What it took to make one sample forgotten, the mean over the seeds.

    Attributes:
        group: the task, or whatever else sets runs apart.
        algorithm, sample: which algorithm forgot which sample.
        mrd: of the sample under the initial model.
        tokens: scored tokens of the sample.
        updates: made until it was forgotten, or until the run ended.
        change: mean |Δθ| when the run ended.
        forgotten: it was forgotten with every seed; if not, `updates` and `change` are lower bounds.
        below: it was below both thresholds before any update: nothing was there to be forgotten.
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


def single_sample_runs(trials: pa.Table, samples: pa.Table, group: str) -> list[SingleSampleRun]:
    """The finished trials on one sample that has an MRD, by algorithm and sample.

    Args:
        trials, samples: tables of a sweep, see `bench.jobs.sweep_tables`.
        group: the name that sets these runs apart from others.
    """
    sample_of = {row["trial"]: row for row in samples.to_pylist()}
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for trial in trials.to_pylist():
        if _is_usable(trial):
            cells.setdefault((trial["algorithm"], trial["selection"]), []).append(trial)
    runs = []
    for (algorithm, _), seeds in cells.items():
        first = seeds[0]
        sample = sample_of[first["trial"]]
        runs.append(
            SingleSampleRun(
                group,
                algorithm,
                sample["sample_id"],
                math.exp(first["mean_log_mrd"]),
                sample["num_tokens"],
                float(np.mean([trial["updates"] for trial in seeds])),
                float(np.mean([trial["mean_abs_delta"] for trial in seeds])),
                all(trial["forgotten"] == 1 for trial in seeds),
                is_below(first, sample),
            )
        )
    return runs


def _is_usable(trial: Mapping[str, Any]) -> bool:
    log_mrd = trial["mean_log_mrd"]
    return trial["status"] == FINISHED and log_mrd is not None and math.isfinite(log_mrd)


def is_below(trial: Mapping[str, Any], sample: Mapping[str, Any]) -> bool:
    """Whether a sample was below the thresholds of its trial before any update."""
    # Where a threshold is not given it is the sample's own value, and nothing is below itself.
    ma, el = (math.nan if trial[f"{name}_threshold"] is None else trial[f"{name}_threshold"] for name in ("ma", "el"))
    below = Thresholds(ma, el).forgotten(np.array([sample["ma_initial"]]), np.array([sample["el_initial"]]))
    return bool(below[0])


def difficulties(runs: Sequence[SingleSampleRun], measure: str) -> np.ndarray:
    """`updates` or `change`, (N,); inf, the tied last rank, for samples that were not forgotten at the cap."""
    return np.array([getattr(run, measure) if run.forgotten else math.inf for run in runs])


@dataclass(frozen=True)
class Relation:
    """MRD against difficulty, over the samples of one algorithm.

    Attributes:
        group, algorithm: see SingleSampleRun.
        runs: those whose sample had something to forget.
        measure: of difficulty, `updates` or `change`.
        correlation: Spearman's, of MRD with the difficulty.
        beyond_length: the same with the number of scored tokens partialled out.
        with_length: Spearman's, of the number of scored tokens with the difficulty.
    """

    group: str
    algorithm: str
    runs: Sequence[SingleSampleRun]
    measure: str
    correlation: Estimate
    beyond_length: Estimate
    with_length: Estimate

    @property
    def name(self) -> str:
        return f"{self.group} with {self.algorithm}"

    @classmethod
    def of(cls, group: str, algorithm: str, runs: Sequence[SingleSampleRun], measure: str) -> Relation:
        """Of all runs those that had something to forget; the difficulty is `updates` or `change`."""
        usable = [run for run in runs if not run.below]
        mrd, tokens = np.array([run.mrd for run in usable]), np.array([float(run.tokens) for run in usable])
        hard = difficulties(usable, measure)
        return cls(
            group,
            algorithm,
            usable,
            measure,
            spearman(mrd, hard),
            partial_spearman(mrd, hard, tokens),
            spearman(tokens, hard),
        )


CORRELATION = "correlation"  # the effect that margins are named for


def claim_of(relation: Relation, text: str, margin: float) -> Claim:
    """That MRD is low where samples are hard, as the paper says it; what is left of that beyond length stands beside.

    Args:
        text: the claim.
        margin: the weakest rank correlation that matters.
    """
    mrd = np.array([run.mrd for run in relation.runs])
    hard = difficulties(relation.runs, relation.measure)
    return Claim(
        text,
        f"rank correlation of MRD, {relation.name} (length partialled out: {with_ci(relation.beyond_length)})",
        -1,
        margin,
        bootstrapped(spearman, mrd, hard),
        len(hard),
        "samples",
        "correlation",
    )


def relations_of(runs: Sequence[SingleSampleRun], measure: str) -> list[Relation]:
    """One for each group and algorithm, in the order in which they appear; the difficulty is `updates` or `change`.

    Raises:
        UserError: there is no run.
    """
    if not runs:
        raise UserError("no trial on a sample with an MRD has finished: there is nothing to set against it")
    cells: dict[tuple[str, str], list[SingleSampleRun]] = {}
    for run in runs:
        cells.setdefault((run.group, run.algorithm), []).append(run)
    return [Relation.of(group, algorithm, members, measure) for (group, algorithm), members in cells.items()]


def agreements_of(
    runs: Sequence[SingleSampleRun], measure: str
) -> dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]:
    """(group, first, second algorithm) -> their difficulties of the samples that both have, (N,) each."""
    agreements = {}
    for group in dict.fromkeys(run.group for run in runs):
        by_algorithm: dict[str, dict[str, SingleSampleRun]] = {}
        for run in runs:
            if run.group == group and not run.below:
                by_algorithm.setdefault(run.algorithm, {})[run.sample] = run
        for first, second in combinations(by_algorithm, 2):
            shared = [sample for sample in by_algorithm[first] if sample in by_algorithm[second]]
            x, y = (
                difficulties([by_algorithm[algorithm][sample] for sample in shared], measure)
                for algorithm in (first, second)
            )
            agreements[group, first, second] = x, y
    return agreements


def left_out_sentences(runs: Sequence[SingleSampleRun], lost: int) -> list[str]:
    """Sentences on samples that had nothing to forget, samples that were not forgotten, and trials that did not finish.

    Args:
        runs: all of them.
        lost: trials that gave no run, see `count_unusable`.
    """
    sentences = []
    if below := sum(run.below for run in runs):
        sentences.append(
            f"{below} of {len(runs)} runs are left out: their sample was below both thresholds before any update, so "
            "nothing was there to be forgotten."
        )
    if capped := [run for run in runs if not run.forgotten]:
        sentences.append(
            f"{len(capped)} of {len(runs)} runs ended at the cap, after {max(run.updates for run in capped):g} "
            "updates, with the sample not forgotten: all that is known is that it needs more, and they share the last "
            "rank."
        )
    if lost:
        sentences.append(f"{lost} trials did not finish, or their sample has no MRD; they are left out.")
    return sentences


def count_unusable(trials: pa.Table) -> int:
    """How many trials `single_sample_runs` leaves out."""
    return sum(not _is_usable(trial) for trial in trials.to_pylist())


def run_table(runs: Sequence[SingleSampleRun], group: str) -> pa.Table:
    """A row for each run; the run's group is in the column `group`."""
    rows = [dataclasses.asdict(run) for run in runs]
    return as_table([{group: row.pop("group"), **row} for row in rows])


def relation_row(relation: Relation, group: str) -> dict[str, Any]:
    """A row of a table; the relation's group is in the column `group`."""
    return {
        group: relation.group,
        "algorithm": relation.algorithm,
        "samples": len(relation.runs),
        **interval_columns("spearman", relation.correlation),
        **interval_columns("length_partialled_out", relation.beyond_length),
        **interval_columns("length_alone", relation.with_length),
    }
