"""The table of costs as models grow: its speeds are read, not asserted, but what it compares computes the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bench.cli import main
from bench.speed.scale import BEFORE, CURVATURE, FORWARD, GRADIENT, _BareLoop, _made
from bench.speed.unlearning.inputs import load
from bench.speed.unlearning.loop import TrainingLoop
from scoring.updates import distance


def test_the_bare_loop_trains_as_ours_does(tmp_path: Path) -> None:
    spec = dataclasses.replace(_made(2e5, 64, tmp_path), learning_rate=1e-4)
    model = load(spec).eval()
    loop = TrainingLoop(spec, 2, tmp_path)
    bare: Any = _BareLoop(model, loop)
    loop.advance(2)
    for _ in range(2):
        bare.update()
    trained = loop.unlearner.trained.model
    weights = [list(each.parameters()) for each in (trained, bare.model, model)]
    _, apart = distance((p.detach(), q.detach()) for p, q in zip(weights[0], weights[1], strict=True))
    _, moved = distance((p.detach(), q.detach()) for p, q in zip(weights[1], weights[2], strict=True))
    assert moved > 1e-3
    assert apart < 1e-3 * moved


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scale.json"
    command = ["benchmark", "scale", "--sizes", "2e5", "--tokens", "64", "--turns", "1", "--profile", "cpu-core"]
    assert main([*command, "--out", str(out)]) == 0
    (figures,) = json.loads(out.read_text())["sizes"].values()
    rows = figures["rows"]
    assert rows[FORWARD]["forwards"]["value"] == 1
    assert rows[CURVATURE]["peak_weights"] < rows[BEFORE[CURVATURE]]["peak_weights"] / 2
    assert rows["update, GradDiff"]["peak_weights"] > 4  # weights, gradients and two moments
    for name in (FORWARD, GRADIENT, CURVATURE, "update, NPO"):
        assert rows[name]["planned_error"] == pytest.approx(rows[name]["planned_seconds"] / rows[name]["seconds"] - 1)
    assert "loop against bare loop" in capsys.readouterr().out


def test_sizes_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "scale", "--sizes", "1e7,nan"]) == 2
    assert "--sizes is nan: expected at least 100000" in capsys.readouterr().err
