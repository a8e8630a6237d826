"""Table 6: MRD-weighted sampling on WHP."""

from __future__ import annotations

from bench.experiments.experiment import Experiment
from bench.experiments.shared.weighted_tables import run

EXPERIMENT = Experiment(
    "table6",
    "weighted sampling, WHP",
    "Do algorithms reproduce less of a book and keep more of the rest when passages are drawn by MRD?",
    "with MRD-weighted sampling completions of a book's passages are less like it, and perplexity, zero-shot accuracy "
    "and TruthfulQA are better than without it (Table 6).",
    run,
)
