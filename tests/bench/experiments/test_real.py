"""The preset real: models that learn the task, sizes for the time that there is, answers on a model of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cli import main
from bench.experiments import real, reproduce
from bench.experiments.real import Timed, share_for, sized
from bench.files.spec import read_mapping
from bench.jobs.sweep_plan import SweepSpec
from scoring.errors import UserError
from scoring.settings import build
from tests.tiny_tofu import records, write_task

SPEC = """
fine_tune: {learning_rate: 1e-2, max_steps: 4, batch_size: 4}
fig5:
  alone:
    base: {model: "{original}", task: "{task}", forget_split: "{forget}", batch_size: 1, max_steps: 2,
           learning_rate: 1e-3, algorithm: GA, check_every: 1, check_unit: steps, evaluate: false}
    selections:
      - {kind: single, count: 12}
"""


def test_a_share_of_the_selections_is_as_large_as_there_is_time_for() -> None:
    """By hand: two sweeps of 40 and 400 selections at 9 and 1.8 s each. All take 360 + 720 s; at 540 s half does, two
    at once need half the time; and the least is 10 + 10 selections, 108 s."""
    sweeps = [Timed("a", "sweep", [40], 9.0), Timed("b", "sweep", [400], 1.8)]
    assert share_for(sweeps, 1080, 1) == 1.0
    assert share_for(sweeps, 540, 1) == pytest.approx(0.5, abs=0.005)
    assert share_for(sweeps, 540, 2) == 1.0
    assert [sweep.selections(0.5) for sweep in sweeps] == [20, 200]
    assert [sweep.selections(0.0) for sweep in sweeps] == [10, 10]
    assert share_for(sweeps, 108, 1) < 0.03
    with pytest.raises(UserError, match=r"hours leaves 0\.03 h .* take 0\.03 h: give 0\.1 h more"):
        share_for(sweeps, 107, 1)


def test_only_the_number_of_selections_is_changed() -> None:
    values = {
        "sweep": {"base": {"task": "t"}, "selections": [{"kind": "random", "size": 4, "count": 40}]},
        "few": {"base": {"task": "t"}, "selections": [{"kind": "single", "count": 6}]},
        "later": {"base": {}, "selections": [{"kind": "single", "count": 40}]},
        "margins": {"count": 0.1},
    }
    fewer = sized(values, 0.5)
    assert fewer["sweep"]["selections"] == [{"kind": "random", "size": 4, "count": 20}]
    assert {name: fewer[name] for name in ("few", "later", "margins")} == {
        name: values[name] for name in ("few", "later", "margins")
    }


def test_sweeps_of_the_spec_are_sound() -> None:
    sections = read_mapping(reproduce.SPECS / "real.yaml")[0]
    assert sections.keys() - {real.FINE_TUNE} <= reproduce.EXPERIMENTS.keys()
    sweeps = [section for values in sections.values() for section in values.values() if isinstance(section, dict)]
    for section in sweeps:
        if "base" in section:
            build(SweepSpec, section).checked()


def test_a_model_of_ones_own_learns_and_is_asked(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too little time is said in a line; with more the same command goes on, and a third time nothing is done."""
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path)
    (tmp_path / "real.yaml").write_text(SPEC)
    command = ["reproduce", "all", "--preset", "real", "--model", str(model_folder), "--task", "tiny.yaml"]
    command += ["--spec", "real.yaml", "--out", "out", "--concurrent", "0"]
    assert main([*command, "--hours", "nan"]) == 2
    assert "--hours is nan: expected a number above 0" in capsys.readouterr().err
    assert main([*command, "--hours", "1e-9"]) == 2
    assert "what has been done is kept" in capsys.readouterr().err
    assert main([*command, "--hours", "1"]) == 0

    taught = {
        name: [json.loads(line)["id"] for line in (tmp_path / "out" / "models" / name / "taught.jsonl").open()]
        for name in ("original", "retain-only")
    }
    forget, retain = ([record["id"] for record in records(name)] for name in ("forget", "retain"))
    assert taught == {"original": forget + retain, "retain-only": retain}

    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["share"] == 1.0
    spec = (tmp_path / "out" / "fig5" / "spec.yaml").read_text()
    assert '"{original}"' in spec.replace("'", '"')
    assert str(tmp_path) not in spec
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| retain-only |" in page
    assert "Planned for 1 hours" in page
    assert str(tmp_path) not in page

    capsys.readouterr()
    assert main([*command, "--hours", "1"]) == 0
    assert "is there already" in capsys.readouterr().out
    assert main([*command, "--hours", "2"]) == 2
    assert "is planned for 1 hours" in capsys.readouterr().err
    assert main(["reproduce", "fig5", "--preset", "demo", "--hours", "1"]) == 2
    assert main(["reproduce", "fig5", "--preset", "real"]) == 2
    assert "--model and --task are missing" in capsys.readouterr().err
