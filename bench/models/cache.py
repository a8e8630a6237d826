"""The cache of models that are trained here: each once, even if several processes ask for it at the same time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock


def trained_once(
    name: str,
    spec: dict[str, Any],
    train_into: Callable[[Path], float],
    cache: Path | str | None = None,
    threads: int | None = 1,
) -> Path:
    """The folder of a trained model, NAME-HASH in the cache; it is trained first if it is not there.

    The folder is written under another name and renamed: it appears complete or not at all.

    Args:
        name: begins the folder's name.
        spec: everything that decides the weights; its hash ends the folder's name.
        train_into: trains, writes the model into a folder and returns the final loss.
        cache: the folder of all models; None: `cache_folder()`.
        threads: of torch. One is best for the smallest models: threads on busy cores spend their time waiting for each
            other. None takes all cores, up to eight; more do not help.
    """
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(cache or cache_folder()) / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():  # another process finished while this one waited
            return folder
        for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(leftover)  # of a killed process: only the one that holds the lock trains
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        unfinished.mkdir()
        threads_before = torch.get_num_threads()
        # Not torch's own number of threads: Ray and others limit that of a worker to one.
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else threads_before
        torch.set_num_threads(threads or min(8, cores))
        try:
            started = time.perf_counter()
            final_loss = train_into(unfinished)
            measured = {"seconds": round(time.perf_counter() - started, 1), "final_loss": round(final_loss, 5)}
            description = json.dumps({"spec": spec, "measured": measured}, indent=2, sort_keys=True)
            (unfinished / "mrd_bench.json").write_text(description + "\n")
            unfinished.rename(folder)
        finally:
            torch.set_num_threads(threads_before)
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """Where trained models are kept. The folder need not exist."""
    if "MRD_BENCH_CACHE" in os.environ:
        return Path(os.environ["MRD_BENCH_CACHE"]) / "models"
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "mrd-bench" / "models"
