"""Putting finished work into a result store: sweeps, unlearning runs and score files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from bench.files.score_file import read_scores
from bench.files.status import FINISHED
from bench.jobs.run_folder import read_run
from bench.jobs.sweep import read_sweep
from bench.jobs.trial import derived
from bench.metrics import METRICS
from bench.results.store import SCHEMAS, Store
from bench.tasks.datasets import Dataset, find_task, is_data_file, load_dataset
from scoring.errors import UserError

# What the training loop measures by itself, of the columns of its last epoch.
MEASURED = (
    "forget_rouge_l_recall",
    "forget_probability",
    "retain_rouge_l_recall",
    "retain_probability",
    "mean_abs_delta",
    "delta_norm",
)


@dataclass(frozen=True)
class Collected:
    """Rows of a store's tables, of one task."""

    task: str
    runs: list[dict[str, Any]]
    samples: pa.Table
    scores: list[dict[str, Any]]


def add(store: Store, path: str | Path, experiment: str | None = None) -> Collected:
    """Put what lies at `path` into a store.

    Args:
        path: the folder of a sweep or of a run, or a score file.
        experiment: that it belongs to; None: named like the folder or file.

    Raises:
        UserError: it is none of them, or is not finished.
    """
    path = Path(path)
    if (path / "sweep.json").is_file():
        found = _sweep(path)
    elif (path / "run.json").is_file():
        found = _run(path)
    elif path.is_file() and path.suffix == ".parquet":
        found = _scores(path)
    else:
        raise UserError(f"{path}: expected the folder of a finished sweep or run, or a score file (.parquet)")
    experiment = experiment or _name(path.absolute())
    # Runs come last: where there is a run, its samples and their difficulty are there as well.
    if found.scores:
        store.write("scores", pa.Table.from_pylist(found.scores, SCHEMAS["scores"]), found.task, experiment)
    if found.samples.num_rows:
        store.write("samples", found.samples, found.task, experiment)
    if found.runs:
        store.write("runs", pa.Table.from_pylist(found.runs, SCHEMAS["runs"]), found.task, experiment)
    return found


def _sweep(folder: Path) -> Collected:
    swept = read_sweep(folder)
    if "identity" not in swept.trials.column_names:
        raise UserError(f"{folder}: its trials do not say what they are; run the sweep again, with the same --trials")
    rows = swept.trials.to_pylist()
    runs = [
        {
            **{name: row[name] for name in ("status", "reason", "algorithm", "selection", "kind", "level", "seed")},
            **{name: row[name] for name in ("forget_samples", "mean_log_mrd", "updates", "seconds")},
            **{name: row[name] for name in ("packages", "hardware", "git_commit", "model")},
            "run": row["trial"],
            "metrics": _metrics(row) if row["status"] == FINISHED else [],
            **_identified(json.loads(row["identity"])),
        }
        for row in rows
    ]
    scores: list[dict[str, Any]] = []
    if (folder / "difficulty.parquet").is_file():
        scores = _score_rows(*read_scores(folder / "difficulty.parquet"))
    samples = swept.samples
    if samples.num_rows:
        samples = samples.rename_columns(["run" if name == "trial" else name for name in samples.column_names])
    return Collected(_task(rows[0]["task"]), runs, samples, scores)


def _run(folder: Path) -> Collected:
    done = read_run(folder)
    spec, last = done.record["spec"], done.epochs.to_pylist()[-1]
    ids = done.samples["sample_id"].to_pylist()
    # The file of ids has a name of its own on every machine; the samples are what is the same.
    selection = f"of {len(ids)}, {spec['forget_sha256'][:8]}" if spec["selection"] else "all"
    run = {
        "run": spec["spec_hash"],
        "status": FINISHED,
        "algorithm": spec["algorithm"],
        "selection": selection,
        "kind": "given" if spec["selection"] else "all",
        "level": "",
        "forget_samples": len(ids),
        "seed": spec["seed"],
        "updates": done.record["updates"],
        "seconds": sum(done.record["seconds"].values()),
        "metrics": _metrics({**last, **derived(last)}),
        "model": spec["model"],
        "packages": json.dumps(done.record["packages"]),
        "hardware": done.record.get("hardware"),
        "git_commit": done.record.get("git_commit"),
        **_identified({**spec, "selection": selection}),
    }
    samples = done.samples.append_column("run", pa.repeat(spec["spec_hash"], len(ids)))
    return Collected(_task(spec["task"]), [run], samples, [])


def _scores(path: Path) -> Collected:
    table, spec, record = read_scores(path)
    if "estimator" not in spec:
        raise UserError(f"{path}: what `mrd-bench evaluate` writes is no score file; expected one of `mrd-bench score`")
    return Collected(_task(spec["data"]), [], SCHEMAS["samples"].empty_table(), _score_rows(table, spec, record))


def _score_rows(table: pa.Table, spec: Mapping[str, Any], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores with the texts, where the data are at hand and still the same."""
    texts = {}
    try:
        dataset = load_dataset(spec["data"], spec["split"])
        if dataset.sha256 == spec["data_sha256"]:
            texts = _texts(dataset)
    except UserError:
        pass
    same = {
        "scores": spec["spec_hash"],
        **{name: spec[name] for name in ("split", "estimator", "statistic", "sigma", "seed", "model")},
        **{name: spec[name] for name in ("model_fingerprint", "data_sha256")},
        "spec": json.dumps(spec, sort_keys=True),
        "packages": json.dumps(record["packages"]),
        "hardware": record.get("hardware"),
        "git_commit": record.get("git_commit"),
    }
    return [row | same | texts.get(row["sample_id"], {}) for row in table.to_pylist()]


def _texts(dataset: Dataset) -> dict[str, dict[str, str]]:
    found = {}
    for text in dataset.texts:
        prompt = text.prompt
        if text.messages:
            prompt = "\n".join(f"{turn['role']}: {turn['content']}" for turn in text.messages[:-1])
        completion = text.messages[-1]["content"] if text.messages else text.completion
        found[text.sample_id] = {"prompt": prompt or "", "completion": completion or ""}
    return found


def _identified(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "split": identity["forget_split"],
        "model_fingerprint": identity["model_fingerprint"],
        "data_sha256": identity["forget_sha256"],
        "spec": json.dumps(identity, sort_keys=True),
    }


def _metrics(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    known: Iterable[str] = (*derived(row), *METRICS, *MEASURED)
    return [(name, float(row[name])) for name in dict.fromkeys(known) if row.get(name) is not None]


def _task(name: str) -> str:
    return _name(Path(name)) if is_data_file(name) else _name(Path(find_task(name)[0].name))


def _name(path: Path) -> str:
    """A name for a folder of the store."""
    return re.sub(r"[^\w.-]+", "-", path.stem if path.suffix in (".parquet", ".jsonl") else path.name) or "results"


def summary(found: Sequence[Collected]) -> str:
    """How much was put there, in a line."""
    runs, samples, scores = (sum(counts) for counts in zip(*map(_counts, found), strict=True))
    return f"{runs} runs, {samples} values of their samples, {scores} scores"


def _counts(found: Collected) -> tuple[int, int, int]:
    return len(found.runs), found.samples.num_rows, len(found.scores)
