"""How the batch of an update is cut into the micro-batches of each worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from algorithms.corpus import Corpus
from algorithms.group import Group
from algorithms.passes import OUTPUTS
from algorithms.recipe import Objectives
from algorithms.reference import SetName
from scoring.samples import Batch, collate, make_batches


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward and backward.

    Attributes:
        set_name: the set that the samples are from.
        batch: the samples; for an objective that compares them with refusals, followed by their refusals.
        num_samples: how many rows at the beginning are samples; the others are refusals.
        counts: False for a repetition that keeps a worker busy: it adds nothing to loss and gradient.
    """

    set_name: SetName
    batch: Batch
    num_samples: int
    counts: bool

    @property
    def tokens(self) -> int:
        return int(self.batch.lengths.sum())

    @property
    def positions(self) -> list[int]:
        """Of the samples in their set, (B,); where only refusals are in the batch, of the samples that they are for."""
        return self.batch.indices[: self.num_samples or None].tolist()


def share_of_batch(
    corpus: Corpus,
    objectives: Objectives,
    drawn: Sequence[int],
    retained: Sequence[int],
    group: Group,
    batch_tokens: int,
) -> list[MicroBatch]:
    """The micro-batches of this worker; every worker gets the same number of them.

    Args:
        corpus: the samples.
        objectives: the objectives that they are for.
        drawn: positions of the forget samples of the whole batch.
        retained: positions of its retain samples; empty without a retain term.
        group: this worker.
        batch_tokens: padded tokens in a micro-batch.
    """
    shares = []
    for rank in range(group.size):
        forget, retain = drawn[rank :: group.size], retained[rank :: group.size]
        # A worker without a sample repeats the first one of the batch, which does not count.
        share = _of_forget_set(corpus, objectives, forget or drawn[:1], bool(forget), batch_tokens)
        if objectives.retain:
            share += _of_retain_set(corpus, retain or retained[:1], bool(retain), batch_tokens)
        shares.append(share)
    mine = shares[group.rank]
    idle = replace(mine[0], counts=False)
    return [idle] * (max(map(len, shares)) - len(mine)) + mine


def _of_forget_set(
    corpus: Corpus, objectives: Objectives, positions: Sequence[int], counts: bool, batch_tokens: int
) -> list[MicroBatch]:
    samples = [corpus.forget[i] for i in positions]
    if not objectives.needs_refusals:
        return [MicroBatch("forget", batch, len(batch), counts) for batch in make_batches(samples, batch_tokens)]
    needs_samples = any(name in (*OUTPUTS, "mask", "targets") for name in objectives.forget_inputs)
    if not needs_samples:
        refusals = [corpus.refusals[i] for i in positions]
        return [MicroBatch("forget", batch, 0, counts) for batch in make_batches(refusals, batch_tokens)]
    # An objective takes the answer and the refusal of a sample together, so both are in the same micro-batch.
    groups = [batch.indices.tolist() for batch in make_batches(samples, batch_tokens // 2)]
    pairs = [[*(corpus.forget[i] for i in group), *(corpus.refusals[i] for i in group)] for group in groups]
    return [MicroBatch("forget", collate(pair), len(group), counts) for group, pair in zip(groups, pairs, strict=True)]


def _of_retain_set(corpus: Corpus, positions: Sequence[int], counts: bool, batch_tokens: int) -> list[MicroBatch]:
    batches = make_batches([corpus.retain[i] for i in positions], batch_tokens)
    return [MicroBatch("retain", batch, len(batch), counts) for batch in batches]
