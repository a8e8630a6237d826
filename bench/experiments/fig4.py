"""Figure 4: how unequal are sets of samples in the change of the weights that it takes to forget them?

Composites are drawn with replacement from one forget set and unlearned to the stopping rule. The draws are independent,
so intervals are about further composites of the same forget set. Runs of one composite differ by their seed; only what
composites differ by beyond that is due to their samples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.experiments.shared.single_samples import COLOURS
from bench.files.status import FINISHED
from bench.jobs.sweep_tables import as_table
from bench.report.figures import INK, Draw
from bench.report.verdicts import listed
from bench.report.words import interval_columns, with_ci
from bench.stats.estimates import FEWEST, LEVEL, Estimate, over_sets, partial_spearman, spearman
from bench.stats.verdicts import Claim, Verdict, decide
from scoring.errors import UserError

# Composites whose standard deviation is under a tenth of their mean are not "vastly different".
LARGE_VARIATION = 0.1
VARIATION = "variation"  # the effect that the margin is named for
DRAWS = 10_000


@dataclass(frozen=True)
class Spread:
    """How much one algorithm changed the weights until composites were forgotten.

    Attributes:
        algorithm: its name.
        composites: (n,) names.
        changes: (n, seeds), mean |Δθ| when the run ended.
        mean_log_mrd, tokens: (n,) the mean of log MRD over a composite's samples, and the sum of their scored tokens.
        forgotten: (n,) whether all samples were forgotten with every seed; if not, the change is a lower bound.
    """

    algorithm: str
    composites: tuple[str, ...]
    changes: np.ndarray
    mean_log_mrd: np.ndarray
    tokens: np.ndarray
    forgotten: np.ndarray

    @property
    def seeds(self) -> int:
        return self.changes.shape[1]

    @property
    def means(self) -> np.ndarray:
        """(n,) over the seeds."""
        return self.changes.mean(axis=1)

    @property
    def difficulties(self) -> np.ndarray:
        """(n,) the means; inf, the tied last rank, for composites that were not forgotten."""
        return np.where(self.forgotten, self.means, math.inf)

    def variation(self, level: float = LEVEL) -> Estimate:
        """Standard deviation between composites over their mean.

        With several seeds, the part of the variance that they explain is taken off (one-way random effects,
        (MS_between - MS_within) / seeds, and 0 where that is negative); with one seed it is part of the number.
        """
        return self._estimate(lambda between, _, mean: np.sqrt(between) / mean, level)

    def composite_share(self) -> Estimate:
        """Share of the variance of one run's change that is due to the composite (intraclass correlation); nan with
        one seed."""
        return self._estimate(lambda between, within, _: between / (between + within))

    def _estimate(
        self, statistic: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray], level: float = LEVEL
    ) -> Estimate:
        """A number made of the variances between composites and between seeds, and of the mean.

        The interval is a generalized one (Weerahandi 1993): MS* = MS df / chi^2_df of both mean squares, with the df
        between composites lowered to what the jackknife of the variance shows, as changes need not be normal. (A
        bootstrap of a standard deviation misses in one of ten cases at 24 composites.)

        Args:
            statistic: of the variance between composites, the variance within them, and the mean.
        """
        count, seeds, means = *self.changes.shape, self.means
        variance = means.var(ddof=1)
        within = self.changes.var(axis=1, ddof=1).mean() if seeds > 1 else math.nan

        def at(variance: float | np.ndarray, within: float | np.ndarray, mean: float | np.ndarray) -> np.ndarray:
            noise = within / seeds if seeds > 1 else 0.0
            return statistic(np.maximum(0.0, variance - noise), np.asarray(within), np.asarray(mean))

        value = float(at(variance, within, means.mean()))
        if count < FEWEST or not math.isfinite(value) or not variance:
            return Estimate(value, math.nan, math.nan)
        rng = np.random.default_rng(0)
        df = _degrees_of_freedom(means)
        variances = variance * df / rng.chisquare(df, DRAWS)
        df_within = count * max(1, seeds - 1)
        simulated = at(
            variances,
            within * df_within / rng.chisquare(df_within, DRAWS),
            means.mean() + np.sqrt(variances / count) * rng.normal(size=DRAWS),
        )
        low, high = np.quantile(simulated, [(1 - level) / 2, (1 + level) / 2]).tolist()
        return Estimate(value, low, high)

    def percentile_ratio(self) -> Estimate:
        """The 90th percentile of the composites' means over their 10th."""

        def ratio(sets: list[np.ndarray]) -> np.ndarray:
            high, low = np.quantile(self.means[sets[0]], [0.9, 0.1], axis=-1)
            return high / low

        return over_sets(ratio, [len(self.changes)])

    @cached_property
    def with_mrd(self) -> Estimate:
        """Spearman's correlation of a composite's mean log MRD with its change."""
        return spearman(self.mean_log_mrd, self.difficulties)

    @cached_property
    def beyond_length(self) -> Estimate:
        """The same with the number of tokens partialled out."""
        return partial_spearman(self.mean_log_mrd, self.difficulties, self.tokens)


def _degrees_of_freedom(values: np.ndarray) -> float:
    """The degrees of freedom of the variance of (n,): n - 1, or fewer where the jackknife of its logarithm varies more
    than chi^2 would."""
    count = len(values)
    logs = np.log([np.delete(values, place).var(ddof=1) for place in range(count)])
    error = (count - 1) / count * float(((logs - logs.mean()) ** 2).sum())
    return min(count - 1.0, 2 / error) if error > 0 else count - 1.0


def run(setup: Setup) -> Answer:
    sweep = setup.sweep()
    return answer(sweep.trials, sweep.samples, setup.margins(VARIATION))


def answer(trials: pa.Table, samples: pa.Table, margins: Mapping[str, float]) -> Answer:
    """From the trials of a sweep over algorithms, composites and seeds, and their samples.

    Args:
        margins: the smallest VARIATION beyond LARGE_VARIATION that matters.
    """
    spreads = spreads_of(trials, samples)
    agreements = agreements_of(spreads)
    sentences = [_headline(spreads), _inequality(spreads), _relation_to_mrd(spreads)]
    if agreements:
        sentences.append(_agreement(agreements))
    if capped := sum(int((~spread.forgotten).sum()) for spread in spreads):
        sentences.append(
            f"{capped} of {sum(len(spread.composites) for spread in spreads)} composites were not wholly forgotten at "
            "the cap: their change is a lower bound, and in rank correlations they share the last rank."
        )
    if lost := trials.num_rows - sum(spread.changes.size for spread in spreads):
        sentences.append(f"{lost} of {trials.num_rows} trials are left out: they, or another seed, did not finish.")
    decided = decide([_claim_of(spread, margins[VARIATION]) for spread in spreads])
    sentences.append(_claim(decided, spreads[0].seeds))
    rows = [row for spread in spreads for row in _rows(spread)]
    largest = max(float(spread.means.max()) for spread in spreads)
    return Answer(
        as_table(rows),
        [_polar(spread, COLOURS[number % len(COLOURS)], largest) for number, spread in enumerate(spreads)],
        sentences,
        decided,
        polar=True,
        tables={
            "fig4-spread": as_table([_summary(spread) for spread in spreads]),
            "fig4-agreement": as_table(
                [
                    {"first": first, "second": second, **interval_columns("spearman", correlation)}
                    for (first, second), correlation in agreements.items()
                ],
            ),
        },
    )


def spreads_of(trials: pa.Table, samples: pa.Table) -> list[Spread]:
    """One for each algorithm; composites with fewer finished seeds than others are left out.

    Raises:
        UserError: no algorithm has two composites.
    """
    tokens: defaultdict[str, int] = defaultdict(int)
    for row in samples.select(["trial", "num_tokens"]).to_pylist():
        tokens[row["trial"]] += row["num_tokens"]
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in trials.to_pylist():
        if row["status"] == FINISHED:
            cells.setdefault(row["algorithm"], {}).setdefault(row["selection"], []).append(row)
    spreads = []
    for algorithm, composites in cells.items():
        seeds = max(map(len, composites.values()))
        complete = {name: rows for name, rows in composites.items() if len(rows) == seeds}
        if len(complete) < 2:
            continue
        first = [rows[0] for rows in complete.values()]
        spreads.append(
            Spread(
                algorithm,
                tuple(complete),
                np.array([[row["mean_abs_delta"] for row in rows] for rows in complete.values()]),
                np.array([row["mean_log_mrd"] for row in first], dtype=float),
                np.array([tokens[row["trial"]] for row in first], dtype=float),
                np.array([all(row["forgotten"] == 1 for row in rows) for rows in complete.values()]),
            )
        )
    if not spreads:
        raise UserError("no algorithm has two composites that finished: there is nothing to compare")
    return spreads


# --- Sentences ----------------------------------------------------------------------------------------------


def _headline(spreads: Sequence[Spread]) -> str:
    parts = ", ".join(f"{with_ci(spread.variation())} with {spread.algorithm}" for spread in spreads)
    seeds = spreads[0].seeds
    noise = (
        f"{seeds} runs each, the noise of their seeds taken off"
        if seeds > 1
        else "one run each, its seed's noise in it"
    )
    return (
        "**The change of the weights that it takes to forget a composite (mean |Δθ|) has a coefficient of variation of "
        f"{parts}** between {len(spreads[0].composites)} composites ({noise})."
    )


def _inequality(spreads: Sequence[Spread]) -> str:
    parts = []
    for spread in spreads:
        share = ""
        if spread.seeds > 1:
            share = f", {with_ci(spread.composite_share())} of the variance of a run is the composite's own"
        parts.append(
            f"{spread.algorithm}: the 90th percentile is {with_ci(spread.percentile_ratio())} times the 10th, and the "
            f"largest {spread.means.max() / spread.means.min():.2f} times the smallest{share}"
        )
    return f"{'; '.join(parts)}. The ratio of the extremes grows with the number of composites, and has no interval."


def _relation_to_mrd(spreads: Sequence[Spread]) -> str:
    parts = [
        f"{with_ci(spread.with_mrd)} with {spread.algorithm} ({with_ci(spread.beyond_length)} with the number of "
        "tokens partialled out)"
        for spread in spreads
    ]
    return (
        "Rank correlation of a composite's mean log MRD with its change, which the paper's definition makes negative: "
        f"{'; '.join(parts)}."
    )


def _agreement(agreements: Mapping[tuple[str, str], Estimate]) -> str:
    parts = [
        f"{with_ci(correlation)} between {first} and {second}" for (first, second), correlation in agreements.items()
    ]
    return f"Rank correlation of the changes of the same composites: {', '.join(parts)}."


def agreements_of(spreads: Sequence[Spread]) -> dict[tuple[str, str], Estimate]:
    """Two algorithms -> Spearman's correlation of the changes, over the composites of both."""
    correlations = {}
    for first, second in combinations(spreads, 2):
        x, y = (dict(zip(spread.composites, spread.difficulties.tolist(), strict=True)) for spread in (first, second))
        shared = [name for name in x if name in y]
        correlations[first.algorithm, second.algorithm] = spearman(
            np.array([x[name] for name in shared]), np.array([y[name] for name in shared])
        )
    return correlations


def _claim_of(spread: Spread, margin: float) -> Claim:
    """That composites need vastly different changes."""

    def beyond_large(level: float) -> Estimate:
        variation = spread.variation(level)
        if spread.seeds == 1:  # its noise is part of the variation
            return Estimate(variation.value - LARGE_VARIATION, math.nan, math.nan)
        return Estimate(*(end - LARGE_VARIATION for end in (variation.value, variation.low, variation.high)))

    return Claim(
        "sets of samples need vastly different changes of the weights",
        f"coefficient of variation beyond {LARGE_VARIATION:g}, {spread.algorithm}",
        +1,
        margin,
        beyond_large,
        len(spread.composites),
        "composites",
    )


def _claim(decided: Sequence[Verdict], seeds: int) -> str:
    text = f"The paper's claim, that {decided[0].claim.text}: {listed(decided)}."
    if seeds == 1:
        text += " With one seed, composites cannot be told from noise."
    return text


# --- Rows and picture ---------------------------------------------------------------------------------------


def _rows(spread: Spread) -> list[dict[str, Any]]:
    return [
        {
            "algorithm": spread.algorithm,
            "composite": name,
            "seed": seed,
            "mean_abs_delta": float(change),
            "mean_log_mrd": float(spread.mean_log_mrd[place]),
            "tokens": int(spread.tokens[place]),
            "forgotten": bool(spread.forgotten[place]),
        }
        for place, name in enumerate(spread.composites)
        for seed, change in enumerate(spread.changes[place])
    ]


def _summary(spread: Spread) -> dict[str, Any]:
    return {
        "algorithm": spread.algorithm,
        "composites": len(spread.composites),
        "seeds": spread.seeds,
        "mean": float(spread.changes.mean()),
        **interval_columns("variation", spread.variation()),
        **interval_columns("own_share", spread.composite_share()),
        **interval_columns("percentile_ratio", spread.percentile_ratio()),
        **interval_columns("spearman_of_mrd", spread.with_mrd),
        **interval_columns("length_partialled_out", spread.beyond_length),
        "extremes_ratio": float(spread.means.max() / spread.means.min()),
    }


def _polar(spread: Spread, colour: str, largest: float) -> Draw:
    """A point for each composite, its distance from the centre the mean |Δθ|; all panels reach to the largest."""

    def draw(axes: Axes) -> None:
        power = math.floor(math.log10(largest))
        radius = spread.means / 10.0**power
        angle = np.linspace(0, 2 * np.pi, len(radius), endpoint=False)
        for forgotten in (True, False):
            shown = spread.forgotten == forgotten
            axes.plot(
                angle[shown],
                radius[shown],
                "o",
                color=colour,
                markerfacecolor=colour if forgotten else "none",
                markersize=5,
                alpha=0.8,
            )
        circle = np.linspace(0, 2 * np.pi, 200)
        axes.plot(circle, np.full_like(circle, radius.mean()), color=INK, linewidth=1, linestyle="--")
        axes.set_xticklabels([])
        axes.set_ylim(0, 1.1 * largest / 10.0**power)
        axes.set_title(f"{spread.algorithm}\nmean |Δθ| in $10^{{{power}}}$, dashed: their mean", loc="center")

    return draw


EXPERIMENT = Experiment(
    "fig4",
    "differences in unlearning difficulty",
    "How unequal are sets of samples in the change of the weights that it takes to forget them?",
    "different sets of samples need vastly different changes of the parameters to be unlearned (Figure 4).",
    run,
)
