"""`benchmark cluster` on little work: its figures are there, and follow from what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.cli import main
from bench.speed import cluster

pytestmark = pytest.mark.usefixtures("cluster")


def test_a_small_run(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"TURNS": 3, "DRAWS": 4, "QUEUED_SAMPLES": 300}.items():
        monkeypatch.setattr(cluster, name, value)
    out = tmp_path / "figures.json"
    command = f"benchmark cluster --model {model_folder} --data {data_file} --sizes 300,100 --out {out}"
    assert main(command.split()) == 0
    figures = json.loads(out.read_text())
    one, two = (np.array(figures["scaling_seconds"][key]) for key in ("1", "2"))
    assert figures["efficiency"]["value"] == pytest.approx(np.prod(one / two / 2) ** (1 / 3))
    assert figures["efficiency"]["low"] <= figures["efficiency"]["value"] <= figures["efficiency"]["high"]
    alone, queued = (np.array(figures["scheduling_seconds"][key]) for key in ("alone", "queued"))
    assert figures["overhead"]["value"] == pytest.approx((queued - alone).mean())
    assert list(figures["driver_megabytes"]) == ["100", "300"]
    # A process that has torch and Ray in it, in megabytes.
    assert all(100 < size < 5000 for size in figures["driver_megabytes"].values())
    said = capsys.readouterr().out
    assert "efficiency" in said
    assert "MB at       300 samples, ratio" in said


def test_figures_by_hand() -> None:
    """Two turns: 10 s and 5.0 s, 10 s and 6.25 s: efficiencies of 100 and 80 %, whose logs have a mean of -0.1116, and
    a t interval of one degree of freedom, 12.706 times 0.1116 either way. The queue adds 0.1 and 0.3 s."""
    figures = cluster.summary({1: [10.0, 10.0], 2: [5.0, 6.25]}, {"alone": [1.0, 1.0], "queued": [1.1, 1.3]})
    assert figures["efficiency"]["value"] == pytest.approx(np.sqrt(0.8))
    assert figures["efficiency"]["high"] == pytest.approx(np.exp(-0.11157 + 12.706 * 0.11157), rel=1e-3)
    assert figures["overhead"] == {
        "value": pytest.approx(0.2),
        "low": pytest.approx(0.2 - 12.706 * 0.1, rel=1e-3),
        "high": pytest.approx(0.2 + 12.706 * 0.1, rel=1e-3),
    }


def test_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for sizes, message in (
        ("1000", "--sizes is 1000: expected two or more numbers of samples"),
        ("10,1000", "each 100 or more"),
    ):
        assert main(["benchmark", "cluster", "--sizes", sizes]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "cluster", "--sizes", "a,b"])
    assert "'a,b' is no list of whole numbers" in capsys.readouterr().err
