"""Table 11: what makes a sample's MRD high? Low against high levels of four characteristics, with length set aside.

Levels are those that the task made its records with, where it has them, and the outer quarters of what is counted
in the text (scoring.characteristics) or given by the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from bench.experiments.experiment import Answer, Experiment, Setting
from bench.files.score_file import Scores
from bench.jobs.resources import Resources
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
from bench.stats.estimates import Estimate
from bench.tasks.datasets import Dataset, load_dataset
from scoring.characteristics import characteristics
from scoring.errors import UserError
from scoring.records import LAYOUTS

LOW, HIGH = "low", "high"
MADE, MEASURED = "made", "measured"
# The text of section 3.3 says -1. The MRD of Table 11 (low 0.3481, high 0.7689) says the opposite.
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
    """What is compared.

    Attributes:
        size: samples drawn from each level.
        corpus: splits in which words and phrases are counted, those the model was trained on; a record that says
            with which frequency it was repeated in training counts as often.
        seed: of the draw.
    """

    size: int = 40
    corpus: list[str]
    seed: int = 0

    def checked(self) -> Table11Spec:
        """The same.

        Raises:
            UserError: a value out of range.
        """
        if self.size < 2:
            raise UserError(f"size is {self.size}: expected at least 2 samples of each level")
        if not self.corpus:
            raise UserError("corpus names no split: expected those that the model was trained on")
        return self


@dataclass(frozen=True)
class Grouping:
    """Two levels of an attribute.

    Attributes:
        attribute: which, and what the paper says about it.
        source: "made" or "measured".
        high: sample id -> whether it is of the high level; samples of neither are left out.
    """

    attribute: Attribute
    source: str
    high: Mapping[str, bool]


@dataclass(frozen=True)
class Compared:
    """A grouping, and the effect that it has on MRD.

    Attributes:
        grouping: with all samples of its levels.
        effect: of as many as the paper draws from each level.
        whole: of all.
    """

    grouping: Grouping
    effect: Effect
    whole: Effect

    @property
    def title(self) -> str:
        return f"{self.grouping.attribute.title} ({self.grouping.source})"

    @property
    def claim(self) -> int:
        return self.grouping.attribute.claim


def run(setting: Setting) -> Answer:
    spec = setting.spec(Table11Spec, "groups").checked()
    scored = setting.spec(ScoreSpec, "score")
    shared = setting.resources
    resources = Resources(shared.concurrent, shared.cpus_per_trial, shared.gpus_per_trial)
    result = score(scored, setting.work / "scores.parquet", resources, progress=setting.progress)
    tokenizer = find_model(scored.model).tokenizer
    dataset = load_dataset(scored.data, scored.split, tokenizer)
    corpus = [text for split in spec.corpus for text in as_trained(load_dataset(scored.data, split, tokenizer))]
    return answer(Scores.read(result.path), dataset, corpus, spec)


def as_trained(dataset: Dataset) -> list[str]:
    """The texts, each as often as its record says that an epoch of training had it."""
    return [text_of(record) for record in dataset.records for _ in range(record.get("frequency", 1))]


def text_of(record: Record) -> str:
    """The words of a record, without those of the prompt that they are put into."""
    fields = next(fields for fields in LAYOUTS if all(field in record for field in fields))
    return " ".join(record[field] for field in fields)


def answer(scores: Scores, dataset: Dataset, corpus: Sequence[str], spec: Table11Spec) -> Answer:
    """From the scores of a data set's samples and the texts that the model was trained on."""
    compared = [
        Compared(each, effect(scores, drawn(each, spec.size, spec.seed)), effect(scores, each))
        for each in groupings(scores, dataset, corpus)
    ]
    if not compared:
        raise UserError(f"{dataset.name}: no characteristic varies between its samples; there is nothing to compare")
    sentences = [
        f"**{len(scores.ids)} samples of {dataset.name}**, {spec.size} drawn from each level as in the paper, and all "
        "of them. Made: the level with which the task made the record. Measured: the lowest against the highest "
        "quarter of what is counted in the text, or of the probability under the model.",
        _markdown(compared),
        *(_sentence(each) for each in compared),
        _claim(compared, spec),
    ]
    panels = [
        by_attribute([_titled(each, "\n") for each in compared], f"MRD, {spec.size} of each level"),
        forest_plot([_titled(each, " ") for each in compared], []),
    ]
    table = pa.Table.from_pylist([_row(each) for each in compared])
    return Answer(table, panels, sentences, inches=(20.0, 6.0))


def _titled(each: Compared, space: str) -> Effect:
    """What was drawn, under a title that says where the levels are from."""
    attribute = dataclasses.replace(each.grouping.attribute, title=each.title.replace(" ", space))
    return dataclasses.replace(each.effect, attribute=attribute)


def groupings(scores: Scores, dataset: Dataset, corpus: Sequence[str]) -> list[Grouping]:
    """All that the records and the scores allow, the paper's attributes in turn."""
    by_id = {record["id"]: record for record in dataset.records}
    records = [by_id[name] for name in scores.ids]
    texts = characteristics([text_of(record) for record in records], corpus)
    counted = {
        "complexity": [text.syntactic_complexity for text in texts],
        "frequency": [text.occurrence_frequency for text in texts],
        "rare_words": [text.rare_words for text in texts],
        PROBABILITY.field: scores.probability.tolist(),
    }
    found = []
    for attribute in (*ATTRIBUTES, PROBABILITY):
        levels = {True: attribute.high, False: attribute.low}
        made = {
            name: high
            for name, record in zip(scores.ids, records, strict=True)
            for high, level in levels.items()
            if record.get(attribute.field) == level
        }
        quarters = outer_quarters(dict(zip(scores.ids, counted[attribute.field], strict=True)))
        found += [Grouping(attribute, MADE, made), Grouping(attribute, MEASURED, quarters)]
    return [grouping for grouping in found if len(set(grouping.high.values())) == 2]


def outer_quarters(values: Mapping[str, float]) -> dict[str, bool]:
    """The ids of the lowest and of the highest quarter, ties included; none where half the values are the same.

    Args:
        values: by id; nan is no value.
    """
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    low, high = np.quantile(list(known.values()), [0.25, 0.75]).tolist() if known else (0.0, 0.0)
    if low == high:
        return {}
    return {name: value >= high for name, value in known.items() if value <= low or value >= high}


def drawn(grouping: Grouping, size: int, seed: int) -> Grouping:
    """The same with at most so many samples of each level."""
    kept: dict[str, bool] = {}
    for level in (False, True):
        ids = [name for name, high in grouping.high.items() if high == level]
        rng = np.random.default_rng([seed, level, *f"{grouping.attribute.field} {grouping.source}".encode()])
        kept |= {ids[i]: level for i in sorted(rng.choice(len(ids), min(size, len(ids)), replace=False).tolist())}
    return dataclasses.replace(grouping, high=kept)


def effect(scores: Scores, grouping: Grouping) -> Effect:
    """What `attribute_effects` finds if the samples of a grouping, and no others, carry its levels."""
    carrier = ATTRIBUTES[0]
    records = [
        {"id": name, carrier.field: carrier.high if high else carrier.low} for name, high in grouping.high.items()
    ]
    table = scores.table.filter(pa.array([name in grouping.high for name in scores.ids]))
    (found,) = attribute_effects(Scores(table, scores.spec, scores.facts), records)
    return dataclasses.replace(found, attribute=grouping.attribute)


# --- Words and rows -----------------------------------------------------------------------------------------


def _sentence(each: Compared) -> str:
    title, found, whole = each.title.capitalize(), each.effect, each.whole
    count = f"With all {len(whole.low)} + {len(whole.high)} samples, Hedges' g {with_ci(whole.size)}"
    if each.grouping.attribute != PROBABILITY:
        judged = (sign_verdict(estimate, each.claim) for estimate in (whole.size, whole.beyond_length))
        return (
            f"{title}. {found.sentence()} {count}: {next(judged)}; rank correlation beyond length "
            f"{with_ci(whole.beyond_length)}: {next(judged)}."
        )
    low, high = PAPER[PROBABILITY.field]
    sides = {-1: "as the text says", 1: "as the table shows, against the text", 0: "neither can be told"}
    return (
        f"{title}. The paper contradicts itself: by its text high probability means low MRD, its Table 11 has {low} at "
        f"the low and {high} at the high level. Here the mean MRD is {number_with_ci(found.low_mean)} and "
        f"{number_with_ci(found.high_mean)}, Hedges' g {with_ci(found.size)}: {sides[found.size.sign]}. With length "
        f"partialled out, rank correlation {with_ci(found.beyond_length)}: {sides[found.beyond_length.sign]}. {count}: "
        f"{sides[whole.size.sign]}; rank correlation beyond length {with_ci(whole.beyond_length)}: "
        f"{sides[whole.beyond_length.sign]}."
    )


def _claim(compared: Sequence[Compared], spec: Table11Spec) -> str:
    parts = []
    for how, estimates in (
        (f"With {spec.size} of each level", [each.effect.size for each in compared]),
        ("With all", [each.whole.size for each in compared]),
        ("With all and length partialled out", [each.whole.beyond_length for each in compared]),
    ):
        found: dict[str, list[str]] = {}
        for each, estimate in zip(compared, estimates, strict=True):
            found.setdefault(sign_verdict(estimate, each.claim), []).append(each.title)
        listed = "; ".join(f"{words} for {', '.join(titles)}" for words, titles in found.items())
        signs = {estimate.sign * each.claim for each, estimate in zip(compared, estimates, strict=True)}
        together = "all hold here" if signs == {1} else "not all can be told here"
        parts.append(f"{how}, {'some are contradicted here' if -1 in signs else together}: {listed}.")
    return (
        "The claims of the paper's text are that MRD is high for samples that are complex, rare, improbable or have "
        f"rare words. {' '.join(parts)} Each is judged at 95 % by itself."
    )


def _markdown(compared: Sequence[Compared]) -> str:
    head = ["attribute", "n", "MRD, low", "MRD, high", "Hedges' g", "g, all", "beyond length, all", "the paper"]
    rows = []
    for each in compared:
        found = each.effect
        estimates = [found.size, each.whole.size, each.whole.beyond_length]
        low, high = PAPER[each.grouping.attribute.field]
        rows.append(
            [
                each.title,
                f"{len(found.low)} + {len(found.high)}",
                number_with_ci(found.low_mean),
                number_with_ci(found.high_mean),
                *map(with_ci, estimates),
                f"{decimal(low, 4)}, {decimal(high, 4)}",
            ]
        )
    return markdown_table(head, rows)


def _row(each: Compared) -> dict[str, Any]:
    found, claim = each.effect, each.claim
    paper = PAPER[each.grouping.attribute.field]
    row: dict[str, Any] = {
        "attribute": each.grouping.attribute.field,
        "source": each.grouping.source,
        "low_samples": len(found.low),
        "high_samples": len(found.high),
        "all_low_samples": len(each.whole.low),
        "all_high_samples": len(each.whole.high),
    }
    named: dict[str, Estimate] = {
        "low_mean": found.low_mean,
        "high_mean": found.high_mean,
        "difference": found.difference,
        "hedges_g": found.size,
        "correlation": found.correlation,
        "beyond_length": found.beyond_length,
        "with_length": found.with_length,
        "hedges_g_of_all": each.whole.size,
        "beyond_length_of_all": each.whole.beyond_length,
    }
    for name, estimate in named.items():
        row |= interval_columns(name, estimate)
    return row | {
        "paper_says": claim,
        "paper_low": paper[0],
        "paper_high": paper[1],
        "verdict": sign_verdict(found.size, claim),
        "verdict_beyond_length": sign_verdict(found.beyond_length, claim),
    }


EXPERIMENT = Experiment(
    name="table11",
    title="characteristics that influence MRD",
    question="What makes the MRD of a sample high or low, and does it still once length is set aside?",
    claim="MRD is high for samples of high complexity, low frequency, low initial probability and with rare words.",
    run=run,
)
