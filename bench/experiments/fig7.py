"""Figure 7: does MRD order sentences, paragraphs and long texts as the difficulty of forgetting them does?

A text of a level is made of so many consecutive records of a task, or comes from a split that has such texts. Each text
is unlearned by itself until forgotten, and counts as forgotten below the averages over its level. The difficulty of a
text is mean |Δθ| when it is forgotten, as in Figures 3 and 4.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from scipy import stats

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.experiments.shared.single_samples import (
    COLOURS,
    CORRELATION,
    MARKERS,
    Relation,
    SingleSampleRun,
    claim_of,
    count_unusable,
    difficulties,
    left_out_sentences,
    relation_row,
    relations_of,
    run_table,
    single_sample_runs,
)
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.sweep_tables import as_table
from bench.models.find import ModelReference, find_model
from bench.report.figures import INK, Draw
from bench.report.verdicts import listed
from bench.report.words import decimal, interval, numbers_table, with_ci
from bench.stats.estimates import Estimate, mean
from bench.stats.verdicts import decide
from bench.tasks.datasets import DataName, load_dataset
from bench.tasks.joined import joined
from scoring.errors import UserError
from scoring.files import replacing
from scoring.records import Record
from scoring.samples import encode, evenly_spaced
from scoring.settings import Doc, Ge, check, named

IN_ORDER = "MRD orders texts by their difficulty at every level"


@dataclass(frozen=True, kw_only=True)
class Fig7Spec:
    """Which texts are made."""

    task: Annotated[DataName, Doc("whose records are joined")]
    levels: Annotated[
        dict[str, Annotated[int, Ge(1)] | str],
        Doc(
            "level -> how many records of the split are joined to a text of it, or the split of the task that has its "
            "texts; from the shortest on"
        ),
    ]
    count: Annotated[int, Ge(1), Doc("texts of each level, evenly spaced over the split")]
    split: Annotated[str | None, Doc("whose records are joined (default: the task's own)")] = None

    def checked(self) -> Self:
        """The same.

        Raises:
            UserError: a value that is not allowed, or no level.
        """
        check(self)
        if not self.levels:
            raise UserError(f"{named('levels')} is empty: expected level: number of records")
        return self


def run(setup: Setup) -> Answer:
    spec = setup.spec(Fig7Spec, "texts")
    sweep_spec = setup.spec(SweepSpec, "sweep")
    model = find_model(sweep_spec.base["model"])
    paths = {level: setup.work / f"texts-{made_of}.jsonl" for level, made_of in spec.levels.items()}
    records_of = {}
    # The texts of all levels first, so that one that does not fit is not noticed after an hour.
    with setup.section("texts"):
        for level, path in paths.items():
            texts, records_of[level] = _texts(spec, level, model.tokenizer)
            _write(path, texts, level, model)
    sweeps = {}
    for level, path in paths.items():
        base = sweep_spec.base | {"task": str(path.absolute())}
        key = f"sweep-{path.stem}"
        of_level = dataclasses.replace(setup, values={key: {**setup.values["sweep"], "base": base}})
        sweep = of_level.sweep(key)
        sweeps[level] = sweep.trials, sweep.samples
    return answer(sweeps, records_of, model.max_length, setup.margins(CORRELATION))


# --- Texts --------------------------------------------------------------------------------------------------


def _texts(spec: Fig7Spec, level: str, tokenizer: Any) -> tuple[list[Record], int]:
    """`count` texts of a level, and how many records each of them is made of.

    Raises:
        UserError: there are too few texts, or texts that cannot be joined.
    """
    made_of = spec.levels[level]
    if isinstance(made_of, str):
        dataset = load_dataset(spec.task, made_of, tokenizer)
        records, texts = int(dataset.records[0].get("records", 1)), joined(dataset.texts, 1)
    else:
        dataset = load_dataset(spec.task, spec.split, tokenizer)
        records, texts = made_of, joined(dataset.texts, made_of)
    if len(texts) < spec.count:
        raise UserError(
            f"{named('count')} is {spec.count}: {len(dataset.texts)} records of {dataset.name} give {len(texts)} texts "
            f"for {level!r}; lower it, or choose a larger split"
        )
    return evenly_spaced(texts, spec.count), records


def _write(path: Path, records: Sequence[Record], level: str, model: ModelReference) -> None:
    """Write the texts of a level to a data file.

    Raises:
        UserError: the model's context does not hold one of the texts.
    """
    with replacing(path) as unfinished:
        unfinished.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    _, rejected = encode(load_dataset(str(path)).texts, model.tokenizer, model.max_length)
    if rejected:
        text = rejected[0]
        raise UserError(f"{named('levels')}[{level!r}]: {text.sample_id!r} has {text.reason}; expected fewer records")


# --- The answer ---------------------------------------------------------------------------------------------


def answer(
    sweeps: Mapping[str, tuple[pa.Table, pa.Table]],
    levels: Mapping[str, int],
    context: int,
    margins: Mapping[str, float],
) -> Answer:
    """The answer from a sweep over single texts for each level.

    Args:
        sweeps: level -> trials and samples.
        levels: level -> how many records a text of it has.
        context: tokens that the model can read.
        margins: the weakest rank correlation that matters, by the name CORRELATION.
    """
    runs = [run for level, (trials, samples) in sweeps.items() for run in single_sample_runs(trials, samples, level)]
    lost = sum(count_unusable(trials) for trials, _ in sweeps.values())
    relations, together, initial = relations_of(runs, "change"), _all_levels(runs), _initial(runs, sweeps)
    decided = decide([claim_of(relation, IN_ORDER, margins[CORRELATION]) for relation in relations])
    sentences = [
        _headline(relations, levels),
        _before_any_update(runs, initial, context),
        _beyond_length(relations),
        *_all_levels_together(together),
        *left_out_sentences(runs, lost),
        f"The paper's claim, that {IN_ORDER}: {listed(decided)}.",
    ]
    return Answer(
        run_table(runs, "level"),
        [_rank_dots(level, relations, levels) for level in sweeps],
        sentences,
        decided,
        tables={
            "fig7-correlations": as_table([relation_row(relation, "level") for relation in (*relations, *together)]),
            "fig7-numbers": numbers_table(
                {
                    f"{what} of {level}, before any update": estimate
                    for level, estimates in initial.items()
                    for what, estimate in zip(("mean MRD", "memorization accuracy"), estimates, strict=True)
                }
            ),
        },
    )


def _count_records(count: int) -> str:
    return f"{count} record{'s' if count > 1 else ''}"


def _headline(relations: Sequence[Relation], levels: Mapping[str, int]) -> str:
    parts = "; ".join(
        f"{with_ci(relation.correlation)} for {relation.group} ({_count_records(levels[relation.group])}), "
        f"{relation.algorithm}, {len(relation.runs)} texts"
        for relation in relations
    )
    return (
        f"**Rank correlation of MRD with the difficulty of a text: {parts}**. The difficulty is mean |Δθ| when the "
        "text is forgotten; the paper expects clearly negative numbers: high MRD, easy to forget."
    )


def _before_any_update(
    runs: Sequence[SingleSampleRun], initial: Mapping[str, tuple[Estimate, Estimate]], context: int
) -> str:
    parts = [
        f"{level}: mean MRD {with_ci(mrd, 4)}, memorization accuracy {with_ci(accuracy)}"
        for level, (mrd, accuracy) in initial.items()
    ]
    longest = max((run.tokens for run in runs), default=0)
    return (
        f"Before any update, {'; '.join(parts)}. The longest text has {longest} scored tokens, of the {context} that "
        "the model's context holds. A model that has read the parts of a joined text, and not the text as such, need "
        "not know the whole as well."
    )


def _initial(
    runs: Sequence[SingleSampleRun], sweeps: Mapping[str, tuple[pa.Table, pa.Table]]
) -> dict[str, tuple[Estimate, Estimate]]:
    """Level -> mean MRD and mean memorization accuracy of its texts before any update."""
    means = {}
    for level, (_, samples) in sweeps.items():
        accuracy = dict(zip(samples["sample_id"].to_pylist(), samples["ma_initial"].to_pylist(), strict=True))
        mrd = {run.sample: run.mrd for run in runs if run.group == level}
        means[level] = _mean_of_samples(mrd), _mean_of_samples(accuracy)
    return means


def _mean_of_samples(values: Mapping[str, float]) -> Estimate:
    """The mean of the values by sample, so that several runs of a sample count once."""
    return mean(np.array(list(values.values()), dtype=float))


def _beyond_length(relations: Sequence[Relation]) -> str:
    parts = "; ".join(
        f"{with_ci(relation.beyond_length)} for {relation.group}, {relation.algorithm} (the length alone: "
        f"{with_ci(relation.with_length)})"
        for relation in relations
    )
    return f"With the number of tokens partialled out within a level: {parts}."


def _all_levels(runs: Sequence[SingleSampleRun]) -> list[Relation]:
    """Over the texts of all levels, for each algorithm: mostly the relation with their lengths."""
    algorithms = dict.fromkeys(run.algorithm for run in runs)
    return [Relation.of("all", name, [run for run in runs if run.algorithm == name], "change") for name in algorithms]


def _all_levels_together(relations: Sequence[Relation]) -> list[str]:
    parts = [
        f"{with_ci(relation.correlation)} with {relation.algorithm}, and {with_ci(relation.beyond_length)} with the "
        "number of tokens partialled out"
        for relation in relations
    ]
    return [f"All levels ranked together: {'; '.join(parts)}."] if parts else []


def _rank_dots(level: str, relations: Sequence[Relation], levels: Mapping[str, int]) -> Draw:
    """Rank by MRD against rank by difficulty; on the diagonal both are the same."""

    def draw(axes: Axes) -> None:
        of_level = [relation for relation in relations if relation.group == level]
        for relation, colour, marker in zip(of_level, cycle(COLOURS), cycle(MARKERS), strict=False):
            agreement = _with_sign_turned(relation.correlation)
            label = f"{relation.algorithm}: {decimal(agreement.value)} ({interval(agreement)})"
            axes.plot(
                stats.rankdata(difficulties(relation.runs, "change")),
                stats.rankdata([-run.mrd for run in relation.runs]),
                marker,
                color=colour,
                alpha=0.8,
                label=label,
            )
        count = max((len(relation.runs) for relation in of_level), default=1)
        axes.plot([1, count], [1, count], color=INK, linestyle="--", linewidth=1)
        ticks = np.unique(np.linspace(1, count, 5).round())
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        axes.set_xlim(0, count + 1)
        axes.set_ylim(0, (count + 1) * (1.1 + 0.08 * len(of_level)))
        axes.set_xlabel("rank by difficulty (high: hard)")
        axes.set_ylabel("rank by MRD (high: low MRD)")
        axes.set_title(f"{level}, {_count_records(levels[level])}")
        axes.legend(loc="upper left", title="agreement (95 % CI)", alignment="left")

    return draw


def _with_sign_turned(correlation: Estimate) -> Estimate:
    """The agreement of the two ranks: both are high where the text is hard, which is where MRD is low."""
    return Estimate(-correlation.value, -correlation.high, -correlation.low)


EXPERIMENT = Experiment(
    "fig7",
    "MRD at different text levels",
    "Does MRD order sentences, paragraphs and long texts as the difficulty of forgetting them does?",
    "MRD is stable across text lengths: the ranks by MRD and by unlearning difficulty largely agree for sentences, "
    "paragraphs and long texts (Figure 7).",
    run,
)
