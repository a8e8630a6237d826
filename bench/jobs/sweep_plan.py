"""What a sweep runs: its spec, checked, and the trials that it means.

spec -> model, forget set -> selections, by MRD where they are -> a trial for every configuration and selection
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow.compute as pc

from algorithms.stopping import PAPER, Thresholds, measure_memorization
from bench.files.identity import identity_fields, with_spec_hash
from bench.jobs.attack_spec import AttackSpec
from bench.jobs.difficulty import DifficultySpec, difficulty
from bench.jobs.evaluate import EvaluationResult, evaluate_spec
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.resources import SweepResources
from bench.jobs.score import ScoreSpec, score
from bench.jobs.trial import Trial, make_trial
from bench.jobs.unlearn import UnlearnSpec, datasets_of, with_absolute_paths
from bench.metrics.table import MODEL, ORIGINAL, RETAIN_ONLY, Columns, columns_in
from bench.models.find import ModelReference, find_model
from bench.tasks.datasets import Dataset, find_task, is_data_file, load_dataset, subject
from bench.tasks.selections import Selection, SelectionSpec, needs_difficulty, select, write_selections
from scoring.errors import UserError, expected_one_of, unknown_name
from scoring.files import replacing
from scoring.load import load_model
from scoring.reading import read_json
from scoring.samples import answer_end, encode
from scoring.settings import Doc, Ge, build, check, current_naming, named, naming, settings_of
from scoring.templates import TEMPLATE_FIELDS

SCHEMA_VERSION = 1
OBJECTIVES = ("completeness", "utility", "balance")
# Settings of a run that a sweep does not vary: its samples, and what it continues.
NOT_SWEPT = ("selection", "adapter", "requests")
RANGES = ("uniform", "log_uniform", "integers")


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """What is swept."""

    ADDED_LATER: ClassVar = ("arms", "forecast", "attack")

    base: Annotated[dict[str, Any], Doc("settings of `unlearn`, by name, that all trials share")]
    vary: Annotated[
        dict[str, Any],
        Doc("setting -> list of values; of a search also {uniform: [a, b]}, {log_uniform: ...}, {integers: ...}"),
    ] = field(default_factory=dict)
    arms: Annotated[
        dict[str, dict[str, Any]],
        Doc(
            "name -> settings that go together, over those of base; each configuration is run with each (default: none)"
        ),
    ] = field(default_factory=dict)
    selections: Annotated[
        list[dict[str, Any]],
        Doc("which samples are forgotten, see the next table; each configuration is run on each (default: all)"),
    ] = field(default_factory=list)
    search: Annotated[
        Literal["grid", "random", "optuna"], Doc("grid crosses all values; the others draw `trials` configurations")
    ] = "grid"
    trials: Annotated[int | None, Ge(1), Doc("configurations of a search")] = None
    objective: Annotated[
        str,
        Doc(
            "what a search and a scheduler maximise: completeness (1 - ROUGE-L recall on the forget set), utility (the "
            "same recall on the retain set), balance (their harmonic mean) or, with optuna, a metric of the task"
        ),
    ] = "balance"
    scheduler: Annotated[
        Literal["none", "asha"], Doc("asha stops trials that are behind after an epoch; their rows say so")
    ] = "none"
    grace_epochs: Annotated[int, Ge(1), Doc("of asha: epochs before it stops any")] = 1
    reduction: Annotated[int, Ge(2), Doc("of asha: one in so many goes on")] = 3
    evaluate: Annotated[
        dict[str, Any], Doc("settings of `evaluate`, by name: metrics of the task, measured at the end (default: none)")
    ] = field(default_factory=dict)
    attack: Annotated[
        dict[str, Any], Doc("settings of `attack`, by name: what each trial's model meets at the end (default: none)")
    ] = field(default_factory=dict)
    each_epoch: Annotated[bool, Doc("measure them after every epoch")] = False
    thresholds: Annotated[
        Literal["selection", "split"],
        Doc("a sample counts as forgotten below the averages over its selection, or over the whole split"),
    ] = "selection"
    keep_models: Annotated[bool, Doc("save the model of every trial")] = False
    forecast: Annotated[
        bool,
        Doc("measure the flip time of every forget sample too, for ranks at equal forecast: 4 forward passes a sample"),
    ] = False
    seed: Annotated[int, Ge(0), Doc("of the search")] = 0

    def checked(self) -> Self:
        """The same.

        Raises:
            UserError: a value that cannot be, an unknown field or a combination that does not exist.
        """
        check(self)
        if (self.trials is None) != (self.search == "grid"):
            raise UserError(
                f"{named('trials')} is {self.trials or 'missing'}: expected a number of configurations for search "
                "random and optuna, and none for grid, which runs all"
            )
        if self.scheduler == "asha" and self.search == "optuna":
            raise UserError(
                f"{named('scheduler')} asha and {named('search')} optuna exclude each other: a configuration is run on "
                "all selections, and compared by their mean"
            )
        if self.scheduler == "asha" and self.objective not in OBJECTIVES:
            raise UserError(
                f"{named('objective')} of scheduler asha is {self.objective!r}: "
                f"{expected_one_of(self.objective, OBJECTIVES)}"
            )
        names = [setting.name for setting in settings_of(UnlearnSpec) if setting.name not in NOT_SWEPT]
        called = current_naming().under("vary")
        for name, values in self.vary.items():
            if name not in names:
                raise UserError(f"{called.start(name)}unknown field {name!r}: {expected_one_of(name, names)}")
            if name in self.base:
                raise UserError(f"{called(name)} is in base as well: expected it in one of them")
            if name in UnlearnSpec.EXECUTION:
                raise UserError(f"{called(name)} does not change what a trial ends with: set it in base")
            if name in TEMPLATE_FIELDS:
                raise UserError(f"{called(name)} is the same for all trials, which are compared: set it in base")
            _check_values(called(name), values, self.search)
        self._check_arms(names)
        if "selection" in self.base:
            raise UserError(f"{current_naming().under('base')('selection')} is set: name the samples under selections")
        if "requests" in self.base:
            raise UserError(
                f"{current_naming().under('base')('requests')} is set: requests that come one after the other are a "
                "run of unlearn; name the samples under selections"
            )
        if "adapter" in self.base:
            raise UserError(
                f"{current_naming().under('base')('adapter')} is set: an adapter is continued by unlearn alone; as the "
                "model, its folder is merged and trained whole"
            )
        for section in ("evaluate", "attack"):
            for name in ("model", "task", "split", *TEMPLATE_FIELDS):
                if name in getattr(self, section):
                    where = current_naming().under(section)(name)
                    raise UserError(f"{where} is that of the trials: leave it out")
        for name in ("original", "retain_model", "selection"):
            if name in self.attack:
                where = current_naming().under("attack")(name)
                raise UserError(f"{where} is not for trials: `mrd-bench attack` sets models side by side; leave it out")
        self.selection_specs()
        return self

    def _check_arms(self, names: Sequence[str]) -> None:
        if self.arms and self.search == "optuna":
            raise UserError(f"{named('arms')} and {named('search')} optuna exclude each other: all arms are run")
        for arm, fields in self.arms.items():
            called = current_naming().under("arms", arm)
            for name in fields:
                if name not in names:
                    raise UserError(f"{called.start(name)}unknown field {name!r}: {expected_one_of(name, names)}")
                if name in self.vary:
                    raise UserError(f"{called(name)} is in vary as well: expected it in one of them")
                if name in (*UnlearnSpec.EXECUTION, *TEMPLATE_FIELDS, "model", "task", "forget_split"):
                    raise UserError(f"{called(name)} is the same for all arms: set it in base")

    def selection_specs(self) -> list[SelectionSpec]:
        specs = []
        for number, fields in enumerate(self.selections):
            with naming(current_naming().under("selections", number)):
                specs.append(build(SelectionSpec, fields).checked())
        return specs or [SelectionSpec(kind="all").checked()]


def _check_values(called: str, values: Any, search: str) -> None:
    if isinstance(values, list):
        if not values:
            raise UserError(f"{called} is an empty list: expected values")
        if any(values.count(value) > 1 for value in values):
            raise UserError(f"{called} has a value twice: expected each once")
        return
    if not isinstance(values, dict) or len(values) != 1 or (kind := next(iter(values))) not in RANGES:
        raise UserError(f"{called} is no list: expected values, or one of {', '.join(RANGES)} with [low, high]")
    if search == "grid":
        raise UserError(f"{called} is a range: expected a list of values for search grid")
    ends = values[kind]
    numbers = isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    if not numbers or not ends[0] < ends[1] or (kind == "log_uniform" and ends[0] <= 0):
        raise UserError(f"{called}: {kind} is {ends}: expected [low, high] with low < high, above 0 on a log scale")
    if kind == "integers" and any(end != int(end) for end in ends):
        raise UserError(f"{called}: integers is {ends}: expected whole numbers")


class SweepPlan:
    """A sweep made ready: its models, data and selections, and the trial of every configuration.

    Attributes:
        spec: checked.
        out: the sweep's folder.
        identity: of the sweep, with its hash.
        model, dataset: those of `base`; the forget set before selection.
        mrd: by sample id, of the forget set under the model; {} until `choose`.
        flip_time: the same, in updates; {} where it is not asked for.
        arms: the arm of each trial by its hash, if there are arms.
        selections: {} until `choose`, by name.
    """

    def __init__(self, spec: SweepSpec, out: Path) -> None:
        self.spec, self.out = _with_absolute_paths(spec), out
        # A configuration of the first values, so that a mistake in base or vary is found before anything is done.
        firsts = {name: _first(values) for name, values in spec.vary.items()}
        first = self.unlearn_spec(firsts)
        for fixed in ("model", "task", "forget_split"):
            if fixed in spec.vary and spec.vary[fixed] != [getattr(first, fixed)] and spec.selections:
                raise UserError(
                    f"{current_naming().under('vary')(fixed)} is swept, and selections are of one forget set and "
                    "model: give each a sweep"
                )
        self.base = first
        for name, values in self.spec.vary.items():
            for value in values if isinstance(values, list) else next(iter(values.values())):
                self.unlearn_spec(firsts | {name: value})
        for arm in spec.arms:
            self.unlearn_spec(firsts, arm)
        self.model: ModelReference = find_model(self.base.model)
        self.dataset: Dataset = load_dataset(
            self.base.task, self.base.forget_split, self.model.tokenizer, self.base.chosen_template()
        )
        self.evaluation = self._evaluation()
        self.attack = self._attack()
        self._check_objective()
        self.mrd: dict[str, float] = {}
        self.flip_time: dict[str, float] = {}
        self.arms: dict[str, str] = {}
        self.selections: dict[str, Selection] = {}
        self.paths: dict[str, Path] = {}
        self.thresholds: dict[str, Any] = {}
        self.references: dict[str, Columns] = {}
        self.reference_fingerprints: list[str] = []
        base = {name: value for name, value in spec.base.items() if name not in UnlearnSpec.EXECUTION}
        content = identity_fields(spec) | {
            "base": base,
            "schema_version": SCHEMA_VERSION,
            "model_fingerprint": self.model.fingerprint,
            "forget_sha256": self.dataset.sha256,
        }
        self.identity = with_spec_hash(content, ())

    def unlearn_spec(self, values: Mapping[str, Any], arm: str | None = None) -> UnlearnSpec:
        """A configuration's run, on the whole forget set, in the trial's own process unless it says otherwise."""
        of_arm = {} if arm is None else self.spec.arms[arm]
        # Thresholds of the whole split replace the averages of that rule.
        fixed = {"stopping": PAPER} if self.spec.thresholds == "split" else {}
        with self._naming(values, arm):
            return build(UnlearnSpec, {"workers": 0} | fixed | self.spec.base | of_arm | dict(values)).checked()

    def _naming(self, values: Mapping[str, Any], arm: str | None) -> AbstractContextManager[None]:
        """Within the context settings are called as the sweep's file has them: under vary, arms or base."""
        names = current_naming()
        parts: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [(("base",), self.spec.base), (("vary",), values)]
        if arm is not None:
            parts.append((("arms", arm), self.spec.arms[arm]))
        lines: dict[tuple[str | int, ...], int] = {
            ("base", name): names.lines[*names.path, *part, name]
            for part, fields in parts
            for name in fields
            if (*names.path, *part, name) in names.lines
        }
        return naming(dataclasses.replace(names, lines=lines, path=("base",)))

    def _check_objective(self) -> None:
        """Refuse a search or scheduler whose objective is not measured."""
        spec, objective = self.spec, self.spec.objective
        if spec.scheduler == "none" and spec.search != "optuna":
            return
        if spec.scheduler == "asha" and self.base.epochs is None:
            raise UserError("scheduler asha: expected a number of epochs in base, after which trials are compared")
        if objective in OBJECTIVES:
            _, retain = datasets_of(self.base, self.model.tokenizer)
            if not self.base.evaluate or (retain is None and objective != "completeness"):
                raise UserError(
                    f"objective {objective}: expected evaluate: true in base, and a retain set to measure it"
                )
        elif self.evaluation is None or objective not in self.evaluation.metrics_of(find_task(self.base.task)[0]):
            known = [*OBJECTIVES, *(self.evaluation.metrics or "").split(",")] if self.evaluation else OBJECTIVES
            raise unknown_name("objective", objective, known)

    @property
    def subject(self) -> str:
        """For a progress bar."""
        return subject(self.base.model, self.base.task, self.base.forget_split)

    @property
    def _template(self) -> dict[str, Any]:
        """The settings of the template, which all that is measured shares."""
        return {name: getattr(self.base, name) for name in TEMPLATE_FIELDS}

    def _evaluation(self) -> EvaluateSpec | None:
        if not self.spec.evaluate:
            return None
        if is_data_file(self.base.task):
            raise UserError(f"evaluate: {self.base.task!r} is a data file, and has no metrics; expected a task in base")
        fixed = {"model": self.base.model, "task": self.base.task, "split": self.base.forget_split} | self._template
        with naming(current_naming().under("evaluate")):
            evaluation = build(EvaluateSpec, self.spec.evaluate | fixed).checked()
        evaluation.metrics_of(find_task(evaluation.task)[0])
        return evaluation

    def _attack(self) -> AttackSpec | None:
        if not self.spec.attack:
            return None
        if is_data_file(self.base.task):
            raise UserError(f"attack: {self.base.task!r} is a data file, and has no metrics; expected a task in base")
        fixed = {"model": self.base.model, "task": self.base.task, "split": self.base.forget_split} | self._template
        with naming(current_naming().under("attack")):
            attack = build(AttackSpec, self.spec.attack | fixed).checked()
            attack.metrics_of(find_task(attack.task)[0])
        return attack

    def choose(self, resources: SweepResources) -> None:
        """Draw the selections, by MRD where they are by MRD; measure what all trials are compared with."""
        specs = self.spec.selection_specs()
        if not needs_difficulty(specs):
            select(specs, self.dataset, {})  # a selection that cannot be drawn is refused before anything is measured
        if self.spec.selections:
            # Also where it does not decide who is selected: the difficulty of every selection is part of the result.
            scores = score(
                ScoreSpec(
                    model=self.base.model,
                    data=self.base.task,
                    split=self.base.forget_split,
                    estimator="gradient",
                    **self._template,
                ),
                self.out / "difficulty.parquet",
                resources.replicas(),
                progress=False,
            ).table
            self.mrd = dict(zip(scores["sample_id"].to_pylist(), scores["mrd"].to_pylist(), strict=True))
        if self.spec.forecast:
            self.flip_time = self._flip_times(resources)
        chosen = select(specs, self.dataset, self.mrd)
        self.selections = {selection.name: selection for selection in chosen}
        self.paths = write_selections(chosen, self.mrd, self.out, self.flip_time)
        if self.spec.thresholds == "split":
            self.thresholds = self._split_thresholds()
        if self.evaluation is not None:
            self._measure_references(self.evaluation, resources)

    def choose_without_measuring(self, folder: Path) -> None:
        """The same as if all samples were equally difficult, and nothing had to be compared: for a look at the trials.

        Args:
            folder: for the selections, in place of the sweep's own.
        """
        mrd = dict.fromkeys((text.sample_id for text in self.dataset.texts), 1.0)
        chosen = select(self.spec.selection_specs(), self.dataset, mrd)
        self.selections = {selection.name: selection for selection in chosen}
        self.paths = write_selections(chosen, mrd, folder)

    def _flip_times(self, resources: SweepResources) -> dict[str, float]:
        """Flip time of each forget sample: of gradient ascent on it alone by AdamW, until its MA is below the average.

        One number a sample, whatever the algorithms of the trials, as MRD is: it is a difficulty of the sample. The
        learning rate is that of base, or the first in vary.
        """
        measured = difficulty(
            DifficultySpec(
                model=self.base.model,
                data=self.base.task,
                split=self.base.forget_split,
                measure=["flip-time"],
                learning_rate=self.base.learning_rate,
                batch_tokens=self.base.batch_tokens,
                **self._template,
            ),
            self.out / "forecast.parquet",
            resources.replicas(),
            progress=False,
        ).table
        ids, times = measured["sample_id"].to_pylist(), measured["flip-time@average"].to_pylist()
        return dict(zip(ids, times, strict=True))

    def _split_thresholds(self) -> dict[str, Any]:
        """MA and EL that a forgotten sample is below: the averages over the whole split on the initial model."""
        path = self.out / "thresholds.json"
        if not path.is_file():
            samples, _ = encode(self.dataset.texts, self.model.tokenizer, self.model.max_length)
            model = load_model(self.model.source, revision=self.model.revision)
            samples = [dataclasses.replace(sample, index=i) for i, sample in enumerate(samples)]
            ends = answer_end(self.model.tokenizer, samples)
            look = measure_memorization(model, samples, self.base.el_n, ends, self.base.batch_tokens)
            averages = Thresholds.from_initial(look.ma, look.el)
            thresholds = {"ma_threshold": averages.ma}
            if not math.isnan(averages.el):
                thresholds["el_threshold"] = averages.el
            with replacing(path) as unfinished:
                unfinished.write_text(json.dumps(thresholds))
        return read_json(path, dict[str, float], "thresholds: remove it, and the same command measures them again")

    def _measure_references(self, evaluation: EvaluateSpec, resources: SweepResources) -> None:
        """The original model, and the retain-only one where there is one, on all samples that any selection has."""
        spec = dataclasses.replace(evaluation, original=self.base.model)
        if self.spec.selections:
            used = {name for selection in self.selections.values() for name in selection.ids}
            everyone = self.out / "selections" / "any.txt"
            with replacing(everyone) as unfinished:
                ids = [text.sample_id for text in self.dataset.texts if text.sample_id in used]
                unfinished.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
            spec = dataclasses.replace(spec, selection=str(everyone))
        result = evaluate_spec(spec, self.out / "reference.parquet", resources.replicas(), progress=False)
        self.references = _columns(result)
        self.reference_fingerprints = [
            fingerprint for role, fingerprint in result.record["spec"]["fingerprints"].items() if role != MODEL
        ]

    def trial(self, values: Mapping[str, Any], selection: Selection, arm: str | None = None) -> Trial:
        """A configuration on a selection.

        Raises:
            UserError: they do not go together.
        """
        whole = selection.kind == "all"
        run = self.unlearn_spec(values, arm)
        path = None if whole else str(self.paths[selection.name])
        run = dataclasses.replace(run, selection=path, **self.thresholds)
        evaluation = None if self.evaluation is None else dataclasses.replace(self.evaluation, selection=path)
        attack = None if self.attack is None else dataclasses.replace(self.attack, selection=path)
        references = self.reference_fingerprints
        trial = make_trial(run, selection.name, evaluation, self.spec.each_epoch, references, attack)
        if arm is not None:
            self.arms.setdefault(trial.hash, arm)
        return trial

    def trials(self, values: Mapping[str, Any]) -> list[Trial]:
        """A configuration on every selection, with every arm."""
        arms: list[str | None] = [*self.spec.arms] or [None]
        return [self.trial(values, selection, arm) for arm in arms for selection in self.selections.values()]


def _with_absolute_paths(spec: SweepSpec) -> SweepSpec:
    """The same sweep with paths that its trials find wherever they run. For its work, not for its identity: the same
    files in another place are the same sweep."""
    base = with_absolute_paths(spec.base)
    arms = {
        arm: {name: with_absolute_paths(base | fields)[name] for name in fields} for arm, fields in spec.arms.items()
    }
    vary = {
        name: [with_absolute_paths({**base, name: value})[name] for value in values]
        if isinstance(values, list)
        else values
        for name, values in spec.vary.items()
    }
    return dataclasses.replace(spec, base=base, vary=vary, arms=arms)


def _columns(result: EvaluationResult) -> dict[str, Columns]:
    samples = result.table.filter(pc.equal(result.table["level"], "sample"))
    columns = {}
    for role in (ORIGINAL, RETAIN_ONLY):
        of_role = samples.filter(pc.equal(samples["model"], role))
        if of_role.num_rows:
            columns[role] = columns_in(of_role)
    return columns


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, list) else next(iter(values.values()))[0]


def configurations(plan: SweepPlan) -> list[Trial]:
    """All trials of a sweep that knows them beforehand, in order; those of an adaptive search are not known."""
    spec = plan.spec
    if spec.search == "optuna":
        return []
    configurations: list[dict[str, Any]]
    if spec.search == "grid":
        crossed = itertools.product(*spec.vary.values())
        configurations = [dict(zip(spec.vary, values, strict=True)) for values in crossed]
    else:
        configurations = [_drawn(spec, number) for number in range(spec.trials or 0)]
    trials = [trial for values in configurations for trial in plan.trials(values)]
    # A search in a small space may draw a configuration again.
    return list({trial.hash: trial for trial in trials}.values())


def _drawn(spec: SweepSpec, number: int) -> dict[str, Any]:
    """The configuration of this number, by the seed alone."""
    rng = np.random.default_rng([spec.seed, number])
    values = {}
    for name, among in spec.vary.items():
        if isinstance(among, list):
            values[name] = among[int(rng.integers(len(among)))]
            continue
        kind, (low, high) = next(iter(among.items()))
        if kind == "integers":
            values[name] = int(rng.integers(int(low), int(high) + 1))
        elif kind == "uniform":
            values[name] = float(rng.uniform(low, high))
        else:
            values[name] = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return values
