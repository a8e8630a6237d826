"""Runs with known results in a store, without a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from bench.results.store import SCHEMAS, Store

SETTING = {"model_fingerprint": "m" * 64, "forget_split": "forget10", "evaluate_samples": 24, "el_n": 10}


def made_run(
    algorithm: str,
    selection: str,
    seed: int,
    metrics: Mapping[str, float],
    difficulty: float | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """A row of the table of runs; `spec` may also change the setting, and the row's own columns by "row"."""
    row = spec.pop("row", {})
    identity = {"algorithm": algorithm, "seed": seed, "learning_rate": 1e-4, "selection": selection, **SETTING, **spec}
    samples = row.get("data_sha256", hashlib.sha256(selection.encode()).hexdigest())
    key = hashlib.sha256(json.dumps([identity, samples], sort_keys=True).encode()).hexdigest()[:16]
    return {
        "run": key,
        "status": "finished",
        "algorithm": algorithm,
        "split": identity["forget_split"],
        "selection": selection,
        "kind": "random",
        "level": "",
        "forget_samples": 2,
        "mean_log_mrd": difficulty,
        "seed": seed,
        "updates": 10,
        "seconds": 1.5,
        "metrics": list(metrics.items()),
        "model": "authors",
        "model_fingerprint": identity["model_fingerprint"],
        "data_sha256": samples,
        "spec": json.dumps(identity | {"spec_hash": key}, sort_keys=True),
        "packages": json.dumps({"torch": "2.13.0"}),
        "hardware": "8 cores",
        "git_commit": "abc",
    } | row


def write_runs(root: Path, rows: Iterable[Mapping[str, Any]], task: str = "authors", experiment: str = "fig2") -> Path:
    """Put them into a store, with two samples each; its folder."""
    rows = list(rows)
    store = Store(root)
    samples = [
        {"run": row["run"], "sample_id": f"{row['selection']}/{n}", "num_tokens": 5, "updates_until_forgotten": until}
        for row in rows
        for n, until in enumerate((None, 4))
    ]
    scores = [
        {
            "scores": "h",
            "sample_id": name,
            "mrd": 0.5,
            "num_tokens": 5,
            "prompt": f"about {name}?",
            "completion": f"it is {name}",
            "model_fingerprint": SETTING["model_fingerprint"],
        }
        for name in dict.fromkeys(each["sample_id"] for each in samples)
    ]
    store.write("scores", pa.Table.from_pylist(scores, SCHEMAS["scores"]), task, experiment)
    store.write("samples", pa.Table.from_pylist(samples, SCHEMAS["samples"]), task, experiment)
    store.write("runs", pa.Table.from_pylist(rows, SCHEMAS["runs"]), task, experiment)
    return root


def grid(values: Mapping[str, Any], metric: str = "completeness", **spec: Any) -> list[dict[str, Any]]:
    """Runs of algorithm -> selection -> one value a seed."""
    return [
        made_run(algorithm, selection, seed, {metric: value}, **spec)
        for algorithm, own in values.items()
        for selection, seeds in own.items()
        for seed, value in enumerate(seeds)
    ]
