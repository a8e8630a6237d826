"""Table 1: MRD-weighted sampling on TOFU, and which way to weight: p ∝ MRD or p ∝ 1/MRD."""

from __future__ import annotations

from functools import partial

from bench.experiments.experiment import Experiment
from bench.experiments.shared.weighted_tables import run

# The change by MRD in Table 1, mean over the four algorithms.
PAPER = {"uc_average": 0.032, "ut_average": 0.027}

EXPERIMENT = Experiment(
    "table1",
    "weighted sampling, TOFU",
    "Do algorithms forget more and keep more of the rest when forget samples are drawn by MRD?",
    "algorithms with MRD-weighted sampling are better in completeness and in utility than without it (Table 1). "
    "Algorithm 2 draws p ∝ MRD, Appendix B p ∝ 1/MRD.",
    partial(run, paper=PAPER),
)
