"""How a model is made to forget: the unlearning objectives, the algorithms made of them, and the training loop.

import algorithms

result = algorithms.unlearn(model, tokenizer, forget, retain, algorithm="NPO")  # the same loop as the command line
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from algorithms.api import Unlearned, unlearn
    from scoring.errors import UserError

__all__ = ["Unlearned", "UserError", "unlearn"]


def __getattr__(name: str) -> object:
    # Loaded on first use, so that importing one module of this package does not wait for all of them.
    if name in __all__:
        from algorithms import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
