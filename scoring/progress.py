"""How far work is: counted where it is done, shown where somebody waits for it.

Who works calls `expect`, `advance` and `phase`, which set numbers in the `Meter` of the context and do nothing where
there is none. A `Bar` reads them in a thread of its own: nothing that is computed waits for what is shown.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

# Seconds from one look to the next: on a terminal, and in a file, which would otherwise fill up.
TERMINAL_S, FILE_S = 0.5, 10.0


@dataclass
class Meter:
    """How far the work at hand is.

    Attributes:
        phase: what is being done.
        done, of: units of it, whatever they are; `of` is 0 where nobody knows.
    """

    phase: str = ""
    done: float = 0
    of: float = 0

    @property
    def share(self) -> float:
        """What is done of the whole, 0 to 1."""
        return min(1.0, self.done / self.of) if self.of else 0.0

    def __str__(self) -> str:
        return f"{self.phase} {self.done:.0f}/{self.of:.0f}" if self.of else self.phase


_METER: ContextVar[Meter | None] = ContextVar("meter", default=None)
# The meters of the tasks that a pool is working on, by their keys.
_IN_FLIGHT: ContextVar[dict[str, Meter] | None] = ContextVar("in_flight", default=None)


def current_meter() -> Meter | None:
    """The meter of the context."""
    return _METER.get()


@contextmanager
def metered(meter: Meter | None) -> Iterator[None]:
    """Within the context work counts on this meter."""
    token = _METER.set(meter)
    try:
        yield
    finally:
        _METER.reset(token)


def expect(units: float) -> None:
    """So many more units of the work at hand are to be done."""
    if (meter := _METER.get()) is not None:
        meter.of += units


def advance(units: float = 1) -> None:
    """So many units of the work at hand are done."""
    if (meter := _METER.get()) is not None:
        meter.done += units


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Within the context the work at hand is this; its units are counted from 0."""
    if (meter := _METER.get()) is None:
        yield
        return
    before = meter.phase, meter.done, meter.of
    meter.phase, meter.done, meter.of = name, 0, 0
    try:
        yield
    finally:
        meter.phase, meter.done, meter.of = before


def tasks_in_flight() -> dict[str, Meter] | None:
    """Where a pool tells how far the tasks are that it works on; None where nobody looks."""
    return _IN_FLIGHT.get()


@contextmanager
def every(seconds: float, look: Callable[[], None], at_end: bool = True) -> Iterator[None]:
    """Within the context `look` is called again and again in another thread, and once more at the end."""
    done = threading.Event()

    def again() -> None:
        while not done.wait(seconds):
            look()

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if at_end:
            look()


class Bar:
    """A progress bar that moves by itself while something is counted.

    Attributes:
        meter: what is counted in the context beside the bar's own units, shown behind it.
        left: seconds until all is done; None takes the average so far.

    Args:
        title: what is done, with the names of model and data.
        total: units of the whole work; it grows if more is begun.
        unit: its name.
        shown: False shows nothing.
        initial: units that an earlier start has done.
    """

    def __init__(self, title: str, total: float, unit: str, shown: bool = True, initial: float = 0) -> None:
        self._total, self._finished, self._begun = total, initial, initial
        self._sizes: dict[str, float] = {}
        self._in_flight: dict[str, Meter] = {}
        self._words = ""
        self.meter = Meter()
        self.left: float | None = None
        self._period = TERMINAL_S if sys.stderr.isatty() else FILE_S
        self._lock = threading.Lock()
        self._looking: Any = None
        self._bar = tqdm(
            total=round(total),
            initial=round(initial),
            unit=unit,
            desc=title,
            disable=not shown,
            smoothing=0,
            unit_scale=total >= 100_000,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Bar:
        if not self._bar.disable:
            self._tokens = _METER.set(self.meter), _IN_FLIGHT.set(self._in_flight)
            self._looking = every(self._period, self._draw)
            self._looking.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._looking is not None:
            _METER.reset(self._tokens[0])
            _IN_FLIGHT.reset(self._tokens[1])
            self.meter.phase, self.meter.of, self.left = "", 0, None
            self._looking.__exit__(None, None, None)
        self._bar.close()

    @property
    def shown(self) -> bool:
        return not self._bar.disable

    def say(self, words: str) -> None:
        """Show words behind the bar."""
        self._words = words

    def at(self, units: float) -> None:
        """So many units are done in all."""
        self._finished = units

    @contextmanager
    def task(self, key: str) -> Iterator[None]:
        """Within the context a task that was begun counts how far it is."""
        with metered(self._in_flight.setdefault(key, Meter())):
            yield

    def told(self, in_flight: Mapping[str, Meter]) -> None:
        """How far tasks are that were begun and are done elsewhere."""
        self._in_flight |= in_flight

    def begin(self, sizes: dict[str, float]) -> None:
        """Begin tasks, of so many units each; a bar that did not count on them grows."""
        self._sizes |= sizes
        self._begun += sum(sizes.values())
        self._total = max(self._total, self._begun)

    def finish(self, key: str) -> None:
        """A task is done."""
        self._finished += self._sizes.pop(key, 0.0)
        self._in_flight.pop(key, None)

    def _draw(self) -> None:
        flying = sum(self._sizes.get(key, 0.0) * meter.share for key, meter in list(self._in_flight.items()))
        with self._lock:
            bar = self._bar
            bar.total, bar.n = round(self._total), round(min(self._finished + flying, self._total))
            bar.set_postfix_str(", ".join(filter(None, (self._words, str(self.meter)))), refresh=False)
            left = "{remaining}" if self.left is None else tqdm.format_interval(self.left)
            bar.bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<" + left + "{postfix}]"
            bar.refresh()


def quiet_libraries() -> None:
    """No bars but ours: other libraries draw none from now on, here and in processes that this one starts."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    # Those that have read their variables already.
    if (hub := sys.modules.get("huggingface_hub.utils")) is not None:
        hub.disable_progress_bars()
    if (datasets := sys.modules.get("datasets.utils")) is not None:
        datasets.disable_progress_bars()
    if (transformers := sys.modules.get("transformers.utils.logging")) is not None:
        transformers.disable_progress_bar()
