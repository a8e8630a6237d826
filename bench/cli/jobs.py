"""The verbs that run jobs: score, train, unlearn, evaluate, sweep; plan says what they will take."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from bench.cli.flags import add_settings, refuse_flags_of, settings_from

if TYPE_CHECKING:
    from bench.jobs.preview import Preview
    from bench.jobs.resources import SweepResources


def _add_output(parser: argparse.ArgumentParser, kind: str, about: str) -> None:
    """--out and what goes with it: a file is replaced with --overwrite."""
    parser.add_argument("--out", required=True, metavar=kind, help=about)
    if kind == "FILE":
        parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    add_dry_run(parser)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """--dry-run, and the machine that it plans for."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the spec with all defaults, sizes, time and memory, and the state of --out; do nothing",
    )
    parser.add_argument(
        "--profile", metavar="NAME", help="with --dry-run: plan for this machine, see `plan` (default: this one)"
    )


def score_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.resources import Resources
    from bench.jobs.score import ScoreSpec

    add_settings(parser, ScoreSpec, Resources)
    _add_output(parser, "FILE", "the Parquet file to write")


def score(arguments: argparse.Namespace) -> None:
    from bench.jobs.resources import Resources
    from bench.jobs.score import ScoreSpec, preview_scoring, score
    from bench.jobs.summary import print_summary

    with settings_from(arguments, ScoreSpec, Resources) as (spec, resources):
        if arguments.dry_run:
            show_preview(preview_scoring(spec, arguments.out, resources, arguments.overwrite), arguments)
            return
        print_summary(score(spec, arguments.out, resources, arguments.overwrite))


def difficulty_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.difficulty import DifficultySpec
    from bench.jobs.resources import Resources
    from bench.jobs.truth import TruthSpec

    parser.add_argument(
        "--truth", action="store_true", help="unlearn the samples instead, and record how many updates that takes"
    )
    add_settings(parser, DifficultySpec, TruthSpec, Resources)
    _add_output(parser, "FILE", "the Parquet file to write")


def difficulty(arguments: argparse.Namespace) -> None:
    from bench.jobs.difficulty import DifficultySpec, difficulty, preview_difficulty, print_difficulty
    from bench.jobs.resources import Resources
    from bench.jobs.truth import TruthSpec, preview_truth, print_truth, truth

    kind, other = (TruthSpec, DifficultySpec) if arguments.truth else (DifficultySpec, TruthSpec)
    refuse_flags_of(other, arguments, kind, "without --truth" if arguments.truth else "with --truth")
    with settings_from(arguments, kind, Resources) as (spec, resources):
        if arguments.dry_run:
            preview = preview_truth if arguments.truth else preview_difficulty
            show_preview(preview(spec, arguments.out, resources, arguments.overwrite), arguments)
        elif arguments.truth:
            print_truth(truth(spec, arguments.out, resources, arguments.overwrite))
        else:
            print_difficulty(difficulty(spec, arguments.out, resources, arguments.overwrite))


def measures(arguments: argparse.Namespace) -> None:
    from scoring.measures import MEASURES, Asked

    for name, measure in MEASURES.items():
        sign = "↑" if measure.harder > 0 else "↓"
        needs = "".join(f"; needs {need}" for need in sorted(measure.needs - {"model", "thresholds"}))
        print(f"{name:<20}{sign} {measure.about}")
        print(f"{'':<22}{measure.cost(Asked()):g} forward passes a sample; {measure.source}{needs}")


def train_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.train import TrainSpec

    add_settings(parser, TrainSpec)
    _add_output(parser, "FOLDER", "folder for the model and the tables")


def train(arguments: argparse.Namespace) -> None:
    from bench.jobs.summary import print_training
    from bench.jobs.train import TrainSpec, preview_training, train_spec

    with settings_from(arguments, TrainSpec) as spec:
        if arguments.dry_run:
            show_preview(preview_training(spec, arguments.out), arguments)
            return
        print_training(train_spec(spec, arguments.out))


def unlearn_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.unlearn import UnlearnSpec

    add_settings(parser, UnlearnSpec)
    _add_output(parser, "FOLDER", "folder for the model and the tables")


def unlearn(arguments: argparse.Namespace) -> None:
    from bench.jobs.requests import preview_requests, unlearn_requests
    from bench.jobs.summary import print_requests, print_unlearning
    from bench.jobs.unlearn import UnlearnSpec, preview_unlearning, unlearn

    with settings_from(arguments, UnlearnSpec) as spec:
        if arguments.dry_run:
            preview = preview_unlearning if spec.requests is None else preview_requests
            show_preview(preview(spec, arguments.out), arguments)
        elif spec.requests is None:
            print_unlearning(unlearn(spec, arguments.out))
        else:
            print_requests(unlearn_requests(spec, arguments.out))


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.evaluation_spec import EvaluateSpec
    from bench.jobs.resources import Resources

    add_settings(parser, EvaluateSpec, Resources)
    _add_output(parser, "FILE", "the Parquet file to write")


def evaluate(arguments: argparse.Namespace) -> None:
    from bench.jobs.evaluate import evaluate, preview_evaluation
    from bench.jobs.evaluation_spec import EvaluateSpec
    from bench.jobs.evaluation_summary import print_evaluation
    from bench.jobs.resources import Resources
    from bench.tasks.datasets import find_task

    with settings_from(arguments, EvaluateSpec, Resources) as (spec, resources):
        if arguments.dry_run:
            show_preview(preview_evaluation(spec, arguments.out, resources, arguments.overwrite), arguments)
            return
        fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        result = evaluate(
            **fields, out=arguments.out, resources=resources, overwrite=arguments.overwrite, progress=True
        )
        print_evaluation(result, find_task(spec.task)[0])


def attack_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.attack_spec import AttackSpec
    from bench.jobs.resources import Resources

    add_settings(parser, AttackSpec, Resources)
    _add_output(parser, "FILE", "the Parquet file to write")


def attack(arguments: argparse.Namespace) -> None:
    from bench.jobs.attack import attack_spec, preview_attack
    from bench.jobs.attack_spec import AttackSpec
    from bench.jobs.attack_summary import print_attacks
    from bench.jobs.resources import Resources

    with settings_from(arguments, AttackSpec, Resources) as (spec, resources):
        if arguments.dry_run:
            show_preview(preview_attack(spec, arguments.out, resources, arguments.overwrite), arguments)
            return
        print_attacks(attack_spec(spec, arguments.out, resources, arguments.overwrite))


def sweep_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.logs import Logging
    from bench.jobs.resources import SweepResources

    add = parser.add_argument
    add("spec", metavar="SPEC.yaml", help="what is swept: base, vary, selections, search; see docs/sweeps.md")
    _add_output(parser, "FOLDER", "folder for the tables; the same command continues a sweep that was stopped")
    add("--trials", help="folder of finished trials, shared by sweeps (default: trials, next to --out)")
    add("--retry-failed", action="store_true", help="try again what ran out of memory, died or met an error")
    add("--results", metavar="STORE", help="also put the results into this store (folder or URI)")
    add("--experiment", help="name of the sweep in the store (default: that of --out)")
    add_settings(parser, SweepResources, Logging, spec=False)


def sweep(arguments: argparse.Namespace) -> None:
    from bench.cli.results import add_to_store
    from bench.jobs.logs import Logging
    from bench.jobs.resources import SweepResources
    from bench.jobs.summary import print_sweep
    from bench.jobs.sweep import preview_sweep, sweep
    from bench.results.store import Store

    if arguments.results:
        Store(arguments.results).check(arguments.experiment)
    file = arguments.spec
    arguments.spec = None
    with settings_from(arguments, SweepResources, Logging) as (resources, logging):
        resources = with_threads(resources, arguments)
        if arguments.dry_run:
            show_preview(preview_sweep(file, arguments.out, arguments.trials, resources, logging), arguments)
            return
        result = sweep(
            file, arguments.out, arguments.trials, resources, retry_failed=arguments.retry_failed, logging=logging
        )
    print_sweep(result)
    if arguments.results:
        add_to_store(arguments.results, [arguments.out], arguments.experiment)


def with_threads(resources: SweepResources, arguments: argparse.Namespace) -> SweepResources:
    """Trials in this process have its threads, unless they are given a number of their own."""
    if arguments.threads is None or not resources.in_this_process or hasattr(arguments, "cpus_per_trial"):
        return resources
    return dataclasses.replace(resources, cpus_per_trial=arguments.threads)


def show_preview(preview: Preview, arguments: argparse.Namespace) -> None:
    """Print what a command would do: a spec file, with all else as comments."""
    from bench.speed.preview import preview_lines

    print("\n".join(preview_lines(preview, arguments.verb, arguments.profile)))


def spec_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        metavar="PATH",
        help="folder of a run or a sweep, or a Parquet file that score, difficulty or evaluate wrote",
    )


def spec(arguments: argparse.Namespace) -> None:
    from bench.jobs.stored_spec import stored_spec

    stored = stored_spec(arguments.path)
    for note in stored.notes:
        print(f"note: {note}", file=sys.stderr)
    print(stored.as_yaml(), end="")


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.speed.plan import PlanSettings

    add_settings(parser, PlanSettings, spec=False)


def plan(arguments: argparse.Namespace) -> None:
    from bench.speed.plan import PlanSettings, find_profile, plan, print_plan

    with settings_from(arguments, PlanSettings) as settings:
        profile = find_profile(settings.profile)
        job = settings.job()
        print_plan(job, plan(job, profile, settings.gpus), profile, settings.price)


def tasks(arguments: argparse.Namespace) -> None:
    from bench.tasks import TASKS

    width = max(map(len, TASKS)) + 2
    for task in TASKS.values():
        print(f"{task.name:<{width}}{task.about}")
        data = "generated here"
        if task.source_is:
            data = f"{task.source or 'none by itself'}; {task.name}:SOURCE, {task.source_is}"
        print(f"{'':<{width}}forget split {task.default_split}; data: {data}")
        print(f"{'':<{width}}splits: {', '.join(task.splits)}")


def metrics(arguments: argparse.Namespace) -> None:
    from bench.metrics import GROUPS, METRICS
    from bench.tasks import TASKS

    width = max(map(len, METRICS)) + 2
    for name, metric in METRICS.items():
        of = [task.name for task in TASKS.values() if name in task.metrics]
        print(f"{name:<{width}}{'↑' if metric.higher_is_better else '↓'} {metric.definition}")
        print(f"{'':<{width + 2}}{metric.title}; {metric.source}; tasks: {', '.join(of) or 'those that have its sets'}")
    for group, names in GROUPS.items():
        print(f"\n--metrics {group}: those of {', '.join(names)} that a task has the sets for")
