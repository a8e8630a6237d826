"""Table 9: what one round of an algorithm takes: an epoch over the forget set, without MRD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from bench.experiments.experiment import Answer, Experiment, Setting
from bench.experiments.shared import costs
from bench.experiments.shared.arms import plus_minus, together
from bench.experiments.shared.costs import COST, SECONDS, ForgetSet, Ratio, Spent
from bench.experiments.shared.verdicts import CONTRADICTED, HOLDS, UNKNOWN
from bench.files.status import FINISHED
from bench.jobs.sweep_tables import as_table
from bench.report.figures import BLUE, VERMILLION, Draw
from bench.stats.estimates import Estimate, over_seeds
from scoring.errors import UserError

# Seconds of the paper, in its order, which is the claim.
PAPER = {"GA": 100.0, "GradDiff": 123.0, "NPO": 128.0, "PO": 143.0}
FIRST = next(iter(PAPER))
# Epochs that are not counted where there are more: memory is touched for the first time.
WARM_UP = 1


def run(setting: Setting) -> Answer:
    found = costs.timed(setting)
    trials, epochs = (together([getattr(sweep, name) for sweep in found]) for name in ("trials", "epochs"))
    base = next(values["base"] for key, values in setting.values.items() if key.startswith("sweep"))
    return answer(trials, epochs, ForgetSet.of(base))


def answer(trials: pa.Table, epochs: pa.Table, forget: ForgetSet) -> Answer:
    """From trials of algorithms and seeds that draw uniformly, each of the same number of epochs.

    Args:
        epochs: one row an epoch of a trial; row 0 is the initial model.
    """
    found = rounds(trials, epochs, forget)
    order = [name for name in PAPER if any(each.algorithm == name for each in found)]
    if len(order) < 2:
        raise UserError(
            f"rounds of {', '.join(order) or 'no algorithm'}: expected two of {', '.join(PAPER)} to compare"
        )
    to_first = {
        measure: compared(found, measure, [(name, order[0]) for name in order[1:]]) for measure in (COST, SECONDS)
    }
    steps = {measure: compared(found, measure, [(b, a) for a, b in pairwise(order)]) for measure in (COST, SECONDS)}
    passes = passes_of(trials, epochs)
    sentences = [
        _markdown(found, order, passes, to_first),
        _ratios(steps, "Each algorithm over the one that the paper has before it, paired by seed"),
        _claim(steps, order),
    ]
    panels: list[Draw] = [
        _measured(found, order, COST, "cost of a round, forwards of the forget set"),
        _measured(found, order, SECONDS, "seconds of a round"),
    ]
    return Answer(as_table(_rows(found, order, passes, to_first)), panels, sentences, inches=(12.0, 4.2))


def rounds(trials: pa.Table, epochs: pa.Table, forget: ForgetSet) -> list[Spent]:
    """Means over the epochs of each trial, but those of the warm-up."""
    return [
        costs.Spent(
            trial["algorithm"],
            "uniform",
            trial["seed"],
            change["tokens"] * (1 + costs.BACKWARD) / forget.tokens,
            0.0,
            change["seconds_training"],
            0.0,
            change["step"],
        )
        for trial, change in _changes(trials, epochs)
    ]


def passes_of(trials: pa.Table, epochs: pa.Table) -> dict[str, tuple[float, float, float]]:
    """Algorithm -> forwards and backwards over micro-batches, and tokens, of a round; means over seeds."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for trial, change in _changes(trials, epochs):
        own = tuple(change[name] for name in ("forwards_training", "backwards_training", "tokens"))
        found.setdefault(trial["algorithm"], []).append(own)
    return {name: tuple(np.mean(own, axis=0).tolist()) for name, own in found.items()}  # type: ignore[misc]


def _changes(trials: pa.Table, epochs: pa.Table) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Finished trials, each with what an epoch adds to what is counted up, on average."""
    by_trial: dict[str, list[dict[str, Any]]] = {}
    for row in epochs.to_pylist():
        by_trial.setdefault(row["trial"], []).append(row)
    found = []
    for trial in trials.to_pylist():
        if trial["status"] == FINISHED:
            own = sorted(by_trial[trial["trial"]], key=lambda row: row["epoch"])
            start, end = own[min(WARM_UP, len(own) - 2)], own[-1]
            count = end["epoch"] - start["epoch"]
            names = ("tokens", "seconds_training", "forwards_training", "backwards_training", "step")
            found.append((trial, {name: (end[name] - start[name]) / count for name in names}))
    return found


def compared(found: Sequence[Spent], measure: str, pairs: Sequence[tuple[str, str]]) -> list[Ratio]:
    """What the first of each pair takes over the second, by seed."""
    by_seed = {(each.algorithm, each.seed): each.of(measure) for each in found}
    seeds = sorted({each.seed for each in found})
    return costs.ratios(
        measure,
        {
            f"{more} / {less}": [
                (by_seed[more, seed], by_seed[less, seed])
                for seed in seeds
                if (more, seed) in by_seed and (less, seed) in by_seed
            ]
            for more, less in pairs
        },
    )


def cost_verdict(steps: Sequence[Ratio]) -> str:
    """Whether each algorithm takes more than the one before it."""
    exact = [ratio for ratio in steps if ratio.value.low == ratio.value.high == 1]
    if exact or any(ratio.sign < 0 for ratio in steps):
        return CONTRADICTED
    return HOLDS if all(ratio.sign > 0 for ratio in steps) else UNKNOWN


# --- Words, rows, pictures ----------------------------------------------------------------------------------


def _of(found: Sequence[Spent], algorithm: str, measure: str) -> list[float]:
    return [each.of(measure) for each in found if each.algorithm == algorithm]


def _markdown(
    found: Sequence[Spent],
    order: Sequence[str],
    passes: Mapping[str, tuple[float, float, float]],
    to_first: Mapping[str, Sequence[Ratio]],
) -> str:
    head = (
        "| algorithm | forwards | backwards | tokens | cost | seconds | "
        f"cost / {order[0]} | seconds / {order[0]} | paper |"
    )
    lines = [head, "|---" * 9 + "|"]
    for number, name in enumerate(order):
        forwards, backwards, tokens = passes[name]
        over = [costs.times(to_first[measure][number - 1].value) if number else "1" for measure in (COST, SECONDS)]
        lines.append(
            f"| {name} | {forwards:g} | {backwards:g} | {tokens:.0f} | {plus_minus(_of(found, name, COST), 2)} | "
            f"{plus_minus(_of(found, name, SECONDS))} | {over[0]} | {over[1]} | {PAPER[name] / PAPER[order[0]]:.2f} |"
        )
    seeds = len({each.seed for each in found})
    return (
        f"One round, means over {seeds} seeds ± half the 95 % t interval; forwards and backwards are over "
        f"micro-batches, cost is in forwards of the forget set, a backward counting {costs.BACKWARD}:\n\n"
        + "\n".join(lines)
    )


def _ratios(steps: Mapping[str, Sequence[Ratio]], what: str) -> str:
    parts = [f"{measure}: {', '.join(ratio.text() for ratio in own)}" for measure, own in steps.items()]
    return f"{what}; {'; '.join(parts)}."


def _claim(steps: Mapping[str, Sequence[Ratio]], order: Sequence[str]) -> str:
    by_cost, by_seconds = (cost_verdict(steps[measure]) for measure in (COST, SECONDS))
    against = [ratio.text() for ratio in steps[COST] if ratio.sign < 0 or ratio.value.low == ratio.value.high == 1]
    why = f" ({', '.join(against)})" if against else ""
    reference = (
        " NPO's initial model is asked once before the first round, and not in every update."
        if by_cost == CONTRADICTED and "NPO" in order
        else ""
    )
    return (
        f"**The paper's claim, that a round takes longer in the order {' < '.join(order)}, {by_cost} here by what goes "
        f"through the model**{why}; by the clock it {by_seconds}.{reference}"
    )


def _rows(
    found: Sequence[Spent],
    order: Sequence[str],
    passes: Mapping[str, tuple[float, float, float]],
    to_first: Mapping[str, Sequence[Ratio]],
) -> list[dict[str, Any]]:
    one = Estimate(1.0, 1.0, 1.0)
    rows = []
    for number, name in enumerate(order):
        row: dict[str, Any] = {"algorithm": name, "seeds": len(_of(found, name, COST))}
        row |= dict(zip(("forwards", "backwards", "tokens"), passes[name], strict=True))
        for measure in (COST, SECONDS):
            mean = over_seeds(_of(found, name, measure))
            ratio = to_first[measure][number - 1].value if number else one
            row |= {measure: mean.value, f"{measure}_low": mean.low, f"{measure}_high": mean.high}
            row |= {
                f"{measure}_ratio": ratio.value,
                f"{measure}_ratio_low": ratio.low,
                f"{measure}_ratio_high": ratio.high,
            }
        rows.append(row | {"paper_seconds": PAPER[name]})
    return rows


def _measured(found: Sequence[Spent], order: Sequence[str], measure: str, title: str) -> Draw:
    """Of every algorithm, mean and 95 % interval; the paper's seconds, scaled to the first, beside it."""

    def draw(axes: Axes) -> None:
        means = [over_seeds(_of(found, name, measure)) for name in order]
        y = -np.arange(len(order), dtype=float)
        axes.errorbar(
            [mean.value for mean in means],
            y,
            xerr=costs.bars(means),
            fmt="o",
            color=BLUE,
            capsize=4,
            markersize=7,
            label="here, 95 % CI",
        )
        scale = means[0].value / PAPER[order[0]]
        paper = [PAPER[name] * scale for name in order]
        axes.plot(paper, y, "x", color=VERMILLION, markersize=8, label=f"paper, scaled to {order[0]}")
        axes.set_yticks(y, order)
        axes.set_xlim(left=0)
        axes.set_ylim(-len(order) + 0.4, 0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(title)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.1)

    return draw


EXPERIMENT = Experiment(
    "table9",
    "what a round takes",
    "What does one round of an algorithm take, in passes through the model and in seconds?",
    "a round of GA takes 1m40s, of GradDiff 2m03s, of NPO 2m08s, of PO 2m23s (Table 9).",
    run,
)
