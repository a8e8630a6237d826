"""Data sets without some of their records: what a retain-only model learns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from bench.tasks.datasets import Dataset, find_task, is_data_file, load_dataset
from bench.tasks.selections import read_ids
from bench.tasks.sources import SUFFIXES
from scoring.errors import UserError, unknown_name
from scoring.reading import exists
from scoring.records import check_ids
from scoring.samples import Text
from scoring.settings import named
from scoring.templates import Template

EVERYTHING = "full"  # the split of a task that has all that its original model has learnt


def splits_taught(source: str) -> list[str]:
    """The splits that make up all that the original model of a task learns: `full`, or else the task's own forget
    split and the retain split that goes with it.

    Raises:
        UserError: there is no such task.
    """
    task, _ = find_task(source)
    if EVERYTHING in task.splits:
        return [EVERYTHING]
    return [task.default_split, *([task.retain_of[task.default_split]] if task.default_split in task.retain_of else [])]


def joined_splits(source: str, splits: Sequence[str], tokenizer: Any, template: Template | None) -> Dataset:
    """Splits of a task one after the other as one data set; without splits a data file.

    Raises:
        UserError: there is no such split or file, a record is at fault, or an id occurs in two splits.
    """
    if not splits:
        return load_dataset(source, None, tokenizer, template)
    parts = [load_dataset(source, split, tokenizer, template) for split in splits]
    if len(parts) == 1:
        return parts[0]
    name = f"{parts[0].name}+{'+'.join(splits[1:])}"
    texts = [text for part in parts for text in part.texts]
    check_ids(name, [text.sample_id for text in texts])
    return Dataset(name, texts, [record for part in parts for record in part.records], tokenizer)


def without(
    dataset: Dataset, left_out: str, source: str, tokenizer: Any, template: Template | None, setting: str
) -> tuple[Dataset, Dataset]:
    """A data set without some of its records, and these.

    Args:
        left_out: a split of the task, a data file, or a text file of sample ids, one a line; several with commas. The
            records of splits and data files are found by what is read of them, prompt and answer: their ids may be
            others. One that occurs several times is left out each time.
        source: the task or data file of the data set.
        setting: that names what is left out, for messages.

    Raises:
        UserError: a record or an id is not in the data set, or nothing would remain.
    """
    parts = parts_of(left_out)
    places = set().union(*(_places(dataset, part, source, tokenizer, template, setting) for part in parts))
    if len(places) == len(dataset.texts):
        raise UserError(
            f"{named(setting)} {left_out!r} leaves out all {len(places)} records of {dataset.name}: nothing is left to "
            "learn"
        )
    rest = [place for place in range(len(dataset.texts)) if place not in places]
    stems = "+".join(Path(part).stem for part in parts)
    name = f"{dataset.name} without {stems}"
    return _part(dataset, rest, name), _part(dataset, sorted(places), f"{stems} in {dataset.name}")


def parts_of(left_out: str) -> list[str]:
    """The splits and files that are left out; a file may have commas in its name."""
    return [left_out] if exists(left_out) else [part.strip() for part in left_out.split(",")]


def _places(
    dataset: Dataset, left_out: str, source: str, tokenizer: Any, template: Template | None, setting: str
) -> set[int]:
    """Where in a data set the records of one split or file are."""
    where = f"{named(setting)} {left_out!r}"
    task = None if is_data_file(source) else find_task(source)[0]
    if task is not None and left_out in task.splits:
        return _of_texts(dataset, load_dataset(source, left_out, tokenizer, template), where)
    if left_out.endswith(SUFFIXES):
        return _of_texts(dataset, load_dataset(left_out, None, tokenizer, template), where)
    if is_data_file(left_out):
        return _of_ids(dataset, read_ids(left_out, setting), where)
    if task is not None:
        raise UserError(f"{where}: {unknown_name(f'split of task {task.name!r}', left_out, task.splits)}")
    raise UserError(f"{where}: a data file has no splits; expected a data file, or a text file of sample ids")


def _of_ids(dataset: Dataset, ids: Sequence[str], where: str) -> set[int]:
    if not ids:
        raise UserError(f"{where} names no sample; expected ids of {dataset.name}, one a line")
    place_of = {text.sample_id: place for place, text in enumerate(dataset.texts)}
    for sample_id in ids:
        if sample_id not in place_of:
            raise UserError(f"{where}: {unknown_name(f'sample of {dataset.name}', sample_id, place_of)}")
    return {place_of[sample_id] for sample_id in ids}


def _of_texts(dataset: Dataset, other: Dataset, where: str) -> set[int]:
    places: dict[str, list[int]] = {}
    for place, text in enumerate(dataset.texts):
        places.setdefault(_read(text), []).append(place)
    missing = [text.sample_id for text in other.texts if _read(text) not in places]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of its {len(other.texts)} records are not in {dataset.name}, the first is "
            f"{missing[0]!r}: a record is found by its prompt and answer, letter by letter; expected the data that the "
            "forget set was taken from"
        )
    return {place for text in other.texts for place in places[_read(text)]}


def _read(text: Text) -> str:
    """All that a model reads of a text."""
    return json.dumps([text.prompt, text.completion, text.messages])


def _part(dataset: Dataset, places: Collection[int], name: str) -> Dataset:
    return dataclasses.replace(
        dataset,
        name=name,
        texts=[dataset.texts[place] for place in places],
        records=[dataset.records[place] for place in places],
    )
