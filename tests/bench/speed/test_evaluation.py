"""`mrd-bench benchmark evaluation` compares what it says it compares; its speeds are read, not asserted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.cli import main
from bench.speed.evaluation import TURNS
from tests.tiny_tofu import pairs_of, records, taught, write_task

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark takes all cores for the method that has no replicas."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(model: Path, task: Path, generations: int, out: Path) -> list[str]:
    named = {"model": model, "data": task, "generations": generations, "out": out}
    return ["benchmark", "evaluation", *(part for key, value in named.items() for part in (f"--{key}", str(value)))]


def test_three_methods_write_the_same_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = taught(tmp_path / "model", pairs_of(*records("forget")), 20)
    task, out = write_task(tmp_path / "task"), tmp_path / "figures.json"
    assert main(command(model, task, 40, out)) == 0
    printed, figures = capsys.readouterr().out, json.loads(out.read_text())
    assert figures["generations"] == 40
    assert f"40 greedy answers, {figures['new_tokens']} new tokens" in printed
    # Up to 20 tokens more than the true answers, of 4 to 8 tokens, have.
    assert 40 < figures["new_tokens"] <= 40 * 28
    assert figures["same_answers"] == {"b": 1.0, "c": 1.0}
    for name, title in (("b", "(b) one replica"), ("c", f"(c) {figures['replicas']} replicas")):
        seconds, beside, gain = figures["seconds"][name], figures["seconds"][f"a beside {name}"], figures["gain"][name]
        assert f"(a) one at a time, {figures['cores']} threads" in printed
        assert re.search(rf"^{re.escape(title)} +{seconds:.1f} s +{gain['value']:.1f} x faster", printed, re.MULTILINE)
        assert gain["value"] == pytest.approx(beside / seconds)
        assert gain["low"] <= gain["value"] <= gain["high"]


def test_too_little_to_compare(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, out = write_task(tmp_path / "task"), tmp_path / "figures.json"
    assert main(command(model_folder, task, TURNS - 1, out)) == 2
    assert capsys.readouterr().err == f"mrd-bench: error: --generations is {TURNS - 1}: expected at least {TURNS}\n"
    few = write_task(tmp_path / "few", forget=records("forget")[:1], retain=records("retain")[:1])
    assert main(command(model_folder, few, 20, out)) == 2
    assert f"4 questions fit into the model's context, expected at least {TURNS}" in capsys.readouterr().err
    assert not out.exists()
