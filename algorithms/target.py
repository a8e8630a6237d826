"""How well a model that learns must know its samples for training to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from algorithms.group import Group
from algorithms.stopping import measure_memorization
from scoring.samples import Sample

# The column of epochs: the mean memorization accuracy of trained samples.
TRAINED_MA = "trained_ma"


@dataclass(frozen=True)
class Target:
    """A mean memorization accuracy (MA), measured on the initial model and after each epoch.

    Attributes:
        samples: trained samples on which MA is measured.
        ma: training ends with the first epoch whose mean MA is at least this, 0 to 1; None: MA is measured, and ends
            nothing.
    """

    samples: Sequence[Sample]
    ma: float | None = None

    def measured(self, model: PreTrainedModel, batch_tokens: int, group: Group) -> float:
        """The mean MA, 0 to 1; each worker measures its share, and all get the result.

        Args:
            model: the whole model, in eval mode.
            batch_tokens: padded tokens in a batch.
            group: this worker.
        """
        # No MA is below 0: extraction likelihood is asked of no sample.
        look = measure_memorization(model, self.samples, 1, None, batch_tokens, el_below=0.0, group=group)
        return float(look.ma.mean())

    def is_reached(self, epoch: Mapping[str, Any]) -> bool:
        """Whether training ends with this row of the epochs."""
        return self.ma is not None and epoch[TRAINED_MA] >= self.ma
