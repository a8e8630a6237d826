"""What a task is: a forget set, a retain set, the metrics that are taken of it, and what the paper runs it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from scoring.errors import UserError
from scoring.records import Record

HarnessTask = str | dict[str, Any]


class Unreachable(UserError):
    """Data that cannot be had here: not on this machine, and no hub within reach."""


def _no_harness(source: str | None) -> Mapping[str, tuple[HarnessTask, ...]]:
    return {}


class Loader(Protocol):
    """Reads the records of a split."""

    def __call__(self, split: str, source: str | None, tokenizer: Any) -> list[Record]:
        """Records in order, each with a unique "id".

        Args:
            split: one of the task's splits.
            source: where the data are: a Hugging Face id, a folder or a file; None where nothing is to be read.
            tokenizer: of the model that is to forget; for texts that are cut by the number of tokens.

        Raises:
            UserError: one line that names the file, record or field at fault; Unreachable: data that cannot be had,
                and what to do about it.
        """


@dataclass(frozen=True)
class Task:
    """One entry of the registry.

    Attributes:
        name: in the registry, and of --task.
        about: one line.
        load: see Loader.
        splits: what it can load.
        default_split: what is forgotten if nobody says otherwise.
        retain_of: forget split -> the split that is kept when it is forgotten.
        evaluation: forget split -> {set that a metric speaks of, such as "world_facts": split}.
        completeness, utility: metrics of the paper's table of this task, in its order, see `bench.metrics`.
        further: metrics beyond that table.
        source: where the data are if --task does not say; None: the data are generated, or nobody can know.
        source_is: what SOURCE of --task NAME:SOURCE is; empty: the data are generated, and there is none.
        harness: source -> {set that a metric speaks of, such as "arc_easy": tasks of lm-evaluation-harness}, each a
            name that it knows or a configuration; one whose "task" is a name that it knows changes that task. The
            questions of several are pooled.
        new_tokens: how many tokens the model may write; None: 20 more than the true answer has.
        epochs, max_steps: how long the paper unlearns; None, None: the algorithm's own number of epochs.
        refusals: answers for PO and IdkDPO; empty: the built-in ones.
        toxicity_model: the text classifier of its toxicity metrics, see `bench.metrics.toxicity`.
    """

    name: str
    about: str
    load: Loader
    splits: tuple[str, ...]
    default_split: str
    retain_of: Mapping[str, str]
    evaluation: Callable[[str], Mapping[str, str]]
    completeness: tuple[str, ...]
    utility: tuple[str, ...]
    further: tuple[str, ...] = ()
    source: str | None = None
    source_is: str = ""
    harness: Callable[[str | None], Mapping[str, tuple[HarnessTask, ...]]] = _no_harness
    new_tokens: int | None = None
    epochs: int | None = None
    max_steps: int | None = None
    refusals: tuple[str, ...] = ()
    toxicity_model: str = "unitary/toxic-bert"

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*self.completeness, *self.utility, *self.further)
