"""Table 11: what makes a sample's MRD high? Low against high levels of four characteristics, with length set aside.

Levels are those with which the task made its records, where it has them, and the outer quarters of numbers that are
counted in the text (scoring.characteristics) or given by the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.files.score_file import Scores
from bench.jobs.score import ScoreSpec, score
from bench.models.find import find_model
from bench.report.attributes import ATTRIBUTES, Attribute, Effect, Record, attribute_effects, by_attribute, forest_plot
from bench.report.words import (
    decimal,
    interval_columns,
    markdown_table,
    number_with_ci,
    sign_verdict,
    with_ci,
)
from bench.tasks.datasets import Dataset, load_dataset
from scoring.characteristics import characteristics
from scoring.errors import UserError
from scoring.records import LAYOUTS
from scoring.settings import Doc, Ge, check, named

LOW, HIGH = "low", "high"
MADE, MEASURED = "made", "measured"
# The text of section 3.3 says -1; the MRD of Table 11 (low 0.3481, high 0.7689) says the opposite.
PROBABILITY = Attribute("probability", "initial probability", LOW, HIGH, -1)
# Table 11: MRD at the low and at the high level.
PAPER = {
    "complexity": (0.3085, 1.0026),
    "frequency": (0.6374, 0.2529),
    "probability": (0.3481, 0.7689),
    "rare_words": (0.3929, 0.7188),
}


@dataclass(frozen=True, kw_only=True)
class Table11Spec:
    """What is compared."""

    size: Annotated[int, Ge(2), Doc("samples drawn from each level")] = 40
    corpus: Annotated[
        list[str],
        Doc(
            "splits that the model was trained on, in which words and phrases are counted; a record with a frequency "
            "counts as often as it was repeated in training"
        ),
    ]
    seed: Annotated[int, Ge(0), Doc("of the draw")] = 0

    def checked(self) -> Self:
        """The same.

        Raises:
            UserError: a value that is not allowed, or no split.
        """
        check(self)
        if not self.corpus:
            raise UserError(f"{named('corpus')} is empty: expected the splits that the model was trained on")
        return self


@dataclass(frozen=True)
class Grouping:
    """Two levels of an attribute.

    Attributes:
        attribute: the attribute, and what the paper says about it.
        source: "made" or "measured".
        high: sample id -> whether the sample is at the high level; samples at neither level are left out.
    """

    attribute: Attribute
    source: str
    high: Mapping[str, bool]


@dataclass(frozen=True)
class Comparison:
    """A grouping, and the effect that it has on MRD.

    Attributes:
        grouping: with all samples of its levels.
        drawn: the effect in as many samples as the paper draws from each level.
        whole: the effect in all samples.
    """

    grouping: Grouping
    drawn: Effect
    whole: Effect

    @property
    def title(self) -> str:
        return f"{self.grouping.attribute.title} ({self.grouping.source})"

    @property
    def claim(self) -> int:
        return self.grouping.attribute.claim


def run(setup: Setup) -> Answer:
    spec = setup.spec(Table11Spec, "groups")
    score_spec = setup.spec(ScoreSpec, "score")
    scores = score(score_spec, setup.work / "scores.parquet", setup.resources.replicas(), progress=setup.progress)
    tokenizer = find_model(score_spec.model).tokenizer
    dataset = load_dataset(score_spec.data, score_spec.split, tokenizer)
    corpus = [
        text for split in spec.corpus for text in texts_as_trained(load_dataset(score_spec.data, split, tokenizer))
    ]
    return answer(Scores.read(scores.path), dataset, corpus, spec)


def texts_as_trained(dataset: Dataset) -> list[str]:
    """The texts, each as often as an epoch of training had it according to its record."""
    return [text_of(record) for record in dataset.records for _ in range(record.get("frequency", 1))]


def text_of(record: Record) -> str:
    """The words of a record, without those of the prompt around them."""
    fields = next(fields for fields in LAYOUTS if all(field in record for field in fields))
    return " ".join(record[field] for field in fields)


def answer(scores: Scores, dataset: Dataset, corpus: Sequence[str], spec: Table11Spec) -> Answer:
    """From the scores of a data set's samples and the texts that the model was trained on."""
    comparisons = [
        Comparison(
            grouping,
            effect_of(scores, draw_samples(grouping, spec.size, spec.seed)),
            effect_of(scores, grouping),
        )
        for grouping in groupings_of(scores, dataset, corpus)
    ]
    if not comparisons:
        raise UserError(f"{dataset.name}: no characteristic varies between its samples; there is nothing to compare")
    sentences = [
        f"**{len(scores.ids)} samples of {dataset.name}**, {spec.size} drawn from each level as in the paper, and all "
        "of them. Made: the level with which the task made the record. Measured: the lowest against the highest "
        "quarter of what is counted in the text, or of the probability under the model.",
        _table(comparisons),
        *(_sentence(comparison) for comparison in comparisons),
        _claim(comparisons, spec),
    ]
    panels = [
        by_attribute([_with_source(comparison, "\n") for comparison in comparisons], f"MRD, {spec.size} of each level"),
        forest_plot([_with_source(comparison, " ") for comparison in comparisons], []),
    ]
    table = pa.Table.from_pylist([_row(comparison) for comparison in comparisons])
    return Answer(table, panels, sentences, inches=(20.0, 6.0))


def _with_source(comparison: Comparison, space: str) -> Effect:
    """The effect in the drawn samples, under a title that says where the levels are from.

    Args:
        space: what the words of the title are separated by.
    """
    attribute = dataclasses.replace(comparison.grouping.attribute, title=comparison.title.replace(" ", space))
    return dataclasses.replace(comparison.drawn, attribute=attribute)


def groupings_of(scores: Scores, dataset: Dataset, corpus: Sequence[str]) -> list[Grouping]:
    """All groupings that the records and the scores allow, the paper's attributes in turn."""
    by_id = {record["id"]: record for record in dataset.records}
    records = [by_id[name] for name in scores.ids]
    texts = characteristics([text_of(record) for record in records], corpus)
    numbers = {
        "complexity": [text.syntactic_complexity for text in texts],
        "frequency": [text.occurrence_frequency for text in texts],
        "rare_words": [text.rare_words for text in texts],
        PROBABILITY.field: scores.probability.tolist(),
    }
    groupings = []
    for attribute in (*ATTRIBUTES, PROBABILITY):
        levels = {True: attribute.high, False: attribute.low}
        made = {
            name: high
            for name, record in zip(scores.ids, records, strict=True)
            for high, level in levels.items()
            if record.get(attribute.field) == level
        }
        quarters = outer_quarters(dict(zip(scores.ids, numbers[attribute.field], strict=True)))
        groupings += [Grouping(attribute, MADE, made), Grouping(attribute, MEASURED, quarters)]
    return [grouping for grouping in groupings if len(set(grouping.high.values())) == 2]


def outer_quarters(values: Mapping[str, float]) -> dict[str, bool]:
    """Id -> whether it is in the highest quarter, of the ids in the lowest and in the highest one, ties included.

    Empty where half the values are the same.

    Args:
        values: by id; nan is no value.
    """
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    low, high = np.quantile(list(known.values()), [0.25, 0.75]).tolist() if known else (0.0, 0.0)
    if low == high:
        return {}
    return {name: value >= high for name, value in known.items() if value <= low or value >= high}


def draw_samples(grouping: Grouping, size: int, seed: int) -> Grouping:
    """The same grouping with at most `size` samples of each level."""
    drawn: dict[str, bool] = {}
    for level in (False, True):
        ids = [name for name, high in grouping.high.items() if high == level]
        rng = np.random.default_rng([seed, level, *f"{grouping.attribute.field} {grouping.source}".encode()])
        drawn |= {ids[i]: level for i in sorted(rng.choice(len(ids), min(size, len(ids)), replace=False).tolist())}
    return dataclasses.replace(grouping, high=drawn)


def effect_of(scores: Scores, grouping: Grouping) -> Effect:
    """The effect of a grouping on the MRD of its samples."""
    # `attribute_effects` reads levels from records: these have the levels of the grouping, under a name that it knows.
    carrier = ATTRIBUTES[0]
    records = [
        {"id": name, carrier.field: carrier.high if high else carrier.low} for name, high in grouping.high.items()
    ]
    table = scores.table.filter(pa.array([name in grouping.high for name in scores.ids]))
    (effect,) = attribute_effects(Scores(table, scores.spec, scores.facts), records)
    return dataclasses.replace(effect, attribute=grouping.attribute)


# --- Words and rows -----------------------------------------------------------------------------------------


def _sentence(comparison: Comparison) -> str:
    title, drawn, whole = comparison.title.capitalize(), comparison.drawn, comparison.whole
    count = f"With all {len(whole.low)} + {len(whole.high)} samples, Hedges' g {with_ci(whole.size)}"
    if comparison.grouping.attribute != PROBABILITY:
        return (
            f"{title}. {drawn.sentence()} {count}: {sign_verdict(whole.size, comparison.claim)}; rank correlation "
            f"beyond length {with_ci(whole.beyond_length)}: {sign_verdict(whole.beyond_length, comparison.claim)}."
        )
    low, high = PAPER[PROBABILITY.field]
    sides = {-1: "as the text says", 1: "as the table shows, against the text", 0: "neither can be told"}
    return (
        f"{title}. The paper contradicts itself: by its text high probability means low MRD, its Table 11 has {low} at "
        f"the low and {high} at the high level. Here the mean MRD is {number_with_ci(drawn.low_mean)} and "
        f"{number_with_ci(drawn.high_mean)}, Hedges' g {with_ci(drawn.size)}: {sides[drawn.size.sign]}. With length "
        f"partialled out, rank correlation {with_ci(drawn.beyond_length)}: {sides[drawn.beyond_length.sign]}. {count}: "
        f"{sides[whole.size.sign]}; rank correlation beyond length {with_ci(whole.beyond_length)}: "
        f"{sides[whole.beyond_length.sign]}."
    )


def _claim(comparisons: Sequence[Comparison], spec: Table11Spec) -> str:
    parts = []
    for samples, estimates in (
        (f"With {spec.size} of each level", [comparison.drawn.size for comparison in comparisons]),
        ("With all", [comparison.whole.size for comparison in comparisons]),
        ("With all and length partialled out", [comparison.whole.beyond_length for comparison in comparisons]),
    ):
        titles_of: dict[str, list[str]] = {}
        for comparison, estimate in zip(comparisons, estimates, strict=True):
            titles_of.setdefault(sign_verdict(estimate, comparison.claim), []).append(comparison.title)
        listed = "; ".join(f"{verdict} for {', '.join(titles)}" for verdict, titles in titles_of.items())
        signs = {estimate.sign * comparison.claim for comparison, estimate in zip(comparisons, estimates, strict=True)}
        if -1 in signs:
            together = "some are contradicted here"
        else:
            together = "all hold here" if signs == {1} else "not all can be told here"
        parts.append(f"{samples}, {together}: {listed}.")
    return (
        "The claims of the paper's text are that MRD is high for samples that are complex, rare, improbable or have "
        f"rare words. {' '.join(parts)} Each is judged at 95 % by itself."
    )


def _table(comparisons: Sequence[Comparison]) -> str:
    head = ["attribute", "n", "MRD, low", "MRD, high", "Hedges' g", "g, all", "beyond length, all", "the paper"]
    rows = []
    for comparison in comparisons:
        drawn, whole = comparison.drawn, comparison.whole
        low, high = PAPER[comparison.grouping.attribute.field]
        rows.append(
            [
                comparison.title,
                f"{len(drawn.low)} + {len(drawn.high)}",
                number_with_ci(drawn.low_mean),
                number_with_ci(drawn.high_mean),
                with_ci(drawn.size),
                with_ci(whole.size),
                with_ci(whole.beyond_length),
                f"{decimal(low, 4)}, {decimal(high, 4)}",
            ]
        )
    return markdown_table(head, rows)


def _row(comparison: Comparison) -> dict[str, Any]:
    drawn, whole, claim = comparison.drawn, comparison.whole, comparison.claim
    paper_low, paper_high = PAPER[comparison.grouping.attribute.field]
    return {
        "attribute": comparison.grouping.attribute.field,
        "source": comparison.grouping.source,
        "low_samples": len(drawn.low),
        "high_samples": len(drawn.high),
        "all_low_samples": len(whole.low),
        "all_high_samples": len(whole.high),
        **interval_columns("low_mean", drawn.low_mean),
        **interval_columns("high_mean", drawn.high_mean),
        **interval_columns("difference", drawn.difference),
        **interval_columns("hedges_g", drawn.size),
        **interval_columns("correlation", drawn.correlation),
        **interval_columns("beyond_length", drawn.beyond_length),
        **interval_columns("with_length", drawn.with_length),
        **interval_columns("hedges_g_of_all", whole.size),
        **interval_columns("beyond_length_of_all", whole.beyond_length),
        "paper_says": claim,
        "paper_low": paper_low,
        "paper_high": paper_high,
        "verdict": sign_verdict(drawn.size, claim),
        "verdict_beyond_length": sign_verdict(drawn.beyond_length, claim),
    }


EXPERIMENT = Experiment(
    name="table11",
    title="characteristics that influence MRD",
    question="What makes the MRD of a sample high or low, and does it still once length is set aside?",
    claim="MRD is high for samples of high complexity, low frequency, low initial probability and with rare words.",
    run=run,
)
