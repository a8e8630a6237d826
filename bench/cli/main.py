"""The command line: `mrd-bench VERB`."""

from __future__ import annotations

import argparse
import errno
import os
import select
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from bench.cli import jobs, programs, results
from bench.cli.flags import USER_ERROR, Parser
from scoring.errors import UserError, first_line, one_line
from scoring.plugins import installed_plugins, load_plugins, read_plugin
from scoring.progress import quiet_libraries
from scoring.settings import Naming, naming

INTERRUPTED, TERMINATED, NOBODY_READS = 130, 143, 141  # as shells count: 128 and the signal's number
OUR_FAULT = 70  # EX_SOFTWARE of sysexits.h
# What the file system refuses at any time, and no check beforehand can rule out.
REFUSED_BY_FILE_SYSTEM = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "ENAMETOOLONG", "ENOSPC", "EDQUOT", "EROFS", "EIO", "ELOOP", "ESTALE", "EMFILE")
}


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        name: on the command line.
        about: one line.
        arguments: adds its flags to a parser; None: it has none.
        run: does it; None: its sub-commands do.
        computes: in this process, if it is asked to.
    """

    name: str
    about: str
    arguments: Callable[[argparse.ArgumentParser], None] | None
    run: Callable[[argparse.Namespace], None] | None
    computes: bool = False


VERBS = (
    Verb(
        "score",
        "score the Memory Removal Difficulty of every sample of a data set",
        jobs.score_arguments,
        jobs.score,
        computes=True,
    ),
    Verb(
        "difficulty",
        "forecast how many updates forgetting takes, beside MRD and other measures; --truth finds out",
        jobs.difficulty_arguments,
        jobs.difficulty,
        computes=True,
    ),
    Verb(
        "train",
        "fine-tune a model on a task or a data file, until it knows it by heart; with and without a forget set",
        jobs.train_arguments,
        jobs.train,
        computes=True,
    ),
    Verb(
        "unlearn",
        "make a model forget samples, easy or hard ones first, or as they come",
        jobs.unlearn_arguments,
        jobs.unlearn,
        computes=True,
    ),
    Verb(
        "evaluate",
        "measure the metrics of a task, with intervals and reference models",
        jobs.evaluate_arguments,
        jobs.evaluate,
        computes=True,
    ),
    Verb(
        "attack",
        "attack a model that has forgotten: relearning, coarser weights, many answers, other questions, noise",
        jobs.attack_arguments,
        jobs.attack,
        computes=True,
    ),
    Verb(
        "sweep",
        "run the cross of algorithms, sample selections, seeds and settings, on Ray Tune or in this process",
        jobs.sweep_arguments,
        jobs.sweep,
        computes=True,
    ),
    Verb(
        "reproduce",
        "answer the paper's questions: a table, a picture and a paragraph each",
        programs.reproduce_arguments,
        programs.reproduce,
        computes=True,
    ),
    Verb(
        "watch",
        "show runs and sweeps as they go, in the terminal or on a local page",
        results.watch_arguments,
        results.watch,
    ),
    Verb(
        "show",
        "what a model answered before and after unlearning, side by side, here or on a page",
        results.show_arguments,
        results.show,
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
    Verb(
        "spec",
        "print the spec that made a run, a sweep or a file, as its command takes it",
        jobs.spec_arguments,
        jobs.spec,
    ),
    Verb("benchmark", "measure speed, side by side in one run", programs.benchmark_arguments, None),
)


class Terminated(KeyboardInterrupt):
    """SIGTERM: all that cleans up after an interrupt cleans up after it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Returns:
        The exit code: 0 done, 2 the input must be mended, 70 a fault of this program, 130 interrupted, 141 nobody reads
        what is printed, 143 terminated.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        with _terminable(), naming(Naming(flags=True)):
            arguments = make_parser(next(iter(argv), None)).parse_args(argv)
            quiet_libraries()
            with _threads(getattr(arguments, "threads", None)):
                load_plugins([*installed_plugins(), *map(read_plugin, arguments.plugin)])
                arguments.run(arguments)
            sys.stdout.flush()
    except SystemExit:  # of --help, whose reader may have gone too
        if _nobody_reads():
            return NOBODY_READS
        raise
    except UserError as error:
        return _ended(USER_ERROR, f"mrd-bench: error: {one_line(str(error))}")
    except Terminated:
        return _ended(TERMINATED, "\nmrd-bench: terminated; the same command continues")
    except KeyboardInterrupt:
        return _ended(INTERRUPTED, "\nmrd-bench: interrupted; the same command continues")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return NOBODY_READS
        if isinstance(error, OSError) and error.errno in REFUSED_BY_FILE_SYSTEM:
            where = f"{error.filename}: " if error.filename else ""
            return _ended(USER_ERROR, one_line(f"mrd-bench: error: {where}{error.strerror}"))
        return _ended(OUR_FAULT, one_line(f"mrd-bench: {_confession(error, argv)}"))
    return 0


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Within the context, compute with so many threads in this process; who called `main` gets theirs back."""
    if count is None:
        yield
        return
    cores = os.cpu_count() or 1
    if not 1 <= count <= cores:
        raise UserError(f"--threads is {count}: expected a whole number from 1 to {cores}, the cores of this machine")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ended(code: int, line: str) -> int:
    with suppress(BrokenPipeError):
        print(line, file=sys.stderr)
    return code


def _nobody_reads() -> bool:
    """Whether the reader of standard output has gone, as `head` does; nothing more is written there then."""
    try:
        out = sys.stdout.fileno()
    except (OSError, ValueError):  # no file: a test, or a notebook, reads
        return False
    poll = select.poll()
    poll.register(out, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    # Else Python would try once more when it ends, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return True


def _confession(error: Exception, argv: Sequence[str]) -> str:
    """What to say of an error that nobody has foreseen; its traceback goes to a file."""
    what = f"{type(error).__name__}: {first_line(error)}"
    text = f"mrd-bench {shlex.join(argv)}\n\n{''.join(traceback.format_exception(error))}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="mrd-bench-fault-", suffix=".txt", delete=False
        ) as file:
            file.write(text)
    except OSError:
        return f"a fault of mrd-bench itself ({what}); its traceback could not be saved"
    return f"a fault of mrd-bench itself ({what}); please report it with {file.name}"


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the context SIGTERM ends work as an interrupt does; only the main thread can arrange that."""

    def end(*_: object) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        if verb.computes:
            sub.add_argument(
                "--threads",
                metavar="N",
                type=int,
                help="threads of what is computed in this process (default: as many as there are cores); those of "
                "replicas and workers on Ray have flags of their own",
            )
        if verb.arguments and verb.name == verb_name:
            verb.arguments(sub)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
