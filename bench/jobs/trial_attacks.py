"""Attacks on the model that a trial ends with, in the process where it ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from bench.attacks import Attack, NoAttack
from bench.attacks.prompts import read_families
from bench.attacks.relearn import Relearn
from bench.files.identity import identity_fields
from bench.jobs.attack_spec import AttackSpec
from bench.jobs.probe import Questions, TaskProbe, measured_under, probe_of
from bench.metrics import ATTACKED, METRICS
from bench.metrics.table import Columns, metric_value
from bench.metrics.values import Measured, Missing, Scores
from bench.models.find import ModelReference
from bench.tasks.datasets import find_task, load_dataset
from scoring.progress import metered
from scoring.templates import TEMPLATE_FIELDS

# Settings that a trial decides itself.
OF_THE_TRIAL = ("model", "task", "split", "selection", "original", "retain_model", "prompts", "benign")
COMPLETENESS = f"{ATTACKED}completeness"


def attack_identity(spec: AttackSpec) -> dict[str, Any]:
    """What of the attacks is part of a trial's identity."""
    fields = identity_fields(spec, (*OF_THE_TRIAL, *TEMPLATE_FIELDS))
    benign = load_dataset(spec.benign).sha256 if spec.benign else None
    return fields | {"prompt_templates": read_families(spec.prompts), "benign_sha256": benign}


def attacked(
    spec: AttackSpec, model: ModelReference, trained: PreTrainedModel, device: str
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """What is known under each attack, sample by sample; and of the whole under the worst, for the trial's row.

    Args:
        spec: checked.
        model: whose tokenizer the trained model has.
        trained: left as it is.
        device: of it.
    """
    metrics = spec.metrics_of(find_task(spec.task)[0])
    questions = Questions(dataclasses.replace(spec.evaluation(), metrics=",".join(metrics)), model, spec.benign)
    probe = probe_of(questions, device)
    rows: list[dict[str, Any]] = []
    worst: dict[str, float] = {}
    with metered(None):
        for attack in (NoAttack(), *spec.chosen(spec.seed)):
            measured = measured_under(attack, trained, probe)
            if isinstance(measured, Missing):
                rows.append({"attack": attack.name, "missing": measured.reason})
                continue
            taught = _taught(attack, probe)
            for updates, columns in measured:
                for row in _by_sample(columns):
                    known = {"taught": row["sample_id"] in taught} if taught else {}
                    rows.append({"attack": attack.name, "updates": updates, **row, **known})
                for name in metrics:
                    value = metric_value(name, Measured(columns))
                    better = min if METRICS[name].higher_is_better else max
                    if np.isfinite(value):
                        worst[name] = better(value, worst.get(name, value))
    values = {f"{ATTACKED}{name}": value for name, value in worst.items()}
    if "rr" in worst:
        values[COMPLETENESS] = worst["rr"]
    return rows, values


def _taught(attack: Attack, probe: TaskProbe) -> set[str]:
    """The samples that an attack trains on."""
    if not isinstance(attack, Relearn) or attack.taught != "forget":
        return set()
    return {record["id"] for record in attack.records(probe.records("forget"))}


def _by_sample(columns: Columns) -> Iterator[dict[str, Any]]:
    """A row for each sample of the sets, with its quantities by name."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for (set_name, quantity), scores in columns.items():
        if isinstance(scores, Scores):
            for sample_id, value in zip(scores.ids, scores.values.tolist(), strict=True):
                row = rows.setdefault((set_name, sample_id), {"set": set_name, "sample_id": sample_id})
                row[quantity] = value
    yield from rows.values()
