"""Flags that several verbs share, and how they become specs."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from bench.jobs.resources import Resources, SweepResources
from bench.tasks import TASKS
from scoring.errors import unknown_name

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


def _sweep_resource_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--concurrent", type=int, help="trials at once (default: as many as fit)")
    sub.add_argument("--cpus-per-trial", type=int, default=1, help="cores and threads (default: %(default)s)")
    sub.add_argument("--gpus-per-trial", type=float, help="default: 1 where the cluster has GPUs, else 0")


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
