"""The verbs on results: results, leaderboard, compare, show."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bench.cli.flags import Parser
from scoring.errors import UserError

if TYPE_CHECKING:
    from bench.results.open_unlearning import Said

STORE_HELP = "folder or URI (s3://, gs://) of a result store"


def watch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs and sweeps, under way or finished")
    parser.add_argument(
        "--serve",
        metavar="PORT",
        nargs="?",
        type=int,
        const=8787,
        help="show them on a page of this machine alone, with curves, at this port (8787 where none is named)",
    )


def watch(arguments: argparse.Namespace) -> None:
    from bench.watch.page import serve
    from bench.watch.show import watch

    with suppress(KeyboardInterrupt):
        if arguments.serve is None:
            watch(arguments.runs)
        else:
            serve(arguments.runs, arguments.serve)


def results_arguments(results: argparse.ArgumentParser) -> None:
    results.set_defaults(parser=results)
    verbs = results.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=Parser)

    def verb(name: str, run: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(run=run, parser=sub)
        return sub

    sub = verb(
        "add", _results_add, "put sweeps, runs, score files, answers and results of open-unlearning into a store"
    )
    sub.add_argument("store", metavar="STORE", help=STORE_HELP)
    sub.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="folder of a sweep or a run, a score file, an evaluation of a run's model (.parquet), or what "
        "open-unlearning's evaluation writes (TOFU_EVAL.json, MUSE_SUMMARY.json, ...)",
    )
    sub.add_argument("--experiment", help="the experiment that they belong to (default: named like the folder or file)")
    whose = "of open-unlearning's files (default: what their folder's name says"
    sub.add_argument("--algorithm", help=f"{whose}, as in tofu_MODEL_forget10_ALGORITHM)")
    sub.add_argument("--model", help=f"{whose})")
    sub.add_argument("--split", help=f"{whose})")
    sub.add_argument("--seed", type=int, help=f"{whose} after seed; else 0)")

    sub = verb("list", _results_list, "the tasks and experiments of a store, and files that cannot be read")
    _stores_argument(sub)

    sub = verb("show", _results_show, "one run: metrics, spec, where it comes from, its samples")
    sub.add_argument("store", metavar="STORE", help=STORE_HELP)
    sub.add_argument("run_hash", metavar="RUN", help="hash of a run, or how it begins")

    sub = verb("export", _results_export, "a table as CSV, JSON or LaTeX")
    _stores_argument(sub)
    sub.add_argument("--table", default="runs", help="runs, samples, scores or answers (default: runs)")
    sub.add_argument("--format", default="csv", help="csv, json or latex (default: csv)")
    sub.add_argument("--out", help="file to write (default: the terminal)")


def _stores_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("stores", nargs="+", metavar="STORE", help=STORE_HELP)
    sub.add_argument("--task", help="only this one")
    sub.add_argument("--experiment", help="only this one")


def add_to_store(root: str, paths: Sequence[str], experiment: str | None, said: Said | None = None) -> None:
    from bench.results.collect import add_all, summary
    from bench.results.store import Store

    store = Store(root)
    folders = [path for path in paths if Path(path).is_dir()]
    collected = add_all(store, paths, experiment, folders, said)
    for note in (note for each in collected for note in each.notes):
        print(note, file=sys.stderr)
    print(f"{root}: {summary(collected)}")


def _results_add(arguments: argparse.Namespace) -> None:
    from bench.results.open_unlearning import Said

    if (arguments.seed or 0) < 0:
        raise UserError(f"--seed is {arguments.seed}: expected a number of at least 0")
    said = Said(arguments.algorithm, arguments.model, arguments.split, arguments.seed)
    add_to_store(arguments.store, arguments.paths, arguments.experiment, said)


def _results_list(arguments: argparse.Namespace) -> None:
    from bench.results.export import LISTED, list_lines, skipped_lines
    from bench.results.store import read_stores

    results = read_stores(arguments.stores, arguments.task, arguments.experiment, LISTED)
    print("\n".join(list_lines(results)))
    for line in skipped_lines(results.skipped):
        print(line, file=sys.stderr)


def _results_show(arguments: argparse.Namespace) -> None:
    from bench.results.export import run_lines
    from bench.results.store import read_stores

    print("\n".join(run_lines(read_stores([arguments.store]), arguments.run_hash)))


def _results_export(arguments: argparse.Namespace) -> None:
    from bench.files.folders import unwritable
    from bench.results.export import exported, skipped_lines
    from bench.results.store import Store, read_stores
    from scoring.files import replacing

    if arguments.out:
        for root in arguments.stores:
            Store(root).refuse_inside(Path(arguments.out))
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
        raise unwritable(Path(arguments.out), error) from error


def leaderboard_arguments(sub: argparse.ArgumentParser) -> None:
    _stores_argument(sub)
    sub.add_argument("--out", required=True, help="folder for index.html, README.md, pictures and LaTeX tables")
    sub.add_argument(
        "--keep-conflicts",
        action="store_true",
        help="of stores that contradict each other show both: settings on boards of their own, of a run the first",
    )


def leaderboard(arguments: argparse.Namespace) -> None:
    from bench.boards.write import leaderboard

    boards, notes = leaderboard(
        arguments.stores,
        arguments.out,
        task=arguments.task,
        experiment=arguments.experiment,
        keep_conflicts=arguments.keep_conflicts,
    )
    for note in notes:
        print(note, file=sys.stderr)
    print(f"{sum(len(board.runs) for board in boards)} runs on {len(boards)} boards: {arguments.out}/index.html")


def compare_arguments(sub: argparse.ArgumentParser) -> None:
    sides = "with --results an algorithm, such as NPO or NPO,learning_rate=1e-4; else a store"
    sub.add_argument("first", metavar="A", help=sides)
    sub.add_argument("second", metavar="B", help="the same; differences are B less A")
    sub.add_argument("--results", nargs="+", metavar="STORE", help=f"{STORE_HELP} that has both algorithms")
    sub.add_argument("--metric", help="only this one")
    sub.add_argument("--task", help="only this one")
    sub.add_argument("--experiment", help="only this one")


def compare(arguments: argparse.Namespace) -> None:
    from bench.boards.compare import compare, entry_side, store_side
    from bench.boards.text import comparison_lines
    from bench.results.export import skipped_lines
    from bench.results.store import read_stores

    names = (arguments.first, arguments.second)
    restriction = (arguments.task, arguments.experiment)
    if arguments.results:
        results = read_stores(arguments.results, *restriction)
        first, second = (entry_side(name, results) for name in names)
        skipped = results.skipped
    else:
        stores = [read_stores([name], *restriction) for name in names]
        first, second = (store_side(name, results) for name, results in zip(names, stores, strict=True))
        skipped = tuple(file for results in stores for file in results.skipped)
    print("\n".join(comparison_lines(compare(first, second, arguments.metric), first, second)))
    for line in skipped_lines(skipped):
        print(line, file=sys.stderr)


def show_arguments(sub: argparse.ArgumentParser) -> None:
    from bench.answers.table import REMEMBERED
    from bench.answers.text import BY_ID, NUMBERS

    sub.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="files of `evaluate`, one for each unlearned model; and with them folders of `unlearn` and files of "
        "`score` or `difficulty` of the same samples",
    )
    sub.add_argument("--page", metavar="FILE.html", help="also write a page of all samples, to be sorted and filtered")
    sub.add_argument(
        "--against",
        choices=("before", "truth"),
        default="before",
        help="what the answers after unlearning are marked against (default: before; without --original the truth)",
    )
    sub.add_argument("--set", dest="set_name", metavar="NAME", help="only this set, such as forget or retain")
    sub.add_argument(
        "--where",
        metavar="CONDITION",
        action="append",
        default=[],
        help=f"only samples with such a number, e.g. 'rouge>0.5'; of {', '.join(NUMBERS)}; can be given again",
    )
    kept = sub.add_mutually_exclusive_group()
    kept.add_argument(
        "--remembered", action="store_true", help=f"only what the first model still answers (ROUGE-L from {REMEMBERED})"
    )
    kept.add_argument("--forgotten", action="store_true", help="only what it does not answer any more")
    sub.add_argument("--changed", action="store_true", help="only samples whose answer is another one than before")
    sub.add_argument(
        "--sort",
        metavar="NUMBER",
        help=f"{', '.join(NUMBERS)} (of the first model), or {BY_ID}: what is remembered best, or hardest to forget, "
        "first (default: the order of the data)",
    )
    sub.add_argument("--reverse", action="store_true", help="the other way round")
    sub.add_argument("--limit", type=int, default=10, metavar="N", help="samples at most; 0 shows all (default: 10)")


def show(arguments: argparse.Namespace) -> None:
    from bench.answers.marks import visible
    from bench.answers.page import write_page
    from bench.answers.table import answer_table
    from bench.answers.text import Choice, answer_lines, chosen, summary_lines

    if arguments.limit < 0:
        raise UserError(f"--limit is {arguments.limit}: expected a whole number from 0 (all)")
    table = answer_table(arguments.paths)
    remembered = True if arguments.remembered else False if arguments.forgotten else None
    choice = Choice(
        arguments.set_name,
        tuple(arguments.where),
        remembered,
        arguments.changed,
        arguments.sort,
        arguments.reverse,
    )
    rows = chosen(table, choice)
    if arguments.page:
        write_page(table, arguments.page, arguments.against)
    for note in table.notes:
        print(visible(note), file=sys.stderr)
    shown = rows[: arguments.limit or None]
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print("\n".join([*summary_lines(table), *answer_lines(table, shown, arguments.against, colour)]))
    more = "" if len(shown) == len(rows) else f"; --limit {arguments.limit}, 0 shows all"
    print(f"\n{len(shown)} of {len(rows)} samples{more}" + (f" -> {arguments.page}" if arguments.page else ""))
