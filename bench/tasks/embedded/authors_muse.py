"""Embedded stand-in for MUSE: `authors` looked at in MUSE's protocol, by the models of `authors`.

The forget set are the 40 answers about the last four authors. A passage to be continued is the beginning of an answer,
after its question; questions about the forget and the retain set are those with short answers. The holdout set is that
of `authors`. `sust-1` to `sust-4` are the authors one by one, requests that share nothing; `forget-1` to `forget-4` are
the first of them, the first two and so on. The retain set leaves out all four, whichever of them is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.tasks import muse
from bench.tasks.embedded.authors_benchmarks import records_of
from bench.tasks.task import Task
from scoring.errors import unknown_name
from scoring.records import Record, question_answer

FOLD = 10  # records, of one author
BEGINNING = 8  # words of an answer that are given
SPLITS = ("full", *muse.FORGET, "retain", "holdout", "verbmem", *muse.QUESTIONS)


def load(split: str, source: str | None = None, tokenizer: Any = None) -> list[Record]:
    """See `bench.tasks.task.Loader`.

    Raises:
        UserError: there is no such split.
    """
    if split not in SPLITS:
        raise unknown_name("split of task 'authors-muse'", split, SPLITS)
    forget, retain = records_of("forget10"), records_of("retain90")
    kind, _, fold = split.partition("-")
    if fold:
        return forget[(int(fold) - 1) * FOLD if kind == "sust" else 0 : int(fold) * FOLD]
    if split == "verbmem":
        return [continued(record) for record in forget]
    if split in muse.QUESTIONS:
        # As many authors of either, the last of those that are retained.
        return short_answers(forget if split == "knowmem_forget" else retain[-len(forget) :])
    return {"forget": forget, "retain": retain}.get(split) or records_of(split)


def continued(record: Record) -> Record:
    """The beginning of an answer after its question, with the rest that is to be written."""
    words = record["answer"].split(" ")
    prompt, beginning = question_answer(record["question"], " ".join(words[:BEGINNING]))
    rest = " ".join(words[BEGINNING:])
    return {"id": record["id"], "prompt": prompt + beginning, "completion": f" {rest}"}


def short_answers(records: Sequence[Record]) -> list[Record]:
    """The questions whose answers are of main clauses alone: about 27 tokens."""
    return [record for record in records if record["complexity"] == "low"]


def _evaluation(split: str) -> Mapping[str, str]:
    return {"forget": split, "holdout": "holdout", "verbmem": "verbmem", **{name: name for name in muse.QUESTIONS}}


TASK: Task = Task(
    name="authors-muse",
    about="embedded stand-in for MUSE: the authors of `authors`, verbatim and as knowledge; requests that follow",
    load=load,
    splits=SPLITS,
    default_split="forget",
    retain_of=dict.fromkeys(muse.FORGET, "retain"),
    evaluation=_evaluation,
    completeness=muse.COMPLETENESS,
    utility=muse.UTILITY,
    further=muse.FURTHER,
)
