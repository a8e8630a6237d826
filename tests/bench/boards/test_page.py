"""The leaderboard's page: what is in the file, and what a real browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from bench.boards.board import Board, boards
from bench.boards.figures import by_selection, front, marks, pareto_caption, strips_caption
from bench.boards.page import page
from bench.results.store import SCHEMAS, Store, read_stores
from bench.speed.leaderboard import write_made_runs
from tests.browser import Browser, contrast, luminance
from tests.made_runs import SETTING, made_run, write_runs

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\"> & <b>bold</b>",
    "<!-- <script> \u2028 line \u2029 ${1} {{x}} `",
)
# Completeness and utility of five entries on four selections, a seed each; C is worse than B in both.
LEVELS = {"A": (0.9, 0.5), "B": (0.7, 0.8), "C": (0.6, 0.7), "D10": (0.5, 0.9), "D9": (0.2, 0.95)}


def made_board(root: Path) -> Board:
    """A board whose selections have samples with hostile texts; one run has failed."""
    rng = np.random.default_rng(0)
    rows = []
    for name, (forgotten, kept) in LEVELS.items():
        for number in range(3 if name == "D10" else 4):  # or values at equal difficulty would be the raw ones
            noise = 0.01 * rng.normal()
            values = {"completeness": forgotten + noise + 0.02 * number, "utility": kept - noise}
            rows.append(made_run(name, f"s{number}", 0, values, -5.0 + 0.1 * number))
    rows.append(made_run("A", "s0", 1, {}, -5.0, row={"status": "diverged", "reason": "loss is <nan>", "metrics": []}))
    write_runs(root, rows)
    texts = [
        {
            "scores": "texts",
            "sample_id": f"s0/{number}",
            "mrd": 0.25 - 0.125 * number,
            "num_tokens": 7,
            "prompt": HOSTILE[number],
            "completion": HOSTILE[2 - number],
            "model_fingerprint": SETTING["model_fingerprint"],
        }
        for number in (0, 1)
    ]
    # Read after the others, as its name may be: the texts of s0 are only there.
    store = Store(root)
    shutil.rmtree(root / "scores")
    store.write("scores", pa.Table.from_pylist(texts, SCHEMAS["scores"]), "authors", "fig2")
    (board,), _ = boards(read_stores([root]))
    return board


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    return made_board(tmp_path_factory.mktemp("board"))


@pytest.fixture(scope="module")
def html(board: Board) -> str:
    return page([board], ["a note with <b>markup</b>"])


# --- The file -----------------------------------------------------------------------------------------------


def test_texts_are_nowhere_markup(html: str) -> None:
    for text in HOSTILE:
        assert text not in html
    assert html.count("<script") == 2
    assert "<img" not in html
    assert "<b>" not in html
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html)
    assert data is not None
    assert "<" not in data[1]
    assert "\u2028" not in html
    (found,) = json.loads(data[1])
    assert {text for sample in found["samples"][:2] for text in sample[1:3]} == set(HOSTILE)


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", html)
    assert "url(http" not in html
    assert "default-src 'none'" in html.replace("&#x27;", "'")


def test_numbers_that_are_none_are_null(board: Board, tmp_path: Path) -> None:
    write_runs(tmp_path, [made_run("A", "s0", 0, {"completeness": 0.5})])
    (single,), _ = boards(read_stores([tmp_path]))
    data = re.search(r'id="data">(.*?)</script>', page([single]))
    assert data is not None
    (found,) = json.loads(data[1])
    assert found["standings"][0][0][4] == [0.5, None, None]
    assert "NaN" not in page([single])


def test_without_javascript_the_standings_are_there(html: str) -> None:
    place = html[html.index('<div class="place">') : html.index('<p class="explained">')]
    assert [re.search(rf"<td>{name}</td>", place) is not None for name in LEVELS] == [True] * 5
    assert "<noscript>" in html


def test_the_front_is_that_of_a_second_computation(board: Board) -> None:
    every = {mark.entry: (mark.completeness.value, mark.utility.value) for mark in marks(board)}
    expected = {
        name
        for name, own in every.items()
        if not any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in every.values())
    }
    assert {mark.entry for mark in front(board)} == expected == {"A", "B", "D10", "D9"}
    caption = pareto_caption(board)
    assert caption.startswith("A, B, D10 and D9 are on the Pareto front: no other of the 5 entries")


def test_captions_are_computed(board: Board) -> None:
    values = by_selection(board, "completeness")
    wide = max(values["A"].values()) - min(values["A"].values())
    lead = np.mean(list(values["A"].values())) - np.mean(list(values["B"].values()))
    caption = strips_caption(board, "completeness")
    assert f"A ranges over {wide:.3g}" in caption
    assert f"{wide / lead:.1f} times its lead of {lead:.3g} over B" in caption


def test_a_page_of_no_board_says_so() -> None:
    assert "0 boards, 0 runs" in page([])


# --- In a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(html, encoding="utf-8")
    return path


@pytest.fixture
def shown(browser: Browser, file: Path) -> Iterator[Browser]:
    browser.driver.set_window_size(1280, 900)
    browser.open(file)
    yield browser
    assert browser.driver.title == "mrd-bench leaderboard"
    assert browser.errors() == []


def leading_number(text: str) -> float:
    found = re.match("[\N{MINUS SIGN}-]?[0-9.]+", text)
    assert found is not None, text
    return float(found[0].replace("\N{MINUS SIGN}", "-"))


@pytest.mark.parametrize("title", ["rank", "completeness", "at equal difficulty", "rank there", "runs"])
def test_sorting_by_numbers(shown: Browser, title: str) -> None:
    place = [each.text for each in shown.all("thead button")].index(title)
    seen = []
    for _ in range(2):
        shown.header(title).click()
        values = [leading_number(row[place]) for row in shown.table()]
        direction = shown.header(title).find_element(By.XPATH, "..").get_attribute("aria-sort")
        assert values == sorted(values, reverse=direction == "descending")
        seen.append(direction)
    assert sorted(map(str, seen)) == ["ascending", "descending"]
    others = [each.find_element(By.XPATH, "..").get_attribute("aria-sort") for each in shown.all("thead button")]
    assert others.count("none") == len(others) - 1


def test_sorting_by_names_knows_numbers(shown: Browser) -> None:
    shown.header("entry").click()
    assert [row[1] for row in shown.table()] == ["A", "B", "C", "D9", "D10"]
    shown.header("entry").click()
    assert [row[1] for row in shown.table()] == ["D10", "D9", "C", "B", "A"]


def test_filter(shown: Browser) -> None:
    assert shown.one(".count").text == "5 of 5 entries"
    shown.one(".filter").send_keys("d1")
    assert [row[1] for row in shown.table()] == ["D10"]
    assert shown.one(".count").text == "1 of 5 entries"
    shown.one(".filter").send_keys("x")
    assert shown.table() == []
    shown.one(".filter").send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
    assert len(shown.table()) == 5


def test_another_metric(shown: Browser, board: Board) -> None:
    Select(shown.one(".metric")).select_by_value("utility")
    WebDriverWait(shown.driver, 10).until(lambda _: "metric=utility" in shown.driver.current_url)
    assert [row[1] for row in shown.table()] == [each.entry for each in board.standings["utility"]]
    assert shown.one(".sentences").text.split("\n") == list(filter(None, board.sentences["utility"]))


def test_from_an_entry_to_a_run_to_its_samples_and_back(shown: Browser, board: Board) -> None:
    shown.one("table").find_element(By.LINK_TEXT, "A").click()
    shown.wait("A")
    rows = shown.table()
    assert len(rows) == 5
    assert any("✗ diverged: loss is <nan>" in row[4] for row in rows)
    run = next(each for each in board.runs if each.entry == "A" and each.selection == "s0" and each.seed == 0)
    shown.one("table").find_element(By.LINK_TEXT, run.run).click()
    shown.wait(f"Run {run.run}")
    facts = dict(zip((each.text for each in shown.all("dt")), (each.text for each in shown.all("dd")), strict=True))
    assert facts["commit"] == "abc"
    assert facts["packages"] == "torch 2.13.0"
    assert facts["completeness"] == f"{run.values['completeness']:.4f}"
    rows = shown.table()
    # Hardest first: s0/1 has the lower MRD.
    assert [row[0] for row in rows] == ["s0/1", "s0/0"]
    assert [row[3] for row in rows] == ["4", "–"]
    texts = [each.get_attribute("textContent") for each in shown.all(".question, .completion")]
    assert texts == [HOSTILE[1], HOSTILE[1], HOSTILE[0], HOSTILE[2]]
    assert shown.driver.find_elements(By.CSS_SELECTOR, "img, b") == []
    shown.driver.back()
    shown.wait("A")
    shown.driver.back()
    shown.wait("authors, fig2")
    assert shown.table()[0][1] == "A"


def test_every_view_has_an_address(browser: Browser, file: Path, board: Board) -> None:
    browser.open(file, f"#board=0&run={board.runs[-1].run}")
    assert "✗" not in browser.one("#detail h2").text
    assert "loss is <nan>" in browser.one("#detail dl").text
    for fragment, said in (
        ("#board=0&run=nothing", "There is no such run"),
        ("#board=0&entry=<img src=x>", "There is no such entry"),
        ("#board=77&metric=none", "5 of 5 entries"),
    ):
        browser.open(file, fragment)
        assert said in browser.one("main").text
    assert browser.errors() == []


def test_light_and_dark(shown: Browser) -> None:
    """The button goes round; texts stand out from their ground in both (WCAG: 4.5), and figures follow."""
    grounds = []
    for expected in ("Theme: light", "Theme: dark"):
        shown.one("#theme").click()
        assert shown.one("#theme").text == expected
        ground = shown.one("body").value_of_css_property("background-color")
        grounds.append(ground)
        for css in ("h1", ".explained", "tbody td", "tbody a", "thead button", "figcaption", ".count"):
            assert contrast(shown.all(css)[0].value_of_css_property("color"), ground) >= 4.5, css
        fills = "return getComputedStyle(document.querySelector('figure svg text')).fill"
        assert contrast(shown.driver.execute_script(fills), ground) >= 4.5
    assert luminance(grounds[0]) > 0.9 > 0.1 > luminance(grounds[1])
    shown.driver.refresh()
    assert shown.one("#theme").text == "Theme: dark"
    shown.one("#theme").click()
    assert shown.one("#theme").text == "Theme: auto"
    for scheme, bright in (("dark", False), ("light", True)):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        assert (luminance(shown.one("body").value_of_css_property("background-color")) > 0.5) == bright
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_by_the_keyboard_alone(shown: Browser) -> None:
    """The first stop skips to the standings; every control can be reached, seen and used."""

    def tab() -> WebElement:
        shown.driver.switch_to.active_element.send_keys(Keys.TAB)
        return shown.driver.switch_to.active_element

    assert tab().text == "Skip to the standings"
    shown.driver.switch_to.active_element.send_keys(Keys.ENTER)
    seen = []
    for _ in range(30):
        now = tab()
        seen.append(now.text or now.get_attribute("class"))
        assert now.value_of_css_property("outline-style") != "none", seen
        if now.text == "entry":
            break
    assert "filter" in " ".join(map(str, seen))
    shown.driver.switch_to.active_element.send_keys(Keys.ENTER)
    shown.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert shown.table()[0][1] == "D10"
    while tab().tag_name != "a":
        pass
    assert shown.driver.switch_to.active_element.text == "D10"
    shown.driver.switch_to.active_element.send_keys(Keys.ENTER)
    shown.wait("D10")


def test_on_a_phone(browser: Browser, file: Path, board: Board) -> None:
    """Nothing but the tables scrolls sideways."""
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for fragment in ("", "#board=0&entry=A", f"#board=0&run={board.runs[0].run}"):
            browser.open(file, fragment)
            wide = browser.driver.execute_script("return document.documentElement.scrollWidth")
            assert wide <= 360
            scroll = browser.one(".scroll")
            assert browser.driver.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", scroll)
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_values_at_equal_forecast(browser: Browser, tmp_path: Path) -> None:
    """Columns of them are there where they are known, and in the order of what they show."""
    rows = [
        made_run(name, f"s{n}", 0, {"completeness": level - n / 4}, row={"mean_log_flip_time": float(n)})
        for name, level, own in (("A", 1.9, range(4)), ("B", 2.0, range(1, 6)))
        for n in own
    ]
    (with_forecasts,), _ = boards(read_stores([write_runs(tmp_path / "store", rows)]))
    path = tmp_path / "index.html"
    path.write_text(page([with_forecasts]), encoding="utf-8")
    browser.open(path)
    heads = [each.text for each in browser.all("thead button")]
    place = heads.index("at equal forecast")
    assert heads[place + 1] == "rank by forecast"
    # At the mean forecast, 2.5: the level less .625.
    found = {row[1]: (leading_number(row[place]), row[place + 1].split()[0]) for row in browser.table()}
    assert found == {"A": (1.275, "2"), "B": (1.375, "1")}
    browser.open(path, "#board=0&entry=A")
    assert "mean log flip time" in [each.text for each in browser.all("thead button")]
    assert browser.errors() == []


def test_ten_thousand_runs(browser: Browser, tmp_path: Path) -> None:
    """10 entries on 100 selections of 40 samples, 10 seeds each: all of them can be reached."""
    path = tmp_path / "index.html"
    (large,), _ = boards(read_stores([write_made_runs(tmp_path / "store", 10_000)]))
    path.write_text(page([large]), encoding="utf-8")
    browser.open(path)
    assert len(browser.table()) == 10
    browser.open(path, "#board=0&entry=A3")
    assert len(browser.table()) == 200
    more = browser.one(".more")
    assert more.text == "Show all 1000"
    more.click()
    assert len(browser.table()) == 1000
    last = large.runs[-1]
    browser.open(path, f"#board=0&run={last.run}")
    rows = browser.table()
    assert sorted(row[0] for row in rows) == sorted(large.selections[last.selection].ids)
    assert {row[0]: row[3] for row in rows} == {k: str(v) for k, v in last.updates_until_forgotten.items()}
    assert browser.errors() == []
