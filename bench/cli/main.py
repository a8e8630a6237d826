"""The command line: `mrd-bench VERB`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.cli import jobs, programs, results
from bench.cli.flags import USER_ERROR, Parser
from scoring.errors import UserError
from scoring.plugins import installed_plugins, load_plugins, read_plugin
from scoring.settings import Naming, naming

INTERRUPTED = 130


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        name: on the command line.
        about: one line.
        arguments: adds its flags to a parser; None: it has none.
        run: does it; None: its sub-commands do.
    """

    name: str
    about: str
    arguments: Callable[[argparse.ArgumentParser], None] | None
    run: Callable[[argparse.Namespace], None] | None


VERBS = (
    Verb(
        "score",
        "score the Memory Removal Difficulty of every sample of a data set",
        jobs.score_arguments,
        jobs.score,
    ),
    Verb(
        "difficulty",
        "forecast how many updates forgetting takes, beside MRD and other measures; --truth finds out",
        jobs.difficulty_arguments,
        jobs.difficulty,
    ),
    Verb(
        "unlearn",
        "make a model forget samples, easy or hard ones first, or as they come",
        jobs.unlearn_arguments,
        jobs.unlearn,
    ),
    Verb(
        "evaluate",
        "measure the metrics of a task, with intervals and reference models",
        jobs.evaluate_arguments,
        jobs.evaluate,
    ),
    Verb(
        "sweep",
        "run the cross of algorithms, sample selections, seeds and settings, on Ray Tune or in this process",
        jobs.sweep_arguments,
        jobs.sweep,
    ),
    Verb(
        "reproduce",
        "answer the paper's questions: a table, a picture and a paragraph each",
        programs.reproduce_arguments,
        programs.reproduce,
    ),
    Verb("results", "put results into a store, list, show and export them", results.results_arguments, None),
    Verb(
        "leaderboard",
        "rank what stores hold, raw and at equal difficulty, on one page",
        results.leaderboard_arguments,
        results.leaderboard,
    ),
    Verb(
        "compare",
        "the paired difference of two algorithms, or two stores, at equal selections and seeds",
        results.compare_arguments,
        results.compare,
    ),
    Verb("tasks", "list the tasks: what is forgotten, what is kept, where the data are", None, jobs.tasks),
    Verb("metrics", "list the metrics: what they say, and where they are from", None, jobs.metrics),
    Verb("measures", "list the measures of difficulty: what they say, what they cost", None, jobs.measures),
    Verb(
        "demo",
        "score and unlearn the embedded task under the embedded model; writes a page of results",
        programs.demo_arguments,
        programs.demo,
    ),
    Verb("plan", "say what a job will take: hours, memory, cost, and what limits it", jobs.plan_arguments, jobs.plan),
    Verb("benchmark", "measure speed, side by side in one run", programs.benchmark_arguments, None),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code: 0 done, 2 the input must be mended, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = make_parser(next(iter(argv), None)).parse_args(argv)
    try:
        with naming(Naming(flags=True)):
            load_plugins([*installed_plugins(), *map(read_plugin, arguments.plugin)])
            arguments.run(arguments)
    except UserError as error:
        print(f"mrd-bench: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("\nmrd-bench: interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
    return 0


def make_parser(verb_name: str | None) -> argparse.ArgumentParser:
    """The parser, with the flags of one verb alone: those of all would load everything that any of them needs."""
    parser = Parser(prog="mrd-bench", description="How hard is each sample to unlearn? Measured on Ray.")
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for verb in VERBS:
        sub = parsers.add_parser(verb.name, help=verb.about, description=verb.about, allow_abbrev=False)
        sub.set_defaults(run=verb.run, parser=sub)
        sub.add_argument(
            "--plugin",
            metavar="FILE.py",
            action="append",
            default=[],
            help="a file that adds algorithms, orders, metrics or tasks; can be given again (see docs/extending.md)",
        )
        if verb.arguments and verb.name == verb_name:
            verb.arguments(sub)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
