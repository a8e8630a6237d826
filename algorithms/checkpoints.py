"""Checkpoints: folders that appear whole or not at all. The newest is kept, and the one before it until an update
has shown that training can go on from the newest.

    step-00000012/
        model/                   loads with AutoModelForCausalLM.from_pretrained; fp32, adapters merged. Where adapters
                                 are trained, or a negated change, only the last checkpoint has it
        adapter/                 of a run that trains adapters; loads with peft.PeftModel.from_pretrained
        training.safetensors     optimizer moments, and what is trained where the model does not tell it
        shards/                  of a sharded run, in place of these three, which the last checkpoint gets once the run
                                 ends: what is trained, and optimizer moments, by torch.distributed.checkpoint
        history.json             everything else: the step, the sampler, the record of the run

There is no random state: every random number depends on the seed and the step.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from algorithms.history import History
from scoring.errors import UserError
from scoring.files import has_no_locks, shown
from scoring.reading import read_json, readable
from scoring.settings import named

# A worker whose driver was killed goes on until Ray notices.
WAIT_S = 120.0


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        folder: the folder of the checkpoint.
    """

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def adapter(self) -> Path:
        """The folder of the adapter, which is there if one was trained."""
        return self.folder / "adapter"

    @property
    def shards(self) -> Path:
        """The folder of what every worker of a sharded run has written of the training."""
        return self.folder / "shards"

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's weights by name."""
        weights: dict[str, torch.Tensor] = {}
        for path in sorted(self.model.glob("*.safetensors")):
            with readable(str(path), self._expected):
                weights |= load_file(str(path))
        return weights

    def training(self) -> dict[str, torch.Tensor]:
        """Optimizer moments and adapters, as `Trainable.state` gave them."""
        path = self.folder / "training.safetensors"
        with readable(str(path), self._expected):
            return load_file(str(path))

    @property
    def _expected(self) -> str:
        return f"a checkpoint: remove {self.folder}, and the same command goes on from an earlier one, or begins again"

    def history(self) -> dict[str, Any]:
        path = self.folder / "history.json"
        history: dict[str, Any] = dataclasses.asdict(read_json(path, History, self._expected))
        return history


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the folder that has them; it must be visible from every worker's node.
        tokenizer: the tokenizer, which is saved with each model.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder = folder
        self._tokenizer = tokenizer

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the context only this process writes here. A worker that an earlier driver has left behind is waited
        for: it would save steps that this process has passed, and remove its unfinished ones.

        Raises:
            UserError: another process writes here all the time.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=WAIT_S)
        except Timeout:
            raise UserError(
                f"{named('out')} {shown(self.folder.parent)}: a process of an earlier start has been writing here for "
                f"{WAIT_S:.0f} s; end it, and give the same command again"
            ) from None
        except (OSError, NotImplementedError) as error:
            # The folder of the run is locked too, and its command has said that this file system has no locks.
            if not has_no_locks(error):
                raise
        try:
            yield
        finally:
            # A refused run leaves nothing, a finished one its checkpoints.
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; None if there is none."""
        finished = sorted(self.folder.glob("step-*"))
        return Checkpoint(finished[-1]) if finished else None

    def save(
        self,
        step: int,
        model: PreTrainedModel | None,
        training: Mapping[str, torch.Tensor],
        history: Mapping[str, Any],
        save_adapter: Callable[[Path], None] = lambda _: None,
    ) -> None:
        """Write a checkpoint. Only one worker calls this method and the following ones.

        Args:
            model: the whole model; None leaves it out, see `add_model`.
            save_adapter: writes the adapter, if there is one, into the folder that it is given.
        """
        unfinished = self.begin(step)
        if model is not None:
            self._save_model(model, unfinished / "model")
        save_adapter(unfinished / "adapter")
        save_file(dict(training), str(unfinished / "training.safetensors"))
        self.finish(step, history)

    def begin(self, step: int) -> Path:
        """An empty folder for a checkpoint, which `finish` puts in its place."""
        for leftover in self.folder.glob(".*.tmp"):
            shutil.rmtree(leftover)  # from a process that was killed
        unfinished = self._unfinished(step)
        unfinished.mkdir(parents=True)
        return unfinished

    def unfinished_shards(self, step: int) -> Path | None:
        """Where the workers write their shards between `begin` and `finish`; None: nowhere."""
        return Checkpoint(self._unfinished(step)).shards

    def finish(self, step: int, history: Mapping[str, Any]) -> None:
        """Add the history to a checkpoint that was begun: it is whole."""
        unfinished = self._unfinished(step)
        (unfinished / "history.json").write_text(json.dumps(history))
        unfinished.rename(self.folder / f"step-{step:08d}")

    def _unfinished(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.tmp"

    def _save_model(self, model: PreTrainedModel, folder: Path) -> None:
        model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def add_model(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        """Add the whole model to a checkpoint that was saved without it."""
        unfinished = checkpoint.folder / ".model.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)  # from a process that was killed
        self._save_model(model, unfinished)
        unfinished.rename(checkpoint.model)

    def keep_newest(self) -> None:
        """Remove all checkpoints but the newest."""
        for path in sorted(self.folder.glob("step-*"))[:-1]:
            _remove(path)

    def discard(self, step: int) -> None:
        """Remove the checkpoint of this step, if there is one and it is not the only one: training diverged there."""
        if len(list(self.folder.glob("step-*"))) > 1:
            _remove(self.folder / f"step-{step:08d}")


def latest_step(folder: Path) -> int | None:
    """The update of the newest whole checkpoint in a folder of them; None if there is none."""
    finished = sorted(folder.glob("step-*"))
    return int(finished[-1].name.removeprefix("step-")) if finished else None


class NoCheckpoints(Checkpoints):
    """The checkpoints of a run so short that it is never continued: none are written."""

    def __init__(self) -> None:
        pass

    @contextmanager
    def held(self) -> Iterator[None]:
        yield

    def latest(self) -> None:
        return None

    def save(self, *_: Any) -> None:
        pass

    def begin(self, step: int) -> Path:
        return Path()

    def unfinished_shards(self, step: int) -> None:
        return None

    def finish(self, *_: Any) -> None:
        pass

    def keep_newest(self) -> None:
        pass

    def discard(self, step: int) -> None:
        pass


def _remove(folder: Path) -> None:
    """Remove a folder so that nobody sees it half removed: it is renamed first."""
    if folder.is_dir():
        leftover = folder.with_name(f".{folder.name}.tmp")
        folder.rename(leftover)
        shutil.rmtree(leftover)
