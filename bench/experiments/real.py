"""The preset real: the paper's questions put to a pretrained model of your own, within a number of hours.

    model --learns forget and retain set--> OUT/models/original      what is to forget
          --learns the retain set alone---> OUT/models/retain-only   never saw the forget set: the gold standard
    a few trials of every sweep ----------> OUT/plan.json            how many selections there is time for

Trials are timed on the models and the machine themselves, and are part of the sweeps later on. Experiments without
sweeps have one size, and are run before that. The plan is made once: the same command goes on by it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.experiments.experiment import Experiment, Setup
from bench.files.status import FINISHED
from bench.jobs.evaluate import evaluate_spec
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.resources import SweepResources
from bench.jobs.train import fine_tuned
from bench.models.find import absolute_model, find_model
from bench.report.words import decimal, markdown_table
from bench.tasks.datasets import absolute_source, find_task, load_dataset
from bench.tasks.task import Task
from scoring.cluster import connect, how_many_fit
from scoring.errors import UserError
from scoring.files import replacing
from scoring.reading import read_json
from scoring.settings import named

PRESET = "real"
HOURS = 6.0
SETTING = "setting.md"
FINE_TUNE = "fine_tune"  # the section of the spec file that says how the models learn the task
LEAST = 10  # selections of a sweep: with fewer there are hardly any intervals
PILOTS = 3  # selections by which a sweep is timed
KNOWN = ("ma", "forget_probability", "retain_probability")  # metrics that say what a model knows


@dataclass(frozen=True)
class RealModel:
    """A model and a task, and what they are turned into.

    Attributes:
        stand_ins: the name of a place in the spec file -> what stands there: a folder, a task or a split.
        fingerprints: of the models, by name.
        seconds: that fine-tuning took.
        knowledge: how well the models know the task, in words.
    """

    stand_ins: Mapping[str, str]
    fingerprints: Mapping[str, str]
    seconds: float
    knowledge: str


def prepare(
    model: str,
    data: str,
    split: str | None,
    settings: Mapping[str, Any],
    out: Path,
    resources: SweepResources,
    progress: bool,
) -> RealModel:
    """Let the model learn the task, with and without its forget set; or read what an earlier start has made.

    Args:
        model, data, split: the model, the task and its forget split.
        settings: of the fine-tuning, fields of UnlearnSpec.
        out: the folder of the answers.

    Raises:
        UserError: the task has no such split, or no retain set that goes with it; or see `fine_tuned`.
    """
    model, data = absolute_model(model), absolute_source(data)
    task, _ = find_task(data)
    forget, retain = splits_of(task, data, split)
    base = find_model(model)
    sets = {name: load_dataset(data, name, base.tokenizer).records for name in (forget, retain)}
    # In this process where the trials are, too.
    settings = ({"workers": 0} if resources.in_this_process else {}) | dict(settings)
    runs = {
        name: fine_tuned(model, records, settings, out / "models" / name, progress)
        for name, records in (("original", [*sets[forget], *sets[retain]]), ("retain-only", sets[retain]))
    }
    folders = {"base": model} | {name.replace("-", "_"): str(run.model) for name, run in runs.items()}
    return RealModel(
        folders | {"task": data, "forget": forget, "retain": retain},
        {name: find_model(folder).fingerprint for name, folder in folders.items()},
        sum(sum(run.record["seconds"].values()) for run in runs.values()),
        _of_models(folders, task, data, forget, sets, out, resources),
    )


def splits_of(task: Task, data: str, split: str | None) -> tuple[str, str]:
    """The forget split, and the retain split that goes with it.

    Raises:
        UserError: there is none.
    """
    forget = split or task.default_split
    if forget not in task.retain_of:
        known = ", ".join(task.retain_of) or "none of this task"
        raise UserError(
            f"{named('task')} {data}: no retain set goes with split {forget!r}, which is needed for the retain-only "
            f"model: expected one of {known}"
        )
    return forget, task.retain_of[forget]


def _of_models(
    folders: Mapping[str, str],
    task: Task,
    data: str,
    forget: str,
    sets: Mapping[str, Sequence[Any]],
    out: Path,
    resources: SweepResources,
) -> str:
    """What the models know of the task, as a table."""
    metrics = [name for name in KNOWN if name in (*task.completeness, *task.utility, *task.further)]
    rows = []
    for name, folder in folders.items():
        spec = EvaluateSpec(model=folder, task=data, split=forget, metrics=",".join(metrics), samples=100)
        known = evaluate_spec(spec, out / "models" / f"{name}-known.parquet", resources.replicas(), progress=False)
        values = dict(zip(known.metrics["name"], known.metrics["value"], strict=True))
        rows.append([name.replace("_", "-"), *(decimal(values[metric], 3) for metric in metrics)])
    head = ["model", *(metric.replace("_", " ") for metric in metrics)]
    learned = " and ".join(f"{len(records)} samples of {name}" for name, records in sets.items())
    return (
        f"The original has learned {learned}, the retain-only model the latter alone.\n\n{markdown_table(head, rows)}"
    )


# --- Sizes -----------------------------------------------------------------------------------------------------------


def sweeps_in(values: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The sections of an experiment that are sweeps over a number of selections that can be chosen. Where the task is
    made only when the experiment runs there is nothing to time beforehand."""
    return {
        key: section
        for key, section in values.items()
        if isinstance(section, Mapping)
        and "task" in section.get("base", {})
        and any("count" in each for each in section.get("selections", []))
    }


def sized(values: Mapping[str, Any], share: float) -> dict[str, Any]:
    """The same sections with a share of the selections of their sweeps, but at least LEAST."""
    fewer = {
        key: _with_counts(section, lambda count: _part(count, share)) for key, section in sweeps_in(values).items()
    }
    return {**values, **fewer}


def _part(count: int, share: float) -> int:
    """A share of so many selections, but at least LEAST where there are as many."""
    return max(min(LEAST, count), math.floor(share * count))


def _with_counts(section: Mapping[str, Any], of: Callable[[int], int]) -> dict[str, Any]:
    """The sweep with other numbers of selections, where there is a number.

    Args:
        of: a number of selections -> the other one.
    """
    selections = [{**each, "count": of(each["count"])} if "count" in each else each for each in section["selections"]]
    return {**section, "selections": selections}


def _pilot(section: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep with the first seed, and few selections."""
    vary = {name: values[:1] if name == "seed" else values for name, values in section.get("vary", {}).items()}
    return _with_counts({**section, "vary": vary}, lambda count: min(PILOTS, count))


@dataclass(frozen=True)
class Timed:
    """A sweep, and what one of its selections takes.

    Attributes:
        experiment, key: which sweep.
        counts: of selections, by description, at full size.
        seconds: of all trials of one selection.
    """

    experiment: str
    key: str
    counts: Sequence[int]
    seconds: float

    def selections(self, share: float) -> int:
        return sum(_part(count, share) for count in self.counts)


def timed_of(setup: Setup) -> list[Timed]:
    """Run a few trials of every sweep of an experiment."""
    found = []
    for key, section in sweeps_in(setup.values).items():
        pilot = dataclasses.replace(setup, values={f"pilot-{key}": _pilot(section)})
        # Which samples are singled out depends on their number; all else finds its trials again.
        trials = pilot.sweep(f"pilot-{key}").trials.to_pylist()
        finished = [row for row in trials if row["status"] == FINISHED]
        if not finished:
            raise UserError(f"{setup.name}, {key}: no trial has finished, so that there is nothing to plan with")
        seeds = len(section.get("vary", {}).get("seed", [0]))
        each = sum(row["seconds"] for row in finished) / len(finished) * len(trials) * seeds
        described = pilot.values[f"pilot-{key}"]["selections"]
        of_one = each / sum(selection.get("count", 1) for selection in described)
        counts = [selection.get("count", 1) for selection in section["selections"]]
        found.append(Timed(setup.name, key, counts, of_one))
    return found


def share_for(timed: Sequence[Timed], seconds: float, at_once: int) -> float:
    """The largest share of all selections that there is time for, in (0, 1].

    Args:
        seconds: that there are.
        at_once: trials that run side by side.

    Raises:
        UserError: there is not even time for LEAST selections of each.
    """

    def takes(share: float) -> float:
        return sum(sweep.seconds * sweep.selections(share) for sweep in timed) / at_once

    if takes(0.0) > seconds:
        raise UserError(
            f"{named('hours')} leaves {max(seconds, 0) / 3600:.2f} h for the sweeps, and {LEAST} selections of each "
            f"take {takes(0.0) / 3600:.2f} h: give {math.ceil((takes(0.0) - seconds) / 360) / 10:.1f} h more, or name "
            "one experiment instead of all; what has been done is kept"
        )
    return max(step / 1000 for step in range(1001) if takes(step / 1000) <= seconds)


def planned(setups: Sequence[Setup], hours: float, spent: float, out: Path) -> tuple[list[Setup], str]:
    """The same experiments with sizes for the time, and the plan in words; as an earlier start has planned it.

    Args:
        hours: for everything.
        spent: seconds of them.
        out: the folder of the answers.

    Raises:
        UserError: there is too little time, or another plan in `out`.
    """
    path = out / "plan.json"
    asked = {"hours": hours, "experiments": [setup.name for setup in setups]}
    if path.is_file():
        plan = read_json(path, dict[str, Any], f"a plan: remove {path}, and the same command makes it again")
        if {name: plan[name] for name in asked} != asked:
            raise UserError(
                f"{named('out')} {out} is planned for {plan['hours']:g} hours and {', '.join(plan['experiments'])}: "
                f"give the same, choose another folder, or remove {path}"
            )
    else:
        timed = [each for setup in setups for each in timed_of(setup)]
        at_once = _at_once(setups[0].resources) if setups else 1
        share = share_for(timed, 3600 * hours - spent, at_once)
        rows = [dataclasses.asdict(each) | {"selections": each.selections(share)} for each in timed]
        plan = asked | {"spent_seconds": spent, "at_once": at_once, "share": share, "sweeps": rows}
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    lines = [
        [row["experiment"], row["key"], str(row["selections"]), str(sum(row["counts"])), f"{row['seconds']:.1f}"]
        for row in plan["sweeps"]
    ]
    head = ["experiment", "sweep", "selections", "at most", "seconds a selection"]
    words = (
        f"Planned for {hours:g} hours, of which {plan['spent_seconds'] / 3600:.2f} h were gone before any sweep; "
        f"trials run {plan['at_once']} at a time.\n\n{markdown_table(head, lines)}"
    )
    return [dataclasses.replace(setup, values=sized(setup.values, plan["share"])) for setup in setups], words


def _at_once(resources: SweepResources) -> int:
    """How many trials run side by side."""
    if resources.in_this_process:
        return 1
    connect()
    fit = how_many_fit(resources.footprint(), "trial")
    return min(resources.concurrent or fit, fit)


def answered(
    experiments: Sequence[Experiment],
    setups: Sequence[Setup],
    hours: float,
    real: RealModel,
    answer: Callable[[Experiment, Setup], tuple[Path, float]],
    out: Path,
) -> list[Path]:
    """Answer the questions: those without sweeps first, then the others at the size that there is time for.

    Args:
        answer: gives the folder of an answer, and the seconds that it took.
        out: the folder of the answers, which gets setting.md, the words about models and plan.
    """
    pairs = list(zip(experiments, setups, strict=True))
    at_one_size = [pair for pair in pairs if not sweeps_in(pair[1].values)]
    swept = [pair for pair in pairs if sweeps_in(pair[1].values)]
    done = [answer(*pair) for pair in at_one_size]
    spent = real.seconds + sum(seconds for _, seconds in done)
    ready, words = planned([setup for _, setup in swept], hours, spent, out)
    with replacing(out / SETTING) as unfinished:
        unfinished.write_text("\n\n".join(["## The models", real.knowledge, "## The plan", words]) + "\n")
    print(words, flush=True)
    return [folder for folder, _ in done] + [
        answer(experiment, setup)[0] for (experiment, _), setup in zip(swept, ready, strict=True)
    ]
