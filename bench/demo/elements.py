"""HTML elements of the demo's page: paragraphs, lists, figures, tables and the numbers in their cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from bench.report.words import decimal, interval
from bench.stats.estimates import Estimate


def number(value: float) -> str:
    """A number with three significant digits; a dash where it is not known."""
    return f"{value:.3g}" if math.isfinite(value) else "–"


def estimate_cells(estimate: Estimate, digits: int = 2) -> list[str]:
    """The value and its interval as two cells of a table."""
    return [decimal(estimate.value, digits), interval(estimate, digits)]


def with_interval(estimate: Estimate) -> str:
    """The value and its interval in one cell: "0.42 (0.3 to 0.53)"."""
    if not math.isfinite(estimate.low):
        return number(estimate.value)
    return f"{number(estimate.value)} ({number(estimate.low)} to {number(estimate.high)})"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def bullets(texts: Iterable[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def figure(svg: str, caption: str) -> str:
    """A drawing with its caption, which is plain text."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table that scrolls sideways by itself. Cells are HTML already, caption and head are plain text."""
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    label = escape(caption)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table class="{kind}">'
        f"<caption>{label}</caption><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
