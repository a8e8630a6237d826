"""Selections of forget samples: who is drawn, by hand-made data sets and scores."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from bench.tasks.datasets import Dataset
from bench.tasks.selections import (
    Selection,
    SelectionSpec,
    mean_log_flip_time,
    mean_log_mrd,
    read_ids,
    select,
    write_selections,
)
from scoring.errors import UserError
from scoring.samples import Text


def dataset(count: int, **fields: list[Any]) -> Dataset:
    ids = [f"s{n:02d}" for n in range(count)]
    texts = [Text(name, "What is it?", " A thing" + " and a thing" * n) for n, name in enumerate(ids)]
    records = [{"id": name} | {key: values[n] for key, values in fields.items()} for n, name in enumerate(ids)]
    return Dataset("made", texts, records)


def chosen(data: Dataset, mrd: dict[str, float] | None = None, **spec: Any) -> list[Selection]:
    return select([SelectionSpec(**spec).checked()], data, mrd or {})


def test_all_is_everyone_in_order() -> None:
    (selection,) = chosen(dataset(5), kind="all")
    assert selection.ids == ("s00", "s01", "s02", "s03", "s04")


def test_random_subsets() -> None:
    data = dataset(20)
    found = chosen(data, kind="random", size=8, count=30, seed=3)
    assert len({s.name for s in found}) == 30
    for selection in found:
        assert len(set(selection.ids)) == 8
        assert list(selection.ids) == sorted(selection.ids)  # in the order of the data
    assert len({s.ids for s in found}) == 30
    # Everyone is drawn about as often: 30 × 8 / 20 = 12 times, binomial with a standard deviation of 2.7.
    times = Counter(name for s in found for name in s.ids)
    assert len(times) == 20
    assert 3 <= min(times.values()) <= max(times.values()) <= 22
    assert chosen(data, kind="random", size=8, count=30, seed=3) == found
    # The first of more are the same, and another seed draws others.
    assert chosen(data, kind="random", size=8, count=2, seed=3) == found[:2]
    assert not {s.ids for s in chosen(data, kind="random", size=8, count=30, seed=4)} & {s.ids for s in found}


def test_thirds_by_mrd() -> None:
    data = dataset(9)
    mrd = {f"s{n:02d}": value for n, value in enumerate([5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0])}
    easy, medium, hard = chosen(data, mrd, kind="thirds")
    # High MRD is easy to forget.
    assert {mrd[name] for name in easy.ids} == {9.0, 8.0, 7.0}
    assert {mrd[name] for name in medium.ids} == {6.0, 5.0, 4.0}
    assert {mrd[name] for name in hard.ids} == {3.0, 2.0, 1.0}
    assert [s.level for s in (easy, medium, hard)] == ["easy", "medium", "hard"]
    assert mean_log_mrd(hard, mrd) == pytest.approx(math.log(6) / 3)
    of_two = chosen(data, mrd, kind="thirds", size=2, count=4)
    assert [s.level for s in of_two] == ["easy"] * 4 + ["medium"] * 4 + ["hard"] * 4
    assert all(set(s.ids) <= set(hard.ids) and len(s.ids) == 2 for s in of_two[8:])
    # One without a score is in no third.
    del mrd["s02"]
    assert "s02" not in {name for s in chosen(data, mrd, kind="thirds") for name in s.ids}


def test_composites_repeat_samples() -> None:
    data = dataset(6)
    found = chosen(data, kind="composite", size=40, count=50)
    assert all(len(s.ids) == 40 for s in found)
    # 40 draws from 6 miss a given one with probability (5/6)^40 < 0.1 %.
    assert all(len(set(s.ids)) < 40 for s in found)
    times = Counter(name for s in found for name in s.ids)
    expected, deviation = 2000 / 6, math.sqrt(2000 * 1 / 6 * 5 / 6)
    assert all(abs(count - expected) < 4 * deviation for count in times.values())


def test_by_attribute() -> None:
    data = dataset(8, colour=["red", "blue"] * 4, size=[1, 2, 3, 4, 5, 6, 7, 8], half=[None, 1.0] * 4)
    blue, red = chosen(data, kind="attribute", by="colour")
    assert (blue.level, blue.ids) == ("blue", ("s01", "s03", "s05", "s07"))
    assert (red.level, red.ids) == ("red", ("s00", "s02", "s04", "s06"))
    low, high = chosen(data, kind="attribute", by="size", size=2)
    assert set(low.ids) <= {"s00", "s01", "s02", "s03"}
    assert set(high.ids) <= {"s04", "s05", "s06", "s07"}
    # Of the texts: the later ones are longer.
    short, long = chosen(data, kind="attribute", by="words")
    assert short.ids == ("s00", "s01", "s02", "s03")
    assert long.ids == ("s04", "s05", "s06", "s07")


def test_single_samples() -> None:
    found = chosen(dataset(10), kind="single", count=4)
    assert len({s.ids for s in found}) == 4
    assert all(s.name == f"single-{s.ids[0]}" for s in found)


def test_files_are_what_was_drawn(tmp_path: Path) -> None:
    data = dataset(6, colour=["a/b"] * 3 + ["c d"] * 3)
    specs = [SelectionSpec(kind="composite", size=4, count=2), SelectionSpec(kind="attribute", by="colour")]
    mrd = {"s00": 2.0, "s03": 0.5}
    found = select(specs, data, mrd)
    paths = write_selections(found, mrd, tmp_path)
    for selection in found:
        ids = read_ids(str(paths[selection.name]))
        assert ids == list(selection.ids)
        of_these = data.chosen(ids, "here")
        assert len(of_these.texts) == len(ids) == len({text.sample_id for text in of_these.texts})
        whole = {text.sample_id: text for text in data.texts}
        for name, text in zip(ids, of_these.texts, strict=True):
            assert text.sample_id.partition("#")[0] == name
            assert (text.prompt, text.completion) == (whole[name].prompt, whole[name].completion)
    rows = pq.read_table(tmp_path / "selections.parquet").to_pylist()
    assert [(r["selection"], r["position"], r["sample_id"]) for r in rows] == [
        (s.name, n, name) for s in found for n, name in enumerate(s.ids)
    ]
    assert rows[0].keys() == {"selection", "kind", "level", "seed", "position", "sample_id", "mrd"}
    assert {r["sample_id"]: r["mrd"] for r in rows}.items() >= {"s00": 2.0, "s03": 0.5, "s01": None}.items()


def test_a_repeated_id_is_there_again() -> None:
    found = dataset(3).chosen(["s01", "s01", "s00", "s01"], "here")
    assert [text.sample_id for text in found.texts] == ["s01", "s01#2", "s00", "s01#3"]
    assert [record["id"] for record in found.records] == ["s01", "s01#2", "s00", "s01#3"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"kind": "randon", "size": 2}, "did you mean 'random'"),
        ({"kind": "random"}, "no size"),
        ({"kind": "composite"}, "no size"),
        ({"kind": "random", "size": 0}, "size is 0: expected a whole number of at least 1"),
        ({"kind": "random", "size": 7}, "size is 7: made has 6 samples"),
        ({"kind": "thirds", "size": 3}, "size is 3: made, easy has 2 samples"),
        ({"kind": "thirds", "count": 2}, "without a size"),
        ({"kind": "random", "size": 2, "by": "colour"}, "by is colour"),
        ({"kind": "attribute"}, "by is missing"),
        ({"kind": "attribute", "by": "colr"}, "did you mean 'colour'"),
        ({"kind": "single", "size": 2}, "leave it out"),
        ({"kind": "random", "size": 2, "seed": -1}, "seed is -1"),
    ],
)
def test_refusals(spec: dict[str, Any], said: str) -> None:
    mrd = {f"s{n:02d}": float(n + 1) for n in range(6)}
    with pytest.raises(UserError, match=said) as refusal:
        chosen(dataset(6, colour=["red"] * 6), mrd, **spec)
    assert "\n" not in str(refusal.value)


def test_files_at_fault(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_ids(str(tmp_path / "none.txt"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bytes.txt: not UTF-8 text at byte 0"):
        read_ids(str(tmp_path / "bytes.txt"))
    with pytest.raises(UserError, match="names no sample"):
        dataset(3).chosen([], "selection 'a.txt'")
    with pytest.raises(UserError, match=r"selection 'a.txt': unknown sample of made 's1'.*did you mean 's01'"):
        dataset(3).chosen(["s1"], "selection 'a.txt'")


def test_mean_log_flip_time_by_hand(tmp_path: Path) -> None:
    """Forgotten at the start: half an update; never: as the farthest of the set; not measured: left out."""
    times = {"a": 0.0, "b": 4.0, "c": math.inf, "d": 16.0}
    selection = Selection("s", "random", "", 0, ("a", "b", "c", "x"))
    # log of 1/2, 4 and 16: (-1 + 2 + 4) / 3 log 2.
    assert mean_log_flip_time(selection, times) == pytest.approx(5 / 3 * math.log(2))
    assert np.isnan(mean_log_flip_time(selection, {}))
    assert np.isnan(mean_log_flip_time(selection, {"a": math.inf}))
    write_selections([selection], {}, tmp_path, times)
    rows = pq.read_table(tmp_path / "selections.parquet").to_pylist()
    assert [row["flip_time"] for row in rows] == [0.0, 4.0, math.inf, None]


def test_mean_log_mrd_of_nothing_is_nan() -> None:
    assert np.isnan(mean_log_mrd(Selection("a", "all", "", 0, ("s00",)), {}))
