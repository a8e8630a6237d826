"""The verbs that run jobs: score, train, unlearn, evaluate, sweep; plan says what they will take."""

from __future__ import annotations

import argparse
import dataclasses

from bench.cli.flags import add_settings, refuse_flags_of, settings_from


def score_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.resources import Resources
    from bench.jobs.score import ScoreSpec

    add_settings(parser, ScoreSpec, Resources)
    parser.add_argument("--out", required=True, metavar="FILE", help="the Parquet file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def score(arguments: argparse.Namespace) -> None:
    from bench.jobs.resources import Resources
    from bench.jobs.score import ScoreSpec, score
    from bench.jobs.summary import print_summary

    with settings_from(arguments, ScoreSpec, Resources) as (spec, resources):
        print_summary(score(spec, arguments.out, resources, arguments.overwrite))


def difficulty_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.difficulty import DifficultySpec
    from bench.jobs.resources import Resources
    from bench.jobs.truth import TruthSpec

    parser.add_argument(
        "--truth", action="store_true", help="unlearn the samples instead, and record how many updates that takes"
    )
    add_settings(parser, DifficultySpec, TruthSpec, Resources)
    parser.add_argument("--out", required=True, metavar="FILE", help="the Parquet file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def difficulty(arguments: argparse.Namespace) -> None:
    from bench.jobs.difficulty import DifficultySpec, difficulty, print_difficulty
    from bench.jobs.resources import Resources
    from bench.jobs.truth import TruthSpec, print_truth, truth

    kind, other = (TruthSpec, DifficultySpec) if arguments.truth else (DifficultySpec, TruthSpec)
    refuse_flags_of(other, arguments, kind, "without --truth" if arguments.truth else "with --truth")
    with settings_from(arguments, kind, Resources) as (spec, resources):
        if arguments.truth:
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
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for the model and the tables")


def train(arguments: argparse.Namespace) -> None:
    from bench.jobs.summary import print_training
    from bench.jobs.train import TrainSpec, train_spec

    with settings_from(arguments, TrainSpec) as spec:
        print_training(train_spec(spec, arguments.out))


def unlearn_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.unlearn import UnlearnSpec

    add_settings(parser, UnlearnSpec)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for the model and the tables")


def unlearn(arguments: argparse.Namespace) -> None:
    from bench.jobs.summary import print_unlearning
    from bench.jobs.unlearn import UnlearnSpec, unlearn

    with settings_from(arguments, UnlearnSpec) as spec:
        print_unlearning(unlearn(spec, arguments.out))


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.evaluation_spec import EvaluateSpec
    from bench.jobs.resources import Resources

    add_settings(parser, EvaluateSpec, Resources)
    parser.add_argument("--out", required=True, metavar="FILE", help="the Parquet file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def evaluate(arguments: argparse.Namespace) -> None:
    from bench.jobs.evaluate import evaluate
    from bench.jobs.evaluation_spec import EvaluateSpec
    from bench.jobs.evaluation_summary import print_evaluation
    from bench.jobs.resources import Resources
    from bench.tasks.datasets import find_task

    with settings_from(arguments, EvaluateSpec, Resources) as (spec, resources):
        fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        result = evaluate(
            **fields, out=arguments.out, resources=resources, overwrite=arguments.overwrite, progress=True
        )
        print_evaluation(result, find_task(spec.task)[0])


def sweep_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.logs import Logging
    from bench.jobs.resources import SweepResources

    add = parser.add_argument
    add("spec", metavar="SPEC.yaml", help="what is swept: base, vary, selections, search; see docs/sweeps.md")
    add("--out", required=True, help="folder for the tables; the same command continues a sweep that was stopped")
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
    from bench.jobs.sweep import sweep
    from bench.results.store import Store

    if arguments.results:
        Store(arguments.results).check(arguments.experiment)
    file = arguments.spec
    arguments.spec = None
    with settings_from(arguments, SweepResources, Logging) as (resources, logging):
        result = sweep(
            file, arguments.out, arguments.trials, resources, retry_failed=arguments.retry_failed, logging=logging
        )
    print_sweep(result)
    if arguments.results:
        add_to_store(arguments.results, [arguments.out], arguments.experiment)


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

    for task in TASKS.values():
        print(f"{task.name:<12}{task.about}")
        data = "generated here"
        if task.source_is:
            data = f"{task.source or 'none by itself'}; {task.name}:SOURCE, {task.source_is}"
        print(f"{'':<12}forget split {task.default_split}; data: {data}")
        print(f"{'':<12}splits: {', '.join(task.splits)}")


def metrics(arguments: argparse.Namespace) -> None:
    from bench.metrics import METRICS
    from bench.tasks import TASKS

    for name, metric in METRICS.items():
        of = [task.name for task in TASKS.values() if name in task.metrics]
        print(f"{name:<26}{'↑' if metric.higher_is_better else '↓'} {metric.definition}")
        print(f"{'':<28}{metric.title}; {metric.source}; tasks: {', '.join(of) or 'those that have its sets'}")
