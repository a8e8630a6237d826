"""Runs as they go, as a table in the terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from algorithms.target import TRAINED_MA
from bench.watch.read import Seen, State, check_run, look_all

REFRESH_S = 2.0
# Looks in a row at which a run is found like this until it counts as ended: one that is stopped may just be started
# again, and the second of a pair begins once its data have been hashed.
ENDED_AFTER: Mapping[State, int] = {"finished": 1, "failed": 1, "stopped": 3, "waiting": 15}
COLUMNS = (
    *("run", "state", "update", "epoch", "loss", "forget", "retain", "forgotten", "evaluation"),
    *("s/update", "left", "news"),
)
# What is said of the last evaluation, by its column.
MEASURED = {
    TRAINED_MA: "MA",
    "trained_rouge_l_recall": "RL",
    "left_out_rouge_l_recall": "left out RL",
    "forget_rouge_l_recall": "forget RL",
    "retain_rouge_l_recall": "retain RL",
}
WIDTH_OF_A_FILE = 240


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
        looks: dict[str, tuple[State, int]] = {}
        while not have_ended(seen, looks):
            time.sleep(REFRESH_S)
            seen = look_all(paths)
            live.update(table(seen), refresh=True)


def have_ended(seen: Sequence[Seen], looks: dict[str, tuple[State, int]]) -> bool:
    """Whether nothing more is to be expected of any run.

    Args:
        looks: by name of a run the state that it was last seen in, and at how many looks in a row; is kept up to date.
    """
    for one in seen:
        state, count = looks.get(one.name, (one.state, 0))
        looks[one.name] = one.state, count + 1 if state == one.state else 1
    return all(looks[one.name][1] >= ENDED_AFTER.get(one.state, math.inf) for one in seen)


def table(seen: Sequence[Seen]) -> Table:
    """A row a run."""
    made = Table(*COLUMNS)
    for one in seen:
        made.add_row(*map(Text, cells(one)))
    return made


def cells(one: Seen) -> tuple[str, ...]:
    """What is said of a run, by COLUMNS; plain text of printable characters."""
    what = one.state + (f": {one.doing}" if one.doing else "")
    evaluation = ", ".join(
        f"{words} {one.evaluation[name]:.3g}" for name, words in MEASURED.items() if name in one.evaluation
    )
    texts = (
        one.name,
        what,
        f"{one.step} of {'?' if one.total is None else one.total}{' trials' if one.kind == 'sweep' else ''}",
        _or_dash(one.epoch, str),
        _or_dash(one.loss, "{:.4g}".format),
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
