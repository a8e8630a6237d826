"""The real number of updates until samples are forgotten: what forecasts are held against.

    records -> samples -> alone: each unlearnt by itself; together: runs over all, a seed each -> one Parquet file

The same command finds the parts of a killed run and goes on; the output file appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa

from algorithms.truth import AloneTask, ExtractionTask, Rule, TogetherTask
from bench.files.identity import identity_fields, with_spec_hash
from bench.files.origin import Origin, origin
from bench.files.parts import ColumnParts, finished_output
from bench.files.score_file import write_scores
from bench.jobs.difficulty import OnModel
from bench.jobs.preview import Preview, SetSize, state_of
from bench.jobs.read_samples import read_samples
from bench.jobs.resources import Resources
from bench.models.find import ModelReference, find_model
from bench.tasks.datasets import Texts, check_dataset, open_texts, subject
from scoring.api import run_tasks
from scoring.errors import RefusedUnderWay, UserError
from scoring.measuring import AVERAGE, MA_COLUMN, NOT_FINITE, MemorizationTask, average_of, joined, threshold_name
from scoring.reading import check_columns
from scoring.sample_file import Batches
from scoring.samples import Batch, Rejected, answer_end, nothing_scored
from scoring.settings import Doc, Ge, Gt, Le, check, named
from scoring.templates import TEMPLATE_FIELDS
from scoring.updates import UpdateSettings
from scoring.work import ReplicaSpec, ReplicaTask

SCHEMA_VERSION = 1
NOT_HASHED = ("model", "data", "split", *TEMPLATE_FIELDS)
PAPER: Literal["paper"] = "paper"
EL: Literal["el"] = "el"


@dataclass(frozen=True, kw_only=True)
class TruthSpec(UpdateSettings, OnModel):
    """Of which samples it is found out how many updates they take. Its hash is the run's identity."""

    until: Annotated[
        list[Annotated[float, Gt(0), Le(1)] | Literal["average", "paper", "el"]],
        Doc(
            "rules, with commas; a number: MA is below it; average: MA is below that of all samples under the initial "
            "model; el: EL is; paper: both are"
        ),
    ] = field(default_factory=lambda: [PAPER, AVERAGE, 0.9, 0.75, 0.5])
    most_updates: Annotated[int, Ge(1), Doc("after so many a sample is given up, and a run together ends")] = 200
    el_n: Annotated[int, Ge(1), Doc("tokens in an n-gram of extraction likelihood")] = 10
    together: Annotated[
        bool, Doc("forget all samples together, in a run for each seed; rules are then of MA alone")
    ] = False
    batch_size: Annotated[
        int, Ge(1), Doc("samples of an update, drawn uniformly, where they are forgotten together")
    ] = 4
    seeds: Annotated[list[Annotated[int, Ge(0)]], Doc("of runs together")] = field(default_factory=lambda: [0, 1, 2])

    def checked(self) -> Self:
        """The same with absolute paths, each rule and seed once.

        Raises:
            UserError: a value that cannot be, or a combination that does not exist.
        """
        check(self)
        self.loss()
        self.chosen_template()
        for name in ("until", "seeds"):
            if not getattr(self, name):
                raise UserError(f"{named(name)} is empty: expected at least one")
        if self.together and (of_el := [rule for rule in self.until if rule in (PAPER, EL)]):
            raise UserError(
                f"{named('until')} has {of_el[0]}: EL of all samples after every update would cost more than the "
                f"training; with {named('together')} expected average, or numbers"
            )
        if self.dtype != "float32" and self.dtype != "float64":
            raise UserError(f"{named('dtype')} is {self.dtype}: updates need float32 or float64")
        once = {"until": list(dict.fromkeys(self.until)), "seeds": list(dict.fromkeys(self.seeds))}
        return dataclasses.replace(self, **(self.located() | once))

    @property
    def update(self) -> UpdateSettings:
        return UpdateSettings.of(self)


@dataclass(frozen=True)
class TruthResult:
    """What a run gives back.

    Attributes:
        path: the Parquet file.
        table: a row a sample, or a row a sample and seed: sample_id, num_tokens, ma (and el, where a rule needs it)
            under the initial model, and for each rule NAME updates@NAME, inf where it was not met; alone also
            mean_abs_delta@NAME and delta_norm@NAME, nan there. A sample that is forgotten before any update has 0.
        rejected: samples that could not be scored.
        record: the thresholds as numbers, and what the replicas noticed.
        seconds: without loading; 0 if the file was there already.
    """

    path: Path
    table: pa.Table
    rejected: list[Rejected]
    record: dict[str, Any]
    seconds: float


class _Record(Origin):
    rejected: list[dict[str, str]]
    rules: dict[str, dict[str, Any]]


_COLUMNS = pa.schema(
    [pa.field("sample_id", pa.string(), nullable=False), pa.field("num_tokens", pa.int64(), nullable=False)]
)


def truth(
    spec: TruthSpec,
    out: str | Path,
    resources: Resources | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> TruthResult:
    """Find out how many updates samples take and write `out`.

    Args:
        resources: how many replicas share the work; with 0 it is done in this process.
        overwrite: replace `out` if it exists.
        progress: show a bar.

    Raises:
        UserError: one line; nothing is half-written.
    """
    resources = (resources or Resources()).checked()
    spec, out, model, texts, identity = _ready(spec, out, resources)
    if finished := _finished(spec, out, identity, overwrite):
        table, record = finished
        return TruthResult(out, table, [Rejected(**r) for r in record["rejected"]], record, 0.0)
    samples, rejected = read_samples(texts, model, spec.tokens, spec.samples)
    with ColumnParts(out, identity) as parts:
        started = time.perf_counter()
        with resources.pool(ReplicaSpec(model.source, model.revision, spec.dtype)) as pool:
            batch_tokens = spec.batch_tokens or parts.number("batch_tokens", resources.batch_tokens)
            batches = samples.batches(batch_tokens)

            def run(tasks: Sequence[ReplicaTask], shards: Sequence[Sequence[Batch]], title: str) -> list[Any]:
                on = subject(spec.model, spec.data, spec.split)
                run_tasks(pool, tasks, shards, parts, f"{title} ({on})" if progress else None)
                return [parts.result(task) for task in tasks]

            def in_rows(results: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
                return joined(results, len(samples), samples.rows_of)

            eos = answer_end(model.tokenizer, [samples[row] for row in range(len(samples))])
            initial = in_rows(
                run([MemorizationTask(n) for n in range(len(batches))], _by_batch(batches), "measuring MA")
            )
            if any(rule in (PAPER, EL) for rule in spec.until):
                tasks = [ExtractionTask(n, spec.el_n, eos) for n in range(len(batches))]
                initial |= in_rows(run(tasks, _by_batch(batches), "measuring EL"))
                initial["el"][np.isnan(initial[MA_COLUMN])] = np.nan
            sound = ~np.isnan(initial[MA_COLUMN])
            unsound = [Rejected(samples[row].sample_id, NOT_FINITE) for row in np.flatnonzero(~sound)]
            rejected += unsound
            if not sound.any():
                raise RefusedUnderWay(str(nothing_scored(texts.name, rejected)))
            if unsound and spec.together:
                raise RefusedUnderWay(
                    f"sample {unsound[0].sample_id!r}: {NOT_FINITE}, and an update on it would spoil the model for "
                    "all: leave it out"
                )
            rules = _rules(spec, initial)
            found: dict[int | None, dict[str, np.ndarray]]
            if spec.together:
                thresholds = {name: rule.ma for name, rule in rules.items() if rule.ma is not None}
                together = [
                    TogetherTask(0, seed, spec.loss(), spec.update, thresholds, spec.most_updates, spec.batch_size)
                    for seed in spec.seeds
                ]
                results = run(together, [batches], "forgetting together")
                found = {seed: in_rows([result]) for seed, result in zip(spec.seeds, results, strict=True)}
            else:
                alone = _alone(batches)
                one_by_one = [
                    AloneTask(n, spec.loss(), spec.update, rules, spec.most_updates, spec.el_n, eos)
                    for n in range(len(alone))
                ]
                found = {None: in_rows(run(one_by_one, alone, "forgetting one by one"))}
        seconds = time.perf_counter() - started
        tables = []
        for seed, columns in found.items():
            of_run = {} if seed is None else {"seed": np.full(len(samples), seed)}
            base = {"sample_id": samples.sample_ids, "num_tokens": samples.num_scored}
            tables.append(pa.table(base | of_run | initial | columns))
        table = pa.concat_tables(tables)
        if unsound:
            table = table.filter(pa.array(sound))
        record = dataclasses.asdict(parts.all_facts()) | {
            "rejected": [dataclasses.asdict(r) for r in rejected],
            "rules": {name: dataclasses.asdict(rule) for name, rule in rules.items()},
            "seconds": seconds,
            **origin(),
        }
        write_scores(table, out, identity, record)
        parts.remove()
    return TruthResult(out, table, rejected, record, seconds)


def preview_truth(
    spec: TruthSpec, out: str | Path, resources: Resources | None = None, overwrite: bool = False
) -> Preview:
    """What `truth` would do with the same arguments; nothing is written.

    Raises:
        UserError: what `truth` would refuse before it computes.
    """
    resources = (resources or Resources()).checked()
    spec, out, model, texts, identity = _ready(spec, out, resources)
    finished = _finished(spec, out, identity, overwrite)
    samples, rejected = read_samples(texts, model, spec.tokens, spec.samples)
    state = state_of(ColumnParts(out, identity), finished is not None)
    sets = (SetSize.of("samples", samples, len(rejected)),)
    return Preview(spec, identity, state, model, sets, resources=resources)


def _ready(
    spec: TruthSpec, out: str | Path, resources: Resources
) -> tuple[TruthSpec, Path, ModelReference, Texts, dict[str, Any]]:
    """The spec, checked, with its output, model, texts and identity."""
    if resources.engine == "vllm":
        raise UserError(f"{named('engine')} vllm does not train: use {named('engine')} transformers")
    spec = spec.checked()
    check_dataset(spec.data, spec.split)
    model = find_model(spec.model)
    texts = open_texts(spec.data, spec.split, model.tokenizer, spec.chosen_template())
    hashes = {"data_sha256": texts.checked_sha256(), "model_fingerprint": model.fingerprint}
    identity = with_spec_hash(
        identity_fields(spec) | {"schema_version": SCHEMA_VERSION, "truth": True} | hashes, NOT_HASHED
    )
    return spec, Path(out).absolute(), model, texts, identity


def _finished(
    spec: TruthSpec, out: Path, identity: dict[str, Any], overwrite: bool
) -> tuple[pa.Table, dict[str, Any]] | None:
    """The table and the record, where they are there already; see `finished_output`."""
    finished = finished_output(out, identity, "a truth file", "updates", spec, overwrite, _Record, _COLUMNS)
    if finished:
        numbers = pa.schema([(f"updates@{name}", pa.float64()) for name in finished[1]["rules"]])
        check_columns(finished[0], numbers, str(out), "a number for each rule")
    return finished


def _by_batch(batches: Batches) -> list[Sequence[Batch]]:
    return [batches[number : number + 1] for number in range(len(batches))]


def _alone(batches: Batches) -> list[Sequence[Batch]]:
    """Every sample as a shard of its own: they take very different numbers of updates."""
    return [[batch.rows(row, row + 1)] for batch in batches for row in range(len(batch))]


def _rules(spec: TruthSpec, initial: Mapping[str, np.ndarray]) -> dict[str, Rule]:
    """The rules by name, with the averages over all samples under the initial model.

    Raises:
        RefusedUnderWay: EL is asked for and no sample has one.
    """
    average_ma = average_of(initial[MA_COLUMN])
    average_el = None
    if "el" in initial:
        if not np.isfinite(initial["el"]).any():
            raise RefusedUnderWay(
                f"{named('until')} asks for EL, which is not defined for any sample: all have at most "
                f"{named('el_n')} = {spec.el_n} tokens"
            )
        average_el = average_of(initial["el"])
    special = {PAPER: Rule(average_ma, average_el), EL: Rule(None, average_el), AVERAGE: Rule(average_ma)}
    return {threshold_name(rule): special[rule] if isinstance(rule, str) else Rule(float(rule)) for rule in spec.until}


def print_truth(result: TruthResult) -> None:
    """How many updates the samples took, rule by rule."""
    table, record = result.table, result.record
    print(f"{table.num_rows} rows in {result.seconds:.1f} s, {len(result.rejected)} rejected -> {result.path}")
    print(
        f"{'rule':<12}{'MA below':>10}{'EL below':>10}{'median':>9}{'10 %':>9}{'90 %':>9}{'at start':>10}{'never':>8}"
    )
    for name, rule in record["rules"].items():
        updates = table[f"updates@{name}"].to_numpy()
        low, middle, high = np.quantile(updates, [0.1, 0.5, 0.9], method="nearest")
        limits = "".join(f"{'-' if rule[key] is None else format(rule[key], '.4g'):>10}" for key in ("ma", "el"))
        counts = f"{int(np.sum(updates == 0)):>10}{int(np.sum(np.isinf(updates))):>8}"
        print(f"{name:<12}{limits}{middle:>9.4g}{low:>9.4g}{high:>9.4g}{counts}")
    for rejected in result.rejected:
        print(f"rejected {rejected.sample_id!r}: {rejected.reason}")
