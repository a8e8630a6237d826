"""What is true of one sample under one model: MRD and its estimators, training difficulty, memorization.

import scoring

table = scoring.score(model, tokenizer, records)  # a loaded Hugging Face model, in this process
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scoring.api import score
    from scoring.errors import UserError

__all__ = ["UserError", "score"]


def __getattr__(name: str) -> object:
    # Loaded on first use, so that importing one module of this package does not wait for all of torch.
    if name == "score":
        from scoring.api import score

        return score
    if name == "UserError":
        from scoring.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
