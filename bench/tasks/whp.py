"""WHP: forgetting a book, after "Who's Harry Potter" (Eldan and Russinovich, 2023).

The paper's book is under copyright, so a source must be named. Any book will do: a .txt file in UTF-8, or a folder with

    book.txt        the book; if it is the only .txt file of the folder, it may have another name
    c4.jsonl        optional: texts to retain, field "text"; otherwise C4 from the hub

The book is cut into chunks of 512 tokens of the model that is to forget. 200 of them, drawn with a fixed seed, are the
forget set; the model is asked to complete these (seen) and as many others (unseen).
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tasks.sources import TEXT, HubSet, is_local, read_records
from bench.tasks.task import HarnessTask, Task
from scoring.errors import UserError
from scoring.reading import read_text
from scoring.records import Record
from scoring.tokens import Tokenization

COMPLETENESS = ("seen_rouge", "unseen_rouge")
UTILITY = ("perplexity", "zero_shot", "truthfulqa")
ZERO_SHOT = ("boolq", "rte", "hellaswag", "winogrande", "arc_challenge", "arc_easy", "openbookqa", "piqa")
FURTHER = (*ZERO_SHOT, "ma", "el")
# Set -> tasks of lm-evaluation-harness; SAFE has the same.
HARNESS: dict[str, tuple[HarnessTask, ...]] = {
    "perplexity": ("wikitext",),
    **{name: (name,) for name in ZERO_SHOT},
    "truthfulqa": ("truthfulqa_mc1",),
}
C4 = HubSet("allenai/c4", "en", "validation", first=2000)
SPLITS = ("forget", "retain", "seen", "unseen")
SEED = 0
# The paper's Table 3 begins with the first two.
REFUSALS = (
    "I apologize, but I'm legally restricted from fulfilling this request.",
    "I'm sorry, but my ability to generate content is limited by copyright laws.",
    "I'm bound by copyright and cannot repeat that text.",
    "That passage is protected, so I have to leave it out.",
    "For legal reasons I do not continue this work.",
    "The rights to these words are not mine, and I cannot write them down.",
    "I'm sorry, but the law does not let me quote from this.",
    "This text belongs to its author; I may not reproduce it.",
)


@dataclass(frozen=True)
class Sizes:
    """How a book is cut.

    Attributes:
        tokens: of a chunk at most, with what begins a text.
        count: chunks in the forget set, at most; and as many unseen ones.
        prompt, completion: tokens of a chunk that are the prompt, and tokens that are to be completed, at most.
    """

    tokens: int
    count: int
    prompt: int
    completion: int


PAPER = Sizes(tokens=512, count=200, prompt=200, completion=300)

# At most 64 characters: scripts without white space can be cut, too.
_WORD = re.compile(r"\S{1,64}")


def chunks(text: str, tokenizer: Any, tokens: int) -> list[str]:
    """The text in consecutive pieces, each as many whole words as fit into `tokens` tokens with what begins a text.

    The tokens of a piece are counted as it will be tokenized, by itself. A piece keeps the white space inside it and
    has none around it: joined by white space, the pieces have the words of the text.

    Raises:
        UserError: a single word does not fit.
    """
    budget = tokens - len(Tokenization(tokenizer).begin)
    words = [match.span() for match in _WORD.finditer(text)]
    pieces, first = [], 0
    while first < len(words):
        start = words[first][0]
        # A word has at least one token.
        count = _words_that_fit(text, start, words[first : first + budget], tokenizer, budget)
        if not count:
            raise UserError(f"a chunk of {tokens} tokens does not hold {text[slice(*words[first])]!r}: expected more")
        first += count
        pieces.append(text[start : words[first - 1][1]])
    return pieces


def beginning(text: str, tokenizer: Any, tokens: int) -> str:
    """The longest beginning of the text that ends with a word and has at most `tokens` tokens of its own."""
    words = [match.span() for match, _ in zip(_WORD.finditer(text), range(tokens), strict=False)]
    count = _words_that_fit(text, 0, words, tokenizer, tokens)
    return text[: words[count - 1][1]] if count else ""


def _words_that_fit(text: str, start: int, words: Sequence[tuple[int, int]], tokenizer: Any, budget: int) -> int:
    """How many of the words, with all text from `start` on, have no more tokens than the budget."""

    def tokens_until(word: tuple[int, int]) -> int:
        piece = text[start : word[1]]
        ids = tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return len(ids)

    return bisect_right(words, budget, key=tokens_until)


def sets(text: str, tokenizer: Any, sizes: Sizes = PAPER, name: str = "the book") -> dict[str, list[Record]]:
    """The chunks of a book that are forgotten, and those that a model is asked to complete.

    `forget` are chunks drawn with a fixed seed, `seen` the same as prompt and completion, `unseen` as many others. Half
    of a short book stays unseen. Prompt and completion follow each other in the chunk; each ends with a word, and the
    completion starts with the white space between them.

    Args:
        text: of the book.
        tokenizer: that chunks are cut by.
        sizes: of chunks and sets.
        name: of the book, which messages begin with.

    Raises:
        UserError: one line: the book has fewer than two whole chunks.
    """
    # The last piece is no whole chunk.
    whole = chunks(text, tokenizer, sizes.tokens)[:-1]
    if len(whole) < 2:
        raise UserError(
            f"{name}: {len(whole)} whole chunks of {sizes.tokens} tokens; expected at least two, one to forget and one "
            "that stays unseen: take a longer text"
        )
    count = min(sizes.count, len(whole) // 2)
    drawn = random.Random(SEED).sample(range(len(whole)), 2 * count)
    forget, unseen = sorted(drawn[:count]), sorted(drawn[count:])
    return {
        "forget": [{"id": _chunk_id(number), "text": whole[number]} for number in forget],
        "seen": [_completion(number, whole[number], tokenizer, sizes) for number in forget],
        "unseen": [_completion(number, whole[number], tokenizer, sizes) for number in unseen],
    }


def _chunk_id(number: int) -> str:
    return f"chunk-{number:05d}"


def _completion(number: int, chunk: str, tokenizer: Any, sizes: Sizes) -> Record:
    prompt = beginning(chunk, tokenizer, sizes.prompt)
    completion = beginning(chunk[len(prompt) :], tokenizer, sizes.completion)
    return {"id": _chunk_id(number), "prompt": prompt, "completion": completion}


# --- Reading ------------------------------------------------------------------------------------------------


def load(split: str, source: str | None, tokenizer: Any) -> list[Record]:
    """See `bench.tasks.task.Loader`; `forget` and `retain` have the field "text", the others "prompt" and "completion".

    Raises:
        UserError: one line: there is no book, or too short a one.
        ValueError: there is no source, or no tokenizer to cut by.
    """
    if source is None or tokenizer is None:
        raise ValueError("whp: the book and the tokenizer of the model must be given")
    if split == "retain":
        return load_c4("whp", source, tokenizer, PAPER.tokens)
    path = _book(Path(source))
    text = read_text(path, "a book as plain text").removeprefix("\ufeff")
    return sets(text, tokenizer, name=str(path))[split]


def _book(source: Path) -> Path:
    """The file of the book: the source itself, or in that folder."""
    if source.is_file():
        if source.suffix != ".txt":
            raise UserError(f"book {str(source)!r} is no .txt file: expected plain text in UTF-8")
        return source
    if not source.is_dir():
        raise UserError(f"book {str(source)!r} does not exist: expected a .txt file, or a folder with book.txt")
    if (book := source / "book.txt").is_file():
        return book
    texts = sorted(source.glob("*.txt"))
    if len(texts) != 1:
        names = ", ".join(path.name for path in texts) or "none"
        raise UserError(f"folder {str(source)!r}: expected book.txt, or a single .txt file; found {names}")
    return texts[0]


def load_c4(task: str, source: str, tokenizer: Any, tokens: int) -> list[Record]:
    """Documents of C4, as {"id", "text"}: those of the file c4 of a local source, or else the first ones of the hub.

    Args:
        task: its name, for messages.
        source: of the task; a folder with c4.jsonl, c4.json or c4.parquet has the documents.
        tokenizer: documents are cut at the end of a word; None: uncut.
        tokens: of a document at most, with what begins a text.

    Raises:
        UserError: one line.
    """
    local = is_local(source) and any(path.is_file() for path in Path(source).glob("c4.*"))
    records = read_records(task, source if local else C4.repository, "c4", C4, {"text": TEXT})
    return documents(records, "c4", tokenizer, tokens)


def documents(records: Sequence[Record], name: str, tokenizer: Any, tokens: int) -> list[Record]:
    """Documents as {"id", "text"}, cut as by `load_c4`, with ids from their order.

    Empty ones stay: a run lists the samples that it cannot use, with the reason.
    """
    begin = 0 if tokenizer is None else len(Tokenization(tokenizer).begin)
    return [
        {
            "id": f"{name}-{number:05d}",
            "text": beginning(record["text"], tokenizer, tokens - begin) if tokenizer else record["text"],
        }
        for number, record in enumerate(records)
    ]


def _evaluation(split: str) -> Mapping[str, str]:
    return {"forget": "forget", "seen": "seen", "unseen": "unseen"}


def harness(source: str | None) -> Mapping[str, tuple[HarnessTask, ...]]:
    """The benchmarks of WHP and SAFE, which do not depend on the source."""
    return HARNESS


TASK: Task = Task(
    name="whp",
    about="a book of your own, cut into passages (Who's Harry Potter)",
    load=load,
    splits=SPLITS,
    default_split="forget",
    retain_of={"forget": "retain"},
    evaluation=_evaluation,
    completeness=COMPLETENESS,
    utility=UTILITY,
    further=FURTHER,
    source_is="a book as a .txt file, or a folder with book.txt",
    harness=harness,
    new_tokens=PAPER.completion,
    epochs=5,
    refusals=REFUSALS,
)
