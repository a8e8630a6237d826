"""Where a task's records come from: a folder of data files, or the Hugging Face hub.

The file NAME of a folder is NAME.jsonl (an object a line), NAME.json (the same, or one array of objects) or
NAME.parquet: the first of these that exists; or NAME-00000-of-00001.parquet, as a hub's copy has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tasks.task import Unreachable
from scoring.errors import UserError, first_line
from scoring.reading import decoded, exists, parquet_file, parse_json, read_text, readable
from scoring.records import HALF_A_PAIR, Record, is_unicode

SUFFIXES = (".jsonl", ".json", ".parquet")
WHOLE = "-00000-of-00001.parquet"  # of a set that the hub has in one piece
FILES_IN_MESSAGE = 10


@dataclass(frozen=True)
class HubSet:
    """A set on the hub.

    Attributes:
        repository, config, split: as `datasets.load_dataset` takes them.
        first: how many records are read and downloaded, from the first on; None: all.
        file: of the repository, where a set is in none of its configurations.
    """

    repository: str
    config: str | None = None
    split: str = "train"
    first: int | None = None
    file: str | None = None

    def __str__(self) -> str:
        parts = (self.file,) if self.file else (self.config, self.split)
        return f"{self.repository} ({', '.join(part for part in parts if part)})"


# --- Fields -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a field's value must be.

    Attributes:
        name: in words, for messages.
        fits: whether a value is of this kind.
    """

    name: str
    fits: Callable[[Any], bool]


TEXT = Kind("text", lambda value: isinstance(value, str))
TEXTS = Kind(
    "a list of texts", lambda value: isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value)
)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool))
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
Fields = Mapping[str, Kind]


def with_fields(records: Sequence[Record], fields: Fields, where: str) -> list[Record]:
    """The records without nulls, which stand in formats with columns where a field is missing.

    Args:
        records: as they were read.
        fields: that every record must have.
        where: the file or set, for messages.

    Raises:
        UserError: one line with the file or set, the record, counted from 1, and the field that is missing or wrong.
    """
    records = [{name: value for name, value in record.items() if value is not None} for record in records]
    for number, record in enumerate(records, start=1):
        for field, kind in fields.items():
            if field not in record:
                raise UserError(
                    f"{where}, record {number}: field {field!r} is missing, expected {kind.name}; there are "
                    f"{', '.join(map(repr, record)) or 'no fields'}"
                )
            if not kind.fits(record[field]):
                raise UserError(
                    f"{where}, record {number}: field {field!r} is {_described(record[field])}, expected {kind.name}"
                )
    return records


def _described(value: Any) -> str:
    if isinstance(value, list):
        if value and all(isinstance(entry, str) for entry in value):
            return f"a list of {len(value)}"
        return "a list with other things than text" if value else "an empty list"
    return repr(value) if isinstance(value, int | float | str) and len(repr(value)) < 20 else type(value).__name__


# --- Reading ------------------------------------------------------------------------------------------------


def read_records(task: str, source: str, name: str, hub: HubSet, fields: Fields) -> list[Record]:
    """The records of one set, in order, with the fields that they must have.

    Args:
        task: its name, for messages.
        source: a folder with a file `name`; anything else is taken for the hub.
        name: of the local file, without its suffix.
        hub: where the set is on the hub.
        fields: see `with_fields`.

    Raises:
        UserError: one line that names the record and field at fault. Unreachable: they cannot be had; the message says
            what to do.
    """
    if is_local(source):
        path = find_file(source, name)
        records, where = read_file(path), str(path)
    else:
        records, where = read_hub(hub, f"{task}:FOLDER reads local files, here FOLDER/{name}.jsonl"), str(hub)
    return with_fields(records, fields, where)


def is_local(source: str) -> bool:
    """Whether a source is a folder or file of this machine. A name that does not look like a path, or that has one
    slash and does not exist here, is an id on the hub."""
    return exists(source) or source.startswith((".", "/", "~")) or source.count("/") > 1


def find_file(folder: str | Path, name: str) -> Path:
    """The data file `name` in a folder.

    Raises:
        UserError: there is no such folder. Unreachable: one line that says which files were looked for, and which are
            there.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"source {str(folder)!r} is a file: expected a folder with {name}.jsonl")
    if not folder.is_dir():
        raise UserError(f"source folder {str(folder)!r} does not exist: expected a folder with {name}.jsonl")
    for suffix in SUFFIXES:
        if (path := folder / f"{name}{suffix}").is_file():
            return path
    if (path := folder / f"{name}{WHOLE}").is_file():
        return path
    place = folder / Path(name).parent
    if not place.is_dir():
        raise Unreachable(f"source folder {str(folder)!r} has no folder {Path(name).parent.name!r} with {name}.jsonl")
    names = sorted(path.name for path in place.iterdir() if not path.name.startswith("."))
    more = f" and {len(names) - FILES_IN_MESSAGE} more" if len(names) > FILES_IN_MESSAGE else ""
    raise Unreachable(
        f"source folder {str(folder)!r} has no {', '.join(name + suffix for suffix in SUFFIXES[:-1])} or "
        f"{name}{SUFFIXES[-1]}: it holds {', '.join(names[:FILES_IN_MESSAGE]) or 'nothing'}{more}"
    )


def names_in(folder: str | Path, names: Iterable[str]) -> list[str]:
    """Those of the names that a folder has a data file of; none if there is no such folder."""
    return [name for name in names if any((Path(folder) / f"{name}{end}").is_file() for end in (*SUFFIXES, WHOLE))]


def read_hub(hub: HubSet, instead: str) -> list[Record]:
    """The records of a set on the hub, or in its local cache.

    Args:
        hub: the set.
        instead: what else the user can do, for the message.

    Raises:
        Unreachable: one line with the set and the reason.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(
            hub.repository, hub.config, data_files=hub.file, split=hub.split, streaming=hub.first is not None
        )
        return dataset.to_list() if hub.first is None else list(dataset.take(hub.first))
    except Exception as error:  # of the network, of the hub, or of a library that reads files
        raise Unreachable(
            f"data set {hub} cannot be read from the Hugging Face hub: {first_line(error)}; {instead}"
        ) from error


def check_file(path: str | Path) -> None:
    """Refuse a data file that does not exist, without reading it.

    Raises:
        UserError: one line.
    """
    expected = "a JSON Lines or Parquet file"
    if not exists(path):
        raise UserError(f"data file {str(path)!r} does not exist: expected {expected}")
    if Path(path).is_dir():
        raise UserError(f"data file {str(path)!r} is a folder: expected {expected}")
    if not Path(path).is_file():
        raise UserError(f"data file {str(path)!r} is a pipe or a device: expected {expected}")


def read_file(path: str | Path) -> list[Record]:
    """The records of a JSON Lines or Parquet file.

    Raises:
        UserError: one line that names the file, and the line or record at fault.
    """
    return list(iterate_file(path))


def iterate_file(path: str | Path) -> Iterator[Record]:
    """The records of a file, one at a time: JSON Lines and Parquet are never in memory as a whole.

    Raises:
        UserError: see `read_file`. The records before the one at fault have come out by then.
    """
    check_file(path)
    path = Path(path)
    empty = True
    for record in _read_parquet(path) if path.suffix == ".parquet" else _read_json(path):
        empty = False
        yield record
    if empty:
        raise UserError(f"{path}: the data file is empty; expected at least one record")


def _read_parquet(path: Path) -> Iterator[Record]:
    with parquet_file(path, "rows of text") as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _read_json(path: Path) -> Iterator[Record]:
    if path.suffix == ".json" and (text := read_text(path, "JSON Lines")).lstrip().startswith("["):
        yield from _read_array(path, text, _is_escaped(text))
        return
    read = 0
    with readable(str(path), "JSON Lines"), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = decoded(line, str(path), "JSON Lines", read)
            read += len(line)
            if text.strip():
                yield _read_line(f"{path}, line {number}", text, _is_escaped(text))


def _is_escaped(text: str) -> bool:
    """Whether JSON text may hold half of a surrogate pair: only an escape can bring one into UTF-8 text."""
    return "\\ud" in text.lower()


def _read_array(path: Path, text: str, escaped: bool) -> list[Record]:
    values = parse_json(text, str(path), "an array of objects", lines=True)
    return [
        _object(f"{path}, record {number}", value, "an array of objects", escaped)
        for number, value in enumerate(values, start=1)
    ]


def _read_line(where: str, line: str, escaped: bool) -> Record:
    value = parse_json(line, where, "one object a line")
    return _object(where, value, "one object a line (JSON Lines)", escaped)


def _object(where: str, value: Any, expected: str, escaped: bool) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON {type(value).__name__}; expected {expected}")
    if escaped and not is_unicode(value):
        raise UserError(f"{where}: {HALF_A_PAIR}")
    return value
