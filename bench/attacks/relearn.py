"""Attacks by training: a few updates on part of what was forgotten, or on something else, and what comes back.

The loop is that of `mrd-bench train`: AdamW at a constant rate on the answers' NLL. It runs in the replica's process.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from algorithms.corpus import make_corpus
from algorithms.group import Group
from algorithms.history import Progress
from algorithms.ray_train import TrainingJob, unlearner_of
from algorithms.recipe import Execution, learning
from algorithms.unlearner import Diverged
from bench.attacks.attack import Probe
from bench.attacks.weights import linear_weights, prune_, put_back
from bench.metrics.table import Columns
from bench.metrics.values import Missing, Unmeasured
from bench.tasks import Record
from scoring.eval_mode import in_eval_mode
from scoring.progress import metered

Taught = Literal["forget", "retain", "benign"]
BATCH_SIZE = 4


@dataclass(frozen=True)
class Relearn:
    """Train, and ask after so many updates.

    Attributes:
        taught: the set that is trained on: the forget set, other samples of the same kind, or anything else.
        share: of the forget set that is taught, in (0, 1]; drawn by `seed`.
        learning_rate: of AdamW.
        updates: after which is asked, in increasing order; of BATCH_SIZE samples each.
        pruned: the share of weights that is pruned before (fine-pruning, Liu et al. 2018); 0: none.
    """

    taught: Taught
    share: float
    learning_rate: float
    updates: tuple[int, ...]
    seed: int
    pruned: float = 0.0

    @property
    def family(self) -> str:
        return "prune" if self.pruned else "relearn"

    @property
    def cost(self) -> float:
        return 1.5 * len(self.updates)

    @property
    def name(self) -> str:
        what = f"{self.taught} {self.share:g}" if self.taught == "forget" else self.taught
        begin = f"prune {self.pruned:g}, then " if self.pruned else "relearn "
        return f"{begin}{what}, rate {self.learning_rate:g}"

    def records(self, records: Sequence[Record]) -> list[Record]:
        """Those that are taught, in the order of the set."""
        if self.taught != "forget":
            return list(records)
        return share_of(records, self.share, self.seed)

    def under(self, model: PreTrainedModel, probe: Probe) -> Iterator[tuple[int | None, Columns]]:
        taught = self.records(probe.records(self.taught))
        measured: list[tuple[int, Columns]] = []
        with put_back(model), tempfile.TemporaryDirectory() as folder:
            if self.pruned:
                for weight in linear_weights(model):
                    prune_(weight, self.pruned)
            recipe = learning(
                max_steps=self.updates[-1],
                batch_size=min(BATCH_SIZE, len(taught)),
                learning_rate=self.learning_rate,
                seed=self.seed,
            )
            corpus, _ = make_corpus(recipe, probe.encoder, probe.texts(self.taught, taught), None)
            job = TrainingJob(
                recipe,
                Execution(),
                corpus,
                "",
                None,
                Path(folder),
                probe.encoder.tokenizer,
                None,
                keeps_checkpoints=False,
            )

            def ask(progress: Progress) -> None:
                if progress.step in self.updates:
                    with unlearner.trained.whole_model() as trained:
                        measured.append((progress.step, probe.columns(trained)))

            # What is trained keeps its flags of what needs a gradient.
            trainable = [p.requires_grad for p in model.parameters()]
            with in_float32(model):
                unlearner = unlearner_of(job, model, Group(), ask, initial={})
                try:
                    with in_eval_mode(model), metered(None):
                        unlearner.run()
                except Diverged as error:
                    # It is known until then; and nobody wants to lose all the other attacks.
                    reason = str(error).partition(";")[0]
                    if not measured:
                        raise Unmeasured(reason) from None
                    nothing: Columns = {column: Missing(reason) for column in measured[-1][1]}
                    measured += [(step, nothing) for step in self.updates if step > measured[-1][0]]
                finally:
                    for p, needed in zip(model.parameters(), trainable, strict=True):
                        p.requires_grad_(needed)
                        p.grad = None
        if not measured:
            raise Unmeasured("training ended before the first measurement")
        yield from measured


def share_of(records: Sequence[Record], share: float, seed: int) -> list[Record]:
    """A share of a set, at least one record, drawn by a seed; in the order of the set."""
    count = max(1, round(share * len(records)))
    chosen = sorted(random.Random(f"relearn/{seed}").sample(range(len(records)), count))
    return [records[i] for i in chosen]


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the model computes with a copy of its weights in fp32: an update at a small rate is less than
    what bf16 can add to a weight. Afterwards the weights are those of before, which nobody has changed."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t.dtype != torch.float32]
    before = [t.data for t in tensors]
    try:
        for t in tensors:
            t.data = t.data.float()
        yield
    finally:
        for t, data in zip(tensors, before, strict=True):
            t.data = data
