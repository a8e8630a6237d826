"""The experiments by name, and how they are run: each leaves a table, a picture and a paragraph, with their spec.

OUT/NAME/spec.yaml  NAME.parquet  NAME.png, .svg  finding.md  the answer; record.json comes last and says it is whole
OUT/NAME/claims.parquet                                   the verdicts on the paper's claims
OUT/README.md                                             all claims at a glance, and all findings, figures first
OUT/work/NAME, OUT/trials                                 measurements, which the next start reads

The preset real also has models/, plan.json and setting.md, see `bench.experiments.real`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from bench.experiments import real
from bench.experiments.experiment import Answer, Experiment, Setup
from bench.files.folders import LOCK, Hashed, MadeFolders, locked, refuse_foreign
from bench.files.identity import with_spec_hash
from bench.files.origin import origin
from bench.files.spec import read_mapping
from bench.jobs.resources import SweepResources
from bench.report import figures, verdicts
from scoring.errors import UserError, unknown_name
from scoring.files import replacing
from scoring.reading import read_json
from scoring.settings import Naming, named

OF_EXPERIMENTS = ("demo", "decide", "paper")  # the presets that each experiment has in a spec file of its own
PRESETS = (*OF_EXPERIMENTS, real.PRESET)
MARGINS = "margins"  # of a spec file: the smallest effects that matter, for all presets that name none themselves
CLAIMS = "claims.parquet"
SPECS = Path(__file__).parent / "specs"
ALL = "all"
SCHEMA_VERSION = 1
TITLE = "# The paper's figures and tables"
OF_DEMO = (
    "These are few runs, which show what the answers look like: intervals are wide, and most claims open. `mrd-bench "
    "reproduce all --preset decide` has the power to tell."
)

# Each name is a module of this package.
FIGURES = ("fig2", "fig3", "fig4", "fig5", "fig6", "fig7")
TABLES = (
    "table1",
    "table4",
    "table5",
    "table6",
    "table7",
    "table8",
    "table9",
    "table10",
    "table11",
    "table12",
    "table13",
)
# Questions that the paper does not ask; they are run by name.
FURTHER = ("tournament", "samplers", "relapse")
NAMES = (*FIGURES, *TABLES, *FURTHER)
EXPERIMENTS: dict[str, Experiment] = {name: import_module(f"bench.experiments.{name}").EXPERIMENT for name in NAMES}


class _Record(Hashed):
    preset: str
    seconds: float


def reproduce(
    name: str,
    preset: str,
    out: str | Path,
    resources: SweepResources | None = None,
    spec: str | Path | None = None,
    progress: bool = True,
    model: str | None = None,
    data: str | None = None,
    split: str | None = None,
    hours: float | None = None,
) -> list[Path]:
    """Answer a question of the paper, or all of them, and give the folders of the answers.

    Args:
        name: of an experiment, or "all" that are the paper's.
        preset: "demo", on the embedded tasks in minutes; "decide", with the power to tell; "paper", at the paper's
            scale; or "real", on a model of your own.
        out: a folder; the same call continues where it was stopped.
        resources: how trials, and replicas, are spread.
        spec: a file instead of the experiment's own, with a section named like the preset, for one experiment; of the
            preset real with a section for each.
        progress: show bars.
        model, data, split: run the experiment on these instead, where it can be run on any; of the preset real the
            model that is fine-tuned, the task and its forget split.
        hours: of the preset real: for everything.

    Raises:
        UserError: no such experiment or preset, a spec at fault, or `out` holds answers of another preset.
    """
    if preset not in PRESETS:
        raise unknown_name("preset", preset, PRESETS)
    if name != ALL and name not in EXPERIMENTS:
        raise unknown_name("experiment", name, [*EXPERIMENTS, ALL])
    if spec is not None and name == ALL and preset != real.PRESET:
        raise UserError(f"{named('spec')} is for one experiment: name it instead of all")
    if (model is None) != (data is None):
        raise UserError(f"{named('model')} and {named('task')} go together: name both, or none")
    if preset == real.PRESET and model is None:
        raise UserError(
            f"preset {preset}: {named('model')} and {named('task')} are missing: expected a model and a task"
        )
    if preset != real.PRESET and hours is not None:
        raise UserError(f"{named('hours')} is for preset {real.PRESET}: the others have fixed sizes")
    if hours is not None and not 0 < hours < math.inf:
        raise UserError(f"{named('hours')} is {hours:g}: expected a number above 0")
    if preset != real.PRESET and model is not None and (name == ALL or EXPERIMENTS[name].on_model is None):
        able = ", ".join(each for each, experiment in EXPERIMENTS.items() if experiment.on_model)
        raise UserError(
            f"{named('model')} {model}: {name} cannot be run on any model by a flag; {able} can, and others by preset "
            f"{real.PRESET}"
        )
    out = Path(out).absolute()
    chosen = [EXPERIMENTS[each] for each in EXPERIMENTS if each == name or (name == ALL and each not in FURTHER)]
    # All specs are read first, so that a mistake in the last one is not noticed after an hour.
    if preset == real.PRESET:
        fine_tune, setups = _real_setups(chosen, Path(spec or SPECS / "real.yaml"), name, out, resources, progress)
        chosen = [EXPERIMENTS[setup.name] for setup in setups]
    else:
        setups = [
            _setup(each, preset, Path(spec) if spec else SPECS / f"{each.name}.yaml", out, resources, progress)
            for each in chosen
        ]
        if model is not None and data is not None:
            on_model = chosen[0].on_model
            assert on_model is not None
            setups = [replace(setup, values=on_model(setup.values, model, data, split)) for setup in setups]
    refuse_foreign(out / "README.md", TITLE, "answers")
    made = MadeFolders(out / "work")
    with locked(out / "work", out, "run") as lock:
        try:
            if preset == real.PRESET and model is not None and data is not None:
                learned = real.prepare(model, data, split, fine_tune, out, setups[0].resources, progress)
                setups = [replace(setup, stand_ins=learned.stand_ins) for setup in setups]
                folders = real.answered(
                    chosen,
                    setups,
                    real.HOURS if hours is None else hours,
                    learned,
                    lambda experiment, setup: _answer_once(experiment, setup, preset, out, learned.fingerprints),
                    out,
                )
            else:
                folders = [
                    _answer_once(experiment, setup, preset, out)[0]
                    for experiment, setup in zip(chosen, setups, strict=True)
                ]
        except UserError:
            for setup in setups:
                with suppress(OSError):
                    setup.work.rmdir()
            if not any(path.name != LOCK for path in (out / "work").iterdir()):
                Path(lock.lock_file).unlink()
            made.remove_unused()
            raise
        _write_overview(out, preset)
    return folders


def _setup(
    experiment: Experiment, preset: str, path: Path, out: Path, resources: SweepResources | None, progress: bool
) -> Setup:
    sections, lines = read_mapping(path)
    if unknown := next((name for name in sections if name not in (*OF_EXPERIMENTS, MARGINS)), None):
        raise UserError(f"{path}: {unknown_name('preset', str(unknown), OF_EXPERIMENTS)}")
    values = sections.get(preset)
    if not isinstance(values, dict):
        there = ", ".join(name for name in OF_EXPERIMENTS if isinstance(sections.get(name), dict))
        raise UserError(
            f"{path}: no section {preset!r}: expected a mapping of what the experiment is given; there is {there}"
        )
    if MARGINS in sections and MARGINS not in values:
        values = {**values, MARGINS: sections[MARGINS]}
    names = Naming(file=str(path), lines=lines, path=(preset,))
    return _setup_of(experiment, values, names, out, resources, progress)


def _setup_of(
    experiment: Experiment,
    values: Mapping[str, Any],
    names: Naming,
    out: Path,
    resources: SweepResources | None,
    progress: bool,
) -> Setup:
    """What an experiment is run with whose answer goes to `out`."""
    resources = (resources or SweepResources()).checked()
    return Setup(experiment.name, values, names, out / "work" / experiment.name, out / "trials", resources, progress)


def _real_setups(
    chosen: Sequence[Experiment],
    path: Path,
    name: str,
    out: Path,
    resources: SweepResources | None,
    progress: bool,
) -> tuple[Mapping[str, Any], list[Setup]]:
    """The settings of the fine-tuning, and the setups of those experiments that the spec file has; margins are those of
    the experiments' own spec files.

    Raises:
        UserError: a name in the file that is no experiment, or no section of the one that was asked for.
    """
    sections, lines = read_mapping(path)
    for section in sections:
        if section not in (*EXPERIMENTS, real.FINE_TUNE):
            raise UserError(f"{path}: {unknown_name('experiment', str(section), [*EXPERIMENTS, real.FINE_TUNE])}")
    there = [experiment for experiment in chosen if experiment.name in sections]
    if not there:
        able = ", ".join(section for section in sections if section in EXPERIMENTS)
        raise UserError(f"{path}: no section {name!r}: preset {real.PRESET} has {able}")
    setups = []
    for experiment in there:
        own, _ = read_mapping(SPECS / f"{experiment.name}.yaml")
        margins = {MARGINS: own[MARGINS]} if MARGINS in own else {}
        names = Naming(file=str(path), lines=lines, path=(experiment.name,))
        setups.append(_setup_of(experiment, sections[experiment.name] | margins, names, out, resources, progress))
    return sections.get(real.FINE_TUNE, {}), setups


def _answer_once(
    experiment: Experiment, setup: Setup, preset: str, out: Path, fingerprints: Mapping[str, str] | None = None
) -> tuple[Path, float]:
    """Run an experiment unless its answer is there, and give the folder of the answer and the seconds that it took.

    Args:
        fingerprints: of the models that the values name.
    """
    folder = out / experiment.name
    content = {"experiment": experiment.name, "preset": preset, "values": setup.values}
    of_models = {"models": dict(fingerprints)} if fingerprints else {}
    identity = with_spec_hash(content | of_models | {"schema_version": SCHEMA_VERSION}, ())
    path = folder / "record.json"
    if path.is_file():
        record = read_json(path, _Record, f"the record of an answer: remove {folder}, and give the same command again")
        if record["spec_hash"] == identity["spec_hash"]:
            print(f"{experiment.name}: {folder} is there already", flush=True)
            return folder, record["seconds"]
        raise UserError(
            f"{named('out')} {out} holds {experiment.name} by another spec (preset {record['preset']}): choose another "
            f"folder, or remove {folder}"
        )
    print(f"{experiment.name}: {experiment.question}", flush=True)
    started = time.perf_counter()
    setup.work.mkdir(parents=True, exist_ok=True)
    answer = experiment.run(setup)
    folder.mkdir(parents=True, exist_ok=True)
    seconds = time.perf_counter() - started
    _write(experiment, answer, setup, identity, seconds, folder)
    print("\n".join(answer.sentences), flush=True)
    return folder, seconds


def _write(
    experiment: Experiment,
    answer: Answer,
    setup: Setup,
    identity: dict[str, Any],
    seconds: float,
    folder: Path,
) -> None:
    for name, table in {experiment.name: answer.table, **answer.tables}.items():
        with replacing(folder / f"{name}.parquet") as unfinished:
            pq.write_table(table, unfinished)
    inches = answer.inches or (5.0 * len(answer.panels), 5.0)
    if answer.verdicts:
        with replacing(folder / CLAIMS) as unfinished:
            pq.write_table(pa.Table.from_pylist(verdicts.rows(answer.verdicts), verdicts.SCHEMA), unfinished)
    for suffix in ("png", "svg"):
        with replacing(folder / f"{experiment.name}.{suffix}") as unfinished:
            figures.picture(answer.panels, unfinished, inches, polar=answer.polar)
    with replacing(folder / "spec.yaml") as unfinished:
        unfinished.write_text(yaml.safe_dump({identity["preset"]: setup.values}, sort_keys=False), encoding="utf-8")
    with replacing(folder / "finding.md") as unfinished:
        unfinished.write_text(_finding(experiment, answer), encoding="utf-8")
    with replacing(folder / "record.json") as unfinished:
        unfinished.write_text(json.dumps(identity | {"seconds": seconds} | origin(), indent=2) + "\n")


def _finding(experiment: Experiment, answer: Answer) -> str:
    parts = [
        f"## {experiment.name}: {experiment.title}",
        experiment.question,
        f"*The paper:* {experiment.claim}",
        f"![{experiment.title}]({experiment.name}.png)",
        *answer.sentences,
    ]
    if answer.verdicts:
        parts.append(verdicts.as_table(verdicts.rows(answer.verdicts)))
    return "\n\n".join(parts) + "\n"


def _anchor(title: str) -> str:
    """The end of the address of a heading, as Markdown pages make it."""
    return "".join(letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter == "-")


def _write_overview(out: Path, preset: str) -> None:
    """Write README.md with every claim at a glance, and every finding in the folder."""
    finished = [name for name in EXPERIMENTS if (out / name / "record.json").is_file()]
    parts = [f"{TITLE}, preset {preset}\n", *([f"{OF_DEMO}\n"] if preset == "demo" else [])]
    if (out / real.SETTING).is_file():
        parts.append((out / real.SETTING).read_text(encoding="utf-8"))
    claims = [
        {"experiment": f"[{name}](#{name}-{_anchor(EXPERIMENTS[name].title)})"} | row
        for name in finished
        if name not in FURTHER and (out / name / CLAIMS).is_file()
        for row in pq.read_table(out / name / CLAIMS).to_pylist()
    ]
    if claims:
        parts.append(
            f"## The paper's claims at a glance\n\n{verdicts.summary(claims)}\n\n{verdicts.GLANCE}\n\n"
            f"{verdicts.as_table(claims)}\n"
        )
    for name in finished:
        text = (out / name / "finding.md").read_text(encoding="utf-8")
        parts.append(text.replace(f"]({name}.png)", f"]({name}/{name}.png)"))
    with replacing(out / "README.md") as unfinished:
        unfinished.write_text("\n".join(parts), encoding="utf-8")
