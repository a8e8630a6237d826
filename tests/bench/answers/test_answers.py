"""`mrd-bench show`: answers joined by sample and marked, on the terminal and, in a real browser, on the page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from bench.answers.marks import Kind, pieces, visible
from bench.answers.page import page, write_page
from bench.answers.table import Answer, AnswerTable, Model, Row, answer_table
from bench.answers.text import Choice, answer_lines, chosen
from bench.cli import main
from bench.files.score_file import read_scores, write_scores
from bench.results.store import read_stores
from tests.browser import Browser, contrast
from tests.made_answers import PRINTS, SAMPLES, write_difficulty, write_evaluation
from tests.tiny_tofu import records, write_task

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\"> & <b>bold</b> 'quotes'",
    "<!-- <script> \u2028 line \u2029 ${1} {{x}} ` \u202egnirts\u202c",
    "\x1b]52;c;b3duZWQ=\x07 \x1b[2J \x00 \x9b31m \x7f",
)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that says why a command was refused."""
    capsys.readouterr()
    assert main(["show", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


# --- Marks --------------------------------------------------------------------------------------------------


def test_marks_by_hand() -> None:
    kept, added, removed = Kind.KEPT, Kind.ADDED, Kind.REMOVED
    assert pieces("Ada was born in London.", "Bob was born in York.") == [
        (removed, "Ada "),
        (added, "Bob "),
        (kept, "was born in "),
        (removed, "London"),
        (added, "York"),
        (kept, "."),
    ]
    # White space is no difference, and stays the answer's.
    assert pieces("a\n b ", "  a b") == [(added, "  "), (kept, "a b")]
    assert pieces("gone", "") == [(removed, "gone")]
    assert pieces("", "new") == [(added, "new")]
    assert pieces(None, "new") == [(kept, "new")]
    assert pieces("same", "same") == [(kept, "same")]
    # A script without spaces: by characters.
    assert pieces("她在北京", "她在南京") == [(kept, "她在"), (removed, "北"), (added, "南"), (kept, "京")]


def test_what_is_kept_and_added_is_the_answer() -> None:
    for base in HOSTILE:
        for answer in (*HOSTILE, "\t leading\nand  trailing \n"):
            assert "".join(text for kind, text in pieces(base, answer) if kind is not Kind.REMOVED) == answer


def test_visible() -> None:
    assert visible("a\x1b[2J\x00\x7f\r") == "a␛[2J␀␡␍"
    assert visible("\u202eabc\u2028\x9b\ufeff") == "⟨U+202E⟩abc⟨U+2028⟩⟨U+009B⟩⟨U+FEFF⟩"
    plain = "two\nlines\tÉ 她 👩\u200d🔬"
    assert visible(plain) == plain


# --- The table ----------------------------------------------------------------------------------------------


def test_the_joined_table_by_hand(tmp_path: Path) -> None:
    first = write_evaluation(tmp_path / "first.parquet")
    other = [(*sample[:4], {"model": (f"other {sample[1]}", 0.25, 0.5)}) for sample in SAMPLES[1:]]
    second = write_evaluation(tmp_path / "second.parquet", other, fingerprints={"model": "n" * 64})
    table = answer_table([first, second, write_difficulty(tmp_path / "difficulty.parquet")])
    assert table.title == "authors, forget10"
    assert table.models == (
        Model("before", "before"),
        Model("after", "first"),
        Model("after", "second"),
        Model("retain-only", "retain-only"),
    )
    assert table.forecast == "flip-time@0.5"
    assert [row.sample_id for row in table.rows] == ["q10", "q9", "k0"]  # the forget set first
    q10, q9, k0 = table.rows
    assert q10 == Row(
        "forget",
        "q10",
        "Who was born?",
        "Ada was born in  London.",
        (
            Answer("Ada was born in London.", 1.0, 1.0),
            Answer("Bob was born in York.", 0.6, 0.5),
            Answer("other q10", 0.25, 0.5),
            Answer("No idea.", 0.0, 0.1),
        ),
        0.25,
        4.0,
    )
    assert q9.forecast == float("inf")
    assert k0.answers[2] == Answer()
    assert (k0.mrd, k0.forecast) == (None, None)
    assert [table.is_remembered(row) for row in table.rows] == [True, False, True]
    assert [table.has_changed(row) for row in table.rows] == [True, True, False]
    assert table.change(q10) == pytest.approx(0.4)
    # What unlearning changed is marked against the answer before, all others against the truth.
    assert [table.base(q9, model, "before") for model in table.models] == ["Ada did."] * 4
    assert table.base(q10, table.models[1], "before") == "Ada was born in London."
    assert table.base(q10, table.models[1], "truth") == table.base(q10, table.models[3], "before") == q10.truth


def test_choices(tmp_path: Path) -> None:
    table = answer_table([write_evaluation(tmp_path / "e.parquet"), write_difficulty(tmp_path / "difficulty.parquet")])

    def ids(**choice: Any) -> list[str]:
        return [row.sample_id for row in chosen(table, Choice(**choice))]

    assert ids() == ["q10", "q9", "k0"]
    assert ids(sort="id") == ["k0", "q9", "q10"]
    assert ids(sort="rouge") == ["k0", "q10", "q9"]
    assert ids(sort="rouge", reverse=True) == ["q9", "q10", "k0"]
    assert ids(sort="mrd") == ["q10", "q9", "k0"]  # the lowest is the hardest; without one comes last
    assert ids(sort="forecast") == ["q9", "q10", "k0"]
    assert ids(sort="change") == ["q9", "q10", "k0"]
    assert ids(set_name="forget", remembered=False) == ["q9"]
    assert ids(remembered=True) == ["q10", "k0"]
    assert ids(changed=True) == ["q10", "q9"]
    assert ids(conditions=("rouge>=.6", "ma < 0.9")) == ["q10"]
    assert ids(conditions=("forecast>1e9",)) == ["q9"]


def test_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_evaluation(tmp_path / "e.parquet"))
    assert main(["show", path, "--set", "forget", "--limit", "1"]) == 0
    printed = capsys.readouterr().out
    assert "  forget: 2; mean ROUGE-L before 1.000, e 0.300, retain-only 0.250\n" in printed
    assert "q10 (forget)\n  question       Who was born?\n  truth          Ada was born in  London.\n" in printed
    assert "  before         Ada was born in London.  (ROUGE-L 1.00, MA 1.00)\n" in printed
    assert "  e              [-Ada-] {+Bob+} was born in [-London-] {+York+}.  (ROUGE-L 0.60, MA 0.50)\n" in printed
    assert printed.endswith("\n1 of 2 samples; --limit 1, 0 shows all\n")
    assert "\x1b" not in printed
    table = answer_table([path])
    lines = answer_lines(table, chosen(table, Choice(set_name="forget")), colour=True)
    (line,) = [line for line in lines if "York" in line]
    assert "\x1b[9;31mAda\x1b[0m \x1b[4;32mBob\x1b[0m was born in " in line


def test_nothing_in_the_texts_steers_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = HOSTILE[3] + HOSTILE[2]
    samples = [(text, text, text, text, dict.fromkeys(PRINTS, (text * (1 + n), 0.5, 0.5))) for n in range(2)]
    samples = [(each[0], f"{text}{n}", *each[2:]) for n, each in enumerate(samples)]
    path = write_evaluation(tmp_path / "e.parquet", samples, task_name=text, task=text)
    assert main(["show", str(path)]) == 0
    printed = capsys.readouterr().out
    assert {letter for letter in printed if not letter.isprintable()} <= {"\n"}
    assert "␛]52;c;b3duZWQ=␇ ␛[2J ␀ ⟨U+009B⟩31m ␡" in printed
    line = refused(capsys, path, "--set", "nothing")
    assert line.isprintable()


# --- Refusals -----------------------------------------------------------------------------------------------


def test_what_contradicts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_evaluation(tmp_path / "good.parquet")
    other = write_evaluation(tmp_path / "other.parquet", fingerprints=PRINTS | {"original": "p" * 64})
    assert "have different original models (oooooooo, pppppppp)" in refused(capsys, good, other)
    other = write_evaluation(tmp_path / "other.parquet", sets_sha256={"forget": "a" * 64})
    assert "are of different data (the forget set, ffffffff and aaaaaaaa)" in refused(capsys, good, other)
    after = write_difficulty(tmp_path / "difficulty.parquet", model_fingerprint=PRINTS["model"])
    assert "is of another model (mmmmmmmm) than the original of" in refused(capsys, good, after)
    strangers = write_evaluation(tmp_path / "other.parquet", [("forget", "z", None, None, SAMPLES[0][4])])
    right = write_difficulty(tmp_path / "difficulty.parquet")
    assert "have no sample in common" in refused(capsys, strangers, right)
    assert "no evaluation is among the files" in refused(capsys, right)
    assert "--where 'rogue>1': unknown number 'rogue'" in refused(capsys, good, "--where", "rogue>1")
    assert "--where 'mrd>1': no scores were given: add a file of" in refused(capsys, good, "--where", "mrd>1")
    assert "No such file or directory): expected files of `mrd-bench evaluate`" in refused(capsys, tmp_path / "nope")
    assert "--where 'rouge': expected" in refused(capsys, good, "--where", "rouge")
    assert "--limit is -1" in refused(capsys, good, "--limit", "-1")
    assert "unknown set 'forgt'" in refused(capsys, good, "--set", "forgt")
    before = good.read_bytes()
    assert "exists and is not of a page of answers" in refused(capsys, good, "--page", good)
    assert good.read_bytes() == before
    table, spec, record = read_scores(good)
    write_scores(table.filter(pc.equal(table["name"], "ma")), good, spec, record)
    assert "has no answers" in refused(capsys, good)


# --- From a real run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two updates, its evaluation and scores of its forget set."""
    folder = tmp_path_factory.mktemp("real")
    task = str(write_task(folder / "task"))
    model, here = ["--model", str(model_folder)], ["--replicas", "0"]
    quick = ["--max-steps", "2", "--check-every", "0", "--no-early-stopping", "--evaluate-every", "0", "--workers", "0"]
    quick += ["--algorithm", "GradDiff", "--learning-rate", "1e-2"]
    assert main(["unlearn", *model, "--task", task, *quick, "--out", str(folder / "run")]) == 0
    unlearned = ["--model", str(folder / "run" / "model"), "--original", str(model_folder), "--samples", "12"]
    asked = ["--metrics", "rr,ma,retain_rr", *here]
    assert main(["evaluate", *unlearned, "--task", task, *asked, "--out", str(folder / "e.parquet")]) == 0
    assert main(["score", *model, "--data", task, *here, "--out", str(folder / "scores.parquet")]) == 0
    return folder


def test_a_run_is_shown(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "make them with `mrd-bench evaluate --model" in refused(capsys, real / "run")
    files = [str(real / name) for name in ("e.parquet", "run", "scores.parquet")]
    assert main(["show", *files, "--limit", "0", "--page", str(real / "page.html")]) == 0
    printed = capsys.readouterr().out
    asked = {each["id"]: each for name in ("forget", "retain") for each in records(name)}
    shown = re.findall(r"^(\S+) \((\w+)\)(.*)\n  question       (.*)\n  truth          (.*)$", printed, re.M)
    assert len(shown) == 24
    table, _, _ = read_scores(real / "scores.parquet")
    mrd = dict(zip(table["sample_id"].to_pylist(), table["mrd"].to_pylist(), strict=True))
    for name, set_name, numbers, question, truth in shown:
        assert (question, truth) == (asked[name]["question"], asked[name]["answer"])
        assert numbers == (f"  MRD {mrd[name]:.3g}" if set_name == "forget" else "")
    assert printed.count("\n  GradDiff       ") == 24
    assert (real / "page.html").read_text(encoding="utf-8").count("<script") == 2


def test_of_another_run_and_of_changed_data(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run is known by its model, wherever its folder is; of data that have changed only the scores say so."""
    shutil.copytree(real / "run", tmp_path / "moved")
    table = answer_table([real / "e.parquet", tmp_path / "moved"])
    assert table.models[1].name == json.loads((real / "run" / "run.json").read_text())["spec"]["algorithm"]
    record = json.loads((tmp_path / "moved" / "run.json").read_text())
    for changed, said in (
        ({"model_fingerprint": "x" * 64}, "began with another model (xxxxxxxx) than the original of"),
        ({"task": "authors"}, "is of task 'authors' and"),
    ):
        other = {**record, "spec": {**record["spec"], **changed}}
        (tmp_path / "moved" / "run.json").write_text(json.dumps(other))
        assert said in refused(capsys, real / "e.parquet", tmp_path / "moved")
    (tmp_path / "moved" / "run.json").write_text(json.dumps(record))
    scores, spec, facts = read_scores(real / "scores.parquet")
    write_scores(scores, tmp_path / "scores.parquet", spec | {"data_sha256": "y" * 64}, facts)
    line = refused(capsys, real / "e.parquet", tmp_path / "moved", tmp_path / "scores.parquet")
    assert "are of different data (yyyyyyyy and" in line


def test_a_file_of_an_earlier_version_asks_the_task(real: Path, tmp_path: Path) -> None:
    table, spec, record = read_scores(real / "e.parquet")
    task = write_task(tmp_path / "task")
    earlier = table.filter(pc.not_equal(table["level"], "record"))
    write_scores(earlier, tmp_path / "e.parquet", spec | {"task": str(task)}, record)
    now, then = (answer_table([folder / "e.parquet"]) for folder in (real, tmp_path))
    assert then.rows == now.rows
    assert all(row.question and row.truth for row in then.rows)
    write_task(tmp_path / "task", forget=[each | {"answer": "w1"} for each in records("forget")])
    changed = answer_table([tmp_path / "e.parquet"])
    assert {row.truth for row in changed.rows if row.set_name == "forget"} == {None}
    assert [row.truth for row in changed.rows if row.set_name == "retain"] == [
        row.truth for row in now.rows if row.set_name == "retain"
    ]
    (note,) = changed.notes
    assert "no questions and truths of the forget set: the data of" in note


def test_from_a_store_to_the_leaderboard(real: Path, tmp_path: Path, browser: Browser) -> None:
    """The store keeps the answers beside the run, and the run's entry leads to their page."""
    store, board = str(tmp_path / "store"), tmp_path / "board"
    assert main(["results", "add", store, str(real / "e.parquet"), str(real / "run")]) == 0
    results = read_stores([store])
    (run,) = results.runs["run"].to_pylist()
    assert set(results.answers["run"].to_pylist()) == {run}
    assert set(results.answers["experiment"].to_pylist()) == {"run"}
    table = answer_table([real / "e.parquet"])
    kept = {(row["set"], row["sample_id"]): row for row in results.answers.to_pylist()}
    assert len(kept) == len(table.rows) == 24
    for row in table.rows:
        stored = kept[row.set_name, row.sample_id]
        assert [stored["before"], stored["after"]] == [answer.text for answer in row.answers]
        assert stored["rouge_after"] == row.answers[1].rouge
        assert (stored["question"], stored["truth"], stored["retain_only"]) == (row.question, row.truth, None)
    assert main(["leaderboard", store, "--out", str(board)]) == 0
    browser.open(board / "index.html", f"#board=0&run={run}")
    browser.driver.find_element("link text", "Answers before and after, side by side").click()
    assert browser.driver.title == "mrd-bench answers"
    assert len(browser.table(".answers")) == 24
    assert browser.errors() == []


# --- The page -----------------------------------------------------------------------------------------------


def test_hostile_texts_are_only_shown(tmp_path: Path, browser: Browser) -> None:
    everything = " ".join(HOSTILE)
    rows = [
        Row(text, f"{text}{n}", text, text, (Answer(everything, 0.5, 0.5), Answer(text, 0.1 * n, None)), 0.1, 1.0)
        for n, text in enumerate(HOSTILE)
    ]
    models = (Model("before", everything), Model("after", HOSTILE[0]))
    table = AnswerTable(everything, models, tuple(rows), "flip", (everything,))
    html = page(table)
    assert html.count("<script") == 2
    assert "<img" not in html
    assert {letter for letter in html if not letter.isprintable()} == {"\n"}
    write_page(table, tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    assert browser.driver.title == "mrd-bench answers"
    assert browser.driver.find_elements("css selector", "img, b") == []
    cells = browser.table(".answers")
    said = browser.driver.execute_script(
        "const cells = [...document.querySelectorAll('.answers tbody tr')].map((row) => row.cells[5]);"
        "const kept = (node) => node.tagName !== 'DEL';"
        "const words = (cell) => [...cell.querySelector('.said').childNodes].filter(kept);"
        "return cells.map((cell) => words(cell).map((node) => node.textContent).join(''));"
    )
    assert said == [visible(text) for text in HOSTILE]
    assert len(cells) == 4
    Select(browser.one("#set")).select_by_visible_text(visible(HOSTILE[1]))
    assert len(browser.table(".answers")) == 1
    assert browser.errors() == []


def test_the_page_is_sorted_filtered_and_searched(tmp_path: Path, browser: Browser) -> None:
    files = [write_evaluation(tmp_path / "e.parquet"), write_difficulty(tmp_path / "difficulty.parquet")]
    write_page(answer_table(files), tmp_path / "page.html")
    browser.driver.set_window_size(1300, 900)
    browser.open(tmp_path / "page.html")

    def ids() -> list[str]:
        return [row[0].split("\n")[0] for row in browser.table(".answers")]

    assert ids() == ["q10", "q9", "k0"]
    assert browser.table(".answers")[0][5].split("\n")[0] == "Ada Bob was born in LondonYork."
    assert browser.table(".answers")[1][2] == "∞"
    assert [each.text.strip() for each in browser.all(".answers del")][:2] == ["Ada", "London"]
    browser.header("sample").click()
    assert ids() == ["k0", "q9", "q10"]
    browser.header("MRD").click()
    assert ids() == ["q10", "q9", "k0"]
    assert Select(browser.one("#order")).first_selected_option.text == "MRD"
    for title, expected in (
        ("ROUGE-L of e", ["k0", "q10", "q9"]),
        ("MA of retain-only", ["k0", "q9", "q10"]),
        ("ROUGE-L lost", ["q9", "q10", "k0"]),
        ("forecast", ["q9", "q10", "k0"]),
    ):
        Select(browser.one("#order")).select_by_visible_text(title)
        assert ids() == expected
    assert browser.one("#direction").text == "highest first"
    browser.one("#direction").send_keys(Keys.ENTER)
    assert ids() == ["q10", "q9", "k0"]
    assert browser.one("#direction").text == "lowest first"
    for state, expected in (("remembered", ["q10", "k0"]), ("forgotten", ["q9"]), ("changed", ["q10", "q9"])):
        Select(browser.one("#state")).select_by_visible_text(state)
        assert ids() == expected
    Select(browser.one("#set")).select_by_visible_text("forget")
    Select(browser.one("#state")).select_by_visible_text("all")
    assert browser.one("#count").text == "2 of 3 samples"
    browser.one("#filter").send_keys("eve DID")
    assert ids() == ["q9"]
    browser.one("#filter").send_keys(Keys.CONTROL, "a", Keys.NULL, "London")
    assert ids() == ["q10"]
    browser.one("#marks").send_keys(Keys.SPACE)
    assert browser.table(".answers")[0][5].split("\n")[0] == "Bob was born in York."
    assert browser.errors() == []


def test_marks_stand_out_in_light_and_dark(tmp_path: Path, browser: Browser) -> None:
    write_page(answer_table([write_evaluation(tmp_path / "e.parquet")]), tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    for theme in ("light", "dark"):
        browser.driver.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
        page_ground = browser.one("body").value_of_css_property("background-color")
        for css in (".answers ins", ".answers del", ".kept", ".gone", ".answers .facts"):
            each = browser.all(css)[0]
            own = each.value_of_css_property("background-color")
            ground = own if css.endswith(("ins", "del")) else page_ground
            assert contrast(each.value_of_css_property("color"), ground) >= 4.5, (theme, css)


def test_four_thousand_samples(tmp_path: Path, browser: Browser) -> None:
    """Fifty are there at a time, and all of them are sorted and searched."""
    words = [f"word{n}" for n in range(40)]
    answers = [" ".join([*words[:k], "other", *words[k + 9 :]]) for k in range(20)]

    def row(n: int) -> Row:
        own = tuple(Answer(answers[(n + k) % 20], n / 4000, 0.5) for k in range(3))
        return Row("forget", f"s{n}", f"Question {n}?", " ".join(words), own, n / 7)

    rows = tuple(map(row, range(4000)))
    table = AnswerTable("many", (Model("before", "before"), Model("after", "A"), Model("after", "B")), rows)
    write_page(table, tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    assert len(browser.table(".answers")) == 50
    assert browser.one(".more").text == "Show 50 more of 4000"
    browser.one(".more").click()
    assert len(browser.table(".answers")) == 100
    browser.header("A").click()
    assert [row[0].split("\n")[0] for row in browser.table(".answers")][:2] == ["s3999", "s3998"]
    browser.one("#filter").send_keys("question 3777?")
    assert [row[0].split("\n")[0] for row in browser.table(".answers")] == ["s3777"]
    assert browser.errors() == []
