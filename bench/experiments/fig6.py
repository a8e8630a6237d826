"""Figure 6: how much does MRD depend on sigma, and from how many draws is it stable?

Measured on the same samples along the same directions, in float32 and in bfloat16, by all estimators of both
statistics; and settled on the way: sigma = 1e-5 or 1, K = 100 or 200, E|.| or |E.|.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from bench.experiments.experiment import Answer, Experiment, Setting
from bench.experiments.shared.verdicts import CONTRADICTED, HOLDS, lies_within
from bench.jobs.draws import (
    EXACT,
    EXPECTED_SLOPE,
    HALF_NORMAL_SPREAD,
    SLOPE_TOLERANCE,
    Point,
    PointDraws,
    ScalingLine,
    inflation,
    measure_draws,
    scaling_line,
)
from bench.jobs.resources import Resources
from bench.models.find import find_model
from bench.report.figures import BLUE, GREEN, GRID, INK, MUTED, ORANGE, VERMILLION, Draw
from bench.report.words import (
    decimal,
    interval,
    interval_columns,
    number_with_ci,
    percent_with_ci,
    with_ci,
)
from bench.stats.estimates import Estimate, over_sets, spearman
from bench.tasks.datasets import load_dataset
from scoring.errors import UserError
from scoring.mrd import Statistic, reduce_draws
from scoring.samples import encode, evenly_spaced
from scoring.work import Dtype

COARSE: Dtype = "bfloat16"
CLOSED_FORM = {"mean_abs": "gradient", "abs_mean": "curvature"}
DRAWN = (("monte-carlo", "mean_abs"), ("monte-carlo", "abs_mean"), ("antithetic", "abs_mean"))
COUNTED = (*DRAWN, ("curvature", "abs_mean"))
PAPERS_LEVEL = 0.64  # around which MRD is said to fluctuate
MEDIAN_OF_NORMAL = 0.6745  # of |x|, x normal
FLAT = (-SLOPE_TOLERANCE, SLOPE_TOLERANCE)  # slope of what does not depend on sigma
# What a score that still is the closed form may differ from it by, as a factor.
SAME = 2.0


@dataclass(frozen=True, kw_only=True)
class Fig6Spec:
    """What is measured.

    Attributes:
        model, task, split: whose samples.
        samples: how many, evenly spaced over the split.
        sigmas, coarse_sigmas: in float32 and in bfloat16.
        fit: statistic -> the lowest and highest sigma of its slope.
        sigma: of Monte Carlo, where draws are counted; the paper's other one is `other_sigma`.
        pair_sigma: of antithetic, where pairs are counted.
        draws, pairs: of Monte Carlo and antithetic at the remaining sigmas.
        directions, coarse_directions: of curvature.
        counts, pair_counts, direction_counts: K at which the error is taken.
        stable, tolerance: MRD is stable if with so many draws its relative standard error is at most that.
        fewer, more: K that are set against each other.
        seed: addresses the noise.
    """

    model: str
    task: str
    split: str | None = None
    samples: int
    sigmas: list[float]
    coarse_sigmas: list[float]
    fit: dict[str, list[float]]
    sigma: float = 1e-5
    other_sigma: float = 1.0
    pair_sigma: float = 1e-4
    draws: int = 8
    pairs: int = 4
    directions: int = 8
    coarse_directions: int = 1
    counts: list[int]
    pair_counts: list[int]
    direction_counts: list[int]
    stable: int = 100
    tolerance: float = 0.1
    fewer: int = 100
    more: int = 200
    seed: int = 0

    def checked(self) -> Fig6Spec:
        """The same.

        Raises:
            UserError: a value that another one needs is missing.
        """
        if sorted(self.fit) != sorted(EXPECTED_SLOPE):
            raise UserError(f"fit names {', '.join(self.fit) or 'nothing'}: expected {', '.join(EXPECTED_SLOPE)}")
        for statistic, ends in self.fit.items():
            if len(ends) != 2 or any(len(_between(values, ends)) < 2 for values in (self.sigmas, self.coarse_sigmas)):
                raise UserError(
                    f"fit: {statistic} is {ends}: expected [low, high] with two sigmas or more of each dtype"
                )
        for name in ("sigma", "other_sigma", "pair_sigma"):
            if getattr(self, name) not in self.sigmas:
                raise UserError(f"{name} is {getattr(self, name):g}: expected one of sigmas")
        for name in ("fewer", "more", "stable"):
            if getattr(self, name) not in self.counts:
                raise UserError(f"{name} is {getattr(self, name)}: expected one of counts")
        if min(self.draws, self.pairs, self.directions) < 2:
            raise UserError("draws, pairs and directions: expected at least 2 of each")
        if max(self.direction_counts) > self.directions / 2:
            raise UserError(f"direction_counts: expected at most half of directions, {self.directions}")
        return self

    def points(self) -> list[Point]:
        """All of them; the longest tasks first, so that no replica is left with one at the end."""
        exact = [Point("curvature", self.sigma, self.directions), Point("gradient", self.sigma)]
        exact += [Point("antithetic", sigma, self._pairs(sigma)) for sigma in self.sigmas]
        exact += [Point("monte-carlo", sigma, self._draws(sigma)) for sigma in self.sigmas]
        coarse = [Point("curvature", self.sigma, self.coarse_directions), Point("gradient", self.sigma)]
        coarse += [Point("antithetic", sigma, self.pairs) for sigma in self.coarse_sigmas]
        coarse += [Point("monte-carlo", sigma, self.draws) for sigma in self.coarse_sigmas]
        return exact + [dataclasses.replace(point, dtype=COARSE) for point in coarse]

    def _draws(self, sigma: float) -> int:
        if sigma == self.sigma:
            return max(self.counts)
        return max(self.stable, self.draws) if sigma == self.other_sigma else self.draws

    def _pairs(self, sigma: float) -> int:
        return max(self.pair_counts) if sigma == self.pair_sigma else self.pairs


def _between(sigmas: Sequence[float], ends: Sequence[float]) -> list[float]:
    return [sigma for sigma in sigmas if ends[0] <= sigma <= ends[1]]


def run(setting: Setting) -> Answer:
    spec = setting.spec(Fig6Spec, "sensitivity").checked()
    model = find_model(spec.model)
    dataset = load_dataset(spec.task, spec.split, model.tokenizer)
    samples, _ = encode(evenly_spaced(dataset.texts, spec.samples), model.tokenizer, model.max_length)
    shared = setting.resources
    drawn = measure_draws(
        setting.work / "draws.parquet",
        model,
        samples,
        spec.points(),
        Resources(shared.concurrent, shared.cpus_per_trial, shared.gpus_per_trial),
        spec.seed,
        setting.progress,
    )
    return answer(drawn, np.array([sample.num_scored for sample in samples]), spec)


def answer(drawn: Sequence[PointDraws], tokens: np.ndarray, spec: Fig6Spec) -> Answer:
    """From the draws at spec.points() of samples with so many scored tokens, (N,)."""
    found = SigmaAndDraws.of(drawn, tokens, spec)
    by_sigma, by_draws = found.by_sigma(), found.by_draws()
    sentences = [
        found.scaling(),
        found.either_sigma(),
        found.either_count(by_draws),
        found.either_statistic(by_draws),
        found.claim_sigma(),
        found.claim_draws(),
    ]
    tables = {"fig6-draws": pa.Table.from_pylist([each.row() for each in by_draws])}
    panels = [
        _against_sigma(found, "mean_abs", "(a) mean_abs, E|·|, against sigma"),
        _against_sigma(found, "abs_mean", "(a) abs_mean, |E·|, against sigma"),
        _against_draws(by_draws, "(b) Error, against draws"),
    ]
    return Answer(pa.Table.from_pylist(by_sigma), panels, sentences, inches=(18.0, 6.0), tables=tables)


@dataclass(frozen=True)
class DrawCount:
    """The error of an estimator after so many draws.

    Attributes:
        estimator, statistic, draws: of which.
        error: median over the samples, and over all runs of so many draws, of |score / reference - 1|.
        stderr: median over the samples of standard error / score, of the first such run.
        rank: rank correlation of the first such run with the reference.
        exponent: of the error as a power of the draws, over all counts.
    """

    estimator: str
    statistic: str
    draws: int
    error: Estimate
    stderr: Estimate
    rank: Estimate
    exponent: Estimate

    def row(self) -> dict[str, Any]:
        named = {"relative_error": self.error, "relative_stderr": self.stderr, "rank": self.rank}
        row: dict[str, Any] = {"estimator": self.estimator, "statistic": self.statistic, "draws": self.draws}
        for name, estimate in (named | {"error_exponent": self.exponent}).items():
            row |= interval_columns(name, estimate)
        return row


@dataclass(frozen=True)
class SigmaAndDraws:
    """The draws, and what is read off them.

    Attributes:
        drawn: by estimator, dtype and sigma.
        tokens: (N,), scored ones.
        spec: what was drawn.
    """

    drawn: Mapping[tuple[str, str, float], PointDraws]
    tokens: np.ndarray
    spec: Fig6Spec

    @classmethod
    def of(cls, drawn: Sequence[PointDraws], tokens: np.ndarray, spec: Fig6Spec) -> SigmaAndDraws:
        return cls({(each.point.estimator, each.point.dtype, each.point.sigma): each for each in drawn}, tokens, spec)

    @cached_property
    def slopes(self) -> dict[tuple[str, str, str], Estimate]:
        """Of every line, over the sigmas that it is fitted to."""
        return {
            (estimator, statistic, dtype): self.line(estimator, statistic, dtype, fitted=True).slope()
            for dtype in (EXACT, COARSE)
            for estimator, statistic in DRAWN
        }

    def closed_form(self, statistic: str, dtype: str = EXACT) -> np.ndarray:
        """At spec.sigma, (N,)."""
        return self.drawn[CLOSED_FORM[statistic], dtype, self.spec.sigma].mrd(statistic)

    def expected(self, statistic: str, sigma: float) -> np.ndarray:
        """The closed form at another sigma, (N,)."""
        return self.closed_form(statistic) * (sigma / self.spec.sigma) ** EXPECTED_SLOPE[statistic]

    def sigmas(self, dtype: str) -> list[float]:
        return self.spec.sigmas if dtype == EXACT else self.spec.coarse_sigmas

    def line(self, estimator: str, statistic: str, dtype: str, fitted: bool = False) -> ScalingLine:
        """All sigmas with as many draws each, or those that the slope is fitted to."""
        most = self.spec.pairs if estimator == "antithetic" else self.spec.draws
        sigmas = _between(self.sigmas(dtype), self.spec.fit[statistic]) if fitted else self.sigmas(dtype)
        at = [self.drawn[estimator, dtype, sigma] for sigma in sigmas]
        return scaling_line([dataclasses.replace(each, values=each.values[:, :most]) for each in at], statistic)

    def by_sigma(self) -> list[dict[str, Any]]:
        """A row for each estimator, statistic, dtype and sigma."""
        rows = []
        for dtype in (EXACT, COARSE):
            for estimator, statistic in DRAWN:
                slope = self.slopes[estimator, statistic, dtype]
                for sigma in self.sigmas(dtype):
                    at = self.drawn[estimator, dtype, sigma]
                    rows.append(self._row(at, statistic) | interval_columns("slope", slope))
            for statistic, estimator in CLOSED_FORM.items():
                unknown = Estimate(np.nan, np.nan, np.nan)
                at = self.drawn[estimator, dtype, self.spec.sigma]
                rows.append(self._row(at, statistic) | interval_columns("slope", unknown))
        return rows

    def _row(self, at: PointDraws, statistic: str) -> dict[str, Any]:
        point, mrd = at.point, at.mrd(statistic)
        row: dict[str, Any] = {
            "estimator": point.estimator,
            "statistic": statistic,
            "dtype": point.dtype,
            "sigma": point.sigma,
            "draws": at.values.shape[1],
            "perturbation_survival": at.survival,
        }
        expected = self.expected(statistic, point.sigma)
        for name, estimate in {
            "mrd": _median(mrd),
            "ratio": _median(mrd / expected),
            "rank": spearman(mrd, expected),
            "rank_of_tokens": spearman(mrd, self.tokens),
        }.items():
            row |= interval_columns(name, estimate)
        return row

    def by_draws(self) -> list[DrawCount]:
        spec = self.spec
        counts = {"monte-carlo": spec.counts, "antithetic": spec.pair_counts, "curvature": spec.direction_counts}
        sigma = {"monte-carlo": spec.sigma, "antithetic": spec.pair_sigma, "curvature": spec.sigma}
        return [
            each
            for estimator, statistic in COUNTED
            for each in counted(
                self.drawn[estimator, EXACT, sigma[estimator]],
                statistic,
                self.expected(statistic, sigma[estimator]),
                counts[estimator],
                own=estimator == CLOSED_FORM[statistic],
            )
        ]

    # --- Sentences --------------------------------------------------------------------------------------------

    def scaling(self) -> str:
        """Slopes, and what storage in bfloat16 does."""
        lines = [
            self.line(estimator, statistic, dtype, fitted=True)
            for dtype in (EXACT, COARSE)
            for estimator, statistic in (DRAWN[0], DRAWN[2])
        ]
        rounded = [
            f"{CLOSED_FORM[statistic]} by {percent_with_ci(_median(np.abs(here / self.closed_form(statistic) - 1)))}"
            for statistic in CLOSED_FORM
            for here in [self._coarse(statistic)]
        ]
        return (
            f"**Against sigma**, {len(self.tokens)} samples. {' '.join(line.sentence() for line in lines)} "
            f"{inflation(lines)} The estimators that differentiate are proportional to the power of sigma by "
            f"construction; {COARSE} moves {' and '.join(rounded)} (median)."
        )

    def _coarse(self, statistic: str) -> np.ndarray:
        """Against the same directions in float32, the closed form that bfloat16 gives, (N,)."""
        at = self.drawn[CLOSED_FORM[statistic], COARSE, self.spec.sigma]
        same = self.drawn[CLOSED_FORM[statistic], EXACT, self.spec.sigma].values[:, : at.values.shape[1]]
        exact = _score(same, statistic)
        return self.closed_form(statistic) * at.mrd(statistic) / exact

    def either_sigma(self) -> str:
        spec = self.spec
        parts = []
        for sigma in (spec.sigma, spec.other_sigma):
            at = self.drawn["monte-carlo", EXACT, sigma]
            mrd = _score(at.values[:, : spec.stable], "mean_abs")
            expected = self.expected("mean_abs", sigma)
            ratio = _median(mrd / expected)
            same = lies_within(ratio, 1 / SAME, SAME)
            means = {HOLDS: "the closed form is measured", CONTRADICTED: "something else is measured"}
            parts.append(
                f"At sigma {sigma:g} MRD has a median of {np.median(mrd):.3g}, {number_with_ci(ratio)} times the "
                "closed "
                f"form; its rank correlation with that is {with_ci(spearman(mrd, expected))}, with the number of "
                "scored "
                f"tokens {with_ci(spearman(mrd, self.tokens))}: {means.get(same, 'what is measured cannot be told')}."
            )
        title = (
            f"**Sigma {spec.sigma:g} or {spec.other_sigma:g}** (mean_abs by Monte Carlo, {EXACT}, K = {spec.stable})."
        )
        return " ".join([title, *parts])

    def either_count(self, by_draws: Sequence[DrawCount]) -> str:
        spec = self.spec
        fewer, more = (_at(by_draws, *DRAWN[0], count) for count in (spec.fewer, spec.more))
        law = MEDIAN_OF_NORMAL * HALF_NORMAL_SPREAD
        return (
            f"**K = {spec.fewer} or {spec.more}** (mean_abs by Monte Carlo, sigma {spec.sigma:g}). A score is off by "
            f"{percent_with_ci(fewer.error)} or {percent_with_ci(more.error)} of the closed form, median over "
            "samples, where "
            f"independent draws give {law / spec.fewer**0.5:.1%} and {law / spec.more**0.5:.1%}; the error falls as K "
            f"to the power of {with_ci(fewer.exponent)}, expected \N{MINUS SIGN}0.50. Rank correlation with the closed "
            f"form: {with_ci(fewer.rank)} or {with_ci(more.rank)}."
        )

    def either_statistic(self, by_draws: Sequence[DrawCount]) -> str:
        spec = self.spec
        naive = _at(by_draws, *DRAWN[1], spec.more)
        pairs = _at(by_draws, *DRAWN[2], max(spec.pair_counts))
        directions = _at(by_draws, *COUNTED[3], max(spec.direction_counts))
        curved = _relative_stderr(self.drawn["curvature", EXACT, spec.sigma].values, "abs_mean")
        needed = spec.more * (naive.error.value / spec.tolerance) ** 2
        rank = spearman(self.closed_form("mean_abs"), self.closed_form("abs_mean"))
        return (
            f"**E|·| (Algorithm 1) or |E·| (Definition 3.1).** Monte Carlo of |E·| at K = {spec.more} is off by "
            f"{percent_with_ci(naive.error)}: noise of first order; about {needed:.1g} draws would bring that to "
            f"{spec.tolerance:.0%}. {max(spec.pair_counts)} antithetic pairs at sigma {spec.pair_sigma:g} are off by "
            f"{percent_with_ci(pairs.error)} from the curvature along {spec.directions} directions (which has a "
            "standard error "
            f"of {percent_with_ci(curved)} itself), and the curvature along {max(spec.direction_counts)} by "
            f"{percent_with_ci(directions.error)}. Rank correlation of the two closed forms: {with_ci(rank)}."
        )

    def claim_sigma(self) -> str:
        exact, coarse = (self.line(*DRAWN[0], dtype, fitted=True) for dtype in (EXACT, COARSE))
        slope, coarse_slope = exact.slope(), coarse.slope()
        kept = self.drawn[DRAWN[0][0], COARSE, float(coarse.sigmas[0])].survival
        storage = "" if kept is None else f", where storage keeps {kept:.0%} of the smallest perturbation"
        flatter = {
            HOLDS: "nearer to flat than to proportional, and there it is rounding that is measured",
            CONTRADICTED: "nearer to proportional than to flat",
        }
        return (
            f"The claim that MRD (mean_abs) does not depend on sigma {lies_within(slope, *FLAT)} here: in {EXACT} "
            f"{_change(exact)}, a slope of {with_ci(slope)} where a number without dependence has 0. In {COARSE} "
            f"{_change(coarse)}, slope {with_ci(coarse_slope)}{storage}: "
            f"{flatter.get(lies_within(coarse_slope, -0.5, 0.5), 'whether that is nearer to flat cannot be told')}."
        )

    def claim_draws(self) -> str:
        spec = self.spec
        parts = []
        for statistic in ("mean_abs", "abs_mean"):
            values = self.drawn["monte-carlo", EXACT, spec.sigma].values[:, : spec.stable]
            stderr = _relative_stderr(values, statistic)
            claim = lies_within(stderr, 0.0, spec.tolerance)
            parts.append(f"{claim} here for {statistic}, with a relative standard error of {percent_with_ci(stderr)}")
        return (
            f"The claim that MRD by Monte Carlo is stable from K = {spec.stable} on (relative standard error at most "
            f"{spec.tolerance:.0%}, median of samples; the paper gives none) {parts[0]}; it {parts[1]}."
        )


def counted(
    drawn: PointDraws, statistic: str, reference: np.ndarray, counts: Sequence[int], own: bool = False
) -> list[DrawCount]:
    """The error after each number of draws.

    Errors are taken over all disjoint runs of so many draws. The intervals are over samples: these share the noise,
    but their gradients are nearly orthogonal, so that their errors are not the same.

    Args:
        drawn: all draws.
        statistic: which the draws are reduced to.
        reference: (N,), what the scores should be.
        counts: at most as many as there are draws.
        own: the reference is the mean of these very draws, which makes it look closer than it is, by a factor of
            sqrt(1 - K / all draws); it is divided out.
    """
    values = drawn.values
    samples, total = values.shape

    def errors(count: int) -> np.ndarray:
        """(runs, N)."""
        runs = values[:, : total // count * count].reshape(samples, -1, count)
        mrd = np.stack([_score(runs[:, r], statistic) for r in range(runs.shape[1])])
        return np.abs(mrd / reference - 1) / (np.sqrt(1 - count / total) if own else 1.0)

    off = {count: errors(count) for count in counts}

    def median_of(count: int) -> Callable[[list[np.ndarray]], np.ndarray]:
        return lambda rows: np.median(off[count][:, rows[0]], axis=(0, -1))

    def exponent(rows: list[np.ndarray]) -> np.ndarray:
        error = np.log(np.stack([median_of(count)(rows) for count in counts]))
        size = np.log(counts) - np.mean(np.log(counts))
        return np.tensordot(size, error, 1) / (size @ size)

    power = over_sets(exponent, [samples])
    return [
        DrawCount(
            drawn.point.estimator,
            statistic,
            count,
            over_sets(median_of(count), [samples]),
            _relative_stderr(values[:, :count], statistic),
            spearman(_score(values[:, :count], statistic), reference),
            power,
        )
        for count in counts
    ]


def _change(line: ScalingLine) -> str:
    ends = [float(np.median(line.scores[end])) for end in (0, -1)]
    return (
        f"its median goes from {ends[0]:.3g} to {ends[1]:.3g} between sigma {line.sigmas[0]:g} and {line.sigmas[-1]:g}"
    )


def _score(values: np.ndarray, statistic: str) -> np.ndarray:
    """(N, K) -> (N,)."""
    return reduce_draws(values, cast(Statistic, statistic))[0]


def _relative_stderr(values: np.ndarray, statistic: str) -> Estimate:
    """Median over samples, of (N, K) draws; of one draw it is not known."""
    if values.shape[1] < 2:
        return Estimate(np.nan, np.nan, np.nan)
    mrd, stderr = reduce_draws(values, cast(Statistic, statistic))
    return _median(stderr / mrd)


def _median(values: np.ndarray) -> Estimate:
    """Of (N,), with its interval over samples."""
    return over_sets(lambda rows: np.median(values[rows[0]], axis=-1), [len(values)])


def _at(by_draws: Sequence[DrawCount], estimator: str, statistic: str, draws: int) -> DrawCount:
    wanted = (estimator, statistic, draws)
    return next(each for each in by_draws if (each.estimator, each.statistic, each.draws) == wanted)


# --- Panels -------------------------------------------------------------------------------------------------

LINES = {
    ("monte-carlo", EXACT): (BLUE, "o", "-"),
    ("monte-carlo", COARSE): (VERMILLION, "^", "-"),
    ("antithetic", EXACT): (GREEN, "s", "-"),
    ("antithetic", COARSE): (ORANGE, "D", "-"),
}
COUNT_LINES = {
    ("monte-carlo", "mean_abs"): (BLUE, "o"),
    ("monte-carlo", "abs_mean"): (VERMILLION, "^"),
    ("antithetic", "abs_mean"): (GREEN, "s"),
    ("curvature", "abs_mean"): (ORANGE, "D"),
}
SHORT = {EXACT: "fp32", COARSE: "bf16"}


def _against_sigma(found: SigmaAndDraws, statistic: str, title: str) -> Draw:
    def draw(axes: Axes) -> None:
        for (estimator, dtype), (colour, marker, dash) in LINES.items():
            if (estimator, statistic) not in DRAWN:
                continue
            line = found.line(estimator, statistic, dtype)
            slope = found.slopes[estimator, statistic, dtype]
            label = f"{estimator}, {SHORT[dtype]}: {decimal(slope.value)} [{interval(slope)}]"
            median = np.median(line.scores, axis=1)
            axes.plot(line.sigmas, median, dash, color=colour, marker=marker, markersize=6, label=label)
        name, sigmas = CLOSED_FORM[statistic], np.array(found.spec.sigmas)
        exact = np.median(found.closed_form(statistic))
        power = EXPECTED_SLOPE[statistic]
        axes.plot(sigmas, exact * (sigmas / found.spec.sigma) ** power, "--", color=INK, label=f"{name}: {power:g}")
        axes.axhline(PAPERS_LEVEL, color=MUTED, linestyle=":", label=f"the paper: about {PAPERS_LEVEL:g} throughout")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("sigma")
        axes.set_ylabel("MRD, median of samples")
        axes.set_title(title)
        axes.axvspan(*found.spec.fit[statistic], color=GRID, alpha=0.5, zorder=0)
        _legend_below(axes, "slope over the grey range [95 % CI]")

    return draw


def _against_draws(by_draws: Sequence[DrawCount], title: str) -> Draw:
    def draw(axes: Axes) -> None:
        for (estimator, statistic), (colour, marker) in COUNT_LINES.items():
            mine = [each for each in by_draws if (each.estimator, each.statistic) == (estimator, statistic)]
            label = f"{estimator}, {statistic}: {decimal(mine[0].exponent.value)} [{interval(mine[0].exponent)}]"
            error = [each.error for each in mine]
            counts = [each.draws for each in mine]
            axes.plot(counts, [e.value for e in error], color=colour, marker=marker, markersize=6, label=label)
            axes.vlines(counts, [e.low for e in error], [e.high for e in error], color=colour, linewidth=1.5)
        counts = sorted({each.draws for each in by_draws})
        law = MEDIAN_OF_NORMAL * HALF_NORMAL_SPREAD / np.sqrt(counts)
        axes.plot(counts, law, "--", color=INK, label="independent draws, mean_abs: \N{MINUS SIGN}0.50")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("draws K (antithetic: pairs, curvature: directions)")
        axes.set_ylabel("relative error, median of samples")
        axes.set_title(title)
        _legend_below(axes, "power of K [95 % CI]")

    return draw


def _legend_below(axes: Axes, title: str) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.14), alignment="left", title=title)


EXPERIMENT = Experiment(
    name="fig6",
    title="sensitivity of MRD to sigma and K",
    question="How much does MRD depend on the size of the perturbation, and from how many draws is it stable?",
    claim="MRD is not sensitive to sigma, it fluctuates around 0.64; and it is stable from K = 100 on.",
    run=run,
)
