"""How far work in other processes is: numbers on a board that all processes of a Ray cluster see.

The board is the key-value store of Ray's head, so that nobody has to be asked who is at work. It is no part of Ray's
public interface: where it is not to be had, nothing is told, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from scoring.progress import Meter, every, metered

TELL_S = 1.0
NAMESPACE = b"mrd-bench"


@contextmanager
def told_on(name: str) -> Iterator[None]:
    """Within the context the work's progress stands on the board, under a name; afterwards it is wiped."""
    from ray.experimental import internal_kv

    meter = Meter()
    told = (0.0, 0.0)

    def tell() -> None:
        nonlocal told
        now = (meter.done, meter.of)
        if now != told:
            with suppress(Exception):
                internal_kv._internal_kv_put(name, f"{now[0]} {now[1]}", overwrite=True, namespace=NAMESPACE)
            told = now

    try:
        with metered(meter), every(TELL_S, tell, at_end=False):
            yield
    finally:
        if told != (0.0, 0.0):
            with suppress(Exception):
                internal_kv._internal_kv_del(name, namespace=NAMESPACE)


def read_board(name: str) -> Meter:
    """What stands under a name; nothing done where nothing does."""
    from ray.experimental import internal_kv

    with suppress(Exception):
        if text := internal_kv._internal_kv_get(name, namespace=NAMESPACE):
            done, of = text.split()
            return Meter("", float(done), float(of))
    return Meter()
