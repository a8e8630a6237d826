"""Figure 2: do results and rankings depend on which samples are unlearned? And how much, as a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, pairwise
from typing import Annotated, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.files.status import FINISHED
from bench.jobs.sweep_tables import as_table
from bench.metrics import limits_of
from bench.report.figures import BLUE, GREEN, MUTED, ORANGE, VERMILLION, Draw
from bench.report.verdicts import by_claim
from bench.report.words import count_with_ci, interval_columns, numbers_table, share_with_ci, with_ci
from bench.stats.estimates import Estimate
from bench.stats.selection_bias import (
    AdjustedScores,
    Concordance,
    Failures,
    PairNeeded,
    Ranking,
    Reversal,
    ScoreTable,
    VarianceShares,
    adjusted_scores,
    failures_of,
    kendalls_w,
    reversal_rates,
    selections_needed,
    selections_needed_between,
    selections_needed_pair,
    separable,
    separable_groups,
    variance_shares,
)
from bench.stats.verdicts import UNKNOWN, Claim, Verdict, decide
from bench.tasks.selections import THIRDS
from scoring.errors import UserError
from scoring.settings import Doc, Ge, Gt, Le, Lt, check, named

SHARE, REVERSALS = "share", "reversals"  # effects that margins are named for
COLOURS, MARKERS = (BLUE, VERMILLION, GREEN, ORANGE), ("o", "s", "^", "D")


@dataclass(frozen=True, kw_only=True)
class Fig2Spec:
    """What is compared."""

    measures: Annotated[
        dict[str, Annotated[float, Ge(-1), Le(1)]],
        Doc("column of the sweep's trials -> 1 if higher is better, -1 if lower; the first is the one in the headline"),
    ] = field(default_factory=lambda: {"completeness": 1.0, "utility": 1.0, "balance": 1.0})
    probability: Annotated[float, Gt(0), Lt(1), Doc("of a right ranking, for which selections are counted")] = 0.95

    def checked(self) -> Self:
        """The same.

        Raises:
            UserError: a value that is not allowed, or no measure.
        """
        check(self)
        if not self.measures:
            raise UserError(f"{named('measures')} is empty: expected columns of the table of trials")
        return self


@dataclass(frozen=True)
class MeasureBias:
    """The statistics of selection bias (`bench.stats.selection_bias`) for one measure; higher scores are better."""

    measure: str
    table: ScoreTable
    shares: VarianceShares
    reversals: Sequence[Reversal]
    concordance: Concordance
    needed: Estimate
    groups: Sequence[Sequence[str]]
    needed_of_groups: Estimate
    pairs_needed: Sequence[PairNeeded]
    ranking: Ranking
    adjusted: AdjustedScores
    limits: tuple[float, float]  # what a score can be


def run(setup: Setup) -> Answer:
    spec = setup.spec(Fig2Spec, "statistics")
    thirds = setup.sweep("thirds").trials if "thirds" in setup.values else None
    trials = setup.sweep().trials
    margins = setup.margins(SHARE, REVERSALS)
    with setup.section("statistics"):
        return answer(trials, spec, margins, thirds)


def answer(trials: pa.Table, spec: Fig2Spec, margins: Mapping[str, float], thirds: pa.Table | None = None) -> Answer:
    """From the trials of a sweep over algorithms, selections and seeds; and of one over thirds by MRD.

    Args:
        margins: the smallest SHARE of the variance, and the smallest rate of REVERSALS, that matter.
    """
    finished = trials.filter(pc.equal(trials["status"], FINISHED)).to_pylist()
    constant = [name for name in spec.measures if not _varies(finished, name)]
    biases = [bias_of(finished, name, sign, spec) for name, sign in spec.measures.items() if name not in constant]
    if not biases:
        raise UserError(f"none of {', '.join(spec.measures)} varies between trials: there is nothing to compare")
    first = biases[0]
    sentences = [_headline(first, spec), *(_variance(bias) for bias in biases), _rankings(first)]
    sentences += [f"{name} does not vary between these trials, and is left out." for name in constant]
    failures = failures_of((str(row["algorithm"]), row["status"] == FINISHED) for row in trials.to_pylist())
    if any(of_algorithm.failed for of_algorithm in failures.values()):
        sentences.append(_lost(failures, first))
    tables = {
        "fig2-shares": as_table(_share_rows(biases)),
        "fig2-pairs": as_table(_pair_rows(biases)),
        "fig2-ranking": as_table(_ranking_rows(biases)),
        "fig2-numbers": numbers_table(
            {f"{bias.measure} per unit of mean log MRD": bias.adjusted.slope for bias in biases}
        ),
        "fig2-failures": as_table([_failure_row(*each) for each in failures.items()]),
    }
    measures = [bias.measure for bias in biases]
    if thirds is not None:
        rows = third_rows(thirds, measures)
        tables["fig2-thirds"] = as_table(rows)
        sentences.append(_table_by_thirds(rows, first.measure))
    decided = decide([claim for bias in biases for claim in _claims(bias, margins)])
    sentences.append(_claim(decided))
    panels = [*(_runs_by_selection(bias) for bias in biases), _share_bars(biases)]
    columns = ["algorithm", "selection", "seed", "mean_log_mrd", *measures]
    table = pa.table({name: [row[name] for row in finished] for name in columns})
    return Answer(table, panels, sentences, decided, tables=tables)


def _varies(rows: Sequence[Mapping[str, object]], measure: str) -> bool:
    """Whether a measure has different values in the trials.

    Raises:
        UserError: the trials have no such column.
    """
    if rows and measure not in rows[0]:
        raise UserError(f"{named('measures')} has {measure!r}: expected columns of the table of trials")
    return len({row[measure] for row in rows if row[measure] is not None}) > 1


def bias_of(trials: Sequence[Mapping[str, object]], measure: str, sign: float, spec: Fig2Spec) -> MeasureBias:
    """The statistics of one column of the trials.

    Args:
        sign: 1 if higher is better, -1 if lower.
    """
    usable = [row for row in trials if row[measure] is not None]
    algorithms = [str(row["algorithm"]) for row in usable]
    selections = [str(row["selection"]) for row in usable]
    values = np.array([sign * float(row[measure]) for row in usable])  # type: ignore[arg-type]
    table = ScoreTable.of(algorithms, selections, values, [int(str(row["seed"])) for row in usable])
    difficulty = np.array([float(row["mean_log_mrd"]) for row in usable])  # type: ignore[arg-type]
    ranking = separable(table)
    groups = separable_groups(ranking)
    ends = [sign * end for end in limits_of(measure)]
    return MeasureBias(
        measure,
        table,
        variance_shares(table),
        reversal_rates(table),
        kendalls_w(table),
        selections_needed(table, spec.probability),
        groups,
        selections_needed_between(table, groups, spec.probability),
        selections_needed_pair(table, spec.probability),
        ranking,
        adjusted_scores(algorithms, difficulty, values, selections),
        (min(ends), max(ends)),
    )


# --- Sentences ----------------------------------------------------------------------------------------------


def _headline(bias: MeasureBias, spec: Fig2Spec) -> str:
    table = bias.table.complete
    seeds = f"{table.seeds} seeds" if table.seeds > 1 else "one seed"
    share = bias.shares.within_algorithm
    due = (
        f"**{share_with_ci(share)} of the variance of an algorithm's {bias.measure} is due to which samples were "
        "drawn**, the rest to the seed"
        if math.isfinite(share.value)
        else f"How much of the variance of an algorithm's {bias.measure} is due to which samples were drawn, and how "
        f"much to the seed, {UNKNOWN} with one seed"
    )
    return (
        f"{due}; on {len(table.selections)} selections with {seeds} each. For the ranking of "
        f"{', '.join(table.algorithms)} to be right with a probability of {spec.probability:.0%}, a paper needs "
        f"{count_with_ci(bias.needed)} selections{_needed_in_part(bias)}; it usually reports one."
    )


def _needed_in_part(bias: MeasureBias) -> str:
    """What a ranking needs that goes no further than algorithms can be told apart, and what neighbours need."""
    text = ""
    if 1 < len(bias.groups) < len(bias.ranking.ranks):
        names = ", then ".join("/".join(group) for group in bias.groups)
        text = f", and for no more than {names} {count_with_ci(bias.needed_of_groups)}"
    if len(bias.ranking.ranks) > 2:
        of_pair = {frozenset((pair.better, pair.worse)): pair for pair in bias.pairs_needed}
        neighbours = [of_pair[frozenset(pair)] for pair in pairwise(rank.algorithm for rank in bias.ranking.ranks)]
        counts = [f"{pair.better} before {pair.worse} {count_with_ci(pair.selections)}" for pair in neighbours]
        text += f" (of neighbours, {'; '.join(counts)})"
    return text


def _variance(bias: MeasureBias) -> str:
    parts = ", ".join(f"{name} {share_with_ci(share)}" for name, share in bias.shares.parts.items())
    tails = bias.shares.long_tails
    limits = f" No upper limits, as scores have long tails ({tails}): outliers that were not drawn would change them."
    return f"Shares of the variance of {bias.measure}: {parts}.{limits if tails else ''}"


def _lost(failures: Mapping[str, Failures], bias: MeasureBias) -> str:
    """How many trials of which algorithm did not finish, and what that does to the numbers."""
    shares = ", ".join(f"{name} {share_with_ci(of_algorithm.share)}" for name, of_algorithm in failures.items())
    lost, trials = (sum(getattr(each, name) for each in failures.values()) for name in ("failed", "runs"))
    of_all = f"{len(bias.table.incomplete)} of {len(bias.table.selections)} selections are not complete"
    return (
        f"{lost} of {trials} trials did not finish: {shares}. {of_all}: means are adjusted for the selections that an "
        "algorithm lacks, and two are compared on those that both have; the shares of the variance and the rank "
        "correlation are of complete selections."
    )


def _rankings(bias: MeasureBias) -> str:
    reversals = []
    for reversal in bias.reversals:
        by_seeds = "" if reversal.by_seeds is None else f" (seed noise alone: {reversal.by_seeds:.0%})"
        reversals.append(
            f"{reversal.worse} is ahead of {reversal.better}, the better on average by "
            f"{with_ci(reversal.difference)}, on {share_with_ci(reversal.rate)} of the selections{by_seeds}"
        )
    ranks = ", ".join(f"{rank.algorithm} {rank.text}" for rank in bias.ranking.ranks)
    tied = [f"{pair.better} and {pair.worse}" for pair in bias.ranking.pairs if not pair.separable]
    separability = f"Not separable: {'; '.join(tied)}." if tied else "All pairs are separable."
    return (
        f"By {bias.measure}: {'; '.join(reversals)}. The rank correlation of two selections' rankings is "
        f"{with_ci(bias.concordance.agreement)} (Kendall's W {bias.concordance.w:.2f}). Ranks with their 95 % "
        f"intervals: {ranks}. {separability} Per unit of mean log MRD the {bias.measure} changes by "
        f"{with_ci(bias.adjusted.slope)}."
    )


def _claims(bias: MeasureBias, margins: Mapping[str, float]) -> list[Claim]:
    """That results depend on the draw, and that the worse of two is ahead on more selections than seeds explain."""
    table = bias.table

    def share(level: float) -> Estimate:
        return variance_shares(table, level).within_algorithm

    return [
        Claim(
            "results depend on the samples that were drawn",
            f"share of the variance of one algorithm's {bias.measure} that is due to the draw",
            +1,
            margins[SHARE],
            share,
            len(table.complete.selections),
            "selections",
            "share",
        ),
        Claim(
            "rankings reverse with the samples",
            f"share of selections on which the worse of two algorithms by {bias.measure} is ahead, beyond what seeds "
            "do; of the two with the most",
            +1,
            margins[REVERSALS],
            partial(_most_reversed, table),
            len(table.selections),
            "selections",
            "share",
        ),
    ]


def _most_reversed(table: ScoreTable, level: float) -> Estimate:
    """The largest rate of reversals beyond seeds, over the pairs of algorithms, which are all corrected for.

    Counts of selections show that there are reversals; that they are rare is shown by how far apart algorithms are.
    """
    by_size = reversal_rates(table, level)
    by_count = reversal_rates(table, 1 - (1 - level) / max(len(by_size), 1))
    beyond = [
        (counts.rate.value - counts.by_seeds, counts.rate.low - counts.by_seeds, sizes.at_most - counts.by_seeds)
        for counts, sizes in zip(by_count, by_size, strict=True)
        if counts.by_seeds is not None
    ]
    return Estimate(*map(max, zip(*beyond, strict=True))) if beyond else Estimate(math.nan, math.nan, math.nan)


def _claim(decided: Sequence[Verdict]) -> str:
    return f"The paper's claims: {'. '.join(by_claim(decided))}."


# --- Thirds by MRD ------------------------------------------------------------------------------------------


def third_rows(trials: pa.Table, measures: Sequence[str]) -> list[dict[str, object]]:
    """Mean of each measure for each algorithm on the easy, the medium and the hard third, over seeds."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in trials.to_pylist():
        if row["status"] == FINISHED:
            groups.setdefault((row["algorithm"], row["level"]), []).append(row)
    return [
        {"algorithm": algorithm, "third": level, "runs": len(seeds), "mean_log_mrd": seeds[0]["mean_log_mrd"]}
        | {name: float(np.mean([row[name] for row in seeds])) for name in measures}
        for (algorithm, level), seeds in groups.items()
    ]


def _table_by_thirds(rows: Sequence[Mapping[str, object]], measure: str) -> str:
    means: dict[str, dict[str, float]] = {}
    for row in rows:
        means.setdefault(str(row["algorithm"]), {})[str(row["third"])] = float(row[measure])  # type: ignore[arg-type]
    lines = [
        f"| {algorithm} | " + " | ".join(f"{by_third[third]:.3f}" for third in THIRDS) + " |"
        for algorithm, by_third in means.items()
    ]
    head = f"| {measure} | easy third | medium | hard |\n|---|---|---|---|\n"
    return f"Reported by thirds of the forget set by MRD instead of one draw:\n\n{head}" + "\n".join(lines)


# --- Rows and pictures --------------------------------------------------------------------------------------


def _share_rows(biases: Sequence[MeasureBias]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for bias in biases:
        numbers = bias.shares.parts | {
            "within an algorithm: selection and algorithm×selection": bias.shares.within_algorithm,
            "within an algorithm: selection, common to all": bias.shares.within_algorithm_common,
            "agreement of rankings": bias.concordance.agreement,
            "selections needed": bias.needed,
            "selections needed up to groups": bias.needed_of_groups,
        }
        rows += [
            {"measure": bias.measure, "part": part, "value": number.value, "low": number.low, "high": number.high}
            for part, number in numbers.items()
        ]
    return rows


def _pair_rows(biases: Sequence[MeasureBias]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for bias in biases:
        needed = {(pair.better, pair.worse): pair.selections for pair in bias.pairs_needed}
        tests = {(pair.better, pair.worse): pair for pair in bias.ranking.pairs}
        for reversal in bias.reversals:
            key = (reversal.better, reversal.worse)
            count = needed[key]
            rows.append(
                {
                    "measure": bias.measure,
                    "better": reversal.better,
                    "worse": reversal.worse,
                    **interval_columns("difference", reversal.difference),
                    "reversal_rate": reversal.rate.value,
                    "reversal_low": reversal.rate.low,
                    "reversal_high": reversal.rate.high,
                    "reversal_by_seeds": reversal.by_seeds,
                    "selections_needed": count.value,
                    "selections_low": count.low,
                    "selections_high": count.high,
                    "p_value": tests[key].p_value,
                    "separable": tests[key].separable,
                }
            )
    return rows


def _failure_row(name: str, failures: Failures) -> dict[str, object]:
    return {"algorithm": name, "trials": failures.runs, "failed": failures.failed} | interval_columns(
        "share", failures.share
    )


def _ranking_rows(biases: Sequence[MeasureBias]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for bias in biases:
        adjusted = {score.algorithm: score.adjusted for score in bias.adjusted.scores}
        for rank in bias.ranking.ranks:
            # Where all have all selections, the adjusted score is the mean, and is not shown as another number.
            of_rank = adjusted[rank.algorithm] if bias.table.incomplete else Estimate(math.nan, math.nan, math.nan)
            rows.append(
                {
                    "measure": bias.measure,
                    "algorithm": rank.algorithm,
                    "rank_best": rank.best,
                    "rank_worst": rank.worst,
                    **interval_columns("mean", rank.mean.within(*bias.limits)),
                    **interval_columns("adjusted", of_rank.within(*bias.limits)),
                }
            )
    return rows


def _runs_by_selection(bias: MeasureBias) -> Draw:
    """Every run, by selection; selections from the lowest mean to the highest."""

    def draw(axes: Axes) -> None:
        table = bias.table
        order = np.argsort(table.values.mean(axis=(0, 2)), kind="stable")
        count = len(table.algorithms)
        for number, (algorithm, colour, marker) in enumerate(
            zip(table.algorithms, cycle(COLOURS), cycle(MARKERS), strict=False)
        ):
            values = table.values[number][order]
            x = np.arange(len(order)) + (number - (count - 1) / 2) * 0.18
            axes.plot(x, values.mean(axis=1), color=colour, linewidth=0.8, alpha=0.6)
            axes.plot(
                np.repeat(x, table.seeds),
                values.ravel(),
                marker,
                color=colour,
                markersize=4,
                label=algorithm,
                alpha=0.9,
            )
        axes.set_xlabel("selections of forget samples, by mean")
        axes.set_ylabel(bias.measure)
        axes.set_title(f"{bias.measure}: one point a run")
        axes.legend(loc="best")

    return draw


def _share_bars(biases: Sequence[MeasureBias]) -> Draw:
    """Shares of the variance, one bar for each measure."""

    def draw(axes: Axes) -> None:
        parts = list(biases[0].shares.parts)
        colours = dict(zip(parts, (MUTED, VERMILLION, ORANGE, BLUE, GREEN), strict=False))
        for row, bias in enumerate(biases):
            left = 0.0
            for part, share in bias.shares.parts.items():
                label = part if row == 0 else None
                axes.barh(row, share.value, left=left, color=colours[part], label=label, height=0.6)
                left += share.value
        axes.set_yticks(range(len(biases)), [bias.measure for bias in biases])
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.6, len(biases) + 0.5)
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
