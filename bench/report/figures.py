"""From a function that draws on an Axes to an SVG element for a page, or a picture in a file.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; marks differ in shape as well. In an SVG
for a page, ink and colours become CSS variables, so that the page's theme decides them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from bench.stats.estimates import Estimate

Draw = Callable[[Axes], None]

INK, MUTED, GRID = "#1b1d21", "#6a6e76", "#d9dbe0"
BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
# Their names in the page's style sheet.
CSS_NAMES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    VERMILLION: "--vermillion",
}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "mrd-bench",
}
INCHES = (5.0, 3.4)  # narrow enough for a phone to show the labels at a readable size


def svg(draw: Draw, name: str, alt: str, inches: tuple[float, float] = INCHES) -> str:
    """An `<svg>` element to put into a page.

    Args:
        draw: draws the figure.
        name: prefix of all ids in it, unique on the page.
        alt: description for readers who cannot see it.
    """
    stream = io.StringIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # The SVG's style sheet would apply to the whole page, and its metadata only repeats the program's name.
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    for colour, variable in CSS_NAMES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1).strip()


def picture(
    draws: Sequence[Draw],
    path: Path,
    inches: tuple[float, float] = (15.0, 5.0),
    dpi: int = 100,
    polar: bool = False,
) -> None:
    """Write a picture of panels side by side, on white.

    Args:
        path: its name ends in .png or .svg; ".tmp" may follow.
        polar: the panels have polar axes.
    """
    form = path.name.removesuffix(".tmp").rsplit(".", 1)[-1]
    with mpl.rc_context(STYLE | {"font.size": 12, "axes.titlesize": 14, "legend.fontsize": 11}):
        figure = Figure(figsize=inches, layout=ConstrainedLayoutEngine(wspace=0.04), facecolor="white")
        (FigureCanvasSVG if form == "svg" else FigureCanvasAgg)(figure)
        for axes, draw in zip(
            np.atleast_1d(figure.subplots(1, len(draws), subplot_kw={"polar": polar})), draws, strict=True
        ):
            draw(axes)
        # With the date or matplotlib's version in it, the same picture would differ from file to file.
        metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(path, format=form, dpi=dpi, metadata=metadata)


def error_bars(estimates: Sequence[Estimate]) -> np.ndarray:
    """Lengths of error bars below and above the values, (2, n); 0 where there is no interval."""
    lengths = np.array([[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]])
    return np.nan_to_num(np.clip(lengths, 0, None))
