"""Figure 5: does MRD predict how many updates it takes to forget a sample?

Samples are unlearned one at a time, all with the same settings, until the stop rule says that they are forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullFormatter, NullLocator

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.experiments.shared.single_samples import (
    COLOURS,
    CORRELATION,
    MARKERS,
    Relation,
    agreements_of,
    claim_of,
    count_unusable,
    left_out_sentences,
    relation_row,
    relations_of,
    run_table,
    single_sample_runs,
)
from bench.jobs.sweep_tables import as_table
from bench.report.figures import Draw
from bench.report.verdicts import by_claim
from bench.report.words import decimal, interval, interval_columns, with_ci
from bench.stats.estimates import Estimate, spearman
from bench.stats.verdicts import Claim, Verdict, bootstrapped, decide
from bench.tasks.datasets import short_name
from scoring.errors import UserError

FEWER = "the higher the MRD of a sample, the fewer updates it takes to forget it"
ALIKE = "different algorithms order samples alike"
Agreements = Mapping[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]


def run(setup: Setup) -> Answer:
    """Every section of the spec file with a base is a sweep; one that is alone on its task has the task's name."""
    sweeps = {
        key: setup.sweep(key) for key, values in setup.values.items() if isinstance(values, dict) and "base" in values
    }
    if not sweeps:
        raise UserError(f"{setup.names.start()}expected sections with base, vary and selections: sweeps over samples")
    tasks = {key: short_name(str(sweep.trials["task"][0].as_py())) for key, sweep in sweeps.items()}
    names = {key: task if list(tasks.values()).count(task) == 1 else f"{task}, {key}" for key, task in tasks.items()}
    return answer(
        {names[key]: (sweep.trials, sweep.samples) for key, sweep in sweeps.items()}, setup.margins(CORRELATION)
    )


def answer(sweeps: Mapping[str, tuple[pa.Table, pa.Table]], margins: Mapping[str, float]) -> Answer:
    """The answer from sweeps over single samples.

    Args:
        sweeps: name -> trials and samples.
        margins: the weakest rank correlation that matters, by the name CORRELATION.
    """
    runs = [run for name, (trials, samples) in sweeps.items() for run in single_sample_runs(trials, samples, name)]
    lost = sum(count_unusable(trials) for trials, _ in sweeps.values())
    relations, agreements = relations_of(runs, "updates"), agreements_of(runs, "updates")
    estimates = {pair: spearman(*difficulties) for pair, difficulties in agreements.items()}
    decided = decide(_claims(relations, agreements, margins[CORRELATION]))
    sentences = [
        _headline(relations),
        *(_of_task(name, relations, estimates) for name in sweeps),
        *left_out_sentences(runs, lost),
        _claim(decided),
    ]
    tables = {
        "fig5-correlations": as_table([relation_row(relation, "task") for relation in relations]),
        "fig5-agreement": as_table(
            [
                {"task": task, "first": first, "second": second, **interval_columns("spearman", correlation)}
                for (task, first, second), correlation in estimates.items()
            ]
        ),
    }
    panels = [_scatter(task, relations) for task in sweeps]
    inches = (6.0 * len(panels), 5.5)
    return Answer(run_table(runs, "task"), panels, sentences, decided, tables=tables, inches=inches)


def _claims(relations: Sequence[Relation], agreements: Agreements, margin: float) -> list[Claim]:
    """MRD and updates for the first algorithm of each task; the others enter by whether they order samples alike."""
    first = {relation.group: relation for relation in reversed(relations)}
    claims = [claim_of(first[group], FEWER, margin) for group in dict.fromkeys(each.group for each in relations)]
    return claims + [
        Claim(
            ALIKE,
            f"rank correlation of the updates, {task}, {one} and {other}",
            +1,
            margin,
            bootstrapped(spearman, *difficulties),
            len(difficulties[0]),
            "samples",
            "correlation",
        )
        for (task, one, other), difficulties in agreements.items()
    ]


def _headline(relations: Sequence[Relation]) -> str:
    parts = [
        f"{with_ci(relation.correlation)} for {relation.group}, {relation.algorithm} ({len(relation.runs)} samples)"
        for relation in relations
    ]
    return (
        f"**Rank correlation of MRD with the number of updates until a sample is forgotten: {'; '.join(parts)}**. The "
        "paper expects it to be clearly negative: high MRD, few updates. MRD sums over tokens, so length is a confound."
    )


def _of_task(task: str, relations: Sequence[Relation], agreements: Mapping[tuple[str, str, str], Estimate]) -> str:
    of_task = [relation for relation in relations if relation.group == task]
    updates = [run.updates for relation in of_task for run in relation.runs if run.forgotten]
    span = f"took {min(updates):g} to {max(updates):g} updates" if updates else "were never forgotten"
    beyond = "; ".join(
        f"{with_ci(relation.beyond_length)} with {relation.algorithm} "
        f"(the length alone: {with_ci(relation.with_length)})"
        for relation in of_task
    )
    order = [
        f" {first} and {second} order the samples alike with a rank correlation of {with_ci(correlation)}."
        for (group, first, second), correlation in agreements.items()
        if group == task
    ]
    return (
        f"Samples of {task} {span}. With the number of tokens partialled out, the rank correlation is {beyond}."
        f"{''.join(order)}"
    )


def _claim(decided: Sequence[Verdict]) -> str:
    return f"The paper's claims: {'. And '.join(by_claim(decided))}."


def _scatter(task: str, relations: Sequence[Relation]) -> Draw:
    """Updates against MRD; open marks are samples that were not forgotten at the cap."""

    def draw(axes: Axes) -> None:
        of_task = [relation for relation in relations if relation.group == task]
        for relation, colour, marker in zip(of_task, cycle(COLOURS), cycle(MARKERS), strict=False):
            label = f"{relation.algorithm}: {decimal(relation.correlation.value)} ({interval(relation.correlation)})"
            for forgotten in (True, False):
                shown = [run for run in relation.runs if run.forgotten == forgotten]
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
        _set_four_ticks(axes, [run.mrd for relation in of_task for run in relation.runs])
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.08 * (len(of_task) + 1) * (high - low))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("MRD (log scale)")
        axes.set_ylabel("updates until forgotten (open: more)")
        axes.set_title(f"{task}: one point a sample")
        axes.legend(loc="upper left", title="Spearman (95 % CI)", alignment="left")

    return draw


def _set_four_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Four labels, evenly spaced, for a logarithmic axis that may span less than a decade."""
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
