"""Watching a run that really runs in another process, is killed, and is finished."""

from __future__ import annotations

import dataclasses
import http.client
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from selenium.webdriver.common.by import By

from bench.cli import main
from bench.watch.page import HERE, make_server
from bench.watch.read import look, look_all, runs_in
from bench.watch.show import COLUMNS, cells, have_ended
from scoring.reading import read_json
from tests.browser import Browser
from tests.paths import ROOT
from tests.processes import kill, wait_for
from tests.tiny_folders import pairs, write_jsonl

HOSTILE = "<img src=x onerror=\"document.title='owned'\"> & [red]"


@pytest.fixture(scope="module")
def seen(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen of one run in its states, and the folder that it left."""
    folder = tmp_path_factory.mktemp("watch")
    out = folder / "run"
    task = write_jsonl(folder / "task.jsonl", pairs(6))
    arguments = ["unlearn", "--model", str(model_folder), "--task", str(task), "--algorithm", "GA", "--workers", "0"]
    arguments += ["--batch-size", "2", "--no-early-stopping", "--evaluate-samples", "2", "--out", str(out)]
    command = [sys.executable, "-m", "bench.cli", *arguments, "--epochs", "1000000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (out / "spec.json").is_file() and look(out).step >= 6 and look(out).seconds_left)
        running = look(out)
    finally:
        kill(process.pid)
        process.wait()
    stopped = look(out)
    assert main([*arguments, "--epochs", "2", "--out", str(folder / "short")]) == 0
    return {"running": running, "stopped": stopped, "finished": look(folder / "short"), "folder": folder}


def test_a_run_is_seen_in_each_state(seen: dict[str, Any]) -> None:
    running, stopped, finished = (seen[state] for state in ("running", "stopped", "finished"))
    assert (running.state, stopped.state, finished.state) == ("running", "stopped", "finished")
    assert running.total == stopped.total == 3_000_000
    assert 6 <= running.step <= stopped.step
    assert running.seconds_left > 0
    assert {"forget_rouge_l_recall", "forget_probability"} <= running.evaluation.keys()
    assert (finished.step, finished.total, finished.epoch) == (6, 6, 2)
    assert [x for x, _ in finished.curves["forget loss"]] == [1, 2, 3, 4, 5, 6]


def test_without_a_terminal_it_prints_once(seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(seen["folder"] / "run"), str(seen["folder"] / "short")]) == 0
    printed = capsys.readouterr().out
    assert "stopped" in printed
    assert "6 of 6" in printed


def test_the_folder_of_a_pair_shows_both(
    seen: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also before the second has begun; what is learnt has a loss of its own, and other measurements."""
    pair = tmp_path / "pair"
    data, forget = (write_jsonl(tmp_path / f"{count}.jsonl", pairs(count)) for count in (6, 2))
    model = read_json(seen["folder"] / "short" / "spec.json", dict[str, Any], "a spec")["model"]
    arguments = ["train", "--model", model, "--task", str(data), "--and-retain", str(forget), "--workers", "0"]
    assert main([*arguments, "--epochs", "2", "--out", str(pair)]) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert main(["watch", "pair"]) == 0
    said = capsys.readouterr().out
    assert re.findall("pair/[a-z-]+", said) == ["pair/original", "pair/retain-only"]
    original, retain_only = look_all([pair])
    last = pq.read_table(pair / "retain-only" / "epochs.parquet").to_pylist()[-1]
    assert retain_only.evaluation["trained_ma"] == last["trained_ma"]
    shown = dict(zip(COLUMNS, cells(retain_only), strict=True))
    assert (shown["forget"], shown["retain"], shown["forgotten"]) == ("–", "–", "–")
    assert shown["loss"] == f"{retain_only.curves['loss'][-1][1]:.4g}"
    assert shown["evaluation"] == (
        f"MA {last['trained_ma']:.3g}, RL {last['trained_rouge_l_recall']:.3g}, "
        f"left out RL {last['left_out_rouge_l_recall']:.3g}"
    )

    shutil.rmtree(pair / "retain-only")
    original, second = look_all([pair])
    assert (original.state, second.state) == ("finished", "waiting")
    looks: dict[str, Any] = {}
    assert not have_ended([original, second], looks)
    # By itself, in a folder that has others too, it is no pair.
    (pair / "other").mkdir()
    assert runs_in(pair) == [pair / "original"]


def test_it_ends_when_a_run_stays_stopped(seen: dict[str, Any]) -> None:
    """Three looks in a row; one that is started again meanwhile is followed."""
    running, stopped, finished = (dataclasses.replace(seen[s], name="run") for s in ("running", "stopped", "finished"))
    looks: dict[str, Any] = {}
    states = [stopped, stopped, running, stopped, stopped, stopped]
    assert [have_ended([one, seen["finished"]], looks) for one in states] == [False] * 5 + [True]
    assert have_ended([finished], looks)


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.fixture
def port(seen: dict[str, Any], tmp_path: Path) -> Iterator[int]:
    hostile = Path(shutil.copytree(seen["folder"] / "short", tmp_path / HOSTILE.replace("/", "")))
    with make_server([hostile], 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_the_page_answers_this_machine_alone(port: int) -> None:
    def get(path: str, host: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HERE, port)
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    status, html = get("/", f"{HERE}:{port}")
    assert status == 200
    assert "&lt;img" in html
    assert "<img" not in html
    assert "<script" not in html
    assert html.count("<polyline") >= 3
    assert get("/", f"evil.example:{port}")[0] == 403
    assert get("/../spec.json", f"{HERE}:{port}")[0] == 404


def test_a_browser_shows_a_hostile_name_as_text(port: int, browser: Browser) -> None:
    driver = browser.driver
    driver.get(f"http://{HERE}:{port}/")
    assert driver.title == "mrd-bench watch"
    assert HOSTILE.replace("/", "") in driver.find_element(By.CSS_SELECTOR, "tbody td").text
    assert not driver.find_elements(By.TAG_NAME, "img")
    assert len(driver.find_elements(By.CSS_SELECTOR, "svg polyline")) >= 3
