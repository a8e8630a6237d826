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

LONGEST = 64  # rows whose products are formed one by one


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
    row_of, column_of = ({name: n for n, name in enumerate(names)} for names in (algorithm_names, selection_names))
    row = np.array([row_of[algorithm] for algorithm, _ in cells], dtype=int)
    column = np.array([column_of[selection] for _, selection in cells], dtype=int)
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

    In the orthonormal basis Q of the design, without cluster g a function f is estimated with the weights a_g · q_i of
    the rows i that are left, a_g = f (I - G_g)⁺ and G_g = Q_g' Q_g; so all that is needed of the n rows are the G_g and
    Q_g' y_g, and the work grows with the clusters and not with their square.

    Args:
        functions: (k, p), one in a row.
        design: (n, p) of full rank.
        cluster: (n,) the number of the cluster, from 0.
        y: (n,).
    """
    clusters, p = int(cluster.max()) + 1, design.shape[1]
    basis, triangle = np.linalg.qr(design)
    gram, moment = np.zeros((clusters, p, p)), np.zeros((clusters, p))
    np.add.at(gram, cluster, basis[:, :, None] * basis[:, None, :])
    np.add.at(moment, cluster, basis * y[:, None])
    left = np.eye(p) - gram
    inverse = np.linalg.pinv(left, rcond=1e-10, hermitian=True)
    whole = basis.T @ y
    estimates = []
    for function in np.linalg.solve(triangle.T, functions.T).T:
        value = float(function @ whole)
        without = function @ inverse  # (clusters, p)
        if (np.abs((np.einsum("gp,gpq->gq", without, left) - function) @ triangle) >= 1e-6).any():
            estimates.append(Estimate(value, math.nan, math.nan))
            continue
        changes = (without * (whole - moment)).sum(axis=1) - value
        variance = (clusters - 1) / clusters * (changes**2).sum()
        # The weights of two changes have the product -u_g · u_h, and those of one with themselves u_g · f.
        u = without - function
        own = u @ function
        products = _squares_of_products(u)
        df = own.sum() ** 2 / ((own**2).sum() + products)
        half = float(stats.t.ppf((1 + level) / 2, df) * math.sqrt(variance))
        estimates.append(Estimate(value, value - half, value + half))
    return estimates


def _squares_of_products(rows: np.ndarray) -> float:
    """The sum of (r_g · r_h)² over all g and h but g = h.

    All pairs at once are the squares of a small matrix less those of the rows themselves. Rows that are far longer than
    the others, of clusters on which nearly all hangs, would drown the rest in that difference: they go pair by pair.
    """
    lengths = (rows**2).sum(axis=1)
    longest = np.argsort(-lengths)
    far, near = rows[longest[:LONGEST]], rows[longest[LONGEST:]]
    among = far @ far.T
    np.fill_diagonal(among, 0.0)
    of_near = ((near.T @ near) ** 2).sum() - (lengths[longest[LONGEST:]] ** 2).sum()
    return float((among**2).sum() + 2 * ((far @ near.T) ** 2).sum() + max(of_near, 0.0))
