"""Figure 5: does MRD predict how many updates it takes to forget a sample?

Samples are unlearned one at a time, all with the same settings, until the stop rule says that they are forgotten. What
is said here about runs of single samples and about verdicts serves figures 3, 4 and 7 too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, cycle
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullFormatter, NullLocator

from algorithms.stopping import Thresholds
from bench.experiments.experiment import Answer, Experiment, Setting
from bench.files.status import FINISHED
from bench.report.figures import BLUE, GREEN, ORANGE, VERMILLION, Draw
from bench.report.words import decimal, interval, said
from bench.stats.estimates import Estimate, partial_spearman, spearman
from bench.sweeps import as_table
from scoring.errors import UserError

TASKS = ("tofu", "wmdp")  # sweeps that a preset may describe: of these tasks, or of their stand-ins
COLOURS, MARKERS = (BLUE, VERMILLION, GREEN, ORANGE), ("o", "s", "^", "D")
HOLDS, CONTRADICTED, UNKNOWN = "holds", "is contradicted", "cannot be told"
# A rank correlation that even at the far end of its interval is smaller is not what the paper shows.
WEAK = 0.3


# --- Verdicts -----------------------------------------------------------------------------------------------


def ruling(correlation: Estimate, claim: int) -> str:
    """Whether there is a clear rank correlation of the claimed sign.

    It holds if the whole interval has that sign; it is contradicted if even the end of the interval that is the
    nearest to the claim is weaker than WEAK; else, and without an interval, it cannot be told.
    """
    ends = sorted((claim * correlation.low, claim * correlation.high))
    if not all(math.isfinite(end) for end in ends):
        return UNKNOWN
    least, most = ends
    if most < WEAK:
        return CONTRADICTED
    return HOLDS if least > 0 else UNKNOWN


def ruled(rulings: Mapping[str, str]) -> str:
    """HOLDS, CONTRADICTED or UNKNOWN "here" if that is so of all; else of which it is so."""
    if len(set(rulings.values())) == 1:
        return f"{next(iter(rulings.values()))} here"
    return "; ".join(
        f"{verdict} for {', '.join(name for name, own in rulings.items() if own == verdict)}"
        for verdict in (HOLDS, CONTRADICTED, UNKNOWN)
        if verdict in rulings.values()
    )


# --- Runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
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


def runs(trials: pa.Table, samples: pa.Table, group: str) -> list[Run]:
    """Finished trials on one sample that has an MRD, by algorithm and sample.

    Args:
        trials, samples: tables of a sweep, see `bench.sweeps`.
        group: name of them all.
    """
    measured = {row["trial"]: row for row in samples.to_pylist()}
    seeds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in trials.to_pylist():
        if _is_usable(row):
            seeds.setdefault((row["algorithm"], row["selection"]), []).append(row | {"own": measured[row["trial"]]})
    return [
        Run(
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


def difficulty(of: Sequence[Run], name: str) -> np.ndarray:
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
    runs: Sequence[Run]
    correlation: Estimate
    beyond_length: Estimate
    with_length: Estimate


def relations(of: Sequence[Run], name: str) -> list[Relation]:
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


def agreements(of: Sequence[Run], name: str) -> dict[tuple[str, str, str], Estimate]:
    """(group, first, second algorithm) -> Spearman's correlation of their difficulties, over the samples of both."""
    found = {}
    for group in dict.fromkeys(run.group for run in of):
        by_algorithm: dict[str, dict[str, Run]] = {}
        for run in of:
            if run.group == group and not run.below:
                by_algorithm.setdefault(run.algorithm, {})[run.sample] = run
        for first, second in combinations(by_algorithm, 2):
            shared = [sample for sample in by_algorithm[first] if sample in by_algorithm[second]]
            x, y = (difficulty([by_algorithm[each][s] for s in shared], name) for each in (first, second))
            found[group, first, second] = spearman(x, y)
    return found


def left_out(of: Sequence[Run], lost: int) -> list[str]:
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


# --- The answer ---------------------------------------------------------------------------------------------


def run(setting: Setting) -> Answer:
    measured = {}
    for key in TASKS:
        if key in setting.values:
            result = setting.sweep(key)
            measured[result.trials["task"][0].as_py()] = result.trials, result.samples
    if not measured:
        raise UserError(f"{setting.where}: expected a sweep under {' or '.join(TASKS)}")
    return answer(measured)


def answer(measured: Mapping[str, tuple[pa.Table, pa.Table]]) -> Answer:
    """From task -> the trials and the samples of a sweep over single samples."""
    found = [run for task, (trials, samples) in measured.items() for run in runs(trials, samples, task)]
    lost = sum(unusable(trials) for trials, _ in measured.values())
    related, agreed = relations(found, "updates"), agreements(found, "updates")
    sentences = [
        _headline(related),
        *(_by_task(task, related, agreed) for task in measured),
        *left_out(found, lost),
        _claim(related, agreed),
    ]
    tables = {
        "fig5-correlations": as_table([relation_row(each, "task") for each in related]),
        "fig5-agreement": as_table(
            [
                {"task": task, "first": first, "second": second, **estimated("spearman", each)}
                for (task, first, second), each in agreed.items()
            ]
        ),
    }
    panels = [_scatter(task, related) for task in measured]
    return Answer(run_table(found, "task"), panels, sentences, tables=tables, inches=(6.0 * len(panels), 5.5))


def run_table(of: Sequence[Run], group: str) -> pa.Table:
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


def _headline(related: Sequence[Relation]) -> str:
    parts = [
        f"{said(each.correlation)} for {each.group}, {each.algorithm} ({len(each.runs)} samples)" for each in related
    ]
    return (
        f"**Rank correlation of MRD with the number of updates until a sample is forgotten: {'; '.join(parts)}**. The "
        "paper expects it to be clearly negative: high MRD, few updates. MRD sums over tokens, so length is a confound."
    )


def _by_task(task: str, related: Sequence[Relation], agreed: Mapping[tuple[str, str, str], Estimate]) -> str:
    own = [each for each in related if each.group == task]
    needed = [run.updates for each in own for run in each.runs if run.forgotten]
    span = f"took {min(needed):g} to {max(needed):g} updates" if needed else "were never forgotten"
    beyond = "; ".join(
        f"{said(each.beyond_length)} with {each.algorithm} (the length alone: {said(each.with_length)})" for each in own
    )
    order = [
        f" {first} and {second} order the samples alike with a rank correlation of {said(each)}."
        for (group, first, second), each in agreed.items()
        if group == task
    ]
    return (
        f"Samples of {task} {span}. With the number of tokens partialled out, the rank correlation is {beyond}."
        f"{''.join(order)}"
    )


def _claim(related: Sequence[Relation], agreed: Mapping[tuple[str, str, str], Estimate]) -> str:
    first = ruled({f"{each.group} with {each.algorithm}": ruling(each.correlation, -1) for each in related})
    beyond = ruled({f"{each.group} with {each.algorithm}": ruling(each.beyond_length, -1) for each in related})
    text = (
        f"The paper's claim: the higher the MRD, the fewer updates: {first} (beyond what length explains: {beyond}). "
        f"It counts as contradicted where even the end of the interval is weaker than {decimal(-WEAK, 1)}."
    )
    if agreed:
        order = ruled({f"{task}, {one} and {other}": ruling(each, +1) for (task, one, other), each in agreed.items()})
        text += f" That difficulty is the sample's own, the same order under different algorithms: {order}."
    return text


def _scatter(task: str, related: Sequence[Relation]) -> Draw:
    """Updates against MRD; open marks on top are samples that were not forgotten at the cap."""

    def draw(axes: Axes) -> None:
        own = [each for each in related if each.group == task]
        for each, colour, marker in zip(own, cycle(COLOURS), cycle(MARKERS), strict=False):
            label = f"{each.algorithm}: {decimal(each.correlation.value)} ({interval(each.correlation)})"
            for forgotten in (True, False):
                shown = [run for run in each.runs if run.forgotten == forgotten]
                axes.plot(
                    [run.mrd for run in shown],
                    [run.updates for run in shown],
                    marker,
                    color=colour,
                    markerfacecolor=colour if forgotten else "none",
                    alpha=0.75,
                    label=label if forgotten else None,
                )
        axes.set_xscale("log")
        _plain_ticks(axes, [run.mrd for each in own for run in each.runs])
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.08 * (len(own) + 1) * (high - low))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("MRD (log scale)")
        axes.set_ylabel("updates until forgotten (open: more)")
        axes.set_title(f"{task}: one point a sample")
        axes.legend(loc="upper left", title="Spearman (95 % CI)", alignment="left")

    return draw


def _plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Of a logarithmic axis that may span less than a decade: four labels, evenly spaced."""
    places: list[float] = np.geomspace(min(values), max(values), 4).tolist() if values else []
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{place:.2g}" for place in places]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


EXPERIMENT = Experiment(
    "fig5",
    "MRD and the number of updates",
    "Does the MRD of a sample predict how many updates it takes to forget it?",
    "as MRD increases, the number of updates that unlearning a sample takes decreases, and different algorithms order "
    "samples alike (Figure 5).",
    run,
)
