"""The demo's page says what the data say, is one safe and self-contained document, and the whole demo runs."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from bench import plots
from bench.demo import Sizes, run_demo
from bench.report import findings as findings_module
from bench.report.findings import Findings, ScalingLine, Scores, attribute_effects, correlations, decimal, inflation
from bench.report.page import page
from bench.scoring_job import Resources
from bench.statistics import Estimate
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


def findings(mrd: np.ndarray, rows: list[dict] | None = None, nll: np.ndarray | None = None) -> Findings:
    rows = rows or records(len(mrd))
    tokens = np.random.default_rng(1).integers(20, 40, len(mrd))
    exact = scores(mrd, tokens, nll=nll)
    return Findings(
        monte_carlo=scores(mrd * 1.01, tokens, "monte-carlo"),
        gradient=exact,
        curvature=scores(mrd**2, tokens, "curvature"),
        whole=exact,
        records={row["id"]: row for row in rows},
        scaling=[line(1.0), line(2.0, "abs_mean"), line(0.1, dtype="bfloat16")],
        scaling_draws=4,
        effects=attribute_effects(exact, rows),
        correlations=correlations(exact, rows, [row["answer"] for row in rows]),
        model={"model": "a small one"},
    )


def by_level(field: str, level: object, count: int = 80) -> np.ndarray:
    """MRD that is 1 higher where the record has that level, and noise."""
    raised = np.array([row[field] == level for row in records(count)])
    return 2 + raised + np.random.default_rng(2).normal(0, 0.2, count)


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
    figures = re.findall(r"<svg.*?</svg>", document, flags=re.DOTALL)
    assert len(figures) == 5
    for figure in figures:
        root = ET.fromstring(figure)
        assert root.tag == f"{SVG}svg"
        assert root.get("role") == "img"
        assert len(root.get("aria-label") or "") > 20
        assert root.get("viewBox")
        assert root.get("width") is None
        for colour in plots.CSS_NAMES:
            assert colour not in figure
        used = set(re.findall(r"var\((--[a-z]+)\)", figure))
        assert used <= set(plots.CSS_NAMES.values())
        # Anything with a colour of its own would vanish on one of the two grounds.
        assert set(re.findall(r"#[0-9a-f]{6}\b", figure)) == set()


def test_both_themes_define_every_colour(document):
    light, dark = document.split("prefers-color-scheme: dark", 1)
    for name in plots.CSS_NAMES.values():
        assert f"{name}: #" in light
        assert f"{name}: #" in dark


def test_the_same_findings_give_the_same_page(document):
    data = findings(by_level("complexity", "high"))
    assert page(data) == page(data)


# --- Sentences come from the data -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "claimed", "opposite"),
    [("complexity", "high", "low"), ("frequency", 1, 4), ("rare_words", "high", "low")],
)
def test_flipped_data_flip_the_claim(field, claimed, opposite):
    place = [attribute.field for attribute in findings_module.ATTRIBUTES].index(field)

    def sentence(mrd: np.ndarray) -> str:
        return findings(mrd).effects[place].sentence()

    assert sentence(by_level(field, claimed)).count("the claim holds") == 2
    assert sentence(by_level(field, opposite)).count("the opposite of the claim") == 2
    noise = 2 + np.random.default_rng(3).normal(0, 0.2, 80)
    assert sentence(noise).count("not separable") == 2


def test_a_claim_that_is_only_length_is_not_kept_beyond_length():
    rows = records(200)
    rng = np.random.default_rng(4)
    tokens = np.array([30 if row["complexity"] == "high" else 20 for row in rows]) + rng.integers(0, 12, 200)
    mrd = tokens * rng.normal(1, 0.02, 200)
    effect = attribute_effects(scores(mrd, tokens), rows)[0]
    assert effect.size.sign == 1
    assert effect.beyond_length.value < 0.3
    assert effect.with_length.value > 0.7


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


def test_probability_is_judged_by_its_correlation():
    nll = np.linspace(0.1, 5, 80)
    rising = findings(1 + nll, nll=nll).correlations[2]  # unlikely text, high MRD: as claimed
    assert rising.title == findings_module.PROBABILITY
    assert "the claim holds" in rising.sentence()
    assert "the opposite of the claim" in findings(10 - nll, nll=nll).correlations[2].sentence()


def test_correlations_are_scipys():
    mrd = by_level("frequency", 1)
    data = findings(mrd)
    length = data.correlations[0]
    tokens = data.whole["num_tokens"]
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
    assert findings_module.said(Estimate(0.5, float("nan"), float("nan"))) == "0.50 [too few samples for a CI]"


def test_few_samples_give_a_page_that_says_so():
    text = _Parsed(page(findings(np.array([1.0, 2.0, 3.0])))).text
    assert not re.search(r"\bnan\b", text, flags=re.IGNORECASE)
    assert "the claim holds" not in text
    assert "the opposite of the claim" not in text


def test_samples_without_attributes_give_a_page():
    rows = [{key: row[key] for key in ("id", "question", "answer")} for row in records(12)]
    data = findings(np.linspace(1, 2, 12), rows)
    assert data.effects == []
    assert "Difficulty by attribute" in page(data)


# --- The picture and the whole --------------------------------------------------------------------------------


def test_the_picture_has_three_panels_and_is_reproducible(tmp_path):
    data = findings(by_level("complexity", "high"))
    panels = [plots.difficulty(data.monte_carlo), plots.scaling(data.scaling), plots.attributes(data.effects)]
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    plots.png(panels, first)
    plots.png(panels, second)
    content = first.read_bytes()
    assert content == second.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(content[i : i + 4], "big") for i in (16, 20)] == [1500, 500]


def test_the_demo_from_end_to_end(tmp_path: Path, cluster, capsys):
    sizes = Sizes(draws=4, whole="forget05", scaling_samples=2, scaling_draws=2)
    alone = Resources(replicas=1)  # what takes the time is to start them
    run_demo(tmp_path / "demo", "forget01", sizes, alone)
    made = {path.name for path in (tmp_path / "demo").iterdir()}
    scored = {f"scores-{name}.parquet" for name in ("monte-carlo", "gradient", "curvature", "whole")}
    assert made == scored | {"scaling.parquet", "index.html", "difficulty.png"}
    said = capsys.readouterr().out
    assert str(tmp_path / "demo" / "index.html") in said
    assert "hardest to forget" in said

    text = _Parsed((tmp_path / "demo" / "index.html").read_text(encoding="utf-8")).text
    assert "4 samples of authors/forget01" in text
    assert "20 samples of authors/forget05" in text
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").glob("*.parquet")}
    run_demo(tmp_path / "demo", "forget01", sizes)
    assert {path: path.stat().st_mtime_ns for path in written} == written

    with pytest.raises(UserError, match="forget01"):
        run_demo(tmp_path / "demo", "forget05", sizes)
    with pytest.raises(UserError, match="unknown split"):
        run_demo(tmp_path / "other", "forget")
    assert not (tmp_path / "other").exists()
