"""`mrd-bench benchmark leaderboard`: building and opening a leaderboard of many runs.

Two stores hold the same made runs: one as sweeps leave it, a file for many runs, and one as single runs leave it, a
file each. Reading either and building take turns; building is the whole command as a user calls it, with the start of
Python. Opening is the time until the page is loaded, as the browser measures it, where Chromium and selenium are
installed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bench.files.status import FINISHED
from bench.results.store import SCHEMAS, Store
from bench.speed.figures import seconds_in_turns, write_figures
from scoring.errors import UserError
from scoring.settings import named

TURNS = 3
ENTRIES, SEEDS, SAMPLES, FORGET_SET = 10, 10, 40, 400
TASK, EXPERIMENT = "made", "many"


def run_benchmark(runs: int, out: str | None) -> None:
    """Measure, print, and write the figures as JSON if asked to.

    Args:
        runs: in each store.
        out: JSON file.
    """
    if runs < ENTRIES * SEEDS or runs % (ENTRIES * SEEDS):
        raise UserError(
            f"{named('runs')} is {runs}: expected a multiple of {ENTRIES * SEEDS}, for as many entries × seeds"
        )
    with tempfile.TemporaryDirectory(prefix="mrd-bench-") as name:
        folder = Path(name)
        stores = {"sweeps": folder / "sweeps", "single runs": folder / "single"}
        for kind, root in stores.items():
            write_made_runs(root, runs, one_file_each=kind == "single runs")
        works: dict[str, Callable[[], Any]] = {kind: Store(root).read for kind, root in stores.items()}
        works["building"] = partial(_build, stores["sweeps"], folder / "board")
        reading = seconds_in_turns(works, TURNS)
        building = reading.pop("building")
        page = folder / "board" / "index.html"
        figures: dict[str, Any] = {
            "runs": runs,
            "build_seconds": building,
            "read_seconds": reading,
            "page_megabytes": page.stat().st_size / 1e6,
            "open_seconds": _opening(page),
        }
    medians = {kind: statistics.median(seconds) for kind, seconds in reading.items()}
    print(f"{runs} runs, {ENTRIES} entries, {SAMPLES} samples a run; median of {TURNS}")
    print(f"building the leaderboard, whole command {statistics.median(building):7.2f} s")
    print(f"reading a store that sweeps wrote       {medians['sweeps']:7.2f} s")
    print(f"reading one of a file a run             {medians['single runs']:7.2f} s")
    print(f"ratio of the two                        {medians['single runs'] / medians['sweeps']:7.1f}")
    opening = figures["open_seconds"]
    time = f"{statistics.median(opening):7.2f} s" if opening else "not measured: no chromium, chromedriver and selenium"
    print(f"opening the page ({figures['page_megabytes']:.1f} MB)              {time}")
    write_figures(figures, out)


def _build(store: Path, out: Path) -> None:
    command = [sys.executable, "-m", "bench.cli", "leaderboard", str(store), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)


def _opening(page: Path) -> list[float] | None:
    """Seconds from the request to the end of loading, script and first view included; None without a browser."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        return None
    if not browser or not driver:
        return None
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.binary_location = browser
    chrome = webdriver.Chrome(options, Service(driver))
    seconds = []
    try:
        for _ in range(TURNS):
            chrome.get("about:blank")
            chrome.get(page.as_uri())
            milliseconds = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
            seconds.append(chrome.execute_script(milliseconds) / 1000)
    finally:
        chrome.quit()
    return seconds


def write_made_runs(root: Path, runs: int, one_file_each: bool = False, seed: int = 0) -> Path:
    """A store of made runs: ENTRIES algorithms on runs / (ENTRIES × SEEDS) selections, with SEEDS seeds each.

    Metrics are normal around a mean that depends on the algorithm, and every sample has a number of updates.

    Args:
        root: of the store.
        runs: how many.
        one_file_each: write a file for each run; else one for each algorithm.
        seed: of the random values.

    Returns:
        The root.
    """
    rng = np.random.default_rng(seed)
    fingerprint = hashlib.sha256(b"made").hexdigest()
    selections = [rng.choice(FORGET_SET, SAMPLES, replace=False) for _ in range(runs // (ENTRIES * SEEDS))]
    rows, samples = [], []
    for entry in range(ENTRIES):
        for selection, sample_numbers in enumerate(selections):
            for run_seed in range(SEEDS):
                row = _made_run(entry, selection, run_seed, fingerprint, rng)
                rows.append(row)
                samples.append((row["run"], sample_numbers, rng.integers(1, 30, SAMPLES)))
    scores = [
        {
            "scores": "made",
            "sample_id": f"q{n:03d}",
            "mrd": float(rng.random()),
            "num_tokens": 20,
            "prompt": f"What is known of subject {n}, and how is it that it is known? " * 3,
            "completion": f"Nothing is known of subject {n}: it was made for this. " * 3,
            "model_fingerprint": fingerprint,
        }
        for n in range(FORGET_SET)
    ]
    store = Store(root)
    store.write("scores", pa.Table.from_pylist(scores, SCHEMAS["scores"]), TASK, EXPERIMENT)
    run_table = pa.Table.from_pylist(rows, SCHEMAS["runs"])
    sample_table = pa.table(
        {
            "run": [run for run, numbers, _ in samples for _ in numbers],
            "sample_id": [f"q{number:03d}" for _, numbers, _ in samples for number in numbers],
            "updates_until_forgotten": np.concatenate([updates for _, _, updates in samples]),
        }
    )
    store.write("samples", sample_table, TASK, EXPERIMENT)
    if one_file_each:
        parts = [run_table.slice(number, 1) for number in range(run_table.num_rows)]
    else:
        parts = [run_table.filter(pc.equal(run_table["algorithm"], f"A{entry}")) for entry in range(ENTRIES)]
    for part in parts:
        store.write("runs", part, TASK, EXPERIMENT)
    return root


def _made_run(entry: int, selection: int, seed: int, fingerprint: str, rng: np.random.Generator) -> dict[str, Any]:
    identity = {
        "algorithm": f"A{entry}",
        "seed": seed,
        "selection": f"s{selection:03d}",
        "model_fingerprint": fingerprint,
    }
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return {
        "run": key,
        "status": FINISHED,
        "algorithm": f"A{entry}",
        "split": "made",
        "selection": f"s{selection:03d}",
        "kind": "random",
        "level": "",
        "forget_samples": SAMPLES,
        "mean_log_mrd": -5.0 + 0.001 * selection,
        "seed": seed,
        "updates": 30,
        "seconds": 3.0,
        "metrics": [
            ("completeness", 0.1 + 0.05 * entry + 0.1 * rng.normal()),
            ("utility", 0.9 - 0.04 * entry + 0.1 * rng.normal()),
        ],
        "model": "made",
        "model_fingerprint": fingerprint,
        "data_sha256": hashlib.sha256(str(selection).encode()).hexdigest(),
        "spec": json.dumps(identity | {"spec_hash": key}),
        "packages": "{}",
    }
