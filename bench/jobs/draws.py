"""Draws of several estimators on the same samples, kept one by one: a score file has only their mean.

    points -> a task for a few draws of a point -> replicas -> parts on disk -> one Parquet file

All points draw along the same directions, so that a difference between two sigmas is not one of sampling. A killed
measurement is continued by the same call, and a finished one is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from bench.files.identity import with_spec_hash
from bench.files.parts import DrawParts
from bench.files.score_file import read_scores, write_scores
from bench.jobs.resources import Resources
from bench.models.find import ModelReference
from bench.report.words import with_ci
from bench.stats.estimates import Estimate, over_samples
from scoring.engine import Dtype
from scoring.errors import UserError
from scoring.mrd import ESTIMATORS, Draws, EstimatorName, Request, Statistic, reduce_draws, scaling_slope
from scoring.samples import BATCH_TOKENS, Sample, make_batches
from scoring.work import DrawTask, ReplicaSpec

SCHEMA_VERSION = 1
# sd / mean of |x|, x normal: how far one draw of mean_abs is off, relatively. The standard error of K draws is this
# over sqrt(K), whatever the model and the sample, as long as the change is linear in the perturbation.
HALF_NORMAL_SPREAD = math.sqrt(math.pi / 2 - 1)
EXACT: Dtype = "float32"  # coarser dtypes are measured to show what storage rounds away, so it may be lost there
# Draws in one task: few, since those of `curvature` are dear and all replicas shall have work.
DRAWS_PER_TASK = 4


@dataclass(frozen=True)
class Point:
    """Where draws are made.

    Attributes:
        estimator: see scoring.mrd.
        sigma: standard deviation of the perturbation.
        draws: how many (pairs, for antithetic); 1 for an estimator that draws nothing.
        dtype: of weights and activations.
    """

    estimator: EstimatorName
    sigma: float
    draws: int = 1
    dtype: Dtype = EXACT


@dataclass(frozen=True)
class PointDraws:
    """What was drawn at a point.

    Attributes:
        point: where.
        values: (N, K), a row for each sample, in the order in which the samples were given.
        survival: std(stored(theta + delta) - theta) / sigma; None if nothing was perturbed.
    """

    point: Point
    values: np.ndarray
    survival: float | None = None

    def mrd(self, statistic: str) -> np.ndarray:
        """(N,)."""
        return reduce_draws(self.values, cast(Statistic, statistic))[0]


def measure_draws(
    path: Path,
    model: ModelReference,
    samples: Sequence[Sample],
    points: Sequence[Point],
    resources: Resources,
    seed: int = 0,
    progress: bool = True,
) -> list[PointDraws]:
    """Draw at all points and write `path`, or read it where it holds just that.

    Args:
        path: a Parquet file, a row for each point and sample; other points or samples in it are replaced.
        model: which is drawn from.
        samples: whose values; they are never split, a replica takes all of them.
        points: where to draw, without repetition.
        resources: how the work is spread.
        seed: addresses the noise.
        progress: show a bar.

    Returns:
        The draws of every point, in the order of the points.

    Raises:
        UserError: float32 does not hold the perturbation of a point.
    """
    identity = _identity(model, samples, points, seed)
    if (table := read_finished(path, identity)) is not None:
        return [_of_point(table, number, point) for number, point in enumerate(points)]
    batches = make_batches(samples, BATCH_TOKENS)
    tasks = [task for number, point in enumerate(points) for task in _tasks(number, point, seed)]
    with DrawParts(path, identity) as parts:
        todo = [task for task in tasks if not parts.has(task.key)]
        with tqdm(
            total=len(tasks), initial=len(tasks) - len(todo), unit="task", desc="drawing", disable=not progress
        ) as bar:
            for dtype in dict.fromkeys(points[task.shard].dtype for task in todo):
                replica = ReplicaSpec(model.source, model.revision, dtype, allow_lost_perturbation=dtype != EXACT)
                with resources.pool(replica) as pool:
                    mine = [task for task in todo if points[task.shard].dtype == dtype]
                    for task, draws, facts in pool.run(mine, [batches] * len(points)):
                        parts.keep(task, draws, facts)
                        bar.update()
        table = pa.concat_tables([_rows(number, point, samples, tasks, parts) for number, point in enumerate(points)])
        write_scores(table, path, identity, {})
        parts.remove()
    return [_of_point(table, number, point) for number, point in enumerate(points)]


def read_finished(path: Path, identity: dict[str, Any]) -> pa.Table | None:
    """What `path` holds, if it was measured for this identity; None: measure it."""
    if not path.is_file():
        return None
    try:
        table, spec, _ = read_scores(path)
    except UserError:
        return None
    return table if spec.get("spec_hash") == identity["spec_hash"] else None


def scaling_line(drawn: Sequence[PointDraws], statistic: str) -> ScalingLine:
    """A statistic against sigma, from the draws of one estimator and dtype at several."""
    point = drawn[0].point
    sigmas = np.array([at_sigma.point.sigma for at_sigma in drawn])
    scores = np.stack([at_sigma.mrd(statistic) for at_sigma in drawn])
    return ScalingLine(point.estimator, statistic, point.dtype, sigmas, scores)


def _identity(model: ModelReference, samples: Sequence[Sample], points: Sequence[Point], seed: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.sample_id.encode() + b"\0" + sample.input_ids.tobytes() + sample.scored.tobytes())
    content = {
        "schema_version": SCHEMA_VERSION,
        "model_fingerprint": model.fingerprint,
        "samples_sha256": digest.hexdigest(),
        "points": [dataclasses.asdict(point) for point in points],
        "seed": seed,
    }
    return with_spec_hash(content, ())


def _tasks(number: int, point: Point, seed: int) -> list[DrawTask]:
    draws = point.draws if ESTIMATORS[point.estimator].default_draws else 1
    return [
        DrawTask(number, Request(point.estimator, point.sigma, seed, first, min(first + DRAWS_PER_TASK, draws)))
        for first in range(0, draws, DRAWS_PER_TASK)
    ]


def _rows(
    number: int, point: Point, samples: Sequence[Sample], tasks: Sequence[DrawTask], parts: DrawParts
) -> pa.Table:
    """The table of one point, put together from its parts."""
    tasks_of_point = [task for task in tasks if task.shard == number]
    draws = reduce(Draws.followed_by, (parts.result(task) for task in tasks_of_point))
    row = {index: place for place, index in enumerate(draws.indices.tolist())}
    order = [row[sample.index] for sample in samples]
    # A replica remembers the survival at the sigma that it perturbed by last: this point's is that of its own tasks.
    survival = parts.facts(tasks_of_point[:1]).perturbation_survival if ESTIMATORS[point.estimator].perturbs else None
    count = len(samples)
    return pa.table(
        {
            "point": np.full(count, number),
            "estimator": [point.estimator] * count,
            "sigma": np.full(count, point.sigma),
            "dtype": [point.dtype] * count,
            "sample_id": [sample.sample_id for sample in samples],
            "num_tokens": [sample.num_scored for sample in samples],
            "perturbation_survival": pa.array([survival] * count, pa.float64()),
            "values": pa.array(list(draws.values[order]), pa.list_(pa.float64())),
        }
    )


def _of_point(table: pa.Table, number: int, point: Point) -> PointDraws:
    mine = table.filter(pc.equal(table["point"], number))
    values = np.stack([np.asarray(row) for row in mine["values"].to_pylist()])
    return PointDraws(point, values, mine["perturbation_survival"][0].as_py())


# Slope of log MRD against log sigma where the model is measured and not its rounding (scoring.mrd.scaling_slope).
EXPECTED_SLOPE = {"mean_abs": 1.0, "abs_mean": 2.0}
SLOPE_TOLERANCE = 0.1


@dataclass(frozen=True)
class ScalingLine:
    """One statistic, measured at several sigmas on the same samples with the same directions.

    Attributes:
        estimator, statistic, dtype: see scoring.mrd.
        sigmas: (M,).
        scores: (M, N).
    """

    estimator: str
    statistic: str
    dtype: str
    sigmas: np.ndarray
    scores: np.ndarray

    @property
    def expected(self) -> float:
        return EXPECTED_SLOPE[self.statistic]

    def slope(self) -> Estimate:
        """scaling_slope, with its interval over the samples."""
        sigmas = self.sigmas.tolist()
        return over_samples(lambda rows: scaling_slope(sigmas, self.scores[:, rows]), self.scores.shape[1])

    def sentence(self) -> str:
        slope = self.slope()
        measured = (
            f"{self.statistic} by {self.estimator} in {self.dtype}, sigma {self.sigmas[0]:.0e} to "
            f"{self.sigmas[-1]:.0e}: slope {with_ci(slope, 3)}, expected {self.expected:g}."
        )
        if abs(slope.value - self.expected) <= SLOPE_TOLERANCE:
            return f"{measured} The number follows the perturbation, as it must."
        return f"{measured} The number does not follow the perturbation: it measures rounding, not the model."


def inflation(lines: Sequence[ScalingLine]) -> str:
    """How far each statistic in a coarser dtype is from itself in float32, at the smallest and largest shared sigma."""
    sentences = []
    exact = {line.statistic: line for line in lines if line.dtype == "float32"}
    for line in lines:
        if line.dtype == "float32" or line.statistic not in exact:
            continue
        reference = exact[line.statistic]
        shared = [sigma for sigma in line.sigmas.tolist() if sigma in reference.sigmas]
        for sigma in dict.fromkeys((shared[0], shared[-1])) if shared else ():
            here, there = (float(np.median(one.scores[list(one.sigmas).index(sigma)])) for one in (line, reference))
            sentences.append(
                f"At sigma {sigma:.0e} the median {line.statistic} in {line.dtype} is {here / there:.3g} times that in "
                "float32."
            )
    return " ".join(sentences)
