"""Table 4: what MRD-weighted sampling changes from epoch to epoch; trials of Table 1, measured after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bench.experiments.experiment import Answer, Experiment, Setting
from bench.experiments.shared import weighted_tables
from bench.experiments.shared.arms import EASY_FIRST, MARKERS, UNIFORM, Columns, Outcome, arm_of_alpha, label, method
from bench.files.status import FINISHED
from bench.jobs.sweep_tables import as_table
from bench.report.figures import BLUE, GREEN, MUTED, ORANGE, VERMILLION, Draw
from bench.stats.estimates import Estimate, over_seeds
from scoring.errors import UserError

COLOURS = (VERMILLION, BLUE, GREEN, ORANGE)


def run(setting: Setting) -> Answer:
    found = weighted_tables.sweeps(setting)
    trials, epochs = (
        weighted_tables.together([getattr(sweep, name) for sweep in found]) for name in ("trials", "epochs")
    )
    return answer(trials, epochs, Columns.of(trials["task"][0].as_py(), trials), weighted_tables.original_of(found[0]))


def answer(trials: pa.Table, epochs: pa.Table, columns: Columns, original: Mapping[str, Any]) -> Answer:
    """From trials over algorithms, alphas and seeds whose metrics were measured after every epoch.

    Args:
        epochs: one row an epoch of a trial; row 0 is the initial model.
        original: metric -> value of the model before it forgets.
    """
    found, lost = weighted_tables.outcomes(trials, columns.all)
    by_epoch = at_epochs(trials, epochs, columns.all)
    # A run as a whole: what it is worth at the epochs that it goes through, on average.
    paths = path_means(by_epoch, columns.all)
    single, average = (
        weighted_tables.contrasts(paths, columns.judged, EASY_FIRST, UNIFORM, each) for each in (False, True)
    )
    if not single:
        raise UserError("no algorithm has finished trials with alpha 0 and with alpha 1 and the same seed")
    first = by_epoch[min(by_epoch)]
    early = weighted_tables.contrasts(first, columns.judged, EASY_FIRST, UNIFORM)
    seeds = len({outcome.seed for outcome in found})
    rows = {
        f"{method(algorithm, arm)}, epoch {epoch}": [
            weighted_tables.values_of(own, algorithm, arm, name) for name in columns.all
        ]
        for algorithm, arm in weighted_tables.methods(found)
        for epoch, own in by_epoch.items()
        if any(outcome.algorithm == algorithm for outcome in own)
    }
    sentences = [
        weighted_tables.markdown_table(rows, columns, original, seeds),
        f"Mean over epochs 1 to {max(by_epoch)}. {weighted_tables.by_algorithm(single, columns)}",
        f"After epoch {min(by_epoch)} alone. {weighted_tables.by_algorithm(early, columns)}",
    ]
    if lost:
        sentences.append(lost)
    sentences.append(
        weighted_tables.claim(
            single, average, columns, "at the same epoch runs that draw by MRD have forgotten more and kept more"
        )
    )
    table = as_table(
        [
            {"epoch": epoch, **row}
            for epoch, own in by_epoch.items()
            for row in weighted_tables.rows_of(own, columns, original)
            if row["method"] != "Original"
        ]
    )
    panels = [_lines(by_epoch, metric, original) for metric in columns.judged]
    return Answer(table, panels, sentences, inches=(6.0 * len(panels), 5.0))


def at_epochs(trials: pa.Table, epochs: pa.Table, metrics: Sequence[str]) -> dict[int, list[Outcome]]:
    """Epoch, from 1 on -> what the trials that finished had reached then.

    Raises:
        UserError: the metrics were not measured after every epoch.
    """
    known = {row["trial"]: row for row in trials.to_pylist()}
    found: dict[int, list[Outcome]] = {}
    for row in epochs.to_pylist():
        values = {name: row[name] for name in metrics if row.get(name) is not None}
        trial = known[row["trial"]]
        if row["epoch"] and values and trial["status"] == FINISHED:
            outcome = Outcome(trial["algorithm"], arm_of_alpha(trial), trial["seed"], values)
            found.setdefault(row["epoch"], []).append(outcome)
    if not found:
        raise UserError("no metric of the task was measured after the epochs: expected each_epoch: true in the sweep")
    return dict(sorted(found.items()))


def path_means(by_epoch: Mapping[int, Sequence[Outcome]], metrics: Sequence[str]) -> list[Outcome]:
    """Every run with its means over the epochs."""
    runs: dict[tuple[str, str, int], list[Mapping[str, float]]] = {}
    for own in by_epoch.values():
        for outcome in own:
            runs.setdefault((outcome.algorithm, outcome.arm, outcome.seed), []).append(outcome.values)
    return [
        Outcome(
            *run,
            {name: float(np.mean([v[name] for v in values])) for name in metrics if all(name in v for v in values)},
        )
        for run, values in runs.items()
    ]


def _lines(by_epoch: Mapping[int, Sequence[Outcome]], metric: str, original: Mapping[str, Any]) -> Draw:
    """A metric by epoch: a colour for each algorithm, dashed where it draws uniformly; 95 % intervals over seeds."""

    def draw(axes: Axes) -> None:
        order = weighted_tables.methods([outcome for own in by_epoch.values() for outcome in own])
        colours = dict(zip(dict.fromkeys(algorithm for algorithm, _ in order), cycle(COLOURS), strict=False))
        for number, (algorithm, arm) in enumerate(order):
            means: dict[int, Estimate] = {}
            for epoch, own in by_epoch.items():
                if values := weighted_tables.values_of(own, algorithm, arm, metric):
                    means[epoch] = over_seeds(values)
            # Side by side, so that intervals can be told apart.
            x = np.array(list(means)) + 0.05 * (number - (len(order) - 1) / 2)
            axes.errorbar(
                x,
                [mean.value for mean in means.values()],
                weighted_tables.bars(list(means.values())),
                color=colours[algorithm],
                linestyle="--" if arm == UNIFORM else "-",
                marker=MARKERS.get(arm, "D"),
                markerfacecolor="none" if arm == UNIFORM else colours[algorithm],
                capsize=3,
                label=method(algorithm, arm),
            )
        if metric in original:
            axes.plot(0, original[metric], "D", color=MUTED, label="original")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epochs")
        axes.set_ylabel(f"{label(metric)}, 95 % CI")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, borderaxespad=0.1)

    return draw


EXPERIMENT = Experiment(
    "table4",
    "weighted sampling by epoch, TOFU",
    "Do runs that draw by MRD get there faster: is more forgotten, and more kept, at the same epoch?",
    "at every epoch CGA is ahead of SGA and NPO + MRD of NPO in completeness and in utility (Table 4; its averages of "
    "SGA at epoch 3, .5217, and its MIA of NPO at epoch 4, .913, do not agree with the rest: .5192, .9913).",
    run,
)
