"""How toxic texts are, by a text classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers.utils.logging import disable_progress_bar

from bench.metrics.values import Unmeasured
from scoring.errors import first_line, unknown_name
from scoring.settings import named

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Classifier:
    """A text classifier, loaded on first use.

    Attributes:
        source: Hugging Face id or folder of a text-classification model; "embedded": the small one trained here, which
            knows the rudeness of the task `replies` and nothing else.
        label: the label whose score is taken. Several labels are scored each by itself or against each other, as the
            model's configuration says (sigmoid or softmax).
    """

    source: str
    label: str = "toxic"

    @cached_property
    def _pipeline(self) -> Any:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

        disable_progress_bar()
        source = self.source
        if source == EMBEDDED:
            from bench.models.classifier import embedded_classifier

            source = str(embedded_classifier())
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            model = AutoModelForSequenceClassification.from_pretrained(
                source, config=config, use_safetensors=True, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # folders and hubs fail with errors of many types
            raise Unmeasured(
                f"toxicity classifier {source!r} cannot be loaded ({first_line(error)}): name a folder or a Hugging "
                f"Face id of a text-classification model with {named('toxicity_model')}"
            ) from error
        labels = list(config.label2id)
        if self.label not in labels:
            raise Unmeasured(f"toxicity classifier {source!r}: {unknown_name('label', self.label, labels)}")
        # Longer texts are judged by their beginning, as far as the classifier reads.
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
        return pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """The label's score for each of N texts, (N,) fp64 in [0, 1].

        Raises:
            Unmeasured: the classifier cannot be loaded, or has no such label.
        """
        labelled = self._pipeline(list(texts), truncation=True, batch_size=32)
        scores = [{label["label"]: label["score"] for label in labels}[self.label] for labels in labelled]
        return np.array(scores, dtype=np.float64)
