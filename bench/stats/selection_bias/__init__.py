"""How much the choice of forget samples decides a comparison of unlearning algorithms.

Scores are y[algorithm, selection, seed]: a selection is one draw of forget samples, a seed is one repeated run on it.
Higher is better; a caller whose metric is better when lower turns its sign. Selections are taken as a random draw from
all that could have been drawn, so every interval is about new selections, not about these. A seed that algorithms share
can move all of them alike on a selection, which is told from the selection's own effect by `variance_shares`; means and
differences over selections are right with shared seeds and without. Runs may be missing: pairs are compared on the
selections that both have, and means adjusted for those that an algorithm lacks (`mean_scores`); shares of the variance
and agreement are of complete selections (`ScoreTable.complete`).

The same data and seed give the same interval.
"""

from bench.stats.selection_bias.adjusted import AdjustedDifference, AdjustedScore, AdjustedScores, adjusted_scores
from bench.stats.selection_bias.needed import (
    PairNeeded,
    noncentrality,
    selections_needed,
    selections_needed_between,
    selections_needed_pair,
)
from bench.stats.selection_bias.rankings import (
    Concordance,
    Failures,
    Rank,
    Ranking,
    Reversal,
    SeparablePair,
    failures_of,
    kendalls_w,
    reversal_rates,
    separable,
    separable_groups,
    wilson,
)
from bench.stats.selection_bias.table import FEWEST_SELECTIONS, SAME, ScoreTable, mean_scores
from bench.stats.selection_bias.variance import VarianceShares, variance_shares

__all__ = [
    "FEWEST_SELECTIONS",
    "SAME",
    "AdjustedDifference",
    "AdjustedScore",
    "AdjustedScores",
    "Concordance",
    "Failures",
    "PairNeeded",
    "Rank",
    "Ranking",
    "Reversal",
    "ScoreTable",
    "SeparablePair",
    "VarianceShares",
    "adjusted_scores",
    "failures_of",
    "kendalls_w",
    "mean_scores",
    "noncentrality",
    "reversal_rates",
    "selections_needed",
    "selections_needed_between",
    "selections_needed_pair",
    "separable",
    "separable_groups",
    "variance_shares",
    "wilson",
]
