"""The verbs that run jobs: score, unlearn, evaluate, sweep; plan says what they will take."""

from __future__ import annotations

import argparse
import dataclasses

from bench.cli.flags import (
    TASK_HELP,
    _number_or_auto,
    _resource_arguments,
    _resources_of,
    _spec_arguments,
    _spec_of,
    _sweep_resource_arguments,
    _sweep_resources_of,
)
from bench.cli.results import _add_to_store
from bench.tasks import TASKS


def _plan_arguments(sub: argparse.ArgumentParser) -> None:
    from bench.speed.plan import Job, profiles
    from scoring.mrd import ESTIMATORS

    default = {f.name: f.default for f in dataclasses.fields(Job)}
    add = sub.add_argument
    add("--model-params", type=float, required=True, help="weights of the model, such as 7e9")
    add("--samples", type=float, required=True, help="to be scored, or to be forgotten, such as 1e6")
    add("--tokens", type=float, default=100, help="of a sample, on average (default: %(default)g)")
    add("--scored", type=float, help="those of them that are scored (default: half)")
    add("--estimator", default="gradient", help=f"{' | '.join(ESTIMATORS)} | none (default: %(default)s)")
    add("--draws", type=int, help="K (default: the estimator's own)")
    add("--epochs", type=float, default=0, help="also unlearn for so many (default: 0)")
    add("--retained", type=float, default=default["retained"], help="retain samples for each forgotten (default: 1)")
    add("--batch-size", type=int, default=default["batch_size"], help="samples an update (default: %(default)s)")
    add("--batch-tokens", type=int, default=default["batch_tokens"], help="tokens a batch (default: %(default)s)")
    add("--dtype", default=default["dtype"], help="of the weights (default: %(default)s)")
    add("--gpus", type=int, default=1, help="devices in all; cores, with a profile of a CPU (default: 1)")
    add(
        "--profile",
        default="h100",
        help=f"{' | '.join(profiles())}, or what `benchmark plan --out FILE` wrote (default: %(default)s)",
    )
    add("--price", type=float, help="of a device and hour, in any currency")


def _plan(arguments: argparse.Namespace) -> None:
    from bench.speed.plan import Job, Shape, find_profile, plan, print_plan

    profile = find_profile(arguments.profile)
    job = Job(
        Shape.of_size(max(arguments.model_params, 1.0)),
        arguments.samples,
        arguments.tokens,
        arguments.tokens / 2 if arguments.scored is None else arguments.scored,
        None if arguments.estimator == "none" else arguments.estimator,
        arguments.draws,
        arguments.epochs,
        arguments.retained,
        arguments.batch_tokens,
        arguments.batch_size,
        arguments.dtype,
    )
    print_plan(job, plan(job, profile, arguments.gpus), profile, arguments.price)


def _score_arguments(sub: argparse.ArgumentParser) -> None:
    from bench.jobs.resources import DTYPE_CHOICES
    from bench.jobs.score import ScoreSpec
    from scoring.mrd import ESTIMATORS, STATISTICS
    from scoring.samples import TOKENS_CHOICES

    default = {f.name: f.default for f in dataclasses.fields(ScoreSpec)}
    add = sub.add_argument
    add("--model", required=True, help="authors (embedded), authors:retain90, a folder, or a Hugging Face id")
    add("--data", required=True, help=f"{TASK_HELP}; or a .jsonl or .parquet file")
    add("--split", help="of a task, e.g. forget10")
    add("--estimator", default=default["estimator"], help=f"{' | '.join(ESTIMATORS)} (default: %(default)s)")
    add("--statistic", help=f"{' | '.join(STATISTICS)} (default: the estimator's own)")
    add("--sigma", type=float, default=default["sigma"], help="std of the perturbation (default: %(default)g)")
    add("--draws", type=_number_or_auto, help="K, or auto (default: the estimator's own, 200 for monte-carlo)")
    add("--tolerance", type=float, default=default["tolerance"], help="of --draws auto (default: %(default)g)")
    add("--seed", type=int, default=default["seed"])
    add(
        "--tokens",
        default=default["tokens"],
        help=f"scored tokens: {' | '.join(TOKENS_CHOICES)} (default: %(default)s)",
    )
    add(
        "--batch-tokens",
        type=_number_or_auto,
        default=default["batch_tokens"],
        help="padded tokens a batch, or auto: what fits into memory (default: %(default)s)",
    )
    add("--dtype", default=default["dtype"], help=f"{' | '.join(DTYPE_CHOICES)} (default: %(default)s)")
    add("--allow-lost-perturbation", action="store_true", help="score although storage rounds the noise away")
    _resource_arguments(sub)
    add("--out", required=True, help="the Parquet file to write")
    add("--overwrite", action="store_true", help="replace --out if it exists")


# What the flags of `unlearn` mean; those that are not here say it by their name and default.
UNLEARN_HELP = {
    "model": "authors (embedded), a folder, or a Hugging Face id",
    "task": f"{TASK_HELP}; or a data file of the forget set",
    "forget_split": "of a task, e.g. forget10",
    "selection": "text file of sample ids, one a line: only these are forgotten (default: all)",
    "retain": "split of the task or data file of what is to be kept (default: the task's own)",
    "refusals": "text file, one refusal a line, for PO and IdkDPO",
    "settings": "of the objective, e.g. beta=0.1 (several: beta1=5,beta2=1)",
    "retain_term": "nll, kl, hidden or none (default: the algorithm's)",
    "alpha": "draw p_i ∝ MRD_i^alpha: 1 easy first, 0 uniform, -1 hard first",
    "order": "weighted, or a fixed order: easy-first, hard-first, random",
    "refresh": "measure MRD again every so many --refresh-unit; 0: never",
    "epochs": "an epoch draws as many samples as there are (default: the algorithm's)",
    "batch_size": "forget samples an update, over all workers (default: 4; 1 for SGA and CGA)",
    "early_stopping": "a forgotten sample leaves the draw; ends when all are forgotten",
    "trainable": "regular expression searched in parameter names (default: all)",
    "layer": "of RMU, counted from 1",
    "lora_rank": "rank of adapters; 0 trains full weights",
    "workers": "Ray Train workers; 0 trains in this process",
    "strategy": "ddp or fsdp",
    "batch_tokens": "padded tokens in a micro-batch; gradients are accumulated",
    "evaluate_every": "epochs from one measurement to the next; 0: only at the end",
    "ma_threshold": "a forgotten sample's MA is below (default: the average on the initial model)",
    "el_threshold": "a forgotten sample's EL is below (default: the average on the initial model)",
    "checkpoint_every": "updates (default: each epoch)",
}


def _unlearn_arguments(sub: argparse.ArgumentParser) -> None:
    from algorithms.objectives import ALGORITHMS
    from bench.jobs.unlearn import UnlearnSpec

    sub.add_argument("--out", required=True, help="folder for the model and the tables")
    _spec_arguments(sub, UnlearnSpec, {**UNLEARN_HELP, "algorithm": ", ".join(ALGORITHMS)})


def _unlearn(arguments: argparse.Namespace) -> None:
    from bench.jobs.summary import print_unlearning
    from bench.jobs.unlearn import UnlearnSpec, unlearn

    print_unlearning(unlearn(_spec_of(arguments, UnlearnSpec), arguments.out))


# What the flags of `evaluate` mean; those that are not here say it by their name and default.
EVALUATE_HELP = {
    "model": "the model that has forgotten: an embedded one, a folder, or a Hugging Face id",
    "task": TASK_HELP,
    "split": "the forget split, e.g. forget10 (default: the task's own)",
    "selection": "text file of the ids of the samples that were forgotten, one a line (default: the whole split)",
    "original": "the model before it forgot",
    "retain_model": "the gold standard: a model trained without the forget set",
    "metrics": "names, separated by commas (default: all of the task; see mrd-bench metrics)",
    "samples": "of each set at most, evenly spaced (default: all)",
    "mia_negatives": "holdout (never trained on) or retain",
    "min_k": "share of tokens that Min-k% takes, in (0, 1]",
    "el_n": "tokens in an n-gram of extraction likelihood",
    "sentence_model": "embeds sentences for FA (default: all-MiniLM-L6-v2)",
    "toxicity_model": "a text-classification model (default: the task's, unitary/toxic-bert)",
    "harness_tasks": "folder of lm-evaluation-harness task files, which go before its own",
    "harness_limit": "questions of each of its tasks at most (default: all)",
    "relearn_share": "share of the forget set that is taught again",
    "relearn_steps": "updates of relearning, 4 samples each",
    "relearn_workers": "Ray Train workers; 0 trains in this process",
    "dtype": "float32, bfloat16 or float64",
    "batch_tokens": "padded tokens in a batch",
    "seed": "of the resampling and of relearning",
}


def _evaluate_arguments(sub: argparse.ArgumentParser) -> None:
    from bench.jobs.evaluate import EvaluateSpec

    sub.add_argument("--out", required=True, help="the Parquet file to write")
    sub.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    _spec_arguments(sub, EvaluateSpec, EVALUATE_HELP)
    _resource_arguments(sub)


def _sweep_arguments(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("spec", metavar="SPEC.yaml", help="what is swept: base, vary, selections, search; see the README")
    add("--out", required=True, help="folder for the tables; the same command continues a sweep that was stopped")
    add("--trials", help="folder of finished trials, shared by sweeps (default: trials, next to --out)")
    add("--retry-failed", action="store_true", help="try again what ran out of memory, died or met an error")
    add("--results", metavar="STORE", help="also put the results into this store (folder or URI)")
    add("--experiment", help="name of the sweep in the store (default: that of --out)")
    _sweep_resource_arguments(sub)


def _sweep(arguments: argparse.Namespace) -> None:
    from bench.files.spec import read_spec
    from bench.jobs.summary import print_sweep
    from bench.jobs.sweep import sweep
    from bench.jobs.sweep_plan import SweepSpec

    spec = read_spec(arguments.spec, SweepSpec, None)
    print_sweep(
        sweep(
            spec,
            arguments.out,
            arguments.trials,
            _sweep_resources_of(arguments),
            retry_failed=arguments.retry_failed,
        )
    )
    if arguments.results:
        _add_to_store(arguments.results, [arguments.out], arguments.experiment)


def _evaluate(arguments: argparse.Namespace) -> None:
    from bench.jobs.evaluate import EvaluateSpec, evaluate
    from bench.jobs.summary import print_evaluation
    from bench.tasks.datasets import find_task

    spec = _spec_of(arguments, EvaluateSpec)
    result = evaluate(spec, arguments.out, _resources_of(arguments), arguments.overwrite)
    print_evaluation(result, find_task(spec.task)[0])


def _tasks(arguments: argparse.Namespace) -> None:
    for task in TASKS.values():
        print(f"{task.name:<12}{task.about}")
        data = "generated here"
        if task.source_is:
            data = f"{task.source or 'none by itself'}; {task.name}:SOURCE, {task.source_is}"
        print(f"{'':<12}forget split {task.default_split}; data: {data}")
        print(f"{'':<12}splits: {', '.join(task.splits)}")


def _metrics(arguments: argparse.Namespace) -> None:
    from bench.metrics import METRICS

    for name, metric in METRICS.items():
        of = [task.name for task in TASKS.values() if name in task.metrics]
        print(f"{name:<26}{'↑' if metric.higher_is_better else '↓'} {metric.definition}")
        print(f"{'':<28}{metric.title}; {metric.source}; tasks: {', '.join(of)}")


def _score(arguments: argparse.Namespace) -> None:
    from bench.jobs.score import ScoreSpec, score
    from bench.jobs.summary import print_summary

    spec = ScoreSpec(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(ScoreSpec)})
    print_summary(score(spec, arguments.out, _resources_of(arguments), arguments.overwrite))
