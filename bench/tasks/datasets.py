"""Reading data sets: a task by name, a task file, or a JSON Lines or Parquet file."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bench.tasks import TASKS, Record, Task, custom, rwku
from bench.tasks.sources import check_file, iterate_file, names_in, read_file
from bench.tasks.task import Unreachable
from bench.tasks.token_hash import TokenHash
from scoring.errors import UserError, unknown_name
from scoring.records import as_text, check_ids
from scoring.samples import Text, TextSet
from scoring.settings import named
from scoring.templates import Template

T = TypeVar("T")
# What names a data set in settings: see `load_dataset`.
DataName = str


@dataclass(frozen=True)
class Dataset:
    """Records in order, as texts and as they were read.

    Attributes:
        name: the task and split, or the file's name.
        texts: of the records, as they are tokenized.
        records: with all their fields, in the same order.
        tokenizer: of the model that reads them; None: only the texts count.
        asked: ids by which it was chosen of a larger one; None: it is whole.
        hashes: of the same data set, and of what was chosen of it, by `asked`.
    """

    name: str
    texts: list[Text]
    records: list[Record]
    tokenizer: Any = None
    asked: tuple[str, ...] | None = field(default=None, repr=False, compare=False)
    hashes: dict[tuple[str, ...] | None, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def text_set(self) -> TextSet:
        return TextSet(self.name, self.texts)

    @cached_property
    def sha256(self) -> str:
        """The hash of all that scoring reads of the data."""
        # The trials of a sweep ask for that of each selection again and again, and to tokenize takes time.
        if self.asked not in self.hashes:
            self.hashes[self.asked] = _sha256(self.texts, self.tokenizer)
        return self.hashes[self.asked]

    def chosen(self, ids: Sequence[str], where: str) -> Dataset:
        """The data set of some of the samples, in the order of their ids. The second time that an id occurs it becomes
        "id#2".

        Args:
            ids: of samples.
            where: the ids are from, for messages.

        Raises:
            UserError: there is no such sample, or none is named.
        """
        if not ids:
            raise UserError(f"{where} names no sample; expected ids of {self.name}, one a line")
        positions = {text.sample_id: position for position, text in enumerate(self.texts)}
        occurrences: Counter[str] = Counter()
        texts, records = [], []
        for sample_id in ids:
            if sample_id not in positions:
                raise UserError(f"{where}: {unknown_name(f'sample of {self.name}', sample_id, positions)}")
            occurrences[sample_id] += 1
            unique_id = sample_id if occurrences[sample_id] == 1 else f"{sample_id}#{occurrences[sample_id]}"
            texts.append(replace(self.texts[positions[sample_id]], sample_id=unique_id))
            records.append({**self.records[positions[sample_id]], "id": unique_id})
        check_ids(where, [text.sample_id for text in texts])
        hashes = self.hashes if self.asked is None else {}
        return Dataset(self.name, texts, records, self.tokenizer, tuple(ids), hashes)


def _sha256(texts: Iterable[Text], tokenizer: Any) -> str:
    # The hash of one JSON array, whose items come one at a time.
    digest, separator = hashlib.sha256(b"["), ""
    tokens = None if tokenizer is None else TokenHash(tokenizer)
    for text in texts:
        item = [text.sample_id, text.prompt, text.completion, text.messages]
        # What the words do not say.
        if tokens and (changed := tokens.of_changed(text)):
            item.append(changed)
        digest.update((separator + json.dumps(item)).encode())
        separator = ", "
    digest.update(b"]")
    return digest.hexdigest()


@dataclass(frozen=True)
class Texts:
    """The texts of a data set, read anew whenever somebody iterates over them: they need not fit into memory.

    Attributes:
        name: the task and split, or the file's name.
        read: gives the texts in order.
        tokenizer: see `Dataset`.
    """

    name: str
    read: Callable[[], Iterator[Text]]
    tokenizer: Any = None

    def __iter__(self) -> Iterator[Text]:
        return self.read()

    def checked_sha256(self) -> str:
        """The same hash as `Dataset.sha256`; all texts are read and checked on the way.

        Raises:
            UserError: one line that names the record and field at fault, or an id that occurs twice.
        """
        # Eight bytes for each id, since the ids themselves may not fit into memory.
        digests = array("Q")

        def texts() -> Iterator[Text]:
            for text in self:
                digest = hashlib.blake2b(text.sample_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                digests.append(int.from_bytes(digest, "little"))
                yield text

        sha256 = _sha256(texts(), self.tokenizer)
        values, counts = np.unique(np.array(digests), return_counts=True)
        if (counts > 1).any():
            # Ids whose digests are equal are few: they are compared as they are.
            repeated = np.isin(np.array(digests), values[counts > 1])
            ids = [text.sample_id for text, is_repeated in zip(self, repeated, strict=True) if is_repeated]
            check_ids(self.name, ids, np.flatnonzero(repeated))
        return sha256


def short_name(name: str) -> str:
    """The task or data file for a reader, without the place where its data are: `tofu` of `tofu:/data/tofu`."""
    head = name.partition(":")[0]
    return head if head in TASKS else Path(name).stem


def short_model(name: str) -> str:
    """A model for a reader: the last two parts of a folder or an id."""
    return "/".join(Path(name).parts[-2:])


def subject(model: str, source: str, split: str | None) -> str:
    """Which model is looked at on which data, for a progress bar: "authors on authors/forget10"."""
    return f"{short_model(model)} on {short_name(source)}{f'/{split}' if split else ''}"


def find_task(name: str) -> tuple[Task, str | None]:
    """The task that a name stands for, and where its data are.

    Args:
        name: NAME or NAME:SOURCE, such as `tofu`, `tofu:/data/tofu` or `whp:/books/novel.txt`, with a NAME in TASKS
            and a SOURCE that is a folder, a file or a Hugging Face id; or a task file, see `bench.tasks.custom`.

    Returns:
        The task, and its source: the one that is named, or the task's own; None where the data are generated, or where
        a task file names them.

    Raises:
        UserError: one line: no such task, a source for a task that has none, or none for one that needs it.
    """
    if name.endswith(custom.SUFFIXES):
        return custom.read_task(name), None
    head, colon, source = name.partition(":")
    if head not in TASKS:
        raise unknown_name("task", head, TASKS)
    task = TASKS[head]
    if colon and not task.source_is:
        raise UserError(
            f"task {name!r}: the data of {head!r} are generated, there is no source to name; write {head!r}"
        )
    if not source and task.source is None and task.source_is:
        raise UserError(f"task {name!r} needs its data: write {head}:SOURCE, where SOURCE is {task.source_is}")
    return task, os.path.expanduser(source) if source else task.source


def is_data_file(name: str) -> bool:
    """Whether a name stands for a data file, which need not exist, and not for a task."""
    if name.partition(":")[0] in TASKS or name.endswith(custom.SUFFIXES):
        return False
    return Path(name).exists() or bool(Path(name).suffix) or "/" in name.partition(":")[0]


def absolute_source(name: str) -> str:
    """A name that stands for the same data set in every process: files and folders have their absolute paths in it.

    Args:
        name: as `load_dataset` takes it. The name of what does not exist stays as it is.
    """
    if is_data_file(name) or name.endswith(custom.SUFFIXES):
        return str(Path(name).absolute()) if Path(name).exists() else name
    head, colon, source = name.partition(":")
    # Of a folder, what is chosen in it may be named after a mark.
    place, mark, chosen = (source, "", "") if Path(source).expanduser().exists() else source.partition(rwku.TARGET)
    folder = Path(place).expanduser()
    return f"{head}:{folder.absolute()}{mark}{chosen}" if colon and place and folder.exists() else name


def check_dataset(source: str, split: str | None = None) -> None:
    """Refuse a data set that `load_dataset` could not find, before anything is read.

    Raises:
        UserError: one line: no such task, split or file.
    """
    if not is_data_file(source):
        task, _ = find_task(source)
        if split is not None and split not in task.splits:
            raise unknown_name(f"split of task {task.name!r}", split, task.splits)
        return
    check_file(source)
    if split is not None:
        raise UserError(f"split {split}: a data file has no splits; name the file of the split instead of {source!r}")


def load_dataset(
    source: str, split: str | None = None, tokenizer: Any = None, template: Template | None = None
) -> Dataset:
    """A task's split, or a file.

    Args:
        source: a task, see `find_task`, or a path ending in .jsonl, .json or .parquet.
        split: of a task; None: its default one.
        tokenizer: of the model, for tasks whose texts are cut by the number of tokens, and for the hash.
        template: of pairs and conversations, see `scoring.records.as_text`.

    Raises:
        UserError: one line that names the file, line or field at fault.
    """
    check_dataset(source, split)
    if is_data_file(source):
        name, records = source, read_file(source)
    else:
        task, task_source = find_task(source)
        split = split or task.default_split
        name, records = f"{task.name}/{split}", task.load(split, task_source, tokenizer)
    texts = [as_text(name, number, record, template) for number, record in enumerate(records, start=1)]
    check_ids(name, [text.sample_id for text in texts])
    return Dataset(name, texts, records, tokenizer)


def load_default_retain(load: Callable[[str], T], source: str, forget_split: str, retain_split: str) -> T:
    """The retain set that belongs to a forget split, where the user has named none.

    Args:
        load: split -> its data.
        source: the task, as `find_task` takes it.

    Raises:
        Unreachable: it cannot be had; the message names the setting, and the splits that are there.
    """
    try:
        return load(retain_split)
    except Unreachable as error:
        task, place = find_task(source)
        there = names_in(place, task.splits) if place else []
        why = f"of the splits of {task.name!r} there are {', '.join(there)}" if there else str(error)
        raise Unreachable(
            f"{forget_split} goes with {retain_split}, which cannot be had from {place!r}: name another split or a "
            f"data file with {named('retain')}; {why}"
        ) from error


def open_texts(source: str, split: str | None = None, tokenizer: Any = None, template: Template | None = None) -> Texts:
    """The texts alone of a task's split or a file, one at a time. A file is never in memory as a whole.

    Raises:
        UserError: no such task, split or file. Records at fault are found when they are read.
    """
    check_dataset(source, split)
    if is_data_file(source):

        def read() -> Iterator[Text]:
            return (as_text(source, number, record, template) for number, record in enumerate(iterate_file(source), 1))

        return Texts(source, read, tokenizer)
    dataset = load_dataset(source, split, tokenizer, template)
    return Texts(dataset.name, lambda: iter(dataset.texts), tokenizer)
