"""`mrd-bench benchmark volume`: what many samples, many trials and many runs take, and how it grows.

scoring  `mrd-bench score` of a data file under a model of next to no weights, by replicas: seconds, and the largest
         memory of the driver, the process that the user has started
sweep    what a sweep does beside its trials, whose results are made: planning them, writing the tables, a look at it,
         and putting it into a store
store    `results list` and `leaderboard` of a store of made runs, each the whole command: seconds and memory

Growth is the ratio of two times over that of the two sizes: 1 is in proportion, and 2 for a size ten times as large
twice as much as that.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.files.status import FINISHED
from bench.jobs.resources import SweepResources
from bench.jobs.sweep_plan import SweepPlan, SweepSpec, configurations
from bench.jobs.sweep_tables import write_tables
from bench.jobs.trial import Trial, TrialStore
from bench.models.find import find_model
from bench.results.collect import add
from bench.results.store import Store
from bench.speed.figures import seconds_of, write_figures
from bench.speed.leaderboard import ENTRIES, SEEDS, write_made_runs
from bench.speed.made import random_data_file, random_llama_folder
from bench.watch.page import page
from bench.watch.read import look_all
from scoring.errors import UserError
from scoring.settings import named

POLL_S = 0.02
FORGET_SET, SELECTIONS, SELECTED, EPOCHS = 40, 10, 20, 5
# Figures of a size, by name: seconds, but for those in megabytes.
Figures = dict[str, float]


def run_benchmark(
    model: str, samples: Sequence[int], trials: Sequence[int], runs: Sequence[int], replicas: int, out: str | None
) -> None:
    """Measure, print, and write the figures as JSON if asked to.

    Args:
        model: embedded one, folder or Hugging Face id, whose tokenizer reads the data.
        samples: of the data files.
        trials: of the sweeps, multiples of SELECTIONS.
        runs: in the stores, multiples of ENTRIES × SEEDS. Of each kind a size of 0 alone leaves the kind out.
        replicas: that share the scoring; 0: it is done in the driver.
        out: JSON file.
    """
    _check("samples", samples, 100)
    _check("trials", trials, SELECTIONS)
    _check("runs", runs, ENTRIES * SEEDS)
    figures: dict[str, Any] = {"replicas": replicas}
    with tempfile.TemporaryDirectory(prefix="mrd-bench-") as name:
        folder = Path(name)
        tokenizer = find_model(model).tokenizer
        small = random_llama_folder(
            folder / "model", tokenizer, 16, 1, 2, intermediate_size=16, tie_word_embeddings=True
        )
        measured: dict[str, tuple[Sequence[int], Callable[[int], Figures]]] = {
            "samples": (samples, lambda count: _scoring(folder, small, count, replicas)),
            "trials": (trials, lambda count: _sweep(folder, small, count)),
            "runs": (runs, lambda count: _store(folder, count)),
        }
        for kind, (sizes, measure) in measured.items():
            of_sizes: dict[int, Figures] = {}
            for size in sorted(filter(None, sizes)):
                of_sizes[size] = measure(size)
                print(f"{size:>9,} {kind}: " + ", ".join(_told(*item) for item in of_sizes[size].items()), flush=True)
            if len(of_sizes) > 1:
                figures[f"growth_with_{kind}"] = growth(of_sizes)
                grown = ", ".join(f"{name} {value:.2f}" for name, value in figures[f"growth_with_{kind}"].items())
                print(f"growth over that of the {kind}: {grown}")
            figures[kind] = of_sizes
    write_figures(figures, out)


def growth(of_sizes: Mapping[int, Mapping[str, float]]) -> Figures:
    """From the smallest size to the largest, the ratio of each figure over that of the sizes.

    >>> growth({10: {"listing": 2.0}, 100: {"listing": 30.0}})
    {'listing': 1.5}
    """
    least, most = min(of_sizes), max(of_sizes)
    return {name: of_sizes[most][name] / value / (most / least) for name, value in of_sizes[least].items()}


def _check(name: str, sizes: Sequence[int], step: int) -> None:
    if any(size < 0 or size % step for size in sizes):
        raise UserError(
            f"{named(name)} is {','.join(map(str, sizes))}: expected numbers with commas between them, each a multiple "
            f"of {step}, or 0 to leave them out"
        )


def _told(name: str, value: float) -> str:
    return f"{name.replace('_', ' ')} {value:.0f}" if name.endswith("megabytes") else f"{name} {value:.2f} s"


# --- Measuring ----------------------------------------------------------------------------------------------


def _scoring(folder: Path, model: Path, count: int, replicas: int) -> Figures:
    data, out = random_data_file(folder, count), folder / f"{count}.parquet"
    seconds, megabytes = _command(
        "score", f"--model={model}", f"--data={data}", f"--replicas={replicas}", f"--out={out}"
    )
    out.unlink()
    return {"scoring": seconds, "driver_megabytes": megabytes}


def _sweep(folder: Path, model: Path, count: int) -> Figures:
    spec = SweepSpec(
        base={
            "model": str(model),
            "task": str(random_data_file(folder, FORGET_SET)),
            "algorithm": "GA",
            "epochs": EPOCHS,
            "evaluate": False,
        },
        vary={"seed": list(range(count // SELECTIONS))},
        selections=[{"kind": "random", "size": SELECTED, "count": SELECTIONS}],
    )
    out, store = folder / f"sweep-{count}", TrialStore(folder / f"trials-{count}", folder / "failed")
    out.mkdir()
    started = time.perf_counter()
    plan = SweepPlan(spec.checked(), out)
    plan.choose(SweepResources(concurrent=0))
    # Scoring the forget set takes the same time whatever the number of trials.
    chosen = time.perf_counter()
    trials = configurations(plan)
    planned = time.perf_counter()
    for trial in trials:
        store.write(trial.hash, _made_result(trial, plan))
    figures = {"choosing": chosen - started, "planning": planned - chosen}
    figures["tables"] = seconds_of(lambda: write_tables(plan, trials, store, 0.0))
    figures["page"] = seconds_of(lambda: page(look_all([out])))
    figures["adding"] = seconds_of(lambda: add(Store(folder / f"store-of-{count}"), out))
    return figures


def _made_result(trial: Trial, plan: SweepPlan) -> dict[str, Any]:
    """As `bench.jobs.trial` keeps it, with numbers that mean nothing."""
    seed = trial.spec.seed
    epochs = [
        {"epoch": float(epoch), "step": float(5 * epoch), "forgotten": epoch / EPOCHS, "forget_loss": seed + epoch / 7}
        for epoch in range(EPOCHS + 1)
    ]
    samples = [
        {
            "sample_id": name,
            "num_tokens": 12,
            "updates": 5,
            "updates_until_forgotten": 3,
            "ma_initial": 0.9,
            "ma_last": 0.1,
        }
        for name in plan.selections[trial.selection].ids
    ]
    return {
        "spec": trial.identity,
        "status": FINISHED,
        "reason": None,
        "seconds": 1.0,
        "updates": 5 * EPOCHS,
        "values": epochs[-1],
        "epochs": epochs,
        "samples": samples,
    }


def _store(folder: Path, count: int) -> Figures:
    root = write_made_runs(folder / f"runs-{count}", count)
    listing, of_list = _command("results", "list", str(root))
    building, of_board = _command("leaderboard", str(root), f"--out={folder / f'board-{count}'}")
    return {
        "listing": listing,
        "listing_megabytes": of_list,
        "leaderboard": building,
        "leaderboard_megabytes": of_board,
    }


def _command(*arguments: str) -> tuple[float, float]:
    """Seconds of a whole command, and the largest memory of its process, in megabytes; not that of replicas.

    Raises:
        UserError: it has failed.
    """
    with tempfile.TemporaryFile("w+") as said:
        started, largest = time.perf_counter(), 0
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.cli", *arguments], stdout=said, stderr=said, cwd=Path(__file__).parents[2]
        )
        while process.poll() is None:
            largest = max(largest, _largest_bytes(process.pid))
            time.sleep(POLL_S)
        seconds = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            raise UserError(f"{arguments[0]} failed: {(said.read().strip() or 'without a word').splitlines()[-1]}")
    return seconds, largest / 1e6


def _largest_bytes(process: int) -> int:
    """The most that a process has held so far; what it holds now where the system does not keep that."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has just ended, or there is no such file
        try:
            return 0 if Path("/proc").is_dir() else psutil.Process(process).memory_info().rss
        except psutil.Error:
            return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
