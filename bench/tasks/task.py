"""What a task is: a forget set, a retain set, the metrics that are measured on it, and the paper's settings for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from scoring.errors import UserError
from scoring.records import Record

HarnessTask = str | dict[str, Any]


class Unreachable(UserError):
    """Data that cannot be had: they are not on this machine, and no hub is within reach."""


def _no_benchmarks(source: str | None) -> Mapping[str, tuple[HarnessTask, ...]]:
    return {}


class Loader(Protocol):
    """Reads the records of a split."""

    def __call__(self, split: str, source: str | None, tokenizer: Any) -> list[Record]:
        """The records of a split in order, each with a unique "id".

        Args:
            split: one of the task's splits.
            source: where the data are: a Hugging Face id, a folder or a file; None: the data are generated.
            tokenizer: of the model that is to forget; for texts that are cut by the number of tokens.

        Raises:
            UserError: one line that names the file, record or field at fault; Unreachable: the data cannot be had;
                the message says what to do.
        """


@dataclass(frozen=True)
class Task:
    """One entry of the registry.

    Attributes:
        name: in the registry, and on the command line.
        about: one line.
        load: see Loader.
        splits: that can be loaded.
        default_split: the forget split if none is named.
        retain_of: forget split -> the split that is retained when it is forgotten.
        evaluation: forget split -> {set that metrics are formed from, such as "world_facts": split}.
        completeness, utility: metrics of the paper's table of this task, in its order, see `bench.metrics`. These and
            the further ones are what `evaluate` measures; others can be asked for by name, see `bench.metrics.choice`.
        further: metrics beyond that table.
        source: where the data are if none is named; None: the data are generated, or a source must be named.
        source_is: what SOURCE in NAME:SOURCE is; empty: the data are generated, and there is none.
        harness: source -> {set that metrics are formed from, such as "arc_easy": tasks of lm-evaluation-harness}. Each
            task is a name that the harness knows, or a configuration; a configuration whose "task" is such a name
            changes that task. The questions of several tasks are pooled.
        new_tokens: how many tokens the model may write; None: 20 more than the true answer has.
        epochs, max_steps: how long the paper unlearns; None, None: the algorithm's own number of epochs.
        refusals: answers for PO and IdkDPO; empty: the built-in ones.
        toxicity_model: the text classifier of the toxicity metrics, see `bench.metrics.toxicity`.
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
    harness: Callable[[str | None], Mapping[str, tuple[HarnessTask, ...]]] = _no_benchmarks
    new_tokens: int | None = None
    epochs: int | None = None
    max_steps: int | None = None
    refusals: tuple[str, ...] = ()
    toxicity_model: str = "unitary/toxic-bert"

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics that the task names."""
        return (*self.completeness, *self.utility, *self.further)
