"""The demo's page: one HTML file that needs no other, with every number and sentence computed from the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal

import numpy as np

from bench.demo.elements import bullets, estimate_cells, figure, number, paragraph, table, with_interval
from bench.demo.figures import difficulty, estimators, forecasts, recall_by_epoch, scaling, trade_off
from bench.demo.findings import Findings, agreement
from bench.demo.runs import DemoRun, Unlearning, best_runs_text, has_retain_set, percent, recipe_text, update_sentences
from bench.files.score_file import Scores
from bench.jobs.draws import inflation
from bench.report import figures
from bench.report.attributes import LENGTH, PROBABILITY, Correlation, Effect, by_attribute, forest_plot
from bench.report.style import STYLE_SHEET
from bench.report.words import decimal, with_ci
from bench.stats.estimates import Estimate, spearman

SHOWN_SAMPLES = 5  # hardest and easiest
RUN_INCHES = (5.0, 3.9)  # with room for a legend of two rows above the axes
# By that a page is told from somebody else's.
PAGE_TITLE = "<title>mrd-bench: how hard is each sample to forget?</title>"


def page(findings: Findings, unlearning: Unlearning) -> str:
    """The whole document."""
    sections = [
        ("measured", "What was measured", _measured(findings)),
        ("distribution", "How difficulty is distributed", _distribution(findings)),
        ("samples", "Hardest and easiest samples", _samples(findings)),
        ("estimators", "Estimators against one another", _estimators(findings)),
        ("scaling", "Does MRD follow sigma?", _scaling(findings)),
        ("attributes", "Difficulty by attribute", _attributes(findings)),
        ("length", "Length as a confound", _length(findings)),
        ("forecast", "How many updates will it take?", _forecast(findings)),
        ("unlearning", "Unlearning", _unlearning(unlearning)),
    ]
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>' for name, title, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"{PAGE_TITLE}<style>{STYLE_SHEET}</style></head>"
        "<body><header><h1>How hard is each sample to forget?</h1>"
        f"{paragraph(_lead(findings))}</header>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main></body></html>\n'
    )


def _lead(findings: Findings) -> str:
    scores = findings.monte_carlo
    mrd = scores["mrd"]
    return (
        f"Memory Removal Difficulty (MRD) of {len(mrd)} samples of {_data(scores)}: the relative change of a sample's "
        "log-probability when all weights are perturbed by a little Gaussian noise. In the paper's reading, low MRD is "
        f"hard to forget. The easiest sample has {mrd.max() / mrd.min():.2g} times the MRD of the hardest."
    )


# --- Sections -----------------------------------------------------------------------------------------------


def _measured(findings: Findings) -> str:
    score_files = [findings.monte_carlo, findings.gradient, findings.curvature, findings.attribute_scores]
    rows = [
        [
            escape(scores.spec["estimator"]),
            escape(scores.spec["statistic"]),
            escape(_data(scores)),
            str(scores.table.num_rows),
            str(scores.spec["draws"] or "none"),
            f"{scores.spec['sigma']:g}",
            str(scores.spec["seed"]),
            escape(scores.spec["dtype"]),
            f"{scores.facts['seconds']:.0f}",
            f"<code>{escape(scores.spec['spec_hash'])}</code>",
        ]
        for scores in score_files
    ]
    head = ["estimator", "statistic", "data", "samples", "draws", "sigma", "seed", "dtype", "seconds", "spec"]
    versions = ", ".join(f"{name} {version}" for name, version in findings.monte_carlo.facts["packages"].items())
    facts = {**findings.model, "scored tokens": findings.monte_carlo.spec["tokens"], "versions": versions}
    survival = findings.monte_carlo.facts["perturbation_survival"]
    if survival is not None:
        facts["perturbation survival"] = f"{survival:.4f} (1: the noise survived storage)"
    terms = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
    notes = dict.fromkeys(note for scores in score_files for note in scores.facts["notes"])
    rejected = sum(len(scores.facts["rejected"]) for scores in score_files)
    saturated = sum(int(scores["tokens_saturated"].sum()) for scores in score_files)
    remarks = [f"Note: {note}" for note in notes]
    if rejected:
        remarks.append(f"{rejected} samples could not be scored; the score files name them.")
    if saturated:
        remarks.append(f"{saturated} scored tokens have probability exactly 1 and are left out of the sums.")
    return (
        f"<dl>{terms}</dl>{table('Runs', head, rows)}"
        + paragraph(
            "mean_abs is the mean of |Δ| over the draws (Algorithm 1 of the paper), abs_mean the absolute value of the "
            "mean (Definition 3.1). They are different quantities: the first is proportional to sigma, the second to "
            "its square. All intervals on this page are 95 % and, unless stated otherwise, over samples (bootstrap)."
        )
        + "".join(map(paragraph, remarks))
    )


def _distribution(findings: Findings) -> str:
    scores = findings.monte_carlo
    mrd, error = scores["mrd"], scores["mrd_stderr"]
    quartiles = np.quantile(mrd, [0.25, 0.5, 0.75])
    draws = int(scores["draws"].max())
    sentence = (
        f"Median {number(quartiles[1])}, half of the samples between {number(quartiles[0])} and "
        f"{number(quartiles[2])}; range {number(mrd.min())} to {number(mrd.max())}. With {draws} draws the median "
        f"relative standard error is {np.median(error / mrd):.1%}."
    )
    alt = f"MRD of {len(mrd)} samples in ascending order, from {number(mrd.min())} to {number(mrd.max())}."
    caption = "Every sample in order of MRD, with the 95 % interval of the Monte Carlo error."
    return paragraph(sentence) + figure(figures.svg(difficulty(scores), "distribution", alt), caption)


def _samples(findings: Findings) -> str:
    scores = findings.monte_carlo
    order = np.argsort(scores["mrd"], kind="stable")
    shown = min(SHOWN_SAMPLES, max(1, len(order) // 2))
    head = ["sample", "question and answer", "MRD ± std. error", "tokens", "probability"]
    tables = []
    for title, rows in (
        ("Hardest to forget (lowest MRD)", order[:shown]),
        ("Easiest to forget (highest MRD)", order[: -shown - 1 : -1]),
    ):
        cells = [_sample(findings, scores, int(row)) for row in rows]
        tables.append(table(title, head, cells, kind="texts"))
    return "".join(tables)


def _sample(findings: Findings, scores: Scores, row: int) -> list[str]:
    """The row of a sample in the tables of the hardest and easiest."""
    name = scores.ids[row]
    record = findings.records[name]
    return [
        f"<code>{escape(name)}</code>",
        f'<p class="question">{escape(str(record["question"]))}</p><p>{escape(str(record["answer"]))}</p>',
        f"{number(scores['mrd'][row])} ± {scores['mrd_stderr'][row]:.2g}",
        str(scores["num_tokens"][row]),
        f"{scores.probability[row]:.4f}",
    ]


def _estimators(findings: Findings) -> str:
    same_statistic = agreement(findings.monte_carlo, findings.gradient)
    other_statistic = agreement(findings.gradient, findings.curvature)
    pairs = [same_statistic, agreement(findings.monte_carlo, findings.curvature), other_statistic]
    rows = [[escape(p.first), escape(p.second), *estimate_cells(p.rank), number(p.ratio)] for p in pairs]
    correlations = table("Rank correlation (Spearman)", ["first", "second", "value", "95 % CI", "median ratio"], rows)
    sentence = (
        f"monte-carlo and gradient estimate the same statistic; the second has no sampling error. Their ratio is "
        f"{same_statistic.ratio:.3f} in the median and their ranks correlate by {with_ci(same_statistic.rank)}. "
        f"curvature estimates the other statistic, abs_mean, which ranks the samples {_likeness(other_statistic.rank)} "
        f"gradient does: {with_ci(other_statistic.rank)}."
    )
    alt = f"Scatter of MRD by monte-carlo against gradient; Spearman {with_ci(same_statistic.rank)}."
    scatter = figures.svg(estimators(findings.monte_carlo, findings.gradient), "estimators", alt)
    caption = "Algorithm 1 of the paper against its limit for small sigma, which one backward pass gives."
    return paragraph(sentence) + figure(scatter, caption) + correlations


def _likeness(rank: Estimate) -> str:
    """How alike two orders are, in words that go before "... does"."""
    if not math.isfinite(rank.low) or rank.sign <= 0:
        return "not detectably as"
    return "much as" if rank.low > 0.8 else "only partly as"


def _scaling(findings: Findings) -> str:
    lines = findings.scaling
    sentences = [line.sentence() for line in lines]
    rounding = inflation(lines)
    rows = [
        [
            escape(line.statistic),
            escape(line.estimator),
            escape(line.dtype),
            *estimate_cells(line.slope(), 3),
            f"{line.expected:g}",
        ]
        for line in lines
    ]
    head = ["statistic", "estimator", "dtype", "slope", "95 % CI", "should be"]
    alt = "Median MRD against sigma, both logarithmic. " + " ".join(sentences)
    count = lines[0].scores.shape[1]
    caption = f"{count} samples, {findings.scaling_draws} draws (antithetic: pairs) at each sigma, same directions."
    return (
        bullets(sentences)
        + (paragraph(rounding) if rounding else "")
        + figure(figures.svg(scaling(lines), "scaling", alt), caption)
        + table("Slope of log MRD against log sigma", head, rows)
    )


def _attributes(findings: Findings) -> str:
    effects = findings.effects
    probability = _correlation_of(findings.correlations, PROBABILITY)
    scores = findings.attribute_scores
    intro = (
        f"{scores.table.num_rows} samples of {_data(scores)} by gradient. The task crosses three attributes, so that "
        "they can be told apart: complexity of the answer, repetitions of the record in training (1 or 4 an epoch), "
        "rare words. The claims are those of the paper's section 3.3 and Table 11 (which itself prints the opposite "
        "for probability: MRD 0.348 at low, 0.769 at high); what is found holds for this model and task. Intervals are "
        "not adjusted for their number. Whether low MRD is hard to forget is looked at under Unlearning."
    )
    sentences = [effect.sentence() for effect in effects] + [probability.sentence()]
    head = ["attribute", "mean MRD, low", "mean MRD, high", "Hedges' g", "95 % CI", "beyond length", "95 % CI"]
    head += ["level with length"]
    rows = [
        [
            escape(e.attribute.title),
            with_interval(e.low_mean),
            with_interval(e.high_mean),
            *estimate_cells(e.size),
            *estimate_cells(e.beyond_length),
            decimal(e.with_length.value),
        ]
        for e in effects
    ]
    content = paragraph(intro) + bullets(sentences)
    if effects:
        content += figure(
            figures.svg(by_attribute(effects), "attributes", _effects_alt(effects)),
            "MRD at the low and the high level of each attribute; large marks are means with 95 % intervals.",
        )
    correlations = figures.svg(
        forest_plot(effects, [probability]),
        "forest",
        "Rank correlations with MRD. " + " ".join(sentences),
        (5.0, 3.6),
    )
    content += figure(
        correlations, "Rank correlation of MRD with each attribute, as it is and with length partialled out."
    )
    return content + table("By attribute", head, rows)


def _effects_alt(effects: Sequence[Effect]) -> str:
    return "Mean MRD: " + "; ".join(
        f"{e.attribute.title} low {number(e.low_mean.value)}, high {number(e.high_mean.value)}" for e in effects
    )


def _length(findings: Findings) -> str:
    length = _correlation_of(findings.correlations, LENGTH)
    rank_agreement = spearman(findings.attribute_scores["mrd"], findings.attribute_scores["mrd_per_token"])
    sentence = (
        "MRD sums over tokens and is not divided by their number, although the paper's text speaks of normalisation. "
        f"Its rank correlation with length is {with_ci(length.mrd)}; MRD per token has {with_ci(length.per_token)}. "
        f"The two orders of the samples correlate by {with_ci(rank_agreement)}. Partialling out removes only what is "
        "linear in the ranks of the length; where an attribute goes with length, it cannot say which of them acts."
    )
    determined = [e for e in findings.effects if math.isfinite(e.with_length.value)]
    if determined:
        most = max(determined, key=lambda e: abs(e.with_length.value))
        sentence += f" Here {most.attribute.title} goes with it most: {with_ci(most.with_length)}."
    head = ["MRD against", "Spearman", "95 % CI", "beyond length", "95 % CI", "MRD per token", "95 % CI"]
    rows = [
        [escape(c.title), *estimate_cells(c.mrd), *estimate_cells(c.beyond_length), *estimate_cells(c.per_token)]
        for c in findings.correlations
    ]
    note = (
        "Probability is the geometric mean over the scored tokens, before any unlearning. The counted characteristics "
        "are measured on question and answer against the training text, each record as often as an epoch repeats it."
    )
    return paragraph(sentence) + table("Rank correlations", head, rows) + paragraph(note)


def _forecast(findings: Findings) -> str:
    found = findings.forecasts
    spec = found.spec
    intro = (
        f"Flip time forecasts how many updates it takes until a sample is forgotten: how far the margins of its tokens "
        f"have to go, over how fast the first updates move them. Here it looks ahead {spec['lookahead']} gradients, "
        f"and is held against the real number: each sample of {spec['data']}/{spec['split']}, evenly spaced, is "
        f"forgotten alone by {spec['algorithm']} with {_OPTIMIZERS[spec['optimizer']]}, learning rate "
        f"{spec['learning_rate']:g}, until its memorization accuracy is below {found.rule:g}."
    )
    flip_time, mrd = found.correlations()
    alt = f"Forecast against real updates; Spearman {with_ci(flip_time)}, of MRD {with_ci(mrd)}."
    drawn = figures.svg(forecasts(found), "forecast", alt)
    caption = "Every sample: flip time against the updates that it really took; on the dashed line they are equal."
    return paragraph(intro) + paragraph(found.sentence()) + figure(drawn, caption)


_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}


def _unlearning(unlearning: Unlearning) -> str:
    runs = unlearning.runs
    evaluated = runs[0].spec["evaluate_samples"]
    content = paragraph(recipe_text(runs))
    if skipped := unlearning.skipped_sentence():
        content += paragraph(skipped)
    content += figure(
        figures.svg(recall_by_epoch(runs, "forget"), "forgetting", _recalls(runs, "forget"), RUN_INCHES),
        f"What is left of the forget set after each epoch: ROUGE-L recall of greedy answers, at most {evaluated} "
        "samples. A ring: all samples were forgotten and the run ended.",
    )
    if has_retain_set(runs):
        content += figure(
            figures.svg(recall_by_epoch(runs, "retain"), "keeping", _recalls(runs, "retain"), RUN_INCHES),
            f"What is left of the retain set, at most {evaluated} samples evenly spaced over it.",
        )
        content += figure(
            figures.svg(
                trade_off(runs),
                "trade-off",
                f"Paths from the upper left. {_recalls(runs, 'forget')} {_recalls(runs, 'retain')}",
                RUN_INCHES,
            ),
            "The path of each run, a mark an epoch: the further right, the more is forgotten; the higher, the more is "
            "kept.",
        )
    first = runs[0]
    before = ["before", *map(decimal, _evaluation(first, 0)), percent(first.forgotten[0]), "0", "–", "0", "–", "–"]
    head = ["run", "forget ROUGE-L recall", "forget probability", "retain ROUGE-L recall", "retain probability"]
    head += ["forgotten", "updates", "median updates until forgotten", "mean |Δθ|", "s on training", "s on MRD"]
    content += table("The end of each run", head, [before, *map(_run, runs)])
    content += paragraph(
        "The median is over all forget samples, a dash where half of them or more were never forgotten. It counts the "
        "updates that drew the sample itself: with replacement some are drawn more often than others, and a sample can "
        "be forgotten through the updates of others. Seconds are those of runs side by side."
    )
    content += bullets([best_runs_text(runs), *update_sentences(runs)])
    if unlearning.predictions:
        content += paragraph(
            "The paper says (Remark 3.4) that the updates a sample takes are inversely proportional to its MRD, which "
            "makes their rank correlation negative. Here MRD is that of gradient before unlearning, the updates are "
            "those that drew the sample until it was forgotten, at alpha 0, where the draws do not depend on MRD. "
            "Samples never forgotten count as one more than the largest number, tied last. The intervals are over "
            "samples of this one run."
        )
        content += bullets(prediction.sentence() for prediction in unlearning.predictions)
    notes = dict.fromkeys(note for run in runs for note in run.record["notes"])
    return content + "".join(paragraph(f"Note: {note}") for note in notes)


def _evaluation(run: DemoRun, row: int) -> list[float]:
    """Recall and probability of forget and retain answers after an epoch."""
    columns = (run.forget_recall, run.forget_probability, run.retain_recall, run.retain_probability)
    return [float(column[row]) for column in columns]


def _run(run: DemoRun) -> list[str]:
    """The row of a run in the table of how runs ended."""
    seconds = run.record["seconds"]
    return [
        escape(run.name),
        *map(decimal, _evaluation(run, -1)),
        percent(run.forgotten[-1]),
        f"{run.updates[-1]:.0f}",
        number(float(np.median(run.until_forgotten))),
        f"{run.mean_abs_delta[-1]:.2e}",
        f"{seconds['training']:.1f}",
        f"{seconds['mrd']:.1f}" if "mrd" in seconds else "–",
    ]


def _recalls(runs: Sequence[DemoRun], which_set: Literal["forget", "retain"]) -> str:
    """How each line of a figure ends, for readers who cannot see it."""
    ends = (
        f"{run.name} {decimal((run.forget_recall if which_set == 'forget' else run.retain_recall)[-1])}" for run in runs
    )
    return f"ROUGE-L recall of the {which_set} set at the end: {'; '.join(ends)}."


# --- Pieces -------------------------------------------------------------------------------------------------


def _data(scores: Scores) -> str:
    """Data and split of scores: "authors/forget10"."""
    split = scores.spec["split"]
    return f"{scores.spec['data']}/{split}" if split else str(scores.spec["data"])


def _correlation_of(correlations: Iterable[Correlation], title: str) -> Correlation:
    return next(correlation for correlation in correlations if correlation.title == title)
