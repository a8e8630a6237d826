"""Table 10: does MRD-weighted sampling pay? All that it takes until every sample is forgotten, MRD included.

The paper's times are whole rounds of Table 9 and one measurement of MRD of Table 8: GA 8m20 = 5 x 1m40, GA + MRD 6m23 =
3 x 1m40 + 1m23, GradDiff + MRD 11m38 = 5 x 2m03 + 1m23, NPO + MRD 12m03 = 5 x 2m08 + 1m23. With m = 2, MRD would be
measured two or three times in so many rounds. Here every measurement counts. To look up which samples are forgotten
does not count: it is part of the stop rule and not of the sampling.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.experiments.shared import costs
from bench.experiments.shared.arms import ALL, UNIFORM, Row, merged, plus_minus
from bench.experiments.shared.costs import BACKWARD, COST, SECONDS, UPDATES, ForgetSet, Ratio, RunCost
from bench.files.status import FINISHED
from bench.jobs.sweep_tables import as_table
from bench.report.verdicts import by_claim
from bench.report.words import interval_columns
from bench.stats.estimates import Estimate, geometric_mean, over_seeds
from bench.stats.verdicts import Claim, Interval, Verdict, decide, half_of
from scoring.errors import UserError

# Arm -> measure -> a ratio to uniform draws for each algorithm, or one for their average.
Ratios = Mapping[str, Mapping[str, Sequence[Ratio]]]
PAPER_DRAWS = 200
# Seconds of the paper: without and with MRD.
PAPER = {"GA": (500.0, 383.0), "GradDiff": (861.0, 698.0), "PO": (1024.0, 851.0), "NPO": (960.0, 723.0)}
PAPER_LOG_RATIO = float(np.mean([math.log(with_mrd / without) for without, with_mrd in PAPER.values()]))
MONTE_CARLO = "Monte Carlo, K = "
PRINTED = f"{MONTE_CARLO}{PAPER_DRAWS}"  # the arm of Algorithm 1 as printed
COUNTED = " (counted)"  # follows an arm that was not run: its cost is computed from that of another


def run(setup: Setup) -> Answer:
    sweeps = costs.timed_sweeps(setup)
    forget = ForgetSet.of(setup.filled(setup.sweep_keys()[0])["base"])
    return answer(merged([sweep.trials for sweep in sweeps]), forget)


def arm_of(row: Row) -> str:
    """The way of drawing, and of measuring MRD for it."""
    if not row["alpha"]:
        return UNIFORM
    return f"{MONTE_CARLO}{row['draws']}" if row["estimator"] == "monte-carlo" else row["estimator"]


def answer(trials: pa.Table, forget: ForgetSet) -> Answer:
    """From trials of algorithms, arms and seeds that end when all samples are forgotten."""
    rows = [row for row in trials.to_pylist() if row["status"] == FINISHED]
    runs = [costs.run_cost(row, arm_of(row), forget) for row in rows]
    runs += [
        with_draws_of_paper(run, int(row["draws"]))
        for run, row in zip(runs, rows, strict=True)
        if _has_other_draws(row)
    ]
    arms = [arm for arm in dict.fromkeys(run.arm for run in runs) if arm != UNIFORM]
    single = {arm: {measure: ratios_to_uniform(runs, arm, measure) for measure in _measures(arm)} for arm in arms}
    average = {arm: {measure: average_ratio(runs, arm, measure) for measure in _measures(arm)} for arm in arms}
    if not any(ratios for by_measure in single.values() for ratios in by_measure.values()):
        raise UserError(
            "no algorithm reached the end both with alpha 0 and with alpha 1 and the same seed: expected more epochs"
        )
    sentences = [_table(runs, single)]
    sentences += [_ratios_of_arm(arm, single[arm], average[arm]) for arm in arms]
    if capped := [run for run in runs if not run.reached and not run.arm.endswith(COUNTED)]:
        sentences.append(_not_at_the_end(capped, runs))
    if lost := trials.num_rows - len(rows):
        sentences.append(f"{lost} of {trials.num_rows} trials did not finish and are left out.")
    verdicts = decide(claims_of(runs, average))
    sentences.append(_claim(verdicts))
    panels = [
        costs.stacked_bars(_cost_parts(runs), ("updates", "MRD"), "cost to the end, forwards of the forget set"),
        costs.ratio_dots(
            {arm: [*single[arm][COST], *average[arm][COST]] for arm in arms}, "cost / uniform, 95 % CI", log=True
        ),
        *(
            costs.ratio_dots(
                {arm: [*single[arm][measure], *average[arm][measure]] for arm in arms if measure in single[arm]},
                f"{measure} / uniform, 95 % CI",
                paper={name: with_mrd / without for name, (without, with_mrd) in PAPER.items()}
                if measure == SECONDS
                else None,
            )
            for measure in (UPDATES, SECONDS)
        ),
    ]
    return Answer(as_table(_rows(runs, single, average)), panels, sentences, verdicts, inches=(19.0, 5.5))


# --- Runs ---------------------------------------------------------------------------------------------------


def _has_other_draws(row: Row) -> bool:
    """Whether MRD was measured by Monte Carlo with another number of draws than in the paper."""
    return arm_of(row).startswith(MONTE_CARLO) and row["draws"].isdigit() and int(row["draws"]) != PAPER_DRAWS


def with_draws_of_paper(run: RunCost, draws: int) -> RunCost:
    """A run whose MRD took K draws, as it would cost with the paper's K: one forward a draw, and one without noise."""
    mrd = run.mrd * (PAPER_DRAWS + 1) / (draws + 1)
    nan = float("nan")
    return dataclasses.replace(run, arm=PRINTED + COUNTED, mrd=mrd, seconds_training=nan, seconds_mrd=nan)


def _measures(arm: str) -> tuple[str, ...]:
    """What is known of the runs of an arm."""
    return (COST,) if arm.endswith(COUNTED) else (COST, UPDATES, SECONDS)


def _pairs(runs: Sequence[RunCost], algorithm: str, arm: str) -> dict[int, tuple[RunCost, RunCost]]:
    """Seed -> a run with the arm and a run with uniform draws, where both came to the end."""
    weighted, uniform = (
        {run.seed: run for run in runs if (run.algorithm, run.arm) == (algorithm, which) and run.reached}
        for which in (arm, UNIFORM)
    )
    return {seed: (run, uniform[seed]) for seed, run in weighted.items() if seed in uniform}


def _pairs_by_algorithm(runs: Sequence[RunCost], arm: str) -> dict[str, dict[int, tuple[RunCost, RunCost]]]:
    """The pairs of every algorithm that has any."""
    pairs = {name: _pairs(runs, name, arm) for name in dict.fromkeys(run.algorithm for run in runs)}
    return {name: by_seed for name, by_seed in pairs.items() if by_seed}


def ratios_to_uniform(runs: Sequence[RunCost], arm: str, measure: str) -> list[Ratio]:
    """How many times as much an arm takes as uniform draws, for every algorithm."""
    return costs.ratios(
        measure,
        {
            name: [(weighted.amount(measure), uniform.amount(measure)) for weighted, uniform in by_seed.values()]
            for name, by_seed in _pairs_by_algorithm(runs, arm).items()
        },
    )


def average_ratio(runs: Sequence[RunCost], arm: str, measure: str) -> list[Ratio]:
    """The same for the geometric mean over the algorithms, on the seeds that all of them have; [] if there is none."""
    by_algorithm = list(_pairs_by_algorithm(runs, arm).values())
    if not by_algorithm:
        return []
    means = []
    for seed in sorted(set.intersection(*(set(by_seed) for by_seed in by_algorithm))):
        amounts = np.array([[run.amount(measure) for run in by_seed[seed]] for by_seed in by_algorithm])
        weighted, uniform = (geometric_mean(column).value for column in amounts.T)
        means.append((weighted, uniform))
    return costs.ratios(measure, {ALL: means}) if means else []


def claims_of(runs: Sequence[RunCost], average: Ratios) -> list[Claim]:
    """That each way to measure MRD takes less than uniform draws, in all and in updates alone."""
    unknown = Estimate(math.nan, math.nan, math.nan)
    claims = []
    for measure, text in (
        (COST, "drawing by MRD takes less in all, MRD included"),
        (UPDATES, "drawing by MRD takes fewer updates"),
    ):
        # The arm that measures MRD as the paper does comes first.
        for arm in sorted(average, key=lambda arm: not arm.startswith(PRINTED)):
            if measure in average[arm]:
                ratio = next(iter(average[arm][measure]), None)
                claims.append(
                    Claim(
                        text,
                        f"{measure} / uniform, MRD by {arm}, geometric mean of algorithms",
                        -1,
                        half_of(PAPER_LOG_RATIO),
                        _never_for_capped(ratio.at, runs, arm) if ratio else lambda _: unknown,
                        ratio.pairs if ratio else 0,
                        "seeds",
                        "log ratio",
                        PAPER_LOG_RATIO if measure == COST and arm.startswith(PRINTED) else None,
                    )
                )
    return claims


def _never_for_capped(at: Interval, runs: Sequence[RunCost], arm: str) -> Interval:
    """The interval of arm / uniform, not known where it could speak for an arm with runs that are left out.

    A run that had not come to the end when its updates were used up would have taken more: what is left of its arm
    looks better than it is. Only an interval that is wholly against such an arm stands.
    """
    arm_capped, uniform_capped = (any(run.arm == each and not run.reached for run in runs) for each in (arm, UNIFORM))

    def at_level(level: float) -> Estimate:
        found = at(level)
        if (arm_capped and found.sign != 1) or (uniform_capped and found.sign != -1):
            return Estimate(found.value, math.nan, math.nan)
        return found

    return at_level


# --- Words --------------------------------------------------------------------------------------------------


def method_name(algorithm: str, arm: str) -> str:
    return algorithm if arm == UNIFORM else f"{algorithm} + MRD, {arm}"


def _runs_by_method(runs: Sequence[RunCost]) -> dict[tuple[str, str], list[RunCost]]:
    """Algorithm and arm -> its runs, the arms of an algorithm together."""
    order = {algorithm: number for number, algorithm in enumerate(dict.fromkeys(run.algorithm for run in runs))}
    methods: dict[tuple[str, str], list[RunCost]] = {}
    for run in sorted(runs, key=lambda run: order[run.algorithm]):
        methods.setdefault((run.algorithm, run.arm), []).append(run)
    return methods


def _table(runs: Sequence[RunCost], single: Ratios) -> str:
    lines = [
        "| method | at the end | updates | cost of updates | of MRD | in all | seconds | cost / uniform | "
        "seconds / uniform |",
        "|---" * 9 + "|",
    ]
    for (algorithm, arm), of_method in _runs_by_method(runs).items():
        done = [run for run in of_method if run.reached]
        cells = [plus_minus([run.amount(measure) for run in done], 1) for measure in (UPDATES, "training", "mrd", COST)]
        cells.append("–" if arm.endswith(COUNTED) else plus_minus([run.seconds for run in done], 2))
        for measure in (COST, SECONDS):
            ratio = _ratio_of(algorithm, single.get(arm, {}).get(measure, ()))
            cells.append(costs.times_with_ci(ratio.value) if ratio else "–")
        lines.append(f"| {method_name(algorithm, arm)} | {len(done)} of {len(of_method)} | {' | '.join(cells)} |")
    seeds = len({run.seed for run in runs})
    return (
        f"Until every sample is forgotten, MRD included; means over {seeds} seeds ± half the 95 % t interval. Cost is "
        f"in forwards of the forget set, a backward counting {BACKWARD}:\n\n" + "\n".join(lines)
    )


def _ratio_of(algorithm: str, ratios: Sequence[Ratio]) -> Ratio | None:
    return next((ratio for ratio in ratios if ratio.name == algorithm), None)


def _ratios_of_arm(arm: str, single: Mapping[str, Sequence[Ratio]], average: Mapping[str, Sequence[Ratio]]) -> str:
    parts = []
    for measure, ratios in single.items():
        texts = [ratio.text() for ratio in (*average[measure], *ratios)]
        parts.append(f"{measure} {', '.join(texts) if texts else 'not determined'}")
    return f"MRD by {arm} over uniform draws, paired by seed: {'; '.join(parts)}."


def _not_at_the_end(capped: Sequence[RunCost], runs: Sequence[RunCost]) -> str:
    measured = [run for run in runs if not run.arm.endswith(COUNTED)]
    names = list(dict.fromkeys(method_name(run.algorithm, run.arm) for run in capped))
    return (
        f"{len(capped)} of {len(measured)} runs had not forgotten all when their updates were used up "
        f"({'; '.join(names)}); they are left out of the ratios, and nothing is concluded in favour of their arm: "
        "where the mean of the algorithms could speak for it, its interval is not known."
    )


def _claim(verdicts: Sequence[Verdict]) -> str:
    return f"The paper's claim, {'; '.join(by_claim(verdicts))}."


# --- Rows and pictures --------------------------------------------------------------------------------------


def _rows(runs: Sequence[RunCost], single: Ratios, average: Ratios) -> list[dict[str, Any]]:
    rows = []
    for (algorithm, arm), of_method in _runs_by_method(runs).items():
        done = [run for run in of_method if run.reached]
        row: dict[str, Any] = {"algorithm": algorithm, "arm": arm, "runs": len(of_method), "at_the_end": len(done)}
        for measure in (UPDATES, "training", "mrd", COST, SECONDS, "seconds_training", "seconds_mrd"):
            row |= interval_columns(measure, over_seeds([run.amount(measure) for run in done]))
        by_measure = single.get(arm, {})
        row |= _ratio_columns({measure: _ratio_of(algorithm, ratios) for measure, ratios in by_measure.items()})
        rows.append(row | _paper_columns(algorithm, arm))
    for arm, by_measure in average.items():
        columns = _ratio_columns({measure: _ratio_of(ALL, ratios) for measure, ratios in by_measure.items()})
        rows.append({"algorithm": ALL, "arm": arm} | columns)
    return rows


def _ratio_columns(by_measure: Mapping[str, Ratio | None]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for measure, ratio in by_measure.items():
        value = ratio.value if ratio else Estimate(float("nan"), float("nan"), float("nan"))
        columns |= interval_columns(f"{measure}_ratio", value)
        columns[f"{measure}_ratio_p_corrected"] = ratio.corrected if ratio else None
    return columns


def _paper_columns(algorithm: str, arm: str) -> dict[str, Any]:
    if algorithm not in PAPER:
        return {}
    without, with_mrd = PAPER[algorithm]
    return {"paper_seconds": without} if arm == UNIFORM else {"paper_seconds_ratio": with_mrd / without}


def _cost_parts(runs: Sequence[RunCost]) -> dict[str, list[tuple[float, float]]]:
    """Method -> the cost of updates and of MRD, for each seed. Only measured runs: one with the paper's K would dwarf
    them."""
    return {
        method_name(algorithm, arm): [(run.training, run.mrd) for run in of_method if run.reached]
        for (algorithm, arm), of_method in _runs_by_method(runs).items()
        if not arm.endswith(COUNTED)
    }


EXPERIMENT = Experiment(
    "table10",
    "what weighted sampling takes in all",
    "Do algorithms that draw by MRD take less until all is forgotten, the measurements of MRD included?",
    "with MRD they take less in all: GA 8m20s and 6m23s, GradDiff 14m21s and 11m38s, PO 17m04s and 14m11s, NPO 16m00s "
    "and 12m03s (Table 10).",
    run,
)
