"""Figure 5: does MRD predict how many updates it takes to forget a sample?

Samples are unlearned one at a time, all with the same settings, until the stop rule says that they are forgotten. What
is said here about runs of single samples and about verdicts serves figures 3, 4 and 7 too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullFormatter, NullLocator

from bench.experiments.experiment import Answer, Experiment, Setting
from bench.experiments.shared.single_samples import (
    COLOURS,
    MARKERS,
    Relation,
    agreements,
    estimated,
    left_out,
    relation_row,
    relations,
    run_table,
    runs,
    unusable,
)
from bench.experiments.shared.verdicts import WEAK, ruled, ruling
from bench.jobs.sweep_tables import as_table
from bench.report.figures import Draw
from bench.report.words import decimal, interval, with_ci
from bench.stats.estimates import Estimate
from scoring.errors import UserError

TASKS = ("tofu", "wmdp")  # sweeps that a preset may describe: of these tasks, or of their stand-ins


# --- Verdicts -----------------------------------------------------------------------------------------------


# --- Runs ---------------------------------------------------------------------------------------------------


# --- The answer ---------------------------------------------------------------------------------------------


def run(setting: Setting) -> Answer:
    measured = {}
    for key in TASKS:
        if key in setting.values:
            result = setting.sweep(key)
            measured[result.trials["task"][0].as_py()] = result.trials, result.samples
    if not measured:
        raise UserError(f"{setting.names.start()}expected a sweep under {' or '.join(TASKS)}")
    return answer(measured)


def answer(measured: Mapping[str, tuple[pa.Table, pa.Table]]) -> Answer:
    """From task -> the trials and the samples of a sweep over single samples."""
    found = [run for task, (trials, samples) in measured.items() for run in runs(trials, samples, task)]
    lost = sum(unusable(trials) for trials, _ in measured.values())
    related, agreed = relations(found, "updates"), agreements(found, "updates")
    sentences = [
        _headline(related),
        *(_by_task(task, related, agreed) for task in measured),
        *left_out(found, lost),
        _claim(related, agreed),
    ]
    tables = {
        "fig5-correlations": as_table([relation_row(each, "task") for each in related]),
        "fig5-agreement": as_table(
            [
                {"task": task, "first": first, "second": second, **estimated("spearman", each)}
                for (task, first, second), each in agreed.items()
            ]
        ),
    }
    panels = [_scatter(task, related) for task in measured]
    return Answer(run_table(found, "task"), panels, sentences, tables=tables, inches=(6.0 * len(panels), 5.5))


def _headline(related: Sequence[Relation]) -> str:
    parts = [
        f"{with_ci(each.correlation)} for {each.group}, {each.algorithm} ({len(each.runs)} samples)" for each in related
    ]
    return (
        f"**Rank correlation of MRD with the number of updates until a sample is forgotten: {'; '.join(parts)}**. The "
        "paper expects it to be clearly negative: high MRD, few updates. MRD sums over tokens, so length is a confound."
    )


def _by_task(task: str, related: Sequence[Relation], agreed: Mapping[tuple[str, str, str], Estimate]) -> str:
    own = [each for each in related if each.group == task]
    needed = [run.updates for each in own for run in each.runs if run.forgotten]
    span = f"took {min(needed):g} to {max(needed):g} updates" if needed else "were never forgotten"
    beyond = "; ".join(
        f"{with_ci(each.beyond_length)} with {each.algorithm} (the length alone: {with_ci(each.with_length)})"
        for each in own
    )
    order = [
        f" {first} and {second} order the samples alike with a rank correlation of {with_ci(each)}."
        for (group, first, second), each in agreed.items()
        if group == task
    ]
    return (
        f"Samples of {task} {span}. With the number of tokens partialled out, the rank correlation is {beyond}."
        f"{''.join(order)}"
    )


def _claim(related: Sequence[Relation], agreed: Mapping[tuple[str, str, str], Estimate]) -> str:
    first = ruled({f"{each.group} with {each.algorithm}": ruling(each.correlation, -1) for each in related})
    beyond = ruled({f"{each.group} with {each.algorithm}": ruling(each.beyond_length, -1) for each in related})
    text = (
        f"The paper's claim: the higher the MRD, the fewer updates: {first} (beyond what length explains: {beyond}). "
        f"It counts as contradicted where even the end of the interval is weaker than {decimal(-WEAK, 1)}."
    )
    if agreed:
        order = ruled({f"{task}, {one} and {other}": ruling(each, +1) for (task, one, other), each in agreed.items()})
        text += f" That difficulty is the sample's own, the same order under different algorithms: {order}."
    return text


def _scatter(task: str, related: Sequence[Relation]) -> Draw:
    """Updates against MRD; open marks on top are samples that were not forgotten at the cap."""

    def draw(axes: Axes) -> None:
        own = [each for each in related if each.group == task]
        for each, colour, marker in zip(own, cycle(COLOURS), cycle(MARKERS), strict=False):
            label = f"{each.algorithm}: {decimal(each.correlation.value)} ({interval(each.correlation)})"
            for forgotten in (True, False):
                shown = [run for run in each.runs if run.forgotten == forgotten]
                axes.plot(
                    [run.mrd for run in shown],
                    [run.updates for run in shown],
                    marker,
                    color=colour,
                    markerfacecolor=colour if forgotten else "none",
                    alpha=0.75,
                    label=label if forgotten else None,
                )
        axes.set_xscale("log")
        _plain_ticks(axes, [run.mrd for each in own for run in each.runs])
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.08 * (len(own) + 1) * (high - low))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("MRD (log scale)")
        axes.set_ylabel("updates until forgotten (open: more)")
        axes.set_title(f"{task}: one point a sample")
        axes.legend(loc="upper left", title="Spearman (95 % CI)", alignment="left")

    return draw


def _plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Of a logarithmic axis that may span less than a decade: four labels, evenly spaced."""
    places: list[float] = np.geomspace(min(values), max(values), 4).tolist() if values else []
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{place:.2g}" for place in places]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


EXPERIMENT = Experiment(
    "fig5",
    "MRD and the number of updates",
    "Does the MRD of a sample predict how many updates it takes to forget it?",
    "as MRD increases, the number of updates that unlearning a sample takes decreases, and different algorithms order "
    "samples alike (Figure 5).",
    run,
)
