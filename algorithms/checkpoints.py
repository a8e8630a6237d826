"""Checkpoints: folders that appear whole or not at all, of which the newest is kept.

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
        """Write one, then remove those before it. One worker calls it."""
        for leftover in self.folder.glob(".*.tmp"):
            shutil.rmtree(leftover)  # of a killed process
        unfinished = self.folder / f".step-{step:08d}.tmp"
        unfinished.mkdir(parents=True)
        model.save_pretrained(unfinished / "model")
        self._tokenizer.save_pretrained(unfinished / "model")
        save_file(dict(training), str(unfinished / "training.safetensors"))
        (unfinished / "history.json").write_text(json.dumps(history))
        older = list(self.folder.glob("step-*"))
        finished = self.folder / f"step-{step:08d}"
        if finished in older:
            # Of a run that was continued from it: this one is the same.
            shutil.rmtree(unfinished)
            return
        unfinished.rename(finished)
        for path in older:
            shutil.rmtree(path)
