"""What is true of one sample under one model: MRD and its estimators, training difficulty, memorization.

import scoring

table = scoring.score(model, tokenizer, records)  # a loaded Hugging Face model, in this process
table = scoring.difficulty(model, tokenizer, records, measure=["flip-time", "mrd", "nll"])
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

# Under `uv run` Ray starts its workers by `uv run` again, in an environment that uv makes anew for each. On a cluster
# of our own they run in this one instead. Ray reads it where it is first imported, which is after this.
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

# Where it is installed, peft imports it, and on some processors it misses kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from scoring.api import score
    from scoring.errors import UserError
    from scoring.measuring import difficulty

__all__ = ["UserError", "difficulty", "score"]


def __getattr__(name: str) -> object:
    # Loaded on first use, so that importing one module of this package does not wait for all of torch.
    if name == "score":
        from scoring.api import score

        return score
    if name == "difficulty":
        from scoring.measuring import difficulty

        return difficulty
    if name == "UserError":
        from scoring.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
