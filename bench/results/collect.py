"""Putting finished work into a result store: sweeps, unlearning runs, score files and answers; and what open-unlearning
has measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from typing_extensions import TypedDict

from bench.files.origin import Origin
from bench.files.score_file import read_scores
from bench.files.status import FINISHED
from bench.jobs.evaluation_answers import is_evaluation, read_answers, run_folder_of
from bench.jobs.run_folder import read_run
from bench.jobs.sweep_tables import read_sweep
from bench.jobs.trial import derived
from bench.metrics import ATTACKED, METRICS
from bench.metrics.table import MODEL, ORIGINAL, RETAIN_ONLY
from bench.results.open_unlearning import NAME, Said, is_open_unlearning, read_open_unlearning
from bench.results.store import ANSWERED_BY, SCHEMAS, Identity, Store, as_stored
from bench.tasks.datasets import Dataset, find_task, is_data_file, load_dataset
from bench.tasks.words import prompt_and_completion
from scoring.errors import UserError
from scoring.reading import parse_json, readable, shaped

# Metrics that the training loop measures itself: columns of the table of epochs.
LOOP_METRICS = (
    "forget_rouge_l_recall",
    "forget_probability",
    "retain_rouge_l_recall",
    "retain_probability",
    "mean_abs_delta",
    "delta_norm",
)


_ROLES = dict(zip(ANSWERED_BY, (ORIGINAL, MODEL, RETAIN_ONLY), strict=True))


@dataclass(frozen=True)
class Collected:
    """Rows for a store's tables, all of one task.

    Attributes:
        belongs_to: the folder or file by which the experiment is named if nothing else is said.
        notes: what a reader must know, a line each.
    """

    task: str
    belongs_to: Path
    runs: list[dict[str, Any]] = field(default_factory=list)
    samples: pa.Table = field(default_factory=SCHEMAS["samples"].empty_table)
    scores: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def add(store: Store, path: str | Path, experiment: str | None = None, folders: Sequence[str | Path] = ()) -> Collected:
    """Put a sweep, a run, a score file, or the answers of an evaluation into a store; or results of open-unlearning.

    Args:
        path: the folder of a sweep or of a run, a score file, an evaluation of the model of a run, or a file of
            open-unlearning's evaluation.
        experiment: the experiment that it belongs to; None: named like the folder or file, or, of an evaluation, like
            the folder of its run.
        folders: where the run of an evaluation may be, besides the folder that the evaluation names.

    Raises:
        UserError: it is none of them, or it is not finished.
    """
    (collected,) = add_all(store, [path], experiment, folders)
    return collected


def add_all(
    store: Store,
    paths: Sequence[str | Path],
    experiment: str | None = None,
    folders: Sequence[str | Path] = (),
    said: Said | None = None,
) -> list[Collected]:
    """Put several into a store, as `add` does; all are read before any is written, so that none is where one cannot be.

    Args:
        said: what open-unlearning's files do not say, of those that are among them.

    Raises:
        UserError: see `add`; or something is said, and there is no such file.
    """
    if said is not None and said != Said() and not any(is_open_unlearning(Path(path)) for path in paths):
        raise UserError(
            "an algorithm, model, split or seed is said of open-unlearning's files alone: none is among these"
        )
    read = []
    for path in map(Path, paths):
        collected = _collected(path, folders, said or Said())
        read.append((collected, _tables(collected, path)))
    # Runs are written last: where there is a run, its samples and their difficulty are there as well.
    for collected, tables in read:
        for name, table in tables.items():
            if table.num_rows:
                store.write(name, table, collected.task, experiment or _folder_name(collected.belongs_to.absolute()))
    return [collected for collected, _ in read]


def _collected(path: Path, folders: Sequence[str | Path], said: Said) -> Collected:
    if (path / "sweep.json").is_file():
        return _from_sweep(path)
    if (path / "run.json").is_file():
        return _from_run(path)
    if path.is_file() and path.suffix == ".parquet":
        return _from_file(path, folders)
    if path.is_file() and is_open_unlearning(path):
        return _from_open_unlearning(path, said)
    raise UserError(
        f"{path}: expected the folder of a finished sweep or run, a score file or an evaluation (.parquet), or a file "
        "of open-unlearning's evaluation, such as TOFU_EVAL.json"
    )


def _tables(collected: Collected, path: Path) -> dict[str, pa.Table]:
    """Those of a store, in the order in which they are written."""
    with readable(str(path), "what this version writes", "has values that a store does not take"):
        return {
            "scores": pa.Table.from_pylist(collected.scores, SCHEMAS["scores"]),
            "answers": pa.Table.from_pylist(collected.answers, SCHEMAS["answers"]),
            "samples": as_stored("samples", collected.samples),
            "runs": pa.Table.from_pylist(collected.runs, SCHEMAS["runs"]),
        }


def _from_sweep(folder: Path) -> Collected:
    sweep = read_sweep(folder)
    if "identity" not in sweep.trials.column_names:
        raise UserError(f"{folder}: its trials do not say what they are; run the sweep again, with the same --trials")
    rows = sweep.trials.to_pylist()
    if not rows:
        raise UserError(f"{folder}: the sweep has no trial: nothing can be added")
    _check_numbers(sweep.trials, folder / "trials.parquet")
    runs = [
        {
            **{name: row[name] for name in ("status", "reason", "algorithm", "selection", "kind", "level", "seed")},
            **{name: row[name] for name in ("forget_samples", "mean_log_mrd", "updates", "seconds")},
            **{name: row[name] for name in ("packages", "hardware", "git_commit", "model")},
            "mean_log_flip_time": row.get("mean_log_flip_time"),
            "run": row["trial"],
            "metrics": _metrics(row) if row["status"] == FINISHED else [],
            **_identity_columns(_identity_of(row["identity"], folder / "trials.parquet")),
        }
        for row in rows
    ]
    scores: list[dict[str, Any]] = []
    if (folder / "difficulty.parquet").is_file():
        scores = _score_rows(*read_scores(folder / "difficulty.parquet"))
    samples = sweep.samples
    if samples.num_rows:
        samples = samples.rename_columns(["run" if name == "trial" else name for name in samples.column_names])
    return Collected(_task_folder(rows[0]["task"]), folder, runs, samples, scores)


def _from_run(folder: Path) -> Collected:
    result = read_run(folder)
    _check_numbers(result.epochs, folder / "epochs.parquet")
    spec, last_epoch = result.record["spec"], result.epochs.to_pylist()[-1]
    ids = result.samples["sample_id"].to_pylist()
    # The file of ids may have another name on another machine; a hash of the samples is the same everywhere.
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
        "updates": result.record["updates"],
        "seconds": sum(result.record["seconds"].values()),
        "metrics": _metrics({**last_epoch, **derived(last_epoch)}),
        "model": spec["model"],
        "packages": json.dumps(result.record["packages"]),
        "hardware": result.record.get("hardware"),
        "git_commit": result.record.get("git_commit"),
        **_identity_columns({**spec, "selection": selection}),
    }
    samples = result.samples.append_column("run", pa.repeat(spec["spec_hash"], len(ids)))
    return Collected(_task_folder(spec["task"]), folder, [run], samples)


def _from_file(path: Path, folders: Sequence[str | Path]) -> Collected:
    table, spec, record = read_scores(path)
    if is_evaluation(spec):
        return _from_evaluation(path, folders)
    if "estimator" not in spec:
        raise UserError(f"{path}: expected what `mrd-bench score` or `mrd-bench evaluate` writes")
    return Collected(_task_folder(spec["data"]), path, scores=_score_rows(table, spec, record))


def _from_evaluation(path: Path, folders: Sequence[str | Path]) -> Collected:
    """The answers of a run's model."""
    answers = read_answers(path)
    folder = run_folder_of(answers, [Path(each) for each in folders])
    if folder is None:
        raise UserError(
            f"{path}: the run whose model it is of is not there (it was {answers.spec['model']}): give the run's "
            "folder as well, and the answers are put beside the run"
        )
    spec = read_run(folder).record["spec"]
    rows = [
        {
            "run": spec["spec_hash"],
            "evaluation": answers.spec["spec_hash"],
            "set": sample.set_name,
            "sample_id": sample.sample_id,
            "question": sample.question,
            "truth": sample.truth,
            **{name: sample.texts.get(role) for name, role in _ROLES.items()},
            **{f"rouge_{name}": sample.rouge.get(role) for name, role in _ROLES.items()},
            **{f"ma_{name}": sample.ma.get(role) for name, role in _ROLES.items()},
        }
        for sample in answers.samples.values()
    ]
    return Collected(_task_folder(spec["task"]), folder, answers=rows)


def _from_open_unlearning(path: Path, said: Said) -> Collected:
    foreign = read_open_unlearning(path, said)
    run = foreign.run["run"]
    samples = pa.table({"run": [run] * len(foreign.sample_ids), "sample_id": list(foreign.sample_ids)})
    reasons: dict[str, list[str]] = {}
    for name, reason in foreign.left_out.items():
        reasons.setdefault(reason, []).append(name)
    notes = tuple(f"{path}: left out: {', '.join(names)} ({reason})" for reason, names in reasons.items())
    # All of them belong together, whatever their folders are called.
    return Collected(
        foreign.task,
        Path(NAME),
        [foreign.run],
        as_stored("samples", samples),
        answers=[{"run": run, **row} for row in foreign.answers],
        notes=notes,
    )


def _score_rows(table: pa.Table, spec: Mapping[str, Any], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores, with the texts of the samples if their data set can be loaded and has not changed."""
    shaped(spec, _ScoredBy, "the spec of a score file", "what `mrd-bench score` writes")
    shaped(record, Origin, "the record of a score file", "what `mrd-bench score` writes")
    if "sample_id" not in table.column_names:
        raise UserError("a score file has no column 'sample_id': expected what `mrd-bench score` writes")
    texts = {}
    try:
        dataset = load_dataset(spec["data"], spec["split"])
        if dataset.sha256 == spec["data_sha256"]:
            texts = _texts_by_id(dataset)
    except UserError:
        pass  # scores without texts are still of use
    columns = {
        "scores": spec["spec_hash"],
        **{name: spec[name] for name in ("split", "estimator", "statistic", "sigma", "seed", "model")},
        **{name: spec[name] for name in ("model_fingerprint", "data_sha256")},
        "spec": json.dumps(spec, sort_keys=True),
        "packages": json.dumps(record["packages"]),
        "hardware": record.get("hardware"),
        "git_commit": record.get("git_commit"),
    }
    return [row | columns | texts.get(row["sample_id"], {}) for row in table.to_pylist()]


class _ScoredBy(TypedDict):
    data: str
    split: str | None
    data_sha256: str
    estimator: str
    statistic: str
    sigma: float
    seed: int
    model: str
    model_fingerprint: str
    spec_hash: str


class _TrialIdentity(Identity):
    forget_split: str | None
    model_fingerprint: str
    forget_sha256: str


def _identity_of(text: Any, where: Path) -> dict[str, Any]:
    expected = "the identity of a trial"
    if not isinstance(text, str):
        raise UserError(f"{where}, column 'identity', has a row without a value: expected {expected}")
    identity: dict[str, Any] = shaped(parse_json(text, str(where), expected), _TrialIdentity, str(where), expected)
    return identity


def _check_numbers(table: pa.Table, where: Path) -> None:
    """Refuse a table whose metrics are no numbers."""
    names = {"completeness", "utility", "balance", *METRICS, *LOOP_METRICS}
    names |= {name for name in table.column_names if name.startswith(ATTACKED)}
    for column in table.schema:
        kinds = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
        if column.name in names and not any(is_kind(column.type) for is_kind in kinds):
            raise UserError(f"{where}, column {column.name!r}, is of type {column.type}: expected numbers")


def _texts_by_id(dataset: Dataset) -> dict[str, dict[str, str]]:
    return {
        text.sample_id: dict(zip(("prompt", "completion"), prompt_and_completion(text), strict=True))
        for text in dataset.texts
    }


def _identity_columns(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "split": identity["forget_split"],
        "model_fingerprint": identity["model_fingerprint"],
        "data_sha256": identity["forget_sha256"],
        "spec": json.dumps(identity, sort_keys=True),
    }


def _metrics(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    under_attack = (name for name in row if name.startswith(ATTACKED))
    names: Iterable[str] = (*derived(row), *METRICS, *LOOP_METRICS, *under_attack)
    return [(name, float(row[name])) for name in dict.fromkeys(names) if row.get(name) is not None]


def _task_folder(name: str) -> str:
    """The task's folder in a store, by a task's name or the path of a data file."""
    return _folder_name(Path(name)) if is_data_file(name) else _folder_name(Path(find_task(name)[0].name))


def _folder_name(path: Path) -> str:
    """The name of a file or folder as the name of a folder of the store."""
    return re.sub(r"[^\w.-]+", "-", path.stem if path.suffix in (".parquet", ".jsonl") else path.name) or "results"


def summary(collected: Sequence[Collected]) -> str:
    """How much was put into the store, in a line."""
    runs, samples, scores, answers = (sum(counts) for counts in zip(*map(_counts, collected), strict=True))
    told = f"{runs} runs, {samples} values of their samples, {scores} scores"
    return f"{told}, answers to {answers} samples" if answers else told


def _counts(collected: Collected) -> tuple[int, int, int, int]:
    return len(collected.runs), collected.samples.num_rows, len(collected.scores), len(collected.answers)
