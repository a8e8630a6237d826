"""Ranks of a board's entries under one metric, raw and at equal difficulty, and which entries the data tell apart."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bench.report.words import count_with_ci, share_with_ci, with_ci
from bench.stats import selection_bias as bias
from bench.stats.estimates import Estimate, t_interval
from scoring.errors import UserError

UNKNOWN = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class MetricLabel:
    """A metric of a board.

    Attributes:
        title: heading of its column.
        definition: what it measures, in one line.
        higher_is_better: for an unlearned model.
        limits: what it can be at all.
    """

    title: str
    definition: str
    higher_is_better: bool
    limits: tuple[float, float] = (-math.inf, math.inf)


@dataclass(frozen=True)
class Standing:
    """The place of an entry under one metric.

    Attributes:
        entry: its name.
        runs: how many have a value.
        selections, seeds: how many it has, of selections, and of seeds on each of them at least.
        value: mean over all selections of the mean over the seeds, also over those that it has no run on
            (`bias.mean_scores`); interval over the selections, nan with one.
        rank: by the value, 1 is the best; None for an entry that could not be compared.
        best, worst: the ranks that it can have; None with fewer than three selections.
        groups: letters; two entries that share one are not separable; "" where that is not known.
        adjusted: the value at the mean difficulty of all selections; None where difficulty is not known, and where
            every entry has every selection: then it is the raw one.
        adjusted_rank: rank by the adjusted value; None without one.
        adjusted_by_forecast, forecast_rank: the same, difficulty being the mean log flip time and not the mean log MRD.
    """

    entry: str
    runs: int
    selections: int
    seeds: int
    value: Estimate
    rank: int | None
    best: int | None
    worst: int | None
    groups: str
    adjusted: Estimate | None
    adjusted_rank: int | None
    adjusted_by_forecast: Estimate | None = None
    forecast_rank: int | None = None


@dataclass(frozen=True)
class SelectionLabel:
    """A selection of forget samples.

    Attributes:
        name: unique on the board.
        level: "easy", "medium", "hard", the value of an attribute, or "".
        mean_log_mrd: its difficulty; None where it was not measured.
        ids: of its samples, in order, each once.
        mean_log_flip_time: its difficulty by forecast, see `bench.tasks.selections`; None where it was not measured.
    """

    name: str
    level: str
    mean_log_mrd: float | None
    ids: tuple[str, ...]
    mean_log_flip_time: float | None = None


def standings(
    metric: MetricLabel,
    values: Sequence[tuple[str, str, float]],
    entries: Sequence[str],
    selections: Mapping[str, SelectionLabel],
) -> tuple[tuple[Standing, ...], tuple[str, ...]]:
    """The standings under one metric, best first, and the sentences that a reader must know.

    Args:
        values: entry, selection and value of each run that has one.
        entries: names of all of them, also of those without a value.

    Two entries are compared on the selections that both have, and means are adjusted for what is missing: raw values on
    different selections would compare the draws. At equal difficulty each is compared on all it has.
    """
    sign = 1.0 if metric.higher_is_better else -1.0
    measured = [(entry, selection, sign * value) for entry, selection, value in values]
    by_mrd = _adjusted(measured, {name: label.mean_log_mrd for name, label in selections.items()})
    by_forecast = _adjusted(measured, {name: label.mean_log_flip_time for name, label in selections.items()})
    table, remark = _table(measured)
    sentences = [remark] if remark else []
    rows = []
    for entry in entries:
        own_values = [(selection, value) for other, selection, value in measured if other == entry]
        rows.append(
            Standing(
                entry,
                runs=len(own_values),
                selections=len({selection for selection, _ in own_values}),
                seeds=_fewest_seeds(own_values),
                value=_signed(_mean(_selection_means(own_values)), sign),
                rank=None,
                best=None,
                worst=None,
                groups="",
                adjusted=by_mrd.value(entry, sign),
                adjusted_rank=by_mrd.rank(entry),
                adjusted_by_forecast=by_forecast.value(entry, sign),
                forecast_rank=by_forecast.rank(entry),
            )
        )
    if table:
        ranking = bias.separable(table)
        sentences += _uncertainty_sentences(metric.title, table, ranking)
        rows = _ranked_by_table(rows, ranking, sign)
    else:
        rows = _ranked_by_value(rows, sign)
    rows = [_within(row, *metric.limits) for row in rows]
    if by_mrd.slope is not None:
        sentences.append(
            f"Per unit of mean log MRD {metric.title} changes by {with_ci(_signed(by_mrd.slope, sign))}; "
            + (
                "adjusted values are what each entry would have at the mean difficulty of all selections."
                if by_mrd.values
                else "every entry has every selection, so values at equal difficulty are the raw ones."
            )
        )
    else:
        sentences.append(f"Not adjusted: {by_mrd.reason or 'the difficulty of the selections was not measured'}.")
    if by_forecast.slope is not None:
        sentences.append(
            f"Per unit of mean log flip time, the forecast of updates, it changes by "
            f"{with_ci(_signed(by_forecast.slope, sign))}; values at equal forecast are "
            + ("those at its mean." if by_forecast.values else "the raw ones, too.")
        )
    elif by_forecast.reason:
        sentences.append(f"Not adjusted by forecast: {by_forecast.reason}.")
    rows.sort(key=lambda row: (row.rank is None, row.rank or 0))
    return tuple(rows), tuple(sentences)


def _ranked_by_table(rows: Sequence[Standing], ranking: bias.Ranking, sign: float) -> list[Standing]:
    """The rows with values and ranks from the table, for the entries that are in it."""
    places = {rank.algorithm: (number, rank) for number, rank in enumerate(ranking.ranks, 1)}
    groups = group_letters(list(places), ranking.pairs)
    return [
        dataclasses.replace(
            row,
            value=_signed(places[row.entry][1].mean, sign),
            rank=places[row.entry][0],
            best=places[row.entry][1].best,
            worst=places[row.entry][1].worst,
            groups=groups[row.entry],
        )
        if row.entry in places
        else row
        for row in rows
    ]


def _within(row: Standing, least: float, most: float) -> Standing:
    """With intervals that end where the metric does."""
    adjusted, by_forecast = (value and value.within(least, most) for value in (row.adjusted, row.adjusted_by_forecast))
    return dataclasses.replace(
        row, value=row.value.within(least, most), adjusted=adjusted, adjusted_by_forecast=by_forecast
    )


def _table(measured: Sequence[tuple[str, str, float]]) -> tuple[bias.ScoreTable | None, str]:
    """The table of the entries that share at least three selections, and a sentence about what it lacks."""
    entries = list(dict.fromkeys(entry for entry, _, _ in measured))
    compared = list(entries)
    while len(compared) > 1:
        chosen = [row for row in measured if row[0] in compared]
        try:
            table = bias.ScoreTable.of(*(list(column) for column in zip(*chosen, strict=True)))
        except UserError:
            # Without the entries that have the fewest selections, the others may share enough.
            counts = {entry: len({s for e, s, _ in chosen if e == entry}) for entry in compared}
            fewest = min(counts.values())
            if fewest == max(counts.values()):
                break
            compared = [entry for entry in compared if counts[entry] > fewest]
            continue
        remarks = []
        if table.incomplete:
            remarks.append(
                f"{len(table.incomplete)} of {len(table.selections)} selections do not have the same number of runs of "
                "all: means are adjusted for the selections that an entry lacks, and two entries are compared on those "
                "that both have"
            )
        if excluded := [entry for entry in entries if entry not in compared]:
            remarks.append(f"{', '.join(excluded)}: not compared, on too few selections")
        return table, ". ".join(remarks) + "." if remarks else ""
    if len(entries) < 2:
        return None, "There is one entry, and none to compare it with."
    return None, "Ranks have no intervals: entries do not share three selections."


def failed_runs(runs: Sequence[tuple[str, bool]]) -> tuple[str, ...]:
    """A sentence about the runs that did not finish; none if all did.

    Args:
        runs: the entry of each run, and whether it finished.
    """
    failures = bias.failures_of(runs)
    if not any(of_entry.failed for of_entry in failures.values()):
        return ()
    shares = ", ".join(f"{entry} {share_with_ci(of_entry.share)}" for entry, of_entry in failures.items())
    return (f"Runs that did not finish: {shares}.",)


def _ranked_by_value(rows: Sequence[Standing], sign: float) -> list[Standing]:
    """The rows with ranks by their value alone."""
    ordered = sorted((row for row in rows if math.isfinite(row.value.value)), key=lambda row: -sign * row.value.value)
    ranks = {row.entry: rank for rank, row in enumerate(ordered, 1)}
    return [dataclasses.replace(row, rank=ranks.get(row.entry)) for row in rows]


@dataclass(frozen=True)
class _Adjusted:
    """Values at equal difficulty.

    Attributes:
        values: by entry, higher is better; {} if there are none, or every entry has every selection.
        slope: of the value, per unit of difficulty.
        reason: why there are none; "" where difficulty was not measured.
    """

    values: Mapping[str, Estimate]
    slope: Estimate | None
    reason: str

    def value(self, entry: str, sign: float) -> Estimate | None:
        return _signed(self.values[entry], sign) if entry in self.values else None

    def rank(self, entry: str) -> int | None:
        order = sorted(self.values, key=lambda each: -self.values[each].value)
        return order.index(entry) + 1 if entry in self.values else None


def _adjusted(measured: Sequence[tuple[str, str, float]], difficulties: Mapping[str, float | None]) -> _Adjusted:
    """Values at equal difficulty, from that of each selection; none where they are the raw ones."""
    rows = [
        (entry, selection, value, difficulty)
        for entry, selection, value in measured
        if (difficulty := difficulties[selection]) is not None and math.isfinite(difficulty)
    ]
    if not rows:
        return _Adjusted({}, None, "")
    entries, names, values, found = (list(column) for column in zip(*rows, strict=True))
    try:
        result = bias.adjusted_scores(entries, found, values, names)
    except UserError as error:
        return _Adjusted({}, None, str(error))
    if len(set(zip(entries, names, strict=True))) == len(set(entries)) * len(set(names)):
        return _Adjusted({}, result.slope, "")
    return _Adjusted({score.algorithm: score.adjusted for score in result.scores}, result.slope, "")


def _uncertainty_sentences(title: str, table: bias.ScoreTable, ranking: bias.Ranking) -> list[str]:
    """How much of the variance is the draw's, and how many selections the ranking would need."""
    apart = sum(pair.separable for pair in ranking.pairs)
    told = f"{apart} of {len(ranking.pairs)} pairs of entries can be told apart on these selections."
    try:
        table = table.complete
    except UserError:
        return [
            f"Which part of the variance of {title} is due to the samples that were drawn, and how many selections the "
            f"ranking needs, cannot be told with {int(table.is_complete.sum())} complete selections; {told}"
        ]
    return [_variance_sentence(title, table), f"{_needed_sentence(table, ranking)} {told}"]


def _variance_sentence(title: str, table: bias.ScoreTable) -> str:
    shares = bias.variance_shares(table)
    share = shares.within_algorithm
    if not math.isfinite(share.value):
        return (
            f"How much of the variance of one entry's {title} is due to which samples were drawn cannot be told with "
            f"one seed ({len(table.selections)} selections)."
        )
    tails = f"; no upper limit, as scores have long tails ({shares.long_tails})" if shares.long_tails else ""
    return (
        f"Of the variance of one entry's {title}, {share_with_ci(share)} is due to which samples were drawn, the rest "
        f"to the seed ({len(table.selections)} selections, {table.seeds} seeds each{tails})."
    )


def _needed_sentence(table: bias.ScoreTable, ranking: bias.Ranking) -> str:
    """Selections for the whole ranking, for it up to groups that cannot be told apart, and for each two neighbours."""
    sentence = (
        f"For this ranking to be right with a probability of 95 %, {count_with_ci(bias.selections_needed(table))} "
        "selections are needed"
    )
    groups = bias.separable_groups(ranking)
    if 1 < len(groups) < len(ranking.ranks):
        needed = bias.selections_needed_between(table, groups)
        names = ", then ".join("/".join(group) for group in groups)
        sentence += f", and for no more than {names}, {count_with_ci(needed)}"
    pairs = {frozenset((p.better, p.worse)): p for p in bias.selections_needed_pair(table)}
    order = [rank.algorithm for rank in ranking.ranks]
    neighbours = [pairs[frozenset(pair)] for pair in pairwise(order)]
    if len(neighbours) > 1:
        counts = "; ".join(f"{p.better} before {p.worse} {count_with_ci(p.selections)}" for p in neighbours)
        sentence += f"; of neighbours, {counts}"
    return sentence + "."


def group_letters(order: Sequence[str], pairs: Sequence[bias.SeparablePair]) -> dict[str, str]:
    """Letters by entry, best first: two entries share one if and only if they are not separable.

    A letter is a largest set of entries of which no two are separable: the maximal cliques (Bron & Kerbosch 1973).
    """
    tied: dict[str, set[str]] = {entry: set() for entry in order}
    for pair in pairs:
        if not pair.separable:
            tied[pair.better].add(pair.worse)
            tied[pair.worse].add(pair.better)
    cliques: list[set[str]] = []

    def grow(clique: set[str], candidates: set[str], done: set[str]) -> None:
        if not candidates and not done:
            cliques.append(clique)
            return
        pivot = max(candidates | done, key=lambda entry: len(tied[entry] & candidates))
        for entry in [name for name in order if name in candidates - tied[pivot]]:
            grow(clique | {entry}, candidates & tied[entry], done & tied[entry])
            candidates, done = candidates - {entry}, done | {entry}

    grow(set(), set(order), set())
    cliques.sort(key=lambda clique: sorted(order.index(entry) for entry in clique))
    return {entry: "".join(_letter(n) for n, clique in enumerate(cliques) if entry in clique) for entry in order}


def _letter(number: int) -> str:
    """a, b, … z, then a1, b1, …"""
    letter = "abcdefghijklmnopqrstuvwxyz"[number % 26]
    return letter if number < 26 else f"{letter}{number // 26}"


def _selection_means(values: Sequence[tuple[str, float]]) -> np.ndarray:
    """(selections,) means over seeds of pairs of selection and value."""
    cells: defaultdict[str, list[float]] = defaultdict(list)
    for selection, value in values:
        cells[selection].append(value)
    return np.array([np.mean(seeds) for seeds in cells.values()])


def _fewest_seeds(values: Sequence[tuple[str, float]]) -> int:
    return min(Counter(selection for selection, _ in values).values(), default=0)


def _mean(values: np.ndarray) -> Estimate:
    return t_interval(values) if len(values) else UNKNOWN


def _signed(estimate: Estimate, sign: float) -> Estimate:
    """From "higher is better" back to the metric's own direction."""
    return estimate if sign > 0 else Estimate(-estimate.value, -estimate.high, -estimate.low)
