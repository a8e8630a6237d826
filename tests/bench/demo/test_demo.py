"""The demo's page says what the data say, is one safe and self-contained document, and the whole demo runs."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from scipy import stats

from bench.demo.figures import RING, difficulty, forecasts, recall_by_epoch, scaling, trade_off
from bench.demo.findings import Findings, Forecasts
from bench.demo.page import page as whole_page
from bench.demo.run import Sizes, run_demo, unlearn_side_by_side, unlearning_specs
from bench.demo.runs import DemoRun, Unlearning, best_runs_text, predictions, recipe_text, table_lines, update_sentences
from bench.files.score_file import Scores
from bench.jobs.draws import ScalingLine, inflation
from bench.jobs.resources import Resources
from bench.report import figures
from bench.report.attributes import ATTRIBUTES, PROBABILITY, attribute_effects, by_attribute, correlations
from bench.report.words import decimal, with_ci
from bench.stats.estimates import Estimate
from bench.stats.verdicts import CONTRADICTED, HOLDS, UNKNOWN
from scoring.errors import UserError

SVG = "{http://www.w3.org/2000/svg}"


def scores(mrd: np.ndarray, tokens: np.ndarray, estimator: str = "gradient", nll: np.ndarray | None = None) -> Scores:
    """A score file's content, of samples s0, s1, ..."""
    count = len(mrd)
    table = pa.table(
        {
            "sample_id": [f"s{i}" for i in range(count)],
            "num_tokens": tokens,
            "tokens_saturated": np.zeros(count, dtype=np.int64),
            "nll": np.full(count, 0.1) if nll is None else nll,
            "mrd": mrd,
            "mrd_stderr": 0.05 * mrd,
            "mrd_per_token": mrd / tokens,
            "draws": np.full(count, 20),
        }
    )
    spec = {
        "estimator": estimator,
        "statistic": "mean_abs",
        "data": "authors",
        "split": "forget10",
        "draws": 20,
        "sigma": 1e-5,
        "seed": 0,
        "dtype": "float32",
        "tokens": "answer",
        "spec_hash": "0123456789abcdef",
    }
    facts = {"seconds": 1.0, "packages": {"numpy": "2"}, "perturbation_survival": 1.0, "notes": [], "rejected": []}
    return Scores(table, spec, facts)


def records(count: int) -> list[dict]:
    """A 2 x 2 x 2 design over consecutive samples."""
    return [
        {
            "id": f"s{i}",
            "question": f"Where does number {i} live?",
            "answer": f"In house {i}, which is old.",
            "complexity": ("low", "high")[i % 2],
            "frequency": (1, 4)[i // 2 % 2],
            "rare_words": ("low", "high")[i // 4 % 2],
        }
        for i in range(count)
    ]


def line(slope: float, statistic: str = "mean_abs", dtype: str = "float32") -> ScalingLine:
    sigmas = np.array([1e-6, 1e-5, 1e-4])
    base = np.random.default_rng(0).uniform(100, 500, 10)
    return ScalingLine("monte-carlo", statistic, dtype, sigmas, sigmas[:, None] ** slope * base)


def made_forecasts(updates: tuple[float, ...] = (*range(2, 24, 2), math.inf)) -> Forecasts:
    """The forecast is half of the real number; MRD rises with it, which is the opposite of the claim."""
    real = np.array(updates, dtype=float)
    spec = {"algorithm": "GA", "optimizer": "adamw", "learning_rate": 5e-5, "lookahead": 2}
    spec |= {"data": "authors", "split": "forget10"}
    return Forecasts(0.75, spec, np.minimum(real, 300) / 2, np.arange(1.0, 1 + len(real)), real, 200)


def findings(mrd: np.ndarray, rows: list[dict] | None = None, nll: np.ndarray | None = None) -> Findings:
    rows = rows or records(len(mrd))
    tokens = np.random.default_rng(1).integers(20, 40, len(mrd))
    exact = scores(mrd, tokens, nll=nll)
    return Findings(
        monte_carlo=scores(mrd * 1.01, tokens, "monte-carlo"),
        gradient=exact,
        curvature=scores(mrd**2, tokens, "curvature"),
        attribute_scores=exact,
        records={row["id"]: row for row in rows},
        scaling=[line(1.0), line(2.0, "abs_mean"), line(0.1, dtype="bfloat16")],
        scaling_draws=4,
        effects=attribute_effects(exact, rows),
        correlations=correlations(exact, rows, [row["answer"] for row in rows]),
        forecasts=made_forecasts() if len(mrd) > 8 else made_forecasts((2.0, 4.0, 6.0)),
        model={"model": "a small one"},
    )


def by_level(field: str, level: object, count: int = 80) -> np.ndarray:
    """MRD that is 1 higher where the record has that level, and noise."""
    raised = np.array([row[field] == level for row in records(count)])
    return 2 + raised + np.random.default_rng(2).normal(0, 0.2, count)


def run(
    algorithm: str = "GA",
    alpha: float = 0.0,
    forget: tuple[float, ...] = (1.0, 0.8, 0.6),
    retain: tuple[float, ...] | None = (1.0, 0.9, 0.8),
    until: tuple[float, ...] = (3.0,) * 8,
    epochs: int = 2,
    forgotten: float = 1.0,
) -> DemoRun:
    """A run with as many epochs as `forget` has values after the first, of `epochs` that were planned; samples s0,
    s1, ... in batches of 4."""
    rows = np.arange(len(forget), dtype=float)
    per_epoch = math.ceil(len(until) / 4)
    spec = {
        "algorithm": algorithm,
        "alpha": alpha,
        "epochs": epochs,
        "max_steps": None,
        "batch_size": 4,
        "learning_rate": 5e-5,
        "seed": 0,
        "replacement": True,
        "estimator": "gradient",
        "refresh": 2,
        "refresh_unit": "epochs",
        "check_every": 1,
        "check_unit": "epochs",
        "el_n": 10,
        "evaluate_samples": 40,
    }
    record = {"spec": spec, "thresholds": {"ma": 0.97, "el": 0.5}, "seconds": {"training": 2.0}, "notes": []}
    return DemoRun(
        spec=spec,
        record=record | ({"seconds": {"training": 2.0, "mrd": 0.5}} if alpha else {}),
        epochs=rows,
        updates=rows * per_epoch,
        forgotten=np.linspace(0, forgotten, len(rows)),
        forget_recall=np.array(forget),
        forget_probability=np.array(forget) / 2,
        retain_recall=np.full(len(rows), math.nan) if retain is None else np.array(retain),
        retain_probability=np.full(len(rows), math.nan) if retain is None else np.array(retain) / 2,
        mean_abs_delta=1e-4 * rows,
        ids=[f"s{i}" for i in range(len(until))],
        tokens=np.random.default_rng(1).integers(20, 40, len(until)),
        until_forgotten=np.array(until),
    )


def unlearning(
    runs: list[DemoRun] | None = None, scored: Scores | None = None, skipped: tuple[str, ...] = ()
) -> Unlearning:
    if runs is None:
        runs = [run(name, alpha) for name in ("GA", "GradDiff", "PO", "NPO") for alpha in (0.0, 1.0)]
    return Unlearning(runs, predictions(runs, scored) if scored else [], skipped)


def page(data: Findings) -> str:
    return whole_page(data, unlearning())


class _Parsed(HTMLParser):
    """All tags with their attributes, and all text outside of style and figures."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "style" not in self.open and "svg" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def document() -> str:
    rows = records(80)
    rows[0]["answer"] = "<script>alert('x')</script> & <b>bold</b>"
    rows[0]["question"] = 'Is "this" <i>text</i>?'
    mrd = by_level("complexity", "high")
    mrd[0] = 0.1  # the hardest: shown with its text
    return page(findings(mrd, rows))


# --- One safe document ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_texts_are_shown_and_not_run(document):
    parsed = _Parsed(document)
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "b", "i")]
    assert "<script>alert('x')</script> & <b>bold</b>" in parsed.text
    assert 'Is "this" <i>text</i>?' in parsed.text


def test_the_page_asks_nothing_of_a_network(document):
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?!#)[a-z/]""", document) == []
    assert "@import" not in document
    addresses = set(re.findall(r'https?://[^"\s<]+', document))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_elements_are_nested_and_ids_unique(document):
    parsed = _Parsed(document)
    assert parsed.open == []
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in parsed.tags:
        for name in ("href", "xlink:href"):
            if name in attributes:
                assert (attributes[name] or "").removeprefix("#") in ids


def test_figures_are_xml_with_a_description_and_take_the_themes_colours(document):
    drawings = re.findall(r"<svg.*?</svg>", document, flags=re.DOTALL)
    assert len(drawings) == 9
    for figure in drawings:
        root = ET.fromstring(figure)
        assert root.tag == f"{SVG}svg"
        assert root.get("role") == "img"
        assert len(root.get("aria-label") or "") > 20
        assert root.get("viewBox")
        assert root.get("width") is None
        for colour in figures.CSS_NAMES:
            assert colour not in figure
        used = set(re.findall(r"var\((--[a-z]+)\)", figure))
        assert used <= set(figures.CSS_NAMES.values())
        # Anything with a colour of its own would vanish on one of the two grounds.
        assert set(re.findall(r"#[0-9a-f]{6}\b", figure)) == set()


def test_both_themes_define_every_colour(document):
    for name in figures.CSS_NAMES.values():
        light, dark = re.findall(rf"{name}: light-dark\((#\w{{6}}), (#\w{{6}})\)", document)[0]
        assert light != dark


@pytest.mark.slow
def test_the_same_findings_give_the_same_page(document):
    data = findings(by_level("complexity", "high"))
    assert page(data) == page(data)


# --- Sentences come from the data -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "claimed", "opposite"),
    [("complexity", "high", "low"), ("frequency", 1, 4), ("rare_words", "high", "low")],
)
def test_flipped_data_flip_the_claim(field, claimed, opposite):
    place = [attribute.field for attribute in ATTRIBUTES].index(field)

    def sentence(mrd: np.ndarray) -> str:
        return findings(mrd).effects[place].sentence()

    assert sentence(by_level(field, claimed)).endswith(f": {HOLDS}.")
    assert sentence(by_level(field, opposite)).endswith(f": {CONTRADICTED}.")
    noise = 2 + np.random.default_rng(3).normal(0, 0.2, 80)
    assert sentence(noise).endswith(f": {UNKNOWN}.")


def test_a_claim_that_is_only_length_is_not_kept_beyond_length():
    rows = records(200)
    rng = np.random.default_rng(4)
    tokens = np.array([30 if row["complexity"] == "high" else 20 for row in rows]) + rng.integers(0, 12, 200)
    mrd = tokens * rng.normal(1, 0.02, 200)
    effect = attribute_effects(scores(mrd, tokens), rows)[0]
    assert effect.size.sign == 1
    assert effect.beyond_length.value < 0.3
    assert effect.with_length.value > 0.7


@pytest.mark.slow
def test_numbers_of_a_sentence_are_those_of_the_data():
    mrd = by_level("complexity", "high")
    high, low = mrd[1::2], mrd[0::2]
    effect = findings(mrd).effects[0]
    pooled = np.sqrt((low.var(ddof=1) + high.var(ddof=1)) / 2)
    hedges = (1 - 3 / (4 * 80 - 9)) * (high.mean() - low.mean()) / pooled
    assert f"{high.mean() / low.mean() - 1:.1%} higher" in effect.sentence()
    assert f"Hedges' g {hedges:.2f} [95 % CI {effect.size.low:.2f} to {effect.size.high:.2f}]" in effect.sentence()
    text = _Parsed(page(findings(mrd))).text
    assert effect.sentence() in text
    assert f"{np.median(mrd * 1.01):.3g}" in text


@pytest.mark.slow
def test_probability_is_judged_by_its_correlation():
    nll = np.linspace(0.1, 5, 80)
    rising = findings(1 + nll, nll=nll).correlations[2]  # unlikely text, high MRD: as claimed
    assert rising.title == PROBABILITY
    assert rising.sentence().endswith(f": {HOLDS}.")
    assert findings(10 - nll, nll=nll).correlations[2].sentence().endswith(f": {CONTRADICTED}.")


def test_correlations_are_scipys():
    mrd = by_level("frequency", 1)
    data = findings(mrd)
    length = data.correlations[0]
    tokens = data.attribute_scores["num_tokens"]
    assert length.mrd.value == pytest.approx(stats.spearmanr(tokens, mrd).statistic)
    assert length.per_token.value == pytest.approx(stats.spearmanr(tokens, mrd / tokens).statistic)


@pytest.mark.parametrize(
    ("slope", "statistic", "sound"), [(1, "mean_abs", True), (2, "abs_mean", True), (0.1, "mean_abs", False)]
)
def test_slopes_are_judged(slope, statistic, sound):
    sentence = line(slope, statistic).sentence()
    assert f"slope {slope:.3f}" in sentence
    assert ("as it must" in sentence) == sound
    assert ("measures rounding" in sentence) != sound


def test_rounding_is_sized_against_float32():
    exact = line(1.0)
    coarse = dataclasses.replace(exact, dtype="bfloat16", scores=exact.scores * np.array([[30.0], [3.0], [2.0]]))
    assert inflation([exact, coarse]) == (
        "At sigma 1e-06 the median mean_abs in bfloat16 is 30 times that in float32. "
        "At sigma 1e-04 the median mean_abs in bfloat16 is 2 times that in float32."
    )
    assert inflation([exact]) == ""


def test_numbers_are_printed_as_people_write_them():
    assert decimal(-0.401) == "\N{MINUS SIGN}0.40"
    assert decimal(-0.001) == "0.00"
    assert decimal(float("nan")) == "–"
    assert with_ci(Estimate(0.5, float("nan"), float("nan"))) == "0.50 [too few samples for a CI]"


@pytest.mark.slow
def test_few_samples_give_a_page_that_says_so():
    text = _Parsed(page(findings(np.array([1.0, 2.0, 3.0])))).text
    assert not re.search(r"\bnan\b", text, flags=re.IGNORECASE)
    assert "the claim holds" not in text
    assert "the opposite of the claim" not in text


@pytest.mark.slow
def test_samples_without_attributes_give_a_page():
    rows = [{key: row[key] for key in ("id", "question", "answer")} for row in records(12)]
    data = findings(np.linspace(1, 2, 12), rows)
    assert data.effects == []
    assert "Difficulty by attribute" in page(data)


def test_forecasts_are_held_against_the_real_updates() -> None:
    found = made_forecasts()
    assert [each.value for each in found.correlations()] == pytest.approx([1.0, 1.0])
    sentence = found.sentence()
    assert sentence.startswith("Rank correlation with the real updates of 12 samples: flip time 1.00")
    assert "MRD 1.00" in sentence
    assert "the opposite of the claim" in sentence
    # Of 2, 4, ..., 22 and one that was given up, the middle is between 12 and 14.
    assert "0.5 times the real number in the median, and that is 13." in sentence
    assert sentence.endswith("Given up after 200 updates: 1.")
    assert "Given up" not in made_forecasts((1.0, 2.0, 3.0, 4.0, 5.0)).sentence()
    samples, diagonal = (x for x, _ in drawn(forecasts(found)))
    assert samples == list(range(2, 24, 2))
    assert diagonal == pytest.approx([0, 1.05 * 22])


# --- Unlearning -----------------------------------------------------------------------------------------------


def run_folder(folder: Path, epochs: list[dict], until: list[int | None]) -> Path:
    """What bench.jobs.unlearn leaves behind, as far as it is read here."""
    folder.mkdir()
    spec = {"algorithm": "NPO", "alpha": 1.0, "epochs": 4, "max_steps": None, "batch_size": 2, "seed": 0}
    spec |= dict.fromkeys(("model", "task", "model_fingerprint", "forget_sha256", "spec_hash"), "x")
    spec |= {"forget_split": None, "selection": None}
    facts = {"packages": {}, "updates": 8, "thresholds": {}, "seconds": {}, "passes": {}, "notes": [], "rejected": []}
    (folder / "run.json").write_text(json.dumps({"spec": spec} | facts))
    samples = {
        "sample_id": [f"s{i}" for i in range(len(until))],
        "num_tokens": [20 + i for i in range(len(until))],
        "updates": [4] * len(until),
        "updates_until_forgotten": pa.array(until, pa.int64()),
    }
    pq.write_table(pa.Table.from_pylist(epochs), folder / "epochs.parquet")
    pq.write_table(pa.table(samples), folder / "samples.parquet")
    pq.write_table(pa.table({"step": [1]}), folder / "steps.parquet")
    return folder


def epoch_row(epoch: int, forgotten: float, value: float, retain: float | None) -> dict:
    row = {"epoch": epoch, "step": 2 * epoch, "forgotten": forgotten, "mean_abs_delta": 0.001 * epoch}
    row |= {"forget_loss": 1.0, "retain_loss": 1.0}
    row |= {"forget_rouge_l_recall": value, "forget_probability": value + 0.01}
    if retain is not None:
        row |= {"retain_rouge_l_recall": retain, "retain_probability": retain + 0.01}
    return row


def test_curves_are_those_of_the_tables(tmp_path):
    rows = [epoch_row(0, 0.0, 0.9, 0.95), epoch_row(1, 0.5, 0.5, 0.85), epoch_row(2, 1.0, 0.1, 0.75)]
    found = DemoRun.read(run_folder(tmp_path / "run", rows, [3, 2, None, 0]))
    assert found.name == "NPO at alpha 1"
    assert found.epochs.tolist() == [0, 1, 2]
    assert found.updates.tolist() == [0, 2, 4]
    assert found.forgotten.tolist() == [0, 0.5, 1]
    assert found.forget_recall.tolist() == [0.9, 0.5, 0.1]
    assert found.forget_probability.tolist() == pytest.approx([0.91, 0.51, 0.11])
    assert found.retain_recall.tolist() == [0.95, 0.85, 0.75]
    assert found.retain_probability.tolist() == pytest.approx([0.96, 0.86, 0.76])
    assert found.mean_abs_delta.tolist() == [0, 0.001, 0.002]
    assert found.ids == ["s0", "s1", "s2", "s3"]
    assert found.tokens.tolist() == [20, 21, 22, 23]
    assert found.until_forgotten.tolist() == [3, 2, math.inf, 0]
    # 4 samples in batches of 2, 4 epochs.
    assert (found.updates_per_epoch, found.planned_updates, found.ended_early) == (2, 8, True)


def test_a_run_to_the_end_without_a_retain_set(tmp_path):
    rows = [epoch_row(epoch, 0.0, 0.9, None) for epoch in range(5)]
    found = DemoRun.read(run_folder(tmp_path / "run", rows, [None] * 4))
    assert np.isnan(found.retain_recall).all()
    assert np.isnan(found.retain_probability).all()
    assert not found.ended_early


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        DemoRun.read(tmp_path)


def drawn(draw: figures.Draw) -> list[tuple[list[float], float]]:
    """Where each line of a figure goes along x, and the size of its marks."""
    axes = Figure().subplots()
    draw(axes)
    return [(np.asarray(line.get_xdata()).tolist(), line.get_markersize()) for line in axes.get_lines()]


def test_a_line_ends_where_its_run_did_and_is_marked_there():
    early = run("GA", 0.0, (1.0, 0.5, 0.1), (1.0, 0.9, 0.7), epochs=3)
    late = run("GA", 1.0, (1.0, 0.8, 0.6, 0.4), (1.0, 0.9, 0.9, 0.8), epochs=3)
    ring = RING["markersize"]
    for which in ("forget", "retain"):
        lines = drawn(recall_by_epoch([early, late], which))
        assert [x for x, size in lines if size != ring] == [[0, 1, 2], [0, 1, 2, 3]]
        assert [x for x, size in lines if size == ring] == [[2]]
    lines = drawn(trade_off([early, late]))
    assert [x for x, size in lines if size == ring] == [[0.1]]
    assert [x for x, size in lines if size != ring] == [[1.0, 0.5, 0.1], [1.0, 0.8, 0.6, 0.4]]


def test_who_kept_most_and_who_forgot_most():
    careful = run("GradDiff", 0.0, (1.0, 0.6), (1.0, 0.95))
    harsh = run("GA", 1.0, (1.0, 0.1), (1.0, 0.3))
    sentence = best_runs_text([careful, harsh])
    assert "highest, 0.95, after GradDiff at alpha 0, with a forget recall of 0.60." in sentence
    assert "lowest, 0.10, after GA at alpha 1, with a retain recall of 0.30." in sentence
    assert sentence.endswith("No run has both.")
    best = run("PO", 0.0, (1.0, 0.05), (1.0, 0.952))
    sentence = best_runs_text([careful, harsh, best])
    assert (
        "highest, 0.95, after GradDiff at alpha 0 and PO at alpha 0, with a forget recall of 0.05 to 0.60" in sentence
    )
    assert "lowest, 0.05, after PO at alpha 0, with a retain recall of 0.95." in sentence
    assert "No run has both" not in sentence
    assert "not measured" in best_runs_text([run(retain=None)])


def test_fewer_updates_with_mrd_or_more():
    short, long = (1.0, 0.5), (1.0, 0.7, 0.5)
    retain = (1.0, 1.0, 1.0)

    def sentences(uniform: tuple[float, ...], easy: tuple[float, ...], epochs: int = 3) -> list[str]:
        return update_sentences(
            [
                run("NPO", 0.0, uniform, retain[: len(uniform)], epochs=epochs),
                run("NPO", 1.0, easy, retain[: len(easy)], epochs=epochs, forgotten=0.975),
            ]
        )

    fewer, summary = sentences(long, short)
    assert fewer == "NPO: 2 updates at alpha 1, 4 at alpha 0, 2 fewer (forgotten: 97.5% and 100%)."
    assert "fewer updates than alpha 0 for 1 of 1 algorithms, with more for 0" in summary
    assert "one seed" in summary
    assert "mrd-bench benchmark unlearning" in summary
    more, summary = sentences(short, long)
    assert more == "NPO: 4 updates at alpha 1, 2 at alpha 0, 2 more (forgotten: 97.5% and 100%)."
    assert "for 0 of 1 algorithms, with more for 1" in summary
    same, summary = sentences(long, long)
    assert same == "NPO: 4 updates at alpha 1 and at alpha 0 (forgotten: 97.5% and 100%)."
    assert "for 0 of 1 algorithms, with more for 0" in summary
    assert sentences(long, long, epochs=2)[0].startswith("NPO: all 4 updates at alpha 1 and at alpha 0")
    assert update_sentences([run("NPO", 1.0)]) == []


def test_mrd_is_held_against_the_updates():
    mrd = np.random.default_rng(5).permutation(np.linspace(1, 2, 40))
    tokens = np.full(40, 30)
    scored = scores(mrd, tokens)

    def found(until: np.ndarray, alpha: float = 0.0) -> list:
        return predictions([run(alpha=alpha, until=tuple(until))], scored)

    falling = np.round(20 / mrd)
    assert found(falling)[0].correlation.value == pytest.approx(stats.spearmanr(mrd, falling).statistic)
    sentence = found(falling)[0].sentence()
    assert sentence.count("the claim holds") == 2
    assert "Never forgotten" not in sentence
    assert found(np.round(20 * mrd))[0].sentence().count("the opposite of the claim") == 2
    noise = np.random.default_rng(6).integers(1, 9, 40).astype(float)
    assert found(noise)[0].sentence().count("not separable") == 2
    # Draws at alpha 1 go by MRD itself.
    assert found(falling, alpha=1.0) == []
    # A sample of another name is of no use.
    assert predictions([run(until=tuple(falling))], scores(mrd[:30], tokens[:30]))[0].samples == 30


def test_samples_never_forgotten_are_tied_last():
    mrd = np.linspace(1, 2, 12)
    until = np.array([math.inf, math.inf, math.inf, 9, 8, 8, 7, 6, 4, 3, 2, 1])
    (found,) = predictions([run(until=tuple(until))], scores(mrd, np.full(12, 30)))
    assert (found.samples, found.never) == (12, 3)
    assert found.correlation.value == pytest.approx(stats.spearmanr(mrd, [10, 10, 10, *until[3:]]).statistic)
    assert "Never forgotten: 3 of 12 samples." in found.sentence()
    (none,) = predictions([run(until=(math.inf,) * 12)], scores(mrd, np.full(12, 30)))
    assert none.sentence() == "GA at alpha 0: no sample was forgotten, so there is nothing to compare."


def test_the_recipe_is_the_runs():
    sentence = recipe_text([run("GA", 0.0), run("GA", 1.0), run("NPO", 0.0), run("NPO", 1.0)])
    assert sentence.startswith("GA and NPO, each at alpha 0 and alpha 1: AdamW, learning rate 5e-05, batches of 4, ")
    assert "up to 2 epochs of 2 updates" in sentence
    assert "again every 2 epochs" in sentence
    assert "accuracy is below 0.97 and its extraction likelihood EL_10 below 0.5" in sentence
    assert "looked at every epoch" in sentence
    assert "by heart" not in sentence
    knows_all = run()
    knows_all.record["thresholds"]["ma"] = 1.0
    assert "by heart" in recipe_text([knows_all])


@pytest.mark.slow
def test_the_section_shows_every_run_and_sentence():
    data = findings(by_level("complexity", "high"))
    names = ("GA", "GradDiff", "PO", "NPO")
    until = tuple(np.random.default_rng(7).integers(1, 9, 80).astype(float))
    runs = [run(name, alpha, until=until) for name in names for alpha in (0.0, 1.0)]
    shown = unlearning(runs, data.gradient)
    text = _Parsed(whole_page(data, shown)).text
    for each in runs:
        assert each.name in text
    for sentence in (
        recipe_text(runs),
        best_runs_text(runs),
        *update_sentences(runs),
        *(p.sentence() for p in shown.predictions),
    ):
        assert sentence in text
    assert len(shown.predictions) == 4
    assert "Remark 3.4" in text
    lines = table_lines(runs)
    assert len(lines) == 9
    assert lines[1].split() == ["GA", "at", "alpha", "0", "0.60", "0.80", "100%", "40"]


@pytest.mark.slow
def test_without_a_retain_set_the_page_has_only_what_was_measured():
    runs = [run("GA", 0.0, retain=None), run("GA", 1.0, retain=None, until=(math.inf,) * 8)]
    document = whole_page(findings(by_level("complexity", "high")), unlearning(runs, skipped=("GradDiff", "PO")))
    parsed = _Parsed(document)
    assert parsed.open == []
    assert "GradDiff and PO need a retain set: not run." in parsed.text
    assert "no retain set: what was kept is not measured" in parsed.text
    assert len(re.findall("<svg", document)) == 7
    assert not re.search(r"\b(nan|inf)\b", parsed.text, flags=re.IGNORECASE)


def test_a_split_without_a_retain_set_leaves_out_what_needs_one():
    specs, skipped = unlearning_specs("forget05", Sizes())
    assert [(spec.algorithm, spec.alpha) for spec in specs] == [
        (name, alpha) for name in ("GA", "GradDiff", "PO", "NPO") for alpha in (0.0, 1.0)
    ]
    assert skipped == []
    specs, skipped = unlearning_specs("world_facts", Sizes())
    assert [(spec.algorithm, spec.alpha) for spec in specs] == [
        (name, alpha) for name in ("GA", "NPO") for alpha in (0.0, 1.0)
    ]
    assert skipped == ["GradDiff", "PO"]


# --- The picture and the whole --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_picture_has_three_panels_and_is_reproducible(tmp_path):
    data = findings(by_level("complexity", "high"))
    panels = [difficulty(data.monte_carlo), scaling(data.scaling), by_attribute(data.effects)]
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    figures.picture(panels, first)
    figures.picture(panels, second)
    content = first.read_bytes()
    assert content == second.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(content[i : i + 4], "big") for i in (16, 20)] == [1500, 500]


def test_the_demo_from_end_to_end(tmp_path: Path, cluster, capsys):
    sizes = Sizes(
        draws=4,
        attribute_split="forget05",
        scaling_samples=2,
        scaling_draws=2,
        forecast_samples=3,
        algorithms=("GA",),
        epochs=2,
        evaluated=2,
    )
    here, alone = Resources(replicas=0), Resources(replicas=1)
    demo = tmp_path / "demo"
    run_demo(demo, "forget01", sizes, here)
    made = {path.name for path in demo.iterdir()}
    scored = {f"scores-{name}.parquet" for name in ("monte-carlo", "gradient", "curvature", "whole")}
    assert made == scored | {
        "scaling.parquet",
        "forecast.parquet",
        "updates.parquet",
        "index.html",
        "difficulty.png",
        "forgetting.png",
        "unlearning",
    }
    assert {path.name for path in (demo / "unlearning").iterdir()} == {"GA-alpha0", "GA-alpha1"}
    output = capsys.readouterr().out
    assert str(demo / "index.html") in output
    assert "hardest to forget" in output
    assert "GA at alpha 1" in output

    text = _Parsed((demo / "index.html").read_text(encoding="utf-8")).text
    assert "4 samples of authors/forget01" in text
    assert "20 samples of authors/forget05" in text
    assert "up to 2 epochs of 1 updates" in text
    assert "How many updates will it take?" in text
    real = pq.read_table(demo / "updates.parquet")
    assert real.num_rows == 3
    assert "Rank correlation with the real updates of 3 samples" in text
    easy = DemoRun.read(demo / "unlearning" / "GA-alpha1")
    assert (easy.algorithm, easy.alpha, easy.spec["forget_split"]) == ("GA", 1.0, "forget01")
    assert np.isfinite(easy.retain_recall).all()
    written = {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.suffix in (".parquet", ".json")}
    assert any(path.name == "run.json" for path in written)
    run_demo(demo, "forget01", sizes)
    assert {path: path.stat().st_mtime_ns for path in written} == written

    with pytest.raises(UserError, match="forget01"):
        run_demo(demo, "forget05", sizes)
    with pytest.raises(UserError, match="unknown split"):
        run_demo(tmp_path / "other", "forget")
    assert not (tmp_path / "other").exists()

    # An unfinished run of another spec is found by the task itself: its error is one line, as if raised here.
    specs, _ = unlearning_specs("forget01", sizes)
    other = demo / "unlearning" / "GA-alpha0"
    (other / "run.json").unlink()
    (other / "spec.json").write_text(json.dumps({"spec_hash": "another"}))
    with pytest.raises(UserError, match="another spec") as caught:
        unlearn_side_by_side(specs[:1], demo / "unlearning", alone)
    assert type(caught.value) is UserError
    assert "\n" not in str(caught.value)
    assert unlearn_side_by_side(specs[:1], demo / "unlearning", alone, overwrite=True) == [other]
    assert DemoRun.read(other).alpha == 0
    assert not (demo / "unlearning" / "GA-alpha1").exists()
