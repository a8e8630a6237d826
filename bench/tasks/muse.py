"""MUSE: news articles and books to forget, looked at from six sides (Shi et al., 2024).

SOURCE is `news`, `books` (muse-bench/MUSE-News and muse-bench/MUSE-Books on the hub), or a folder with these files,
whose folders are the hub's configurations and whose names are its splits; only what is used must be there:

    raw/forget.jsonl  raw/retain1.jsonl  raw/retain2.jsonl  raw/holdout.jsonl              text
    train/forget.jsonl  train/retain1.jsonl  train/retain2.jsonl                           text
    verbmem/forget.jsonl                                                                   prompt, gt
    knowmem/forget_qa.jsonl  knowmem/retain_qa.jsonl                                       question, answer
    knowmem/forget_qa_icl.jsonl  knowmem/retain_qa_icl.jsonl                               question, answer
    privleak/forget.jsonl  privleak/holdout.jsonl                                          text
    scal/forget_1.jsonl ... scal/forget_4.jsonl     text: each has the one before in it
    sust/forget_1.jsonl ... sust/forget_4.jsonl     text: requests that come one after the other

Forget sets: `forget`; `forget-1` to `forget-4`, which grow (scalability); `sust-1` to `sust-4`, which share nothing
(sustainability). retain1 is kept, retain2 is asked about. Texts are cut into pieces of at most 2048 tokens, as MUSE
does. Questions are asked after the ten examples of their set, which the base models of MUSE need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.tasks.sources import TEXT, Fields, HubSet, read_records
from bench.tasks.task import Task, Unreachable
from bench.tasks.whp import chunks
from scoring.records import Record, question_answer

COMPLETENESS = ("verbmem_f", "knowmem_f", "priv_leak")
UTILITY = ("knowmem_r",)
FURTHER = ("extraction_strength", "exact_memorization", "mia_min_40_auc", "ma", "el")

CORPORA = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
TOKENS = 2048  # of a text at most, with what begins a text
FOLDS = (1, 2, 3, 4)
TEXTS_OF: dict[str, tuple[str, ...]] = {
    "forget": ("raw/forget",),
    "retain1": ("raw/retain1",),
    "retain2": ("raw/retain2",),
    "holdout": ("raw/holdout",),
    "full": ("train/forget", "train/retain1", "train/retain2"),
    "privleak_forget": ("privleak/forget",),
    "privleak_holdout": ("privleak/holdout",),
    **{f"forget-{fold}": (f"scal/forget_{fold}",) for fold in FOLDS},
    **{f"sust-{fold}": (f"sust/forget_{fold}",) for fold in FOLDS},
}
VERBMEM = "verbmem/forget"
QUESTIONS = {"knowmem_forget": "knowmem/forget_qa", "knowmem_retain": "knowmem/retain_qa"}
EXAMPLES = "_icl"
FORGET = ("forget", *(f"{kind}-{fold}" for kind in ("forget", "sust") for fold in FOLDS))

PASSAGE: Fields = {"text": TEXT}
CONTINUED: Fields = {"prompt": TEXT, "gt": TEXT}
QUESTION: Fields = {"question": TEXT, "answer": TEXT}
# The sets of a task file.
SETS: dict[str, Fields] = {
    "forget": {},
    "retain": {},
    "holdout": {},
    "verbmem": CONTINUED,
    "knowmem_forget": QUESTION,
    "knowmem_retain": QUESTION,
    f"knowmem_forget{EXAMPLES}": QUESTION,
    f"knowmem_retain{EXAMPLES}": QUESTION,
}


def load(split: str, source: str | None, tokenizer: Any) -> list[Record]:
    """See `bench.tasks.task.Loader`: texts {"id", "text"}, uncut if there is no tokenizer; passages {"id", "prompt",
    "completion"}; questions with the examples before them.

    Raises:
        UserError: one line.
    """
    place = CORPORA.get(source or "news", source or "")

    def read(file: str, fields: Fields) -> list[Record]:
        config, _, name = file.partition("/")
        return read_records("muse", place, file, HubSet(place, config, name), fields)

    if split in TEXTS_OF:
        files = TEXTS_OF[split]
        read_from = [(file.split("/")[1] if len(files) > 1 else split, read(file, PASSAGE)) for file in files]
        return [piece for name, records in read_from for piece in pieces(records, name, tokenizer)]
    if split == "verbmem":
        return passages(read(VERBMEM, CONTINUED))
    file = QUESTIONS[split]
    try:
        examples = read(file + EXAMPLES, QUESTION)
    except Unreachable:
        examples = []  # the questions say themselves whether they can be had
    return questions(read(file, QUESTION), examples, split)


def of_files(split: str, read: Callable[[str], list[Record] | None], tokenizer: Any) -> list[Record]:
    """The same of a task file.

    Args:
        read: one of SETS -> its records, None if the task file names none.
    """
    records = read(split) or []
    if split == "verbmem":
        return passages(records)
    if split in QUESTIONS:
        return questions(records, read(split + EXAMPLES) or [], split)
    return records


def set_of(split: str) -> str:
    """The set of a task file that a split is."""
    return split


def pieces(records: Sequence[Record], name: str, tokenizer: Any) -> list[Record]:
    """Texts as {"id", "text"}, in pieces that are no longer than TOKENS. Empty ones stay, to be listed as unusable."""
    cut = []
    for number, record in enumerate(records):
        parts = chunks(record["text"], tokenizer, TOKENS) if tokenizer is not None else []
        sample_id = f"{name}-{number:05d}"
        if len(parts) < 2:
            cut.append({"id": sample_id, "text": record["text"]})
        else:
            cut += [{"id": f"{sample_id}-{place}", "text": part} for place, part in enumerate(parts)]
    return cut


def passages(records: Sequence[Record]) -> list[Record]:
    """Beginnings of passages, each with the rest that is to be written."""
    return [
        {"id": f"verbmem-{number:05d}", "prompt": record["prompt"], "completion": record["gt"]}
        for number, record in enumerate(records)
    ]


def questions(records: Sequence[Record], examples: Sequence[Record], name: str) -> list[Record]:
    """Questions with their answers, and as they are put: after the examples."""
    before = "".join("".join(question_answer(each["question"], each["answer"])) + "\n\n" for each in examples)
    put = []
    for number, record in enumerate(records):
        prompt, completion = question_answer(record["question"], record["answer"])
        asked = {"prompt": before + prompt, "completion": completion}
        put.append({"id": f"{name}-{number:05d}", "question": record["question"], "answer": record["answer"], **asked})
    return put


def _evaluation(split: str) -> Mapping[str, str]:
    # MUSE tells members from others by excerpts of the first forget set; of a later one there are its own texts.
    by_excerpts = {"forget": "privleak_forget", "holdout": "privleak_holdout"}
    sets = by_excerpts if split == "forget" else {"forget": split, "holdout": "holdout"}
    return {**sets, "verbmem": "verbmem", **{name: name for name in QUESTIONS}}


TASK: Task = Task(
    name="muse",
    about="news articles or books: verbatim text, knowledge and traces of both (MUSE)",
    load=load,
    splits=(*TEXTS_OF, "verbmem", *QUESTIONS),
    default_split="forget",
    retain_of=dict.fromkeys(FORGET, "retain1"),
    evaluation=_evaluation,
    completeness=COMPLETENESS,
    utility=UTILITY,
    further=FURTHER,
    source="news",
    source_is="news, books, or a folder with files such as raw/forget.jsonl",
)
