"""Figure 6: how much does MRD depend on sigma, and from how many draws is it stable?

Measured on the same samples along the same directions, in float32 and in bfloat16, by all estimators of both
statistics. That also decides where the paper contradicts itself: sigma = 1e-5 or 1, K = 100 or 200, E|.| or |E.|.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Self, cast

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.jobs.draws import (
    EXACT,
    EXPECTED_SLOPE,
    HALF_NORMAL_SPREAD,
    Point,
    PointDraws,
    ScalingLine,
    inflation,
    measure_draws,
    scaling_line,
)
from bench.models.find import ModelName, find_model
from bench.report.figures import BLUE, GREEN, GRID, INK, MUTED, ORANGE, VERMILLION, Draw
from bench.report.verdicts import listed
from bench.report.words import (
    decimal,
    interval,
    interval_columns,
    number_with_ci,
    numbers_table,
    percent_with_ci,
    with_ci,
)
from bench.stats.estimates import Estimate, over_sets, spearman
from bench.stats.verdicts import CONTRADICTED, HOLDS, UNKNOWN, Claim, Verdict, bootstrapped, decide
from bench.tasks.datasets import DataName, load_dataset
from scoring.engine import Dtype
from scoring.errors import UserError
from scoring.mrd import Statistic, reduce_draws
from scoring.samples import encode, evenly_spaced
from scoring.settings import Doc, Ge, Gt, check, named

COARSE: Dtype = "bfloat16"
CLOSED_FORM = {"mean_abs": "gradient", "abs_mean": "curvature"}
DRAWN = (("monte-carlo", "mean_abs"), ("monte-carlo", "abs_mean"), ("antithetic", "abs_mean"))
COUNTED = (*DRAWN, ("curvature", "abs_mean"))
PAPER_LEVEL = 0.64  # the paper says that MRD fluctuates around it
MEDIAN_OF_NORMAL = 0.6745  # of |x|, x normal
MARGIN = "slope of log MRD against log sigma"
CLOSE = 2.0  # a score within this factor of the closed form measures the same thing

Sigma = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class Fig6Spec:
    """What is measured."""

    model: Annotated[ModelName, Doc("an embedded model, a folder, or a Hugging Face id")]
    task: Annotated[DataName, Doc("whose samples are scored")]
    split: Annotated[str | None, Doc("of the task (default: the task's own)")] = None
    samples: Annotated[int, Ge(1), Doc("how many, evenly spaced over the split")]
    sigmas: Annotated[list[Sigma], Doc("in float32")]
    coarse_sigmas: Annotated[list[Sigma], Doc("in bfloat16")]
    fit: Annotated[
        dict[str, list[float]], Doc("statistic -> the lowest and the highest sigma that its slope is fitted to")
    ]
    sigma: Annotated[float, Gt(0), Doc("of Monte Carlo, where draws are counted")] = 1e-5
    other_sigma: Annotated[float, Gt(0), Doc("the other sigma that the paper names")] = 1.0
    pair_sigma: Annotated[float, Gt(0), Doc("of antithetic, where pairs are counted")] = 1e-4
    draws: Annotated[int, Ge(2), Doc("of Monte Carlo at the remaining sigmas")] = 8
    pairs: Annotated[int, Ge(2), Doc("of antithetic at the remaining sigmas")] = 4
    directions: Annotated[int, Ge(2), Doc("of curvature in float32")] = 8
    coarse_directions: Annotated[int, Ge(1), Doc("of curvature in bfloat16")] = 1
    counts: Annotated[list[Count], Doc("K at which the error of Monte Carlo is measured")]
    pair_counts: Annotated[list[Count], Doc("K at which the error of antithetic is measured")]
    direction_counts: Annotated[list[Count], Doc("K at which the error of curvature is measured")]
    stable: Annotated[int, Ge(1), Doc("K from which on MRD is claimed to be stable")] = 100
    tolerance: Annotated[float, Gt(0), Doc("the largest relative standard error that counts as stable")] = 0.1
    fewer: Annotated[int, Ge(1), Doc("one K that the paper names")] = 100
    more: Annotated[int, Ge(1), Doc("another K that the paper names")] = 200
    seed: Annotated[int, Ge(0), Doc("addresses the noise")] = 0

    def checked(self) -> Self:
        """The same.

        Raises:
            UserError: a value that is not allowed, or that lacks another one.
        """
        check(self)
        if sorted(self.fit) != sorted(EXPECTED_SLOPE):
            raise UserError(
                f"{named('fit')} has {', '.join(self.fit) or 'no statistic'}: expected {', '.join(EXPECTED_SLOPE)}"
            )
        for statistic, ends in self.fit.items():
            if len(ends) != 2 or any(len(_between(values, ends)) < 2 for values in (self.sigmas, self.coarse_sigmas)):
                raise UserError(
                    f"{named('fit')}[{statistic!r}] is {ends}: expected [low, high] with two sigmas or more of each "
                    "dtype"
                )
        for name in ("sigma", "other_sigma", "pair_sigma"):
            if getattr(self, name) not in self.sigmas:
                raise UserError(f"{named(name)} is {getattr(self, name):g}: expected one of {named('sigmas')}")
        for name in ("fewer", "more", "stable"):
            if getattr(self, name) not in self.counts:
                raise UserError(f"{named(name)} is {getattr(self, name)}: expected one of {named('counts')}")
        for name in ("pair_counts", "direction_counts"):
            if not getattr(self, name):
                raise UserError(f"{named(name)} is empty: expected numbers of draws")
        if max(self.direction_counts) > self.directions / 2:
            raise UserError(
                f"{named('direction_counts')} has {max(self.direction_counts)}: expected at most half of "
                f"{named('directions')}, {self.directions}"
            )
        return self

    def points(self) -> list[Point]:
        """All points; the longest tasks first, so that no replica is left with one at the end."""
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


def run(setup: Setup) -> Answer:
    spec = setup.spec(Fig6Spec, "sensitivity")
    model = find_model(spec.model)
    dataset = load_dataset(spec.task, spec.split, model.tokenizer)
    samples, _ = encode(evenly_spaced(dataset.texts, spec.samples), model.tokenizer, model.max_length)
    draws = measure_draws(
        setup.work / "draws.parquet",
        model,
        samples,
        spec.points(),
        setup.resources.replicas(),
        spec.seed,
        setup.progress,
    )
    return answer(draws, np.array([sample.num_scored for sample in samples]), spec, setup.margins(MARGIN))


def answer(draws: Sequence[PointDraws], tokens: np.ndarray, spec: Fig6Spec, margins: Mapping[str, float]) -> Answer:
    """The answer from the draws at all points of a spec.

    Args:
        draws: at spec.points().
        tokens: (N,) how many scored tokens the samples have.
        margins: the smallest slope that matters, by the name MARGIN.
    """
    sensitivity = Sensitivity.of(draws, tokens, spec)
    by_sigma, by_count = sensitivity.by_sigma(), sensitivity.by_count()
    verdicts = decide([*sensitivity.sigma_claims(margins[MARGIN]), *sensitivity.draws_claims()])
    sentences = [
        sensitivity.scaling(),
        sensitivity.either_sigma(),
        sensitivity.either_count(by_count),
        sensitivity.either_statistic(by_count),
        sensitivity.on_sigma(*verdicts[:2]),
        sensitivity.on_draws(verdicts[2:]),
    ]
    tables = {
        "fig6-draws": pa.Table.from_pylist([error.row() for error in by_count]),
        "fig6-numbers": numbers_table(sensitivity.numbers()),
    }
    panels = [
        _against_sigma(sensitivity, "mean_abs", "(a) mean_abs, E|·|, against sigma"),
        _against_sigma(sensitivity, "abs_mean", "(a) abs_mean, |E·|, against sigma"),
        _against_draws(by_count, "(b) Error, against draws"),
    ]
    return Answer(pa.Table.from_pylist(by_sigma), panels, sentences, verdicts, inches=(18.0, 6.0), tables=tables)


@dataclass(frozen=True)
class CountError:
    """The error of an estimator after so many draws.

    Attributes:
        estimator, statistic, draws: the estimator, what its draws are reduced to, and how many there are.
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
        return {
            "estimator": self.estimator,
            "statistic": self.statistic,
            "draws": self.draws,
            **interval_columns("relative_error", self.error),
            **interval_columns("relative_stderr", self.stderr),
            **interval_columns("rank", self.rank),
            **interval_columns("error_exponent", self.exponent),
        }


@dataclass(frozen=True)
class Sensitivity:
    """The draws, and the numbers and sentences that follow from them.

    Attributes:
        draws: by estimator, dtype and sigma.
        tokens: (N,) how many scored tokens the samples have.
        spec: what was drawn.
    """

    draws: Mapping[tuple[str, str, float], PointDraws]
    tokens: np.ndarray
    spec: Fig6Spec

    @classmethod
    def of(cls, draws: Sequence[PointDraws], tokens: np.ndarray, spec: Fig6Spec) -> Sensitivity:
        by_point: dict[tuple[str, str, float], PointDraws] = {
            (at.point.estimator, at.point.dtype, at.point.sigma): at for at in draws
        }
        return cls(by_point, tokens, spec)

    @cached_property
    def slopes(self) -> dict[tuple[str, str, str], Estimate]:
        """Estimator, statistic and dtype -> slope over the sigmas that it is fitted to."""
        return {
            (estimator, statistic, dtype): self.line(estimator, statistic, dtype, fitted=True).slope()
            for dtype in (EXACT, COARSE)
            for estimator, statistic in DRAWN
        }

    def closed_form(self, statistic: str, dtype: str = EXACT) -> np.ndarray:
        """The closed form at spec.sigma, (N,)."""
        return self.draws[CLOSED_FORM[statistic], dtype, self.spec.sigma].mrd(statistic)

    def expected(self, statistic: str, sigma: float) -> np.ndarray:
        """The closed form at another sigma, (N,)."""
        return self.closed_form(statistic) * (sigma / self.spec.sigma) ** EXPECTED_SLOPE[statistic]

    def sigmas(self, dtype: str) -> list[float]:
        return self.spec.sigmas if dtype == EXACT else self.spec.coarse_sigmas

    def line(self, estimator: str, statistic: str, dtype: str, fitted: bool = False) -> ScalingLine:
        """A statistic at all sigmas, or at those that the slope is fitted to, by the same number of draws."""
        count = self.spec.pairs if estimator == "antithetic" else self.spec.draws
        sigmas = _between(self.sigmas(dtype), self.spec.fit[statistic]) if fitted else self.sigmas(dtype)
        draws = [self.draws[estimator, dtype, sigma] for sigma in sigmas]
        return scaling_line([dataclasses.replace(at, values=at.values[:, :count]) for at in draws], statistic)

    def by_sigma(self) -> list[dict[str, Any]]:
        """A row for each estimator, statistic, dtype and sigma."""
        rows = []
        for dtype in (EXACT, COARSE):
            for estimator, statistic in DRAWN:
                slope = self.slopes[estimator, statistic, dtype]
                for sigma in self.sigmas(dtype):
                    at = self.draws[estimator, dtype, sigma]
                    rows.append(self._row(at, statistic) | interval_columns("slope", slope))
            for statistic, estimator in CLOSED_FORM.items():
                unknown = Estimate(np.nan, np.nan, np.nan)
                at = self.draws[estimator, dtype, self.spec.sigma]
                rows.append(self._row(at, statistic) | interval_columns("slope", unknown))
        return rows

    def _row(self, at: PointDraws, statistic: str) -> dict[str, Any]:
        point, mrd = at.point, at.mrd(statistic)
        expected = self.expected(statistic, point.sigma)
        return {
            "estimator": point.estimator,
            "statistic": statistic,
            "dtype": point.dtype,
            "sigma": point.sigma,
            "draws": at.values.shape[1],
            "perturbation_survival": at.survival,
            **interval_columns("mrd", _median(mrd)),
            **interval_columns("ratio", _median(mrd / expected)),
            **interval_columns("rank", spearman(mrd, expected)),
            **interval_columns("rank_of_tokens", spearman(mrd, self.tokens)),
        }

    def by_count(self) -> list[CountError]:
        """The errors of each estimator and statistic after each number of draws."""
        spec = self.spec
        counts = {"monte-carlo": spec.counts, "antithetic": spec.pair_counts, "curvature": spec.direction_counts}
        sigma = {"monte-carlo": spec.sigma, "antithetic": spec.pair_sigma, "curvature": spec.sigma}
        return [
            error
            for estimator, statistic in COUNTED
            for error in count_errors(
                self.draws[estimator, EXACT, sigma[estimator]],
                statistic,
                self.expected(statistic, sigma[estimator]),
                counts[estimator],
                against_own_mean=estimator == CLOSED_FORM[statistic],
            )
        ]

    # --- Sentences --------------------------------------------------------------------------------------------

    def scaling(self) -> str:
        """The slopes, and the effect of storage in bfloat16."""
        lines = [
            self.line(estimator, statistic, dtype, fitted=True)
            for dtype in (EXACT, COARSE)
            for estimator, statistic in (DRAWN[0], DRAWN[2])
        ]
        moved = [f"{estimator} by {percent_with_ci(share)}" for estimator, share in self.moved.items()]
        return (
            f"**Against sigma**, {len(self.tokens)} samples. {' '.join(line.sentence() for line in lines)} "
            f"{inflation(lines)} The estimators that differentiate are proportional to the power of sigma by "
            f"construction; {COARSE} moves {' and '.join(moved)} (median)."
        )

    @cached_property
    def moved(self) -> dict[str, Estimate]:
        """Estimator -> by what share of it bfloat16 moves the closed form, the median of samples."""
        return {
            estimator: _median(np.abs(self._coarse_closed_form(statistic) / self.closed_form(statistic) - 1))
            for statistic, estimator in CLOSED_FORM.items()
        }

    def _coarse_closed_form(self, statistic: str) -> np.ndarray:
        """The closed form in bfloat16, (N,): that in float32 times the ratio of both along the same directions."""
        coarse = self.draws[CLOSED_FORM[statistic], COARSE, self.spec.sigma]
        exact = self.draws[CLOSED_FORM[statistic], EXACT, self.spec.sigma].values[:, : coarse.values.shape[1]]
        return self.closed_form(statistic) * coarse.mrd(statistic) / _score(exact, statistic)

    def either_sigma(self) -> str:
        """What MRD measures at either of the paper's two sigmas."""
        spec = self.spec
        meaning = {
            HOLDS: "the closed form is measured",
            CONTRADICTED: "something else is measured",
            UNKNOWN: f"what is measured {UNKNOWN}",
        }
        parts = []
        for sigma in (spec.sigma, spec.other_sigma):
            mrd = self.with_stable_draws(sigma)
            ratio, rank, rank_of_tokens = self.against_closed_form[sigma].values()
            ratios = mrd / self.expected("mean_abs", sigma)
            same = self._claim("it is the closed form", "MRD / closed form", 0, math.log(CLOSE), ratios)
            parts.append(
                f"At sigma {sigma:g} MRD has a median of {np.median(mrd):.3g}, {number_with_ci(ratio)} times the "
                f"closed form; its rank correlation with that is {with_ci(rank)}, with the number of scored tokens "
                f"{with_ci(rank_of_tokens)}: {meaning[decide([same])[0].word]}."
            )
        title = (
            f"**Sigma {spec.sigma:g} or {spec.other_sigma:g}** (mean_abs by Monte Carlo, {EXACT}, K = {spec.stable})."
        )
        return " ".join([title, *parts])

    def with_stable_draws(self, sigma: float) -> np.ndarray:
        """MRD (mean_abs) by Monte Carlo with the paper's number of draws, (N,)."""
        return _score(self.draws["monte-carlo", EXACT, sigma].values[:, : self.spec.stable], "mean_abs")

    @cached_property
    def against_closed_form(self) -> dict[float, dict[str, Estimate]]:
        """Sigma -> how that is related to the closed form and to the number of scored tokens."""
        relations = {}
        for sigma in (self.spec.sigma, self.spec.other_sigma):
            mrd, expected = self.with_stable_draws(sigma), self.expected("mean_abs", sigma)
            relations[sigma] = {
                "MRD / closed form": _median(mrd / expected),
                "rank correlation with the closed form": spearman(mrd, expected),
                "rank correlation with the number of scored tokens": spearman(mrd, self.tokens),
            }
        return relations

    def either_count(self, by_count: Sequence[CountError]) -> str:
        """The error after either of the paper's two numbers of draws."""
        spec = self.spec
        fewer, more = (_error_at(by_count, *DRAWN[0], count) for count in (spec.fewer, spec.more))
        one_draw = MEDIAN_OF_NORMAL * HALF_NORMAL_SPREAD
        return (
            f"**K = {spec.fewer} or {spec.more}** (mean_abs by Monte Carlo, sigma {spec.sigma:g}). A score is off by "
            f"{percent_with_ci(fewer.error)} or {percent_with_ci(more.error)} of the closed form, median over "
            f"samples, where independent draws give {one_draw / spec.fewer**0.5:.1%} and "
            f"{one_draw / spec.more**0.5:.1%}; the error falls as K to the power of {with_ci(fewer.exponent)}, "
            f"expected \N{MINUS SIGN}0.50. Rank correlation with the closed form: {with_ci(fewer.rank)} or "
            f"{with_ci(more.rank)}."
        )

    def either_statistic(self, by_count: Sequence[CountError]) -> str:
        """What it takes to estimate either of the paper's two statistics."""
        spec = self.spec
        naive = _error_at(by_count, *DRAWN[1], spec.more)
        pairs = _error_at(by_count, *DRAWN[2], max(spec.pair_counts))
        directions = _error_at(by_count, *COUNTED[3], max(spec.direction_counts))
        needed = spec.more * (naive.error.value / spec.tolerance) ** 2
        return (
            f"**E|·| (Algorithm 1) or |E·| (Definition 3.1).** Monte Carlo of |E·| at K = {spec.more} is off by "
            f"{percent_with_ci(naive.error)}: noise of first order; about {needed:.1g} draws would bring that to "
            f"{spec.tolerance:.0%}. {max(spec.pair_counts)} antithetic pairs at sigma {spec.pair_sigma:g} are off by "
            f"{percent_with_ci(pairs.error)} from the curvature along {spec.directions} directions (which has a "
            f"standard error of {percent_with_ci(self.curvature_stderr)} itself), and the curvature along "
            f"{max(spec.direction_counts)} by {percent_with_ci(directions.error)}. Rank correlation of the two closed "
            f"forms: {with_ci(self.rank_of_closed_forms)}."
        )

    @cached_property
    def curvature_stderr(self) -> Estimate:
        """The relative standard error of the curvature along all directions, the median of samples."""
        return _relative_stderr(self.draws["curvature", EXACT, self.spec.sigma].values, "abs_mean")

    @cached_property
    def rank_of_closed_forms(self) -> Estimate:
        return spearman(self.closed_form("mean_abs"), self.closed_form("abs_mean"))

    def numbers(self) -> dict[str, Estimate]:
        """Those of the sentences that no other table has."""
        numbers = {
            f"{what}, sigma {sigma:g}": estimate
            for sigma, relations in self.against_closed_form.items()
            for what, estimate in relations.items()
        }
        numbers |= {f"{estimator}, moved by {COARSE}": share for estimator, share in self.moved.items()}
        return numbers | {
            "relative standard error of the curvature": self.curvature_stderr,
            "rank correlation of the closed forms": self.rank_of_closed_forms,
        }

    # --- Claims -----------------------------------------------------------------------------------------------

    def sigma_claims(self, margin: float) -> list[Claim]:
        """That the slope of MRD (mean_abs) against sigma is 0, in float32 and in bfloat16."""
        lines = [self.line(*DRAWN[0], dtype, fitted=True) for dtype in (EXACT, COARSE)]
        return [
            Claim(
                "MRD does not depend on sigma",
                f"slope of log MRD against log sigma, mean_abs in {line.dtype}",
                0,
                margin,
                bootstrapped(over_sets, functools.partial(_slopes, line), [line.scores.shape[1]]),
                line.scores.shape[1],
                "samples",
            )
            for line in lines
        ]

    def draws_claims(self) -> list[Claim]:
        """That the relative standard error of MRD by Monte Carlo is below the tolerance, for both statistics."""
        spec = self.spec
        claims = []
        statistics: tuple[Statistic, ...] = ("mean_abs", "abs_mean")
        for statistic in statistics:
            values = self.draws["monte-carlo", EXACT, spec.sigma].values[:, : spec.stable]
            mrd, stderr = reduce_draws(values, statistic)
            effect = f"relative standard error of {statistic} / {spec.tolerance:.0%}"
            # The tolerance says what matters; any error below it is stable.
            claims.append(
                self._claim(f"MRD is stable from K = {spec.stable} on", effect, -1, 0.0, stderr / mrd / spec.tolerance)
            )
        return claims

    def _claim(self, text: str, effect: str, sign: int, margin: float, ratios: np.ndarray) -> Claim:
        """On the logarithm of the median of a ratio that each sample has, (N,)."""
        return Claim(
            text,
            f"{effect}, median of samples",
            sign,
            margin,
            bootstrapped(over_sets, lambda sets: np.log(np.median(ratios[sets[0]], axis=-1)), [len(ratios)]),
            len(ratios),
            "samples",
            "log ratio",
        )

    def on_sigma(self, exact: Verdict, coarse: Verdict) -> str:
        """The verdicts on the claim about sigma, in float32 and in bfloat16."""
        exact_line, coarse_line = (self.line(*DRAWN[0], dtype, fitted=True) for dtype in (EXACT, COARSE))
        survival = self.draws[DRAWN[0][0], COARSE, float(coarse_line.sigmas[0])].survival
        storage = "" if survival is None else f", where storage keeps {survival:.0%} of the smallest perturbation"
        rounding = ": it is rounding that does not" if (exact.word, coarse.word) == (CONTRADICTED, HOLDS) else ""
        return (
            f"The claim that {exact.claim.text} (mean_abs) {exact.word} here: in {EXACT} {_change(exact_line)}, a "
            f"slope of {with_ci(exact.estimate)} where a number without dependence has 0. In {COARSE} "
            f"{_change(coarse_line)}, slope {with_ci(coarse.estimate)}{storage}: that MRD does not depend on sigma "
            f"{coarse.word}{rounding}."
        )

    def on_draws(self, verdicts: Sequence[Verdict]) -> str:
        """The verdicts on the claim about K."""
        spec = self.spec
        values = self.draws["monte-carlo", EXACT, spec.sigma].values[:, : spec.stable]
        errors = [
            f"{percent_with_ci(_relative_stderr(values, statistic))} for {statistic}"
            for statistic in ("mean_abs", "abs_mean")
        ]
        return (
            f"The claim that MRD by Monte Carlo is stable from K = {spec.stable} on (relative standard error at most "
            f"{spec.tolerance:.0%}, median of samples; the paper gives none): {listed(verdicts)}. The error is "
            f"{' and '.join(errors)}."
        )


def count_errors(
    draws: PointDraws,
    statistic: str,
    reference: np.ndarray,
    counts: Sequence[int],
    against_own_mean: bool = False,
) -> list[CountError]:
    """The error after each number of draws.

    Errors are taken over all disjoint runs of so many draws. The intervals are over samples: these share the noise,
    but their gradients are nearly orthogonal, so that their errors are not the same.

    Args:
        draws: all of them.
        statistic: which the draws are reduced to.
        reference: (N,), what the scores should be.
        counts: at most as many as there are draws.
        against_own_mean: the reference is the mean of these very draws, which makes it look closer than it is, by a
            factor of sqrt(1 - K / all draws); it is divided out.
    """
    values = draws.values
    samples, total = values.shape

    def errors(count: int) -> np.ndarray:
        """(runs, N)."""
        runs = values[:, : total // count * count].reshape(samples, -1, count)
        mrd = np.stack([_score(runs[:, r], statistic) for r in range(runs.shape[1])])
        return np.abs(mrd / reference - 1) / (np.sqrt(1 - count / total) if against_own_mean else 1.0)

    errors_of = {count: errors(count) for count in counts}

    def median_error(count: int) -> Callable[[list[np.ndarray]], np.ndarray]:
        return lambda sets: np.median(errors_of[count][:, sets[0]], axis=(0, -1))

    def exponent(sets: list[np.ndarray]) -> np.ndarray:
        log_errors = np.log(np.stack([median_error(count)(sets) for count in counts]))
        log_counts = np.log(counts) - np.mean(np.log(counts))
        return np.tensordot(log_counts, log_errors, 1) / (log_counts @ log_counts)

    power = over_sets(exponent, [samples])
    return [
        CountError(
            draws.point.estimator,
            statistic,
            count,
            over_sets(median_error(count), [samples]),
            _relative_stderr(values[:, :count], statistic),
            spearman(_score(values[:, :count], statistic), reference),
            power,
        )
        for count in counts
    ]


def _slopes(line: ScalingLine, sets: list[np.ndarray]) -> np.ndarray:
    """scoring.mrd.scaling_slope for many sets of samples, (..., n) -> (...,)."""
    medians = np.stack([np.median(scores[sets[0]], axis=-1) for scores in line.scores])
    return np.polyfit(np.log(line.sigmas), np.log(medians).reshape(len(medians), -1), 1)[0].reshape(medians.shape[1:])


def _change(line: ScalingLine) -> str:
    ends = [float(np.median(line.scores[end])) for end in (0, -1)]
    return (
        f"its median goes from {ends[0]:.3g} to {ends[1]:.3g} between sigma {line.sigmas[0]:g} and {line.sigmas[-1]:g}"
    )


def _score(values: np.ndarray, statistic: str) -> np.ndarray:
    """MRD from draws, (N, K) -> (N,)."""
    return reduce_draws(values, cast(Statistic, statistic))[0]


def _relative_stderr(values: np.ndarray, statistic: str) -> Estimate:
    """Standard error / MRD of (N, K) draws, median over samples; nan for one draw."""
    if values.shape[1] < 2:
        return Estimate(np.nan, np.nan, np.nan)
    mrd, stderr = reduce_draws(values, cast(Statistic, statistic))
    return _median(stderr / mrd)


def _median(values: np.ndarray) -> Estimate:
    """The median of (N,), with its interval over samples."""
    return over_sets(lambda sets: np.median(values[sets[0]], axis=-1), [len(values)])


def _error_at(by_count: Sequence[CountError], estimator: str, statistic: str, draws: int) -> CountError:
    key = (estimator, statistic, draws)
    return next(error for error in by_count if (error.estimator, error.statistic, error.draws) == key)


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


def _against_sigma(sensitivity: Sensitivity, statistic: str, title: str) -> Draw:
    spec = sensitivity.spec

    def draw(axes: Axes) -> None:
        for (estimator, dtype), (colour, marker, dash) in LINES.items():
            if (estimator, statistic) not in DRAWN:
                continue
            line = sensitivity.line(estimator, statistic, dtype)
            slope = sensitivity.slopes[estimator, statistic, dtype]
            label = f"{estimator}, {SHORT[dtype]}: {decimal(slope.value)} [{interval(slope)}]"
            median = np.median(line.scores, axis=1)
            axes.plot(line.sigmas, median, dash, color=colour, marker=marker, markersize=6, label=label)
        name, sigmas = CLOSED_FORM[statistic], np.array(spec.sigmas)
        exact = np.median(sensitivity.closed_form(statistic))
        power = EXPECTED_SLOPE[statistic]
        axes.plot(sigmas, exact * (sigmas / spec.sigma) ** power, "--", color=INK, label=f"{name}: {power:g}")
        axes.axhline(PAPER_LEVEL, color=MUTED, linestyle=":", label=f"the paper: about {PAPER_LEVEL:g} throughout")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("sigma")
        axes.set_ylabel("MRD, median of samples")
        axes.set_title(title)
        axes.axvspan(*spec.fit[statistic], color=GRID, alpha=0.5, zorder=0)
        _legend_below(axes, "slope over the grey range [95 % CI]")

    return draw


def _against_draws(by_count: Sequence[CountError], title: str) -> Draw:
    def draw(axes: Axes) -> None:
        for (estimator, statistic), (colour, marker) in COUNT_LINES.items():
            errors = [error for error in by_count if (error.estimator, error.statistic) == (estimator, statistic)]
            exponent = errors[0].exponent
            label = f"{estimator}, {statistic}: {decimal(exponent.value)} [{interval(exponent)}]"
            counts, medians = [error.draws for error in errors], [error.error for error in errors]
            axes.plot(counts, [m.value for m in medians], color=colour, marker=marker, markersize=6, label=label)
            axes.vlines(counts, [m.low for m in medians], [m.high for m in medians], color=colour, linewidth=1.5)
        counts = sorted({error.draws for error in by_count})
        independent = MEDIAN_OF_NORMAL * HALF_NORMAL_SPREAD / np.sqrt(counts)
        axes.plot(counts, independent, "--", color=INK, label="independent draws, mean_abs: \N{MINUS SIGN}0.50")
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
