"""A short fine-tune on part of the forget set: do the forgotten samples come back?"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.attacks.relearn import BATCH_SIZE, share_of
from bench.jobs.train import fine_tuned
from bench.tasks import Record
from scoring.errors import UserError


@dataclass(frozen=True)
class Relearning:
    """The protocol.

    Attributes:
        share: of the forget set that is trained on, in (0, 1]; drawn by `seed`.
        steps: updates, of BATCH_SIZE samples each.
        learning_rate: of AdamW.
        seed: of the share and of the order.
        workers: of Ray Train; 0 trains in this process.
        template: settings of the template by name, see `scoring.templates`.
    """

    share: float = 0.25
    steps: int = 25
    learning_rate: float = 5e-5
    seed: int = 0
    workers: int = 0
    template: Mapping[str, Any] = field(default_factory=dict)


def taught_again(source: str, records: Sequence[Record], protocol: Relearning, folder: Path, progress: bool) -> Path:
    """The folder of the model after the fine-tune.

    Args:
        source: folder or Hugging Face id of the model.
        records: the forget set.
        protocol: how it is trained.
        folder: to work in; the same call goes on where it was stopped.
        progress: show a bar.
    """
    chosen = share_of(records, protocol.share, protocol.seed)
    settings = {
        "max_steps": protocol.steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": protocol.learning_rate,
        "seed": protocol.seed,
        "workers": protocol.workers,
        **protocol.template,
    }
    try:
        return fine_tuned(source, chosen, settings, folder, progress).model
    except UserError:
        shutil.rmtree(folder / "run", ignore_errors=True)
        raise
