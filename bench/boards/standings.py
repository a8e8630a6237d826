"""Ranks of a board's entries under one metric: raw and at equal difficulty, with what the data can tell apart."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        definition: one line.
        higher_is_better: of an unlearned model.
    """

    title: str
    definition: str
    higher_is_better: bool


@dataclass(frozen=True)
class Standing:
    """The place of an entry under one metric.

    Attributes:
        entry: its name.
        runs: with a value.
        selections, seeds: of the runs that are compared: those that every entry has.
        value: mean over the selections, of the mean over the seeds; t interval over the selections, nan with one.
        rank: by the value, 1 the best; None for an entry that could not be compared.
        best, worst: the ranks that it can have; None where there are fewer than three selections.
        groups: letters; two entries that share one are not separable; "" where that is not known.
        adjusted: the value at the mean difficulty of all selections; None where difficulty is not known.
        adjusted_rank: by it; None where there is none.
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


@dataclass(frozen=True)
class SelectionLabel:
    """A selection of forget samples.

    Attributes:
        name: unique on the board.
        level: "easy", "medium", "hard", the value of an attribute, or "".
        mean_log_mrd: its difficulty; None where it was not measured.
        ids: of its samples, in order, without repetition.
    """

    name: str
    level: str
    mean_log_mrd: float | None
    ids: tuple[str, ...]


def standings(
    metric: MetricLabel,
    values: Sequence[tuple[str, str, float]],
    entries: Sequence[str],
    selections: Mapping[str, SelectionLabel],
) -> tuple[tuple[Standing, ...], tuple[str, ...]]:
    """Places under one metric, and what is to be known of them.

    Args:
        values: entry, selection and value of each run that has one.
        entries: all of them, also those without a run that has a value.

    Entries are compared on the selections that all of them have with the same number of seeds (`bias.ScoreTable.of`):
    raw values of different selections would be the draw's. At equal difficulty they are compared on all they have.
    """
    sign = 1.0 if metric.higher_is_better else -1.0
    measured = [(entry, selection, sign * value) for entry, selection, value in values]
    own = {entry: [(s, v) for e, s, v in measured if e == entry] for entry in entries}
    adjusted, slope, why_not = _adjusted(measured, selections)
    adjusted_order = sorted(adjusted, key=lambda entry: -adjusted[entry].value)
    table, left_out = _table(measured)
    sentences = [left_out] if left_out else []
    found = []
    for entry in entries:
        each = own[entry]
        found.append(
            Standing(
                entry,
                runs=len(each),
                selections=len({selection for selection, _ in each}),
                seeds=_fewest_seeds(each),
                value=_turned(_mean(_by_selection(each)), sign),
                rank=None,
                best=None,
                worst=None,
                groups="",
                adjusted=_turned(adjusted[entry], sign) if entry in adjusted else None,
                adjusted_rank=adjusted_order.index(entry) + 1 if entry in adjusted else None,
            )
        )
    if table:
        ranking = bias.separable(table)
        sentences += _told(metric.title, table, ranking)
        found = _compared(found, table, ranking, sign)
    else:
        found = _by_value(found, sign)
    if slope is not None:
        sentences.append(
            f"Per unit of mean log MRD {metric.title} changes by {with_ci(_turned(slope, sign))}; adjusted values are "
            "what each entry would have at the mean difficulty of all selections."
        )
    elif why_not:
        sentences.append(why_not)
    found.sort(key=lambda each: (each.rank is None, each.rank or 0))
    return tuple(found), tuple(sentences)


def _compared(found: Sequence[Standing], table: bias.ScoreTable, ranking: bias.Ranking, sign: float) -> list[Standing]:
    """With what the balanced table says of those that are in it."""
    places = {rank.algorithm: (number, rank) for number, rank in enumerate(ranking.ranks, 1)}
    groups = groups_of(list(places), ranking.pairs)
    means = dict(zip(table.algorithms, table.means, strict=True))
    return [
        dataclasses.replace(
            each,
            selections=len(table.selections),
            seeds=table.seeds,
            value=_turned(_mean(means[each.entry]), sign),
            rank=places[each.entry][0],
            best=places[each.entry][1].best,
            worst=places[each.entry][1].worst,
            groups=groups[each.entry],
        )
        if each.entry in places
        else each
        for each in found
    ]


def _table(measured: Sequence[tuple[str, str, float]]) -> tuple[bias.ScoreTable | None, str]:
    """The balanced table of the entries that share at least three selections; and who is not in it."""
    entries = list(dict.fromkeys(entry for entry, _, _ in measured))
    kept = list(entries)
    while len(kept) > 1:
        chosen = [each for each in measured if each[0] in kept]
        try:
            table = bias.ScoreTable.of(*(list(column) for column in zip(*chosen, strict=True)))  # type: ignore[arg-type]
        except UserError:
            # Whoever has the fewest selections stands in the way of the others.
            counts = {entry: len({s for e, s, _ in chosen if e == entry}) for entry in kept}
            fewest = min(counts.values())
            if fewest == max(counts.values()):
                break
            kept = [entry for entry in kept if counts[entry] > fewest]
            continue
        parts = []
        if table.dropped:
            parts.append(
                f"{len(table.dropped)} of {len(table.dropped) + len(table.selections)} selections do not have the "
                "same number of runs of all, and are left out of the raw comparison"
            )
        if out := [entry for entry in entries if entry not in kept]:
            parts.append(f"{', '.join(out)}: not compared, on too few selections")
        return table, ". ".join(parts) + "." if parts else ""
    if len(entries) < 2:
        return None, "There is one entry, and none to compare it with."
    return None, "Ranks have no intervals: entries do not share three selections with the same number of seeds."


def _by_value(found: Sequence[Standing], sign: float) -> list[Standing]:
    """Ranked by the value alone."""
    ordered = sorted(
        (each for each in found if math.isfinite(each.value.value)), key=lambda each: -sign * each.value.value
    )
    place = {each.entry: number for number, each in enumerate(ordered, 1)}
    return [dataclasses.replace(each, rank=place.get(each.entry)) for each in found]


def _adjusted(
    measured: Sequence[tuple[str, str, float]], selections: Mapping[str, SelectionLabel]
) -> tuple[dict[str, Estimate], Estimate | None, str]:
    """Values at equal difficulty by entry, the slope, and why there are none."""
    known = [
        (entry, selection, value, difficulty)
        for entry, selection, value in measured
        if (difficulty := selections[selection].mean_log_mrd) is not None and math.isfinite(difficulty)
    ]
    if not known:
        return {}, None, "Not adjusted: the difficulty of the selections was not measured."
    entries, drawn, values, difficulties = (list(column) for column in zip(*known, strict=True))
    try:
        found = bias.adjusted_scores(entries, difficulties, values, drawn)
    except UserError as error:
        return {}, None, f"Not adjusted: {error}."
    return {each.algorithm: each.adjusted for each in found.scores}, found.slope, ""


def _told(title: str, table: bias.ScoreTable, ranking: bias.Ranking) -> list[str]:
    shares = bias.variance_shares(table)
    share, bound, rest = shares.within_algorithm, "", ", the rest to the seed"
    if not math.isfinite(share.value):
        share, bound, rest = shares.within_algorithm_common, "at least ", ""
    seeds = f"{table.seeds} seeds" if table.seeds > 1 else "one seed"
    apart = sum(pair.separable for pair in ranking.pairs)
    return [
        f"Of the variance of one entry's {title}, {bound}{share_with_ci(share)} is due to which samples were "
        f"drawn{rest} "
        f"({len(table.selections)} selections, {seeds} each).",
        f"For this ranking to be right with a probability of 95 %, {count_with_ci(bias.selections_needed(table))} "
        "selections "
        f"are needed; {apart} of {len(ranking.pairs)} pairs of entries can be told apart on these.",
    ]


def groups_of(order: Sequence[str], pairs: Sequence[bias.SeparablePair]) -> dict[str, str]:
    """Letters by entry, best first: two share one if and only if they are not separable.

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
        for entry in [each for each in order if each in candidates - tied[pivot]]:
            grow(clique | {entry}, candidates & tied[entry], done & tied[entry])
            candidates, done = candidates - {entry}, done | {entry}

    grow(set(), set(order), set())
    cliques.sort(key=lambda clique: sorted(order.index(entry) for entry in clique))
    return {entry: "".join(_letter(n) for n, clique in enumerate(cliques) if entry in clique) for entry in order}


def _letter(number: int) -> str:
    """a, b, … z, then a1, b1, …"""
    letter = "abcdefghijklmnopqrstuvwxyz"[number % 26]
    return letter if number < 26 else f"{letter}{number // 26}"


def _by_selection(own: Sequence[tuple[str, float]]) -> np.ndarray:
    cells: defaultdict[str, list[float]] = defaultdict(list)
    for selection, value in own:
        cells[selection].append(value)
    return np.array([np.mean(values) for values in cells.values()])


def _fewest_seeds(own: Sequence[tuple[str, float]]) -> int:
    return min(Counter(selection for selection, _ in own).values(), default=0)


def _mean(values: np.ndarray) -> Estimate:
    return t_interval(values) if len(values) else UNKNOWN


def _turned(estimate: Estimate, sign: float) -> Estimate:
    """Back to the metric's own direction."""
    return estimate if sign > 0 else Estimate(-estimate.value, -estimate.high, -estimate.low)
