"""Table 10: does MRD-weighted sampling pay? All that it takes until every sample is forgotten, MRD included.

The paper's times are whole rounds of Table 9 and one measurement of MRD of Table 8: GA 8m20 = 5 x 1m40, GA + MRD 6m23 =
3 x 1m40 + 1m23, GradDiff + MRD 11m38 = 5 x 2m03 + 1m23, NPO + MRD 12m03 = 5 x 2m08 + 1m23. With m = 2, MRD would be
measured two or three times in so many rounds. Here every measurement counts; looking which samples are forgotten does
not, as it is part of the stop rule and not of the sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from bench.experiments.experiment import Answer, Experiment, Setting
from bench.experiments.shared import costs
from bench.experiments.shared.arms import ALL, UNIFORM, Row, plus_minus, together
from bench.experiments.shared.costs import COST, SECONDS, UPDATES, ForgetSet, Ratio, Spent
from bench.experiments.shared.verdicts import CONTRADICTED, HOLDS, UNKNOWN, by_verdict, overall
from bench.files.status import FINISHED
from bench.jobs.sweep_tables import as_table
from bench.stats.estimates import Estimate, over_seeds
from scoring.errors import UserError

PAPER_DRAWS = 200
# Seconds of the paper: without and with MRD.
PAPER = {"GA": (500.0, 383.0), "GradDiff": (861.0, 698.0), "PO": (1024.0, 851.0), "NPO": (960.0, 723.0)}
MONTE_CARLO = "Monte Carlo, K = "
PRINTED = f"{MONTE_CARLO}{PAPER_DRAWS}"  # as Algorithm 1 has it
COUNTED = " (counted)"


def run(setting: Setting) -> Answer:
    found = costs.timed(setting)
    base = next(values["base"] for key, values in setting.values.items() if key.startswith("sweep"))
    return answer(together([sweep.trials for sweep in found]), ForgetSet.of(base))


def arm_of(row: Row) -> str:
    """How it is drawn and how MRD is measured."""
    if not row["alpha"]:
        return UNIFORM
    return f"{MONTE_CARLO}{row['draws']}" if row["estimator"] == "monte-carlo" else row["estimator"]


def answer(trials: pa.Table, forget: ForgetSet) -> Answer:
    """From trials of algorithms, arms and seeds that end when all samples are forgotten."""
    rows = [row for row in trials.to_pylist() if row["status"] == FINISHED]
    found = [costs.spent(row, arm_of(row), forget) for row in rows]
    found += [counted(run, int(row["draws"])) for run, row in zip(found, rows, strict=True) if _needs_counting(row)]
    arms = [arm for arm in dict.fromkeys(run.arm for run in found) if arm != UNIFORM]
    single = {arm: {measure: compared(found, arm, measure) for measure in _measures(arm)} for arm in arms}
    average = {arm: {measure: averaged(found, arm, measure) for measure in _measures(arm)} for arm in arms}
    if not any(own for by_measure in single.values() for own in by_measure.values()):
        raise UserError(
            "no algorithm reached the end both with alpha 0 and with alpha 1 and the same seed: expected more epochs"
        )
    sentences = [_markdown(found, single)]
    sentences += [_arm(arm, single[arm], average[arm]) for arm in arms]
    if missed := [run for run in found if not run.reached and not run.arm.endswith(COUNTED)]:
        sentences.append(_missed(missed, found))
    if lost := trials.num_rows - len(rows):
        sentences.append(f"{lost} of {trials.num_rows} trials did not finish and are left out.")
    sentences.append(_claim(found, single, average))
    panels = [
        costs.stacked(_bars(found), ("updates", "MRD"), "cost to the end, forwards of the forget set"),
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
    return Answer(as_table(_rows(found, single, average)), panels, sentences, inches=(19.0, 5.5))


# --- Runs ---------------------------------------------------------------------------------------------------


def _needs_counting(row: Row) -> bool:
    return arm_of(row).startswith(MONTE_CARLO) and row["draws"].isdigit() and int(row["draws"]) != PAPER_DRAWS


def counted(run: Spent, draws: int) -> Spent:
    """A run whose MRD takes K draws, as it would be with the paper's: one forward each, and one without noise."""
    mrd = run.mrd * (PAPER_DRAWS + 1) / (draws + 1)
    nothing = float("nan")
    return dataclasses.replace(run, arm=PRINTED + COUNTED, mrd=mrd, seconds_training=nothing, seconds_mrd=nothing)


def _measures(arm: str) -> tuple[str, ...]:
    return (COST,) if arm.endswith(COUNTED) else (COST, UPDATES, SECONDS)


def _pairs(found: Sequence[Spent], algorithm: str, arm: str) -> dict[int, tuple[Spent, Spent]]:
    """Seed -> a run with the arm and a run without, where both came to the end."""
    by_arm = {
        which: {run.seed: run for run in found if (run.algorithm, run.arm) == (algorithm, which) and run.reached}
        for which in (arm, UNIFORM)
    }
    return {seed: (run, by_arm[UNIFORM][seed]) for seed, run in by_arm[arm].items() if seed in by_arm[UNIFORM]}


def _algorithms(found: Sequence[Spent], arm: str) -> list[str]:
    """Those that have pairs."""
    return [name for name in dict.fromkeys(run.algorithm for run in found) if _pairs(found, name, arm)]


def compared(found: Sequence[Spent], arm: str, measure: str) -> list[Ratio]:
    """What an arm takes over uniform draws, for every algorithm."""
    return costs.ratios(
        measure,
        {
            name: [(run.of(measure), other.of(measure)) for run, other in _pairs(found, name, arm).values()]
            for name in _algorithms(found, arm)
        },
    )


def averaged(found: Sequence[Spent], arm: str, measure: str) -> list[Ratio]:
    """The geometric mean over the algorithms, on the seeds that all of them have."""
    own = [_pairs(found, name, arm) for name in _algorithms(found, arm)]
    if not own:
        return []
    pairs = []
    for seed in sorted(set.intersection(*(set(each) for each in own))):
        runs = [each[seed] for each in own]
        pairs.append(tuple(_geometric([pair[which].of(measure) for pair in runs]) for which in (0, 1)))
    return costs.ratios(measure, {ALL: pairs}) if pairs else []  # type: ignore[dict-item]


def _geometric(values: Sequence[float]) -> float:
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product


def verdicts(found: Sequence[Spent], arm: str, single: Sequence[Ratio], average: Sequence[Ratio]) -> dict[str, str]:
    """Algorithm, or ALL -> whether an arm takes less in all.

    A run that was not at the end when its updates were used up would have taken more: where such runs are left out,
    nothing is concluded in favour of their arm.
    """
    result = {}
    for ratio in (*single, *average):
        names = [ratio.name] if ratio.name != ALL else [own.name for own in single]
        cut = {which: _cut(found, names, which) for which in (arm, UNIFORM)}
        if ratio.sign < 0:
            result[ratio.name] = UNKNOWN if cut[arm] else HOLDS
        elif ratio.sign > 0:
            result[ratio.name] = UNKNOWN if cut[UNIFORM] else CONTRADICTED
        else:
            result[ratio.name] = UNKNOWN
    return result


def _cut(found: Sequence[Spent], algorithms: Sequence[str], arm: str) -> bool:
    return any(run.arm == arm and run.algorithm in algorithms and not run.reached for run in found)


# --- Words --------------------------------------------------------------------------------------------------


def name(algorithm: str, arm: str) -> str:
    return algorithm if arm == UNIFORM else f"{algorithm} + MRD, {arm}"


def _cells(found: Sequence[Spent]) -> dict[tuple[str, str], list[Spent]]:
    """Algorithm and arm -> its runs, arms of an algorithm together."""
    order = {algorithm: number for number, algorithm in enumerate(dict.fromkeys(run.algorithm for run in found))}
    cells: dict[tuple[str, str], list[Spent]] = {}
    for run in sorted(found, key=lambda run: order[run.algorithm]):
        cells.setdefault((run.algorithm, run.arm), []).append(run)
    return cells


def _markdown(found: Sequence[Spent], single: Mapping[str, Mapping[str, Sequence[Ratio]]]) -> str:
    lines = [
        "| method | at the end | updates | cost of updates | of MRD | in all | seconds | cost / uniform | "
        "seconds / uniform |",
        "|---" * 9 + "|",
    ]
    for (algorithm, arm), runs in _cells(found).items():
        done = [run for run in runs if run.reached]
        cells = [plus_minus([run.of(measure) for run in done], 1) for measure in (UPDATES, "training", "mrd", COST)]
        seconds = "–" if arm.endswith(COUNTED) else plus_minus([run.seconds for run in done], 2)
        over = []
        for measure in (COST, SECONDS):
            own = [r for r in single.get(arm, {}).get(measure, ()) if r.name == algorithm]
            over.append(costs.times(own[0].value) if own else "–")
        lines.append(
            f"| {name(algorithm, arm)} | {len(done)} of {len(runs)} | {' | '.join([*cells, seconds, *over])} |"
        )
    seeds = len({run.seed for run in found})
    return (
        f"Until every sample is forgotten, MRD included; means over {seeds} seeds ± half the 95 % t interval. Cost is "
        f"in forwards of the forget set, a backward counting {costs.BACKWARD}:\n\n" + "\n".join(lines)
    )


def _arm(arm: str, single: Mapping[str, Sequence[Ratio]], average: Mapping[str, Sequence[Ratio]]) -> str:
    parts = []
    for measure, own in single.items():
        texts = [ratio.text() for ratio in (*average[measure], *own)]
        parts.append(f"{measure} {', '.join(texts) if texts else 'not determined'}")
    return f"MRD by {arm} over uniform draws, paired by seed: {'; '.join(parts)}."


def _missed(missed: Sequence[Spent], found: Sequence[Spent]) -> str:
    real = [run for run in found if not run.arm.endswith(COUNTED)]
    names = list(dict.fromkeys(name(run.algorithm, run.arm) for run in missed))
    return (
        f"{len(missed)} of {len(real)} runs had not forgotten all when their updates were used up "
        f"({'; '.join(names)}); they are left out of the ratios, and nothing is concluded in favour of their arm."
    )


def _claim(
    found: Sequence[Spent],
    single: Mapping[str, Mapping[str, Sequence[Ratio]]],
    average: Mapping[str, Mapping[str, Sequence[Ratio]]],
) -> str:
    parts = []
    # As the paper measures MRD first.
    for arm in sorted(single, key=lambda arm: not arm.startswith(PRINTED)):
        own = verdicts(found, arm, single[arm][COST], average[arm][COST])
        on_average = own.pop(ALL, UNKNOWN)
        ratio = costs.times(average[arm][COST][0].value) if average[arm][COST] else "not determined"
        parts.append(
            f"**with MRD by {arm} it {overall(own, on_average)}**: cost {ratio} that of uniform draws over the "
            f"algorithms together, by themselves it {by_verdict(own)}"
        )
    return f"The paper's claim, that drawing by MRD takes less in all, MRD included: {'; '.join(parts)}."


# --- Rows and pictures --------------------------------------------------------------------------------------


def _rows(
    found: Sequence[Spent],
    single: Mapping[str, Mapping[str, Sequence[Ratio]]],
    average: Mapping[str, Mapping[str, Sequence[Ratio]]],
) -> list[dict[str, Any]]:
    rows = []
    for (algorithm, arm), runs in _cells(found).items():
        done = [run for run in runs if run.reached]
        row: dict[str, Any] = {"algorithm": algorithm, "arm": arm, "runs": len(runs), "at_the_end": len(done)}
        for measure in (UPDATES, "training", "mrd", COST, SECONDS, "seconds_training", "seconds_mrd"):
            mean = over_seeds([run.of(measure) for run in done])
            row |= {measure: mean.value, f"{measure}_low": mean.low, f"{measure}_high": mean.high}
        ratios = {m: next((r for r in own if r.name == algorithm), None) for m, own in single.get(arm, {}).items()}
        rows.append(row | _ratio_columns(ratios) | _paper(algorithm, arm))
    for arm, by_measure in average.items():
        ratios = {measure: own[0] if own else None for measure, own in by_measure.items()}
        rows.append({"algorithm": ALL, "arm": arm} | _ratio_columns(ratios))
    return rows


def _ratio_columns(ratios: Mapping[str, Ratio | None]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for measure, ratio in ratios.items():
        value = ratio.value if ratio else Estimate(float("nan"), float("nan"), float("nan"))
        columns |= {
            f"{measure}_ratio": value.value,
            f"{measure}_ratio_low": value.low,
            f"{measure}_ratio_high": value.high,
            f"{measure}_ratio_p_corrected": ratio.corrected if ratio else None,
        }
    return columns


def _paper(algorithm: str, arm: str) -> dict[str, Any]:
    if algorithm not in PAPER:
        return {}
    without, with_mrd = PAPER[algorithm]
    return {"paper_seconds": without} if arm == UNIFORM else {"paper_seconds_ratio": with_mrd / without}


def _bars(found: Sequence[Spent]) -> dict[str, list[tuple[float, float]]]:
    """Of what was run: what is counted for the paper's K would dwarf it."""
    return {
        name(*cell): [(run.training, run.mrd) for run in runs if run.reached]
        for cell, runs in _cells(found).items()
        if not cell[1].endswith(COUNTED)
    }


EXPERIMENT = Experiment(
    "table10",
    "what weighted sampling takes in all",
    "Do algorithms that draw by MRD take less until all is forgotten, the measurements of MRD included?",
    "with MRD they take less in all: GA 8m20s and 6m23s, GradDiff 14m21s and 11m38s, PO 17m04s and 14m11s, NPO 16m00s "
    "and 12m03s (Table 10).",
    run,
)
