"""The verbs that do many jobs in a row: demo, reproduce, benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from bench.cli.flags import _Parser, _sizes, _sweep_resource_arguments, _sweep_resources_of
from scoring.errors import UserError


def _demo_arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--out", default="demo", help="folder for the page and the Parquet files (default: demo)")
    demo.add_argument("--split", default="forget10", help="of the task authors (default: forget10)")
    demo.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in --out")


def _benchmark_arguments(benchmark: argparse.ArgumentParser) -> None:
    benchmark.set_defaults(parser=benchmark)
    which = benchmark.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=_Parser)

    def what(name: str, about: str) -> Callable[..., argparse.Action]:
        sub = which.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(run=_benchmark, parser=sub)
        sub.add_argument("--model", default="authors", help="embedded model, folder or Hugging Face id")
        sub.add_argument("--data", default="authors", help="task or data file (default: authors)")
        sub.add_argument("--out", help="also write the figures to this JSON file")
        return sub.add_argument

    add = what("scoring", "Algorithm 1 as printed against the estimators")
    add("--split", help="of a task")
    add("--samples", type=int, default=400, help="at most this many samples (default: 400)")
    add("--draws", type=int, default=200, help="K of Monte Carlo (default: 200)")

    add = what("evaluation", "greedy answers by the replica pool against one question at a time")
    add("--split", help="of a task (default: the task's own forget split)")
    add("--generations", type=int, default=800, help="at most this many (default: 800)")

    add = what("unlearning", "the training loop against transformers' Trainer, and unlearning with MRD against without")
    add("--split", help="of a task (default for authors: forget10)")
    add("--retain", help="split of the task or data file of what is to be kept (default: the task's own)")
    add("--seeds", type=int, default=5, help="of the runs until all is forgotten; 0 leaves them out (default: 5)")

    add = what("sweep", "what Ray Tune adds to a trial: warm workers against a new one each")
    add("--split", help="of a task (default: the task's own forget split)")
    add("--trials", type=int, default=12, help="in each of the sweeps (default: 12)")

    add = what("cluster", "scaling over replicas, what scheduling adds, and the driver's memory as data sets grow")
    add("--split", help="of a task")
    add("--sizes", type=_sizes, default="1000,100000", help="samples of the data sets (default: %(default)s)")

    add = what("engines", "a replica of vLLM against one of transformers: log-probs, draws of MRD, answers")
    add("--split", help="of a task")
    add("--samples", type=int, default=200, help="at most this many samples (default: 200)")

    about = "how much of a card's arithmetic MRD reaches, on a random Llama"
    sub = which.add_parser("gpu", help=about, description=about, allow_abbrev=False)
    sub.set_defaults(run=_benchmark, parser=sub)
    sub.add_argument("--model-params", type=float, default=1e9, help="weights (default: %(default)g)")
    sub.add_argument("--samples", type=int, default=400, help="(default: %(default)s)")
    sub.add_argument("--tokens", type=int, default=128, help="of a sample (default: %(default)s)")
    sub.add_argument("--draws", type=int, default=200, help="K of Monte Carlo (default: %(default)s)")
    sub.add_argument("--batch-tokens", type=int, default=8192, help="tokens a batch (default: %(default)s)")
    sub.add_argument("--out", help="also write the figures to this JSON file")

    about = "the constants of `mrd-bench plan` on this machine, and its sums against runs"
    sub = which.add_parser("plan", help=about, description=about, allow_abbrev=False)
    sub.set_defaults(run=_benchmark, parser=sub)
    sub.add_argument("--out", help="also write constants and checks to this JSON file, which plan --profile takes")

    about = "building a leaderboard of many runs, and opening it"
    sub = which.add_parser("leaderboard", help=about, description=about, allow_abbrev=False)
    sub.set_defaults(run=_benchmark, parser=sub)
    sub.add_argument("--runs", type=int, default=10_000, help="made ones, in the store (default: 10000)")
    sub.add_argument("--out", help="also write the figures to this JSON file")


def _reproduce_arguments(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("name", metavar="NAME", help="an experiment of the paper, such as fig2 or table13; all; or list")
    add("--preset", default="demo", help="demo (embedded tasks, minutes) or paper (its scale, for a cluster)")
    add("--spec", help="YAML file in place of the experiment's own, with a section named like the preset")
    add("--out", help="folder for the answers (default: reproduce-PRESET); the same command continues")
    _sweep_resource_arguments(sub)


def _reproduce(arguments: argparse.Namespace) -> None:
    from bench.experiments.reproduce import EXPERIMENTS, reproduce

    if arguments.name == "list":
        for experiment in EXPERIMENTS.values():
            print(f"{experiment.name:<9}{experiment.title}: {experiment.question}")
        return
    out = arguments.out or f"reproduce-{arguments.preset}"
    reproduce(arguments.name, arguments.preset, out, _sweep_resources_of(arguments), arguments.spec)
    print(f"\nanswers {out}/README.md")


def _demo(arguments: argparse.Namespace) -> None:
    from bench.demo.run import run_demo

    run_demo(arguments.out, arguments.split, overwrite=arguments.overwrite)


def _benchmark(arguments: argparse.Namespace) -> None:
    if arguments.out and not Path(arguments.out).absolute().parent.is_dir():
        # Not after minutes of measuring.
        raise UserError(f"--out {arguments.out}: its folder does not exist; make it, or choose another")
    if arguments.what == "evaluation":
        from bench.speed import evaluation

        evaluation.run_benchmark(arguments.model, arguments.data, arguments.split, arguments.generations, arguments.out)
        return
    if arguments.what == "unlearning":
        from bench.speed import unlearning

        unlearning.run_benchmark(
            arguments.model, arguments.data, arguments.split, arguments.retain, arguments.seeds, arguments.out
        )
        return
    if arguments.what == "leaderboard":
        from bench.speed import leaderboard

        leaderboard.run_benchmark(arguments.runs, arguments.out)
        return
    if arguments.what == "sweep":
        from bench.speed import sweep

        sweep.run_benchmark(arguments.model, arguments.data, arguments.split, arguments.trials, arguments.out)
        return
    if arguments.what == "engines":
        from bench.speed import engines

        engines.run_benchmark(arguments.model, arguments.data, arguments.split, arguments.samples, arguments.out)
        return
    if arguments.what == "gpu":
        from bench.speed import gpu

        gpu.run_benchmark(
            arguments.model_params,
            arguments.samples,
            arguments.tokens,
            arguments.draws,
            arguments.batch_tokens,
            arguments.out,
        )
        return
    if arguments.what == "plan":
        from bench.speed import calibration as plan

        plan.run_benchmark(arguments.out)
        return
    if arguments.what == "cluster":
        from bench.speed import cluster

        cluster.run_benchmark(arguments.model, arguments.data, arguments.split, arguments.sizes, arguments.out)
        return
    from bench.speed import scoring

    scoring.run_benchmark(
        arguments.model, arguments.data, arguments.split, arguments.samples, arguments.draws, arguments.out
    )
