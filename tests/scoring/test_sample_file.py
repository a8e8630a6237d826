"""Samples on disk are the samples, and make the batches, that those in memory do."""

import dataclasses
import tracemalloc

import numpy as np
import torch

from scoring.sample_file import SampleFile
from scoring.samples import Sample, make_batches
from tests.tiny_models import random_samples


def named(samples: list[Sample]) -> list[Sample]:
    """With names of several lengths and scripts, gaps in the numbers, and equal ones among them."""
    names = ["", "é", "名前", "a b", "x" * 50]
    changed = [dataclasses.replace(s, sample_id=f"{names[i % 5]}{i}", index=2 * i + 1) for i, s in enumerate(samples)]
    twin = dataclasses.replace(changed[3], sample_id="twin", index=1000)
    return [*changed, twin]


def test_samples_come_back() -> None:
    samples = named(random_samples(40))
    file = SampleFile(iter(samples))
    assert len(file) == 41
    assert file.sample_ids.to_pylist() == [s.sample_id for s in samples]
    assert file.names_of(np.array([79, 1, 1000])) == [samples[39].sample_id, samples[0].sample_id, "twin"]
    assert file.num_scored.tolist() == [s.num_scored for s in samples]
    assert file.largest_token == max(int(s.input_ids.max()) for s in samples)
    # In any order, also while batches are read.
    for row in (40, 0, 17, 17, 3):
        back = file[row]
        assert (back.sample_id, back.index) == (samples[row].sample_id, samples[row].index)
        np.testing.assert_array_equal(back.input_ids, samples[row].input_ids)
        np.testing.assert_array_equal(back.scored, samples[row].scored)
        assert back.input_ids.dtype == np.int64
        assert back.scored.dtype == bool


def test_batches_are_those_of_make_batches() -> None:
    samples = named(random_samples(60))
    file = SampleFile(samples)
    for batch_tokens in (1, 57, 200, 10_000):
        batches, expected = file.batches(batch_tokens), make_batches(samples, batch_tokens)
        assert len(batches) == len(expected)
        assert batches.num_samples == 61
        parts = [*batches[:2], *batches[2:]]
        for one, two, three in zip(batches, expected, parts, strict=True):
            for name, value in vars(two).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(getattr(one, name), value)
                    assert torch.equal(getattr(three, name), value)
                else:
                    assert getattr(one, name) == value


def test_batches_do_not_depend_on_the_order_of_the_data_set() -> None:
    samples = random_samples(60)
    turned = [dataclasses.replace(s, index=i) for i, s in enumerate(reversed(samples))]
    one, two = (SampleFile(each).batches(90) for each in (samples, turned))
    assert [batch.sample_ids for batch in one] == [batch.sample_ids for batch in two]


def test_memory_is_a_few_bytes_of_each_sample() -> None:
    """Growth from 2,000 to 6,000 samples of 40 tokens: what is kept, and the most on the way to batches."""
    held, most = [], []
    for count in (2000, 6000):
        rng = np.random.default_rng(0)
        mask = np.arange(40) >= 20
        tracemalloc.start()
        file = SampleFile(Sample(f"{i:08d}", rng.integers(0, 500, 40), mask, i) for i in range(count))
        held.append(tracemalloc.get_traced_memory()[0])
        assert file.batches(1000).num_samples == count
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Five numbers of eight bytes and the name of eight letters, and room to grow.
    assert 48 <= (held[1] - held[0]) / 4000 < 64
    assert (most[1] - most[0]) / 4000 < 110


def test_no_samples() -> None:
    file = SampleFile([])
    assert (len(file), file.largest_token, len(file.batches(100))) == (0, -1, 0)
    assert file.sample_ids.to_pylist() == []
