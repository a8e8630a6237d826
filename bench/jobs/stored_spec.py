"""The spec that made a result, as a spec file: the same command with it gives the same identity.

What is stored is an identity: the fields that count, and hashes in place of some names. Fields that it leaves out have
their defaults: how work was spread, and settings that did not exist when it was made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from algorithms.corpus import REFUSALS
from algorithms.stopping import PAPER
from bench.files.folders import owner_of, refuse_several
from bench.files.score_file import read_scores
from bench.files.spec import as_yaml
from bench.jobs.attack_spec import AttackSpec
from bench.jobs.difficulty import DifficultySpec
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.score import ScoreSpec
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.train import TrainSpec
from bench.jobs.truth import TruthSpec
from bench.jobs.unlearn import UnlearnSpec
from bench.tasks import TASKS
from scoring.errors import UserError
from scoring.reading import exists
from scoring.settings import settings_of

# Command, what its settings are, and a key that only its identities have; the first that fits.
KINDS: tuple[tuple[str, type, str], ...] = (
    ("sweep", SweepSpec, "base"),
    ("train", TrainSpec, "left_out_sha256"),
    ("unlearn", UnlearnSpec, "forget_sha256"),
    ("attack", AttackSpec, "prompt_templates"),
    ("unlearn", UnlearnSpec, "requests_sha256"),
    ("evaluate", EvaluateSpec, "fingerprints"),
    ("difficulty --truth", TruthSpec, "truth"),
    ("difficulty", DifficultySpec, "corpus_sha256"),
    ("score", ScoreSpec, "data_sha256"),
)
EXPECTED = "the folder of a run or a sweep, or a Parquet file that score, difficulty, evaluate or attack wrote"


@dataclass(frozen=True)
class StoredSpec:
    """The spec that made a result.

    Attributes:
        command: that takes it, such as "unlearn".
        settings: of a spec file.
        notes: what the user has to put in by hand.
    """

    command: str
    settings: Mapping[str, Any]
    notes: tuple[str, ...]

    def as_yaml(self) -> str:
        """A spec file."""
        takes = "SPEC.yaml" if self.command == "sweep" else "--spec SPEC.yaml"
        return f"# mrd-bench {self.command} {takes} --out OUT\n{as_yaml(self.settings)}"


def stored_spec(path: str | Path) -> StoredSpec:
    """The spec that made a finished or unfinished run, a sweep, or a file of scores, measures, updates or metrics.

    Raises:
        UserError: it is none of these.
    """
    identity = _identity_in(Path(path))
    for command, kind, key in KINDS:
        if key in identity:
            return _spec_of(command, kind, identity)
    raise UserError(f"{path} does not say what made it: expected {EXPECTED}")


def _identity_in(path: Path) -> Mapping[str, Any]:
    # The pieces of an unfinished file lie in a folder beside it.
    folder = path if path.is_dir() else path.with_name(path.name + ".parts")
    if path.is_file():
        return read_scores(path, EXPECTED)[1]
    if not exists(folder):
        raise UserError(f"{path} does not exist: expected {EXPECTED}")
    refuse_several(folder, "one of them")
    if (owner := owner_of(folder)) is None:
        raise UserError(f"{path} holds no spec.json of a run: expected {EXPECTED}")
    return owner


def _spec_of(command: str, kind: type, identity: Mapping[str, Any]) -> StoredSpec:
    settings = {}
    for setting in settings_of(kind):
        default = None if setting.default is MISSING else setting.default
        settings[setting.name] = identity.get(setting.name, default)
    if kind is UnlearnSpec and identity.get("stopping") is None and settings["check_every"] != 0:
        settings["stopping"] = PAPER  # the only rule that there was once, which identities do not name
    notes = []
    if isinstance(listed := settings.get("refusals"), list):
        # The texts themselves are kept, so that they count, and not the name of the file.
        built_in = [list(REFUSALS), *(list(task.refusals) for task in TASKS.values() if task.refusals)]
        settings["refusals"] = None
        if listed not in built_in:
            notes.append("refusals were read from a file whose name is not kept: put it in")
    for name in ("weights", "alternatives", "adapter", "sentence_model", "toxicity_model"):
        value = settings.get(name)
        by_hash = isinstance(value, str) and (value.startswith("sha256:") or _is_sha256(value))
        if by_hash or (name == "adapter" and value == "continued"):
            notes.append(f"{name} was a file or a folder that is known by its hash alone: put its name in")
    if isinstance(schedule := settings.get("schedule"), dict) and str(schedule.get("by")).startswith("sha256:"):
        notes.append("schedule: by was a file that is known by its hash alone: put its name in")
    if identity.get("plugins"):
        notes.append("plugins were loaded: give the same files with --plugin")
    # JSON's types: tuples among the defaults are lists there.
    return StoredSpec(command, json.loads(json.dumps(settings)), tuple(notes))


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
