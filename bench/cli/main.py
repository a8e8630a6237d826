"""The command line: `mrd-bench VERB`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bench.cli.flags import (
    USER_ERROR,
    _Parser,
)
from bench.cli.jobs import (
    _evaluate,
    _evaluate_arguments,
    _metrics,
    _plan,
    _plan_arguments,
    _score,
    _score_arguments,
    _sweep,
    _sweep_arguments,
    _tasks,
    _unlearn,
    _unlearn_arguments,
)
from bench.cli.programs import _benchmark_arguments, _demo, _demo_arguments, _reproduce, _reproduce_arguments
from bench.cli.results import _compare, _compare_arguments, _leaderboard, _leaderboard_arguments, _results_arguments
from scoring.errors import UserError

if TYPE_CHECKING:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code: 0 done, 2 the input must be mended, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = make_parser(next(iter(argv), None)).parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"mrd-bench: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("\nmrd-bench: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def make_parser(asked: str | None) -> argparse.ArgumentParser:
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


if __name__ == "__main__":
    raise SystemExit(main())
