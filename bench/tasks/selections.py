"""Selections: the samples of a forget set that are forgotten together. Papers choose them without saying so.

Every selection has a name, a seed and a list of sample ids, and is stored. `mrd-bench unlearn --selection` reads the
ids, one a line, so that a trial of a sweep can be run again by itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.tasks.datasets import Dataset
from scoring.characteristics import Characteristics, characteristics
from scoring.errors import UserError, unknown_name
from scoring.files import replacing
from scoring.reading import read_text
from scoring.settings import Doc, Ge, check, named

ALL = "all"
THIRDS = ("easy", "medium", "hard")
LEAST_FLIP_TIME = 0.5  # updates, in the mean of logarithms
Kind = Literal["all", "random", "thirds", "attribute", "composite", "single"]
# The characteristics of texts, by name. A record's field of the same name goes before.
MEASURED = tuple(name for name in Characteristics.__dataclass_fields__ if name != "tokens")


@dataclass(frozen=True, kw_only=True)
class SelectionSpec:
    """Selections of one kind."""

    kind: Annotated[
        Kind,
        Doc(
            "all: the whole forget set; random: subsets drawn without replacement; thirds: by MRD, the easy, the "
            "medium and the hard third; attribute: one for each value of a field of the records, or the lower and "
            "the upper half of a number; composite: drawn with replacement; single: one sample each"
        ),
    ]
    size: Annotated[
        int | None,
        Ge(1),
        Doc("samples in each; must be given for random and composite (default: as many as there are to be had)"),
    ] = None
    count: Annotated[int, Ge(1), Doc("how many of each level; of single, how many samples")] = 1
    by: Annotated[str | None, Doc("the attribute: a field of the records, or a characteristic of their texts")] = None
    seed: Annotated[int, Ge(0), Doc("of the draws")] = 0

    def checked(self) -> Self:
        """The same settings.

        Raises:
            UserError: a value that cannot be, or a combination that does not exist.
        """
        check(self)
        kind = f"kind {self.kind}"
        if self.kind in ("random", "composite") and self.size is None:
            raise UserError(f"{named('kind')}: {kind}: no size: expected the number of samples in each")
        if self.kind in ("single", ALL) and self.size is not None:
            raise UserError(f"{named('size')} is {self.size}: leave it out of {kind}")
        if (self.kind == "attribute") != (self.by is not None):
            raise UserError(
                f"{named('by')} is {self.by or 'missing'}, {kind}: expected the name of an attribute for kind "
                "attribute, and for no other"
            )
        if self.size is None and self.count > 1 and self.kind in ("thirds", "attribute"):
            raise UserError(f"{named('count')} is {self.count}, {kind}, without a size: all would be the same")
        return self


@dataclass(frozen=True)
class Selection:
    """Samples that are forgotten together.

    Attributes:
        name: unique in a sweep.
        kind, seed: see `SelectionSpec`.
        level: "easy", "medium", "hard", a value of the attribute, "low" or "high"; "" where there is none.
        ids: of the samples, in order; a repeated one counts as often as it occurs.
    """

    name: str
    kind: str
    level: str
    seed: int
    ids: tuple[str, ...]


def needs_difficulty(specs: Sequence[SelectionSpec]) -> bool:
    """Whether any of the selections depends on MRD."""
    return any(spec.kind == "thirds" for spec in specs)


def select(specs: Sequence[SelectionSpec], dataset: Dataset, mrd: Mapping[str, float]) -> list[Selection]:
    """The selections of a forget set.

    Args:
        specs: checked.
        dataset: the forget set.
        mrd: by sample id; only thirds depend on it.

    Raises:
        UserError: a selection has more samples than there are, or no record has the attribute.
    """
    selections = [selection for spec in specs for selection in _selections(spec, dataset, mrd)]
    counts = Counter(selection.name for selection in selections)
    if twice := next((name for name, count in counts.items() if count > 1), None):
        raise UserError(f"selections: {twice!r} occurs twice; give one of them another seed")
    return selections


def _selections(spec: SelectionSpec, dataset: Dataset, mrd: Mapping[str, float]) -> list[Selection]:
    ids = [text.sample_id for text in dataset.texts]
    if spec.kind == ALL:
        return [Selection(ALL, ALL, "", spec.seed, tuple(ids))]
    if spec.kind == "single":
        drawn = _drawn(ids, spec.count, spec, "", 0, dataset.name)
        return [Selection(f"single-{sample_id}", "single", "", spec.seed, (sample_id,)) for sample_id in drawn]
    selections = []
    for level, members in _levels(spec, dataset, ids, mrd).items():
        for number in range(spec.count):
            drawn = _drawn(members, spec.size, spec, level, number, dataset.name)
            parts = [spec.kind, *([spec.by] if spec.by else []), *([level] if level else []), str(spec.seed)]
            name = "-".join(parts) + (f"-{number:03d}" if spec.size is not None else "")
            selections.append(Selection(name, spec.kind, level, spec.seed, tuple(drawn)))
    return selections


def _levels(
    spec: SelectionSpec, dataset: Dataset, ids: Sequence[str], mrd: Mapping[str, float]
) -> dict[str, list[str]]:
    """Level -> ids of the samples that its selections are drawn from."""
    if spec.kind == "thirds":
        # The paper: samples that change most under noise are the easiest to forget. Those without a score are left out.
        scored = [sample_id for sample_id in ids if sample_id in mrd]
        easiest_first = sorted(scored, key=lambda sample_id: (-mrd[sample_id], sample_id))
        return {level: list(part) for level, part in zip(THIRDS, np.array_split(easiest_first, 3), strict=True)}
    if spec.kind == "attribute":
        return _by_attribute(str(spec.by), dataset, ids)
    return {"": list(ids)}


def _by_attribute(by: str, dataset: Dataset, ids: Sequence[str]) -> dict[str, list[str]]:
    fields = list(dict.fromkeys(name for record in dataset.records for name in record))
    if by in fields:
        values = [record.get(by) for record in dataset.records]
    elif by in MEASURED:
        texts = [f"{text.prompt} {text.completion or ''}" for text in dataset.texts]
        values = [asdict(of_text)[by] for of_text in characteristics(texts, texts)]
    else:
        raise UserError(f"selections: {unknown_name(f'attribute of {dataset.name}', by, [*fields, *MEASURED])}")
    # Without nulls and nan, which equals nothing.
    value_of = {sample_id: value for sample_id, value in zip(ids, values, strict=True) if value is not None}
    value_of = {sample_id: value for sample_id, value in value_of.items() if value == value}
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in value_of.values()):
        median = float(np.median(list(value_of.values()))) if value_of else math.nan
        return {
            "low": [sample_id for sample_id, value in value_of.items() if value < median],
            "high": [sample_id for sample_id, value in value_of.items() if value > median],
        }
    levels: dict[str, list[str]] = {}
    for sample_id, value in sorted(value_of.items(), key=lambda item: str(item[1])):
        levels.setdefault(str(value), []).append(sample_id)
    if len(levels) > 20:
        raise UserError(
            f"selections: attribute {by!r} of {dataset.name} has {len(levels)} values; expected a number, or at most 20"
        )
    return levels


def _drawn(
    ids: Sequence[str], size: int | None, spec: SelectionSpec, level: str, number: int, dataset_name: str
) -> Sequence[str]:
    """`size` of the ids in the order of the data, or all. The draw depends on the seed, the kind, the level and the
    number of the selection."""
    if size is None:
        return ids
    replacement = spec.kind == "composite"
    if not ids or (size > len(ids) and not replacement):
        place = f"{dataset_name}, {level}" if level else dataset_name
        raise UserError(f"selections: kind {spec.kind}: size is {size}: {place} has {len(ids)} samples")
    rng = np.random.default_rng([spec.seed, get_args(Kind).index(spec.kind), number, *level.encode()])
    return [ids[i] for i in sorted(rng.choice(len(ids), size, replace=replacement).tolist())]


# --- On disk ------------------------------------------------------------------------------------------------


def write_selections(
    selections: Sequence[Selection], mrd: Mapping[str, float], out: Path, flip_time: Mapping[str, float] | None = None
) -> dict[str, Path]:
    """Write selections.parquet, a row for each sample of a selection, and a file of ids for each selection.

    Args:
        mrd, flip_time: by sample id; the table has a column of flip times only where they are known.

    Returns:
        Name of a selection -> its file of ids.
    """
    rows = [
        {
            "selection": selection.name,
            "kind": selection.kind,
            "level": selection.level,
            "seed": selection.seed,
            "position": position,
            "sample_id": sample_id,
            "mrd": mrd.get(sample_id),
            "flip_time": (flip_time or {}).get(sample_id),
        }
        for selection in selections
        for position, sample_id in enumerate(selection.ids)
    ]
    schema = pa.schema(
        [
            ("selection", pa.string()),
            ("kind", pa.string()),
            ("level", pa.string()),
            ("seed", pa.int64()),
            ("position", pa.int64()),
            ("sample_id", pa.string()),
            ("mrd", pa.float64()),
            *([("flip_time", pa.float64())] if flip_time else []),
        ]
    )
    with replacing(out / "selections.parquet") as unfinished:
        pq.write_table(pa.Table.from_pylist(rows, schema), unfinished)
    folder = out / "selections"
    folder.mkdir(exist_ok=True)
    # By number: a value of an attribute may be no name for a file.
    paths = {selection.name: folder / f"{number:04d}.txt" for number, selection in enumerate(selections)}
    for selection in selections:
        with replacing(paths[selection.name]) as unfinished:
            unfinished.write_text("".join(f"{sample_id}\n" for sample_id in selection.ids), encoding="utf-8")
    return paths


def read_ids(path: str, setting: str = "selection") -> list[str]:
    """The sample ids of a file, one a line.

    Args:
        setting: that names the file, for messages.

    Raises:
        UserError: it cannot be read.
    """
    text = read_text(path, "sample ids, one a line", f"{named(setting)} {path!r}")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line]


def mean_log_mrd(selection: Selection, mrd: Mapping[str, float]) -> float:
    """The difficulty of a selection: the mean of log MRD over its samples that have a score; nan if none has."""
    values = [math.log(mrd[sample_id]) for sample_id in selection.ids if mrd.get(sample_id, 0.0) > 0]
    return float(np.mean(values)) if values else math.nan


def mean_log_flip_time(selection: Selection, flip_time: Mapping[str, float]) -> float:
    """The difficulty of a selection by forecast: the mean of log flip time, in updates, over its samples; nan if none
    has one.

    A sample that is forgotten at the start, 0 updates, counts as half of one, whose logarithm is a number. One that no
    update brings nearer, infinitely many, counts as the farthest of the forget set.
    """
    farthest = max((value for value in flip_time.values() if math.isfinite(value)), default=math.nan)
    found = [flip_time[sample_id] for sample_id in selection.ids if sample_id in flip_time]
    values = [math.log(max(min(farthest, value), LEAST_FLIP_TIME)) for value in found]
    return float(np.mean(values)) if values else math.nan
