"""The peak memory of tensors while something runs, and memory that is given back."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# mallopt's name of the size from which on glibc maps memory for a block by itself, and gives it back when it is freed.
M_MMAP_THRESHOLD = -3
LARGE = 1 << 20


def give_back_large_blocks() -> None:
    """Have this process give memory of a MB and more back as soon as it is freed, where its C library can.

    glibc raises the size from which it does so to that of whatever was freed, up to 32 MB. The layers of a sharded
    model, which are put together and let go of all the time, would leave holes as large as the whole model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create within the context: `live` now, `peak` at most.

    It counts the operations' results, so it is exact to the byte, while the process's resident size depends on the
    allocator. A kernel's inner workspace is not counted.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def count(self, *tensors: torch.Tensor) -> None:
        """Count tensors that exist already, too; storage that they share counts once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)))
        return result
