"""Runs until every sample is forgotten, with and without MRD."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from tqdm import tqdm

from algorithms.unlearner import Diverged
from bench.jobs.unlearn import UnlearnSpec, unlearn
from bench.speed.figures import as_json, from_json, with_interval
from bench.speed.unlearning.inputs import COMPARED, PAPER_TIME, Sizes
from bench.stats.estimates import LEVEL, Estimate, t_interval
from scoring.cluster import Footprint, connect, default_gpus, how_many_fit

ALPHAS = (0.0, 1.0, -1.0)
MEASURES = ("updates", "tokens", "updates_a_sample", "seconds", "paced_seconds")


def run_until_forgotten(spec: UnlearnSpec, sizes: Sizes, seeds: int) -> dict[str, Any]:
    """Runs of every algorithm, alpha and seed, their means, and what alpha changes, paired by seed."""
    connect()
    footprint = Footprint(1, default_gpus())
    # Runs that are compared stand next to each other, should the machine's load change.
    specs = [
        dataclasses.replace(
            spec,
            algorithm=name,
            alpha=alpha,
            seed=seed,
            epochs=sizes.epochs,
            check_every=sizes.check_every,
            check_unit="steps",
        )
        for seed in range(seeds)
        for name in COMPARED
        for alpha in ALPHAS
    ]
    at_a_time = min(how_many_fit(footprint, "worker"), len(specs))
    print(f"\nuntil all are forgotten, {sizes.epochs} epochs at most; {at_a_time} runs at a time, one core each")
    task = ray.remote(run_once).options(**footprint.ray_options(), max_retries=0)
    # Every worker process has imported and computed once before any run counts.
    ray.get([task.remote(dataclasses.replace(first, max_steps=1, epochs=None)) for first in specs[:at_a_time]])
    runs = [task.remote(run_spec) for run_spec in specs]
    # The last runs would have the machine to themselves: more runs take the places of those that end before.
    fillers = [task.remote(run_spec) for run_spec in specs[: at_a_time - 1]]
    rows = [ray.get(run) for run in tqdm(runs, desc="runs", unit="run")]
    for filler in fillers:
        ray.cancel(filler, force=True)
    add_paced_seconds(rows)

    print(
        f"{'':<9}{'alpha':>5}  {'updates':<19}{'updates a sample':<18}{'training + MRD, s':<22}{'at one pace, s':<22}"
        f"{'MRD, s':>7}{'checks, s':>11}  censored"
    )
    means = [_means(rows, name, alpha) for name in COMPARED for alpha in ALPHAS]
    changes = [change_by_alpha(rows, name, alpha) for name in COMPARED for alpha in ALPHAS if alpha]
    print(
        f"means over {seeds} seeds and {LEVEL:.0%} t intervals; looked at every {sizes.check_every} updates; "
        "at one pace: as if each token and each refresh had taken the median time of the algorithm's runs"
    )
    for change in changes:
        print(in_words(change))
    return {"runs_at_a_time": at_a_time, "runs": rows, "means": means, "changes": changes}


def run_once(spec: UnlearnSpec) -> dict[str, Any]:
    """A run until all samples are forgotten, or the epochs are over ("reached" is False), or it diverges (then there
    are no figures)."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {"algorithm": spec.algorithm, "alpha": spec.alpha, "seed": spec.seed}
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = unlearn(spec, Path(folder) / "run", progress=False)
        except Diverged as error:
            return row | {"reached": False, "diverged": str(error)}
        refreshes = len(pc.unique(pq.read_table(result.folder / "difficulty.parquet")["step"]))
    seconds = {name: result.record["seconds"].get(name, 0.0) for name in ("training", "mrd", "checks")}
    until_forgotten = result.samples["updates_until_forgotten"].to_pylist()
    updates = [count for count in until_forgotten if count is not None]
    return row | {
        "reached": len(updates) == len(until_forgotten),
        "forgotten": len(updates) / len(until_forgotten),
        "updates": result.record["updates"],
        "tokens": result.epochs["tokens"].to_pylist()[-1],
        "refreshes": refreshes,
        "updates_a_sample": float(np.median(updates)) if updates else None,
        "seconds": seconds["training"] + seconds["mrd"],
        **seconds,
    }


def add_paced_seconds(rows: Sequence[dict[str, Any]]) -> None:
    """Give each run "paced_seconds": its tokens and refreshes at the median time that each took over all runs of the
    algorithm. The load of the machine moves the seconds of a run, but not these."""
    for name in {row["algorithm"] for row in rows}:
        finished = [row for row in rows if row["algorithm"] == name and "tokens" in row]
        token = float(np.median([row["training"] / row["tokens"] for row in finished] or [0.0]))
        refresh = float(np.median([row["mrd"] / row["refreshes"] for row in finished if row["refreshes"]] or [0.0]))
        for row in finished:
            row["paced_seconds"] = row["tokens"] * token + row["refreshes"] * refresh


def _means(rows: Sequence[dict[str, Any]], name: str, alpha: float) -> dict[str, Any]:
    """The means of the runs in which all samples were forgotten."""
    runs = [row for row in rows if row["algorithm"] == name and row["alpha"] == alpha]
    reached = [row for row in runs if row["reached"]]
    means = {key: t_interval([row[key] for row in reached]) for key in (*MEASURES, "mrd", "checks")}
    print(
        f"{name:<9}{alpha:>5g}  {with_interval(means['updates'], '.1f'):<19}"
        f"{with_interval(means['updates_a_sample'], '.1f'):<18}{with_interval(means['seconds'], '.2f'):<22}"
        f"{with_interval(means['paced_seconds'], '.2f'):<22}{means['mrd'].value:>7.2f}{means['checks'].value:>11.1f}  "
        f"{len(runs) - len(reached)} of {len(runs)}"
    )
    return {
        "algorithm": name,
        "alpha": alpha,
        "runs": len(runs),
        "censored": len(runs) - len(reached),
        **{key: as_json(mean) for key, mean in means.items()},
    }


def change_by_alpha(rows: Sequence[dict[str, Any]], name: str, alpha: float) -> dict[str, Any]:
    """What alpha changes against uniform draws with the same seed. Pairs with a run that did not forget all samples are
    left out, and counted.

    Returns:
        For each measure "difference", the mean of the differences, and "ratio", that over the mean without MRD and
        plus 1; both with the interval of the differences.
    """
    runs = {(row["alpha"], row["seed"]): row for row in rows if row["algorithm"] == name}
    pairs = [(runs[0.0, seed], row) for (run_alpha, seed), row in runs.items() if run_alpha == alpha]
    complete = [(before, after) for before, after in pairs if before["reached"] and after["reached"]]
    change: dict[str, Any] = {
        "algorithm": name,
        "alpha": alpha,
        "pairs": len(complete),
        "left_out": len(pairs) - len(complete),
        "paper_time_ratio": PAPER_TIME[name] if alpha == 1 else None,
    }
    for key in MEASURES:
        before, after = (np.array([pair[side][key] for pair in complete], dtype=float) for side in (0, 1))
        difference = t_interval(after - before)
        change[key] = {"difference": as_json(difference), "ratio": as_json(_ratio(difference, before))}
    return change


def _ratio(difference: Estimate, before: np.ndarray) -> Estimate:
    base = float(before.mean()) if len(before) else math.nan
    return Estimate(*(1 + value / base for value in dataclasses.astuple(difference)))


def in_words(change: dict[str, Any]) -> str:
    """The result of `change_by_alpha` in a sentence or two."""
    text = f"{change['algorithm']}, alpha = {change['alpha']:g} against 0"
    if change["left_out"]:
        text += f" ({change['left_out']} of {change['pairs'] + change['left_out']} pairs left out: not all forgotten)"
    if not change["pairs"]:
        return f"{text}: nothing to compare"
    updates, seconds, paced = (from_json(change[key]["ratio"]) for key in ("updates", "seconds", "paced_seconds"))
    text += (
        f": updates x {with_interval(updates, '.2f')}, {_side(updates, 'fewer', 'more')}; time with MRD x "
        f"{with_interval(seconds, '.2f')}, {_side(seconds, 'less', 'more')}; at one pace x "
        f"{with_interval(paced, '.2f')}, {_side(paced, 'less', 'more')}"
    )
    if (paper := change["paper_time_ratio"]) is not None:
        inside = "inside" if paced.low <= paper <= paced.high else "outside"
        text += f". The paper's time is x {paper:.2f} (Table 10), {inside} the interval at one pace"
    return text


def _side(ratio: Estimate, below: str, above: str) -> str:
    """The word for the side of 1 on which the whole interval lies."""
    return below if ratio.high < 1 else above if ratio.low > 1 else "no difference shown"
