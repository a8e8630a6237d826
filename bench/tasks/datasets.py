"""Reading what is to be scored: a task by name, a task file, or a JSON Lines or Parquet file."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bench.tasks import TASKS, Record, Task, custom
from bench.tasks.sources import check_file, iterate_file, read_file
from scoring.errors import UserError, unknown_name
from scoring.records import as_text, check_ids
from scoring.samples import Text, TextSet

T = TypeVar("T")
# A data set, as settings name it: see `load_dataset`.
DataName = str


@dataclass(frozen=True)
class Dataset:
    """Records in order, as texts and as they were read.

    Attributes:
        name: the task and split, or the file's name.
        texts: what is tokenized.
        records: the whole records (attributes included), same order.
    """

    name: str
    texts: list[Text]
    records: list[Record]

    @property
    def text_set(self) -> TextSet:
        return TextSet(self.name, self.texts)

    @property
    def sha256(self) -> str:
        """Hash of all that scoring sees of the data."""
        return _sha256(self.texts)

    def chosen(self, ids: Sequence[str], where: str) -> Dataset:
        """These samples, in this order. One that is named again is there again, as "id#2".

        Args:
            ids: of samples.
            where: they are named, for messages.

        Raises:
            UserError: there is no such sample, or none is named.
        """
        if not ids:
            raise UserError(f"{where} names no sample; expected ids of {self.name}, one a line")
        place = {text.sample_id: number for number, text in enumerate(self.texts)}
        times: Counter[str] = Counter()
        texts, records = [], []
        for name in ids:
            if name not in place:
                raise UserError(f"{where}: {unknown_name(f'sample of {self.name}', name, place)}")
            times[name] += 1
            copy = name if times[name] == 1 else f"{name}#{times[name]}"
            texts.append(replace(self.texts[place[name]], sample_id=copy))
            records.append({**self.records[place[name]], "id": copy})
        check_ids(where, [text.sample_id for text in texts])
        return Dataset(self.name, texts, records)


def _sha256(texts: Iterable[Text]) -> str:
    # The hash of one JSON array, whose items come one at a time.
    digest, before = hashlib.sha256(b"["), ""
    for text in texts:
        digest.update((before + json.dumps([text.sample_id, text.prompt, text.completion, text.messages])).encode())
        before = ", "
    digest.update(b"]")
    return digest.hexdigest()


@dataclass(frozen=True)
class Texts:
    """The texts of a data set, read anew whenever they are asked for: it need not fit into memory.

    Attributes:
        name: the task and split, or the file's name.
        read: gives them in order.
    """

    name: str
    read: Callable[[], Iterator[Text]]

    def __iter__(self) -> Iterator[Text]:
        return self.read()

    def checked_sha256(self) -> str:
        """See `Dataset.sha256`; all texts are read and checked on the way.

        Raises:
            UserError: one line that names the record and field at fault, or an id that occurs twice.
        """
        digests = array("Q")

        def noted() -> Iterator[Text]:
            for text in self:
                # Eight bytes of each id, not the id.
                name = hashlib.blake2b(text.sample_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                digests.append(int.from_bytes(name, "little"))
                yield text

        found = _sha256(noted())
        values, counts = np.unique(np.array(digests), return_counts=True)
        if (counts > 1).any():
            # Few, and told apart by what they really are.
            doubtful = np.isin(np.array(digests), values[counts > 1])
            places = np.flatnonzero(doubtful)
            check_ids(self.name, [text.sample_id for text, also in zip(self, doubtful, strict=True) if also], places)
        return found


def find_task(name: str) -> tuple[Task, str | None]:
    """The task that a name means, and where its data are.

    Args:
        name: NAME or NAME:SOURCE, such as `tofu`, `tofu:/data/tofu` or `whp:/books/novel.txt`, with a NAME in TASKS
            and a SOURCE that is a folder, a file or a Hugging Face id; or a task file, see `bench.tasks.custom`.

    Returns:
        The task, and its source: the one named, or the task's own; None where the data are generated, or where the
        task is a file and says it itself.

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
    """Whether a name means a data file, which need not exist, and not a task."""
    if name.partition(":")[0] in TASKS or name.endswith(custom.SUFFIXES):
        return False
    return Path(name).exists() or bool(Path(name).suffix) or "/" in name.partition(":")[0]


def absolute_source(name: str) -> str:
    """The same data set, named in a way that is right in every process: files and folders by their absolute paths.

    Args:
        name: as `load_dataset` takes it. What does not exist keeps the name that it was given.
    """
    if is_data_file(name) or name.endswith(custom.SUFFIXES):
        return str(Path(name).absolute()) if Path(name).exists() else name
    head, colon, source = name.partition(":")
    folder = Path(source).expanduser()
    return f"{head}:{folder.absolute()}" if colon and source and folder.exists() else name


def check_dataset(source: str, split: str | None = None) -> None:
    """Refuse what `load_dataset` cannot find, before anything is read.

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


def load_dataset(source: str, split: str | None = None, tokenizer: Any = None) -> Dataset:
    """A task's split, or a file.

    Args:
        source: a task, see `find_task`, or a path ending in .jsonl, .json or .parquet.
        split: of a task; the task's own default if None.
        tokenizer: of the model, for tasks whose texts are cut by the number of tokens.

    Raises:
        UserError: one line that names the file, line or field at fault.
    """
    check_dataset(source, split)
    if is_data_file(source):
        return _dataset(source, read_file(source))
    task, where = find_task(source)
    split = split or task.default_split
    return _dataset(f"{task.name}/{split}", task.load(split, where, tokenizer))


def open_texts(source: str, split: str | None = None, tokenizer: Any = None) -> Texts:
    """The same for those who need the texts alone, one at a time. A file is not in memory as a whole.

    Raises:
        UserError: no such task, split or file. What is wrong with a file's records shows when they are read.
    """
    check_dataset(source, split)
    if is_data_file(source):
        return Texts(
            source, lambda: (as_text(source, number, record) for number, record in enumerate(iterate_file(source), 1))
        )
    dataset = load_dataset(source, split, tokenizer)
    return Texts(dataset.name, lambda: iter(dataset.texts))


def _dataset(name: str, records: list[Record]) -> Dataset:
    texts = [as_text(name, number, record) for number, record in enumerate(records, start=1)]
    check_ids(name, [text.sample_id for text in texts])
    return Dataset(name, texts, records)
