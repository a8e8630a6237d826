"""What algorithms would score on selections of the same difficulty."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from bench.stats.estimates import LEVEL, Estimate, t_interval
from bench.stats.selection_bias.table import check_lengths
from scoring.errors import UserError


@dataclass(frozen=True)
class AdjustedScore:
    """An algorithm's mean over the `selections` it was run on, and what it would be at the mean difficulty."""

    algorithm: str
    selections: int
    raw: Estimate
    adjusted: Estimate


@dataclass(frozen=True)
class AdjustedDifference:
    """first - second at equal difficulty, in units of the score."""

    first: str
    second: str
    difference: Estimate


@dataclass(frozen=True)
class AdjustedScores:
    """Scores at equal difficulty.

    Attributes:
        difficulty: the mean difficulty to which scores are adjusted.
        slope: change of the score per unit of difficulty, the same for all algorithms.
        scores: of each algorithm, in the order of first appearance.
        differences: of each pair of algorithms.
    """

    difficulty: float
    slope: Estimate
    scores: tuple[AdjustedScore, ...]
    differences: tuple[AdjustedDifference, ...]


def adjusted_scores(
    algorithms: Sequence[str],
    difficulty: Sequence[float] | np.ndarray,
    values: Sequence[float] | np.ndarray,
    selections: Sequence[str],
    level: float = LEVEL,
) -> AdjustedScores:
    """What each algorithm would score at the mean difficulty, also where each was run on selections of its own.

    Four sequences of one length, a row for each run; difficulty is that of the selection (mean log MRD), in any unit.
    Runs of one algorithm on one selection are averaged first. Then, by least squares,

        y = score of the algorithm + slope (difficulty - mean difficulty)

    with the mean over the distinct selections. Where all algorithms have seen all selections, adjusted scores are the
    raw ones. Difficulty is taken as known: a noisy one biases the slope towards 0.

    Intervals of adjusted values are t intervals of the delete-one-selection jackknife (the cluster-robust CR3,
    MacKinnon, Nielsen & Webb 2023), with the degrees of freedom that this variance has under equal independent errors
    (Satterthwaite, as Bell & McCaffrey 2002 for CR2): an algorithm with few selections has few, however many the
    others have. They are nan where the value hangs on a single selection. Intervals of raw means are t intervals over
    the algorithm's selections.

    Raises:
        UserError: a value is not finite, a selection has two difficulties, or difficulty does not vary within any
            algorithm, so that it cannot be told from the algorithms.
    """
    check_lengths(algorithms=algorithms, difficulty=difficulty, values=values, selections=selections)
    cells: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    difficulty_of: dict[str, float] = {}
    for algorithm, selection, hardness, score in zip(algorithms, selections, difficulty, values, strict=True):
        for quantity, number in (("score", score), ("difficulty", hardness)):
            if not math.isfinite(number):
                raise UserError(
                    f"{quantity} of {algorithm!r} on selection {selection!r} is {number}: expected a finite number; "
                    "leave the run out"
                )
        if difficulty_of.setdefault(selection, float(hardness)) != hardness:
            raise UserError(
                f"selection {selection!r} has the difficulties {difficulty_of[selection]} and {hardness}: expected one "
                "for all its runs; give selections of different samples different names"
            )
        cells[algorithm, selection].append(float(score))

    algorithm_names, selection_names = list(dict.fromkeys(algorithms)), list(difficulty_of)
    row = np.array([algorithm_names.index(algorithm) for algorithm, _ in cells], dtype=int)
    column = np.array([selection_names.index(selection) for _, selection in cells], dtype=int)
    y = np.array([np.mean(scores) for scores in cells.values()])
    x = np.array(list(difficulty_of.values()))
    mean_difficulty = float(x.mean()) if difficulty_of else math.nan
    design = np.column_stack([row[:, None] == np.arange(len(algorithm_names)), x[column] - mean_difficulty]).astype(
        float
    )
    if not cells or np.linalg.matrix_rank(design) < design.shape[1]:
        raise UserError(
            f"difficulty of {len(difficulty_of)} selections: expected one algorithm with runs on two of different "
            "difficulty, without which difficulty and algorithm cannot be told apart; add runs or compare raw scores"
        )
    count = len(algorithm_names)
    pairs = list(combinations(range(count), 2))
    coefficients = np.eye(count + 1)  # a score for each algorithm, and the slope
    functions = np.array([*coefficients, *(coefficients[i] - coefficients[j] for i, j in pairs)])
    estimates = _jackknifed(functions, design, column, y, level)
    scores, slope, differences = estimates[:count], estimates[count], estimates[count + 1 :]
    return AdjustedScores(
        mean_difficulty,
        slope,
        tuple(
            AdjustedScore(algorithm, int((row == k).sum()), t_interval(y[row == k], level), scores[k])
            for k, algorithm in enumerate(algorithm_names)
        ),
        tuple(
            AdjustedDifference(algorithm_names[i], algorithm_names[j], difference)
            for (i, j), difference in zip(pairs, differences, strict=True)
        ),
    )


def _jackknifed(
    functions: np.ndarray, design: np.ndarray, cluster: np.ndarray, y: np.ndarray, level: float
) -> list[Estimate]:
    """Linear functions of least-squares coefficients, with their delete-one-cluster intervals.

    Args:
        functions: (k, p), one in a row.
        design: (n, p) of full rank.
        cluster: (n,) the number of the cluster, from 0.
        y: (n,).
    """
    clusters = cluster.max() + 1
    whole = functions @ np.linalg.pinv(design)
    # Values are linear in y, and so is their change when a cluster is left out.
    design_without = np.where((cluster != np.arange(clusters)[:, None])[..., None], design, 0.0)  # (clusters, n, p)
    without = functions @ np.linalg.pinv(design_without)
    changes = without - whole
    known = (np.abs(without @ design_without - functions) < 1e-6).all(axis=(0, 2))
    variance = (clusters - 1) / clusters * ((changes @ y) ** 2).sum(axis=0)
    estimates = []
    for k, value in enumerate((whole @ y).tolist()):
        if not known[k]:
            estimates.append(Estimate(value, math.nan, math.nan))
            continue
        spread = changes[:, k] @ changes[:, k].T
        df = np.trace(spread) ** 2 / (spread**2).sum()
        half = float(stats.t.ppf((1 + level) / 2, df) * math.sqrt(variance[k]))
        estimates.append(Estimate(value, value - half, value + half))
    return estimates
