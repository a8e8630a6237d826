"""Checkpoints: folders that appear whole or not at all. The newest is kept, and the one before it until an update
has shown that the newest can be trained on.

    step-00000012/
        model/                   loads with AutoModelForCausalLM.from_pretrained; fp32, adapters merged
        training.safetensors     optimizer moments, and adapters
        history.json             everything else: the step, the sampler, the record of the run

No random state: every random number is addressed by the seed and the step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's weights by name."""
        found: dict[str, torch.Tensor] = {}
        for path in sorted(self.model.glob("*.safetensors")):
            found |= load_file(str(path))
        return found

    def training(self) -> dict[str, torch.Tensor]:
        return load_file(str(self.folder / "training.safetensors"))

    def history(self) -> dict[str, Any]:
        return json.loads((self.folder / "history.json").read_text())


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are; visible from every worker's node.
        tokenizer: is saved with each model.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder = folder
        self._tokenizer = tokenizer

    def latest(self) -> Checkpoint | None:
        """The newest whole one."""
        finished = sorted(self.folder.glob("step-*"))
        return Checkpoint(finished[-1]) if finished else None

    def save(
        self, step: int, model: PreTrainedModel, training: Mapping[str, torch.Tensor], history: Mapping[str, Any]
    ) -> None:
        """Write one. One worker calls it, and the following."""
        for leftover in self.folder.glob(".*.tmp"):
            shutil.rmtree(leftover)  # of a killed process
        unfinished = self.folder / f".step-{step:08d}.tmp"
        unfinished.mkdir(parents=True)
        model.save_pretrained(unfinished / "model")
        self._tokenizer.save_pretrained(unfinished / "model")
        save_file(dict(training), str(unfinished / "training.safetensors"))
        (unfinished / "history.json").write_text(json.dumps(history))
        unfinished.rename(self.folder / f"step-{step:08d}")

    def keep_newest(self) -> None:
        """Remove all but the newest."""
        for path in sorted(self.folder.glob("step-*"))[:-1]:
            _remove(path)

    def distrust(self, step: int) -> None:
        """Remove the checkpoint of this step, whose weights gave a loss that nothing can be done with, unless it is
        the only one."""
        if len(list(self.folder.glob("step-*"))) > 1:
            _remove(self.folder / f"step-{step:08d}")


class NoCheckpoints(Checkpoints):
    """Of a run that is too short to be continued: nothing is kept, so that nothing has to be written."""

    def __init__(self) -> None:
        pass

    def latest(self) -> None:
        return None

    def save(self, *_: Any) -> None:
        pass

    def keep_newest(self) -> None:
        pass

    def distrust(self, step: int) -> None:
        pass


def _remove(folder: Path) -> None:
    """Whole or not at all, for whoever looks at the names."""
    if folder.is_dir():
        leftover = folder.with_name(f".{folder.name}.tmp")
        folder.rename(leftover)
        shutil.rmtree(leftover)
