"""Tensors that are written as they come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from scoring import tensor_folder
from scoring.tensor_folder import StoredTensors, writing_tensors


def test_they_are_read_back_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensor_folder, "FILE_BYTES", 100)
    tensors = {f"t{i}": torch.randn(i + 1, 5, dtype=torch.float64).t().contiguous().t() for i in range(6)}
    with writing_tensors(tmp_path / "folder") as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        assert not (tmp_path / "folder").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert len(list((tmp_path / "folder").iterdir())) == 5, "of 40 + 80, 120, 160 and more bytes"
    stored = StoredTensors(tmp_path / "folder")
    assert stored.keys() == tensors.keys()
    for name in reversed(tensors):
        for rows in (slice(0, 1), slice(len(tensors[name]) // 2, len(tensors[name]))):
            np.testing.assert_array_equal(stored[name][rows], tensors[name][rows].numpy())


def test_they_are_whole_or_not_there(tmp_path: Path):
    with pytest.raises(AttributeError), writing_tensors(tmp_path / "folder") as writer:
        writer.add("no tensor", None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
