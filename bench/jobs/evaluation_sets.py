"""The sets of records that the metrics of an evaluation speak of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from bench.jobs.evaluation_spec import EvaluateSpec
from bench.metrics import METRICS
from bench.metrics.harness import HARNESS
from bench.metrics.table import MODEL
from bench.metrics.values import Missing
from bench.models.find import ModelReference
from bench.tasks import Record, Task
from bench.tasks.selections import read_ids
from bench.tasks.task import Unreachable
from bench.tasks.token_hash import TokenHash
from scoring.errors import UserError, unknown_name
from scoring.records import as_text, check_ids, pair_text, question_answer
from scoring.samples import NO_LIMIT, Rejected, Sample, Text, answer_end, encode, evenly_spaced, iter_encoded
from scoring.settings import named
from scoring.templates import Template

Sets = Mapping[str, list[Record] | Missing]


def sets_of(
    spec: EvaluateSpec,
    task: Task,
    source: str | None,
    models: Mapping[str, ModelReference],
    metrics: Sequence[str],
) -> tuple[Sets, dict[str, list[Rejected]]]:
    """The records of every set that the metrics speak of, each with an "id", and those that no model can take.

    Raises:
        UserError: a set that is there is at fault, or has no record.
    """
    split = spec.split or task.default_split
    if split not in task.retain_of:
        raise unknown_name(f"forget split of task {task.name!r}", split, task.retain_of)
    splits = dict(task.evaluation(split))
    if spec.mia_negatives in splits:
        splits["negatives"] = splits[spec.mia_negatives]
    needed = {name for metric in metrics for name, quantity in METRICS[metric].columns if quantity not in HARNESS}
    sets: dict[str, list[Record] | Missing] = {}
    rejected: dict[str, list[Rejected]] = {}
    for name in sorted(needed):
        if name not in splits:
            # By the split's name, so that nobody wonders what the negatives are.
            absent = spec.mia_negatives if name == "negatives" else name
            sets[name] = Missing(f"task {task.name!r} has no {absent} set")
            continue
        try:
            records = task.load(splits[name], source, models[MODEL].tokenizer)
        except Unreachable as error:
            sets[name] = Missing(str(error))
            continue
        if not records:
            raise UserError(
                f"{spec.task}, split {splits[name]!r}: the {name} set is empty; expected at least one record"
            )
        records = with_ids(records)
        check_ids(f"{spec.task}, split {splits[name]!r}", [record["id"] for record in records])
        if name == "forget" and spec.selection is not None:
            records = _selected(records, spec.selection, f"{spec.task}, split {splits[name]!r}")
        else:
            records = evenly_spaced(records, spec.samples)
        sets[name], rejected[name] = _fitting(name, records, models, spec.chosen_template())
    return sets, rejected


def with_ids(records: Sequence[Record]) -> list[Record]:
    """The records, those without an "id" with their place as one."""
    return [{**record, "id": str(record.get("id", place))} for place, record in enumerate(records)]


def _selected(records: Sequence[Record], selection: str, where: str) -> list[Record]:
    """Those whose id is in a file, in the order of the data."""
    known = {record["id"] for record in records}
    chosen = read_ids(selection)
    if unknown := next((name for name in chosen if name not in known), None):
        raise UserError(f"{named('selection')} {selection!r}: {unknown_name(f'sample of {where}', unknown, known)}")
    return [record for record in records if record["id"] in set(chosen)]


def _fitting(
    name: str, records: Sequence[Record], models: Mapping[str, ModelReference], template: Template | None
) -> tuple[list[Record], list[Rejected]]:
    """The records whose texts fit into the context of every model, whichever metric reads them; and the others."""
    tokenizer, context = models[MODEL].tokenizer, min(model.max_length for model in models.values())
    texts = [_texts(name, number, record, template) for number, record in enumerate(records, start=1)]
    encoded = iter_encoded((text for of_record in texts for text in of_record), tokenizer, context)
    fit, unfit = [], []
    for record, of_record in zip(records, texts, strict=True):
        reasons = [result.reason for result in islice(encoded, len(of_record)) if isinstance(result, Rejected)]
        if reasons:
            unfit.append(Rejected(record["id"], reasons[0]))
        else:
            fit.append(record)
    if not fit:
        raise UserError(f"{name} set: none of {len(records)} records can be used; the first: {unfit[0].reason}")
    return fit, unfit


def first_samples(
    name: str, records: Sequence[Record], model: ModelReference, template: Template | None
) -> list[Sample]:
    """Each record's question with its answer, or its prompt, as the model reads it."""
    texts = [_texts(name, number, record, template)[0] for number, record in enumerate(records, start=1)]
    return encode(texts, model.tokenizer, model.max_length)[0]


def end_of_answers(sets: Sets, tokenizer: Any, template: Template | None) -> int | None:
    """The token that ends a written answer, see `scoring.samples.answer_end`: that of the template, or of the sets'
    own records, which may be conversations."""
    if template is None:
        firsts = [records[0] for records in sets.values() if not isinstance(records, Missing) and records]
        texts = [text for record in firsts for text in _texts("evaluation", 1, record, None)[:1] if not text.is_plain]
    else:
        texts = [pair_text("", "a", "a", template)]
    samples, _ = encode(texts, tokenizer, NO_LIMIT)
    return answer_end(tokenizer, samples)


def sets_sha256(sets: Sets) -> dict[str, str | None]:
    """The hash of the records of each set; None of one that is missing."""
    return {
        name: None if isinstance(records, Missing) else hashlib.sha256(json.dumps(records).encode()).hexdigest()
        for name, records in sets.items()
    }


def tokens_sha256(sets: Sets, tokenizer: Any, template: Template | None) -> str | None:
    """The hash of the tokens of all sets; None if they are those that the records' words always had."""
    texts = (
        text
        for name, records in sets.items()
        if not isinstance(records, Missing)
        for number, record in enumerate(records, start=1)
        for text in _texts(name, number, record, template)
    )
    return TokenHash(tokenizer).of_all_changed(texts)


def _texts(name: str, number: int, record: Record, template: Template | None) -> list[Text]:
    """Every pair of a question and an answer that a metric may put to a model."""
    if "prompt" in record and "completion" not in record:
        return [pair_text(record["id"], record["prompt"], ".", template)]
    texts = [as_text(name, number, record, template)]
    if "question" in record:
        questions = [record[key] for key in ("question", "paraphrased_question") if record.get(key)]
        answers = [record[key] for key in ("answer", "paraphrased_answer") if record.get(key)]
        answers += record.get("perturbed_answer") or []
        texts += [pair_text(record["id"], *question_answer(q, a), template) for q in questions for a in answers]
    return texts
