"""Tokenized samples on disk, so that a data set may be larger than memory."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa

from scoring.samples import Batch, Sample, collate, group_samples, token_digest


class SampleFile:
    """Samples in a temporary file that ends with the process; memory holds a few bytes of each.

    Args:
        samples: the samples in data-set order; read once.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._file = tempfile.TemporaryFile(prefix="mrd-bench-samples-")  # noqa: SIM115 (as long as this lives)
        ends, name_ends = array("q", [0]), array("q", [0])
        num_scored, digests, indices = array("q"), array("Q"), array("q")
        self.largest_token = -1
        self._names = bytearray()
        for sample in samples:
            # One number per token: the ids, which are at least 0, are inverted where a token is not scored.
            tokens = np.where(sample.scored, sample.input_ids, ~sample.input_ids).astype(np.int32)
            self._file.write(tokens.tobytes())
            self._names += sample.sample_id.encode("utf-8")
            ends.append(ends[-1] + len(tokens))
            num_scored.append(sample.num_scored)
            digests.append(token_digest(sample.input_ids))
            indices.append(sample.index)
            name_ends.append(len(self._names))
            self.largest_token = max(self.largest_token, int(sample.input_ids.max()))
        self._file.flush()
        # Views: a copy would be another eight bytes of each sample.
        self._ends, self._name_ends = np.frombuffer(ends, np.int64), np.frombuffer(name_ends, np.int64)
        self._digests, self._indices = np.frombuffer(digests, np.uint64), np.frombuffer(indices, np.int64)
        self.num_scored = np.frombuffer(num_scored, np.int64)

    def __len__(self) -> int:
        return len(self.num_scored)

    def __getitem__(self, row: int) -> Sample:
        first, last = self._ends[row : row + 2].tolist()
        self._file.seek(4 * first)
        tokens = np.frombuffer(self._file.read(4 * (last - first)), np.int32).astype(np.int64)
        scored = tokens >= 0
        return Sample(self._name(row), np.where(scored, tokens, ~tokens), scored, int(self._indices[row]))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample; 0 without samples."""
        return int(np.diff(self._ends).max(initial=0))

    @property
    def sample_ids(self) -> pa.Array:
        """Ids of the samples, (N,) text, in data-set order."""
        return pa.LargeStringArray.from_buffers(
            len(self), pa.py_buffer(self._name_ends), pa.py_buffer(self._names)
        ).cast(pa.string())

    def _name(self, row: int) -> str:
        return self._names[self._name_ends[row] : self._name_ends[row + 1]].decode("utf-8")

    def names_of(self, indices: np.ndarray) -> list[str]:
        """Ids of the samples at these positions in the data set, (n,)."""
        return [self._name(row) for row in self.rows_of(indices).tolist()]

    def rows_of(self, indices: np.ndarray) -> np.ndarray:
        """Positions in the data set -> positions in this file, both (N,)."""
        return np.searchsorted(self._indices, indices)

    def batches(self, batch_tokens: int) -> Batches:
        """The batches that `make_batches` makes of the samples; each is read when it is accessed."""
        groups = group_samples(np.diff(self._ends), self.num_scored, self._digests, self._indices, batch_tokens)
        return Batches(self, groups)


class Batches(Sequence[Batch]):
    """Batches of a `SampleFile`, read when they are accessed."""

    def __init__(self, file: SampleFile, groups: list[np.ndarray]) -> None:
        self._file, self._groups = file, groups

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, number: int) -> Batch: ...

    @overload
    def __getitem__(self, number: slice) -> Batches: ...

    def __getitem__(self, number: int | slice) -> Batch | Batches:
        if isinstance(number, slice):
            return Batches(self._file, self._groups[number])
        return collate([self._file[row] for row in self._groups[number].tolist()])

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    @property
    def num_samples(self) -> int:
        """The number of samples in all batches, without reading any."""
        return sum(len(group) for group in self._groups)
