"""Table 6: MRD-weighted sampling on WHP."""

from __future__ import annotations

from functools import partial

from bench.experiments.experiment import Experiment
from bench.experiments.shared.weighted_tables import run

# The change by MRD in Table 6, mean over GradDiff and NPO, which are run here; of perplexity the mean ratio less 1.
PAPER = {
    "seen_rouge": -0.00105,
    "unseen_rouge": -0.0014,
    "perplexity": -0.0068,
    "zero_shot": 0.00365,
    "truthfulqa": 0.0051,
}

EXPERIMENT = Experiment(
    "table6",
    "weighted sampling, WHP",
    "Do algorithms reproduce less of a book and keep more of the rest when passages are drawn by MRD?",
    "with MRD-weighted sampling completions of a book's passages are less like it, and perplexity, zero-shot accuracy "
    "and TruthfulQA are better than without it (Table 6).",
    partial(run, paper=PAPER),
)
