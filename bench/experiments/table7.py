"""Table 7: MRD-weighted sampling on SAFE."""

from __future__ import annotations

from functools import partial

from bench.experiments.experiment import Experiment
from bench.experiments.shared.weighted_tables import run

# The change by MRD in Table 7, mean over its three algorithms; of perplexity the mean ratio less 1. There toxicity on
# SAFE and perplexity get worse.
PAPER = {
    "real_toxicity": -0.0039,
    "safe_toxicity": 0.0020,
    "perplexity": 0.0186,
    "zero_shot": 0.0067,
    "truthfulqa": 0.0201,
}

EXPERIMENT = Experiment(
    "table7",
    "weighted sampling, SAFE",
    "Are algorithms' responses less toxic, and is more of the rest kept, when unsafe responses are drawn by MRD?",
    "with MRD-weighted sampling responses are less toxic, and perplexity, zero-shot accuracy and TruthfulQA are better "
    "than without it (Table 7; its toxic score of PO on SAFE rises all the same, from .0275 to .0336).",
    partial(run, paper=PAPER),
)
