"""Teaching records to a model: the training loop of unlearning, with the loss of learning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.jobs.run_folder import UnlearnResult
from bench.jobs.unlearn import UnlearnSpec, unlearn
from bench.tasks import Record
from scoring.files import replacing
from scoring.settings import build


def fine_tuned(
    source: str, records: Sequence[Record], settings: Mapping[str, Any], folder: Path, progress: bool
) -> UnlearnResult:
    """The run that taught the records.

    Args:
        source: folder or Hugging Face id of the model.
        records: what it is to learn.
        settings: fields of UnlearnSpec: learning rate, epochs, seed, ...
        folder: to work in; the same call goes on where it was stopped.
        progress: show a bar.

    Raises:
        UserError: a setting that does not exist or cannot be; see `unlearn`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taught = folder / "taught.jsonl"
    with replacing(taught) as unfinished:
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    plain = {
        "alpha": 0.0,
        "replacement": False,
        "early_stopping": False,
        "check_every": 0,
        "evaluate": False,
    }
    fixed = {"model": source, "task": str(taught), "algorithm": "Relearn"}
    return unlearn(build(UnlearnSpec, plain | dict(settings) | fixed), folder / "run", progress)
