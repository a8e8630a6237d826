"""Beyond the paper: do draws and losses that go by difficulty beat uniform draws, and by more than a margin?

Every arm forgets the same samples with the same number of updates at most, and the same seed. It is compared with
uniform draws in how many updates it takes until all samples are forgotten, and in the utility that is left once a given
part of the forget set is gone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.experiments.shared.arms import UNIFORM, merged
from bench.files.status import FINISHED
from bench.jobs.sweep_tables import as_table
from bench.report.figures import BLUE, GREEN, MUTED, VERMILLION, Draw, error_bars
from bench.report.verdicts import needed
from bench.report.words import decimal, interval, interval_columns, listed, markdown_table
from bench.stats.estimates import Estimate, geometric_mean, over_seeds
from bench.stats.verdicts import CONTRADICTED, HOLDS, NO_EFFECT, UNKNOWN, Claim, Verdict, decide, over_runs
from scoring.errors import UserError
from scoring.settings import Doc, Ge, Gt, Lt, check, named

BETTER, WORSE = "better", "worse"
WORDS = {HOLDS: BETTER, CONTRADICTED: WORSE, NO_EFFECT: NO_EFFECT, UNKNOWN: UNKNOWN}  # of the claim to be better
COLOURS = {BETTER: GREEN, WORSE: VERMILLION, NO_EFFECT: BLUE, UNKNOWN: MUTED}
UPDATES = "updates"
# What says how much of the forget set is gone, and what is left of utility; columns of a sweep's epochs.
FORGOTTEN = "forget_rouge_l_recall"
UTILITIES = {
    "retain_rouge_l_recall": "ROUGE-L recall on the retain set",
    "retain_probability": "probability of the retain set",
}


@dataclass(frozen=True, kw_only=True)
class CompareSpec:
    """What counts as an effect."""

    margin_updates: Annotated[float, Gt(0), Lt(1), Doc("the least change of the number of updates that matters")] = 0.1
    margin_utility: Annotated[float, Gt(0), Lt(1), Doc("the least difference in utility that matters")] = 0.02
    completeness: Annotated[
        float, Gt(0), Lt(1), Doc("utility is compared when this share of the forget set's ROUGE-L recall is gone")
    ] = 0.5
    least_pairs: Annotated[int, Ge(2), Doc("pairs of runs without which nothing can be told")] = 3

    def checked(self) -> Self:
        """The same settings.

        Raises:
            UserError: a value that is not allowed.
        """
        check(self)
        return self


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        algorithm, arm: of the run.
        pair: what it shares with a run of another arm: the samples and the seed.
        updates: until all samples were forgotten, or until it ended.
        all_forgotten: whether they were.
        utility: by its column, when as much was forgotten as `CompareSpec.completeness` says; nothing if that was not
            reached.
    """

    algorithm: str
    arm: str
    pair: tuple[str, int]
    updates: int
    all_forgotten: bool
    utility: Mapping[str, float]


@dataclass(frozen=True)
class Compared:
    """An arm against uniform draws in one measure.

    Attributes:
        algorithm, arm, measure: what is compared.
        verdict: on the claim that the arm is better. Its effect is the mean over the pairs: of the logarithm of the
            ratio of updates, of the difference of utilities.
    """

    algorithm: str
    arm: str
    measure: str
    verdict: Verdict

    @property
    def change(self) -> Estimate:
        return self.verdict.estimate

    @property
    def pairs(self) -> int:
        return self.verdict.claim.count

    @property
    def word(self) -> str:
        return WORDS[self.verdict.word]

    def text(self) -> str:
        """The change in words: "−4 % (−9 to 1)"."""
        if self.measure == UPDATES:
            percent = Estimate(*(100 * np.expm1([self.change.value, self.change.low, self.change.high])).tolist())
            return f"{_signed(percent.value, 0)} % ({interval(percent, 0)})"
        return f"{_signed(self.change.value, 3)} ({interval(self.change, 3)})"


def _signed(value: float, digits: int) -> str:
    return ("+" if round(value, digits) > 0 else "") + decimal(value, digits)


def run(setup: Setup) -> Answer:
    compare = setup.spec(CompareSpec, "compare")
    sweeps = [setup.sweep(key) for key in setup.sweep_keys()]
    return answer(merged([sweep.trials for sweep in sweeps]), merged([sweep.epochs for sweep in sweeps]), compare)


# --- Runs ---------------------------------------------------------------------------------------------------


def runs_of(trials: pa.Table, epochs: pa.Table, completeness: float) -> list[Run]:
    """The trials that finished."""
    if "arm" not in trials.column_names:
        raise UserError(f"the sweep has no {named('arms')}: expected {UNIFORM} and others to compare it with")
    epochs_of: dict[str, list[dict[str, Any]]] = {}
    for row in epochs.to_pylist():
        epochs_of.setdefault(row["trial"], []).append(row)
    runs = []
    for row in trials.to_pylist():
        if row["status"] == FINISHED:
            of_run = sorted(epochs_of[row["trial"]], key=lambda epoch: epoch["step"])
            utility = {name: utility_at(of_run, name, completeness) for name in UTILITIES}
            runs.append(
                Run(
                    row["algorithm"],
                    row["arm"],
                    (row["selection"], row["seed"]),
                    row["updates"],
                    row["forgotten"] == 1,
                    {name: value for name, value in utility.items() if value is not None},
                )
            )
    return runs


def utility_at(epochs: Sequence[Mapping[str, Any]], utility: str, completeness: float) -> float | None:
    """The utility when a share of the forget set's recall is gone for the first time, on a straight line between the
    two measurements around that; None if it is not reached.

    Args:
        epochs: of a run, in order; the first is the initial model.
        utility: its column.
        completeness: the share.
    """
    rows = [row for row in epochs if row.get(FORGOTTEN) is not None and row.get(utility) is not None]
    level = (1 - completeness) * rows[0][FORGOTTEN] if rows else 0.0
    for before, after in pairwise(rows):
        if after[FORGOTTEN] <= level:
            part = (before[FORGOTTEN] - level) / (before[FORGOTTEN] - after[FORGOTTEN])
            return float(before[utility] + part * (after[utility] - before[utility]))
    return None


# --- Comparisons --------------------------------------------------------------------------------------------


def comparisons_of(runs: Sequence[Run], compare: CompareSpec) -> list[Compared]:
    """Every arm against uniform draws, by algorithm and measure; one family."""
    keys = [
        (algorithm, arm, measure)
        for algorithm, arm in dict.fromkeys((run.algorithm, run.arm) for run in runs)
        if arm != UNIFORM
        for measure in (UPDATES, *UTILITIES)
    ]
    verdicts = decide([_claim(runs, compare, *key) for key in keys])
    return [Compared(*key, verdict) for key, verdict in zip(keys, verdicts, strict=True)]


def _claim(runs: Sequence[Run], compare: CompareSpec, algorithm: str, arm: str, measure: str) -> Claim:
    changes = changes_of(runs, algorithm, arm, measure)
    mean = over_runs(changes)
    return Claim(
        f"{arm} beats uniform draws",
        f"{UTILITIES.get(measure, measure)}, {algorithm}",
        -1 if measure == UPDATES else +1,
        -math.log1p(-compare.margin_updates) if measure == UPDATES else compare.margin_utility,
        mean if len(changes) >= compare.least_pairs else lambda level: Estimate(mean(level).value, math.nan, math.nan),
        len(changes),
        "pairs",
        "log ratio" if measure == UPDATES else "difference",
    )


def changes_of(runs: Sequence[Run], algorithm: str, arm: str, measure: str) -> list[float]:
    """Of each pair: the logarithm of arm / uniform in updates, arm - uniform in utility."""
    values: dict[str, dict[tuple[str, int], float]] = {arm: {}, UNIFORM: {}}
    for run in runs:
        if run.algorithm == algorithm and run.arm in values:
            if measure == UPDATES:
                values[run.arm][run.pair] = math.log(run.updates)
            elif measure in run.utility:
                values[run.arm][run.pair] = run.utility[measure]
    return [value - values[UNIFORM][pair] for pair, value in values[arm].items() if pair in values[UNIFORM]]


# --- Answer -------------------------------------------------------------------------------------------------


def answer(trials: pa.Table, epochs: pa.Table, compare: CompareSpec) -> Answer:
    """From the trials of all arms, and their epochs."""
    runs = runs_of(trials, epochs, compare.completeness)
    arms = list(dict.fromkeys(run.arm for run in runs))
    if UNIFORM not in arms or len(arms) < 2:
        raise UserError(f"trials of {', '.join(arms) or 'no arm'}: expected {UNIFORM} and others to compare it with")
    compared = comparisons_of(runs, compare)
    sentences = [_table(runs, compared), _what_is_compared(runs, compared, compare)]
    if lost := trials.num_rows - len(runs):
        sentences.append(f"{lost} of {trials.num_rows} trials did not finish and are left out.")
    sentences += [_of_measure(compared, measure) for measure in (UPDATES, *UTILITIES)]
    sentences.append(_conclusion(compared))
    panels = [_forest(compared, measure, first=not number) for number, measure in enumerate((UPDATES, *UTILITIES))]
    rows = len({(c.algorithm, c.arm) for c in compared})
    return Answer(
        as_table(_rows(runs, compared)),
        panels,
        sentences,
        [c.verdict for c in compared],
        inches=(2.5 + 4.2 * len(panels), 1.8 + 0.42 * rows),
    )


def _rows(runs: Sequence[Run], compared: Sequence[Compared]) -> list[dict[str, Any]]:
    of_uniform = {
        "arm": UNIFORM,
        "measure": UPDATES,
    }
    rows = []
    for algorithm in dict.fromkeys(run.algorithm for run in runs):
        rows.append(of_uniform | {"algorithm": algorithm} | _reached(runs, algorithm, UNIFORM))
    for c in compared:
        rows.append(
            {
                "arm": c.arm,
                "measure": c.measure,
                "algorithm": c.algorithm,
                **(_reached(runs, c.algorithm, c.arm) if c.measure == UPDATES else {}),
                **interval_columns("change", c.change),
                "margin": c.verdict.claim.margin,
                "pairs": c.pairs,
                "pairs_needed": c.verdict.needed,
                "verdict": c.word,
            }
        )
    return rows


def _reached(runs: Sequence[Run], algorithm: str, arm: str) -> dict[str, Any]:
    of_arm = [run for run in runs if (run.algorithm, run.arm) == (algorithm, arm)]
    return {
        "runs": len(of_arm),
        "all_forgotten": sum(run.all_forgotten for run in of_arm),
        **interval_columns("updates", geometric_mean([run.updates for run in of_arm])),
    }


# --- Words --------------------------------------------------------------------------------------------------


def _table(runs: Sequence[Run], compared: Sequence[Compared]) -> str:
    by_key = {(c.algorithm, c.arm, c.measure): c for c in compared}
    rows = []
    for algorithm, arm in dict.fromkeys((run.algorithm, run.arm) for run in runs):
        of_arm = [run for run in runs if (run.algorithm, run.arm) == (algorithm, arm)]
        updates = geometric_mean([run.updates for run in of_arm])
        row = [algorithm, arm, f"{sum(run.all_forgotten for run in of_arm)} of {len(of_arm)}"]
        row.append(f"{decimal(updates.value, 1)} ({interval(updates, 1)})")
        for measure in (UPDATES, *UTILITIES):
            if arm == UNIFORM and measure != UPDATES:
                mean = over_seeds([run.utility[measure] for run in of_arm if measure in run.utility])
                row.append(f"{decimal(mean.value, 3)} ({interval(mean, 3)})")
            else:
                found = by_key.get((algorithm, arm, measure))
                row.append(f"{found.text()}: {found.word}" if found else "–")
        rows.append(row)
    head = ["algorithm", "arm", "all forgotten", "updates (95 % CI)", "less uniform: updates", *UTILITIES.values()]
    return (
        "Updates are geometric means; in the row of uniform draws utility is itself, below it the difference:\n\n"
        + (markdown_table(head, rows))
    )


def _what_is_compared(runs: Sequence[Run], compared: Sequence[Compared], compare: CompareSpec) -> str:
    capped = sum(not run.all_forgotten for run in runs)
    short = sum(not run.utility for run in runs)
    notes = []
    if capped:
        notes.append(f"{capped} of {len(runs)} runs ended before all was forgotten, and count with what they had made")
    if short:
        notes.append(f"{short} of {len(runs)} never got so far that utility could be compared")
    return (
        f"Paired by samples and seed ({min(c.pairs for c in compared)} pairs or more), with as many updates at most; "
        f"utility is that at which {compare.completeness:.0%} of the forget set's ROUGE-L recall is gone. An "
        f"effect matters from {compare.margin_updates:.0%} fewer updates on, and from {compare.margin_utility:g} in "
        f"utility. Verdicts by t intervals and by two one-sided tests, after Holm's correction for {len(compared)} "
        f"comparisons{': ' if notes else ''}{'; '.join(notes)}."
    )


def _of_measure(compared: Sequence[Compared], measure: str) -> str:
    of_measure = [c for c in compared if c.measure == measure]
    several = len({c.algorithm for c in of_measure}) > 1
    parts = []
    for word in WORDS.values():
        names = []
        for c in of_measure:
            if c.word == word:
                name = f"{c.arm} ({c.algorithm})" if several else c.arm
                names.append(name + (f" ({needed(c.verdict.needed, 'pairs')})" if word == UNKNOWN else ""))
        if names:
            parts.append(f"{word}: {listed(names)}")
    title = "Updates until all are forgotten" if measure == UPDATES else f"Utility, {UTILITIES[measure]}"
    return f"{title}, against uniform draws: {'; '.join(parts)}."


def _conclusion(compared: Sequence[Compared]) -> str:
    better = [c for c in compared if c.word == BETTER]
    unknown = [c for c in compared if c.word == UNKNOWN]
    if better:
        several = len({c.algorithm for c in compared}) > 1
        names = [
            f"{c.arm}{f' ({c.algorithm})' if several else ''} in "
            f"{'updates' if c.measure == UPDATES else UTILITIES[c.measure]}"
            for c in better
        ]
        return f"**Better than uniform draws: {listed(names)}**; in no other comparison is an arm better."
    if not unknown:
        return "**No arm beats uniform draws by as much as the margin, in updates or in utility.**"
    return (
        f"**No arm is shown to beat uniform draws**; {len(unknown)} of {len(compared)} comparisons {UNKNOWN} with so "
        "many pairs."
    )


# --- Picture ------------------------------------------------------------------------------------------------


def _forest(compared: Sequence[Compared], measure: str, first: bool) -> Draw:
    """The changes with 95 % intervals, and the margins between which they do not matter."""

    def draw(axes: Axes) -> None:
        shown = [c for c in compared if c.measure == measure]
        several = len({c.algorithm for c in shown}) > 1
        margin = shown[0].verdict.claim.margin
        axes.axvspan(-margin, margin, color=MUTED, alpha=0.15, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=1)
        for row, c in enumerate(shown):
            bars = error_bars([c.change])
            axes.errorbar(c.change.value, -row, xerr=bars, fmt="o", color=COLOURS[c.word], capsize=4)
        names = [f"{c.algorithm}, {c.arm}" if several else c.arm for c in shown]
        axes.set_yticks([-float(row) for row in range(len(shown))], names if first else [""] * len(shown))
        axes.grid(axis="y", visible=False)
        axes.set_ylim(-len(shown) + 0.4, 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        title = "log ratio of updates (left: fewer)" if measure == UPDATES else f"{UTILITIES[measure]} (right: more)"
        axes.set_xlabel(f"{title}, 95 % CI")

    return draw


EXPERIMENT = Experiment(
    "samplers",
    "what goes by difficulty, against uniform draws",
    "Does any use of difficulty beat uniform draws, in updates until all is forgotten, or in utility when as much is "
    "forgotten?",
    "drawing by MRD helps; groups by difficulty, difficulty as a regulariser and as a reward are named as future work, "
    "without numbers. This question goes beyond the paper.",
    run,
)
