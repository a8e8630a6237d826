"""From the texts of a data set to samples on disk."""

from __future__ import annotations

from collections.abc import Iterator

from bench.models.find import ModelReference
from bench.tasks.datasets import Texts
from scoring.sample_file import SampleFile
from scoring.samples import Rejected, Sample, Tokens, check_tokens, evenly_spaced, iter_encoded


def read_samples(
    texts: Texts, model: ModelReference, tokens: Tokens, most: int | None = None
) -> tuple[SampleFile, list[Rejected]]:
    """The samples of a data set, tokenized for a model, and the texts that cannot be scored.

    Args:
        most: so many samples at most, evenly spaced; None: all.

    Raises:
        UserError: no sample can be scored, or a tokenizer that gives tokens which the model does not know.
    """
    rejected: list[Rejected] = []

    def samples() -> Iterator[Sample]:
        for sample in iter_encoded(texts, model.tokenizer, model.max_length, tokens):
            if isinstance(sample, Sample):
                yield sample
            else:
                rejected.append(sample)

    file = SampleFile(samples() if most is None else evenly_spaced(list(samples()), most))
    tokenizer = f"the tokenizer of {model.source!r}"
    check_tokens(len(file), file.largest_token, rejected, model.vocabulary, tokenizer, texts.name)
    return file, rejected
