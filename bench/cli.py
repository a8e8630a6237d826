"""The command line: `mrd-bench VERB`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args, get_type_hints

from bench.tasks import TASKS
from scoring.errors import UserError, unknown_name

if TYPE_CHECKING:
    from bench.jobs.resources import Resources, SweepResources

USER_ERROR = 2
TASK_HELP = (
    f"a task ({', '.join(TASKS)}), NAME:SOURCE with its data's folder, file or Hugging Face id, or a task file (.yaml)"
)
T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    """Errors are one line and exit code 2; an unknown flag or verb comes with the nearest known one."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(USER_ERROR)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = action.metavar if isinstance(action.metavar, str) else action.dest
            raise argparse.ArgumentError(None, str(unknown_name(kind.lower(), str(value), action.choices)))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            chosen = getattr(found, "parser", self)
            near = difflib.get_close_matches(unknown[0].split("=")[0], chosen._option_string_actions, n=1)
            chosen.error(f"unknown argument {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code: 0 done, 2 the input must be mended, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser(next(iter(argv), None)).parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"mrd-bench: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("\nmrd-bench: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def _parser(asked: str | None) -> argparse.ArgumentParser:
    """The parser, with the flags of the verb that is asked for: those of all would load all that any of them needs."""
    parser = _Parser(prog="mrd-bench", description="How hard is each sample to unlearn? Measured on Ray.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    def verb(
        name: str,
        what: str,
        run: Callable[[argparse.Namespace], None] | None = None,
        arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    ) -> None:
        sub = verbs.add_parser(name, help=what, description=what, allow_abbrev=False)
        sub.set_defaults(run=run, parser=sub)
        if arguments and name == asked:
            arguments(sub)

    verb("score", "score the Memory Removal Difficulty of every sample of a data set", _score, _score_arguments)
    verb(
        "unlearn", "make a model forget samples, easy or hard ones first, or as they come", _unlearn, _unlearn_arguments
    )
    verb(
        "evaluate",
        "measure the metrics of a task, with intervals and reference models",
        _evaluate,
        _evaluate_arguments,
    )
    verb(
        "sweep",
        "run the cross of algorithms, sample selections, seeds and settings on Ray Tune",
        _sweep,
        _sweep_arguments,
    )
    verb(
        "reproduce",
        "answer the paper's questions: a table, a picture and a paragraph each",
        _reproduce,
        _reproduce_arguments,
    )
    verb("results", "put results into a store, list, show and export them", None, _results_arguments)
    verb(
        "leaderboard",
        "rank what stores hold, raw and at equal difficulty, on one page",
        _leaderboard,
        _leaderboard_arguments,
    )
    verb(
        "compare",
        "the paired difference of two algorithms, or two stores, at equal selections and seeds",
        _compare,
        _compare_arguments,
    )
    verb("tasks", "list the tasks: what is forgotten, what is kept, where the data are", _tasks)
    verb("metrics", "list the metrics: what they say, and where they are from", _metrics)
    verb(
        "demo",
        "score and unlearn the embedded task under the embedded model; writes a page of results",
        _demo,
        _demo_arguments,
    )
    verb("plan", "say what a job will take: hours, memory, cost, and what limits it", _plan, _plan_arguments)
    verb("benchmark", "measure speed, side by side in one run", None, _benchmark_arguments)
    return parser


def _demo_arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--out", default="demo", help="folder for the page and the Parquet files (default: demo)")
    demo.add_argument("--split", default="forget10", help="of the task authors (default: forget10)")
    demo.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in --out")


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


def _spec_arguments(sub: argparse.ArgumentParser, spec: type, meanings: Mapping[str, str]) -> None:
    """A flag for each field of a spec, and --spec for a file of them."""
    sub.add_argument("--spec", help="YAML file with any of the following, by name (learning_rate: 1e-5); flags win")
    hints = get_type_hints(spec)
    for field in dataclasses.fields(spec):
        what = meanings.get(field.name, "")
        if field.default not in (None, dataclasses.MISSING):
            what += f" (default: {field.default})"
        # What was not given is not there: the spec file decides, or the default.
        options: dict[str, Any] = {"help": what.strip().replace("%", "%%"), "default": argparse.SUPPRESS}
        kinds = get_args(hints[field.name]) if isinstance(hints[field.name], types.UnionType) else (hints[field.name],)
        if bool in kinds:
            options["action"] = argparse.BooleanOptionalAction
        elif field.name == "draws":
            options["type"] = _number_or_auto
        elif field.name == "settings":
            options["type"] = _settings
        else:
            options["type"] = next(kind for kind in kinds if kind is not type(None))
        sub.add_argument(f"--{field.name.replace('_', '-')}", **options)


def _spec_of(arguments: argparse.Namespace, kind: type[T]) -> T:
    """The spec that the flags of `_spec_arguments` say."""
    from bench.files.spec import make_spec, read_spec

    fields = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    given = {name: getattr(arguments, name) for name in fields if hasattr(arguments, name)}
    if arguments.spec:
        return read_spec(arguments.spec, kind, given)
    return make_spec(kind, given, "command line")


def _settings(text: str) -> dict[str, float]:
    try:
        pairs = [(name.strip(), float(value)) for name, value in (pair.split("=") for pair in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected name=number, such as beta=0.1") from None
    if len(found := dict(pairs)) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: a setting occurs twice")
    return found


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


def _sweep_resource_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--concurrent", type=int, help="trials at once (default: as many as fit)")
    sub.add_argument("--cpus-per-trial", type=int, default=1, help="cores and threads (default: %(default)s)")
    sub.add_argument("--gpus-per-trial", type=float, help="default: 1 where the cluster has GPUs, else 0")


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


STORE_HELP = "folder or URI (s3://, gs://) of a result store"


def _results_arguments(results: argparse.ArgumentParser) -> None:
    results.set_defaults(parser=results)
    which = results.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=_Parser)

    def what(name: str, run: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        sub = which.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(run=run, parser=sub)
        return sub

    sub = what("add", _results_add, "put sweeps, runs and score files into a store")
    sub.add_argument("store", metavar="STORE", help=STORE_HELP)
    sub.add_argument("paths", nargs="+", metavar="PATH", help="folder of a sweep or a run, or a score file (.parquet)")
    sub.add_argument("--experiment", help="that they belong to (default: named like the folder or file)")

    sub = what("list", _results_list, "the tasks and experiments of a store, and files that cannot be read")
    _stores_argument(sub)

    sub = what("show", _results_show, "one run: metrics, spec, where it comes from, its samples")
    sub.add_argument("store", metavar="STORE", help=STORE_HELP)
    sub.add_argument("run_hash", metavar="RUN", help="hash of a run, or how it begins")

    sub = what("export", _results_export, "a table as CSV, JSON or LaTeX")
    _stores_argument(sub)
    sub.add_argument("--table", default="runs", help="runs, samples or scores (default: runs)")
    sub.add_argument("--format", default="csv", help="csv, json or latex (default: csv)")
    sub.add_argument("--out", help="file to write (default: the terminal)")


def _stores_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("stores", nargs="+", metavar="STORE", help=STORE_HELP)
    sub.add_argument("--task", help="only this one")
    sub.add_argument("--experiment", help="only this one")


def _add_to_store(root: str, paths: Sequence[str], experiment: str | None) -> None:
    from bench.results.collect import add, summary
    from bench.results.store import Store

    store = Store(root)
    print(f"{root}: {summary([add(store, path, experiment) for path in paths])}")


def _results_add(arguments: argparse.Namespace) -> None:
    _add_to_store(arguments.store, arguments.paths, arguments.experiment)


def _results_list(arguments: argparse.Namespace) -> None:
    from bench.results.export import list_lines, skipped_lines
    from bench.results.store import read_stores

    results = read_stores(arguments.stores, arguments.task, arguments.experiment)
    print("\n".join(list_lines(results)))
    for line in skipped_lines(results.skipped):
        print(line, file=sys.stderr)


def _results_show(arguments: argparse.Namespace) -> None:
    from bench.results.export import run_lines
    from bench.results.store import read_stores

    print("\n".join(run_lines(read_stores([arguments.store]), arguments.run_hash)))


def _results_export(arguments: argparse.Namespace) -> None:
    from bench.results.export import exported, skipped_lines
    from bench.results.store import read_stores
    from scoring.files import replacing

    results = read_stores(arguments.stores, arguments.task, arguments.experiment)
    text = exported(results, arguments.table, arguments.format)
    for line in skipped_lines(results.skipped):
        print(line, file=sys.stderr)
    if not arguments.out:
        print(text, end="")
        return
    try:
        with replacing(Path(arguments.out)) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {arguments.out}: cannot be written to ({error.strerror})") from error


def _leaderboard_arguments(sub: argparse.ArgumentParser) -> None:
    _stores_argument(sub)
    sub.add_argument("--out", required=True, help="folder for index.html, README.md, pictures and LaTeX tables")
    sub.add_argument(
        "--keep-conflicts",
        action="store_true",
        help="of stores that contradict each other show both: settings on boards of their own, of a run the first",
    )


def _leaderboard(arguments: argparse.Namespace) -> None:
    from bench.leaderboard.boards import boards
    from bench.leaderboard.write import write_leaderboard
    from bench.results.store import read_stores

    results = read_stores(arguments.stores, arguments.task, arguments.experiment)
    found, notes = boards(results, keep_conflicts=arguments.keep_conflicts)
    write_leaderboard(found, notes, arguments.out)
    for note in notes:
        print(note, file=sys.stderr)
    print(f"{sum(len(board.runs) for board in found)} runs on {len(found)} boards: {arguments.out}/index.html")


def _compare_arguments(sub: argparse.ArgumentParser) -> None:
    sides = "with --results an algorithm, such as NPO or NPO,learning_rate=1e-4; else a store"
    sub.add_argument("first", metavar="A", help=sides)
    sub.add_argument("second", metavar="B", help="the same; differences are B less A")
    sub.add_argument("--results", nargs="+", metavar="STORE", help=f"{STORE_HELP} that has both algorithms")
    sub.add_argument("--metric", help="only this one")
    sub.add_argument("--task", help="only this one")
    sub.add_argument("--experiment", help="only this one")


def _compare(arguments: argparse.Namespace) -> None:
    from bench.leaderboard.compare import compare, entries_side, store_side
    from bench.leaderboard.text import comparison_lines
    from bench.results.export import skipped_lines
    from bench.results.store import read_stores

    of = (arguments.task, arguments.experiment)
    if arguments.results:
        results = read_stores(arguments.results, *of)
        first, second = (entries_side(name, results) for name in (arguments.first, arguments.second))
        skipped = results.skipped
    else:
        both = [read_stores([name], *of) for name in (arguments.first, arguments.second)]
        names = (arguments.first, arguments.second)
        first, second = (store_side(name, each) for name, each in zip(names, both, strict=True))
        skipped = tuple(file for each in both for file in each.skipped)
    print("\n".join(comparison_lines(compare(first, second, arguments.metric), first, second)))
    for line in skipped_lines(skipped):
        print(line, file=sys.stderr)


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


def _sweep_resources_of(arguments: argparse.Namespace) -> SweepResources:
    from bench.jobs.resources import SweepResources

    return SweepResources(arguments.cpus_per_trial, arguments.gpus_per_trial, arguments.concurrent)


def _resource_arguments(sub: argparse.ArgumentParser) -> None:
    from bench.jobs.resources import Resources
    from scoring.pool import ENGINES

    sub.add_argument("--replicas", type=int, help="replicas of the model (default: as many as fit)")
    sub.add_argument(
        "--cpus-per-replica",
        type=int,
        default=Resources.cpus_per_replica,
        help="cores and threads (default: %(default)s)",
    )
    sub.add_argument("--gpus-per-replica", type=float, help="default: 1 where the cluster has GPUs, else 0")
    sub.add_argument(
        "--engine", default=Resources.engine, help=f"of a replica: {' | '.join(ENGINES)} (default: %(default)s)"
    )
    sub.add_argument("--tensor-parallel", type=int, help="processes, or GPUs, that share a vLLM replica")


def _resources_of(arguments: argparse.Namespace) -> Resources:
    from bench.jobs.resources import Resources

    return Resources(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Resources)})


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


def _number_or_auto(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers with commas between them") from None


def _score(arguments: argparse.Namespace) -> None:
    from bench.jobs.score import ScoreSpec, score
    from bench.jobs.summary import print_summary

    spec = ScoreSpec(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(ScoreSpec)})
    print_summary(score(spec, arguments.out, _resources_of(arguments), arguments.overwrite))


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


if __name__ == "__main__":
    raise SystemExit(main())
