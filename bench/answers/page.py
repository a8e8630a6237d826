"""A page of answers side by side: one HTML file that needs no network, to be sorted, filtered and searched.

Python writes the frame and how much each model still answers; `answers.js` shows the samples, from the JSON in the
page.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

from bench.answers.marks import pieces, visible
from bench.answers.table import REMEMBERED, Answer, AnswerTable, Row
from bench.answers.text import Against, mean_rouge
from bench.files.folders import HEAD_BYTES, MadeFolders, refuse_foreign, unwritable
from bench.report.document import document, title_element
from bench.report.words import decimal
from scoring.files import replacing

HERE = Path(__file__).parent
TITLE = "mrd-bench answers"


def write_page(table: AnswerTable, path: str | Path, against: Against = "before", setting: str = "page") -> None:
    """Write the page of all samples of a table.

    Args:
        path: of the HTML file.
        against: what the answers after unlearning are marked against.
        setting: that names the place, for messages.

    Raises:
        UserError: the file is somebody else's, or cannot be written.
    """
    path = Path(path)
    refuse_foreign(path, title_element(TITLE), "a page of answers", HEAD_BYTES, setting)
    made = MadeFolders(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            unfinished.write_text(page(table, against), encoding="utf-8")
    except OSError as error:
        made.remove_unused()
        raise unwritable(path, error, setting) from error


def page(table: AnswerTable, against: Against = "before") -> str:
    """The whole document.

    Args:
        against: what the answers after unlearning are marked against; those of the other models are against the truth.
    """
    notes = "".join(f"<li>{escape(visible(note))}</li>" for note in table.notes)
    marked = "answers after unlearning against those before, others against the truth"
    if against == "truth" or table.place("before") is None:
        marked = "against the truth"
    first = next(model.name for model in table.models if model.role == "after")
    body = (
        '<a class="skip" href="#main">Skip to the answers</a>'
        f"<header><h1>Answers: {escape(visible(table.title))}</h1>"
        '<button type="button" id="theme" hidden>Theme: auto</button>'
        f"<p>{len(table.rows):,} samples under {len(table.models)} models. Marked is what differs, word by word, "
        f"{marked}: <del>missing</del>, <ins>new</ins>. ROUGE-L is the share of the truth's "
        "words that "
        f"an answer has, in their order; a sample is remembered with {REMEMBERED} or more of it under "
        f"{escape(visible(first))}.</p>"
        "<noscript><p>Without JavaScript this page has no samples.</p></noscript></header>"
        f'<main id="main" tabindex="-1">{_means(table)}'
        '<div class="controls" hidden>'
        '<label>Search <input type="search" id="filter" placeholder="words, or an id"></label>'
        '<label>Set <select id="set"></select></label>'
        '<label>Show <select id="state"></select></label>'
        '<label>Sort by <select id="order"></select></label>'
        '<button type="button" id="direction"></button>'
        '<label><input type="checkbox" id="marks" checked> marks</label>'
        '<output class="count" id="count"></output></div>'
        '<div id="place"></div></main>'
        + (f'<footer><h2>Notes</h2><ul id="notes">{notes}</ul></footer>' if notes else "")
    )
    return document(TITLE, body, _data(table, against), HERE, "answers")


def _means(table: AnswerTable) -> str:
    """Mean ROUGE-L of every set and model."""
    rows = ""
    for name in dict.fromkeys(row.set_name for row in table.rows):
        of_set = [row for row in table.rows if row.set_name == name]
        means = [mean_rouge([row.answers[place] for row in of_set]) for place in range(len(table.models))]
        cells = "".join(f"<td>{decimal(mean, 3)}</td>" for mean in means)
        rows += f'<tr><th scope="row">{escape(visible(name))}</th><td>{len(of_set):,}</td>{cells}</tr>'
    heads = "".join(f'<th scope="col">{escape(visible(model.name))}</th>' for model in table.models)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Mean ROUGE-L"><table class="numbers means">'
        '<caption>Mean ROUGE-L</caption><thead><tr><th scope="col">set</th><th scope="col">samples</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


# --- The data that the script reads -------------------------------------------------------------------------


def _data(table: AnswerTable, against: Against) -> dict[str, Any]:
    """The table as the script reads it: lists without keys, as there are many rows. All texts are visible ones."""
    return {
        "models": [[model.role, visible(model.name)] for model in table.models],
        "forecast": None if table.forecast is None else visible(table.forecast),
        "remembered": REMEMBERED,
        "rows": [_row(table, row, against) for row in table.rows],
    }


def _row(table: AnswerTable, row: Row, against: Against) -> list[Any]:
    answers = [
        _answer(answer, table.base(row, model, against))
        for model, answer in zip(table.models, row.answers, strict=True)
    ]
    return [
        visible(row.set_name),
        visible(row.sample_id),
        None if row.question is None else visible(row.question),
        None if row.truth is None else visible(row.truth),
        _number(row.mrd),
        _number(row.forecast),
        int(table.has_changed(row)),
        answers,
    ]


def _answer(answer: Answer, base: str | None) -> list[Any] | None:
    if answer.text is None:
        return None
    marked = [[int(kind), visible(text)] for kind, text in pieces(base, answer.text)]
    return [marked, _number(answer.rouge), _number(answer.ma), answer.until]


def _number(value: float | None) -> float | str | None:
    """Six significant digits; JSON has no infinity, and "inf" stands for it."""
    if value is None or math.isnan(value):
        return None
    return "inf" if math.isinf(value) else float(f"{value:.6g}")
