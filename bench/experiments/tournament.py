"""Beyond the paper: which measure tells beforehand how many updates it takes to forget a sample?

Every measure of difficulty, at its price in forward passes, against the real number of updates: of samples forgotten
one by one, for several optimisers and rules, and forgotten together. Measures are chosen on one half of the samples and
reported on the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.experiments.shared.contest import MRD, Entry, Score, Truth, best, halves, score
from bench.jobs.difficulty import DifficultyResult, DifficultySpec, difficulty
from bench.jobs.sweep_tables import as_table
from bench.jobs.truth import TruthSpec, truth
from bench.models.embedded import shorter_training
from bench.models.find import absolute_model
from bench.report.figures import BLUE, GREEN, MUTED, ORANGE, VERMILLION, Draw, error_bars
from bench.report.words import decimal, interval, interval_columns, markdown_table, with_ci
from bench.stats.estimates import Estimate
from bench.tasks.datasets import absolute_source, find_task, is_data_file
from scoring.errors import UserError
from scoring.measures import MEASURES, Asked
from scoring.measuring import threshold_name
from scoring.settings import Doc, Ge, build, check, named

Rule = Literal["average", "paper", "el"]
# Measures that say nothing about an update, and so are taken once; the others depend on optimiser and learning rate.
STILL = tuple(name for name, measure in MEASURES.items() if "thresholds" not in measure.needs)
FORECASTS = tuple(name for name, measure in MEASURES.items() if "thresholds" in measure.needs)
TARGETS = {"average": 0.9, "0.5": 0.8}  # rank correlations that a forecast is meant to reach, by rule
AFFORDABLE = 10  # forward passes a sample
LOOKS_AHEAD = ("flip-time", "joint-forecast")


@dataclass(frozen=True, kw_only=True)
class Updates:
    """How samples are forgotten: the algorithm, and how an update is made."""

    algorithm: Annotated[str, Doc("see the table of algorithms")] = "GA"
    optimizer: Annotated[Literal["adamw", "sgd"], Doc("AdamW, or plain gradient descent")] = "adamw"
    learning_rate: Annotated[float, Doc("of the optimiser")] = 5e-5
    most_updates: Annotated[int, Ge(1), Doc("after so many a sample is given up")] = 200
    until: Annotated[
        list[float | Literal["average", "paper", "el"]], Doc("rules, see `mrd-bench difficulty --truth`")
    ] = field(default_factory=lambda: ["average", 0.75, 0.5])

    @property
    def name(self) -> str:
        return f"{self.algorithm}, {self.optimizer}, {self.learning_rate:g}"


@dataclass(frozen=True, kw_only=True)
class Together(Updates):
    """How samples are forgotten together."""

    batch_size: Annotated[int, Ge(1), Doc("samples of an update")] = 10
    seeds: Annotated[list[int], Doc("of runs")] = field(default_factory=lambda: [0, 1, 2])

    @property
    def name(self) -> str:
        return f"together, batches of {self.batch_size}"


@dataclass(frozen=True, kw_only=True)
class Arena:
    """A model and samples on which measures compete."""

    name: Annotated[str, Doc("in tables")]
    model: Annotated[str, Doc("an embedded model, a folder, or a Hugging Face id")]
    data: Annotated[str, Doc("a task or a data file")]
    split: Annotated[str | None, Doc("of a task")] = None
    samples: Annotated[int | None, Ge(1), Doc("at most, evenly spaced (default: all)")] = None
    alone: Annotated[list[dict[str, Any]], Doc("how samples are forgotten one by one; the first is the main one")] = (
        field(default_factory=lambda: [{}])
    )
    together: Annotated[dict[str, Any] | None, Doc("how they are forgotten together (default: not at all)")] = None
    lookaheads: Annotated[list[Annotated[int, Ge(1)]], Doc("of forecasts")] = field(default_factory=lambda: [1, 2])
    epochs: Annotated[list[int], Doc("of shorter trainings of an embedded model, for vog")] = field(
        default_factory=list
    )
    checkpoints: Annotated[list[str], Doc("earlier states of the model, for vog")] = field(default_factory=list)

    def checked(self) -> Self:
        """The same.

        Raises:
            UserError: a value that is not allowed.
        """
        check(self)
        if not self.alone:
            raise UserError(f"{named('alone')} is empty: expected at least one way to forget samples one by one")
        return self


def run(setup: Setup) -> Answer:
    """All arenas of the preset."""
    described = setup.values.get("arenas")
    if not isinstance(described, list) or not described:
        raise UserError(f"{setup.names.start()}arenas: expected a list of mappings, one for each model")
    arenas = []
    for number, values in enumerate(described):
        with setup.section("arenas"):
            arenas.append(build(Arena, values).checked())
        if [arena.name for arena in arenas].count(arenas[-1].name) > 1:
            raise UserError(f"{setup.names.start()}arenas, entry {number + 1}: name {values['name']!r} occurs twice")
    return answer([contest for arena in arenas for contest in Contests(setup, arena).run()])


def on_model(values: Mapping[str, Any], model: str, data: str, split: str | None) -> dict[str, Any]:
    """The preset with its first arena alone, on another model and other data.

    Args:
        values: the preset's section of the spec file.
    """
    first = {name: value for name, value in values["arenas"][0].items() if name not in ("epochs", "checkpoints")}
    of_model = {"name": Path(model).name, "model": absolute_model(model), "data": absolute_source(data), "split": split}
    return {**values, "arenas": [first | of_model]}


@dataclass(frozen=True)
class Contest:
    """One truth of an arena, and how every measure did.

    Attributes:
        arena: its name.
        rule: of the truth: "average", "0.5", ...
        main: it belongs to the arena's main way of forgetting one by one, or together.
        scores: on the half that is reported, by measure.
        chosen: the measure that was best on the other half.
        forecast: the forecast in updates that was best there, of those for at most AFFORDABLE forward passes.
        never: how many samples were not forgotten at the cap.
        at_start: how many were forgotten before any update; they are left out.
    """

    arena: str
    rule: str
    main: bool
    scores: Mapping[str, Score]
    chosen: str
    forecast: str
    never: int
    at_start: int

    @property
    def truth(self) -> Truth:
        return next(iter(self.scores.values())).truth


class Contests:
    """The measurements and comparisons of one arena.

    Args:
        setup: of the experiment.
        arena: the arena.
    """

    def __init__(self, setup: Setup, arena: Arena) -> None:
        self._setup, self._arena = setup, arena
        self._folder = setup.work / arena.name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._on = {"model": arena.model, "data": arena.data, "split": arena.split, "samples": arena.samples}

    def run(self) -> list[Contest]:
        """Measure what is not measured yet, and compare."""
        still = self._still()
        contests = []
        for number, values in enumerate(self._arena.alone):
            with self._setup.section("arenas"):
                updates = build(Updates, values)
            contests += self._alone(updates, still, main=number == 0)
        if self._arena.together is not None:
            with self._setup.section("arenas"):
                together = build(Together, self._arena.together)
            contests += self._together(together, still)
        return contests

    def _alone(self, updates: Updates, still: DifficultyResult, main: bool) -> list[Contest]:
        found = self._truth(updates, f"alone-{_file_name(updates)}")
        names = list(map(threshold_name, updates.until))
        forecasts = self._forecasts(updates, f"alone-forecasts-{_file_name(updates)}")
        return [
            self._compare(
                Truth.alone(f"{updates.name}: {_rule_in_words(name)}", found[f"updates@{name}"].to_numpy()),
                name,
                still,
                forecasts,
                main,
            )
            for name in names
        ]

    def _together(self, together: Together, still: DifficultyResult) -> list[Contest]:
        found = self._truth(together, f"together-{_file_name(together)}")
        forecasts = self._forecasts(together, f"together-forecasts-{_file_name(together)}")
        seeds = found["seed"].to_numpy()
        contests = []
        for rule in together.until:
            name = threshold_name(rule)
            updates = found[f"updates@{name}"].to_numpy()
            by_seed = [updates[seeds == seed] for seed in together.seeds]
            truth_ = Truth.together(f"{together.name}: {_rule_in_words(name)}", by_seed)
            contests.append(self._compare(truth_, name, still, forecasts, True))
        return contests

    def _compare(
        self, truth_: Truth, rule: str, still: DifficultyResult, made: Mapping[int, DifficultyResult], main: bool
    ) -> Contest:
        entries = entries_of(still, made, rule)
        ids, tokens = still.table["sample_id"].to_pylist(), still.table["num_tokens"].to_numpy()
        first, second = halves(ids)
        never, at_start = int(np.isinf(truth_.typical).sum()), int((truth_.typical == 0).sum())
        forecasts = {name: entry for name, entry in entries.items() if entry.in_updates and entry.cost <= AFFORDABLE}
        return Contest(
            self._arena.name,
            rule,
            main,
            score(entries, truth_, tokens, second),
            best(entries, truth_, first),
            best(forecasts, truth_, first),
            never,
            at_start,
        )

    # --- Measurements -----------------------------------------------------------------------------------

    def _still(self) -> DifficultyResult:
        """The measures that do not depend on the update."""
        arena = self._arena
        checkpoints = [shorter_training(arena.model, n, self._setup.progress) for n in arena.epochs]
        checkpoints += arena.checkpoints
        names = [name for name in STILL if name != "vog" or checkpoints]
        if not _has_retain_set(arena):
            names.remove("gradient-cosine")
        spec = build(DifficultySpec, self._on | {"measure": names, "checkpoints": checkpoints})
        return self._measured(spec, "measures")

    def _forecasts(self, updates: Updates, name: str) -> dict[int, DifficultyResult]:
        """The forecasts for an update, by look-ahead. Of the paper's rule the part on MA is forecast."""
        rules = dict.fromkeys(rule if rule != "paper" else "average" for rule in updates.until if rule != "el")
        results = {}
        for lookahead in self._arena.lookaheads:
            names = [name for name in FORECASTS if lookahead == 1 or name in LOOKS_AHEAD]
            spec = build(
                DifficultySpec,
                self._on
                | {
                    "measure": names,
                    "thresholds": list(rules) or ["average"],
                    "lookahead": lookahead,
                    "algorithm": updates.algorithm,
                    "optimizer": updates.optimizer,
                    "learning_rate": updates.learning_rate,
                },
            )
            results[lookahead] = self._measured(spec, f"{name}-h{lookahead}")
        return results

    def _measured(self, spec: DifficultySpec, name: str) -> DifficultyResult:
        path = self._folder / f"{name}.parquet"
        return difficulty(spec, path, self._setup.resources.replicas(), progress=self._setup.progress)

    def _truth(self, updates: Updates, name: str) -> pa.Table:
        values = {field.name: getattr(updates, field.name) for field in dataclasses.fields(updates)}
        spec = build(TruthSpec, self._on | values | {"together": isinstance(updates, Together)})
        path = self._folder / f"{name}.parquet"
        return truth(spec, path, self._setup.resources.replicas(), progress=self._setup.progress).table


def entries_of(still: DifficultyResult, forecasts: Mapping[int, DifficultyResult], rule: str) -> dict[str, Entry]:
    """All measures that take part under a rule, by name.

    Args:
        still: measures without an update.
        forecasts: by look-ahead.
        rule: of the truth; a forecast is made for its threshold of MA, for "el" for the average one.
    """
    threshold = "average" if rule in ("paper", "el") else rule
    entries = {
        name: Entry(name, still.table[name].to_numpy(), MEASURES[name].harder, still.record["cost"][name])
        for name in STILL
        if name in still.table.column_names
    }
    for lookahead, result in forecasts.items():
        for name in FORECASTS:
            if (column := f"{name}@{threshold}") in result.table.column_names:
                title = f"{name}, h = {lookahead}" if name in LOOKS_AHEAD else name
                measure = MEASURES[name]
                # What it costs for this one threshold.
                cost = measure.cost(Asked(thresholds={threshold: math.nan}, lookahead=lookahead))
                entries[title] = Entry(title, result.table[column].to_numpy(), measure.harder, cost, True)
    return entries


def _has_retain_set(arena: Arena) -> bool:
    if is_data_file(arena.data):
        return False
    task, _ = find_task(arena.data)
    return (arena.split or task.default_split) in task.retain_of


def _file_name(updates: Updates) -> str:
    return f"{updates.algorithm}-{updates.optimizer}-{updates.learning_rate:g}"


def _rule_in_words(name: str) -> str:
    return {"average": "MA below its average", "paper": "the paper's rule", "el": "EL below its average"}.get(
        name, f"MA < {name}"
    )


# --- The answer ---------------------------------------------------------------------------------------------


def answer(contests: Sequence[Contest]) -> Answer:
    """From the contests of all arenas, the main arena first."""
    arenas = list(dict.fromkeys(contest.arena for contest in contests))
    main = [contest for contest in contests if contest.arena == arenas[0] and contest.main]
    sentences = [_headline(main), *map(_of_arena, ([c for c in contests if c.arena == name] for name in arenas))]
    sentences += [_chosen(contests), _targets(contests)]
    rows = [_row(contest, score_) for contest in contests for score_ in contest.scores.values()]
    shown = main[:1] + [c for c in main if c.rule == "0.5" and c.truth.ceiling == 1.0][:1]
    shown += [c for c in main if c.truth.ceiling != 1.0][:1]
    panels = [_cost_plot(contest) for contest in shown]
    return Answer(as_table(rows), panels, sentences, inches=(7.0 * len(panels), 7.0))


def _row(contest: Contest, score_: Score) -> dict[str, Any]:
    missing = Estimate(np.nan, np.nan, np.nan)
    return {
        "arena": contest.arena,
        "truth": contest.truth.name,
        "rule": contest.rule,
        "ceiling": contest.truth.ceiling,
        "measure": score_.entry.name,
        "cost": score_.entry.cost,
        "chosen": score_.entry.name == contest.chosen,
        "samples": score_.samples,
        "never": contest.never,
        "at_start": contest.at_start,
        **interval_columns("spearman", score_.correlation),
        **interval_columns("length_partialled_out", score_.beyond_length),
        **interval_columns("middle_lengths", score_.middle_lengths),
        **interval_columns("ahead_of_mrd", score_.ahead_of_mrd or missing),
        **interval_columns("ratio", score_.ratio or missing),
        "ratio_10": score_.spread[0],
        "ratio_90": score_.spread[1],
    }


def _headline(main: Sequence[Contest]) -> str:
    parts = []
    for contest in main:
        top, mrd, nll = contest.scores[contest.forecast], contest.scores[MRD], contest.scores["nll"]
        parts.append(
            f"{contest.truth.name}: {top.entry.name} {with_ci(top.correlation)}, MRD {with_ci(mrd.correlation)}, "
            f"initial NLL {with_ci(nll.correlation)}"
        )
    return (
        f"**Rank correlation with the real number of updates ({main[0].arena}, +1: the order from easy to hard is the "
        f"true one): {'; '.join(parts)}.** The forecast is the one for at most {AFFORDABLE} forward passes a sample "
        "that was best on one half of the samples; all numbers are of the other half."
    )


def _of_arena(contests: Sequence[Contest]) -> str:
    """A table of one arena: measures by truths."""
    names = list(dict.fromkeys(name for contest in contests for name in contest.scores))
    head = ["measure", "forwards", *(contest.truth.name for contest in contests)]
    rows = []
    for name in names:
        cost = next(c.scores[name].entry.cost for c in contests if name in c.scores)
        cells = []
        for contest in contests:
            found = contest.scores.get(name)
            cell = "–" if found is None else f"{decimal(found.correlation.value)} ({interval(found.correlation)})"
            cells.append(f"**{cell}**" if name == contest.chosen else cell)
        rows.append([name, f"{cost:g}", *cells])
    rows.sort(key=lambda row: -contests[0].scores[row[0]].correlation.value if row[0] in contests[0].scores else 2.0)
    rows.append(["*samples (forgotten at the start, never)*", "", *(_counts(contest) for contest in contests)])
    if any(contest.truth.ceiling < 1 for contest in contests):
        ceilings = ["–" if c.truth.ceiling == 1 else decimal(c.truth.ceiling) for c in contests]
        rows.append(["*ceiling by the spread over seeds*", "", *ceilings])
    calibrated = [_calibration_of(contest) for contest in contests]
    return (
        f"{contests[0].arena}: rank correlation with 95 % CI; bold is what the other half of the samples chose.\n\n"
        f"{markdown_table(head, rows)}\n\nForecast / truth, median (10 to 90 %): {'; '.join(calibrated)}."
    )


def _counts(contest: Contest) -> str:
    samples = next(iter(contest.scores.values())).samples
    return f"{samples} ({contest.at_start}, {contest.never})"


def _calibration_of(contest: Contest) -> str:
    top = contest.scores[contest.forecast]
    assert top.ratio is not None
    low, high = (decimal(value) for value in top.spread)
    return f"{contest.truth.name}, {top.entry.name}: {decimal(top.ratio.value)} ({low} to {high})"


def _chosen(contests: Sequence[Contest]) -> str:
    ahead = [
        f"{contest.arena}, {contest.truth.name}: {contest.chosen} {with_ci(difference)}"
        for contest in contests
        if (difference := contest.scores[contest.chosen].ahead_of_mrd) is not None
    ]
    return f"What was chosen on one half is ahead of MRD on the other, paired, by: {'; '.join(ahead)}."


def _targets(contests: Sequence[Contest]) -> str:
    """Whether the forecasts reach the correlations that they were meant to."""
    verdicts = []
    for contest in contests:
        target = TARGETS.get(contest.rule) if contest.truth.ceiling == 1.0 else 0.8
        if target is None or not contest.main:
            continue
        top = contest.scores[contest.forecast]
        reached = "reached" if top.correlation.value >= target else "not reached"
        verdicts.append(
            f"{contest.arena}, {contest.truth.name}: {decimal(top.correlation.value)} by {top.entry.name}, target "
            f"{decimal(target, 1)} {reached}"
        )
    return f"Targets, set before the run, for at most {AFFORDABLE} forward passes a sample: {'; '.join(verdicts)}."


def _cost_plot(contest: Contest) -> Draw:
    """Rank correlation against the price."""

    def draw(axes: Axes) -> None:
        lowest = min(np.nanmin([s.correlation.low, s.correlation.value]) for s in contest.scores.values())
        by_price: dict[float, list[Score]] = {}
        for score_ in sorted(contest.scores.values(), key=lambda s: -s.correlation.value):
            by_price.setdefault(round(score_.entry.cost), []).append(score_)
        for at_price in by_price.values():
            # Points of about the same price stand side by side, their names one below the other.
            y = np.inf
            for number, score_ in enumerate(at_price):
                x, value = score_.entry.cost + 0.16 * number, score_.correlation.value
                y = min(value, y - (1.1 - lowest) / 28)
                colour = _colour(score_.entry.name)
                bars = error_bars([score_.correlation])
                axes.errorbar([x], [value], yerr=bars, fmt="o", color=colour, capsize=3)
                right = at_price[0].entry.cost + 0.16 * len(at_price) + 0.1
                axes.annotate(
                    score_.entry.name,
                    (x, value),
                    xytext=(right, y),
                    va="center",
                    fontsize=9,
                    color=colour,
                    arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
                )
        axes.axhline(0, color=MUTED, linewidth=1)
        if contest.truth.ceiling < 1:
            axes.axhline(contest.truth.ceiling, color=MUTED, linestyle=":", linewidth=1.2, label="ceiling")
            axes.legend(loc="lower right")
        axes.set_xlim(-0.6, max(by_price) + 3)
        axes.set_ylim(lowest - 0.05, 1.08)
        axes.set_xlabel("price, forward passes a sample")
        axes.set_ylabel("rank correlation with the true updates, 95 % CI")
        axes.set_title(f"{contest.arena}: {contest.truth.name}")

    return draw


def _colour(name: str) -> str:
    """Forecasts of updates, what is distance over speed otherwise, MRD, and the others."""
    known = {"flip-time": BLUE, "joint-forecast": GREEN, "mrd": VERMILLION}
    known |= {"margin-over-drop": ORANGE, "distance-over-mrd": ORANGE}
    return known.get(name.partition(",")[0], MUTED)


EXPERIMENT = Experiment(
    "tournament",
    "A tournament of difficulty measures",
    "Which measure tells beforehand how many updates it takes until a sample is forgotten, and at what price?",
    "MRD is the measure of difficulty (Section 3); forecasts of updates are this suite's own.",
    run,
    on_model,
)
