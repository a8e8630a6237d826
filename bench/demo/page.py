"""The demo's page: one HTML file that needs nothing else, with every number and sentence taken from the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal

import numpy as np

from bench.demo.figures import difficulty, estimators, recall_by_epoch, scaling, trade_off
from bench.demo.findings import Findings, agreement
from bench.demo.runs import DemoRun, Unlearning, has_retain_set, kept, percent, recipe, saved
from bench.files.score_file import Scores
from bench.jobs.draws import inflation
from bench.report import figures
from bench.report.attributes import LENGTH, PROBABILITY, Correlation, Effect, by_attribute, forest_plot
from bench.report.style import STYLE_SHEET
from bench.report.words import decimal, interval, with_ci
from bench.stats.estimates import Estimate, spearman

SHOWN = 5
RUN_INCHES = (5.0, 3.9)  # two rows of a legend above the axes


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
        f"<title>mrd-bench: how hard is each sample to forget?</title><style>{STYLE_SHEET}</style></head>"
        "<body><header><h1>How hard is each sample to forget?</h1>"
        f"{_paragraph(_lead(findings))}</header>"
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
    every = [findings.monte_carlo, findings.gradient, findings.curvature, findings.whole]
    runs = [
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
        for scores in every
    ]
    head = ["estimator", "statistic", "data", "samples", "draws", "sigma", "seed", "dtype", "seconds", "spec"]
    versions = ", ".join(f"{name} {version}" for name, version in findings.monte_carlo.facts["packages"].items())
    about = {**findings.model, "scored tokens": findings.monte_carlo.spec["tokens"], "versions": versions}
    survival = findings.monte_carlo.facts["perturbation_survival"]
    if survival is not None:
        about["perturbation survival"] = f"{survival:.4f} (1: the noise survived storage)"
    terms = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in about.items())
    notes = dict.fromkeys(note for scores in every for note in scores.facts["notes"])
    rejected = sum(len(scores.facts["rejected"]) for scores in every)
    saturated = sum(int(scores["tokens_saturated"].sum()) for scores in every)
    remarks = [f"Note: {note}" for note in notes]
    if rejected:
        remarks.append(f"{rejected} samples could not be scored; the score files name them.")
    if saturated:
        remarks.append(f"{saturated} scored tokens have probability exactly 1 and are left out of the sums.")
    return (
        f"<dl>{terms}</dl>{_table('Runs', head, runs)}"
        + _paragraph(
            "mean_abs is the mean of |Δ| over the draws (Algorithm 1 of the paper), abs_mean the absolute value of the "
            "mean (Definition 3.1). They are different quantities: the first is proportional to sigma, the second to "
            "its square. All intervals on this page are 95 % and, unless stated otherwise, over samples (bootstrap)."
        )
        + "".join(map(_paragraph, remarks))
    )


def _distribution(findings: Findings) -> str:
    scores = findings.monte_carlo
    mrd, error = scores["mrd"], scores["mrd_stderr"]
    quartiles = np.quantile(mrd, [0.25, 0.5, 0.75])
    draws = int(scores["draws"].max())
    sentence = (
        f"Median {_number(quartiles[1])}, half of the samples between {_number(quartiles[0])} and "
        f"{_number(quartiles[2])}; range {_number(mrd.min())} to {_number(mrd.max())}. With {draws} draws the median "
        f"relative standard error is {np.median(error / mrd):.1%}."
    )
    alt = f"MRD of {len(mrd)} samples in ascending order, from {_number(mrd.min())} to {_number(mrd.max())}."
    caption = "Every sample in order of MRD, with the 95 % interval of the Monte Carlo error."
    return _paragraph(sentence) + _figure(figures.svg(difficulty(scores), "distribution", alt), caption)


def _samples(findings: Findings) -> str:
    scores = findings.monte_carlo
    order = np.argsort(scores["mrd"], kind="stable")
    shown = min(SHOWN, max(1, len(order) // 2))
    head = ["sample", "question and answer", "MRD ± std. error", "tokens", "probability"]
    tables = []
    for title, rows in (
        ("Hardest to forget (lowest MRD)", order[:shown]),
        ("Easiest to forget (highest MRD)", order[: -shown - 1 : -1]),
    ):
        lines = [_sample(findings, scores, int(row)) for row in rows]
        tables.append(_table(title, head, lines, kind="texts"))
    return "".join(tables)


def _sample(findings: Findings, scores: Scores, row: int) -> list[str]:
    name = scores.ids[row]
    record = findings.records[name]
    return [
        f"<code>{escape(name)}</code>",
        f'<p class="question">{escape(str(record["question"]))}</p><p>{escape(str(record["answer"]))}</p>',
        f"{_number(scores['mrd'][row])} ± {scores['mrd_stderr'][row]:.2g}",
        str(scores["num_tokens"][row]),
        f"{scores.probability[row]:.4f}",
    ]


def _estimators(findings: Findings) -> str:
    exact = agreement(findings.monte_carlo, findings.gradient)
    pairs = [
        exact,
        agreement(findings.monte_carlo, findings.curvature),
        agreement(findings.gradient, findings.curvature),
    ]
    rows = [[escape(p.first), escape(p.second), *_cells(p.rank), _number(p.ratio)] for p in pairs]
    table = _table("Rank correlation (Spearman)", ["first", "second", "value", "95 % CI", "median ratio"], rows)
    sentence = (
        f"monte-carlo and gradient estimate the same statistic; the second has no sampling error. Their ratio is "
        f"{exact.ratio:.3f} in the median and their ranks correlate by {with_ci(exact.rank)}. curvature estimates the "
        f"other statistic, abs_mean, which ranks the samples {_likeness(pairs[2].rank)} gradient does: "
        f"{with_ci(pairs[2].rank)}."
    )
    alt = f"Scatter of MRD by monte-carlo against gradient; Spearman {with_ci(exact.rank)}."
    drawn = figures.svg(estimators(findings.monte_carlo, findings.gradient), "estimators", alt)
    caption = "Algorithm 1 of the paper against its limit for small sigma, which one backward pass gives."
    return _paragraph(sentence) + _figure(drawn, caption) + table


def _likeness(rank: Estimate) -> str:
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
            *_cells(line.slope(), 3),
            f"{line.expected:g}",
        ]
        for line in lines
    ]
    head = ["statistic", "estimator", "dtype", "slope", "95 % CI", "should be"]
    alt = "Median MRD against sigma, both logarithmic. " + " ".join(sentences)
    count = lines[0].scores.shape[1]
    caption = f"{count} samples, {findings.scaling_draws} draws (antithetic: pairs) at each sigma, same directions."
    return (
        _list(sentences)
        + (_paragraph(rounding) if rounding else "")
        + _figure(figures.svg(scaling(lines), "scaling", alt), caption)
        + _table("Slope of log MRD against log sigma", head, rows)
    )


def _attributes(findings: Findings) -> str:
    effects = findings.effects
    probability = _of(findings.correlations, PROBABILITY)
    count = findings.whole.table.num_rows
    intro = (
        f"{count} samples of {_data(findings.whole)} by gradient. The task crosses three attributes, so that they can "
        "be told apart: complexity of the answer, repetitions of the record in training (1 or 4 an epoch), rare words. "
        "The claims are those of the paper's section 3.3 and Table 11 (which itself prints "
        "the opposite for probability: MRD 0.348 at low, 0.769 at high); what is found holds for this model and task. "
        "Intervals are not adjusted for their number. Whether low MRD is hard to forget is looked at under Unlearning."
    )
    sentences = [effect.sentence() for effect in effects] + [probability.sentence()]
    head = ["attribute", "mean MRD, low", "mean MRD, high", "Hedges' g", "95 % CI", "beyond length", "95 % CI"]
    head += ["level with length"]
    rows = [
        [
            escape(e.attribute.title),
            _with_interval(e.low_mean),
            _with_interval(e.high_mean),
            *_cells(e.size),
            *_cells(e.beyond_length),
            decimal(e.with_length.value),
        ]
        for e in effects
    ]
    content = _paragraph(intro) + _list(sentences)
    if effects:
        content += _figure(
            figures.svg(by_attribute(effects), "attributes", _effects_alt(effects)),
            "MRD at the low and the high level of each attribute; large marks are means with 95 % intervals.",
        )
    correlations = figures.svg(
        forest_plot(effects, [probability]),
        "forest",
        "Rank correlations with MRD. " + " ".join(sentences),
        (5.0, 3.6),
    )
    content += _figure(
        correlations, "Rank correlation of MRD with each attribute, as it is and with length partialled out."
    )
    return content + _table("By attribute", head, rows)


def _effects_alt(effects: Sequence[Effect]) -> str:
    return "Mean MRD: " + "; ".join(
        f"{e.attribute.title} low {_number(e.low_mean.value)}, high {_number(e.high_mean.value)}" for e in effects
    )


def _length(findings: Findings) -> str:
    length = _of(findings.correlations, LENGTH)
    normalised = spearman(findings.whole["mrd"], findings.whole["mrd_per_token"])
    sentence = (
        "MRD sums over tokens and is not divided by their number, although the paper's text speaks of normalisation. "
        f"Its rank correlation with length is {with_ci(length.mrd)}; MRD per token has {with_ci(length.per_token)}. "
        "The two "
        f"orders of the samples correlate by {with_ci(normalised)}. Partialling out removes only what is linear in the "
        "ranks of the length; where an attribute goes with length, it cannot say which of them acts."
    )
    known = [e for e in findings.effects if math.isfinite(e.with_length.value)]
    if known:
        most = max(known, key=lambda e: abs(e.with_length.value))
        sentence += f" Here {most.attribute.title} goes with it most: {with_ci(most.with_length)}."
    head = ["MRD against", "Spearman", "95 % CI", "beyond length", "95 % CI", "MRD per token", "95 % CI"]
    rows = [
        [escape(c.title), *_cells(c.mrd), *_cells(c.beyond_length), *_cells(c.per_token)] for c in findings.correlations
    ]
    note = (
        "Probability is the geometric mean over the scored tokens, before any unlearning. The counted characteristics "
        "are measured on question and answer against the training text, each record as often as an epoch repeats it."
    )
    return _paragraph(sentence) + _table("Rank correlations", head, rows) + _paragraph(note)


def _unlearning(unlearning: Unlearning) -> str:
    runs = unlearning.runs
    evaluated = runs[0].spec["evaluate_samples"]
    content = _paragraph(recipe(runs))
    if skipped := unlearning.skipped_sentence():
        content += _paragraph(skipped)
    content += _figure(
        figures.svg(recall_by_epoch(runs, "forget"), "forgetting", _recalls(runs, "forget"), RUN_INCHES),
        f"What is left of the forget set after each epoch: ROUGE-L recall of greedy answers, at most {evaluated} "
        "samples. A ring: all samples were forgotten and the run ended.",
    )
    if has_retain_set(runs):
        content += _figure(
            figures.svg(recall_by_epoch(runs, "retain"), "keeping", _recalls(runs, "retain"), RUN_INCHES),
            f"What is left of the retain set, at most {evaluated} samples evenly spaced over it.",
        )
        content += _figure(
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
    before = ["before", *map(decimal, _answers(first, 0)), percent(first.forgotten[0]), "0", "–", "0", "–", "–"]
    head = ["run", "forget ROUGE-L recall", "forget probability", "retain ROUGE-L recall", "retain probability"]
    head += ["forgotten", "updates", "median updates until forgotten", "mean |Δθ|", "s on training", "s on MRD"]
    content += _table("The end of each run", head, [before, *map(_run, runs)])
    content += _paragraph(
        "The median is over all forget samples, a dash where half of them or more were never forgotten. It counts the "
        "updates that drew the sample itself: with replacement some are drawn more often than others, and a sample can "
        "be forgotten through the updates of others. Seconds are those of runs side by side."
    )
    content += _list([kept(runs), *saved(runs)])
    if unlearning.predictions:
        content += _paragraph(
            "The paper says (Remark 3.4) that the updates a sample takes are inversely proportional to its MRD, which "
            "makes their rank correlation negative. Here MRD is that of gradient before unlearning, the updates are "
            "those that drew the sample until it was forgotten, at alpha 0, where the draws do not depend on MRD. "
            "Samples never forgotten count as one more than the largest number, tied last. The intervals are over "
            "samples of this one run."
        )
        content += _list(prediction.sentence() for prediction in unlearning.predictions)
    notes = dict.fromkeys(note for run in runs for note in run.record["notes"])
    return content + "".join(_paragraph(f"Note: {note}") for note in notes)


def _answers(run: DemoRun, row: int) -> list[float]:
    columns = (run.forget_recall, run.forget_probability, run.retain_recall, run.retain_probability)
    return [float(column[row]) for column in columns]


def _run(run: DemoRun) -> list[str]:
    seconds = run.record["seconds"]
    return [
        escape(run.name),
        *map(decimal, _answers(run, -1)),
        percent(run.forgotten[-1]),
        f"{run.updates[-1]:.0f}",
        _number(float(np.median(run.until_forgotten))),
        f"{run.mean_abs_delta[-1]:.2e}",
        f"{seconds['training']:.1f}",
        f"{seconds['mrd']:.1f}" if "mrd" in seconds else "–",
    ]


def _recalls(runs: Sequence[DemoRun], which: Literal["forget", "retain"]) -> str:
    """The end of each line, for those who do not see it."""
    ends = (
        f"{run.name} {decimal((run.forget_recall if which == 'forget' else run.retain_recall)[-1])}" for run in runs
    )
    return f"ROUGE-L recall of the {which} set at the end: {'; '.join(ends)}."


# --- Pieces -------------------------------------------------------------------------------------------------


def _data(scores: Scores) -> str:
    split = scores.spec["split"]
    return f"{scores.spec['data']}/{split}" if split else str(scores.spec["data"])


def _of(found: Iterable[Correlation], title: str) -> Correlation:
    return next(correlation for correlation in found if correlation.title == title)


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _cells(estimate: Estimate, digits: int = 2) -> list[str]:
    """Value and interval as two cells."""
    return [decimal(estimate.value, digits), interval(estimate, digits)]


def _with_interval(estimate: Estimate) -> str:
    if not math.isfinite(estimate.low):
        return _number(estimate.value)
    return f"{_number(estimate.value)} ({_number(estimate.low)} to {_number(estimate.high)})"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _list(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def _figure(drawn: str, caption: str) -> str:
    return f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table that scrolls sideways by itself; cells are HTML already, caption and head are text."""
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    label = escape(caption)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table class="{kind}">'
        f"<caption>{label}</caption><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
