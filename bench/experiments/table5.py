"""Table 5: MRD-weighted sampling on WMDP."""

from __future__ import annotations

from functools import partial

from bench.experiments.experiment import Experiment
from bench.experiments.shared.weighted_tables import run

# The change by MRD in Table 5, mean over its three algorithms; its averages are computed again from their parts.
PAPER = {"wmdp_average": -0.017, "mmlu": 0.011}

EXPERIMENT = Experiment(
    "table5",
    "weighted sampling, WMDP",
    "Do algorithms forget more hazardous knowledge and keep more of the rest when documents are drawn by MRD?",
    "with MRD-weighted sampling accuracy on WMDP is lower and accuracy on MMLU higher than without it (Table 5, whose "
    "averages of CGA and of NPO + MRD do not agree with their parts: .2459 for .2394, .55895 for .5872).",
    partial(run, paper=PAPER),
)
