"""The verbs that do many jobs in a row: demo, reproduce, benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cli.flags import Parser, add_settings, amounts, settings_from, whole_numbers
from bench.cli.jobs import with_threads
from scoring.errors import UserError
from scoring.reading import exists, read_json


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.resources import Resources

    add = parser.add_argument
    add("--out", default="demo", help="folder for the page and the Parquet files (default: demo)")
    add("--split", default="forget10", help="of the task authors (default: forget10)")
    add("--overwrite", action="store_true", help="replace what an earlier demo left in --out")
    add_settings(parser, Resources, spec=False, only=("replicas",))


def demo(arguments: argparse.Namespace) -> None:
    from bench.demo.run import run_demo
    from bench.jobs.resources import Resources

    with settings_from(arguments, Resources) as resources:
        run_demo(arguments.out, arguments.split, resources=resources.checked(), overwrite=arguments.overwrite)


def reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.jobs.resources import SweepResources

    add = parser.add_argument
    add("name", metavar="NAME", help="an experiment of the paper, such as fig2 or table13; all; or list")
    add(
        "--preset",
        default="demo",
        help="demo (embedded tasks, minutes), decide (hours), paper (its scale) or real (--model)",
    )
    add(
        "--experiment-spec",
        "--spec",
        dest="experiment_spec",
        metavar="FILE",
        help="YAML file in place of the experiment's own, with a section named like the preset",
    )
    add("--model", help="for preset real, or tournament: run it on this model, a folder, an id or an embedded one")
    add("--task", help="with --model: the task, NAME:SOURCE or data file whose samples are forgotten")
    add("--split", help="with --task: its forget split (default: the task's own)")
    add("--hours", type=float, help="for preset real: all the time that there is, which decides sizes (default: 6)")
    add("--out", help="folder for the answers (default: reproduce-PRESET); the same command continues")
    add_settings(parser, SweepResources, spec=False)


def reproduce(arguments: argparse.Namespace) -> None:
    from bench.experiments.reproduce import EXPERIMENTS, reproduce
    from bench.jobs.resources import SweepResources

    if arguments.name == "list":
        for experiment in EXPERIMENTS.values():
            print(f"{experiment.name:<9}{experiment.title}: {experiment.question}")
        return
    out = arguments.out or f"reproduce-{arguments.preset}"
    with settings_from(arguments, SweepResources) as resources:
        resources = with_threads(resources, arguments)
        on = {"model": arguments.model, "data": arguments.task, "split": arguments.split, "hours": arguments.hours}
        reproduce(arguments.name, arguments.preset, out, resources, arguments.experiment_spec, **on)
    print(f"\nanswers {out}/README.md")


def benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(parser=parser)
    which = parser.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=Parser)

    def benchmark(name: str, about: str, run: Callable[[argparse.Namespace], None]) -> Callable[..., argparse.Action]:
        sub = which.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(run=run, parser=sub)
        sub.add_argument("--out", metavar="FILE", help="also write the figures to this JSON file")
        return sub.add_argument

    def on_data(name: str, about: str, run: Callable[[argparse.Namespace], None]) -> Callable[..., argparse.Action]:
        add = benchmark(name, about, run)
        add("--model", default="authors", help="embedded model, folder or Hugging Face id (default: authors)")
        add("--data", default="authors", help="task or data file (default: authors)")
        add("--split", help="of a task (default: of authors forget10 or full, else the task's own)")
        return add

    add = on_data("scoring", "Algorithm 1 as printed against the estimators", _scoring)
    add("--samples", type=int, default=400, help="at most this many samples (default: 400)")
    add("--draws", type=int, default=200, help="K of Monte Carlo (default: 200)")

    add = on_data("evaluation", "greedy answers by the replica pool against one question at a time", _evaluation)
    add("--generations", type=int, default=800, help="at most this many (default: 800)")

    add = on_data("difficulty", "what each measure of difficulty costs, in forward passes", _difficulty)
    add("--samples", type=int, default=40, help="at most this many samples (default: 40)")

    add = benchmark("experts", "gradients of mixtures of experts, a batch at once against a sample at a time", _experts)
    add("--experts", type=whole_numbers, default="8,32", help="of a model, several models (default: %(default)s)")
    add("--samples", type=int, default=32, help="in a batch (default: %(default)s)")
    add("--turns", type=int, default=5, help="how often each way is timed (default: %(default)s)")

    add = benchmark("peers", "MRD the public way and NPO by a plain Trainer, against the same here", _peers)
    add("--params", type=float, default=1e7, help="weights of the model, about (default: %(default)g)")
    add("--samples", type=int, default=32, help="that are scored, and forgotten (default: %(default)s)")
    add("--batch", type=int, default=8, help="samples in a batch (default: %(default)s)")
    add("--draws", type=int, default=10, help="K of Monte Carlo (default: %(default)s)")
    add("--turns", type=int, default=5, help="how often each way is timed (default: %(default)s)")

    about = "the training loop against transformers' Trainer, and unlearning with MRD against without"
    add = on_data("unlearning", about, _unlearning)
    add("--retain", help="split of the task or data file of what is to be kept (default: the task's own)")
    add("--seeds", type=int, default=5, help="of the runs until all is forgotten; 0 leaves them out (default: 5)")

    add = on_data("costs", "what padding, looks and evaluations cost beside the updates, before and now", _costs)
    add("--retain", help="split of the task or data file of what is to be kept (default: the task's own)")
    add("--samples", type=int, default=40, help="of the forget set, at most (default: 40)")
    add("--epochs", type=int, default=2, help="of the run whose costs are added up (default: 2)")
    add("--turns", type=int, default=3, help="how often each part is timed (default: 3)")

    add = on_data("sweep", "what Ray Tune adds to a trial: warm workers against a new one each", _sweep)
    add("--trials", type=int, default=12, help="in each of the sweeps (default: 12)")

    about = "scaling over replicas, what scheduling adds, and the driver's memory as data sets grow"
    add = on_data("cluster", about, _cluster)
    add("--sizes", type=whole_numbers, default="1000,100000", help="samples of the data sets (default: %(default)s)")

    add = on_data("engines", "a replica of vLLM against one of transformers: log-probs, draws, answers", _engines)
    add("--samples", type=int, default=200, help="at most this many samples (default: 200)")

    add = benchmark("gpu", "how much of a card's arithmetic MRD reaches, on a random Llama", _gpu)
    add("--model-params", type=float, default=1e9, help="weights (default: %(default)g)")
    add("--samples", type=int, default=400, help="how many (default: %(default)s)")
    add("--tokens", type=int, default=128, help="of a sample (default: %(default)s)")
    add("--draws", type=int, default=200, help="K of Monte Carlo (default: %(default)s)")
    add("--batch-tokens", type=int, default=8192, help="tokens a batch (default: %(default)s)")

    about = "what a run of unlearning holds in memory, and whether it fits under a limit"
    add = benchmark("memory", about, _memory)
    add("--params", type=float, default=1e7, help="weights of the random Llama (default: %(default)g)")
    add("--limit", type=float, help="bytes of data of each process, RLIMIT_DATA (default: no limit)")
    add("--ways", type=_names, default="adapters,shards", help="what is trained, and how (default: %(default)s)")

    about = "what everything costs as models grow, in forward passes and weights, before and now"
    add = benchmark("scale", about, _scale)
    add("--sizes", type=amounts, default="1e7,4e7,1.35e8", help="weights of the models (default: %(default)s)")
    add("--tokens", type=int, default=512, help="of the batch (default: %(default)s)")
    add("--turns", type=int, default=3, help="how often each part is timed (default: %(default)s)")
    add("--profile", help="of a machine, whose plans stand beside: a known one, or a file of `benchmark plan`")

    benchmark("plan", "the constants of `mrd-bench plan` on this machine, and its sums against runs", _plan)

    about = "how often intervals cover and claims are false, on simulated data, before faults were mended and now"
    add = benchmark("statistics", about, _statistics)
    add("--replications", type=int, default=500, help="simulated data sets a case (default: %(default)s)")

    add = benchmark("leaderboard", "building a leaderboard of many runs, and opening it", _leaderboard)
    add("--runs", type=int, default=10_000, help="number of made runs in the store (default: 10000)")

    add = benchmark("volume", "many samples, trials and runs: seconds, memory, and how they grow", _volume)
    add("--model", default="authors", help="whose tokenizer reads what is made (default: authors)")
    each = "several sizes; 0 leaves them out (default: %(default)s)"
    add("--samples", type=whole_numbers, default="10000,100000", help=f"that are scored, {each}")
    add("--trials", type=whole_numbers, default="500,5000", help=f"of a sweep, with made results, {each}")
    add("--runs", type=whole_numbers, default="10000,100000", help=f"made runs in a store, {each}")
    add("--replicas", type=int, default=2, help="that score; 0: in the driver itself (default: %(default)s)")


def _out(arguments: argparse.Namespace) -> str | None:
    """The file that figures are written to; that it can be is checked before minutes of measuring.

    Raises:
        UserError: its folder does not exist.
    """
    out: str | None = arguments.out
    if out and not Path(out).absolute().parent.is_dir():
        raise UserError(f"--out {out}: its folder does not exist; make it, or choose another")
    if out and exists(out):
        expected = "a JSON file of figures, which is replaced, or a new name"
        read_json(out, dict[str, Any], expected)
    return out


def _scoring(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import scoring

    scoring.run_benchmark(arguments.model, arguments.data, arguments.split, arguments.samples, arguments.draws, out)


def _evaluation(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import evaluation

    evaluation.run_benchmark(arguments.model, arguments.data, arguments.split, arguments.generations, out)


def _difficulty(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import difficulty

    difficulty.run_benchmark(arguments.model, arguments.data, arguments.split, arguments.samples, out)


def _experts(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import experts

    experts.run_benchmark(arguments.experts, arguments.samples, arguments.turns, out)


def _peers(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import peers

    peers.run_benchmark(arguments.params, arguments.samples, arguments.batch, arguments.draws, arguments.turns, out)


def _unlearning(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed.unlearning.run import run_benchmark

    run_benchmark(arguments.model, arguments.data, arguments.split, arguments.retain, arguments.seeds, out)


def _costs(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import costs

    costs.run_benchmark(
        arguments.model,
        arguments.data,
        arguments.split,
        arguments.retain,
        arguments.samples,
        arguments.epochs,
        arguments.turns,
        out,
    )


def _sweep(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import sweep

    sweep.run_benchmark(arguments.model, arguments.data, arguments.split, arguments.trials, out)


def _cluster(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import cluster

    cluster.run_benchmark(arguments.model, arguments.data, arguments.split, arguments.sizes, out)


def _engines(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import engines

    engines.run_benchmark(arguments.model, arguments.data, arguments.split, arguments.samples, out)


def _scale(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import scale

    scale.run_benchmark(arguments.sizes, arguments.tokens, arguments.turns, arguments.profile, out)


def _gpu(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import gpu

    gpu.run_benchmark(
        arguments.model_params, arguments.samples, arguments.tokens, arguments.draws, arguments.batch_tokens, out
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _memory(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import memory

    memory.run_benchmark(arguments.params, arguments.limit, arguments.ways, out)


def _plan(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import calibration

    calibration.run_benchmark(out)


def _leaderboard(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import leaderboard

    leaderboard.run_benchmark(arguments.runs, out)


def _volume(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import volume

    sizes = (arguments.samples, arguments.trials, arguments.runs)
    volume.run_benchmark(arguments.model, *sizes, arguments.replicas, out)


def _statistics(arguments: argparse.Namespace) -> None:
    out = _out(arguments)
    from bench.speed import statistics

    statistics.run_benchmark(arguments.replications, out)
