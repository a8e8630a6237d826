"""Figure 2: do results and rankings depend on which samples are unlearned? And how much, as a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes

from bench.experiments.experiment import Answer, Experiment, Setting
from bench.files.status import FINISHED
from bench.jobs.sweep_tables import as_table
from bench.report.figures import BLUE, GREEN, MUTED, ORANGE, VERMILLION, Draw
from bench.report.words import count_with_ci, share_with_ci, with_ci
from bench.stats import selection_bias as bias
from bench.stats.estimates import Estimate
from scoring.errors import UserError

COLOURS, MARKERS = (BLUE, VERMILLION, GREEN, ORANGE), ("o", "s", "^", "D")
# From which share on the samples that were drawn are the larger part of what a number varies by.
MOST = 0.5


@dataclass(frozen=True, kw_only=True)
class Fig2Spec:
    """What is compared.

    Attributes:
        measures: measure -> 1 if higher is better, -1 if lower; columns of the sweep's trials, the usual one first.
        probability: with which a ranking is to be right.
    """

    measures: dict[str, float] = field(default_factory=lambda: {"completeness": 1.0, "utility": 1.0, "balance": 1.0})
    probability: float = 0.95


@dataclass(frozen=True)
class Measure:
    """The bias statistics of one measure, on scores of which higher is better."""

    name: str
    table: bias.ScoreTable
    shares: bias.VarianceShares
    reversals: Sequence[bias.Reversal]
    concordance: bias.Concordance
    needed: Estimate
    pairs_needed: Sequence[bias.PairNeeded]
    ranking: bias.Ranking
    adjusted: bias.AdjustedScores


def run(setting: Setting) -> Answer:
    spec = setting.spec(Fig2Spec, "statistics")
    thirds = setting.sweep("thirds").trials if "thirds" in setting.values else None
    return answer(setting.sweep().trials, spec, thirds)


def answer(trials: pa.Table, spec: Fig2Spec, thirds: pa.Table | None = None) -> Answer:
    """From the trials of a sweep over algorithms, selections and seeds; and of one over thirds by MRD."""
    finished = trials.filter(pc.equal(trials["status"], FINISHED)).to_pylist()
    lost = trials.num_rows - len(finished)
    flat = [name for name in spec.measures if not _varies(finished, name)]
    measures = [measure(finished, name, sign, spec) for name, sign in spec.measures.items() if name not in flat]
    if not measures:
        raise UserError(f"none of {', '.join(spec.measures)} varies between trials: there is nothing to compare")
    first = measures[0]
    sentences = [_headline(first, spec), *(_variance(each) for each in measures), _rankings(first, spec)]
    sentences += [f"{name} does not vary between these trials, and is left out." for name in flat]
    if lost:
        sentences.append(f"{lost} of {trials.num_rows} trials did not finish; selections without them are left out.")
    tables = {
        "fig2-shares": as_table(_share_rows(measures)),
        "fig2-pairs": as_table(_pair_rows(measures)),
        "fig2-ranking": as_table(_ranking_rows(measures)),
    }
    if thirds is not None:
        rows = third_rows(thirds, [each.name for each in measures])
        tables["fig2-thirds"] = as_table(rows)
        sentences.append(_by_thirds(rows, first.name))
    sentences.append(_claim(first))
    panels = [*(_strips(each) for each in measures), _stacked(measures)]
    columns = ["algorithm", "selection", "seed", "mean_log_mrd", *(each.name for each in measures)]
    table = pa.table({name: [row[name] for row in finished] for name in columns})
    return Answer(table, panels, sentences, tables=tables)


def _varies(rows: Sequence[Mapping[str, object]], name: str) -> bool:
    if rows and name not in rows[0]:
        raise UserError(f"measures: the trials have no {name!r}; expected a column of their table")
    return len({row[name] for row in rows if row[name] is not None}) > 1


def measure(rows: Sequence[Mapping[str, object]], name: str, sign: float, spec: Fig2Spec) -> Measure:
    """The statistics of one column of the trials."""
    usable = [row for row in rows if row[name] is not None]
    algorithms = [str(row["algorithm"]) for row in usable]
    selections = [str(row["selection"]) for row in usable]
    values = np.array([sign * float(row[name]) for row in usable])  # type: ignore[arg-type]
    table = bias.ScoreTable.of(algorithms, selections, values)
    difficulty = np.array([float(row["mean_log_mrd"]) for row in usable])  # type: ignore[arg-type]
    return Measure(
        name,
        table,
        bias.variance_shares(table),
        bias.reversal_rates(table),
        bias.kendalls_w(table),
        bias.selections_needed(table, spec.probability),
        bias.selections_needed_pair(table, spec.probability),
        bias.separable(table),
        bias.adjusted_scores(algorithms, difficulty, values, selections),
    )


# --- Sentences ----------------------------------------------------------------------------------------------


def _share(each: Measure) -> Estimate:
    """The share of one algorithm's variance that is due to the draw; with one seed a cell, its lower bound."""
    known = math.isfinite(each.shares.within_algorithm.value)
    return each.shares.within_algorithm if known else each.shares.within_algorithm_common


def _headline(each: Measure, spec: Fig2Spec) -> str:
    table = each.table
    seeds = f"{table.seeds} seeds" if table.seeds > 1 else "one seed"
    bound = "" if math.isfinite(each.shares.within_algorithm.value) else "at least "
    return (
        f"**{bound.capitalize()}{share_with_ci(_share(each))} of the variance of an algorithm's {each.name} is due "
        "to which "
        f"samples were drawn**, the rest to the seed; on {len(table.selections)} selections with {seeds} each. "
        f"For the ranking of {', '.join(table.algorithms)} to be right with a probability of {spec.probability:.0%}, a "
        f"paper needs {count_with_ci(each.needed)} selections; it usually reports one."
    )


def _variance(each: Measure) -> str:
    parts = ", ".join(f"{name} {share_with_ci(share)}" for name, share in each.shares.parts.items())
    return f"Shares of the variance of {each.name}: {parts}."


def _rankings(each: Measure, spec: Fig2Spec) -> str:
    reversals = []
    for reversal in each.reversals:
        by_seeds = "" if reversal.by_seeds is None else f" (seed noise alone: {reversal.by_seeds:.0%})"
        reversals.append(
            f"{reversal.worse} is ahead of {reversal.better}, the better on average by "
            f"{with_ci(reversal.difference)}, on "
            f"{share_with_ci(reversal.rate)} of the selections{by_seeds}"
        )
    ranks = ", ".join(f"{rank.algorithm} {rank.text}" for rank in each.ranking.ranks)
    apart = [f"{p.better} and {p.worse}" for p in each.ranking.pairs if not p.separable]
    tied = f" Not separable: {'; '.join(apart)}." if apart else " All pairs are separable."
    return (
        f"By {each.name}: {'; '.join(reversals)}. The rank correlation of two selections' rankings is "
        f"{with_ci(each.concordance.agreement)} (Kendall's W {each.concordance.w:.2f}). Ranks with their 95 % "
        "intervals: "
        f"{ranks}.{tied} Per unit of mean log MRD the {each.name} changes by {with_ci(each.adjusted.slope)}."
    )


def _claim(each: Measure) -> str:
    share = _share(each)
    varies = share.low > 0
    reversed_surely = [r for r in each.reversals if r.rate.low > (r.by_seeds or 0.0) and r.difference.sign > 0]
    if varies:
        first = "results depend on the samples that were drawn: the claim holds here "
        first += f"({share_with_ci(share)} of the variance"
        first += f", {'most' if share.low > MOST else 'perhaps most' if share.high > MOST else 'the smaller part'})"
    else:
        first = f"whether results depend on the samples that were drawn cannot be told here ({share_with_ci(share)})"
    if reversed_surely:
        pairs = "; ".join(f"{r.worse} ahead of {r.better} on {share_with_ci(r.rate)}" for r in reversed_surely)
        second = (
            f"rankings reverse on some selections more often than the seed alone explains: the claim holds ({pairs})"
        )
    elif all(r.rate.high < 0.05 for r in each.reversals):
        second = "rankings do not reverse on these samples: the claim is contradicted"
    else:
        second = "that rankings reverse because of the samples, and not of the seed, cannot be told here"
    return f"The paper's claim: {first}; {second}."


# --- Thirds by MRD ------------------------------------------------------------------------------------------


def third_rows(trials: pa.Table, measures: Sequence[str]) -> list[dict[str, object]]:
    """Mean of each measure for each algorithm on the easy, the medium and the hard third, over seeds."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in trials.to_pylist():
        if row["status"] == FINISHED:
            groups.setdefault((row["algorithm"], row["level"]), []).append(row)
    return [
        {"algorithm": algorithm, "third": level, "runs": len(own), "mean_log_mrd": own[0]["mean_log_mrd"]}
        | {name: float(np.mean([row[name] for row in own])) for name in measures}
        for (algorithm, level), own in groups.items()
    ]


def _by_thirds(rows: Sequence[Mapping[str, object]], name: str) -> str:
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(str(row["algorithm"]), {})[str(row["third"])] = float(row[name])  # type: ignore[arg-type]
    lines = [
        f"| {algorithm} | " + " | ".join(f"{own[third]:.3f}" for third in ("easy", "medium", "hard")) + " |"
        for algorithm, own in found.items()
    ]
    head = f"| {name} | easy third | medium | hard |\n|---|---|---|---|\n"
    return f"Reported by thirds of the forget set by MRD instead of one draw:\n\n{head}" + "\n".join(lines)


# --- Rows and pictures --------------------------------------------------------------------------------------


def _estimated(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _share_rows(measures: Sequence[Measure]) -> list[dict[str, object]]:
    rows = []
    for each in measures:
        own = each.shares.parts | {
            "within an algorithm: selection and algorithm×selection": each.shares.within_algorithm,
            "within an algorithm: selection, common to all": each.shares.within_algorithm_common,
        }
        rows += [{"measure": each.name, "part": part, **_estimated(share)} for part, share in own.items()]
        rows.append({"measure": each.name, "part": "agreement of rankings", **_estimated(each.concordance.agreement)})
        rows.append({"measure": each.name, "part": "selections needed", **_estimated(each.needed)})
    return rows


def _pair_rows(measures: Sequence[Measure]) -> list[dict[str, object]]:
    rows = []
    for each in measures:
        needed = {(p.better, p.worse): p.selections for p in each.pairs_needed}
        apart = {(p.better, p.worse): p for p in each.ranking.pairs}
        for reversal in each.reversals:
            key = (reversal.better, reversal.worse)
            count = needed[key]
            rows.append(
                {
                    "measure": each.name,
                    "better": reversal.better,
                    "worse": reversal.worse,
                    "difference": reversal.difference.value,
                    "difference_low": reversal.difference.low,
                    "difference_high": reversal.difference.high,
                    "reversal_rate": reversal.rate.value,
                    "reversal_low": reversal.rate.low,
                    "reversal_high": reversal.rate.high,
                    "reversal_by_seeds": reversal.by_seeds,
                    "selections_needed": count.value,
                    "selections_low": count.low,
                    "selections_high": count.high,
                    "p_value": apart[key].p_value,
                    "separable": apart[key].separable,
                }
            )
    return rows


def _ranking_rows(measures: Sequence[Measure]) -> list[dict[str, object]]:
    rows = []
    for each in measures:
        adjusted = {score.algorithm: score for score in each.adjusted.scores}
        for rank in each.ranking.ranks:
            score = adjusted[rank.algorithm]
            rows.append(
                {
                    "measure": each.name,
                    "algorithm": rank.algorithm,
                    "rank_best": rank.best,
                    "rank_worst": rank.worst,
                    "mean": score.raw.value,
                    "mean_low": score.raw.low,
                    "mean_high": score.raw.high,
                    "adjusted": score.adjusted.value,
                    "adjusted_low": score.adjusted.low,
                    "adjusted_high": score.adjusted.high,
                }
            )
    return rows


def _strips(each: Measure) -> Draw:
    """Every run, by selection; selections from the lowest mean to the highest."""

    def draw(axes: Axes) -> None:
        table = each.table
        order = np.argsort(table.values.mean(axis=(0, 2)), kind="stable")
        count = len(table.algorithms)
        for number, (algorithm, colour, marker) in enumerate(
            zip(table.algorithms, cycle(COLOURS), cycle(MARKERS), strict=False)
        ):
            own = table.values[number][order]
            x = np.arange(len(order)) + (number - (count - 1) / 2) * 0.18
            axes.plot(x, own.mean(axis=1), color=colour, linewidth=0.8, alpha=0.6)
            axes.plot(
                np.repeat(x, table.seeds), own.ravel(), marker, color=colour, markersize=4, label=algorithm, alpha=0.9
            )
        axes.set_xlabel("selections of forget samples, by mean")
        axes.set_ylabel(each.name)
        axes.set_title(f"{each.name}: one point a run")
        axes.legend(loc="best")

    return draw


def _stacked(measures: Sequence[Measure]) -> Draw:
    """Shares of the variance, one bar a measure."""

    def draw(axes: Axes) -> None:
        parts = list(measures[0].shares.parts)
        shades = dict(zip(parts, (MUTED, VERMILLION, ORANGE, BLUE), strict=False))
        for row, each in enumerate(measures):
            left = 0.0
            for part, share in each.shares.parts.items():
                axes.barh(row, share.value, left=left, color=shades[part], label=part if row == 0 else None, height=0.6)
                left += share.value
        axes.set_yticks(range(len(measures)), [each.name for each in measures])
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.6, len(measures) + 0.5)
        axes.set_xlabel("share of the variance")
        axes.set_title("What a run's number varies by")
        axes.legend(loc="upper center", ncols=2)

    return draw


EXPERIMENT = Experiment(
    "fig2",
    "selection bias",
    "Do results and rankings of unlearning algorithms depend on which samples are unlearned, and by how much?",
    "for the same algorithm performance varies with the samples chosen, and the ranking of algorithms can reverse "
    "(section 3.1, Figure 2).",
    run,
)
