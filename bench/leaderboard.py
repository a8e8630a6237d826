"""Leaderboards: which algorithm forgets best, and whether that is the algorithm or the samples that were drawn.

stores -> boards of runs that can be compared -> standings under every metric, raw and at equal difficulty

A board is of one task, one experiment and one setting: the same model, data and way of measuring. Within it an entry is
an algorithm with its settings; selections of forget samples and seeds are what it is averaged over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.statistics import Estimate


@dataclass(frozen=True)
class Shown:
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
class Drawn:
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


@dataclass(frozen=True)
class Run:
    """A run as it is shown.

    Attributes:
        run: its hash, unique.
        entry, selection: names.
        status: "finished", or what happened instead; reason: in one line, None of a finished one.
        values: by metric, of those that were measured.
        updates_until_forgotten: by sample id, for those that were forgotten; {} where it was not looked at.
        origin: place in `Board.origins`.
    """

    run: str
    entry: str
    selection: str
    seed: int
    status: str
    reason: str | None
    values: Mapping[str, float]
    updates: int | None
    seconds: float | None
    updates_until_forgotten: Mapping[str, int]
    origin: int


@dataclass(frozen=True)
class Text:
    """A forget sample: what it says, and its Memory Removal Difficulty (low: hard to forget)."""

    prompt: str
    completion: str
    mrd: float | None
    num_tokens: int | None


@dataclass(frozen=True)
class Board:
    """Runs that can be compared.

    Attributes:
        name: unique on the page: "authors, fig2".
        task, experiment: of its runs.
        about: what all its runs have in common, by name: model, forget split, epochs and so on.
        entries: name -> fields of its spec in which entries differ.
        metrics: by name, the first of them first.
        standings: by metric, the best entry first; those without a rank last.
        sentences: by metric: what a reader must know, each computed from the data with its interval.
        trade_off: the metrics of completeness and of utility that are drawn against each other; None without both.
        runs: all, also those that failed.
        selections: by name.
        texts: by sample id, of all samples that any selection has and whose text is known.
        origins: where runs come from: spec hash, model fingerprint, data hash, packages, hardware, commit, store.
    """

    name: str
    task: str
    experiment: str
    about: Mapping[str, str]
    entries: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Shown]
    standings: Mapping[str, tuple[Standing, ...]]
    sentences: Mapping[str, tuple[str, ...]]
    trade_off: tuple[str, str] | None
    runs: tuple[Run, ...]
    selections: Mapping[str, Drawn]
    texts: Mapping[str, Text]
    origins: tuple[Mapping[str, str], ...]
