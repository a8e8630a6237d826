"""Attacks on a model that has forgotten, beside the original and the one that never knew.

    spec -> models, attacks -> columns of per-sample values under each attack, model by model -> one Parquet file

Each attack is a task for a replica, which afterwards has its weights back. The models meet the same attacks, so that
differences between them are paired: an attack that "recovers" from a model what it never knew measures the attack.
Finished attacks are kept next to the output file: the same command continues what was stopped.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bench.attacks import Attack, NoAttack
from bench.attacks.prompts import read_families
from bench.attacks.relearn import Relearn
from bench.files.identity import identity_fields, with_spec_hash
from bench.files.origin import Origin, origin
from bench.files.parts import Parts, finished_output
from bench.files.score_file import write_scores
from bench.jobs.attack_spec import AttackSpec
from bench.jobs.attack_table import SCHEMA, Met, attack_table
from bench.jobs.evaluate import classifiers, harness_rule, models_of
from bench.jobs.evaluation_sets import Sets, first_samples, sets_of, sets_sha256, tokens_sha256
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.preview import Preview, SetSize, state_of
from bench.jobs.probe import AttackTask, Measured, Questions
from bench.jobs.resources import Resources
from bench.metrics import METRICS
from bench.metrics.quantities import asked_of_a_model
from bench.metrics.table import MODEL, columns_in, sample_rows
from bench.metrics.values import Missing
from bench.models.find import ModelReference
from bench.tasks.datasets import find_task, load_dataset, subject
from scoring.errors import UserError
from scoring.files import work_folder
from scoring.progress import Bar
from scoring.settings import build, named
from scoring.templates import TEMPLATE_FIELDS
from scoring.work import ReplicaSpec

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class AttackResult:
    """What attacks give back.

    Attributes:
        path: the Parquet file; None if none was to be written.
        table: its contents, see `bench.jobs.attack_table`.
        record: facts that a reader must know: spec, seconds, packages.
    """

    path: Path | None
    table: pa.Table
    record: dict[str, Any]

    def rows(self, level: str) -> pd.DataFrame:
        """The rows of a level, see `bench.jobs.attack_table`."""
        table = self.table.filter(pc.equal(self.table["level"], level))
        return table.select([name for name in table.column_names if name != "level"]).to_pandas()


class _Record(Origin):
    seconds: float


def attack(
    model: str | Path,
    task: str,
    *,
    out: str | Path | None = None,
    resources: Resources | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **settings: Any,
) -> AttackResult:
    """Attack a model that has forgotten, beside the original and the retain-only model.

    Args:
        model: the model that has forgotten: an embedded one, a folder, or a Hugging Face id.
        task: its name, `NAME:SOURCE`, or a task file.
        out: the Parquet file to write; the same call continues what was stopped. None writes nothing.
        resources: how many replicas share the attacks; with 0 they are made in this process.
        overwrite: replace `out` if it exists.
        progress: show a bar.
        settings: further fields of `AttackSpec`, such as `retain_model=...` or `attacks=["quantise", "relearn"]`.

    Raises:
        UserError: one line; what an earlier start of the same attacks has measured is kept.
    """
    spec = build(AttackSpec, {"model": model, "task": task, **settings})
    if out is not None:
        return attack_spec(spec, out, resources, overwrite, progress)
    with work_folder() as folder:
        result = attack_spec(spec, folder / "attacks.parquet", resources, False, progress)
    return AttackResult(None, result.table, result.record)


def attack_spec(
    spec: AttackSpec,
    out: str | Path,
    resources: Resources | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> AttackResult:
    """The same from a spec.

    Raises:
        UserError: one line; what an earlier start of the same attacks has measured is kept.
    """
    resources = (resources or Resources()).checked()
    ready = _Ready.of(spec, out, resources)
    spec, out, models, attacks, sets, metrics = (
        *(ready.spec, ready.out, ready.models, ready.attacks, ready.sets, ready.metrics),
    )
    identity = ready.identity
    if finished := ready.finished(overwrite):
        return AttackResult(out, finished[0], {"spec": identity} | finished[1])
    started = time.perf_counter()
    # What does not fit into the context of one of them is put to none.
    first = dataclasses.replace(models[MODEL], max_length=min(model.max_length for model in models.values()))
    questions = Questions(_asking(spec, metrics), first, spec.benign)
    with Parts(out, identity) as parts:
        # A model that is the same as another is not attacked twice.
        first_of = {model.fingerprint: role for role, model in reversed(models.items())}
        todo = {
            role: [place for place in range(len(attacks)) if not parts.has(_key(role, place))]
            for role in first_of.values()
        }
        total = sum(attacks[place].cost for places in todo.values() for place in places)
        count = len(attacks) * len(first_of)
        if progress and (left := sum(map(len, todo.values()))) < count:
            print(f"continuing: {count - left} of {count} attacks are made", file=sys.stderr)
        with (
            resources.pool(ReplicaSpec(first.source, first.revision, spec.dtype)) as pool,
            Bar(f"attacking ({subject(spec.model, spec.task, spec.split)})", total, "probe", progress) as bar,
        ):
            for role, places in todo.items():
                if not places:
                    continue
                model = models[role]
                pool.exchange(resources.replica(model.source, model.revision, spec.dtype))
                tasks = [AttackTask(shard, attacks[place], questions) for shard, place in enumerate(places)]
                bar.begin({each.key: each.attack.cost for each in tasks})
                bar.say(f"{role}: {', '.join(dict.fromkeys(each.attack.family for each in tasks))}")
                for each, measured, _ in pool.run(tasks, [[] for _ in tasks]):
                    _keep(parts, _key(role, places[each.shard]), measured)
                    bar.finish(each.key)
        met = {
            role: [
                Met(one, _kept(parts, _key(first_of[model.fingerprint], place)), _untaught(one, sets))
                for place, one in enumerate(attacks)
            ]
            for role, model in models.items()
        }
        table = attack_table(metrics, met, spec.seed)
        record = {
            "metrics": list(metrics),
            "seconds": time.perf_counter() - started,
            **origin("sentence-transformers"),
        }
        write_scores(table, out, identity, record)
        parts.remove()
    return AttackResult(out, table, {"spec": identity} | record)


def preview_attack(
    spec: AttackSpec, out: str | Path, resources: Resources | None = None, overwrite: bool = False
) -> Preview:
    """What `attack_spec` would do with the same arguments; nothing is written.

    Raises:
        UserError: what it would refuse before it computes.
    """
    resources = (resources or Resources()).checked()
    ready = _Ready.of(spec, out, resources)
    state = state_of(Parts(ready.out, ready.identity), ready.finished(overwrite) is not None)
    model, template = ready.models[MODEL], ready.spec.chosen_template()
    sizes = [
        SetSize.of(name, first_samples(name, records, model, template))
        for name, records in ready.sets.items()
        if not isinstance(records, Missing)
    ]
    columns = {column for metric in ready.metrics for column in METRICS[metric].columns}
    texts, answers = asked_of_a_model(columns, ready.sets)
    probes = math.ceil(sum(one.cost for one in ready.attacks))
    counts = {
        "models": len({one.fingerprint for one in ready.models.values()}),
        "attacks": len(ready.attacks) - 1,
        "probes of each model": probes,
        "texts read by each model": texts * probes,
        "answers written by each model": answers * probes,
    }
    return Preview(ready.spec, ready.identity, state, model, tuple(sizes), counts, resources)


@dataclass(frozen=True)
class _Ready:
    """A checked spec with all that it names."""

    spec: AttackSpec
    out: Path
    metrics: tuple[str, ...]
    models: dict[str, ModelReference]
    attacks: list[Attack]
    sets: Sets
    identity: dict[str, Any]

    @classmethod
    def of(cls, spec: AttackSpec, out: str | Path, resources: Resources) -> _Ready:
        if resources.engine != "transformers":
            raise UserError(
                f"{named('engine')} is {resources.engine}: attacks change weights and train; expected transformers"
            )
        spec = spec.checked()
        task, source = find_task(spec.task)
        metrics = spec.metrics_of(task)
        models = models_of(spec.evaluation(), {})
        sets, _ = sets_of(spec.evaluation(), task, source, models, metrics)
        missing = [records.reason for records in sets.values() if isinstance(records, Missing)]
        if sets and len(missing) == len(sets):
            raise UserError(missing[0])
        identity = _identity(spec, models, sets)
        attacks = [NoAttack(), *spec.chosen(spec.seed)]
        return cls(spec, Path(out).absolute(), metrics, models, attacks, sets, identity)

    def finished(self, overwrite: bool) -> tuple[pa.Table, dict[str, Any]] | None:
        """The table and the record, where they are there already; see `finished_output`."""
        return finished_output(self.out, self.identity, "of attacks", "attacks", self.spec, overwrite, _Record, SCHEMA)


def _asking(spec: AttackSpec, metrics: tuple[str, ...]) -> EvaluateSpec:
    """The evaluation that is made under every attack: of the metrics that are attacked, and of one model."""
    return dataclasses.replace(spec.evaluation(), metrics=",".join(metrics), original=None, retain_model=None)


def _untaught(one: Attack, sets: Sets) -> tuple[str, ...]:
    """The samples that an attack does not train on, where it trains on some of the forget set; none where it trains on
    all or on nothing of it."""
    records = sets.get("forget")
    if not isinstance(one, Relearn) or one.taught != "forget" or one.share >= 1 or not isinstance(records, list):
        return ()
    taught = {record["id"] for record in one.records(records)}
    return tuple(record["id"] for record in records if record["id"] not in taught)


# --- Pieces -------------------------------------------------------------------------------------------------


def _key(role: str, place: int) -> str:
    return f"{role}-{place:04d}"


UPDATES = pa.field("updates", pa.int64())


def _keep(parts: Parts, key: str, measured: Measured | Missing) -> None:
    if isinstance(measured, Missing):
        parts.write(
            key, sample_rows({}).append_column(UPDATES, pa.array([], pa.int64())), {"unmeasured": measured.reason}
        )
        return
    tables, missing = [], []
    for updates, columns in measured:
        rows = sample_rows(columns)
        tables.append(rows.append_column(UPDATES, pa.array([updates] * rows.num_rows, pa.int64())))
        missing += [[updates, *column, c.reason] for column, c in columns.items() if isinstance(c, Missing)]
    points = [updates for updates, _ in measured]
    parts.write(key, pa.concat_tables(tables), {"unmeasured": None, "missing": missing, "points": points})


def _kept(parts: Parts, key: str) -> Measured | Missing:
    table, facts = parts.read(key)
    if facts["unmeasured"] is not None:
        return Missing(facts["unmeasured"])
    at = np.array([-1 if updates is None else updates for updates in table["updates"].to_pylist()], dtype=np.int64)
    measured: Measured = []
    for updates in facts["points"]:
        columns = columns_in(table.filter(pa.array(at == (-1 if updates is None else updates))))
        columns |= {(s, q): Missing(reason) for u, s, q, reason in facts["missing"] if u == updates}
        measured.append((updates, columns))
    return measured


# --- Identity -----------------------------------------------------------------------------------------------


def _identity(spec: AttackSpec, models: Mapping[str, ModelReference], sets: Sets) -> dict[str, Any]:
    """The spec, with hashes of models and data in place of their names, and the hash of all that."""
    evaluation = spec.evaluation()
    content = identity_fields(spec) | {
        "kind": "attack",
        "schema_version": SCHEMA_VERSION,
        "fingerprints": {role: model.fingerprint for role, model in models.items()},
        "sets_sha256": sets_sha256(sets),
        # Read here, so that a file at fault is refused before anything is measured.
        "benign_sha256": load_dataset(spec.benign).sha256 if spec.benign else None,
        "prompt_templates": read_families(spec.prompts),
        **classifiers(evaluation),
    }
    template = spec.chosen_template()
    content["tokens_sha256"] = tokens_sha256(sets, models[MODEL].tokenizer, template)
    content |= harness_rule(spec.metrics_of(find_task(spec.task)[0]), models[MODEL], template)
    not_hashed = ("model", "original", "retain_model", "task", "selection", "benign", "prompts", *TEMPLATE_FIELDS)
    return with_spec_hash(content, not_hashed)
