"""Requests to forget that come one after the other: each starts from the model that the one before has left.

    spec -> what each request forgets and keeps -> a run of unlearning for each -> what all of them score after each

OUT/1-NAME/ OUT/2-NAME/   a run folder for each request, as `bench.jobs.run_folder` has it
OUT/spec.json             the spec of the whole
OUT/requests.parquet      what every request so far and the retain set score; written after each request
OUT/model/                the model that the last request has left
OUT/run.json              what was done; written last
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.files.folders import SEVERAL_REQUESTS, OwnedFolder
from bench.files.identity import with_spec_hash
from bench.files.origin import Origin, origin
from bench.jobs.preview import DONE, NEW, Preview
from bench.jobs.resources import Resources
from bench.jobs.run_folder import RunFolder, UnlearnResult, link, read_run
from bench.jobs.unlearn import (
    NOT_HASHED,
    UnlearnSpec,
    datasets_of,
    encoder_of,
    identity_of,
    preview_unlearning,
    unlearn,
)
from bench.metrics.quantities import MeasurementSetup, measure, tokens_to_read
from bench.metrics.similarity import Embedder
from bench.metrics.toxicity import Classifier
from bench.metrics.values import Scores
from bench.models.find import ModelReference, find_model
from bench.tasks import Record
from bench.tasks.datasets import Dataset, check_dataset, find_task, is_data_file, subject
from scoring.errors import UserError, unknown_name
from scoring.files import replacing
from scoring.progress import Bar
from scoring.reading import read_json, read_parquet
from scoring.readings import Reader
from scoring.samples import BATCH_TOKENS, answer_end, encode, evenly_spaced
from scoring.settings import named
from scoring.work import ReplicaSpec

SCHEMA_VERSION = 1
TABLE = "requests.parquet"
RETAIN = "retain"
# What is measured of each sample after each request: columns of the table, and what quantities they are.
MEASURED = {"loss": "loss", "rouge_l_recall": "rouge_l_recall", "ma": "ma"}
SCHEMA = pa.schema(
    [
        pa.field("after", pa.int64(), nullable=False),
        ("request", pa.int64()),
        pa.field("name", pa.string(), nullable=False),
        pa.field("samples", pa.int64(), nullable=False),
        ("sample_id", pa.string()),
        *((name, pa.float64()) for name in MEASURED),
    ]
)


@dataclass(frozen=True)
class Request:
    """One of the requests.

    Attributes:
        number: counted from 1.
        name: as it was given, without the folder of a file.
        spec: of its run, but for the model.
        forget, retain: what it forgets and keeps.
    """

    number: int
    name: str
    spec: UnlearnSpec
    forget: Dataset
    retain: Dataset | None

    @property
    def folder(self) -> str:
        """The name of its run's folder."""
        return f"{self.number}-{self.name}"


@dataclass(frozen=True)
class RequestsResult:
    """What several requests give back.

    Attributes:
        folder: with a run folder for each request, and the model that the last one has left.
        runs: of the requests, in their order.
        table: what all of them score. Columns: after (the number of the last request that was carried out; 0: the
            initial model), request (the number of the one that is scored; null: the retain set), name, samples (how
            many are scored), sample_id (null: the mean over them), loss (mean NLL of a token, in nats),
            rouge_l_recall and ma (0 to 1; null where they cannot be measured).
        record: spec, requests, notes, packages.
    """

    folder: Path
    runs: tuple[UnlearnResult, ...]
    table: pa.Table
    record: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def means(self) -> list[dict[str, Any]]:
        """The rows that are means over a set."""
        return self.table.filter(pc.is_null(self.table["sample_id"])).to_pylist()

    def came_back(self, number: int) -> list[str]:
        """The samples of a request of which more tokens are predicted after the last request than after its own."""
        samples = [row for row in self.table.to_pylist() if row["request"] == number and row["sample_id"] is not None]
        ma = {(row["after"], row["sample_id"]): row["ma"] for row in samples}
        ids = dict.fromkeys(row["sample_id"] for row in samples)
        return [name for name in ids if ma[len(self.runs), name] > ma[number, name]]


class RequestsFolder(OwnedFolder):
    """The folder of several requests."""

    KIND, BEGUN, RECORD = SEVERAL_REQUESTS, (TABLE,), RunFolder.RECORD


def unlearn_requests(spec: UnlearnSpec, out: str | Path, progress: bool = True) -> RequestsResult:
    """Carry out requests one after the other, and write `out`.

    Raises:
        UserError: one line; what an earlier start of the same command has reached is kept.
    """
    out = Path(out).absolute()
    spec, model, requests, identity = _ready(spec)
    with RequestsFolder(out, identity) as folder:
        if folder.is_finished():
            RunFolder(out, identity).say_done()
            return read_requests(out)
        rows = _rows_so_far(out)
        if not _has(rows, 0):
            rows = _added(out, rows, _scored(spec, model, requests, 0, progress))
        source = spec.model
        for request in requests:
            place = out / request.folder
            unlearn(dataclasses.replace(request.spec, model=source), place, progress)
            source = str(place / "model")
            if not _has(rows, request.number):
                scored = _scored(spec, find_model(source), requests, request.number, progress)
                rows = _added(out, rows, scored)
        _finish(out, requests, identity)
    return read_requests(out)


def preview_requests(spec: UnlearnSpec, out: str | Path) -> Preview:
    """What `unlearn_requests` would do with the same arguments; nothing is written. Sizes are of the first request.

    Raises:
        UserError: what it would refuse before it computes.
    """
    out = Path(out).absolute()
    spec, _, requests, identity = _ready(spec)
    folder = RequestsFolder(out, identity)
    folder.check()
    first = preview_unlearning(requests[0].spec, out / requests[0].folder)
    done = [request for request in requests if (out / request.folder / RunFolder.RECORD).is_file()]
    begun = (out / requests[0].folder).is_dir()
    state = f"would continue: {len(done)} of {len(requests)} requests are carried out" if begun else NEW
    return dataclasses.replace(
        first,
        spec=spec,
        identity=identity,
        state=DONE if folder.is_finished() else state,
        counts={"requests, the first of which is described": len(requests), **first.counts},
    )


def read_requests(folder: str | Path) -> RequestsResult:
    """Finished requests.

    Raises:
        UserError: the folder holds none.
    """
    folder = Path(folder)
    expected = "what `mrd-bench unlearn --requests` writes"
    if not (folder / RunFolder.RECORD).is_file():
        raise UserError(f"{folder}: no finished {SEVERAL_REQUESTS}; expected {expected}")
    record = read_json(folder / RunFolder.RECORD, _Record, expected)
    table = read_parquet(folder / TABLE, expected, SCHEMA)
    runs = tuple(read_run(folder / request["folder"]) for request in record["requests"])
    return RequestsResult(folder, runs, table, record)


class _Record(Origin):
    """What every reader of run.json may rely on."""

    spec: dict[str, Any]
    requests: list[dict[str, Any]]
    notes: list[str]


# --- What is asked for --------------------------------------------------------------------------------------


def _ready(spec: UnlearnSpec) -> tuple[UnlearnSpec, ModelReference, list[Request], dict[str, Any]]:
    """The spec, checked, with the initial model, the requests with their data, and the identity of the whole."""
    spec = spec.checked()
    if spec.adapter is not None or spec.selection is not None:
        name = "adapter" if spec.adapter is not None else "selection"
        more = "merge it first: its folder is a model" if name == "adapter" else "name the file as a request"
        raise UserError(f"{named(name)} and {named('requests')} exclude each other: {more}")
    model = find_model(spec.model)
    names = spec.request_names
    requests = []
    for number, name in enumerate(names, start=1):
        own = _spec_of(spec, name)
        check_dataset(own.task, own.forget_split)
        forget, retain = datasets_of(own, model.tokenizer)
        requests.append(Request(number, Path(name).stem, own, forget, retain))
    content = identity_of(requests[0].spec, model, requests[0].forget, requests[0].retain)
    for key in ("spec_hash", "plugins", "forget_sha256", "retain_sha256"):
        content.pop(key, None)
    content |= {
        "kind": SEVERAL_REQUESTS,
        "forget_split": spec.forget_split,
        "selection": None,
        "requests": spec.requests,
        "requests_sha256": [[r.name, r.forget.sha256, r.retain.sha256 if r.retain else None] for r in requests],
    }
    return spec, model, requests, with_spec_hash(content, (*NOT_HASHED, "requests"))


def _spec_of(spec: UnlearnSpec, name: str) -> UnlearnSpec:
    """The spec of one request.

    Raises:
        UserError: it is neither a split nor a file.
    """
    splits = () if is_data_file(spec.task) else find_task(spec.task)[0].splits
    if name in splits:
        return dataclasses.replace(spec, requests=None, forget_split=name)
    if Path(name).is_file():
        return dataclasses.replace(spec, requests=None, selection=name)
    if not splits:
        raise UserError(
            f"{named('requests')}: file {name!r} does not exist: expected a text file of sample ids, one a line"
        )
    raise unknown_name(f"request ({named('requests')}): no file of ids and no split", name, splits)


def _notes(requests: Sequence[Request]) -> list[str]:
    """What a reader must know: what one request forgets and a later one learns again."""
    notes = []
    for later in requests:
        kept = {(text.prompt, text.completion) for text in later.retain.texts} if later.retain else set()
        for earlier in requests[: later.number - 1]:
            again = sum((text.prompt, text.completion) in kept for text in earlier.forget.texts)
            if again:
                notes.append(
                    f"the retain set of request {later.number} ({later.name}) has {again} of the samples that request "
                    f"{earlier.number} ({earlier.name}) has forgotten"
                )
    return notes


# --- What the requests score --------------------------------------------------------------------------------


def _scored(
    spec: UnlearnSpec, model: ModelReference, requests: Sequence[Request], after: int, progress: bool
) -> list[dict[str, Any]]:
    """The rows after a request: of all requests so far, before the first one of all there are, and of what the last one
    keeps."""
    asked = {r.number: (r.name, r.forget) for r in requests if r.number <= (after or len(requests))}
    sets: dict[str, tuple[int | None, str, list[Record]]] = {}
    encoder = encoder_of(model)
    for number, (name, dataset) in asked.items():
        sets[f"request {number}"] = number, name, _usable(dataset, encoder, spec.evaluate_samples)
    if (retain := requests[-1].retain) is not None:
        sets["retain set"] = None, RETAIN, _usable(retain, encoder, spec.evaluate_samples)
    records = {name: own for name, (_, _, own) in sets.items()}
    columns = [(name, quantity) for name in records for quantity in MEASURED.values()]
    setup = MeasurementSetup(
        model.tokenizer, model.max_length, None, 0.2, spec.el_n, Embedder(), Classifier(""), spec.chosen_template()
    )
    samples, _ = encode(requests[0].forget.texts[:1], model.tokenizer, model.max_length)
    resources = Resources(spec.workers, spec.cpus_per_worker, spec.gpus_per_worker)
    title = f"after request {after}" if after else f"before the requests ({subject(spec.model, spec.task, None)})"
    with (
        resources.pool(ReplicaSpec(model.source, model.revision, spec.dtype)) as pool,
        Bar(title, tokens_to_read(columns, records, setup), "token", progress) as bar,
    ):
        end = answer_end(model.tokenizer, samples)
        reader = Reader(pool, end, resources.batch_tokens(), bar if progress else None, 4 * BATCH_TOKENS)
        measured = measure(columns, records, reader, setup)
    rows = []
    for name, (request, label, own) in sets.items():
        values = {
            column: scores.values
            if isinstance(scores := measured[name, quantity], Scores)
            else np.full(len(own), np.nan)
            for column, quantity in MEASURED.items()
        }
        fields = {"after": after, "request": request, "name": label, "samples": len(own)}
        for place, sample_id in enumerate([None, *(record["id"] for record in own)]):
            numbers = {c: v.mean() if sample_id is None else v[place - 1] for c, v in values.items()}
            known = {c: None if np.isnan(value) else float(value) for c, value in numbers.items()}
            rows.append(fields | {"sample_id": sample_id} | known)
    return rows


def _usable(dataset: Dataset, encoder: Any, most: int) -> list[Record]:
    """The records that the model can read, evenly spaced, each with the id of its text."""
    samples, _ = encoder.samples(dataset.text_set)
    fit = {sample.sample_id for sample in samples}
    both = zip(dataset.records, dataset.texts, strict=True)
    records = [{**record, "id": text.sample_id} for record, text in both if text.sample_id in fit]
    return list(evenly_spaced(records, most))


def _rows_so_far(out: Path) -> pa.Table:
    """The rows of an earlier start."""
    if not (out / TABLE).is_file():
        return SCHEMA.empty_table()
    return read_parquet(out / TABLE, "what `mrd-bench unlearn --requests` writes", SCHEMA)


def _has(rows: pa.Table, after: int) -> bool:
    return bool(pc.any(pc.equal(rows["after"], after)).as_py())


def _added(out: Path, rows: pa.Table, new: Sequence[Mapping[str, Any]]) -> pa.Table:
    table = pa.concat_tables([rows, pa.Table.from_pylist(list(new), SCHEMA)])
    with replacing(out / TABLE) as path:
        pq.write_table(table, path)
    return table


def _finish(out: Path, requests: Sequence[Request], identity: Mapping[str, Any]) -> None:
    """Put the model in place; run.json comes last and says that all is there."""
    unfinished = out / ".model.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(out / requests[-1].folder / "model", unfinished, copy_function=link)
    shutil.rmtree(out / "model", ignore_errors=True)
    unfinished.rename(out / "model")
    records = [read_run(out / request.folder).record for request in requests]
    record = {
        "spec": identity,
        "requests": [
            {
                "name": request.name,
                "folder": request.folder,
                "spec_hash": record["spec"]["spec_hash"],
                "updates": record["updates"],
            }
            for request, record in zip(requests, records, strict=True)
        ],
        "updates": sum(record["updates"] for record in records),
        "notes": _notes(requests),
        "rejected": [],  # each run has its own
        **origin(),
    }
    with replacing(out / RunFolder.RECORD) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
