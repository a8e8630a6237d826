"""Figure 7: does MRD order sentences, paragraphs and long texts as the difficulty of forgetting them does?

Texts of a level are so many consecutive records of a task, joined. Each is unlearned by itself until forgotten, and
what counts as forgotten is decided by the averages over its own level. The difficulty of a text is mean |Δθ| when it is
forgotten, as in Figures 3 and 4.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from scipy import stats

from bench.experiments.experiment import Answer, Experiment, Setting
from bench.experiments.shared.single_samples import (
    COLOURS,
    MARKERS,
    Relation,
    SingleSampleRun,
    difficulty,
    left_out,
    relation_row,
    relations,
    run_table,
    runs,
    unusable,
)
from bench.experiments.shared.verdicts import ruled, ruling
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.sweep_tables import as_table
from bench.models.find import ModelReference, find_model
from bench.report.figures import INK, Draw
from bench.report.words import decimal, interval, with_ci
from bench.stats.estimates import mean, partial_spearman, spearman
from bench.tasks.datasets import load_dataset
from scoring.errors import UserError
from scoring.files import replacing
from scoring.records import Record
from scoring.samples import Text, encode, evenly_spaced


@dataclass(frozen=True, kw_only=True)
class Fig7Spec:
    """Which texts are made.

    Attributes:
        task, split: of the records that are joined.
        levels: level -> how many records a text of it has, from the shortest on.
        count: texts of each level, evenly spaced over the split.
    """

    task: str
    levels: dict[str, int]
    count: int
    split: str | None = None

    def checked(self) -> Fig7Spec:
        """The same.

        Raises:
            UserError: no level, or a number below 1.
        """
        if not self.levels:
            raise UserError("texts: levels is empty: expected level: number of records")
        for name, value in (*self.levels.items(), ("count", self.count)):
            if value < 1:
                raise UserError(f"texts: {name} is {value}: expected 1 or more")
        return self


def run(setting: Setting) -> Answer:
    spec = setting.spec(Fig7Spec, "texts").checked()
    sweep = setting.spec(SweepSpec, "sweep")
    model = find_model(sweep.base["model"])
    texts = load_dataset(spec.task, spec.split, model.tokenizer).texts
    paths = {level: setting.work / f"texts-{records}.jsonl" for level, records in spec.levels.items()}
    # All of them first: a text that does not fit is not found after an hour.
    for level, records in spec.levels.items():
        _write(paths[level], joined(texts, records, spec.count), level, model)
    measured = {}
    for level, path in paths.items():
        base = sweep.base | {"task": str(path.absolute())}
        key = f"sweep-{path.stem}"
        own = dataclasses.replace(setting, values={key: {**setting.values["sweep"], "base": base}})
        result = own.sweep(key)
        measured[level] = result.trials, result.samples
    return answer(measured, spec.levels, model.max_length)


# --- Texts --------------------------------------------------------------------------------------------------


def joined(texts: Sequence[Text], records: int, count: int) -> list[Record]:
    """`count` texts of `records` consecutive texts each, none of which shares one with another.

    The first prompt is what is conditioned on, and all that follows is scored: one record alone is what it was. Plain
    texts are joined to a plain text.

    Raises:
        UserError: there are too few texts, or chats among them.
    """
    whole = [texts[start : start + records] for start in range(0, len(texts) - records + 1, records)]
    if len(whole) < count:
        raise UserError(
            f"texts: count is {count}: {len(texts)} records give {len(whole)} texts of {records}; lower it, or choose "
            "a larger split"
        )
    return [_join(group) for group in evenly_spaced(whole, count)]


def _join(group: Sequence[Text]) -> Record:
    first = group[0]
    name = first.sample_id if len(group) == 1 else f"{first.sample_id}+{len(group) - 1}"
    if any(text.messages is not None for text in group):
        raise UserError(f"texts: {first.sample_id!r} is a chat: expected prompts with completions, or plain texts")
    if first.completion is None:
        return {"id": name, "text": " ".join(text.prompt for text in group)}
    rest = "".join(f"\n{text.prompt}{text.completion or ''}" for text in group[1:])
    return {"id": name, "prompt": first.prompt, "completion": first.completion + rest}


def _write(path: Path, records: Sequence[Record], level: str, model: ModelReference) -> None:
    """A data file.

    Raises:
        UserError: the model's context does not hold one of the texts.
    """
    with replacing(path) as unfinished:
        unfinished.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    _, rejected = encode(load_dataset(str(path)).texts, model.tokenizer, model.max_length)
    if rejected:
        raise UserError(
            f"texts: {level}, {rejected[0].sample_id!r}: {rejected[0].reason}; expected a level of fewer records"
        )


# --- The answer ---------------------------------------------------------------------------------------------


def answer(measured: Mapping[str, tuple[pa.Table, pa.Table]], levels: Mapping[str, int], context: int) -> Answer:
    """From the trials and samples of a sweep over single texts for each level.

    Args:
        measured: by level.
        levels: how many records its texts have.
        context: tokens that the model can read.
    """
    found = [run for level, (trials, samples) in measured.items() for run in runs(trials, samples, level)]
    lost = sum(unusable(trials) for trials, _ in measured.values())
    related = relations(found, "change")
    sentences = [
        _headline(related, levels),
        _sizes(found, measured, context),
        _length(related),
        *_pooled(found),
        *left_out(found, lost),
        _claim(related),
    ]
    return Answer(
        run_table(found, "level"),
        [_ranks(level, related, levels) for level in measured],
        sentences,
        tables={"fig7-correlations": as_table([relation_row(each, "level") for each in related])},
    )


def _named(each: Relation, levels: Mapping[str, int]) -> str:
    records = levels[each.group]
    return f"{each.group} ({records} record{'s' if records > 1 else ''}), {each.algorithm}"


def _headline(related: Sequence[Relation], levels: Mapping[str, int]) -> str:
    parts = "; ".join(
        f"{with_ci(each.correlation)} for {_named(each, levels)}, {len(each.runs)} texts" for each in related
    )
    return (
        f"**Rank correlation of MRD with the difficulty of a text: {parts}**. The difficulty is mean |Δθ| when the "
        "text is forgotten; the paper expects clearly negative numbers: high MRD, easy to forget."
    )


def _sizes(found: Sequence[SingleSampleRun], measured: Mapping[str, tuple[pa.Table, pa.Table]], context: int) -> str:
    parts = []
    for level, (_, samples) in measured.items():
        known = dict(zip(samples["sample_id"].to_pylist(), samples["ma_initial"].to_pylist(), strict=True))
        mrd = {run.sample: run.mrd for run in found if run.group == level}
        parts.append(
            f"{level}: mean MRD {with_ci(mean(np.array(list(mrd.values()))), 4)}, memorization accuracy "
            f"{with_ci(mean(np.array(list(known.values()), dtype=float)))}"
        )
    longest = max((run.tokens for run in found), default=0)
    return (
        f"Before any update, {'; '.join(parts)}. The longest text has {longest} scored tokens, of the {context} that "
        "the model's context holds. Joined texts were not trained on as such: a model that knows their parts need not "
        "know the whole as well."
    )


def _length(related: Sequence[Relation]) -> str:
    parts = "; ".join(
        f"{with_ci(each.beyond_length)} for {each.group}, {each.algorithm} (the length alone: "
        f"{with_ci(each.with_length)})"
        for each in related
    )
    return f"With the number of tokens partialled out within a level: {parts}."


def _pooled(found: Sequence[SingleSampleRun]) -> list[str]:
    """What ranking all levels together gives, for each algorithm: mostly a ranking by length."""
    parts = []
    for algorithm in dict.fromkeys(run.algorithm for run in found):
        own = [run for run in found if run.algorithm == algorithm and not run.below]
        mrd, tokens = np.array([run.mrd for run in own]), np.array([float(run.tokens) for run in own])
        hard = difficulty(own, "change")
        parts.append(
            f"{with_ci(spearman(mrd, hard))} with {algorithm}, and {with_ci(partial_spearman(mrd, hard, tokens))} "
            "with the "
            "number of tokens partialled out"
        )
    return [f"All levels ranked together: {'; '.join(parts)}."] if parts else []


def _claim(related: Sequence[Relation]) -> str:
    several = len({each.algorithm for each in related}) > 1
    names = [f"{each.group} with {each.algorithm}" if several else each.group for each in related]
    plain = ruled({name: ruling(each.correlation, -1) for name, each in zip(names, related, strict=True)})
    beyond = ruled({name: ruling(each.beyond_length, -1) for name, each in zip(names, related, strict=True)})
    return (
        f"The paper's claim: MRD orders texts by their difficulty at every level: {plain} (beyond what length "
        f"explains: {beyond})."
    )


def _ranks(level: str, related: Sequence[Relation], levels: Mapping[str, int]) -> Draw:
    """Rank by MRD against rank by difficulty; on the diagonal both are the same."""

    def draw(axes: Axes) -> None:
        own = [each for each in related if each.group == level]
        for each, colour, marker in zip(own, cycle(COLOURS), cycle(MARKERS), strict=False):
            label = f"{each.algorithm}: {decimal(-each.correlation.value)} ({_turned(each)})"
            axes.plot(
                stats.rankdata(difficulty(each.runs, "change")),
                stats.rankdata([-run.mrd for run in each.runs]),
                marker,
                color=colour,
                alpha=0.8,
                label=label,
            )
        count = max((len(each.runs) for each in own), default=1)
        axes.plot([1, count], [1, count], color=INK, linestyle="--", linewidth=1)
        ticks = np.unique(np.linspace(1, count, 5).round())
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        axes.set_xlim(0, count + 1)
        axes.set_ylim(0, (count + 1) * (1.1 + 0.08 * len(own)))
        axes.set_xlabel("rank by difficulty (high: hard)")
        axes.set_ylabel("rank by MRD (high: low MRD)")
        axes.set_title(f"{level}, {levels[level]} record{'s' if levels[level] > 1 else ''}")
        axes.legend(loc="upper left", title="agreement (95 % CI)", alignment="left")

    return draw


def _turned(each: Relation) -> str:
    """The interval of the agreement of the two ranks: that of the correlation with its sign turned."""
    found = each.correlation
    return interval(dataclasses.replace(found, value=-found.value, low=-found.high, high=-found.low))


EXPERIMENT = Experiment(
    "fig7",
    "MRD at different text levels",
    "Does MRD order sentences, paragraphs and long texts as the difficulty of forgetting them does?",
    "MRD is stable across text lengths: the ranks by MRD and by unlearning difficulty largely agree for sentences, "
    "paragraphs and long texts (Figure 7).",
    run,
)
