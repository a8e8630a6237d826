"""Tensors in a folder of safetensors files: written as they come, and read a few rows at a time.

Whoever writes or reads never holds them all: they may be as large as a model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# A file is written once it has at least so many bytes, and only one at a time is mapped into memory by a reader.
FILE_BYTES = 1 << 27


class TensorWriter:
    """Takes tensors, and writes them to files of about FILE_BYTES."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = 0
        self._bytes = 0
        self._waiting: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor; it must not change before the folder is whole."""
        self._waiting[name] = tensor.detach().cpu().contiguous()
        self._bytes += tensor.nbytes
        if self._bytes >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has not been written yet."""
        if self._waiting:
            save_file(self._waiting, str(self._folder / f"{self._files:05d}.safetensors"))
            self._files, self._bytes, self._waiting = self._files + 1, 0, {}


@contextmanager
def writing_tensors(folder: Path) -> Iterator[TensorWriter]:
    """Within the context tensors can be added. The folder appears at the end, whole or not at all."""
    # Of this process: one that an earlier driver has left behind may be writing the same.
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        writer = TensorWriter(unfinished)
        yield writer
        writer.flush()
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise  # else the other one was faster
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class StoredTensors(Mapping[str, Any]):
    """The tensors of a folder by name. Values are slices of safetensors, whose rows `value[start:stop]` are read as
    they are asked for, as NumPy arrays.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there")
        self._file_of: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(str(path), "numpy") as file:
                self._file_of |= dict.fromkeys(file.keys(), path)
        self._path: Path | None = None
        self._open: Any = None

    def __getitem__(self, name: str) -> Any:
        path = self._file_of[name]
        if path != self._path:
            self._open = None  # before the next: only one is mapped
            self._path, self._open = path, safe_open(str(path), "numpy")
        return self._open.get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)
