"""Answers side by side on the terminal: which samples, in which order, and how they are written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.answers.marks import Kind, pieces, visible
from bench.answers.table import Answer, AnswerTable, Row
from scoring.errors import UserError, unknown_name

Against = Literal["before", "truth"]
Number = Callable[[AnswerTable, Row], float | None]
# What samples are sorted and chosen by; of several unlearned models the first counts. The second value says whether the
# highest come first: the best remembered ones, and the hardest ones.
NUMBERS: dict[str, tuple[Number, bool]] = {
    "rouge": (lambda table, row: table.answer(row, "after").rouge, True),
    "ma": (lambda table, row: table.answer(row, "after").ma, True),
    "mrd": (lambda table, row: row.mrd, False),
    "forecast": (lambda table, row: row.forecast, True),
    "change": (lambda table, row: table.change(row), True),
}
# Where a number comes from that no sample has.
ABSENT = {
    "rouge": "no ROUGE-L was measured: evaluate with --metrics rr",
    "ma": "no MA was measured: add the folder of the run",
    "mrd": "no scores were given: add a file of `mrd-bench score`",
    "forecast": "no forecasts were given: add a file of `mrd-bench difficulty --measure flip-time`",
    "change": "there are no answers of the original model: evaluate with --original",
}
BY_ID = "id"
_CONDITION = re.compile(r"\s*([a-z]+)\s*(<=|>=|<|>|=)\s*(\S+)\s*")
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda one, other: one < other,
    "<=": lambda one, other: one <= other,
    ">": lambda one, other: one > other,
    ">=": lambda one, other: one >= other,
    "=": lambda one, other: one == other,
}
_STYLES = {Kind.REMOVED: "9;31", Kind.ADDED: "4;32"}  # struck out and underlined: colours alone are not seen by all
_SIGNS = {Kind.REMOVED: ("[-", "-]"), Kind.ADDED: ("{+", "+}")}
_MARGIN = 15


@dataclass(frozen=True)
class Choice:
    """Which samples are shown, and in which order.

    Attributes:
        set_name: only of this set.
        conditions: such as "rouge>0.5"; all must hold. What is not known fulfils none.
        remembered: only those that are still remembered, or, if false, only the others.
        changed: only those whose answer is another one now.
        sort: one of NUMBERS, or "id"; None: the order of the data.
        reverse: the other way round.
    """

    set_name: str | None = None
    conditions: tuple[str, ...] = ()
    remembered: bool | None = None
    changed: bool = False
    sort: str | None = None
    reverse: bool = False


def chosen(table: AnswerTable, choice: Choice) -> list[Row]:
    """The samples of a choice, in its order; those without the number that is sorted by come last.

    Raises:
        UserError: there is no such set or number, a condition is none, or it asks for a number that no sample has.
    """
    sets = list(dict.fromkeys(row.set_name for row in table.rows))
    if choice.set_name is not None and choice.set_name not in sets:
        raise UserError(f"--set {unknown_name('set', choice.set_name, map(visible, sets))}")
    conditions = [_condition(text, table) for text in choice.conditions]
    rows = [
        row
        for row in table.rows
        if choice.set_name in (None, row.set_name)
        and choice.remembered in (None, table.is_remembered(row))
        and (not choice.changed or table.has_changed(row))
        and all(holds(table, row) for holds in conditions)
    ]
    if choice.sort is None or choice.sort == BY_ID:
        if choice.sort == BY_ID:
            rows.sort(key=lambda row: _natural(row.sample_id))
        return rows[::-1] if choice.reverse else rows
    if choice.sort not in NUMBERS:
        raise UserError(f"--sort {unknown_name('number', choice.sort, [*NUMBERS, BY_ID])}")
    number, highest_first = NUMBERS[choice.sort]
    known = [(value, row) for row in rows if (value := number(table, row)) is not None]
    known.sort(key=lambda pair: pair[0], reverse=highest_first != choice.reverse)
    return [row for _, row in known] + [row for row in rows if number(table, row) is None]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key by which q9 comes before q10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def _condition(text: str, table: AnswerTable) -> Callable[[AnswerTable, Row], bool]:
    match = _CONDITION.fullmatch(text)
    try:
        limit = float(match[3]) if match else math.nan
    except ValueError:
        limit = math.nan
    if match is None or math.isnan(limit):
        raise UserError(f"--where {text!r}: expected a number of a sample, a comparison and a value, such as rouge>0.5")
    if match[1] not in NUMBERS:
        raise UserError(f"--where {text!r}: {unknown_name('number', match[1], NUMBERS)}")
    (number, _), holds = NUMBERS[match[1]], _HOLDS[match[2]]
    if all(number(table, row) is None for row in table.rows):
        raise UserError(f"--where {text!r}: {ABSENT[match[1]]}")

    def fulfilled(table: AnswerTable, row: Row) -> bool:
        value = number(table, row)
        return value is not None and holds(value, limit)

    return fulfilled


# --- Lines --------------------------------------------------------------------------------------------------


def answer_lines(
    table: AnswerTable, rows: Sequence[Row], against: Against = "before", colour: bool = False
) -> list[str]:
    """Samples as lines for the terminal; nothing in the texts can steer it.

    Args:
        against: what an unlearned model's answers are compared with; the others' are compared with the truth.
        colour: marks by colour instead of signs.
    """
    lines = []
    for row in rows:
        lines += ["", _bold(f"{visible(row.sample_id)} ({visible(row.set_name)})", colour) + _numbers(table, row)]
        lines += _text("question", "not known" if row.question is None else visible(row.question))
        lines += _text("truth", "not known" if row.truth is None else visible(row.truth))
        for model, answer in zip(table.models, row.answers, strict=True):
            if answer.text is None:
                lines += _text(model.name, "not asked")
                continue
            marked = _marked(table.base(row, model, against), answer.text, colour)
            lines += _text(model.name, f"{marked}{_of_answer(answer)}")
    return lines


def _bold(text: str, colour: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour else text


def _numbers(table: AnswerTable, row: Row) -> str:
    parts = []
    if row.mrd is not None:
        parts.append(f"MRD {row.mrd:.3g}")
    if row.forecast is not None:
        parts.append(f"forecast {row.forecast:.3g} updates")
    for model, answer in zip(table.models, row.answers, strict=True):
        if answer.until is not None:
            parts.append(f"{visible(model.name)} forgot it after {answer.until}")
    return "".join(f"  {part}" for part in parts)


def _of_answer(answer: Answer) -> str:
    """The metrics of an answer, behind it."""
    parts = [
        f"{name} {value:.2f}" for name, value in (("ROUGE-L", answer.rouge), ("MA", answer.ma)) if value is not None
    ]
    return f"  ({', '.join(parts)})" if parts else ""


def _text(label: str, text: str) -> list[str]:
    """A text below its label, its own lines below each other."""
    first, *others = text.split("\n")
    head = f"  {visible(label):<{_MARGIN}}"
    return [head + first, *(" " * len(head) + line for line in others)]


def _marked(base: str | None, answer: str, colour: bool) -> str:
    parts = []
    marked = pieces(base, answer)
    for place, (kind, text) in enumerate(marked):
        seen = visible(text)
        if kind is Kind.KEPT:
            parts.append(seen)
            continue
        # White space behind a word is not marked.
        words = seen.rstrip()
        space = seen[len(words) :]
        before, after = (f"\x1b[{_STYLES[kind]}m", "\x1b[0m") if colour else _SIGNS[kind]
        replaced = kind is Kind.REMOVED and marked[place + 1 :][:1] and marked[place + 1][0] is Kind.ADDED
        parts.append(f"{before}{words}{after}{space or (' ' if replaced else '')}")
    return "".join(parts)


def summary_lines(table: AnswerTable) -> list[str]:
    """Mean ROUGE-L of every set and model."""
    lines = [f"{visible(table.title)}: {len(table.rows)} samples"]
    for name in dict.fromkeys(row.set_name for row in table.rows):
        rows = [row for row in table.rows if row.set_name == name]
        means = [(model, mean_rouge([row.answers[n] for row in rows])) for n, model in enumerate(table.models)]
        known = [f"{visible(model.name)} {mean:.3f}" for model, mean in means if not math.isnan(mean)]
        lines.append(f"  {visible(name)}: {len(rows)}; mean ROUGE-L {', '.join(known) or 'not measured'}")
    return lines


def mean_rouge(answers: Sequence[Answer]) -> float:
    """Of the answers whose ROUGE-L is known; nan where there is none."""
    known = [answer.rouge for answer in answers if answer.rouge is not None]
    return math.fsum(known) / len(known) if known else math.nan
