"""Runs as they go, as a table in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from bench.watch.read import Seen, check_run, look_all

REFRESH_S = 2.0
# What a run cannot come back from by itself.
ENDED = ("finished", "failed")
COLUMNS = ("run", "state", "update", "epoch", "forget", "retain", "forgotten", "evaluation", "s/update", "left", "news")
WIDTH_OF_A_FILE = 200


def watch(folders: Sequence[str | Path]) -> None:
    """Show runs until all have ended; where nobody looks on, once.

    Raises:
        UserError: a folder is no run's.
    """
    paths = [Path(folder).absolute() for folder in folders]
    for path in paths:
        check_run(path)
    seen = look_all(paths)
    if not sys.stdout.isatty():
        Console(width=WIDTH_OF_A_FILE).print(table(seen))
        return
    with Live(table(seen), auto_refresh=False) as live:
        while any(one.state not in ENDED for one in seen):
            time.sleep(REFRESH_S)
            seen = look_all(paths)
            live.update(table(seen), refresh=True)


def table(seen: Sequence[Seen]) -> Table:
    """A row a run."""
    made = Table(*COLUMNS)
    for one in seen:
        made.add_row(*map(Text, cells(one)))
    return made


def cells(one: Seen) -> tuple[str, ...]:
    """What is said of a run, by COLUMNS; plain text of printable characters."""
    what = one.state + (f": {one.doing}" if one.doing else "")
    names = {"forget_rouge_l_recall": "forget RL", "retain_rouge_l_recall": "retain RL"}
    evaluation = ", ".join(f"{names[name]} {value:.3g}" for name, value in one.evaluation.items() if name in names)
    texts = (
        one.name,
        what,
        f"{one.step} of {'?' if one.total is None else one.total}{' trials' if one.kind == 'sweep' else ''}",
        _or_dash(one.epoch, str),
        _or_dash(one.forget_loss, "{:.4g}".format),
        _or_dash(one.retain_loss, "{:.4g}".format),
        _or_dash(one.forgotten, "{:.0%}".format),
        evaluation or "–",
        _or_dash(one.seconds_per_update, "{:.3g}".format),
        _or_dash(one.seconds_left, tqdm.format_interval),
        f"{tqdm.format_interval(one.age)} ago",
    )
    return tuple("".join(c if c.isprintable() else "�" for c in text) for text in texts)


def _or_dash(value: float | None, words: Callable[[float], str]) -> str:
    return "–" if value is None else words(value)
