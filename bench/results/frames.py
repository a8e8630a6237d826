"""Result stores as data frames, for Python programs and notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.results.export import flat_rows
from bench.results.store import Skipped, read_stores

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ResultFrames:
    """The content of result stores.

    Attributes:
        runs: one row for each unlearning run: spec, selection, status, where it comes from, a column for each metric.
        samples: one row for each forget sample of a run.
        scores: one row for each scored sample.
        answers: one row for each sample of an evaluation: what the models answered.
        skipped: files that could not be read, with the reason.
    """

    runs: pd.DataFrame
    samples: pd.DataFrame
    scores: pd.DataFrame
    answers: pd.DataFrame
    skipped: tuple[Skipped, ...]


def read_results(
    stores: str | Path | Sequence[str | Path], *, task: str | None = None, experiment: str | None = None
) -> ResultFrames:
    """The content of result stores together.

    Args:
        stores: folders or URIs (s3://, gs://) of stores.
        task, experiment: only this one.

    Raises:
        UserError: one of them is no store.
    """
    import pandas as pd

    roots = [stores] if isinstance(stores, str | Path) else stores
    results = read_stores(roots, task, experiment)
    return ResultFrames(
        runs=pd.DataFrame(flat_rows(results.runs)),
        samples=results.samples.to_pandas(),
        scores=results.scores.to_pandas(),
        answers=results.answers.to_pandas(),
        skipped=results.skipped,
    )
